//! The epoll driver, for where io_uring is forbidden: edge-triggered watches, and a few threads for file operations.
//!
//! How it works. File operations go to [`pool`](super::pool), started with the first of them. Watches are
//! edge-triggered: each write to an eventfd is an edge, so nobody reads its count. epoll has no flag in memory that
//! says "something came", so while there are watches a reactor that does not sleep looks every [`LOOK_NS`].

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::pool::Pool;
use super::slots::{Inserted, Job, Slots};
use super::watches::Watches;
use super::{Completion, Driver, PollerId, Request, WatchId};
use crate::Clock;
use crate::event::Event;
use crate::log::{self, Level};

/// Longest time between two looks at the watches of a busy reactor, in nanoseconds: a look costs some 300.
pub const LOOK_NS: u64 = 10_000;

const BELL: u64 = u64::MAX;
const EVENTS: usize = 64;

/// See the module.
pub struct Epoll {
    poll: OwnedFd,
    bell: Event,
    slots: Slots,
    watches: Watches,
    /// What could not be begun.
    refused: Vec<Completion>,
    queued: Vec<Job>,
    pool: Option<Pool>,
    /// Watches that were notified, not yet reported.
    notified: Vec<WatchId>,
    looked_ns: u64,
    /// Whether the kernel has epoll_pwait2 (5.11) and lets us use it.
    precise: bool,
}

impl Epoll {
    /// Opens one.
    pub fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 has no preconditions.
        let poll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if poll < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let poll = unsafe { OwnedFd::from_raw_fd(poll) };
        let this = Self {
            poll,
            bell: Event::new()?,
            slots: Slots::default(),
            watches: Watches::default(),
            refused: Vec::new(),
            queued: Vec::new(),
            pool: None,
            notified: Vec::new(),
            looked_ns: 0,
            precise: true,
        };
        this.control(libc::EPOLL_CTL_ADD, this.bell.fd().map(|fd| fd.as_raw_fd()), BELL)?;
        Ok(this)
    }

    fn control(&self, what: i32, fd: Option<RawFd>, data: u64) -> io::Result<()> {
        let fd = fd.ok_or_else(|| io::Error::other("a simulated event has no descriptor"))?;
        let events = (libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
        let mut interest = libc::epoll_event { events, u64: data };
        // SAFETY: `interest` is valid for the call; both descriptors are open.
        let rc = unsafe { libc::epoll_ctl(self.poll.as_raw_fd(), what, fd, &mut interest) };
        if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Collects notifications, waiting for the first of them as long as asked.
    fn look(&mut self, timeout_ns: Option<u64>) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
        let count = match self.epoll_wait(&mut events, timeout_ns) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                log::say(Level::Error, "reactor", format_args!("epoll_wait: {error}"));
                0
            }
        };
        self.notified.extend(events[..count].iter().map(|event| event.u64).filter(|data| *data != BELL).map(|data| WatchId(data as u32)));
        // A full array: there may be more, to be fetched next turn.
        self.looked_ns = if count == EVENTS { 0 } else { Clock::Monotonic.now_ns() };
    }

    fn epoll_wait(&mut self, events: &mut [libc::epoll_event; EVENTS], timeout_ns: Option<u64>) -> io::Result<usize> {
        let (fd, count) = (self.poll.as_raw_fd(), EVENTS as i32);
        let time = timeout_ns
            .map(|ns| libc::timespec { tv_sec: (ns / 1_000_000_000) as libc::time_t, tv_nsec: (ns % 1_000_000_000) as libc::c_long });
        let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        if self.precise {
            let no_mask = std::ptr::null::<libc::sigset_t>();
            // SAFETY: `events` has room for `count`; `time` is null or valid; the mask is null.
            let rc = unsafe { libc::syscall(libc::SYS_epoll_pwait2, fd, events.as_mut_ptr(), count, time, no_mask, 0usize) };
            if rc >= 0 {
                return Ok(rc as usize);
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) {
                return Err(error);
            }
            self.precise = false;
        }
        let milliseconds = timeout_ns.map_or(-1, |ns| i32::try_from(ns.div_ceil(1_000_000)).unwrap_or(i32::MAX));
        // SAFETY: `events` has room for `count`.
        let rc = unsafe { libc::epoll_wait(fd, events.as_mut_ptr(), count, milliseconds) };
        if rc >= 0 { Ok(rc as usize) } else { Err(io::Error::last_os_error()) }
    }

    /// Queues the request in `slot`, with the pool running.
    fn queue(&mut self, slot: u32) -> io::Result<()> {
        if self.pool.is_none() {
            self.pool = Some(Pool::start(self.bell.twin()?)?);
        }
        self.queued.extend(self.slots.job(slot));
        Ok(())
    }
}

impl Driver for Epoll {
    fn name(&self) -> &'static str {
        "epoll"
    }

    fn submit(&mut self, request: Request) -> Result<(), Request> {
        match self.slots.insert(request)? {
            Inserted::Refused(completion) => self.refused.push(completion),
            Inserted::At(slot) => {
                if let Err(error) = self.queue(slot) {
                    let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
                    self.refused.extend(self.slots.finish(slot, -errno));
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn unplug(&mut self) {
        if let (false, Some(pool)) = (self.queued.is_empty(), &self.pool) {
            pool.give(self.queued.drain(..));
        }
    }

    fn watch(&mut self, event: &Event, poller: PollerId) -> io::Result<WatchId> {
        let event = event.twin()?;
        let fd = event.fd().map(|fd| fd.as_raw_fd());
        let id = self.watches.insert(event, poller).ok_or_else(|| io::Error::other("2^20 watches on one reactor"))?;
        if let Err(error) = self.control(libc::EPOLL_CTL_ADD, fd, u64::from(id.0)) {
            self.watches.remove(id);
            return Err(error);
        }
        Ok(id)
    }

    fn unwatch(&mut self, watch: WatchId) {
        if let Some(gone) = self.watches.remove(watch) {
            // Fails only for a descriptor that is not registered; then there is nothing to undo.
            let _ = self.control(libc::EPOLL_CTL_DEL, gone.event.fd().map(|fd| fd.as_raw_fd()), 0);
        }
    }

    #[inline]
    fn reap(&mut self, out: &mut Vec<Completion>) {
        if !self.refused.is_empty() {
            out.append(&mut self.refused);
        }
        if let Some(pool) = self.pool.as_ref().filter(|_| self.slots.taken() > 0) {
            while let Some((slot, result)) = pool.result() {
                out.extend(self.slots.finish(slot, result));
            }
        }
        if !self.watches.is_empty() && self.notified.is_empty() && Clock::Monotonic.now_ns().saturating_sub(self.looked_ns) >= LOOK_NS {
            self.look(Some(0));
        }
        for id in self.notified.drain(..) {
            if let Some(watch) = self.watches.get_mut(id) {
                out.push(Completion::Ready { poller: watch.poller });
            }
        }
    }

    fn wait(&mut self, timeout_ns: Option<u64>) {
        self.unplug();
        if !self.refused.is_empty() || !self.notified.is_empty() {
            return;
        }
        match self.pool.take() {
            None => self.look(timeout_ns),
            Some(pool) => {
                pool.sleep(|| self.look(timeout_ns));
                self.pool = Some(pool);
            }
        }
    }

    fn bell(&self) -> Event {
        self.bell.twin().expect("a descriptor can be duplicated")
    }

    fn outstanding(&self) -> usize {
        self.slots.taken() + self.refused.len()
    }

    fn cancel_all(&mut self) {
        let unbegun = std::mem::take(&mut self.queued);
        let queued = std::iter::from_fn(|| self.pool.as_ref().and_then(Pool::take_back));
        for job in unbegun.into_iter().chain(queued) {
            self.refused.extend(self.slots.finish(job.slot, -libc::ECANCELED));
        }
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        // The threads end here, and with them every use of the memory in `slots`.
        self.pool = None;
    }
}
