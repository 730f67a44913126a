//! Blocks that say what they are.
//!
//! A block begins with [`MAGIC`], the seed, its address and its generation (8 bytes each, little-endian); every following
//! word of 8 bytes follows from those and its position, so that a block in the wrong place, an old one and a torn one are
//! all told apart. A worker knows the generation it last wrote to each place; of places it did not write, a pure
//! reader demands any generation of this seed, and a mixed run demands nothing.
//!
//! Errors: a [`Mismatch`] names the block, the byte, and what was and should have been there.
//!
//! Limits: [`SLOTS_MAX`] places a worker, four bytes each.

use std::fmt;

use qpair_memory::{MemoryError, Region};

use crate::pattern::mix;

/// First word of each block.
pub const MAGIC: u64 = u64::from_le_bytes(*b"qpairblk");
/// Most I/O-sized places in a verifying worker's range.
pub const SLOTS_MAX: u64 = 1 << 26;
/// What a buffer is filled with before it is read into.
const SCRIBBLE: u8 = 0xA5;
const WORD: usize = 8;

/// A block that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Logical block.
    pub lba: u64,
    /// Byte within it.
    pub offset: usize,
    /// What should be there.
    pub expected: u64,
    /// What is.
    pub found: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lba, offset, expected, found } = self;
        write!(f, "block {lba}, byte {offset}: {found:#018x} instead of {expected:#018x}")
    }
}

/// What a reader demands of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// This generation.
    Exactly(u32),
    /// Any generation, all of it.
    Any,
}

/// Writes and checks content, one block at a time through `scratch`.
pub struct Checker {
    seed: u64,
    scratch: Vec<u8>,
}

impl Checker {
    /// For blocks of so many bytes.
    pub fn new(seed: u64, block_size: u32) -> Self {
        Self { seed, scratch: vec![0; block_size as usize] }
    }

    /// Fills `blocks` blocks from `lba` on at `offset`.
    pub fn write(&mut self, region: &Region, offset: u64, lba: u64, blocks: u64, generation: u32) -> Result<(), MemoryError> {
        let size = self.scratch.len() as u64;
        for index in 0..blocks {
            self.fill(lba + index, u64::from(generation));
            region.write(offset + index * size, &self.scratch)?;
        }
        Ok(())
    }

    /// Makes sure that what is read next was really read.
    pub fn scribble(region: &Region, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        region.fill(offset, bytes, SCRIBBLE)
    }

    /// Checks `blocks` blocks from `lba` on; the first difference, if any.
    pub fn check(&mut self, region: &Region, offset: u64, lba: u64, blocks: u64, demand: Demand) -> Result<Option<Mismatch>, MemoryError> {
        let size = self.scratch.len();
        for index in 0..blocks {
            region.read(offset + index * size as u64, &mut self.scratch)?;
            if let Some(mismatch) = self.compare(lba + index, demand) {
                return Ok(Some(mismatch));
            }
        }
        Ok(None)
    }

    fn fill(&mut self, lba: u64, generation: u64) {
        let words = self.scratch.chunks_exact_mut(WORD).zip(expected(self.seed, lba, generation));
        words.for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
    }

    fn compare(&self, lba: u64, demand: Demand) -> Option<Mismatch> {
        let word = |index: usize| {
            let bytes = &self.scratch[index * WORD..(index + 1) * WORD];
            u64::from_le_bytes(bytes.try_into().unwrap_or_default())
        };
        let generation = match demand {
            Demand::Exactly(generation) => u64::from(generation),
            Demand::Any => word(3),
        };
        let words = expected(self.seed, lba, generation).enumerate().take(self.scratch.len() / WORD);
        let difference = words.map(|(index, expected)| (index, expected, word(index))).find(|(_, expected, found)| expected != found);
        difference.map(|(index, expected, found)| Mismatch { lba, offset: index * WORD, expected, found })
    }
}

/// The words of a block.
fn expected(seed: u64, lba: u64, generation: u64) -> impl Iterator<Item = u64> {
    let key = mix(seed ^ mix(lba ^ mix(generation)));
    let body = (4u64..).map(move |index| key.wrapping_add(index).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    [MAGIC, seed, lba, generation].into_iter().chain(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qpair_memory::{Mapping, Pages};

    fn region() -> Region {
        Region::new(Mapping::anonymous(8192, Pages::Normal).unwrap())
    }

    #[test]
    fn what_was_written_is_accepted_by_generation_and_by_any() {
        let (region, mut checker) = (region(), Checker::new(9, 512));
        checker.write(&region, 1024, 77, 3, 5).unwrap();
        assert_eq!(checker.check(&region, 1024, 77, 3, Demand::Exactly(5)).unwrap(), None);
        assert_eq!(checker.check(&region, 1024, 77, 3, Demand::Any).unwrap(), None);
    }

    #[test]
    fn one_changed_byte_is_found_where_it_is() {
        let (region, mut checker) = (region(), Checker::new(9, 512));
        checker.write(&region, 0, 10, 4, 1).unwrap();
        let mut byte = [0];
        region.read(512 + 100, &mut byte).unwrap();
        region.write(512 + 100, &[byte[0] ^ 1]).unwrap();
        let found = checker.check(&region, 0, 10, 4, Demand::Any).unwrap().unwrap();
        assert_eq!((found.lba, found.offset), (11, 96));
        assert_eq!(found.expected ^ found.found, 1 << 32);
    }

    #[test]
    fn a_block_of_another_place_generation_or_seed_is_refused() {
        let (region, mut checker) = (region(), Checker::new(9, 512));
        checker.write(&region, 0, 10, 1, 1).unwrap();
        let wrong_place = checker.check(&region, 0, 11, 1, Demand::Any).unwrap().unwrap();
        assert_eq!(wrong_place, Mismatch { lba: 11, offset: 16, expected: 11, found: 10 });
        let old = checker.check(&region, 0, 10, 1, Demand::Exactly(2)).unwrap().unwrap();
        assert_eq!(old, Mismatch { lba: 10, offset: 24, expected: 2, found: 1 });
        let other = Checker::new(8, 512).check(&region, 0, 10, 1, Demand::Any).unwrap().unwrap();
        assert_eq!(other, Mismatch { lba: 10, offset: 8, expected: 8, found: 9 });
    }

    #[test]
    fn a_buffer_nobody_read_into_is_refused() {
        let (region, mut checker) = (region(), Checker::new(9, 512));
        checker.write(&region, 0, 10, 1, 1).unwrap();
        Checker::scribble(&region, 0, 512).unwrap();
        let found = checker.check(&region, 0, 10, 1, Demand::Any).unwrap().unwrap();
        assert_eq!((found.offset, found.found), (0, 0xA5A5_A5A5_A5A5_A5A5));
    }
}
