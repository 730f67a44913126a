//! A zoned bdev on a plain one: what a host does to a zoned device, kept in memory.
//!
//! How it works. A zone is `capacity_blocks` rounded up to a power of two; what is left of the base behind the last whole zone is not used. Zones
//! begin *full*, because the base may hold data: a zone is reset before it is written. A write goes down only from its zone's write pointer, an append
//! goes down as a write from there; the pointer moves when they are taken, whether they succeed or not. A reset unmaps the zone on a base that can.
//! Zones are shared by all reactors without a lock; why that is right stands in `zone`.
//!
//! Errors: `ZONE_IS_FULL`, `ZONE_INVALID_WRITE`, `ZONE_BOUNDARY_ERROR`, `ZONE_INVALID_STATE_TRANSITION`; `COMMAND_INTERRUPTED` for what meets a reset
//! that is under way, and for a reset that meets writes: it may be tried again.
//!
//! Not implemented: limits on open and active zones (SPDK's has none either), states that outlive the process.
//!
//! Limits: [`ZONES_MAX`] zones, 2^40 - 1 blocks in one.

mod zone;

use std::sync::Arc;

use qpair_bdev::{
    BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, OpSet, QueueId, Registry, Status, ZONE_DESCRIPTOR_BYTES,
    ZoneAction, ZoneDescriptor, Zoned,
};
use qpair_memory::Sge;
use qpair_reactor::Reactor;
use uuid::Uuid;

use crate::part::each_piece;
use zone::{CAPACITY_MAX, State, Word, Zone};

/// Zones of one bdev: eight bytes each.
pub const ZONES_MAX: u64 = 1 << 24;

// What a frame's tag says that is to be done when the I/O is back; from bit 2 on: an append's place.
const PLAIN: u64 = 0;
const WRITE: u64 = 1;
const APPEND: u64 = 2;
const RESET: u64 = 3;
const KIND: u64 = 3;

struct Zones {
    zones: Box<[Zone]>,
    geometry: Zoned,
    shift: u32,
}

impl Zones {
    fn of(&self, lba: u64) -> &Zone {
        &self.zones[(lba >> self.shift) as usize]
    }

    fn offset(&self, lba: u64) -> u64 {
        lba & (self.geometry.zone_blocks - 1)
    }
}

/// See the module's doc.
pub struct ZoneBlock {
    info: Info,
    base: Descriptor,
    zones: Arc<Zones>,
    unmaps: bool,
}

impl ZoneBlock {
    /// On the bdev `base`, which is claimed.
    pub fn new(
        registry: &Arc<Registry>,
        name: &str,
        base: &str,
        uuid: Option<Uuid>,
        capacity_blocks: u64,
        optimal_open_zones: u32,
    ) -> Result<Self, BdevError> {
        if capacity_blocks == 0 || capacity_blocks > CAPACITY_MAX {
            return Err(BdevError::invalid("zone_capacity", capacity_blocks, format!("1 to {CAPACITY_MAX} blocks")));
        }
        if optimal_open_zones == 0 {
            return Err(BdevError::invalid("optimal_open_zones", 0, "at least 1"));
        }
        let base = registry.open_base(base, "bdev_zoned_block")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        if below.zoned.is_some() {
            return Err(BdevError::Exists(format!("{} is zoned already", below.name)));
        }
        let zone_blocks = capacity_blocks.next_power_of_two();
        let count = below.num_blocks / zone_blocks;
        if count == 0 || count > ZONES_MAX {
            let limit = format!("1 to {ZONES_MAX} zones; {} of {zone_blocks} blocks each fit on {}", count, below.name);
            return Err(BdevError::invalid("zone_capacity", capacity_blocks, limit));
        }
        let (max_open_zones, max_active_zones, max_append_blocks) = (0, 0, 0);
        let geometry = Zoned { zone_blocks, capacity_blocks, max_open_zones, max_active_zones, optimal_open_zones, max_append_blocks };
        let mut info = Info { num_blocks: count * zone_blocks, zoned: Some(geometry), ..Info::over(&below, name, "bdev_zoned_block") };
        info.uuid = uuid.unwrap_or(info.uuid);
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset, Op::ZoneAppend, Op::ZoneManagement]);
        let zones = (0..count).map(|_| Zone::full(capacity_blocks)).collect();
        let zones = Arc::new(Zones { zones, geometry, shift: zone_blocks.trailing_zeros() });
        Ok(Self { info, base, zones, unmaps: below.supported.has(Op::Unmap) && !below.readonly })
    }
}

impl Device for ZoneBlock {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        let (queue, zones) = (layer.add_inner_queue(id), self.zones.clone());
        Ok(Box::new(ZoneChannel { below, queue, zones, unmaps: self.unmaps, ready: Vec::with_capacity(256) }))
    }
}

struct ZoneChannel {
    below: ChannelId,
    queue: QueueId,
    zones: Arc<Zones>,
    unmaps: bool,
    ready: Vec<IoId>,
}

impl ZoneChannel {
    /// Begins one I/O: true if it goes down, with its frame pushed; else how it ended.
    fn begin(&mut self, layer: &mut Layer, id: IoId) -> Result<bool, Status> {
        let io = layer.io_mut(id);
        let (lba, blocks, capacity) = (io.lba, io.blocks, self.zones.geometry.capacity_blocks);
        match io.op {
            Op::Write => {
                let at = self.zones.offset(lba);
                self.zones.of(lba).step(|word| word.write(Some(at), blocks, capacity))?;
                io.push(self.queue, WRITE);
            }
            Op::ZoneAppend => {
                let place = lba + self.zones.of(lba).step(|word| word.write(None, blocks, capacity))?.written;
                io.push(self.queue, APPEND | place << 2);
                (io.op, io.lba) = (Op::Write, place);
            }
            Op::ZoneManagement => return self.manage(layer, id),
            _ => io.push(self.queue, PLAIN),
        }
        Ok(true)
    }

    fn manage(&mut self, layer: &mut Layer, id: IoId) -> Result<bool, Status> {
        let io = layer.io_mut(id);
        let (zone, capacity) = (self.zones.of(io.lba), self.zones.geometry.capacity_blocks);
        match ZoneAction::of(io.command[0]).ok_or(Status::INVALID_FIELD)? {
            ZoneAction::Report => {
                io.result = io.blocks / self.zones.geometry.zone_blocks;
                report(&self.zones, io.lba, io.result, &io.list)?;
            }
            ZoneAction::Open => drop(zone.step(Word::open)?),
            ZoneAction::Close => drop(zone.step(Word::close)?),
            ZoneAction::Finish => drop(zone.step(|word| word.finish(capacity))?),
            ZoneAction::Reset => {
                if zone.step(Word::begin_reset)?.state == State::Empty {
                    return Ok(false);
                }
                if !self.unmaps {
                    zone.end_reset();
                    return Ok(false);
                }
                io.push(self.queue, RESET);
                (io.op, io.blocks) = (Op::Unmap, capacity);
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Descriptors of `count` zones from `lba` on.
fn report(zones: &Zones, lba: u64, count: u64, list: &[Sge]) -> Result<(), Status> {
    let Zoned { zone_blocks, capacity_blocks, .. } = zones.geometry;
    for number in 0..count {
        let start = lba + number * zone_blocks;
        let now = zones.of(start).now();
        let state = now.shown(capacity_blocks);
        let bytes = ZoneDescriptor { start, capacity_blocks, write_pointer: start + now.written, state }.encode();
        let at = number * ZONE_DESCRIPTOR_BYTES;
        if !each_piece(list, at, ZONE_DESCRIPTOR_BYTES, |region, offset, range| region.write(offset, &bytes[range]).is_ok()) {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
    }
    Ok(())
}

impl Channel for ZoneChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            match self.begin(layer, *id) {
                Ok(true) => self.ready.push(*id),
                Ok(false) => layer.complete(*id, Status::SUCCESS),
                Err(status) => layer.complete(*id, status),
            }
        }
        if !self.ready.is_empty() {
            layer.submit(reactor, self.below, &self.ready);
            self.ready.clear();
        }
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            let tag = layer.retrieve(*id).tag;
            let io = layer.io_mut(*id);
            match tag & KIND {
                WRITE => self.zones.of(io.lba).end_write(),
                APPEND => {
                    (io.op, io.result) = (Op::ZoneAppend, tag >> 2);
                    self.zones.of(io.lba).end_write();
                }
                RESET => {
                    (io.op, io.blocks) = (Op::ZoneManagement, self.zones.geometry.zone_blocks);
                    self.zones.of(io.lba).end_reset();
                }
                _ => {}
            }
            let status = io.status;
            layer.complete(*id, status);
        }
    }
}
