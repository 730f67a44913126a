//! Operations that a device does not know, done by others that it does, one after the other: compare, compare-and-write, copy and zcopy.
//!
//! How it works. Such an I/O is a parent with one helper at a time: a read into a bounce buffer or a write from it, which may itself be
//! split. When the helper is back the parent's [`Job`] takes its next step; after an error, an abort or the device's removal it takes
//! none. Compare-and-write has its range to itself meanwhile ([`crate::ranges`]). A job that finds no helper, no buffer or no room with
//! the device waits until something of this channel ends; buffers are shared by the reactor's channels, so one that finds none asks
//! again when the next is given back.
//!
//! Limits: [`HELPERS`] jobs at once, each channel; [`BOUNCES`] buffers, each reactor; memory lent by zcopy is up to [`LENT_BYTES_MAX`], mapped
//! anew each time. A copy whose ranges overlap is done from the end that keeps its source whole.

use qpair_memory::{Mapping, MemoryError, Pages, Region, SgList, Sge};
use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;

use super::check::{self, Route};
use super::split::{ZEROS, slice, whole_units};
use super::{ChannelState, Layer};
use crate::io::State;
use crate::ranges::{self, Keep, RangeLock};
use crate::trace::Point;
use crate::{BdevError, ChannelId, Info, Io, IoFlags, IoId, Op};

/// I/Os set aside for each channel.
const HELPERS: usize = 4;
/// Bounce buffers of a reactor.
const BOUNCES: usize = 8;
/// What is moved in one step, unless the device writes more at once.
const STEP_BYTES: u64 = 64 << 10;
/// The most memory that one zcopy is lent, in bytes.
pub(super) const LENT_BYTES_MAX: u64 = 256 << 20;

/// As large as the largest write unit.
struct Bounce {
    region: Region,
    offset: u64,
}

/// A reactor's bounce buffers; memory is only used where one is filled.
#[derive(Default)]
pub(super) struct Bounces {
    free: Vec<Bounce>,
    made: bool,
    /// Channels whose jobs found none.
    wanted_by: Vec<ChannelId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Begin,
    /// Waits for its range.
    Lock,
    Compare,
    WriteSecondHalf,
    CopyRead,
    CopyWrite,
    Fill,
    Commit,
    Done,
}

/// One emulated I/O.
pub(super) struct Job {
    parent: IoId,
    step: Step,
    /// Blocks that are through, and those under way.
    done: u64,
    now: u64,
    bounce: Option<Bounce>,
    lock: Option<RangeLock>,
    /// A helper or a lock is awaited.
    busy: bool,
}

impl Job {
    pub(super) fn new(parent: IoId) -> Self {
        Self { parent, step: Step::Begin, done: 0, now: 0, bounce: None, lock: None, busy: false }
    }
}

impl Layer {
    /// Sets I/Os aside for a channel whose device leaves something to be emulated.
    pub(super) fn reserve_helpers(&mut self, info: &Info) -> Result<Vec<IoId>, BdevError> {
        if !check::can_emulate(info, Op::Compare) {
            return Ok(Vec::new());
        }
        if !self.bounces.made {
            let memory = Mapping::anonymous(BOUNCES * ZEROS as usize, Pages::Normal)?;
            self.bounces.free =
                (0..BOUNCES as u64).map(|number| Bounce { region: Region::new(memory.clone()), offset: number * ZEROS }).collect();
            self.bounces.made = true;
        }
        Ok(self.ios.reserve(HELPERS))
    }

    /// Has every job that can take its next step take it, and ends those that are through.
    pub(super) fn pump_jobs(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        let mut index = 0;
        while let Some(slot) = &mut self.slots[channel.0 as usize]
            && index < slot.jobs.len()
        {
            if slot.jobs[index].busy {
                index += 1;
                continue;
            }
            let mut job = slot.jobs.swap_remove(index);
            if self.step(reactor, channel, &mut job) {
                self.end_job(channel, job);
            } else if let Some(slot) = &mut self.slots[channel.0 as usize] {
                slot.jobs.push(job);
                // It changed places with the last, which was not looked at yet.
                let last = slot.jobs.len() - 1;
                slot.jobs.swap(index, last);
                index += 1;
            }
        }
        self.pump_splits(reactor, channel);
    }

    /// One step, as far as it can be taken now; true: the job is through.
    fn step(&mut self, reactor: &mut Reactor, channel: ChannelId, job: &mut Job) -> bool {
        let Some(slot) = &self.slots[channel.0 as usize] else { return true };
        let closed = slot.state == ChannelState::Closed;
        let io = self.ios.get_mut(job.parent);
        if closed && !io.status.is_error() {
            io.status = Status::INVALID_NAMESPACE;
        }
        if io.status.is_error() || job.step == Step::Done {
            return true;
        }
        if job.step == Step::Begin {
            let first = first_step(io);
            job.step = first;
            match first {
                Step::Lock => return self.ask_for_lock(reactor, channel, job),
                Step::Fill if self.lend(channel, job) => return true,
                Step::Done => return true,
                _ => {}
            }
        }
        self.start_helper(reactor, channel, job);
        false
    }

    fn ask_for_lock(&mut self, reactor: &Reactor, channel: ChannelId, job: &mut Job) -> bool {
        let Some(slot) = &self.slots[channel.0 as usize] else { return true };
        let io = self.ios.get(job.parent);
        let (origin, parent) = (reactor.handle(), job.parent);
        job.busy = true;
        let answer = move |lock: Option<RangeLock>| {
            origin.call(move |reactor| {
                let layer = Self::of(reactor);
                let mut layer = layer.borrow_mut();
                layer.locked(channel, parent, lock);
                layer.settle(reactor);
            });
        };
        ranges::lock(&slot.registry, slot.device_id, io.lba, io.blocks, Keep::Writers, answer);
        false
    }

    fn locked(&mut self, channel: ChannelId, parent: IoId, lock: Option<RangeLock>) {
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        let Some(job) = slot.jobs.iter_mut().find(|job| job.parent == parent) else { return };
        (job.busy, job.step) = (false, if lock.is_some() { Step::Compare } else { Step::Done });
        if lock.is_none() {
            self.ios.get_mut(parent).status = Status::INVALID_NAMESPACE;
        }
        job.lock = lock;
        self.call_attention(channel);
    }

    /// Memory for the range, which the front end gets with the answer; true: that is all.
    fn lend(&mut self, channel: ChannelId, job: &mut Job) -> bool {
        let shift = self.slot(channel).map_or(0, |slot| slot.info.block_size.trailing_zeros());
        let io = self.ios.get_mut(job.parent);
        let bytes = io.blocks << shift;
        match Mapping::anonymous(bytes as usize, Pages::Normal) {
            Ok(memory) => io.list.push(Sge { region: Region::new(memory), offset: 0, length: bytes as u32 }),
            Err(_) => io.status = Status::INTERNAL_DEVICE_ERROR,
        }
        io.status.is_error() || !io.flags.contains(IoFlags::POPULATE)
    }

    /// Submits the helper of the job's present step, unless something for it is missing.
    fn start_helper(&mut self, reactor: &mut Reactor, channel: ChannelId, job: &mut Job) {
        if matches!(job.step, Step::Compare | Step::CopyRead) && job.bounce.is_none() {
            job.bounce = self.bounces.free.pop();
            if job.bounce.is_none() {
                return self.bounces.wanted_by.push(channel);
            }
        }
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        if slot.room() == 0 {
            return;
        }
        let Some(helper) = slot.helpers.pop() else { return };
        let (queue, info, now_ns) = (slot.split_queue, slot.info.clone(), self.now_ns);
        let mut list = std::mem::take(&mut self.ios.get_mut(helper).list);
        let (op, lba, blocks, flags) = plan(&info, job, self.ios.get(job.parent), &mut list);
        job.now = blocks;
        job.busy = true;
        let io = self.ios.get_mut(helper);
        (io.op, io.lba, io.blocks, io.list, io.flags) = (op, lba, blocks, list, flags | IoFlags::CHILD);
        (io.status, io.state, io.sized) = (Status::SUCCESS, State::Submitted, 0);
        io.push(queue, job.parent.pack());
        let frame = io.frame_mut();
        (frame.channel, frame.submitted_ns) = (channel, now_ns);
        self.route_helper(reactor, channel, helper, &info);
    }

    /// As any I/O, but past whatever keeps new I/O out: the parent was let in.
    fn route_helper(&mut self, reactor: &mut Reactor, channel: ChannelId, helper: IoId, info: &Info) {
        if self.trace.is_on() {
            self.trace_batch(channel, &[helper], Point::Start.bit());
        }
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        match check::route(info, self.ios.get(helper)) {
            Route::Plain => {
                slot.inflight += 1;
                self.dispatch(reactor, channel, &[helper], Point::Issue.bit());
            }
            Route::Split => {
                let io = self.ios.get_mut(helper);
                io.flags |= IoFlags::SPLIT;
                (io.split_blocks, io.split_pending) = (0, 0);
                slot.parents += 1;
                slot.splitting.push_back(helper);
            }
            Route::Answer(status) => self.refuse(channel, helper, status),
            Route::Emulate | Route::Reset => self.refuse(channel, helper, Status::INTERNAL_DEVICE_ERROR),
        }
    }

    /// A helper is back: what it did is the parent's progress.
    pub(super) fn end_helper(&mut self, channel: ChannelId, parent: IoId, helper: IoId) {
        let io = self.ios.get_mut(helper);
        let status = io.status;
        io.list.clear();
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        slot.helpers.push(helper);
        let shift = slot.info.block_size.trailing_zeros();
        if let Some(job) = slot.jobs.iter_mut().find(|job| job.parent == parent) {
            job.busy = false;
            let io = self.ios.get_mut(parent);
            let outcome = if status.is_error() { status } else { advance(job, io, shift) };
            if outcome.is_error() && !io.status.is_error() {
                io.status = outcome;
            }
        }
        self.call_attention(channel);
    }

    fn end_job(&mut self, channel: ChannelId, job: Job) {
        let Job { parent, bounce, lock, .. } = job;
        // Given up before the answer: who waits for the range may go on.
        drop(lock);
        if let Some(bounce) = bounce {
            self.bounces.free.push(bounce);
            let wanted_by = std::mem::take(&mut self.bounces.wanted_by);
            wanted_by.into_iter().for_each(|channel| self.call_attention(channel));
        }
        let io = self.ios.get_mut(parent);
        let status = io.status;
        if io.op == Op::ZcopyEnd || (io.op == Op::ZcopyStart && status.is_error()) {
            io.list.clear();
        }
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            slot.parents -= 1;
        }
        self.complete(parent, status);
        self.call_attention(channel);
    }
}

fn first_step(io: &Io) -> Step {
    match io.op {
        Op::Compare => Step::Compare,
        Op::CompareAndWrite => Step::Lock,
        Op::Copy => Step::CopyRead,
        Op::ZcopyStart => Step::Fill,
        Op::ZcopyEnd if io.flags.contains(IoFlags::COMMIT) => Step::Commit,
        _ => Step::Done,
    }
}

/// What the helper of the present step does: operation, range, flags; its data go to `list`.
fn plan(info: &Info, job: &Job, io: &Io, list: &mut SgList) -> (Op, u64, u64, IoFlags) {
    let block = u64::from(info.block_size);
    let most = whole_units(info, STEP_BYTES / block).max(u64::from(info.write_unit_blocks));
    let blocks = (io.blocks - job.done).min(most);
    // Backwards, where writing forwards would overwrite what is still to be read.
    let backwards = io.op == Op::Copy && io.lba > io.source_lba && io.lba - io.source_lba < io.blocks;
    let at = if backwards { io.blocks - job.done - blocks } else { job.done };
    let bounced = |list: &mut SgList| {
        let entry = |bounce: &Bounce| Sge { region: bounce.region.clone(), offset: bounce.offset, length: (blocks * block) as u32 };
        list.extend(job.bounce.as_ref().map(entry));
    };
    let durable = io.flags & IoFlags::FUA;
    match job.step {
        Step::CopyRead | Step::Compare => {
            bounced(list);
            let lba = if io.op == Op::Copy { io.source_lba } else { io.lba };
            (Op::Read, lba + at, blocks, IoFlags::empty())
        }
        Step::CopyWrite => {
            bounced(list);
            (Op::Write, io.lba + at, blocks, durable)
        }
        Step::WriteSecondHalf => {
            slice(&io.list, io.blocks * block, io.blocks * block, usize::MAX, list);
            (Op::Write, io.lba, io.blocks, durable)
        }
        step => {
            list.extend(io.list.iter().cloned());
            (if step == Step::Fill { Op::Read } else { Op::Write }, io.lba, io.blocks, durable)
        }
    }
}

/// The step after a helper that succeeded.
fn advance(job: &mut Job, io: &Io, shift: u32) -> Status {
    match job.step {
        Step::Compare => match equal(&io.list, job.done << shift, job.bounce.as_ref(), job.now << shift) {
            Ok(true) => {}
            Ok(false) => return Status::COMPARE_FAILURE,
            Err(_) => return Status::DATA_TRANSFER_ERROR,
        },
        Step::CopyRead => {
            job.step = Step::CopyWrite;
            return Status::SUCCESS;
        }
        Step::CopyWrite => job.step = Step::CopyRead,
        _ => {
            job.step = Step::Done;
            return Status::SUCCESS;
        }
    }
    job.done += job.now;
    if job.done == io.blocks {
        job.step = if io.op == Op::CompareAndWrite { Step::WriteSecondHalf } else { Step::Done };
    }
    Status::SUCCESS
}

/// Whether `length` bytes of a list from byte `start` are those of a buffer.
fn equal(list: &[Sge], start: u64, buffer: Option<&Bounce>, length: u64) -> Result<bool, MemoryError> {
    let Some(buffer) = buffer else { return Ok(false) };
    let mut pieces = SgList::new();
    slice(list, start, length, usize::MAX, &mut pieces);
    let (mut ours, mut theirs) = ([0u8; 4096], [0u8; 4096]);
    let mut at = 0;
    for piece in &pieces {
        let mut inside = 0;
        while inside < u64::from(piece.length) {
            let count = (u64::from(piece.length) - inside).min(4096) as usize;
            piece.region.read(piece.offset + inside, &mut ours[..count])?;
            buffer.region.read(buffer.offset + at, &mut theirs[..count])?;
            if ours[..count] != theirs[..count] {
                return Ok(false);
            }
            inside += count as u64;
            at += count as u64;
        }
    }
    Ok(at == length)
}
