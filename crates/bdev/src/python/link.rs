//! The engine's side of a worker process: the consumer of a [`Ring`] that passes its requests on through shared memory.
//!
//! How it works. A poller on one reactor takes requests off the ring, writes them for the worker ([`EngineEnd`]), reads its completions, checks each against what
//! the worker was given, and completes the slot. It rests when both sides are quiet. Commands come by a list and a wake-up.
//!
//! **A worker fails alone.** A [`Lie`], a request that is out longer than the timeout, or the word of whoever watches the process severs the link: every request that
//! is out fails with EIO, once (the ring sees to that), nothing of that memory is read again, and the watcher is told, once for each worker. Until another
//! worker is attached no slot is used anew, so a worker that hangs and comes back writes into buffers that nobody reads. Attach the next one only when the process
//! before is gone.
//! While there is none, I/O waits or fails, as configured; requests that were never shown to a worker are not lost when they wait.
//!
//! Errors: none of its own; [`Down`] tells why a worker was severed.
//!
//! Limits: a timeout is noticed a quarter of itself late.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use qpair_memory::Mapping;
use qpair_reactor::driver::WatchId;
use qpair_reactor::event::Event;
use qpair_reactor::{Handle, LocalWaker, Poller, PollerId, Reactor};

use super::ring::{Ring, Service, Work};
use super::shared::{Claim, ERRNO_MAX, EngineEnd, Lie, control_bytes};
use crate::BdevError;

/// Requests passed on in one go.
const BATCH: usize = 64;

/// Why there is no worker any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Down {
    /// Its memory says what cannot be.
    #[error("the worker broke the ring: {0}")]
    Lied(Lie),
    /// It had a request for too long.
    #[error("the worker has not answered for {0} ms")]
    Silent(u64),
    /// Whoever watches the process says so.
    #[error("{0}")]
    Gone(String),
}

/// How a link treats its worker.
#[derive(Clone, Copy, Debug)]
pub struct LinkConfig {
    /// A worker that has a request for longer is severed; 0: never.
    pub timeout_ns: u64,
    /// What I/O does while there is no worker: [`Service::Waiting`] or [`Service::Failing`].
    pub while_down: Service,
}

/// Told of each worker that was severed: the number that [`Link::attach`] gave it, and why. Called on the reactor; must not block.
pub type OnDown = Box<dyn Fn(u64, Down) + Send + Sync>;

enum Command {
    Attach { number: u64, control: Arc<Mapping>, work: Event, done: Event },
    Sever { number: u64, why: String },
    WhileDown(Service),
}

#[derive(Default)]
struct Shared {
    commands: Mutex<Vec<Command>>,
    waiting: AtomicBool,
    poller: OnceLock<PollerId>,
}

/// A link as the control plane has it.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    handle: Handle,
    depth: u32,
}

impl Link {
    /// A call for [`PythonBdev::new`](super::PythonBdev::new)'s `on_work`, and the link that it wakes once [`start`](Self::start)ed.
    pub fn prepare(handle: Handle, depth: u32) -> (Self, Box<dyn Fn() + Send + Sync>) {
        let link = Self { shared: Arc::default(), handle, depth };
        let woken = link.clone();
        (link, Box::new(move || woken.wake()))
    }

    /// Starts it, without a worker yet: I/O waits for the first.
    pub fn start(&self, ring: Arc<Ring>, config: LinkConfig, on_down: OnDown) {
        // Also where I/O is to fail while there is no worker: the first one is on its way.
        ring.serve(Service::Waiting);
        let shared = self.shared.clone();
        self.handle.call(move |reactor| {
            let id = reactor.reserve_poller("python_worker");
            let depth = ring.depth() as usize;
            // Nobody else sets it.
            let _ = shared.poller.set(id);
            let poller = LinkPoller {
                me: id,
                shared,
                ring,
                config,
                on_down,
                attached: None,
                out: vec![None; depth],
                generations: vec![0; depth],
                count: 0,
                works: Vec::with_capacity(BATCH),
                ended: Vec::with_capacity(depth),
                due: Rc::default(),
                timed: false,
                waker: None,
            };
            reactor.install_poller(id, Box::new(poller));
        });
    }

    /// Memory for the next worker, zeroed.
    pub fn control(&self) -> Result<Arc<Mapping>, BdevError> {
        Ok(Mapping::memfd("qpair-worker", control_bytes(self.depth))?)
    }

    /// A worker serves from now on: `work` is rung for it, `done` by it. `number` names it. One that is attached already is severed first.
    pub fn attach(&self, number: u64, control: Arc<Mapping>, work: Event, done: Event) {
        self.command(Command::Attach { number, control, work, done });
    }

    /// The worker of that number is no more, if it still is the one attached.
    pub fn sever(&self, number: u64, why: &str) {
        self.command(Command::Sever { number, why: why.to_owned() });
    }

    /// What I/O does while there is no worker, from now on.
    pub fn while_down(&self, service: Service) {
        self.command(Command::WhileDown(service));
    }

    fn command(&self, command: Command) {
        self.shared.commands.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        self.shared.waiting.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        let shared = self.shared.clone();
        self.handle.call(move |reactor| {
            if let Some(waker) = shared.poller.get().and_then(|poller| reactor.waker(*poller)) {
                waker.wake();
            }
        });
    }
}

struct Attached {
    number: u64,
    end: EngineEnd,
    work: Event,
    watch: Option<WatchId>,
    /// Held: the watch is on it.
    _done: Event,
}

/// A request that the worker has.
#[derive(Clone, Copy)]
struct Out {
    since_ns: u64,
}

struct LinkPoller {
    me: PollerId,
    shared: Arc<Shared>,
    ring: Arc<Ring>,
    config: LinkConfig,
    on_down: OnDown,
    attached: Option<Attached>,
    /// By slot.
    out: Vec<Option<Out>>,
    /// By slot: which use of it the worker has, or had last.
    generations: Vec<u32>,
    count: u32,
    works: Vec<Work>,
    ended: Vec<(u32, i32)>,
    /// The timer came.
    due: Rc<Cell<bool>>,
    timed: bool,
    waker: Option<LocalWaker>,
}

impl LinkPoller {
    fn obey(&mut self, reactor: &mut Reactor) -> usize {
        if !self.shared.waiting.swap(false, Ordering::SeqCst) {
            return 0;
        }
        let commands = std::mem::take(&mut *self.shared.commands.lock().unwrap_or_else(PoisonError::into_inner));
        let count = commands.len();
        for command in commands {
            match command {
                Command::Attach { number, control, work, done } => self.attach(reactor, number, &control, work, done),
                Command::Sever { number, why } if self.attached.as_ref().is_some_and(|attached| attached.number == number) => {
                    self.sever(reactor, Down::Gone(why));
                }
                Command::Sever { .. } => {}
                Command::WhileDown(service) => {
                    self.config.while_down = service;
                    if self.attached.is_none() {
                        self.ring.serve(service);
                    }
                }
            }
        }
        count
    }

    fn attach(&mut self, reactor: &mut Reactor, number: u64, control: &Arc<Mapping>, work: Event, done: Event) {
        self.sever(reactor, Down::Gone("another worker took its place".to_owned()));
        let end = EngineEnd::new(control, self.ring.depth());
        let watch = reactor.watch(&done, self.me);
        match (end, watch) {
            (Ok(end), Ok(watch)) => {
                self.attached = Some(Attached { number, end, work, watch: Some(watch), _done: done });
                self.ring.serve(Service::Open);
            }
            (end, watch) => {
                if let Ok(watch) = &watch {
                    reactor.unwatch(*watch);
                }
                let memory = end.err().map(|error| error.to_string());
                let why = memory.or_else(|| watch.err().map(|error| error.to_string())).unwrap_or_default();
                (self.on_down)(number, Down::Gone(format!("the worker could not be attached: {why}")));
            }
        }
    }

    /// Fails what the worker has, and reads nothing of it again.
    fn sever(&mut self, reactor: &mut Reactor, why: Down) {
        let Some(attached) = self.attached.take() else { return };
        attached.end.close();
        attached.work.notify();
        if let Some(watch) = attached.watch {
            reactor.unwatch(watch);
        }
        // First: what comes back frees its slot, and no slot is to be used anew.
        self.ring.serve(self.config.while_down);
        self.ended.clear();
        for (slot, out) in self.out.iter_mut().enumerate() {
            if out.take().is_some() {
                self.ended.push((slot as u32, libc::EIO));
            }
        }
        self.count = 0;
        // Each is out, or was given up: none is refused.
        let _ = self.ring.complete_all(&self.ended);
        (self.on_down)(attached.number, why);
    }

    fn check(&self, claim: Claim) -> Result<(u32, i32), Lie> {
        let Claim { slot, generation: claimed, errno } = claim;
        if self.out.get(slot as usize).copied().flatten().is_none() {
            return Err(Lie::NotOut { slot });
        }
        let generation = self.generations[slot as usize];
        if claimed != generation {
            return Err(Lie::Stale { slot, claimed, generation });
        }
        if errno > u64::from(ERRNO_MAX) {
            return Err(Lie::Errno { errno });
        }
        Ok((slot, errno as i32))
    }

    /// Completions: all that are told now, or up to the first lie.
    fn reap(&mut self) -> Result<usize, Lie> {
        let Some(attached) = &self.attached else { return Ok(0) };
        let waiting = attached.end.waiting(self.count)?;
        self.ended.clear();
        let mut outcome = Ok(waiting as usize);
        for _ in 0..waiting {
            let Some(attached) = &mut self.attached else { break };
            let claim = attached.end.pop();
            match self.check(claim) {
                Ok((slot, errno)) => {
                    self.out[slot as usize] = None;
                    self.count -= 1;
                    self.ended.push((slot, errno));
                }
                Err(lie) => {
                    outcome = Err(lie);
                    break;
                }
            }
        }
        if !self.ended.is_empty() {
            let _ = self.ring.complete_all(&self.ended);
        }
        outcome
    }

    fn pass_on(&mut self, reactor: &mut Reactor) -> usize {
        let Some(attached) = &mut self.attached else { return 0 };
        self.works.clear();
        self.ring.take(BATCH, &mut self.works);
        if self.works.is_empty() {
            return 0;
        }
        let since_ns = reactor.now_ns();
        for work in &self.works {
            let slot = work.slot as usize;
            self.generations[slot] = self.generations[slot].wrapping_add(1);
            self.out[slot] = Some(Out { since_ns });
            attached.end.push(work, self.generations[slot]);
        }
        self.count += self.works.len() as u32;
        if attached.end.publish() {
            attached.work.notify();
        }
        self.works.len()
    }

    /// Keeps a timer as long as requests are out, and looks when it comes.
    fn watch_time(&mut self, reactor: &mut Reactor) {
        let timeout_ns = self.config.timeout_ns;
        if self.due.replace(false) {
            self.timed = false;
            let now_ns = reactor.now_ns();
            let late = |out: &Option<Out>| out.is_some_and(|out| now_ns.saturating_sub(out.since_ns) >= timeout_ns);
            if self.out.iter().any(late) {
                self.sever(reactor, Down::Silent(timeout_ns / 1_000_000));
            }
        }
        if timeout_ns == 0 || self.timed || self.count == 0 {
            return;
        }
        self.timed = true;
        if self.waker.is_none() {
            self.waker = reactor.waker(self.me);
        }
        let (due, waker) = (self.due.clone(), self.waker.clone());
        reactor.after((timeout_ns / 4).max(1), move |_| {
            due.set(true);
            if let Some(waker) = waker {
                waker.wake();
            }
        });
    }
}

impl Poller for LinkPoller {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let mut count = self.obey(reactor);
        if self.ring.is_closed() {
            self.sever(reactor, Down::Gone("the bdev was closed".to_owned()));
            reactor.remove_poller(self.me);
            return 1;
        }
        match self.reap() {
            Ok(reaped) => count += reaped,
            Err(lie) => {
                self.sever(reactor, Down::Lied(lie));
                count += 1;
            }
        }
        count += self.pass_on(reactor);
        self.watch_time(reactor);
        count
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        // Commands and the ring's end come with a wake-up of their own; without a worker there is nothing else to wait for.
        let quiet = !self.shared.waiting.load(Ordering::SeqCst) && !self.ring.is_closed() && !self.due.get();
        let Some(attached) = &self.attached else { return quiet };
        attached.end.rest();
        // A lie is looked at by the next poll.
        let rests = quiet && attached.end.waiting(self.count) == Ok(0) && self.ring.may_rest();
        if !rests {
            attached.end.rise();
        }
        rests
    }

    fn disarm(&mut self, _: &mut Reactor) {
        if let Some(attached) = &self.attached {
            attached.end.rise();
        }
    }

    fn poisoned(&mut self, reactor: &mut Reactor, why: &str) {
        self.ring.close();
        self.sever(reactor, Down::Gone(format!("the engine's own side panicked: {why}")));
    }
}
