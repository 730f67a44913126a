//! The driver's side of one split virtqueue: indices, notifications, and what the device may not do.

use std::sync::atomic::{Ordering, fence};

use qpair_memory::{MemoryError, Region, Shared, SharedIndex};
use qpair_wire::virtio::{
    AVAIL_FLAGS_OFFSET, AVAIL_IDX_OFFSET, AvailFlags, RingSize, USED_FLAGS_OFFSET, USED_IDX_OFFSET, UsedFlags, need_event,
};

use crate::chain::Chains;
use crate::config::Agreed;
use crate::layout::QueueLayout;
use crate::ring::{Place, Ring};

/// How often `used_event` is moved out of the device's way while polling: long before 65536 entries are used.
const QUIET_ENTRIES: u16 = 16384;

pub(crate) struct SplitRing {
    size: RingSize,
    event_idx: bool,
    avail_flags: SharedIndex,
    avail_idx: SharedIndex,
    avail: Shared<u16>,
    used_event: SharedIndex,
    used_flags: SharedIndex,
    used_idx: SharedIndex,
    /// Halves of an entry are naturally aligned; a whole one is not, so two words: id and length.
    used: Shared<[u32; 2]>,
    avail_event: SharedIndex,
    /// As published.
    avail_at: u16,
    /// Entries written behind that.
    added: u16,
    used_at: u16,
    /// When `used_event` was last put out of reach.
    quiet_at: u16,
}

impl Ring for SplitRing {
    fn new(region: &Region, layout: &QueueLayout, size: RingSize, agreed: &Agreed, place: Option<Place>) -> Result<Self, MemoryError> {
        let (event_idx, place) = (agreed.event_idx, place.unwrap_or(Place { avail: 0, used: 0 }));
        let count = usize::from(size.get());
        let mut ring = Self {
            size,
            event_idx,
            avail_flags: SharedIndex::new(region, layout.avail + AVAIL_FLAGS_OFFSET)?,
            avail_idx: SharedIndex::new(region, layout.avail + AVAIL_IDX_OFFSET)?,
            avail: Shared::new(region, layout.avail + size.avail_entry_offset(0), count)?,
            used_event: SharedIndex::new(region, layout.avail + size.used_event_offset())?,
            used_flags: SharedIndex::new(region, layout.used + USED_FLAGS_OFFSET)?,
            used_idx: SharedIndex::new(region, layout.used + USED_IDX_OFFSET)?,
            used: Shared::new(region, layout.used + size.used_entry_offset(0), count)?,
            avail_event: SharedIndex::new(region, layout.used + size.avail_event_offset())?,
            avail_at: place.avail,
            added: 0,
            used_at: place.used,
            quiet_at: place.used,
        };
        ring.silence();
        Ok(ring)
    }

    fn place(&self) -> Place {
        Place { avail: self.avail_at, used: self.used_at }
    }

    /// Takes the avail index's line from the device that looks at it, shortly before [`publish`](Self::publish): the store then waits less.
    #[inline]
    fn prefetch_publish(&self) {
        self.avail_idx.prefetch_write();
    }

    /// Adds a chain to the batch. The caller has at most as many chains under way as the ring has entries.
    #[inline]
    fn add(&mut self, chains: &Chains, slot: u16) {
        let at = self.size.slot(self.avail_at.wrapping_add(self.added));
        self.avail.store(usize::from(at), chains.head(slot).to_le());
        self.added += 1;
    }

    /// Shows the batch to the device. True: it wants a kick.
    ///
    /// The release store makes descriptors, headers and entries visible before the index. The full fence stands
    /// between the index and the look at what the device wants: the device does the same two things the other way round
    /// (writes its wish, fences, looks at the index), so one of the two sees the other's.
    #[inline]
    fn publish(&mut self) -> bool {
        if self.added == 0 {
            return false;
        }
        let old = self.avail_at;
        let new = old.wrapping_add(self.added);
        (self.avail_at, self.added) = (new, 0);
        self.avail_idx.store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.event_idx {
            return need_event(self.avail_event.load(Ordering::Relaxed), new, old);
        }
        self.used_flags.load(Ordering::Relaxed) & UsedFlags::NO_NOTIFY.bits() == 0
    }

    /// Drops the batch: the device never sees it.
    #[cold]
    fn forget(&mut self) {
        self.added = 0;
    }

    /// How many used entries wait. Acquire: what the device wrote before its index (entries, status, data) is read next.
    #[inline]
    fn waiting(&self) -> u16 {
        self.used_idx.load(Ordering::Acquire).wrapping_sub(self.used_at)
    }

    /// Brings the avail entry that will be written next nearer.
    #[inline]
    fn prefetch_avail(&self) {
        self.avail.prefetch_write(usize::from(self.size.slot(self.avail_at)));
    }

    /// The next used entry: id and length. Only as many times as [`waiting`](Ring::waiting) said.
    #[inline]
    fn next_used(&mut self) -> (u32, u32) {
        let [id, length] = self.used.load(usize::from(self.size.slot(self.used_at)));
        self.used_at = self.used_at.wrapping_add(1);
        (u32::from_le(id), u32::from_le(length))
    }

    /// Asks for an interrupt at the next used entry. True: none came meanwhile (the argument is `publish`'s, mirrored).
    fn listen(&mut self) -> bool {
        if self.event_idx {
            self.used_event.store(self.used_at, Ordering::Relaxed);
        } else {
            self.avail_flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.waiting() == 0
    }

    /// Asks for no interrupts. With the event index that is an index as far away as can be.
    fn silence(&mut self) {
        if self.event_idx {
            self.used_event.store(self.used_at.wrapping_sub(1), Ordering::Relaxed);
            self.quiet_at = self.used_at;
        } else {
            self.avail_flags.store(AvailFlags::NO_INTERRUPT.bits(), Ordering::Relaxed);
        }
    }

    /// Keeps the event index away while the ring is polled. Seldom: its line is the device's to read.
    #[inline]
    fn stay_silent(&mut self) {
        if self.event_idx && self.used_at.wrapping_sub(self.quiet_at) >= QUIET_ENTRIES {
            self.silence();
        }
    }
}
