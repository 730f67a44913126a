//! The bdev room: creating, listing, measuring, resizing and removing bdevs, and single I/Os on them.

use std::os::fd::{IntoRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use qpair_bdev::malloc::Malloc;
use qpair_bdev::null::Null;
use qpair_bdev::{BdevError, Device, FileBdev, Info, IoFlags, Op, lifecycle};
use uuid::Uuid;

use crate::bounce::Bounce;
use crate::core::{Core, lock};
use crate::engine::Engine;
use crate::events::Draft;
use crate::io::{self, Request};
use crate::measures;
use crate::values::{Failure, Number, Value};
use crate::vhost::duplicate;

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
        signature = (name, *, num_blocks, block_size, uuid=None, physical_block_size=Number::of(0), metadata_bytes=Number::of(0)),
        text_signature = "($self, name, *, num_blocks, block_size, uuid=None, physical_block_size=0, metadata_bytes=0)"
    )]
    fn bdev_null_create(
        &self,
        name: &str,
        num_blocks: Number,
        block_size: Number,
        uuid: Option<&str>,
        physical_block_size: Number,
        metadata_bytes: Number,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let physical = physical_block_size.u32("physical_block_size")?;
        let null = Null::new(name, block_size.u32("block_size")?, num_blocks.u64("num_blocks")?, parse_uuid(uuid)?, physical)
            .with_metadata(metadata_bytes.u32("metadata_bytes")?);
        Ok(register(core, draft, Arc::new(null))?)
    }

    #[pyo3(
        signature = (
            name, *, num_blocks, block_size, uuid=None, physical_block_size=Number::of(0), optimal_io_boundary=Number::of(0),
            metadata_bytes=Number::of(0), contents=None
        ),
        text_signature = "($self, name, *, num_blocks, block_size, uuid=None, physical_block_size=0, optimal_io_boundary=0, metadata_bytes=0, contents=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_malloc_create(
        &self,
        name: &str,
        num_blocks: Number,
        block_size: Number,
        uuid: Option<&str>,
        physical_block_size: Number,
        optimal_io_boundary: Number,
        metadata_bytes: Number,
        contents: Option<Number>,
    ) -> PyResult<u64> {
        let (core, draft) = self.begin()?;
        let contents = contents.map(|fd| duplicate("contents", fd)).transpose()?;
        let malloc = Malloc::new(
            name,
            block_size.u32("block_size")?,
            num_blocks.u64("num_blocks")?,
            parse_uuid(uuid)?,
            physical_block_size.u32("physical_block_size")?,
            optimal_io_boundary.u32("optimal_io_boundary")?,
        );
        let metadata_bytes = metadata_bytes.u32("metadata_bytes")?;
        let malloc = malloc.and_then(|malloc| malloc.with_metadata(metadata_bytes));
        let malloc = malloc.and_then(|malloc| match contents {
            Some(contents) => malloc.with_contents(contents),
            None => Ok(malloc),
        });
        let malloc = Arc::new(malloc.map_err(Failure::from)?);
        let answer = register(core, draft, malloc.clone())?;
        lock(&core.mallocs).insert(name.to_owned(), Arc::downgrade(&malloc));
        Ok(answer)
    }

    /// Copies, which may take a while: call it from a thread of its own.
    fn bdev_malloc_contents(&self, py: Python<'_>, name: &str) -> PyResult<RawFd> {
        let core = self.running()?;
        let malloc = lock(&core.mallocs).get(name).and_then(Weak::upgrade);
        let malloc = malloc.ok_or_else(|| Failure::from(BdevError::NoSuchBdev(name.to_owned())))?;
        let contents = py.detach(|| malloc.contents()).map_err(Failure::from)?;
        Ok(contents.into_raw_fd())
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
        let registry = &self.running()?.registry;
        let found = registry.list(name).map_err(Failure::from)?;
        let dicts = found.iter().map(|listing| {
            let dict = info_dict(py, &listing.info)?;
            measures::limits_into(&dict, registry, listing.id)?;
            dict.set_item("claimed_by", &listing.claimed_by)?;
            dict.set_item("removing", listing.removing)?;
            dict.set_item("open_count", listing.open_count)?;
            Ok(dict)
        });
        dicts.collect()
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
        signature = (
            descriptor, op, offset_blocks=Number::of(0), num_blocks=Number::of(0), data=None, *,
            source_blocks=Number::of(0), metadata=None, fua=false, drain=false, view=false
        ),
        text_signature = "($self, descriptor, op, offset_blocks=0, num_blocks=0, data=None, *, source_blocks=0, metadata=None, fua=False, drain=False, view=False)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python contract")]
    fn bdev_io(
        &self,
        descriptor: Number,
        op: &str,
        offset_blocks: Number,
        num_blocks: Number,
        data: Option<&Bound<'_, PyAny>>,
        source_blocks: Number,
        metadata: Option<&Bound<'_, PyAny>>,
        fua: bool,
        drain: bool,
        view: bool,
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
        let bounce = Bounce::new(&core.pool, &info, op, blocks, data, metadata)?.map(|bounce| Bounce { view, ..bounce });
        let mut flags = IoFlags::empty();
        flags.set(IoFlags::FUA, fua);
        flags.set(IoFlags::DRAIN, drain);
        let (answer, token) = (draft.number(), draft.commit());
        let request = Request { number, descriptor, op, lba, source_lba, action: 0, blocks, flags, bounce, token };
        core.home().call(move |reactor| io::start(reactor, request));
        Ok(answer)
    }
}

pub fn not_open(number: u64) -> Failure {
    Failure::new(libc::EBADF, format!("descriptor {number} is not open"))
}

/// An operation's name, as Python has it.
pub fn op_name(op: Op) -> &'static str {
    OPS.iter().chain(&OTHERS).find(|(_, known)| *known == op).map_or("other", |(name, _)| *name)
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

fn info_dict<'py>(py: Python<'py>, info: &Info) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &info.name)?;
    dict.set_item("module", info.module)?;
    dict.set_item("uuid", info.uuid.to_string())?;
    dict.set_item("aliases", Vec::<String>::new())?;
    dict.set_item("block_size", info.block_size)?;
    dict.set_item("num_blocks", info.num_blocks)?;
    dict.set_item("write_unit", info.write_unit_blocks)?;
    dict.set_item("metadata_bytes", info.metadata_bytes)?;
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
