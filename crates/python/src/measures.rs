//! What is set and asked of any bdev while it works: limits and groups of them, histograms, counters, queue depth, time-outs.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use qpair_bdev::histogram::{GRANULARITY, Histogram, Shape};
use qpair_bdev::layer::watch::Late;
use qpair_bdev::limit::{KINDS, Rates};
use qpair_bdev::measures::{self, GroupInfo, Report};
use qpair_bdev::stats::{Latency, Reset, Stats};
use qpair_bdev::{BdevError, DeviceId, IoId, Layer, Op, OpSet, Registry};

use crate::bdev::{not_open, op_name};
use crate::core::{Core, lock};
use crate::engine::Engine;
use crate::events::{News, Token};
use crate::values::{Failure, Number, Value};

/// Operations by SPDK's names of I/O types, for histograms.
const IO_TYPES: [(&str, &[Op]); 17] = [
    ("read", &[Op::Read]),
    ("write", &[Op::Write]),
    ("unmap", &[Op::Unmap]),
    ("flush", &[Op::Flush]),
    ("reset", &[Op::Reset]),
    ("nvme_admin", &[Op::NvmeAdmin]),
    ("nvme_io", &[Op::NvmeIo]),
    ("write_zeroes", &[Op::WriteZeroes]),
    ("zcopy", &[Op::ZcopyStart, Op::ZcopyEnd]),
    ("zone_management", &[Op::ZoneManagement]),
    ("zone_append", &[Op::ZoneAppend]),
    ("compare", &[Op::Compare]),
    ("compare_and_write", &[Op::CompareAndWrite]),
    ("seek_hole", &[Op::SeekHole]),
    ("seek_data", &[Op::SeekData]),
    ("copy", &[Op::Copy]),
    ("write_uncorrectable", &[Op::WriteUncorrectable]),
];

type Given = (Option<Number>, Option<Number>, Option<Number>, Option<Number>);

const GIVEN: [&str; KINDS] = ["rw_ios_per_sec", "rw_bytes_per_sec", "r_bytes_per_sec", "w_bytes_per_sec"];

fn given(rates: Given) -> Result<[Option<u64>; KINDS], Failure> {
    let mut found = [None; KINDS];
    for ((place, number), field) in found.iter_mut().zip([rates.0, rates.1, rates.2, rates.3]).zip(GIVEN) {
        *place = number.map(|number| number.u64(field)).transpose()?;
    }
    Ok(found)
}

fn told(rates: &Rates) -> (u64, u64, u64, u64) {
    (rates.rw_ios, rates.rw_bytes, rates.r_bytes, rates.w_bytes)
}

#[pymethods]
impl Engine {
    fn bdev_set_limits(&self, name: &str, rates: Given) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let rates = given(rates)?;
        let (number, token) = (draft.number(), draft.commit());
        measures::set_limits(&core.registry, name, rates, token.done());
        Ok(number)
    }

    fn qos_group_create(&self, group: &str, rates: Given) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let [rw_ios, rw_bytes, r_bytes, w_bytes] = given(rates)?.map(Option::unwrap_or_default);
        measures::create_group(&core.registry, group, Rates { rw_ios, rw_bytes, r_bytes, w_bytes }).map_err(Failure::from)?;
        Ok(draft.done(Value::Nothing))
    }

    fn qos_group_set(&self, group: &str, rates: Given) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let rates = given(rates)?;
        let (number, token) = (draft.number(), draft.commit());
        measures::set_group(&core.registry, group, rates, token.done());
        Ok(number)
    }

    fn qos_group_delete(&self, group: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        measures::delete_group(&core.registry, group, token.done());
        Ok(number)
    }

    fn qos_group_add(&self, group: &str, bdev: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        measures::join_group(&core.registry, group, bdev, token.done());
        Ok(number)
    }

    fn qos_group_remove(&self, group: &str, bdev: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        measures::leave_group(&core.registry, group, bdev, token.done());
        Ok(number)
    }

    fn qos_groups<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let group = |info: &GroupInfo| {
            let dict = PyDict::new(py);
            dict.set_item("name", &info.name)?;
            dict.set_item("limits", told(&info.rates))?;
            dict.set_item("bdevs", &info.bdevs)?;
            Ok(dict)
        };
        measures::groups(&self.running()?.registry).iter().map(group).collect()
    }

    #[pyo3(
        signature = (name, enable, *, ops=None, granularity=Number::of(GRANULARITY), min_ns=Number::of(1000), max_ns=None),
        text_signature = "($self, name, enable, *, ops=None, granularity=7, min_ns=1000, max_ns=120000000000)"
    )]
    fn bdev_enable_histogram(
        &self,
        name: &str,
        enable: bool,
        ops: Option<Vec<String>>,
        granularity: Number,
        min_ns: Number,
        max_ns: Option<Number>,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let max_ns = max_ns.map_or(Ok(120_000_000_000), |max_ns| max_ns.u64("max_nsec"))?;
        let shape =
            Shape::new(granularity.u32("granularity")?, min_ns.u64("min_nsec")?, max_ns, operations(ops)?).map_err(Failure::from)?;
        let (number, token) = (draft.number(), draft.commit());
        measures::enable_histogram(&core.registry, name, enable.then_some(shape), token.done());
        Ok(number)
    }

    fn bdev_histogram(&self, name: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (number, token) = (draft.number(), draft.commit());
        measures::histogram(&core.registry, name, Box::new(move |outcome| token.answer(outcome.map(Box::new).map(Value::Histogram))));
        Ok(number)
    }

    fn bdev_set_sampling(&self, name: &str, period_us: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        measures::set_sampling(&core.registry, name, period_us.u64("period")?).map_err(Failure::from)?;
        Ok(draft.done(Value::Nothing))
    }

    fn bdev_set_overdue(&self, name: &str, timeout_ms: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        measures::set_timeout(&core.registry, name, timeout_ms.deadline_ns("timeout_ms")?).map_err(Failure::from)?;
        Ok(draft.done(Value::Nothing))
    }

    #[pyo3(signature = (name=None, *, reset="none"))]
    fn bdev_iostat(&self, name: Option<&str>, reset: &str) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let reset = match reset {
            "none" => Reset::None,
            "all" => Reset::All,
            "maxmin" => Reset::MaxMin,
            "error" => Reset::Errors,
            other => return Err(Failure::invalid("reset", other, "none, all, maxmin or error").into()),
        };
        let names = core.registry.list(name).map_err(Failure::from)?.into_iter().map(|listing| listing.info.name.clone());
        let (number, token) = (draft.number(), draft.commit());
        gather_statistics(core, names.collect(), name.is_some(), reset, token);
        Ok(number)
    }

    fn bdev_set_timeout(&self, descriptor: Number, timeout_ms: Number) -> PyResult<()> {
        let core = self.running()?;
        let number = descriptor.u64("descriptor")?;
        let descriptor = lock(&core.descriptors).get(&number).cloned().ok_or_else(|| not_open(number))?;
        let outbox = Arc::downgrade(&core.outbox);
        descriptor.set_timeout(timeout_ms.deadline_ns("timeout_ms")?, move |_, _, late| {
            if let Some(outbox) = outbox.upgrade() {
                outbox.push(News::Late { descriptor: number, late });
            }
        });
        Ok(())
    }

    fn bdev_abort(&self, descriptor: Number, io: Number) -> PyResult<()> {
        let core = self.running()?;
        let number = descriptor.u64("descriptor")?;
        if !lock(&core.descriptors).contains_key(&number) {
            return Err(not_open(number).into());
        }
        let id = IoId::unpack(io.u64("io")?);
        core.home().call(move |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            layer.abort(reactor, id);
            layer.settle(reactor);
        });
        Ok(())
    }
}

fn operations(names: Option<Vec<String>>) -> Result<OpSet, Failure> {
    let Some(names) = names else {
        let all: Vec<Op> = IO_TYPES.iter().flat_map(|(_, ops)| ops.iter().copied()).collect();
        return Ok(OpSet::of(&all));
    };
    let mut chosen = Vec::new();
    for name in names {
        let found = IO_TYPES.iter().find(|(known, _)| *known == name);
        chosen.extend_from_slice(found.ok_or_else(|| Failure::invalid("opc", &name, "an I/O type of SPDK's"))?.1);
    }
    Ok(OpSet::of(&chosen))
}

/// What bdev_info tells of a bdev's limits.
pub fn limits_into(dict: &Bound<'_, PyDict>, registry: &Registry, device: DeviceId) -> PyResult<()> {
    let (rates, group) = measures::limits(registry, device);
    dict.set_item("limits", told(&rates))?;
    dict.set_item("qos_group", group)
}

/// Several bdevs' counters, answered when the last has come.
struct Gathering {
    token: Option<Token>,
    missing: usize,
    found: Vec<(String, Report)>,
}

fn gather_statistics(core: &Core, names: Vec<String>, strict: bool, reset: Reset, token: Token) {
    let gathering = Arc::new(Mutex::new(Gathering { token: Some(token), missing: names.len() + 1, found: Vec::new() }));
    for name in names {
        let (gathering, told) = (gathering.clone(), name.clone());
        let reply = move |outcome: Result<Report, BdevError>| {
            let mut gathering = lock(&gathering);
            match outcome {
                Ok(report) => gathering.found.push((told, report)),
                Err(error) if strict => gathering.fail(error),
                // In a list of all, one that went meanwhile is simply not there.
                Err(_) => {}
            }
            gathering.one_less();
        };
        measures::statistics(&core.registry, &name, reset, Box::new(reply));
    }
    lock(&gathering).one_less();
}

impl Gathering {
    fn fail(&mut self, error: BdevError) {
        if let Some(token) = self.token.take() {
            token.answer(Err(error));
        }
    }

    fn one_less(&mut self) {
        self.missing -= 1;
        if self.missing == 0
            && let Some(token) = self.token.take()
        {
            let mut found = std::mem::take(&mut self.found);
            found.sort_by(|(a, _), (b, _)| a.cmp(b));
            token.answer(Ok::<_, Failure>(Value::Statistics(found)));
        }
    }
}

pub fn report_dict<'py>(py: Python<'py>, name: &str, report: &Report) -> PyResult<Bound<'py, PyDict>> {
    let dict = statistics_dict(py, &report.total)?;
    dict.set_item("name", name)?;
    let channels = report.channels.iter().map(|(reactor, stats)| {
        let dict = statistics_dict(py, stats)?;
        dict.set_item("lcore", reactor.0)?;
        Ok(dict)
    });
    dict.set_item("channels", channels.collect::<PyResult<Vec<_>>>()?)?;
    let sampled = report.sampled.map(|sampled| (sampled.period_us, sampled.depth, sampled.io_time_us, sampled.weighted_io_time_us));
    dict.set_item("sampled", sampled)?;
    Ok(dict)
}

fn statistics_dict<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let latency = |kind: &str, latency: &Latency| -> PyResult<()> {
        dict.set_item(format!("{kind}_ios"), latency.ios)?;
        dict.set_item(format!("{kind}_bytes"), latency.bytes)?;
        dict.set_item(format!("{kind}_ns"), latency.total_ns)?;
        dict.set_item(format!("max_{kind}_ns"), latency.max_ns)?;
        dict.set_item(format!("min_{kind}_ns"), if latency.min_ns == u64::MAX { 0 } else { latency.min_ns })
    };
    latency("read", &stats.read)?;
    latency("write", &stats.write)?;
    latency("unmap", &stats.unmap)?;
    latency("copy", &stats.copy)?;
    dict.set_item("flush_ios", stats.flush_ios)?;
    dict.set_item("write_zeroes_ios", stats.write_zeroes_ios)?;
    let errors = PyDict::new(py);
    let kinds = [
        ("aborted", stats.errors.aborted),
        ("miscompare", stats.errors.miscompare),
        ("nomem", stats.errors.nomem),
        ("failed", stats.errors.failed),
    ];
    for (kind, count) in kinds.into_iter().filter(|(_, count)| *count > 0) {
        errors.set_item(kind, count)?;
    }
    dict.set_item("errors", errors)?;
    Ok(dict)
}

pub fn histogram_dict<'py>(py: Python<'py>, histogram: &Histogram) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let (min_range, max_range) = histogram.shape().ranges();
    dict.set_item("granularity", histogram.shape().granularity())?;
    dict.set_item("min_range", min_range)?;
    dict.set_item("max_range", max_range)?;
    let bytes: Vec<u8> = histogram.buckets().iter().flat_map(|count| count.to_le_bytes()).collect();
    dict.set_item("buckets", PyBytes::new(py, &bytes))?;
    Ok(dict)
}

/// An I/O of a descriptor takes longer than its time-out. It is still under way.
#[pyclass(frozen, get_all, module = "qpair._engine")]
pub struct IoTimeout {
    descriptor: u64,
    io: u64,
    op: &'static str,
    offset_blocks: u64,
    num_blocks: u64,
    age_ns: u64,
}

impl IoTimeout {
    pub fn of(descriptor: u64, late: &Late) -> Self {
        let (offset_blocks, num_blocks) = (late.lba, late.blocks);
        Self { descriptor, io: late.id.pack(), op: op_name(late.op), offset_blocks, num_blocks, age_ns: late.age_ns }
    }
}
