//! Requests and configuration space, against bytes made by hand.

use qpair_wire::virtio_blk::{BlkFeatures, CONFIG_WRITEBACK_OFFSET, Config, RequestHeader, RequestType, Segment, SegmentFlags};
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn a_request_header_is_type_reserved_sector() {
    let bytes = [1, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x08, 0, 0, 0, 0, 0, 0x01];
    let header = RequestHeader::read_from_bytes(&bytes).unwrap();
    assert_eq!(header.kind(), RequestType::OUT);
    assert_eq!(header.sector.get(), 0x0100_0000_0000_0800);
    assert_eq!(RequestHeader::new(RequestType::OUT, 0x0100_0000_0000_0800).as_bytes(), bytes);
}

#[test]
fn an_unknown_request_type_is_held_and_has_no_name() {
    assert_eq!(RequestType(0xdead).name(), None);
    assert_eq!(format!("{:?}", RequestType(0xdead)), "RequestType(0xdead)");
    assert_eq!(format!("{:?}", RequestType::WRITE_ZEROES), "WRITE_ZEROES");
    assert_eq!(RequestType::KNOWN.len(), 16);
}

#[test]
fn a_segment_is_sector_count_flags() {
    let bytes = [8, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0];
    let segment = Segment::read_from_bytes(&bytes).unwrap();
    assert_eq!((segment.sector.get(), segment.num_sectors.get()), (8, u32::MAX));
    assert_eq!(segment.flags(), SegmentFlags::UNMAP);
    assert_eq!(Segment::new(8, u32::MAX, SegmentFlags::UNMAP).as_bytes(), bytes);
}

#[test]
fn configuration_fields_lie_where_the_standard_puts_them() {
    let bytes: Vec<u8> = (0..60).collect();
    let config = Config::read_from_bytes(&bytes).unwrap();
    assert_eq!(config.capacity.get(), 0x0706_0504_0302_0100);
    assert_eq!(config.seg_max.get(), 0x0f0e_0d0c);
    assert_eq!(config.blk_size.get(), 0x1716_1514);
    assert_eq!(config.physical_block_exp, 24);
    assert_eq!(config.opt_io_size.get(), 0x1f1e_1d1c);
    assert_eq!(config.writeback, 32);
    assert_eq!(CONFIG_WRITEBACK_OFFSET, 32);
    assert_eq!(config.num_queues.get(), 0x2322);
    assert_eq!(config.discard_sector_alignment.get(), 0x2f2e_2d2c);
    assert_eq!(config.max_write_zeroes_seg.get(), 0x3736_3534);
    assert_eq!(config.write_zeroes_may_unmap, 56);
}

#[test]
fn feature_bits_are_where_the_standard_puts_them() {
    assert_eq!((BlkFeatures::RO | BlkFeatures::BLK_SIZE).bits(), 0x60);
    assert_eq!((BlkFeatures::FLUSH | BlkFeatures::MQ | BlkFeatures::DISCARD | BlkFeatures::WRITE_ZEROES).bits(), 0x7200);
}
