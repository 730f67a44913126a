//! Bdevs whose I/O Python does: the class `PythonBdevRing` over the ring of the bdev layer.
//!
//! How it works. `fetch` gives each request with data a buffer out of this ring's own pool, behind a memoryview:
//! writable for a read, read-only for a write. A write's data are copied in at `fetch`, a read's out at `complete`, so
//! what Python does to its view afterwards reaches nobody. A pooled buffer is lent out again only when its request is
//! complete *and* the last view of it is gone: the view owns a share of it. Neither the engine's own bounce buffers
//! nor a guest's memory are ever seen by Python.
//!
//! Errors. `ValueError` for a slot that is not with Python; an errno outside 0 to 4095 is refused. An I/O that the engine
//! gave up meanwhile (removal) is completed in vain, which is no error.
//!
//! Limits: those of [`qpair_bdev::python`]; the pool keeps as many buffers as the ring is deep. A program that hoards
//! views pays for them with memory of its own.

use std::collections::HashMap;
use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex};

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyMemoryView};
use qpair_bdev::Op;
use qpair_bdev::python::{PythonBdev, Ring, Work};
use qpair_memory::{Mapping, Pages, Region};

use crate::bdev::{OPS, parse_uuid};
use crate::core::lock;
use crate::engine::{Engine, not_forked};
use crate::events::News;
use crate::values::{Failure, Number};

/// Requests of one `fetch`.
const FETCH_MAX: u64 = 4096;
const ERRNO_MAX: u64 = 4095;

/// Buffers of one size that nobody looks at.
struct Pool {
    free: Mutex<Vec<Arc<Mapping>>>,
    bytes: usize,
    kept: usize,
}

impl Pool {
    fn lend(self: &Arc<Self>) -> Result<Arc<Lease>, Failure> {
        let kept = lock(&self.free).pop();
        let mapping = match kept {
            Some(mapping) => mapping,
            None => Mapping::anonymous(self.bytes, Pages::Normal)?,
        };
        Ok(Arc::new(Lease { mapping, pool: self.clone() }))
    }
}

/// One buffer out of the pool, shared by its request and its views.
struct Lease {
    mapping: Arc<Mapping>,
    pool: Arc<Pool>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut free = lock(&self.pool.free);
        if free.len() < self.pool.kept {
            free.push(self.mapping.clone());
        }
    }
}

/// What a memoryview is made over. Lives as long as any view of it.
#[pyclass(frozen, module = "qpair._engine")]
struct BounceBuffer {
    lease: Arc<Lease>,
    length: usize,
    readonly: bool,
}

#[pymethods]
impl BounceBuffer {
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let region = Region::new(this.lease.mapping.clone());
        let start = region.pointer(0, this.length as u64).map_err(Failure::from)?;
        // SAFETY: `view` is the caller's, good to be written to (buffer protocol). `start` is good for `length` bytes of
        // a mapping that lives as long as `slf`, of which the filled view holds a reference. No Rust reference to those
        // bytes exists anywhere: `Region` copies by raw pointers.
        let rc =
            unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), this.length as isize, c_int::from(this.readonly), flags) };
        if rc == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// A request that Python has.
struct Out {
    op: Op,
    /// Its lease, and offset and length in the engine's own bounce memory.
    data: Option<(Arc<Lease>, u64, u64)>,
}

/// The engine's side of a bdev whose I/O Python does.
#[pyclass(frozen, module = "qpair._engine")]
pub struct PythonBdevRing {
    id: u64,
    pid: u32,
    ring: ManuallyDrop<Arc<Ring>>,
    pool: ManuallyDrop<Arc<Pool>>,
    out: Mutex<HashMap<u32, Out>>,
}

impl PythonBdevRing {
    fn take_in(&self, work: &Work) -> Result<Option<Arc<Lease>>, Failure> {
        let data = match work.buffer {
            None => None,
            Some((offset, length)) => {
                let lease = self.pool.lend()?;
                let (into, from) = (Region::new(lease.mapping.clone()), Region::new(self.ring.mapping().clone()));
                if work.op == Op::Write {
                    into.copy_from(0, &from, offset, length)?;
                } else {
                    // What Python does not fill reads as zeros, not as some other request's data.
                    into.fill(0, length, 0)?;
                }
                Some((lease, offset, length))
            }
        };
        let lease = data.as_ref().map(|(lease, ..)| lease.clone());
        lock(&self.out).insert(work.slot, Out { op: work.op, data });
        Ok(lease)
    }

    /// One request for Python. When it cannot be made, the request fails: it must not be lost between the two.
    fn hand_out<'py>(&self, py: Python<'py>, work: &Work) -> PyResult<Bound<'py, PyAny>> {
        let lease = self.take_in(work)?;
        let view = match (lease, work.buffer) {
            (Some(lease), Some((_, length))) => {
                let buffer = BounceBuffer { lease, length: length as usize, readonly: work.op == Op::Write };
                Some(PyMemoryView::from(Bound::new(py, buffer)?.as_any())?)
            }
            _ => None,
        };
        let name = OPS.iter().find(|(_, op)| *op == work.op).map_or("reset", |(name, _)| name);
        Ok((work.slot, name, work.offset_blocks, work.num_blocks, view).into_pyobject(py)?.into_any())
    }

    fn finish(&self, slot: u32, errno: i32) -> PyResult<()> {
        let not_here = || PyValueError::new_err(format!("slot {slot} is not with Python: each fetched request is completed once"));
        let out = lock(&self.out).remove(&slot).ok_or_else(not_here)?;
        if let (Op::Read, 0, Some((lease, offset, length))) = (out.op, errno, &out.data) {
            let (into, from) = (Region::new(self.ring.mapping().clone()), Region::new(lease.mapping.clone()));
            into.copy_from(*offset, &from, 0, *length).map_err(Failure::from)?;
        }
        self.ring.complete(slot, errno).map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

#[pymethods]
impl PythonBdevRing {
    #[getter]
    fn id(&self) -> u64 {
        self.id
    }

    #[pyo3(signature = (max_requests=Number::of(64)), text_signature = "($self, max_requests=64)")]
    fn fetch<'py>(&self, py: Python<'py>, max_requests: Number) -> PyResult<Bound<'py, PyList>> {
        not_forked(self.pid)?;
        let max = max_requests.within("max_requests", 1..=FETCH_MAX)?;
        let list = PyList::empty(py);
        for work in self.ring.fetch(max as usize) {
            match self.hand_out(py, &work) {
                Ok(request) => list.append(request)?,
                Err(_) => {
                    lock(&self.out).entry(work.slot).or_insert(Out { op: work.op, data: None });
                    self.finish(work.slot, libc::ENOMEM)?;
                }
            }
        }
        Ok(list)
    }

    #[pyo3(signature = (slot, errno=Number::of(0)), text_signature = "($self, slot, errno=0)")]
    fn complete(&self, slot: Number, errno: Number) -> PyResult<()> {
        not_forked(self.pid)?;
        let errno = errno.within("errno", 0..=ERRNO_MAX)? as i32;
        self.finish(slot.u32("slot")?, errno)
    }

    fn close(&self) -> PyResult<()> {
        not_forked(self.pid)?;
        self.ring.close();
        Ok(())
    }
}

impl Drop for PythonBdevRing {
    fn drop(&mut self) {
        if not_forked(self.pid).is_err() {
            return;
        }
        // Nobody is left who could complete anything.
        self.ring.close();
        // SAFETY: each is taken once, here; `self` is not used afterwards.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.pool);
        }
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
        core.registry.register(device).map_err(Failure::from)?;
        lock(&core.rings).push(Arc::downgrade(&ring));
        let pool = Pool { free: Mutex::default(), bytes: max_io_bytes as usize, kept: depth as usize };
        Ok(PythonBdevRing {
            id,
            pid: std::process::id(),
            ring: ManuallyDrop::new(ring),
            pool: ManuallyDrop::new(Arc::new(pool)),
            out: Mutex::default(),
        })
    }
}
