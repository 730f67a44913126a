//! The perf room: runs of the load generator, by token.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use qpair_bdev::BdevError;
use qpair_perf::{Job, Report, Spec};

use crate::core::lock;
use crate::engine::Engine;
use crate::values::{Failure, Number, Value};

/// The runs under way, by token. A run is entered before it starts and leaves when its report is there, so it is
/// never found here after its end, however fast that comes.
#[derive(Default)]
pub struct Runs {
    jobs: Mutex<HashMap<u64, Option<Arc<Job>>>>,
    ended: Condvar,
}

impl Runs {
    fn find(&self, token: u64) -> Result<Arc<Job>, Failure> {
        let found = lock(&self.jobs).get(&token).cloned().flatten();
        found.ok_or_else(|| Failure::new(libc::ENOENT, format!("run {token} is not under way")))
    }

    fn leave(&self, token: u64) {
        lock(&self.jobs).remove(&token);
        self.ended.notify_all();
    }

    /// Tells every run to end, and waits for that. False: some had not by then.
    pub fn stop(&self, until: Instant) -> bool {
        let mut jobs = lock(&self.jobs);
        jobs.values().flatten().for_each(|job| job.stop());
        while !jobs.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return false;
            }
            jobs = self.ended.wait_timeout(jobs, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (
            bdev, *, pattern="randread", read_percent=Number::of(100), io_bytes=Number::of(4096), depth=Number::of(128), reactors=None,
            duration_ms=Number::of(0), max_ios=Number::of(0), verify=false, seed=Number::of(1), offset_blocks=Number::of(0), length_blocks=Number::of(0)
        ),
        text_signature = "($self, bdev, *, pattern='randread', read_percent=100, io_bytes=4096, depth=128, reactors=(), duration_ms=0, \
                          max_ios=0, verify=False, seed=1, offset_blocks=0, length_blocks=0)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn perf_start(
        &self,
        bdev: String,
        pattern: &str,
        read_percent: Number,
        io_bytes: Number,
        depth: Number,
        reactors: Option<Vec<Number>>,
        duration_ms: Number,
        max_ios: Number,
        verify: bool,
        seed: Number,
        offset_blocks: Number,
        length_blocks: Number,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let spec = Spec {
            bdev,
            pattern: pattern.parse().map_err(Failure::from)?,
            read_percent: read_percent.within("read_percent", 0..=100)? as u8,
            io_bytes: io_bytes.u32("io_bytes")?,
            depth: depth.u32("depth")?,
            duration_ms: duration_ms.u64("duration_ms")?,
            max_ios: max_ios.u64("max_ios")?,
            verify,
            seed: seed.u64("seed")?,
            offset_blocks: offset_blocks.u64("offset_blocks")?,
            length_blocks: length_blocks.u64("length_blocks")?,
        };
        let reactors = core.pick_reactors(reactors.unwrap_or_default())?;
        let (number, runs) = (draft.number(), core.runs.clone());
        lock(&runs.jobs).insert(number, None);
        let (ended, outbox) = (runs.clone(), core.outbox.clone());
        let done = move |outcome: Result<Report, BdevError>| {
            ended.leave(number);
            outbox.answer(number, outcome.map(|report| Value::Perf(Box::new(report))).map_err(Failure::from));
        };
        match qpair_perf::start(&core.registry, &reactors, spec, Box::new(done)) {
            Ok(job) => {
                if let Some(place) = lock(&runs.jobs).get_mut(&number) {
                    *place = Some(job);
                }
                Ok(draft.keep())
            }
            Err(error) => {
                runs.leave(number);
                Err(Failure::from(error).into())
            }
        }
    }

    fn perf_snapshot<'py>(&self, py: Python<'py>, token: Number) -> PyResult<Bound<'py, PyDict>> {
        let snapshot = self.running()?.runs.find(token.u64("token")?)?.snapshot();
        let dict = PyDict::new(py);
        dict.set_item("ios", snapshot.ios)?;
        dict.set_item("bytes", snapshot.bytes)?;
        dict.set_item("errors", snapshot.errors)?;
        dict.set_item("elapsed_ns", snapshot.elapsed_ns)?;
        Ok(dict)
    }

    fn perf_stop(&self, token: Number) -> PyResult<()> {
        self.running()?.runs.find(token.u64("token")?)?.stop();
        Ok(())
    }
}

pub fn report_dict<'py>(py: Python<'py>, report: &Report) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("ios", report.ios)?;
    dict.set_item("reads", report.reads)?;
    dict.set_item("writes", report.writes)?;
    dict.set_item("bytes", report.bytes)?;
    dict.set_item("errors", report.errors)?;
    dict.set_item("verify_errors", report.verify_errors)?;
    dict.set_item("first_mismatch", &report.first_mismatch)?;
    dict.set_item("removed", report.removed)?;
    dict.set_item("elapsed_ns", report.elapsed_ns)?;
    dict.set_item("mean_ns", report.mean_ns)?;
    dict.set_item("min_ns", report.min_ns)?;
    dict.set_item("max_ns", report.max_ns)?;
    dict.set_item("max_gap_ns", report.max_gap_ns)?;
    let percentiles = PyDict::new(py);
    for (name, percent) in [("50", 50.0), ("99", 99.0), ("99.9", 99.9), ("99.99", 99.99)] {
        percentiles.set_item(name, report.percentile_ns(percent))?;
    }
    dict.set_item("percentiles", percentiles)?;
    let shares = report.per_reactor.iter().map(|share| {
        let entry = PyDict::new(py);
        entry.set_item("lcore", share.lcore)?;
        entry.set_item("ios", share.ios)?;
        Ok(entry)
    });
    dict.set_item("per_reactor", shares.collect::<PyResult<Vec<_>>>()?)?;
    dict.set_item("histogram", PyBytes::new(py, &report.histogram_bytes()))?;
    Ok(dict)
}
