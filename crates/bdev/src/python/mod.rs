//! A bdev whose I/O somebody outside the engine does: Python, on a thread of its own.
//!
//! How it works. One [`Ring`] a device, shared by its channels of all reactors and one consumer. A channel takes a slot,
//! copies a write's data into the slot's bounce buffer, and queues the request; the consumer [`fetch`](Ring::fetch)es
//! requests, does them on the bounce buffers, and [`complete`](Ring::complete)s slots; the channel finds them when its
//! reactor polls it, copies a read's data out, and completes the I/O. The consumer never sees the initiator's memory.
//! Queues have a place for each slot, so no push fails. When no slot is free, an I/O waits in its channel.
//!
//! **No wake-up of the consumer is lost.** `on_work` is called once until the consumer has found nothing; why no call is lost stands in `turn.rs`, and is
//! model-checked by loom in `cargo test`. The way back is [`qpair_reactor::doorbell`]: a channel that is polled costs the consumer nothing; to one that is armed
//! it sends one message, which is cheaper than a descriptor written and watched, and runs in the simulator as it is. For
//! slots that become free the same argument holds: who found none says so (`starving`), fences, and looks again; who
//! frees one pushes it, fences, and looks for starving ones.
//!
//! A slot is free, queued, out (with the consumer), returned, or given up: an aborted I/O completes at once and its slot is
//! set aside until the consumer completes it or comes across it. Each move is one compare-and-swap, so an I/O ends
//! either by its abort or by its completion.
//!
//! Durability. A write with FUA is followed by a flush in the same slot.
//!
//! Errors. The consumer's errno is the I/O's ([`Status::from_errno`]). After [`Ring::close`], or when a panic or removal takes
//! a channel, all that is out fails and late completions are accepted and forgotten.
//!
//! Not implemented: compare, copy; reset is not passed on (the channels are quiet by then).
//!
//! Limits: [`DEPTH_MAX`] slots, [`BYTES_MAX`] bytes of bounce buffers in all; memory is used as it is touched.

mod channel;
mod filter;
mod link;
mod ring;
mod shared;
mod turn;
mod sync {
    //! The model check compiles `turn` with loom's in this place.
    pub(crate) use std::sync::atomic;
}

use std::sync::Arc;

use qpair_reactor::Reactor;
use uuid::Uuid;

pub use self::filter::{ANSWERED, FilterBdev, Interest};
pub use self::link::{Down, Link, LinkConfig, OnDown};
pub use self::ring::{NotWithPython, Ring, Service, Stage, Work};
pub use self::shared::{Claim, ERRNO_MAX, EngineEnd, Lie, WorkerEnd, control_bytes};
use crate::{BdevError, Channel, ChannelId, Device, Info, Layer, Op, OpSet};

/// Most requests at once.
pub const DEPTH_MAX: u32 = 4096;
/// Most bytes that the bounce buffers of one device take.
pub const BYTES_MAX: u64 = 1 << 30;

/// Refuses a ring that makes no sense.
fn check_ring(block_size: u32, depth: u32, max_io_bytes: u32) -> Result<(), BdevError> {
    if depth == 0 || depth > DEPTH_MAX {
        return Err(BdevError::invalid("depth", depth, format!("1 to {DEPTH_MAX}")));
    }
    let limit = BYTES_MAX / u64::from(depth);
    if max_io_bytes == 0 || !max_io_bytes.is_multiple_of(block_size) || u64::from(max_io_bytes).next_multiple_of(4096) > limit {
        return Err(BdevError::invalid("max_io_bytes", max_io_bytes, format!("a multiple of block_size {block_size}, at most {limit}")));
    }
    Ok(())
}

/// See the module's doc.
pub struct PythonBdev {
    info: Info,
    ring: Arc<Ring>,
}

impl PythonBdev {
    /// `on_work` is called from reactors, once until [`Ring::fetch`] finds nothing; it must not block.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        name: &str,
        num_blocks: u64,
        block_size: u32,
        depth: u32,
        max_io_bytes: u32,
        uuid: Option<Uuid>,
        readonly: bool,
        on_work: Box<dyn Fn() + Send + Sync>,
    ) -> Result<(Arc<Self>, Arc<Ring>), BdevError> {
        let mut info = Info::new(name, "python", block_size, num_blocks);
        info.check()?;
        check_ring(block_size, depth, max_io_bytes)?;
        info.uuid = uuid.unwrap_or(info.uuid);
        info.readonly = readonly;
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
        info.write_cache = true;
        info.queue_depth = depth;
        info.max_io_blocks = max_io_bytes / block_size;
        let ring = Arc::new(Ring::new(depth, max_io_bytes, on_work)?);
        Ok((Arc::new(Self { info, ring: ring.clone() }), ring))
    }
}

impl Device for PythonBdev {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(channel::PythonChannel::new(self.ring.clone(), self.info.block_size, reactor, layer, id)?))
    }

    fn polled(&self) -> bool {
        true
    }

    fn resize(&self, _: u64) -> Result<(), BdevError> {
        Ok(())
    }
}

impl Drop for PythonBdev {
    fn drop(&mut self) {
        self.ring.close();
    }
}
