//! Bdevs whose I/O Python does in another process: the engine's class `PythonWorkerLink`, and the worker's own, `PythonWorker`.
//!
//! How it works. [`qpair_bdev::python::Link`] passes requests through shared memory and trusts nothing in it. Here are its controls, for whoever watches the process:
//! `attach` makes memory and eventfds for the next worker and gives their descriptors, `sever` says that a process is gone. A worker that the link itself severed (it
//! lied, it was silent) is told by an event. In the worker, the same requests and buffers as in process ([`desk`](crate::desk)) over the worker's end.
//!
//! Errors. `PythonWorker` refuses memory that is too small for what it is told; nothing else is checked there: a worker trusts its engine.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use pyo3::types::PyList;
use qpair_bdev::python::{DEPTH_MAX, Link, LinkConfig, PythonBdev, Service, Work, WorkerEnd, control_bytes};
use qpair_memory::Mapping;
use qpair_reactor::event::Event;

use crate::bdev::parse_uuid;
use crate::core::lock;
use crate::desk::{Desk, FETCH_MAX, Source};
use crate::engine::Engine;
use crate::events::News;
use crate::held::Held;
use crate::pyring::memory_of;
use crate::values::{Failure, Number};

fn service(while_down: &str) -> Result<Service, Failure> {
    match while_down {
        "wait" => Ok(Service::Waiting),
        "fail" => Ok(Service::Failing),
        other => Err(Failure::invalid("while_down", other, "wait or fail")),
    }
}

/// Another descriptor of the same file, Python's from then on.
fn given(fd: BorrowedFd<'_>) -> Result<OwnedFd, Failure> {
    fd.try_clone_to_owned().map_err(|error| Failure::os("dup", &error))
}

/// An eventfd that a worker shares: the engine's handle, which never waits for the worker, and the worker's descriptor.
fn bell() -> Result<(Event, OwnedFd), Failure> {
    let event = Event::new().map_err(|error| Failure::os("eventfd", &error))?;
    let no_fd = || Failure::new(libc::EBADF, "the eventfd has no descriptor");
    let fd = event.fd().ok_or_else(no_fd)?;
    Ok((Event::from_fd(given(fd)?), given(fd)?))
}

/// The engine's side of a bdev that a worker process serves.
#[pyclass(frozen, module = "qpair._engine")]
pub struct PythonWorkerLink {
    id: u64,
    held: Held<Link>,
    attached: AtomicU64,
}

#[pymethods]
impl PythonWorkerLink {
    #[getter]
    fn id(&self) -> u64 {
        self.id
    }

    #[getter]
    fn stride(&self) -> u64 {
        self.held.parts().0.stride()
    }

    fn attach(&self) -> PyResult<(u64, i32, i32, i32, i32)> {
        let link = self.held.server()?;
        let control = link.control().map_err(Failure::from)?;
        let no_fd = || Failure::new(libc::EBADF, "the worker's memory has no descriptor");
        let control_fd = given(control.fd().ok_or_else(no_fd)?)?;
        let memory_fd = given(memory_of(&self.held.parts().0)?)?;
        let ((work, work_fd), (done, done_fd)) = (bell()?, bell()?);
        let number = self.attached.fetch_add(1, Ordering::Relaxed) + 1;
        link.attach(number, control, work, done);
        Ok((number, control_fd.into_raw_fd(), memory_fd.into_raw_fd(), work_fd.into_raw_fd(), done_fd.into_raw_fd()))
    }

    #[pyo3(text_signature = "($self, number, why)")]
    fn sever(&self, number: Number, why: &str) -> PyResult<()> {
        self.held.server()?.sever(number.u64("number")?, why);
        Ok(())
    }

    #[pyo3(text_signature = "($self, while_down)")]
    fn while_down(&self, while_down: &str) -> PyResult<()> {
        self.held.server()?.while_down(service(while_down)?);
        Ok(())
    }

    fn close(&self) -> PyResult<()> {
        self.held.close()
    }
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (name, *, num_blocks, block_size, depth=Number::of(128), max_io_bytes=Number::of(131_072), uuid=None, readonly=false,
            timeout_ms=Number::of(30_000), while_down="wait"),
        text_signature = "($self, name, *, num_blocks, block_size, depth=128, max_io_bytes=131072, uuid=None, readonly=False, timeout_ms=30000, while_down='wait')"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_python_worker_create(
        &self,
        name: &str,
        num_blocks: Number,
        block_size: Number,
        depth: Number,
        max_io_bytes: Number,
        uuid: Option<&str>,
        readonly: bool,
        timeout_ms: Number,
        while_down: &str,
    ) -> PyResult<PythonWorkerLink> {
        let (core, draft) = self.begin()?;
        let id = draft.number();
        let (num_blocks, block_size) = (num_blocks.u64("num_blocks")?, block_size.u32("block_size")?);
        let (depth, max_io_bytes) = (depth.u32("depth")?, max_io_bytes.u32("max_io_bytes")?);
        let config = LinkConfig { timeout_ns: timeout_ms.deadline_ns("timeout_ms")?, while_down: service(while_down)? };
        let (link, on_work) = Link::prepare(core.home().clone(), depth.min(DEPTH_MAX));
        let made = PythonBdev::new(name, num_blocks, block_size, depth, max_io_bytes, parse_uuid(uuid)?, readonly, on_work);
        let (device, ring) = made.map_err(Failure::from)?;
        core.registry.register(device).map_err(Failure::from)?;
        lock(&core.rings).push(Arc::downgrade(&ring));
        let news = core.outbox.clone();
        let on_down = Box::new(move |number, why: qpair_bdev::python::Down| {
            news.push(News::PythonWorkerDown { link: id, number, reason: why.to_string() });
        });
        link.start(ring.clone(), config, on_down);
        Ok(PythonWorkerLink { id, held: Held::new(ring, link), attached: AtomicU64::new(0) })
    }
}

/// The worker's end and the way to ring the engine.
struct Served {
    end: Mutex<WorkerEnd>,
    done: Event,
}

impl Source for Arc<Served> {
    fn fetch(&self, max: usize) -> Vec<Work> {
        lock(&self.end).fetch(max)
    }

    fn complete(&self, batch: &[(u32, i32)]) {
        if lock(&self.end).complete(batch) {
            self.done.notify();
        }
    }
}

/// A worker process's end of a bdev that it serves.
#[pyclass(frozen, module = "qpair._engine")]
pub struct PythonWorker {
    served: Arc<Served>,
    work: Event,
    desk: Arc<Desk>,
}

#[pymethods]
impl PythonWorker {
    #[new]
    #[pyo3(
        signature = (control_fd, memory_fd, work_fd, done_fd, *, depth, stride, block_size),
        text_signature = "(control_fd, memory_fd, work_fd, done_fd, *, depth, stride, block_size)"
    )]
    fn new(
        control_fd: i32,
        memory_fd: i32,
        work_fd: i32,
        done_fd: i32,
        depth: Number,
        stride: Number,
        block_size: Number,
    ) -> PyResult<Self> {
        let own = |what: &str, fd: i32| {
            // SAFETY: fcntl has no preconditions; a descriptor that is not open is refused by it.
            let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
            if copy < 0 {
                return Err(Failure::os(what, &std::io::Error::last_os_error()));
            }
            // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
            Ok(unsafe { OwnedFd::from_raw_fd(copy) })
        };
        let (control, memory) = (own("control_fd", control_fd)?, own("memory_fd", memory_fd)?);
        let (work, done) = (own("work_fd", work_fd)?, own("done_fd", done_fd)?);
        let depth = depth.within("depth", 1..=u64::from(DEPTH_MAX))? as u32;
        let stride = stride.within("stride", 4096..=1 << 30)?;
        let block_size = block_size.within("block_size", 512..=65536)? as u32;
        let control = Mapping::shared(control.as_fd(), control_bytes(depth) as u64).map_err(Failure::from)?;
        let end = WorkerEnd::new(control, depth, stride, block_size).map_err(Failure::from)?;
        let served = Arc::new(Served { end: Mutex::new(end), done: Event::from_fd(done) });
        let desk = Desk::new(Box::new(served.clone()), memory.as_fd(), depth, stride, block_size)?;
        Ok(Self { served, work: Event::from_fd(work), desk })
    }

    /// Views that were still held when their request was completed, ever.
    #[getter]
    fn buffers_kept(&self) -> u64 {
        self.desk.kept()
    }

    /// Whether the engine wants no more of this worker.
    #[getter]
    fn closed(&self) -> bool {
        lock(&self.served.end).is_closed()
    }

    /// Takes the notifications that made `work_fd` readable.
    fn rung(&self) -> u64 {
        self.work.take()
    }

    #[pyo3(signature = (max_requests=Number::of(64)), text_signature = "($self, max_requests=64)")]
    fn fetch<'py>(&self, py: Python<'py>, max_requests: Number) -> PyResult<Bound<'py, PyList>> {
        let max = max_requests.within("max_requests", 1..=FETCH_MAX)?;
        self.desk.fetch(py, max as usize)
    }

    #[pyo3(signature = (requests, errno=Number::of(0)), text_signature = "($self, requests, errno=0)")]
    fn finish(&self, requests: &Bound<'_, PyAny>, errno: Number) -> PyResult<()> {
        self.desk.finish_all(requests, errno)
    }

    /// As a ring has it; a worker ends by ending.
    fn close(&self) {}
}
