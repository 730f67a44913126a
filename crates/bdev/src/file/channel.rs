//! One reactor's way to a file: each I/O is a chain of driver requests, one at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use qpair_memory::{Mapping, MemoryError, Pages, Region, SgList, Sge};
use qpair_reactor::driver::{FileOp, Request};
use qpair_reactor::{LocalWaker, PollerId, Reactor};

use super::{SEGMENTS_MAX, Shared};
use crate::{BdevError, Channel, ChannelId, Info, Io, IoFlags, IoId, Layer, Op, Status, layer};

/// Bytes of one bounce buffer; larger I/Os go through it in turns.
const BOUNCE_BYTES: u64 = 128 << 10;
/// Bounce buffers of a channel; the I/Os that want more wait for one.
const BOUNCES: u32 = 16;
/// How often a request is tried that the kernel had no resources for, or that moved nothing.
const ATTEMPTS: u8 = 16;

/// How far an I/O is. Beside the slab: one for each of its slots.
#[derive(Clone, Copy, Default)]
struct Job {
    /// Bytes transferred so far.
    moved: u64,
    /// Bytes of the request under way.
    asked: u64,
    /// The bounce buffer it holds.
    bounce: Option<u32>,
    /// Whether its memory is such that it needs one.
    bounced: bool,
    /// All is done but the fdatasync that makes it durable.
    syncing: bool,
    attempts: u8,
}

/// Why an I/O could not go to the driver now.
enum Wait {
    Driver,
    Bounce,
}

struct Bounces {
    memory: Region,
    free: Vec<u32>,
}

pub(super) struct FileChannel {
    id: ChannelId,
    shared: Arc<Shared>,
    shift: u32,
    poller: PollerId,
    waker: Option<LocalWaker>,
    jobs: Vec<Job>,
    bounces: Option<Bounces>,
    /// The driver was full.
    backlog: VecDeque<IoId>,
    /// All bounce buffers were taken.
    starved: VecDeque<IoId>,
}

impl FileChannel {
    pub(super) fn new(
        shared: Arc<Shared>,
        block_size: u32,
        reactor: &mut Reactor,
        layer: &Layer,
        id: ChannelId,
    ) -> Result<Self, BdevError> {
        let poller = layer.poller(id).ok_or_else(|| BdevError::Unsupported("a channel without a poller".to_owned()))?;
        let bounces = match shared.direct {
            None => None,
            Some(_) => {
                let memory = Mapping::anonymous((u64::from(BOUNCES) * BOUNCE_BYTES) as usize, Pages::Normal)?;
                Some(Bounces { memory: Region::new(memory), free: (0..BOUNCES).rev().collect() })
            }
        };
        Ok(Self {
            id,
            shared,
            shift: block_size.trailing_zeros(),
            poller,
            waker: reactor.waker(poller),
            jobs: vec![Job::default(); layer.ios().0],
            bounces,
            backlog: VecDeque::with_capacity(super::QUEUE_DEPTH as usize),
            starved: VecDeque::with_capacity(super::QUEUE_DEPTH as usize),
        })
    }

    /// Whether the kernel would refuse this list for O_DIRECT.
    fn must_bounce(&self, io: &Io) -> bool {
        let Some(direct) = self.shared.direct else { return false };
        let fits = |entry: &Sge| {
            let address = entry.region.pointer(entry.offset, u64::from(entry.length));
            address.is_ok_and(|address| (address as u64).is_multiple_of(direct.memory)) && u64::from(entry.length) % direct.length == 0
        };
        matches!(io.op, Op::Read | Op::Write) && !io.list.iter().all(fits)
    }

    /// Gives the next request of an I/O to the driver; one that must wait is queued here.
    fn advance(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        match self.try_advance(layer, reactor, id) {
            Ok(Ok(())) => {}
            Ok(Err(Wait::Bounce)) => self.starved.push_back(id),
            Ok(Err(Wait::Driver)) => {
                self.backlog.push_back(id);
                // Others may have filled the driver, so that nothing of ours will come back to wake us.
                if let Some(waker) = &self.waker {
                    waker.wake();
                }
            }
            Err(_) => self.finish(layer, reactor, id, Status::DATA_TRANSFER_ERROR),
        }
    }

    fn try_advance(&mut self, layer: &Layer, reactor: &mut Reactor, id: IoId) -> Result<Result<(), Wait>, MemoryError> {
        let io = layer.io(id);
        let mut request = Request {
            op: FileOp::Sync,
            file: self.shared.file.clone(),
            offset: 0,
            length: 0,
            list: SgList::new(),
            poller: self.poller,
            value: id.pack(),
        };
        let job = &mut self.jobs[id.slot()];
        if !job.syncing && io.op != Op::Flush {
            let left = (io.blocks << self.shift) - job.moved;
            request.op = operation(io, self.shared.punches);
            request.offset = (io.lba << self.shift) + job.moved;
            job.asked = left;
            if !matches!(io.op, Op::Read | Op::Write) {
                request.length = left;
            } else if job.bounced {
                let Some(bounces) = &mut self.bounces else { return Ok(Err(Wait::Bounce)) };
                let Some(buffer) = job.bounce.or_else(|| bounces.free.pop()) else { return Ok(Err(Wait::Bounce)) };
                job.bounce = Some(buffer);
                job.asked = left.min(BOUNCE_BYTES);
                let offset = u64::from(buffer) * BOUNCE_BYTES;
                if io.op == Op::Write {
                    copy_part(&io.list, job.moved, &bounces.memory, offset, job.asked, false)?;
                }
                request.list.push(Sge { region: bounces.memory.clone(), offset, length: job.asked as u32 });
            } else if job.moved == 0 {
                request.list.clone_from(&io.list);
            } else {
                layer::slice(&io.list, job.moved, left, SEGMENTS_MAX as usize, &mut request.list);
            }
        }
        Ok(reactor.driver().submit(request).map_err(|_| Wait::Driver))
    }

    /// What one request of a transfer brought. Some: the I/O is at its end.
    fn transferred(&mut self, io: &Io, id: IoId, result: i32) -> Option<Status> {
        let job = &mut self.jobs[id.slot()];
        let mut bytes = (result as u64).min(job.asked);
        if let (Some(buffer), Op::Read, Some(bounces)) = (job.bounce, io.op, &self.bounces)
            && copy_part(&io.list, job.moved, &bounces.memory, u64::from(buffer) * BOUNCE_BYTES, bytes, true).is_err()
        {
            return Some(Status::DATA_TRANSFER_ERROR);
        }
        // What is continued must be as aligned as what was begun.
        if let Some(direct) = self.shared.direct.filter(|_| bytes < job.asked) {
            bytes -= bytes % direct.length;
        }
        job.moved += bytes;
        job.attempts = if bytes == 0 { job.attempts + 1 } else { 0 };
        if job.moved == io.blocks << self.shift {
            return Some(Status::SUCCESS);
        }
        // Nothing moves: the file ends here, which it did not when its size was taken. Once alone may be a signal's doing.
        let fault = if io.op == Op::Read { Status::UNRECOVERED_READ_ERROR } else { Status::WRITE_FAULT };
        (job.attempts > ATTEMPTS).then_some(fault)
    }

    /// Judges a result. None: another request is needed.
    fn judge(&mut self, io: &Io, id: IoId, result: i32) -> Option<Status> {
        let direct = self.shared.direct.is_some();
        let job = &mut self.jobs[id.slot()];
        match -result {
            libc::EINTR | libc::EAGAIN if job.attempts < ATTEMPTS => {
                job.attempts += 1;
                return None;
            }
            // It wants more of the memory than it told: then as it surely takes it.
            libc::EINVAL if direct && !job.bounced && matches!(io.op, Op::Read | Op::Write) => {
                job.bounced = true;
                return None;
            }
            _ => {}
        }
        if job.syncing || io.op == Op::Flush {
            let outcome = self.shared.sync_outcome(result);
            return Some(if outcome < 0 { status_of(Op::Flush, -outcome) } else { Status::SUCCESS });
        }
        if result < 0 {
            return Some(status_of(io.op, -result));
        }
        if matches!(io.op, Op::Read | Op::Write) {
            return self.transferred(io, id, result);
        }
        if io.flags.contains(IoFlags::FUA) {
            self.jobs[id.slot()].syncing = true;
            return None;
        }
        Some(Status::SUCCESS)
    }

    /// Says what an I/O failed of, if that is the medium's fault.
    #[cold]
    fn report(&self, layer: &mut Layer, id: IoId, result: i32, status: Status) {
        let (job, io) = (&self.jobs[id.slot()], layer.io(id));
        let (op, blocks, at) = (io.op, io.blocks, (io.lba << self.shift) + job.moved);
        if job.syncing || op == Op::Flush {
            if let Some(errno) = self.shared.first_sync_error() {
                layer.report_failure(self.id, "flush", |info| {
                    let why = std::io::Error::from_raw_os_error(errno);
                    format!("flushing {} failed: {why}; every later flush fails, too", path_of(info))
                });
            }
        } else if result < 0 && is_mediums(-result) {
            let cause = if matches!(-result, libc::ENODEV | libc::ENXIO) { "gone" } else { "medium" };
            layer.report_failure(self.id, cause, |info| {
                let why = std::io::Error::from_raw_os_error(-result);
                format!("{} of {blocks} blocks failed at byte {at} of {}: {why}", verb(op), path_of(info))
            });
        } else if result >= 0 && status != Status::DATA_TRANSFER_ERROR {
            layer.report_failure(self.id, "end", |info| {
                format!("{} ends before byte {at}: it is shorter than the bdev's {} bytes", path_of(info), info.bytes())
            });
        }
    }

    fn finish(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId, status: Status) {
        let buffer = self.jobs[id.slot()].bounce.take();
        layer.complete(id, status);
        if let (Some(buffer), Some(bounces)) = (buffer, &mut self.bounces) {
            bounces.free.push(buffer);
            if let Some(next) = self.starved.pop_front() {
                self.advance(layer, reactor, next);
            }
        }
    }

    /// Tries again what the driver had no room for; returns how much of it went.
    fn drain_backlog(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let before = self.backlog.len();
        for _ in 0..before {
            let Some(id) = self.backlog.pop_front() else { break };
            match self.try_advance(layer, reactor, id) {
                Ok(Ok(())) => {}
                Ok(Err(Wait::Bounce)) => self.starved.push_back(id),
                Ok(Err(Wait::Driver)) => {
                    self.backlog.push_front(id);
                    break;
                }
                Err(_) => self.finish(layer, reactor, id, Status::DATA_TRANSFER_ERROR),
            }
        }
        before - self.backlog.len().min(before)
    }
}

impl Channel for FileChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for &id in batch {
            self.jobs[id.slot()] = Job { bounced: self.must_bounce(layer.io(id)), ..Job::default() };
            if self.backlog.is_empty() {
                self.advance(layer, reactor, id);
            } else {
                self.backlog.push_back(id);
            }
        }
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        if self.backlog.is_empty() { 0 } else { self.drain_backlog(layer, reactor) }
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        self.backlog.is_empty()
    }

    fn done(&mut self, layer: &mut Layer, reactor: &mut Reactor, value: u64, result: i32) {
        let id = IoId::unpack(value);
        match self.judge(layer.io(id), id, result) {
            Some(status) => {
                if status.is_error() {
                    self.report(layer, id, result, status);
                }
                self.finish(layer, reactor, id, status);
            }
            None => self.advance(layer, reactor, id),
        }
        if !self.backlog.is_empty() {
            self.drain_backlog(layer, reactor);
        }
    }
}

fn operation(io: &Io, punches: bool) -> FileOp {
    match io.op {
        Op::Read => FileOp::Read,
        Op::Write if io.flags.contains(IoFlags::FUA) => FileOp::WriteDurable,
        Op::Write => FileOp::Write,
        Op::Unmap => FileOp::Punch,
        Op::WriteZeroes if punches && !io.flags.contains(IoFlags::NO_UNMAP) => FileOp::Punch,
        Op::WriteZeroes => FileOp::Zero,
        _ => FileOp::Sync,
    }
}

/// Whether it is the medium that failed, and neither who asked, nor a want of resources for now.
fn is_mediums(errno: i32) -> bool {
    let others = [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOSYS, libc::EFAULT, libc::ENOMEM, libc::EAGAIN, libc::EINTR, libc::ECANCELED];
    !others.contains(&errno)
}

fn path_of(info: &Info) -> &str {
    info.path.as_deref().unwrap_or(&info.name)
}

fn verb(op: Op) -> &'static str {
    match op {
        Op::Read => "a read",
        Op::Write => "a write",
        Op::Unmap => "an unmap",
        _ => "a write of zeroes",
    }
}

fn status_of(op: Op, errno: i32) -> Status {
    match (op, errno) {
        (Op::Read, libc::EIO) => Status::UNRECOVERED_READ_ERROR,
        (_, libc::EIO) => Status::WRITE_FAULT,
        _ => Status::from_errno(errno),
    }
}

/// Copies `length` bytes between a flat range and a list from its byte `skip`.
fn copy_part(list: &[Sge], mut skip: u64, flat: &Region, mut offset: u64, mut length: u64, to_list: bool) -> Result<(), MemoryError> {
    for entry in list {
        let size = u64::from(entry.length);
        if skip >= size {
            skip -= size;
            continue;
        }
        let step = length.min(size - skip);
        if to_list {
            entry.region.copy_from(entry.offset + skip, flat, offset, step)?;
        } else {
            flat.copy_from(offset, &entry.region, entry.offset + skip, step)?;
        }
        (skip, offset, length) = (0, offset + step, length - step);
        if length == 0 {
            break;
        }
    }
    Ok(())
}
