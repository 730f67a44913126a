//! One reactor's side of range locks: who has to wait, and what a lock waits for. See [`crate::ranges`].

use std::rc::Rc;

use qpair_reactor::fanout::Part;

use super::{Layer, Slot};
use crate::io::State;
use crate::ranges::Range;
use crate::{ChannelId, DeviceId, IoFlags, IoId, Op};

/// What a channel keeps out, and whom.
#[derive(Default)]
pub(super) struct Gate {
    pub(super) ranges: Vec<Range>,
    awaiting: Vec<Awaiting>,
    /// I/Os that wait for a lock to go.
    pub(super) outside: Vec<IoId>,
}

/// A lock on its way: what was in its range before has to end first.
struct Awaiting {
    ios: Vec<IoId>,
    _part: Rc<Part>,
}

impl Layer {
    /// A lock begins: I/O that it excludes waits from now on. `part` is dropped when none is under way.
    pub(crate) fn keep_out(&mut self, device: DeviceId, range: Range, part: &Rc<Part>) {
        self.ranges.push((device, range));
        for channel in self.channels_of(device) {
            let ios = self.excluded_by(channel, &range);
            for id in &ios {
                self.ios.get_mut(*id).flags |= IoFlags::AWAITED;
            }
            if let Some(slot) = &mut self.slots[channel.0 as usize] {
                slot.gate.ranges.push(range);
                if !ios.is_empty() {
                    slot.gate.awaiting.push(Awaiting { ios, _part: part.clone() });
                }
            }
        }
    }

    /// The lock is over: what it kept out is judged anew.
    pub(crate) fn let_in(&mut self, device: DeviceId, range: u64) {
        // Each device counts its own: another one's lock may have the same number.
        self.ranges.retain(|(of, other)| *of != device || other.id != range);
        for channel in self.channels_of(device) {
            let Some(slot) = &mut self.slots[channel.0 as usize] else { continue };
            slot.gate.ranges.retain(|other| other.id != range);
            slot.waiting.extend(slot.gate.outside.drain(..));
            self.call_attention(channel);
        }
    }

    /// The locks that a channel of this device begins with.
    pub(super) fn gate_of(&self, device: DeviceId) -> Gate {
        let of_it = self.ranges.iter().filter(|(other, _)| *other == device);
        Gate { ranges: of_it.map(|(_, range)| *range).collect(), ..Gate::default() }
    }

    /// Has an I/O wait if some lock keeps it out.
    #[cold]
    pub(super) fn stays_out(slot: &mut Slot, id: IoId, io: &mut crate::Io) -> bool {
        let excluded = slot.gate.ranges.iter().any(|range| range.excludes(io, io.lba));
        if excluded {
            io.state = State::Waiting;
            slot.gate.outside.push(id);
        }
        excluded
    }

    /// The I/Os of a channel that are under way in a range. Walks the slab, unless nothing is under way at all.
    fn excluded_by(&self, channel: ChannelId, range: &Range) -> Vec<IoId> {
        if self.slot(channel).is_none_or(Slot::is_quiet) {
            return Vec::new();
        }
        let under_way = |id: &IoId| {
            let io = self.ios.get(*id);
            // One that waits for a lock itself has begun nothing.
            let begun = io.state == State::Submitted && !(io.op == Op::CompareAndWrite && io.flags.contains(IoFlags::EMULATED));
            begun && io.lba_at(channel).is_some_and(|lba| range.excludes(io, lba))
        };
        self.ios.names().filter(under_way).collect()
    }

    /// An I/O ended that a lock waits for, here or in another channel that it passed.
    #[cold]
    pub(super) fn end_awaited(&mut self, channel: ChannelId, id: IoId) {
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            slot.gate.awaiting.iter_mut().for_each(|awaiting| awaiting.ios.retain(|other| *other != id));
            slot.gate.awaiting.retain(|awaiting| !awaiting.ios.is_empty());
        }
    }
}
