//! The split ring's layout and the event index, against bytes and loops made by hand.

use proptest::prelude::*;
use qpair_wire::virtio::{AvailHeader, Desc, DescFlags, Features, RING_SIZE_MAX, RingSize, UsedElem, need_event};
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn a_descriptor_is_read_from_sixteen_bytes() {
    let bytes = [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x00, 0x02, 0x00, 0x00, 0x03, 0x00, 0xff, 0x7f];
    let desc = Desc::read_from_bytes(&bytes).unwrap();
    assert_eq!(desc.addr.get(), 0x7060_5040_3020_1000);
    assert_eq!(desc.len.get(), 512);
    assert_eq!(desc.flags(), DescFlags::NEXT | DescFlags::WRITE);
    assert_eq!(desc.next.get(), 0x7fff);
    assert_eq!(Desc::new(0x7060_5040_3020_1000, 512, DescFlags::NEXT | DescFlags::WRITE, 0x7fff).as_bytes(), bytes);
}

#[test]
fn unknown_descriptor_flags_are_kept() {
    let mut bytes = [0u8; 16];
    bytes[12] = 0x84;
    let flags = Desc::read_from_bytes(&bytes).unwrap().flags();
    assert!(flags.contains(DescFlags::INDIRECT));
    assert_eq!(flags.bits(), 0x84);
}

#[test]
fn a_used_element_is_head_and_length() {
    assert_eq!(UsedElem::new(5, 4097).as_bytes(), [5, 0, 0, 0, 1, 0x10, 0, 0]);
    let avail = AvailHeader::read_from_bytes(&[1, 0, 0xfe, 0xff]).unwrap();
    assert_eq!((avail.flags.get(), avail.idx.get()), (1, 0xfffe));
}

#[test]
fn ring_sizes_are_powers_of_two_up_to_32768() {
    let legal: Vec<u32> = (0..=70_000).filter(|n| RingSize::new(*n).is_some()).collect();
    let expected: Vec<u32> = (0..16).map(|shift| 1 << shift).collect();
    assert_eq!(legal, expected);
    assert_eq!(legal.last().copied(), Some(u32::from(RING_SIZE_MAX)));
    assert_eq!(RingSize::new(u32::MAX), None);
    assert_eq!(RingSize::new(1 << 31), None);
}

#[test]
fn a_ring_of_256_has_the_specified_sizes() {
    let size = RingSize::new(256).unwrap();
    assert_eq!(size.desc_bytes(), 4096);
    assert_eq!((size.avail_bytes(false), size.avail_bytes(true)), (516, 518));
    assert_eq!((size.used_bytes(false), size.used_bytes(true)), (2052, 2054));
    assert_eq!((size.used_event_offset(), size.avail_event_offset()), (516, 2052));
    assert_eq!(size.avail_entry_offset(257), 6);
    assert_eq!(size.used_entry_offset(257), 12);
    assert_eq!(size.desc_offset(255), 4080);
}

#[test]
fn the_legacy_layout_puts_the_used_ring_on_a_page() {
    let layout = RingSize::new(256).unwrap().layout(0x10000, 4096).unwrap();
    assert_eq!((layout.desc, layout.avail, layout.used, layout.end), (0x10000, 0x11000, 0x12000, 0x12000 + 2054));
}

#[test]
fn a_layout_that_is_misaligned_or_passes_the_address_space_is_refused() {
    let size = RingSize::new(8).unwrap();
    assert_eq!(size.layout(8, 4), None);
    assert_eq!(size.layout(0, 2), None);
    assert_eq!(size.layout(0, 12), None);
    assert_eq!(size.layout(u64::MAX - 15, 4), None);
    assert_eq!(size.layout(u64::MAX - 255, 4096), None);
}

#[test]
fn feature_bits_are_where_the_standards_put_them() {
    assert_eq!(Features::VERSION_1.bits(), 0x1_0000_0000);
    assert_eq!(Features::RING_EVENT_IDX.bits(), 0x2000_0000);
    assert_eq!(Features::PROTOCOL_FEATURES.bits(), 0x4000_0000);
    assert_eq!(Features::LOG_ALL.bits(), 0x0400_0000);
    assert_eq!(Features::RING_PACKED.bits(), 0x4_0000_0000);
}

proptest! {
    #[test]
    fn an_event_is_due_exactly_when_the_index_passed_it(event: u16, old: u16, moved in 0u16..=2048) {
        let new = old.wrapping_add(moved);
        let passed = (0..moved).any(|step| old.wrapping_add(step) == event);
        prop_assert_eq!(need_event(event, new, old), passed);
    }

    #[test]
    fn the_areas_of_a_layout_are_aligned_and_do_not_overlap(shift in 0u32..16, page in 0u64..1 << 40, align_shift in 2u32..13) {
        let size = RingSize::new(1 << shift).unwrap();
        let layout = size.layout(page * 16, 1 << align_shift).unwrap();
        prop_assert_eq!(layout.desc + size.desc_bytes(), layout.avail);
        prop_assert!(layout.avail + size.avail_bytes(true) <= layout.used);
        prop_assert_eq!(layout.avail % 2, 0);
        prop_assert_eq!(layout.used % (1 << align_shift), 0);
        prop_assert_eq!(layout.used + size.used_bytes(true), layout.end);
    }

    #[test]
    fn entries_lie_inside_their_ring_for_every_index(shift in 0u32..16, index: u16) {
        let size = RingSize::new(1 << shift).unwrap();
        prop_assert!(size.slot(index) < size.get());
        prop_assert!(size.avail_entry_offset(index) + 2 <= size.avail_bytes(false));
        prop_assert!(size.used_entry_offset(index) + 8 <= size.used_bytes(false));
    }
}
