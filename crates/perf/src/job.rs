//! A run: its start on each reactor, its counters, its end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use qpair_bdev::{Descriptor, Notice, Registry};
use qpair_reactor::Handle;

use crate::report::Tally;
use crate::spec::Plan;
use crate::{BdevError, Report, Spec, worker};

/// Where the outcome goes, from whatever thread the run ends on.
pub type Done = Box<dyn FnOnce(Result<Report, BdevError>) + Send>;

/// A worker's figures for others to read, on cache lines of its own.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters {
    pub(crate) ios: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) elapsed_ns: AtomicU64,
}

/// What ends a run early.
#[derive(Default)]
pub(crate) struct Signals {
    pub(crate) stop: AtomicBool,
    pub(crate) removed: AtomicBool,
}

impl Signals {
    #[inline]
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// A run under way.
pub struct Job {
    signals: Arc<Signals>,
    counters: Arc<[Counters]>,
}

/// A run's figures so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// I/Os that succeeded.
    pub ios: u64,
    /// Their bytes.
    pub bytes: u64,
    /// I/Os that failed.
    pub errors: u64,
    /// As of the last completion.
    pub elapsed_ns: u64,
}

impl Job {
    /// Figures so far, as of each reactor's last batch. Takes no lock.
    pub fn snapshot(&self) -> Snapshot {
        let sum = |field: fn(&Counters) -> &AtomicU64| self.counters.iter().map(|counters| field(counters).load(Ordering::Relaxed)).sum();
        Snapshot {
            ios: sum(|counters| &counters.ios),
            bytes: sum(|counters| &counters.bytes),
            errors: sum(|counters| &counters.errors),
            elapsed_ns: self.counters.iter().map(|counters| counters.elapsed_ns.load(Ordering::Relaxed)).max().unwrap_or(0),
        }
    }

    /// Submits no more; the report comes when what is in flight is back.
    pub fn stop(&self) {
        self.signals.stop.store(true, Ordering::Relaxed);
    }
}

/// Starts a run on `reactors`. `done` is called exactly once unless this returns an error.
pub fn start(registry: &Arc<Registry>, reactors: &[Handle], spec: Spec, done: Done) -> Result<Arc<Job>, BdevError> {
    let signals = Arc::new(Signals::default());
    let heard = signals.clone();
    let listener = move |notice: &Notice| {
        if matches!(notice, Notice::Removing(_)) {
            heard.removed.store(true, Ordering::Relaxed);
            heard.stop.store(true, Ordering::Relaxed);
        }
    };
    let descriptor = registry.open(&spec.bdev, spec.writes(), listener)?;
    let info = descriptor.info().ok_or_else(|| BdevError::Removing(spec.bdev.clone()))?;
    let plans = Plan::make(&spec, &info, reactors.len())?;
    let counters: Arc<[Counters]> = plans.iter().map(|_| Counters::default()).collect();
    let collector = Arc::new(Collector {
        signals: signals.clone(),
        descriptor: Mutex::new(Some(Arc::new(descriptor))),
        outcomes: Mutex::new(Outcomes { tallies: plans.iter().map(|_| None).collect(), error: None, left: plans.len(), done: Some(done) }),
    });
    for (index, (handle, plan)) in reactors.iter().zip(plans).enumerate() {
        let ticket = Ticket { collector: collector.clone(), index, handed_in: false };
        let (signals, counters) = (signals.clone(), counters.clone());
        handle.call(move |reactor| worker::begin(reactor, plan, ticket, signals, counters));
    }
    Ok(Arc::new(Job { signals, counters }))
}

/// Runs on all the registry's reactors and waits for the end. Not for a reactor's own thread, which would wait for itself.
pub fn run(registry: &Arc<Registry>, spec: Spec) -> Result<Report, BdevError> {
    let (send, receive) = mpsc::channel();
    let done = Box::new(move |outcome| {
        // Who waits is a few lines below.
        let _ = send.send(outcome);
    });
    start(registry, registry.reactors(), spec, done)?;
    receive.recv().unwrap_or_else(|_| unreachable!("`done` is called exactly once"))
}

struct Outcomes {
    tallies: Vec<Option<Tally>>,
    error: Option<BdevError>,
    left: usize,
    done: Option<Done>,
}

struct Collector {
    signals: Arc<Signals>,
    descriptor: Mutex<Option<Arc<Descriptor>>>,
    outcomes: Mutex<Outcomes>,
}

impl Collector {
    fn hand_in(&self, index: usize, outcome: Result<Tally, BdevError>) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(tally) => outcomes.tallies[index] = Some(tally),
            Err(error) => {
                // The others would measure something else than what was asked for.
                self.signals.stop.store(true, Ordering::Relaxed);
                outcomes.error.get_or_insert(error);
            }
        }
        outcomes.left -= 1;
        if outcomes.left > 0 {
            return;
        }
        let (done, error) = (outcomes.done.take(), outcomes.error.take());
        let tallies: Vec<Tally> = outcomes.tallies.drain(..).flatten().collect();
        drop(outcomes);
        drop(self.descriptor.lock().unwrap_or_else(PoisonError::into_inner).take());
        let removed = self.signals.removed.load(Ordering::Relaxed);
        let result = match error {
            Some(error) if !removed => Err(error),
            _ => Ok(Report::sum(&tallies, removed)),
        };
        if let Some(done) = done {
            done(result);
        }
    }
}

/// One worker's obligation to hand in its outcome. Dropped without, because its reactor is gone: the run was cancelled.
pub(crate) struct Ticket {
    collector: Arc<Collector>,
    index: usize,
    handed_in: bool,
}

impl Ticket {
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn descriptor(&self) -> Option<Arc<Descriptor>> {
        self.collector.descriptor.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn hand_in(mut self, outcome: Result<Tally, BdevError>) {
        self.handed_in = true;
        self.collector.hand_in(self.index, outcome);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.handed_in {
            let source = std::io::Error::from_raw_os_error(libc::ECANCELED);
            self.collector.hand_in(self.index, Err(BdevError::Os { what: "perf: a reactor ended under the run".to_owned(), source }));
        }
    }
}
