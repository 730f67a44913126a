//! Counters of one channel; a device's are their sum.

use qpair_wire::nvme::Status;

use crate::Op;

/// Times of one kind of I/O, in nanoseconds of reactor time: what ends in the turn it began counts as 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Latency {
    pub ios: u64,
    pub bytes: u64,
    pub total_ns: u64,
    pub max_ns: u64,
    /// `u64::MAX` while there was none.
    pub min_ns: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { ios: 0, bytes: 0, total_ns: 0, max_ns: 0, min_ns: u64::MAX }
    }
}

impl Latency {
    #[inline(always)]
    fn book(&mut self, bytes: u64, elapsed_ns: u64) {
        self.ios += 1;
        self.bytes += bytes;
        self.total_ns += elapsed_ns;
        self.max_ns = self.max_ns.max(elapsed_ns);
        self.min_ns = self.min_ns.min(elapsed_ns);
    }

    fn add(&mut self, other: &Self) {
        self.ios += other.ios;
        self.bytes += other.bytes;
        self.total_ns += other.total_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
        self.min_ns = self.min_ns.min(other.min_ns);
    }
}

/// Failed I/Os by what became of them, in SPDK's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Failures {
    pub aborted: u64,
    pub miscompare: u64,
    pub nomem: u64,
    pub failed: u64,
}

impl Failures {
    #[cold]
    fn book(&mut self, status: Status) {
        let count = match status {
            Status::ABORT_REQUESTED => &mut self.aborted,
            Status::COMPARE_FAILURE => &mut self.miscompare,
            Status::COMMAND_INTERRUPTED => &mut self.nomem,
            _ => &mut self.failed,
        };
        *count += 1;
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.aborted + self.miscompare + self.nomem + self.failed
    }

    fn add(&mut self, other: &Self) {
        self.aborted += other.aborted;
        self.miscompare += other.miscompare;
        self.nomem += other.nomem;
        self.failed += other.failed;
    }
}

/// What bdev_get_iostat tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stats {
    pub read: Latency,
    pub write: Latency,
    pub unmap: Latency,
    pub copy: Latency,
    pub flush_ios: u64,
    pub write_zeroes_ios: u64,
    pub other_ios: u64,
    pub errors: Failures,
}

/// What is set to zero once counters were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reset {
    /// Nothing.
    #[default]
    None,
    /// Everything.
    All,
    /// The largest and smallest times.
    MaxMin,
    /// Failures.
    Errors,
}

/// I/Os of one kind that end together: counted in registers, and written down once.
pub(crate) struct Run {
    op: Op,
    latency: Latency,
}

impl Run {
    #[inline(always)]
    pub(crate) fn of(op: Op) -> Self {
        Self { op, latency: Latency::default() }
    }

    /// As [`Stats::book`], into `stats` only what is not of the kind.
    #[inline(always)]
    pub(crate) fn book(&mut self, stats: &mut Stats, op: Op, bytes: u64, elapsed_ns: u64, status: Status) {
        if op == self.op && !status.is_error() && matches!(op, Op::Read | Op::Write) {
            self.latency.book(bytes, elapsed_ns);
        } else {
            stats.book(op, bytes, elapsed_ns, status);
        }
    }

    #[inline(always)]
    pub(crate) fn end(self, stats: &mut Stats) {
        match self.op {
            Op::Read => stats.read.add(&self.latency),
            Op::Write => stats.write.add(&self.latency),
            _ => {}
        }
    }
}

impl Stats {
    /// Books one finished I/O.
    #[inline(always)]
    pub fn book(&mut self, op: Op, bytes: u64, elapsed_ns: u64, status: Status) {
        match op {
            Op::Read if !status.is_error() => self.read.book(bytes, elapsed_ns),
            Op::Write if !status.is_error() => self.write.book(bytes, elapsed_ns),
            _ => self.book_rest(op, bytes, elapsed_ns, status),
        }
    }

    #[inline(never)]
    fn book_rest(&mut self, op: Op, bytes: u64, elapsed_ns: u64, status: Status) {
        match op {
            _ if status.is_error() => self.errors.book(status),
            Op::Unmap => self.unmap.book(bytes, elapsed_ns),
            Op::Copy => self.copy.book(bytes, elapsed_ns),
            Op::Flush => self.flush_ios += 1,
            Op::WriteZeroes => self.write_zeroes_ios += 1,
            _ => self.other_ios += 1,
        }
    }

    /// I/Os that were done.
    pub fn done(&self) -> u64 {
        let timed = self.read.ios + self.write.ios + self.unmap.ios + self.copy.ios;
        timed + self.flush_ios + self.write_zeroes_ios + self.other_ios
    }

    /// Adds another channel's.
    pub fn add(&mut self, other: &Self) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.unmap.add(&other.unmap);
        self.copy.add(&other.copy);
        self.flush_ios += other.flush_ios;
        self.write_zeroes_ios += other.write_zeroes_ios;
        self.other_ios += other.other_ios;
        self.errors.add(&other.errors);
    }

    /// The counters as they are, and then as `reset` leaves them.
    pub fn tell(&mut self, reset: Reset) -> Self {
        let told = *self;
        match reset {
            Reset::None => {}
            Reset::All => *self = Self::default(),
            Reset::Errors => self.errors = Failures::default(),
            Reset::MaxMin => {
                for latency in [&mut self.read, &mut self.write, &mut self.unmap, &mut self.copy] {
                    (latency.max_ns, latency.min_ns) = (0, u64::MAX);
                }
            }
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Stats {
        let mut stats = Stats::default();
        for (op, elapsed_ns) in [(Op::Read, 5), (Op::Read, 3), (Op::Write, 7), (Op::Unmap, 2), (Op::Copy, 9), (Op::Flush, 1)] {
            stats.book(op, 512, elapsed_ns, Status::SUCCESS);
        }
        for status in [Status::ABORT_REQUESTED, Status::COMPARE_FAILURE, Status::WRITE_FAULT, Status::INVALID_FIELD] {
            stats.book(Op::Write, 512, 100, status);
        }
        stats
    }

    #[test]
    fn successes_count_with_their_times_and_failures_by_kind() {
        let stats = some();
        assert_eq!(stats.read, Latency { ios: 2, bytes: 1024, total_ns: 8, max_ns: 5, min_ns: 3 });
        assert_eq!(stats.write, Latency { ios: 1, bytes: 512, total_ns: 7, max_ns: 7, min_ns: 7 });
        assert_eq!((stats.unmap.total_ns, stats.copy.total_ns, stats.flush_ios), (2, 9, 1));
        assert_eq!(stats.errors, Failures { aborted: 1, miscompare: 1, nomem: 0, failed: 2 });
        assert_eq!((stats.errors.total(), stats.done()), (4, 6));
    }

    #[test]
    fn each_reset_leaves_what_is_not_its_own() {
        let before = some();
        let after = |reset| {
            let mut stats = before;
            assert_eq!(stats.tell(reset), before);
            stats
        };
        assert_eq!(after(Reset::None), before);
        assert_eq!(after(Reset::All), Stats::default());
        assert_eq!(after(Reset::Errors), Stats { errors: Failures::default(), ..before });
        let flat = |latency: Latency| Latency { max_ns: 0, min_ns: u64::MAX, ..latency };
        let (read, write, unmap, copy) = (flat(before.read), flat(before.write), flat(before.unmap), flat(before.copy));
        assert_eq!(after(Reset::MaxMin), Stats { read, write, unmap, copy, ..before });
    }
}
