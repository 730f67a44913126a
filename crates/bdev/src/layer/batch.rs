//! The common case, whole batches in one pass: submitted as they are, completed alike, and given back.
//!
//! What is done here is exactly what `submit_slowly`, `complete`, `pass_down`, `pass_rest` and `retrieve` do one I/O at a time, with the look-ups of channel, queue and
//! waker made once. Whatever is not common goes there; so does what a module may not do (a stale name, an I/O that has ended already): nothing here panics, or what was
//! looked at before in the same batch would be nobody's.

use qpair_wire::nvme::Status;

use super::{ChannelState, Layer, Owner, QueueId, check};
use crate::io::{Slab, State};
use crate::stats::Run;
use crate::trace::Point;
use crate::{ChannelId, Frame, IoFlags, IoId, Op};

impl Layer {
    /// True: the device takes I/O, has room, every I/O fits as it is, and all are booked in flight. False: nothing has changed.
    #[inline]
    pub(super) fn all_plain(&mut self, channel: ChannelId, batch: &[IoId]) -> bool {
        let Some(slot) = self.slots.get_mut(channel.0 as usize).and_then(Option::as_mut) else { return false };
        if slot.state != ChannelState::Open || !slot.waiting.is_empty() || !slot.gate.ranges.is_empty() || slot.room() < batch.len() {
            return false;
        }
        for (position, id) in batch.iter().enumerate() {
            let found = self.ios.find_mut(*id).filter(|io| io.may_be_submitted() && check::is_plain(&slot.info, io));
            let Some(io) = found else {
                take_back(&mut self.ios, &batch[..position]);
                return false;
            };
            io.state = State::Submitted;
            io.sized = slot.info.block_size.trailing_zeros() as u8;
            let frame = io.frame_mut();
            (frame.channel, frame.submitted_ns) = (channel, self.now_ns);
        }
        if let Some(limits) = &mut slot.limits
            && !limits.pay_all(&self.ios, batch, &slot.info, self.now_ns)
        {
            take_back(&mut self.ios, batch);
            return false;
        }
        slot.inflight += batch.len() as u32;
        true
    }

    /// Some if what is plain for the channel whose queue this is, is so `shift` blocks further on below: then the mark ([`crate::Io::sized`]) of
    /// I/Os that nobody wrote to since they were looked at.
    #[inline]
    pub(super) fn covers(&self, below: ChannelId, queue: QueueId, shift: u64) -> Option<u8> {
        let Owner::Channel(above) = self.queues[queue.0 as usize].owner else { return None };
        let (above, below) = (self.slot(above)?, self.slot(below)?);
        check::covers(&below.info, &above.info, shift).then(|| below.info.block_size.trailing_zeros() as u8)
    }

    /// Passing down as [`all_plain`](Self::all_plain) submits: frames are pushed in the same pass. False: nothing has changed.
    #[inline(always)]
    pub(super) fn all_pass(
        &mut self,
        below: ChannelId,
        queue: QueueId,
        tag: u64,
        batch: &[IoId],
        covered: Option<u8>,
        place: impl Fn(u64) -> u64,
    ) -> bool {
        let Some(slot) = self.slots.get(below.0 as usize).and_then(Option::as_ref) else { return false };
        if slot.state != ChannelState::Open || !slot.waiting.is_empty() || !slot.gate.ranges.is_empty() || slot.room() < batch.len() {
            return false;
        }
        if slot.limits.is_some() {
            return false;
        }
        let (submitted_ns, info, sized) = (self.now_ns, &slot.info, covered.unwrap_or(u8::MAX));
        for (position, id) in batch.iter().enumerate() {
            let Some(io) = self.ios.find_mut(*id).filter(|io| io.state == State::Submitted) else {
                lift(&mut self.ios, &batch[..position]);
                return false;
            };
            let lba = io.lba;
            io.lba = place(lba);
            if io.sized != sized && !check::is_plain(info, io) {
                io.lba = lba;
                lift(&mut self.ios, &batch[..position]);
                return false;
            }
            io.frames[usize::from(io.depth)] = Frame { queue, channel: below, tag, lba, submitted_ns };
            io.depth += 1;
        }
        if let Some(slot) = &mut self.slots[below.0 as usize] {
            slot.inflight += batch.len() as u32;
        }
        true
    }

    /// Takes I/Os at the batch's start that came back from below, plain ones that go to one place, and ends them as they ended there;
    /// returns how many.
    #[inline]
    pub(super) fn pass_run(&mut self, above: ChannelId, batch: &[IoId]) -> usize {
        let (Some(first), Some(Some(slot))) = (batch.first(), self.slots.get_mut(above.0 as usize)) else { return 0 };
        let io = self.ios.get(*first);
        if io.depth < 2 || !slot.is_calm() || slot.counts() {
            return 0;
        }
        let (queue, mut run) = (io.frames[usize::from(io.depth) - 2].queue, Run::of(io.op));
        let place = &self.queues[queue.0 as usize];
        if !matches!(place.owner, Owner::FrontEnd(_) | Owner::Channel(_)) {
            return 0;
        }
        let (shift, now_ns) = (slot.info.block_size.trailing_zeros(), self.now_ns);
        let mut done = 0;
        for id in batch {
            let Some(io) = self.ios.find_mut(*id) else { break };
            let plain = matches!(io.op, Op::Read | Op::Write)
                && io.state == State::Done
                && io.depth > 1
                && !io.flags.intersects(IoFlags::SPLIT | IoFlags::CHILD | IoFlags::AWAITED | IoFlags::EMULATED);
            if !plain {
                break;
            }
            let depth = usize::from(io.depth) - 1;
            let frame = &io.frames[depth - 1];
            if frame.queue != queue || frame.channel != above {
                break;
            }
            run.book(&mut slot.stats, io.op, io.blocks << shift, now_ns.saturating_sub(frame.submitted_ns), io.status);
            io.lba = io.frames[depth].lba;
            io.depth = depth as u8;
            done += 1;
        }
        self.end_run(above, queue, &batch[..done], run);
        done
    }

    /// Books a run of I/Os that ended, and tells who reaps them.
    #[inline(always)]
    fn end_run(&mut self, channel: ChannelId, queue: QueueId, ended: &[IoId], run: Run) {
        if ended.is_empty() {
            return;
        }
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            run.end(&mut slot.stats);
            slot.inflight -= ended.len() as u32;
        }
        let straight = self.queues[queue.0 as usize].straight;
        let ended = if straight { self.go_straight(channel, queue, ended) } else { ended };
        if ended.is_empty() {
            return;
        }
        let place = &mut self.queues[queue.0 as usize];
        let was_empty = place.entries.is_empty();
        place.entries.extend_from_slice(ended);
        match &place.owner {
            Owner::FrontEnd(waker) => waker.wake(),
            _ if was_empty => {
                self.inner_ready.push(queue);
                self.call_settler();
            }
            _ => {}
        }
        // Last, when nothing else is at hand that would have to be kept for afterwards.
        if self.trace.is_on() && !straight {
            self.trace_batch(channel, ended, Point::Done.bit());
        }
    }

    /// Has what ended below, on channel `below`, end for whoever is above the channel whose queue this is, up to the first that is not plain; what is left. It goes up as
    /// many floors as are straight, one call a floor.
    #[inline(never)]
    fn go_straight<'a>(&mut self, below: ChannelId, queue: QueueId, ended: &'a [IoId]) -> &'a [IoId] {
        if self.trace.is_on() {
            self.trace_batch(below, ended, Point::Done.bit());
        }
        let Owner::Channel(above) = self.queues[queue.0 as usize].owner else { return ended };
        if self.slot(above).is_none_or(|slot| slot.gone) {
            return ended;
        }
        &ended[self.pass_run(above, ended)..]
    }

    /// Ends I/Os of one channel alike, as [`complete`](Self::complete) does one.
    #[inline]
    pub fn complete_all(&mut self, channel: ChannelId, batch: &[IoId], status: Status) {
        let done = self.complete_run(channel, batch, status);
        for id in &batch[done..] {
            self.complete(*id, status);
        }
    }

    /// Ends the I/Os at the batch's start that are plain and go to one place; returns how many.
    #[inline]
    fn complete_run(&mut self, channel: ChannelId, batch: &[IoId], status: Status) -> usize {
        let (Some(first), Some(Some(slot))) = (batch.first(), self.slots.get_mut(channel.0 as usize)) else { return 0 };
        let io = self.ios.get(*first);
        let (queue, mut run) = (io.frame().queue, Run::of(io.op));
        let place = &self.queues[queue.0 as usize];
        if !slot.is_calm() || !matches!(place.owner, Owner::FrontEnd(_) | Owner::Channel(_)) {
            return 0;
        }
        let shift = slot.info.block_size.trailing_zeros();
        let mut done = 0;
        for id in batch {
            let Some(io) = self.ios.find_mut(*id).filter(|io| io.state == State::Submitted) else { break };
            let frame = io.frame();
            if frame.queue != queue || frame.channel != channel || io.flags.intersects(IoFlags::SPLIT | IoFlags::CHILD | IoFlags::AWAITED) {
                break;
            }
            let elapsed_ns = self.now_ns.saturating_sub(frame.submitted_ns);
            (io.state, io.status) = (State::Done, status);
            run.book(&mut slot.stats, io.op, io.blocks << shift, elapsed_ns, status);
            if let Some(observer) = &mut slot.observer {
                observer.book(io.op, elapsed_ns);
            }
            done += 1;
        }
        self.end_run(channel, queue, &batch[..done], run);
        done
    }

    /// Takes a reaped I/O back and returns it to the slab: its front end's tag, and how it ended.
    #[inline]
    pub fn finish(&mut self, id: IoId) -> (u64, Status) {
        self.ios.finish(id)
    }
}

/// Takes frames off again, of I/Os that were about to be passed down.
#[cold]
fn lift(ios: &mut Slab, batch: &[IoId]) {
    for id in batch {
        let io = ios.get_mut(*id);
        io.lba = io.pop().lba;
    }
}

/// As if they had not been looked at.
#[cold]
fn take_back(ios: &mut Slab, batch: &[IoId]) {
    for id in batch {
        let io = ios.get_mut(*id);
        io.state = if io.depth == 1 { State::Held } else { State::Submitted };
    }
}
