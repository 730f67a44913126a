//! The packed ring's positions and layout, against walks made by hand.

use proptest::prelude::*;
use qpair_wire::virtio::DescFlags;
use qpair_wire::virtio_packed::{EVENT_DESC, EventSuppress, PackedBase, PackedDesc, PackedSize, Position, turn};
use zerocopy::{FromBytes, IntoBytes};

#[test]
fn a_descriptor_is_read_from_sixteen_bytes() {
    let bytes = [0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x00, 0x02, 0x00, 0x00, 0xff, 0x7f, 0x83, 0x80];
    let desc = PackedDesc::read_from_bytes(&bytes).unwrap();
    assert_eq!((desc.addr.get(), desc.len.get(), desc.id.get()), (0x7060_5040_3020_1000, 512, 0x7fff));
    assert_eq!(desc.flags(), DescFlags::NEXT | DescFlags::WRITE | DescFlags::AVAIL | DescFlags::USED);
    assert_eq!(PackedDesc::new(0x7060_5040_3020_1000, 512, 0x7fff, desc.flags()).as_bytes(), bytes);
    let event = EventSuppress::read_from_bytes(&[5, 0x80, 2, 0]).unwrap();
    assert_eq!((Position::from_bits(event.position.get()), event.flags.get()), (Position::new(5, true), EVENT_DESC));
}

#[test]
fn any_number_from_1_to_32768_is_a_size() {
    assert!((1..=32768).all(|entries| PackedSize::new(entries).is_some_and(|size| u32::from(size.get()) == entries)));
    assert!([0, 32769, 65536, 65537, u32::MAX].iter().all(|entries| PackedSize::new(*entries).is_none()));
}

#[test]
fn the_bits_of_a_descriptor_follow_the_wrap_counter() {
    let (first, second) = (Position::new(3, true), Position::new(3, false));
    assert_eq!((first.available(), first.used()), (0x0080, 0x8080));
    assert_eq!((second.available(), second.used()), (0x8000, 0));
    assert_eq!(turn(0xffff), 0x8080);
    assert_eq!(Position::START, Position::new(0, true));
}

#[test]
fn a_base_is_two_positions_and_half_a_base_is_one() {
    assert_eq!(PackedBase::START.bits(), 0x8000_8000);
    let base = PackedBase { avail: Position::new(7, false), used: Position::new(5, true) };
    assert_eq!((base.bits(), PackedBase::from_bits(0x8005_0007)), (0x8005_0007, base));
    assert_eq!(PackedBase::from_bits(0x8003), PackedBase { avail: Position::new(3, true), used: Position::new(3, true) });
}

#[test]
fn a_layout_is_aligned_in_order_and_inside_64_bits() {
    let size = PackedSize::new(5).unwrap();
    let layout = size.layout(0x1000).unwrap();
    assert_eq!((layout.desc, layout.driver, layout.device, layout.end), (0x1000, 0x1050, 0x1054, 0x1058));
    assert_eq!((size.layout(8), size.layout(u64::MAX - 15)), (None, None));
}

fn step(size: u16, at: Position) -> Position {
    if at.index() + 1 == size { Position::new(0, !at.wrap()) } else { Position::new(at.index() + 1, at.wrap()) }
}

proptest! {
    #[test]
    fn positions_move_and_measure_as_single_steps_do(
        size in prop_oneof![1..9u16, Just(32768), 1..=32768u16], index in any::<u16>(), wrap in any::<bool>(), count in 0..64u16, event in 0..70u16
    ) {
        let (ring, start) = (PackedSize::new(size.into()).unwrap(), Position::new(index % size, wrap));
        let count = count.min(size);
        let steps: Vec<Position> = std::iter::successors(Some(start), |at| Some(step(size, *at))).take(usize::from(count) + 1).collect();
        let end = steps[usize::from(count)];
        prop_assert!(ring.holds(end));
        prop_assert_eq!(ring.advance(start, count), end);
        prop_assert_eq!(ring.distance(start, end), u32::from(count));
        // An event is wanted at a position that may lie before, among or behind what was passed, within two laps.
        let event = (0..u32::from(event) % (2 * u32::from(size))).fold(start, |at, _| step(size, at));
        prop_assert_eq!(ring.need_event(event, end, count.into()), steps[..usize::from(count)].contains(&event));
        prop_assert!(ring.need_event(Position::new(size & 0x7fff, wrap), end, count.into()) || size == 32768);
    }
}
