//! Filters: bdevs on others that show some of their I/O to Python, the class `PythonFilterRing`.
//!
//! How it works. As a Python bdev in this process ([`desk`](crate::desk)), but a request comes before the base has it or after: `fetch` groups them by the methods
//! "before" and "after". What is shown can be changed at any time.

use std::sync::{Arc, Weak};

use pyo3::prelude::*;
use pyo3::types::PyList;
use qpair_bdev::Op;
use qpair_bdev::python::{FilterBdev, Interest};

use crate::bdev::{OPS, parse_uuid};
use crate::core::lock;
use crate::desk::{Desk, FETCH_MAX};
use crate::engine::Engine;
use crate::events::News;
use crate::held::Held;
use crate::pyring::memory_of;
use crate::values::{Failure, Number};

/// First block and number of blocks.
type Ranges = Option<Vec<(Number, Number)>>;

fn interest(before: &[String], after: &[String], ranges: Ranges) -> Result<Interest, Failure> {
    let named = |field: &str, names: &[String]| -> Result<Vec<Op>, Failure> {
        let op = |name: &String| {
            let found = OPS.iter().find(|(known, op)| known == name && *op != Op::Reset);
            found.map(|(_, op)| *op).ok_or_else(|| Failure::invalid(field, name, "read, write, flush, unmap or write_zeroes"))
        };
        names.iter().map(op).collect()
    };
    let range = |(first, count): (Number, Number)| Ok((first.u64("ranges")?, count.u64("ranges")?));
    let ranges = ranges.map(|ranges| ranges.into_iter().map(range).collect::<Result<Vec<_>, Failure>>()).transpose()?;
    Ok(Interest::new(&named("before", before)?, &named("after", after)?, ranges.as_deref())?)
}

/// The engine's side of a filter.
#[pyclass(frozen, module = "qpair._engine")]
pub struct PythonFilterRing {
    id: u64,
    /// Gone when the bdev is.
    filter: Weak<FilterBdev>,
    held: Held<Arc<Desk>>,
}

#[pymethods]
impl PythonFilterRing {
    #[getter]
    fn id(&self) -> u64 {
        self.id
    }

    /// Buffers that Python still held when it was done with their request, ever.
    #[getter]
    fn buffers_kept(&self) -> u64 {
        self.held.parts().1.kept()
    }

    #[pyo3(signature = (max_requests=Number::of(64)), text_signature = "($self, max_requests=64)")]
    fn fetch<'py>(&self, py: Python<'py>, max_requests: Number) -> PyResult<Bound<'py, PyList>> {
        let desk = self.held.server()?;
        let max = max_requests.within("max_requests", 1..=FETCH_MAX)?;
        desk.fetch(py, max as usize)
    }

    #[pyo3(signature = (requests, errno=Number::of(0)), text_signature = "($self, requests, errno=0)")]
    fn finish(&self, requests: &Bound<'_, PyAny>, errno: Number) -> PyResult<()> {
        self.held.server()?.finish_all(requests, errno)
    }

    #[pyo3(signature = (*, before, after, ranges=None), text_signature = "($self, *, before, after, ranges=None)")]
    fn show(&self, before: Vec<String>, after: Vec<String>, ranges: Ranges) -> PyResult<()> {
        self.held.server()?;
        let interest = interest(&before, &after, ranges)?;
        if let Some(filter) = self.filter.upgrade() {
            filter.show(interest);
        }
        Ok(())
    }

    fn close(&self) -> PyResult<()> {
        self.held.close()
    }
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (name, base, *, before, after, ranges=None, depth=Number::of(128), max_io_bytes=Number::of(131_072), uuid=None),
        text_signature = "($self, name, base, *, before, after, ranges=None, depth=128, max_io_bytes=131072, uuid=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_filter_create(
        &self,
        name: &str,
        base: &str,
        before: Vec<String>,
        after: Vec<String>,
        ranges: Ranges,
        depth: Number,
        max_io_bytes: Number,
        uuid: Option<&str>,
    ) -> PyResult<PythonFilterRing> {
        let (core, draft) = self.begin()?;
        let id = draft.number();
        let (depth, max_io_bytes) = (depth.u32("depth")?, max_io_bytes.u32("max_io_bytes")?);
        let (uuid, interest) = (parse_uuid(uuid)?, interest(&before, &after, ranges)?);
        let news = core.outbox.clone();
        let on_work = Box::new(move || news.push(News::PythonBdev { ring: id }));
        let made = FilterBdev::new(&core.registry, name, base, uuid, depth, max_io_bytes, interest, on_work);
        let (filter, ring) = made.map_err(Failure::from)?;
        let block_size = qpair_bdev::Device::info(&*filter).block_size;
        let desk = Desk::new(Box::new(ring.clone()), memory_of(&ring)?, depth, ring.stride(), block_size)?;
        let weak = Arc::downgrade(&filter);
        core.registry.register(filter).map_err(Failure::from)?;
        lock(&core.rings).push(Arc::downgrade(&ring));
        Ok(PythonFilterRing { id, filter: weak, held: Held::new(ring, desk) })
    }
}
