//! Virtio: the packed virtqueue.
//!
//! Virtio 1.2, 2.8 (packed virtqueues), 2.8.14 (event suppression); vhost-user's encoding of its indices (SET_VRING_BASE).
//!
//! One ring of 16-byte descriptors, which driver and device write in turn, each in order of its own. What a descriptor is, its flags
//! say: *available* when AVAIL equals the driver's wrap counter and USED does not, *used* when both equal the device's. A wrap counter is one
//! bit, 1 at first, flipped by each lap. A [`Position`] is an index and its wrap counter; [`PackedSize`] moves it and measures with it. Each side
//! tells the other when it wants to be notified in 4 bytes of its own ([`EventSuppress`]).
//!
//! Errors: [`PackedSize::new`] refuses with `None`; its caller names the queue.
//!
//! Not implemented: nothing of the layout.
//!
//! Limits: 1 to 32768 entries a ring, any number (2.8.10.1: "does not have to be a power of 2").

use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::virtio::{DESC_ALIGN, DescFlags, RING_SIZE_MAX};

/// A descriptor (2.8.13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PackedDesc {
    /// Guest-physical address. Without meaning in a used descriptor.
    pub addr: U64,
    /// Length in bytes; in a used descriptor, how many the device wrote.
    pub len: U32,
    /// The buffer's name; of a chain, its last descriptor has it.
    pub id: U16,
    /// See [`DescFlags`].
    pub flags: U16,
}
const _: () = assert!(size_of::<PackedDesc>() == 16);
const _: () = assert!(offset_of!(PackedDesc, len) == 8 && offset_of!(PackedDesc, id) == 12 && offset_of!(PackedDesc, flags) == 14);

impl PackedDesc {
    /// Builds a descriptor from native values.
    #[must_use]
    pub const fn new(addr: u64, len: u32, id: u16, flags: DescFlags) -> Self {
        Self { addr: U64::new(addr), len: U32::new(len), id: U16::new(id), flags: U16::new(flags.bits()) }
    }

    /// The flags, unknown bits kept.
    #[must_use]
    pub const fn flags(&self) -> DescFlags {
        DescFlags::from_bits_retain(self.flags.get())
    }
}

/// When one side wants to be notified (2.8.14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EventSuppress {
    /// A [`Position`]: has a meaning under [`EVENT_DESC`].
    pub position: U16,
    /// One of [`EVENT_ENABLE`], [`EVENT_DISABLE`], [`EVENT_DESC`] in the low two bits.
    pub flags: U16,
}
const _: () = assert!(size_of::<EventSuppress>() == 4);
const _: () = assert!(offset_of!(EventSuppress, flags) == 2);

/// Notify always.
pub const EVENT_ENABLE: u16 = 0;
/// Notify never.
pub const EVENT_DISABLE: u16 = 1;
/// Notify when the descriptor at the position is passed. Only under RING_EVENT_IDX.
pub const EVENT_DESC: u16 = 2;
/// The bits of `flags` that have a meaning.
pub const EVENT_MASK: u16 = 3;
/// Alignment of an event suppression structure, in bytes (2.8.10.1).
pub const EVENT_ALIGN: u64 = 4;
/// Bytes of an event suppression structure.
pub const EVENT_BYTES: u64 = size_of::<EventSuppress>() as u64;

/// Where one side is on the ring: the index in the low 15 bits, the wrap counter above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u16);

const WRAP: u16 = 1 << 15;

impl Position {
    /// Where both sides begin: index 0, wrap counter 1.
    pub const START: Self = Self(WRAP);

    /// From 16 bits of a message or of shared memory. Whether the index is on the ring, [`PackedSize::holds`] says.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Of an index below 32768.
    #[must_use]
    pub const fn new(index: u16, wrap: bool) -> Self {
        Self(index & !WRAP | if wrap { WRAP } else { 0 })
    }

    /// As 16 bits.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Which descriptor.
    #[must_use]
    pub const fn index(self) -> u16 {
        self.0 & !WRAP
    }

    /// The wrap counter.
    #[must_use]
    pub const fn wrap(self) -> bool {
        self.0 & WRAP != 0
    }

    /// The two bits of a descriptor here that is available.
    #[must_use]
    pub const fn available(self) -> u16 {
        if self.wrap() { DescFlags::AVAIL.bits() } else { DescFlags::USED.bits() }
    }

    /// The two bits of a descriptor here that is used.
    #[must_use]
    pub const fn used(self) -> u16 {
        if self.wrap() { BOTH } else { 0 }
    }
}

const BOTH: u16 = DescFlags::AVAIL.bits() | DescFlags::USED.bits();

/// The two bits of `flags` that say whose turn it is.
#[must_use]
pub const fn turn(flags: u16) -> u16 {
    flags & BOTH
}

/// What SET_VRING_BASE and GET_VRING_BASE say of a packed ring: the next descriptor to take, and above it the next one to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedBase {
    /// The next descriptor that the device takes.
    pub avail: Position,
    /// The next descriptor that it writes.
    pub used: Position,
}

impl PackedBase {
    /// A ring that was never used.
    pub const START: Self = Self { avail: Position::START, used: Position::START };

    /// From a message. Some front ends send the lower half alone: then nothing is between the two.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        let avail = Position::from_bits(bits as u16);
        let used = if bits >> 16 == 0 { avail } else { Position::from_bits((bits >> 16) as u16) };
        Self { avail, used }
    }

    /// As 32 bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.avail.bits() as u32 | (self.used.bits() as u32) << 16
    }
}

/// A legal number of entries of a packed ring: 1 to [`RING_SIZE_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackedSize(u16);

impl PackedSize {
    /// `None` for zero and for more than [`RING_SIZE_MAX`].
    #[must_use]
    pub const fn new(entries: u32) -> Option<Self> {
        if entries == 0 || entries > RING_SIZE_MAX as u32 {
            return None;
        }
        Some(Self(entries as u16))
    }

    /// Number of entries.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Whether the position's index is on this ring.
    #[must_use]
    pub const fn holds(self, position: Position) -> bool {
        position.index() < self.0
    }

    /// `count` descriptors on, at most a lap.
    #[must_use]
    pub const fn advance(self, position: Position, count: u16) -> Position {
        let index = position.index() as u32 + count as u32;
        if index < self.0 as u32 {
            return Position(position.0 & WRAP | index as u16);
        }
        Position(!position.0 & WRAP | (index - self.0 as u32) as u16)
    }

    /// Descriptors from one position to another, modulo two laps: no more than two can be told apart.
    #[must_use]
    pub const fn distance(self, from: Position, to: Position) -> u32 {
        let size = self.0 as u32;
        let (from, to) = (linear(from, size), linear(to, size));
        (to + 2 * size - from) % (2 * size)
    }

    /// Did whoever came to `new` over `count` descriptors pass the one at which the other side wants its event (2.8.14)?
    /// A position that is not on the ring is always passed.
    #[must_use]
    pub const fn need_event(self, event: Position, new: Position, count: u32) -> bool {
        let laps = 2 * self.0 as u32;
        !self.holds(event) || count >= laps || (self.distance(event, new) + laps - 1) % laps < count
    }

    /// Bytes of the descriptor ring.
    #[must_use]
    pub const fn desc_bytes(self) -> u64 {
        size_of::<PackedDesc>() as u64 * self.0 as u64
    }

    /// Where the three areas lie when they follow each other from `base`. `None` if `base` is not aligned to [`DESC_ALIGN`], or if
    /// the end would pass 2^64.
    #[must_use]
    pub const fn layout(self, base: u64) -> Option<PackedLayout> {
        if !base.is_multiple_of(DESC_ALIGN) {
            return None;
        }
        let Some(driver) = base.checked_add(self.desc_bytes()) else { return None };
        let Some(end) = driver.checked_add(2 * EVENT_BYTES) else { return None };
        Some(PackedLayout { desc: base, driver, device: driver + EVENT_BYTES, end })
    }
}

/// Laps differ by their wrap counter: the first has 1.
const fn linear(position: Position, size: u32) -> u32 {
    let lap = if position.wrap() { 0 } else { size };
    // An index that is not on the ring counts as one that is.
    position.index() as u32 % size + lap
}

/// Addresses of a ring's three areas, see [`PackedSize::layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    /// Descriptor ring.
    pub desc: u64,
    /// Driver event suppression: the device reads it.
    pub driver: u64,
    /// Device event suppression: the driver reads it.
    pub device: u64,
    /// First byte after them.
    pub end: u64,
}
