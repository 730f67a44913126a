//! The vhost room: controllers, sessions and the commands that Python decoded from a front end's messages.
//!
//! Descriptors are duplicated before a call returns, so Python may close its own at once. What a session's features
//! are, and which controller it belongs to, is kept here for those who look.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use qpair_reactor::event::Event;
use qpair_vhost::{
    Addresses, Answer, Change, Coalescing, Command, ControllerInfo, MemoryRow, Options, QueueState, Source, Target, VhostError,
};

use crate::core::{Core, lock};
use crate::engine::Engine;
use crate::events::{News, Outbox, Token};
use crate::values::{Failure, Number, Value};

/// Rows of a memory table: vhost-user itself has 8; with the slots protocol feature a front end may have up to 509.
const ROWS_MAX: usize = 509;

impl From<VhostError> for Failure {
    fn from(error: VhostError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

struct Session {
    controller: String,
    features: u64,
    sizes: BTreeMap<u16, u32>,
}

/// The target, and what is kept beside it.
pub struct Room {
    pub target: Arc<Target>,
    sessions: Mutex<BTreeMap<u64, Session>>,
}

impl Room {
    pub fn new(registry: Arc<qpair_bdev::Registry>, outbox: Arc<Outbox>) -> Arc<Self> {
        let target = Target::new(registry, move |failure| {
            let gone = failure.broken.ends_session();
            outbox.push(News::Session {
                session: failure.session,
                kind: if gone { "failed" } else { "queue_failed" },
                queue: (!gone).then_some(failure.queue),
                reason: failure.broken.to_string(),
            });
        });
        Arc::new(Self { target, sessions: Mutex::default() })
    }

    fn session_of(&self, controller: &str) -> Option<u64> {
        let sessions = lock(&self.sessions);
        sessions.iter().find(|(_, session)| session.controller == controller).map(|(id, _)| *id)
    }

    fn drain_ns(&self, session: u64, drain_ns: u64) -> Result<(), Failure> {
        let controller = lock(&self.sessions).get(&session).map(|session| session.controller.clone());
        let controller = controller.ok_or_else(|| Failure::from(VhostError::NoSuch(format!("session {session}"))))?;
        Ok(self.target.set_drain_ns(&controller, drain_ns)?)
    }

    /// Has a command done, and notes here what it changed.
    fn noting(self: &Arc<Self>, session: u64, command: Command, token: Token, note: impl FnOnce(&mut Session) + Send + 'static) {
        let room = self.clone();
        let reply = move |outcome: Result<Answer, VhostError>| {
            if let (true, Some(known)) = (outcome.is_ok(), lock(&room.sessions).get_mut(&session)) {
                note(known);
            }
            token.answer(outcome.map(value_of));
        };
        self.target.command(session, command, Box::new(reply));
    }

    /// Closes a session and goes on when it is gone, or could not be closed.
    fn close(self: &Arc<Self>, session: u64, then: impl FnOnce(Result<(), VhostError>) + Send + 'static) {
        let room = self.clone();
        let reply = move |outcome: Result<Answer, VhostError>| {
            lock(&room.sessions).remove(&session);
            then(outcome.map(drop));
        };
        self.target.command(session, Command::Close, Box::new(reply));
    }

    /// Ends all sessions and controllers. False: some session was still draining.
    pub fn stop(self: &Arc<Self>, until: Instant) -> bool {
        let sessions: Vec<u64> = lock(&self.sessions).keys().copied().collect();
        let (send, receive) = mpsc::channel();
        let left = until.saturating_duration_since(Instant::now());
        for session in &sessions {
            // Half the time to drain; what is left then is aborted, and has the other half to come back.
            drop(self.drain_ns(*session, u64::try_from((left / 2).as_nanos()).unwrap_or(u64::MAX)));
            let send = send.clone();
            self.close(*session, move |_| {
                let _ = send.send(());
            });
        }
        drop(send);
        let closed = sessions.iter().all(|_| receive.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok());
        for controller in self.target.info(None).unwrap_or_default() {
            drop(self.target.delete(&controller.name));
        }
        closed
    }
}

/// A descriptor of Python's, duplicated.
pub fn duplicate(field: &str, fd: Number) -> Result<OwnedFd, Failure> {
    let fd = fd.within(field, 0..=RawFd::MAX as u64)? as RawFd;
    // SAFETY: `fd` is not -1; the borrow ends with the call below, which fails with EBADF if nothing is open there. That
    // Python closes it meanwhile is as if it had passed a descriptor of something else: its own doing, and harmless here.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|error| Failure::os(&format!("{field} {fd}"), &error))
}

/// A peer's eventfd, duplicated. Anything else (a pipe, a file of a file system that never answers) could stall who notifies it.
pub fn eventfd(field: &str, fd: Number) -> Result<Event, Failure> {
    let fd = duplicate(field, fd)?;
    let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_err(|error| Failure::os(&format!("kind of {field}"), &error))?;
    if kind.as_os_str() != "anon_inode:[eventfd]" {
        qpair_memory::drop_apart(fd);
        return Err(Failure::invalid(field, kind.display(), "an eventfd"));
    }
    Ok(Event::from_fd(fd))
}

fn event(fd: Option<Number>) -> Result<Option<Event>, Failure> {
    fd.map(|fd| eventfd("fd", fd)).transpose()
}

fn queue_index(queue: Number) -> Result<u16, Failure> {
    Ok(queue.within("queue", 0..=u64::from(u16::MAX))? as u16)
}

fn value_of(answer: Answer) -> Value {
    match answer {
        Answer::Done => Value::Nothing,
        Answer::Base(base) => Value::Integer(u64::from(base)),
        Answer::Inflight(fd, size) => Value::Inflight(fd, size),
    }
}

type Row = (Number, Number, Number, Number, Number);

fn memory_rows(regions: Vec<Row>) -> Result<Vec<MemoryRow>, Failure> {
    if regions.len() > ROWS_MAX {
        return Err(Failure::invalid("regions", format_args!("of {} rows", regions.len()), format_args!("at most {ROWS_MAX} rows")));
    }
    let row = |(guest, size, user, offset, fd): Row| {
        Ok(MemoryRow {
            guest_address: guest.u64("guest_address")?,
            length: size.u64("size_bytes")?,
            user_address: user.u64("user_address")?,
            offset: offset.u64("mmap_offset")?,
            source: Source::Fd(duplicate("fd", fd)?),
        })
    };
    regions.into_iter().map(row).collect()
}

fn remove(core: &Core, name: &str, token: Token) {
    if let Err(error) = core.vhost.target.delete(name) {
        return token.answer(Err(error));
    }
    token.answer(Ok::<_, Failure>(Value::Nothing));
}

impl Engine {
    fn vhost_change(&self, name: &str, change: Change) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        core.vhost.target.change(name, change, Box::new(move |outcome| token.answer(outcome.map(value_of))));
        Ok(number)
    }

    fn vhost_command(&self, session: Number, command: Command) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let session = session.u64("session")?;
        let (number, token) = (draft.number(), draft.commit());
        core.vhost.target.command(session, command, Box::new(move |outcome| token.answer(outcome.map(value_of))));
        Ok(number)
    }
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (name, bdev, *, reactors=None, readonly=false, num_queues=Number::of(16), packed_ring=false),
        text_signature = "($self, name, bdev, *, reactors=(), readonly=False, num_queues=16, packed_ring=False)"
    )]
    fn vhost_blk_create(
        &self,
        name: &str,
        bdev: &str,
        reactors: Option<Vec<Number>>,
        readonly: bool,
        num_queues: Number,
        packed_ring: bool,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let reactors = core.pick_reactors(reactors.unwrap_or_default())?;
        let options = Options { readonly, packed_ring, num_queues: num_queues.u32("num_queues")? };
        core.vhost.target.create(name, bdev, reactors, options).map_err(Failure::from)?;
        Ok(draft.done(Value::Nothing))
    }

    #[pyo3(signature = (name, *, deadline_ms=Number::of(10_000)), text_signature = "($self, name, *, deadline_ms=10000)")]
    fn vhost_blk_delete(&self, name: &str, deadline_ms: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let drain_ns = deadline_ms.deadline_ns("deadline_ms")?;
        core.vhost.target.set_drain_ns(name, drain_ns).map_err(Failure::from)?;
        let (number, token) = (draft.number(), draft.commit());
        match core.vhost.session_of(name) {
            None => remove(core, name, token),
            Some(session) => {
                // Not the core itself: a reactor must not be the last to hold it.
                let (vhost, core, name) = (core.vhost.clone(), Arc::downgrade(core), name.to_owned());
                vhost.close(session, move |_| match core.upgrade() {
                    Some(core) => remove(&core, &name, token),
                    None => drop(token),
                });
            }
        }
        Ok(number)
    }

    #[pyo3(signature = (name=None))]
    fn vhost_blk_info<'py>(&self, py: Python<'py>, name: Option<&str>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let core = self.running()?;
        let found = core.vhost.target.info(name).map_err(Failure::from)?;
        found.iter().map(|controller| controller_dict(py, &core.vhost, controller)).collect()
    }

    fn vhost_blk_set_reactors(&self, name: &str, reactors: Vec<Number>) -> PyResult<u64> {
        let reactors = self.running()?.pick_reactors(reactors)?;
        self.vhost_change(name, Change::Reactors(reactors))
    }

    fn vhost_blk_set_coalescing(&self, name: &str, delay_base_us: Number, iops_threshold: Number) -> PyResult<u64> {
        let (delay_base_us, iops_threshold) = (delay_base_us.u32("delay_base_us")?, iops_threshold.u32("iops_threshold")?);
        self.vhost_change(name, Change::Coalescing(Coalescing { delay_base_us, iops_threshold }))
    }

    fn vhost_session_open(&self, controller: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let session = core.vhost.target.open(controller).map_err(Failure::from)?;
        lock(&core.vhost.sessions).insert(session, Session { controller: controller.to_owned(), features: 0, sizes: BTreeMap::new() });
        Ok(draft.done(Value::Integer(session)))
    }

    #[pyo3(signature = (session, *, deadline_ms=Number::of(10_000)), text_signature = "($self, session, *, deadline_ms=10000)")]
    fn vhost_session_close(&self, session: Number, deadline_ms: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let session = session.u64("session")?;
        core.vhost.drain_ns(session, deadline_ms.deadline_ns("deadline_ms")?)?;
        let (number, token) = (draft.number(), draft.commit());
        core.vhost.close(session, token.done());
        Ok(number)
    }

    fn vhost_set_features(&self, session: Number, features: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (session, features) = (session.u64("session")?, features.u64("features")?);
        let (number, token) = (draft.number(), draft.commit());
        core.vhost.noting(session, Command::SetFeatures(features), token, move |known| known.features = features);
        Ok(number)
    }

    fn vhost_set_protocol_features(&self, session: Number, features: Number) -> PyResult<u64> {
        self.vhost_command(session, Command::SetProtocolFeatures(features.u64("features")?))
    }

    fn vhost_set_mem_table(&self, session: Number, regions: Vec<Row>) -> PyResult<u64> {
        self.vhost_command(session, Command::SetMemTable(memory_rows(regions)?))
    }

    fn vhost_set_vring_num(&self, session: Number, queue: Number, size: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (session, queue, size) = (session.u64("session")?, queue_index(queue)?, size.u32("size")?);
        let (number, token) = (draft.number(), draft.commit());
        core.vhost.noting(session, Command::SetVringNum { queue, size }, token, move |known| {
            known.sizes.insert(queue, size);
        });
        Ok(number)
    }

    #[allow(clippy::too_many_arguments, reason = "the members of the message, as in the Python contract")]
    fn vhost_set_vring_addr(
        &self,
        session: Number,
        queue: Number,
        flags: Number,
        desc: Number,
        used: Number,
        avail: Number,
        log: Number,
    ) -> PyResult<u64> {
        // The one flag asks that the ring's own writes be logged, too.
        let logged = flags.within("flags", 0..=1)? == 1;
        let log = Some(log.u64("log")?).filter(|_| logged);
        let addresses = Addresses { desc: desc.u64("desc")?, avail: avail.u64("avail")?, used: used.u64("used")?, log };
        self.vhost_command(session, Command::SetVringAddr { queue: queue_index(queue)?, addresses })
    }

    fn vhost_set_vring_base(&self, session: Number, queue: Number, base: Number) -> PyResult<u64> {
        self.vhost_command(session, Command::SetVringBase { queue: queue_index(queue)?, base: base.u32("base")? })
    }

    #[pyo3(signature = (session, queue, *, deadline_ms=Number::of(5_000)), text_signature = "($self, session, queue, *, deadline_ms=5000)")]
    fn vhost_get_vring_base(&self, session: Number, queue: Number, deadline_ms: Number) -> PyResult<u64> {
        let drain_ns = deadline_ms.deadline_ns("deadline_ms")?;
        self.running()?.vhost.drain_ns(session.u64("session")?, drain_ns)?;
        self.vhost_command(session, Command::GetVringBase { queue: queue_index(queue)? })
    }

    #[pyo3(signature = (session, queue, fd))]
    fn vhost_set_vring_kick(&self, session: Number, queue: Number, fd: Option<Number>) -> PyResult<u64> {
        self.vhost_command(session, Command::SetVringKick { queue: queue_index(queue)?, kick: event(fd)? })
    }

    #[pyo3(signature = (session, queue, fd))]
    fn vhost_set_vring_call(&self, session: Number, queue: Number, fd: Option<Number>) -> PyResult<u64> {
        self.vhost_command(session, Command::SetVringCall { queue: queue_index(queue)?, call: event(fd)? })
    }

    #[pyo3(signature = (session, queue, fd))]
    fn vhost_set_vring_err(&self, session: Number, queue: Number, fd: Option<Number>) -> PyResult<u64> {
        self.vhost_command(session, Command::SetVringErr { queue: queue_index(queue)?, err: event(fd)? })
    }

    fn vhost_set_vring_enable(&self, session: Number, queue: Number, enabled: bool) -> PyResult<u64> {
        self.vhost_command(session, Command::SetVringEnable { queue: queue_index(queue)?, enabled })
    }

    fn vhost_get_inflight_fd(&self, session: Number, num_queues: Number, queue_size: Number) -> PyResult<u64> {
        let (num_queues, queue_size) = inflight_shape(num_queues, queue_size)?;
        self.vhost_command(session, Command::GetInflight { num_queues, queue_size })
    }

    #[allow(clippy::too_many_arguments, reason = "the members of the message, as in the Python contract")]
    fn vhost_set_inflight_fd(
        &self,
        session: Number,
        fd: Number,
        mmap_size: Number,
        mmap_offset: Number,
        num_queues: Number,
        queue_size: Number,
    ) -> PyResult<u64> {
        let (num_queues, queue_size) = inflight_shape(num_queues, queue_size)?;
        let (size, offset) = (mmap_size.u64("mmap_size")?, mmap_offset.u64("mmap_offset")?);
        self.vhost_command(session, Command::SetInflight { fd: duplicate("fd", fd)?, size, offset, num_queues, queue_size })
    }

    fn vhost_get_config<'py>(&self, py: Python<'py>, session: Number) -> PyResult<Bound<'py, PyBytes>> {
        let config = self.running()?.vhost.target.config(session.u64("session")?).map_err(Failure::from)?;
        Ok(PyBytes::new(py, &config))
    }

    fn vhost_set_log_base(&self, session: Number, fd: Number, mmap_size: Number, mmap_offset: Number) -> PyResult<u64> {
        let (size, offset) = (mmap_size.u64("mmap_size")?, mmap_offset.u64("mmap_offset")?);
        self.vhost_command(session, Command::SetLogBase { fd: duplicate("fd", fd)?, size, offset })
    }

    fn vhost_set_log_fd(&self, session: Number, fd: Number) -> PyResult<u64> {
        self.vhost_command(session, Command::SetLogFd(eventfd("fd", fd)?))
    }

    fn vhost_set_writeback(&self, session: Number, writeback: bool) -> PyResult<u64> {
        self.vhost_command(session, Command::SetWriteback(writeback))
    }

    fn vhost_reset_device(&self, session: Number) -> PyResult<u64> {
        self.vhost_command(session, Command::ResetDevice)
    }
}

fn inflight_shape(num_queues: Number, queue_size: Number) -> Result<(u16, u16), Failure> {
    let limits = 0..=u64::from(u16::MAX);
    Ok((num_queues.within("num_queues", limits.clone())? as u16, queue_size.within("queue_size", limits)? as u16))
}

fn controller_dict<'py>(py: Python<'py>, room: &Room, controller: &ControllerInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &controller.name)?;
    dict.set_item("bdev", &controller.bdev)?;
    dict.set_item("readonly", controller.readonly)?;
    dict.set_item("num_queues", controller.num_queues)?;
    dict.set_item("reactors", controller.reactors.clone())?;
    dict.set_item("device_features", controller.features)?;
    let sessions = controller.sessions.iter().map(|session| {
        let entry = PyDict::new(py);
        entry.set_item("id", session.id)?;
        let known = lock(&room.sessions).get(&session.id).map(|known| (known.features, known.sizes.clone()));
        let (features, sizes) = known.unwrap_or_default();
        entry.set_item("features", features)?;
        let size = |index: u16| sizes.get(&index).copied().unwrap_or(0);
        let queues = session.queues.iter().map(|queue| queue_dict(py, queue, size(queue.index))).collect::<PyResult<Vec<_>>>()?;
        entry.set_item("queues", queues)?;
        Ok(entry)
    });
    dict.set_item("sessions", sessions.collect::<PyResult<Vec<_>>>()?)?;
    Ok(dict)
}

fn queue_dict<'py>(py: Python<'py>, queue: &qpair_vhost::QueueInfo, size: u32) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let state = match queue.state {
        QueueState::Stopped => "stopped",
        QueueState::Running => "running",
        QueueState::Draining => "draining",
        QueueState::Failed => "failed",
    };
    dict.set_item("index", queue.index)?;
    dict.set_item("size", size)?;
    dict.set_item("state", state)?;
    dict.set_item("lcore", queue.lcore)?;
    dict.set_item("avail_idx", queue.avail_idx)?;
    dict.set_item("used_idx", queue.used_idx)?;
    dict.set_item("requests", queue.requests)?;
    dict.set_item("kicks", queue.kicks)?;
    dict.set_item("interrupts", queue.interrupts)?;
    dict.set_item("inflight", queue.inflight)?;
    Ok(dict)
}
