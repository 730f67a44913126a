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
    pub(crate) flush: bool,
    /// Sectors a block.
    pub(crate) sectors: u64,
    /// Data pieces that a request may have: 1 or 2.
    pub(crate) pieces: usize,
    pub(crate) info: Info,
}

/// Reads features and configuration; what the driver cannot live with is refused by name.
pub(crate) fn agree(name: &str, features: u64, bytes: &[u8], max_io_bytes: u32, slots: impl Fn(bool) -> u16) -> Result<Agreed, BdevError> {
    let ring = Features::from_bits_retain(features);
    let blk = BlkFeatures::from_bits_retain(features);
    if ring.contains(Features::RING_PACKED) {
        return Err(BdevError::invalid("features", format!("{features:#x}"), "no packed ring (bit 34)"));
    }
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
    info.max_unmap_blocks = largest_range(blk, &config, sectors);
    let indirect = ring.contains(Features::INDIRECT_DESC);
    info.queue_depth = u32::from(slots(indirect));
    let mut ops = vec![Op::Read, Op::Write, Op::Reset];
    ops.extend(flush.then_some(Op::Flush));
    ops.extend(blk.contains(BlkFeatures::DISCARD).then_some(Op::Unmap));
    ops.extend(blk.contains(BlkFeatures::WRITE_ZEROES).then_some(Op::WriteZeroes));
    info.supported = OpSet::of(&ops);
    info.check()?;
    let pieces = if blk.contains(BlkFeatures::SEG_MAX) && config.seg_max.get() < 2 { 1 } else { 2 };
    Ok(Agreed { event_idx: ring.contains(Features::RING_EVENT_IDX), indirect, flush, sectors, pieces, info })
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

/// One limit for discards and write-zeroes: the smaller, in whole blocks.
fn largest_range(blk: BlkFeatures, config: &Config, sectors: u64) -> u32 {
    let limit = |feature, sectors: u32| if blk.contains(feature) && sectors > 0 { sectors } else { u32::MAX };
    let discard = limit(BlkFeatures::DISCARD, config.max_discard_sectors.get());
    let zeroes = limit(BlkFeatures::WRITE_ZEROES, config.max_write_zeroes_sectors.get());
    (u64::from(discard.min(zeroes)) / sectors).max(1) as u32
}
