//! The controllers of a process and the sessions open on them: the control plane's door.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use qpair_bdev::{Descriptor, Info, Registry};
use qpair_reactor::Handle;

use crate::session::{self, Answer, Command, SharedState};
use crate::{Broken, Coalescing, QUEUES_MAX, QueueState, QueueStats, VhostError, config};

/// Where the answer to a command goes, from whatever thread.
pub type Reply = Box<dyn FnOnce(Result<Answer, VhostError>) + Send>;

/// In-flight I/O of a ring that stops is asked to end early after this long.
const DRAIN_NS: u64 = 5_000_000_000;

/// What may change while a session lives.
#[derive(Clone)]
pub enum Change {
    /// The rings run on these reactors in turn. The session's home stays where it is.
    Reactors(Vec<Handle>),
    /// How interrupts are coalesced.
    Coalescing(Coalescing),
}

struct Changeable {
    reactors: Vec<Handle>,
    coalescing: Coalescing,
}

/// A bdev as a virtio-blk device.
pub struct Controller {
    name: String,
    descriptor: Arc<Descriptor>,
    info: Arc<Info>,
    readonly: bool,
    packed_ring: bool,
    num_queues: u32,
    changeable: RwLock<Changeable>,
    drain_ns: AtomicU64,
}

impl Controller {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn descriptor(&self) -> &Arc<Descriptor> {
        &self.descriptor
    }

    /// Whether guests may write.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    pub(crate) fn bdev_info(&self) -> Arc<Info> {
        self.descriptor.info().unwrap_or_else(|| self.info.clone())
    }

    /// Feature bits offered.
    pub fn features(&self) -> u64 {
        config::features(&self.bdev_info(), self.readonly, self.packed_ring)
    }

    /// Queues are spread over the controller's reactors in turn.
    pub(crate) fn reactor_of(&self, queue: u16) -> Handle {
        let reactors = &self.changeable.read().unwrap_or_else(PoisonError::into_inner).reactors;
        reactors[usize::from(queue) % reactors.len()].clone()
    }

    /// How interrupts are coalesced, if they are.
    pub(crate) fn coalescing(&self) -> Option<Coalescing> {
        let coalescing = self.changeable.read().unwrap_or_else(PoisonError::into_inner).coalescing;
        (coalescing.delay_base_us > 0).then_some(coalescing)
    }

    /// Only while no ring runs.
    pub(crate) fn change(&self, change: Change) {
        let mut state = self.changeable.write().unwrap_or_else(PoisonError::into_inner);
        match change {
            Change::Reactors(reactors) => state.reactors = reactors,
            Change::Coalescing(coalescing) => state.coalescing = coalescing,
        }
    }

    pub(crate) fn drain_ns(&self) -> u64 {
        self.drain_ns.load(Ordering::Relaxed)
    }
}

/// How a controller is to be.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Guests may not write.
    pub readonly: bool,
    /// Packed rings are offered beside split ones.
    pub packed_ring: bool,
    /// Most queues of a session.
    pub num_queues: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { readonly: false, packed_ring: false, num_queues: 1 }
    }
}

/// A ring that its driver broke.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Session.
    pub session: u64,
    /// Queue.
    pub queue: u16,
    /// Why, by name.
    pub broken: Broken,
}

struct Open {
    controller: Arc<Controller>,
    home: Handle,
    shared: SharedState,
}

#[derive(Default)]
struct Inner {
    controllers: BTreeMap<String, Arc<Controller>>,
    sessions: BTreeMap<u64, Open>,
    next: u64,
}

/// See the module's doc.
pub struct Target {
    registry: Arc<Registry>,
    inner: Mutex<Inner>,
    on_failure: Arc<dyn Fn(Failure) + Send + Sync>,
}

/// One ring for those who look.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct QueueInfo {
    pub index: u16,
    pub state: QueueState,
    pub lcore: u32,
    pub avail_idx: u16,
    pub used_idx: u16,
    pub requests: u64,
    pub kicks: u64,
    pub interrupts: u64,
    pub inflight: u64,
}

/// One session for those who look.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Its number.
    pub id: u64,
    /// Its rings.
    pub queues: Vec<QueueInfo>,
}

/// One controller for those who look.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ControllerInfo {
    pub name: String,
    /// Empty once it is gone.
    pub bdev: String,
    pub readonly: bool,
    pub num_queues: u32,
    pub reactors: Vec<u32>,
    pub features: u64,
    pub sessions: Vec<SessionInfo>,
}

impl Target {
    /// Over the bdevs of `registry`; `on_failure` hears of broken rings, on the reactor where it happens.
    pub fn new(registry: Arc<Registry>, on_failure: impl Fn(Failure) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { registry, inner: Mutex::default(), on_failure: Arc::new(on_failure) })
    }

    /// Makes a controller. Its queues run on `reactors` in turn; the first is home to its sessions.
    pub fn create(&self, name: &str, bdev: &str, reactors: Vec<Handle>, options: Options) -> Result<(), VhostError> {
        let Options { readonly, packed_ring, num_queues } = options;
        if num_queues == 0 || num_queues > QUEUES_MAX {
            return Err(VhostError::invalid("num_queues", num_queues, format!("1 to {QUEUES_MAX}")));
        }
        if reactors.is_empty() {
            return Err(VhostError::invalid("reactors", "none", "at least one"));
        }
        let mut inner = self.lock();
        if inner.controllers.contains_key(name) {
            return Err(VhostError::Exists(name.to_owned()));
        }
        let descriptor = self.registry.open(bdev, !readonly, |_| {})?;
        let info = descriptor.info().ok_or_else(|| VhostError::NoSuch(format!("bdev {bdev}")))?;
        let controller = Controller {
            name: name.to_owned(),
            descriptor: Arc::new(descriptor),
            info,
            readonly,
            packed_ring,
            num_queues,
            changeable: RwLock::new(Changeable { reactors, coalescing: Coalescing::default() }),
            drain_ns: AtomicU64::new(DRAIN_NS),
        };
        inner.controllers.insert(name.to_owned(), Arc::new(controller));
        Ok(())
    }

    /// Removes a controller that has no session.
    pub fn delete(&self, name: &str) -> Result<(), VhostError> {
        let mut inner = self.lock();
        if !inner.controllers.contains_key(name) {
            return Err(VhostError::NoSuch(format!("controller {name}")));
        }
        if let Some(id) = inner.session_of(name) {
            return Err(VhostError::Busy(format!("controller {name} has session {id}")));
        }
        let controller = inner.controllers.remove(name);
        drop(inner);
        drop(controller);
        Ok(())
    }

    /// A controller by name.
    pub fn controller(&self, name: &str) -> Result<Arc<Controller>, VhostError> {
        let inner = self.lock();
        inner.controllers.get(name).cloned().ok_or_else(|| VhostError::NoSuch(format!("controller {name}")))
    }

    /// The configuration space of a controller, or of the one a session belongs to.
    pub fn config(&self, session: u64) -> Result<Vec<u8>, VhostError> {
        let inner = self.lock();
        let open = inner.sessions.get(&session).ok_or_else(|| VhostError::NoSuch(format!("session {session}")))?;
        let writeback = open.shared.writeback.load(Ordering::Relaxed);
        Ok(config::config(&open.controller.bdev_info(), open.controller.num_queues, writeback))
    }

    /// After how long a stopping ring's I/O is asked to end early.
    pub fn set_drain_ns(&self, name: &str, drain_ns: u64) -> Result<(), VhostError> {
        self.controller(name).map(|controller| controller.drain_ns.store(drain_ns, Ordering::Relaxed))
    }

    /// Opens a session: one at a time for each controller.
    pub fn open(&self, name: &str) -> Result<u64, VhostError> {
        let mut inner = self.lock();
        let controller = inner.controllers.get(name).cloned().ok_or_else(|| VhostError::NoSuch(format!("controller {name}")))?;
        if let Some(id) = inner.session_of(name) {
            return Err(VhostError::Busy(format!("controller {name} has session {id}")));
        }
        inner.next += 1;
        let id = inner.next;
        let stats = (0..controller.num_queues).map(|_| Arc::new(QueueStats::default())).collect();
        let shared = SharedState { stats, writeback: Arc::new(AtomicBool::new(true)) };
        let home = controller.reactor_of(0);
        inner.sessions.insert(id, Open { controller: controller.clone(), home: home.clone(), shared: shared.clone() });
        drop(inner);
        let tell = self.on_failure.clone();
        let failed = Arc::new(move |queue, broken| tell(Failure { session: id, queue, broken }));
        home.call(move |reactor| session::open(reactor, id, controller, shared, failed));
        Ok(id)
    }

    /// Sends a command to a session. [`Command::Close`] also forgets it, when it is done.
    pub fn command(self: &Arc<Self>, session: u64, command: Command, reply: Reply) {
        let home = self.lock().sessions.get(&session).map(|open| open.home.clone());
        let Some(home) = home else {
            return reply(Err(VhostError::NoSuch(format!("session {session}"))));
        };
        let target = matches!(command, Command::Close).then(|| self.clone());
        let reply: Reply = match target {
            None => reply,
            Some(target) => Box::new(move |outcome| {
                let gone = target.lock().sessions.remove(&session);
                drop(gone);
                reply(outcome);
            }),
        };
        home.call(move |reactor| session::command(reactor, session, command, reply));
    }

    /// Changes a controller, with its session's rings at rest if it has one.
    pub fn change(self: &Arc<Self>, name: &str, change: Change, reply: Reply) {
        if matches!(&change, Change::Reactors(reactors) if reactors.is_empty()) {
            return reply(Err(VhostError::invalid("reactors", "none", "at least one")));
        }
        let inner = self.lock();
        let Some(controller) = inner.controllers.get(name).cloned() else {
            drop(inner);
            return reply(Err(VhostError::NoSuch(format!("controller {name}"))));
        };
        let Some(session) = inner.session_of(name) else {
            // Under the lock: none begins meanwhile.
            controller.change(change);
            drop(inner);
            return reply(Ok(Answer::Done));
        };
        drop(inner);
        let (target, name, again) = (self.clone(), name.to_owned(), change.clone());
        let reply: Reply = Box::new(move |outcome| match outcome {
            // The session ended before its turn came.
            Err(VhostError::NoSuch(_)) => target.change(&name, again, reply),
            outcome => reply(outcome),
        });
        self.command(session, Command::Change(change), reply);
    }

    /// Controllers with their sessions and rings; all, or the one of a name.
    pub fn info(&self, name: Option<&str>) -> Result<Vec<ControllerInfo>, VhostError> {
        if let Some(name) = name {
            self.controller(name)?;
        }
        let inner = self.lock();
        let wanted = inner.controllers.values().filter(|controller| name.is_none_or(|name| name == controller.name));
        Ok(wanted.map(|controller| inner.describe(controller)).collect())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn session_of(&self, controller: &str) -> Option<u64> {
        self.sessions.iter().find(|(_, open)| open.controller.name == controller).map(|(id, _)| *id)
    }

    fn describe(&self, controller: &Arc<Controller>) -> ControllerInfo {
        let sessions = self.sessions.iter().filter(|(_, open)| open.controller.name == controller.name);
        let session = |(id, open): (&u64, &Open)| {
            let queues = open.shared.stats.iter().enumerate().map(|(index, stats)| queue_info(controller, index as u16, stats));
            SessionInfo { id: *id, queues: queues.collect() }
        };
        ControllerInfo {
            name: controller.name.clone(),
            bdev: controller.descriptor.info().map(|info| info.name.clone()).unwrap_or_default(),
            readonly: controller.readonly,
            num_queues: controller.num_queues,
            reactors: controller
                .changeable
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .reactors
                .iter()
                .map(|handle| handle.id().0)
                .collect(),
            features: controller.features(),
            sessions: sessions.map(session).collect(),
        }
    }
}

fn queue_info(controller: &Controller, index: u16, stats: &QueueStats) -> QueueInfo {
    QueueInfo {
        index,
        state: stats.state(),
        lcore: controller.reactor_of(index).id().0,
        avail_idx: stats.avail_idx.load(Ordering::Relaxed) as u16,
        used_idx: stats.used_idx.load(Ordering::Relaxed) as u16,
        requests: stats.requests.load(Ordering::Relaxed),
        kicks: stats.kicks.load(Ordering::Relaxed),
        interrupts: stats.interrupts.load(Ordering::Relaxed),
        inflight: stats.inflight.load(Ordering::Relaxed),
    }
}
