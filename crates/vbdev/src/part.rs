//! A range of a bdev as a bdev of its own: what split makes by count and GPT by its table.
//!
//! All parts of a base are made together and share one descriptor of it, and so one claim, which goes with the last of them.
//! When the base is resized a part stays as it was; I/O past a base that shrank fails there. A part of a zoned bdev begins and ends with a zone.

use std::sync::Arc;

use qpair_bdev::{
    BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, QueueId, Registry, ZONE_DESCRIPTOR_BYTES, ZoneAction,
    ZoneDescriptor,
};
use qpair_memory::{Region, Sge};
use qpair_reactor::Reactor;
use uuid::Uuid;

/// What a part is to be.
#[derive(Clone, Debug)]
pub struct Range {
    /// Name of the part.
    pub name: String,
    /// First block on the base.
    pub offset_blocks: u64,
    /// Size.
    pub num_blocks: u64,
    /// None: random.
    pub uuid: Option<Uuid>,
}

/// See the module's doc.
pub struct Part {
    info: Info,
    base: Arc<Descriptor>,
    offset_blocks: u64,
}

impl Part {
    /// The parts of the bdev `base`, which is claimed for `module`; none of them is registered yet.
    pub fn cut(registry: &Arc<Registry>, base: &str, module: &'static str, ranges: &[Range]) -> Result<Vec<Self>, BdevError> {
        let base = Arc::new(registry.open_base(base, module)?);
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        ranges.iter().map(|range| Self::new(&base, &below, module, range)).collect()
    }

    fn new(base: &Arc<Descriptor>, below: &Info, module: &'static str, range: &Range) -> Result<Self, BdevError> {
        let Range { name, offset_blocks, num_blocks, uuid } = range;
        if *offset_blocks >= below.num_blocks || *num_blocks == 0 || *num_blocks > below.num_blocks - offset_blocks {
            let limit = format!("within the {} blocks of {}", below.num_blocks, below.name);
            return Err(BdevError::invalid("offset_blocks + num_blocks", format!("{offset_blocks} + {num_blocks}"), limit));
        }
        if let Some(zoned) = below.zoned
            && !(offset_blocks.is_multiple_of(zoned.zone_blocks) && num_blocks.is_multiple_of(zoned.zone_blocks))
        {
            let limit = format!("multiples of the {} blocks of a zone of {}", zoned.zone_blocks, below.name);
            return Err(BdevError::invalid("offset_blocks, num_blocks", format!("{offset_blocks}, {num_blocks}"), limit));
        }
        let mut info = Info { num_blocks: *num_blocks, ..Info::over(below, name, module) };
        info.uuid = uuid.unwrap_or(info.uuid);
        let boundary = u64::from(info.optimal_io_boundary);
        if boundary != 0 && !offset_blocks.is_multiple_of(boundary) {
            // The base's borders lie elsewhere in the part.
            info.optimal_io_boundary = 0;
        }
        Ok(Self { info, base: base.clone(), offset_blocks: *offset_blocks })
    }
}

impl Device for Part {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        let zoned = self.info.zoned.is_some();
        Ok(Box::new(PartChannel { id, below, queue: layer.add_straight_queue(id), shift: self.offset_blocks, zoned }))
    }
}

struct PartChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
    shift: u64,
    zoned: bool,
}

impl PartChannel {
    /// A report's descriptors say where zones are on the base.
    #[cold]
    fn move_reports(&self, layer: &Layer, batch: &[IoId]) {
        for id in batch {
            let io = layer.io(*id);
            if io.op == Op::ZoneManagement && io.command[0] == ZoneAction::Report as u8 && !io.status.is_error() {
                for number in 0..io.result {
                    move_descriptor(&io.list, number * ZONE_DESCRIPTOR_BYTES, self.shift);
                }
            }
        }
    }
}

fn move_descriptor(list: &[Sge], at: u64, shift: u64) {
    let mut bytes = [0; ZONE_DESCRIPTOR_BYTES as usize];
    let whole = each_piece(list, at, ZONE_DESCRIPTOR_BYTES, |region, offset, range| region.read(offset, &mut bytes[range]).is_ok());
    let Some(found) = ZoneDescriptor::decode(&bytes).filter(|_| whole) else { return };
    let moved = ZoneDescriptor { start: found.start.wrapping_sub(shift), write_pointer: found.write_pointer.wrapping_sub(shift), ..found };
    let bytes = moved.encode();
    each_piece(list, at, ZONE_DESCRIPTOR_BYTES, |region, offset, range| region.write(offset, &bytes[range]).is_ok());
}

/// Calls `each` for the pieces of `length` bytes from byte `at` of a list: region, offset there, and which of those bytes; until it says no.
pub(crate) fn each_piece(list: &[Sge], at: u64, length: u64, mut each: impl FnMut(&Region, u64, std::ops::Range<usize>) -> bool) -> bool {
    let (mut skipped, mut done) = (at, 0);
    for entry in list {
        let size = u64::from(entry.length);
        if skipped >= size {
            skipped -= size;
            continue;
        }
        let step = (size - skipped).min(length - done);
        if !each(&entry.region, entry.offset + skipped, done as usize..(done + step) as usize) {
            return false;
        }
        (skipped, done) = (0, done + step);
        if done == length {
            return true;
        }
    }
    false
}

impl Channel for PartChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        layer.pass_down(reactor, self.below, self.queue, 0, self.shift, batch);
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        if self.zoned {
            self.move_reports(layer, batch);
        }
        layer.pass_up(self.id, self.shift, batch);
    }
}
