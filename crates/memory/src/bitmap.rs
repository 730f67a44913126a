//! A bitmap of pages in shared memory, that another process reads and clears while we set bits.
//!
//! Order. Whoever marks a page has written to it before. Setting the bit is an atomic read-modify-write even where it is set already: the other side
//! clears it by an atomic exchange and copies the page after that, so either it sees what was written, or it finds the bit set again.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::{MemoryError, Region};

/// Bytes that one bit stands for (vhost: VHOST_LOG_PAGE).
pub const BITMAP_PAGE: u64 = 4096;

/// Bits of pages from address 0 on, the lowest of a byte first.
#[derive(Clone, Debug)]
pub struct PageBitmap {
    base: *const AtomicU8,
    length: u64,
    region: Region,
}

impl PageBitmap {
    /// `length` bytes of bits at `offset`; refuses what leaves the region.
    pub fn new(region: &Region, offset: u64, length: u64) -> Result<Self, MemoryError> {
        let base = region.pointer(offset, length)?.cast::<AtomicU8>().cast_const();
        Ok(Self { base, length, region: region.clone() })
    }

    /// The first address that has no bit any more.
    #[inline]
    pub fn end(&self) -> u64 {
        self.length.saturating_mul(8 * BITMAP_PAGE)
    }

    /// Whether all of `[address, address + length)` has bits.
    #[inline]
    pub fn covers(&self, address: u64, length: u64) -> bool {
        address.checked_add(length).is_some_and(|end| end <= self.end())
    }

    /// Sets the bits of all pages that `[address, address + length)` touches. False, and nothing is set: some have none.
    #[inline]
    pub fn mark(&self, address: u64, length: u64) -> bool {
        if length == 0 {
            return true;
        }
        if !self.covers(address, length) {
            return false;
        }
        let (first, last) = (address / BITMAP_PAGE, (address + length - 1) / BITMAP_PAGE);
        for byte in first / 8..=last / 8 {
            let from = first.max(byte * 8) - byte * 8;
            let to = last.min(byte * 8 + 7) - byte * 8;
            let bits = (0xffu8 << from) & (0xff >> (7 - to));
            // SAFETY: `byte` is below `length` (the last page's byte is, by `covers`), and the region that `self` holds has that many bytes from
            // `base` on; an AtomicU8 is aligned anywhere and may alias anything shared.
            unsafe { (*self.base.add(byte as usize)).fetch_or(bits, Ordering::SeqCst) };
        }
        true
    }

    /// Whether the memory of the bits vanished under us.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.region.is_dead()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{Mapping, Pages};

    fn bitmap(bytes: u64, offset: u64) -> (Region, PageBitmap) {
        let region = Region::new(Mapping::anonymous(4096, Pages::Normal).unwrap());
        let bitmap = PageBitmap::new(&region, offset, bytes).unwrap();
        (region, bitmap)
    }

    fn marked(region: &Region) -> BTreeSet<u64> {
        let mut bytes = vec![0; 4096];
        region.read(0, &mut bytes).unwrap();
        (0..4096 * 8).filter(|bit| bytes[*bit as usize / 8] & 1 << (bit % 8) != 0).collect()
    }

    proptest! {
        #[test]
        fn the_bits_are_those_of_the_pages_touched_and_no_others(
            ranges in prop::collection::vec((0u64..40 * 8 * 4096, 0u64..100_000), 1..20),
            offset in 0u64..50,
        ) {
            let (region, bitmap) = bitmap(32, offset);
            let mut expected = BTreeSet::new();
            for (address, length) in ranges {
                let inside = address + length <= 32 * 8 * 4096;
                prop_assert_eq!(bitmap.mark(address, length), inside || length == 0);
                if inside && length > 0 {
                    expected.extend((address / 4096..=(address + length - 1) / 4096).map(|page| page + 8 * offset));
                }
            }
            prop_assert_eq!(marked(&region), expected);
        }
    }

    #[test]
    fn an_address_at_the_end_of_all_is_refused() {
        let (region, bitmap) = bitmap(4096, 0);
        assert!(!bitmap.mark(u64::MAX, 1));
        assert!(!bitmap.mark(u64::MAX - 4096, 4096));
        assert!(!bitmap.mark(1 << 27, 1));
        assert!(bitmap.mark((1 << 27) - 1, 1));
        assert_eq!(marked(&region), BTreeSet::from([32767]));
    }

    #[test]
    fn bits_that_leave_the_region_are_refused() {
        let region = Region::new(Mapping::anonymous(4096, Pages::Normal).unwrap());
        assert!(matches!(PageBitmap::new(&region, 1, 4096), Err(MemoryError::OutOfRange { limit: 4096, .. })));
    }
}
