//! The engine's life without Python: reactors, the registry, and the order in which all of it ends.
//!
//! Stopping. No new calls; then front ends (what makes I/O), then bdevs (drained, or aborted at their deadline), then
//! reactors (joined); last, every token still open is answered. Each step has a share of the deadline; a step that
//! overruns is named in the error, and the next one goes on regardless.

use std::collections::HashMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use qpair_bdev::malloc::Malloc;
use qpair_bdev::python::Ring;
use qpair_bdev::{Descriptor, Layer, Registry, lifecycle};
use qpair_raid::Raids;
use qpair_reactor::driver::Choice;
use qpair_reactor::log::{self, Level};
use qpair_reactor::thread::{self, ReactorThread};
use qpair_reactor::{Config, Handle, ReactorId, ReactorStats};

use crate::events::Outbox;
use crate::io;
use crate::perf::Runs;
use crate::pool::Pool;
use crate::values::{Failure, Number};
use crate::vhost::Room;

/// How long one reactor may take to tell its figures.
const STATS_WAIT: Duration = Duration::from_millis(100);
/// What joining the reactors gets at least, however short the deadline.
const JOIN_WAIT: Duration = Duration::from_millis(500);

/// How the engine is to be.
pub struct Options {
    pub cores: Vec<u32>,
    pub pin: bool,
    pub choice: Choice,
    pub config: Config,
    pub ios_per_reactor: u32,
}

/// One reactor's place, known from its start.
pub struct Place {
    pub handle: Handle,
    pub tid: i32,
    pub driver: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Running,
    Stopping,
    Stopped,
}

/// See the module's doc.
pub struct Core {
    pub outbox: Arc<Outbox>,
    pub registry: Arc<Registry>,
    pub raids: Arc<Raids>,
    pub places: Vec<Place>,
    pub descriptors: Mutex<HashMap<u64, Arc<Descriptor>>>,
    /// Disks in memory, by name; some may be gone.
    pub mallocs: Mutex<HashMap<String, Weak<Malloc>>>,
    /// Memory of single I/Os.
    pub pool: Arc<Pool>,
    /// Rings of Python bdevs, to be closed when nobody can be waited for any more.
    pub rings: Mutex<Vec<Weak<Ring>>>,
    pub runs: Arc<Runs>,
    pub vhost: Arc<Room>,
    last_stats: Mutex<HashMap<u32, ReactorStats>>,
    threads: Mutex<Vec<ReactorThread>>,
    life: Mutex<Life>,
    ended: Condvar,
}

/// A lock whose holder panicked guards data that is still whole: every section here is a single step.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub fn start(options: &Options) -> Result<Arc<Self>, Failure> {
        let mut threads = Vec::with_capacity(options.cores.len());
        for core in &options.cores {
            let thread = thread::spawn(ReactorId(*core), options.config, options.choice, options.pin);
            threads.push(thread.map_err(|error| Failure::os(&format!("reactor {core}"), &error))?);
        }
        let places: Vec<Place> =
            threads.iter().map(|thread| Place { handle: thread.handle().clone(), tid: thread.tid, driver: thread.driver }).collect();
        let ios = options.ios_per_reactor;
        for place in &places {
            place.handle.call(move |reactor| drop(Layer::install(reactor, ios)));
        }
        let registry = Registry::new(places.iter().map(|place| place.handle.clone()).collect());
        let outbox = Outbox::new().map_err(|error| Failure::os("eventfd", &error))?;
        let news = outbox.clone();
        registry.listen(move |notice| news.push_notice(notice));
        let vhost = Room::new(registry.clone(), outbox.clone());
        Ok(Arc::new(Self {
            rings: Mutex::default(),
            runs: Arc::default(),
            vhost,
            outbox,
            raids: Raids::new(&registry),
            registry,
            places,
            descriptors: Mutex::default(),
            mallocs: Mutex::default(),
            pool: Pool::new(),
            last_stats: Mutex::default(),
            threads: Mutex::new(threads),
            life: Mutex::new(Life::Running),
            ended: Condvar::new(),
        }))
    }

    /// Where work without a reactor of its own is done.
    pub fn home(&self) -> &Handle {
        &self.places[0].handle
    }

    /// The reactors of these cores; none given means all.
    pub fn pick_reactors(&self, cores: Vec<Number>) -> Result<Vec<Handle>, Failure> {
        if cores.is_empty() {
            return Ok(self.places.iter().map(|place| place.handle.clone()).collect());
        }
        let mut picked: Vec<Handle> = Vec::with_capacity(cores.len().min(self.places.len()));
        for core in cores {
            let core = core.u32("reactors")?;
            let Some(place) = self.places.iter().find(|place| place.handle.id().0 == core) else {
                let there: Vec<String> = self.places.iter().map(|place| place.handle.id().0.to_string()).collect();
                return Err(Failure::invalid("reactors", core, format_args!("out of {}", there.join(", "))));
            };
            if picked.contains(&place.handle) {
                return Err(Failure::invalid("reactors", core, "each core once"));
            }
            picked.push(place.handle.clone());
        }
        Ok(picked)
    }

    pub fn is_running(&self) -> bool {
        *lock(&self.life) == Life::Running
    }

    /// Each reactor's figures, and whether they are of now: one that does not answer in time tells its last ones.
    pub fn figures(&self) -> Vec<(Option<ReactorStats>, bool)> {
        self.places.iter().map(|place| self.figures_of(place)).collect()
    }

    fn figures_of(&self, place: &Place) -> (Option<ReactorStats>, bool) {
        let (send, receive) = mpsc::channel();
        place.handle.call(move |reactor| drop(send.send(reactor.stats())));
        let mut last = lock(&self.last_stats);
        match receive.recv_timeout(STATS_WAIT) {
            Ok(stats) => {
                last.insert(place.handle.id().0, stats.clone());
                (Some(stats), true)
            }
            Err(_) => (last.get(&place.handle.id().0).cloned(), false),
        }
    }

    /// Ends everything, once; who comes second waits for the first. Blocks.
    pub fn stop(&self, deadline: Duration) -> Result<(), Failure> {
        let mut life = lock(&self.life);
        while *life == Life::Stopping {
            life = self.ended.wait(life).unwrap_or_else(PoisonError::into_inner);
        }
        if *life == Life::Stopped {
            return Ok(());
        }
        *life = Life::Stopping;
        drop(life);
        let late = self.stop_in_order(Instant::now() + deadline);
        self.outbox.cancel_open();
        *lock(&self.life) = Life::Stopped;
        self.ended.notify_all();
        if late.is_empty() {
            return Ok(());
        }
        Err(not_in_time("stop", deadline, &late))
    }

    /// Front ends and bdevs end, the reactors do not: to end a reactor takes longer than those for whom this is done can wait. Blocks.
    pub fn rest(&self, deadline: Duration) -> Result<(), Failure> {
        let mut late = Vec::new();
        self.stop_users(Instant::now() + deadline, &mut late);
        late.is_empty().then_some(()).ok_or_else(|| not_in_time("stop_bdevs", deadline, &late))
    }

    fn stop_in_order(&self, until: Instant) -> Vec<String> {
        self.outbox.shut();
        let mut late = Vec::new();
        self.stop_users(until, &mut late);
        self.stop_reactors(until, &mut late);
        self.pool.sleep();
        late
    }

    fn stop_users(&self, until: Instant, late: &mut Vec<String>) {
        self.stop_front_ends(until, late);
        self.stop_bdevs(until, late);
        if !self.runs.stop(until) {
            late.push("a load run had I/O under way".to_owned());
        }
    }

    /// Who makes I/O first, and only then the sessions: a load of ours may run through a target of ours.
    fn stop_front_ends(&self, until: Instant, late: &mut Vec<String>) {
        let third = |until: Instant| Instant::now() + until.saturating_duration_since(Instant::now()) / 3;
        self.runs.stop(third(until));
        self.stop_single_ios(third(until));
        lock(&self.rings).drain(..).filter_map(|ring| ring.upgrade()).for_each(|ring| ring.close());
        if !self.vhost.stop(third(until)) {
            late.push("a vhost session was still draining".to_owned());
        }
    }

    /// Single I/Os may end by themselves until then; after that the bdevs' removal aborts them.
    fn stop_single_ios(&self, until: Instant) {
        let (send, receive) = mpsc::channel();
        let told = Box::new(move || {
            let _ = send.send(());
        });
        self.home().call(move |reactor| io::when_idle(reactor, told));
        if receive.recv_timeout(until.saturating_duration_since(Instant::now())) == Err(RecvTimeoutError::Timeout) {
            log::say(Level::Warning, "engine", format_args!("single I/Os are still under way: they are aborted"));
        }
        let open: Vec<(u64, Arc<Descriptor>)> = lock(&self.descriptors).drain().collect();
        for (number, descriptor) in open {
            drop(descriptor);
            self.home().call(move |reactor| io::close(reactor, number, None));
        }
    }

    fn stop_bdevs(&self, until: Instant, late: &mut Vec<String>) {
        let left = until.saturating_duration_since(Instant::now());
        let grace_ns = u64::try_from((left / 2).as_nanos()).unwrap_or(u64::MAX);
        // Else each mirror would be degraded by the going of its legs.
        self.raids.shut_down();
        let (send, receive) = mpsc::channel();
        let mut pending = Vec::new();
        for listing in self.registry.list(None).unwrap_or_default() {
            let name = listing.info.name.clone();
            if let Some(owner) = &listing.claimed_by {
                drop(self.registry.release(&name, owner));
            }
            if listing.removing {
                continue;
            }
            let (send, told) = (send.clone(), name.clone());
            pending.push(name.clone());
            lifecycle::unregister(&self.registry, &name, grace_ns, Box::new(move |_| drop(send.send(told))));
        }
        drop(send);
        while !pending.is_empty() {
            match receive.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(name) => pending.retain(|other| *other != name),
                Err(_) => break,
            }
        }
        if !pending.is_empty() {
            late.push(format!("bdevs {} still had I/O under way", pending.join(", ")));
        }
    }

    fn stop_reactors(&self, until: Instant, late: &mut Vec<String>) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        threads.iter().for_each(|thread| thread.handle().stop());
        let wait = until.saturating_duration_since(Instant::now()).max(JOIN_WAIT);
        let (send, receive) = mpsc::channel();
        // Joined elsewhere, so that a reactor that hangs costs its deadline and not the process.
        let joiner = std::thread::Builder::new().name("qpair_join".to_owned()).spawn(move || {
            drop(threads);
            let _ = send.send(());
        });
        match joiner {
            Ok(_) if receive.recv_timeout(wait).is_ok() => {}
            Ok(_) => late.push("a reactor did not end".to_owned()),
            Err(error) => late.push(format!("no thread to join the reactors: {error}")),
        }
    }
}

fn not_in_time(what: &str, deadline: Duration, late: &[String]) -> Failure {
    Failure::new(libc::ETIMEDOUT, format!("{what}: not done within {} ms: {}", deadline.as_millis(), late.join("; ")))
}

/// Stops an engine that nobody refers to any more, without making its last holder wait.
pub fn abandon(core: Arc<Core>) {
    if !core.is_running() {
        return;
    }
    let kept = core.clone();
    let helper = std::thread::Builder::new().name("qpair_stop".to_owned()).spawn(move || drop(core.stop(Duration::from_secs(10))));
    if helper.is_err() {
        // No thread to be had: the reactors end by themselves, unjoined.
        kept.places.iter().for_each(|place| place.handle.stop());
        std::mem::forget(kept);
    }
}
