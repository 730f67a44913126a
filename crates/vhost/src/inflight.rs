//! The inflight region: which requests were with us when we died (vhost-user, "Inflight I/O tracking", split ring).
//!
//! The front end keeps the region through our death and gives it to our successor. Before a request is submitted its
//! head is marked with a rising counter. When a batch is done: (1) its heads are linked and `last_batch_head` names the
//! first; (2) the used index is published; (3) the marks are taken off; (4) the header's used index follows. A successor
//! that finds the header's index behind the ring's knows that it died between 2 and 4: it takes off the marks of the
//! last batch, as many as the ring is ahead. What is still marked was never answered, and is submitted again in order.
//!
//! Every store is volatile and fenced against the compiler, so that they happen in this order in memory, which is all that
//! a killed process leaves behind. The region may lie: all that is read is checked, and a contradiction is refused.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use qpair_memory::{Mapping, MemoryError, Region, Shared, SharedIndex};
use qpair_wire::vhost_user::{
    INFLIGHT_DESC_NUM_OFFSET, INFLIGHT_LAST_BATCH_HEAD_OFFSET, INFLIGHT_USED_IDX_OFFSET, INFLIGHT_VERSION, INFLIGHT_VERSION_OFFSET,
    inflight_desc_offset, inflight_queue_bytes, inflight_region_bytes,
};

use crate::{Broken, QUEUES_MAX, VhostError};

/// One descriptor's entry as two words: mark, padding and link; counter.
const MARK: u64 = 1;
const LINK_SHIFT: u32 = 48;

/// The region of a session, shared by its rings.
#[derive(Clone, Debug)]
pub struct Inflight {
    mapping: Arc<Mapping>,
    offset: u64,
    num_queues: u16,
    queue_size: u16,
}

impl Inflight {
    /// A new, empty one, and its descriptor for the front end.
    pub fn create(num_queues: u16, queue_size: u16) -> Result<(Self, OwnedFd, u64), VhostError> {
        check(num_queues, queue_size)?;
        let bytes = inflight_region_bytes(num_queues, queue_size);
        let mapping = Mapping::memfd("qpair-inflight", bytes as usize)?;
        let fd = mapping.fd().ok_or(VhostError::State("the inflight region has no descriptor".into()))?;
        let fd = fd.try_clone_to_owned().map_err(|error| VhostError::Os("dup", error))?;
        Ok((Self { mapping, offset: 0, num_queues, queue_size }, fd, bytes))
    }

    /// One that the front end gave back.
    pub fn adopt(fd: &OwnedFd, size: u64, offset: u64, num_queues: u16, queue_size: u16) -> Result<Self, VhostError> {
        check(num_queues, queue_size)?;
        let least = inflight_region_bytes(num_queues, queue_size);
        if size < least {
            return Err(VhostError::invalid(
                "inflight mmap_size",
                size,
                format!("at least {least} for {num_queues} queues of {queue_size}"),
            ));
        }
        let end =
            offset.checked_add(size).ok_or_else(|| VhostError::invalid("inflight mmap_offset", offset, "offset + size below 2^64"))?;
        let mapping = Mapping::shared(fd.as_fd(), end)?;
        Ok(Self { mapping, offset, num_queues, queue_size })
    }

    pub(crate) fn queue(&self, index: u16, size: u16) -> Result<InflightQueue, Broken> {
        if index >= self.num_queues || size > self.queue_size {
            let (num, entries) = (self.num_queues, self.queue_size);
            return Err(Broken::Inflight(format!("queue {index} of {size} entries does not fit a region of {num} queues of {entries}")));
        }
        let base = self.offset + inflight_queue_bytes(self.queue_size) * u64::from(index);
        let entries = self.offset + inflight_desc_offset(index, self.queue_size, 0);
        InflightQueue::new(&Region::new(self.mapping.clone()), base, entries, size).map_err(|error| Broken::Inflight(error.to_string()))
    }

    /// The largest ring that it can track.
    pub(crate) fn queue_size(&self) -> u16 {
        self.queue_size
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.mapping.is_dead()
    }
}

fn check(num_queues: u16, queue_size: u16) -> Result<(), VhostError> {
    if num_queues == 0 || u32::from(num_queues) > QUEUES_MAX {
        return Err(VhostError::invalid("inflight num_queues", num_queues, format!("1 to {QUEUES_MAX}")));
    }
    if !queue_size.is_power_of_two() || queue_size > 32768 {
        return Err(VhostError::invalid("inflight queue_size", queue_size, "a power of two up to 32768"));
    }
    Ok(())
}

/// One ring's part of the region.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    version: SharedIndex,
    desc_num: SharedIndex,
    last_batch_head: SharedIndex,
    used_idx: SharedIndex,
    entries: Shared<[u64; 2]>,
    counter: u64,
    batch: Vec<u16>,
}

/// What a predecessor left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Whether anybody had used the region before: only then does it know where the ring goes on.
    pub(crate) used_before: bool,
    /// Heads to submit again, oldest first.
    pub(crate) heads: Vec<u16>,
}

impl InflightQueue {
    fn new(region: &Region, base: u64, entries: u64, size: u16) -> Result<Self, MemoryError> {
        Ok(Self {
            version: SharedIndex::new(region, base + INFLIGHT_VERSION_OFFSET)?,
            desc_num: SharedIndex::new(region, base + INFLIGHT_DESC_NUM_OFFSET)?,
            last_batch_head: SharedIndex::new(region, base + INFLIGHT_LAST_BATCH_HEAD_OFFSET)?,
            used_idx: SharedIndex::new(region, base + INFLIGHT_USED_IDX_OFFSET)?,
            entries: Shared::new(region, entries, usize::from(size))?,
            counter: 0,
            batch: Vec::with_capacity(usize::from(size)),
        })
    }

    fn size(&self) -> u16 {
        self.entries.count() as u16
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
            let [word, counter] = self.entries.load(usize::from(head));
            if word & 0xff == MARK {
                marked.push((u64::from_le(counter), head));
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
            let [word, counter] = self.entries.load(usize::from(head));
            let word = u64::from_le(word);
            self.entries.store(usize::from(head), [(word & !0xff).to_le(), counter]);
            head = (word >> LINK_SHIFT) as u16;
        }
        self.used_idx.store(ring_used, Ordering::Release);
        Ok(())
    }

    /// Before a request is submitted.
    #[inline]
    pub(crate) fn mark(&mut self, head: u16) {
        self.entries.store(usize::from(head), [MARK.to_le(), self.counter.to_le()]);
        self.counter = self.counter.wrapping_add(1);
    }

    /// A request is done and about to be in the used ring.
    #[inline]
    pub(crate) fn add_done(&mut self, head: u16) {
        let link = if self.batch.is_empty() { 0 } else { self.last_batch_head.load(Ordering::Relaxed) };
        let [_, counter] = self.entries.load(usize::from(head));
        self.entries.store(usize::from(head), [(MARK | u64::from(link) << LINK_SHIFT).to_le(), counter]);
        compiler_fence(Ordering::SeqCst);
        self.last_batch_head.store(head, Ordering::Relaxed);
        self.batch.push(head);
    }

    /// The used index was published.
    pub(crate) fn end_batch(&mut self, ring_used: u16) {
        compiler_fence(Ordering::SeqCst);
        while let Some(head) = self.batch.pop() {
            let [word, counter] = self.entries.load(usize::from(head));
            self.entries.store(usize::from(head), [word & !MARK.to_le(), counter]);
        }
        compiler_fence(Ordering::SeqCst);
        self.used_idx.store(ring_used, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
