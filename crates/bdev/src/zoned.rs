//! Zoned geometry: zones that are written from their start on, as NVMe's Zoned Namespace command set (1.1) has them.
//!
//! How it works. A device is zoned when its [`crate::Info`] has a [`Zoned`]. Zones lie one after the other from block 0, all of one size, and the
//! first `capacity_blocks` of each can hold data. The layer refuses what crosses a zone or passes its capacity, so that a device sees
//! only I/O of one zone. [`crate::Op::ZoneAppend`] writes where the zone's write pointer is; its `lba` is the zone's first block, its `result` the first
//! block written. [`crate::Op::ZoneManagement`] has a [`ZoneAction`] in `command[0]`; its `lba` and `blocks` are one whole zone, or for a report
//! any number of whole zones, with room for one [`ZoneDescriptor`] each in the list.
//!
//! Errors. `ZONE_BOUNDARY_ERROR`, and `INVALID_FIELD` for what is no zone or no action.

use qpair_wire::nvme::Status;

use crate::{Io, Op};

/// The geometry of zones and the limits on their use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zoned {
    /// Blocks from a zone's start to the next one's.
    pub zone_blocks: u64,
    /// How many of them can be written.
    pub capacity_blocks: u64,
    /// Zones open at once; 0: no limit.
    pub max_open_zones: u32,
    /// Zones open or closed at once; 0: no limit.
    pub max_active_zones: u32,
    /// Zones open at once for the best speed; 0: it does not matter.
    pub optimal_open_zones: u32,
    /// Blocks of the largest append; 0: a whole zone.
    pub max_append_blocks: u32,
}

/// What is to be done with a zone: NVMe's "zone send action", and 0 for a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ZoneAction {
    /// Descriptors of zones into the list.
    Report = 0,
    /// Keep it, but not ready for writing.
    Close = 1,
    /// No more writes.
    Finish = 2,
    /// Ready for writing until closed.
    Open = 3,
    /// Empty again; its data are gone.
    Reset = 4,
}

impl ZoneAction {
    /// Of an I/O's `command[0]`.
    pub fn of(byte: u8) -> Option<Self> {
        [Self::Report, Self::Close, Self::Finish, Self::Open, Self::Reset].into_iter().find(|action| *action as u8 == byte)
    }
}

/// Where a zone is in its life: NVMe's "zone state".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ZoneState {
    /// Nothing is written.
    Empty = 0x1,
    /// A write opened it.
    ImplicitlyOpen = 0x2,
    /// It was opened on request.
    ExplicitlyOpen = 0x3,
    /// Partly written.
    Closed = 0x4,
    /// Cannot be written any more.
    ReadOnly = 0xd,
    /// Written to its capacity, or finished.
    Full = 0xe,
    /// Cannot be used.
    Offline = 0xf,
}

/// What a report says of a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneDescriptor {
    /// First block.
    pub start: u64,
    /// Blocks that can be written.
    pub capacity_blocks: u64,
    /// The next block to be written.
    pub write_pointer: u64,
    /// Its state.
    pub state: ZoneState,
}

/// Bytes of a descriptor in a list.
pub const ZONE_DESCRIPTOR_BYTES: u64 = 64;
/// "Sequential write required", the only type there is.
const SEQUENTIAL: u8 = 2;

impl ZoneDescriptor {
    /// As it lies in the list: NVMe's zone descriptor.
    pub fn encode(&self) -> [u8; ZONE_DESCRIPTOR_BYTES as usize] {
        let mut bytes = [0; ZONE_DESCRIPTOR_BYTES as usize];
        bytes[0] = SEQUENTIAL;
        bytes[1] = (self.state as u8) << 4;
        bytes[8..16].copy_from_slice(&self.capacity_blocks.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.start.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.write_pointer.to_le_bytes());
        bytes
    }

    /// The way back; None: a state or type that there is not.
    pub fn decode(bytes: &[u8; ZONE_DESCRIPTOR_BYTES as usize]) -> Option<Self> {
        use ZoneState::{Closed, Empty, ExplicitlyOpen, Full, ImplicitlyOpen, Offline, ReadOnly};
        let states = [Empty, ImplicitlyOpen, ExplicitlyOpen, Closed, ReadOnly, Full, Offline];
        let state = states.into_iter().find(|state| *state as u8 == bytes[1] >> 4)?;
        let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        (bytes[0] == SEQUENTIAL).then(|| Self { start: number(16), capacity_blocks: number(8), write_pointer: number(24), state })
    }
}

impl Zoned {
    /// Whether a range lies in one zone and within its capacity.
    #[inline]
    pub fn holds(&self, lba: u64, blocks: u64) -> bool {
        let within = lba % self.zone_blocks;
        within < self.capacity_blocks && blocks <= self.capacity_blocks - within
    }

    fn starts(&self, lba: u64) -> bool {
        lba.is_multiple_of(self.zone_blocks)
    }

    /// Why an I/O within the device's range is none for a zoned device.
    pub(crate) fn refuses(&self, io: &Io) -> Option<Status> {
        let demand = |holds: bool, status: Status| (!holds).then_some(status);
        match io.op {
            Op::ZoneAppend => {
                let limit = if self.max_append_blocks == 0 { u64::MAX } else { u64::from(self.max_append_blocks) };
                demand(self.starts(io.lba) && io.blocks <= limit, Status::INVALID_FIELD)
                    .or(demand(io.blocks <= self.capacity_blocks, Status::ZONE_BOUNDARY_ERROR))
            }
            Op::ZoneManagement => {
                let legal = match ZoneAction::of(io.command[0]) {
                    Some(ZoneAction::Report) => {
                        io.blocks.is_multiple_of(self.zone_blocks)
                            && io.list_bytes() == io.blocks / self.zone_blocks * ZONE_DESCRIPTOR_BYTES
                    }
                    Some(_) => io.blocks == self.zone_blocks,
                    None => false,
                };
                demand(legal && self.starts(io.lba), Status::INVALID_FIELD)
            }
            Op::Copy => demand(self.holds(io.lba, io.blocks) && self.holds(io.source_lba, io.blocks), Status::ZONE_BOUNDARY_ERROR),
            _ => demand(self.holds(io.lba, io.blocks), Status::ZONE_BOUNDARY_ERROR),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Slab;
    use crate::{Info, IoFlags};

    const ZONED: Zoned =
        Zoned { zone_blocks: 8, capacity_blocks: 6, max_open_zones: 0, max_active_zones: 0, optimal_open_zones: 1, max_append_blocks: 4 };

    #[test]
    fn a_range_is_within_one_zone_and_its_capacity() {
        assert!(ZONED.holds(8, 6) && ZONED.holds(13, 1));
        assert!(!ZONED.holds(8, 7) && !ZONED.holds(13, 2) && !ZONED.holds(14, 1) && !ZONED.holds(7, 2) && !ZONED.holds(0, u64::MAX));
    }

    #[test]
    fn descriptors_decode_to_what_was_encoded() {
        let descriptor = ZoneDescriptor { start: 8, capacity_blocks: 6, write_pointer: 11, state: ZoneState::Closed };
        assert_eq!(ZoneDescriptor::decode(&descriptor.encode()), Some(descriptor));
        let mut bytes = descriptor.encode();
        bytes[1] = 0x50;
        assert_eq!(ZoneDescriptor::decode(&bytes), None);
    }

    #[test]
    fn management_is_of_whole_zones_and_known_actions() {
        let mut io = Slab::new(1).into_only();
        let mut ask = |action: u8, lba: u64, blocks: u64| {
            (io.op, io.flags, io.lba, io.blocks, io.command[0]) = (Op::ZoneManagement, IoFlags::empty(), lba, blocks, action);
            ZONED.refuses(&io)
        };
        assert_eq!(ask(ZoneAction::Open as u8, 8, 8), None);
        for (action, lba, blocks) in
            [(ZoneAction::Open as u8, 9, 8), (ZoneAction::Reset as u8, 8, 16), (5, 8, 8), (ZoneAction::Report as u8, 8, 8)]
        {
            assert_eq!(ask(action, lba, blocks), Some(Status::INVALID_FIELD), "{action} {lba} {blocks}");
        }
    }

    #[test]
    fn every_layer_passes_the_geometry_on() {
        let base = Info { zoned: Some(ZONED), ..Info::new("base", "sim", 512, 64) };
        assert_eq!(Info::over(&base, "above", "test").zoned, Some(ZONED));
        let lying = Info { zoned: Some(Zoned { capacity_blocks: 9, ..ZONED }), ..base.clone() };
        assert_eq!(lying.check().unwrap_err().to_string(), "Invalid argument: zone_capacity 9: 1 to 8, the zone's size");
        let torn = Info { num_blocks: 63, ..base };
        assert_eq!(torn.check().unwrap_err().to_string(), "Invalid argument: num_blocks 63: a multiple of the zone's 8");
    }
}
