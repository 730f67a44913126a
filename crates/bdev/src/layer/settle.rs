//! What follows from completions, done in a loop and never by recursion.

use std::panic::{AssertUnwindSafe, catch_unwind};

use qpair_reactor::Reactor;
use qpair_reactor::log::{self, Level};
use qpair_wire::nvme::Status;

use super::{ChannelState, Layer, Owner, QueueId, Then};
use crate::io::State;
use crate::{Channel, ChannelId, IoFlags, IoId};

impl Layer {
    /// Starts what waited, runs inner layers, tells drains that all is quiet; until nothing is left to do.
    #[inline]
    pub fn settle(&mut self, reactor: &mut Reactor) {
        while !(self.attention.is_empty() && self.inner_ready.is_empty()) {
            if let Some(channel) = self.attention.pop() {
                self.tend(reactor, channel);
            }
            if let Some(queue) = self.inner_ready.pop() {
                self.deliver_inside(reactor, queue);
            }
        }
    }

    /// Has the channel looked after by the next [`settle`](Self::settle).
    pub(super) fn call_attention(&mut self, channel: ChannelId) {
        if let Some(slot) = &mut self.slots[channel.0 as usize]
            && !slot.attention
        {
            slot.attention = true;
            self.attention.push(channel);
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
        self.run_when_quiet(reactor, channel);
    }

    /// Moves waiting I/Os on as long as the device has room.
    fn start_waiting(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        let mut ready = std::mem::take(&mut self.scratch);
        while let Some(slot) = &mut self.slots[channel.0 as usize] {
            let waiting = std::mem::take(&mut slot.waiting);
            let before = waiting.len();
            // Routed with an empty queue, so that order is kept; what does not fit queues up again behind.
            let mut rest = waiting.into_iter();
            for id in rest.by_ref() {
                self.ios.get_mut(id).state = State::Held;
                self.route(reactor, channel, id, &mut ready);
                if self.slots[channel.0 as usize].as_ref().is_none_or(|slot| !slot.waiting.is_empty()) {
                    break;
                }
            }
            if let Some(slot) = &mut self.slots[channel.0 as usize] {
                slot.waiting.extend(rest);
            }
            if ready.is_empty() {
                break;
            }
            self.dispatch(reactor, channel, &ready);
            ready.clear();
            let left = self.slots[channel.0 as usize].as_ref().map_or(0, |slot| slot.waiting.len());
            if left == 0 || left == before {
                break;
            }
        }
        self.scratch = ready;
    }

    fn fail_waiting(&mut self, channel: ChannelId) {
        while let Some(id) = self.slots[channel.0 as usize].as_mut().and_then(|slot| slot.waiting.pop_front()) {
            self.refuse(channel, id, Status::INVALID_NAMESPACE);
        }
    }

    /// Hands completions to the layer that is stacked here, or merges children into their parents.
    fn deliver_inside(&mut self, reactor: &mut Reactor, queue: QueueId) {
        let place = &mut self.queues[queue.0 as usize];
        let mut entries = std::mem::take(&mut place.entries);
        match place.owner {
            Owner::Split(channel) => entries.iter().for_each(|id| self.end_child(channel, *id)),
            Owner::Channel(channel) => {
                self.with_channel(reactor, channel, |module, layer, reactor| module.completed(layer, reactor, &entries));
            }
            Owner::FrontEnd(_) | Owner::Nobody => {}
        }
        entries.clear();
        let place = &mut self.queues[queue.0 as usize];
        if place.entries.is_empty() {
            place.entries = entries;
        }
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

    /// Calls into a module with the layer at its disposal. A panic poisons the channel, and only it.
    #[inline]
    pub(crate) fn with_channel<R>(
        &mut self,
        reactor: &mut Reactor,
        channel: ChannelId,
        call: impl FnOnce(&mut dyn Channel, &mut Layer, &mut Reactor) -> R,
    ) -> Option<R> {
        let Some(mut module) = self.slots[channel.0 as usize].as_mut().and_then(|slot| slot.channel.take()) else {
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
                None
            }
        }
    }

    /// A module panicked: its channel takes no more, and whatever it had ends with an error.
    #[cold]
    fn poison(&mut self, channel: ChannelId) {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        log::say(Level::Error, "bdev", format_args!("{}: its module panicked; this channel of it fails all I/O from now on", slot.info.name));
        slot.state = ChannelState::Closed;
        self.fail_inflight(channel);
        self.call_attention(channel);
    }

    /// Ends all that is with a device that will not do it.
    #[cold]
    fn fail_inflight(&mut self, channel: ChannelId) {
        for id in self.inflight_of(channel) {
            self.complete(id, Status::INTERNAL_DEVICE_ERROR);
        }
    }

    /// The I/Os that are with the device behind this channel now. Walks the slab: control plane only.
    pub(crate) fn inflight_of(&self, channel: ChannelId) -> Vec<IoId> {
        let with_it = |id: &IoId| {
            let io = self.ios.get(*id);
            io.state == State::Submitted && !io.flags.contains(IoFlags::SPLIT) && io.depth > 0 && io.frame().channel == channel
        };
        self.ios.names().filter(with_it).collect()
    }
}
