//! The superblock that a member of a RAID bdev carries: SPDK's `SPDKRAID`, version 1.0.
//!
//! Format: the public SPDK repository, `module/bdev/raid/bdev_raid.h`. A [`Header`] of 256 bytes at the start of the member, followed by one [`Base`]
//! of 64 bytes a slot; all numbers little-endian, UUIDs as their 16 bytes. Data begin [`DATA_OFFSET_MIN`] bytes on, or later. The
//! checksum is CRC-32C of the whole superblock with its own field zero, begun with zero and not inverted at the end.
//!
//! How it works: [`decode`] looks at bytes that anybody may have written, and gives them as they are only if every field makes sense; [`encode`] writes
//! one with its length and checksum. Neither copies or allocates.
//!
//! Errors. [`Error`], one a field, with the value and the limit. [`Error::Signature`] alone says that there is no superblock at all.
//!
//! Not implemented: versions beyond 1.x; a minor version above 0 is read as 1.0, which is what minor versions are for. The fields `state` and `flags`
//! are kept and mean nothing yet, as in SPDK.
//!
//! Limits: [`BASES_MAX`] members, names of [`NAME_BYTES`] − 1 bytes.

use core::fmt;
use core::mem::{offset_of, size_of};

use crc::{Algorithm, Crc, Table};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::open_enum::open_enum;

/// The first eight bytes.
pub const SIGNATURE: [u8; 8] = *b"SPDKRAID";
/// The only major version there is.
pub const VERSION_MAJOR: u16 = 1;
/// What is written.
pub const VERSION_MINOR: u16 = 0;
/// Bytes of the name's field; the name ends with a zero in it.
pub const NAME_BYTES: usize = 64;
/// Most members.
pub const BASES_MAX: usize = 255;
/// Bytes of the longest superblock.
pub const LENGTH_MAX: usize = size_of::<Header>() + BASES_MAX * size_of::<Base>();
/// Data begin so many bytes from the start of a member, or later.
pub const DATA_OFFSET_MIN: u64 = 1 << 20;

open_enum! {
    /// How the members make a whole.
    pub enum Level: u32 {
        /// Strips in turn.
        RAID0 = 0,
        /// Mirrored.
        RAID1 = 1,
        /// Strips with parity, whole stripes only.
        RAID5F = 0x5f,
        /// One after the other.
        CONCAT = 99,
    }
}

open_enum! {
    /// What a slot's member is to the whole.
    pub enum BaseState: u32 {
        /// Not there: removed by somebody.
        MISSING = 0,
        /// Current.
        CONFIGURED = 1,
        /// Not there: it failed.
        FAILED = 2,
        /// Waits for a slot.
        SPARE = 3,
    }
}

/// The fixed part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`SIGNATURE`].
    pub signature: [u8; 8],
    /// A breaking change makes it higher.
    pub version_major: U16,
    /// A compatible change makes it higher.
    pub version_minor: U16,
    /// Bytes of the whole superblock.
    pub length: U32,
    /// See the module's doc.
    pub crc: U32,
    /// None are known.
    pub flags: U32,
    /// Names the whole.
    pub uuid: [u8; 16],
    /// UTF-8, ended by a zero.
    pub name: [u8; NAME_BYTES],
    /// Blocks of the whole.
    pub raid_size: U64,
    /// Bytes a block, of the whole and of each member.
    pub block_size: U32,
    /// See [`Level`].
    pub level: U32,
    /// Blocks a strip; 0 for a mirror.
    pub strip_size: U32,
    /// Not used.
    pub state: U32,
    /// One more with each change: the higher one is the newer.
    pub seq_number: U64,
    /// Slots.
    pub num_base_bdevs: u8,
    /// Zero.
    pub reserved: [u8; 118],
    /// How many [`Base`]s follow.
    pub base_bdevs_size: u8,
}
const _: () = assert!(size_of::<Header>() == 256);
const _: () = assert!(offset_of!(Header, length) == 12 && offset_of!(Header, crc) == 16 && offset_of!(Header, uuid) == 24);
const _: () = assert!(offset_of!(Header, raid_size) == 104 && offset_of!(Header, level) == 116 && offset_of!(Header, seq_number) == 128);
const _: () = assert!(offset_of!(Header, num_base_bdevs) == 136 && offset_of!(Header, base_bdevs_size) == 255);

/// One member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Base {
    /// Of the member's bdev.
    pub uuid: [u8; 16],
    /// Blocks from the member's start to its data.
    pub data_offset: U64,
    /// Blocks of data.
    pub data_size: U64,
    /// See [`BaseState`].
    pub state: U32,
    /// None are known.
    pub flags: U32,
    /// Which slot.
    pub slot: u8,
    /// Zero.
    pub reserved: [u8; 23],
}
const _: () = assert!(size_of::<Base>() == 64);
const _: () = assert!(offset_of!(Base, data_offset) == 16 && offset_of!(Base, state) == 32 && offset_of!(Base, slot) == 40);
const _: () = assert!((LENGTH_MAX as u64) < DATA_OFFSET_MIN);

impl Base {
    /// The state.
    #[must_use]
    pub const fn state(&self) -> BaseState {
        BaseState(self.state.get())
    }
}

impl Default for Header {
    fn default() -> Self {
        Self {
            signature: SIGNATURE,
            version_major: U16::new(VERSION_MAJOR),
            version_minor: U16::new(VERSION_MINOR),
            length: U32::new(0),
            crc: U32::new(0),
            flags: U32::new(0),
            uuid: [0; 16],
            name: [0; NAME_BYTES],
            raid_size: U64::new(0),
            block_size: U32::new(0),
            level: U32::new(0),
            strip_size: U32::new(0),
            state: U32::new(0),
            seq_number: U64::new(0),
            num_base_bdevs: 0,
            reserved: [0; 118],
            base_bdevs_size: 0,
        }
    }
}

impl Header {
    /// The name, if it is one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        let end = self.name.iter().position(|byte| *byte == 0)?;
        core::str::from_utf8(&self.name[..end]).ok().filter(|name| !name.is_empty())
    }

    /// The level.
    #[must_use]
    pub const fn level(&self) -> Level {
        Level(self.level.get())
    }
}

/// Why bytes are not a superblock. Every number is the field's, as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// There is no superblock.
    Signature,
    /// So many bytes are needed, and there are fewer.
    Short {
        /// From the start.
        needed: usize,
        /// There are.
        found: usize,
    },
    /// Bytes of the whole, and what it must be.
    Length {
        /// As found.
        value: u32,
        /// At least, for its members.
        least: usize,
    },
    /// Torn, or changed by somebody.
    Checksum {
        /// As found.
        value: u32,
        /// Of what is there.
        computed: u32,
    },
    /// Another major version than 1.
    Version(u16),
    /// The zero UUID.
    Uuid,
    /// Empty, not ended by a zero, or not UTF-8.
    Name,
    /// Not a power of two from 512 to 65536.
    BlockSize(u32),
    /// Not a known one.
    Level(u32),
    /// Not a power of two, or not zero for a mirror.
    StripSize(u32),
    /// No member; more described than slots; or zero blocks.
    Count {
        /// Slots.
        slots: u8,
        /// Described.
        described: u8,
    },
    /// Zero blocks, or more bytes than there can be.
    RaidSize(u64),
    /// A member in a slot that there is not, or in one that another has.
    Slot {
        /// As found.
        value: u8,
        /// Slots.
        slots: u8,
    },
    /// A member's state is not a known one.
    State(u32),
    /// A member's data begin in the superblock, or end beyond what there can be.
    Data {
        /// Which slot.
        slot: u8,
        /// Blocks.
        offset: u64,
        /// Blocks.
        size: u64,
    },
    /// A member's UUID is zero, or another's too.
    BaseUuid(u8),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Signature => write!(f, "signature: not SPDKRAID"),
            Self::Short { needed, found } => write!(f, "length {found}: at least {needed} bytes"),
            Self::Length { value, least } => write!(f, "length {value}: {least} to {LENGTH_MAX} bytes"),
            Self::Checksum { value, computed } => write!(f, "crc {value:#010x}: the content's is {computed:#010x}"),
            Self::Version(value) => write!(f, "version.major {value}: {VERSION_MAJOR}"),
            Self::Uuid => write!(f, "uuid: not zero"),
            Self::Name => write!(f, "name: 1 to {} bytes of UTF-8 and a zero", NAME_BYTES - 1),
            Self::BlockSize(value) => write!(f, "block_size {value}: a power of two from 512 to 65536"),
            Self::Level(value) => write!(f, "level {value}: 0, 1, 95 or 99"),
            Self::StripSize(value) => write!(f, "strip_size {value}: a power of two; 0 for raid1"),
            Self::Count { slots, described } => write!(f, "base_bdevs_size {described}: 1 to num_base_bdevs {slots}"),
            Self::RaidSize(value) => write!(f, "raid_size {value}: 1 to 2^63 bytes"),
            Self::Slot { value, slots } => write!(f, "slot {value}: each below num_base_bdevs {slots}, once"),
            Self::State(value) => write!(f, "state {value}: 0 to 3"),
            Self::Data { slot, offset, size } => {
                write!(f, "data_offset {offset} and data_size {size} of slot {slot}: from {DATA_OFFSET_MIN} to 2^63 bytes")
            }
            Self::BaseUuid(slot) => write!(f, "uuid of slot {slot}: not zero, and nobody else's"),
        }
    }
}

impl core::error::Error for Error {}

static CRC: Crc<u32, Table<1>> = Crc::<u32, Table<1>>::new(&Algorithm {
    width: 32,
    poly: 0x1edc_6f41,
    init: 0,
    refin: true,
    refout: true,
    xorout: 0,
    check: 0x58e3_fa20,
    residue: 0,
});

/// The checksum of a whole superblock, whatever its field says.
fn checksum(bytes: &[u8]) -> u32 {
    let at = offset_of!(Header, crc);
    let mut digest = CRC.digest();
    digest.update(&bytes[..at]);
    digest.update(&[0; 4]);
    digest.update(&bytes[at + 4..]);
    digest.finalize()
}

/// Looks at the start of a member. `Ok`: everything in it makes sense by itself; whether it fits the bdev that it lies on is another question.
/// [`Error::Short`] says how much of the member is needed.
pub fn decode(bytes: &[u8]) -> Result<(&Header, &[Base]), Error> {
    let short = Error::Short { needed: size_of::<Header>(), found: bytes.len() };
    let Ok((header, _)) = Header::ref_from_prefix(bytes) else { return Err(short) };
    if header.signature != SIGNATURE {
        return Err(Error::Signature);
    }
    let length = header.length.get() as usize;
    let least = size_of::<Header>() + usize::from(header.base_bdevs_size) * size_of::<Base>();
    if length > LENGTH_MAX || length < least {
        return Err(Error::Length { value: header.length.get(), least });
    }
    let Some(whole) = bytes.get(..length) else { return Err(Error::Short { needed: length, found: bytes.len() }) };
    let computed = checksum(whole);
    if computed != header.crc.get() {
        return Err(Error::Checksum { value: header.crc.get(), computed });
    }
    let tail = &whole[size_of::<Header>()..least];
    let Ok(bases) = <[Base]>::ref_from_bytes(tail) else { return Err(Error::Short { needed: least, found: bytes.len() }) };
    check(header, bases)?;
    Ok((header, bases))
}

fn check(header: &Header, bases: &[Base]) -> Result<(), Error> {
    if header.version_major.get() != VERSION_MAJOR {
        return Err(Error::Version(header.version_major.get()));
    }
    if header.uuid == [0; 16] {
        return Err(Error::Uuid);
    }
    if header.name().is_none() {
        return Err(Error::Name);
    }
    let block_size = header.block_size.get();
    if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
        return Err(Error::BlockSize(block_size));
    }
    let (level, strip) = (header.level(), header.strip_size.get());
    if level.name().is_none() {
        return Err(Error::Level(level.0));
    }
    if if level == Level::RAID1 { strip != 0 } else { !strip.is_power_of_two() } {
        return Err(Error::StripSize(strip));
    }
    let slots = header.num_base_bdevs;
    if slots == 0 || bases.is_empty() || bases.len() > usize::from(slots) {
        return Err(Error::Count { slots, described: header.base_bdevs_size });
    }
    let blocks_max = i64::MAX as u64 / u64::from(block_size);
    let size = header.raid_size.get();
    if size == 0 || size > blocks_max {
        return Err(Error::RaidSize(size));
    }
    bases.iter().enumerate().try_for_each(|(position, base)| check_base(header, base, &bases[..position], blocks_max))
}

fn check_base(header: &Header, base: &Base, before: &[Base], blocks_max: u64) -> Result<(), Error> {
    if base.slot >= header.num_base_bdevs || before.iter().any(|other| other.slot == base.slot) {
        return Err(Error::Slot { value: base.slot, slots: header.num_base_bdevs });
    }
    if base.state().name().is_none() {
        return Err(Error::State(base.state.get()));
    }
    if base.uuid == [0; 16] || before.iter().any(|other| other.uuid == base.uuid) {
        return Err(Error::BaseUuid(base.slot));
    }
    let (offset, size) = (base.data_offset.get(), base.data_size.get());
    let first = DATA_OFFSET_MIN / u64::from(header.block_size.get());
    let fits = size != 0 && offset.checked_add(size).is_some_and(|end| end <= blocks_max);
    if base.state() == BaseState::CONFIGURED && (offset < first || !fits) {
        return Err(Error::Data { slot: base.slot, offset, size });
    }
    Ok(())
}

/// Writes a superblock into `out`, its length and checksum filled in; how many bytes it has. What [`decode`] would refuse is refused, and
/// nothing is promised of `out` then.
pub fn encode(header: &Header, bases: &[Base], out: &mut [u8]) -> Result<usize, Error> {
    let length = size_of::<Header>() + size_of_val(bases);
    let described = bases.len().min(usize::from(u8::MAX)) as u8;
    if bases.len() > BASES_MAX {
        return Err(Error::Count { slots: header.num_base_bdevs, described });
    }
    let found = out.len();
    let Some(whole) = out.get_mut(..length) else { return Err(Error::Short { needed: length, found }) };
    let header = Header { length: U32::new(length as u32), base_bdevs_size: described, crc: U32::new(0), ..*header };
    check(&header, bases)?;
    whole[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    whole[size_of::<Header>()..].copy_from_slice(bases.as_bytes());
    let crc = checksum(whole);
    let at = offset_of!(Header, crc);
    whole[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(length)
}
