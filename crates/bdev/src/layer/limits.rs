//! Limits at work: who pays, who waits, and who may pass.
//!
//! How it works. What costs (reads, writes, zcopy, and NVMe commands that move data, as SPDK has it) is of one of two *kinds*: it reads or it writes.
//! A channel pays ([`super::dues`]) for an I/O in two lines: first the line of its kind (rates of reads alone, or of writes alone), then the one that both
//! share. What cannot be paid waits in the *lane* of its kind; a timer of this reactor wakes the channel when the first of a lane has its turn. One timer
//! serves all channels; none runs while nothing waits. Each I/O pays once, when it starts: not again where it is split, but once more at each bdev below
//! that has a limit of its own.
//!
//! **Who passes whom.** I/O of a kind starts in its order: there is one lane for it, only its first is ever asked to pay, and who comes while the lane has
//! somebody goes to its end. What costs nothing (flushes, unmaps, resets), and a kind that no limit concerns, never enters a lane, so never waits for one. Between the kinds, the
//! first of a lane takes a place in the line that both share only when the line of its own lets it go, so reads are not held up by a write that has still to
//! wait for its own rate, and do not find the shared credit in its hands. Of two that both wait for shared rates, the older goes first: [`Throttle::pay`]
//! lets no younger one ask there while an older one waits. Hence neither kind starves: the older one of the two firsts only ever waits for its own rate, which nobody
//! else on this channel uses, or for a place in the shared line that nobody on this channel gets before it.
//!
//! **Room.** A channel whose device is full is not asked to pay for what needs room. When there is room again the lanes come first, then what waits in
//! `Slot::waiting`. That starves nobody: what is in a lane when the device is full came before all that waits behind (`waiting` is empty when an I/O gets
//! into a lane from outside, and otherwise it was at the head of it), and while anything waits for room nothing new gets past it, into a lane or to the device.
//!
//! **Costs.** Whatever happens, an I/O is looked at once on its way into a lane and once at the head of it; a wake-up looks at the two firsts of
//! channels whose time has come, and at what it starts. Only an abort, and a change of limits (which judges anew all that waits), walk a lane.
//!
//! What ends before it started (an abort, a removal) has not paid; units taken for it serve the next, or are given back when nothing is left.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use qpair_reactor::{Reactor, TimerId};

use super::check::{self, Route};
use super::dues::{Cost, Due, Late, Line};
use super::{Layer, Slot};
use crate::io::{Slab, State};
use crate::limit::{KINDS, Limiter, NAMES, Rates, UNIT_BYTES};
use crate::trace::Why;
use crate::{ChannelId, DeviceId, Info, Io, IoFlags, IoId, Notice, Op, Registry};

/// What pays apart: reads, and writes.
const LANES: usize = 2;
/// Younger than any that waits.
const NEWCOMER: u64 = u64::MAX;

/// I/O of one kind that waits, in its order.
#[derive(Default)]
struct Lane {
    /// With the number of its arrival.
    ios: VecDeque<(u64, IoId)>,
    /// When the first may be tried again.
    due_ns: u64,
    /// The first waits for what both kinds share.
    at_shared: bool,
}

impl Lane {
    fn first(&self) -> u64 {
        self.ios.front().map_or(NEWCOMER, |(arrival, _)| *arrival)
    }
}

/// A channel's limits.
pub(super) struct Throttle {
    shared: Line,
    own: [Line; LANES],
    lanes: [Lane; LANES],
    arrivals: u64,
    /// The first of a lane has its turn, and the device no room.
    stalled: bool,
}

/// Why an I/O has to wait, and for which limit unless that of one before it.
struct Wait {
    due_ns: u64,
    at_shared: bool,
    limit: Option<(Arc<Limiter>, usize)>,
}

impl Wait {
    fn for_limit(late: Late, at_shared: bool) -> Self {
        Self { due_ns: late.due_ns, at_shared, limit: Some((late.limiter, late.kind)) }
    }
}

impl Throttle {
    /// Of these limiters, credit of before kept where they stay. What waits is in no lane any more.
    fn new(before: Option<Box<Self>>, limiters: impl IntoIterator<Item = Arc<Limiter>>) -> Option<Box<Self>> {
        let mut before: Vec<Due> = before.map_or_else(Vec::new, |mut before| {
            let lines = std::iter::once(&mut before.shared).chain(&mut before.own);
            lines.flat_map(Line::take_dues).collect()
        });
        let (mut shared, mut own) = (Vec::new(), [Vec::new(), Vec::new()]);
        for limiter in limiters {
            for kind in 0..KINDS {
                let same = |due: &Due| due.kind == kind && Arc::ptr_eq(&due.limiter, &limiter);
                let kept = before.iter().position(same).map(|at| before.swap_remove(at));
                let Some(due) = kept.or_else(|| Due::new(&limiter, kind)) else { continue };
                match Rates::concerns(kind) {
                    (true, true) => shared.push(due),
                    (reads, _) => own[usize::from(!reads)].push(due),
                }
            }
        }
        if shared.is_empty() && own.iter().all(Vec::is_empty) {
            return None;
        }
        let (shared, own) = (Line::new(shared), own.map(Line::new));
        Some(Box::new(Self { shared, own, lanes: Default::default(), arrivals: 0, stalled: false }))
    }

    /// Pays for a batch of reads and writes, for all of it or for nothing.
    #[inline]
    pub(super) fn pay_all(&mut self, ios: &Slab, batch: &[IoId], info: &Info, now_ns: u64) -> bool {
        let (mut read, mut written) = (Cost::default(), Cost::default());
        for id in batch {
            let io = ios.get(*id);
            let cost = if io.op == Op::Read { &mut read } else { &mut written };
            (cost.ios, cost.units) = (cost.ios + 1, cost.units + io.blocks);
        }
        let units = u64::from(info.block_size) / UNIT_BYTES;
        (read.units, written.units) = (read.units * units, written.units * units);
        let both = Cost { ios: read.ios + written.ios, units: read.units + written.units };
        if self.stalled || self.shared.waits() {
            return false;
        }
        for (lane, cost) in [read, written].into_iter().enumerate() {
            if cost.ios > 0 && !(self.lanes[lane].ios.is_empty() && self.own[lane].affords(cost, now_ns)) {
                return false;
            }
        }
        if !self.shared.affords(both, now_ns) {
            return false;
        }
        self.shared.charge(both);
        self.own[0].charge(read);
        self.own[1].charge(written);
        true
    }

    /// Pays for one I/O, the first of its lane or a newcomer to it; or has it take its place where it has to wait.
    fn pay(&mut self, lane: usize, cost: Cost, arrival: u64, now_ns: u64) -> Result<(), Wait> {
        let queued = self.lanes.each_ref().map(|lane| lane.ios.len() as u64);
        if let Some(late) = self.own[lane].ask(cost, queued[lane].max(1), now_ns) {
            self.own[lane].wait(Some(&late), now_ns);
            return Err(Wait::for_limit(late, false));
        }
        let wait = if let Some(older) = self.older_at_shared(lane, arrival) {
            Wait { due_ns: older.due_ns, at_shared: true, limit: None }
        } else if let Some(late) = self.shared.ask(cost, queued.iter().sum::<u64>().max(1), now_ns) {
            self.shared.wait(Some(&late), now_ns);
            Wait::for_limit(late, true)
        } else {
            self.own[lane].charge(cost);
            self.shared.charge(cost);
            return Ok(());
        };
        self.own[lane].wait(None, now_ns);
        Err(wait)
    }

    fn older_at_shared(&self, lane: usize, arrival: u64) -> Option<&Lane> {
        let others = self.lanes.iter().enumerate().filter(|(other, _)| *other != lane);
        others.map(|(_, other)| other).find(|other| other.at_shared && other.first() < arrival)
    }

    /// The lane to be tried next: the one with the older first, of those whose time has come.
    fn next(&self, now_ns: u64) -> Option<(usize, u64, IoId)> {
        let firsts = self.lanes.iter().enumerate().filter(|(_, lane)| lane.due_ns <= now_ns);
        let firsts = firsts.filter_map(|(number, lane)| lane.ios.front().map(|(arrival, id)| (*arrival, number, *id)));
        firsts.min().map(|(arrival, number, id)| (number, arrival, id))
    }

    fn push(&mut self, lane: usize, id: IoId) {
        self.lanes[lane].ios.push_back((self.arrivals, id));
        self.arrivals += 1;
    }

    /// The first of a lane goes, paid for or not.
    fn pop(&mut self, lane: usize, now_ns: u64) {
        let place = &mut self.lanes[lane];
        place.ios.pop_front();
        (place.due_ns, place.at_shared) = (0, false);
        if place.ios.is_empty() {
            self.own[lane].rest(now_ns);
        }
    }

    /// Nobody is left to be tried now.
    fn end_turn(&mut self, now_ns: u64) {
        self.stalled = false;
        if !self.lanes.iter().any(|lane| lane.at_shared) {
            self.shared.rest(now_ns);
        }
    }

    /// The first of a lane has its turn, and waits for the device: for as long, for no rate.
    fn stall(&mut self, lane: usize, now_ns: u64) {
        self.stalled = true;
        self.own[lane].rest(now_ns);
        self.shared.rest(now_ns);
    }

    /// Takes an I/O out that ends unpaid.
    pub(super) fn forget(&mut self, id: IoId, now_ns: u64) {
        for number in 0..LANES {
            let lane = &mut self.lanes[number];
            let before = lane.ios.len();
            lane.ios.retain(|(_, other)| *other != id);
            if lane.ios.len() < before && lane.ios.is_empty() {
                self.emptied(number, now_ns);
            }
        }
    }

    /// Takes any I/O out, to end it unpaid.
    pub(super) fn take_any(&mut self, now_ns: u64) -> Option<IoId> {
        let number = self.lanes.iter().position(|lane| !lane.ios.is_empty())?;
        let (_, id) = self.lanes[number].ios.pop_front()?;
        if self.lanes[number].ios.is_empty() {
            self.emptied(number, now_ns);
        }
        Some(id)
    }

    fn emptied(&mut self, lane: usize, now_ns: u64) {
        (self.lanes[lane].due_ns, self.lanes[lane].at_shared) = (0, false);
        self.own[lane].give_up();
        if self.is_empty() {
            self.shared.give_up();
        } else {
            self.end_turn(now_ns);
        }
    }

    /// Whether nothing waits in a lane.
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.iter().all(|lane| lane.ios.is_empty())
    }

    /// Whether something here waits for the device to have room.
    #[inline]
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Puts what waits before all else that does, by its age.
    fn hand_back(&mut self, waiting: &mut VecDeque<IoId>) {
        while let Some(lane) = self.lanes.iter_mut().max_by_key(|lane| lane.ios.back().map(|(arrival, _)| *arrival))
            && let Some((_, id)) = lane.ios.pop_back()
        {
            waiting.push_front(id);
        }
    }
}

/// What an I/O costs, and in which lane it is; None: nothing.
fn cost_of(info: &Info, io: &Io) -> Option<(usize, Cost)> {
    let units = (io.blocks << info.block_size.trailing_zeros()) / UNIT_BYTES;
    let (reads, units) = match io.op {
        Op::Read => (true, units),
        Op::Write => (false, units),
        Op::ZcopyStart => (io.flags.contains(IoFlags::POPULATE), units),
        // Bits 1:0 of an NVMe opcode: which way data go.
        Op::NvmeIo if io.command[0] & 3 != 0 => (io.command[0] & 2 != 0, io.list_bytes().div_ceil(UNIT_BYTES)),
        _ => return None,
    };
    Some((usize::from(!reads), Cost { ios: 1, units }))
}

/// Something for whoever listens, told when the layer is at rest.
type News = (Arc<Registry>, DeviceId, Notice);

/// The lanes of a reactor that wait for their turn, and the one timer.
#[derive(Default)]
pub(super) struct Throttled {
    /// What does not agree with its lane any more is passed over.
    lanes: BinaryHeap<Reverse<(u64, ChannelId, usize)>>,
    timer: Option<(u64, TimerId)>,
    changed: bool,
    news: Vec<News>,
}

impl Throttled {
    /// The first of a lane has to wait.
    fn add(&mut self, slot: &mut Slot, channel: ChannelId, lane: usize, wait: Wait, now_ns: u64) {
        let Some(limits) = &mut slot.limits else { return };
        let place = &mut limits.lanes[lane];
        place.at_shared = wait.at_shared;
        if place.due_ns != wait.due_ns {
            place.due_ns = wait.due_ns;
            self.lanes.push(Reverse((wait.due_ns, channel, lane)));
            self.changed = true;
        }
        if let Some((limiter, kind)) = wait.limit
            && limiter.holds_back(now_ns)
        {
            let notice = Notice::Throttled { name: slot.info.name.clone(), limit: NAMES[kind], value: limiter.rates.of(kind) };
            self.news.push((slot.registry.clone(), slot.device_id, notice));
        }
    }

    fn forget(&mut self, channel: ChannelId) {
        self.lanes.retain(|Reverse((_, other, _))| *other != channel);
    }
}

impl Layer {
    /// Whether an I/O that is about to start has to wait: it is then in its lane.
    #[cold]
    pub(super) fn holds_back(throttled: &mut Throttled, slot: &mut Slot, channel: ChannelId, id: IoId, io: &mut Io, now_ns: u64) -> bool {
        let Some((lane, cost)) = cost_of(&slot.info, io) else { return false };
        match check::route(&slot.info, io) {
            Route::Answer(_) => return false,
            // Waits for the device first.
            Route::Plain if slot.room() == 0 => return false,
            _ => {}
        }
        let Some(limits) = &mut slot.limits else { return false };
        if limits.own[lane].is_free() && limits.shared.is_free() {
            return false;
        }
        let first = limits.lanes[lane].ios.is_empty();
        let outcome = if first { limits.pay(lane, cost, NEWCOMER, now_ns).map(|()| false) } else { Ok(true) };
        if let Ok(waits) = outcome
            && !waits
        {
            return false;
        }
        io.state = State::Waiting;
        limits.push(lane, id);
        if let Err(wait) = outcome {
            throttled.add(slot, channel, lane, wait, now_ns);
        }
        true
    }

    /// Moves on what waits in lanes, as far as it can be paid and the device has room. False: it has no room.
    pub(super) fn start_throttled(&mut self, reactor: &Reactor, channel: ChannelId, ready: &mut Vec<IoId>) -> bool {
        let now_ns = self.now_ns;
        while let Some(slot) = &mut self.slots[channel.0 as usize]
            && let Some(limits) = &mut slot.limits
        {
            let Some((lane, arrival, id)) = limits.next(now_ns) else {
                limits.end_turn(now_ns);
                break;
            };
            let io = self.ios.get_mut(id);
            if !slot.gate.ranges.is_empty() && Self::stays_out(slot, id, io) {
                if let Some(limits) = &mut slot.limits {
                    limits.pop(lane, now_ns);
                }
                self.trace.wait(slot.device_id, id, io, Why::Range, now_ns);
                continue;
            }
            let route = check::route(&slot.info, io);
            if matches!(route, Route::Plain) && slot.room() == 0 {
                if let Some(limits) = &mut slot.limits {
                    limits.stall(lane, now_ns);
                }
                return false;
            }
            let Some(limits) = &mut slot.limits else { break };
            // What a new snapshot refuses is not paid for.
            if let (Some((_, cost)), false) = (cost_of(&slot.info, io), matches!(route, Route::Answer(_)))
                && let Err(wait) = limits.pay(lane, cost, arrival, now_ns)
            {
                self.throttled.add(slot, channel, lane, wait, now_ns);
                continue;
            }
            limits.pop(lane, now_ns);
            io.state = State::Held;
            self.start(reactor, channel, id, ready);
        }
        true
    }

    /// Sets the timer for the lane whose turn comes first.
    #[inline]
    pub(super) fn arm_limits(&mut self, reactor: &mut Reactor) {
        if std::mem::take(&mut self.throttled.changed) {
            self.set_limits_timer(reactor);
        }
    }

    fn set_limits_timer(&mut self, reactor: &mut Reactor) {
        self.tidy_throttled();
        let throttled = &mut self.throttled;
        for (registry, device, notice) in throttled.news.drain(..) {
            // Listeners may call back: not while the layer is at work.
            reactor.handle().call(move |_| registry.tell(Some(device), &notice));
        }
        let Some(&Reverse((due_ns, ..))) = throttled.lanes.peek() else { return };
        if let Some((before_ns, timer)) = throttled.timer {
            if before_ns <= due_ns {
                return;
            }
            reactor.cancel(timer);
        }
        // A function without captures: its box is no allocation.
        throttled.timer = Some((due_ns, reactor.after(due_ns.saturating_sub(reactor.now_ns()), wake)));
    }

    /// Aborts leave entries behind that mean nothing: not more than there may be others.
    fn tidy_throttled(&mut self) {
        if self.throttled.lanes.len() > 64 + 2 * LANES * self.slots.len() {
            let slots = &self.slots;
            self.throttled.lanes.retain(|Reverse((due_ns, channel, lane))| is_due(slots, *channel, *lane, *due_ns));
        }
    }

    fn wake_throttled(&mut self, reactor: &mut Reactor) {
        self.now_ns = reactor.now_ns();
        self.throttled.timer = None;
        while let Some(&Reverse((due_ns, channel, lane))) = self.throttled.lanes.peek()
            && due_ns <= self.now_ns
        {
            self.throttled.lanes.pop();
            if is_due(&self.slots, channel, lane, due_ns) {
                self.call_attention(channel);
            }
        }
        self.throttled.changed = true;
        self.settle(reactor);
        self.arm_limits(reactor);
    }

    /// A channel does as its device's limits and histogram are now.
    pub(crate) fn adopt(&mut self, channel: ChannelId) {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        let wanted = slot.registry.board().of(slot.device_id);
        // What waits is judged anew.
        if let Some(before) = &mut slot.limits {
            before.hand_back(&mut slot.waiting);
        }
        slot.limits = Throttle::new(slot.limits.take(), wanted.limiters());
        self.throttled.forget(channel);
        self.observe(channel, &wanted);
        self.call_attention(channel);
    }
}

/// Whether that is when a lane is to be looked at.
fn is_due(slots: &[Option<Slot>], channel: ChannelId, lane: usize, due_ns: u64) -> bool {
    let limits = slots.get(channel.0 as usize).and_then(Option::as_ref).and_then(|slot| slot.limits.as_ref());
    limits.is_some_and(|limits| limits.lanes[lane].due_ns == due_ns)
}

fn wake(reactor: &mut Reactor) {
    let layer = Layer::of(reactor);
    layer.borrow_mut().wake_throttled(reactor);
}
