//! Limits and marks of a logarithmic axis.

/// The range from the last to the first of 1, 2 and 5 times a power of ten that encloses the values with a little room,
/// and where to put marks.
pub fn logarithmic(values: impl IntoIterator<Item = f64> + Clone) -> (std::ops::Range<f64>, Vec<f64>) {
    let (mut low, mut high) = (f64::INFINITY, 0f64);
    for value in values {
        (low, high) = (low.min(value), high.max(value));
    }
    let steps = |mantissas: &'static [f64]| {
        (-3..=9).flat_map(move |power| mantissas.iter().map(move |mantissa| mantissa * 10f64.powi(power)))
    };
    let low = steps(&[1., 2., 5.]).rfind(|step| *step <= low / 1.05).unwrap_or(low);
    let high = steps(&[1., 2., 5.]).find(|step| *step >= high * 1.05).unwrap_or(high);
    let fine: &[f64] = if high / low > 20. { &[1., 2., 5.] } else { &[1., 1.2, 1.5, 2., 2.5, 3., 4., 5., 6., 7., 8.] };
    (low..high, steps(fine).filter(|step| (low..=high).contains(step)).collect())
}
