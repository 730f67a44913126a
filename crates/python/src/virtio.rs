//! The virtio room: memory that a virtio-user initiator shares with its target, and the bdev over its rings.
//!
//! Python speaks vhost-user with the target; the memory's descriptor and ring addresses are what it tells it. Kick and call
//! descriptors must be eventfds: a reactor writes to the one and waits for the other.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use pyo3::prelude::*;
use qpair_virtio::{QueueSetup, VirtioBlk, VirtioLayout};

use crate::bdev::register;
use crate::engine::Engine;
use crate::values::{Failure, Number};
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
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let queues = queues.into_iter().map(queue_setup).collect::<Result<Vec<_>, _>>()?;
        let device = VirtioBlk::new(name, memory.get().layout.clone(), features.u64("features")?, config, queues);
        Ok(register(core, draft, Arc::new(device.map_err(Failure::from)?))?)
    }
}
