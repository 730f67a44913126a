//! Filters: bdevs on others that show some of their I/O to Python, the class `PythonFilterRing`.
//!
//! How it works. As a Python bdev in this process ([`desk`](crate::desk)), but a request comes before the base has it or after: `fetch` groups them by the methods
//! "before" and "after". What is shown can be changed at any time.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Weak};

use pyo3::prelude::*;
use pyo3::types::PyList;
use qpair_bdev::Op;
use qpair_bdev::python::{FilterBdev, Interest, Ring};

use crate::bdev::{OPS, parse_uuid};
use crate::core::lock;
use crate::desk::{Desk, FETCH_MAX};
use crate::engine::{Engine, not_forked};
use crate::events::News;
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
    pid: u32,
    /// Gone when the bdev is.
    filter: Weak<FilterBdev>,
    ring: ManuallyDrop<Arc<Ring>>,
    desk: ManuallyDrop<Arc<Desk>>,
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
        self.desk.kept()
    }

    #[pyo3(signature = (max_requests=Number::of(64)), text_signature = "($self, max_requests=64)")]
    fn fetch<'py>(&self, py: Python<'py>, max_requests: Number) -> PyResult<Bound<'py, PyList>> {
        not_forked(self.pid)?;
        let max = max_requests.within("max_requests", 1..=FETCH_MAX)?;
        self.desk.fetch(py, max as usize)
    }

    #[pyo3(signature = (requests, errno=Number::of(0)), text_signature = "($self, requests, errno=0)")]
    fn finish(&self, requests: &Bound<'_, PyAny>, errno: Number) -> PyResult<()> {
        not_forked(self.pid)?;
        self.desk.finish_all(requests, errno)
    }

    #[pyo3(signature = (*, before, after, ranges=None), text_signature = "($self, *, before, after, ranges=None)")]
    fn show(&self, before: Vec<String>, after: Vec<String>, ranges: Ranges) -> PyResult<()> {
        not_forked(self.pid)?;
        let interest = interest(&before, &after, ranges)?;
        if let Some(filter) = self.filter.upgrade() {
            filter.show(interest);
        }
        Ok(())
    }

    fn close(&self) -> PyResult<()> {
        not_forked(self.pid)?;
        self.ring.close();
        Ok(())
    }
}

impl Drop for PythonFilterRing {
    fn drop(&mut self) {
        if not_forked(self.pid).is_err() {
            return;
        }
        // Nobody is left who could look at anything.
        self.ring.close();
        // SAFETY: each is taken once, here; `self` is not used afterwards.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.desk);
        }
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
        Ok(PythonFilterRing { id, pid: std::process::id(), filter: weak, ring: ManuallyDrop::new(ring), desk: ManuallyDrop::new(desk) })
    }
}
