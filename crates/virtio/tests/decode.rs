//! What the initiator reads from its target may be anything: used rings, features, configuration space.

mod support;

use proptest::prelude::*;
use qpair_bdev::{Info, IoFlags, Op, lifecycle};
use qpair_reactor::event::Event;
use qpair_virtio::{QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::BlkFeatures;
use support::{Driver, MAX_IO, config, features};
use zerocopy::IntoBytes;

/// The device that features and configuration describe; or the text of the refusal.
fn describe(features: u64, bytes: &[u8]) -> Result<Info, String> {
    use qpair_bdev::Device;
    let layout = VirtioLayout::new(1, 16, MAX_IO).unwrap();
    let event = || Event::new().unwrap();
    let queues = vec![QueueSetup { size: 16, kick: event(), call: event() }];
    VirtioBlk::new("v0", layout, features, bytes, queues).map(|device| device.info()).map_err(|error| error.to_string())
}

/// Whatever was accepted is something that the layer and the ring can work with.
fn check(info: &Info, features: u64, bytes: &[u8]) {
    let blk = BlkFeatures::from_bits_retain(features);
    let capacity = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let limit = |at: usize, feature| {
        // What is missing reads as zero, also of a field that ends in its middle.
        let number = u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes.get(at + byte).copied().unwrap_or(0)));
        if blk.contains(feature) && number > 0 { u64::from(number) } else { u64::from(u32::MAX) }
    };
    info.check().unwrap();
    let sectors = u64::from(info.block_size) / 512;
    assert!(info.num_blocks * sectors <= capacity && capacity - info.num_blocks * sectors < sectors);
    assert!(info.max_io_blocks > 0 && u64::from(info.max_io_blocks) * u64::from(info.block_size) <= u64::from(MAX_IO));
    assert_eq!(info.readonly, blk.contains(BlkFeatures::RO));
    let range = u64::from(info.max_unmap_blocks) * sectors;
    assert!(range <= u64::from(u32::MAX));
    // Offsets in virtio_blk_config: max_discard_sectors, max_write_zeroes_sectors.
    for (op, at, feature) in [(Op::Unmap, 36, BlkFeatures::DISCARD), (Op::WriteZeroes, 48, BlkFeatures::WRITE_ZEROES)] {
        let most = limit(at, feature);
        assert_eq!(info.supported.has(op), blk.contains(feature) && most >= sectors, "{op:?} of {most} sectors at most");
        assert!(!info.supported.has(op) || (1..=most).contains(&range), "{op:?}: {range} sectors, the target takes {most}");
    }
    assert_eq!(info.supported.has(Op::Flush), blk.contains(BlkFeatures::FLUSH));
    assert!(info.queue_depth > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_features_and_configuration_are_refused_by_name_or_make_a_device_that_works(
        features: u64,
        bytes in prop::collection::vec(any::<u8>(), 0..100),
        capacity in prop::option::of(0u64..1 << 40),
        block_size in prop::option::of(prop::sample::select(vec![512u32, 4096, 65536])),
        small in prop::option::of(0u32..300),
    ) {
        let (mut bytes, mut features) = (bytes, features & !Features::RING_PACKED.bits());
        let mut put = |at: usize, number: &[u8]| if let Some(place) = bytes.get_mut(at..at + number.len()) { place.copy_from_slice(number) };
        capacity.iter().for_each(|capacity| put(0, &capacity.to_le_bytes()));
        block_size.iter().for_each(|size| put(20, &size.to_le_bytes()));
        small.iter().for_each(|limit| { put(36, &limit.to_le_bytes()); put(48, &(limit * 7 % 300).to_le_bytes()) });
        if small.is_some() {
            features &= !BlkFeatures::SIZE_MAX.bits();
        }
        match describe(features, &bytes) {
            Ok(info) => check(&info, features, &bytes),
            Err(text) => prop_assert!(text.starts_with("Invalid argument: "), "{}", text),
        }
    }

    /// Any used ring, any used index, any status bytes, again and again: each I/O ends once, at the latest with the device.
    #[test]
    fn any_used_ring_ends_each_io_once(
        ring in prop::sample::select(vec![4u32, 16, 512]),
        rounds in prop::collection::vec((prop::collection::vec((0u16..600, 0u32..40, 0u32..10_000), 0..8), prop::option::of(0u16..20), 0u8..4), 1..8),
    ) {
        let mut driver = Driver::new(ring, features());
        let (mut asked, mut ended) = (Vec::new(), Vec::new());
        let mut index = 0u16;
        for (entries, jump, status) in rounds {
            let flags = if status == 3 { IoFlags::FUA } else { IoFlags::empty() };
            asked.extend(driver.submit(&[(Op::Read, 0, 8, flags), (Op::Write, 8, 8, flags), (Op::WriteZeroes, 16, 8, flags)]));
            let requests = driver.target.requests();
            for (at, id, length) in entries {
                // Often an id that may be under way, and where it is looked for.
                let id = requests.get(id as usize % 6).map_or(id, |request| u32::from(request.head));
                driver.target.lie(index.wrapping_add(at % 4), id, if length < 5000 { length % 2 + 4096 * (length % 3) } else { length }, index);
            }
            for request in &requests {
                driver.target.write(request.status, &[status]);
            }
            index = index.wrapping_add(jump.unwrap_or(1));
            driver.target.set_used_index(index);
            ended.extend(driver.reap());
        }
        lifecycle::unregister(&driver.registry, "v0", 0, Box::new(|outcome| outcome.unwrap()));
        for _ in 0..4 {
            ended.extend(driver.reap());
        }
        let mut ended: Vec<_> = ended.into_iter().map(|(id, _)| id).collect();
        ended.sort_unstable();
        asked.sort_unstable();
        prop_assert_eq!(ended, asked);
        prop_assert!(driver.registry.list(None).unwrap().is_empty());
    }
}

#[test]
fn a_configuration_of_which_any_one_byte_is_anything_is_refused_or_works() {
    let good = config();
    let all = features() | (BlkFeatures::BLK_SIZE | BlkFeatures::SIZE_MAX | BlkFeatures::TOPOLOGY | BlkFeatures::CONFIG_WCE).bits();
    let (mut refused, mut worked) = (0, 0);
    for at in 0..good.as_bytes().len() {
        for value in [0, 1, 2, 0x0f, 0x10, 0x7f, 0x80, 0xff] {
            let mut bytes = good.as_bytes().to_vec();
            bytes[20..24].copy_from_slice(&512u32.to_le_bytes());
            bytes[8..12].copy_from_slice(&65536u32.to_le_bytes());
            bytes[at] = value;
            match describe(all, &bytes) {
                Ok(info) => {
                    check(&info, all, &bytes);
                    worked += 1;
                }
                Err(text) => {
                    assert!(text.starts_with("Invalid argument: "), "byte {at} is {value}: {text}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 10 && worked > 300, "{refused} refused, {worked} worked");
}

/// The property test above found it: such a range was asked for one block at a time all the same.
#[test]
fn a_target_that_discards_less_than_a_block_at_a_time_is_not_asked_to() {
    let mut bytes = config();
    bytes.blk_size.set(4096);
    bytes.max_discard_sectors.set(7);
    bytes.max_write_zeroes_sectors.set(17);
    let info = describe(features() | BlkFeatures::BLK_SIZE.bits(), bytes.as_bytes()).unwrap();
    assert_eq!((info.supported.has(Op::Unmap), info.supported.has(Op::WriteZeroes), info.max_unmap_blocks), (false, true, 2));
}
