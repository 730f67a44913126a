//! Features and configuration space to a bdev's geometry and limits.

use qpair_bdev::{Info, Op, OpSet};
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::{BlkFeatures, Config, SECTOR_BYTES};
use zerocopy::FromZeros;
use zerocopy::IntoBytes;

use crate::BdevError;

/// What was agreed on with the target.
#[derive(Clone, Debug)]
pub(crate) struct Agreed {
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) packed: bool,
    pub(crate) flush: bool,
    /// Sectors a block.
    pub(crate) sectors: u64,
    /// Data pieces that a request may have: 1 or 2.
    pub(crate) pieces: usize,
    pub(crate) info: Info,
}

/// Reads features and configuration; what the driver cannot live with is refused by name.
pub(crate) fn agree(
    name: &str,
    features: u64,
    bytes: &[u8],
    max_io_bytes: u32,
    slots: impl Fn(bool, bool) -> u16,
) -> Result<Agreed, BdevError> {
    let ring = Features::from_bits_retain(features);
    let blk = BlkFeatures::from_bits_retain(features);
    let config = parse(bytes)?;
    let block_size = if blk.contains(BlkFeatures::BLK_SIZE) { config.blk_size.get() } else { SECTOR_BYTES as u32 };
    if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
        return Err(BdevError::invalid("config.blk_size", block_size, "a power of two from 512 to 65536"));
    }
    let sectors = u64::from(block_size) / SECTOR_BYTES;
    let mut info = Info::new(name, "virtio", block_size, config.capacity.get() / sectors);
    if info.num_blocks == 0 {
        return Err(BdevError::invalid("config.capacity", config.capacity.get(), format!("at least one block of {sectors} sectors")));
    }
    if blk.contains(BlkFeatures::TOPOLOGY) && config.physical_block_exp < 16 {
        info.physical_block_size = block_size << config.physical_block_exp;
    }
    info.readonly = blk.contains(BlkFeatures::RO);
    let flush = blk.contains(BlkFeatures::FLUSH);
    info.write_cache = flush && !(blk.contains(BlkFeatures::CONFIG_WCE) && config.writeback == 0);
    info.max_io_blocks = largest_io(blk, &config, block_size, max_io_bytes)?;
    let discard = largest_range(blk, BlkFeatures::DISCARD, config.max_discard_sectors.get(), sectors);
    let zeroes = largest_range(blk, BlkFeatures::WRITE_ZEROES, config.max_write_zeroes_sectors.get(), sectors);
    // One limit for both: the smaller.
    info.max_unmap_blocks = discard.into_iter().chain(zeroes).min().unwrap_or(0);
    let (indirect, packed) = (ring.contains(Features::INDIRECT_DESC), ring.contains(Features::RING_PACKED));
    info.queue_depth = u32::from(slots(indirect, packed));
    let mut ops = vec![Op::Read, Op::Write, Op::Reset];
    ops.extend(flush.then_some(Op::Flush));
    ops.extend(discard.map(|_| Op::Unmap));
    ops.extend(zeroes.map(|_| Op::WriteZeroes));
    info.supported = OpSet::of(&ops);
    info.check()?;
    let pieces = if blk.contains(BlkFeatures::SEG_MAX) && config.seg_max.get() < 2 { 1 } else { 2 };
    Ok(Agreed { event_idx: ring.contains(Features::RING_EVENT_IDX), indirect, packed, flush, sectors, pieces, info })
}

impl Agreed {
    /// Whether a device that was made for this can go on with `other`: all but the size has to do for what is under way, and for what the layer splits by the first limits.
    pub(crate) fn admit(&self, other: &Self) -> Result<(), BdevError> {
        let ring = |agreed: &Self| (agreed.event_idx, agreed.indirect, agreed.packed, agreed.flush);
        if ring(self) != ring(other) {
            let show = |agreed: &Self| format!("event index, indirect, packed, flush {:?}", ring(agreed));
            return Err(BdevError::invalid("features", show(other), show(self)));
        }
        let (before, now) = (&self.info, &other.info);
        if before.block_size != now.block_size {
            return Err(BdevError::invalid("config.blk_size", now.block_size, format!("{} as before", before.block_size)));
        }
        if before.readonly != now.readonly {
            return Err(BdevError::invalid("read-only", now.readonly, format!("{} as before", before.readonly)));
        }
        if now.write_cache && !before.write_cache {
            return Err(BdevError::invalid("config.writeback", 1, "0 as before: durable writes were not flushed"));
        }
        let at_least = |field: &'static str, was: u32, is: u32| match is {
            is if is < was => Err(BdevError::invalid(field, is, format!("at least {was} as before"))),
            _ => Ok(()),
        };
        at_least("config.size_max in blocks", before.max_io_blocks, now.max_io_blocks)?;
        at_least("config.max_discard_sectors, max_write_zeroes_sectors in blocks", before.max_unmap_blocks, now.max_unmap_blocks)?;
        at_least("config.seg_max", self.pieces as u32, other.pieces as u32)
    }
}

/// Old targets send less than 60 bytes: what is missing reads as zero, which no feature bit announces.
fn parse(bytes: &[u8]) -> Result<Config, BdevError> {
    const CAPACITY: usize = 8;
    if bytes.len() < CAPACITY {
        return Err(BdevError::invalid("config", format!("of {} bytes", bytes.len()), format!("at least {CAPACITY} bytes")));
    }
    let mut config = Config::new_zeroed();
    let space = config.as_mut_bytes();
    let count = bytes.len().min(space.len());
    space[..count].copy_from_slice(&bytes[..count]);
    Ok(config)
}

fn largest_io(blk: BlkFeatures, config: &Config, block_size: u32, max_io_bytes: u32) -> Result<u32, BdevError> {
    let mut bytes = max_io_bytes;
    if blk.contains(BlkFeatures::SIZE_MAX) && config.size_max.get() > 0 {
        bytes = bytes.min(config.size_max.get());
    }
    match bytes / block_size {
        0 => Err(BdevError::invalid("config.size_max", bytes, format!("at least one block of {block_size} bytes"))),
        blocks => Ok(blocks),
    }
}

/// Most blocks of one discard or write-zeroes; None: the target does not do it, or not even one block at a time.
fn largest_range(blk: BlkFeatures, feature: BlkFeatures, sectors_max: u32, sectors: u64) -> Option<u32> {
    // Zero is no limit, as other drivers have it.
    let limit = if sectors_max > 0 { sectors_max } else { u32::MAX };
    let blocks = (u64::from(limit) / sectors) as u32;
    (blk.contains(feature) && blocks > 0).then_some(blocks)
}
