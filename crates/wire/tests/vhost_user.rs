//! vhost-user structures against the vectors that the Python codec is tested with, and the inflight region's layout.

use proptest::prelude::*;
use qpair_wire::vhost_user::{
    self as vu, ConfigHeader, Header, HeaderFlags, Inflight, InflightDesc, InflightHeader, MemoryHeader, MemoryRegion, ProtocolFeatures,
    Request, SingleMemoryRegion, VringAddr, VringState,
};
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::{BlkFeatures, CONFIG_WRITEBACK_OFFSET, Config};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

fn vector(name: &str) -> Vec<u8> {
    let path = format!("{}/../../tests/vectors/vhost/{name}.bin", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The header, checked against the payload's true length, and the payload.
fn message(name: &str, request: Request) -> (Header, Vec<u8>) {
    let bytes = vector(name);
    let (header, payload) = Header::read_from_prefix(&bytes).unwrap();
    assert_eq!(header.request(), request, "{name}");
    assert_eq!(header.version(), vu::VERSION, "{name}");
    assert_eq!(header.size.get() as usize, payload.len(), "{name}");
    (header, payload.to_vec())
}

fn payload<T: FromBytes + KnownLayout + Immutable>(name: &str, request: Request) -> T {
    T::read_from_bytes(&message(name, request).1).unwrap()
}

#[test]
fn header_flags_tell_requests_replies_and_wishes_apart() {
    assert!(!message("get_features", Request::GET_FEATURES).0.flags().intersects(HeaderFlags::REPLY | HeaderFlags::NEED_REPLY));
    assert!(message("features_reply", Request::GET_FEATURES).0.flags().contains(HeaderFlags::REPLY));
    assert!(message("set_mem_table", Request::SET_MEM_TABLE).0.flags().contains(HeaderFlags::NEED_REPLY));
}

#[test]
fn feature_words_hold_the_bits_of_both_standards() {
    let features = payload::<U64>("features_reply", Request::GET_FEATURES).get();
    let blk = BlkFeatures::from_bits_truncate(features);
    assert!(blk.contains(BlkFeatures::SEG_MAX | BlkFeatures::BLK_SIZE | BlkFeatures::FLUSH | BlkFeatures::MQ));
    assert!(blk.contains(BlkFeatures::DISCARD | BlkFeatures::WRITE_ZEROES));
    assert!(
        Features::from_bits_truncate(features)
            .contains(Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::RING_EVENT_IDX | Features::INDIRECT_DESC)
    );
    let protocol = payload::<U64>("set_protocol_features", Request::SET_PROTOCOL_FEATURES).get();
    let agreed = ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK | ProtocolFeatures::CONFIG;
    assert_eq!(protocol, agreed.bits());
}

#[test]
fn a_memory_table_is_a_count_and_regions() {
    let (_, bytes) = message("set_mem_table", Request::SET_MEM_TABLE);
    let (head, rest) = MemoryHeader::read_from_prefix(&bytes).unwrap();
    assert_eq!(head.num_regions.get(), 2);
    let regions = <[MemoryRegion]>::ref_from_bytes(rest).unwrap();
    assert_eq!(regions.len(), 2);
    assert_eq!((regions[0].guest_addr.get(), regions[0].size.get()), (0, 0x20_0000));
    assert_eq!((regions[1].guest_addr.get(), regions[1].size.get()), (0x1_0000_0000, 0xff_f000));
    assert_eq!(regions[1].mmap_offset.get(), 0x20_0000);
}

#[test]
fn a_single_region_comes_after_padding() {
    let added: SingleMemoryRegion = payload("add_mem_reg", Request::ADD_MEM_REG);
    assert_eq!((added.padding.get(), added.region.guest_addr.get()), (0, 0x7f0a_0000_0000));
    assert_eq!((added.region.size.get(), added.region.mmap_offset.get()), (0x1234, 0x1000));
    let removed: SingleMemoryRegion = payload("rem_mem_reg", Request::REM_MEM_REG);
    assert_eq!(removed.region.user_addr, added.region.user_addr);
    assert_eq!(payload::<U64>("max_mem_slots_reply", Request::GET_MAX_MEM_SLOTS).get(), 64);
}

#[test]
fn vring_messages_carry_queue_and_value() {
    let num: VringState = payload("set_vring_num", Request::SET_VRING_NUM);
    assert_eq!((num.index.get(), num.num.get()), (1, 256));
    let base: VringState = payload("vring_base_reply", Request::GET_VRING_BASE);
    assert_eq!((base.index.get(), base.num.get()), (1, 0xfffe));
    let addr: VringAddr = payload("set_vring_addr", Request::SET_VRING_ADDR);
    assert_eq!((addr.index.get(), addr.flags.get(), addr.log.get()), (1, 0, 0));
    assert_eq!((addr.desc.get(), addr.used.get(), addr.avail.get()), (0x7f0a_0000_1000, 0x7f0a_0000_3000, 0x7f0a_0000_2000));
    let kick = payload::<U64>("set_vring_kick", Request::SET_VRING_KICK).get();
    assert_eq!((kick & vu::VRING_INDEX_MASK, kick & vu::VRING_NO_FD), (2, 0));
    let call = payload::<U64>("set_vring_call_without_fd", Request::SET_VRING_CALL).get();
    assert_eq!((call & vu::VRING_INDEX_MASK, call & vu::VRING_NO_FD), (3, vu::VRING_NO_FD));
}

#[test]
fn a_configuration_reply_holds_the_block_devices_configuration() {
    let (_, bytes) = message("config_reply", Request::GET_CONFIG);
    let (head, rest) = ConfigHeader::read_from_prefix(&bytes).unwrap();
    assert_eq!((head.offset.get(), head.size.get(), head.flags.get()), (0, 60, 0));
    let config = Config::read_from_bytes(rest).unwrap();
    assert_eq!((config.capacity.get(), config.seg_max.get(), config.blk_size.get()), (131_072, 126, 512));
    assert_eq!((config.physical_block_exp, config.min_io_size.get(), config.opt_io_size.get()), (3, 1, 8));
    assert_eq!((config.writeback, config.num_queues.get()), (1, 4));
    assert_eq!((config.max_discard_sectors.get(), config.max_discard_seg.get()), (0x7f_ffff, 1));
    assert_eq!((config.discard_sector_alignment.get(), config.max_write_zeroes_seg.get(), config.write_zeroes_may_unmap), (8, 1, 1));
    let (_, written) = message("set_config", Request::SET_CONFIG);
    let (head, byte) = ConfigHeader::read_from_prefix(&written).unwrap();
    assert_eq!((head.offset.get() as usize, byte), (CONFIG_WRITEBACK_OFFSET, &[0u8][..]));
}

#[test]
fn the_log_and_the_status_are_as_python_has_them() {
    let log: vu::Log = payload("set_log_base", Request::SET_LOG_BASE);
    assert_eq!((log.mmap_size.get(), log.mmap_offset.get()), (0x8000, 0));
    assert_eq!(message("set_log_fd", Request::SET_LOG_FD).1, []);
    assert_eq!(payload::<U64>("set_status", Request::SET_STATUS).get(), 0xf);
    assert_eq!(payload::<U64>("status_reply", Request::GET_STATUS).get(), 0xf);
}

#[test]
fn the_inflight_message_is_the_padded_structure() {
    let inflight: Inflight = payload("set_inflight_fd", Request::SET_INFLIGHT_FD);
    assert_eq!((inflight.num_queues.get(), inflight.queue_size.get()), (2, 256));
    assert_eq!(inflight.mmap_size.get(), 0x1400);
    assert_eq!(payload::<U64>("ack", Request::SET_MEM_TABLE).get(), 22);
}

#[test]
fn an_inflight_queue_is_a_header_and_an_entry_a_descriptor() {
    let bytes = vector("inflight_queue");
    let (head, rest) = InflightHeader::read_from_prefix(&bytes).unwrap();
    assert_eq!((head.features.get(), head.version.get(), head.desc_num.get()), (0, vu::INFLIGHT_VERSION, 2));
    assert_eq!((head.last_batch_head.get(), head.used_idx.get()), (1, 7));
    let entries = <[InflightDesc]>::ref_from_bytes(rest).unwrap();
    assert_eq!((entries[0].inflight, entries[0].next.get(), entries[0].counter.get()), (1, 0, 5));
    assert_eq!((entries[1].inflight, entries[1].next.get(), entries[1].counter.get()), (0, 3, 0));
    assert_eq!(entries.as_bytes(), rest);
}

#[test]
fn a_request_without_a_name_is_held() {
    assert_eq!(Request(99).name(), None);
    assert_eq!(Request::KNOWN.len(), 43);
    assert!(Request::KNOWN.iter().enumerate().all(|(index, request)| request.0 as usize == index + 1));
}

proptest! {
    #[test]
    fn inflight_entries_stay_inside_their_queues_part(queues in 1u16..64, shift in 0u32..16, queue: u16, index: u16) {
        let size = 1u16 << shift;
        let (queue, index) = (queue % queues, index % size);
        let start = vu::inflight_queue_bytes(size) * u64::from(queue);
        let entry = vu::inflight_desc_offset(queue, size, index);
        prop_assert_eq!(vu::inflight_queue_bytes(size) % vu::INFLIGHT_ALIGN, 0);
        prop_assert!(entry >= start + 16 && entry + 16 <= start + vu::inflight_queue_bytes(size));
        prop_assert!(entry + 16 <= vu::inflight_region_bytes(queues, size));
    }

    #[test]
    fn any_twelve_bytes_are_a_header(bytes: [u8; 12]) {
        let header = Header::read_from_bytes(&bytes).unwrap();
        prop_assert_eq!(header.as_bytes(), bytes);
    }
}
