//! For bdevs that stand on others: channels below, I/Os passed down and up, and I/Os of a module's own.
//!
//! An I/O that is passed down keeps its name and its data; it gets one more frame, and comes back to the module's inner queue.
//! It counts as in flight with every channel that it passed. A module that makes several I/Os out of one takes them from a
//! reserve that it made when its channel was opened. Whatever a module leaves behind when it panics is taken care of here:
//! channels below are left, reserved I/Os go back to the slab when they are done.

use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;

use super::trace::ENTERED;
use super::{Layer, QueueId};
use crate::io::State;
use crate::{BdevError, ChannelId, Descriptor, IoFlags, IoId, Op};

impl Layer {
    /// Opens this reactor's channel to a bdev below, from inside [`crate::Device::open`] or later. It is closed with channel `above`, or
    /// before by [`close_base`](Self::close_base).
    pub fn open_base(&mut self, reactor: &mut Reactor, above: ChannelId, base: &Descriptor) -> Result<ChannelId, BdevError> {
        let below = base.channel(reactor, self)?;
        if let Some(slot) = &mut self.slots[above.0 as usize] {
            slot.bases.push(below);
        }
        Ok(below)
    }

    /// Closes a channel below, when the module does without it from now on. What is in flight there still comes back.
    pub fn close_base(&mut self, above: ChannelId, below: ChannelId) {
        let Some(slot) = &mut self.slots[above.0 as usize] else { return };
        if let Some(at) = slot.bases.iter().position(|base| *base == below) {
            slot.bases.swap_remove(at);
            self.leave_channel(below);
        }
    }

    pub(super) fn leave_bases(&mut self, above: ChannelId) {
        let bases = self.slots[above.0 as usize].as_mut().map(|slot| std::mem::take(&mut slot.bases));
        bases.into_iter().flatten().for_each(|below| self.leave_channel(below));
    }

    /// Passes I/Os on to a channel below, `shift` blocks further on; they come back to `queue` with `tag`.
    #[inline]
    pub fn pass_down(&mut self, reactor: &mut Reactor, below: ChannelId, queue: QueueId, tag: u64, shift: u64, batch: &[IoId]) {
        let covered = self.covers(below, queue, shift);
        self.pass_on(reactor, below, queue, tag, batch, covered, |lba| lba.wrapping_add(shift));
    }

    /// As [`pass_down`](Self::pass_down), each to a place of its own: `place` tells where a block lies there. What comes back goes up with a shift of 0.
    #[inline]
    pub fn pass_down_to(
        &mut self,
        reactor: &mut Reactor,
        below: ChannelId,
        queue: QueueId,
        tag: u64,
        batch: &[IoId],
        place: impl Fn(u64) -> u64,
    ) {
        self.pass_on(reactor, below, queue, tag, batch, None, place);
    }

    #[inline]
    #[allow(clippy::too_many_arguments)]
    fn pass_on(
        &mut self,
        reactor: &mut Reactor,
        below: ChannelId,
        queue: QueueId,
        tag: u64,
        batch: &[IoId],
        covered: Option<u8>,
        place: impl Fn(u64) -> u64,
    ) {
        self.now_ns = reactor.now_ns();
        if self.all_pass(below, queue, tag, batch, covered, &place) {
            return self.dispatch(reactor, below, batch, ENTERED);
        }
        // A stale name is found before anything is touched.
        for id in batch {
            self.ios.get(*id);
        }
        for id in batch {
            let io = self.ios.get_mut(*id);
            io.push(queue, tag);
            io.lba = place(io.lba);
            if io.op == Op::Copy {
                io.source_lba = place(io.source_lba);
            }
        }
        self.submit(reactor, below, batch);
    }

    /// Completes I/Os of channel `above` that came back as they came back; `shift` as they were passed down.
    #[inline]
    pub fn pass_up(&mut self, above: ChannelId, shift: u64, batch: &[IoId]) {
        let done = self.pass_run(above, batch);
        self.pass_rest(above, shift, &batch[done..]);
    }

    /// Those that are not of the common kind, one after the other.
    fn pass_rest(&mut self, above: ChannelId, shift: u64, batch: &[IoId]) {
        let mut start = 0;
        let mut status = Status::SUCCESS;
        for (position, id) in batch.iter().enumerate() {
            let ended = self.take_up(*id, shift);
            if ended != status {
                self.complete_all(above, &batch[start..position], status);
                (start, status) = (position, ended);
            }
        }
        self.complete_all(above, &batch[start..], status);
    }

    /// As [`retrieve`](Self::retrieve), for one passed down by [`pass_down`](Self::pass_down); how it ended below.
    #[inline]
    fn take_up(&mut self, id: IoId, shift: u64) -> Status {
        let io = self.ios.get_mut(id);
        assert!(io.state == State::Done && io.depth > 1, "I/O passed up in state {:?} at depth {}", io.state, io.depth);
        io.flags.remove(IoFlags::SPLIT | IoFlags::EMULATED);
        io.lba = io.pop().lba;
        io.state = State::Submitted;
        match io.op {
            Op::Copy => io.source_lba = io.source_lba.wrapping_sub(shift),
            Op::ZoneAppend => io.result = io.result.wrapping_sub(shift),
            _ => {}
        }
        io.status
    }

    /// Sets I/Os aside for a module's own use, when its channel is opened.
    pub fn reserve(&mut self, above: ChannelId, count: usize) {
        let ids = self.ios.reserve(count);
        if let Some(slot) = &mut self.slots[above.0 as usize] {
            slot.reserve.extend(ids);
        }
    }

    /// An I/O out of the reserve, held by the module: it pushes a frame and submits it to a channel below.
    #[inline]
    pub fn take_reserved(&mut self, above: ChannelId) -> Option<IoId> {
        self.slots[above.0 as usize].as_mut()?.reserve.pop()
    }

    /// Back into the reserve, after it was [`retrieve`](Self::retrieve)d.
    #[inline]
    pub fn return_reserved(&mut self, above: ChannelId, id: IoId) {
        let io = self.ios.get_mut(id);
        assert!(io.state == State::Held, "I/O returned in state {:?}", io.state);
        (io.flags, io.status, io.result) = (IoFlags::empty(), Status::SUCCESS, 0);
        io.list.clear();
        io.metadata.clear();
        if let Some(slot) = &mut self.slots[above.0 as usize] {
            slot.reserve.push(id);
        }
    }

    /// Makes `child` do what `parent` does: operation, range, flags, data.
    pub fn copy_request(&mut self, parent: IoId, child: IoId) {
        let mut list = std::mem::take(&mut self.ios.get_mut(child).list);
        let mut metadata = std::mem::take(&mut self.ios.get_mut(child).metadata);
        let io = self.ios.get(parent);
        list.extend(io.list.iter().cloned());
        metadata.extend(io.metadata.iter().cloned());
        let (op, flags, lba, blocks, source_lba, command) = (io.op, io.flags, io.lba, io.blocks, io.source_lba, io.command);
        let io = self.ios.get_mut(child);
        (io.op, io.flags, io.lba, io.blocks, io.source_lba, io.command) =
            (op, flags - IoFlags::SPLIT - IoFlags::CHILD, lba, blocks, source_lba, command);
        (io.list, io.metadata, io.sized, io.origin) = (list, metadata, 0, parent.pack());
    }
}
