//! What the engine reads of a worker's memory, as a property: whatever is there, a claim is one that was due, or a lie; and both ends agree where nobody lies.

mod fuzzed;

use std::sync::Arc;

use proptest::prelude::*;
use qpair_bdev::Op;
use qpair_bdev::python::{EngineEnd, Lie, Stage, Work, WorkerEnd, control_bytes};
use qpair_memory::{Mapping, Region};

const STRIDE: u64 = 4096;

fn memory(depth: u32) -> Arc<Mapping> {
    Mapping::memfd("test", control_bytes(depth)).unwrap()
}

fn work(slot: u32, op: Op, offset_blocks: u64, num_blocks: u64) -> Work {
    let buffer = matches!(op, Op::Read | Op::Write).then_some((u64::from(slot) * STRIDE, num_blocks * 512));
    Work { slot, op, offset_blocks, num_blocks, buffer, stage: Stage::Whole }
}

proptest! {
    /// What the fuzzer runs.
    #[test]
    fn any_steps_over_any_memory_end_well(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        fuzzed::worker_memory(&data);
    }

    /// Words anywhere, at any time: nothing panics, nothing is read past what is out, and no more claims are read than requests are out.
    #[test]
    fn whatever_the_memory_says_no_more_is_taken_than_was_given(
        depth in 1u32..70,
        words in proptest::collection::vec((0u64..600, any::<u64>()), 0..200),
        given in 0u32..70,
    ) {
        let control = memory(depth);
        let region = Region::new(control.clone());
        let mut engine = EngineEnd::new(&control, depth).unwrap();
        let out = given.min(depth);
        for slot in 0..out {
            engine.push(&work(slot, Op::Read, u64::from(slot), 1), 1);
        }
        engine.publish();
        let mut left = out;
        for (place, word) in words {
            let offset = place * 8 % (control.len() as u64 / 8 * 8);
            region.write(offset, &word.to_le_bytes()).unwrap();
            match engine.waiting(left) {
                Ok(count) => {
                    prop_assert!(count <= left);
                    for _ in 0..count {
                        engine.pop();
                    }
                    left -= count;
                }
                Err(Lie::TooMany { claimed, out }) => {
                    prop_assert!(out == left && claimed > out && claimed <= 65535);
                    break;
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
            engine.publish();
            engine.rest();
            engine.rise();
        }
    }

    /// The worker's end over any bytes: it ends, and takes no more than it is asked for.
    #[test]
    fn a_workers_end_over_any_bytes_takes_at_most_what_it_asks_for(
        depth in 1u32..70,
        words in proptest::collection::vec((0u64..600, any::<u64>()), 0..100),
        most in 1usize..100,
    ) {
        let control = memory(depth);
        let region = Region::new(control.clone());
        let mut worker = WorkerEnd::new(control.clone(), depth, STRIDE, 512).unwrap();
        for (place, word) in words {
            region.write(place * 8 % (control.len() as u64 / 8 * 8), &word.to_le_bytes()).unwrap();
            let works = worker.fetch(most);
            prop_assert!(works.len() <= most);
            for work in &works {
                prop_assert!(work.slot < depth);
                prop_assert!(work.buffer.is_none_or(|(offset, length)| offset == u64::from(work.slot) * STRIDE && length <= STRIDE));
            }
            worker.complete(&works.iter().map(|work| (work.slot, 0)).collect::<Vec<_>>());
        }
    }

    /// Honest ends: each request arrives once and in order, each completion comes back with its slot, use and errno, over many wraps of the indices.
    #[test]
    fn honest_ends_agree(depth in 1u32..20, rounds in 1usize..60, seed in any::<u64>()) {
        let control = memory(depth);
        let mut engine = EngineEnd::new(&control, depth).unwrap();
        let mut worker = WorkerEnd::new(control.clone(), depth, STRIDE, 512).unwrap();
        let ops = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];
        for round in 0..rounds {
            let generation = round as u32 + 1;
            let given: Vec<Work> =
                (0..depth).map(|slot| work(slot, ops[(seed as usize + slot as usize + round) % 5], seed >> 20, u64::from(slot % 8))).collect();
            given.iter().for_each(|work| engine.push(work, generation));
            let rests = engine.publish();
            prop_assert_eq!(rests, round > 0, "the worker rested after it had found nothing");
            let mut got = Vec::new();
            while got.len() < given.len() {
                let part = worker.fetch(3);
                prop_assert!(!part.is_empty());
                got.extend(part);
            }
            prop_assert_eq!(&got, &given);
            prop_assert!(worker.fetch(3).is_empty());
            engine.rest();
            let answers: Vec<(u32, i32)> = got.iter().rev().map(|work| (work.slot, work.slot as i32)).collect();
            prop_assert!(worker.complete(&answers), "the engine rests");
            prop_assert!(!worker.complete(&[]), "and is rung for once");
            prop_assert_eq!(engine.waiting(depth), Ok(depth));
            for (slot, errno) in answers {
                let claim = engine.pop();
                prop_assert_eq!((claim.slot, claim.generation, claim.errno), (slot, generation, errno as u64));
            }
            prop_assert_eq!(engine.waiting(0), Ok(0));
        }
        prop_assert!(!worker.is_closed());
        engine.close();
        prop_assert!(worker.is_closed());
    }
}
