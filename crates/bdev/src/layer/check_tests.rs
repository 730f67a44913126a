//! What is plain above is plain below where `covers` says so.

use proptest::prelude::*;
use qpair_memory::{Mapping, Pages, Region, Sge};

use super::*;

/// Mostly without limits: else nothing would be covered.
fn infos() -> impl Strategy<Value = Info> {
    fn rarely(other: u32) -> impl Strategy<Value = u32> {
        prop_oneof![9 => Just(0u32), 1 => 1..other]
    }
    let limits = (rarely(9), rarely(4), rarely(9), rarely(2), prop_oneof![9 => Just(0u32), 1 => Just(8)]);
    (prop::bool::weighted(0.1), 16u64..60, limits, prop::bool::weighted(0.1), prop::bool::weighted(0.1)).prop_map(
        |(large, blocks, (most, segments, boundary, unit, metadata), readonly, split)| {
            let mut info = Info::new("disk", "test", if large { 4096 } else { 512 }, blocks);
            (info.max_io_blocks, info.max_segments, info.optimal_io_boundary) = (most, segments, boundary);
            (info.write_unit_blocks, info.metadata_bytes, info.readonly, info.split_on_boundary) = (1 + unit, metadata, readonly, split);
            info
        },
    )
}

fn io(op: Op, lba: u64, blocks: u64, bytes: u32, entries: u32, metadata: u32) -> Io {
    let region = Region::new(Mapping::anonymous(4096, Pages::Normal).expect("memory"));
    let mut io = crate::io::Slab::new(1).into_only();
    (io.op, io.lba, io.blocks) = (op, lba, blocks);
    for entry in 0..entries {
        // The last one has what is left.
        let length = if entry + 1 == entries { bytes - bytes / entries * entry } else { bytes / entries };
        io.list.push(Sge { region: region.clone(), offset: 0, length });
    }
    if metadata > 0 {
        io.metadata.push(Sge { region, offset: 0, length: metadata });
    }
    io
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, max_global_rejects: 500_000, ..ProptestConfig::default() })]

    #[test]
    fn what_is_covered_need_not_be_asked_again(
        above in infos(),
        below in infos(),
        shift in prop_oneof![3 => Just(0u64), 3 => 0u64..40, 1 => Just(u64::MAX - 3)],
        writes in any::<bool>(),
        (lba, blocks, entries) in (0u64..50, 1u64..12, 1u32..5),
        metadata in prop_oneof![3 => Just(0u32), 1 => Just(8)],
    ) {
        let op = if writes { Op::Write } else { Op::Read };
        let mut io = io(op, lba, blocks, blocks as u32 * above.block_size, entries, metadata * blocks as u32);
        prop_assume!(covers(&below, &above, shift) && is_plain(&above, &io));
        io.lba = io.lba.wrapping_add(shift);
        prop_assert!(is_plain(&below, &io), "{io:?} on {below:?}");
    }
}

#[test]
fn bdevs_alike_cover_each_other_and_each_limit_of_the_lower_one_ends_that() {
    let above = Info::new("above", "test", 512, 64);
    let changed = |change: fn(&mut Info)| {
        let mut below = Info::new("below", "test", 512, 64);
        change(&mut below);
        covers(&below, &above, 0)
    };
    assert!(changed(|_| {}));
    assert!(changed(|info| info.num_blocks = 65));
    let limits: [fn(&mut Info); 8] = [
        |info| info.num_blocks = 63,
        |info| info.block_size = 4096,
        |info| info.readonly = true,
        |info| info.max_io_blocks = 8,
        |info| info.max_segments = 2,
        |info| info.split_on_boundary = true,
        |info| info.write_unit_blocks = 2,
        |info| info.metadata_bytes = 8,
    ];
    for (position, limit) in limits.into_iter().enumerate() {
        assert!(!changed(limit), "limit {position}");
    }
    assert!(!covers(&above, &above, 1));
}
