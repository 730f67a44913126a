//! The inflight region of a packed ring.
//!
//! Answers overwrite descriptors of chains that are still in flight, so the region holds copies of all descriptors that were taken. Its entries are
//! chained, those of a request from its first, the others in a free list that `free_head` begins. What is done changes `free_head` and the used position;
//! what is settled is in `old_free_head` and the old position. So:
//!
//! * *taking* copies the chain's descriptors to the first free entries, marks the first with a rising counter, and then moves both heads at once. Until
//!   then the entries are on the free list, where a mark means nothing.
//! * *answering*: (1) the chain's entries go before the free list and `free_head` names them; (2) the used position moves on;
//!   (3) the used descriptor is published; (4) the mark is taken off; (5) the old head and the old position follow.
//!
//! A successor that finds the position ahead of the old one looks at the descriptor there: if it is still available, the predecessor
//! died before 3, and head and position go back; else the driver may have seen the answer, and the old ones follow. Then it takes all marks off the free
//! list. What is still marked was never answered.
//!
//! Answers are shown one by one. The specification allows batches, of which only the first used descriptor is looked at; but what a predecessor
//! wrote of the others would then have to be found and taken back, which no successor does.
//!
//! The two heads are one 32-bit store, the positions one of 64 bits, so that no kill tears them. Where the free list goes, each chain's last entry, and
//! the counter are also kept here: once it was checked, the region is only written, and what its other holder does to it meanwhile concerns a successor.

use std::sync::atomic::{Ordering, compiler_fence};

use qpair_memory::{MemoryError, Region, Shared, SharedIndex};
use qpair_wire::vhost_user::{
    INFLIGHT_PACKED_DESC_NUM_OFFSET, INFLIGHT_PACKED_ENTRIES_OFFSET, INFLIGHT_PACKED_FREE_HEAD_OFFSET, INFLIGHT_PACKED_USED_IDX_OFFSET,
    INFLIGHT_PACKED_VERSION_OFFSET, INFLIGHT_VERSION,
};
use qpair_wire::virtio::DescFlags;
use qpair_wire::virtio_packed::Position;

use crate::packed::{FLAGS_SHIFT, ID_SHIFT, refused};
use crate::ring::{Buffer, Chain, Taken, Tracker};
use crate::{Broken, PackedRing};

/// An entry as four words: mark, link, last, number; counter; id, flags, length; address.
type Entry = [u64; 4];
const MARK: u64 = 1;

/// What a predecessor left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Where the ring stood and how many descriptors were in flight; None in a region that was never used.
    pub(crate) at: Option<(Position, u16)>,
    /// The first entries of the requests to submit again, oldest first.
    pub(crate) entries: Vec<u16>,
}

/// One ring's part of the region.
#[derive(Debug)]
pub(crate) struct PackedTracker {
    version: SharedIndex,
    desc_num: SharedIndex,
    /// `free_head` and `old_free_head`.
    heads: Shared<u32>,
    /// Both used indices, then both wrap counters.
    used: Shared<u64>,
    entries: Shared<Entry>,
    /// The entries' marks are each the first of so many bytes.
    bytes: Shared<u8>,
    /// The entries' links are each the second of so many.
    halves: Shared<u16>,
    free: u16,
    next: Vec<u16>,
    /// Of the chain that an entry begins: its last entry and its number.
    chains: Vec<(u16, u16)>,
    counter: u64,
    /// The entry whose answer is not yet shown, and where the ring stood before it.
    done: Option<u16>,
    settled: Position,
}

const ENTRY_BYTES: usize = size_of::<Entry>();

impl PackedTracker {
    pub(super) fn new(region: &Region, base: u64, size: u16) -> Result<Self, MemoryError> {
        let (count, entries) = (usize::from(size), base + INFLIGHT_PACKED_ENTRIES_OFFSET);
        Ok(Self {
            version: SharedIndex::new(region, base + INFLIGHT_PACKED_VERSION_OFFSET)?,
            desc_num: SharedIndex::new(region, base + INFLIGHT_PACKED_DESC_NUM_OFFSET)?,
            heads: Shared::new(region, base + INFLIGHT_PACKED_FREE_HEAD_OFFSET, 1)?,
            used: Shared::new(region, base + INFLIGHT_PACKED_USED_IDX_OFFSET, 1)?,
            entries: Shared::new(region, entries, count)?,
            bytes: Shared::new(region, entries, ENTRY_BYTES * count)?,
            halves: Shared::new(region, entries, ENTRY_BYTES / 2 * count)?,
            free: 0,
            next: (1..=size).collect(),
            chains: vec![(0, 0); count],
            counter: 0,
            done: None,
            settled: Position::START,
        })
    }

    fn size(&self) -> u16 {
        self.entries.count() as u16
    }

    /// Both heads at once.
    #[inline]
    fn set_heads(&self, now: u16, settled: u16) {
        compiler_fence(Ordering::SeqCst);
        self.heads.store_atomic(0, u32::from(now) | u32::from(settled) << 16, Ordering::Release);
    }

    /// Both positions at once.
    #[inline]
    fn set_used(&self, now: Position, settled: Position) {
        let wraps = u64::from(now.wrap()) | u64::from(settled.wrap()) << 8;
        compiler_fence(Ordering::SeqCst);
        self.used.store_atomic(0, u64::from(now.index()) | u64::from(settled.index()) << 16 | wraps << 32, Ordering::Release);
    }

    /// Reads what is there against the ring; starts a fresh region.
    pub(crate) fn recover(&mut self, ring: &PackedRing) -> Result<Found, Broken> {
        let size = self.size();
        match self.version.load(Ordering::Acquire) {
            0 => {
                self.start(ring.next_used());
                return Ok(Found { at: None, entries: Vec::new() });
            }
            INFLIGHT_VERSION => {}
            other => return Err(Broken::Inflight(format!("version {other}, only {INFLIGHT_VERSION} is known"))),
        }
        let desc_num = self.desc_num.load(Ordering::Relaxed);
        if desc_num != size {
            return Err(Broken::Inflight(format!("desc_num {desc_num}, the ring has {size}")));
        }
        self.settle(ring)?;
        let mut seen = vec![false; usize::from(size)];
        self.walk_free(&mut seen)?;
        let (entries, outstanding) = self.walk_marked(&mut seen)?;
        Ok(Found { at: Some((self.settled, outstanding)), entries })
    }

    fn start(&mut self, at: Position) {
        for entry in 0..self.size() {
            self.entries.store(usize::from(entry), [u64::from(entry + 1) << 16, 0, 0, 0].map(u64::to_le));
        }
        self.desc_num.store(self.size(), Ordering::Relaxed);
        self.settled = at;
        self.set_heads(0, 0);
        self.set_used(at, at);
        self.version.store(INFLIGHT_VERSION, Ordering::Release);
    }

    /// Died while it answered: goes forth or back.
    fn settle(&mut self, ring: &PackedRing) -> Result<(), Broken> {
        let (heads, used) = (self.heads.load_atomic(0, Ordering::Acquire), self.used.load_atomic(0, Ordering::Acquire));
        let (head, old_head) = (heads as u16, (heads >> 16) as u16);
        let position = |index: u64, wrap: u64| {
            let at = Position::new(index as u16, wrap & 0xff != 0);
            let holds = index & 0xffff < u64::from(self.size()) && wrap & 0xff <= 1;
            holds.then_some(at).ok_or_else(|| {
                Broken::Inflight(format!("used index {} with wrap counter {} on a ring of {}", index & 0xffff, wrap & 0xff, self.size()))
            })
        };
        let (now, old) = (position(used, used >> 32)?, position(used >> 16, used >> 40)?);
        let went = ring.entries().distance(old, now);
        if went > u32::from(self.size()) {
            return Err(Broken::Inflight(format!("its used position is {went} ahead of the old one, on a ring of {}", self.size())));
        }
        (self.free, self.settled) = if went > 0 && !ring.is_available(old) { (head, now) } else { (old_head, old) };
        self.set_heads(self.free, self.free);
        self.set_used(self.settled, self.settled);
        Ok(())
    }

    /// Notes the entries of the free list, and takes the marks off them.
    fn walk_free(&mut self, seen: &mut [bool]) -> Result<(), Broken> {
        let mut entry = self.free;
        while entry != self.size() {
            let before = seen.get_mut(usize::from(entry)).map(|seen| std::mem::replace(seen, true));
            match before {
                Some(false) => {}
                Some(true) => return Err(Broken::Inflight(format!("its free list comes twice to entry {entry}"))),
                None => return Err(Broken::Inflight(format!("its free list names entry {entry} of {}", self.size()))),
            }
            self.bytes.store(usize::from(entry) * ENTRY_BYTES, 0);
            self.next[usize::from(entry)] = self.halves.load_atomic(usize::from(entry) * ENTRY_BYTES / 2 + 1, Ordering::Relaxed);
            entry = self.next[usize::from(entry)];
        }
        Ok(())
    }

    /// The requests in flight, by age, and how many descriptors they have.
    fn walk_marked(&mut self, seen: &mut [bool]) -> Result<(Vec<u16>, u16), Broken> {
        let mut marked: Vec<(u64, u16)> = Vec::new();
        let free = seen.iter().filter(|seen| **seen).count() as u16;
        let mut outstanding = 0;
        for head in 0..self.size() {
            let [first, counter, ..] = self.entries.load(usize::from(head)).map(u64::from_le);
            if seen[usize::from(head)] || first & 0xff != MARK {
                continue;
            }
            let (last, count) = ((first >> 32) as u16, (first >> 48) as u16);
            self.walk_chain(head, last, count, seen)?;
            self.chains[usize::from(head)] = (last, count);
            outstanding += count;
            marked.push((counter, head));
        }
        if free + outstanding != self.size() {
            let (size, lost) = (self.size(), self.size() - free - outstanding);
            return Err(Broken::Inflight(format!("{lost} of its {size} entries are neither free nor in flight")));
        }
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok((marked.into_iter().map(|(_, head)| head).collect(), outstanding))
    }

    /// The entries of one chain: as many as it says, to the last that it names, none of them seen before.
    fn walk_chain(&mut self, head: u16, last: u16, count: u16, seen: &mut [bool]) -> Result<(), Broken> {
        let mut entry = head;
        for position in 0..count {
            match seen.get_mut(usize::from(entry)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Broken::Inflight(format!("the chain of entry {head} goes on at {entry}, which is not its own"))),
            }
            if position + 1 == count && entry == last {
                return Ok(());
            }
            self.next[usize::from(entry)] = self.halves.load_atomic(usize::from(entry) * ENTRY_BYTES / 2 + 1, Ordering::Relaxed);
            entry = self.next[usize::from(entry)];
        }
        Err(Broken::Inflight(format!("the chain of entry {head} has not {count} entries that end at {last}")))
    }

    /// A chain that a predecessor took.
    pub(crate) fn chain(&self, entry: u16) -> PackedLeft<'_> {
        PackedLeft { tracker: self, entry, at: entry, taken: Taken::default() }
    }
}

impl Tracker<PackedRing> for PackedTracker {
    const ONE_BY_ONE: bool = true;

    #[inline]
    fn mark(&mut self, ring: &PackedRing, taken: Taken) -> u16 {
        let (head, mut last) = (self.free, self.free);
        for ahead in 0..taken.count {
            let entry = self.free;
            // There are as many free entries as the ring has descriptors that are not in flight, and no chain is longer.
            let next = self.next[usize::from(entry)];
            let [address, second] = ring.words(ahead);
            let (id, flags) = (second >> ID_SHIFT & 0xffff, second >> FLAGS_SHIFT);
            let third = id | flags << 16 | (second & 0xffff_ffff) << 32;
            self.entries.store(usize::from(entry), [u64::from(next) << 16, self.counter, third, address].map(u64::to_le));
            (last, self.free) = (entry, next);
        }
        let first = MARK | u64::from(self.next[usize::from(head)]) << 16 | u64::from(last) << 32 | u64::from(taken.count) << 48;
        let [_, counter, third, address] = self.entries.load(usize::from(head));
        self.entries.store(usize::from(head), [first.to_le(), counter, third, address]);
        self.chains[usize::from(head)] = (last, taken.count);
        self.counter = self.counter.wrapping_add(1);
        self.set_heads(self.free, self.free);
        head
    }

    #[inline]
    fn add_done(&mut self, ring: &PackedRing, entry: u16) {
        let last = self.chains[usize::from(entry)].0;
        self.next[usize::from(last)] = self.free;
        compiler_fence(Ordering::SeqCst);
        self.halves.store_atomic(usize::from(last) * ENTRY_BYTES / 2 + 1, self.free, Ordering::Release);
        self.set_heads(entry, self.free);
        self.set_used(ring.next_used(), self.settled);
        self.free = entry;
        self.done = Some(entry);
        compiler_fence(Ordering::SeqCst);
    }

    #[inline]
    fn end_batch(&mut self, ring: &PackedRing) {
        let Some(entry) = self.done.take() else { return };
        compiler_fence(Ordering::SeqCst);
        self.bytes.store(usize::from(entry) * ENTRY_BYTES, 0);
        self.settled = ring.next_used();
        self.set_heads(self.free, self.free);
        self.set_used(self.settled, self.settled);
    }
}

/// The descriptors of a chain as the region has them.
pub(crate) struct PackedLeft<'a> {
    tracker: &'a PackedTracker,
    entry: u16,
    at: u16,
    taken: Taken,
}

impl PackedLeft<'_> {
    fn read(&mut self) -> Result<Buffer, Broken> {
        let [_, _, third, address] = self.tracker.entries.load(usize::from(self.at)).map(u64::from_le);
        self.taken = Taken { id: third as u16, count: self.taken.count + 1 };
        let flags = DescFlags::from_bits_retain((third >> 16) as u16);
        if flags.contains(DescFlags::INDIRECT) && self.taken.count > 1 {
            return Err(Broken::BadIndirect { head: self.entry, reason: "an indirect descriptor follows another" });
        }
        if flags.contains(DescFlags::NEXT) != (u32::from(self.taken.count) < self.limit()) {
            return Err(Broken::Inflight(format!("the chain of entry {} does not end where its flags say", self.entry)));
        }
        Ok(Buffer { address, length: (third >> 32) as u32, flags, next: 0 })
    }
}

impl Chain for PackedLeft<'_> {
    const LINKED_TABLES: bool = false;

    fn head(&self) -> u16 {
        self.entry
    }

    fn limit(&self) -> u32 {
        self.tracker.chains[usize::from(self.entry)].1.into()
    }

    fn first(&mut self) -> Result<Buffer, Broken> {
        (self.at, self.taken.count) = (self.entry, 0);
        self.read()
    }

    fn next(&mut self, _: &Buffer) -> Result<Buffer, Broken> {
        self.at = self.tracker.next[usize::from(self.at)];
        if u32::from(self.taken.count) >= self.limit() {
            return Err(Broken::TooLong { head: self.entry, limit: self.limit() });
        }
        self.read()
    }

    fn taken(&self) -> Taken {
        self.taken
    }

    fn refused(&self, taken: Taken, size: u16) -> Broken {
        refused(self.entry, taken, size)
    }
}

#[cfg(test)]
mod tests;
