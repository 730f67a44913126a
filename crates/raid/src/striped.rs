//! One reactor's channel to an array without redundancy: strips in turn (raid0), or member after member (concat).
//!
//! How it works. The layer splits reads and writes at the strip, so that each lies on one member: it is moved there and passed down as it is, with the others
//! of its batch that go there. What has no data (flush, unmap, write-zeroes) may concern several members: each gets its part of the range, by I/Os
//! reserved when the channel was opened, and the first error is the whole's.
//!
//! Limits: [`FANNED_MAX`] I/Os fanned out at once on a channel, the rest wait here.

use std::collections::VecDeque;

use qpair_bdev::{BdevError, Channel, ChannelId, IoId, Layer, Op, QueueId, Status};
use qpair_reactor::Reactor;

use crate::array::Array;
use crate::geometry::Layout;

/// The tag of an I/O that was passed down as it is.
const WHOLE: u64 = 1 << 63;
/// See the module's doc.
const FANNED_MAX: usize = 8;

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
    offsets: Vec<u64>,
    below: Vec<ChannelId>,
    ready: Vec<Vec<IoId>>,
    fanned: Vec<Fanned>,
    /// How many of those are under way.
    busy: usize,
    waiting: VecDeque<IoId>,
}

impl Striped {
    pub(crate) fn open(array: &Array, layer: &mut Layer, reactor: &mut Reactor, id: ChannelId) -> Result<Self, BdevError> {
        let view = array.view();
        let mut below = Vec::with_capacity(array.slots);
        for member in &view.members {
            let member = member.as_ref().ok_or_else(|| BdevError::Removing(array.name.clone()))?;
            below.push(layer.open_base(reactor, id, member)?);
        }
        layer.reserve(id, FANNED_MAX * array.slots);
        let vacant = || Fanned { parent: None, children: Vec::with_capacity(array.slots), status: Status::SUCCESS };
        Ok(Self {
            id,
            queue: layer.add_inner_queue(id),
            layout: array.layout(),
            offsets: view.offsets.clone(),
            ready: below.iter().map(|_| Vec::with_capacity(256)).collect(),
            below,
            fanned: (0..FANNED_MAX).map(|_| vacant()).collect(),
            busy: 0,
            waiting: VecDeque::new(),
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
        for member in 0..self.below.len() {
            let part = if op == Op::Flush { Some((0, 0)) } else { self.layout.part(member, lba, blocks) };
            let Some((first, count)) = part else { continue };
            // As many were reserved as all can need.
            let Some(child) = layer.take_reserved(self.id) else { continue };
            layer.copy_request(parent, child);
            let io = layer.io_mut(child);
            (io.lba, io.blocks) = if op == Op::Flush { (0, 0) } else { (first + self.offsets[member], count) };
            io.push(self.queue, index as u64);
            self.fanned[index].children.push(child);
            self.ready[member].push(child);
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

    #[cold]
    fn spread(&mut self, layer: &mut Layer, id: IoId) {
        if !self.waiting.is_empty() || !self.fan_out(layer, id) {
            self.waiting.push_back(id);
        }
    }

    #[inline]
    fn send(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        for (member, batch) in self.ready.iter_mut().enumerate() {
            if !batch.is_empty() {
                layer.submit(reactor, self.below[member], batch);
                batch.clear();
            }
        }
    }

    #[cold]
    fn merge(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            if layer.io(*id).frame().tag == WHOLE {
                layer.pass_up(self.id, 0, &[*id]);
            } else {
                self.part_done(layer, *id);
            }
        }
        while let Some(id) = self.waiting.front().copied() {
            if !self.fan_out(layer, id) {
                break;
            }
            self.waiting.pop_front();
        }
        self.send(layer, reactor);
    }
}

impl Channel for Striped {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for &id in batch {
            let io = layer.io_mut(id);
            if matches!(io.op, Op::Read | Op::Write) {
                let (member, lba) = self.layout.place(io.lba);
                io.push(self.queue, WHOLE);
                io.lba = lba + self.offsets[member];
                self.ready[member].push(id);
            } else {
                self.spread(layer, id);
            }
        }
        self.send(layer, reactor);
    }

    fn completed(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        if self.busy == 0 {
            layer.pass_up(self.id, 0, batch);
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
