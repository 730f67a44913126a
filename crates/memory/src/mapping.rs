//! One `mmap` and its life.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::{MemoryError, fault, origin};

/// Which page size to ask for. Hugepages are used when they are to be had, never needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// What the kernel gives.
    Normal,
    /// Transparent hugepages where the kernel has them.
    Transparent,
}

/// Mapped memory, shared by reactors; unmapped when the last `Arc` goes.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    length: usize,
    fd: Option<OwnedFd>,
    fault: Option<fault::Slot>,
}

// SAFETY: a mapping is plain memory without thread affinity; all access goes through raw pointers in
// `Region` and `Shared`, which never hand out references to it.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out only its address, size and dead flag (an atomic).
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed private memory of `length` bytes.
    pub fn anonymous(length: usize, pages: Pages) -> Result<Arc<Self>, MemoryError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = map_aligned(length, pages, flags)?;
        if pages == Pages::Transparent {
            // SAFETY: the range was just mapped by us. A refusal only means small pages.
            unsafe { libc::madvise(base.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
        }
        Ok(Arc::new(Self { base, length, fd: None, fault: None }))
    }

    /// Zeroed memory behind a memfd, to be shared with another process. The size is sealed against shrinking.
    pub fn memfd(name: &str, length: usize) -> Result<Arc<Self>, MemoryError> {
        let name = std::ffi::CString::new(name.replace('\0', "")).unwrap_or_default();
        // SAFETY: `name` is a valid C string for the duration of the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(MemoryError::last_os("memfd_create"));
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let file = File::from(fd);
        file.set_len(length as u64).map_err(|source| MemoryError::Os { call: "ftruncate", source })?;
        // SAFETY: a plain fcntl on a descriptor we own. Without the seal only robustness is lost.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
        let fd = OwnedFd::from(file);
        let base = map_shared(fd.as_fd(), 0, length)?;
        Ok(Arc::new(Self { base, length, fd: Some(fd), fault: None }))
    }

    /// Maps `length` bytes at `offset` (a whole number of pages) of a memfd that cannot shrink any more ([`Self::memfd`] makes such), and keeps it.
    pub fn sealed(fd: OwnedFd, offset: u64, length: usize) -> Result<Arc<Self>, MemoryError> {
        // SAFETY: a plain fcntl on a descriptor we own; anything but a memfd is refused by it.
        let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
        if seals < 0 {
            return Err(MemoryError::last_os("fcntl(F_GET_SEALS)"));
        }
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(MemoryError::Os { call: "fcntl(F_GET_SEALS)", source: std::io::Error::from_raw_os_error(libc::EPERM) });
        }
        let file = File::from(fd);
        let size = file.metadata().map_err(|source| MemoryError::Os { call: "fstat", source })?.len();
        if length == 0 || offset.checked_add(length as u64).is_none_or(|end| end > size) {
            return Err(MemoryError::OutOfRange { offset, length: length as u64, limit: size });
        }
        let fd = OwnedFd::from(file);
        let start = i64::try_from(offset).map_err(|_| MemoryError::OutOfRange { offset, length: length as u64, limit: size })?;
        let base = map_shared(fd.as_fd(), start, length)?;
        Ok(Arc::new(Self { base, length, fd: Some(fd), fault: None }))
    }

    /// Maps `length` bytes of somebody else's descriptor, from its start. The file may shrink under us: then the
    /// mapping reads as zeros and [`is_dead`](Self::is_dead) turns true. Refused is a file whose pages may never come.
    pub fn shared(fd: BorrowedFd<'_>, length: u64) -> Result<Arc<Self>, MemoryError> {
        let page = page_size() as u64;
        let limit = isize::MAX as u64 - page;
        if length == 0 || length > limit {
            return Err(MemoryError::OutOfRange { offset: 0, length, limit });
        }
        let size = origin::size_unless_stalling(fd)?;
        if size != 0 && length > size.next_multiple_of(page) {
            return Err(MemoryError::OutOfRange { offset: 0, length, limit: size });
        }
        let length = length as usize;
        let base = map_shared(fd, 0, length)?;
        match fault::Slot::register(base.as_ptr() as usize, length.next_multiple_of(page_size())) {
            Ok(slot) => Ok(Arc::new(Self { base, length, fd: None, fault: Some(slot) })),
            Err(error) => {
                // SAFETY: mapped a few lines above and known to nobody else.
                unsafe { libc::munmap(base.as_ptr().cast(), length) };
                Err(error)
            }
        }
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Never true: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The memfd behind it, if it has one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }

    /// Where it is mapped in this process. A number for address tables and system calls, not a licence to touch it.
    pub fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Whether the memory vanished under us (SIGBUS) and was replaced by zeros.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.fault.as_ref().is_some_and(fault::Slot::is_dead)
    }

    /// Whether nobody else has this memory: it is neither a memfd of ours nor somebody else's descriptor.
    pub(crate) fn is_private(&self) -> bool {
        self.fd.is_none() && self.fault.is_none()
    }

    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The slot goes first: after munmap the range may belong to somebody else.
        self.fault = None;
        // SAFETY: `base` and `length` are what mmap returned, and the last owner is here.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// The system's base page in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

fn map(length: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> Result<NonNull<u8>, MemoryError> {
    // SAFETY: without MAP_FIXED the kernel picks a free range, so no memory in use is touched.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, offset) };
    if base == libc::MAP_FAILED {
        return Err(MemoryError::last_os("mmap"));
    }
    NonNull::new(base.cast()).ok_or(MemoryError::OutOfRange { offset: 0, length: 0, limit: 0 })
}

fn map_shared(fd: BorrowedFd<'_>, offset: i64, length: usize) -> Result<NonNull<u8>, MemoryError> {
    map(length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE, fd.as_raw_fd(), offset)
}

/// Maps with the start on a 2 MiB boundary when transparent hugepages are wanted, else the kernel finds few to give.
fn map_aligned(length: usize, pages: Pages, flags: i32) -> Result<NonNull<u8>, MemoryError> {
    const HUGE: usize = 2 << 20;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    if pages == Pages::Normal || length < HUGE {
        return map(length, protection, flags, -1, 0);
    }
    let Some(padded) = length.checked_add(HUGE) else {
        return Err(MemoryError::OutOfRange { offset: 0, length: length as u64, limit: (isize::MAX as u64) - HUGE as u64 });
    };
    let raw = map(padded, protection, flags, -1, 0)?.as_ptr();
    let lead = raw.align_offset(HUGE);
    let tail = padded - lead - length.next_multiple_of(page_size()).min(padded - lead);
    // SAFETY: `lead + length <= padded`, so the head and the tail cut off here are parts of the range just mapped.
    unsafe {
        if lead > 0 {
            libc::munmap(raw.cast(), lead);
        }
        if tail > 0 {
            libc::munmap(raw.add(padded - tail).cast(), tail);
        }
        Ok(NonNull::new_unchecked(raw.add(lead)))
    }
}
