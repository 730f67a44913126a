//! How long I/Os took, counted in buckets as SPDK has them.
//!
//! How it works. A *range* is a power of two, cut into `1 << granularity` buckets: range 0 has one value each, from 0; range 1 one value each, from
//! `1 << granularity`; each further range twice as many values a bucket as the one before. Kept are the ranges from that of the least time that was asked for to that of
//! the largest; what is below or above counts in the first or the last bucket. Times are nanoseconds, so the tick rate that belongs to them is
//! one thousand million. A channel has one of its own while they are enabled; they are added when somebody asks.
//!
//! Errors: a shape that makes no sense is refused by field, value and limit.
//!
//! Limits: granularity 1 to [`GRANULARITY_MAX`]; at the most that is 7.7 MB a channel, at SPDK's default 28 KiB.

use crate::{BdevError, Op, OpSet};

/// What SPDK takes when nothing is said.
pub const GRANULARITY: u32 = 7;
/// More cost memory and tell nothing.
pub const GRANULARITY_MAX: u32 = 14;

/// Which times are told apart, and of which I/Os.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    granularity: u32,
    min_range: u32,
    max_range: u32,
    ops: OpSet,
}

impl Shape {
    /// Times from `min_ns` up to, but without, `max_ns`.
    pub fn new(granularity: u32, min_ns: u64, max_ns: u64, ops: OpSet) -> Result<Self, BdevError> {
        if granularity == 0 || granularity > GRANULARITY_MAX {
            return Err(BdevError::invalid("granularity", granularity, format!("1 to {GRANULARITY_MAX}")));
        }
        if min_ns >= max_ns {
            return Err(BdevError::invalid("min_nsec", min_ns, format!("less than max_nsec {max_ns}")));
        }
        Ok(Self { granularity, min_range: range_of(granularity, min_ns), max_range: range_of(granularity, max_ns - 1), ops })
    }

    /// Buckets a range: `1 << granularity`.
    pub fn granularity(&self) -> u32 {
        self.granularity
    }

    /// The first and the last range that is kept.
    pub fn ranges(&self) -> (u32, u32) {
        (self.min_range, self.max_range)
    }

    fn buckets(&self) -> usize {
        ((self.max_range - self.min_range + 1) as usize) << self.granularity
    }
}

#[inline]
fn range_of(granularity: u32, value: u64) -> u32 {
    (u64::BITS - value.leading_zeros()).saturating_sub(granularity)
}

/// See the module's doc.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    shape: Shape,
    buckets: Vec<u64>,
}

impl Histogram {
    /// Empty.
    pub fn new(shape: Shape) -> Self {
        Self { shape, buckets: vec![0; shape.buckets()] }
    }

    /// Its shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The counts, range by range.
    pub fn buckets(&self) -> &[u64] {
        &self.buckets
    }

    /// Counts one I/O.
    #[inline]
    pub fn book(&mut self, op: Op, elapsed_ns: u64) {
        if self.shape.ops.has(op) {
            let place = self.place(elapsed_ns);
            self.buckets[place] += 1;
        }
    }

    #[inline]
    fn place(&self, elapsed_ns: u64) -> usize {
        let Shape { granularity, min_range, max_range, .. } = self.shape;
        let range = range_of(granularity, elapsed_ns);
        if range < min_range {
            return 0;
        }
        if range > max_range {
            return self.buckets.len() - 1;
        }
        let within = (elapsed_ns >> range.saturating_sub(1)) & ((1 << granularity) - 1);
        (((range - min_range) as usize) << granularity) + within as usize
    }

    /// Adds another channel's; one of another shape was begun before this one, and does not count.
    pub fn add(&mut self, other: &Self) {
        if self.shape == other.shape {
            self.buckets.iter_mut().zip(&other.buckets).for_each(|(sum, count)| *sum += count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(granularity: u32, min_ns: u64, max_ns: u64) -> Histogram {
        Histogram::new(Shape::new(granularity, min_ns, max_ns, OpSet::of(&[Op::Read])).unwrap())
    }

    /// The first value that the next bucket has, as SPDK's reader computes it.
    fn end_of(histogram: &Histogram, place: usize) -> u64 {
        let Shape { granularity, min_range, .. } = histogram.shape;
        let (range, index) = (min_range + (place >> granularity) as u32, (place & ((1 << granularity) - 1)) as u64 + 1);
        if range == 0 { index } else { (1 << (range + granularity - 1)) + (index << (range - 1)) }
    }

    #[test]
    fn each_value_is_below_the_end_of_its_bucket_and_not_of_the_one_before() {
        for granularity in [1, 3, 7, GRANULARITY_MAX] {
            let histogram = reads(granularity, 0, 1 << 40);
            for value in
                (0..5000).chain((0..40).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit, (1 << bit) + 1])).filter(|value| *value < 1 << 40)
            {
                let place = histogram.place(value);
                assert!(value < end_of(&histogram, place), "{value} at granularity {granularity}");
                assert!(place == 0 || value >= end_of(&histogram, place - 1), "{value} at granularity {granularity}");
            }
        }
    }

    #[test]
    fn spdks_default_has_the_ranges_of_a_microsecond_to_two_minutes() {
        let histogram = reads(GRANULARITY, 1000, 120_000_000_000);
        assert_eq!(histogram.shape().ranges(), (3, 30));
        assert_eq!(histogram.buckets().len(), 28 * 128);
    }

    #[test]
    fn what_is_outside_counts_at_the_ends() {
        let mut histogram = reads(7, 1000, 1_000_000);
        [0, 1, u64::MAX, 1 << 20].into_iter().for_each(|value| histogram.book(Op::Read, value));
        assert_eq!((histogram.buckets()[0], *histogram.buckets().last().unwrap()), (2, 2));
    }

    #[test]
    fn only_the_operations_asked_for_count() {
        let mut histogram = reads(7, 0, 1000);
        [Op::Read, Op::Write, Op::Flush].into_iter().for_each(|op| histogram.book(op, 10));
        assert_eq!(histogram.buckets().iter().sum::<u64>(), 1);
    }

    #[test]
    fn sums_are_of_one_shape() {
        let (mut sum, mut other, strange) = (reads(7, 0, 1000), reads(7, 0, 1000), reads(6, 0, 1000));
        sum.book(Op::Read, 3);
        other.book(Op::Read, 3);
        sum.add(&other);
        sum.add(&strange);
        assert_eq!(sum.buckets()[3], 2);
    }

    #[test]
    fn shapes_that_make_no_sense_are_refused() {
        let refusal = |granularity, min, max| Shape::new(granularity, min, max, OpSet::default()).unwrap_err().to_string();
        assert_eq!(refusal(0, 0, 1), "Invalid argument: granularity 0: 1 to 14");
        assert_eq!(refusal(15, 0, 1), "Invalid argument: granularity 15: 1 to 14");
        assert_eq!(refusal(7, 5, 5), "Invalid argument: min_nsec 5: less than max_nsec 5");
    }
}
