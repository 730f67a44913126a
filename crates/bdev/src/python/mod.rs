//! A bdev whose I/O somebody outside the engine does: Python, on a thread of its own.
//!
//! How it works. One [`Ring`] a device, shared by its channels of all reactors and one consumer. A channel takes a slot,
//! copies a write's data into the slot's bounce buffer, and queues the request; the consumer [`fetch`](Ring::fetch)es
//! requests, does them on the bounce buffers, and [`complete`](Ring::complete)s slots; the channel finds them when its
//! reactor polls it, copies a read's data out, and completes the I/O. The consumer never sees the initiator's memory.
//! Queues have a place for each slot, so no push fails. When no slot is free, an I/O waits in its channel.
//!
//! **No wake-up of the consumer is lost.** `on_work` is called by who pushes a request and then turns `notified` from
//! false to true. The consumer turns it to false only in a `fetch` that found nothing, and then looks once more; it
//! returns empty-handed only if that look found nothing either. Suppose a request lies in the queue and nobody is told.
//! Its push came after that look, hence after the store of false (fences on both sides order the four accesses), so the
//! swap that follows the push read false, or another pusher's did: and that one called `on_work`.
//! The way back is [`qpair_reactor::doorbell`]: a channel that is polled costs the consumer nothing; to one that is armed
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

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock};

use crossbeam_queue::ArrayQueue;
use qpair_memory::{Mapping, Pages};
use qpair_reactor::doorbell::Doorbell;
use qpair_reactor::{Handle, PollerId, Reactor};
use uuid::Uuid;

use crate::{BdevError, Channel, ChannelId, Device, Info, Layer, Op, OpSet};

/// Most requests at once.
pub const DEPTH_MAX: u32 = 4096;
/// Most bytes that the bounce buffers of one device take.
pub const BYTES_MAX: u64 = 1 << 30;

const FREE: u8 = 0;
const QUEUED: u8 = 1;
const OUT: u8 = 2;
const RETURNED: u8 = 3;
/// Given up while queued: whoever takes it off the queue frees it.
const CANCELLED: u8 = 4;
/// Given up while out: the consumer's completion frees it.
const GIVEN_UP: u8 = 5;

/// What a slot is about, for the consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Names it until it is completed.
    pub slot: u32,
    /// Read, write, flush, unmap or write-zeroes.
    pub op: Op,
    /// First block.
    pub offset_blocks: u64,
    /// How many.
    pub num_blocks: u64,
    /// Offset and length in bytes of its bounce buffer in [`Ring::mapping`]; for read and write. The consumer's until it
    /// completes the slot.
    pub buffer: Option<(u64, u64)>,
}

/// A slot that is not the consumer's to complete: never fetched, or completed already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("slot {slot} is not with Python: each fetched request is completed once")]
pub struct NotWithPython {
    /// The slot as given.
    pub slot: u32,
}

struct Slot {
    state: AtomicU8,
    /// The number of the port it goes back to.
    port: AtomicU64,
}

/// A channel as the consumer sees it.
struct Port {
    number: u64,
    handle: Handle,
    poller: PollerId,
    returned: ArrayQueue<(u32, i32)>,
    doorbell: Doorbell,
    starving: AtomicBool,
    /// Nobody looks at `returned` any more.
    gone: AtomicBool,
}

impl Port {
    /// Has the channel polled.
    fn wake(&self) {
        if self.doorbell.must_ring() {
            let poller = self.poller;
            self.handle.call(move |reactor| {
                if let Some(waker) = reactor.waker(poller) {
                    waker.wake();
                }
            });
        }
    }
}

/// See the module's doc.
pub struct Ring {
    mapping: Arc<Mapping>,
    stride: u64,
    slots: Box<[Slot]>,
    free: ArrayQueue<u32>,
    work: ArrayQueue<Work>,
    notified: AtomicBool,
    closed: AtomicBool,
    on_work: Box<dyn Fn() + Send + Sync>,
    /// Read by the consumer, and by a reactor only when a channel starves, opens or closes.
    ports: RwLock<Vec<Arc<Port>>>,
    port_next: AtomicU64,
    /// How many ports wait for a free slot.
    starving: AtomicU32,
}

impl Ring {
    fn new(depth: u32, max_io_bytes: u32, on_work: Box<dyn Fn() + Send + Sync>) -> Result<Self, BdevError> {
        let stride = u64::from(max_io_bytes).next_multiple_of(4096);
        let mapping = Mapping::anonymous((stride * u64::from(depth)) as usize, Pages::Normal)?;
        let free = ArrayQueue::new(depth as usize);
        for slot in 0..depth {
            let _ = free.push(slot);
        }
        let slot = |_| Slot { state: AtomicU8::new(FREE), port: AtomicU64::new(0) };
        Ok(Self {
            mapping,
            stride,
            slots: (0..depth).map(slot).collect(),
            free,
            work: ArrayQueue::new(depth as usize),
            notified: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            on_work,
            ports: RwLock::default(),
            port_next: AtomicU64::new(1),
            starving: AtomicU32::new(0),
        })
    }

    /// Where the bounce buffers lie. Hold it as long as one is looked at.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// How many slots it has.
    pub fn depth(&self) -> u32 {
        self.slots.len() as u32
    }

    /// How many slots are free: all of them when nothing is under way.
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Takes requests, at most `max`. Empty: there are none, and `on_work` is called when one comes.
    pub fn fetch(&self, max: usize) -> Vec<Work> {
        let mut out = Vec::new();
        while out.len() < max {
            if let Some(work) = self.work.pop() {
                if self.move_slot(work.slot, QUEUED, OUT) {
                    out.push(work);
                } else {
                    // Given up before it was fetched.
                    self.release(work.slot);
                }
            } else if !out.is_empty() || !self.disarm_failed() {
                break;
            }
        }
        out
    }

    /// The consumer found nothing and says so. True: something came meanwhile after all, and it is still its turn.
    fn disarm_failed(&self) -> bool {
        self.notified.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // Who has pushed may be about to swap: one of the two goes on.
        !self.work.is_empty() && !self.notified.swap(true, Ordering::SeqCst)
    }

    /// Ends a fetched request; `errno` 0 is success, its sign does not matter.
    pub fn complete(&self, slot: u32, errno: i32) -> Result<(), NotWithPython> {
        let place = self.slots.get(slot as usize).ok_or(NotWithPython { slot })?;
        // Read before the slot is handed on.
        let number = place.port.load(Ordering::Acquire);
        if self.move_slot(slot, OUT, RETURNED) {
            let ports = self.ports.read().unwrap_or_else(PoisonError::into_inner);
            let port = ports.iter().find(|port| port.number == number).cloned();
            drop(ports);
            match port {
                Some(port) => {
                    // As many places as slots.
                    let _ = port.returned.push((slot, errno.saturating_abs()));
                    port.wake();
                    self.take_back(&port);
                }
                // Its channel went between the two lines above, and gave up what was out; this was not out any more.
                None => self.release(slot),
            }
            return Ok(());
        }
        if self.move_slot(slot, GIVEN_UP, FREE) {
            self.release(slot);
            return Ok(());
        }
        Err(NotWithPython { slot })
    }

    /// Fails whatever is under way, and all that comes later. Idempotent.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.ports().iter().for_each(|port| port.wake());
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Frees what came back to a channel that is gone. Its end and a completion that crosses it both look.
    fn take_back(&self, port: &Port) {
        fence(Ordering::SeqCst);
        if port.gone.load(Ordering::SeqCst) {
            while let Some((slot, _)) = port.returned.pop() {
                self.release(slot);
            }
        }
    }

    fn ports(&self) -> Vec<Arc<Port>> {
        self.ports.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn move_slot(&self, slot: u32, from: u8, to: u8) -> bool {
        self.slots[slot as usize].state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Puts a slot back that nobody has.
    fn release(&self, slot: u32) {
        self.slots[slot as usize].state.store(FREE, Ordering::Release);
        // As many places as slots, and each slot is in there once.
        let _ = self.free.push(slot);
        fence(Ordering::SeqCst);
        if self.starving.load(Ordering::SeqCst) > 0 {
            self.ports().iter().filter(|port| port.starving.load(Ordering::SeqCst)).for_each(|port| port.wake());
        }
    }

    /// Tells the consumer that there is work, unless it knows.
    fn notify(&self) {
        fence(Ordering::SeqCst);
        if !self.notified.swap(true, Ordering::SeqCst) {
            (self.on_work)();
        }
    }
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
        if depth == 0 || depth > DEPTH_MAX {
            return Err(BdevError::invalid("depth", depth, format!("1 to {DEPTH_MAX}")));
        }
        let limit = BYTES_MAX / u64::from(depth);
        if max_io_bytes == 0 || !max_io_bytes.is_multiple_of(block_size) || u64::from(max_io_bytes).next_multiple_of(4096) > limit {
            return Err(BdevError::invalid(
                "max_io_bytes",
                max_io_bytes,
                format!("a multiple of block_size {block_size}, at most {limit}"),
            ));
        }
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
