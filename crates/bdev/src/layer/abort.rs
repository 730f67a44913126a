//! Early ends: hints to whoever has an I/O.

use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;

use super::{Layer, QueueId};
use crate::io::State;
use crate::{IoFlags, IoId, Op};

impl Layer {
    /// Asks for an early end of an I/O. One that waits here ends at once; one with its device ends when the device says.
    pub fn abort(&mut self, reactor: &mut Reactor, id: IoId) {
        if !self.ios.is_current(id) {
            return;
        }
        let io = self.ios.get_mut(id);
        if !matches!(io.state, State::Waiting | State::Submitted) {
            return;
        }
        let channel = io.frame().channel;
        if io.state == State::Waiting {
            if let Some(slot) = &mut self.slots[channel.0 as usize] {
                slot.waiting.retain(|other| *other != id);
                slot.gate.outside.retain(|other| *other != id);
                slot.limits.iter_mut().for_each(|limits| limits.forget(id, self.now_ns));
            }
            return self.refuse(channel, id, Status::ABORT_REQUESTED);
        }
        if !io.flags.contains(IoFlags::SPLIT) {
            self.with_channel(reactor, channel, |module, layer, reactor| module.abort(layer, reactor, id));
        } else if io.op != Op::Reset {
            // Nothing more of it is handed out; its children are asked to end.
            if !io.status.is_error() {
                io.status = Status::ABORT_REQUESTED;
            }
            for child in self.children_of(channel, id) {
                self.abort(reactor, child);
            }
            self.call_attention(channel);
        }
    }

    /// Asks for an early end of everything that will come to `queue`. Walks the slab: control plane only.
    pub fn abort_queue(&mut self, reactor: &mut Reactor, queue: QueueId) {
        let of_queue = |id: &IoId| {
            let io = self.ios.get(*id);
            io.depth > 0 && io.frame().queue == queue
        };
        for id in self.ios.names().filter(of_queue).collect::<Vec<_>>() {
            self.abort(reactor, id);
        }
        self.settle(reactor);
    }
}
