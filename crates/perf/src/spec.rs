//! What to run: the user's wishes, and the plan that follows once the bdev's geometry is known.

use std::str::FromStr;

use qpair_bdev::{Info, Op};

use crate::BdevError;
use crate::verify::SLOTS_MAX;

/// Most I/Os in flight on one reactor.
pub const DEPTH_MAX: u32 = 65536;
/// Largest I/O in bytes.
pub const IO_BYTES_MAX: u32 = 64 << 20;

/// Which I/Os, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Pattern {
    RandRead,
    RandWrite,
    /// Reads and writes at random places, mixed by `read_percent`.
    RandRw,
    Read,
    Write,
    /// As `RandRw`, one address after the other.
    Rw,
    Flush,
    Unmap,
    WriteZeroes,
}

impl FromStr for Pattern {
    type Err = BdevError;

    fn from_str(name: &str) -> Result<Self, BdevError> {
        Ok(match name {
            "randread" => Self::RandRead,
            "randwrite" => Self::RandWrite,
            "randrw" => Self::RandRw,
            "read" => Self::Read,
            "write" => Self::Write,
            "rw" => Self::Rw,
            "flush" => Self::Flush,
            "unmap" => Self::Unmap,
            "write_zeroes" => Self::WriteZeroes,
            other => {
                let limit = "randread, randwrite, randrw, read, write, rw, flush, unmap or write_zeroes";
                return Err(BdevError::invalid("pattern", other, limit));
            }
        })
    }
}

/// A run as the user wants it.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name or UUID.
    pub bdev: String,
    /// Which I/Os.
    pub pattern: Pattern,
    /// Share of reads in the mixed patterns, 0 to 100.
    pub read_percent: u8,
    /// Bytes an I/O, a multiple of the block size.
    pub io_bytes: u32,
    /// I/Os in flight on each reactor.
    pub depth: u32,
    /// Milliseconds; 0: no limit.
    pub duration_ms: u64,
    /// I/Os on all reactors together, without those that read back; 0: no limit.
    pub max_ios: u64,
    /// Check content.
    pub verify: bool,
    /// Of addresses and content: the same seed gives the same run, and finds what a former run wrote.
    pub seed: u64,
    /// First block of the range used.
    pub offset_blocks: u64,
    /// Its length; 0: to the end.
    pub length_blocks: u64,
}

impl Spec {
    /// Random 4 KiB reads at depth 128, without end.
    pub fn new(bdev: &str) -> Self {
        Self {
            bdev: bdev.to_owned(),
            pattern: Pattern::RandRead,
            read_percent: 100,
            io_bytes: 4096,
            depth: 128,
            duration_ms: 0,
            max_ios: 0,
            verify: false,
            seed: 1,
            offset_blocks: 0,
            length_blocks: 0,
        }
    }

    /// Whether the bdev has to be opened for writing.
    pub(crate) fn writes(&self) -> bool {
        !matches!(self.pattern, Pattern::RandRead | Pattern::Read | Pattern::Flush)
    }

    pub(crate) fn reads_percent(&self) -> u8 {
        match self.pattern {
            Pattern::RandRead | Pattern::Read => 100,
            Pattern::RandRw | Pattern::Rw => self.read_percent,
            _ => 0,
        }
    }
}

/// What follows from a spec and a geometry.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The operation that is no read.
    pub(crate) op: Op,
    pub(crate) read_percent: u8,
    pub(crate) random: bool,
    pub(crate) block_size: u32,
    pub(crate) io_blocks: u64,
    pub(crate) io_bytes: u32,
    pub(crate) depth: u32,
    pub(crate) duration_ns: u64,
    pub(crate) verify: bool,
    pub(crate) seed: u64,
    /// First block of the worker's range.
    pub(crate) base: u64,
    /// Places for an I/O in it.
    pub(crate) slots: u64,
    /// I/Os to do.
    pub(crate) quota: u64,
    /// Whether I/Os carry data.
    pub(crate) data: bool,
}

impl Plan {
    /// One plan for each of `workers`: sequential and verifying workers get a part of the range each, so that none
    /// overwrites what another one checks; the others share it.
    pub(crate) fn make(spec: &Spec, info: &Info, workers: usize) -> Result<Vec<Self>, BdevError> {
        check_plain(spec, info)?;
        if workers == 0 {
            return Err(BdevError::invalid("reactors", 0, "one or more"));
        }
        let io_blocks = u64::from(spec.io_bytes / info.block_size);
        let end = match spec.length_blocks {
            0 => info.num_blocks,
            length => spec.offset_blocks.saturating_add(length),
        };
        if spec.offset_blocks >= info.num_blocks || end > info.num_blocks {
            let value = format!("{}+{}", spec.offset_blocks, spec.length_blocks);
            return Err(BdevError::invalid("offset_blocks, length_blocks", value, format!("a range within {} blocks", info.num_blocks)));
        }
        let random = matches!(spec.pattern, Pattern::RandRead | Pattern::RandWrite | Pattern::RandRw);
        let parts = if random && !spec.verify { 1 } else { workers as u64 };
        let slots = (end - spec.offset_blocks) / io_blocks / parts;
        check_slots(spec, slots, parts)?;
        let op = operation(spec.pattern);
        let whole = Self {
            op,
            read_percent: spec.reads_percent(),
            random,
            block_size: info.block_size,
            io_blocks,
            io_bytes: spec.io_bytes,
            depth: spec.depth,
            duration_ns: spec.duration_ms.saturating_mul(1_000_000),
            verify: spec.verify,
            seed: spec.seed,
            base: spec.offset_blocks,
            slots,
            quota: u64::MAX,
            data: matches!(op, Op::Read | Op::Write),
        };
        let plan = |index: u64| {
            let mut plan = whole.clone();
            plan.base += (index % parts) * slots * io_blocks;
            if spec.max_ios > 0 {
                plan.quota = spec.max_ios / workers as u64 + u64::from(index < spec.max_ios % workers as u64);
            }
            plan
        };
        Ok((0..workers as u64).map(plan).collect())
    }
}

fn operation(pattern: Pattern) -> Op {
    match pattern {
        Pattern::RandRead | Pattern::Read => Op::Read,
        Pattern::RandWrite | Pattern::RandRw | Pattern::Write | Pattern::Rw => Op::Write,
        Pattern::Flush => Op::Flush,
        Pattern::Unmap => Op::Unmap,
        Pattern::WriteZeroes => Op::WriteZeroes,
    }
}

fn check_plain(spec: &Spec, info: &Info) -> Result<(), BdevError> {
    if spec.io_bytes == 0 || spec.io_bytes > IO_BYTES_MAX || !spec.io_bytes.is_multiple_of(info.block_size) {
        let limit = format!("a multiple of the block size {} up to {IO_BYTES_MAX}", info.block_size);
        return Err(BdevError::invalid("io_bytes", spec.io_bytes, limit));
    }
    if spec.depth == 0 || spec.depth > DEPTH_MAX {
        return Err(BdevError::invalid("depth", spec.depth, format!("1 to {DEPTH_MAX}")));
    }
    if spec.read_percent > 100 {
        return Err(BdevError::invalid("read_percent", spec.read_percent, "0 to 100"));
    }
    let op = operation(spec.pattern);
    if spec.verify && !matches!(op, Op::Read | Op::Write) {
        return Err(BdevError::invalid("verify", format!("with {:?}", spec.pattern), "a pattern that reads or writes"));
    }
    if spec.writes() && info.readonly {
        return Err(BdevError::invalid(
            "pattern",
            format!("{:?}", spec.pattern),
            format!("one that only reads: {} is read-only", info.name),
        ));
    }
    if op == Op::Unmap && !info.supported.has(Op::Unmap) {
        return Err(BdevError::Unsupported(format!("{} has no unmap", info.name)));
    }
    Ok(())
}

fn check_slots(spec: &Spec, slots: u64, parts: u64) -> Result<(), BdevError> {
    if slots == 0 {
        let limit = format!("at least {} bytes of range for {parts} parts", u64::from(spec.io_bytes) * parts);
        return Err(BdevError::invalid("length_blocks", spec.length_blocks, limit));
    }
    if spec.verify && slots < u64::from(spec.depth) {
        return Err(BdevError::invalid("depth", spec.depth, format!("with verify at most the {slots} I/Os that the range holds")));
    }
    if spec.verify && slots > SLOTS_MAX {
        return Err(BdevError::invalid("length_blocks", spec.length_blocks, format!("with verify at most {SLOTS_MAX} I/Os a reactor")));
    }
    Ok(())
}
