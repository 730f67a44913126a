//! The device's side of a split virtqueue (Virtio 1.2, 2.7): indices, rings, notifications. Knows nothing of blocks.
//!
//! Orders. The driver writes descriptors, then the avail entry, then the avail index: the index is loaded with Acquire
//! before anything it announces is read. We write the used entries, then the used index with Release. Whether to
//! interrupt or to kick is decided by reading what the other side wrote *after* publishing what it looks for: both sides
//! put a full fence between the two (2.7.7.2, 2.7.13.4.1), so at least one of them sees the other.

use std::sync::atomic::{Ordering, fence};

use qpair_memory::{GuestMemory, MemoryError, Shared, SharedIndex};
use qpair_wire::virtio::{
    AVAIL_FLAGS_OFFSET, AVAIL_IDX_OFFSET, AvailFlags, Desc, RingSize, USED_FLAGS_OFFSET, USED_IDX_OFFSET, UsedFlags, need_event,
};

use crate::inflight::{Inflight, SplitTracker};
use crate::log::{Writes, Written};
use crate::ring::{Buffer, Chain, Kind, Ring, Taken};
use crate::session::Setup;
use crate::{Addresses, Broken, VhostError};

/// How far the avail event may fall behind before it is moved along, so that it never seems to lie ahead.
const EVENT_STALE: u16 = 0x4000;

/// See the module's doc.
#[derive(Debug)]
pub struct SplitRing {
    size: RingSize,
    event_idx: bool,
    desc: Shared<[u64; 2]>,
    avail_flags: SharedIndex,
    avail_idx: SharedIndex,
    avail_ring: Shared<u16>,
    used_event: Option<SharedIndex>,
    used_flags: SharedIndex,
    used_idx: SharedIndex,
    used_ring: Shared<[u32; 2]>,
    avail_event: Option<SharedIndex>,
    next_avail: u16,
    next_used: u16,
    /// Used index when the driver was last told or found not to want to be.
    signalled: u16,
    event_written: u16,
}

impl SplitRing {
    /// Maps the ring's areas and starts at `base`. Refuses what is misaligned, outside memory, or overlaps.
    pub fn new(memory: &GuestMemory, size: RingSize, addresses: Addresses, base: u16, event_idx: bool) -> Result<Self, MemoryError> {
        let (desc, desc_at) = area(memory, addresses.desc, size.desc_bytes(), 16)?;
        let (avail, avail_at) = area(memory, addresses.avail, size.avail_bytes(event_idx), 2)?;
        let (used, used_at) = area(memory, addresses.used, size.used_bytes(event_idx), 4)?;
        refuse_overlap(&[
            (addresses.desc, size.desc_bytes()),
            (addresses.avail, size.avail_bytes(event_idx)),
            (addresses.used, size.used_bytes(event_idx)),
        ])?;
        let entries = usize::from(size.get());
        let used_event = event_idx.then(|| SharedIndex::new(avail, avail_at + size.used_event_offset())).transpose()?;
        let avail_event = event_idx.then(|| SharedIndex::new(used, used_at + size.avail_event_offset())).transpose()?;
        let used_idx = SharedIndex::new(used, used_at + USED_IDX_OFFSET)?;
        let next_used = used_idx.load(Ordering::Acquire);
        Ok(Self {
            size,
            event_idx,
            desc: Shared::new(desc, desc_at, entries)?,
            avail_flags: SharedIndex::new(avail, avail_at + AVAIL_FLAGS_OFFSET)?,
            avail_idx: SharedIndex::new(avail, avail_at + AVAIL_IDX_OFFSET)?,
            avail_ring: Shared::new(avail, avail_at + size.avail_entry_offset(0), entries)?,
            used_event,
            used_flags: SharedIndex::new(used, used_at + USED_FLAGS_OFFSET)?,
            used_idx,
            used_ring: Shared::new(used, used_at + size.used_entry_offset(0), entries)?,
            avail_event,
            next_avail: base,
            next_used,
            signalled: next_used,
            event_written: base,
        })
    }

    /// The used index as published.
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used
    }

    /// The head that is `ahead` of the next one, without taking it. Only within what [`waiting`](Ring::waiting) said.
    #[inline]
    fn peek(&self, ahead: u16) -> u16 {
        u16::from_le(self.avail_ring.load(usize::from(self.size.slot(self.next_avail.wrapping_add(ahead)))))
    }

    /// The chain at any head.
    #[inline]
    pub fn chain_at(&self, head: u16) -> SplitChain<'_> {
        SplitChain { ring: self, head }
    }

    /// Descriptor `index` of the table, copied.
    #[inline]
    fn buffer(&self, index: u16) -> Result<Buffer, Broken> {
        if index >= self.size.get() {
            return Err(Broken::BadIndex { index: u32::from(index), size: u32::from(self.size.get()) });
        }
        let desc: Desc = zerocopy::transmute!(self.desc.load(usize::from(index)));
        Ok(Buffer { address: desc.addr.get(), length: desc.len.get(), flags: desc.flags(), next: desc.next.get() })
    }

    fn write_event(&mut self, index: u16) {
        self.event_written = index;
        if let Some(event) = &self.avail_event {
            event.store(index, Ordering::Relaxed);
        }
    }

    /// A predecessor took `inflight` requests beyond what is used: the next avail index follows from the ring itself.
    fn resume_after(&mut self, inflight: u16) {
        self.next_avail = self.next_used.wrapping_add(inflight);
        self.event_written = self.next_avail;
        // The predecessor may have died before it interrupted.
        self.signalled = self.next_used.wrapping_sub(1);
    }
}

impl Ring for SplitRing {
    type Chain<'a> = SplitChain<'a>;

    #[inline]
    fn size(&self) -> u16 {
        self.size.get()
    }

    /// The next avail index to take.
    fn base(&self) -> u32 {
        self.next_avail.into()
    }

    fn positions(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }

    /// More than the ring holds is a broken driver.
    #[inline]
    fn waiting(&self) -> Result<u16, Broken> {
        let index = self.avail_idx.load(Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next_avail);
        if ahead > self.size.get() {
            return Err(Broken::AvailJumped { index, next: self.next_avail, ahead, size: self.size.get() });
        }
        Ok(ahead)
    }

    #[inline]
    fn ready(&self) -> Result<bool, Broken> {
        Ok(true)
    }

    #[inline]
    fn chain(&self) -> SplitChain<'_> {
        self.chain_at(self.peek(0))
    }

    #[inline]
    fn prefetch(&self, ahead: u16) {
        self.desc.prefetch(usize::from(self.peek(ahead)));
    }

    #[inline]
    fn took(&mut self, _: Taken) {
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    #[inline]
    fn rest(&mut self) {
        if self.event_idx && self.next_avail.wrapping_sub(self.event_written) > EVENT_STALE {
            self.write_event(self.next_avail.wrapping_sub(1));
        }
    }

    #[inline]
    fn prefetch_used(&self) {
        self.used_ring.prefetch_write(usize::from(self.size.slot(self.next_used)));
    }

    #[inline]
    fn prefetch_publish(&self) {
        self.used_idx.prefetch_write();
    }

    #[inline]
    fn push_used(&mut self, taken: Taken, written: u32) {
        self.used_ring.store(usize::from(self.size.slot(self.next_used)), [u32::from(taken.id).to_le(), written.to_le()]);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    fn publish(&mut self) {
        self.used_idx.store(self.next_used, Ordering::Release);
    }

    #[inline]
    fn wants_interrupt(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.signalled, self.next_used);
        self.signalled = new;
        if old == new {
            return false;
        }
        match &self.used_event {
            Some(event) => need_event(event.load(Ordering::Relaxed), new, old),
            None => self.avail_flags.load(Ordering::Relaxed) & AvailFlags::NO_INTERRUPT.bits() == 0,
        }
    }

    fn arm(&mut self) -> bool {
        if self.event_idx {
            self.write_event(self.next_avail);
        } else {
            self.used_flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.avail_idx.load(Ordering::Acquire) == self.next_avail
    }

    fn disarm(&mut self) {
        if self.event_idx {
            self.write_event(self.next_avail.wrapping_sub(1));
        } else {
            self.used_flags.store(UsedFlags::NO_NOTIFY.bits(), Ordering::Relaxed);
        }
    }
}

/// The chain at a head of the descriptor table.
pub struct SplitChain<'a> {
    ring: &'a SplitRing,
    head: u16,
}

impl Chain for SplitChain<'_> {
    const LINKED_TABLES: bool = true;

    #[inline]
    fn head(&self) -> u16 {
        self.head
    }

    #[inline]
    fn limit(&self) -> u32 {
        self.ring.size.get().into()
    }

    #[inline]
    fn first(&mut self) -> Result<Buffer, Broken> {
        self.ring.buffer(self.head)
    }

    #[inline]
    fn next(&mut self, after: &Buffer) -> Result<Buffer, Broken> {
        self.ring.buffer(after.next)
    }

    #[inline]
    fn taken(&self) -> Taken {
        Taken { id: self.head, count: 1 }
    }

    /// A chain outside the table has no first buffer, so that leaves one reason.
    #[cold]
    fn refused(&self, _: Taken, _: u16) -> Broken {
        Broken::InFlight { head: self.head }
    }
}

impl Kind for SplitRing {
    type Tracker = SplitTracker;
    type Left<'a> = SplitChain<'a>;

    fn open(memory: &GuestMemory, setup: &Setup) -> Result<Self, VhostError> {
        let size = RingSize::new(u32::from(setup.size));
        let size = size.ok_or_else(|| VhostError::invalid("vring num", setup.size, "a power of two from 1 to 32768"))?;
        let base = setup.base.unwrap_or(0);
        let base = u16::try_from(base).map_err(|_| VhostError::invalid("vring base", base, "below 65536"))?;
        Ok(Self::new(memory, size, setup.addresses, base, setup.event_idx)?)
    }

    fn track(&mut self, region: &Inflight, index: u16) -> Result<(SplitTracker, Vec<u16>), Broken> {
        let mut tracker = region.queue(index, self.size.get())?;
        let found = tracker.recover(self.next_used)?;
        if found.used_before {
            self.resume_after(found.heads.len() as u16);
        }
        Ok((tracker, found.heads))
    }

    fn left<'a>(&'a self, _: &'a SplitTracker, head: u16) -> SplitChain<'a> {
        self.chain_at(head)
    }
}

impl Writes for SplitRing {
    fn all(&self) -> [Option<Written>; 2] {
        [Some(Written { in_table: false, offset: 0, length: self.size.used_bytes(self.event_idx) }), None]
    }

    fn entry(&self) -> Written {
        let offset = self.size.used_entry_offset(self.size.slot(self.next_used));
        Written { in_table: false, offset, length: 8 }
    }

    fn shown(&self) -> Option<Written> {
        Some(Written { in_table: false, offset: USED_IDX_OFFSET, length: 2 })
    }

    fn wish(&self) -> Written {
        let offset = if self.event_idx { self.size.avail_event_offset() } else { USED_FLAGS_OFFSET };
        Written { in_table: false, offset, length: 2 }
    }
}

pub(crate) fn area(memory: &GuestMemory, address: u64, length: u64, alignment: u64) -> Result<(&qpair_memory::Region, u64), MemoryError> {
    if !address.is_multiple_of(alignment) {
        return Err(MemoryError::Misaligned { address, alignment });
    }
    memory.find_user(address, length)
}

pub(crate) fn refuse_overlap(areas: &[(u64, u64); 3]) -> Result<(), MemoryError> {
    for (index, (start, length)) in areas.iter().enumerate() {
        for (other, other_length) in &areas[index + 1..] {
            if start < &(other + other_length) && other < &(start + length) {
                return Err(MemoryError::BadTable { index, reason: "areas of the ring overlap" });
            }
        }
    }
    Ok(())
}
