//! What a fuzzer and the property tests feed alike.

use qpair_bdev::Op;
use qpair_bdev::python::{EngineEnd, Stage, Work, WorkerEnd, control_bytes};
use qpair_memory::{Mapping, Region};

/// A worker's memory of any content, changed between any two steps of the engine. `data`: the depth, then a step every eleven bytes: which, where, what.
pub fn worker_memory(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let depth = u32::from(*first % 70) + 1;
    let control = Mapping::memfd("fuzzed", control_bytes(depth)).unwrap();
    let memory = Region::new(control.clone());
    let mut engine = EngineEnd::new(&control, depth).unwrap();
    let mut worker = WorkerEnd::new(control.clone(), depth, 4096, 512).unwrap();
    let mut out = vec![false; depth as usize];
    let mut count = 0;
    for step in rest.chunks_exact(11) {
        let word = u64::from_le_bytes(step[3..].try_into().unwrap());
        match step[0] % 8 {
            0..3 => {
                let place = u64::from(u16::from_le_bytes([step[1], step[2]])) * 8 % (control.len() as u64 / 8 * 8);
                memory.write(place, &word.to_le_bytes()).unwrap();
            }
            3 => {
                let slot = u32::from(step[1]) % depth;
                if !std::mem::replace(&mut out[slot as usize], true) {
                    let (op, buffer) = (Op::Read, Some((u64::from(slot) * 4096, 512)));
                    engine.push(&Work { slot, op, offset_blocks: word, num_blocks: 1, buffer, stage: Stage::Whole }, u32::from(step[2]));
                    count += 1;
                }
                engine.publish();
            }
            4 => {
                // As the link does: severed at a lie, so that nothing is read after it.
                let Ok(waiting) = engine.waiting(count) else { return };
                assert!(waiting <= count);
                for _ in 0..waiting {
                    let claim = engine.pop();
                    let Some(place) = out.get_mut(claim.slot as usize).filter(|place| **place) else { return };
                    *place = false;
                    count -= 1;
                }
            }
            5 => {
                engine.rest();
                engine.rise();
            }
            _ => {
                let works = worker.fetch(usize::from(step[1]));
                assert!(works.iter().all(|work| work.slot < depth && work.buffer.is_none_or(|(_, length)| length <= 4096)));
                worker.complete(&works.iter().map(|work| (work.slot, i32::from(step[2]))).collect::<Vec<_>>());
            }
        }
    }
}
