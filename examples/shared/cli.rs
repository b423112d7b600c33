//! Devices, dtypes and errors on the command line.

use anyhow::{anyhow, bail, Result};
use candle_core::{DType, Device};
use clap::error::ErrorKind;
use clap::Parser;
use std::fmt;
use std::process::ExitCode;
use std::str::FromStr;

/// Runs a program whose `run` says whether all is as it should be: exit code 0 if so, 1 if not, and 2 with one line on
/// the error stream if the input is wrong.
pub fn run<O: Parser>(run: impl FnOnce(&O) -> Result<bool>) -> ExitCode {
    match parse::<O>().and_then(|options| options.map_or(Ok(true), |options| run(&options))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {}", first_line(&format!("{error:#}")));
            ExitCode::from(2)
        }
    }
}

/// The options given; `None` if it was help that was asked for, and has been printed.
///
/// # Errors
/// A wrong option, in one line.
fn parse<O: Parser>() -> Result<Option<O>> {
    match O::try_parse() {
        Ok(options) => Ok(Some(options)),
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            error.print()?;
            Ok(None)
        }
        Err(error) => {
            let text = error.to_string();
            let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            Err(anyhow!("{} (--help lists the options)", lines.join(" ").trim_start_matches("error: ")))
        }
    }
}

/// What an error says, without the backtrace that candle writes below it when asked to.
pub fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

/// One of the dtypes that the ops take.
///
/// # Errors
/// Another dtype.
pub fn dtype(name: &str) -> Result<DType> {
    match name.parse() {
        Ok(dtype @ (DType::F32 | DType::F16 | DType::BF16 | DType::F64)) => Ok(dtype),
        _ => bail!("expected f32, f16, bf16 or f64"),
    }
}

/// A device to be opened.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    Cpu,
    Cuda(usize),
}

impl FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.parse::<usize>().is_ok() => Ok(Self::Cuda(ordinal.parse()?)),
            _ => bail!("expected cpu, cuda or cuda:N"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Place {
    /// The device.
    ///
    /// # Errors
    /// A GPU that is not there, or in a build without CUDA.
    pub fn open(self) -> Result<Device> {
        self.open_by(Device::new_cuda)
    }

    /// The device, a GPU, so that what runs on it can be captured in CUDA graphs: with a stream of its own. One thread is to
    /// use it, and no other device of the same GPU beside it.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), and the CPU.
    pub fn open_to_capture(self) -> Result<Device> {
        let device = self.open_by(Device::new_cuda_with_stream)?;
        if !device.is_cuda() {
            bail!("--graph: expected a CUDA device, found {self}");
        }
        // candle's events between streams cannot be captured.
        #[cfg(feature = "cuda")]
        // SAFETY: there is one stream, on which all that is launched or freed comes in order.
        unsafe {
            device.as_cuda_device()?.disable_event_tracking();
        }
        Ok(device)
    }

    fn open_by(self, cuda: impl FnOnce(usize) -> candle_core::Result<Device>) -> Result<Device> {
        let ordinal = match self {
            Self::Cpu => return Ok(Device::Cpu),
            Self::Cuda(ordinal) => ordinal,
        };
        if !candle_core::utils::cuda_is_available() {
            bail!("--device {self}: this program was built without CUDA");
        }
        cuda(ordinal).map_err(|error| anyhow!("--device {self}: {}", first_line(&error.to_string())))
    }
}
