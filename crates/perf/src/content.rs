//! What one worker knows of the content of its range, place by place.

use qpair_bdev::{Io, Op};
use qpair_memory::{MemoryError, Region};

use crate::spec::Plan;
use crate::verify::{Checker, Demand, Mismatch};

/// Set in a generation whose write failed: what lies there is not known.
const UNKNOWN: u32 = 1 << 31;

/// What becomes of an I/O that came back.
pub(crate) enum Verdict {
    /// Its place is free.
    Good,
    /// It is now a read of what it wrote.
    ReadBack,
    /// Its place is free, and its content was wrong.
    Wrong(String),
}

pub(crate) struct Content {
    checker: Checker,
    base: u64,
    io_blocks: u64,
    io_bytes: u64,
    /// Last written to each place; 0: nothing by this run.
    generations: Vec<u32>,
    /// Places with an I/O in flight: never two at once, so that order is known.
    busy: Vec<bool>,
    /// Writes alone: each is read back.
    reads_back: bool,
    /// Reads alone: everything must have been written by a former run.
    only_reads: bool,
}

impl Content {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            checker: Checker::new(plan.seed, plan.block_size),
            base: plan.base,
            io_blocks: plan.io_blocks,
            io_bytes: u64::from(plan.io_bytes),
            generations: vec![0; plan.slots as usize],
            busy: vec![false; plan.slots as usize],
            reads_back: plan.op == Op::Write && plan.read_percent == 0,
            only_reads: plan.op == Op::Read,
        }
    }

    /// The place wished for, or the next that nobody is at. There is one: places are at least as many as I/Os.
    pub(crate) fn claim(&mut self, wish: u64) -> u64 {
        let count = self.busy.len();
        let mut slot = wish as usize;
        while self.busy[slot] {
            slot = if slot + 1 == count { 0 } else { slot + 1 };
        }
        self.busy[slot] = true;
        slot as u64
    }

    fn slot(&self, io: &Io) -> usize {
        ((io.lba - self.base) / self.io_blocks) as usize
    }

    /// Readies the buffer of an I/O that is about to go out.
    pub(crate) fn prepare(&mut self, region: &Region, io: &Io) -> Result<(), MemoryError> {
        let offset = io.list.first().map_or(0, |entry| entry.offset);
        if io.op == Op::Read {
            return Checker::scribble(region, offset, self.io_bytes);
        }
        let slot = self.slot(io);
        let generation = (self.generations[slot] & !UNKNOWN) % (UNKNOWN - 1) + 1;
        self.generations[slot] = generation;
        self.checker.write(region, offset, io.lba, self.io_blocks, generation)
    }

    /// An I/O failed: its place is free, and after a write unknown.
    pub(crate) fn failed(&mut self, io: &Io) {
        let slot = self.slot(io);
        self.busy[slot] = false;
        if io.op == Op::Write {
            self.generations[slot] |= UNKNOWN;
        }
    }

    /// Looks at an I/O that succeeded.
    pub(crate) fn finished(&mut self, region: &Region, io: &mut Io) -> Verdict {
        if io.op == Op::Write && self.reads_back {
            io.op = Op::Read;
            return match self.prepare(region, io) {
                Ok(()) => Verdict::ReadBack,
                Err(error) => Verdict::Wrong(error.to_string()),
            };
        }
        let slot = self.slot(io);
        self.busy[slot] = false;
        let demand = match self.generations[slot] {
            _ if io.op == Op::Write => return Verdict::Good,
            0 if self.only_reads => Demand::Any,
            0 => return Verdict::Good,
            generation if generation & UNKNOWN != 0 => return Verdict::Good,
            generation => Demand::Exactly(generation),
        };
        let offset = io.list.first().map_or(0, |entry| entry.offset);
        match self.checker.check(region, offset, io.lba, self.io_blocks, demand) {
            Ok(None) => Verdict::Good,
            Ok(Some(mismatch)) => Verdict::Wrong(Mismatch::to_string(&mismatch)),
            Err(error) => Verdict::Wrong(error.to_string()),
        }
    }
}
