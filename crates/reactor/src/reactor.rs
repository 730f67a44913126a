//! The reactor: its turn, its pollers, its doors to the outside.

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::doorbell::Doorbell;
use crate::driver::{Completion, Driver, WatchId};
use crate::event::Event;
use crate::log::{self, Level};
use crate::poller::{LocalWaker, Poller, PollerId, PollerState, PollerStats, Slot, Wake};
use crate::timer::{Callback, TimerId, Timers};
use crate::{Clock, Config, Inbox, Message, ReactorId, ReactorStats, Turn};

/// Most looks at the active pollers in one turn.
const PASSES: usize = 16;
/// Things done in a turn up to which latency counts and batches do not.
const LITTLE: usize = 4;

struct Shared {
    id: ReactorId,
    inbox: Inbox,
    doorbell: Doorbell,
    bell: Event,
    stop: AtomicBool,
}

/// A reactor as other threads see it.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Which reactor.
    pub fn id(&self) -> ReactorId {
        self.0.id
    }

    /// Runs the message there, soon. Never fails, never blocks. A reactor that is gone drops it.
    pub fn send(&self, message: Message) {
        self.0.inbox.push(message);
        self.wake();
    }

    /// Shorthand for [`send`](Self::send) of a new message.
    pub fn call(&self, run: impl FnOnce(&mut Reactor) + Send + 'static) {
        self.send(Message::new(run));
    }

    /// Ends the reactor's loop after its current turn.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether messages wait; for the simulator's scheduler.
    pub fn has_messages(&self) -> bool {
        !self.0.inbox.is_empty()
    }

    fn wake(&self) {
        if self.0.doorbell.must_ring() {
            self.0.bell.notify();
        }
    }
}

impl PartialEq for Handle {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// See the crate's doc. `!Send`: it stays on the thread that made it.
pub struct Reactor {
    shared: Arc<Shared>,
    config: Config,
    clock: Clock,
    now_ns: u64,
    driver: Box<dyn Driver>,
    pollers: Vec<Option<Slot>>,
    generation: u32,
    active: Vec<u32>,
    ready: Rc<RefCell<Vec<PollerId>>>,
    timers: Timers,
    locals: HashMap<TypeId, Rc<dyn Any>>,
    completions: Vec<Completion>,
    work: Vec<(u32, usize)>,
    last_work: usize,
    /// Of the last turn that did anything.
    recent_work: usize,
    counters: Counters,
    panicked: Option<String>,
}

#[derive(Default)]
struct Counters {
    busy_ns: u64,
    idle_ns: u64,
    turns: u64,
    sleeps: u64,
    messages: u64,
}

impl Reactor {
    /// A reactor over `driver`, to be stepped by the caller.
    pub fn new(id: ReactorId, config: Config, clock: Clock, driver: Box<dyn Driver>) -> Self {
        let bell = driver.bell();
        let shared = Shared { id, inbox: Inbox::default(), doorbell: Doorbell::default(), bell, stop: AtomicBool::new(false) };
        let now_ns = clock.now_ns();
        Self {
            shared: Arc::new(shared),
            config,
            clock,
            now_ns,
            driver,
            pollers: Vec::new(),
            generation: 0,
            active: Vec::new(),
            ready: Rc::default(),
            timers: Timers::default(),
            locals: HashMap::new(),
            completions: Vec::with_capacity(256),
            work: Vec::with_capacity(64),
            last_work: 0,
            recent_work: 0,
            counters: Counters::default(),
            panicked: None,
        }
    }

    /// Which reactor this is.
    pub fn id(&self) -> ReactorId {
        self.shared.id
    }

    /// For others to reach it.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// The time of this turn.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// The clock itself, read now: for who measures I/O within a turn, once a batch. All else uses [`now_ns`](Self::now_ns).
    #[inline]
    pub fn read_clock_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Its configuration.
    pub fn config(&self) -> Config {
        self.config
    }

    /// Its I/O driver.
    #[inline]
    pub fn driver(&mut self) -> &mut dyn Driver {
        &mut *self.driver
    }

    /// The reactor's own `T`, made on first use: a layer's per-reactor state.
    pub fn local<T: Default + 'static>(&mut self) -> Rc<T> {
        let any = self.locals.entry(TypeId::of::<T>()).or_insert_with(|| Rc::new(T::default())).clone();
        any.downcast::<T>().unwrap_or_else(|_| unreachable!("keyed by its type"))
    }

    /// Runs `callback` once at or after `after_ns` from now.
    pub fn after(&mut self, after_ns: u64, callback: impl FnOnce(&mut Reactor) + 'static) -> TimerId {
        self.timers.add(self.now_ns.saturating_add(after_ns), Callback::Run(Box::new(callback)))
    }

    /// Wakes a poller of this reactor when its time is `at_ns`. In steady state this allocates nothing.
    pub fn wake_at(&mut self, at_ns: u64, waker: &LocalWaker) -> TimerId {
        self.timers.add(at_ns, Callback::Wake(waker.clone()))
    }

    /// True if the timer had not run.
    pub fn cancel(&mut self, timer: TimerId) -> bool {
        self.timers.cancel(timer)
    }

    /// Adds a poller, active.
    pub fn add_poller(&mut self, name: impl Into<String>, poller: Box<dyn Poller>) -> PollerId {
        let id = self.reserve_poller(name);
        self.install_poller(id, poller);
        id
    }

    /// A place for a poller that must know its own id to be built; [`install_poller`](Self::install_poller) fills it.
    pub fn reserve_poller(&mut self, name: impl Into<String>) -> PollerId {
        let free = self.pollers.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.pollers.push(None);
            self.pollers.len() - 1
        });
        self.generation += 1;
        let id = PollerId { index: index as u32, generation: self.generation };
        let wake = Rc::new(Wake { id, active: Cell::new(false), ready: self.ready.clone() });
        self.pollers[index] = Some(Slot {
            id,
            name: name.into(),
            poller: None,
            wake,
            last_busy_ns: self.now_ns,
            runs: 0,
            busy_runs: 0,
            busy_ns: 0,
            removed: false,
            installed: false,
        });
        id
    }

    /// Fills a reserved place; the poller starts active.
    pub fn install_poller(&mut self, id: PollerId, poller: Box<dyn Poller>) {
        if let Some(slot) = self.slot(id) {
            slot.poller = Some(poller);
            slot.installed = true;
            LocalWaker(slot.wake.clone()).wake();
        }
    }

    /// Removes a poller; may be called from inside it. What is still under way for it is dropped when it comes.
    pub fn remove_poller(&mut self, id: PollerId) {
        let Some(slot) = self.slot(id) else { return };
        slot.removed = true;
        slot.wake.active.set(true);
        let (gone, only_reserved) = (slot.poller.take(), !slot.installed);
        // A poller that removes itself is out of its slot now: `with_poller` drops it and frees the slot.
        if gone.is_some() || only_reserved {
            self.pollers[id.index as usize] = None;
            self.active.retain(|index| *index != id.index);
        }
        drop(gone);
    }

    /// What wakes a poller from code on the same reactor.
    pub fn waker(&mut self, id: PollerId) -> Option<LocalWaker> {
        self.slot(id).map(|slot| LocalWaker(slot.wake.clone()))
    }

    /// Wakes `poller` whenever `event` is notified.
    pub fn watch(&mut self, event: &Event, poller: PollerId) -> std::io::Result<WatchId> {
        self.driver.watch(event, poller)
    }

    /// Ends a watch.
    pub fn unwatch(&mut self, watch: WatchId) {
        self.driver.unwatch(watch);
    }

    /// Its figures now.
    pub fn stats(&self) -> ReactorStats {
        let pollers = self.pollers.iter().flatten().map(|slot| PollerStats {
            name: slot.name.clone(),
            state: if slot.wake.active.get() { PollerState::Active } else { PollerState::Armed },
            runs: slot.runs,
            busy_runs: slot.busy_runs,
            busy_ns: slot.busy_ns,
        });
        ReactorStats {
            id: self.id(),
            driver: self.driver.name(),
            busy_ns: self.counters.busy_ns,
            idle_ns: self.counters.idle_ns,
            turns: self.counters.turns,
            sleeps: self.counters.sleeps,
            messages: self.counters.messages,
            pollers: pollers.collect(),
        }
    }

    /// One round: messages, timers, completions, pollers, and one hand-over to the driver.
    pub fn turn(&mut self) -> Turn {
        self.account();
        let mut work = self.run_messages() + self.run_timers() + self.reap();
        self.activate_ready();
        work += self.poll_passes();
        self.driver.unplug();
        self.last_work = work;
        if work > 0 {
            self.recent_work = work;
        }
        if self.shared.stop.load(Ordering::Relaxed) {
            return Turn::Stopped;
        }
        let more = work > 0 || !self.active.is_empty() || !self.ready.borrow().is_empty() || !self.shared.inbox.is_empty();
        if more || self.config.busy_poll {
            return Turn::Again;
        }
        Turn::Idle { until_ns: self.timers.deadline() }
    }

    /// Sleeps as [`Turn::Idle`] asked; see [`crate::doorbell`].
    pub fn sleep(&mut self, until_ns: Option<u64>) {
        if self.falls_asleep() {
            let now = self.clock.now_ns();
            self.driver.wait(until_ns.map(|until| until.saturating_sub(now)));
            self.wakes_up();
        }
    }

    /// The first half of [`sleep`](Self::sleep): false if there is something to do after all. The simulator, whose
    /// reactors cannot wait, does the halves apart.
    pub(crate) fn falls_asleep(&mut self) -> bool {
        let shared = &self.shared;
        let asleep = shared.doorbell.may_sleep(|| shared.inbox.is_empty() && !shared.stop.load(Ordering::SeqCst));
        self.counters.sleeps += u64::from(asleep);
        asleep
    }

    pub(crate) fn wakes_up(&mut self) {
        self.shared.doorbell.awake();
    }

    /// What the last panic since the last call said. The reactor survives it; a simulation need not.
    pub(crate) fn take_panic(&mut self) -> Option<String> {
        self.panicked.take()
    }

    /// Reads the clock, once, and books the time since the last turn.
    #[inline]
    fn account(&mut self) {
        let now_ns = self.clock.now_ns();
        let elapsed = now_ns.saturating_sub(self.now_ns);
        self.now_ns = now_ns;
        self.counters.turns += 1;
        if self.last_work == 0 {
            self.counters.idle_ns += elapsed;
            return;
        }
        self.counters.busy_ns += elapsed;
        let total: usize = self.work.iter().map(|(_, done)| done).sum();
        while let Some((index, done)) = self.work.pop() {
            if let Some(Some(slot)) = self.pollers.get_mut(index as usize) {
                // A division costs as much as a poll.
                slot.busy_ns += if done == total { elapsed } else { elapsed * done as u64 / total as u64 };
            }
        }
    }

    #[inline]
    fn run_messages(&mut self) -> usize {
        if self.shared.inbox.is_empty() {
            return 0;
        }
        let mut count = 0;
        for message in self.shared.clone().inbox.take() {
            count += 1;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| message.run(self))) {
                self.panics(format!("a message panicked: {}", panic_text(&*panic)));
            }
        }
        self.counters.messages += count as u64;
        count
    }

    #[inline]
    fn run_timers(&mut self) -> usize {
        let mut count = 0;
        let newest = self.timers.newest();
        while let Some(callback) = self.timers.due(self.now_ns, newest) {
            count += 1;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| callback.call(self))) {
                self.panics(format!("a timer panicked: {}", panic_text(&*panic)));
            }
        }
        count
    }

    #[inline]
    fn reap(&mut self) -> usize {
        let mut completions = std::mem::take(&mut self.completions);
        self.driver.reap(&mut completions);
        let count = completions.len();
        for completion in completions.drain(..) {
            match completion {
                Completion::Ready { poller } => {
                    if let Some(slot) = self.slot(poller) {
                        LocalWaker(slot.wake.clone()).wake();
                    }
                }
                Completion::Done { poller, value, result } => {
                    self.with_poller(poller, |poller, reactor| poller.done(reactor, value, result));
                    if let Some(waker) = self.waker(poller) {
                        waker.wake();
                    }
                }
            }
        }
        self.completions = completions;
        count
    }

    /// Puts woken pollers on the list of active ones.
    #[inline]
    fn activate_ready(&mut self) {
        if self.ready.borrow().is_empty() {
            return;
        }
        let ready = std::mem::take(&mut *self.ready.borrow_mut());
        for id in &ready {
            let now_ns = self.now_ns;
            let Some(slot) = self.slot(*id) else { continue };
            slot.last_busy_ns = now_ns;
            self.active.push(id.index);
            self.with_poller(*id, |poller, reactor| poller.disarm(reactor));
        }
        let mut list = self.ready.borrow_mut();
        if list.is_empty() {
            // Keep the allocation.
            *list = ready;
            list.clear();
        }
    }

    /// Where little is under way, polls again as long as nothing is found, and once more when something was: the rest of a turn costs more
    /// than a look, and what one poller finishes another may go on with. Where much is, a turn's length is what batches are made of. In the
    /// simulator once, so that others come between any two polls.
    #[inline]
    fn poll_passes(&mut self) -> usize {
        if self.recent_work > LITTLE || !matches!(self.clock, Clock::Monotonic) {
            return self.poll_active();
        }
        for _ in 1..PASSES {
            let work = self.poll_active();
            if work > 0 {
                return work + self.poll_active();
            }
        }
        self.poll_active()
    }

    #[inline]
    fn poll_active(&mut self) -> usize {
        let mut work = 0;
        let mut position = 0;
        while let Some(&index) = self.active.get(position) {
            work += self.poll_one(index);
            // Else this one went, or one before it, and the next one stands here now.
            if self.active.get(position) == Some(&index) {
                position += 1;
            }
        }
        work
    }

    /// Polls one, and books it. Its place is looked up twice, before and after: what a poll changes is anybody's guess.
    #[inline]
    fn poll_one(&mut self, index: u32) -> usize {
        let Some(Some(slot)) = self.pollers.get_mut(index as usize) else {
            self.active.retain(|other| *other != index);
            return 0;
        };
        let id = slot.id;
        let Some(mut poller) = slot.poller.take() else {
            // Woken and only reserved: installing it wakes it again.
            slot.wake.active.set(false);
            self.active.retain(|other| *other != index);
            return 0;
        };
        let done = match catch_unwind(AssertUnwindSafe(|| poller.poll(self))) {
            Ok(done) => done,
            Err(panic) => {
                self.poison(id, &mut *poller, &panic_text(&*panic));
                return 0;
            }
        };
        let (now_ns, config) = (self.now_ns, self.config);
        let Some(slot) = self.slot(id).filter(|slot| !slot.removed) else {
            self.forget(id);
            return done;
        };
        slot.poller = Some(poller);
        slot.runs += 1;
        if done > 0 {
            slot.busy_runs += 1;
            slot.last_busy_ns = now_ns;
            self.work.push((index, done));
        } else if !config.busy_poll && now_ns.saturating_sub(slot.last_busy_ns) >= config.spin_ns {
            self.arm(id);
        }
        done
    }

    /// Lets a poller that was idle long enough ask for a wake-up, and takes it off the active ones unless something came meanwhile.
    fn arm(&mut self, id: PollerId) {
        self.driver.pause();
        let Some(slot) = self.slot(id) else { return };
        // Marked before it arms: what `arm` itself, or anything later, wakes is then seen.
        slot.wake.active.set(false);
        let quiet = self.with_poller(id, |poller, reactor| poller.arm(reactor)).unwrap_or(true);
        let now_ns = self.now_ns;
        let Some(slot) = self.slot(id) else { return };
        if quiet && !slot.wake.active.get() {
            return self.active.retain(|other| *other != id.index);
        }
        slot.last_busy_ns = now_ns;
        slot.wake.active.set(true);
        // If it woke itself while arming it is on the list of the woken too: once is enough.
        self.ready.borrow_mut().retain(|other| *other != id);
        self.with_poller(id, |poller, reactor| poller.disarm(reactor));
    }

    #[inline]
    fn slot(&mut self, id: PollerId) -> Option<&mut Slot> {
        self.pollers.get_mut(id.index as usize)?.as_mut().filter(|slot| slot.id == id)
    }

    /// Calls into a poller with the reactor at its disposal; a panic removes it.
    #[inline]
    fn with_poller<R>(&mut self, id: PollerId, call: impl FnOnce(&mut dyn Poller, &mut Reactor) -> R) -> Option<R> {
        let mut poller = self.slot(id)?.poller.take()?;
        let outcome = catch_unwind(AssertUnwindSafe(|| call(&mut *poller, self)));
        match outcome {
            Ok(result) => {
                match self.slot(id) {
                    Some(slot) if !slot.removed => slot.poller = Some(poller),
                    _ => self.forget(id),
                }
                Some(result)
            }
            Err(panic) => {
                self.poison(id, &mut *poller, &panic_text(&*panic));
                None
            }
        }
    }

    #[cold]
    fn poison(&mut self, id: PollerId, poller: &mut dyn Poller, why: &str) {
        let name = self.slot(id).map(|slot| slot.name.clone()).unwrap_or_default();
        self.panics(format!("poller {name} panicked and is removed: {why}"));
        if catch_unwind(AssertUnwindSafe(|| poller.poisoned(self, why))).is_err() {
            log::say(Level::Error, "reactor", format_args!("poller {name} panicked again while it was removed"));
        }
        self.forget(id);
    }

    #[cold]
    fn panics(&mut self, what: String) {
        log::say(Level::Error, "reactor", format_args!("{what}"));
        self.panicked = Some(what);
    }

    fn forget(&mut self, id: PollerId) {
        if self.slot(id).is_some() {
            self.pollers[id.index as usize] = None;
            self.active.retain(|index| *index != id.index);
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // Pollers may hold memory that the kernel still works on: the driver must outlive what it was given, and it
        // owns holds of its own, so the order is: pollers, local state, driver. Messages that nobody will run any more are
        // dropped now, not when the last handle goes.
        self.pollers.clear();
        self.locals.clear();
        self.shared.inbox.close();
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "(no text)".to_owned(),
    }
}
