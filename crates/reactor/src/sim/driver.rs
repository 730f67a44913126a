//! The simulated I/O driver: operations take random time, end in random order, and fail as they are told to.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::{Rc, Weak};

use super::world::Inner;
use super::{Disk, Rng};
use crate::PollerId;
use crate::driver::{Completion, Driver, FileOp, Request, WatchId};
use crate::event::Event;

/// How badly simulated files behave. All chances are per mille of operations.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// Shortest and longest time of an operation in nanoseconds.
    pub delay_ns: (u64, u64),
    /// Reads and writes that move less than asked.
    pub short: u64,
    /// Operations that fail with EIO; a write may have been done in part.
    pub error: u64,
    /// Operations that end only when they are cancelled.
    pub stall: u64,
    /// Most operations of one driver at once: beyond it, `submit` gives them back.
    pub depth: usize,
}

impl Default for Faults {
    /// Slow and unordered, but faithful.
    fn default() -> Self {
        Self { delay_ns: (500, 200_000), short: 0, error: 0, stall: 0, depth: crate::driver::DEPTH }
    }
}

struct Pending {
    request: Request,
    /// None: not before it is cancelled.
    due_ns: Option<u64>,
    /// The file's history when a flush was submitted.
    sequence: u64,
    cancelled: bool,
}

struct Watch {
    event: Event,
    poller: PollerId,
    /// Notifications reported.
    seen: u64,
}

/// What the driver and the world share.
pub(super) struct Port {
    bell: Event,
    bell_seen: u64,
    queued: Vec<Pending>,
    pending: Vec<Pending>,
    watches: BTreeMap<u32, Watch>,
    watch_next: u32,
    rng: Rng,
    clock: Rc<Cell<u64>>,
    disk: Disk,
    faults: Rc<Cell<Faults>>,
}

impl Port {
    pub fn new(rng: Rng, clock: Rc<Cell<u64>>, disk: Disk, faults: Rc<Cell<Faults>>) -> Self {
        let (bell, watches) = (Event::simulated(), BTreeMap::new());
        Self { bell, bell_seen: 0, queued: Vec::new(), pending: Vec::new(), watches, watch_next: 0, rng, clock, disk, faults }
    }

    /// Whether a thread that waits on this driver would be woken now.
    pub fn is_ready(&self) -> bool {
        let rung = edges(&self.bell) > self.bell_seen;
        let notified = || self.watches.values().any(|watch| edges(&watch.event) > watch.seen);
        rung || notified() || self.next_due_ns().is_some_and(|due_ns| due_ns <= self.clock.get())
    }

    /// When the next operation ends by itself.
    pub fn next_due_ns(&self) -> Option<u64> {
        self.pending.iter().filter_map(|pending| pending.due_ns).min()
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.bell_seen = edges(&self.bell);
        for watch in self.watches.values_mut() {
            let edges = edges(&watch.event);
            // Now and then a report is late, or one comes for nothing.
            if (edges > watch.seen && self.rng.chance(7, 8)) || self.rng.chance(1, 200) {
                watch.seen = edges;
                out.push(Completion::Ready { poller: watch.poller });
            }
        }
        let now_ns = self.clock.get();
        self.pending.sort_by_key(|pending| pending.due_ns.unwrap_or(u64::MAX));
        while self.pending.first().is_some_and(|first| first.due_ns.is_some_and(|due_ns| due_ns <= now_ns)) {
            let pending = self.pending.remove(0);
            let result = self.perform(&pending);
            out.push(Completion::Done { poller: pending.request.poller, value: pending.request.value, result });
            if self.rng.chance(1, 8) {
                break;
            }
        }
    }

    /// Ends an operation: its effect and its result.
    fn perform(&mut self, pending: &Pending) -> i32 {
        let faults = self.faults.get();
        let fails = if pending.cancelled { Some(libc::ECANCELED) } else { self.rng.chance(faults.error, 1000).then_some(libc::EIO) };
        if let Some(errno) = fails {
            self.perform_part(pending);
            return -errno;
        }
        let short = self.rng.chance(faults.short, 1000);
        self.execute(pending, short, false).unwrap_or_else(|errno| -errno)
    }

    /// What an operation may have done that was not answered, or answered by an error: some sectors, or nothing.
    fn perform_part(&mut self, pending: &Pending) {
        if self.rng.chance(3, 4) && pending.request.op != FileOp::Read {
            let _ = self.execute(pending, false, true);
        }
    }

    fn execute(&mut self, pending: &Pending, short: bool, torn: bool) -> Result<i32, i32> {
        let Self { rng, disk, .. } = self;
        let request = &pending.request;
        let total: u64 = request.list.iter().map(|entry| u64::from(entry.length)).sum();
        let moved = if short && total > 0 { rng.below(total) } else { total };
        let mut choose = || !torn || rng.chance(1, 2);
        match request.op {
            FileOp::Read => scatter(request, &disk.read(&request.file, request.offset, moved)?),
            FileOp::Write | FileOp::WriteDurable => {
                let bytes = gather(request, moved)?;
                let durable = request.op == FileOp::WriteDurable && !torn;
                disk.write(&request.file, request.offset, &bytes, durable, choose)?;
                i32::try_from(moved).map_err(|_| libc::EINVAL)
            }
            FileOp::Sync => {
                if choose() {
                    disk.flush(&request.file, pending.sequence)?;
                }
                Ok(0)
            }
            FileOp::Punch | FileOp::Zero => disk.zero(&request.file, request.offset, request.length, choose).map(|()| 0),
        }
    }

    /// The process ends here: nothing is answered any more, and what was under way was done in part, or not.
    pub fn abandon(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            self.perform_part(&pending);
        }
        self.queued.clear();
        self.watches.clear();
    }

    fn unplug(&mut self) {
        let (now_ns, faults) = (self.clock.get(), self.faults.get());
        for mut pending in self.queued.drain(..) {
            let delay_ns = self.rng.between(faults.delay_ns.0, faults.delay_ns.1);
            pending.due_ns = (!self.rng.chance(faults.stall, 1000)).then_some(now_ns + delay_ns);
            self.pending.push(pending);
        }
    }

    fn cancel_all(&mut self) {
        self.unplug();
        let now_ns = self.clock.get();
        for pending in &mut self.pending {
            // What moves by itself may be past cancelling.
            if pending.due_ns.is_none() || self.rng.chance(1, 2) {
                pending.cancelled = true;
                pending.due_ns = Some(now_ns + self.rng.below(10_000));
            }
        }
    }
}

fn edges(event: &Event) -> u64 {
    event.edges().unwrap_or_default()
}

fn gather(request: &Request, limit: u64) -> Result<Vec<u8>, i32> {
    let mut bytes = Vec::with_capacity(limit as usize);
    for entry in &request.list {
        let begin = bytes.len();
        bytes.resize(begin + (u64::from(entry.length).min(limit - begin as u64)) as usize, 0);
        entry.region.read(entry.offset, &mut bytes[begin..]).map_err(|_| libc::EFAULT)?;
    }
    Ok(bytes)
}

fn scatter(request: &Request, bytes: &[u8]) -> Result<i32, i32> {
    let mut rest = bytes;
    for entry in &request.list {
        let (now, later) = rest.split_at(rest.len().min(entry.length as usize));
        entry.region.write(entry.offset, now).map_err(|_| libc::EFAULT)?;
        rest = later;
    }
    i32::try_from(bytes.len()).map_err(|_| libc::EINVAL)
}

/// A [`Driver`] whose other side is the world.
pub(super) struct SimDriver {
    pub port: Rc<RefCell<Port>>,
    pub world: Weak<Inner>,
}

impl SimDriver {
    fn preempt(&self) {
        if let Some(world) = self.world.upgrade() {
            world.preempt();
        }
    }
}

impl Driver for SimDriver {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn submit(&mut self, request: Request) -> Result<(), Request> {
        let mut port = self.port.borrow_mut();
        if port.queued.len() + port.pending.len() >= port.faults.get().depth {
            return Err(request);
        }
        let sequence = port.disk.sequence(&request.file).unwrap_or_default();
        port.queued.push(Pending { request, due_ns: None, sequence, cancelled: false });
        Ok(())
    }

    fn unplug(&mut self) {
        self.preempt();
        self.port.borrow_mut().unplug();
    }

    fn watch(&mut self, event: &Event, poller: PollerId) -> io::Result<WatchId> {
        if event.edges().is_none() {
            return Err(io::Error::other("a real event cannot be watched in a simulation"));
        }
        let mut port = self.port.borrow_mut();
        port.watch_next += 1;
        let id = port.watch_next;
        // As a descriptor that is readable already, one notified before is reported once.
        port.watches.insert(id, Watch { event: event.twin()?, poller, seen: 0 });
        Ok(WatchId(id))
    }

    fn unwatch(&mut self, watch: WatchId) {
        self.port.borrow_mut().watches.remove(&watch.0);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.preempt();
        self.port.borrow_mut().reap(out);
    }

    fn wait(&mut self, _timeout_ns: Option<u64>) {
        unreachable!("the world puts its reactors to sleep itself");
    }

    fn bell(&self) -> Event {
        self.port.borrow().bell.twin().expect("simulated")
    }

    fn outstanding(&self) -> usize {
        let port = self.port.borrow();
        port.queued.len() + port.pending.len()
    }

    fn cancel_all(&mut self) {
        self.port.borrow_mut().cancel_all();
    }

    fn pause(&mut self) {
        self.preempt();
    }
}

impl Drop for SimDriver {
    fn drop(&mut self) {
        // As the real ones do on their way out, but nobody is there to be answered.
        self.port.borrow_mut().abandon();
    }
}
