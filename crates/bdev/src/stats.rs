//! Counters of one channel; a device's are their sum.

use crate::Op;

/// What bdev_get_iostat tells. Times are reactor time: what ends in the turn it began counts as 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stats {
    pub read_ios: u64,
    pub read_bytes: u64,
    pub write_ios: u64,
    pub write_bytes: u64,
    pub unmap_ios: u64,
    pub unmap_bytes: u64,
    pub flush_ios: u64,
    pub write_zeroes_ios: u64,
    pub other_ios: u64,
    pub errors: u64,
    pub read_ns: u64,
    pub write_ns: u64,
    pub unmap_ns: u64,
    pub max_read_ns: u64,
    pub max_write_ns: u64,
    pub min_read_ns: Option<u64>,
    pub min_write_ns: Option<u64>,
}

impl Stats {
    /// Books one finished I/O.
    #[inline]
    pub fn book(&mut self, op: Op, bytes: u64, elapsed_ns: u64, failed: bool) {
        if failed {
            self.errors += 1;
            return;
        }
        match op {
            Op::Read => {
                self.read_ios += 1;
                self.read_bytes += bytes;
                self.read_ns += elapsed_ns;
                self.max_read_ns = self.max_read_ns.max(elapsed_ns);
                self.min_read_ns = Some(self.min_read_ns.map_or(elapsed_ns, |least| least.min(elapsed_ns)));
            }
            Op::Write => {
                self.write_ios += 1;
                self.write_bytes += bytes;
                self.write_ns += elapsed_ns;
                self.max_write_ns = self.max_write_ns.max(elapsed_ns);
                self.min_write_ns = Some(self.min_write_ns.map_or(elapsed_ns, |least| least.min(elapsed_ns)));
            }
            Op::Unmap => {
                self.unmap_ios += 1;
                self.unmap_bytes += bytes;
                self.unmap_ns += elapsed_ns;
            }
            Op::Flush => self.flush_ios += 1,
            Op::WriteZeroes => self.write_zeroes_ios += 1,
            _ => self.other_ios += 1,
        }
    }

    /// Adds another channel's.
    pub fn add(&mut self, other: &Self) {
        let least = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        self.read_ios += other.read_ios;
        self.read_bytes += other.read_bytes;
        self.write_ios += other.write_ios;
        self.write_bytes += other.write_bytes;
        self.unmap_ios += other.unmap_ios;
        self.unmap_bytes += other.unmap_bytes;
        self.flush_ios += other.flush_ios;
        self.write_zeroes_ios += other.write_zeroes_ios;
        self.other_ios += other.other_ios;
        self.errors += other.errors;
        self.read_ns += other.read_ns;
        self.write_ns += other.write_ns;
        self.unmap_ns += other.unmap_ns;
        self.max_read_ns = self.max_read_ns.max(other.max_read_ns);
        self.max_write_ns = self.max_write_ns.max(other.max_write_ns);
        self.min_read_ns = least(self.min_read_ns, other.min_read_ns);
        self.min_write_ns = least(self.min_write_ns, other.min_write_ns);
    }
}
