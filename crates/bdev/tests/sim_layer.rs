//! The layer and its jobs under random schedules: every I/O and every reply exactly once, data as written, nothing leaked.

use std::sync::Arc;

use qpair_bdev::measures;
use qpair_bdev::stats::Reset;
use qpair_bdev::{BdevError, Info, Op, OpSet, Registry, lifecycle};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, SimDisk, check_slabs, quiet_panics, remove};

/// Blocks of each client.
const OWN: u64 = 3 * CELL_BLOCKS;

fn random_info(rng: &mut Rng, blocks: u64) -> Info {
    let mut info = Info::new("disk", "sim", 512, blocks);
    info.queue_depth = *rng.pick(&[0, 1, 3, 16]);
    info.max_io_blocks = *rng.pick(&[0, 0, 1, 3, 8]);
    info.max_segments = *rng.pick(&[0, 0, 1, 2, 4]);
    info.max_unmap_blocks = *rng.pick(&[0, 0, 5]);
    info.optimal_io_boundary = *rng.pick(&[0, 4, 7]);
    info.split_on_boundary = rng.chance(1, 2);
    info.write_cache = rng.chance(1, 2);
    let mut ops = vec![Op::Read, Op::Write, Op::Flush, Op::Reset];
    ops.extend([Op::Unmap, Op::WriteZeroes].into_iter().filter(|_| rng.chance(1, 2)));
    info.supported = OpSet::of(&ops);
    info
}

/// Resizes, removes and asks for statistics, also several at once.
fn control(
    registry: Arc<Registry>,
    device: Arc<SimDisk>,
    allowed: Allowed,
    ledger: Obligations,
    mut left: u32,
) -> impl FnMut(u64, &mut Rng) -> Act {
    move |now_ns, rng| {
        if left == 0 {
            return Act::Done;
        }
        left -= 1;
        let (id, book) = (ledger.open_next(), ledger.clone());
        match rng.below(4) {
            0 | 1 if allowed.resize => {
                let blocks = rng.between(1, device.info.num_blocks + 1);
                let too_large = blocks > device.info.num_blocks;
                let reply = move |outcome: Result<(), BdevError>| {
                    let legal = match &outcome {
                        Ok(()) => !too_large,
                        Err(BdevError::Invalid { .. }) => too_large,
                        Err(error) => matches!(error, BdevError::NoSuchBdev(_) | BdevError::Removing(_)),
                    };
                    assert!(legal, "resize to {blocks}: {outcome:?}");
                    book.close(id);
                };
                lifecycle::resize(&registry, "disk", blocks, Box::new(reply));
            }
            2 if allowed.removal => {
                let (again, module) = (registry.clone(), device.clone());
                let reply = move |outcome: Result<(), BdevError>| {
                    match outcome {
                        Ok(()) => {
                            assert_eq!(module.inflight(), 0, "gone with I/O in flight");
                            again.register(module).unwrap();
                        }
                        Err(error) => assert!(matches!(error, BdevError::NoSuchBdev(_) | BdevError::Removing(_)), "{error}"),
                    }
                    book.close(id);
                };
                lifecycle::unregister(&registry, "disk", rng.below(300_000), Box::new(reply));
            }
            _ => {
                let reset = *rng.pick(&[Reset::None, Reset::All, Reset::MaxMin, Reset::Errors]);
                measures::statistics(&registry, "disk", reset, Box::new(move |_| book.close(id)));
            }
        }
        Act::Until(now_ns + rng.below(300_000))
    }
}

fn run(world: &mut World, plan: Plan, allowed: Allowed) {
    quiet_panics();
    let blocks = Crew::blocks(world, 2, OWN);
    let info = random_info(world.rng(), blocks);
    let registry = Registry::new(world.handles());
    let device = SimDisk::new(info.clone(), plan);
    registry.register(device.clone()).unwrap();
    let mut crew = Crew::new(world, 1..=2, OWN, Fills::only(0));
    crew.start(world, &registry, &Load { bdev: "disk".to_owned(), info, allowed, ios: 0 }, 10..=40);
    let controls = usize::from(allowed.resize || allowed.removal);
    if controls > 0 {
        let ledger = world.obligations().clone();
        world.add_actor(control(registry.clone(), device.clone(), allowed, ledger, 8));
    }
    world.finish();
    remove(world, &registry, "disk");
    device.check_end();
    check_slabs(world);
    crew.check_end();
    drop(registry);
    assert_eq!(Arc::strong_count(&device), 1 + controls, "the device is still held");
}

fn scenario(name: &str, seeds: u64, plan: Plan, allowed: Allowed) {
    sim::run_seeds(name, seeds, |seed| {
        let reactors = 1 + (seed % 4) as usize;
        let mut world = World::new(seed, reactors);
        run(&mut world, plan, allowed);
    });
}

#[test]
fn a_faithful_device_gives_what_was_written() {
    scenario("faithful", 600, Plan { delay_ns: 100_000, ..Plan::default() }, Allowed { composed: true, ..Allowed::default() });
}

#[test]
fn channels_come_and_go_under_load() {
    let allowed = Allowed { churn: true, aborts: true, ..Allowed::default() };
    scenario("churn", 600, Plan { delay_ns: 100_000, ..Plan::default() }, allowed);
}

#[test]
fn failures_and_aborts_end_each_io_once() {
    let allowed = Allowed { errors: true, aborts: true, churn: true, ..Allowed::default() };
    scenario("failures", 600, Plan { delay_ns: 200_000, error: 50, stall: 50, panic: 0 }, allowed);
}

#[test]
fn resets_find_all_channels_quiet() {
    let allowed = Allowed { aborts: true, resets: true, churn: true, composed: true, ..Allowed::default() };
    scenario("resets", 600, Plan { delay_ns: 100_000, stall: 30, ..Plan::default() }, allowed);
}

#[test]
fn a_shrunk_device_sees_nothing_beyond_its_end() {
    let allowed = Allowed { aborts: true, resize: true, churn: true, composed: true, ..Allowed::default() };
    scenario("resize", 600, Plan { delay_ns: 100_000, ..Plan::default() }, allowed);
}

#[test]
fn all_of_it_at_once() {
    let allowed = Allowed {
        errors: true,
        aborts: true,
        removal: true,
        resize: true,
        panics: false,
        resets: true,
        churn: true,
        composed: true,
        ..Allowed::default()
    };
    scenario("all", 1500, Plan { delay_ns: 100_000, error: 20, stall: 30, panic: 0 }, allowed);
}

#[test]
fn a_module_that_panics_takes_only_its_own_channel() {
    let allowed = Allowed {
        errors: true,
        aborts: true,
        removal: true,
        resize: true,
        panics: true,
        resets: true,
        churn: true,
        composed: true,
        ..Allowed::default()
    };
    scenario("panics", 1000, Plan { delay_ns: 100_000, error: 10, stall: 10, panic: 3 }, allowed);
}
