//! The ring itself: slots, the queue of requests, and the ways back to the channels. What it promises stands in the module above.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock};

use crossbeam_queue::ArrayQueue;
use qpair_memory::Mapping;
use qpair_reactor::doorbell::Doorbell;
use qpair_reactor::{Handle, PollerId};

use super::turn::Turn;
use crate::{BdevError, Op};

pub(super) const FREE: u8 = 0;
pub(super) const QUEUED: u8 = 1;
pub(super) const OUT: u8 = 2;
const RETURNED: u8 = 3;
/// Given up while queued: whoever takes it off the queue frees it.
pub(super) const CANCELLED: u8 = 4;
/// Given up while out: the consumer's completion frees it.
pub(super) const GIVEN_UP: u8 = 5;

/// Whether the ring takes and finishes I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Service {
    /// Somebody serves it.
    Open,
    /// Nobody does for now: no slot is used anew, and I/O waits.
    Waiting,
    /// Nobody does for now: I/O fails.
    Failing,
    /// Nobody will again: I/O fails.
    Closed,
}

impl Service {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Open,
            1 => Self::Waiting,
            2 => Self::Failing,
            _ => Self::Closed,
        }
    }
}

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
    /// Where on its way it is shown.
    pub stage: Stage,
}

/// Where on its way a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The consumer does it.
    Whole,
    /// A filter's, before the base has it.
    Before,
    /// A filter's, after; how the base ended it, as an errno.
    After(i32),
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
pub(super) struct Port {
    pub(super) number: u64,
    pub(super) handle: Handle,
    pub(super) poller: PollerId,
    pub(super) returned: ArrayQueue<(u32, i32)>,
    pub(super) doorbell: Doorbell,
    pub(super) starving: AtomicBool,
    /// Nobody looks at `returned` any more.
    pub(super) gone: AtomicBool,
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
    pub(super) stride: u64,
    slots: Box<[Slot]>,
    free: ArrayQueue<u32>,
    work: ArrayQueue<Work>,
    turn: Turn,
    service: AtomicU8,
    on_work: Box<dyn Fn() + Send + Sync>,
    /// Read by the consumer, and by a reactor only when a channel starves, opens or closes.
    ports: RwLock<Vec<Arc<Port>>>,
    port_next: AtomicU64,
    /// How many ports wait for a free slot.
    starving: AtomicU32,
}

impl Ring {
    pub(super) fn new(depth: u32, max_io_bytes: u32, on_work: Box<dyn Fn() + Send + Sync>) -> Result<Self, BdevError> {
        let stride = u64::from(max_io_bytes).next_multiple_of(4096);
        let mapping = Mapping::memfd("qpair-python", (stride * u64::from(depth)) as usize)?;
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
            turn: Turn::default(),
            service: AtomicU8::new(Service::Open as u8),
            on_work,
            ports: RwLock::default(),
            port_next: AtomicU64::new(1),
            starving: AtomicU32::new(0),
        })
    }

    /// Where the bounce buffers lie, each [`stride`](Self::stride) from the one before: a memfd, so that the consumer may map it for itself. Hold it as
    /// long as one is looked at.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Bytes from one slot's buffer to the next one's: whole pages.
    pub fn stride(&self) -> u64 {
        self.stride
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
        loop {
            self.take(max, &mut out);
            if !out.is_empty() || max == 0 || self.may_rest() {
                return out;
            }
        }
    }

    /// Takes requests until there are `max` in `out`, and leaves the consumer called.
    pub fn take(&self, max: usize, out: &mut Vec<Work>) {
        while out.len() < max {
            let Some(work) = self.work.pop() else { return };
            if self.move_slot(work.slot, QUEUED, OUT) {
                out.push(work);
            } else {
                // Given up before it was fetched.
                self.release(work.slot);
            }
        }
    }

    /// The consumer found nothing. True: `on_work` is called when something comes. False: something came after all.
    pub fn may_rest(&self) -> bool {
        self.turn.may_rest(|| self.work.is_empty())
    }

    /// Ends a fetched request; `errno` 0 is success, its sign does not matter.
    pub fn complete(&self, slot: u32, errno: i32) -> Result<(), NotWithPython> {
        self.complete_all(&[(slot, errno)])
    }

    /// As [`complete`](Self::complete), for many: each channel is woken once. Those that are not with Python are left out, and the first of them told.
    pub fn complete_all(&self, batch: &[(u32, i32)]) -> Result<(), NotWithPython> {
        let ports = self.ports.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut outcome = Ok(());
        let mut last: Option<&Arc<Port>> = None;
        for &(slot, errno) in batch {
            let refused = NotWithPython { slot };
            let Some(place) = self.slots.get(slot as usize) else {
                outcome = outcome.and(Err(refused));
                continue;
            };
            // Read before the slot is handed on.
            let number = place.port.load(Ordering::Acquire);
            if self.move_slot(slot, OUT, RETURNED) {
                let port = last.filter(|port| port.number == number).or_else(|| ports.iter().find(|port| port.number == number));
                match port {
                    Some(port) => {
                        // As many places as slots.
                        let _ = port.returned.push((slot, errno.saturating_abs()));
                        if let Some(before) = last
                            && before.number != number
                        {
                            self.told(before);
                        }
                        last = Some(port);
                    }
                    // Its channel went between the two lines above, and gave up what was out; this was not out any more.
                    None => self.release(slot),
                }
            } else if self.move_slot(slot, GIVEN_UP, FREE) {
                self.release(slot);
            } else {
                outcome = outcome.and(Err(refused));
            }
        }
        if let Some(port) = last {
            self.told(port);
        }
        outcome
    }

    fn told(&self, port: &Port) {
        port.wake();
        self.take_back(port);
    }

    /// Fails whatever is under way, and all that comes later. Idempotent.
    pub fn close(&self) {
        if self.is_closed() {
            return;
        }
        self.serve(Service::Closed);
        // Whoever carries requests elsewhere has nothing to do any more, and should see it.
        self.turn.must_call();
        (self.on_work)();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.service() == Service::Closed
    }

    /// Whether it is served, from now on. A closed ring stays closed.
    pub fn serve(&self, service: Service) {
        let open = |now| (now != Service::Closed as u8).then_some(service as u8);
        let _ = self.service.fetch_update(Ordering::SeqCst, Ordering::SeqCst, open);
        fence(Ordering::SeqCst);
        self.ports().iter().for_each(|port| port.wake());
    }

    /// Whether it is served.
    #[inline]
    pub fn service(&self) -> Service {
        Service::of(self.service.load(Ordering::SeqCst))
    }

    /// Frees what came back to a channel that is gone. Its end and a completion that crosses it both look.
    pub(super) fn take_back(&self, port: &Port) {
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

    pub(super) fn move_slot(&self, slot: u32, from: u8, to: u8) -> bool {
        self.slots[slot as usize].state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Puts a slot back that nobody has.
    pub(super) fn release(&self, slot: u32) {
        self.slots[slot as usize].state.store(FREE, Ordering::Release);
        // As many places as slots, and each slot is in there once.
        let _ = self.free.push(slot);
        fence(Ordering::SeqCst);
        if self.starving.load(Ordering::SeqCst) > 0 {
            self.ports().iter().filter(|port| port.starving.load(Ordering::SeqCst)).for_each(|port| port.wake());
        }
    }

    /// Tells the consumer that there is work, unless it knows.
    pub(super) fn notify(&self) {
        if self.turn.must_call() {
            (self.on_work)();
        }
    }
}

/// What a channel does with it.
impl Ring {
    pub(super) fn next_port(&self) -> u64 {
        self.port_next.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn add_port(&self, port: Arc<Port>) {
        self.ports.write().unwrap_or_else(PoisonError::into_inner).push(port);
    }

    pub(super) fn remove_port(&self, number: u64) {
        self.ports.write().unwrap_or_else(PoisonError::into_inner).retain(|port| port.number != number);
    }

    /// A free slot, unless none may be used anew.
    #[inline]
    pub(super) fn free_slot(&self) -> Option<u32> {
        if self.service() == Service::Open { self.free.pop() } else { None }
    }

    /// Whether [`free_slot`](Self::free_slot) would find one.
    pub(super) fn has_room(&self) -> bool {
        self.service() == Service::Open && !self.free.is_empty()
    }

    pub(super) fn starve(&self, port: &Port, starving: bool) {
        if port.starving.swap(starving, Ordering::SeqCst) != starving {
            if starving {
                self.starving.fetch_add(1, Ordering::SeqCst);
            } else {
                self.starving.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Whether a taken slot is queued for or with the consumer.
    pub(super) fn is_shown(&self, slot: u32) -> bool {
        matches!(self.slots[slot as usize].state.load(Ordering::Acquire), QUEUED | OUT)
    }

    /// Queues a request in a slot of the port's.
    pub(super) fn push(&self, port: &Port, work: Work) {
        let place = &self.slots[work.slot as usize];
        place.port.store(port.number, Ordering::Release);
        place.state.store(QUEUED, Ordering::Release);
        // As many places as slots, and each slot is in there once.
        let _ = self.work.push(work);
    }
}
