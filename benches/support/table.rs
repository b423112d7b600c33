//! A markdown table.

/// The table, its columns as wide as their widest cell; the first `left` ones to the left, the others to the right.
pub fn markdown(left: usize, header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(&widths).enumerate().map(|(i, (cell, &width))| {
            if i < left {
                format!("| {cell:<width$} ")
            } else {
                format!("| {cell:>width$} ")
            }
        });
        cells.collect::<String>() + "|\n"
    };
    let mut table = line(&mut header.iter().copied());
    for (i, width) in widths.iter().enumerate() {
        table += &if i < left { format!("|{:-<1$}", "", width + 2) } else { format!("|{:->1$}:", "", width + 1) };
    }
    table += "|\n";
    for row in rows {
        table += &line(&mut row.iter().map(String::as_str));
    }
    table
}
