//! One reactor's queue: I/Os to request slots and back.
//!
//! **Each I/O completes exactly once.** The layer calls `submit` once for an I/O, and asserts in `complete` that it has not ended yet; here is
//! why that assertion never fails, and why `complete` is always called.
//!
//! *At most once.* An I/O that is with the target is named by one slot: from `start`, which takes a free slot only, to
//! `release`, `give_up` or `turn_away`, which free it. Only where the first two are called it is completed; the third moves it to the list of those that wait for another target, from where it
//! goes to a slot again, or is completed as it is taken off. The refusals in `submit` and `start` concern I/Os that nothing names yet. What the target says is a used id, and it is looked up among the slots: one that is free, or is none, is a
//! violation. So a second answer, or one to what was never asked, ends the device, never an I/O again. (A target that gives
//! another request's id ends that one too early, with data that are the target's affair: the other's own answer is then the violation.)
//! Its ids and lengths are read once, into registers, and what it wrote is bounded by what the slot was formatted for.
//!
//! *At least once.* A slot in use is freed by its answer; by a violation on this queue, at once, since `finish` is followed by
//! `give_up`; by a violation on another queue, since `Shared::fail` ends the epoch first and then sends every holder of a queue a
//! wake-up, and whatever slots name by then is what the next `poll` finds; where there may be another target, by that one's answer, to which all of it is sent
//! again (`outage.rs`); or by the removal of the device, whose deadline asks for an early end (`abort`), also where a reset or a shrinking that waits for quiet stands in the
//! removal's way. Until then a target that says nothing is waited for, in a reset too. A panic in here is the layer's to clean up, and
//! a reactor's end leaves nobody to be told. No answer is slept through: `arm` asks for an interrupt and looks again (`Ring::listen`), `unplug` wakes the poller, and what a
//! full ring has no slot for waits in the layer, which asks again when `complete` has made room.
//!
//! *After `give_up`* the target may still answer, so nothing is taken from this queue or sent to it again (what was not yet shown to the
//! target is forgotten, `submit` refuses), and no other channel gets it: it is returned as dead. Its memory stays mapped as long as
//! somebody holds it; a lent buffer may still be written to by a target that wakes up late.
//!
//! *From channel to channel.* The layer closes a channel when nothing is in flight: then every request that was shown has been
//! answered, and the indices stand where the target's stand. They are kept under the device's lock for the next channel, on whatever
//! reactor, which formats its slots anew: none is under way.

use std::sync::Arc;

use qpair_bdev::{Channel, ChannelId, IoFlags, IoId, Layer, Op, Status};
use qpair_memory::{Mapping, Region, copy_list};
use qpair_reactor::driver::WatchId;
use qpair_reactor::event::Event;
use qpair_reactor::{LocalWaker, PollerId, Reactor};
use qpair_wire::virtio_blk::{BlkStatus, RequestHeader, RequestType, Segment, SegmentFlags};

use crate::BdevError;
use crate::chain::{Chains, Shape};
use crate::device::Shared;
use crate::link::{Bond, Phase};
use crate::ring::{Place, Ring};

/// No slot yet.
const NONE: u16 = u16::MAX;

/// Where a request slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Free,
    /// The last part of its I/O is with the target.
    Last,
    /// A flush follows.
    FlushNext,
}

/// What the ring is to the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It is the target's and ours.
    Running,
    /// There is no target: I/Os are kept for the next, all slots are free.
    Away,
    /// Requests were given up.
    Lost,
}

pub(crate) struct Slot {
    pub(crate) stage: Stage,
    /// Data goes through the bounce space.
    bounced: bool,
    /// On the free list, where it may also lie while in use.
    listed: bool,
    /// How the descriptors stand.
    shape: Shape,
    /// Most bytes that the target may say it wrote.
    capacity: u32,
    pub(crate) io: IoId,
    /// When it was submitted, as the channel counts.
    pub(crate) sequence: u32,
}

/// A queue that a channel was given.
pub(crate) struct Seat {
    pub(crate) poller: PollerId,
    pub(crate) queue: usize,
    pub(crate) place: Option<Place>,
    pub(crate) epoch: u32,
}

pub(crate) struct VirtioChannel<R: Ring> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) id: ChannelId,
    pub(crate) queue: usize,
    pub(crate) ring: R,
    pub(crate) chains: Chains,
    headers_at: u64,
    bounce_at: u64,
    bounce_bytes: u64,
    pub(crate) region: Region,
    mapping: *const Mapping,
    pub(crate) slots: Vec<Slot>,
    pub(crate) free: Vec<u16>,
    /// The slot each I/O of the reactor had last: there its descriptors stand as it needs them.
    last: Vec<u16>,
    pub(crate) inflight: u16,
    /// I/Os that wait for a target, in order; empty while there is one.
    pub(crate) kept: Vec<IoId>,
    /// Counts what was submitted.
    pub(crate) sequence: u32,
    /// The slot sent last.
    newest: u16,
    pub(crate) kick: Event,
    watch: WatchId,
    pub(crate) waker: LocalWaker,
    pub(crate) mode: Mode,
    /// Of the connection, as last seen: see [`crate::link`].
    pub(crate) epoch: u32,
}

impl<R: Ring> VirtioChannel<R> {
    pub(crate) fn open(
        shared: Arc<Shared>,
        reactor: &mut Reactor,
        layer: &Layer,
        id: ChannelId,
        Seat { poller, queue, place, epoch }: Seat,
    ) -> Result<Self, BdevError> {
        let (layout, agreed) = (shared.layout.queue(queue), &shared.agreed);
        let size = shared.layout.size();
        let region = Region::new(shared.layout.mapping().clone());
        let ring = R::new(&region, &layout, size, agreed, place)?;
        let chains = Chains::new(&region, &layout, size, agreed)?;
        let setup = &shared.queues[queue];
        let os = |what: &'static str| move |source| BdevError::Os { what: format!("virtio: {what}"), source };
        let kick = setup.kick.twin().map_err(os("kick descriptor"))?;
        let watch = reactor.watch(&setup.call, poller).map_err(os("call descriptor"))?;
        let Some(waker) = reactor.waker(poller) else { return Err(BdevError::Removing(agreed.info.name.clone())) };
        // A ring is started by its first kick, also one that will be polled.
        kick.notify();
        let slots = (0..chains.slots()).map(|_| Slot::new()).collect();
        Ok(Self {
            id,
            queue,
            headers_at: layout.headers,
            bounce_at: layout.bounce,
            bounce_bytes: u64::from(shared.layout.max_io_bytes()),
            mapping: Arc::as_ptr(shared.layout.mapping()),
            slots,
            free: (0..chains.slots()).rev().collect(),
            last: vec![NONE; layer.ios().0],
            inflight: 0,
            kept: Vec::new(),
            sequence: 0,
            newest: 0,
            kick,
            watch,
            waker,
            mode: match Bond::phase(epoch) {
                Phase::Connected => Mode::Running,
                Phase::Away => Mode::Away,
                Phase::Failed => Mode::Lost,
            },
            epoch,
            ring,
            chains,
            region,
            shared,
        })
    }

    /// The slot that this I/O had last, if it is free; else any. The layer submits no more than there are.
    #[inline]
    fn take_slot(&mut self, id: IoId) -> Option<u16> {
        let last = self.last.get(id.slot()).copied().unwrap_or(NONE);
        if let Some(slot) = self.slots.get(usize::from(last))
            && slot.stage == Stage::Free
        {
            return Some(last);
        }
        loop {
            let index = self.free.pop()?;
            let slot = &mut self.slots[usize::from(index)];
            slot.listed = false;
            if slot.stage == Stage::Free {
                if let Some(last) = self.last.get_mut(id.slot()) {
                    *last = index;
                }
                return Some(index);
            }
        }
    }

    #[inline]
    pub(crate) fn release(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.stage = Stage::Free;
        if !slot.listed {
            slot.listed = true;
            self.free.push(index);
        }
        self.inflight -= 1;
    }

    /// Puts one I/O into a slot and the slot into the batch.
    #[inline]
    fn start(&mut self, layer: &mut Layer, id: IoId) {
        let Some(index) = self.take_slot(id) else { return layer.complete(id, Status::INTERNAL_DEVICE_ERROR) };
        let io = layer.io(id);
        let sector = io.lba * self.shared.agreed.sectors;
        let (kind, sector, shape, bounced) = match io.op {
            Op::Read | Op::Write => {
                let (shape, bounced) = self.place(index, io);
                let kind = if io.op == Op::Read { RequestType::IN } else { RequestType::OUT };
                (kind, sector, shape, bounced)
            }
            Op::Flush => (RequestType::FLUSH, 0, Shape::default(), false),
            _ => self.range(index, io),
        };
        if bounced && io.op == Op::Write {
            let at = self.bounce_of(index);
            if copy_list(&io.list, &self.region, at, self.bounce_bytes, false).is_err() {
                self.slots[usize::from(index)].stage = Stage::Last;
                self.inflight += 1;
                self.release(index);
                return layer.complete(id, Status::DATA_TRANSFER_ERROR);
            }
        }
        let changes = !matches!(io.op, Op::Read | Op::Flush);
        let durable = changes && io.flags.contains(IoFlags::FUA) && self.shared.agreed.flush;
        self.send(index, RequestHeader::new(kind, sector), &shape);
        self.sequence = self.sequence.wrapping_add(1);
        let slot = &mut self.slots[usize::from(index)];
        (slot.io, slot.sequence) = (id, self.sequence);
        slot.bounced = bounced;
        slot.stage = if durable { Stage::FlushNext } else { Stage::Last };
        self.inflight += 1;
    }

    /// Writes what changed of a slot, and adds it to the batch.
    #[inline]
    fn send(&mut self, index: u16, header: RequestHeader, shape: &Shape) {
        let slot = &mut self.slots[usize::from(index)];
        if slot.shape != *shape {
            slot.shape = *shape;
            slot.capacity = 1 + if shape.incoming { shape.bytes() } else { 0 };
            self.chains.format(index, self.headers_at, shape);
        }
        self.chains.set_header(index, header);
        self.newest = index;
        self.ring.add(&self.chains, index);
    }

    fn bounce_of(&self, index: u16) -> u64 {
        self.bounce_at + u64::from(index) * self.bounce_bytes
    }

    /// Where an I/O's data is for the target: in place if it lies in the memfd in few pieces, else in the slot's bounce space.
    #[inline]
    fn place(&self, index: u16, io: &qpair_bdev::Io) -> (Shape, bool) {
        let incoming = io.op == Op::Read;
        let here = |entry: &qpair_memory::Sge| std::ptr::eq(Arc::as_ptr(entry.region.mapping()), self.mapping);
        match &io.list[..] {
            [one] if here(one) => (Shape { first: (one.offset, one.length), second: (0, 0), incoming }, false),
            [one, two] if self.shared.agreed.pieces > 1 && one.length > 0 && two.length > 0 && here(one) && here(two) => {
                (Shape { first: (one.offset, one.length), second: (two.offset, two.length), incoming }, false)
            }
            list => {
                let bytes: u32 = list.iter().map(|entry| entry.length).sum();
                (Shape { first: (self.bounce_of(index), bytes), second: (0, 0), incoming }, true)
            }
        }
    }

    /// A discard or write-zeroes: its one segment.
    fn range(&mut self, index: u16, io: &qpair_bdev::Io) -> (RequestType, u64, Shape, bool) {
        let sectors = self.shared.agreed.sectors;
        let unmap = io.op == Op::WriteZeroes && !io.flags.contains(IoFlags::NO_UNMAP);
        let flags = if unmap { SegmentFlags::UNMAP } else { SegmentFlags::empty() };
        let segment = Segment::new(io.lba * sectors, (io.blocks * sectors) as u32, flags);
        let at = self.chains.set_segment(index, segment);
        let kind = if io.op == Op::Unmap { RequestType::DISCARD } else { RequestType::WRITE_ZEROES };
        let shape = Shape { first: (at, size_of::<Segment>() as u32), second: (0, 0), incoming: false };
        (kind, 0, shape, false)
    }

    /// Takes one used entry; an error is the target's violation.
    #[inline(always)]
    fn finish(&mut self, layer: &mut Layer) -> Result<(), String> {
        let (head, written) = self.ring.next_used();
        let index = self.chains.slot(head).ok_or_else(|| format!("used id {head} is no request's"))?;
        let slot = &self.slots[usize::from(index)];
        if slot.stage == Stage::Free {
            return Err(format!("used id {head} is not under way"));
        }
        if written > slot.capacity {
            return Err(format!("used id {head} has {written} bytes of {} that could be written", slot.capacity));
        }
        let id = slot.io;
        let mut status = self.outcome(index, written);
        if slot.stage == Stage::FlushNext && !status.is_error() {
            self.send(index, RequestHeader::new(RequestType::FLUSH, 0), &Shape::default());
            self.slots[usize::from(index)].stage = Stage::Last;
            return Ok(());
        }
        if slot.bounced && slot.shape.incoming && !status.is_error() {
            let at = self.bounce_of(index);
            if copy_list(&layer.io(id).list, &self.region, at, self.bounce_bytes, true).is_err() {
                status = Status::DATA_TRANSFER_ERROR;
            }
        }
        if status == Status::INTERNAL_DEVICE_ERROR {
            self.report(layer, id);
        }
        self.release(index);
        layer.complete(id, status);
        Ok(())
    }

    /// Takes so many answers, as far as they can be believed; an error is the target's violation. (Inline also though `leave` calls it.)
    #[inline(always)]
    pub(crate) fn take(&mut self, layer: &mut Layer, count: u16) -> Result<(), String> {
        if count > self.inflight {
            return Err(format!("the ring says that {count} requests are done, {} are under way", self.inflight));
        }
        for _ in 0..count {
            self.finish(layer)?;
        }
        Ok(())
    }

    #[cold]
    fn report(&self, layer: &mut Layer, id: IoId) {
        let (op, lba, blocks) = (layer.io(id).op, layer.io(id).lba, layer.io(id).blocks);
        layer.report_failure(self.id, "io", |_| format!("the target failed an I/O ({op:?} of {blocks} blocks at block {lba})"));
    }

    /// A length of zero says that not even the status was written, and a short one that data is missing.
    #[inline]
    fn outcome(&self, index: u16, written: u32) -> Status {
        let slot = &self.slots[usize::from(index)];
        if written == 0 {
            return Status::DATA_TRANSFER_ERROR;
        }
        match BlkStatus(self.chains.status(index)) {
            BlkStatus::OK if written < slot.capacity => Status::DATA_TRANSFER_ERROR,
            BlkStatus::OK => Status::SUCCESS,
            BlkStatus::UNSUPP => Status::INVALID_OPCODE,
            _ => Status::INTERNAL_DEVICE_ERROR,
        }
    }

    /// Ends all that is under way: the target is not to be believed, or does not answer.
    #[cold]
    pub(crate) fn give_up(&mut self, layer: &mut Layer, status: Status) {
        for slot in self.slots.iter_mut().filter(|slot| slot.stage != Stage::Free) {
            slot.stage = Stage::Free;
            layer.complete(slot.io, status);
        }
        self.kept.drain(..).for_each(|id| layer.complete(id, status));
        self.mode = Mode::Lost;
        self.inflight = 0;
        self.ring.forget();
        // None of these slots goes out again: see `submit`.
        self.free.clear();
    }

    /// The target is not to be believed: it loses the connection, or what it has is given up.
    #[cold]
    fn distrust(&mut self, layer: &mut Layer, reason: &str) {
        let queue = self.queue;
        let outcome = self.shared.bond.consequence();
        layer.report_failure(self.id, "target", |_| format!("queue {queue}: {reason}; {outcome}"));
        self.shared.fail(self.epoch, queue, reason);
        self.turn_away();
        self.settle(layer);
    }

    #[inline]
    fn ring_out(&mut self) {
        if self.ring.publish() {
            self.kick.notify();
        }
    }
}

impl Slot {
    fn new() -> Self {
        let (shape, io) = (Shape::default(), IoId::default());
        Self { stage: Stage::Free, bounced: false, listed: true, shape, capacity: 1, io, sequence: 0 }
    }

    /// Its descriptors are as they were in the beginning.
    pub(crate) fn forget_shape(&mut self) {
        (self.shape, self.capacity) = (Shape::default(), 1);
    }
}

impl<R: Ring> Channel for VirtioChannel<R> {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        if self.mode != Mode::Running {
            return self.put_off(layer, batch);
        }
        if batch.len() == 1 {
            self.ring.prefetch_publish();
        }
        for id in batch {
            self.start(layer, *id);
        }
    }

    fn unplug(&mut self, _: &mut Layer, _: &mut Reactor) {
        self.ring_out();
        self.waker.wake();
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        if self.shared.bond.epoch() != self.epoch {
            return self.follow(layer, reactor);
        }
        let count = self.ring.waiting();
        if count == 0 || self.mode != Mode::Running {
            return 0;
        }
        if count == 1 {
            // All lines at once: the status is read next, and the one after it will most likely write this slot's header and the next
            // avail entry. They travel while the completion is passed on.
            self.chains.prefetch(self.newest);
            self.ring.prefetch_avail();
        }
        match self.take(layer, count) {
            Ok(()) => {
                self.ring.stay_silent();
                self.ring_out();
            }
            Err(reason) => self.distrust(layer, &reason),
        }
        usize::from(count)
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        self.mode != Mode::Running || self.ring.listen()
    }

    fn disarm(&mut self, _: &mut Reactor) {
        self.ring.silence();
    }

    /// A request cannot be called back from a target. Only where the device is going all are given up: when the removal's deadline has passed, or a front
    /// end that cannot wait for that asks before.
    fn abort(&mut self, layer: &mut Layer, _: &mut Reactor, id: IoId) {
        if layer.is_closed(self.id) {
            self.give_up(layer, Status::ABORT_REQUESTED);
        } else if self.mode == Mode::Away {
            self.call_back(layer, id);
        }
    }

    fn close(&mut self, _: &mut Layer, reactor: &mut Reactor) {
        reactor.unwatch(self.watch);
        let place = (self.mode == Mode::Running).then(|| self.ring.place());
        self.shared.return_queue(self.queue, self.epoch, place, self.mode == Mode::Lost);
    }
}
