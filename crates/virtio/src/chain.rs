//! Request slots in shared memory: four descriptors, a header, a segment and a status byte each, formatted once.
//!
//! Chains of a split ring are linked, in its own table or in indirect ones. A packed ring's are rows one after the other, always in the tables: the
//! ring points there, or has them copied.

use qpair_memory::{MemoryError, Region, Shared};
use qpair_wire::virtio::{Desc, DescFlags, RingSize};
use qpair_wire::virtio_blk::{RequestHeader, Segment};
use qpair_wire::virtio_packed::PackedDesc;
use zerocopy::transmute;

use crate::config::Agreed;
use crate::layout::QueueLayout;

/// Descriptors of a chain: header, two pieces of data, status. 64 bytes: one cache line.
const CHAIN: u16 = 4;
/// Position of the status descriptor in its chain.
const STATUS: u16 = 3;
/// From this many entries on chains live in the descriptor table itself: that leaves slots for a depth of 128.
const DIRECT_FROM: u16 = 512;

/// 16 bytes as two words: stored with two instructions.
type Pair = [u64; 2];

/// The data part of a chain. Two pieces at most; `length` 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) first: (u64, u32),
    pub(crate) second: (u64, u32),
    /// The device writes it.
    pub(crate) incoming: bool,
}

impl Shape {
    #[inline]
    pub(crate) fn bytes(&self) -> u32 {
        self.first.1 + self.second.1
    }
}

pub(crate) struct Chains {
    indirect: bool,
    packed: bool,
    slots: u16,
    tables_at: u64,
    statuses_at: u64,
    /// Descriptors of each slot's chain.
    counts: Vec<u16>,
    descriptors: Shared<Pair>,
    headers: Shared<Pair>,
    segments: Shared<Pair>,
    segments_at: u64,
    statuses: Shared<u8>,
}

impl Chains {
    /// How many requests can be under way.
    pub(crate) fn slots_of(size: RingSize, indirect: bool, packed: bool) -> u16 {
        if is_indirect(size, indirect, packed) { size.get() } else { size.get() / CHAIN }
    }

    /// Formats all slots. Nothing may be under way.
    pub(crate) fn new(region: &Region, layout: &QueueLayout, size: RingSize, agreed: &Agreed) -> Result<Self, MemoryError> {
        let packed = agreed.packed;
        let slots = Self::slots_of(size, agreed.indirect, packed);
        let indirect = is_indirect(size, agreed.indirect, packed);
        let count = usize::from(slots);
        let mut chains = Self {
            indirect,
            packed,
            slots,
            tables_at: layout.tables,
            statuses_at: layout.statuses,
            counts: vec![0; count],
            descriptors: Shared::new(region, if indirect || packed { layout.tables } else { layout.desc }, count * usize::from(CHAIN))?,
            headers: Shared::new(region, layout.headers, count)?,
            segments: Shared::new(region, layout.segments, count)?,
            segments_at: layout.segments,
            statuses: Shared::new(region, layout.statuses, count)?,
        };
        let table: Shared<Pair> = Shared::new(region, layout.desc, usize::from(size.get()))?;
        for slot in 0..slots {
            let place = u64::from(slot);
            if packed {
                chains.format(slot, layout.headers, &Shape::default());
                continue;
            }
            if indirect {
                let desc = Desc::new(layout.tables + 64 * place, 64, DescFlags::INDIRECT, 0);
                table.store(usize::from(slot), transmute!(desc));
            }
            let header = Desc::new(layout.headers + 16 * place, 16, DescFlags::NEXT, chains.link(slot, STATUS));
            chains.put(slot, 0, header);
            chains.put(slot, STATUS, Desc::new(layout.statuses + place, 1, DescFlags::WRITE, 0));
        }
        Ok(chains)
    }

    pub(crate) fn slots(&self) -> u16 {
        self.slots
    }

    /// What goes into the avail ring.
    #[inline]
    pub(crate) fn head(&self, slot: u16) -> u16 {
        if self.indirect || self.packed { slot } else { slot * CHAIN }
    }

    /// The way back; None for what is no head.
    #[inline]
    pub(crate) fn slot(&self, head: u32) -> Option<u16> {
        let slot = if self.indirect || self.packed {
            head
        } else if head.is_multiple_of(u32::from(CHAIN)) {
            head / u32::from(CHAIN)
        } else {
            return None;
        };
        (slot < u32::from(self.slots)).then_some(slot as u16)
    }

    /// `next` as it is counted where the chain lives.
    fn link(&self, slot: u16, index: u16) -> u16 {
        if self.indirect { index } else { slot * CHAIN + index }
    }

    fn put(&self, slot: u16, index: u16, desc: Desc) {
        self.descriptors.store(usize::from(slot) * usize::from(CHAIN) + usize::from(index), transmute!(desc));
    }

    /// Writes the descriptors of a slot whose data part changed.
    #[cold]
    pub(crate) fn format(&mut self, slot: u16, headers_at: u64, shape: &Shape) {
        if self.packed {
            return self.list(slot, headers_at, shape);
        }
        let direction = if shape.incoming { DescFlags::WRITE } else { DescFlags::empty() };
        let first = if shape.first.1 == 0 { STATUS } else { 1 };
        self.put(slot, 0, Desc::new(headers_at + 16 * u64::from(slot), 16, DescFlags::NEXT, self.link(slot, first)));
        if shape.first.1 > 0 {
            let next = if shape.second.1 == 0 { STATUS } else { 2 };
            self.put(slot, 1, Desc::new(shape.first.0, shape.first.1, direction | DescFlags::NEXT, self.link(slot, next)));
        }
        if shape.second.1 > 0 {
            self.put(slot, 2, Desc::new(shape.second.0, shape.second.1, direction | DescFlags::NEXT, self.link(slot, STATUS)));
        }
    }

    /// The same, row after row.
    fn list(&mut self, slot: u16, headers_at: u64, shape: &Shape) {
        let direction = if shape.incoming { DescFlags::WRITE } else { DescFlags::empty() };
        let header = (headers_at + 16 * u64::from(slot), 16, DescFlags::empty());
        let data = [shape.first, shape.second].map(|(address, length)| (address, length, direction));
        let status = (self.statuses_at + u64::from(slot), 1, DescFlags::WRITE);
        let rows = [header, data[0], data[1], status];
        let mut count = 0;
        for (address, length, flags) in rows.into_iter().filter(|row| row.1 > 0) {
            let place = usize::from(slot) * usize::from(CHAIN) + count;
            self.descriptors.store(place, transmute!(PackedDesc::new(address, length, slot, flags)));
            count += 1;
        }
        self.counts[usize::from(slot)] = count as u16;
    }

    /// How many rows a slot has. Of a packed ring.
    #[inline]
    pub(crate) fn count(&self, slot: u16) -> u16 {
        self.counts[usize::from(slot)]
    }

    /// A slot's table.
    #[inline]
    pub(crate) fn table_at(&self, slot: u16) -> u64 {
        self.tables_at + 64 * u64::from(slot)
    }

    /// One of a slot's rows.
    #[inline]
    pub(crate) fn packed(&self, slot: u16, index: u16) -> PackedDesc {
        transmute!(self.descriptors.load(usize::from(slot) * usize::from(CHAIN) + usize::from(index)))
    }

    #[inline]
    pub(crate) fn set_header(&self, slot: u16, header: RequestHeader) {
        self.headers.store(usize::from(slot), transmute!(header));
    }

    /// Writes a slot's segment; its guest address.
    pub(crate) fn set_segment(&self, slot: u16, segment: Segment) -> u64 {
        self.segments.store(usize::from(slot), transmute!(segment));
        self.segments_at + 16 * u64::from(slot)
    }

    #[inline]
    pub(crate) fn status(&self, slot: u16) -> u8 {
        self.statuses.load(usize::from(slot))
    }

    /// Brings a slot's status nearer, to be read, and its header, to be written.
    #[inline]
    pub(crate) fn prefetch(&self, slot: u16) {
        self.statuses.prefetch(usize::from(slot));
        self.headers.prefetch_write(usize::from(slot));
    }
}

/// Indirect tables make every ring entry a request; a large split ring does without, which spares the device a translation. On a packed ring they
/// spare more: the descriptors of a chain would be written anew for each request.
fn is_indirect(size: RingSize, negotiated: bool, packed: bool) -> bool {
    negotiated && (packed || size.get() < DIRECT_FROM)
}
