//! The RAID superblock against bytes made by hand from the format, and against every kind of lie.

use proptest::prelude::*;
use qpair_wire::raid_superblock::{Base, BaseState, Error, Header, LENGTH_MAX, Level, decode, encode};
use zerocopy::little_endian::{U16, U32, U64};

const MIRROR: &[u8] = include_bytes!("../../../tests/vectors/raid/mirror_degraded.bin");
const STRIPE: &[u8] = include_bytes!("../../../tests/vectors/raid/stripe_of_five.bin");

fn base(slot: u8) -> Base {
    let (offset, size, state) = (U64::new(2048), U64::new(4096), U32::new(BaseState::CONFIGURED.0));
    Base { uuid: [slot + 1; 16], data_offset: offset, data_size: size, state, slot, ..Base::default() }
}

fn mirror() -> (Header, Vec<Base>) {
    let mut header = Header { uuid: [9; 16], num_base_bdevs: 2, seq_number: U64::new(3), ..Header::default() };
    header.name[..2].copy_from_slice(b"r1");
    (header.raid_size, header.block_size, header.level) = (U64::new(4096), U32::new(512), U32::new(Level::RAID1.0));
    (header, vec![base(0), base(1)])
}

fn refusal(header: &Header, bases: &[Base]) -> Error {
    encode(header, bases, &mut [0; LENGTH_MAX]).unwrap_err()
}

#[test]
fn a_mirror_made_by_hand_is_read_field_by_field() {
    let (header, bases) = decode(MIRROR).unwrap();
    assert_eq!(header.name(), Some("mirror0"));
    assert_eq!(header.uuid, 0xdeadbeef_0001_0002_0003_000000000042_u128.to_be_bytes());
    assert_eq!((header.raid_size.get(), header.block_size.get(), header.level()), (63488, 512, Level::RAID1));
    assert_eq!((header.strip_size.get(), header.seq_number.get(), header.num_base_bdevs), (0, 7, 2));
    assert_eq!((header.length.get(), header.version_major.get(), header.version_minor.get()), (384, 1, 0));
    let seen: Vec<_> = bases.iter().map(|base| (base.slot, base.state(), base.data_offset.get(), base.data_size.get())).collect();
    assert_eq!(seen, [(0, BaseState::CONFIGURED, 2048, 63488), (1, BaseState::FAILED, 2048, 63488)]);
}

#[test]
fn what_was_made_by_hand_is_written_again_byte_for_byte() {
    for vector in [MIRROR, STRIPE] {
        let (header, bases) = decode(vector).unwrap();
        let mut out = [0xee; LENGTH_MAX];
        let length = encode(header, bases, &mut out).unwrap();
        assert_eq!(&out[..length], vector);
    }
}

#[test]
fn one_that_is_longer_than_what_was_read_says_how_much_is_needed() {
    assert_eq!(decode(&STRIPE[..512]), Err(Error::Short { needed: 576, found: 512 }));
    assert_eq!(decode(&STRIPE[..255]), Err(Error::Short { needed: 256, found: 255 }));
}

#[test]
fn each_changed_bit_is_found() {
    for position in 0..MIRROR.len() * 8 {
        let mut torn = MIRROR.to_vec();
        torn[position / 8] ^= 1 << (position % 8);
        let error = decode(&torn).unwrap_err();
        let named = match position / 8 {
            0..8 => error == Error::Signature,
            12..16 | 255 => matches!(error, Error::Length { .. } | Error::Short { .. } | Error::Checksum { .. }),
            _ => matches!(error, Error::Checksum { .. }),
        };
        assert!(named, "bit {position}: {error:?}");
    }
}

#[test]
fn lies_are_refused_by_name() {
    type Lie = (fn(&mut Header, &mut Vec<Base>), Error);
    let lies: [Lie; 16] = [
        (|h, _| h.version_major = U16::new(2), Error::Version(2)),
        (|h, _| h.uuid = [0; 16], Error::Uuid),
        (|h, _| h.name = [b'x'; 64], Error::Name),
        (|h, _| h.name[0] = 0, Error::Name),
        (|h, _| h.block_size = U32::new(520), Error::BlockSize(520)),
        (|h, _| h.level = U32::new(6), Error::Level(6)),
        (|h, _| h.strip_size = U32::new(8), Error::StripSize(8)),
        (|h, _| h.level = U32::new(0), Error::StripSize(0)),
        (|h, _| h.num_base_bdevs = 1, Error::Count { slots: 1, described: 2 }),
        (|_, b| b.clear(), Error::Count { slots: 2, described: 0 }),
        (|h, _| h.raid_size = U64::new(u64::MAX), Error::RaidSize(u64::MAX)),
        (|_, b| b[1].slot = 2, Error::Slot { value: 2, slots: 2 }),
        (|_, b| b[1].slot = 0, Error::Slot { value: 0, slots: 2 }),
        (|_, b| b[0].state = U32::new(4), Error::State(4)),
        (|_, b| b[1].uuid = b[0].uuid, Error::BaseUuid(1)),
        (|_, b| b[0].data_size = U64::new(u64::MAX), Error::Data { slot: 0, offset: 2048, size: u64::MAX }),
    ];
    for (lie, error) in lies {
        let (mut header, mut bases) = mirror();
        lie(&mut header, &mut bases);
        assert_eq!(refusal(&header, &bases), error);
    }
}

#[test]
fn data_that_begin_in_the_superblock_are_refused() {
    let (header, mut bases) = mirror();
    bases[1].data_offset = U64::new(2047);
    assert_eq!(refusal(&header, &bases), Error::Data { slot: 1, offset: 2047, size: 4096 });
}

#[test]
fn a_length_that_does_not_hold_its_members_is_refused() {
    let mut short = MIRROR.to_vec();
    short[12..16].copy_from_slice(&383_u32.to_le_bytes());
    assert_eq!(decode(&short), Err(Error::Length { value: 383, least: 384 }));
    short[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(decode(&short), Err(Error::Length { value: u32::MAX, least: 384 }));
}

proptest! {
    #[test]
    fn any_bytes_end_in_a_value_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..1024), signed: bool) {
        if signed && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"SPDKRAID");
        }
        let _ = decode(&bytes);
    }

    #[test]
    fn what_is_written_is_read_as_it_was(slots in 1..=255_u8, seq: u64, states in proptest::collection::vec(0..4_u32, 255), level in 0..3_usize) {
        let (mut header, _) = mirror();
        let level = [Level::RAID0, Level::RAID1, Level::CONCAT][level];
        (header.num_base_bdevs, header.seq_number, header.level) = (slots, U64::new(seq), U32::new(level.0));
        header.strip_size = U32::new(if level == Level::RAID1 { 0 } else { 16 });
        let uuid = |slot: u8| (u128::from(slot) + 1).to_be_bytes();
        let bases: Vec<_> = (0..slots).map(|slot| Base { state: U32::new(states[usize::from(slot)]), uuid: uuid(slot), ..base(0) })
            .enumerate().map(|(slot, base)| Base { slot: slot as u8, ..base }).collect();
        let mut out = [0; LENGTH_MAX];
        let length = encode(&header, &bases, &mut out).unwrap();
        let (again, found) = decode(&out).unwrap();
        prop_assert_eq!(found, &bases[..]);
        prop_assert_eq!(length, 256 + 64 * usize::from(slots));
        prop_assert_eq!((again.seq_number.get(), again.level(), again.name()), (seq, level, Some("r1")));
        // Fed in pieces: each start of it that is too short says so, or is refused; none panics.
        for end in (0..length).step_by(61) {
            let needed = if end < 256 { 256 } else { length };
            prop_assert_eq!(decode(&out[..end]), Err(Error::Short { needed, found: end }));
        }
    }
}
