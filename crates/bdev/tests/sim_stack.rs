//! Bdevs upon bdevs under random schedules: any of them is removed or resized at any time, modules panic, and still each I/O
//! ends once, data are as written, and nothing is left behind.

use std::sync::Arc;

use qpair_bdev::measures;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::stats::Reset;
use qpair_bdev::{BdevError, FRAMES_MAX, Info, Op, OpSet, Registry, lifecycle};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, Relay, SimDisk, check_slabs, is_going, quiet_panics, remove};

/// Blocks of each client.
const OWN: u64 = 3 * CELL_BLOCKS;

/// What stands where: names from the base up, each with how far it moves its I/O. None: a passthru.
struct Tower {
    registry: Arc<Registry>,
    base: Arc<SimDisk>,
    floors: Vec<(String, Option<u64>)>,
    panic: u64,
}

impl Tower {
    fn new(world: &mut World, base: &Arc<SimDisk>, panic: u64) -> Self {
        let count = world.rng().between(1, FRAMES_MAX as u64 - 1);
        let name = |floor| if floor == count { "disk".to_owned() } else { format!("floor{floor}") };
        let floors = (1..=count).map(|floor| (name(floor), world.rng().chance(1, 2).then(|| world.rng().below(4)))).collect();
        Self { registry: Registry::new(world.handles()), base: base.clone(), floors, panic }
    }

    fn shift(&self) -> u64 {
        self.floors.iter().filter_map(|(_, shift)| *shift).sum()
    }

    /// Registers what is missing, as far as what is below it is there.
    fn build(&self) -> Result<(), BdevError> {
        let passable = |outcome: Result<(), BdevError>| match outcome {
            Err(BdevError::Exists(_) | BdevError::Claimed { .. }) => Ok(()),
            other => other,
        };
        passable(self.registry.register(self.base.clone()).map(drop))?;
        let mut below = "base";
        for (name, shift) in &self.floors {
            passable(match shift {
                Some(shift) => Relay::register(&self.registry, name, below, *shift, self.panic),
                None => Passthru::new(&self.registry, name, below, None)
                    .and_then(|passthru| self.registry.register(Arc::new(passthru)).map(drop)),
            })?;
            below = name;
        }
        Ok(())
    }
}

/// Removes any floor, or the base; resizes the base.
fn control(tower: Arc<Tower>, allowed: Allowed, ledger: Obligations, mut left: u32) -> impl FnMut(u64, &mut Rng) -> Act {
    move |now_ns, rng| {
        if left == 0 {
            return Act::Done;
        }
        left -= 1;
        let (id, book, again) = (ledger.open_next(), ledger.clone(), tower.clone());
        if allowed.removal && rng.chance(1, 2) {
            let floor = rng.below(tower.floors.len() as u64 + 1) as usize;
            let name = if floor == 0 { "base" } else { &tower.floors[floor - 1].0 };
            let reply = move |outcome: Result<(), BdevError>| {
                assert!(outcome.as_ref().is_ok_and(|()| true) || outcome.as_ref().is_err_and(is_going), "{outcome:?}");
                if outcome.is_ok() && floor == 0 {
                    assert_eq!(again.base.inflight(), 0, "gone with I/O in flight");
                }
                let built = again.build();
                assert!(built.as_ref().is_ok() || built.as_ref().is_err_and(is_going), "{built:?}");
                book.close(id);
            };
            lifecycle::unregister(&tower.registry, name, rng.below(300_000), Box::new(reply));
        } else if allowed.resize {
            let blocks = tower.base.info.num_blocks - rng.below(2 * CELL_BLOCKS);
            let reply = move |outcome: Result<(), BdevError>| {
                assert!(outcome.is_ok() || outcome.as_ref().is_err_and(is_going), "resize to {blocks}: {outcome:?}");
                book.close(id);
            };
            lifecycle::resize(&tower.registry, "base", blocks, Box::new(reply));
        } else {
            measures::statistics(&tower.registry, "disk", Reset::None, Box::new(move |_| book.close(id)));
        }
        Act::Until(now_ns + rng.below(300_000))
    }
}

fn random_base(rng: &mut Rng, blocks: u64) -> Info {
    // Room for what the floors leave out at the start, and for resizing.
    let mut info = Info::new("base", "sim", 512, blocks + 64);
    info.queue_depth = *rng.pick(&[0, 1, 3, 16]);
    info.max_io_blocks = *rng.pick(&[0, 0, 1, 3, 8]);
    info.max_segments = *rng.pick(&[0, 0, 1, 2, 4]);
    info.max_unmap_blocks = *rng.pick(&[0, 0, 5]);
    info.write_cache = rng.chance(1, 2);
    let mut ops = vec![Op::Read, Op::Write, Op::Flush, Op::Reset];
    ops.extend([Op::Unmap, Op::WriteZeroes].into_iter().filter(|_| rng.chance(1, 2)));
    info.supported = OpSet::of(&ops);
    info
}

fn run(world: &mut World, plan: Plan, allowed: Allowed, panic: u64) {
    quiet_panics();
    let count = world.reactors();
    let info = random_base(world.rng(), count as u64 * OWN);
    let base = SimDisk::new(info.clone(), plan);
    let tower = Arc::new(Tower::new(world, &base, panic));
    tower.build().unwrap();
    // The client knows what the base can do, and sees the size of the top.
    let seen = Info { num_blocks: info.num_blocks - tower.shift(), ..info };
    let mut crew = Crew::new(world, 1..=1, OWN, Fills::only(0));
    crew.start(world, &tower.registry, &Load { bdev: "disk".to_owned(), info: seen, allowed, ios: 0 }, 10..=40);
    let ledger = world.obligations().clone();
    world.add_actor(control(tower.clone(), allowed, ledger.clone(), 8));
    world.finish();
    remove(world, &tower.registry, "base");
    assert!(tower.registry.list(None).unwrap().is_empty(), "something still stands");
    base.check_end();
    check_slabs(world);
    crew.check_end();
}

fn scenario(name: &str, seeds: u64, plan: Plan, allowed: Allowed, panic: u64) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        run(&mut world, plan, allowed, panic);
    });
}

#[test]
fn a_tower_gives_what_was_written() {
    let allowed = Allowed { churn: true, aborts: true, resets: true, composed: true, ..Allowed::default() };
    scenario("tower", 500, Plan { delay_ns: 100_000, stall: 20, ..Plan::default() }, allowed, 0);
}

#[test]
fn a_base_takes_all_that_stands_on_it_along() {
    let allowed = Allowed { errors: true, aborts: true, removal: true, churn: true, resets: true, composed: true, ..Allowed::default() };
    scenario("tower_removal", 1000, Plan { delay_ns: 100_000, error: 20, stall: 30, panic: 0 }, allowed, 0);
}

#[test]
fn a_base_that_is_resized_tells_those_above() {
    let allowed = Allowed { aborts: true, resize: true, churn: true, composed: true, ..Allowed::default() };
    scenario("tower_resize", 500, Plan { delay_ns: 100_000, stall: 30, ..Plan::default() }, allowed, 0);
}

#[test]
fn a_floor_that_panics_leaves_nothing_behind() {
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
    scenario("tower_panics", 1000, Plan { delay_ns: 100_000, error: 10, stall: 10, panic: 2 }, allowed, 3);
}
