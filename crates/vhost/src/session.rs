//! One front end's session with a controller: what it told us, and which rings run because of it.
//!
//! Rules. Commands are executed one after the other, on the home reactor. Each goes through the same steps:
//! (1) the rings that the command concerns are stopped, each on its own reactor: drained, and let go of the memory;
//! (2) the command takes effect; (3) every ring that should run and does not is started; (4) the answer. So an
//! answer never leaves before the quiet it promises, and a ring never sees a setting change under it.
//!
//! A ring should run when it was started (a kick descriptor, or the message that there is none), is enabled, has size,
//! addresses and memory, and has not failed. vhost-user, "Ring states".

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_bdev::{Descriptor, Info};
use qpair_memory::{GuestMemory, drop_apart};
use qpair_reactor::event::Event;
use qpair_reactor::{Fanout, Reactor};
use qpair_wire::virtio::{Features, RingSize};
use qpair_wire::virtio_packed::{PackedBase, PackedSize};

use crate::log::{DirtyLog, LogSetup};
use crate::park::park;
use crate::queue::{self, Control};
use crate::rows::{MappedRow, MemoryRow, regions};
use crate::{Addresses, Broken, Change, Coalescing, Controller, Inflight, QueueState, QueueStats, Reply, VhostError};

/// What a front end can ask for.
#[allow(missing_docs)]
pub enum Command {
    SetFeatures(u64),
    SetProtocolFeatures(u64),
    SetMemTable(Vec<MemoryRow>),
    SetVringNum {
        queue: u16,
        size: u32,
    },
    SetVringAddr {
        queue: u16,
        addresses: Addresses,
    },
    SetVringBase {
        queue: u16,
        base: u32,
    },
    GetVringBase {
        queue: u16,
    },
    SetVringKick {
        queue: u16,
        kick: Option<Event>,
    },
    SetVringCall {
        queue: u16,
        call: Option<Event>,
    },
    SetVringErr {
        queue: u16,
        err: Option<Event>,
    },
    SetVringEnable {
        queue: u16,
        enabled: bool,
    },
    GetInflight {
        num_queues: u16,
        queue_size: u16,
    },
    SetInflight {
        fd: OwnedFd,
        size: u64,
        offset: u64,
        num_queues: u16,
        queue_size: u16,
    },
    ResetDevice,
    /// Where writes to guest memory are marked while LOG_ALL is set; takes the place of the log before.
    SetLogBase {
        fd: OwnedFd,
        size: u64,
        offset: u64,
    },
    SetLogFd(Event),
    /// SET_CONFIG of the write-cache mode: writes may be answered before they are durable.
    SetWriteback(bool),
    /// Something of the controller, which no front end asks for.
    Change(Change),
    /// Ends the session: everything stopped, all memory gone.
    Close,
}

/// What a command answers.
#[derive(Debug)]
pub enum Answer {
    /// Done.
    Done,
    /// GET_VRING_BASE.
    Base(u32),
    /// GET_INFLIGHT_FD: descriptor and size; the offset is 0.
    Inflight(OwnedFd, u64),
}

/// Hears of a ring that its driver broke, on the ring's reactor.
pub(crate) type OnBroken = Arc<dyn Fn(u16, Broken) + Send + Sync>;

/// Everything a ring needs to start, to be sent to its reactor.
pub(crate) struct Setup {
    pub(crate) name: String,
    pub(crate) index: u16,
    pub(crate) descriptor: Arc<Descriptor>,
    /// As the bdev is, or was when it went.
    pub(crate) info: Arc<Info>,
    pub(crate) packed: bool,
    pub(crate) size: u16,
    pub(crate) addresses: Addresses,
    /// None: as a ring that was never used.
    pub(crate) base: Option<u32>,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) in_order: bool,
    pub(crate) readonly: bool,
    pub(crate) rows: Vec<MappedRow>,
    pub(crate) kick: Option<Event>,
    pub(crate) call: Option<Event>,
    pub(crate) err: Option<Event>,
    pub(crate) inflight: Option<Inflight>,
    pub(crate) log: Option<LogSetup>,
    /// Each write is durable before it is answered.
    pub(crate) durable: bool,
    pub(crate) coalescing: Option<Coalescing>,
    pub(crate) stats: Arc<QueueStats>,
    pub(crate) failed: OnBroken,
}

impl Setup {
    /// This reactor's own view of the guest's memory.
    pub(crate) fn memory(&self) -> Result<GuestMemory, VhostError> {
        Ok(GuestMemory::new(regions(&self.rows))?)
    }
}

/// What is known of one ring.
struct Ring {
    size: Option<u16>,
    addresses: Option<Addresses>,
    base: Option<u32>,
    kick: Option<Event>,
    call: Option<Event>,
    err: Option<Event>,
    started: bool,
    /// What SET_VRING_ENABLE said last.
    enabled: Option<bool>,
    failed: bool,
    running: bool,
    stats: Arc<QueueStats>,
}

/// See the module's doc.
pub(crate) struct Session {
    id: u64,
    controller: Arc<Controller>,
    features: u64,
    rows: Option<Vec<MappedRow>>,
    inflight: Option<Inflight>,
    log: Option<DirtyLog>,
    log_told: Option<Event>,
    writeback: Arc<AtomicBool>,
    rings: Vec<Ring>,
    waiting: VecDeque<(Command, Reply)>,
    busy: bool,
    failed: OnBroken,
}

/// What of a session is looked at from any thread.
#[derive(Clone)]
pub(crate) struct SharedState {
    pub(crate) stats: Vec<Arc<QueueStats>>,
    /// As the driver wants it; without a write cache it means nothing.
    pub(crate) writeback: Arc<AtomicBool>,
}

type Shared = Rc<RefCell<Session>>;
/// By session and index.
type Queues = HashMap<(u64, u16), Rc<RefCell<dyn Control>>>;

/// The sessions at home on a reactor, and the rings running on it.
#[derive(Default)]
struct Here {
    sessions: RefCell<HashMap<u64, Shared>>,
    queues: RefCell<Queues>,
}

/// Begins a session on this, its home reactor.
pub(crate) fn open(reactor: &mut Reactor, id: u64, controller: Arc<Controller>, shared: SharedState, failed: OnBroken) {
    let ring = |stats| Ring {
        size: None,
        addresses: None,
        base: None,
        kick: None,
        call: None,
        err: None,
        started: false,
        enabled: None,
        failed: false,
        running: false,
        stats,
    };
    let session = Session {
        id,
        controller,
        features: 0,
        rows: None,
        inflight: None,
        log: None,
        log_told: None,
        writeback: shared.writeback,
        rings: shared.stats.into_iter().map(ring).collect(),
        waiting: VecDeque::new(),
        busy: false,
        failed,
    };
    reactor.local::<Here>().sessions.borrow_mut().insert(id, Rc::new(RefCell::new(session)));
}

/// Executes a command, after those before it.
pub(crate) fn command(reactor: &mut Reactor, id: u64, command: Command, reply: Reply) {
    let here = reactor.local::<Here>();
    let session = here.sessions.borrow().get(&id).cloned();
    let Some(session) = session else {
        return reply(Err(VhostError::NoSuch(format!("session {id}"))));
    };
    session.borrow_mut().waiting.push_back((command, reply));
    next(reactor, &session);
}

/// Begins the next command unless one is under way.
fn next(reactor: &mut Reactor, session: &Shared) {
    let mut state = session.borrow_mut();
    if state.busy {
        return;
    }
    let Some((command, reply)) = state.waiting.pop_front() else { return };
    state.busy = true;
    let concerned = state.concerned_by(&command);
    drop(state);
    let again = session.clone();
    stop(reactor, session, concerned, move |reactor| {
        let outcome = again.borrow_mut().apply(reactor, command);
        start(reactor, &again.clone(), move |reactor, started| {
            let closed = again.borrow().rings.is_empty();
            if closed {
                let id = again.borrow().id;
                reactor.local::<Here>().sessions.borrow_mut().remove(&id);
            }
            again.borrow_mut().busy = false;
            reply(outcome.and_then(|answer| started.map(|()| answer)));
            // From a fresh stack: a front end may have sent thousands of commands while a ring drained.
            if !again.borrow().waiting.is_empty() {
                reactor.after(0, move |reactor| next(reactor, &again));
            }
        });
    });
}

/// Stops these rings, then goes on at home.
fn stop(reactor: &mut Reactor, session: &Shared, concerned: Vec<u16>, then: impl FnOnce(&mut Reactor) + 'static) {
    if concerned.is_empty() {
        return then(reactor);
    }
    let bases = Arc::new(Mutex::new(Vec::new()));
    let (id, found) = (session.borrow().id, bases.clone());
    let after = park(reactor, session, move |reactor, session| {
        for (index, base) in found.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let mut state = session.borrow_mut();
            let ring = &mut state.rings[usize::from(index)];
            (ring.base, ring.running) = (Some(base), false);
        }
        then(reactor);
    });
    let fanout = Fanout::new(reactor.handle(), after);
    let state = session.borrow();
    for index in concerned {
        let (part, bases, deadline) = (fanout.part(), bases.clone(), state.controller.drain_ns());
        state.controller.reactor_of(index).call(move |reactor| {
            let queue = reactor.local::<Here>().queues.borrow_mut().remove(&(id, index));
            let Some(queue) = queue else { return };
            let done = move |_: &mut Reactor, base| {
                bases.lock().unwrap_or_else(PoisonError::into_inner).push((index, base));
                drop(part);
            };
            queue.borrow_mut().stop(reactor, deadline, Box::new(done));
        });
    }
}

/// Starts every ring that should run and does not, then goes on at home with the first refusal, if any.
fn start(reactor: &mut Reactor, session: &Shared, then: impl FnOnce(&mut Reactor, Result<(), VhostError>) + 'static) {
    let setups = session.borrow_mut().setups();
    let (ready, mut refused) = match setups {
        Ok(ready) => (ready, None),
        Err(error) => (Vec::new(), Some(error)),
    };
    if ready.is_empty() {
        return then(reactor, refused.map_or(Ok(()), Err));
    }
    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let (id, found) = (session.borrow().id, outcomes.clone());
    let after = park(reactor, session, move |reactor, session| {
        for (index, outcome) in found.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let outcome: Result<(), VhostError> = outcome;
            let mut state = session.borrow_mut();
            let ring = &mut state.rings[usize::from(index)];
            ring.running = outcome.is_ok();
            if let Err(error) = outcome {
                ring.started = false;
                refused = refused.take().or(Some(error));
            }
        }
        then(reactor, refused.map_or(Ok(()), Err));
    });
    let fanout = Fanout::new(reactor.handle(), after);
    for setup in ready {
        let (part, outcomes, index) = (fanout.part(), outcomes.clone(), setup.index);
        session.borrow().controller.reactor_of(index).call(move |reactor| {
            let outcome = queue::start(reactor, setup);
            let outcome = outcome.map(|queue| {
                reactor.local::<Here>().queues.borrow_mut().insert((id, index), queue);
            });
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push((index, outcome));
            drop(part);
        });
    }
}

impl Session {
    /// Which running rings must be quiet before the command takes effect.
    fn concerned_by(&self, command: &Command) -> Vec<u16> {
        let running = |index: &u16| self.rings.get(usize::from(*index)).is_some_and(|ring| ring.running);
        match command {
            Command::SetFeatures(features) if *features == self.features => Vec::new(),
            Command::SetLogBase { .. } | Command::SetLogFd(_) if !self.logs() => Vec::new(),
            Command::SetWriteback(wanted) if *wanted == self.writeback.load(Ordering::Relaxed) => Vec::new(),
            Command::SetFeatures(_)
            | Command::SetMemTable(_)
            | Command::SetInflight { .. }
            | Command::SetLogBase { .. }
            | Command::SetLogFd(_)
            | Command::SetWriteback(_)
            | Command::ResetDevice
            | Command::Close
            | Command::Change(_) => (0..self.rings.len() as u16).filter(running).collect(),
            Command::SetVringNum { queue, .. }
            | Command::SetVringAddr { queue, .. }
            | Command::SetVringBase { queue, .. }
            | Command::GetVringBase { queue }
            | Command::SetVringKick { queue, .. }
            | Command::SetVringErr { queue, .. }
            | Command::SetVringEnable { queue, enabled: false } => [*queue].into_iter().filter(running).collect(),
            Command::SetProtocolFeatures(_)
            | Command::SetVringCall { .. }
            | Command::SetVringEnable { .. }
            | Command::GetInflight { .. } => Vec::new(),
        }
    }

    fn ring(&mut self, queue: u16) -> Result<&mut Ring, VhostError> {
        let count = self.rings.len();
        self.rings.get_mut(usize::from(queue)).ok_or_else(|| VhostError::invalid("queue", queue, format!("below {count}")))
    }

    fn apply(&mut self, reactor: &mut Reactor, command: Command) -> Result<Answer, VhostError> {
        match command {
            Command::SetFeatures(features) => self.set_features(features)?,
            Command::SetProtocolFeatures(_) => {}
            Command::SetMemTable(rows) => self.set_memory(rows)?,
            Command::SetVringNum { queue, size } => {
                let size = self.legal_size(size)?;
                self.ring(queue)?.size = Some(size);
            }
            Command::SetVringAddr { queue, addresses } => self.ring(queue)?.addresses = Some(addresses),
            Command::SetVringBase { queue, base } => {
                if !self.packed() && base > u32::from(u16::MAX) {
                    return Err(VhostError::invalid("vring base", base, "below 65536"));
                }
                self.ring(queue)?.base = Some(base);
            }
            Command::GetVringBase { queue } => {
                let packed = self.packed();
                let ring = self.ring(queue)?;
                (ring.started, ring.failed, ring.kick) = (false, false, None);
                ring.stats.set_state(QueueState::Stopped);
                let unused = if packed { PackedBase::START.bits() } else { 0 };
                return Ok(Answer::Base(ring.base.unwrap_or(unused)));
            }
            Command::SetVringKick { queue, kick } => {
                let ring = self.ring(queue)?;
                (ring.kick, ring.started) = (kick, true);
            }
            Command::SetVringCall { queue, call } => self.set_call(reactor, queue, call)?,
            Command::SetVringErr { queue, err } => self.ring(queue)?.err = err,
            Command::SetVringEnable { queue, enabled } => self.ring(queue)?.enabled = Some(enabled),
            Command::GetInflight { num_queues, queue_size } => {
                let (_, fd, size) = Inflight::create(num_queues, queue_size, self.packed())?;
                return Ok(Answer::Inflight(fd, size));
            }
            Command::SetInflight { fd, size, offset, num_queues, queue_size } => {
                let adopted = Inflight::adopt(&fd, size, offset, num_queues, queue_size, self.packed());
                if adopted.is_err() {
                    drop_apart(fd);
                }
                self.inflight = Some(adopted?);
            }
            Command::SetLogBase { fd, size, offset } => {
                self.log = None;
                let adopted = DirtyLog::adopt(&fd, size, offset);
                if adopted.is_err() {
                    drop_apart(fd);
                }
                self.log = Some(adopted?);
            }
            Command::SetLogFd(event) => self.log_told = Some(event),
            Command::SetWriteback(wanted) => {
                if wanted && !self.controller.bdev_info().write_cache {
                    return Err(VhostError::invalid("writeback", 1, "0: the bdev has no write cache"));
                }
                self.writeback.store(wanted, Ordering::Relaxed);
            }
            Command::ResetDevice => self.reset(),
            Command::Change(change) => self.controller.change(change),
            Command::Close => {
                self.reset();
                self.rows = None;
                self.rings.clear();
            }
        }
        Ok(Answer::Done)
    }

    fn packed(&self) -> bool {
        self.features & Features::RING_PACKED.bits() != 0
    }

    fn logs(&self) -> bool {
        self.features & Features::LOG_ALL.bits() != 0
    }

    fn legal_size(&self, size: u32) -> Result<u16, VhostError> {
        let (legal, limit) = match self.packed() {
            true => (PackedSize::new(size).map(PackedSize::get), "1 to 32768"),
            false => (RingSize::new(size).map(RingSize::get), "a power of two from 1 to 32768"),
        };
        legal.ok_or_else(|| VhostError::invalid("vring num", size, limit))
    }

    fn set_features(&mut self, features: u64) -> Result<(), VhostError> {
        let offered = self.controller.features();
        if features & !offered != 0 {
            return Err(VhostError::invalid("features", format!("{features:#x}"), format!("within the offered {offered:#x}")));
        }
        self.features = features;
        Ok(())
    }

    /// Replaces the table. The old one's last holds go first, so that a refused table leaves none: its rings stay stopped.
    fn set_memory(&mut self, rows: Vec<MemoryRow>) -> Result<(), VhostError> {
        self.rows = None;
        self.rows = Some(MappedRow::of_table(rows)?);
        Ok(())
    }

    fn set_call(&mut self, reactor: &mut Reactor, queue: u16, call: Option<Event>) -> Result<(), VhostError> {
        let (id, controller) = (self.id, self.controller.clone());
        let ring = self.ring(queue)?;
        let twin = call.as_ref().map(Event::twin).transpose().map_err(|error| VhostError::Os("dup", error))?;
        ring.call = call;
        if ring.running {
            let _ = reactor;
            controller.reactor_of(queue).call(move |reactor| {
                let queue = reactor.local::<Here>().queues.borrow().get(&(id, queue)).cloned();
                if let Some(queue) = queue {
                    queue.borrow_mut().set_call(twin);
                }
            });
        }
        Ok(())
    }

    /// Back to the state after connecting, but with the memory (vhost-user, RESET_DEVICE).
    fn reset(&mut self) {
        self.features = 0;
        (self.inflight, self.log, self.log_told) = (None, None, None);
        self.writeback.store(true, Ordering::Relaxed);
        for ring in &mut self.rings {
            (ring.size, ring.addresses, ring.base) = (None, None, None);
            (ring.kick, ring.call, ring.err) = (None, None, None);
            (ring.started, ring.enabled, ring.failed) = (false, None, false);
            ring.stats.set_state(QueueState::Stopped);
        }
    }

    /// What it takes to start the rings that should run and do not.
    fn setups(&mut self) -> Result<Vec<Setup>, VhostError> {
        let (packed, logs) = (self.packed(), self.logs());
        let Some(rows) = &self.rows else { return Ok(Vec::new()) };
        let durable = self.controller.bdev_info().write_cache && !self.writeback.load(Ordering::Relaxed);
        // Without protocol features there is no message to enable a ring: it is enabled from the start.
        let from_start = self.features & Features::PROTOCOL_FEATURES.bits() == 0;
        let mut setups = Vec::new();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            // A ring that broke a rule is told by its figures; it runs again only after it was stopped in order.
            ring.failed |= ring.stats.state() == QueueState::Failed;
            let should = ring.started && ring.enabled.unwrap_or(from_start) && !ring.failed && !ring.running;
            let (Some(size), Some(addresses), true) = (ring.size, ring.addresses, should) else { continue };
            let twin = |event: &Option<Event>| event.as_ref().map(Event::twin).transpose().map_err(|error| VhostError::Os("dup", error));
            setups.push(Setup {
                name: self.controller.name().to_owned(),
                index: index as u16,
                descriptor: self.controller.descriptor().clone(),
                info: self.controller.bdev_info(),
                packed,
                size,
                addresses,
                base: ring.base,
                event_idx: self.features & Features::RING_EVENT_IDX.bits() != 0,
                indirect: self.features & Features::INDIRECT_DESC.bits() != 0,
                in_order: self.features & Features::IN_ORDER.bits() != 0,
                readonly: self.controller.readonly(),
                rows: rows.clone(),
                kick: twin(&ring.kick)?,
                call: twin(&ring.call)?,
                err: twin(&ring.err)?,
                // A ring for which there is no room in the region runs untracked.
                inflight: self.inflight.clone().filter(|region| region.queue_size() >= size),
                // Without a log, LOG_ALL has nothing to write to: a front end may say it first.
                log: match &self.log {
                    Some(log) if logs => Some(LogSetup { log: log.clone(), told: twin(&self.log_told)? }),
                    _ => None,
                },
                durable,
                coalescing: self.controller.coalescing(),
                stats: ring.stats.clone(),
                failed: self.failed.clone(),
            });
        }
        Ok(setups)
    }
}
