//! A filter in the simulator: what is shown and what is not, by an interest that changes under load, with a consumer that is slow, fails, answers and goes.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::python::{ANSWERED, FilterBdev, Interest, Ring, Stage, Work};
use qpair_bdev::{Device, Info, Op, OpSet, Registry};
use qpair_memory::Region;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{self, Act, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, SimDisk, check_slabs, remove};

/// Blocks of each client.
const OWN: u64 = 6 * CELL_BLOCKS;
const OPS: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];

fn some(rng: &mut Rng) -> Vec<Op> {
    OPS.into_iter().filter(|_| rng.chance(1, 2)).collect()
}

fn interest(rng: &mut Rng, blocks: u64) -> Interest {
    let ranges: Vec<(u64, u64)> = (0..rng.below(4)).map(|_| (rng.below(blocks), rng.below(40))).collect();
    let ranges = rng.chance(1, 2).then_some(&ranges[..]);
    Interest::new(&some(rng), &some(rng), ranges).unwrap()
}

/// Everything a filter may do to data: they are turned over on the way down and back on the way up, so the base has other bytes than the initiator.
fn turn_over(ring: &Ring, work: &Work) {
    if let Some((offset, length)) = work.buffer {
        let memory = Region::new(ring.mapping().clone());
        let mut bytes = vec![0; length as usize];
        memory.read(offset, &mut bytes).unwrap();
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        memory.write(offset, &bytes).unwrap();
    }
}

#[derive(Clone, Copy)]
struct Manner {
    /// Changes what it wants to see.
    fickle: bool,
    /// Fails and answers what it sees.
    meddles: bool,
    /// Turns data over.
    alters: bool,
    closes: bool,
}

fn scenario(name: &str, seeds: u64, manner: Manner, allowed: Allowed) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let count = world.reactors() as u64;
        let blocks = count * OWN;
        let mut info = Info::new("base", "sim", 512, blocks);
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
        let plan = Plan { delay_ns: 30_000, error: if allowed.errors { 20 } else { 0 }, ..Plan::default() };
        let base = SimDisk::new(info, plan);
        let registry = Registry::new(world.handles());
        registry.register(base.clone()).unwrap();
        let bell = Event::simulated();
        let told = bell.twin().unwrap();
        let (depth, max_io) = (*world.rng().pick(&[1, 2, 7, 64]), *world.rng().pick(&[512, 2048, 65536]));
        let first = if manner.alters { Interest::new(&[Op::Write], &[Op::Read], None).unwrap() } else { interest(world.rng(), blocks) };
        let (filter, ring) =
            FilterBdev::new(&registry, "disk", "base", None, depth, max_io, first, Box::new(move || told.notify())).unwrap();
        registry.register(filter.clone()).unwrap();
        let content = if manner.alters { Fills::ANY } else { Fills::only(0) };
        let mut crew = Crew::new(&mut world, 1..=1, OWN, content);
        crew.start(&mut world, &registry, &Load { bdev: "disk".to_owned(), info: filter.info(), allowed, ios: 0 }, 50..=50);
        let (seen, served) = (Arc::new(AtomicU64::new(0)), ring.clone());
        let (counted, changing) = (seen.clone(), Mutex::new(Arc::downgrade(&filter)));
        let mut held: VecDeque<Work> = VecDeque::new();
        world.add_actor(move |now_ns, rng: &mut Rng| {
            if manner.fickle
                && rng.chance(1, 6)
                && let Some(filter) = changing.lock().unwrap().upgrade()
            {
                filter.show(interest(rng, blocks));
            }
            let fetched = served.fetch(rng.between(1, 4) as usize);
            counted.fetch_add(fetched.len() as u64, Ordering::Relaxed);
            for work in &fetched {
                assert_ne!(work.stage, Stage::Whole);
                // At once, as one that is given up is not touched any more.
                if manner.alters {
                    turn_over(&served, work);
                }
            }
            let idle = fetched.is_empty();
            held.extend(fetched);
            if !held.is_empty() && rng.chance(1, 2) {
                let work = held.remove(rng.below(held.len() as u64) as usize).unwrap();
                let code = match rng.below(20) {
                    0 if manner.meddles => libc::ENODATA,
                    1 if manner.meddles => ANSWERED,
                    _ => 0,
                };
                served.complete(work.slot, code).unwrap();
            }
            match (idle, held.is_empty()) {
                (true, true) => Act::On(bell.twin().unwrap(), None),
                (true, false) => Act::Until(now_ns + rng.below(50_000)),
                _ => Act::Again,
            }
        });
        if manner.closes {
            let steps = world.rng().below(2000);
            world.run(steps);
            ring.close();
        }
        world.finish();
        assert_eq!(ring.free_slots(), depth as usize, "slots leaked");
        if manner.alters {
            assert!(seen.load(Ordering::Relaxed) > 0);
        }
        drop(filter);
        for name in ["disk", "base"] {
            remove(&mut world, &registry, name);
        }
        base.check_end();
        check_slabs(&mut world);
        crew.check_end();
        drop(registry);
        assert!(ring.is_closed());
    });
}

#[test]
fn what_is_shown_and_what_is_not_ends_once_with_its_data() {
    let manner = Manner { fickle: true, meddles: false, alters: false, closes: false };
    scenario("filter", 500, manner, Allowed { churn: true, ..Allowed::default() });
}

#[test]
fn data_are_altered_on_both_ways_and_the_initiator_sees_its_own() {
    // Unmapped or zeroed blocks are not turned over: what they read as is not told.
    let manner = Manner { fickle: false, meddles: false, alters: true, closes: false };
    let allowed = Allowed { churn: true, writes_only: true, ..Allowed::default() };
    scenario("filter alters", 500, manner, allowed);
}

#[test]
fn a_consumer_that_fails_answers_and_is_aborted_loses_nothing() {
    let manner = Manner { fickle: true, meddles: true, alters: false, closes: false };
    let allowed = Allowed { aborts: true, resets: true, churn: true, errors: true, rubbish: true, ..Allowed::default() };
    scenario("filter meddles", 500, manner, allowed);
}

#[test]
fn a_filter_whose_consumer_goes_fails_what_was_to_be_shown() {
    let manner = Manner { fickle: true, meddles: false, alters: false, closes: true };
    scenario("filter closes", 400, manner, Allowed { aborts: true, churn: true, panics: true, ..Allowed::default() });
}

#[test]
fn an_interest_takes_ranges_in_any_order_and_refuses_impossible_ones() {
    let interest = Interest::new(&[Op::Read], &[], Some(&[(10, 5), (0, 3), (2, 4), (30, 0)])).unwrap();
    assert_eq!(interest, Interest::new(&[Op::Read], &[], Some(&[(0, 6), (10, 5)])).unwrap());
    let refused = |ranges: &[(u64, u64)]| Interest::new(&[], &[], Some(ranges)).unwrap_err().to_string();
    assert_eq!(refused(&[(u64::MAX, 2)]), "Invalid argument: ranges one: to end by block 2^64 - 1");
    assert_eq!(refused(&[(0, 1); 1025]), "Invalid argument: ranges 1025: at most 1024");
}
