//! Memory that the single I/Os of one engine move their data through, used again and again: fresh pages cost more than what is copied into them.
//!
//! How it works. A [`Pool`] has a shelf for each power of two from [`SMALLEST`] to [`LARGEST`] bytes; what is larger is mapped for its I/O alone. [`Pooled`] is
//! one mapping in use. When it goes, the mapping returns to its shelf, but only if nobody else has a hold on it: a device that still moves bytes after its I/O
//! was given up keeps it, and it is unmapped when that hold goes. **So no memory is ever used again under somebody.** Python looks at a finished read either as a copy, or
//! in place, by a memoryview over a [`ReadView`], which has the `Pooled`: as long as the view lives, so long is the memory set aside.
//!
//! A shelf is lock-free, for things are put back by reactors and taken by Python's threads. While requests come, the front end's reactor looks each [`IDLE_NS`] whether any
//! memory was taken since; if not, the pool sleeps: what it has is unmapped, and so is what comes back until the next request.
//!
//! What was used before holds somebody's data. Who does not overwrite all of it asks for zeros ([`Pool::zeroed`]).
//!
//! Limits: [`KEPT_BYTES`] are kept, each shelf at most that; a program that hoards views pays for them with memory of its own.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam_queue::ArrayQueue;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;
use qpair_memory::{Mapping, MemoryError, Pages, Region};
use qpair_reactor::Reactor;

use crate::values::Failure;

/// Bytes that are kept for later: both ends of 32 copies under way, 1 MiB each.
const KEPT_BYTES: usize = 64 << 20;
const SMALLEST: usize = 4 << 10;
/// 1 MiB, which is what the Python API sends at once, and its metadata.
const LARGEST: usize = 2 << 20;
const SHELVES: usize = (LARGEST / SMALLEST).trailing_zeros() as usize + 1;
/// Mappings on one shelf at most; a process may have 65,530 of them in all.
const SHELF_MAX: usize = 1024;
const IDLE_NS: u64 = 1_000_000_000;

/// See the module's doc.
pub struct Pool {
    shelves: [ArrayQueue<Arc<Mapping>>; SHELVES],
    kept_bytes: AtomicUsize,
    /// Something was taken since the reactor last looked.
    used: AtomicBool,
    /// The reactor looks; what comes back is kept.
    awake: AtomicBool,
}

impl Pool {
    pub fn new() -> Arc<Self> {
        let shelves = std::array::from_fn(|shelf| ArrayQueue::new((KEPT_BYTES / (SMALLEST << shelf)).min(SHELF_MAX)));
        Arc::new(Self { shelves, kept_bytes: AtomicUsize::new(0), used: AtomicBool::new(false), awake: AtomicBool::new(false) })
    }

    /// At least `length` bytes, which hold anything.
    pub fn take(self: &Arc<Self>, length: usize) -> Result<Pooled, MemoryError> {
        Ok(self.find(length)?.0)
    }

    /// At least `length` bytes, of which those are zeros.
    pub fn zeroed(self: &Arc<Self>, length: usize) -> Result<Pooled, MemoryError> {
        let (found, fresh) = self.find(length)?;
        if !fresh {
            found.region().fill(0, length as u64, 0)?;
        }
        Ok(found)
    }

    fn find(self: &Arc<Self>, length: usize) -> Result<(Pooled, bool), MemoryError> {
        let Some(shelf) = shelf_of(length) else {
            return Ok((Pooled { memory: Mapping::anonymous(length, Pages::Normal)?, home: None }, true));
        };
        self.used.store(true, Ordering::Relaxed);
        let kept = self.shelves[shelf].pop();
        if let Some(memory) = &kept {
            self.kept_bytes.fetch_sub(memory.len(), Ordering::Relaxed);
        }
        let fresh = kept.is_none();
        let memory = kept.map_or_else(|| Mapping::anonymous(SMALLEST << shelf, Pages::Normal), Ok)?;
        Ok((Pooled { memory, home: Some((self.clone(), shelf)) }, fresh))
    }

    /// Takes back what nobody else holds.
    fn put(&self, shelf: usize, memory: Arc<Mapping>) {
        let length = memory.len();
        if !self.awake.load(Ordering::SeqCst) {
            return;
        }
        let full = self.kept_bytes.fetch_add(length, Ordering::Relaxed) + length > KEPT_BYTES;
        if full || self.shelves[shelf].push(memory).is_err() {
            self.kept_bytes.fetch_sub(length, Ordering::Relaxed);
        }
        // Whoever sent the pool to sleep meanwhile either saw what was pushed, or is seen here.
        if !self.awake.load(Ordering::SeqCst) {
            self.empty();
        }
    }

    fn empty(&self) {
        for shelf in &self.shelves {
            while let Some(memory) = shelf.pop() {
                self.kept_bytes.fetch_sub(memory.len(), Ordering::Relaxed);
            }
        }
    }

    /// Unmaps what is kept, and what comes back until a request comes again.
    pub fn sleep(&self) {
        self.awake.store(false, Ordering::SeqCst);
        self.empty();
    }

    /// A request came to its reactor.
    pub fn wake(self: &Arc<Self>, reactor: &mut Reactor) {
        if !self.awake.load(Ordering::Relaxed) && !self.awake.swap(true, Ordering::SeqCst) {
            self.clone().look_later(reactor);
        }
    }

    fn look_later(self: Arc<Self>, reactor: &mut Reactor) {
        reactor.after(IDLE_NS, move |reactor| {
            if self.used.swap(false, Ordering::Relaxed) {
                self.look_later(reactor);
            } else {
                self.sleep();
            }
        });
    }
}

/// The smallest shelf whose mappings are long enough.
fn shelf_of(length: usize) -> Option<usize> {
    let rounded = length.max(SMALLEST).checked_next_power_of_two()?;
    (rounded <= LARGEST).then(|| (rounded / SMALLEST).trailing_zeros() as usize)
}

/// One mapping in use. See the module's doc.
pub struct Pooled {
    memory: Arc<Mapping>,
    home: Option<(Arc<Pool>, usize)>,
}

impl Pooled {
    /// A hold for an I/O.
    pub fn region(&self) -> Region {
        Region::new(self.memory.clone())
    }

    /// Its pool, unless it is too large for one.
    pub fn pool(&self) -> Option<&Arc<Pool>> {
        self.home.as_ref().map(|(pool, _)| pool)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        // Unique now means unique for ever: a hold is only ever made from another one.
        if let Some((pool, shelf)) = self.home.take()
            && Arc::get_mut(&mut self.memory).is_some()
        {
            pool.put(shelf, self.memory.clone());
        }
    }
}

/// A finished read where the device put it, for memoryviews. The memory is set aside as long as one of them lives.
#[pyclass(frozen, module = "qpair._engine")]
pub struct ReadView {
    memory: Arc<Pooled>,
    offset: usize,
    length: usize,
}

impl ReadView {
    /// A memoryview of those bytes; `OutOfRange` if the memory has fewer.
    pub fn memoryview<'py>(py: Python<'py>, memory: Arc<Pooled>, offset: usize, length: usize) -> PyResult<Bound<'py, PyMemoryView>> {
        memory.region().pointer(offset as u64, length as u64).map_err(Failure::from)?;
        PyMemoryView::from(Bound::new(py, Self { memory, offset, length })?.as_any())
    }
}

#[pymethods]
impl ReadView {
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        // SAFETY: `view` is the caller's, good to be written to (buffer protocol). The mapping is good for `offset + length` bytes (checked when this was made) and
        // lives as long as `slf`, of which the filled view holds a reference. Its I/O has ended and `Pooled` keeps it off its shelf, so nobody is asked to write to it;
        // no Rust reference to those bytes exists. The view is read-only.
        let rc = unsafe {
            let start = (this.memory.memory.address() as *mut u8).add(this.offset);
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start.cast(), this.length as isize, 1, flags)
        };
        if rc == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}
