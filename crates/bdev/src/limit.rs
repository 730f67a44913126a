//! Rates that several reactors keep together: so many I/Os and bytes a second, and not one more.
//!
//! How it works. A [`Pace`] counts in units (I/Os, or pieces of 512 bytes). By time `t` its *level* is what the rate has allowed since the clock
//! began; `taken` is what was given out. To take units is to add them to `taken`: the place before the addition is a place in line, and the
//! units may be used from the moment when the level reaches it. So there is nobody who refills anything, an idle limit costs nothing, the
//! time to sleep until is known exactly, and those who wait are served in the order in which they asked, on whatever reactor. An I/O larger
//! than what a moment allows waits for nothing but its place; those behind it wait until it is paid.
//!
//! What the rate allowed and nobody took is lost after [`BURST_NS`]: `taken` is lifted to the level of that long ago. But where somebody asked in
//! time and is late to come (his reactor was busy, or its processor away), nothing is lost up to [`CATCH_UP_NS`]: while anybody [waits](Pace::joins)
//! nobody lifts `taken` further, and one who has just waited goes on from his last place. Somebody who waits has a place that the level had not reached when he
//! took it, so what was not taken since then is what he was late.
//!
//! One atomic number is all that reactors share, and nothing is read by what it says; so every order of events is one of additions, and relaxed
//! accesses do. That no unit is given out twice is model-checked in this crate's `tests/loom_limit.rs`.
//!
//! Limits: a rate above [`UNITS_MAX`] units a second (2 TiB/s) is none; at that rate the count lasts 136 years.

use std::sync::Arc;
use std::time::Duration;

use super::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a unit: every I/O is a multiple of it.
pub const UNIT_BYTES: u64 = 512;
/// Rates above are not kept.
pub const UNITS_MAX: u64 = 1 << 32;
/// What was not used so long is lost.
pub const BURST_NS: u64 = 1_000_000;
/// What one who waits may be late without a loss.
pub const CATCH_UP_NS: u64 = 100_000_000;
/// Who waited, came late, and comes again within this time goes on where he was: his front end may be as late as he.
pub const RESUME_NS: u64 = 20_000_000;
/// What a channel takes for those behind the first, and out of abundance: as much as the rate allows in this time.
pub const SLICE_NS: u64 = 100_000;

/// Holding back again after less than this is no news.
pub const NEWS_NS: u64 = 1_000_000_000;

const SECOND: u128 = Duration::from_secs(1).as_nanos();

/// Units given to one who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// How many.
    pub units: u64,
    /// Usable from then on.
    pub from_ns: u64,
    /// When the rate had allowed what came before: the time of the place in line.
    pub place_ns: u64,
}

/// One rate.
#[derive(Debug)]
pub struct Pace {
    per_second: u64,
    slice: u64,
    taken: AtomicU64,
    waiting: AtomicU64,
}

impl Pace {
    /// So many units a second; None: no limit.
    pub fn new(per_second: u64) -> Option<Self> {
        if per_second == 0 || per_second > UNITS_MAX {
            return None;
        }
        let slice = (u128::from(per_second) * u128::from(SLICE_NS) / SECOND) as u64;
        Some(Self { per_second, slice, taken: AtomicU64::new(0), waiting: AtomicU64::new(0) })
    }

    /// What a slice of time allows: 0 for slow rates.
    #[inline]
    pub fn slice(&self) -> u64 {
        self.slice
    }

    /// What the rate allows between two moments.
    pub fn between(&self, since_ns: u64, now_ns: u64) -> u64 {
        self.level(now_ns) - self.level(since_ns.min(now_ns))
    }

    fn level(&self, now_ns: u64) -> u64 {
        (u128::from(now_ns) * u128::from(self.per_second) / SECOND) as u64
    }

    /// The first moment at which the level is `units`.
    fn reached_ns(&self, units: u64) -> u64 {
        let at = (u128::from(units) * SECOND).div_ceil(u128::from(self.per_second));
        u64::try_from(at).unwrap_or(u64::MAX)
    }

    /// Takes a place in line for `units`. `since_ns`: the time of the caller's last place, if he has wanted more ever since; or now.
    pub fn take(&self, units: u64, now_ns: u64, since_ns: u64) -> Grant {
        let floor = self.floor(now_ns, since_ns);
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let place = taken.max(floor);
            let after = place.saturating_add(units);
            match self.taken.compare_exchange_weak(taken, after, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    let place_ns = self.reached_ns(place);
                    return Grant { units, from_ns: place_ns.max(now_ns), place_ns };
                }
                Err(other) => taken = other,
            }
        }
    }

    /// Takes `units` if all of them may be used now, and a slice more where there is plenty; else nothing. `since_ns` as for [`take`](Self::take).
    pub fn take_now(&self, units: u64, now_ns: u64, since_ns: u64) -> Option<Grant> {
        let (level, floor) = (self.level(now_ns), self.floor(now_ns, since_ns));
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let place = taken.max(floor);
            let left = level.checked_sub(place)?.checked_sub(units)?;
            let units = if left >= self.slice { units + self.slice } else { units };
            match self.taken.compare_exchange_weak(taken, place + units, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(Grant { units, from_ns: now_ns, place_ns: self.reached_ns(place) }),
                Err(other) => taken = other,
            }
        }
    }

    /// Below it nothing is given out any more: it was not used in time.
    fn floor(&self, now_ns: u64, since_ns: u64) -> u64 {
        let since_ns = if self.waiting() > 0 { 0 } else { since_ns };
        let wanted = since_ns.max(now_ns.saturating_sub(CATCH_UP_NS)).min(now_ns.saturating_sub(BURST_NS));
        self.level(wanted)
    }

    /// Gives units back that were not used.
    pub fn give_back(&self, units: u64) {
        let mut taken = self.taken.load(Ordering::Relaxed);
        while let Err(other) = self.taken.compare_exchange_weak(taken, taken.saturating_sub(units), Ordering::Relaxed, Ordering::Relaxed) {
            taken = other;
        }
    }

    /// One begins to wait for this rate and no other: his place is still to come.
    pub fn joins(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// One waits no more.
    pub fn leaves(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many wait.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// The rates that SPDK knows, a second; 0: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Reads and writes.
    pub rw_ios: u64,
    /// Bytes read and written.
    pub rw_bytes: u64,
    /// Bytes read.
    pub r_bytes: u64,
    /// Bytes written.
    pub w_bytes: u64,
}

/// How many rates there are.
pub const KINDS: usize = 4;
/// Their names, in the order of [`Rates::units`].
pub const NAMES: [&str; KINDS] = ["rw_ios_per_sec", "rw_mbytes_per_sec", "r_mbytes_per_sec", "w_mbytes_per_sec"];

impl Rates {
    /// As units a second.
    fn units(&self) -> [u64; KINDS] {
        [self.rw_ios, self.rw_bytes / UNIT_BYTES, self.r_bytes / UNIT_BYTES, self.w_bytes / UNIT_BYTES]
    }

    /// Whether a kind counts I/Os, and not what they move.
    #[inline]
    pub fn counts_ios(kind: usize) -> bool {
        kind == 0
    }

    /// Whether I/O that reads is to pay for a kind, and I/O that writes.
    pub fn concerns(kind: usize) -> (bool, bool) {
        [(true, true), (true, true), (true, false), (false, true)][kind]
    }

    /// Whether there is no limit at all.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The rate of a kind, as it was set.
    pub fn of(&self, kind: usize) -> u64 {
        [self.rw_ios, self.rw_bytes, self.r_bytes, self.w_bytes][kind]
    }
}

/// Rates that one bdev, or a group of them, keeps on all reactors together.
#[derive(Debug)]
pub struct Limiter {
    /// What was asked for.
    pub rates: Rates,
    paces: [Option<Arc<Pace>>; KINDS],
    held_ns: AtomicU64,
}

impl Limiter {
    /// Of these rates. Each starts with what it allows in [`BURST_NS`].
    pub fn new(rates: Rates) -> Self {
        let pace = |units| Pace::new(units).map(Arc::new);
        Self { rates, paces: rates.units().map(pace), held_ns: AtomicU64::new(0) }
    }

    /// The pace of a kind, unless that has no limit.
    pub fn pace(&self, kind: usize) -> Option<&Arc<Pace>> {
        self.paces[kind].as_ref()
    }

    /// Something is held back now. True: it is the first in a long time, which is news.
    pub fn holds_back(&self, now_ns: u64) -> bool {
        let before = self.held_ns.swap(now_ns.max(1), Ordering::Relaxed);
        before == 0 || now_ns.saturating_sub(before) > NEWS_NS
    }
}
