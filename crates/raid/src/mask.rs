//! A set of slots.

use std::fmt;

/// Of the 255 slots that an array can have.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Mask([u64; 4]);

impl Mask {
    /// No slot.
    pub const EMPTY: Self = Self([0; 4]);

    /// One slot.
    pub fn of(slot: usize) -> Self {
        let mut mask = Self::EMPTY;
        mask.0[slot / 64] |= 1 << (slot % 64);
        mask
    }

    /// The first `count` slots.
    pub fn first(count: usize) -> Self {
        (0..count).fold(Self::EMPTY, |mask, slot| mask | Self::of(slot))
    }

    /// Whether `slot` is in it.
    #[inline]
    pub fn has(self, slot: usize) -> bool {
        self.0[slot / 64] >> (slot % 64) & 1 == 1
    }

    /// Those that are not in `other`.
    #[inline]
    pub fn minus(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// Whether no slot is in it.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.0 == [0; 4]
    }

    /// How many are in it.
    pub fn count(self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Lowest first.
    pub fn slots(self) -> impl Iterator<Item = usize> {
        (0..4).flat_map(move |word| {
            let mut rest = self.0[word];
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
                rest &= rest - 1;
                Some(word * 64 + bit)
            })
        })
    }
}

impl std::ops::BitOr for Mask {
    type Output = Self;

    #[inline]
    fn bitor(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }
}

impl std::ops::BitAnd for Mask {
    type Output = Self;

    #[inline]
    fn bitand(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }
}

impl fmt::Debug for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.slots()).finish()
    }
}
