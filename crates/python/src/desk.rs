//! What Python has in hand of a Python bdev: requests, and buffers that it looks at.
//!
//! How it works. A [`Desk`] takes requests from where they come (the ring of this process's engine, or a worker's end of shared memory) and makes a
//! [`PythonBdevRequest`] of each. The buffers lie in a memfd; the desk maps each slot's for itself, at an address that only Python sees. So data that the reactor put
//! there for a write are read by Python in place, and what Python puts there for a read is what the reactor copies to the initiator: nothing is copied between.
//!
//! **A buffer that Python still holds is never used again under it.** Each slot has one exporter, which counts the views of it. A request that
//! is completed releases the view it gave; if any other is left (a slice, a NumPy array), the pages under it are exchanged for private ones with the same bytes, in one
//! step (mremap(2)), and the slot is mapped anew at another address. What is done to the view from then on reaches nobody; its memory goes when it does. An
//! exporter gives no view outside [`PythonBdevRequest::data`], so none can be made later.
//!
//! Errors. `ValueError` for a request that was completed before; one that is dropped without having been completed fails with EIO. What Python does not fill reads
//! as zeros, not as some other request's data.
//!
//! Limits: those of [`qpair_bdev::python`]; a program that hoards views pays for them with memory of its own.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyMemoryView, PyString, PyTuple};
use qpair_bdev::Op;
use qpair_bdev::python::{ANSWERED, Stage, Work};

use crate::core::lock;
use crate::engine::not_forked;
use crate::values::{Failure, Number};

/// Requests of one `fetch`.
pub const FETCH_MAX: u64 = 4096;
const ERRNO_MAX: u64 = 4095;

/// Where requests come from and go back to.
pub trait Source: Send + Sync {
    /// Takes up to `max`. Empty: there are none, and the consumer will be called.
    fn fetch(&self, max: usize) -> Vec<Work>;
    /// Ends requests that were fetched and not ended before.
    fn complete(&self, batch: &[(u32, i32)]);
}

/// One slot's buffer, mapped for Python alone.
struct Pages {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: plain memory without thread affinity; all access is by raw pointers, and by Python through the buffer protocol.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn map(fd: c_int, offset: u64, length: usize) -> Result<Self, Failure> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED });
        // SAFETY: without MAP_FIXED the kernel picks a free range, so no memory in use is touched.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, offset as libc::off_t) };
        match NonNull::new(base.cast::<u8>()) {
            Some(start) if base != libc::MAP_FAILED => Ok(Self { base: start, length }),
            _ => Err(Failure::os("mmap", &std::io::Error::last_os_error())),
        }
    }

    fn zero(&self, length: usize) {
        // SAFETY: the range lies in this mapping (its caller's slot is as long as a request may be), and nothing in Rust refers to it.
        unsafe { std::ptr::write_bytes(self.base.as_ptr(), 0, length.min(self.length)) };
    }

    /// Exchanges the pages for private ones with the same first `length` bytes, at the same address.
    fn keep(&self, length: usize) -> Result<(), Failure> {
        let fresh = Self::map(-1, 0, self.length)?;
        // SAFETY: both are mapped for `self.length` bytes, apart from each other, and nothing in Rust refers to either. The last call moves the fresh pages
        // to where the old ones were: both ranges are ours, and it either does so whole or changes nothing.
        let moved = unsafe {
            std::ptr::copy_nonoverlapping(self.base.as_ptr(), fresh.base.as_ptr(), length.min(self.length));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap(fresh.base.as_ptr().cast(), self.length, self.length, flags, self.base.as_ptr())
        };
        if moved == libc::MAP_FAILED {
            return Err(Failure::os("mremap", &std::io::Error::last_os_error()));
        }
        // Its old place is nobody's any more.
        std::mem::forget(fresh);
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; no view is left (each holds its exporter, which holds this).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// What memoryviews of one slot's buffer are made over. Lives as long as any of them.
#[pyclass(frozen, module = "qpair._engine")]
pub struct BounceBuffer {
    pages: Pages,
    /// Of the request that has it now.
    length: AtomicUsize,
    readonly: AtomicBool,
    /// A view may be made: only while the request makes its own.
    open: AtomicBool,
    views: AtomicUsize,
}

#[pymethods]
impl BounceBuffer {
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        if !this.open.load(Ordering::Relaxed) {
            return Err(PyBufferError::new_err("a buffer is looked at through its request's data"));
        }
        let (length, readonly) = (this.length.load(Ordering::Relaxed), this.readonly.load(Ordering::Relaxed));
        // SAFETY: `view` is the caller's, good to be written to (buffer protocol). The pages are good for `length` bytes (checked when the request was
        // taken) and live as long as `slf`, of which the filled view holds a reference. No Rust reference to those bytes exists anywhere.
        let rc = unsafe {
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), this.pages.base.as_ptr().cast(), length as isize, c_int::from(readonly), flags)
        };
        if rc != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        this.views.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The last of a view's own views is gone.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.views.fetch_sub(1, Ordering::Relaxed);
    }
}

/// See the module's doc.
pub struct Desk {
    pid: u32,
    source: Box<dyn Source>,
    memory: OwnedFd,
    stride: u64,
    shift: u32,
    /// By slot; made when first used.
    buffers: Mutex<Vec<Option<Py<BounceBuffer>>>>,
    kept: AtomicU64,
}

impl Desk {
    /// `memory` holds `depth` buffers, `stride` bytes from one to the next.
    pub fn new(source: Box<dyn Source>, memory: BorrowedFd<'_>, depth: u32, stride: u64, block_size: u32) -> Result<Arc<Self>, Failure> {
        let memory = memory.try_clone_to_owned().map_err(|error| Failure::os("dup", &error))?;
        let buffers = Mutex::new((0..depth).map(|_| None).collect());
        let shift = block_size.trailing_zeros();
        Ok(Arc::new(Self { pid: std::process::id(), source, memory, stride, shift, buffers, kept: AtomicU64::new(0) }))
    }

    /// Views that were still held when their request was completed.
    pub fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    /// Up to `max` requests, those for one method together, in the order in which each first came.
    pub fn fetch<'py>(self: &Arc<Self>, py: Python<'py>, max: usize) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        let mut works = self.source.fetch(max);
        while let Some(first) = works.first() {
            let method = method_of(py, first);
            let mut batch = Vec::with_capacity(works.len());
            works.retain(|work| {
                let same = method_of(py, work).is(method);
                if same {
                    batch.push(*work);
                }
                !same
            });
            let requests = self.hand_out(py, &batch)?;
            list.append((method, PyTuple::new(py, requests)?))?;
        }
        Ok(list)
    }

    /// A request that cannot be made fails: it must not be lost between the two.
    fn hand_out(self: &Arc<Self>, py: Python<'_>, works: &[Work]) -> PyResult<Vec<Py<PythonBdevRequest>>> {
        let mut requests = Vec::with_capacity(works.len());
        for work in works {
            let made = self.take_in(py, work).map_err(PyErr::from).and_then(|request| Py::new(py, request));
            match made {
                Ok(request) => requests.push(request),
                Err(_) => self.source.complete(&[(work.slot, libc::ENOMEM)]),
            }
        }
        Ok(requests)
    }

    fn take_in(self: &Arc<Self>, py: Python<'_>, work: &Work) -> Result<PythonBdevRequest, Failure> {
        let length = work.num_blocks << self.shift;
        let buffer = match work.buffer {
            None => None,
            Some((offset, length)) => {
                let buffer = self.buffer(py, work.slot, offset)?;
                let this = buffer.get();
                this.length.store(length as usize, Ordering::Relaxed);
                let (readonly, zeroed) = match work.stage {
                    Stage::Whole => (work.op == Op::Write, work.op == Op::Read),
                    // A filter may change what is written, and answer what is read.
                    Stage::Before => (false, work.op == Op::Read),
                    Stage::After(_) => (work.op == Op::Write, false),
                };
                this.readonly.store(readonly, Ordering::Relaxed);
                if zeroed {
                    this.pages.zero(length as usize);
                }
                Some(buffer)
            }
        };
        let offset = work.offset_blocks << self.shift;
        let desk = self.clone();
        let (slot, op, stage) = (work.slot, work.op, work.stage);
        Ok(PythonBdevRequest { desk, slot, op, stage, offset, length, buffer, done: AtomicBool::new(false), view: Mutex::default() })
    }

    fn buffer(&self, py: Python<'_>, slot: u32, offset: u64) -> Result<Py<BounceBuffer>, Failure> {
        let mut buffers = lock(&self.buffers);
        let no_slot = || Failure::new(libc::EPROTO, format!("slot {slot} is out of the ring"));
        let place = buffers.get_mut(slot as usize).ok_or_else(no_slot)?;
        if let Some(buffer) = place {
            return Ok(buffer.clone_ref(py));
        }
        let pages = Pages::map(self.memory.as_raw_fd(), offset, self.stride as usize)?;
        let (length, views) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let made = BounceBuffer { pages, length, readonly: AtomicBool::new(true), open: AtomicBool::new(false), views };
        let buffer = Py::new(py, made).map_err(|error| Failure::new(libc::ENOMEM, error.to_string()))?;
        *place = Some(buffer.clone_ref(py));
        Ok(buffer)
    }

    /// Takes the buffer back from Python, or what Python still holds out of the ring.
    fn take_back(&self, py: Python<'_>, request: &PythonBdevRequest) -> Result<(), Failure> {
        let Some(buffer) = &request.buffer else { return Ok(()) };
        // Not under the lock: what hears of its end may be anything of Python's.
        let view = lock(&request.view).take();
        if let Some(view) = view {
            // Ours alone: it goes with its last reference. One that somebody else refers to is released, unless it is in use itself.
            // SAFETY: the object is alive, `view` holds it.
            if unsafe { ffi::Py_REFCNT(view.as_ptr()) } > 1 {
                let _ = view.bind(py).call_method0(intern!(py, "release"));
            }
        }
        let this = buffer.get();
        if this.views.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        this.pages.keep(this.length.load(Ordering::Relaxed))?;
        lock(&self.buffers)[request.slot as usize] = None;
        self.kept.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Ends those requests that have not been ended.
    fn finish<'a>(&self, py: Python<'_>, requests: impl Iterator<Item = &'a PythonBdevRequest>, errno: i32) -> Result<(), Failure> {
        let mut batch = Vec::with_capacity(64);
        let mut outcome = Ok(());
        for request in requests {
            if request.done.swap(true, Ordering::AcqRel) {
                continue;
            }
            match self.take_back(py, request) {
                Ok(()) => batch.push((request.slot, errno)),
                // Its buffer cannot be had back: it is not completed, and waits to be completed again or aborted.
                Err(failure) => {
                    request.done.store(false, Ordering::Release);
                    outcome = Err(failure);
                }
            }
        }
        self.source.complete(&batch);
        outcome
    }

    /// As the method of the ring classes: all of `requests`, a sequence, that are not done.
    pub fn finish_all(&self, requests: &Bound<'_, PyAny>, errno: Number) -> PyResult<()> {
        let py = requests.py();
        let errno = errno.within("errno", 0..=ERRNO_MAX)? as i32;
        let mut own: Vec<Bound<'_, PythonBdevRequest>> = Vec::with_capacity(64);
        for request in requests.try_iter()? {
            let request = request?.cast_into::<PythonBdevRequest>()?;
            if !std::ptr::eq(Arc::as_ptr(&request.get().desk), self) {
                return Err(PyValueError::new_err("a request of another bdev"));
            }
            own.push(request);
        }
        Ok(self.finish(py, own.iter().map(Bound::get), errno)?)
    }
}

fn name_of(py: Python<'_>, op: Op) -> &Bound<'_, PyString> {
    match op {
        Op::Read => intern!(py, "read"),
        Op::Write => intern!(py, "write"),
        Op::Flush => intern!(py, "flush"),
        Op::Unmap => intern!(py, "unmap"),
        Op::WriteZeroes => intern!(py, "write_zeroes"),
        _ => intern!(py, "reset"),
    }
}

/// Which method of the user's a request is for.
fn method_of<'py>(py: Python<'py>, work: &Work) -> &'py Bound<'py, PyString> {
    match work.stage {
        Stage::Whole => name_of(py, work.op),
        Stage::Before => intern!(py, "before"),
        Stage::After(_) => intern!(py, "after"),
    }
}

/// One request that Python has.
#[pyclass(frozen, module = "qpair._engine")]
pub struct PythonBdevRequest {
    desk: Arc<Desk>,
    slot: u32,
    op: Op,
    stage: Stage,
    offset: u64,
    length: u64,
    buffer: Option<Py<BounceBuffer>>,
    done: AtomicBool,
    /// Made when first asked for.
    view: Mutex<Option<Py<PyMemoryView>>>,
}

impl PythonBdevRequest {
    fn said(&self, py: Python<'_>) -> String {
        format!("{} at {}", name_of(py, self.op), self.offset)
    }
}

#[pymethods]
impl PythonBdevRequest {
    #[getter]
    fn op<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        name_of(py, self.op).clone()
    }

    #[getter]
    fn offset(&self) -> u64 {
        self.offset
    }

    #[getter]
    fn length(&self) -> u64 {
        self.length
    }

    #[getter]
    fn end(&self) -> u64 {
        self.offset + self.length
    }

    #[getter]
    fn done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Of a filter's request: how the base ended it. 0 before.
    #[getter]
    fn errno(&self) -> i32 {
        if let Stage::After(errno) = self.stage { errno } else { 0 }
    }

    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        if self.done.load(Ordering::Acquire) {
            return Err(PyValueError::new_err(format!("{} was completed: its data are gone", self.said(py))));
        }
        if let Some(view) = &*lock(&self.view) {
            return Ok(view.bind(py).clone());
        }
        // Not under the lock: making an object may run the collector, and with it anything.
        let view = match &self.buffer {
            Some(buffer) => {
                buffer.get().open.store(true, Ordering::Relaxed);
                let made = PyMemoryView::from(buffer.bind(py).as_any());
                buffer.get().open.store(false, Ordering::Relaxed);
                made?
            }
            None => PyMemoryView::from(PyBytes::new(py, b"").as_any())?,
        };
        *lock(&self.view) = Some(view.clone().unbind());
        Ok(view)
    }

    #[pyo3(signature = (errno=Number::of(0)), text_signature = "($self, errno=0)")]
    fn complete(&self, py: Python<'_>, errno: Number) -> PyResult<()> {
        not_forked(self.desk.pid)?;
        let errno = errno.within("errno", 0..=ERRNO_MAX)? as i32;
        if self.done() {
            return Err(PyValueError::new_err(format!("{} was completed before", self.said(py))));
        }
        // To a filter, 0 means that all goes on as it was.
        let code = if errno == 0 && self.stage != Stage::Whole { ANSWERED } else { errno };
        Ok(self.desk.finish(py, std::iter::once(self), code)?)
    }

    /// A filter's: it goes on to the base, or ends as the base ended it.
    fn pass_on(&self, py: Python<'_>) -> PyResult<()> {
        not_forked(self.desk.pid)?;
        if self.done() {
            return Err(PyValueError::new_err(format!("{} was completed before", self.said(py))));
        }
        if self.stage == Stage::Whole {
            return Err(PyValueError::new_err(format!("{}: there is nothing below to pass it on to", self.said(py))));
        }
        Ok(self.desk.finish(py, std::iter::once(self), 0)?)
    }

    #[pyo3(text_signature = "($self, errno)")]
    fn fail(&self, py: Python<'_>, errno: Number) -> PyResult<()> {
        errno.within("errno", 1..=ERRNO_MAX)?;
        self.complete(py, errno)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<{}, {} bytes{}>", self.said(py), self.length, if self.done() { ", done" } else { "" })
    }
}

impl Drop for PythonBdevRequest {
    fn drop(&mut self) {
        if self.done.load(Ordering::Acquire) || not_forked(self.desk.pid).is_err() {
            return;
        }
        Python::attach(|py| drop(self.desk.finish(py, std::iter::once(&*self), libc::EIO)));
    }
}
