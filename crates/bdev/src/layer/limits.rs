//! Limits at work: how a channel pays for its I/O, and how long what cannot be paid waits.
//!
//! A channel pays out of *credit*: units that it took from the rates that it shares with others ([`crate::limit`]). Where there is plenty it takes a
//! slice more than it needs, so that most batches touch nothing shared; what it did not use within a millisecond it gives back. Where there is
//! not, the first I/O that cannot be paid takes its place in line, for itself and for what waits behind it (a slice at most), and a timer of this
//! reactor wakes the channel when its turn has come. One timer serves all channels; none runs while nothing waits.
//!
//! I/O of a channel waits in its order, reads behind writes, too; resets overtake. Each I/O pays once, when it starts: not again where it is
//! split, but once more at each bdev below that has a limit of its own. What ends before it started (an abort, a removal) has not paid; units taken
//! for it serve the next, or are given back. What costs: reads, writes, zcopy, and NVMe commands that move data, as SPDK has it.

use std::sync::Arc;

use qpair_reactor::{Reactor, TimerId};

use super::check::{self, Route};
use super::{Layer, Slot};
use crate::io::{Slab, State};
use crate::limit::{BURST_NS, Cost, KINDS, Limiter, NAMES, Pace, UNIT_BYTES};
use crate::{ChannelId, DeviceId, Info, Io, IoFlags, IoId, Notice, Op, Registry};

/// Units that a channel has of one rate.
#[derive(Clone, Copy, Default)]
struct Credit {
    units: u64,
    from_ns: u64,
    /// The time of the last place in line.
    place_ns: u64,
    /// What may be taken in this turn.
    left: u64,
}

impl Credit {
    /// Gives back what was not used in time.
    fn expire(&mut self, pace: &Pace, now_ns: u64) {
        if self.units > 0 && now_ns > self.from_ns.saturating_add(BURST_NS) {
            pace.give_back(self.units);
            self.units = 0;
        }
    }

    #[inline]
    fn covers(&self, need: u64, now_ns: u64) -> bool {
        self.units >= need && self.from_ns <= now_ns && now_ns - self.from_ns <= BURST_NS
    }

    #[cold]
    fn refill(&mut self, pace: &Pace, need: u64, now_ns: u64) -> bool {
        self.expire(pace, now_ns);
        if self.units > 0 && self.from_ns > now_ns {
            return false;
        }
        let grant = pace.take_now(need.saturating_sub(self.units), now_ns);
        if let Some(grant) = grant {
            (self.units, self.from_ns) = (self.units + grant.units, now_ns);
        }
        grant.is_some()
    }
}

/// A channel's part in one limiter: its bdev's own, or that of the group.
struct Share {
    limiter: Arc<Limiter>,
    credits: [Credit; KINDS],
}

impl Drop for Share {
    fn drop(&mut self) {
        let limiter = &self.limiter;
        self.credits.iter().enumerate().for_each(|(kind, credit)| {
            if let Some(pace) = limiter.pace(kind) {
                pace.give_back(credit.units);
            }
        });
    }
}

/// Which limit holds an I/O back, and until when.
struct Late {
    due_ns: u64,
    limiter: Arc<Limiter>,
    kind: usize,
}

/// A channel's limits.
pub(super) struct Throttle {
    shares: Vec<Share>,
    /// Since when something waits.
    waits: Option<u64>,
    /// When the channel is to be woken.
    due_ns: Option<u64>,
    /// When something was last taken while it waited.
    turn_ns: u64,
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.rest();
    }
}

impl Throttle {
    /// Of these limiters, credit of before kept where they stay.
    fn new(before: Option<Box<Self>>, limiters: impl IntoIterator<Item = Arc<Limiter>>) -> Option<Box<Self>> {
        let mut before = before.map_or_else(Vec::new, |mut before| {
            before.rest();
            std::mem::take(&mut before.shares)
        });
        let mut share = |limiter: Arc<Limiter>| match before.iter().position(|share| Arc::ptr_eq(&share.limiter, &limiter)) {
            Some(at) => before.swap_remove(at),
            None => Share { limiter, credits: Default::default() },
        };
        let shares: Vec<Share> = limiters.into_iter().map(&mut share).collect();
        (!shares.is_empty()).then(|| Box::new(Self { shares, waits: None, due_ns: None, turn_ns: 0 }))
    }

    /// Pays for a batch of reads and writes, for all of it or for nothing.
    #[inline]
    pub(super) fn pay_all(&mut self, ios: &Slab, batch: &[IoId], info: &Info, now_ns: u64) -> bool {
        let (mut read, mut written) = (0, 0);
        for id in batch {
            let io = ios.get(*id);
            if io.op == Op::Read { read += io.blocks } else { written += io.blocks }
        }
        let units = u64::from(info.block_size) / UNIT_BYTES;
        let (read, written) = (read * units, written * units);
        let cost: Cost = [batch.len() as u64, read + written, read, written];
        self.rest();
        for share in &mut self.shares {
            for (kind, credit) in share.credits.iter_mut().enumerate() {
                if let Some(pace) = share.limiter.pace(kind)
                    && !credit.covers(cost[kind], now_ns)
                    && !credit.refill(pace, cost[kind], now_ns)
                {
                    return false;
                }
            }
        }
        self.charge(&cost);
        true
    }

    /// Pays for one I/O, or takes its place in line, for `queued` such.
    fn pay(&mut self, cost: &Cost, queued: u64, now_ns: u64) -> Result<(), Late> {
        let mut late: Option<Late> = None;
        self.begin_turn(now_ns);
        for share in &mut self.shares {
            for (kind, credit) in share.credits.iter_mut().enumerate() {
                let (Some(pace), need) = (share.limiter.pace(kind), cost[kind]) else { continue };
                if need == 0 {
                    continue;
                }
                if self.waits.is_none() {
                    credit.expire(pace, now_ns);
                }
                if credit.units < need {
                    let waited = self.waits.is_some_and(|since_ns| credit.place_ns >= since_ns);
                    let behind = (queued - 1).min(pace.slice() / need) * need;
                    let grant = pace.take(need - credit.units + behind, now_ns, if waited { credit.place_ns } else { now_ns });
                    credit.units += grant.units;
                    let later = self.waits.is_some() && credit.left == 0;
                    credit.left = credit.left.saturating_sub(grant.units);
                    (credit.from_ns, credit.place_ns) = (grant.from_ns.max(now_ns + u64::from(later)), grant.place_ns);
                }
                if credit.from_ns > late.as_ref().map_or(now_ns, |late| late.due_ns) {
                    late = Some(Late { due_ns: credit.from_ns, limiter: share.limiter.clone(), kind });
                }
            }
        }
        match late {
            None => {
                self.charge(cost);
                Ok(())
            }
            Some(late) => {
                if self.waits.is_none() {
                    self.waits = Some(now_ns);
                    self.shares.iter().for_each(|share| share.limiter.joins());
                }
                Err(late)
            }
        }
    }

    /// A turn of one that waits: who is late takes his part of what was missed, and the rest in the next turn: others may be late, too.
    fn begin_turn(&mut self, now_ns: u64) {
        let Some(since_ns) = self.waits.filter(|_| self.turn_ns != now_ns) else { return };
        for share in &mut self.shares {
            for (kind, credit) in share.credits.iter_mut().enumerate() {
                if let Some(pace) = share.limiter.pace(kind) {
                    let missed = pace.between(self.turn_ns.max(since_ns), now_ns);
                    credit.left = pace.slice() + missed.div_ceil(share.limiter.waiting().max(1));
                }
            }
        }
        self.turn_ns = now_ns;
    }

    /// Nothing waits any more.
    #[inline]
    fn rest(&mut self) {
        if self.waits.take().is_some() {
            self.shares.iter().for_each(|share| share.limiter.leaves());
        }
    }

    #[inline]
    fn charge(&mut self, cost: &Cost) {
        for share in &mut self.shares {
            for (kind, credit) in share.credits.iter_mut().enumerate() {
                if share.limiter.pace(kind).is_some() {
                    credit.units -= cost[kind];
                }
            }
        }
    }
}

/// What an I/O costs; None: nothing.
fn cost_of(info: &Info, io: &Io) -> Option<Cost> {
    let units = (io.blocks << info.block_size.trailing_zeros()) / UNIT_BYTES;
    let (reads, units) = match io.op {
        Op::Read => (true, units),
        Op::Write => (false, units),
        Op::ZcopyStart => (io.flags.contains(IoFlags::POPULATE), units),
        // Bits 1:0 of an NVMe opcode: which way data go.
        Op::NvmeIo if io.command[0] & 3 != 0 => (io.command[0] & 2 != 0, io.list_bytes().div_ceil(UNIT_BYTES)),
        _ => return None,
    };
    Some([1, units, if reads { units } else { 0 }, if reads { 0 } else { units }])
}

/// Something for whoever listens, told when the layer is at rest.
type News = (Arc<Registry>, DeviceId, Notice);

/// The channels of a reactor that wait for their turn, and the one timer.
#[derive(Default)]
pub(super) struct Throttled {
    channels: Vec<(u64, ChannelId)>,
    timer: Option<(u64, TimerId)>,
    changed: bool,
    news: Vec<News>,
}

impl Throttled {
    fn forget(&mut self, channel: ChannelId) {
        self.channels.retain(|(_, other)| *other != channel);
    }
}

impl Layer {
    /// Whether an I/O that is about to start has to wait: it is then at the head of those that do.
    #[cold]
    pub(super) fn holds_back(throttled: &mut Throttled, slot: &mut Slot, channel: ChannelId, id: IoId, io: &mut Io, now_ns: u64) -> bool {
        let Some(cost) = cost_of(&slot.info, io) else { return false };
        match check::route(&slot.info, io) {
            Route::Answer(_) => return false,
            // Waits for the device first.
            Route::Plain if slot.room() == 0 => return false,
            _ => {}
        }
        let queued = slot.waiting.len() as u64 + 1;
        let Some(limits) = &mut slot.limits else { return false };
        let Err(late) = limits.pay(&cost, queued, now_ns) else {
            if queued == 1 {
                limits.rest();
            }
            return false;
        };
        io.state = State::Waiting;
        slot.waiting.push_front(id);
        if limits.due_ns != Some(late.due_ns) {
            limits.due_ns = Some(late.due_ns);
            throttled.forget(channel);
            throttled.channels.push((late.due_ns, channel));
            throttled.changed = true;
        }
        if late.limiter.holds_back(now_ns) {
            let value = late.limiter.rates.of(late.kind);
            let notice = Notice::Throttled { name: slot.info.name.clone(), limit: NAMES[late.kind], value };
            throttled.news.push((slot.registry.clone(), slot.device_id, notice));
        }
        true
    }

    /// Sets the timer for the channel whose turn comes first.
    #[inline]
    pub(super) fn arm_limits(&mut self, reactor: &mut Reactor) {
        if std::mem::take(&mut self.throttled.changed) {
            self.set_limits_timer(reactor);
        }
    }

    fn set_limits_timer(&mut self, reactor: &mut Reactor) {
        let throttled = &mut self.throttled;
        for (registry, device, notice) in throttled.news.drain(..) {
            // Listeners may call back: not while the layer is at work.
            reactor.handle().call(move |_| registry.tell(Some(device), &notice));
        }
        let Some(due_ns) = throttled.channels.iter().map(|(due_ns, _)| *due_ns).min() else { return };
        if let Some((before_ns, timer)) = throttled.timer {
            if before_ns <= due_ns {
                return;
            }
            reactor.cancel(timer);
        }
        // A function without captures: its box is no allocation.
        throttled.timer = Some((due_ns, reactor.after(due_ns.saturating_sub(reactor.now_ns()), wake)));
    }

    fn wake_throttled(&mut self, reactor: &mut Reactor) {
        self.now_ns = reactor.now_ns();
        self.throttled.timer = None;
        let mut at = 0;
        while let Some(&(due_ns, channel)) = self.throttled.channels.get(at) {
            if due_ns > self.now_ns {
                at += 1;
                continue;
            }
            self.throttled.channels.swap_remove(at);
            if let Some(slot) = &mut self.slots[channel.0 as usize]
                && let Some(limits) = &mut slot.limits
            {
                limits.due_ns = None;
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
        slot.limits = Throttle::new(slot.limits.take(), wanted.limiters());
        // What waits is judged anew.
        self.throttled.forget(channel);
        slot.histogram = wanted.histogram_for(slot.histogram.take());
        self.call_attention(channel);
    }
}

fn wake(reactor: &mut Reactor) {
    let layer = Layer::of(reactor);
    layer.borrow_mut().wake_throttled(reactor);
}
