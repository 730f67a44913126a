//! One running ring on its reactor, of either kind: takes requests, submits them in batches, puts back what is done.
//!
//! **Each request is answered exactly once.** An id (a split ring's head) is accepted only if it is not in flight ([`Broken::InFlight`], [`Broken::IdInFlight`]), and is
//! then in flight until its last I/O was reaped; reaping is exactly once by the layer's contract, and only there the used
//! entry is written. A ring that drains takes nothing more and stops when nothing is in flight; so no used entry, no
//! status and no data are written after it said it was quiet. A ring that failed writes nothing more at all.

mod accept;
mod order;
mod prepare;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use qpair_bdev::{ChannelId, IoId, Layer, Op, QueueId};
use qpair_memory::{GuestMemory, Place};
use qpair_reactor::driver::WatchId;
use qpair_reactor::event::Event;
use qpair_reactor::log::{self, Level};
use qpair_reactor::{Poller, PollerId, Reactor, TimerId};
use qpair_wire::nvme::Status;
use qpair_wire::virtio_blk::BlkStatus;
use zerocopy::FromZeros;

use crate::coalesce::Interrupts;
use crate::config::RANGES_MAX;
use crate::log::Logged;
use crate::request;
use crate::ring::{Chain, Kind, Taken, Tracker};
use crate::session::Setup;
use crate::stats::QueueState;
use crate::{Broken, PackedRing, SplitRing, VhostError};
use order::Order;
use prepare::usual;

/// Requests taken between two looks at what is done: small enough that the guest gets answers while we work on.
const CHUNK: u16 = 32;
/// Chunks a poll, so that one ring cannot starve its neighbours.
const CHUNKS: usize = 8;
/// How far ahead descriptors are fetched.
const AHEAD: u16 = 4;

/// What is kept of a request while it is in flight. Indexed by its id. Zeroes: the id is not in flight; so ids that a driver never uses cost no memory.
#[derive(Clone, Copy, FromZeros)]
struct Slot {
    status: Place,
    written: u32,
    /// I/Os not yet reaped; 0: the id is not in flight.
    pending: u32,
    /// The first error.
    failed: Status,
    /// Descriptors that go by with it.
    count: u16,
    /// Where the inflight region has it.
    entry: u16,
}

/// Told when a draining ring has stopped, with its base.
pub(crate) type Stopped = Box<dyn FnOnce(&mut Reactor, u32)>;

/// A queue for those who start and stop it, whatever its ring.
pub(crate) trait Control {
    /// Takes nothing new; `stopped` is called when all is answered and everything is let go of.
    fn stop(&mut self, reactor: &mut Reactor, abort_after_ns: u64, stopped: Stopped);

    /// Another descriptor to interrupt by.
    fn set_call(&mut self, call: Option<Event>);
}

/// Puts a ring to work on this reactor.
pub(crate) fn start(reactor: &mut Reactor, setup: Setup) -> Result<Rc<RefCell<dyn Control>>, VhostError> {
    Ok(match (setup.packed, setup.log.is_some()) {
        (false, false) => Queue::<SplitRing>::start(reactor, setup)?,
        (true, false) => Queue::<PackedRing>::start(reactor, setup)?,
        (false, true) => Queue::<Logged<SplitRing>>::start(reactor, setup)?,
        (true, true) => Queue::<Logged<PackedRing>>::start(reactor, setup)?,
    })
}

/// See the module's doc.
struct Queue<R: Kind> {
    setup: Setup,
    ring: R,
    memory: GuestMemory,
    tracker: Option<R::Tracker>,
    /// What a predecessor had not answered, by its entries in the inflight region, to be submitted first.
    resubmit: Vec<u16>,
    /// Where the newest request's header was, and its status.
    header_at: Place,
    status_at: Place,
    slots: Vec<Slot>,
    layer: Rc<RefCell<Layer>>,
    channel: ChannelId,
    completions: QueueId,
    poller: PollerId,
    watch: Option<WatchId>,
    state: QueueState,
    inflight: u32,
    /// Requests answered and not yet shown.
    answered: u32,
    batch: Vec<IoId>,
    done: Vec<IoId>,
    block_shift: u32,
    /// If the driver wants its answers in the order of its requests.
    order: Option<Order>,
    /// Writes may take the short way: they are allowed, and not each to be durable.
    plain_writes: bool,
    /// If interrupts are coalesced.
    interrupts: Option<Rc<RefCell<Interrupts>>>,
    stopped: Option<Stopped>,
    abort_timer: Option<TimerId>,
}

/// The poller; the queue itself is shared with those who stop it.
struct QueuePoller<R: Kind>(Rc<RefCell<Queue<R>>>);

impl<R: Kind> Queue<R> {
    fn start(reactor: &mut Reactor, setup: Setup) -> Result<Rc<RefCell<Self>>, VhostError> {
        let memory = setup.memory()?;
        let mut ring = R::open(&memory, &setup)?;
        let tracked = setup.inflight.as_ref().map(|region| ring.track(region, setup.index)).transpose()?;
        let (tracker, resubmit) = tracked.map_or((None, Vec::new()), |(tracker, left)| (Some(tracker), left));
        let layer = Layer::of(reactor);
        let channel = setup.descriptor.channel_or_gone(reactor, &mut layer.borrow_mut(), &setup.info)?;
        let poller = reactor.reserve_poller(format!("vhost_{}_{}", setup.name, setup.index));
        let waker = reactor.waker(poller).ok_or_else(|| VhostError::State("no poller".into()))?;
        let completions = layer.borrow_mut().add_queue(waker);
        let slots_count = ring.size();
        let slots = Slot::new_vec_zeroed(usize::from(slots_count)).map_err(|_| VhostError::State("no memory for a ring".into()))?;
        setup.stats.set_state(QueueState::Running);
        let call = || setup.call.as_ref().map(Event::twin).transpose().map_err(|error| VhostError::Os("dup", error));
        let coalescing = setup.coalescing.map(|coalescing| Ok::<_, VhostError>((coalescing, call()?))).transpose()?;
        let interrupts = coalescing.map(|(coalescing, call)| Interrupts::new(reactor, coalescing, call, setup.stats.clone()));
        let queue = Rc::new(RefCell::new(Self {
            ring,
            memory,
            tracker,
            resubmit,
            header_at: Place::default(),
            status_at: Place::default(),
            slots,
            layer,
            channel,
            completions,
            poller,
            watch: None,
            state: QueueState::Running,
            inflight: 0,
            answered: 0,
            batch: Vec::with_capacity(usize::from(CHUNK) * RANGES_MAX),
            done: Vec::with_capacity(1024),
            block_shift: setup.info.block_size.trailing_zeros(),
            order: setup.in_order.then(|| Order::new(usize::from(slots_count))),
            plain_writes: !setup.readonly && !setup.durable,
            interrupts,
            stopped: None,
            abort_timer: None,
            setup,
        }));
        reactor.install_poller(poller, Box::new(QueuePoller(queue.clone())));
        queue.borrow_mut().watch_kick(reactor)?;
        // A predecessor may have shown an answer and died before it told of it.
        queue.borrow_mut().interrupt();
        Ok(queue)
    }

    /// Listens for kicks. On failure nothing of the ring is left.
    fn watch_kick(&mut self, reactor: &mut Reactor) -> Result<(), VhostError> {
        let Some(kick) = &self.setup.kick else { return Ok(()) };
        match reactor.watch(kick, self.poller) {
            Ok(watch) => self.watch = Some(watch),
            Err(error) => {
                self.leave(reactor);
                self.set_state(QueueState::Stopped);
                return Err(VhostError::Os("watch the kick descriptor", error));
            }
        }
        Ok(())
    }

    /// Gives the reactor and the layer back what the ring has of them.
    fn leave(&mut self, reactor: &mut Reactor) {
        if let Some(watch) = self.watch.take() {
            reactor.unwatch(watch);
        }
        if let Some(timer) = self.abort_timer.take() {
            reactor.cancel(timer);
        }
        if let Some(interrupts) = &self.interrupts {
            interrupts.borrow_mut().end(reactor);
        }
        {
            let mut layer = self.layer.borrow_mut();
            layer.remove_queue(self.completions);
            layer.close_channel(reactor, self.channel);
        }
        reactor.remove_poller(self.poller);
    }

    fn set_state(&mut self, state: QueueState) {
        self.state = state;
        self.setup.stats.set_state(state);
    }

    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        let mut work = 0;
        if self.state == QueueState::Running && self.vanished() {
            self.fail(Broken::MemoryVanished);
        }
        for _ in 0..CHUNKS {
            work += self.put_back(&mut layer, reactor);
            if !self.takes() {
                break;
            }
            match self.take(&mut layer, reactor) {
                Ok(0) => break,
                Ok(count) => work += count,
                Err(broken) => self.fail(broken),
            }
        }
        if self.state != QueueState::Failed && self.ring.log_is_dead() {
            self.fail(Broken::LogVanished);
        }
        if work > 0 {
            if self.state != QueueState::Failed && self.ring.wants_interrupt() {
                match &self.interrupts {
                    None => self.interrupt(),
                    Some(interrupts) => Interrupts::want(interrupts, reactor),
                }
            }
            self.book();
        }
        work
    }

    /// Whether there may be requests to take. What a predecessor had taken is answered even by a ring that drains.
    #[inline]
    fn takes(&self) -> bool {
        self.state == QueueState::Running || (self.state == QueueState::Draining && !self.resubmit.is_empty())
    }

    #[inline]
    fn vanished(&self) -> bool {
        self.memory.is_dead() || self.setup.inflight.as_ref().is_some_and(|region| region.is_dead())
    }

    fn interrupt(&mut self) {
        if let Some(call) = &self.setup.call {
            call.notify();
            self.setup.stats.interrupts.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn book(&self) {
        let stats = &self.setup.stats;
        stats.inflight.store(u64::from(self.inflight), Ordering::Relaxed);
        let (avail, used) = self.ring.positions();
        stats.avail_idx.store(u64::from(avail), Ordering::Relaxed);
        stats.used_idx.store(u64::from(used), Ordering::Relaxed);
    }

    /// Reaps, writes statuses and used entries, and shows them to the driver.
    #[inline]
    fn put_back(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        layer.reap(reactor, self.completions, &mut self.done);
        if self.done.is_empty() {
            return 0;
        }
        let count = self.done.len();
        if count == 1 {
            self.ring.prefetch_publish();
        }
        for position in 0..count {
            let id = self.done[position];
            let (tag, status) = layer.finish(id);
            let name = tag as u16;
            let slot = &mut self.slots[usize::from(name)];
            slot.pending -= 1;
            if status.is_error() && !slot.failed.is_error() {
                slot.failed = status;
            }
            if slot.pending == 0 {
                let answer = if slot.failed.is_error() { slot.failed.row().virtio } else { BlkStatus::OK };
                self.inflight -= 1;
                self.answer(name, answer);
            }
        }
        self.done.clear();
        self.show();
        count
    }

    /// Publishes what was pushed.
    #[inline]
    fn show(&mut self) {
        let count = std::mem::take(&mut self.answered);
        if count == 0 || self.state == QueueState::Failed {
            return;
        }
        self.publish();
        // One writer: no locked instruction is needed.
        let requests = &self.setup.stats.requests;
        requests.store(requests.load(Ordering::Relaxed) + u64::from(count), Ordering::Relaxed);
    }

    #[inline]
    fn publish(&mut self) {
        self.ring.publish();
        if let Some(tracker) = &mut self.tracker {
            tracker.end_batch(&self.ring);
        }
    }

    /// Writes the status byte and a used entry; nothing if the ring has failed: then what the disk wrote is logged and no more.
    #[inline]
    fn answer(&mut self, name: u16, status: BlkStatus) {
        if self.state == QueueState::Failed {
            return self.ring.mark(name);
        }
        let slot = &self.slots[usize::from(name)];
        let (region, offset) = self.memory.at(slot.status);
        // The place was checked against this table when the request was taken.
        let _ = region.write(offset, &[status.0]);
        self.ring.mark(name);
        let written = if status == BlkStatus::OK { slot.written } else { 1 };
        match &self.order {
            None => self.push(name, written),
            Some(_) => self.answer_in_order(name, written),
        }
    }

    /// Writes a used entry.
    #[inline]
    fn push(&mut self, name: u16, written: u32) {
        let slot = &self.slots[usize::from(name)];
        self.ring.push_used(Taken { id: name, count: slot.count }, written);
        self.answered += 1;
        if let Some(tracker) = &mut self.tracker {
            tracker.add_done(&self.ring, slot.entry);
            if R::Tracker::ONE_BY_ONE {
                self.publish();
            }
        }
    }

    /// Takes a chunk of requests and submits it. Returns how many were taken.
    #[inline]
    fn take(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> Result<usize, Broken> {
        if !self.resubmit.is_empty() {
            return self.take_resubmitted(layer, reactor);
        }
        let count = self.ring.waiting()?.min(CHUNK);
        if count == 0 {
            return Ok(0);
        }
        if count == 1 {
            self.fetch_lone();
        }
        for ahead in 0..count.min(AHEAD) {
            self.ring.prefetch(ahead);
        }
        let (taken, outcome) = self.take_chunk(layer, count);
        self.ring.rest();
        self.submit(layer, reactor);
        self.show();
        outcome.map(|()| taken)
    }

    #[inline]
    fn take_chunk(&mut self, layer: &mut Layer, count: u16) -> (usize, Result<(), Broken>) {
        for taken in 0..count {
            if taken + AHEAD < count {
                self.ring.prefetch(AHEAD);
            }
            let accepted = match self.ring.ready() {
                Ok(true) => self.accept(layer, None),
                Ok(false) => Ok(false),
                Err(broken) => Err(broken),
            };
            match accepted {
                Ok(true) => {}
                Ok(false) => return (taken.into(), Ok(())),
                Err(broken) => return (taken.into(), Err(broken)),
            }
        }
        (count.into(), Ok(()))
    }

    /// Of a request that came alone, all lines are asked for at once: where the last one's header was is read next, where its status was and
    /// the used entry are written last. They travel while it is worked on. Of many, the processor finds enough to do meanwhile.
    #[inline]
    fn fetch_lone(&self) {
        let (region, offset) = self.memory.at(self.header_at);
        region.prefetch(offset, 1);
        let (region, offset) = self.memory.at(self.status_at);
        region.prefetch_write(offset);
        self.ring.prefetch_used();
    }

    fn take_resubmitted(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> Result<usize, Broken> {
        let left = std::mem::take(&mut self.resubmit);
        let mut taken = 0;
        let mut outcome = Ok(());
        for (position, entry) in left.iter().enumerate() {
            match self.accept(layer, Some(*entry)) {
                Ok(true) => taken += 1,
                Ok(false) => {
                    self.resubmit = left[position..].to_vec();
                    break;
                }
                Err(broken) => {
                    outcome = Err(broken);
                    break;
                }
            }
        }
        self.submit(layer, reactor);
        self.show();
        outcome.map(|()| taken)
    }

    #[inline]
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if !self.batch.is_empty() {
            layer.submit(reactor, self.channel, &self.batch);
            self.batch.clear();
            layer.unplug(reactor);
        }
    }

    /// Makes I/Os of one request, or answers it at once: the ring's next, or one that a predecessor left in this entry. False: no I/O is
    /// free, try again later.
    #[inline]
    fn accept(&mut self, layer: &mut Layer, left: Option<u16>) -> Result<bool, Broken> {
        let Some(id) = layer.take() else { return Ok(false) };
        if left.is_none() && self.accept_usual(layer, id) {
            return Ok(true);
        }
        self.accept_any(layer, id, left)
    }

    /// The short way: a read or write in the usual cut, whole blocks, under a free id. False: nothing has changed.
    #[inline]
    fn accept_usual(&mut self, layer: &mut Layer, id: IoId) -> bool {
        let io = layer.io_mut(id);
        let (head, found) = {
            let mut chain = self.ring.chain();
            let request = request::parse_usual(&mut chain, &self.memory, self.setup.indirect, &mut io.list);
            (chain.head(), request.map(|request| (request, chain.taken())))
        };
        let Some((request, taken)) = found else { return false };
        let free = self.slots.get(usize::from(taken.id)).is_some_and(|slot| slot.pending == 0);
        let plain = |op: &Op| *op == Op::Read || self.plain_writes;
        let op = usual(&request).filter(|op| free && plain(op) && self.fits_blocks(&request));
        let op = op.filter(|_| self.ring.note(head, taken.id, &self.memory, &request, &io.list).is_ok());
        let Some(op) = op else {
            io.list.clear();
            return false;
        };
        (self.header_at, self.status_at) = (request.header_at.unwrap_or_default(), request.status);
        let written = prepare::fill(io, op, &request, self.block_shift);
        io.push(self.completions, u64::from(taken.id));
        let entry = self.tracker.as_mut().map_or(0, |tracker| tracker.mark(&self.ring, taken));
        self.slots[usize::from(taken.id)] =
            Slot { status: request.status, written, pending: 1, failed: Status::SUCCESS, count: taken.count, entry };
        self.ring.took(taken);
        if let Some(order) = &mut self.order {
            order.took(taken.id);
        }
        self.batch.push(id);
        self.inflight += 1;
        true
    }

    /// Ends the queue by name. What is in flight is still reaped, and no longer answered.
    #[cold]
    fn fail(&mut self, broken: Broken) {
        // Zeros where memory was look like any broken rule.
        let broken = if self.vanished() { Broken::MemoryVanished } else { broken };
        // Whoever listens to failures tells of it; a second line would only use up what may be said a second.
        log::say(Level::Debug, "vhost", format_args!("{} queue {}: {broken}; the queue is stopped", self.setup.name, self.setup.index));
        self.set_state(QueueState::Failed);
        if let Some(err) = &self.setup.err {
            err.notify();
        }
        (self.setup.failed)(self.setup.index, broken);
    }

    /// Stops for good when draining is over. True: it was the end.
    fn end_if_drained(&mut self, reactor: &mut Reactor) -> bool {
        if self.stopped.is_none() || self.inflight > 0 || self.takes() {
            return false;
        }
        let Some(stopped) = self.stopped.take() else { return false };
        self.leave(reactor);
        let base = self.ring.base();
        if self.state != QueueState::Failed {
            self.set_state(QueueState::Stopped);
        }
        self.setup.stats.inflight.store(0, Ordering::Relaxed);
        // Told in the next turn: the holds on guest memory go with this queue, and that goes with its poller.
        reactor.after(0, move |reactor| stopped(reactor, base));
        true
    }
}

impl<R: Kind> Control for Queue<R> {
    fn stop(&mut self, reactor: &mut Reactor, abort_after_ns: u64, stopped: Stopped) {
        self.stopped = Some(stopped);
        if self.state == QueueState::Running {
            self.set_state(QueueState::Draining);
        }
        if let Some(waker) = reactor.waker(self.poller) {
            waker.wake();
        }
        let (layer, completions) = (self.layer.clone(), self.completions);
        self.abort_timer = Some(reactor.after(abort_after_ns, move |reactor| layer.borrow_mut().abort_queue(reactor, completions)));
    }

    fn set_call(&mut self, call: Option<Event>) {
        if let Some(interrupts) = &self.interrupts {
            interrupts.borrow_mut().set_call(call.as_ref().and_then(|call| call.twin().ok()));
        }
        self.setup.call = call;
        // What was done while nobody could be told is told now: a spurious interrupt is harmless.
        self.interrupt();
    }
}

impl<R: Kind> Poller for QueuePoller<R> {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let mut queue = self.0.borrow_mut();
        let work = queue.poll(reactor);
        if queue.stopped.is_some() && queue.end_if_drained(reactor) {
            return work + 1;
        }
        work
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        let mut queue = self.0.borrow_mut();
        if queue.state != QueueState::Running {
            return !queue.takes();
        }
        // Without a kick there is nothing to be woken by.
        queue.resubmit.is_empty() && queue.ring.arm() && queue.watch.is_some()
    }

    fn disarm(&mut self, _: &mut Reactor) {
        let mut queue = self.0.borrow_mut();
        if queue.state == QueueState::Running {
            queue.ring.disarm();
            queue.setup.stats.kicks.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn poisoned(&mut self, reactor: &mut Reactor, why: &str) {
        let mut queue = self.0.borrow_mut();
        queue.fail(Broken::Internal(why.to_owned()));
        // A new poller reaps what is still in flight, so that the queue can be stopped in order.
        queue.poller = reactor.reserve_poller(format!("vhost_{}_{}_failed", queue.setup.name, queue.setup.index));
        if let Some(waker) = reactor.waker(queue.poller) {
            queue.layer.borrow_mut().set_waker(queue.completions, waker);
        }
        reactor.install_poller(queue.poller, Box::new(QueuePoller(self.0.clone())));
    }
}
