//! What a bdev looks like as a virtio-blk device: features and configuration space (Virtio 1.2, 5.2.3 and 5.2.4).

use qpair_bdev::{Info, Op};
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::{BlkFeatures, Config, ID_BYTES, SECTOR_BYTES};
use zerocopy::IntoBytes;

/// Data segments of a request that drivers are told of: a 128-entry queue less header and status.
const SEG_MAX: u32 = 126;
/// Ranges in one discard or write-zeroes request.
pub(crate) const RANGES_MAX: usize = 16;

/// Feature bits offered for a bdev.
pub fn features(info: &Info, readonly: bool, packed_ring: bool) -> u64 {
    let mut ring = Features::LOG_ALL
        | Features::VERSION_1
        | Features::RING_EVENT_IDX
        | Features::INDIRECT_DESC
        | Features::IN_ORDER
        | Features::PROTOCOL_FEATURES;
    ring.set(Features::RING_PACKED, packed_ring);
    let mut blk = BlkFeatures::SEG_MAX | BlkFeatures::SIZE_MAX | BlkFeatures::BLK_SIZE | BlkFeatures::TOPOLOGY | BlkFeatures::MQ;
    blk.set(BlkFeatures::RO, readonly || info.readonly);
    blk.set(BlkFeatures::FLUSH | BlkFeatures::CONFIG_WCE, info.write_cache);
    let writes = !(readonly || info.readonly);
    blk.set(BlkFeatures::DISCARD, writes && info.supported.has(Op::Unmap));
    blk.set(BlkFeatures::WRITE_ZEROES, writes && (info.supported.has(Op::WriteZeroes) || info.supported.has(Op::Write)));
    ring.bits() | blk.bits()
}

/// The configuration space as the driver reads it. `writeback`: what it said of its write cache, if there is one.
pub(crate) fn config(info: &Info, num_queues: u32, writeback: bool) -> Vec<u8> {
    let sectors_a_block = info.block_size / SECTOR_BYTES as u32;
    let capacity = info.bytes() / SECTOR_BYTES;
    let ranges = u32::try_from(capacity).unwrap_or(u32::MAX) / sectors_a_block * sectors_a_block;
    let physical = (info.physical_block_size / info.block_size).max(1);
    let config = Config {
        capacity: capacity.into(),
        size_max: (1 << 20).into(),
        seg_max: SEG_MAX.into(),
        blk_size: info.block_size.into(),
        physical_block_exp: physical.ilog2() as u8,
        min_io_size: u16::try_from(info.write_unit_blocks).unwrap_or(1).into(),
        opt_io_size: info.optimal_io_boundary.into(),
        writeback: u8::from(info.write_cache && writeback),
        num_queues: (num_queues as u16).into(),
        max_discard_sectors: ranges.into(),
        max_discard_seg: (RANGES_MAX as u32).into(),
        discard_sector_alignment: sectors_a_block.into(),
        max_write_zeroes_sectors: ranges.into(),
        max_write_zeroes_seg: (RANGES_MAX as u32).into(),
        write_zeroes_may_unmap: u8::from(info.supported.has(Op::Unmap)),
        ..Config::default()
    };
    config.as_bytes().to_vec()
}

/// What GET_ID answers: the bdev's name, cut to 20 bytes, zero-padded.
pub fn serial(info: &Info) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let length = info.name.len().min(ID_BYTES);
    id[..length].copy_from_slice(&info.name.as_bytes()[..length]);
    id
}
