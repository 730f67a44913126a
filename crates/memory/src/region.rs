//! A reactor's handle on a mapping, scatter-gather lists, and the copies between them.

use std::rc::Rc;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::{Mapping, MemoryError};

#[derive(Debug)]
struct Inner {
    base: *mut u8,
    length: u64,
    mapping: Arc<Mapping>,
}

/// A hold on a mapping by one reactor. Cloning is a plain count: an I/O in flight keeps a clone per entry.
#[derive(Clone, Debug)]
pub struct Region(Rc<Inner>);

impl Region {
    /// A hold on the whole of `mapping`.
    pub fn new(mapping: Arc<Mapping>) -> Self {
        Self(Rc::new(Inner { base: mapping.base(), length: mapping.len() as u64, mapping }))
    }

    /// Size in bytes.
    #[inline]
    pub fn len(&self) -> u64 {
        self.0.length
    }

    /// Never true: there are no empty mappings.
    pub fn is_empty(&self) -> bool {
        self.0.length == 0
    }

    /// The mapping behind it.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.0.mapping
    }

    /// Whether both are clones of one.
    #[inline]
    pub fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// How many holds this reactor has on the mapping through this region.
    pub fn holds(&self) -> usize {
        Rc::strong_count(&self.0)
    }

    /// See [`Mapping::is_dead`].
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.0.mapping.is_dead()
    }

    /// The address of `length` bytes at `offset`, for a system call or a ring; checked against the region.
    #[inline]
    pub fn pointer(&self, offset: u64, length: u64) -> Result<*mut u8, MemoryError> {
        match offset.checked_add(length) {
            // SAFETY: offset <= offset + length <= length of the mapping, so the result stays in it.
            Some(end) if end <= self.0.length => Ok(unsafe { self.0.base.add(offset as usize) }),
            _ => Err(MemoryError::OutOfRange { offset, length, limit: self.0.length }),
        }
    }

    /// Copies out of the region, once.
    #[inline]
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.pointer(offset, into.len() as u64)?;
        // SAFETY: `from` is good for `into.len()` bytes; `into` is ours alone. The other side may write meanwhile:
        // then the copy holds some mixture of bytes, which the caller checks after the copy.
        unsafe { std::ptr::copy(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies into the region.
    #[inline]
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        let into = self.pointer(offset, from.len() as u64)?;
        // SAFETY: `into` is good for `from.len()` bytes and no reference to it exists.
        unsafe { std::ptr::copy(from.as_ptr(), into, from.len()) };
        Ok(())
    }

    /// Fills with one byte.
    pub fn fill(&self, offset: u64, length: u64, byte: u8) -> Result<(), MemoryError> {
        let into = self.pointer(offset, length)?;
        // SAFETY: `into` is good for `length` bytes and no reference to it exists.
        unsafe { std::ptr::write_bytes(into, byte, length as usize) };
        Ok(())
    }

    /// Gives whole pages of private memory back to the kernel, so that they read as zeros and cost nothing; the
    /// ragged ends are filled. Shared memory is filled with zeros.
    pub fn release(&self, offset: u64, length: u64) -> Result<(), MemoryError> {
        let start = self.pointer(offset, length)? as u64;
        let page = crate::mapping::page_size() as u64;
        let (first, last) = (start.next_multiple_of(page), (start + length) / page * page);
        if first >= last || !self.0.mapping.is_private() {
            return self.fill(offset, length, 0);
        }
        self.fill(offset, first - start, 0)?;
        self.fill(offset + (last - start), start + length - last, 0)?;
        // SAFETY: [first, last) lies inside the region checked above, which is private anonymous memory of ours.
        let rc = unsafe { libc::madvise(first as *mut libc::c_void, (last - first) as usize, libc::MADV_DONTNEED) };
        if rc == 0 { Ok(()) } else { self.fill(offset, length, 0) }
    }

    /// Asks the cache for the line at `offset`, to be written; does nothing outside the region. See [`Shared::prefetch_write`](crate::Shared::prefetch_write).
    #[inline]
    pub fn prefetch_write(&self, offset: u64) {
        if let Ok(pointer) = self.pointer(offset, 1) {
            own_line(pointer);
        }
    }

    /// Asks the cache for the first `lines` lines of 64 bytes at `offset`; does nothing outside the region.
    #[inline]
    pub fn prefetch(&self, offset: u64, lines: u64) {
        #[cfg(target_arch = "x86_64")]
        if let Ok(pointer) = self.pointer(offset, lines * 64) {
            for line in 0..lines as usize {
                // SAFETY: a prefetch never faults, and the address is in the region anyway.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(pointer.add(line * 64).cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (offset, lines);
    }

    /// Copies `length` bytes from `source`. The two ranges may overlap.
    #[inline]
    pub fn copy_from(&self, offset: u64, source: &Region, source_offset: u64, length: u64) -> Result<(), MemoryError> {
        let into = self.pointer(offset, length)?;
        let from = source.pointer(source_offset, length)?;
        // SAFETY: both are good for `length` bytes; no references to either exist. Racing writes by the other side give
        // mixed data, which is the other side's own.
        unsafe { crate::copy::copy(from, into, length as usize) };
        Ok(())
    }
}

/// One piece of a scatter-gather list: a hold on its region, and where in it.
#[derive(Clone, Debug)]
pub struct Sge {
    /// The region held.
    pub region: Region,
    /// First byte, from the start of the region.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// A scatter-gather list. Two entries fit inline; a longer one keeps its heap space when cleared.
pub type SgList = SmallVec<[Sge; 2]>;

/// Copies between a flat range and a list, from the list's start, as long as both last; returns the bytes moved.
#[inline]
pub fn copy_list(list: &[Sge], flat: &Region, mut offset: u64, mut length: u64, to_list: bool) -> Result<u64, MemoryError> {
    let total = length;
    for entry in list {
        if length == 0 {
            break;
        }
        let step = length.min(u64::from(entry.length));
        if to_list {
            entry.region.copy_from(entry.offset, flat, offset, step)?;
        } else {
            flat.copy_from(offset, &entry.region, entry.offset, step)?;
        }
        offset += step;
        length -= step;
    }
    Ok(total - length)
}

/// Takes a cache line from whoever has it, for a store that will follow.
#[inline]
pub(crate) fn own_line(pointer: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch changes nothing and never faults; processors without this one (before 2014) do nothing for it.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) pointer, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = pointer;
}
