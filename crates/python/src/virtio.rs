//! The virtio room: memory that a virtio-user initiator shares with its target, and the bdev over its rings.
//!
//! Python speaks vhost-user with the target; the memory's descriptor and ring addresses are what it tells it. Kick and call
//! descriptors must be eventfds: a reactor writes to the one and waits for the other.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use pyo3::prelude::*;
use qpair_bdev::{DeviceId, Registry};
use qpair_virtio::{Link, QueueSetup, VirtioBlk, VirtioLayout};

use crate::engine::{Engine, not_forked};
use crate::events::{Outbox, Token};
use crate::values::{Failure, Number, Value};
use crate::vhost::eventfd;

/// Shared memory (memfd) for rings and data of a virtio-user initiator, laid out by the engine.
#[pyclass(frozen, module = "qpair._engine")]
pub struct VirtioMemory {
    layout: Arc<VirtioLayout>,
}

#[pymethods]
impl VirtioMemory {
    #[new]
    #[pyo3(
        signature = (*, num_queues, queue_size, max_io_bytes=Number::of(131_072)),
        text_signature = "(*, num_queues, queue_size, max_io_bytes=131072)"
    )]
    fn new(num_queues: Number, queue_size: Number, max_io_bytes: Number) -> PyResult<Self> {
        let layout = VirtioLayout::new(num_queues.u32("num_queues")?, queue_size.u32("queue_size")?, max_io_bytes.u32("max_io_bytes")?);
        Ok(Self { layout: layout.map_err(Failure::from)? })
    }

    /// Open as long as this object or a bdev over it lives.
    #[getter]
    fn fd(&self) -> i32 {
        self.layout.mapping().fd().map_or(-1, |fd| fd.as_raw_fd())
    }

    #[getter]
    fn size_bytes(&self) -> usize {
        self.layout.mapping().len()
    }

    #[getter]
    fn user_address(&self) -> usize {
        self.layout.mapping().address()
    }

    fn queue_addresses(&self, queue: Number) -> PyResult<(u64, u64, u64)> {
        let last = self.layout.num_queues() as u64 - 1;
        let index = queue.within("queue", 0..=last)?;
        let found =
            self.layout.queue_addresses(index as usize).ok_or_else(|| Failure::invalid("queue", index, format_args!("0 to {last}")));
        Ok(found.map(|at| (at.desc, at.avail, at.used))?)
    }
}

fn queue_setup((size, kick, call): (Number, Number, Number)) -> Result<QueueSetup, Failure> {
    let size = size.within("queue_size", 1..=32768)? as u16;
    Ok(QueueSetup { size, kick: eventfd("kick", kick)?, call: eventfd("call", call)? })
}

#[pymethods]
impl Engine {
    #[pyo3(signature = (name, *, features, config, memory, queues))]
    fn bdev_virtio_create(
        &self,
        name: &str,
        features: Number,
        config: &[u8],
        memory: &Bound<'_, VirtioMemory>,
        queues: Vec<(Number, Number, Number)>,
    ) -> PyResult<VirtioLink> {
        let core = self.running()?;
        let queues = queues.into_iter().map(queue_setup).collect::<Result<Vec<_>, _>>()?;
        let features = features.u64("features")?;
        let device = VirtioBlk::new(name, memory.get().layout.clone(), features, config, queues).map_err(Failure::from)?;
        let link = device.link();
        let device = core.registry.register(Arc::new(device)).map_err(Failure::from)?;
        Ok(VirtioLink { pid: std::process::id(), link, features, device, registry: core.registry.clone(), outbox: core.outbox.clone() })
    }
}

/// A virtio bdev and its target, as whoever holds the connection sees them.
#[pyclass(frozen, module = "qpair._engine")]
pub struct VirtioLink {
    pid: u32,
    link: Link,
    features: u64,
    device: DeviceId,
    registry: Arc<Registry>,
    outbox: Arc<Outbox>,
}

impl VirtioLink {
    fn token(&self) -> PyResult<(u64, Token)> {
        not_forked(self.pid)?;
        let draft = self.outbox.draft()?;
        Ok((draft.number(), draft.commit()))
    }
}

#[pymethods]
impl VirtioLink {
    fn broken(&self) -> PyResult<u64> {
        let (number, token) = self.token()?;
        self.link.when_broken(move |reason| token.answer(Ok::<_, Failure>(Value::Text(reason))));
        Ok(number)
    }

    fn leave(&self) -> PyResult<u64> {
        let (number, token) = self.token()?;
        self.link.leave(&self.registry, self.device, token.done());
        Ok(number)
    }

    fn wipe(&self) -> PyResult<()> {
        not_forked(self.pid)?;
        Ok(self.link.wipe().map_err(Failure::from)?)
    }

    fn rejoin(&self, config: &[u8]) -> PyResult<u64> {
        let (number, token) = self.token()?;
        self.link.rejoin(&self.registry, self.device, self.features, config, token.done());
        Ok(number)
    }

    fn configure(&self, config: &[u8]) -> PyResult<u64> {
        let (number, token) = self.token()?;
        self.link.configure(&self.registry, self.features, config, Box::new(move |outcome| token.answer(outcome.map(Value::Integer))));
        Ok(number)
    }
}
