//! From the engine to Python: replies to tokens, and news. Any thread puts in, one reader takes out.
//!
//! How it works. An [`Outbox`] is a queue and an eventfd that is readable exactly while the queue is not empty: it is
//! notified on the edge from empty, and read when the last event was taken, both under the queue's lock. The lock is
//! never held while Python runs or is waited for, so a stalled interpreter stalls no reactor.
//!
//! **Each token is answered exactly once.** Its number is in the set of open ones from the moment it is made; whoever
//! removes it there puts the one reply in: [`Token::answer`], the drop of a token nobody answered (its message died
//! with a reactor), or the end of the engine ([`Outbox::cancel_open`]). The others find it gone and say nothing.
//!
//! Limits. Replies: as many as tokens are open. A Python bdev's work: one flag each. Log lines wait in the reactor
//! crate's own ring ([`log::KEPT`]); here is one flag. The log is the process's: its youngest live engine tells it.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use pyo3::prelude::*;
use qpair_bdev::Notice;
use qpair_bdev::layer::watch::Late;
use qpair_reactor::event::Event;
use qpair_reactor::log::{self, Level, Line};

use crate::measures::IoTimeout;
use crate::values::{Failure, Value};

const DROPPED: &str = "the engine stopped before this was done";

/// Something for Python.
pub enum News {
    Reply { token: u64, outcome: Result<Value, Failure> },
    Bdev { kind: &'static str, name: String, limit: Option<(&'static str, u64)>, reason: Option<String> },
    Late { descriptor: u64, late: Late },
    Session { session: u64, kind: &'static str, queue: Option<u16>, reason: String },
    Log(Line),
    PythonBdev { ring: u64 },
    PythonWorkerDown { link: u64, number: u64, reason: String },
}

#[derive(Default)]
struct State {
    queue: VecDeque<News>,
    log_waits: bool,
    open: HashSet<u64>,
    made: u64,
    shut: bool,
}

/// See the module's doc.
pub struct Outbox {
    state: Mutex<State>,
    event: Event,
}

impl Outbox {
    pub fn new() -> std::io::Result<Arc<Self>> {
        let outbox = Arc::new(Self { state: Mutex::default(), event: Event::new()? });
        listen_to_log(&outbox);
        Ok(outbox)
    }

    /// The descriptor that is readable while events wait.
    pub fn fd(&self) -> i32 {
        use std::os::fd::AsRawFd;
        self.event.fd().map_or(-1, |fd| fd.as_raw_fd())
    }

    /// A new open token, for a call that may still be refused; itself refused once the engine is stopping.
    pub fn draft(self: &Arc<Self>) -> Result<Draft, Failure> {
        let mut state = self.lock();
        if state.shut {
            return Err(Failure::new(libc::ESHUTDOWN, "the engine is stopped"));
        }
        state.made += 1;
        let number = state.made;
        state.open.insert(number);
        Ok(Draft { number, outbox: Some(self.clone()) })
    }

    /// Puts news in that are not a reply.
    pub fn push(&self, news: News) {
        self.put(&mut self.lock(), news);
    }

    pub fn push_notice(&self, notice: &Notice) {
        let (kind, name) = match notice {
            Notice::Added(name) => ("added", name),
            Notice::Removing(name) => ("removing", name),
            Notice::Removed(name) => ("removed", name),
            Notice::Resized(name) => ("resized", name),
            Notice::Failed { name, .. } => ("failed", name),
            Notice::Throttled { name, .. } => ("throttled", name),
        };
        let limit = if let Notice::Throttled { limit, value, .. } = notice { Some((*limit, *value)) } else { None };
        let reason = if let Notice::Failed { reason, .. } = notice { Some(reason.clone()) } else { None };
        self.push(News::Bdev { kind, name: name.clone(), limit, reason });
    }

    /// No more tokens from now on.
    pub fn shut(&self) {
        self.lock().shut = true;
    }

    /// Answers whatever is still open: nobody else will.
    pub fn cancel_open(&self) {
        let mut state = self.lock();
        let mut open: Vec<u64> = state.open.drain().collect();
        open.sort_unstable();
        for token in open {
            self.put(&mut state, News::Reply { token, outcome: Err(Failure::new(libc::ECANCELED, DROPPED)) });
        }
    }

    /// Takes up to `count` events, oldest first.
    pub fn take(&self, count: usize) -> Vec<News> {
        let mut state = self.lock();
        if std::mem::take(&mut state.log_waits) {
            // The log's lock is taken before this one wherever both are: by its notifier.
            drop(state);
            let lines = log::take();
            state = self.lock();
            state.queue.extend(lines.into_iter().map(News::Log));
        }
        let count = count.min(state.queue.len());
        let taken = state.queue.drain(..count).collect();
        if state.queue.is_empty() && !state.log_waits {
            self.event.take();
        }
        taken
    }

    /// Answers a token by its number, if it is still open.
    pub fn answer(&self, token: u64, outcome: Result<Value, Failure>) {
        let mut state = self.lock();
        if state.open.remove(&token) {
            self.put(&mut state, News::Reply { token, outcome });
        }
    }

    fn put(&self, state: &mut State, news: News) {
        let first = state.queue.is_empty() && !state.log_waits;
        state.queue.push_back(news);
        if first {
            self.event.notify();
        }
    }

    fn log_waits(&self) {
        let mut state = self.lock();
        let first = state.queue.is_empty() && !state.log_waits;
        state.log_waits = true;
        if first {
            self.event.notify();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engines that could tell the log, oldest first.
fn log_readers() -> MutexGuard<'static, Vec<Weak<Outbox>>> {
    static READERS: OnceLock<Mutex<Vec<Weak<Outbox>>>> = OnceLock::new();
    READERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen_to_log(outbox: &Arc<Outbox>) {
    static ONCE: OnceLock<()> = OnceLock::new();
    let mut readers = log_readers();
    readers.retain(|reader| reader.strong_count() > 0);
    readers.push(Arc::downgrade(outbox));
    drop(readers);
    ONCE.get_or_init(|| {
        log::on_line(|| {
            let reader = log_readers().iter().rev().find_map(Weak::upgrade);
            if let Some(reader) = reader {
                reader.log_waits();
            }
        });
    });
}

/// The token of a call that is still being checked. Dropped, because the call was refused: nobody knows the number,
/// so nothing is answered.
pub struct Draft {
    number: u64,
    outbox: Option<Arc<Outbox>>,
}

impl Draft {
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The call is accepted: from here on there is an answer.
    pub fn commit(mut self) -> Token {
        let outbox = self.outbox.take().unwrap_or_else(|| unreachable!("taken only here and in `keep`, which consume it"));
        Token { number: self.number, outbox }
    }

    /// As [`commit`](Self::commit), for work that answers by number and cannot forget to.
    pub fn keep(mut self) -> u64 {
        self.outbox = None;
        self.number
    }

    /// The call is accepted and done.
    pub fn done(self, value: Value) -> u64 {
        let token = self.commit();
        let number = token.number();
        token.answer(Ok::<_, Failure>(value));
        number
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(outbox) = &self.outbox {
            outbox.lock().open.remove(&self.number);
        }
    }
}

/// The right and the duty to answer one asynchronous call. Goes wherever the work goes.
pub struct Token {
    number: u64,
    outbox: Arc<Outbox>,
}

impl Token {
    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn answer(self, outcome: Result<Value, impl Into<Failure>>) {
        self.outbox.answer(self.number, outcome.map_err(Into::into));
    }

    /// As a call-back of the core, for operations that answer with nothing but success.
    pub fn done<E: Into<Failure>>(self) -> Box<dyn FnOnce(Result<(), E>) + Send> {
        Box::new(move |outcome| self.answer(outcome.map(|()| Value::Nothing)))
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.outbox.answer(self.number, Err(Failure::new(libc::ECANCELED, DROPPED)));
    }
}

/// The answer to one token.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct Reply {
    token: u64,
    error: Option<Py<PyAny>>,
    value: Py<PyAny>,
}

/// A bdev appeared, went, changed its size, failed, or began to be held back by a limit.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct BdevEvent {
    kind: &'static str,
    name: String,
    limit: Option<(&'static str, u64)>,
    reason: Option<String>,
}

/// A vhost session ended itself: Python closes the socket.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct SessionEvent {
    session: u64,
    kind: &'static str,
    queue: Option<u16>,
    reason: String,
}

/// One line of the engine's log.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct LogEvent {
    level: &'static str,
    component: &'static str,
    message: String,
    suppressed: u64,
}

/// Requests wait in the ring of a Python bdev.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct PythonBdevWork {
    ring: u64,
}

/// The engine severed a worker process: end it.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct PythonWorkerDown {
    link: u64,
    number: u64,
    reason: String,
}

impl News {
    pub fn into_python(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(match self {
            Self::Reply { token, outcome } => Py::new(py, Reply::new(py, token, outcome))?.into_any(),
            Self::Bdev { kind, name, limit, reason } => Py::new(py, BdevEvent { kind, name, limit, reason })?.into_any(),
            Self::Late { descriptor, late } => Py::new(py, IoTimeout::of(descriptor, &late))?.into_any(),
            Self::Session { session, kind, queue, reason } => Py::new(py, SessionEvent { session, kind, queue, reason })?.into_any(),
            Self::Log(Line { level, component, message, suppressed }) => {
                let level = match level {
                    Level::Error => "error",
                    Level::Warning => "warning",
                    Level::Info => "info",
                    Level::Debug => "debug",
                };
                Py::new(py, LogEvent { level, component, message, suppressed })?.into_any()
            }
            Self::PythonWorkerDown { link, number, reason } => Py::new(py, PythonWorkerDown { link, number, reason })?.into_any(),
            Self::PythonBdev { ring } => Py::new(py, PythonBdevWork { ring })?.into_any(),
        })
    }
}

impl Reply {
    /// A value that cannot be made into a Python object (no memory for its bytes) becomes the reply's error.
    fn new(py: Python<'_>, token: u64, outcome: Result<Value, Failure>) -> Self {
        let value = outcome.map_err(PyErr::from).and_then(|value| value.into_python(py));
        match value {
            Ok(value) => Self { token, error: None, value },
            Err(error) => Self { token, error: Some(engine_error(py, error).into_value(py).into_any()), value: py.None() },
        }
    }
}

fn engine_error(py: Python<'_>, error: PyErr) -> PyErr {
    if error.is_instance_of::<crate::values::EngineError>(py) {
        return error;
    }
    Failure::new(libc::ENOMEM, format!("the reply could not be handed over: {error}")).into()
}
