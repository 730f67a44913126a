//! A disk in a file or over a block device, by the reactor's I/O driver.
//!
//! How it works. All reactors share one open file. O_DIRECT is used where the file system takes it with this block size, and not
//! where it does not ([`probe`] finds out); memory that the kernel would refuse for it (guest buffers lie anywhere)
//! goes through aligned buffers that each channel reserves when it is opened. Short transfers are continued. Flush is
//! fdatasync on the one file, so it covers the writes of all channels; a write with FUA is durable by itself
//! (RWF_DSYNC). When the kernel failed to write something back, which of the writes that were already answered it was is
//! not known, and the kernel says it once: so every later flush of the device fails too, until it is made anew.
//!
//! The RPC names "uring" and "aio" are one implementation; [`Info::module`] tells which was asked for.
//!
//! Errors. An errno is mapped by [`Status::from_errno`](crate::Status::from_errno), but EIO is a read or write fault
//! of the medium. A file that was truncated under us reads as an unrecovered read error beyond its end. All of these are reported ([`Layer::report_failure`]), with
//! path, byte and errno; what is refused for its asker's sake (EINVAL, EFAULT ...) or for want of resources is not.
//!
//! Not implemented: locking against a second user of the file; metadata; zones. Abort is not passed on: the kernel ends
//! what it has.
//!
//! Limits: [`QUEUE_DEPTH`] I/Os each channel with the driver, [`IO_BYTES_MAX`] an I/O, [`SEGMENTS_MAX`] segments; more waits or is
//! split in the layer. A channel reserves 2 MiB of address space for unaligned memory.

mod channel;
mod probe;

use std::io::{Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use qpair_reactor::Reactor;
use qpair_reactor::driver::FileRef;
use uuid::Uuid;

use crate::{BdevError, Channel, ChannelId, Device, Info, Layer, Op, OpSet};
use probe::Direct;

/// I/Os that a channel gives the driver at once: a quarter of what a driver takes, so that four busy disks share it.
pub const QUEUE_DEPTH: u32 = 256;
/// Largest transfer in bytes: beyond this a larger one is no faster, and holds others up.
pub const IO_BYTES_MAX: u32 = 1 << 20;
/// Most segments of one transfer: Linux's IOV_MAX.
pub const SEGMENTS_MAX: u32 = 1024;

/// What all channels share.
struct Shared {
    file: FileRef,
    direct: Option<Direct>,
    /// Whether zeros may be had by punching a hole.
    punches: bool,
    /// The first errno that fdatasync ever gave; 0: none.
    sync_error: AtomicI32,
    /// That was told.
    sync_told: AtomicBool,
}

impl Shared {
    fn new(file: FileRef, direct: Option<Direct>, punches: bool) -> Self {
        Self { file, direct, punches, sync_error: AtomicI32::new(0), sync_told: AtomicBool::new(false) }
    }

    /// The errno that every flush fails with; once.
    fn first_sync_error(&self) -> Option<i32> {
        let errno = self.sync_error.load(Ordering::Acquire);
        (errno != 0 && !self.sync_told.swap(true, Ordering::Relaxed)).then_some(errno)
    }

    /// Keeps the first failure, and tells whether there was one.
    fn sync_outcome(&self, result: i32) -> i32 {
        if result < 0 && !matches!(-result, libc::ECANCELED | libc::EAGAIN | libc::EINTR) {
            let _ = self.sync_error.compare_exchange(0, -result, Ordering::AcqRel, Ordering::Relaxed);
        }
        match self.sync_error.load(Ordering::Acquire) {
            0 => result,
            errno => -errno,
        }
    }
}

/// See the module's doc.
pub struct FileBdev {
    info: Info,
    shared: Arc<Shared>,
}

impl FileBdev {
    /// Over the file or block device at `path`. `module`: "uring" or "aio". `block_size` 0 takes the file's own: a device's
    /// logical block, else the smallest that O_DIRECT takes there, else 512. A tail of less than a block is not used. With
    /// `fallocate`, unmap and write-zeroes are the file system's where it has them.
    pub fn open(
        name: &str,
        path: impl AsRef<Path>,
        module: &str,
        block_size: u32,
        readonly: bool,
        fallocate: bool,
        uuid: Option<Uuid>,
    ) -> Result<Self, BdevError> {
        let module = match module {
            "uring" => "uring",
            "aio" => "aio",
            other => return Err(BdevError::invalid("module", other, "uring or aio")),
        };
        let found = probe::open(path.as_ref(), block_size, readonly)?;
        let block_size = found.block_size;
        let mut info = Info::new(name, module, block_size, found.bytes / u64::from(block_size.max(1)));
        info.uuid = uuid.unwrap_or(info.uuid);
        info.readonly = readonly;
        info.path = Some(path.as_ref().display().to_string());
        info.physical_block_size = found.physical_block_size.max(block_size);
        let abilities = if fallocate && !readonly { probe::allocation(&found) } else { probe::Allocation::default() };
        set_limits(&mut info, abilities);
        info.check()?;
        let file = FileRef::Real(Arc::new(found.file));
        let punches = abilities.punch;
        Ok(Self { info, shared: Arc::new(Shared::new(file, found.direct, punches)) })
    }

    /// Over file number `file` of the simulator.
    pub fn simulated(name: &str, file: u32, block_size: u32, num_blocks: u64, fallocate: bool) -> Result<Self, BdevError> {
        let mut info = Info::new(name, "uring", block_size, num_blocks);
        set_limits(&mut info, probe::Allocation { punch: fallocate, zero: fallocate });
        info.check()?;
        Ok(Self { info, shared: Arc::new(Shared::new(FileRef::Simulated(file), None, fallocate)) })
    }

    /// As [`simulated`](Self::simulated), with the alignment that O_DIRECT would ask of memory.
    pub fn simulated_direct(name: &str, file: u32, block_size: u32, num_blocks: u64, alignment: u32) -> Result<Self, BdevError> {
        let mut this = Self::simulated(name, file, block_size, num_blocks, true)?;
        if let Some(shared) = Arc::get_mut(&mut this.shared) {
            shared.direct = Some(Direct { memory: u64::from(alignment), length: u64::from(block_size) });
        }
        Ok(this)
    }

    /// Whether it goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.shared.direct.is_some()
    }

    fn blocks_now(&self) -> Result<u64, BdevError> {
        let FileRef::Real(file) = &self.shared.file else { return Ok(self.info.num_blocks) };
        let mut file: &std::fs::File = file;
        // Works for block devices too; nobody uses the file's position.
        let bytes = file.seek(SeekFrom::End(0)).map_err(|source| probe::failed("seek", Path::new(&self.info.name), source))?;
        Ok(bytes / u64::from(self.info.block_size))
    }
}

fn set_limits(info: &mut Info, abilities: probe::Allocation) {
    let mut supported = vec![Op::Read, Op::Write, Op::Flush, Op::Reset];
    if abilities.punch {
        supported.push(Op::Unmap);
    }
    if abilities.zero {
        supported.push(Op::WriteZeroes);
    }
    info.supported = OpSet::of(&supported);
    info.write_cache = true;
    info.queue_depth = QUEUE_DEPTH;
    info.max_io_blocks = IO_BYTES_MAX / info.block_size.clamp(512, IO_BYTES_MAX);
    info.max_segments = SEGMENTS_MAX;
}

impl Device for FileBdev {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(channel::FileChannel::new(self.shared.clone(), self.info.block_size, reactor, layer, id)?))
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        self.blocks_now()
    }

    /// The file is as large as it is; this says how much of it is used.
    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let simulated = matches!(self.shared.file, FileRef::Simulated(_));
        let limit = self.blocks_now()?;
        if simulated || num_blocks <= limit {
            Ok(())
        } else {
            Err(BdevError::invalid("num_blocks", num_blocks, format!("at most {limit}, the file's size")))
        }
    }
}
