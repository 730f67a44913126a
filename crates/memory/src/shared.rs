//! Typed windows onto shared memory, for rings: checked once when made, then only the index is checked.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{MemoryError, Region};

/// `count` values of `T` in a region. Values are copied in and out, never borrowed.
#[derive(Clone, Debug)]
pub struct Shared<T> {
    base: *mut T,
    count: usize,
    region: Region,
    marker: PhantomData<T>,
}

impl<T: FromBytes + IntoBytes + Immutable + Copy> Shared<T> {
    /// A window of `count` values at `offset`; refuses what leaves the region or is not aligned for `T`.
    pub fn new(region: &Region, offset: u64, count: usize) -> Result<Self, MemoryError> {
        let length = (count as u64).saturating_mul(size_of::<T>() as u64);
        let base = region.pointer(offset, length)?.cast::<T>();
        if !base.is_aligned() {
            return Err(MemoryError::Misaligned { address: offset, alignment: align_of::<T>() as u64 });
        }
        Ok(Self { base, count, region: region.clone(), marker: PhantomData })
    }

    /// One value at `offset`, copied out once. None: it is not inside the region, or not aligned for `T`.
    #[inline]
    pub fn read(region: &Region, offset: u64) -> Option<T> {
        let at = region.pointer(offset, size_of::<T>() as u64).ok()?.cast::<T>();
        // SAFETY: inside the region (checked), aligned (checked), and any bit pattern is a `T` (FromBytes). Volatile: the
        // other side may write at any time, so the value must be read once and not again.
        at.is_aligned().then(|| unsafe { at.read_volatile() })
    }

    /// How many values.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The hold this window has.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Copies value `index` out. Panics outside the window, as a slice does.
    #[inline]
    pub fn load(&self, index: usize) -> T {
        assert!(index < self.count, "index {index} of a window of {}", self.count);
        // SAFETY: in the window, which was checked and aligned when made; any bit pattern is a `T` (FromBytes).
        // Volatile: the other side may write at any time, so the value must be read once and not again.
        unsafe { self.base.add(index).read_volatile() }
    }

    /// Copies `value` in at `index`. Panics outside the window, as a slice does.
    #[inline]
    pub fn store(&self, index: usize, value: T) {
        assert!(index < self.count, "index {index} of a window of {}", self.count);
        // SAFETY: as for `load`; nothing in Rust refers to the place.
        unsafe { self.base.add(index).write_volatile(value) }
    }

    /// Asks the cache for value `index`, if it exists, to be written: the other side's copy goes now and not when the store waits for it.
    #[inline]
    pub fn prefetch_write(&self, index: usize) {
        if index < self.count {
            // In the window, which is all that `wrapping_add` leaves to be shown.
            crate::region::own_line(self.base.wrapping_add(index).cast());
        }
    }

    /// Asks the cache for value `index`, if it exists.
    #[inline]
    pub fn prefetch(&self, index: usize) {
        #[cfg(target_arch = "x86_64")]
        if index < self.count {
            // SAFETY: a prefetch never faults, and the address is in the window anyway.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(self.base.add(index).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = index;
    }
}

macro_rules! as_atomics {
    ($($number:ty, $atomic:ty);*) => {$(
        impl Shared<$number> {
            /// Loads value `index` whole, as an atomic; `Acquire` where what it announces is read next. Panics outside the window.
            #[inline]
            pub fn load_atomic(&self, index: usize, order: Ordering) -> $number {
                <$number>::from_le(self.atomic(index).load(order))
            }

            /// Stores value `index` whole, as an atomic; `Release` where what was written before must be seen first. Panics outside the window.
            #[inline]
            pub fn store_atomic(&self, index: usize, value: $number, order: Ordering) {
                self.atomic(index).store(value.to_le(), order);
            }

            #[inline]
            fn atomic(&self, index: usize) -> &$atomic {
                assert!(index < self.count, "index {index} of a window of {}", self.count);
                // SAFETY: in the window, which was checked and aligned for a number of this size when made (an atomic of it is aligned no
                // stricter on what we build for: asserted below); the region that `self` holds outlives the borrow; an atomic may alias anything shared.
                unsafe { &*self.base.add(index).cast::<$atomic>() }
            }
        }
        const _: () = assert!(align_of::<$number>() == align_of::<$atomic>() && size_of::<$number>() == size_of::<$atomic>());
    )*};
}
as_atomics!(u16, AtomicU16; u32, AtomicU32; u64, AtomicU64);

/// A 16-bit index or flag word that both sides of a ring use as an atomic.
#[derive(Clone, Debug)]
pub struct SharedIndex {
    at: *const AtomicU16,
    _region: Region,
}

impl SharedIndex {
    /// The word at `offset`, which must be even and inside the region.
    pub fn new(region: &Region, offset: u64) -> Result<Self, MemoryError> {
        let at = region.pointer(offset, 2)?.cast::<AtomicU16>().cast_const();
        if !at.is_aligned() {
            return Err(MemoryError::Misaligned { address: offset, alignment: 2 });
        }
        Ok(Self { at, _region: region.clone() })
    }

    /// Takes its cache line from the other side, for a store that will follow. See [`Shared::prefetch_write`].
    #[inline]
    pub fn prefetch_write(&self) {
        crate::region::own_line(self.at.cast_mut().cast());
    }

    /// Loads; `Acquire` where what the index announces is read next.
    #[inline]
    pub fn load(&self, order: Ordering) -> u16 {
        // SAFETY: aligned, inside the region this value holds, and an AtomicU16 may alias anything shared.
        u16::from_le(unsafe { (*self.at).load(order) })
    }

    /// Stores; `Release` where what was written before must be seen first.
    #[inline]
    pub fn store(&self, value: u16, order: Ordering) {
        // SAFETY: as for `load`.
        unsafe { (*self.at).store(value.to_le(), order) }
    }
}
