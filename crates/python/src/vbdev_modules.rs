//! Parts, delay, error and zone_block for Python: constructors, and what can be changed of a delay or error bdev while it is used.
//!
//! How it works. Registering needs no reactor, so a delay or error bdev is there when its constructor returns, with the object that controls it. That object
//! outlives the bdev without effect.

use std::sync::Arc;

use pyo3::prelude::*;
use qpair_bdev::{BdevError, Device, DeviceId, IoFlags, Op, Registry, Status, ZONE_DESCRIPTOR_BYTES, ZoneAction, lifecycle};
use qpair_vbdev::delay::{Delay, Latencies, Latency};
use qpair_vbdev::error::{ErrorBdev, Errors, TARGETS, What};
use qpair_vbdev::part::{Part, Range};
use qpair_vbdev::zone_block::ZoneBlock;

use crate::bdev::{check_range, not_open, parse_uuid, register};
use crate::bounce::Bounce;
use crate::core::lock;
use crate::engine::{Engine, not_forked};
use crate::events::{Outbox, Token};
use crate::io::{self, Request};
use crate::values::{Failure, Number, Value};

/// Parts of one bdev.
const PARTS_MAX: usize = 1 << 16;
/// How long a part that cannot stay is waited for: nobody has seen it yet.
const ROLL_BACK_NS: u64 = 0;

const LATENCIES: [(&str, Latency); 4] = [
    ("avg_read", Latency::AverageRead),
    ("p99_read", Latency::P99Read),
    ("avg_write", Latency::AverageWrite),
    ("p99_write", Latency::P99Write),
];

const ACTIONS: [(&str, ZoneAction); 5] = [
    ("report", ZoneAction::Report),
    ("open", ZoneAction::Open),
    ("close", ZoneAction::Close),
    ("finish", ZoneAction::Finish),
    ("reset", ZoneAction::Reset),
];
/// Zones in one report.
const REPORT_MAX: u64 = 1 << 16;

type PartArguments = (String, Number, Number, Option<String>);

fn range((name, offset_blocks, num_blocks, uuid): PartArguments) -> Result<Range, Failure> {
    let (offset_blocks, num_blocks) = (offset_blocks.u64("offset_blocks")?, num_blocks.u64("num_blocks")?);
    Ok(Range { name, offset_blocks, num_blocks, uuid: parse_uuid(uuid.as_deref())? })
}

/// Says why there are no parts, when those that were there are gone.
struct Refusal {
    token: Option<Token>,
    failure: Failure,
}

impl Drop for Refusal {
    fn drop(&mut self) {
        if let Some(token) = self.token.take() {
            token.answer(Err::<Value, _>(self.failure.clone()));
        }
    }
}

/// All of them, or none.
fn register_parts(registry: &Arc<Registry>, parts: Vec<Part>, token: Token) {
    let mut registered: Vec<String> = Vec::with_capacity(parts.len());
    let mut parts = parts.into_iter();
    while let Some(part) = parts.next() {
        let name = part.info().name;
        if let Err(error) = registry.register(Arc::new(part)) {
            // Those that were not tried hold the base too.
            drop(parts);
            let refusal = Arc::new(Refusal { token: Some(token), failure: error.into() });
            for name in registered {
                let waits = refusal.clone();
                lifecycle::unregister(registry, &name, ROLL_BACK_NS, Box::new(move |_| drop(waits)));
            }
            return;
        }
        registered.push(name);
    }
    token.answer(Ok::<_, Failure>(Value::Nothing));
}

#[pymethods]
impl Engine {
    fn bdev_parts_create(&self, base: &str, module: &str, parts: Vec<PartArguments>) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let module = match module {
            "split" => "split",
            "gpt" => "gpt",
            other => return Err(Failure::invalid("module", other, "split or gpt").into()),
        };
        if parts.is_empty() || parts.len() > PARTS_MAX {
            return Err(Failure::invalid("parts", format_args!("of {} entries", parts.len()), format_args!("1 to {PARTS_MAX}")).into());
        }
        let ranges = parts.into_iter().map(range).collect::<Result<Vec<_>, _>>()?;
        let parts = Part::cut(&core.registry, base, module, &ranges).map_err(Failure::from)?;
        let (number, token) = (draft.number(), draft.commit());
        register_parts(&core.registry, parts, token);
        Ok(number)
    }

    #[pyo3(
        signature = (name, base, *, avg_read, p99_read, avg_write, p99_write, uuid=None),
        text_signature = "($self, name, base, *, avg_read, p99_read, avg_write, p99_write, uuid=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_delay_create(
        &self,
        name: &str,
        base: &str,
        avg_read: Number,
        p99_read: Number,
        avg_write: Number,
        p99_write: Number,
        uuid: Option<&str>,
    ) -> PyResult<DelayControl> {
        let core = self.running()?;
        let micros = [avg_read.u64("avg_read")?, p99_read.u64("p99_read")?, avg_write.u64("avg_write")?, p99_write.u64("p99_write")?];
        let latencies = Latencies::new(micros);
        let delay = Delay::new(&core.registry, name, base, parse_uuid(uuid)?, latencies.clone()).map_err(Failure::from)?;
        core.registry.register(Arc::new(delay)).map_err(Failure::from)?;
        Ok(DelayControl { latencies })
    }

    #[pyo3(signature = (name, base, *, uuid=None))]
    fn bdev_error_create(&self, name: &str, base: &str, uuid: Option<&str>) -> PyResult<ErrorControl> {
        let core = self.running()?;
        let errors = Errors::new();
        let device = ErrorBdev::new(&core.registry, name, base, parse_uuid(uuid)?, errors.clone()).map_err(Failure::from)?;
        let device = core.registry.register(Arc::new(device)).map_err(Failure::from)?;
        Ok(ErrorControl { pid: std::process::id(), errors, device, registry: core.registry.clone(), outbox: core.outbox.clone() })
    }

    #[pyo3(
        signature = (name, base, *, zone_capacity, optimal_open_zones, uuid=None),
        text_signature = "($self, name, base, *, zone_capacity, optimal_open_zones, uuid=None)"
    )]
    fn bdev_zone_block_create(
        &self,
        name: &str,
        base: &str,
        zone_capacity: Number,
        optimal_open_zones: Number,
        uuid: Option<&str>,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (capacity, optimal) = (zone_capacity.u64("zone_capacity")?, optimal_open_zones.u32("optimal_open_zones")?);
        let device = ZoneBlock::new(&core.registry, name, base, parse_uuid(uuid)?, capacity, optimal).map_err(Failure::from)?;
        Ok(register(core, draft, Arc::new(device))?)
    }
}

#[pymethods]
impl Engine {
    #[pyo3(signature = (descriptor, action, offset_blocks, num_blocks, data=None))]
    fn bdev_zone_io(
        &self,
        descriptor: Number,
        action: &str,
        offset_blocks: Number,
        num_blocks: Number,
        data: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let number = descriptor.u64("descriptor")?;
        let descriptor = lock(&core.descriptors).get(&number).cloned().ok_or_else(|| not_open(number))?;
        let info = descriptor.info().ok_or_else(|| Failure::from(BdevError::Removing(descriptor.name().to_owned())))?;
        let zoned =
            info.zoned.ok_or_else(|| Failure::invalid("descriptor", number, format_args!("a zoned bdev; {} is none", info.name)))?;
        let (lba, blocks) = (offset_blocks.u64("offset_blocks")?, num_blocks.u64("num_blocks")?);
        check_range(&info, lba, blocks)?;
        let managed = ACTIONS.iter().find(|(name, _)| *name == action).map(|(_, action)| *action);
        if managed != Some(ZoneAction::Report) && !descriptor.can_write() {
            return Err(Failure::new(libc::EBADF, format!("descriptor {number} of bdev {} is open for reading only", info.name)).into());
        }
        let (op, bounce) = match managed {
            None if action == "append" => (Op::ZoneAppend, Bounce::new(&core.pool, &info, Op::ZoneAppend, blocks, data, None)?),
            None => return Err(Failure::invalid("action", action, "append, report, open, close, finish or reset").into()),
            Some(ZoneAction::Report) => {
                let count = blocks / zoned.zone_blocks;
                if count == 0 || count > REPORT_MAX {
                    return Err(
                        Failure::invalid("num_blocks", blocks, format_args!("1 to {REPORT_MAX} zones of {}", zoned.zone_blocks)).into()
                    );
                }
                let bytes = count * ZONE_DESCRIPTOR_BYTES;
                let memory = core.pool.zeroed(bytes as usize).map_err(Failure::from)?;
                (Op::ZoneManagement, Some(Bounce { memory, data: bytes as u32, metadata: None, view: false }))
            }
            Some(_) => (Op::ZoneManagement, None),
        };
        let (answer, token) = (draft.number(), draft.commit());
        let action = managed.map_or(0, |action| action as u8);
        let request = Request { number, descriptor, op, lba, source_lba: 0, action, blocks, flags: IoFlags::empty(), bounce, token };
        core.home().call(move |reactor| io::start(reactor, request));
        Ok(answer)
    }
}

/// The latencies of one delay bdev.
#[pyclass(frozen, module = "qpair._engine")]
pub struct DelayControl {
    latencies: Arc<Latencies>,
}

#[pymethods]
impl DelayControl {
    fn set(&self, latency: &str, micros: Number) -> PyResult<()> {
        let micros = micros.u64("latency_us")?;
        let found = LATENCIES.iter().find(|(name, _)| *name == latency);
        let limit = "avg_read, p99_read, avg_write or p99_write";
        self.latencies.set(found.ok_or_else(|| Failure::invalid("latency_type", latency, limit))?.1, micros);
        Ok(())
    }
}

/// What is injected into one error bdev.
#[pyclass(frozen, module = "qpair._engine")]
pub struct ErrorControl {
    pid: u32,
    errors: Arc<Errors>,
    device: DeviceId,
    registry: Arc<Registry>,
    outbox: Arc<Outbox>,
}

#[pymethods]
impl ErrorControl {
    #[pyo3(
        signature = (io_type, error_type, *, num=Number::of(1), queue_depth=Number::of(0), corrupt_offset=Number::of(0), corrupt_value=Number::of(0),
            nvme_sct=Number::of(0), nvme_sc=Number::of(0)),
        text_signature = "($self, io_type, error_type, *, num=1, queue_depth=0, corrupt_offset=0, corrupt_value=0, nvme_sct=0, nvme_sc=0)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn inject(
        &self,
        io_type: &str,
        error_type: &str,
        num: Number,
        queue_depth: Number,
        corrupt_offset: Number,
        corrupt_value: Number,
        nvme_sct: Number,
        nvme_sc: Number,
    ) -> PyResult<()> {
        let ops: &[Op] = match io_type {
            "read" => &[Op::Read],
            "write" => &[Op::Write],
            "unmap" => &[Op::Unmap],
            "flush" => &[Op::Flush],
            "all" => &TARGETS,
            other => return Err(Failure::invalid("io_type", other, "read, write, unmap, flush or all").into()),
        };
        let what = match error_type {
            "failure" => What::Fail(Status::INTERNAL_DEVICE_ERROR),
            "pending" => What::Keep,
            "nomem" => What::PutOff,
            "corrupt_data" => {
                let (offset, value) = (corrupt_offset.u64("corrupt_offset")?, corrupt_value.within("corrupt_value", 1..=255)?);
                What::Spoil { offset, value: value as u8 }
            }
            "nvme_failure" => {
                let (sct, sc) = (nvme_sct.within("nvme_sct", 0..=7)?, nvme_sc.within("nvme_sc", 0..=255)?);
                let status = Status::from_bits((sct << 8 | sc) as u16);
                if status == Status::SUCCESS {
                    return Err(Failure::invalid("nvme_sct, nvme_sc", "0, 0", "not success").into());
                }
                What::Fail(status)
            }
            other => return Err(Failure::invalid("error_type", other, "failure, pending, corrupt_data, nomem or nvme_failure").into()),
        };
        let (count, depth) = (num.u32("num")?, queue_depth.u64("queue_depth")?);
        Ok(self.errors.inject(ops, what, count, depth).map_err(Failure::from)?)
    }

    fn clear(&self) {
        self.errors.clear();
    }

    fn resume(&self) -> PyResult<u64> {
        not_forked(self.pid)?;
        let draft = self.outbox.draft()?;
        let (number, token) = (draft.number(), draft.commit());
        self.errors.resume();
        lifecycle::poke(&self.registry, self.device, token.done());
        Ok(number)
    }
}
