//! What a run came to.

use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};

/// Latencies from 1 ns to an hour, three digits.
const LATENCY_MAX_NS: u64 = 3_600_000_000_000;
const DIGITS: u8 = 3;

/// An empty histogram as all runs use it.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, DIGITS).unwrap_or_else(|error| unreachable!("constant bounds: {error:?}"))
}

/// One reactor's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReactorShare {
    /// Logical core.
    pub lcore: u32,
    /// I/Os that succeeded there.
    pub ios: u64,
}

/// The figures of a run. Failed I/Os are in `errors` and nowhere else.
#[derive(Clone, Debug)]
pub struct Report {
    /// I/Os that succeeded: reads, writes and others; with verify, also those that read back.
    pub ios: u64,
    /// Reads among them.
    pub reads: u64,
    /// Writes among them.
    pub writes: u64,
    /// Bytes read, written, unmapped or zeroed.
    pub bytes: u64,
    /// I/Os that failed.
    pub errors: u64,
    /// I/Os whose content was wrong.
    pub verify_errors: u64,
    /// What the first of those looked like.
    pub first_mismatch: Option<String>,
    /// The bdev went away under the run.
    pub removed: bool,
    /// From the first submission to the last completion, of the slowest reactor.
    pub elapsed_ns: u64,
    /// Exact.
    pub mean_ns: f64,
    /// Exact; 0 if there was no I/O.
    pub min_ns: u64,
    /// Exact.
    pub max_ns: u64,
    /// The longest time in which one reactor saw nothing come back.
    pub max_gap_ns: u64,
    /// By reactor, in the order given.
    pub per_reactor: Vec<ReactorShare>,
    /// All latencies in nanoseconds.
    pub histogram: Histogram<u64>,
}

impl Report {
    /// I/Os a second.
    pub fn iops(&self) -> f64 {
        if self.elapsed_ns == 0 { 0.0 } else { self.ios as f64 * 1e9 / self.elapsed_ns as f64 }
    }

    /// The latency that `percent` of the I/Os did not exceed.
    pub fn percentile_ns(&self, percent: f64) -> u64 {
        self.histogram.value_at_quantile(percent / 100.0).min(self.max_ns)
    }

    /// The histogram in HdrHistogram's V2 encoding.
    pub fn histogram_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Writing to a Vec cannot fail, and the counts are within the encoding's range.
        if V2Serializer::new().serialize(&self.histogram, &mut bytes).is_err() {
            bytes.clear();
        }
        bytes
    }

    pub(crate) fn sum(parts: &[Tally], removed: bool) -> Self {
        let mut histogram = histogram();
        let total = |field: fn(&Tally) -> u64| parts.iter().map(field).sum::<u64>();
        let most = |field: fn(&Tally) -> u64| parts.iter().map(field).max().unwrap_or(0);
        for part in parts {
            // Same bounds, so nothing is lost.
            let _ = histogram.add(&part.histogram);
        }
        let ios = total(|part| part.ios);
        let sum_ns: u128 = parts.iter().map(|part| part.sum_ns).sum();
        Self {
            ios,
            reads: total(|part| part.reads),
            writes: total(|part| part.writes),
            bytes: total(|part| part.bytes),
            errors: total(|part| part.errors),
            verify_errors: total(|part| part.verify_errors),
            first_mismatch: parts.iter().find_map(|part| part.first_mismatch.clone()),
            removed,
            elapsed_ns: most(|part| part.elapsed_ns),
            mean_ns: if ios == 0 { 0.0 } else { sum_ns as f64 / ios as f64 },
            min_ns: parts.iter().filter(|part| part.ios > 0).map(|part| part.min_ns).min().unwrap_or(0),
            max_ns: most(|part| part.max_ns),
            max_gap_ns: most(|part| part.max_gap_ns),
            per_reactor: parts.iter().map(|part| ReactorShare { lcore: part.lcore, ios: part.ios }).collect(),
            histogram,
        }
    }
}

/// One worker's figures while it runs.
pub(crate) struct Tally {
    pub(crate) lcore: u32,
    pub(crate) ios: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) bytes: u64,
    pub(crate) errors: u64,
    pub(crate) verify_errors: u64,
    pub(crate) first_mismatch: Option<String>,
    pub(crate) elapsed_ns: u64,
    pub(crate) sum_ns: u128,
    pub(crate) min_ns: u64,
    pub(crate) max_ns: u64,
    pub(crate) max_gap_ns: u64,
    pub(crate) histogram: Histogram<u64>,
}

impl Tally {
    pub(crate) fn new(lcore: u32) -> Self {
        Self {
            lcore,
            ios: 0,
            reads: 0,
            writes: 0,
            bytes: 0,
            errors: 0,
            verify_errors: 0,
            first_mismatch: None,
            elapsed_ns: 0,
            sum_ns: 0,
            min_ns: u64::MAX,
            max_ns: 0,
            max_gap_ns: 0,
            histogram: histogram(),
        }
    }

    /// Books wrong content.
    #[cold]
    pub(crate) fn wrong(&mut self, what: String) {
        self.verify_errors += 1;
        self.first_mismatch.get_or_insert(what);
    }

    /// Books `count` I/Os that took equally long.
    #[inline]
    pub(crate) fn record(&mut self, latency_ns: u64, count: u64) {
        if count == 0 {
            return;
        }
        self.sum_ns += u128::from(latency_ns) * u128::from(count);
        self.min_ns = self.min_ns.min(latency_ns);
        self.max_ns = self.max_ns.max(latency_ns);
        self.histogram.saturating_record_n(latency_ns, count);
    }
}
