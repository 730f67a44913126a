//! The bdev room: creating, listing, measuring, resizing and removing bdevs, and single I/Os on them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMemoryView};
use qpair_bdev::malloc::Malloc;
use qpair_bdev::measures::{self, Report};
use qpair_bdev::null::Null;
use qpair_bdev::stats::Reset;
use qpair_bdev::{BdevError, Device, FileBdev, Info, Op, Stats, lifecycle};
use qpair_memory::{Mapping, Pages, Region};
use uuid::Uuid;

use crate::core::{Core, lock};
use crate::engine::Engine;
use crate::events::{Draft, Token};
use crate::io::{self, IO_BYTES_MAX, Request};
use crate::values::{Failure, Number, Value};

/// Operations by the names that Python gives them.
pub const OPS: [(&str, Op); 9] = [
    ("read", Op::Read),
    ("write", Op::Write),
    ("flush", Op::Flush),
    ("unmap", Op::Unmap),
    ("write_zeroes", Op::WriteZeroes),
    ("reset", Op::Reset),
    ("compare", Op::Compare),
    ("compare_and_write", Op::CompareAndWrite),
    ("copy", Op::Copy),
];

/// What else a bdev may know, by SPDK's names.
const OTHERS: [(&str, Op); 7] = [
    ("zcopy", Op::ZcopyStart),
    ("zone_append", Op::ZoneAppend),
    ("zone_management", Op::ZoneManagement),
    ("get_zone_info", Op::ZoneManagement),
    ("nvme_io", Op::NvmeIo),
    ("nvme_admin", Op::NvmeAdmin),
    ("write_uncorrectable", Op::WriteUncorrectable),
];

pub fn parse_uuid(uuid: Option<&str>) -> Result<Option<Uuid>, Failure> {
    let parse = |text: &str| Uuid::parse_str(text).map_err(|_| Failure::invalid("uuid", text, "32 hexadecimal digits, as 8-4-4-4-12"));
    uuid.map(parse).transpose()
}

/// Makes a device known; the reply is immediate, because no reactor needs to hear of it yet.
pub fn register(core: &Core, draft: Draft, device: Arc<dyn Device>) -> Result<u64, Failure> {
    core.registry.register(device)?;
    Ok(draft.done(Value::Nothing))
}

#[pymethods]
impl Engine {
    #[pyo3(
        signature = (name, *, num_blocks, block_size, uuid=None, physical_block_size=Number::of(0)),
        text_signature = "($self, name, *, num_blocks, block_size, uuid=None, physical_block_size=0)"
    )]
    fn bdev_null_create(
        &self,
        name: &str,
        num_blocks: Number,
        block_size: Number,
        uuid: Option<&str>,
        physical_block_size: Number,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let physical = physical_block_size.u32("physical_block_size")?;
        let null = Null::new(name, block_size.u32("block_size")?, num_blocks.u64("num_blocks")?, parse_uuid(uuid)?, physical);
        Ok(register(core, draft, Arc::new(null))?)
    }

    #[pyo3(
        signature = (name, *, num_blocks, block_size, uuid=None, physical_block_size=Number::of(0), optimal_io_boundary=Number::of(0)),
        text_signature = "($self, name, *, num_blocks, block_size, uuid=None, physical_block_size=0, optimal_io_boundary=0)"
    )]
    fn bdev_malloc_create(
        &self,
        name: &str,
        num_blocks: Number,
        block_size: Number,
        uuid: Option<&str>,
        physical_block_size: Number,
        optimal_io_boundary: Number,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let malloc = Malloc::new(
            name,
            block_size.u32("block_size")?,
            num_blocks.u64("num_blocks")?,
            parse_uuid(uuid)?,
            physical_block_size.u32("physical_block_size")?,
            optimal_io_boundary.u32("optimal_io_boundary")?,
        );
        Ok(register(core, draft, Arc::new(malloc.map_err(Failure::from)?))?)
    }

    #[pyo3(
        signature = (name, path, *, module, block_size=Number::of(0), readonly=false, fallocate=false, uuid=None),
        text_signature = "($self, name, path, *, module, block_size=0, readonly=False, fallocate=False, uuid=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_file_create(
        &self,
        name: String,
        path: PathBuf,
        module: String,
        block_size: Number,
        readonly: bool,
        fallocate: bool,
        uuid: Option<&str>,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let (block_size, uuid) = (block_size.u32("block_size")?, parse_uuid(uuid)?);
        if core.registry.list(Some(&name)).is_ok() {
            return Err(Failure::from(BdevError::Exists(name)).into());
        }
        let (number, token, registry) = (draft.number(), draft.commit(), core.registry.clone());
        // Opening a file may wait for a disk or a server: neither Python nor a reactor does that.
        let open = move || {
            let device = FileBdev::open(&name, &path, &module, block_size, readonly, fallocate, uuid);
            let outcome = device.and_then(|device| registry.register(Arc::new(device)));
            token.answer(outcome.map(|_| Value::Nothing));
        };
        let helper = std::thread::Builder::new().name("qpair_open".to_owned()).spawn(open);
        helper.map_err(|error| Failure::os("a thread to open the file", &error))?;
        Ok(number)
    }

    #[pyo3(signature = (name, *, deadline_ms=Number::of(10_000)), text_signature = "($self, name, *, deadline_ms=10000)")]
    fn bdev_unregister(&self, name: &str, deadline_ms: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let deadline_ns = deadline_ms.deadline_ns("deadline_ms")?;
        let (number, token) = (draft.number(), draft.commit());
        lifecycle::unregister(&core.registry, name, deadline_ns, token.done());
        Ok(number)
    }

    fn bdev_resize(&self, name: &str, num_blocks: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let num_blocks = num_blocks.u64("num_blocks")?;
        let (number, token) = (draft.number(), draft.commit());
        lifecycle::resize(&core.registry, name, num_blocks, token.done());
        Ok(number)
    }

    #[pyo3(signature = (name=None))]
    fn bdev_info<'py>(&self, py: Python<'py>, name: Option<&str>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let found = self.running()?.registry.list(name).map_err(Failure::from)?;
        let dicts = found.iter().map(|listing| {
            let dict = info_dict(py, &listing.info)?;
            dict.set_item("claimed_by", &listing.claimed_by)?;
            dict.set_item("removing", listing.removing)?;
            dict.set_item("open_count", listing.open_count)?;
            Ok(dict)
        });
        dicts.collect()
    }

    #[pyo3(signature = (name=None, *, reset=false))]
    fn bdev_iostat(&self, name: Option<&str>, reset: bool) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let names = core.registry.list(name).map_err(Failure::from)?.into_iter().map(|listing| listing.info.name.clone());
        let (number, token) = (draft.number(), draft.commit());
        gather_statistics(core, names.collect(), name.is_some(), reset, token);
        Ok(number)
    }

    fn bdev_claim(&self, name: &str, owner: &str) -> PyResult<()> {
        Ok(self.running()?.registry.claim(name, owner).map_err(Failure::from)?)
    }

    fn bdev_release(&self, name: &str, owner: &str) -> PyResult<()> {
        Ok(self.running()?.registry.release(name, owner).map_err(Failure::from)?)
    }

    #[pyo3(signature = (name, *, write=true))]
    fn bdev_open(&self, name: &str, write: bool) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        // The process's listener tells Python of changes; this descriptor needs no ear of its own.
        let descriptor = core.registry.open(name, write, |_| {}).map_err(Failure::from)?;
        let number = draft.number();
        lock(&core.descriptors).insert(number, Arc::new(descriptor));
        Ok(draft.done(Value::Integer(number)))
    }

    fn bdev_close(&self, descriptor: Number) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let number = descriptor.u64("descriptor")?;
        let closed = lock(&core.descriptors).remove(&number).ok_or_else(|| not_open(number))?;
        let (answer, token) = (draft.number(), draft.commit());
        core.home().call(move |reactor| {
            // Here, so that requests sent before the close find it open.
            drop(closed);
            io::close(reactor, number, Some(token));
        });
        Ok(answer)
    }

    #[pyo3(
        signature = (descriptor, op, offset_blocks=Number::of(0), num_blocks=Number::of(0), data=None, *, source_blocks=Number::of(0)),
        text_signature = "($self, descriptor, op, offset_blocks=0, num_blocks=0, data=None, *, source_blocks=0)"
    )]
    fn bdev_io(
        &self,
        descriptor: Number,
        op: &str,
        offset_blocks: Number,
        num_blocks: Number,
        data: Option<&Bound<'_, PyAny>>,
        source_blocks: Number,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let number = descriptor.u64("descriptor")?;
        let descriptor = lock(&core.descriptors).get(&number).cloned().ok_or_else(|| not_open(number))?;
        let op = parse_op(op)?;
        let info = descriptor.info().ok_or_else(|| Failure::from(BdevError::Removing(descriptor.name().to_owned())))?;
        if !matches!(op, Op::Read | Op::Compare | Op::Flush | Op::Reset) && !descriptor.can_write() {
            return Err(Failure::new(libc::EBADF, format!("descriptor {number} of bdev {} is open for reading only", info.name)).into());
        }
        let (lba, blocks) = (offset_blocks.u64("offset_blocks")?, num_blocks.u64("num_blocks")?);
        let ranged = op != Op::Flush && op != Op::Reset;
        if ranged {
            check_range(&info, lba, blocks)?;
        }
        let source_lba = source_blocks.u64("source_blocks")?;
        if op == Op::Copy {
            check_range(&info, source_lba, blocks)?;
        }
        let bounce = match op {
            Op::Read => Some(bounce(&info, blocks)?),
            Op::Write | Op::Compare => Some(filled_bounce(&info, blocks, data)?),
            Op::CompareAndWrite => Some(filled_bounce(&info, blocks.saturating_mul(2), data)?),
            _ => None,
        };
        let (answer, token) = (draft.number(), draft.commit());
        let request = Request { number, descriptor, op, lba, source_lba, action: 0, blocks, bounce, token };
        core.home().call(move |reactor| io::start(reactor, request));
        Ok(answer)
    }
}

pub fn not_open(number: u64) -> Failure {
    Failure::new(libc::EBADF, format!("descriptor {number} is not open"))
}

fn parse_op(name: &str) -> Result<Op, Failure> {
    let found = OPS.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, op)| *op)
        .ok_or_else(|| Failure::invalid("op", name, "read, write, flush, unmap, write_zeroes, reset, compare, compare_and_write or copy"))
}

/// Refused here for its text; the layer checks again, against the snapshot of its reactor.
pub fn check_range(info: &Info, lba: u64, blocks: u64) -> Result<(), Failure> {
    if blocks == 0 {
        return Err(Failure::invalid("num_blocks", 0, "at least 1"));
    }
    if lba >= info.num_blocks || blocks > info.num_blocks - lba {
        let limit = format_args!("bdev {} has {} blocks", info.name, info.num_blocks).to_string();
        return Err(Failure::invalid("offset_blocks + num_blocks", format_args!("{lba} + {blocks}"), limit));
    }
    Ok(())
}

fn bounce(info: &Info, blocks: u64) -> Result<(Arc<Mapping>, u32), Failure> {
    let limit = IO_BYTES_MAX / u64::from(info.block_size);
    if blocks > limit {
        return Err(Failure::invalid("num_blocks", blocks, format_args!("at most {limit} in one I/O ({IO_BYTES_MAX} bytes)")));
    }
    let bytes = blocks * u64::from(info.block_size);
    Ok((Mapping::anonymous(bytes as usize, Pages::Normal)?, bytes as u32))
}

pub fn filled_bounce(info: &Info, blocks: u64, data: Option<&Bound<'_, PyAny>>) -> PyResult<(Arc<Mapping>, u32)> {
    let Some(data) = data else { return Err(Failure::invalid("data", "None", "a write needs a buffer").into()) };
    let (mapping, length) = bounce(info, blocks)?;
    // Any item format: what is written is the bytes. Refused by memoryview if they do not lie in one piece.
    let bytes = PyMemoryView::from(data)?.call_method1("cast", ("B",))?;
    let buffer = PyBuffer::<u8>::get(&bytes)?;
    if buffer.len_bytes() != length as usize {
        let limit = format!("{length} bytes, num_blocks {blocks} of {}", info.block_size);
        return Err(Failure::invalid("data", format_args!("of {} bytes", buffer.len_bytes()), limit).into());
    }
    copy_in(&buffer, &mapping)?;
    Ok((mapping, length))
}

fn copy_in(buffer: &PyBuffer<u8>, mapping: &Arc<Mapping>) -> Result<(), Failure> {
    let into = Region::new(mapping.clone()).pointer(0, buffer.len_bytes() as u64)?;
    // SAFETY: `buf_ptr` is good for `len_bytes` bytes as long as `buffer` lives, contiguous because it is a cast
    // memoryview; `into` is good for as many, in a mapping that nobody else knows yet. Raw pointers throughout: another
    // Python thread without the GIL may write to the source, and the copy then has some mixture of its bytes.
    unsafe { std::ptr::copy_nonoverlapping(buffer.buf_ptr().cast::<u8>().cast_const(), into, buffer.len_bytes()) };
    Ok(())
}

fn info_dict<'py>(py: Python<'py>, info: &Info) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &info.name)?;
    dict.set_item("module", info.module)?;
    dict.set_item("uuid", info.uuid.to_string())?;
    dict.set_item("aliases", Vec::<String>::new())?;
    dict.set_item("block_size", info.block_size)?;
    dict.set_item("num_blocks", info.num_blocks)?;
    dict.set_item("write_unit", info.write_unit_blocks)?;
    dict.set_item("physical_block_size", info.physical_block_size)?;
    dict.set_item("optimal_io_boundary", info.optimal_io_boundary)?;
    dict.set_item("max_io_blocks", info.max_io_blocks)?;
    dict.set_item("max_segments", info.max_segments)?;
    dict.set_item("readonly", info.readonly)?;
    dict.set_item("write_cache", info.write_cache)?;
    dict.set_item("zoned", zoned_dict(py, info)?)?;
    dict.set_item("path", &info.path)?;
    dict.set_item("bases", &info.bases)?;
    dict.set_item("version", info.version)?;
    let supported = PyDict::new(py);
    for (name, op) in OPS.into_iter().chain(OTHERS) {
        supported.set_item(name, does(info, op))?;
    }
    supported.set_item("abort", true)?;
    dict.set_item("supported", supported)?;
    Ok(dict)
}

fn zoned_dict<'py>(py: Python<'py>, info: &Info) -> PyResult<Option<Bound<'py, PyDict>>> {
    let Some(zoned) = &info.zoned else { return Ok(None) };
    let dict = PyDict::new(py);
    dict.set_item("zone_size", zoned.zone_blocks)?;
    dict.set_item("zone_capacity", zoned.capacity_blocks)?;
    dict.set_item("max_open_zones", zoned.max_open_zones)?;
    dict.set_item("max_active_zones", zoned.max_active_zones)?;
    dict.set_item("optimal_open_zones", zoned.optimal_open_zones)?;
    dict.set_item("max_append_blocks", zoned.max_append_blocks)?;
    Ok(Some(dict))
}

/// What a user of the bdev can have: also what the layer does in the device's place.
fn does(info: &Info, op: Op) -> bool {
    let written = info.supported.has(Op::Write) && !info.readonly;
    match op {
        Op::Read => info.supported.has(op),
        Op::Flush | Op::Reset => true,
        Op::WriteZeroes => written || (info.supported.has(op) && !info.readonly),
        _ => info.supported.has(op) && !info.readonly,
    }
}

/// Several bdevs' counters, answered when the last has come.
struct Gathering {
    token: Option<Token>,
    missing: usize,
    found: Vec<(String, Stats)>,
}

fn gather_statistics(core: &Core, names: Vec<String>, strict: bool, reset: bool, token: Token) {
    let gathering = Arc::new(Mutex::new(Gathering { token: Some(token), missing: names.len() + 1, found: Vec::new() }));
    for name in names {
        let (gathering, told) = (gathering.clone(), name.clone());
        let reply = move |outcome: Result<Report, BdevError>| {
            let mut gathering = lock(&gathering);
            match outcome {
                Ok(report) => gathering.found.push((told, report.total)),
                Err(error) if strict => gathering.fail(error),
                // In a list of all, one that went meanwhile is simply not there.
                Err(_) => {}
            }
            gathering.one_less();
        };
        measures::statistics(&core.registry, &name, if reset { Reset::All } else { Reset::None }, Box::new(reply));
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

pub fn statistics_dict<'py>(py: Python<'py>, name: &str, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", name)?;
    for (kind, latency) in [("read", &stats.read), ("write", &stats.write), ("unmap", &stats.unmap), ("copy", &stats.copy)] {
        dict.set_item(format!("{kind}_ios"), latency.ios)?;
        dict.set_item(format!("{kind}_bytes"), latency.bytes)?;
        dict.set_item(format!("{kind}_ns"), latency.total_ns)?;
        dict.set_item(format!("max_{kind}_ns"), latency.max_ns)?;
        dict.set_item(format!("min_{kind}_ns"), latency.min_ns.unwrap_or(0))?;
    }
    dict.set_item("flush_ios", stats.flush_ios)?;
    dict.set_item("write_zeroes_ios", stats.write_zeroes_ios)?;
    dict.set_item("errors", stats.errors.total())?;
    Ok(dict)
}
