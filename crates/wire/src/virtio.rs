//! Virtio: feature and status bits and the split virtqueue.
//!
//! Virtio 1.2: 2.1 (status), 2.2 and 6 (features), 2.7 (split virtqueues), 2.7.7.1 and 2.7.10 (event index).
//!
//! A split ring is three areas: a table of 16-byte descriptors, the *avail* ring that the driver writes and the *used*
//! ring that the device writes. [`RingSize`] is a checked queue size and knows every offset, so that nobody
//! else multiplies by 16, 8 or 2. [`need_event`] is the one comparison of the event index, modulo 65536.
//!
//! Errors: [`RingSize::new`] refuses with `None`; its caller names the queue.
//!
//! Not implemented here: the packed ring, which is in [`virtio_packed`](crate::virtio_packed).
//!
//! Limits: 1 to 32768 entries a ring, a power of two (2.7: "Queue Size value is always a power of 2", at most 32768).

use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

bitflags! {
    /// Flags of a descriptor (2.7.5, 2.8.13).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DescFlags: u16 {
        /// The chain goes on in `next`.
        const NEXT = 1 << 0;
        /// The device writes this buffer (else it reads it).
        const WRITE = 1 << 1;
        /// The buffer is a table of descriptors (2.7.5.3).
        const INDIRECT = 1 << 2;
        /// Packed ring: equal to the driver's wrap counter since the driver wrote it (2.8.1).
        const AVAIL = 1 << 7;
        /// Packed ring: equal to the device's wrap counter since the device wrote it (2.8.1).
        const USED = 1 << 15;
    }

    /// Flags of the avail ring, written by the driver (2.7.6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AvailFlags: u16 {
        /// The driver asks for no interrupts. Without meaning under RING_EVENT_IDX.
        const NO_INTERRUPT = 1 << 0;
    }

    /// Flags of the used ring, written by the device (2.7.8).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct UsedFlags: u16 {
        /// The device asks for no kicks. Without meaning under RING_EVENT_IDX.
        const NO_NOTIFY = 1 << 0;
    }

    /// Feature bits that no device type owns (6), and the two that vhost-user puts into reserved places.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Legacy: the device handles any descriptor layout.
        const NOTIFY_ON_EMPTY = 1 << 24;
        /// vhost: writes to guest memory are logged (VHOST_F_LOG_ALL).
        const LOG_ALL = 1 << 26;
        /// Legacy: no assumptions on how a message is cut into descriptors.
        const ANY_LAYOUT = 1 << 27;
        /// Indirect descriptor tables.
        const INDIRECT_DESC = 1 << 28;
        /// `used_event` and `avail_event`.
        const RING_EVENT_IDX = 1 << 29;
        /// vhost-user: the protocol feature messages exist (VHOST_USER_F_PROTOCOL_FEATURES).
        const PROTOCOL_FEATURES = 1 << 30;
        /// Virtio 1.0 or later.
        const VERSION_1 = 1 << 32;
        /// The device reaches memory through the platform's translation (an IOMMU).
        const ACCESS_PLATFORM = 1 << 33;
        /// The packed ring.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available.
        const IN_ORDER = 1 << 35;
        /// Memory accesses are ordered as the platform describes.
        const ORDER_PLATFORM = 1 << 36;
        /// Single-root I/O virtualisation.
        const SR_IOV = 1 << 37;
        /// Extra data in notifications.
        const NOTIFICATION_DATA = 1 << 38;
        /// The device gives the data of notifications.
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// Each queue can be reset alone.
        const RING_RESET = 1 << 40;
    }

    /// Device status (2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DeviceStatus: u8 {
        /// The guest saw the device.
        const ACKNOWLEDGE = 1;
        /// The guest knows how to drive it.
        const DRIVER = 2;
        /// The driver is ready.
        const DRIVER_OK = 4;
        /// Features are agreed.
        const FEATURES_OK = 8;
        /// The device cannot go on without a reset.
        const NEEDS_RESET = 64;
        /// The guest gave up.
        const FAILED = 128;
    }
}

/// A descriptor (2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: U64,
    /// Length in bytes.
    pub len: U32,
    /// See [`DescFlags`].
    pub flags: U16,
    /// The next descriptor where `NEXT` is set.
    pub next: U16,
}
const _: () = assert!(size_of::<Desc>() == 16);
const _: () = assert!(offset_of!(Desc, len) == 8 && offset_of!(Desc, flags) == 12 && offset_of!(Desc, next) == 14);

impl Desc {
    /// Builds a descriptor from native values.
    #[must_use]
    pub const fn new(addr: u64, len: u32, flags: DescFlags, next: u16) -> Self {
        Self { addr: U64::new(addr), len: U32::new(len), flags: U16::new(flags.bits()), next: U16::new(next) }
    }

    /// The flags, unknown bits kept.
    #[must_use]
    pub const fn flags(&self) -> DescFlags {
        DescFlags::from_bits_retain(self.flags.get())
    }
}

/// Head of the avail ring; `size` entries of [`U16`] and `used_event` follow (2.7.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AvailHeader {
    /// See [`AvailFlags`].
    pub flags: U16,
    /// Where the driver puts the next entry, modulo 65536.
    pub idx: U16,
}
const _: () = assert!(size_of::<AvailHeader>() == 4);

/// Head of the used ring; `size` entries of [`UsedElem`] and `avail_event` follow (2.7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UsedHeader {
    /// See [`UsedFlags`].
    pub flags: U16,
    /// Where the device puts the next entry, modulo 65536.
    pub idx: U16,
}
const _: () = assert!(size_of::<UsedHeader>() == 4);

/// An entry of the used ring (2.7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UsedElem {
    /// Head of the chain that is done.
    pub id: U32,
    /// How many bytes the device wrote into it.
    pub len: U32,
}
const _: () = assert!(size_of::<UsedElem>() == 8);

impl UsedElem {
    /// Builds an entry from native values.
    #[must_use]
    pub const fn new(id: u32, len: u32) -> Self {
        Self { id: U32::new(id), len: U32::new(len) }
    }
}

/// Alignment of the descriptor table, in bytes (2.7).
pub const DESC_ALIGN: u64 = 16;
/// Alignment of the avail ring, in bytes (2.7).
pub const AVAIL_ALIGN: u64 = 2;
/// Alignment of the used ring, in bytes (2.7).
pub const USED_ALIGN: u64 = 4;
/// Most entries of a split ring (2.7).
pub const RING_SIZE_MAX: u16 = 32768;

/// Offset of `flags` in the avail ring.
pub const AVAIL_FLAGS_OFFSET: u64 = offset_of!(AvailHeader, flags) as u64;
/// Offset of `idx` in the avail ring.
pub const AVAIL_IDX_OFFSET: u64 = offset_of!(AvailHeader, idx) as u64;
/// Offset of `flags` in the used ring.
pub const USED_FLAGS_OFFSET: u64 = offset_of!(UsedHeader, flags) as u64;
/// Offset of `idx` in the used ring.
pub const USED_IDX_OFFSET: u64 = offset_of!(UsedHeader, idx) as u64;

/// A legal number of entries of a split ring: a power of two from 1 to [`RING_SIZE_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingSize(u16);

impl RingSize {
    /// `None` for zero, for more than [`RING_SIZE_MAX`] and for what is no power of two.
    #[must_use]
    pub const fn new(entries: u32) -> Option<Self> {
        if entries > RING_SIZE_MAX as u32 || !entries.is_power_of_two() {
            return None;
        }
        Some(Self(entries as u16))
    }

    /// Number of entries.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The slot of a free-running index.
    #[must_use]
    pub const fn slot(self, index: u16) -> u16 {
        index & (self.0 - 1)
    }

    /// Bytes of the descriptor table.
    #[must_use]
    pub const fn desc_bytes(self) -> u64 {
        size_of::<Desc>() as u64 * self.0 as u64
    }

    /// Offset of descriptor `index` in the table. `index` must be below the size: the caller checked it by name.
    #[must_use]
    pub const fn desc_offset(self, index: u16) -> u64 {
        size_of::<Desc>() as u64 * index as u64
    }

    /// Bytes of the avail ring, `used_event` included if `event_idx`.
    #[must_use]
    pub const fn avail_bytes(self, event_idx: bool) -> u64 {
        self.used_event_offset() + if event_idx { 2 } else { 0 }
    }

    /// Offset, in the avail ring, of the entry for free-running `index`.
    #[must_use]
    pub const fn avail_entry_offset(self, index: u16) -> u64 {
        size_of::<AvailHeader>() as u64 + 2 * self.slot(index) as u64
    }

    /// Offset of `used_event` in the avail ring.
    #[must_use]
    pub const fn used_event_offset(self) -> u64 {
        size_of::<AvailHeader>() as u64 + 2 * self.0 as u64
    }

    /// Bytes of the used ring, `avail_event` included if `event_idx`.
    #[must_use]
    pub const fn used_bytes(self, event_idx: bool) -> u64 {
        self.avail_event_offset() + if event_idx { 2 } else { 0 }
    }

    /// Offset, in the used ring, of the entry for free-running `index`.
    #[must_use]
    pub const fn used_entry_offset(self, index: u16) -> u64 {
        size_of::<UsedHeader>() as u64 + size_of::<UsedElem>() as u64 * self.slot(index) as u64
    }

    /// Offset of `avail_event` in the used ring.
    #[must_use]
    pub const fn avail_event_offset(self) -> u64 {
        size_of::<UsedHeader>() as u64 + size_of::<UsedElem>() as u64 * self.0 as u64
    }

    /// Where the three areas lie when they follow each other from `base`, the used ring aligned to `used_align`
    /// (at least [`USED_ALIGN`]; 4096 gives the legacy layout). Both event fields have room.
    ///
    /// `None` if `base` is not aligned to [`DESC_ALIGN`], if `used_align` is no power of two of at least [`USED_ALIGN`],
    /// or if the end would pass 2^64.
    #[must_use]
    pub const fn layout(self, base: u64, used_align: u64) -> Option<RingLayout> {
        if !base.is_multiple_of(DESC_ALIGN) || used_align < USED_ALIGN || !used_align.is_power_of_two() {
            return None;
        }
        let Some(avail) = base.checked_add(self.desc_bytes()) else {
            return None;
        };
        let Some(avail_end) = avail.checked_add(self.avail_bytes(true)) else {
            return None;
        };
        let Some(used) = avail_end.checked_next_multiple_of(used_align) else {
            return None;
        };
        let Some(end) = used.checked_add(self.used_bytes(true)) else {
            return None;
        };
        Some(RingLayout { desc: base, avail, used, end })
    }
}

/// Addresses of a ring's three areas, see [`RingSize::layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptor table.
    pub desc: u64,
    /// Avail ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// First byte after the used ring.
    pub end: u64,
}

/// Did an index that moved from `old` to `new` pass the entry at which the other side wants its event (2.7.7.1)?
///
/// The other side writes `event`; it wants to hear when the entry with that index was made available or used. All are
/// free-running, modulo 65536. True when `event` lies in `old..new`.
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
