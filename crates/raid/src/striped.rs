//! One reactor's channel to an array without redundancy: strips in turn (raid0), or member after member (concat).
//!
//! How it works. The layer splits reads and writes at the strip, so that each lies on one member: it is moved there and passed down as it is. A batch is sorted by
//! member in one pass, with the array's shape in registers, and goes down in one call a member. What came back goes up in one run; a batch that came back whole, in the
//! order in which it was submitted: who uses requests and buffers again goes on to find them in a row, and so do the caches. What has no data (flush, unmap, write-zeroes) may
//! concern several members: each gets its part of the range, by I/Os reserved when the channel was opened, and the first error is the whole's.
//!
//! Limits: [`FANNED_MAX`] I/Os fanned out at once on a channel, the rest wait here.

use std::collections::VecDeque;

use qpair_bdev::{BdevError, Channel, ChannelId, IoId, Layer, Op, QueueId, Status};
use qpair_reactor::Reactor;

use crate::array::Array;
use crate::geometry::{Layout, after_another, in_turn};

/// The tag of an I/O that was passed down as it is.
const WHOLE: u64 = 1 << 63;
/// See the module's doc.
const FANNED_MAX: usize = 8;
/// Room for what is sorted or waits, so that larger batches alone allocate, once.
const BATCH: usize = 256;

/// A member, as this channel sees it.
struct Leg {
    below: ChannelId,
    /// Where data begin.
    offset: u64,
    /// What is about to go there as it is.
    ready: Vec<IoId>,
    /// Parts that are.
    parts: Vec<IoId>,
}

/// An I/O that several members have a part of.
struct Fanned {
    parent: Option<IoId>,
    children: Vec<IoId>,
    status: Status,
}

/// See the module's doc.
pub(crate) struct Striped {
    id: ChannelId,
    queue: QueueId,
    layout: Layout,
    legs: Vec<Leg>,
    fanned: Vec<Fanned>,
    /// How many of those are under way.
    busy: usize,
    waiting: VecDeque<IoId>,
    /// How many are below as they are.
    out: usize,
    /// Those, in their order, if they came in one batch; else nothing.
    sent: Vec<IoId>,
}

impl Striped {
    pub(crate) fn open(array: &Array, layer: &mut Layer, reactor: &mut Reactor, id: ChannelId) -> Result<Self, BdevError> {
        let view = array.view();
        let mut legs = Vec::with_capacity(array.slots);
        for (member, offset) in view.members.iter().zip(&view.offsets) {
            let member = member.as_ref().ok_or_else(|| BdevError::Removing(array.name.clone()))?;
            let below = layer.open_base(reactor, id, member)?;
            legs.push(Leg { below, offset: *offset, ready: Vec::with_capacity(BATCH), parts: Vec::with_capacity(FANNED_MAX) });
        }
        layer.reserve(id, FANNED_MAX * array.slots);
        let vacant = || Fanned { parent: None, children: Vec::with_capacity(array.slots), status: Status::SUCCESS };
        Ok(Self {
            id,
            queue: layer.add_inner_queue(id),
            layout: array.layout(),
            legs,
            fanned: (0..FANNED_MAX).map(|_| vacant()).collect(),
            busy: 0,
            waiting: VecDeque::with_capacity(BATCH),
            out: 0,
            sent: Vec::with_capacity(BATCH),
        })
    }

    /// Gives each member its part; false: no room.
    fn fan_out(&mut self, layer: &mut Layer, parent: IoId) -> bool {
        let Some(index) = self.fanned.iter().position(|fanned| fanned.parent.is_none()) else { return false };
        let io = layer.io(parent);
        let (op, lba, blocks) = (io.op, io.lba, io.blocks);
        let fanned = &mut self.fanned[index];
        (fanned.parent, fanned.status) = (Some(parent), Status::SUCCESS);
        self.busy += 1;
        for (member, leg) in self.legs.iter_mut().enumerate() {
            let part = if op == Op::Flush { Some((0, 0)) } else { self.layout.part(member, lba, blocks) };
            let Some((first, count)) = part else { continue };
            // As many were reserved as all can need.
            let Some(child) = layer.take_reserved(self.id) else { continue };
            layer.copy_request(parent, child);
            let io = layer.io_mut(child);
            (io.lba, io.blocks) = if op == Op::Flush { (0, 0) } else { (first + leg.offset, count) };
            io.push(self.queue, index as u64);
            self.fanned[index].children.push(child);
            leg.parts.push(child);
        }
        true
    }

    fn part_done(&mut self, layer: &mut Layer, child: IoId) {
        let status = layer.io(child).status;
        let index = layer.retrieve(child).tag as usize;
        layer.return_reserved(self.id, child);
        let fanned = &mut self.fanned[index];
        fanned.children.retain(|other| *other != child);
        if status.is_error() && !fanned.status.is_error() {
            fanned.status = status;
        }
        if fanned.children.is_empty()
            && let Some(parent) = fanned.parent.take()
        {
            self.busy -= 1;
            layer.complete(parent, fanned.status);
        }
    }

    /// Has the members begin with their parts of what waits, as far as there is room.
    #[cold]
    fn start_waiting(&mut self, layer: &mut Layer) {
        while let Some(id) = self.waiting.front().copied() {
            if !self.fan_out(layer, id) {
                break;
            }
            self.waiting.pop_front();
        }
    }

    /// The parts of what is fanned out.
    #[cold]
    fn send_parts(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        for leg in self.legs.iter_mut().filter(|leg| !leg.parts.is_empty()) {
            layer.submit(reactor, leg.below, &leg.parts);
            leg.parts.clear();
        }
    }

    /// As [`completed`](Channel::completed) while something is fanned out: runs of what was passed down as it was, and parts.
    #[cold]
    fn merge(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let mut rest = batch;
        while let Some(first) = rest.first() {
            let whole = rest.iter().take_while(|id| layer.io(**id).frame().tag == WHOLE).count();
            if whole == 0 {
                self.part_done(layer, *first);
            } else {
                self.out -= whole;
                layer.pass_up(self.id, 0, &rest[..whole]);
            }
            rest = &rest[whole.max(1)..];
        }
        self.start_waiting(layer);
        self.send_parts(layer, reactor);
    }
}

/// Passes reads and writes down, sorted by member, and puts everything else with what waits; how many went down.
#[inline(always)]
fn sort(
    layer: &mut Layer,
    reactor: &mut Reactor,
    queue: QueueId,
    batch: &[IoId],
    (legs, waiting): (&mut [Leg], &mut VecDeque<IoId>),
    place: impl Fn(u64) -> (usize, u64),
) -> usize {
    let waited = waiting.len();
    for &id in batch {
        let io = layer.io(id);
        if matches!(io.op, Op::Read | Op::Write) {
            legs[place(io.lba).0].ready.push(id);
        } else {
            waiting.push_back(id);
        }
    }
    for leg in legs.iter_mut().filter(|leg| !leg.ready.is_empty()) {
        let offset = leg.offset;
        layer.pass_down_to(reactor, leg.below, queue, WHOLE, &leg.ready, |lba| place(lba).1 + offset);
        leg.ready.clear();
    }
    batch.len() - (waiting.len() - waited)
}

impl Channel for Striped {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let Self { queue, layout, legs, waiting, .. } = self;
        let into = (&mut legs[..], waiting);
        let whole = match layout {
            Layout::Strips { shift, members, power: Some(power) } => {
                let (shift, mask, power) = (*shift, *members - 1, *power);
                sort(layer, reactor, *queue, batch, into, |lba| in_turn(lba, shift, |strip| (strip >> power, strip & mask)))
            }
            Layout::Strips { shift, members, power: None } => {
                let (shift, members) = (*shift, *members);
                sort(layer, reactor, *queue, batch, into, |lba| in_turn(lba, shift, |strip| (strip / members, strip % members)))
            }
            Layout::Concat(starts) => sort(layer, reactor, *queue, batch, into, |lba| after_another(lba, starts)),
        };
        self.sent.clear();
        if self.out == 0 && whole == batch.len() {
            self.sent.extend_from_slice(batch);
        }
        self.out += whole;
        if !self.waiting.is_empty() {
            self.start_waiting(layer);
            self.send_parts(layer, reactor);
        }
    }

    #[inline]
    fn completed(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        if self.busy == 0 {
            self.out -= batch.len();
            let in_order = self.out == 0 && batch.len() == self.sent.len();
            layer.pass_up(self.id, 0, if in_order { &self.sent } else { batch });
        } else {
            self.merge(layer, reactor, batch);
        }
    }

    /// A hint: what waits ends at once, members are asked to hurry.
    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        if let Some(at) = self.waiting.iter().position(|other| *other == id) {
            self.waiting.remove(at);
            return layer.complete(id, Status::ABORT_REQUESTED);
        }
        let Some(fanned) = self.fanned.iter().find(|fanned| fanned.parent == Some(id)) else { return };
        fanned.children.clone().into_iter().for_each(|child| layer.abort(reactor, child));
    }
}
