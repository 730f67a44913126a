//! Random towers of passthrus, parts, delays and error bdevs under random schedules: latencies and injected errors change, any of them is removed or
//! its base resized at any time, and still each I/O ends once, data are as written, and nothing is left behind.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use qpair_bdev::passthru::Passthru;
use qpair_bdev::{BdevError, DeviceId, FRAMES_MAX, Info, Op, OpSet, Registry, Status, lifecycle};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, SimDisk, check_slabs, is_going, promise, quiet_panics, remove};
use qpair_vbdev::delay::{Delay, Latencies, Latency};
use qpair_vbdev::error::{ErrorBdev, Errors, TARGETS, What};
use qpair_vbdev::part::{Part, Range};

/// Blocks of each client.
const OWN: u64 = 3 * CELL_BLOCKS;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Passthru,
    Part(u64),
    Delay,
    Error,
}

/// What stands where, from the base up.
struct Tower {
    registry: Arc<Registry>,
    base: Arc<SimDisk>,
    floors: Vec<(String, Kind)>,
    latencies: Arc<Latencies>,
    errors: Arc<Errors>,
    devices: Mutex<HashMap<String, DeviceId>>,
}

fn passable(outcome: Result<(), BdevError>) -> Result<(), BdevError> {
    match outcome {
        Err(BdevError::Exists(_) | BdevError::Claimed { .. }) => Ok(()),
        other => other,
    }
}

impl Tower {
    fn new(world: &mut World, base: &Arc<SimDisk>) -> Self {
        let count = world.rng().between(1, FRAMES_MAX as u64 - 1);
        let name = |floor| if floor == count { "disk".to_owned() } else { format!("floor{floor}") };
        let mut kind = || match world.rng().below(4) {
            0 => Kind::Passthru,
            1 => Kind::Part(world.rng().below(4)),
            2 => Kind::Delay,
            _ => Kind::Error,
        };
        let floors = (1..=count).map(|floor| (name(floor), kind())).collect();
        Self {
            registry: Registry::new(world.handles()),
            base: base.clone(),
            floors,
            latencies: Latencies::new([20, 400, 60, 900]),
            errors: Errors::new(),
            devices: Mutex::default(),
        }
    }

    fn shift(&self) -> u64 {
        self.floors.iter().map(|(_, kind)| if let Kind::Part(shift) = kind { *shift } else { 0 }).sum()
    }

    fn register(&self, name: &str, below: &str, kind: Kind) -> Result<(), BdevError> {
        let registry = &self.registry;
        let id = match kind {
            Kind::Passthru => registry.register(Arc::new(Passthru::new(registry, name, below, None)?)),
            Kind::Part(shift) => {
                let info = registry.list(Some(below))?.remove(0).info;
                let range = Range { name: name.to_owned(), offset_blocks: shift, num_blocks: info.num_blocks - shift, uuid: None };
                registry.register(Arc::new(Part::cut(registry, below, "split", &[range])?.remove(0)))
            }
            Kind::Delay => registry.register(Arc::new(Delay::new(registry, name, below, None, self.latencies.clone())?)),
            Kind::Error => registry.register(Arc::new(ErrorBdev::new(registry, name, below, None, self.errors.clone())?)),
        }?;
        self.devices.lock().unwrap().insert(name.to_owned(), id);
        Ok(())
    }

    /// Registers what is missing, as far as what is below it is there.
    fn build(&self) -> Result<(), BdevError> {
        passable(self.registry.register(self.base.clone()).map(drop))?;
        let mut below = "base";
        for (name, kind) in &self.floors {
            passable(self.register(name, below, *kind))?;
            below = name;
        }
        Ok(())
    }

    fn inject(&self, rng: &mut Rng) {
        let what = *rng.pick(&[What::Fail(Status::WRITE_FAULT), What::Fail(Status::UNRECOVERED_READ_ERROR), What::Keep, What::PutOff]);
        let ops: Vec<Op> = TARGETS.into_iter().filter(|_| rng.chance(1, 2)).collect();
        self.errors.inject(&ops, what, rng.below(8) as u32, rng.below(4)).unwrap();
    }

    fn resume(&self, ledger: &Obligations) {
        self.errors.resume();
        for device in self.devices.lock().unwrap().values() {
            lifecycle::poke(&self.registry, *device, promise(ledger, |_| true));
        }
    }
}

/// Removes any floor, or the base; resizes the base; changes what is injected.
fn control(tower: Arc<Tower>, allowed: Allowed, ledger: Obligations, mut left: u32) -> impl FnMut(u64, &mut Rng) -> Act {
    move |now_ns, rng| {
        if left == 0 {
            return Act::Done;
        }
        left -= 1;
        let passes = |outcome: &Result<(), BdevError>| outcome.is_ok() || outcome.as_ref().is_err_and(is_going);
        if allowed.removal && rng.chance(1, 3) {
            let floor = rng.below(tower.floors.len() as u64 + 1) as usize;
            let name = if floor == 0 { "base" } else { &tower.floors[floor - 1].0 };
            let again = tower.clone();
            let rebuilt = move |outcome: &Result<(), BdevError>| {
                let built = again.build();
                assert!(passes(&built), "{built:?}");
                passes(outcome)
            };
            lifecycle::unregister(&tower.registry, name, rng.below(300_000), promise(&ledger, rebuilt));
        } else if allowed.resize && rng.chance(1, 2) {
            let blocks = tower.base.info.num_blocks - rng.below(2 * CELL_BLOCKS);
            lifecycle::resize(&tower.registry, "base", blocks, promise(&ledger, passes));
        } else {
            match rng.below(4) {
                0 => tower.latencies.set(*rng.pick(&[Latency::AverageRead, Latency::AverageWrite, Latency::P99Read]), rng.below(500)),
                1 => tower.resume(&ledger),
                2 if allowed.errors => tower.inject(rng),
                _ => tower.errors.clear(),
            }
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

fn run(world: &mut World, plan: Plan, allowed: Allowed) {
    quiet_panics();
    let count = world.reactors();
    let info = random_base(world.rng(), count as u64 * OWN);
    let base = SimDisk::new(info.clone(), plan);
    let tower = Arc::new(Tower::new(world, &base));
    tower.build().unwrap();
    // The client knows what the base can do, and sees the size of the top.
    let seen = Info { num_blocks: info.num_blocks - tower.shift(), ..info };
    let mut crew = Crew::new(world, 1..=1, OWN, Fills::only(0));
    crew.start(world, &tower.registry, &Load { bdev: "disk".to_owned(), info: seen, allowed, ios: 0 }, 10..=40);
    world.add_actor(control(tower.clone(), allowed, world.obligations().clone(), 10));
    world.finish();
    remove(world, &tower.registry, "base");
    assert!(tower.registry.list(None).unwrap().is_empty(), "something still stands");
    base.check_end();
    crew.check_end();
    check_slabs(world);
}

fn scenario(name: &str, seeds: u64, plan: Plan, allowed: Allowed) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        run(&mut world, plan, allowed);
    });
}

#[test]
fn a_tower_gives_what_was_written() {
    let allowed = Allowed { churn: true, aborts: true, resets: true, ..Allowed::default() };
    scenario("vbdev_tower", 500, Plan { delay_ns: 100_000, stall: 20, ..Plan::default() }, allowed);
}

#[test]
fn injected_errors_fail_what_they_meet_and_nothing_else() {
    let allowed = Allowed { errors: true, aborts: true, churn: true, resets: true, ..Allowed::default() };
    scenario("vbdev_errors", 1000, Plan { delay_ns: 100_000, error: 20, stall: 20, panic: 0 }, allowed);
}

#[test]
fn a_base_takes_all_that_stands_on_it_along() {
    let allowed = Allowed { errors: true, aborts: true, removal: true, churn: true, resets: true, ..Allowed::default() };
    scenario("vbdev_removal", 1000, Plan { delay_ns: 100_000, error: 20, stall: 30, panic: 0 }, allowed);
}

#[test]
fn a_base_that_is_resized_tells_those_above() {
    let allowed = Allowed { aborts: true, resize: true, churn: true, ..Allowed::default() };
    scenario("vbdev_resize", 500, Plan { delay_ns: 100_000, stall: 30, ..Plan::default() }, allowed);
}

#[test]
fn a_base_that_panics_fails_its_io_alone() {
    let allowed =
        Allowed { errors: true, aborts: true, removal: true, resize: true, panics: true, resets: true, churn: true, ..Allowed::default() };
    scenario("vbdev_panics", 500, Plan { delay_ns: 100_000, error: 10, stall: 10, panic: 2 }, allowed);
}
