//! What a file is and what its file system can: size, blocks, O_DIRECT, fallocate.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};

use crate::BdevError;

/// STATX_DIOALIGN (Linux 6.1).
const DIOALIGN: u32 = 0x2000;
/// What any file system with O_DIRECT takes, where it cannot be asked.
const SAFE_ALIGNMENT: u64 = 4096;

/// What O_DIRECT asks for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Direct {
    /// Of each segment's address.
    pub memory: u64,
    /// Of the offset, and of each segment's length.
    pub length: u64,
}

/// Which kinds of fallocate work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Allocation {
    pub punch: bool,
    pub zero: bool,
}

/// An open file and what is known of it.
pub(super) struct Found {
    pub file: File,
    pub bytes: u64,
    pub block_size: u32,
    pub physical_block_size: u32,
    pub direct: Option<Direct>,
    device: Option<u64>,
}

pub(super) fn failed(what: &str, path: &Path, source: io::Error) -> BdevError {
    BdevError::Os { what: format!("{what} {}", path.display()), source }
}

/// Opens `path`, around the page cache if that works with blocks of `block_size` (0: of any size).
pub(super) fn open(path: &Path, block_size: u32, readonly: bool) -> Result<Found, BdevError> {
    let is_device = kind(&path.metadata().map_err(|source| failed("open", path, source))?, path)?;
    let options = |flags| OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path);
    let direct = options(libc::O_DIRECT).ok().and_then(|file| Some((alignment(&file, is_device)?, file)));
    let fits = |direct: &Direct| block_size == 0 || u64::from(block_size) % direct.length == 0;
    let (direct, mut file) = match direct.filter(|(direct, _)| fits(direct)) {
        Some((direct, file)) => (Some(direct), file),
        None => (None, options(0).map_err(|source| failed("open", path, source))?),
    };
    // Looked at again: the path may lead elsewhere by now.
    let metadata = file.metadata().map_err(|source| failed("stat", path, source))?;
    let is_device = kind(&metadata, path)?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(|source| failed("seek", path, source))?;
    let own = if is_device { rustix::fs::ioctl_blksszget(&file).unwrap_or(512) } else { direct.map_or(512, |direct| direct.length as u32) };
    let block_size = if block_size == 0 { own.max(512) } else { block_size };
    let physical =
        if is_device { rustix::fs::ioctl_blkpbszget(&file).unwrap_or(own) } else { u32::try_from(metadata.blksize()).unwrap_or(own) };
    let physical_block_size = if physical.is_power_of_two() && physical <= 65536 { physical } else { block_size };
    let device = is_device.then(|| metadata.rdev());
    Ok(Found { file, bytes, block_size, physical_block_size, direct, device })
}

/// Whether it is a block device; refuses what is neither that nor a plain file, before opening it can block.
fn kind(metadata: &Metadata, path: &Path) -> Result<bool, BdevError> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(kind.is_block_device());
    }
    Err(BdevError::invalid("filename", path.display(), "a regular file or a block device"))
}

/// What the file, opened with O_DIRECT, asks for; None: it does not really take it.
fn alignment(file: &File, is_device: bool) -> Option<Direct> {
    let asked = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::from_bits_retain(DIOALIGN)).ok();
    let direct = match asked {
        Some(stat) if stat.stx_mask & DIOALIGN != 0 => {
            Direct { memory: u64::from(stat.stx_dio_mem_align), length: u64::from(stat.stx_dio_offset_align) }
        }
        // tmpfs takes the flag and means nothing by it.
        Some(_) if !is_device && is_memory(file) => return None,
        _ if is_device => {
            let block = u64::from(rustix::fs::ioctl_blksszget(file).ok()?);
            Direct { memory: block, length: block }
        }
        _ => Direct { memory: SAFE_ALIGNMENT, length: SAFE_ALIGNMENT },
    };
    (direct.memory.is_power_of_two() && direct.length.is_power_of_two()).then_some(direct)
}

fn is_memory(file: &File) -> bool {
    const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC)
}

/// Tries what can be tried without touching data: on a file beyond its end, on a device by asking the kernel.
pub(super) fn allocation(found: &Found) -> Allocation {
    if let Some(device) = found.device {
        // Zeroing a device always works, the kernel writes zeros if it must; unmapping only where the device helps.
        return Allocation { punch: device_zeroes(device), zero: true };
    }
    let beyond = found.bytes.next_multiple_of(1 << 20);
    let works = |flags| match rustix::fs::fallocate(&found.file, flags | FallocateFlags::KEEP_SIZE, beyond, 4096) {
        Ok(()) => true,
        // Not now is not never.
        Err(error) => matches!(error, rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT),
    };
    let zero = works(FallocateFlags::ZERO_RANGE);
    // Also takes back what the attempt above allocated.
    let punch = works(FallocateFlags::PUNCH_HOLE);
    Allocation { punch, zero }
}

fn device_zeroes(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let base = format!("/sys/dev/block/{major}:{minor}");
    // A partition's queue is its disk's.
    let paths = [format!("{base}/queue/write_zeroes_max_bytes"), format!("{base}/../queue/write_zeroes_max_bytes")];
    let text = paths.iter().find_map(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
    text.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0)
}
