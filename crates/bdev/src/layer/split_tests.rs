//! Children cover their parent exactly and keep every limit, whatever the limits; ranges are judged right at every edge.

use proptest::prelude::*;

use super::super::check::{Route, route};
use super::*;
use crate::OpSet;

fn limits() -> impl Strategy<Value = Info> {
    let shape = (0usize..4, prop_oneof![Just(1u32), Just(2), Just(8)], 0u32..9, 0u32..9);
    let rest = (0u32..6, any::<bool>(), 0u32..9, any::<bool>(), any::<bool>());
    (shape, rest).prop_map(|((size, unit, io, boundary), (segments, split, unmap, zeroes, unmaps))| {
        let mut info = Info::new("disk", "test", 512 << size, 1 << 20);
        (info.write_unit_blocks, info.max_io_blocks, info.optimal_io_boundary) = (unit, io * unit, boundary * unit);
        (info.max_segments, info.split_on_boundary, info.max_unmap_blocks) = (segments, split, unmap);
        let ops = [Op::Read, Op::Write].into_iter().chain(zeroes.then_some(Op::WriteZeroes)).chain(unmaps.then_some(Op::Unmap));
        info.supported = OpSet::of(&ops.collect::<Vec<_>>());
        info
    })
}

/// An I/O whose list is cut where `cuts` say; the bytes lie one after the other in one region.
fn parent(info: &Info, op: Op, lba: u64, blocks: u64, cuts: &[u32]) -> Io {
    let region = Region::new(Mapping::anonymous(1 << 24, Pages::Normal).expect("memory"));
    let mut io = crate::io::Slab::new(1).into_only();
    (io.op, io.lba, io.blocks) = (op, lba, blocks);
    if matches!(op, Op::Read | Op::Write) {
        let (mut at, total, mut cuts) = (0, blocks * u64::from(info.block_size), cuts.iter().cycle());
        while at < total {
            let step = u64::from(*cuts.next().expect("endless")).min(total - at);
            io.list.push(Sge { region: region.clone(), offset: at, length: step as u32 });
            at += step;
        }
    }
    io
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn children_cover_their_parent_and_keep_the_limits(
        info in limits(),
        op in prop_oneof![Just(Op::Read), Just(Op::Write), Just(Op::WriteZeroes), Just(Op::Unmap)],
        lba in 0u64..100,
        blocks in 1u64..64,
        cuts in prop::collection::vec(prop_oneof![1u32..600, Just(512), 500u32..20000], 1..12),
    ) {
        prop_assert!(info.check().is_ok());
        let unit = u64::from(info.write_unit_blocks);
        let (lba, blocks) = if matches!(op, Op::Write | Op::WriteZeroes) { (lba * unit, blocks * unit) } else { (lba, blocks) };
        let mut io = parent(&info, op, lba, blocks, &cuts);
        match route(&info, &io) {
            Route::Split => {}
            Route::Plain => return Ok(()),
            Route::Answer(Status::INVALID_SGL_COUNT) => {
                prop_assert!(spans_too_much(&info, &io));
                return Ok(());
            }
            Route::Answer(status) => {
                prop_assert!(status == Status::INVALID_OPCODE && !info.supported.has(op));
                return Ok(());
            }
            Route::Reset | Route::Emulate => unreachable!(),
        }
        let zeros = zeros().expect("memory");
        let (block, mut bytes, mut count) = (u64::from(info.block_size), 0, 0);
        while io.split_blocks < io.blocks {
            let mut list = SgList::new();
            let (child_op, part) = part_of(&info, &io, Some(&zeros), &mut list);
            prop_assert!(part > 0 && io.split_blocks + part <= io.blocks, "{part} of {}", io.blocks);
            let at = io.lba + io.split_blocks;
            if matches!(child_op, Op::Read | Op::Write) {
                prop_assert!(info.max_io_blocks == 0 || part <= u64::from(info.max_io_blocks));
                prop_assert!(info.max_segments == 0 || list.len() <= info.max_segments as usize);
                prop_assert!(list.iter().map(|entry| u64::from(entry.length)).sum::<u64>() == part * block);
                prop_assert!(child_op == Op::Read || (at.is_multiple_of(unit) && part % unit == 0));
                let boundary = u64::from(info.optimal_io_boundary);
                prop_assert!(!info.split_on_boundary || boundary == 0 || at / boundary == (at + part - 1) / boundary);
            } else {
                prop_assert!(info.max_unmap_blocks == 0 || part <= u64::from(info.max_unmap_blocks));
            }
            // The parent's bytes lie in order in their region: so must the children's.
            for entry in list.iter().filter(|_| op != Op::WriteZeroes) {
                prop_assert_eq!(entry.offset, bytes);
                bytes += u64::from(entry.length);
            }
            io.split_blocks += part;
            count += 1;
        }
        prop_assert_eq!(io.split_blocks, io.blocks);
        prop_assert!(!matches!(op, Op::Read | Op::Write) || bytes == blocks * block);
        prop_assert!(count >= 1);
    }

    #[test]
    fn ranges_are_judged_at_every_edge(
        num_blocks in prop_oneof![1u64..5, Just(i64::MAX as u64 / 512), Just(1u64 << 40)],
        lba in prop_oneof![0u64..6, Just(u64::MAX), Just(i64::MAX as u64 / 512 - 1), Just(i64::MAX as u64 / 512), (1u64 << 40) - 2..(1 << 40) + 2],
        blocks in prop_oneof![0u64..6, Just(u64::MAX), Just(i64::MAX as u64 / 512), Just(1u64 << 40)],
    ) {
        let mut info = Info::new("disk", "test", 512, num_blocks);
        info.supported = OpSet::of(&[Op::Unmap]);
        let io = parent(&info, Op::Unmap, lba, blocks, &[512]);
        let inside = u128::from(lba) + u128::from(blocks) <= u128::from(num_blocks);
        let expected = match (blocks, inside) {
            (0, _) => Route::Answer(Status::INVALID_FIELD),
            (_, true) => Route::Plain,
            (_, false) => Route::Answer(Status::LBA_OUT_OF_RANGE),
        };
        prop_assert_eq!(route(&info, &io), expected);
    }
}
