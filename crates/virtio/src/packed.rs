//! The driver's side of one packed virtqueue (Virtio 1.2, 2.8).
//!
//! Descriptors are written in the ring's order; the device answers in that order, too, and over them: so each request writes its
//! descriptors anew (one, where there are indirect tables). Of a batch the first descriptor's second half, which has the flags, is stored last, with Release:
//! the device reads in order, and sees none of the batch or all of it. The full fence stands between that store and the look at what the device wants, as
//! on a split ring. An answer's second half is loaded whole, with Acquire, before status and data.
//!
//! The device may not name what is not under way, nor write more than there is room for: the channel looks its ids up. How far an answer moves the ring
//! is our own note of the chain, not the device's word.

use std::sync::atomic::{Ordering, fence};

use qpair_memory::{MemoryError, Region, Shared};
use qpair_wire::virtio::{DescFlags, RingSize};
use qpair_wire::virtio_packed::{EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, EVENT_MASK, PackedSize, Position, turn};

use crate::chain::Chains;
use crate::config::Agreed;
use crate::layout::QueueLayout;
use crate::ring::{Place, Ring};

/// Most answers found by one look.
const LOOK: u16 = 64;
/// In the second word of a descriptor.
const ID_SHIFT: u32 = 32;
const FLAGS_SHIFT: u32 = 48;

pub(crate) struct PackedRing {
    size: PackedSize,
    event_idx: bool,
    indirect: bool,
    /// Two a descriptor: its address; its length, id and flags.
    words: Shared<u64>,
    driver_event: Shared<u32>,
    device_event: Shared<u32>,
    avail_at: Position,
    used_at: Position,
    /// Descriptors of the batch.
    added: u16,
    /// Descriptors under way, those of the batch among them.
    outstanding: u16,
    /// The batch's first descriptor, not yet written: its place and both words. The device looks at its line all the time: it is written in one go.
    first: Option<(usize, [u64; 2])>,
    /// How many descriptors each id has.
    counts: Vec<u16>,
}

impl PackedRing {
    #[inline]
    fn second(&self, at: Position) -> u64 {
        self.words.load_atomic(2 * usize::from(at.index()) + 1, Ordering::Acquire)
    }

    #[inline]
    fn is_used(&self, at: Position) -> bool {
        turn((self.second(at) >> FLAGS_SHIFT) as u16) == at.used()
    }

    #[inline]
    fn put(&mut self, address: u64, length: u32, id: u16, flags: u16) {
        let at = 2 * usize::from(self.avail_at.index());
        let flags = u64::from(flags | self.avail_at.available());
        let second = u64::from(length) | u64::from(id) << ID_SHIFT | flags << FLAGS_SHIFT;
        match self.first {
            None => self.first = Some((at, [address, second])),
            Some(_) => {
                self.words.store_atomic(at, address, Ordering::Relaxed);
                self.words.store_atomic(at + 1, second, Ordering::Relaxed);
            }
        }
        self.avail_at = self.size.advance(self.avail_at, 1);
        self.added += 1;
    }

    fn wish(&self, flags: u16) {
        let wish = u32::from(self.used_at.bits()) | u32::from(flags) << 16;
        self.driver_event.store_atomic(0, wish, Ordering::Relaxed);
    }
}

impl Ring for PackedRing {
    fn new(region: &Region, layout: &QueueLayout, size: RingSize, agreed: &Agreed, place: Option<Place>) -> Result<Self, MemoryError> {
        let count = usize::from(size.get());
        let place =
            place.map_or((Position::START, Position::START), |place| (Position::from_bits(place.avail), Position::from_bits(place.used)));
        let Some(size) = PackedSize::new(size.get().into()) else { return Err(MemoryError::OutOfRange { offset: 0, length: 0, limit: 0 }) };
        let ring = Self {
            size,
            event_idx: agreed.event_idx,
            indirect: agreed.indirect,
            words: Shared::new(region, layout.desc, 2 * count)?,
            driver_event: Shared::new(region, layout.avail, 1)?,
            device_event: Shared::new(region, layout.used, 1)?,
            avail_at: place.0,
            used_at: place.1,
            added: 0,
            outstanding: 0,
            first: None,
            counts: vec![1; count],
        };
        ring.wish(EVENT_DISABLE);
        Ok(ring)
    }

    fn place(&self) -> Place {
        Place { avail: self.avail_at.bits(), used: self.used_at.bits() }
    }

    #[inline]
    fn prefetch_publish(&self) {
        self.prefetch_avail();
    }

    #[inline]
    fn prefetch_avail(&self) {
        self.words.prefetch_write(2 * usize::from(self.avail_at.index()));
    }

    #[inline]
    fn add(&mut self, chains: &Chains, slot: u16) {
        let count = chains.count(slot);
        if self.indirect {
            self.put(chains.table_at(slot), 16 * u32::from(count), slot, DescFlags::INDIRECT.bits());
            self.outstanding += 1;
            return;
        }
        for index in 0..count {
            let desc = chains.packed(slot, index);
            let next = if index + 1 < count { DescFlags::NEXT.bits() } else { 0 };
            self.put(desc.addr.get(), desc.len.get(), slot, desc.flags.get() | next);
        }
        self.counts[usize::from(slot)] = count;
        self.outstanding += count;
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let Some((at, [address, second])) = self.first.take() else { return false };
        self.words.store_atomic(at, address, Ordering::Relaxed);
        self.words.store_atomic(at + 1, second, Ordering::Release);
        let added = u32::from(std::mem::take(&mut self.added));
        fence(Ordering::SeqCst);
        let wish = self.device_event.load_atomic(0, Ordering::Relaxed);
        match (wish >> 16) as u16 & EVENT_MASK {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => self.size.need_event(Position::from_bits(wish as u16), self.avail_at, added),
            _ => true,
        }
    }

    #[cold]
    fn forget(&mut self) {
        (self.first, self.added) = (None, 0);
    }

    #[inline]
    fn waiting(&self) -> u16 {
        if !self.indirect {
            return u16::from(self.is_used(self.used_at));
        }
        // What lies beyond all that is under way says nothing: but the next is looked at always, so that a lie is found.
        let most = self.outstanding.clamp(1, LOOK);
        let mut at = self.used_at;
        for found in 0..most {
            if !self.is_used(at) {
                return found;
            }
            at = self.size.advance(at, 1);
        }
        most
    }

    #[inline]
    fn next_used(&mut self) -> (u32, u32) {
        let second = self.second(self.used_at);
        let id = (second >> ID_SHIFT) as u16;
        let count = self.counts.get(usize::from(id)).copied().unwrap_or(1);
        self.used_at = self.size.advance(self.used_at, count);
        self.outstanding = self.outstanding.saturating_sub(count);
        (id.into(), second as u32)
    }

    fn listen(&mut self) -> bool {
        self.wish(if self.event_idx { EVENT_DESC } else { EVENT_ENABLE });
        fence(Ordering::SeqCst);
        self.waiting() == 0
    }

    fn silence(&mut self) {
        self.wish(EVENT_DISABLE);
    }

    #[inline]
    fn stay_silent(&mut self) {}
}
