//! The inflight region of a split ring.
//!
//! Before a request is submitted its head is marked with a rising counter. When a batch is done: (1) its heads are linked and
//! `last_batch_head` names the first; (2) the used index is published; (3) the marks are taken off; (4) the header's used index follows. A
//! successor that finds the header's index behind the ring's knows that its predecessor died between 2 and 4: it takes off the marks of the
//! last batch, as many as the ring is ahead. What is still marked was never answered, and is submitted again in order.

use std::sync::atomic::{Ordering, compiler_fence};

use qpair_memory::{MemoryError, Region, Shared, SharedIndex};
use qpair_wire::vhost_user::{
    INFLIGHT_DESC_NUM_OFFSET, INFLIGHT_LAST_BATCH_HEAD_OFFSET, INFLIGHT_USED_IDX_OFFSET, INFLIGHT_VERSION, INFLIGHT_VERSION_OFFSET,
    inflight_desc_offset,
};

use crate::ring::{Taken, Tracker};
use crate::{Broken, SplitRing};

/// One descriptor's entry as two words: mark, padding and link; counter.
const MARK: u64 = 1;
const LINK_SHIFT: u32 = 48;

/// One ring's part of the region.
#[derive(Debug)]
pub(crate) struct SplitTracker {
    version: SharedIndex,
    desc_num: SharedIndex,
    last_batch_head: SharedIndex,
    used_idx: SharedIndex,
    /// Two an entry: mark and link; counter.
    words: Shared<u64>,
    counter: u64,
    /// What is done and not yet shown: its entry, and the entry's first word.
    batch: Vec<(u16, u64)>,
}

/// What a predecessor left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Whether anybody had used the region before: only then does it know where the ring goes on.
    pub(crate) used_before: bool,
    /// Heads to submit again, oldest first.
    pub(crate) heads: Vec<u16>,
}

impl SplitTracker {
    pub(super) fn new(region: &Region, base: u64, size: u16) -> Result<Self, MemoryError> {
        Ok(Self {
            version: SharedIndex::new(region, base + INFLIGHT_VERSION_OFFSET)?,
            desc_num: SharedIndex::new(region, base + INFLIGHT_DESC_NUM_OFFSET)?,
            last_batch_head: SharedIndex::new(region, base + INFLIGHT_LAST_BATCH_HEAD_OFFSET)?,
            used_idx: SharedIndex::new(region, base + INFLIGHT_USED_IDX_OFFSET)?,
            words: Shared::new(region, base + inflight_desc_offset(0, 0, 0), 2 * usize::from(size))?,
            counter: 0,
            batch: Vec::with_capacity(usize::from(size)),
        })
    }

    fn size(&self) -> u16 {
        (self.words.count() / 2) as u16
    }

    /// Reads what is there against the ring's used index; starts a fresh region.
    pub(crate) fn recover(&mut self, ring_used: u16) -> Result<Recovered, Broken> {
        let size = self.size();
        match self.version.load(Ordering::Acquire) {
            0 => {
                self.desc_num.store(size, Ordering::Relaxed);
                self.used_idx.store(ring_used, Ordering::Relaxed);
                self.version.store(INFLIGHT_VERSION, Ordering::Release);
                return Ok(Recovered { used_before: false, heads: Vec::new() });
            }
            INFLIGHT_VERSION => {}
            other => return Err(Broken::Inflight(format!("version {other}, only {INFLIGHT_VERSION} is known"))),
        }
        let desc_num = self.desc_num.load(Ordering::Relaxed);
        if desc_num != size {
            return Err(Broken::Inflight(format!("desc_num {desc_num}, the ring has {size}")));
        }
        self.undo_last_batch(ring_used)?;
        let mut marked: Vec<(u64, u16)> = Vec::new();
        for head in 0..size {
            if self.word(head) & 0xff == MARK {
                marked.push((u64::from_le(self.words.load(2 * usize::from(head) + 1)), head));
            }
        }
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { used_before: true, heads: marked.into_iter().map(|(_, head)| head).collect() })
    }

    /// Died after the used index was published and before the marks were off: takes them off now.
    fn undo_last_batch(&mut self, ring_used: u16) -> Result<(), Broken> {
        let ahead = ring_used.wrapping_sub(self.used_idx.load(Ordering::Relaxed));
        if ahead > self.size() {
            return Err(Broken::Inflight(format!("its used index is {ahead} behind a ring of {}", self.size())));
        }
        let mut head = self.last_batch_head.load(Ordering::Relaxed);
        for _ in 0..ahead {
            if head >= self.size() {
                return Err(Broken::Inflight(format!("the last batch names descriptor {head} of {}", self.size())));
            }
            let word = self.word(head);
            self.set_word(head, word & !0xff);
            head = (word >> LINK_SHIFT) as u16;
        }
        self.used_idx.store(ring_used, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn word(&self, head: u16) -> u64 {
        u64::from_le(self.words.load(2 * usize::from(head)))
    }

    #[inline]
    fn set_word(&self, head: u16, word: u64) {
        self.words.store(2 * usize::from(head), word.to_le());
    }

    #[inline]
    fn note(&mut self, head: u16) {
        self.words.store(2 * usize::from(head) + 1, self.counter.to_le());
        self.set_word(head, MARK);
        self.counter = self.counter.wrapping_add(1);
    }

    #[inline]
    fn link(&mut self, head: u16) {
        let link = self.batch.last().map_or(0, |(head, _)| *head);
        let word = MARK | u64::from(link) << LINK_SHIFT;
        self.set_word(head, word);
        compiler_fence(Ordering::SeqCst);
        self.last_batch_head.store(head, Ordering::Relaxed);
        self.batch.push((head, word));
    }

    fn forget_batch(&mut self, ring_used: u16) {
        compiler_fence(Ordering::SeqCst);
        for (head, word) in &self.batch {
            self.set_word(*head, word & !MARK);
        }
        self.batch.clear();
        compiler_fence(Ordering::SeqCst);
        self.used_idx.store(ring_used, Ordering::Release);
    }
}

impl Tracker<SplitRing> for SplitTracker {
    const ONE_BY_ONE: bool = false;

    #[inline]
    fn mark(&mut self, _: &SplitRing, taken: Taken) -> u16 {
        self.note(taken.id);
        taken.id
    }

    #[inline]
    fn add_done(&mut self, _: &SplitRing, head: u16) {
        self.link(head);
    }

    fn end_batch(&mut self, ring: &SplitRing) {
        self.forget_batch(ring.next_used());
    }
}

#[cfg(test)]
mod tests;
