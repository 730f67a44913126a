//! What follows from completions, done in a loop and never by recursion.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Weak;

use qpair_reactor::log::{self, Level};
use qpair_reactor::{Poller, Reactor};
use qpair_wire::nvme::Status;

use super::{ChannelState, Layer, Owner, QueueId, Then};
use crate::io::State;
use crate::trace::Point;
use crate::{Channel, ChannelId, Io, IoFlags, IoId};

/// Settles when nobody who reaps does: a submitter need not wait for its first completion to have its second.
pub(super) struct Settler(pub(super) Weak<RefCell<Layer>>);

impl Poller for Settler {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let Some(layer) = self.0.upgrade() else { return 0 };
        let mut layer = layer.borrow_mut();
        layer.now_ns = reactor.now_ns();
        let work = layer.attention.len() + layer.inner_ready.len();
        layer.settle(reactor);
        work
    }
}

impl Layer {
    /// Starts what waited, runs inner layers, tells drains that all is quiet; until nothing is left to do. Not to be
    /// called from inside a [`Channel`]: what follows may be a call into that very channel.
    #[inline]
    pub fn settle(&mut self, reactor: &mut Reactor) {
        while !(self.attention.is_empty() && self.inner_ready.is_empty()) {
            while !(self.attention.is_empty() && self.inner_ready.is_empty()) {
                // Children first: after an error nothing more of their parent is handed out.
                while let Some(queue) = self.inner_ready.pop() {
                    self.deliver_inside(reactor, queue);
                }
                if let Some(channel) = self.attention.pop() {
                    self.tend(reactor, channel);
                }
            }
            // No front end ends the batches that were begun here.
            self.unplug(reactor);
        }
    }

    /// Has the channel looked after by the next [`settle`](Self::settle).
    pub(super) fn call_attention(&mut self, channel: ChannelId) {
        if let Some(slot) = &mut self.slots[channel.0 as usize]
            && !slot.attention
        {
            slot.attention = true;
            self.attention.push(channel);
            self.call_settler();
        }
    }

    fn tend(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        slot.attention = false;
        match slot.state {
            ChannelState::Open => self.start_waiting(reactor, channel),
            ChannelState::Paused => {}
            ChannelState::Closed => self.fail_waiting(channel),
        }
        self.pump_splits(reactor, channel);
        self.pump_jobs(reactor, channel);
        self.arm_limits(reactor);
        self.run_when_quiet(reactor, channel);
        if self.slot(channel).is_some_and(super::Slot::may_be_freed) {
            self.drop_module(reactor, channel);
            self.free_slot(reactor, channel);
        }
    }

    /// Moves waiting I/Os on, in their order, as long as the device has room.
    fn start_waiting(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        let mut ready = self.borrow_list();
        let mut room = self.start_throttled(reactor, channel, &mut ready);
        while room && let Some(slot) = &mut self.slots[channel.0 as usize] {
            let Some(id) = slot.waiting.pop_front() else { break };
            self.ios.get_mut(id).state = State::Held;
            room = self.route(reactor, channel, id, &mut ready);
        }
        if !ready.is_empty() {
            // What ends at once makes room, and calls attention again.
            self.dispatch(reactor, channel, &ready, Point::Issue.bit());
        }
        self.return_list(ready);
    }

    fn fail_waiting(&mut self, channel: ChannelId) {
        let now_ns = self.now_ns;
        let next = |slot: &mut super::Slot| {
            let limited = slot.limits.as_mut().and_then(|limits| limits.take_any(now_ns));
            limited.or_else(|| slot.waiting.pop_front()).or_else(|| slot.gate.outside.pop())
        };
        while let Some(id) = self.slots[channel.0 as usize].as_mut().and_then(next) {
            self.refuse(channel, id, Status::INVALID_NAMESPACE);
        }
    }

    /// Hands completions to the layer that is stacked here, or merges children into their parents.
    fn deliver_inside(&mut self, reactor: &mut Reactor, queue: QueueId) {
        let spare = self.borrow_list();
        let place = &mut self.queues[queue.0 as usize];
        let entries = std::mem::replace(&mut place.entries, spare);
        match place.owner {
            Owner::Split(channel) => {
                if self.trace.is_on() {
                    self.trace_batch(channel, &entries, Point::Done.bit());
                }
                entries.iter().for_each(|id| self.end_child(channel, *id));
            }
            Owner::Channel(channel) => match self.slot(channel) {
                Some(slot) if !slot.gone => {
                    let call =
                        |module: &mut dyn Channel, layer: &mut Layer, reactor: &mut Reactor| module.completed(layer, reactor, &entries);
                    if self.with_channel(reactor, channel, call).is_none() {
                        self.end_unseen(queue, &entries);
                    }
                }
                _ => entries.iter().for_each(|id| self.end_orphan(*id)),
            },
            Owner::Nobody => entries.iter().for_each(|id| self.end_orphan(*id)),
            // Only queues of the layer's own are put on the list, and none of them turns into a front end's while it has entries.
            Owner::FrontEnd(_) => {}
        }
        self.return_list(entries);
    }

    /// Those that a module had not looked at when it panicked.
    #[cold]
    fn end_unseen(&mut self, queue: QueueId, entries: &[IoId]) {
        for id in entries {
            let unseen = |io: &Io| io.state == State::Done && io.depth > 0 && io.frame().queue == queue;
            if self.ios.is_current(*id) && unseen(self.ios.get(*id)) {
                self.end_orphan(*id);
            }
        }
    }

    /// An I/O whose submitter is gone: it fails for whoever is above, or goes back to the slab.
    fn end_orphan(&mut self, id: IoId) {
        self.retrieve(id);
        if self.ios.get(id).depth == 0 {
            return self.ios.give_back(id);
        }
        self.complete(id, Status::INTERNAL_DEVICE_ERROR);
    }

    /// Runs `then` once nothing of this channel is in flight; at once if that is so now (at the next settle).
    pub(crate) fn when_quiet(&mut self, channel: ChannelId, then: Then) {
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            slot.when_quiet.push(then);
        }
        self.call_attention(channel);
    }

    fn run_when_quiet(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        while let Some(slot) = &mut self.slots[channel.0 as usize] {
            if !slot.is_quiet() || slot.when_quiet.is_empty() {
                return;
            }
            let then = slot.when_quiet.remove(0);
            then(self, reactor);
        }
    }

    /// Calls into a module with the layer at its disposal. A panic poisons the channel, and only it. None: there is no
    /// module any more.
    #[inline]
    pub(crate) fn with_channel<R>(
        &mut self,
        reactor: &mut Reactor,
        channel: ChannelId,
        call: impl FnOnce(&mut dyn Channel, &mut Layer, &mut Reactor) -> R,
    ) -> Option<R> {
        let slot = self.slots[channel.0 as usize].as_mut()?;
        let Some(mut module) = slot.channel.take() else {
            assert!(slot.gone, "{}: a channel was called from inside itself", slot.info.name);
            self.fail_inflight(channel);
            return None;
        };
        match catch_unwind(AssertUnwindSafe(|| call(&mut *module, self, reactor))) {
            Ok(result) => {
                if let Some(slot) = &mut self.slots[channel.0 as usize] {
                    slot.channel = Some(module);
                }
                Some(result)
            }
            Err(_) => {
                self.poison(channel);
                // A module that panicked may do so again while it is dropped.
                let _ = catch_unwind(AssertUnwindSafe(|| drop(module)));
                None
            }
        }
    }

    /// A module panicked: its channel takes no more, and whatever it had ends with an error.
    #[cold]
    pub(super) fn poison(&mut self, channel: ChannelId) {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        log::say(
            Level::Error,
            "bdev",
            format_args!("{}: its module panicked; this channel of it fails all I/O from now on", slot.info.name),
        );
        slot.state = ChannelState::Closed;
        slot.gone = true;
        self.report_failure(channel, "panic", |_| "its module panicked: a reactor's channel to it fails all I/O from now on".to_owned());
        self.fail_inflight(channel);
        self.call_attention(channel);
    }

    /// Ends all that is with a device that will not do it.
    #[cold]
    fn fail_inflight(&mut self, channel: ChannelId) {
        if self.slot(channel).is_none_or(|slot| slot.inflight == 0) {
            return;
        }
        for id in self.inflight_of(channel) {
            self.complete(id, Status::INTERNAL_DEVICE_ERROR);
        }
    }

    /// The I/Os that the module behind this channel has itself now. Walks the slab: control plane only.
    fn inflight_of(&self, channel: ChannelId) -> Vec<IoId> {
        let with_it = |id: &IoId| {
            let io = self.ios.get(*id);
            io.state == State::Submitted && !io.flags.contains(IoFlags::SPLIT) && io.depth > 0 && io.frame().channel == channel
        };
        self.ios.names().filter(with_it).collect()
    }

    /// Those, and the ones it passed on to channels below. Walks the slab.
    pub(super) fn under(&self, channel: ChannelId) -> Vec<IoId> {
        let passed = |id: &IoId| {
            let io = self.ios.get(*id);
            let own = io.passed().iter().position(|frame| frame.channel == channel);
            own.is_some_and(|at| match at + 1 < usize::from(io.depth) {
                true => matches!(io.state, State::Submitted | State::Waiting),
                // What waits here is not the module's; a parent ends with its children.
                false => io.state == State::Submitted && !io.flags.contains(IoFlags::SPLIT),
            })
        };
        self.ios.names().filter(passed).collect()
    }

    /// The children of a split or emulated I/O that are under way, also those that are being split themselves. Walks the slab.
    pub(super) fn children_of(&self, channel: ChannelId, parent: IoId) -> Vec<IoId> {
        let queue = self.slot(channel).map(|slot| slot.split_queue);
        let of_it = |id: &IoId| {
            let io = self.ios.get(*id);
            let first = io.passed().first();
            io.state == State::Submitted && first.is_some_and(|frame| Some(frame.queue) == queue && IoId::unpack(frame.tag) == parent)
        };
        self.ios.names().filter(of_it).collect()
    }
}
