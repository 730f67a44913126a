//! Where the next I/O goes, and what it does: a few instructions, no division.

/// A stream of 64-bit numbers: xorshift64*.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Different for each seed and worker, never stuck at 0.
    pub(crate) fn new(seed: u64, worker: u64) -> Self {
        Self(mix(seed ^ mix(worker.wrapping_add(1))) | 1)
    }

    #[inline]
    pub(crate) fn next(&mut self) -> u64 {
        let mut x = self.0;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0 = x;
        x.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// `0..below` from a random number, by its high bits.
#[inline]
pub(crate) fn scale(random: u64, below: u64) -> u64 {
    ((u128::from(random) * u128::from(below)) >> 64) as u64
}

/// Spreads a number over all bits (splitmix64's finish).
#[inline]
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Chooses places and directions for one worker.
#[derive(Clone, Debug)]
pub(crate) struct Chooser {
    random: Random,
    sequential: bool,
    slots: u64,
    next: u64,
    /// Reads where the low 16 bits are below this.
    read_below: u64,
}

impl Chooser {
    pub(crate) fn new(random: Random, sequential: bool, slots: u64, read_percent: u8) -> Self {
        Self { random, sequential, slots, next: 0, read_below: u64::from(read_percent) * 65536 / 100 }
    }

    /// A place, and whether to read there.
    #[inline]
    pub(crate) fn next(&mut self) -> (u64, bool) {
        let random = self.random.next();
        let read = random & 0xffff < self.read_below;
        if !self.sequential {
            return (scale(random, self.slots), read);
        }
        let slot = self.next;
        self.next = if slot + 1 == self.slots { 0 } else { slot + 1 };
        (slot, read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_places_are_in_range_and_spread_evenly() {
        let mut chooser = Chooser::new(Random::new(1, 0), false, 10, 0);
        let mut counts = [0u32; 10];
        for _ in 0..100_000 {
            counts[chooser.next().0 as usize] += 1;
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }

    #[test]
    fn sequential_places_follow_each_other_and_wrap() {
        let mut chooser = Chooser::new(Random::new(1, 0), true, 3, 0);
        let places: Vec<u64> = (0..7).map(|_| chooser.next().0).collect();
        assert_eq!(places, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn the_share_of_reads_is_as_asked() {
        for percent in [0u8, 30, 100] {
            let mut chooser = Chooser::new(Random::new(7, 3), false, 1 << 20, percent);
            let reads = (0..100_000).filter(|_| chooser.next().1).count();
            assert!(reads.abs_diff(usize::from(percent) * 1000) < 600, "{percent}: {reads}");
        }
    }

    #[test]
    fn workers_and_seeds_have_streams_of_their_own() {
        let first = |seed, worker| Random::new(seed, worker).next();
        assert_eq!(first(1, 0), first(1, 0));
        assert_ne!(first(1, 0), first(1, 1));
        assert_ne!(first(1, 0), first(2, 0));
        assert_ne!(first(0, 0), 0);
    }
}
