//! vhost-user: headers, requests, payloads, protocol features and the inflight region.
//!
//! The vhost-user protocol, version 1, as QEMU's documentation states it (docs/interop/vhost-user).
//!
//! A message is a 12-byte [`Header`] and `size` bytes of payload; descriptors travel beside it (SCM_RIGHTS). Numbers are of
//! the machine's order, which is little-endian on every machine qpair runs on. The *inflight region* is memory that both
//! ends keep through a crash of the back end: for each queue a [`InflightHeader`] and one [`InflightDesc`] a
//! descriptor, each queue's part starting at a multiple of [`INFLIGHT_ALIGN`].
//!
//! Errors: none here.
//!
//! Not implemented: crypto, network, GPU and shared-object payloads (their requests are named).
//!
//! Limits: [`MEMORY_REGIONS_MAX`] regions in a table, [`CONFIG_BYTES_MAX`] bytes of configuration in one message.

// Requests and protocol features carry the specification's names, which say what they are.
#![allow(missing_docs)]

use crate::open_enum::open_enum;
use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The only version there is.
pub const VERSION: u32 = 1;
/// Most regions, and so most descriptors, of SET_MEM_TABLE.
pub const MEMORY_REGIONS_MAX: usize = 8;
/// Most bytes of configuration space that a message carries.
pub const CONFIG_BYTES_MAX: usize = 256;
/// In the payload of SET_VRING_KICK / CALL / ERR: the queue's number.
pub const VRING_INDEX_MASK: u64 = 0xff;
/// In the payload of SET_VRING_KICK / CALL / ERR: no descriptor comes along.
pub const VRING_NO_FD: u64 = 1 << 8;
/// Each queue's part of the inflight region starts at a multiple of this many bytes.
pub const INFLIGHT_ALIGN: u64 = 64;
/// Version of the inflight region.
pub const INFLIGHT_VERSION: u16 = 1;

open_enum! {
    /// What the front end asks of the back end.
    pub enum Request: u32 {
        GET_FEATURES = 1,
        SET_FEATURES = 2,
        SET_OWNER = 3,
        RESET_OWNER = 4,
        SET_MEM_TABLE = 5,
        SET_LOG_BASE = 6,
        SET_LOG_FD = 7,
        SET_VRING_NUM = 8,
        SET_VRING_ADDR = 9,
        SET_VRING_BASE = 10,
        GET_VRING_BASE = 11,
        SET_VRING_KICK = 12,
        SET_VRING_CALL = 13,
        SET_VRING_ERR = 14,
        GET_PROTOCOL_FEATURES = 15,
        SET_PROTOCOL_FEATURES = 16,
        GET_QUEUE_NUM = 17,
        SET_VRING_ENABLE = 18,
        SEND_RARP = 19,
        NET_SET_MTU = 20,
        SET_BACKEND_REQ_FD = 21,
        IOTLB_MSG = 22,
        SET_VRING_ENDIAN = 23,
        GET_CONFIG = 24,
        SET_CONFIG = 25,
        CREATE_CRYPTO_SESSION = 26,
        CLOSE_CRYPTO_SESSION = 27,
        POSTCOPY_ADVISE = 28,
        POSTCOPY_LISTEN = 29,
        POSTCOPY_END = 30,
        GET_INFLIGHT_FD = 31,
        SET_INFLIGHT_FD = 32,
        GPU_SET_SOCKET = 33,
        RESET_DEVICE = 34,
        VRING_KICK = 35,
        GET_MAX_MEM_SLOTS = 36,
        ADD_MEM_REG = 37,
        REM_MEM_REG = 38,
        SET_STATUS = 39,
        GET_STATUS = 40,
        GET_SHARED_OBJECT = 41,
        SET_DEVICE_STATE_FD = 42,
        CHECK_DEVICE_STATE = 43,
    }
}

open_enum! {
    /// What the back end asks of the front end, over the channel of SET_BACKEND_REQ_FD.
    pub enum BackendRequest: u32 {
        IOTLB_MSG = 1,
        CONFIG_CHANGE_MSG = 2,
        VRING_HOST_NOTIFIER_MSG = 3,
        VRING_CALL = 4,
        VRING_ERR = 5,
        SHARED_OBJECT_ADD = 6,
        SHARED_OBJECT_REMOVE = 7,
        SHARED_OBJECT_LOOKUP = 8,
    }
}

bitflags! {
    /// Flags of a header. The low two bits are the version.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HeaderFlags: u32 {
        /// Both bits of the version.
        const VERSION_MASK = 0x3;
        /// This message answers one.
        const REPLY = 1 << 2;
        /// The sender wants an answer (REPLY_ACK).
        const NEED_REPLY = 1 << 3;
    }

    /// Protocol features.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        const MQ = 1 << 0;
        const LOG_SHMFD = 1 << 1;
        const RARP = 1 << 2;
        const REPLY_ACK = 1 << 3;
        const MTU = 1 << 4;
        const BACKEND_REQ = 1 << 5;
        const CROSS_ENDIAN = 1 << 6;
        const CRYPTO_SESSION = 1 << 7;
        const PAGEFAULT = 1 << 8;
        const CONFIG = 1 << 9;
        const BACKEND_SEND_FD = 1 << 10;
        const HOST_NOTIFIER = 1 << 11;
        const INFLIGHT_SHMFD = 1 << 12;
        const RESET_DEVICE = 1 << 13;
        const INBAND_NOTIFICATIONS = 1 << 14;
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        const STATUS = 1 << 16;
        const XEN_MMAP = 1 << 17;
        const SHARED_OBJECT = 1 << 18;
        const DEVICE_STATE = 1 << 19;
    }

    /// Flags of [`VringAddr`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct VringAddrFlags: u32 {
        /// Writes to the used ring are logged at `log`.
        const LOG = 1 << 0;
    }

    /// Flags of [`ConfigHeader`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ConfigFlags: u32 {
        /// The driver wrote these bytes.
        const WRITABLE = 0;
        /// A migration restores these bytes.
        const MIGRATION = 1 << 0;
    }
}

macro_rules! payload {
    ($(#[$outer:meta])* $name:ident, $bytes:expr, { $( $(#[$inner:meta])* $field:ident: $ty:ty, )+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $( $(#[$inner])* pub $field: $ty, )+ }
        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

payload! {
    /// Head of every message.
    Header, 12, {
        /// See [`Request`].
        request: U32,
        /// See [`HeaderFlags`].
        flags: U32,
        /// Bytes of payload.
        size: U32,
    }
}

impl Header {
    /// What it asks for.
    #[must_use]
    pub const fn request(&self) -> Request {
        Request(self.request.get())
    }

    /// The flags, unknown bits kept.
    #[must_use]
    pub const fn flags(&self) -> HeaderFlags {
        HeaderFlags::from_bits_retain(self.flags.get())
    }

    /// The version of the sender; only [`VERSION`] is spoken.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.flags.get() & HeaderFlags::VERSION_MASK.bits()
    }
}

payload! {
    /// A queue and a number: SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
    VringState, 8, {
        /// The queue.
        index: U32,
        /// Size, base or enable.
        num: U32,
    }
}

payload! {
    /// SET_VRING_ADDR: where a ring lies, in the front end's address space.
    VringAddr, 40, {
        /// The queue.
        index: U32,
        /// See [`VringAddrFlags`].
        flags: U32,
        /// Descriptor table.
        desc: U64,
        /// Used ring.
        used: U64,
        /// Avail ring.
        avail: U64,
        /// Where writes to the used ring are logged.
        log: U64,
    }
}
const _: () = assert!(offset_of!(VringAddr, used) == 16 && offset_of!(VringAddr, avail) == 24);

payload! {
    /// Head of SET_MEM_TABLE; `num_regions` of [`MemoryRegion`] follow.
    MemoryHeader, 8, {
        /// How many regions, at most [`MEMORY_REGIONS_MAX`].
        num_regions: U32,
        /// Zero.
        padding: U32,
    }
}

payload! {
    /// One region of guest memory.
    MemoryRegion, 32, {
        /// Where the guest sees it.
        guest_addr: U64,
        /// Size in bytes.
        size: U64,
        /// Where the front end sees it.
        user_addr: U64,
        /// Where it starts in its descriptor's file.
        mmap_offset: U64,
    }
}

payload! {
    /// ADD_MEM_REG, REM_MEM_REG.
    SingleMemoryRegion, 40, {
        /// Zero.
        padding: U64,
        /// The region.
        region: MemoryRegion,
    }
}

payload! {
    /// Head of GET_CONFIG and SET_CONFIG; `size` bytes follow.
    ConfigHeader, 12, {
        /// First byte of the configuration space.
        offset: U32,
        /// How many, at most [`CONFIG_BYTES_MAX`].
        size: U32,
        /// See [`ConfigFlags`].
        flags: U32,
    }
}

payload! {
    /// SET_LOG_BASE.
    Log, 16, {
        /// Size in bytes.
        mmap_size: U64,
        /// Where it starts in its descriptor's file.
        mmap_offset: U64,
    }
}

payload! {
    /// GET_INFLIGHT_FD, SET_INFLIGHT_FD. The documentation lists 20 bytes; every implementation sends the C structure's 24.
    Inflight, 24, {
        /// Size in bytes.
        mmap_size: U64,
        /// Where it starts in its descriptor's file.
        mmap_offset: U64,
        /// How many queues it tracks.
        num_queues: U16,
        /// Entries of each.
        queue_size: U16,
        /// Zero.
        padding: U32,
    }
}
/// Bytes of [`Inflight`] without the padding: the least that a message carries.
pub const INFLIGHT_MESSAGE_BYTES_MIN: usize = offset_of!(Inflight, padding);
const _: () = assert!(INFLIGHT_MESSAGE_BYTES_MIN == 20);

payload! {
    /// SET_LOG_FD's area and VRING_HOST_NOTIFIER_MSG.
    VringArea, 24, {
        /// The queue and flags.
        index: U64,
        /// Size in bytes.
        size: U64,
        /// Where it starts in its descriptor's file.
        offset: U64,
    }
}

payload! {
    /// Inflight region, split ring: head of a queue's part.
    InflightHeader, 16, {
        /// Zero: no features are defined.
        features: U64,
        /// [`INFLIGHT_VERSION`]; zero in a region that no back end has used yet.
        version: U16,
        /// Entries that follow: the ring's size.
        desc_num: U16,
        /// Head of the list of chains submitted in the last batch.
        last_batch_head: U16,
        /// The used index as of the last batch.
        used_idx: U16,
    }
}
const _: () = assert!(offset_of!(InflightHeader, version) == 8);
const _: () = assert!(offset_of!(InflightHeader, used_idx) == 14);

payload! {
    /// Inflight region, split ring: the state of one descriptor that heads a chain.
    InflightDesc, 16, {
        /// 1 while the chain is with the back end.
        inflight: u8,
        /// Zero.
        padding: [u8; 5],
        /// Next head of the last batch.
        next: U16,
        /// Order of arrival: a larger one came later.
        counter: U64,
    }
}
const _: () = assert!(offset_of!(InflightDesc, next) == 6);
const _: () = assert!(offset_of!(InflightDesc, counter) == 8);

/// Offset of `inflight` in [`InflightDesc`].
pub const INFLIGHT_DESC_INFLIGHT_OFFSET: u64 = offset_of!(InflightDesc, inflight) as u64;
/// Offset of `next` in [`InflightDesc`].
pub const INFLIGHT_DESC_NEXT_OFFSET: u64 = offset_of!(InflightDesc, next) as u64;
/// Offset of `counter` in [`InflightDesc`].
pub const INFLIGHT_DESC_COUNTER_OFFSET: u64 = offset_of!(InflightDesc, counter) as u64;
/// Offset of `version` in [`InflightHeader`].
pub const INFLIGHT_VERSION_OFFSET: u64 = offset_of!(InflightHeader, version) as u64;
/// Offset of `desc_num` in [`InflightHeader`].
pub const INFLIGHT_DESC_NUM_OFFSET: u64 = offset_of!(InflightHeader, desc_num) as u64;
/// Offset of `last_batch_head` in [`InflightHeader`].
pub const INFLIGHT_LAST_BATCH_HEAD_OFFSET: u64 = offset_of!(InflightHeader, last_batch_head) as u64;
/// Offset of `used_idx` in [`InflightHeader`].
pub const INFLIGHT_USED_IDX_OFFSET: u64 = offset_of!(InflightHeader, used_idx) as u64;

payload! {
    /// Inflight region, packed ring: head of a queue's part. The documentation's C structure is not packed, so that the entries begin at a
    /// multiple of 8: [`InflightPackedHeader`] has the padding that a compiler adds.
    InflightPackedHeader, 32, {
        /// Zero: no features are defined.
        features: U64,
        /// [`INFLIGHT_VERSION`]; zero in a region that no back end has used yet.
        version: U16,
        /// Entries that follow: the ring's size.
        desc_num: U16,
        /// First entry of the free list.
        free_head: U16,
        /// The same as of the last batch.
        old_free_head: U16,
        /// Where the next used descriptor is written.
        used_idx: U16,
        /// The same as of the last batch.
        old_used_idx: U16,
        /// The device's wrap counter.
        used_wrap_counter: u8,
        /// The same as of the last batch.
        old_used_wrap_counter: u8,
        /// Zero.
        padding: [u8; 7],
        /// Zero.
        alignment: [u8; 3],
    }
}
const _: () = assert!(offset_of!(InflightPackedHeader, used_idx) == 16 && offset_of!(InflightPackedHeader, used_wrap_counter) == 20);

payload! {
    /// Inflight region, packed ring: a descriptor that was taken, or a free entry.
    InflightPackedDesc, 32, {
        /// 1 while the chain is with the back end. Of the chain's first entry only, as `last`, `num` and `counter`.
        inflight: u8,
        /// Zero.
        padding: u8,
        /// The next entry: of the chain, or of the free list.
        next: U16,
        /// The chain's last entry.
        last: U16,
        /// How many descriptors the chain has.
        num: U16,
        /// Order of arrival: a larger one came later.
        counter: U64,
        /// As the descriptor had it.
        id: U16,
        /// As the descriptor had them.
        flags: U16,
        /// As the descriptor had it.
        len: U32,
        /// As the descriptor had it.
        addr: U64,
    }
}
const _: () = assert!(offset_of!(InflightPackedDesc, counter) == 8 && offset_of!(InflightPackedDesc, id) == 16);
const _: () = assert!(offset_of!(InflightPackedDesc, len) == 20 && offset_of!(InflightPackedDesc, addr) == 24);

/// Offset of `version` in [`InflightPackedHeader`]; where the split ring's header has it.
pub const INFLIGHT_PACKED_VERSION_OFFSET: u64 = offset_of!(InflightPackedHeader, version) as u64;
/// Offset of `desc_num` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_DESC_NUM_OFFSET: u64 = offset_of!(InflightPackedHeader, desc_num) as u64;
/// Offset of `free_head` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_FREE_HEAD_OFFSET: u64 = offset_of!(InflightPackedHeader, free_head) as u64;
/// Offset of `old_free_head` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_OLD_FREE_HEAD_OFFSET: u64 = offset_of!(InflightPackedHeader, old_free_head) as u64;
/// Offset of `used_idx` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_USED_IDX_OFFSET: u64 = offset_of!(InflightPackedHeader, used_idx) as u64;
/// Offset of `old_used_idx` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_OLD_USED_IDX_OFFSET: u64 = offset_of!(InflightPackedHeader, old_used_idx) as u64;
/// Offset of `used_wrap_counter` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_USED_WRAP_OFFSET: u64 = offset_of!(InflightPackedHeader, used_wrap_counter) as u64;
/// Offset of `old_used_wrap_counter` in [`InflightPackedHeader`].
pub const INFLIGHT_PACKED_OLD_USED_WRAP_OFFSET: u64 = offset_of!(InflightPackedHeader, old_used_wrap_counter) as u64;
/// Bytes of [`InflightPackedHeader`]: where the entries begin.
pub const INFLIGHT_PACKED_ENTRIES_OFFSET: u64 = size_of::<InflightPackedHeader>() as u64;

/// Bytes of one queue's part of a packed ring's inflight region, a multiple of [`INFLIGHT_ALIGN`].
#[must_use]
pub const fn inflight_packed_queue_bytes(queue_size: u16) -> u64 {
    let bytes = INFLIGHT_PACKED_ENTRIES_OFFSET + size_of::<InflightPackedDesc>() as u64 * queue_size as u64;
    bytes.next_multiple_of(INFLIGHT_ALIGN)
}

/// Bytes of one queue's part of the inflight region, a multiple of [`INFLIGHT_ALIGN`].
#[must_use]
pub const fn inflight_queue_bytes(queue_size: u16) -> u64 {
    let bytes = size_of::<InflightHeader>() as u64 + size_of::<InflightDesc>() as u64 * queue_size as u64;
    bytes.next_multiple_of(INFLIGHT_ALIGN)
}

/// Bytes of the whole inflight region.
#[must_use]
pub const fn inflight_region_bytes(num_queues: u16, queue_size: u16) -> u64 {
    inflight_queue_bytes(queue_size) * num_queues as u64
}

/// Offset of descriptor `index` of queue `queue` in the inflight region.
#[must_use]
pub const fn inflight_desc_offset(queue: u16, queue_size: u16, index: u16) -> u64 {
    inflight_queue_bytes(queue_size) * queue as u64 + size_of::<InflightHeader>() as u64 + size_of::<InflightDesc>() as u64 * index as u64
}
