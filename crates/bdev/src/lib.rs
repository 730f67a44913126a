//! The block-device layer: one [`Io`] from front end to device and back, and what all devices share.
//!
//! How it works. A [`Device`] is registered once and seen by all reactors; a [`Channel`] is one reactor's way to it
//! and holds that reactor's queue pair. The reactor's [`Layer`] owns its I/Os (a slab; index and generation are an
//! I/O's name), its channels and the completion queues of its front ends. A front end takes I/Os from the slab, fills
//! them in, submits a batch to a channel and later reaps them from its queue. Validation, splitting, software
//! queueing, draining and statistics live here once, for all modules.
//!
//! Rules. `submit` never calls back: a finished I/O is put on a completion queue, also when it finishes at once.
//! A flush covers every write completed before it was submitted, on all channels; nothing else orders I/O. Abort is a
//! hint: the buffer is the device's until completion. Each I/O completes exactly once (the argument stands in [`layer`]).
//! Removing and shrinking stop new I/O, drain or abort, and only then act ([`lifecycle`]).
//!
//! Errors. [`BdevError`] for misuse and control; an I/O's result is an NVMe [`Status`].
//!
//! Not implemented: protection information, and metadata within the blocks.
//!
//! Limits: [`FRAMES_MAX`] bdevs stacked; I/Os per reactor as configured.

#![forbid(unsafe_code)]

mod buffer;
mod device;
mod error;
pub mod file;
pub mod histogram;
mod io;
pub mod layer;
pub mod lifecycle;
pub mod limit;
pub mod malloc;
pub mod measures;
pub mod null;
pub mod passthru;
pub mod python;
pub mod ranges;
mod registry;
pub mod stats;
pub mod trace;
mod sync {
    //! The model checks compile what uses these with loom's in this place.
    pub(crate) use std::sync::atomic;
}
mod zoned;

pub use buffer::Buffer;
pub use device::{Channel, Device, Fate, Info, OpSet};
pub use error::BdevError;
pub use file::FileBdev;
pub use io::{FRAMES_MAX, Frame, Io, IoFlags, IoId, Op};
pub use layer::{ChannelId, Layer, QueueId};
pub use lifecycle::Hold;
pub use qpair_wire::nvme::Status;
pub use registry::{Descriptor, DeviceId, Notice, Registry};
pub use stats::Stats;
pub use zoned::{ZONE_DESCRIPTOR_BYTES, ZoneAction, ZoneDescriptor, ZoneState, Zoned};
