//! The virtio block device: requests, status bytes, features and configuration space.
//!
//! Virtio 1.2, 5.2: 5.2.3 (features), 5.2.4 (configuration), 5.2.6 (requests).
//!
//! A request is a chain of descriptors: a 16-byte [`RequestHeader`] that the device reads, data in either direction, one
//! status byte that the device writes. Sectors are always 512 bytes, whatever the block size. The configuration
//! space grew with the versions: 60 bytes up to write-zeroes ([`Config`], which is all that QEMU's server sends), 72
//! with secure erase, 96 with zones ([`ConfigZoned`]).
//!
//! Errors: none here.
//!
//! Not implemented: zone requests (the numbers are named, so that they can be refused by name).
//!
//! Limits: a configuration space of 256 bytes at most over vhost-user.

use crate::open_enum::open_enum;
use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector, the unit of [`RequestHeader::sector`] and of [`Config::capacity`].
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of the answer to GET_ID; a shorter string is ended by a zero, a string of 20 is not.
pub const ID_BYTES: usize = 20;

open_enum! {
    /// What a request asks for (5.2.6).
    pub enum RequestType: u32 {
        /// Read.
        IN = 0,
        /// Write.
        OUT = 1,
        /// SCSI passthrough of the legacy interface.
        SCSI_CMD = 2,
        /// Flush volatile writes.
        FLUSH = 4,
        /// The device's name, [`ID_BYTES`] long.
        GET_ID = 8,
        /// Lifetime metrics.
        GET_LIFETIME = 10,
        /// Discard ranges.
        DISCARD = 11,
        /// Write zeroes to ranges.
        WRITE_ZEROES = 13,
        /// Erase ranges for good.
        SECURE_ERASE = 14,
        /// Append to a zone.
        ZONE_APPEND = 15,
        /// Report zones.
        ZONE_REPORT = 16,
        /// Open a zone.
        ZONE_OPEN = 18,
        /// Close a zone.
        ZONE_CLOSE = 20,
        /// Finish a zone.
        ZONE_FINISH = 22,
        /// Reset a zone.
        ZONE_RESET = 24,
        /// Reset all zones.
        ZONE_RESET_ALL = 26,
    }
}

open_enum! {
    /// The last byte of a request, written by the device (5.2.6).
    pub enum BlkStatus: u8 {
        /// Done.
        OK = 0,
        /// Failed.
        IOERR = 1,
        /// Not supported, or malformed.
        UNSUPP = 2,
        /// Zones: not possible in the zone's state.
        ZONE_INVALID_CMD = 3,
        /// Zones: a write away from the write pointer.
        ZONE_UNALIGNED_WP = 4,
        /// Zones: too many are open.
        ZONE_OPEN_RESOURCE = 5,
        /// Zones: too many are active.
        ZONE_ACTIVE_RESOURCE = 6,
    }
}

bitflags! {
    /// Features of the block device (5.2.3); bits above 23 are in [`crate::virtio::Features`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct BlkFeatures: u64 {
        /// Legacy: request barriers.
        const BARRIER = 1 << 0;
        /// `size_max` is valid.
        const SIZE_MAX = 1 << 1;
        /// `seg_max` is valid.
        const SEG_MAX = 1 << 2;
        /// `geometry` is valid.
        const GEOMETRY = 1 << 4;
        /// Read-only.
        const RO = 1 << 5;
        /// `blk_size` is valid.
        const BLK_SIZE = 1 << 6;
        /// Legacy: SCSI passthrough.
        const SCSI = 1 << 7;
        /// FLUSH is understood.
        const FLUSH = 1 << 9;
        /// `topology` is valid.
        const TOPOLOGY = 1 << 10;
        /// `writeback` can be read and written.
        const CONFIG_WCE = 1 << 11;
        /// `num_queues` is valid.
        const MQ = 1 << 12;
        /// DISCARD is understood.
        const DISCARD = 1 << 13;
        /// WRITE_ZEROES is understood.
        const WRITE_ZEROES = 1 << 14;
        /// GET_LIFETIME is understood.
        const LIFETIME = 1 << 15;
        /// SECURE_ERASE is understood.
        const SECURE_ERASE = 1 << 16;
        /// A zoned device.
        const ZONED = 1 << 17;
    }

    /// Flags of a discard / write-zeroes segment (5.2.6).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SegmentFlags: u32 {
        /// Write zeroes: blocks may be deallocated. Must be clear in a discard.
        const UNMAP = 1 << 0;
    }
}

/// First descriptor of a request (5.2.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// See [`RequestType`].
    pub kind: U32,
    /// Legacy: priority. Drivers send zero.
    pub reserved: U32,
    /// First sector of a read or write.
    pub sector: U64,
}
const _: () = assert!(size_of::<RequestHeader>() == 16);
const _: () = assert!(offset_of!(RequestHeader, sector) == 8);

impl RequestHeader {
    /// Builds a header from native values.
    #[must_use]
    pub const fn new(kind: RequestType, sector: u64) -> Self {
        Self { kind: U32::new(kind.0), reserved: U32::new(0), sector: U64::new(sector) }
    }

    /// What it asks for.
    #[must_use]
    pub const fn kind(&self) -> RequestType {
        RequestType(self.kind.get())
    }
}

/// A range of DISCARD, WRITE_ZEROES or SECURE_ERASE (5.2.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Segment {
    /// First sector.
    pub sector: U64,
    /// Number of sectors.
    pub num_sectors: U32,
    /// See [`SegmentFlags`].
    pub flags: U32,
}
const _: () = assert!(size_of::<Segment>() == 16);
const _: () = assert!(offset_of!(Segment, num_sectors) == 8 && offset_of!(Segment, flags) == 12);

impl Segment {
    /// Builds a segment from native values.
    #[must_use]
    pub const fn new(sector: u64, num_sectors: u32, flags: SegmentFlags) -> Self {
        Self { sector: U64::new(sector), num_sectors: U32::new(num_sectors), flags: U32::new(flags.bits()) }
    }

    /// The flags, unknown bits kept.
    #[must_use]
    pub const fn flags(&self) -> SegmentFlags {
        SegmentFlags::from_bits_retain(self.flags.get())
    }
}

/// Configuration space up to write-zeroes: 60 bytes (5.2.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Config {
    /// Size in sectors of 512 bytes.
    pub capacity: U64,
    /// SIZE_MAX: largest segment in bytes.
    pub size_max: U32,
    /// SEG_MAX: most data segments of a request.
    pub seg_max: U32,
    /// GEOMETRY: cylinders.
    pub cylinders: U16,
    /// GEOMETRY: heads.
    pub heads: u8,
    /// GEOMETRY: sectors a track.
    pub sectors: u8,
    /// BLK_SIZE: logical block in bytes.
    pub blk_size: U32,
    /// TOPOLOGY: logical blocks of a physical one, as a power of two.
    pub physical_block_exp: u8,
    /// TOPOLOGY: offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// TOPOLOGY: smallest sensible I/O in logical blocks.
    pub min_io_size: U16,
    /// TOPOLOGY: best I/O in logical blocks.
    pub opt_io_size: U32,
    /// CONFIG_WCE: 1 for write-back, 0 for write-through.
    pub writeback: u8,
    /// Zero.
    pub unused0: u8,
    /// MQ: number of request queues.
    pub num_queues: U16,
    /// DISCARD: most sectors of one segment.
    pub max_discard_sectors: U32,
    /// DISCARD: most segments of one request.
    pub max_discard_seg: U32,
    /// DISCARD: alignment in sectors.
    pub discard_sector_alignment: U32,
    /// WRITE_ZEROES: most sectors of one segment.
    pub max_write_zeroes_sectors: U32,
    /// WRITE_ZEROES: most segments of one request.
    pub max_write_zeroes_seg: U32,
    /// WRITE_ZEROES: 1 where the flag UNMAP has an effect.
    pub write_zeroes_may_unmap: u8,
    /// Zero.
    pub unused1: [u8; 3],
}
const _: () = assert!(size_of::<Config>() == 60);
const _: () = assert!(offset_of!(Config, cylinders) == 16);
const _: () = assert!(offset_of!(Config, blk_size) == 20);
const _: () = assert!(offset_of!(Config, physical_block_exp) == 24);
const _: () = assert!(offset_of!(Config, writeback) == 32);
const _: () = assert!(offset_of!(Config, num_queues) == 34);
const _: () = assert!(offset_of!(Config, max_discard_sectors) == 36);
const _: () = assert!(offset_of!(Config, max_write_zeroes_sectors) == 48);
const _: () = assert!(offset_of!(Config, write_zeroes_may_unmap) == 56);

/// Offset of [`Config::writeback`], the one byte that a driver may write.
pub const CONFIG_WRITEBACK_OFFSET: usize = offset_of!(Config, writeback);

/// Configuration space with secure erase and zones: 96 bytes (5.2.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ConfigZoned {
    /// The first 60 bytes.
    pub base: Config,
    /// SECURE_ERASE: most sectors of one segment.
    pub max_secure_erase_sectors: U32,
    /// SECURE_ERASE: most segments of one request.
    pub max_secure_erase_seg: U32,
    /// SECURE_ERASE: alignment in sectors.
    pub secure_erase_sector_alignment: U32,
    /// ZONED: sectors of a zone.
    pub zone_sectors: U32,
    /// ZONED: most open zones.
    pub max_open_zones: U32,
    /// ZONED: most active zones.
    pub max_active_zones: U32,
    /// ZONED: most sectors of an append.
    pub max_append_sectors: U32,
    /// ZONED: write granularity in bytes.
    pub write_granularity: U32,
    /// ZONED: 0 none, 1 host-managed, 2 host-aware.
    pub zone_model: u8,
    /// Zero.
    pub unused2: [u8; 3],
}
const _: () = assert!(size_of::<ConfigZoned>() == 96);
const _: () = assert!(offset_of!(ConfigZoned, max_secure_erase_sectors) == 60);
const _: () = assert!(offset_of!(ConfigZoned, zone_sectors) == 72);
const _: () = assert!(offset_of!(ConfigZoned, zone_model) == 92);
