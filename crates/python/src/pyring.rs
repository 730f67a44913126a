//! Bdevs whose I/O Python does in this process: the class `PythonBdevRing` over the ring of the bdev layer.
//!
//! How it works, and what is promised of buffers, stands in [`desk`](crate::desk). A forked child is refused; its copy of the ring does nothing when dropped.
//!
//! Errors. An I/O that the engine gave up meanwhile (abort, removal) is completed in vain, which is no error.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyList;
use qpair_bdev::python::{PythonBdev, Ring, Work};

use crate::bdev::parse_uuid;
use crate::core::lock;
use crate::desk::{Desk, FETCH_MAX, Source};
use crate::engine::Engine;
use crate::events::News;
use crate::held::Held;
use crate::values::{Failure, Number};

impl Source for Arc<Ring> {
    fn fetch(&self, max: usize) -> Vec<Work> {
        Ring::fetch(self, max)
    }

    fn complete(&self, batch: &[(u32, i32)]) {
        // Each comes from `fetch` and is ended once, so none is refused.
        let _ = self.complete_all(batch);
    }
}

/// The memfd that the buffers of a ring lie in.
pub fn memory_of(ring: &Ring) -> Result<BorrowedFd<'_>, Failure> {
    ring.mapping().fd().ok_or_else(|| Failure::new(libc::EBADF, "the ring's memory has no descriptor"))
}

/// The engine's side of a bdev whose I/O Python does.
#[pyclass(frozen, module = "qpair._engine")]
pub struct PythonBdevRing {
    id: u64,
    held: Held<Arc<Desk>>,
}

#[pymethods]
impl PythonBdevRing {
    #[getter]
    fn id(&self) -> u64 {
        self.id
    }

    /// Buffers that Python still held when their request was completed, ever.
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

    fn close(&self) -> PyResult<()> {
        self.held.close()
    }
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (name, *, num_blocks, block_size, depth=Number::of(128), max_io_bytes=Number::of(131_072), uuid=None, readonly=false),
        text_signature = "($self, name, *, num_blocks, block_size, depth=128, max_io_bytes=131072, uuid=None, readonly=False)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_python_create(
        &self,
        name: &str,
        num_blocks: Number,
        block_size: Number,
        depth: Number,
        max_io_bytes: Number,
        uuid: Option<&str>,
        readonly: bool,
    ) -> PyResult<PythonBdevRing> {
        // The token is never sent: the ring takes its number, and the call answers at once.
        let (core, draft) = self.begin()?;
        let id = draft.number();
        let (num_blocks, block_size) = (num_blocks.u64("num_blocks")?, block_size.u32("block_size")?);
        let (depth, max_io_bytes) = (depth.u32("depth")?, max_io_bytes.u32("max_io_bytes")?);
        let news = core.outbox.clone();
        let on_work = Box::new(move || news.push(News::PythonBdev { ring: id }));
        let made = PythonBdev::new(name, num_blocks, block_size, depth, max_io_bytes, parse_uuid(uuid)?, readonly, on_work);
        let (device, ring) = made.map_err(Failure::from)?;
        let desk = Desk::new(Box::new(ring.clone()), memory_of(&ring)?, depth, ring.stride(), block_size)?;
        core.registry.register(device).map_err(Failure::from)?;
        lock(&core.rings).push(Arc::downgrade(&ring));
        Ok(PythonBdevRing { id, held: Held::new(ring, desk) })
    }
}
