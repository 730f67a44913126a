//! One reactor's side of the block-device layer: its I/Os, channels and completion queues.
//!
//! How it works. `submit` checks a batch, and passes what is plain straight to the channel. What must be split, wait
//! for room or wait for a paused device takes the slow path. `complete` only books and queues; [`Layer::settle`] does
//! what follows from completions (starts what waited, runs inner layers, tells drains that all is quiet) in a loop, never
//! by recursion. Whoever reaps settles first; the layer has a poller of its own for when nobody does.
//!
//! **Each I/O completes exactly once.** An I/O is in one state: held by its front end, waiting here, submitted, done.
//! `submit` takes it from held; it leaves `submitted` only in `complete`, which asserts that state and the name's
//! generation, so a second completion is a panic that poisons the module that did it and no second delivery. It gets
//! there at least once because every path ends in `complete`: refusals in `submit`; waiting ones when room comes, when the
//! device resumes, or when it closes; parents when their last child ends; those with a device by the device's
//! contract, and when a module panics by [`Layer::poison`], which completes whatever it still had.

mod abort;
mod batch;
mod channels;
mod check;
mod dues;
mod emulate;
pub mod health;
mod limits;
pub(crate) mod overdue;
mod ranges;
mod settle;
mod split;
mod stacking;
mod trace;
pub mod watch;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use qpair_memory::Region;
use qpair_reactor::{LocalWaker, PollerId, Reactor};
use qpair_wire::nvme::Status;

use crate::io::{Slab, State};
use crate::measures::Observer;
use crate::ranges::Range;
use crate::trace::{Point, Why};
use crate::{Channel, Device, DeviceId, FRAMES_MAX, Frame, Info, Io, IoFlags, IoId, Op, Registry, Stats, lifecycle};
use check::Route;
pub(crate) use split::{ZEROS, slice};
use trace::ENTERED;

/// I/Os of a reactor unless configured.
pub const IOS_DEFAULT: u32 = 2048;

/// Names a channel of one reactor's layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ChannelId(pub(crate) u32);

/// Names a completion queue of one reactor's layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct QueueId(pub(crate) u32);

/// Who reaps a completion queue.
enum Owner {
    FrontEnd(LocalWaker),
    /// The layer: children of split I/Os.
    Split(ChannelId),
    /// A channel stacked on others.
    Channel(ChannelId),
    Nobody,
}

struct Queue {
    entries: Vec<IoId>,
    owner: Owner,
    /// Whose I/O comes here, for time-outs; 0: nobody's.
    descriptor: u64,
    /// Plain I/Os go on to whoever is above without a call of [`Channel::completed`].
    straight: bool,
}

/// Whether a channel takes I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChannelState {
    Open,
    /// New I/O waits here.
    Paused,
    /// New I/O fails: the device is going or gone.
    Closed,
}

type Then = Box<dyn FnOnce(&mut Layer, &mut Reactor)>;

pub(crate) struct Slot {
    pub(crate) device_id: DeviceId,
    pub(crate) info: Arc<Info>,
    pub(crate) registry: Arc<Registry>,
    /// Gone once the device was removed; the slot stays until its last user closes it.
    pub(crate) device: Option<Arc<dyn Device>>,
    channel: Option<Box<dyn Channel>>,
    state: ChannelState,
    users: u32,
    /// I/Os with the device.
    inflight: u32,
    /// Split I/Os not yet complete.
    parents: u32,
    /// Resets asked for through this channel and not yet answered.
    resets: u32,
    /// The last user left: freed when nothing is under way or waits.
    closing: bool,
    /// The module panicked or was let go; nothing is passed to it.
    gone: bool,
    waiting: VecDeque<IoId>,
    splitting: VecDeque<IoId>,
    children: Vec<IoId>,
    /// What is done by several I/Os for want of the device's own way, and I/Os to do it.
    jobs: Vec<emulate::Job>,
    helpers: Vec<IoId>,
    gate: ranges::Gate,
    /// Channels below, opened by this channel's module.
    bases: Vec<ChannelId>,
    /// I/Os of the module's own.
    reserve: Vec<IoId>,
    split_queue: QueueId,
    limits: Option<Box<limits::Throttle>>,
    stats: Stats,
    observer: Option<Box<Observer>>,
    failing: Option<Box<health::Failing>>,
    when_quiet: Vec<Then>,
    poller: PollerId,
    plugged: bool,
    attention: bool,
}

impl Slot {
    fn is_quiet(&self) -> bool {
        self.inflight == 0 && self.parents == 0
    }

    /// Whether a completion means nothing to anything that waits here.
    #[inline]
    fn is_calm(&self) -> bool {
        self.state == ChannelState::Open
            && self.waiting.is_empty()
            && self.splitting.is_empty()
            && self.when_quiet.is_empty()
            && self.jobs.is_empty()
            && !self.closing
            && !self.is_stalled()
    }

    /// Whether something that its limit let go waits for the device to have room.
    #[inline]
    fn is_stalled(&self) -> bool {
        self.limits.as_ref().is_some_and(|limits| limits.is_stalled())
    }

    fn may_be_freed(&self) -> bool {
        let unlimited = self.limits.as_ref().is_none_or(|limits| limits.is_empty());
        let nothing_waits = self.waiting.is_empty() && unlimited && self.gate.outside.is_empty() && self.when_quiet.is_empty();
        self.closing && self.is_quiet() && self.resets == 0 && nothing_waits
    }

    /// Whether there is a histogram.
    #[inline]
    fn counts(&self) -> bool {
        self.observer.as_ref().is_some_and(|observer| observer.counting.is_some())
    }

    #[inline]
    fn room(&self) -> usize {
        match self.info.queue_depth {
            0 => usize::MAX,
            depth => (depth as usize).saturating_sub(self.inflight as usize),
        }
    }
}

/// See the module's doc. One per reactor: [`Layer::of`].
pub struct Layer {
    me: Weak<RefCell<Layer>>,
    ios: Slab,
    slots: Vec<Option<Slot>>,
    by_device: HashMap<DeviceId, ChannelId>,
    queues: Vec<Queue>,
    plugged: Vec<ChannelId>,
    attention: Vec<ChannelId>,
    inner_ready: Vec<QueueId>,
    /// Empty lists with room, for who needs one for a while: a stack of bdevs needs several at once.
    scratch: Vec<Vec<IoId>>,
    /// What write-zeroes is emulated from; made when a channel needs it.
    zeros: Option<Region>,
    /// Devices that a job holds still: a channel opened meanwhile starts paused.
    held: Vec<DeviceId>,
    /// Ranges under lock.
    ranges: Vec<(DeviceId, Range)>,
    bounces: emulate::Bounces,
    waker: Option<LocalWaker>,
    throttled: limits::Throttled,
    watches: Vec<watch::Watch>,
    trace: trace::Tracer,
    now_ns: u64,
}

#[derive(Default)]
struct Holder(RefCell<Option<Rc<RefCell<Layer>>>>);

impl Layer {
    /// The reactor's layer, made on first use with [`IOS_DEFAULT`] I/Os.
    pub fn of(reactor: &mut Reactor) -> Rc<RefCell<Self>> {
        Self::install(reactor, IOS_DEFAULT)
    }

    /// As [`of`](Self::of), with a count of I/Os for the first use.
    pub fn install(reactor: &mut Reactor, ios: u32) -> Rc<RefCell<Self>> {
        let holder = reactor.local::<Holder>();
        if let Some(layer) = &*holder.0.borrow() {
            return layer.clone();
        }
        let layer = Rc::new_cyclic(|me| RefCell::new(Self::new(me.clone(), ios)));
        let poller = reactor.add_poller("bdev_layer", Box::new(settle::Settler(Rc::downgrade(&layer))));
        layer.borrow_mut().waker = reactor.waker(poller);
        holder.0.replace(Some(layer.clone()));
        layer
    }

    fn new(me: Weak<RefCell<Self>>, ios: u32) -> Self {
        Self {
            me,
            ios: Slab::new(ios),
            slots: Vec::new(),
            by_device: HashMap::new(),
            queues: Vec::new(),
            plugged: Vec::with_capacity(16),
            attention: Vec::with_capacity(16),
            inner_ready: Vec::with_capacity(16),
            scratch: (0..4 * FRAMES_MAX).map(|_| Vec::with_capacity(256)).collect(),
            zeros: None,
            held: Vec::new(),
            ranges: Vec::new(),
            bounces: emulate::Bounces::default(),
            waker: None,
            throttled: limits::Throttled::default(),
            watches: Vec::new(),
            trace: trace::Tracer::default(),
            now_ns: 0,
        }
    }

    /// Another waker for a front end's queue: its poller was replaced.
    pub fn set_waker(&mut self, queue: QueueId, waker: LocalWaker) {
        self.queues[queue.0 as usize].owner = Owner::FrontEnd(waker);
    }

    /// A completion queue for a front end; `waker` is woken when something comes.
    pub fn add_queue(&mut self, waker: LocalWaker) -> QueueId {
        self.new_queue(Owner::FrontEnd(waker))
    }

    /// A completion queue for a channel stacked on others: [`Channel::completed`] gets what comes.
    pub fn add_inner_queue(&mut self, channel: ChannelId) -> QueueId {
        self.new_queue(Owner::Channel(channel))
    }

    /// As [`add_inner_queue`](Self::add_inner_queue), for what the channel would only [`pass_up`](Self::pass_up): reads and writes go up as soon as they
    /// end, while their lines are in the cache. All else comes to [`Channel::completed`].
    pub fn add_straight_queue(&mut self, channel: ChannelId) -> QueueId {
        let queue = self.add_inner_queue(channel);
        self.queues[queue.0 as usize].straight = true;
        queue
    }

    fn new_queue(&mut self, owner: Owner) -> QueueId {
        let queue = Queue { entries: Vec::with_capacity(256), owner, descriptor: 0, straight: false };
        let free = (0..self.queues.len()).find(|index| {
            let Queue { owner, entries, .. } = &self.queues[*index];
            matches!(owner, Owner::Nobody) && entries.is_empty() && !self.ios.names_queue(QueueId(*index as u32))
        });
        let index = free.unwrap_or(self.queues.len());
        match self.queues.get_mut(index) {
            Some(place) => *place = queue,
            None => self.queues.push(queue),
        }
        QueueId(index as u32)
    }

    /// Gives a queue up. I/Os that its owner has not reaped go back to the slab when they are done; those that it
    /// passed on for somebody above fail there.
    pub fn remove_queue(&mut self, queue: QueueId) {
        let place = &mut self.queues[queue.0 as usize];
        place.owner = Owner::Nobody;
        if !place.entries.is_empty() {
            self.inner_ready.push(queue);
            self.call_settler();
        }
    }

    /// Has the layer's own poller settle soon.
    #[inline]
    fn call_settler(&self) {
        if let Some(waker) = &self.waker {
            waker.wake();
        }
    }

    /// Takes an I/O from the slab; None: all are in use, try again after some completed.
    #[inline]
    pub fn take(&mut self) -> Option<IoId> {
        self.ios.take()
    }

    /// Returns an I/O to the slab, and its holds on memory.
    #[inline]
    pub fn give_back(&mut self, id: IoId) {
        self.ios.give_back(id);
    }

    /// An I/O by name. Panics on a stale name.
    #[inline]
    pub fn io(&self, id: IoId) -> &Io {
        self.ios.get(id)
    }

    /// An I/O by name, to be filled in or worked on.
    #[inline]
    pub fn io_mut(&mut self, id: IoId) -> &mut Io {
        let io = self.ios.get_mut(id);
        io.sized = 0;
        io
    }

    /// Whether the name still means the same I/O.
    #[inline]
    pub fn is_current(&self, id: IoId) -> bool {
        self.ios.is_current(id)
    }

    /// I/Os in the slab, and how many of them are free.
    pub fn ios(&self) -> (usize, usize) {
        (self.ios.count(), self.ios.free_count())
    }

    /// Submits I/Os that the caller holds, each with its frame pushed. They are the layer's until reaped.
    #[inline]
    pub fn submit(&mut self, reactor: &mut Reactor, channel: ChannelId, batch: &[IoId]) {
        self.now_ns = reactor.now_ns();
        if self.all_plain(channel, batch) {
            self.dispatch(reactor, channel, batch, ENTERED);
        } else {
            self.submit_slowly(reactor, channel, batch);
        }
    }

    #[cold]
    fn submit_slowly(&mut self, reactor: &mut Reactor, channel: ChannelId, batch: &[IoId]) {
        // All are looked at before any is touched: a submitter with a bug loses nothing of what it did right.
        for id in batch {
            let io = self.ios.get(*id);
            assert!(io.may_be_submitted(), "I/O submitted in state {:?}", io.state);
        }
        assert!(self.slot(channel).is_some_and(|slot| !slot.closing), "I/O submitted to a channel that was closed");
        if self.trace.is_on() {
            self.trace_batch(channel, batch, Point::Start.bit());
        }
        let mut ready = self.borrow_list();
        for &id in batch {
            let now_ns = self.now_ns;
            let frame = self.ios.get_mut(id).frame_mut();
            (frame.channel, frame.submitted_ns) = (channel, now_ns);
            let Some(slot) = &mut self.slots[channel.0 as usize] else { continue };
            let io = self.ios.get_mut(id);
            // A reset ends what waits; so it does not wait for that.
            let behind = (!slot.waiting.is_empty() || slot.is_stalled()) && io.op != Op::Reset;
            if slot.state != ChannelState::Closed && (slot.state == ChannelState::Paused || behind) {
                io.state = State::Waiting;
                slot.waiting.push_back(id);
                let why = if slot.state == ChannelState::Paused { Why::Paused } else { Why::Full };
                self.trace.wait(slot.device_id, id, io, why, now_ns);
                continue;
            }
            if !self.route(reactor, channel, id, &mut ready) {
                self.trace_full(channel, id);
            }
        }
        if !ready.is_empty() {
            self.dispatch(reactor, channel, &ready, Point::Issue.bit());
        }
        self.return_list(ready);
        self.pump_splits(reactor, channel);
        self.pump_jobs(reactor, channel);
        self.arm_limits(reactor);
    }

    #[inline]
    fn borrow_list(&mut self) -> Vec<IoId> {
        self.scratch.pop().unwrap_or_default()
    }

    #[inline]
    fn return_list(&mut self, mut list: Vec<IoId>) {
        list.clear();
        self.scratch.push(list);
    }

    /// Decides where one I/O goes. Those that go to the device now are added to `ready` and booked in flight; one for
    /// which the device has no room goes to the head of those that wait, and false is returned.
    fn route(&mut self, reactor: &Reactor, channel: ChannelId, id: IoId, ready: &mut Vec<IoId>) -> bool {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return true };
        if slot.state == ChannelState::Closed {
            self.refuse(channel, id, Status::INVALID_NAMESPACE);
            return true;
        }
        let io = self.ios.get_mut(id);
        if !slot.gate.ranges.is_empty() && Self::stays_out(slot, id, io) {
            self.trace.wait(slot.device_id, id, io, Why::Range, self.now_ns);
            return true;
        }
        if slot.limits.is_some() && Self::holds_back(&mut self.throttled, slot, channel, id, io, self.now_ns) {
            self.trace.wait(slot.device_id, id, io, Why::Limit, self.now_ns);
            return true;
        }
        self.start(reactor, channel, id, ready)
    }

    /// As [`route`](Self::route), for one that nothing keeps from starting but the device.
    fn start(&mut self, reactor: &Reactor, channel: ChannelId, id: IoId, ready: &mut Vec<IoId>) -> bool {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return true };
        let io = self.ios.get_mut(id);
        match check::route(&slot.info, io) {
            Route::Plain if slot.room() == 0 => {
                io.state = State::Waiting;
                slot.waiting.push_front(id);
                return false;
            }
            Route::Plain => {
                io.state = State::Submitted;
                slot.inflight += 1;
                ready.push(id);
            }
            Route::Split => {
                io.state = State::Submitted;
                io.flags |= IoFlags::SPLIT;
                (io.split_blocks, io.split_pending, io.status) = (0, 0, Status::SUCCESS);
                slot.parents += 1;
                slot.splitting.push_back(id);
            }
            Route::Emulate => {
                io.state = State::Submitted;
                io.flags |= IoFlags::SPLIT | IoFlags::EMULATED;
                io.status = Status::SUCCESS;
                slot.parents += 1;
                slot.jobs.push(emulate::Job::new(id));
            }
            Route::Reset => {
                io.state = State::Submitted;
                // Not in flight itself: it waits for all that is.
                io.flags |= IoFlags::SPLIT;
                slot.resets += 1;
                let (registry, device, abort) = (slot.registry.clone(), slot.device_id, !io.flags.contains(IoFlags::DRAIN));
                lifecycle::reset(&registry, device, reactor.handle(), id, abort);
            }
            Route::Answer(status) => self.refuse(channel, id, status),
        }
        true
    }

    /// Completes an I/O that the device never sees.
    fn refuse(&mut self, channel: ChannelId, id: IoId, status: Status) {
        self.ios.get_mut(id).state = State::Submitted;
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            slot.inflight += 1;
        }
        self.complete(id, status);
    }

    /// Passes I/Os that are booked in flight to their channel; `points` are those that they pass now. One that finished all it had has no doorbell to ring.
    #[inline]
    fn dispatch(&mut self, reactor: &mut Reactor, channel: ChannelId, batch: &[IoId], points: u8) {
        if self.trace.is_on() {
            self.trace_batch(channel, batch, points);
        }
        self.with_channel(reactor, channel, |module, layer, reactor| module.submit(layer, reactor, batch));
        if let Some(slot) = &mut self.slots[channel.0 as usize]
            && slot.inflight > 0
            && !slot.plugged
        {
            slot.plugged = true;
            self.plugged.push(channel);
        }
    }

    /// Rings the doorbells of all channels that got something since the last time. Front ends call it after a batch.
    #[inline]
    pub fn unplug(&mut self, reactor: &mut Reactor) {
        while let Some(channel) = self.plugged.pop() {
            if let Some(slot) = &mut self.slots[channel.0 as usize] {
                slot.plugged = false;
                self.with_channel(reactor, channel, |module, layer, reactor| module.unplug(layer, reactor));
            }
        }
    }

    /// Ends an I/O: once, by the channel that has it. It goes to the queue of its newest frame.
    #[inline]
    pub fn complete(&mut self, id: IoId, status: Status) {
        let io = self.ios.get_mut(id);
        assert!(io.state == State::Submitted, "I/O completed in state {:?}", io.state);
        io.state = State::Done;
        io.status = status;
        let Frame { queue, channel, submitted_ns, .. } = *io.frame();
        let awaited = io.flags.contains(IoFlags::AWAITED);
        let place = &mut self.queues[queue.0 as usize];
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            if !io.flags.contains(IoFlags::SPLIT) {
                slot.inflight -= 1;
            } else if io.op == Op::Reset {
                slot.resets -= 1;
            }
            // What the layer itself asked for is booked once: with the parent.
            if !matches!(place.owner, Owner::Split(_)) {
                let bytes = io.blocks << slot.info.block_size.trailing_zeros();
                let elapsed_ns = self.now_ns.saturating_sub(submitted_ns);
                slot.stats.book(io.op, bytes, elapsed_ns, status);
                if let Some(observer) = &mut slot.observer {
                    observer.book(io.op, elapsed_ns);
                    if observer.traced {
                        self.trace.done(slot.device_id, id, io, self.now_ns);
                    }
                }
            }
            if !slot.is_calm() && !slot.attention {
                slot.attention = true;
                self.attention.push(channel);
                if let Some(waker) = &self.waker {
                    waker.wake();
                }
            }
        }
        place.entries.push(id);
        match &place.owner {
            Owner::FrontEnd(waker) => waker.wake(),
            _ if place.entries.len() == 1 => {
                self.inner_ready.push(queue);
                self.call_settler();
            }
            _ => {}
        }
        if awaited {
            self.end_awaited(channel, id);
        }
    }

    /// As [`complete`](Self::complete) by errno (positive; 0 is success).
    pub fn complete_errno(&mut self, id: IoId, errno: i32) {
        self.complete(id, if errno == 0 { Status::SUCCESS } else { Status::from_errno(errno) });
    }

    /// Appends what has come to a front end's queue to `out`. Each is [`Layer::retrieve`]d next.
    #[inline]
    pub fn reap(&mut self, reactor: &mut Reactor, queue: QueueId, out: &mut Vec<IoId>) {
        self.settle(reactor);
        out.append(&mut self.queues[queue.0 as usize].entries);
    }

    /// Whether something waits in a front end's queue.
    #[inline]
    pub fn has_completions(&self, queue: QueueId) -> bool {
        !self.queues[queue.0 as usize].entries.is_empty()
    }

    /// Takes a reaped I/O back: a front end holds it again, to look at or give back; a channel that had passed it down
    /// completes it next, or passes it on anew. Its first block is again what it was before it was passed on.
    #[inline]
    pub fn retrieve(&mut self, id: IoId) -> Frame {
        let io = self.ios.get_mut(id);
        assert!(io.state == State::Done, "I/O retrieved in state {:?}", io.state);
        io.flags.remove(IoFlags::SPLIT | IoFlags::EMULATED);
        let frame = io.pop();
        io.lba = frame.lba;
        // One that was passed down is, for whoever is above, still with the channel that passed it.
        io.state = if io.depth == 0 { State::Held } else { State::Submitted };
        frame
    }

    #[inline]
    fn slot(&self, channel: ChannelId) -> Option<&Slot> {
        self.slots.get(channel.0 as usize).and_then(Option::as_ref)
    }

    /// The turn's time as the layer knows it.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }
}
