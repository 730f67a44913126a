//! The memory between the engine and a worker process: two rings of indices, and who rests.
//!
//! How it works. Requests go from the engine to the worker, completions back; each ring has one writer and as many places as the device has slots (rounded up to a
//! power of two), so neither overflows: a slot is in each at most once. Indices run freely and wrap; an index is stored (release) after its entries, and loaded
//! (acquire) before them. Entries are copied out once, then checked. Data lie in another mapping, at the slot's place.
//!
//! **The worker is not trusted.** The engine reads two words and one ring of what the worker writes: how far completions go, whether the worker rests, and the
//! completions. More completions than requests are out, a slot out of the ring or not out, another generation than the request had, an errno past
//! [`ERRNO_MAX`]: each is a [`Lie`], after which nothing of that memory is read again. How far the worker has read is its own affair: the engine never needs
//! it.
//!
//! **No wake-up is lost**, as in [`qpair_reactor::doorbell`]: who is to rest says so, fences, and looks once more; who has published fences and looks whether the
//! other rests. Both may clear the word: whoever clears the other's rings after that.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use qpair_memory::{Mapping, MemoryError, Region, Shared, SharedIndex};

use super::ring::{Stage, Work};
use crate::Op;

/// Largest errno that a worker may answer with.
pub const ERRNO_MAX: u32 = 4095;

const REQUEST_TAIL: u64 = 64;
const ENGINE_RESTS: u64 = 128;
const CLOSED: u64 = 192;
const DONE_TAIL: u64 = 256;
const WORKER_RESTS: u64 = 320;
const ENTRIES: u64 = 512;

/// Slot and generation, operation, first block, number of blocks.
type Request = [u64; 4];
/// Slot and generation, errno.
type Done = [u64; 2];

const OPS: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];

/// What a worker's memory says that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lie {
    /// More completions than there are requests with it.
    #[error("{claimed} completions are claimed, {out} requests are out")]
    TooMany {
        /// By the ring's index.
        claimed: u32,
        /// Requests with the worker.
        out: u32,
    },
    /// A completion of what the worker does not have.
    #[error("slot {slot} is completed, which is not with the worker")]
    NotOut {
        /// As the entry has it.
        slot: u32,
    },
    /// A completion of an earlier request in the same slot.
    #[error("slot {slot} is completed for its use {claimed}, this is use {generation}")]
    Stale {
        /// As the entry has it.
        slot: u32,
        /// As the entry has it.
        claimed: u32,
        /// The request's.
        generation: u32,
    },
    /// No such errno.
    #[error("errno {errno}: 0 to {ERRNO_MAX}")]
    Errno {
        /// As the entry has it.
        errno: u64,
    },
}

/// A completion as the worker claims it: nothing of it is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which slot.
    pub slot: u32,
    /// Which use of it.
    pub generation: u32,
    /// 0 is success.
    pub errno: u64,
}

fn capacity(depth: u32) -> u32 {
    depth.next_power_of_two()
}

/// Bytes of the memory between the two for a ring of `depth`.
pub fn control_bytes(depth: u32) -> usize {
    ENTRIES as usize + capacity(depth) as usize * (size_of::<Request>() + size_of::<Done>())
}

struct Windows {
    request_tail: SharedIndex,
    engine_rests: SharedIndex,
    closed: SharedIndex,
    done_tail: SharedIndex,
    worker_rests: SharedIndex,
    requests: Shared<Request>,
    done: Shared<Done>,
    mask: u16,
}

impl Windows {
    fn over(control: &Arc<Mapping>, depth: u32) -> Result<Self, MemoryError> {
        let region = Region::new(control.clone());
        let count = capacity(depth);
        let index = |offset| SharedIndex::new(&region, offset);
        let done_at = ENTRIES + u64::from(count) * size_of::<Request>() as u64;
        Ok(Self {
            request_tail: index(REQUEST_TAIL)?,
            engine_rests: index(ENGINE_RESTS)?,
            closed: index(CLOSED)?,
            done_tail: index(DONE_TAIL)?,
            worker_rests: index(WORKER_RESTS)?,
            requests: Shared::new(&region, ENTRIES, count as usize)?,
            done: Shared::new(&region, done_at, count as usize)?,
            // At most 4096 places.
            mask: (count - 1) as u16,
        })
    }

    fn place(&self, index: u16) -> usize {
        usize::from(index & self.mask)
    }
}

fn name(slot: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(slot)
}

/// The engine's end.
pub struct EngineEnd {
    windows: Windows,
    request_tail: u16,
    done_head: u16,
}

impl EngineEnd {
    /// Over fresh memory of [`control_bytes`].
    pub fn new(control: &Arc<Mapping>, depth: u32) -> Result<Self, MemoryError> {
        Ok(Self { windows: Windows::over(control, depth)?, request_tail: 0, done_head: 0 })
    }

    /// Writes a request; seen by the worker after [`publish`](Self::publish).
    pub fn push(&mut self, work: &Work, generation: u32) {
        let op = OPS.iter().position(|op| *op == work.op).unwrap_or(0) as u64;
        let request = [name(work.slot, generation), op, work.offset_blocks, work.num_blocks];
        self.windows.requests.store(self.windows.place(self.request_tail), request);
        self.request_tail = self.request_tail.wrapping_add(1);
    }

    /// Shows what was pushed. True: the worker rests, ring.
    pub fn publish(&mut self) -> bool {
        self.windows.request_tail.store(self.request_tail, Ordering::Release);
        fence(Ordering::SeqCst);
        let rests = self.windows.worker_rests.load(Ordering::SeqCst) != 0;
        if rests {
            self.windows.worker_rests.store(0, Ordering::SeqCst);
        }
        rests
    }

    /// How many completions wait, where `out` requests are with the worker.
    pub fn waiting(&self, out: u32) -> Result<u32, Lie> {
        let claimed = u32::from(self.windows.done_tail.load(Ordering::Acquire).wrapping_sub(self.done_head));
        if claimed > out { Err(Lie::TooMany { claimed, out }) } else { Ok(claimed) }
    }

    /// The next completion, of those that [`waiting`](Self::waiting) told.
    pub fn pop(&mut self) -> Claim {
        let [name, errno] = self.windows.done.load(self.windows.place(self.done_head));
        self.done_head = self.done_head.wrapping_add(1);
        Claim { slot: name as u32, generation: (name >> 32) as u32, errno }
    }

    /// Says that the engine rests: from now on it is rung for. Look once more after it.
    pub fn rest(&self) {
        self.windows.engine_rests.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Is up again.
    pub fn rise(&self) {
        self.windows.engine_rests.store(0, Ordering::SeqCst);
    }

    /// Tells the worker to end. Ring after it.
    pub fn close(&self) {
        self.windows.closed.store(1, Ordering::SeqCst);
    }
}

/// The worker's end. It trusts the engine.
pub struct WorkerEnd {
    control: Arc<Mapping>,
    depth: u32,
    stride: u64,
    block_size: u32,
    request_head: u16,
    done_tail: u16,
    generations: Box<[u32]>,
}

impl WorkerEnd {
    /// Over the engine's memory, from its start. Buffers lie `stride` bytes apart in another mapping.
    pub fn new(control: Arc<Mapping>, depth: u32, stride: u64, block_size: u32) -> Result<Self, MemoryError> {
        Windows::over(&control, depth)?;
        Ok(Self { control, depth, stride, block_size, request_head: 0, done_tail: 0, generations: vec![0; depth as usize].into() })
    }

    fn windows(&self) -> Option<Windows> {
        Windows::over(&self.control, self.depth).ok()
    }

    /// Whether the engine wants no more of it.
    pub fn is_closed(&self) -> bool {
        self.windows().is_none_or(|windows| windows.closed.load(Ordering::SeqCst) != 0)
    }

    /// Takes up to `max` requests. Empty: there are none, and the engine rings when one comes.
    pub fn fetch(&mut self, max: usize) -> Vec<Work> {
        let mut out = Vec::new();
        let Some(windows) = self.windows() else { return out };
        loop {
            self.take(&windows, max, &mut out);
            if !out.is_empty() || max == 0 {
                return out;
            }
            windows.worker_rests.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if windows.request_tail.load(Ordering::Acquire) == self.request_head {
                return out;
            }
            windows.worker_rests.store(0, Ordering::SeqCst);
        }
    }

    fn take(&mut self, windows: &Windows, max: usize, out: &mut Vec<Work>) {
        let tail = windows.request_tail.load(Ordering::Acquire);
        while out.len() < max && self.request_head != tail {
            let [name, op, offset_blocks, num_blocks] = windows.requests.load(windows.place(self.request_head));
            self.request_head = self.request_head.wrapping_add(1);
            let (slot, op) = (name as u32, OPS[op as usize % OPS.len()]);
            let Some(generation) = self.generations.get_mut(slot as usize) else { continue };
            *generation = (name >> 32) as u32;
            let bytes = num_blocks.saturating_mul(u64::from(self.block_size)).min(self.stride);
            let buffer = matches!(op, Op::Read | Op::Write).then(|| (u64::from(slot) * self.stride, bytes));
            out.push(Work { slot, op, offset_blocks, num_blocks, buffer, stage: Stage::Whole });
        }
    }

    /// Ends requests that were fetched, each once. True: the engine rests, ring.
    pub fn complete(&mut self, batch: &[(u32, i32)]) -> bool {
        let Some(windows) = self.windows() else { return false };
        for (slot, errno) in batch {
            let generation = self.generations.get(*slot as usize).copied().unwrap_or_default();
            windows.done.store(windows.place(self.done_tail), [name(*slot, generation), u64::from(errno.unsigned_abs())]);
            self.done_tail = self.done_tail.wrapping_add(1);
        }
        windows.done_tail.store(self.done_tail, Ordering::Release);
        fence(Ordering::SeqCst);
        let rests = windows.engine_rests.load(Ordering::SeqCst) != 0;
        if rests {
            windows.engine_rests.store(0, Ordering::SeqCst);
        }
        rests
    }
}
