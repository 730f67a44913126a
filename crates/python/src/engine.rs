//! The class `Engine`: its start, its events, its end. The other rooms add their methods in their own files.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qpair_reactor::driver::Choice;
use qpair_reactor::{Config, PollerState, ReactorStats};

use crate::core::{self, Core, Options, Place};
use crate::events::Draft;
use crate::values::{Failure, Number};

/// Reactors of one engine: more than any machine has cores, so that a slip is refused and not tried.
const CORES_MAX: usize = 1024;
/// Spinning longer than this is what `busy_poll` is for.
const SPIN_US_MAX: u64 = 1_000_000;
/// Below this no bdev that splits could reserve its children; above, the slab alone is over 600 MB.
const IOS: std::ops::RangeInclusive<u64> = 256..=1 << 20;
/// Events of one call: more only make the interpreter's turn long.
const EVENTS_MAX: u64 = 65536;

/// Reactor threads and all that runs on them.
#[pyclass(frozen, module = "qpair._engine")]
pub struct Engine {
    core: ManuallyDrop<Arc<Core>>,
    pid: u32,
}

impl Engine {
    /// The core, unless this process is a fork of the one that started it: its threads did not come along.
    pub fn core(&self) -> Result<&Arc<Core>, Failure> {
        let here = std::process::id();
        if here == self.pid {
            return Ok(&self.core);
        }
        let text =
            format!("the engine belongs to process {}; this is {here}, forked from it, and reactors do not survive a fork", self.pid);
        Err(Failure::new(libc::ESHUTDOWN, text))
    }

    /// Core and a new token, for an asynchronous call that is yet to be checked.
    pub fn begin(&self) -> Result<(&Arc<Core>, Draft), Failure> {
        let core = self.core()?;
        Ok((core, core.outbox.draft()?))
    }

    /// The core, unless stopped: for calls that answer at once.
    pub fn running(&self) -> Result<&Arc<Core>, Failure> {
        let core = self.core()?;
        if core.is_running() { Ok(core) } else { Err(Failure::new(libc::ESHUTDOWN, "the engine is stopped")) }
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(
        signature = (*, cores=None, pin=true, driver="auto", busy_poll=false, spin_us=Number::of(50), ios_per_reactor=Number::of(8192)),
        text_signature = "(*, cores=..., pin=True, driver='auto', busy_poll=False, spin_us=50, ios_per_reactor=8192)"
    )]
    fn new(
        py: Python<'_>,
        cores: Option<Vec<Number>>,
        pin: bool,
        driver: &str,
        busy_poll: bool,
        spin_us: Number,
        ios_per_reactor: Number,
    ) -> PyResult<Self> {
        let choice = match driver {
            "auto" => Choice::Auto,
            "io_uring" => Choice::IoUring,
            "epoll" => Choice::Epoll,
            other => return Err(Failure::invalid("driver", other, "auto, io_uring or epoll").into()),
        };
        let options = Options {
            cores: check_cores(cores)?,
            pin,
            choice,
            config: Config { spin_ns: spin_us.within("spin_us", 0..=SPIN_US_MAX)? * 1000, busy_poll },
            ios_per_reactor: ios_per_reactor.within("ios_per_reactor", IOS)? as u32,
        };
        let core = py.detach(|| Core::start(&options))?;
        Ok(Self { core: ManuallyDrop::new(core), pid: std::process::id() })
    }

    #[getter]
    fn event_fd(&self) -> PyResult<i32> {
        Ok(self.core()?.outbox.fd())
    }

    #[getter]
    fn driver(&self) -> PyResult<&'static str> {
        Ok(self.core()?.places[0].driver)
    }

    #[pyo3(signature = (max_events=Number::of(256)), text_signature = "($self, max_events=256)")]
    fn events<'py>(&self, py: Python<'py>, max_events: Number) -> PyResult<Bound<'py, PyList>> {
        let count = max_events.within("max_events", 1..=EVENTS_MAX)?;
        let list = PyList::empty(py);
        for news in self.core()?.outbox.take(count as usize) {
            list.append(news.into_python(py)?)?;
        }
        Ok(list)
    }

    fn reactors<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let core = self.running()?;
        let figures = py.detach(|| core.figures());
        core.places.iter().zip(figures).map(|(place, (stats, responsive))| reactor_dict(py, place, stats, responsive)).collect()
    }

    #[pyo3(signature = (deadline_ms=Number::of(10_000)), text_signature = "($self, deadline_ms=10000)")]
    fn stop_bdevs(&self, py: Python<'_>, deadline_ms: Number) -> PyResult<()> {
        let deadline = Duration::from_nanos(deadline_ms.deadline_ns("deadline_ms")?);
        let core = self.running()?;
        Ok(py.detach(|| core.rest(deadline))?)
    }

    #[pyo3(signature = (deadline_ms=Number::of(10_000)), text_signature = "($self, deadline_ms=10000)")]
    fn stop(&self, py: Python<'_>, deadline_ms: Number) -> PyResult<()> {
        let deadline = Duration::from_nanos(deadline_ms.deadline_ns("deadline_ms")?);
        let core = self.core()?;
        Ok(py.detach(|| core.stop(deadline))?)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if not_forked(self.pid).is_err() {
            // A forked child: locks may be held by threads that are not here. What the parent made stays untouched.
            return;
        }
        // SAFETY: taken once, here; `self` is not used afterwards.
        let core = unsafe { ManuallyDrop::take(&mut self.core) };
        core::abandon(core);
    }
}

/// Refuses a process that is not the one that made the object.
pub fn not_forked(pid: u32) -> Result<(), Failure> {
    let here = std::process::id();
    if here == pid {
        return Ok(());
    }
    let text = format!("the engine belongs to process {pid}; this is {here}, forked from it, and reactors do not survive a fork");
    Err(Failure::new(libc::ESHUTDOWN, text))
}

/// Given cores, or the first that this process may run on.
fn check_cores(cores: Option<Vec<Number>>) -> Result<Vec<u32>, Failure> {
    let Some(cores) = cores else { return Ok(vec![first_allowed_core()?]) };
    if cores.is_empty() || cores.len() > CORES_MAX {
        return Err(Failure::invalid("cores", format_args!("of {} entries", cores.len()), format_args!("1 to {CORES_MAX} entries")));
    }
    let mut checked: Vec<u32> = Vec::with_capacity(cores.len());
    for core in cores {
        let core = core.within("cores", 0..=CORES_MAX as u64 - 1)? as u32;
        if checked.contains(&core) {
            return Err(Failure::invalid("cores", core, "each core once"));
        }
        checked.push(core);
    }
    Ok(checked)
}

fn first_allowed_core() -> Result<u32, Failure> {
    // SAFETY: an all-zero cpu_set_t is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is as large as said and good to be written to.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } != 0 {
        return Err(Failure::os("sched_getaffinity", &std::io::Error::last_os_error()));
    }
    // SAFETY: the numbers asked for are below CPU_SETSIZE, the set's size in bits.
    let first = (0..libc::CPU_SETSIZE as usize).find(|core| unsafe { libc::CPU_ISSET(*core, &set) });
    Ok(first.unwrap_or(0) as u32)
}

fn reactor_dict<'py>(py: Python<'py>, place: &Place, stats: Option<ReactorStats>, responsive: bool) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("lcore", place.handle.id().0)?;
    dict.set_item("tid", place.tid)?;
    dict.set_item("driver", place.driver)?;
    dict.set_item("responsive", responsive)?;
    let number = |pick: fn(&ReactorStats) -> u64| stats.as_ref().map_or(0, pick);
    dict.set_item("busy_ns", number(|stats| stats.busy_ns))?;
    dict.set_item("idle_ns", number(|stats| stats.idle_ns))?;
    dict.set_item("sleeps", number(|stats| stats.sleeps))?;
    dict.set_item("turns", number(|stats| stats.turns))?;
    dict.set_item("messages", number(|stats| stats.messages))?;
    let pollers = PyList::empty(py);
    for poller in stats.iter().flat_map(|stats| &stats.pollers) {
        let entry = PyDict::new(py);
        entry.set_item("name", &poller.name)?;
        entry.set_item("state", if poller.state == PollerState::Active { "active" } else { "armed" })?;
        entry.set_item("busy_ns", poller.busy_ns)?;
        entry.set_item("runs", poller.runs)?;
        entry.set_item("busy_runs", poller.busy_runs)?;
        pollers.append(entry)?;
    }
    dict.set_item("pollers", pollers)?;
    Ok(dict)
}
