//! What crosses between the two languages besides calls: failures, checked integers, reply values.
//!
//! A [`Failure`] is made anywhere, also on reactor threads; it becomes the exception `EngineError` only where Python
//! looks at it. Integers are taken as Python has them and checked here, so that -1 and 2**70 are refused by name and
//! limit like any other value.

use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt};
use qpair_bdev::histogram::Histogram;
use qpair_bdev::measures::Report;
use qpair_bdev::trace::Page;
use qpair_bdev::{BdevError, Status};
use qpair_memory::MemoryError;
use qpair_perf::Report as PerfReport;

use crate::pool::{Pooled, ReadView};
use crate::{measures, trace};

pyo3::create_exception!(
    qpair._engine,
    EngineError,
    PyOSError,
    "``errno`` is positive, ``strerror`` names the field, the value and the limit."
);

/// Why something was refused or failed: a positive errno and one sentence.
#[derive(Clone, Debug)]
pub struct Failure {
    pub errno: i32,
    pub text: String,
}

impl Failure {
    pub fn new(errno: i32, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    /// A parameter outside its limits.
    pub fn invalid(field: &str, value: impl fmt::Display, limit: impl fmt::Display) -> Self {
        Self::new(libc::EINVAL, format!("Invalid argument: {field} {value}: {limit}"))
    }

    /// What the operating system said when `what` was tried.
    pub fn os(what: &str, error: &std::io::Error) -> Self {
        Self::new(error.raw_os_error().unwrap_or(libc::EIO), format!("{what}: {error}"))
    }
}

impl From<BdevError> for Failure {
    fn from(error: BdevError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        BdevError::from(error).into()
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::new(status.to_errno(), status.to_string())
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        EngineError::new_err((failure.errno, failure.text))
    }
}

/// A Python integer of any size, to be checked by name. Beyond 128 bits it counts as the nearest that fits.
#[derive(Clone, Copy, Debug)]
pub struct Number(i128);

impl FromPyObject<'_, '_> for Number {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        if let Ok(value) = object.extract::<i128>() {
            return Ok(Self(value));
        }
        // Not an integer at all (TypeError), or one that nothing here accepts anyway.
        let integer = object.call_method0("__index__")?;
        let negative = integer.cast::<PyInt>()?.lt(0)?;
        Ok(Self(if negative { i128::MIN } else { i128::MAX }))
    }
}

impl Number {
    /// The default of an optional parameter.
    pub const fn of(value: u32) -> Self {
        Self(value as i128)
    }

    pub fn within(self, field: &str, limits: RangeInclusive<u64>) -> Result<u64, Failure> {
        match u64::try_from(self.0) {
            Ok(value) if limits.contains(&value) => Ok(value),
            _ => Err(Failure::invalid(field, self.0, format_args!("{} to {}", limits.start(), limits.end()))),
        }
    }

    pub fn u64(self, field: &str) -> Result<u64, Failure> {
        self.within(field, 0..=u64::MAX)
    }

    pub fn u32(self, field: &str) -> Result<u32, Failure> {
        Ok(self.within(field, 0..=u64::from(u32::MAX))? as u32)
    }

    /// Milliseconds as nanoseconds; a week at most, so that sums of deadlines cannot overflow.
    pub fn deadline_ns(self, field: &str) -> Result<u64, Failure> {
        Ok(self.within(field, 0..=7 * 86_400_000)? * 1_000_000)
    }
}

/// Bytes of a finished read, still where the device put them: copied on the thread that asks, not on a reactor, or looked at in place.
pub struct ReadData {
    pub memory: Pooled,
    pub data: usize,
    /// How many bytes behind the data are metadata; given apart if they were asked for.
    pub metadata: Option<usize>,
    pub view: bool,
}

impl ReadData {
    fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let Self { memory, data, metadata, view } = self;
        let region = memory.region();
        let memory = Arc::new(memory);
        let piece = |from: usize, length: usize| -> PyResult<Bound<'_, PyAny>> {
            if view {
                return Ok(ReadView::memoryview(py, memory.clone(), from, length)?.into_any());
            }
            let copied = PyBytes::new_with(py, length, |into| region.read(from as u64, into).map_err(|error| Failure::from(error).into()))?;
            Ok(copied.into_any())
        };
        let first = piece(0, data)?;
        match metadata {
            None => Ok(first.unbind()),
            Some(length) => Ok((first, piece(data, length)?).into_pyobject(py)?.into_any().unbind()),
        }
    }
}

/// What a reply carries. Made on reactor threads, so nothing of Python's is in it.
pub enum Value {
    Nothing,
    Integer(u64),
    Text(String),
    Read(ReadData),
    Statistics(Vec<(String, Report)>),
    Histogram(Box<Histogram>),
    Trace(Vec<Page>),
    Perf(Box<PerfReport>),
    /// A descriptor that is Python's from then on, and the size of what it maps.
    Inflight(OwnedFd, u64),
}

impl Value {
    pub fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(match self {
            Self::Nothing => py.None(),
            Self::Integer(number) => number.into_pyobject(py)?.into_any().unbind(),
            Self::Text(text) => text.into_pyobject(py)?.into_any().unbind(),
            Self::Read(data) => data.into_python(py)?,
            Self::Perf(report) => crate::perf::report_dict(py, &report)?.into_any().unbind(),
            Self::Inflight(fd, size) => (fd.into_raw_fd(), size, 0).into_pyobject(py)?.into_any().unbind(),
            Self::Trace(pages) => {
                let dicts = pages.iter().map(|page| trace::page_dict(py, page)).collect::<PyResult<Vec<_>>>()?;
                dicts.into_pyobject(py)?.into_any().unbind()
            }
            Self::Histogram(histogram) => measures::histogram_dict(py, &histogram)?.into_any().unbind(),
            Self::Statistics(list) => {
                let dicts = list.iter().map(|(name, report)| measures::report_dict(py, name, report)).collect::<PyResult<Vec<_>>>()?;
                dicts.into_pyobject(py)?.into_any().unbind()
            }
        })
    }
}
