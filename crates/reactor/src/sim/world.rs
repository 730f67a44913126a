//! The world: who is in it, and who runs next.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use super::driver::{Port, SimDriver};
use super::seeds::text;
use super::{Disk, Faults, Obligations, Rng};
use crate::event::Event;
use crate::{Clock, Config, Handle, Reactor, ReactorId, Turn};

/// How deep turns may nest: who overtakes may be overtaken.
const NESTING: u32 = 3;
/// Steps after which [`World::settle`] gives up.
const SETTLE_STEPS: u64 = 20_000_000;

/// What an actor does next.
#[derive(Debug)]
pub enum Act {
    /// It can go on at any time.
    Again,
    /// Not before this time in nanoseconds.
    Until(u64),
    /// When the event is notified after this act, or at the time, if there is one.
    On(Event, Option<u64>),
    /// Never again.
    Done,
}

/// Somebody outside the engine: a guest, a peer, a user. Also any `FnMut(now_ns, &mut Rng) -> Act`.
pub trait Actor {
    /// Does one thing, at once.
    fn act(&mut self, now_ns: u64, rng: &mut Rng) -> Act;
}

impl<F: FnMut(u64, &mut Rng) -> Act> Actor for F {
    fn act(&mut self, now_ns: u64, rng: &mut Rng) -> Act {
        self(now_ns, rng)
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Somebody ran, or the clock jumped to when somebody can.
    Ran,
    /// Nobody can run, now or later.
    Quiet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Awake,
    /// Its turn said idle; it has not looked into its inbox for the last time.
    Drowsy(Option<u64>),
    Asleep(Option<u64>),
    Gone,
}

struct Node {
    handle: Handle,
    port: Rc<RefCell<Port>>,
    state: State,
    /// None while it runs, and when it is gone.
    reactor: Option<Reactor>,
}

struct Outsider {
    /// None while it acts.
    actor: Option<Box<dyn Actor>>,
    next: Act,
    /// The awaited event's notifications when it began to wait.
    seen: u64,
    rng: Rng,
}

#[derive(Clone, Copy)]
enum Who {
    Node(usize),
    Outsider(usize),
}

pub(super) struct Inner {
    clock: Rc<Cell<u64>>,
    nodes: RefCell<Vec<Node>>,
    outsiders: RefCell<Vec<Outsider>>,
    rng: RefCell<Rng>,
    depth: Cell<u32>,
    steps: Cell<u64>,
    fingerprint: Cell<u64>,
    survives: Cell<bool>,
    failure: RefCell<Option<String>>,
}

/// See the module's doc.
pub struct World {
    inner: Rc<Inner>,
    seed: u64,
    rng: Rng,
    disk: Disk,
    faults: Rc<Cell<Faults>>,
    obligations: Obligations,
}

/// A reactor's own randomness.
#[derive(Default)]
struct Local(RefCell<Rng>);

/// Draws from the randomness of one reactor: for simulated devices that live on it. Outside a world: a fixed sequence.
pub fn draw<R>(reactor: &mut Reactor, draw: impl FnOnce(&mut Rng) -> R) -> R {
    draw(&mut reactor.local::<Local>().0.borrow_mut())
}

impl World {
    /// `reactors` of them, with a spin time that the seed chooses.
    pub fn new(seed: u64, reactors: usize) -> Self {
        let spin_ns = *Rng::new(!seed).pick(&[0, 500, 5_000, 50_000]);
        Self::with_config(seed, reactors, Config { spin_ns, busy_poll: false }, Disk::default())
    }

    /// The same over files that exist already: what is left after [`power_cut`](Self::power_cut) or [`kill`](Self::kill).
    pub fn on_disk(seed: u64, reactors: usize, disk: Disk) -> Self {
        let spin_ns = *Rng::new(!seed).pick(&[0, 500, 5_000, 50_000]);
        Self::with_config(seed, reactors, Config { spin_ns, busy_poll: false }, disk)
    }

    /// All chosen by the caller.
    pub fn with_config(seed: u64, reactors: usize, config: Config, disk: Disk) -> Self {
        let mut rng = Rng::new(seed);
        let inner = Rc::new(Inner {
            clock: Rc::new(Cell::new(1_000_000)),
            nodes: RefCell::default(),
            outsiders: RefCell::default(),
            rng: RefCell::new(rng.fork()),
            depth: Cell::new(0),
            steps: Cell::new(0),
            fingerprint: Cell::new(seed),
            survives: Cell::new(false),
            failure: RefCell::default(),
        });
        let faults = Rc::new(Cell::new(Faults::default()));
        for number in 0..reactors {
            let port = Port::new(rng.fork(), inner.clock.clone(), disk.clone(), faults.clone());
            let port = Rc::new(RefCell::new(port));
            let driver = SimDriver { port: port.clone(), world: Rc::downgrade(&inner) };
            let clock = Clock::Virtual(inner.clock.clone());
            let mut reactor = Reactor::new(ReactorId(number as u32), config, clock, Box::new(driver));
            *reactor.local::<Local>().0.borrow_mut() = rng.fork();
            let node = Node { handle: reactor.handle(), port, state: State::Awake, reactor: Some(reactor) };
            inner.nodes.borrow_mut().push(node);
        }
        Self { inner, seed, rng, disk, faults, obligations: Obligations::default() }
    }

    /// The seed of it all.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Randomness for the test itself.
    pub fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// The virtual time.
    pub fn now_ns(&self) -> u64 {
        self.inner.clock.get()
    }

    /// The files.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// How the files behave from here on.
    pub fn set_faults(&mut self, faults: Faults) {
        self.faults.set(faults);
    }

    /// What must happen exactly once. A violation fails the world.
    pub fn obligations(&self) -> &Obligations {
        &self.obligations
    }

    /// How many reactors it was made with.
    pub fn reactors(&self) -> usize {
        self.inner.nodes.borrow().len()
    }

    /// To reach a reactor by message, as other threads do.
    pub fn handle(&self, reactor: usize) -> Handle {
        self.inner.nodes.borrow()[reactor].handle.clone()
    }

    /// All of them.
    pub fn handles(&self) -> Vec<Handle> {
        self.inner.nodes.borrow().iter().map(|node| node.handle.clone()).collect()
    }

    /// Whether the reactor has not been stopped.
    pub fn is_alive(&self, reactor: usize) -> bool {
        self.inner.nodes.borrow()[reactor].state != State::Gone
    }

    /// Runs `run` on the reactor's own thread, so to speak, between two of its turns. Panics if it is gone.
    pub fn with<R>(&mut self, reactor: usize, run: impl FnOnce(&mut Reactor) -> R) -> R {
        let (mut taken, state) = self.inner.take(reactor).expect("this reactor was stopped");
        if matches!(state, State::Asleep(_)) {
            taken.wakes_up();
        }
        let result = run(&mut taken);
        self.inner.put(reactor, taken, State::Awake);
        result
    }

    /// Adds somebody from outside.
    pub fn add_actor(&mut self, actor: impl Actor + 'static) {
        let rng = self.rng.fork();
        let outsider = Outsider { actor: Some(Box::new(actor)), next: Act::Again, seen: 0, rng };
        self.inner.outsiders.borrow_mut().push(outsider);
    }

    /// Panics of pollers, messages and timers are what this test is about: they do not fail the world.
    pub fn allow_panics(&mut self) {
        self.inner.survives.set(true);
    }

    /// Steps made, nested ones too.
    pub fn steps(&self) -> u64 {
        self.inner.steps.get()
    }

    /// A digest of who ran when.
    pub fn fingerprint(&self) -> u64 {
        self.inner.fingerprint.get()
    }

    /// Lets somebody run. Panics if that brought to light that something is wrong.
    pub fn step(&mut self) -> Step {
        let step = self.inner.step(false);
        let failure = self.inner.failure.borrow_mut().take();
        if let Some(failure) = failure.or_else(|| self.obligations.violation()) {
            panic!("{failure}");
        }
        step
    }

    /// Makes `steps` steps, or fewer if all comes to rest; then all obligations must be closed.
    pub fn run(&mut self, steps: u64) -> Step {
        for _ in 0..steps {
            if self.step() == Step::Quiet {
                self.demand_closed();
                return Step::Quiet;
            }
        }
        Step::Ran
    }

    /// Steps until `condition`; panics if all comes to rest before, or after `steps` steps.
    pub fn run_until(&mut self, what: &str, steps: u64, mut condition: impl FnMut(&mut Self) -> bool) {
        for _ in 0..steps {
            if condition(self) {
                return;
            }
            if self.step() == Step::Quiet {
                assert!(condition(self), "nothing can run at {} ns, yet not: {what}{}", self.now_ns(), self.open());
                return;
            }
        }
        panic!("after {steps} steps, at {} ns, still not: {what}{}", self.now_ns(), self.open());
    }

    /// Runs until nobody can run, now or later; then all obligations must be closed.
    pub fn settle(&mut self) {
        let step = self.run(SETTLE_STEPS);
        assert!(step == Step::Quiet, "still busy after {SETTLE_STEPS} steps, at {} ns{}", self.now_ns(), self.open());
    }

    /// The end of a test: settles, and checks that no operation is left in a driver.
    pub fn finish(&mut self) {
        self.settle();
        for (number, node) in self.inner.nodes.borrow_mut().iter_mut().enumerate() {
            let left = node.reactor.as_mut().map_or(0, |reactor| reactor.driver().outstanding());
            assert!(left == 0, "the driver of reactor {number} has {left} operations that never end");
        }
    }

    /// The power goes: all reactors and actors are gone, what was under way was done in part or not, and the cache is
    /// lost but for what was flushed and any sectors besides. Obligations that are open stay open.
    pub fn power_cut(&mut self) -> Disk {
        self.kill();
        self.disk.cut_power(&mut self.rng);
        self.disk.clone()
    }

    /// The process is killed: as [`power_cut`](Self::power_cut), but the cache lives.
    pub fn kill(&mut self) -> Disk {
        let nodes = std::mem::take(&mut *self.inner.nodes.borrow_mut());
        nodes.iter().for_each(|node| node.port.borrow_mut().abandon());
        let outsiders = std::mem::take(&mut *self.inner.outsiders.borrow_mut());
        drop((outsiders, nodes));
        self.disk.clone()
    }

    fn demand_closed(&self) {
        assert!(self.obligations.all_closed(), "nothing can run at {} ns{}", self.now_ns(), self.open());
    }

    fn open(&self) -> String {
        match self.obligations.open_count() {
            0 => String::new(),
            count => format!(", yet {count} obligations are open: {:?}...", self.obligations.some_open(8)),
        }
    }
}

impl Inner {
    fn take(&self, number: usize) -> Option<(Reactor, State)> {
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get_mut(number)?;
        Some((node.reactor.take()?, node.state))
    }

    fn put(&self, number: usize, mut reactor: Reactor, state: State) {
        if let Some(panic) = reactor.take_panic().filter(|_| !self.survives.get()) {
            self.fail(format!("reactor {number}: {panic}"));
        }
        let gone = {
            let mut nodes = self.nodes.borrow_mut();
            nodes[number].state = state;
            if state == State::Gone { Some(reactor) } else { nodes[number].reactor.replace(reactor) }
        };
        // Its pollers may have last words.
        drop(gone);
    }

    fn fail(&self, what: String) {
        self.failure.borrow_mut().get_or_insert(what);
    }

    /// In the middle of somebody's turn: others may run.
    pub fn preempt(&self) {
        while self.depth.get() < NESTING && self.failure.borrow().is_none() && self.rng.borrow_mut().chance(1, 5) {
            self.depth.set(self.depth.get() + 1);
            let step = self.step(true);
            self.depth.set(self.depth.get() - 1);
            if step == Step::Quiet {
                return;
            }
        }
    }

    fn step(&self, nested: bool) -> Step {
        self.steps.set(self.steps.get() + 1);
        let mut rng = self.rng.borrow_mut();
        let leap = if rng.chance(1, 200) { rng.below(1_000_000) } else { rng.between(1, 300) };
        self.clock.set(self.clock.get() + leap);
        let chosen = self.choose(&mut rng);
        drop(rng);
        match chosen {
            Some(Who::Node(number)) => {
                self.note(number as u64);
                self.run_node(number);
            }
            Some(Who::Outsider(number)) => {
                self.note(1 << 32 | number as u64);
                self.run_outsider(number);
            }
            None if nested => return Step::Quiet,
            None => match self.deadline() {
                None => return Step::Quiet,
                Some(deadline) => self.clock.set(self.clock.get().max(deadline)),
            },
        }
        Step::Ran
    }

    fn note(&self, who: u64) {
        let mixed = self.fingerprint.get() ^ who ^ self.clock.get().rotate_left(20);
        self.fingerprint.set(Rng::new(mixed).next());
    }

    /// One of those who can run, each as likely as the other.
    fn choose(&self, rng: &mut Rng) -> Option<Who> {
        let now_ns = self.clock.get();
        let (mut chosen, mut count) = (None, 0);
        let mut candidate = |who, rng: &mut Rng| {
            count += 1;
            if rng.below(count) == 0 {
                chosen = Some(who);
            }
        };
        let mut sleeper = None;
        for (number, node) in self.nodes.borrow().iter().enumerate() {
            match node.state {
                _ if node.reactor.is_none() => {}
                State::Asleep(until) if until.is_none_or(|until| until > now_ns) && !node.port.borrow().is_ready() => {
                    sleeper = Some(Who::Node(number));
                }
                _ => candidate(Who::Node(number), rng),
            }
        }
        for (number, outsider) in self.outsiders.borrow().iter().enumerate() {
            if outsider.actor.is_some() && outsider.can_act(now_ns) {
                candidate(Who::Outsider(number), rng);
            }
        }
        // Threads also wake up for nothing. Not when all is at rest: it would hide what was lost.
        if chosen.is_some() && rng.chance(1, 500) { sleeper.or(chosen) } else { chosen }
    }

    /// When somebody can run though nobody can now.
    fn deadline(&self) -> Option<u64> {
        let nodes = self.nodes.borrow();
        let nodes = nodes.iter().filter(|node| node.reactor.is_some()).flat_map(|node| {
            let until = if let State::Asleep(until) = node.state { until } else { None };
            [until, node.port.borrow().next_due_ns()]
        });
        let outsiders = self.outsiders.borrow();
        let outsiders = outsiders.iter().map(|outsider| match outsider.next {
            Act::Until(until) | Act::On(_, Some(until)) => Some(until),
            _ => None,
        });
        nodes.chain(outsiders).flatten().min()
    }

    fn run_node(&self, number: usize) {
        let Some((mut reactor, state)) = self.take(number) else { return };
        if let State::Drowsy(until) = state {
            let state = if reactor.falls_asleep() { State::Asleep(until) } else { State::Awake };
            return self.put(number, reactor, state);
        }
        if let State::Asleep(_) = state {
            reactor.wakes_up();
        }
        let state = match reactor.turn() {
            Turn::Again => State::Awake,
            Turn::Idle { until_ns } => State::Drowsy(until_ns),
            Turn::Stopped => State::Gone,
        };
        self.put(number, reactor, state);
    }

    fn run_outsider(&self, number: usize) {
        let (mut actor, mut rng) = {
            let outsider = &mut self.outsiders.borrow_mut()[number];
            let Some(actor) = outsider.actor.take() else { return };
            (actor, std::mem::take(&mut outsider.rng))
        };
        let next = catch_unwind(AssertUnwindSafe(|| actor.act(self.clock.get(), &mut rng))).unwrap_or_else(|panic| {
            self.fail(format!("actor {number}: {}", text(&*panic)));
            Act::Done
        });
        let outsider = &mut self.outsiders.borrow_mut()[number];
        outsider.seen = if let Act::On(event, _) = &next { event.edges().unwrap_or_default() } else { 0 };
        (outsider.actor, outsider.next, outsider.rng) = (Some(actor), next, rng);
    }
}

impl Outsider {
    fn can_act(&self, now_ns: u64) -> bool {
        match &self.next {
            Act::Again => true,
            Act::Until(until) => *until <= now_ns,
            Act::On(event, until) => event.edges().unwrap_or_default() > self.seen || until.is_some_and(|until| until <= now_ns),
            Act::Done => false,
        }
    }
}
