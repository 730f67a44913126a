//! The io_uring driver: one ring a reactor.
//!
//! How it works. Requests and watches are written to the submission ring as they come; [`Driver::unplug`] hands them
//! over by one `io_uring_enter`, which collects completions on its way. The ring is asked for deferred task work: the
//! kernel then sets a flag in the ring instead of interrupting us, so that [`Driver::reap`] of a turn in which nothing
//! came is two loads. A watch is a multishot poll: the kernel reports each wake-up of the descriptor; when it ends one
//! (its report found the ring full) it is begun anew, which reports what is readable by then, so no edge is lost.
//! Nobody reads an eventfd's count: a wake-up is what counts.
//!
//! Kernel: multishot polls (5.13) and wait arguments (5.11) are required; the other flags are asked for stepwise.
//! The ring belongs to the thread that made it.
//!
//! Limits. [`DEPTH`] requests. The completion ring holds four times as many entries, 1 for each request and 3072 for watches and
//! cancellations; the kernel keeps what does not fit and flags it. Ring memory: 132 KiB, or 33 KiB where that is refused.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};

use super::slots::{Inserted, Job, Slots};
use super::watches::Watches;
use super::{Completion, DEPTH, Driver, FileOp, PollerId, Request, WatchId};
use crate::event::Event;
use crate::log::{self, Level};

/// What an entry is for: the upper half of its user data. The lower is a slot or a watch.
const IGNORED: u64 = 0;
const BELL: u64 = 1 << 32;
const REQUEST: u64 = 2 << 32;
const WATCH: u64 = 3 << 32;

/// See the module.
pub struct Uring {
    ring: IoUring,
    bell: Event,
    slots: Slots,
    watches: Watches,
    /// What could not be begun.
    refused: Vec<Completion>,
    /// Entries for which the submission ring had no room.
    backlog: VecDeque<squeue::Entry>,
    /// Whether anything was queued that the kernel has not taken: a turn without need not look at the ring.
    queued: bool,
    rearm: Vec<u64>,
    /// Says which descriptors can be polled at all.
    judge: OwnedFd,
    /// The process that made it. A forked child has neither its ring memory nor its operations.
    process: u32,
}

impl Uring {
    /// Opens a ring for the calling thread.
    pub fn new() -> io::Result<Self> {
        let ring = build()?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is older than 5.13"));
        }
        // SAFETY: epoll_create1 has no preconditions.
        let judge = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if judge < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let judge = unsafe { OwnedFd::from_raw_fd(judge) };
        let mut this = Self {
            ring,
            bell: Event::new()?,
            slots: Slots::default(),
            watches: Watches::default(),
            refused: Vec::new(),
            backlog: VecDeque::new(),
            queued: false,
            rearm: Vec::new(),
            judge,
            process: std::process::id(),
        };
        this.arm(BELL);
        this.flush()?;
        // A kernel without multishot polls refuses the bell's at once.
        let refusal = this.ring.completion().map(|entry| entry.result()).find(|result| *result < 0);
        match refusal {
            Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
            None => Ok(this),
        }
    }

    /// Queues an entry.
    #[inline]
    fn push(&mut self, entry: squeue::Entry) {
        self.queued = true;
        // SAFETY: what the entry points to is owned by `slots` until its completion is reaped, also across drop; an
        // entry for a poll points to nothing and its descriptor is held by `watches` or is the bell's.
        if !self.backlog.is_empty() || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// Hands over what is queued, and collects what the kernel has for us.
    fn flush(&mut self) -> io::Result<()> {
        loop {
            {
                let mut queue = self.ring.submission();
                while let Some(entry) = self.backlog.front() {
                    // SAFETY: as in `push`.
                    if unsafe { queue.push(entry) }.is_err() {
                        break;
                    }
                    self.backlog.pop_front();
                }
            }
            let queued = self.ring.submission().len();
            if queued == 0 {
                self.queued = false;
                return Ok(());
            }
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: the arguments are those of io_uring_enter without a signal mask.
            let taken = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued as u32, 0, flags, None) }?;
            // What the kernel left stays in the ring for the next time; a backlog wants the room now.
            if taken < queued {
                return Ok(());
            }
            self.queued = !self.backlog.is_empty();
            if !self.queued {
                return Ok(());
            }
        }
    }

    /// Begins the poll that reports as `data`.
    fn arm(&mut self, data: u64) {
        let event = if data == BELL { Some(&self.bell) } else { self.watches.get_mut(WatchId(data as u32)).map(|watch| &watch.event) };
        let Some(fd) = event.and_then(Event::fd) else { return };
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32 | libc::POLLRDHUP as u32);
        self.push(poll.multi(true).build().user_data(data));
    }

    /// Empties the completion ring.
    #[inline]
    fn drain(&mut self, out: &mut Vec<Completion>) {
        let Self { ring, slots, watches, rearm, .. } = self;
        for entry in ring.completion() {
            let data = entry.user_data();
            match data & !u64::from(u32::MAX) {
                REQUEST => out.extend(slots.finish(data as u32, entry.result())),
                WATCH => {
                    if let Some(again) = watched(watches, WatchId(data as u32), &entry, out) {
                        rearm.extend(again.then_some(data));
                    }
                }
                BELL if !cqueue::more(entry.flags()) => rearm.push(BELL),
                _ => {}
            }
        }
        while let Some(data) = self.rearm.pop() {
            self.arm(data);
        }
    }

    /// Waits for one completion at least, or the time.
    fn enter_and_wait(&mut self, timeout_ns: Option<u64>) -> io::Result<()> {
        self.flush()?;
        let submitter = self.ring.submitter();
        let outcome = match timeout_ns {
            None => submitter.submit_and_wait(1),
            Some(ns) => {
                let time = types::Timespec::new().sec(ns / 1_000_000_000).nsec((ns % 1_000_000_000) as u32);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        };
        match outcome {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => Err(error),
            _ => Ok(()),
        }
    }
}

/// A report on a watch. Some(true): begin its poll anew. None: the watch is none of ours any more.
#[inline]
fn watched(watches: &mut Watches, id: WatchId, entry: &cqueue::Entry, out: &mut Vec<Completion>) -> Option<bool> {
    let watch = watches.get_mut(id)?;
    let more = cqueue::more(entry.flags());
    if watch.ending {
        if !more {
            watches.remove(id);
        }
        return Some(false);
    }
    // Also on an error: the poller looks at what it watches and finds out.
    out.push(Completion::Ready { poller: watch.poller });
    Some(!more && entry.result() >= 0)
}

/// Whether the kernel is short of something for a moment: what was queued stays queued.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR))
}

fn build() -> io::Result<IoUring> {
    let mut last = io::Error::from(io::ErrorKind::Unsupported);
    for entries in [DEPTH as u32, DEPTH as u32 / 4] {
        for level in (0..4).rev() {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(4 * entries).dontfork();
            if level >= 1 {
                builder.setup_submit_all();
            }
            if level >= 2 {
                builder.setup_taskrun_flag();
                if level == 2 {
                    builder.setup_coop_taskrun()
                } else {
                    builder.setup_single_issuer().setup_defer_taskrun()
                };
            }
            match builder.build(entries) {
                Ok(ring) => return Ok(ring),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = error,
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                    last = error;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Err(last)
}

/// The entry for a request.
#[inline]
fn entry_of(job: &Job) -> squeue::Entry {
    let fd = types::Fd(job.fd);
    let sync = if job.op == FileOp::WriteDurable { libc::RWF_DSYNC } else { 0 };
    let allocate = |mode| opcode::Fallocate::new(fd, job.length).offset(job.offset).mode(mode).build();
    // SAFETY: the slot has `count` iovecs at this address (see `Slots::job`).
    let single = (job.count == 1).then(|| unsafe { *job.iovecs });
    let entry = match (job.op, single) {
        (FileOp::Read, Some(one)) => opcode::Read::new(fd, one.iov_base.cast(), one.iov_len as u32).offset(job.offset).build(),
        (FileOp::Read, None) => opcode::Readv::new(fd, job.iovecs, job.count).offset(job.offset).build(),
        (FileOp::Write | FileOp::WriteDurable, Some(one)) => {
            opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32).offset(job.offset).rw_flags(sync).build()
        }
        (FileOp::Write | FileOp::WriteDurable, None) => {
            opcode::Writev::new(fd, job.iovecs, job.count).offset(job.offset).rw_flags(sync).build()
        }
        (FileOp::Sync, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        (FileOp::Punch, _) => allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
        (FileOp::Zero, _) => allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
    };
    entry.user_data(REQUEST | u64::from(job.slot))
}

impl Driver for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    #[inline]
    fn submit(&mut self, request: Request) -> Result<(), Request> {
        match self.slots.insert(request)? {
            Inserted::Refused(completion) => self.refused.push(completion),
            Inserted::At(slot) => {
                if let Some(job) = self.slots.job(slot) {
                    self.push(entry_of(&job));
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn unplug(&mut self) {
        if !self.queued {
            return;
        }
        match self.flush() {
            Err(error) if !is_transient(&error) => log::say(Level::Error, "reactor", format_args!("io_uring_enter: {error}")),
            _ => {}
        }
    }

    fn watch(&mut self, event: &Event, poller: PollerId) -> io::Result<WatchId> {
        let event = event.twin()?;
        let fd = event.fd().ok_or_else(|| io::Error::other("a simulated event has no descriptor"))?.as_raw_fd();
        // A descriptor that cannot be polled (a plain file) would report for ever: refused as epoll refuses it.
        let mut interest = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: `interest` is valid for the calls; both descriptors are open.
        unsafe {
            if libc::epoll_ctl(self.judge.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut interest) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::epoll_ctl(self.judge.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, &mut interest);
        }
        let id = self.watches.insert(event, poller).ok_or_else(|| io::Error::other("2^20 watches on one reactor"))?;
        self.arm(WATCH | u64::from(id.0));
        Ok(id)
    }

    fn unwatch(&mut self, watch: WatchId) {
        if let Some(entry) = self.watches.get_mut(watch).filter(|entry| !entry.ending) {
            entry.ending = true;
            self.push(opcode::PollRemove::new(WATCH | u64::from(watch.0)).build().user_data(IGNORED));
        }
    }

    #[inline]
    fn reap(&mut self, out: &mut Vec<Completion>) {
        if !self.refused.is_empty() {
            out.append(&mut self.refused);
        }
        loop {
            let queue = self.ring.submission();
            let flagged = queue.taskrun() || queue.cq_overflow();
            drop(queue);
            // Errors here are those of `unplug`, which says them.
            let entered = flagged && self.ring.submitter().submit().is_ok();
            self.drain(out);
            if !entered || !self.ring.submission().cq_overflow() {
                return;
            }
        }
    }

    fn wait(&mut self, timeout_ns: Option<u64>) {
        if !self.refused.is_empty() || !self.ring.completion().is_empty() {
            return;
        }
        match self.enter_and_wait(timeout_ns) {
            Err(error) if !is_transient(&error) => {
                log::say(Level::Error, "reactor", format_args!("io_uring_enter: {error}"));
                // Not to burn a core on what will not mend soon.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            _ => {}
        }
    }

    fn bell(&self) -> Event {
        self.bell.twin().expect("a descriptor can be duplicated")
    }

    fn outstanding(&self) -> usize {
        self.slots.taken() + self.refused.len()
    }

    fn cancel_all(&mut self) {
        // One by one, not "any": watches and the bell must stay.
        let slots: Vec<u32> = self.slots.indices().collect();
        for slot in slots {
            self.push(opcode::AsyncCancel::new(REQUEST | u64::from(slot)).build().user_data(IGNORED));
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if std::process::id() != self.process {
            std::mem::forget(std::mem::take(&mut self.slots));
            return;
        }
        self.cancel_all();
        let mut ended = Vec::new();
        while self.slots.taken() > 0 {
            self.reap(&mut ended);
            if self.slots.taken() == 0 {
                break;
            }
            match self.enter_and_wait(None) {
                Err(error) if !is_transient(&error) => {
                    log::say(Level::Error, "reactor", format_args!("io_uring_enter at the end: {error}; memory is left alone"));
                    // The kernel may still write there: better leaked than freed.
                    std::mem::forget(std::mem::take(&mut self.slots));
                    return;
                }
                _ => {}
            }
        }
    }
}
