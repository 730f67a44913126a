//! Random towers of passthrus, parts, delays and error bdevs under random schedules: latencies and injected errors change, any of them is removed or
//! its base resized at any time, and still each I/O ends once, data are as written, and nothing is left behind.

mod common;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::client::{Allowed, CELL_BLOCKS, Client};
use common::{Plan, SimDevice, quiet_panics};
use qpair_bdev::passthru::Passthru;
use qpair_bdev::{BdevError, DeviceId, FRAMES_MAX, Info, Layer, Op, OpSet, Registry, Status, lifecycle};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_vbdev::delay::{Delay, Latencies, Latency};
use qpair_vbdev::error::{ErrorBdev, Errors, TARGETS, What};
use qpair_vbdev::part::{Part, Range};

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
    base: Arc<SimDevice>,
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

fn is_going(error: &BdevError) -> bool {
    matches!(error, BdevError::NoSuchBdev(_) | BdevError::Removing(_))
}

impl Tower {
    fn new(world: &mut World, base: &Arc<SimDevice>) -> Self {
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
            let (id, book) = (ledger.open_next(), ledger.clone());
            lifecycle::poke(&self.registry, *device, Box::new(move |_| book.close(id)));
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
        let (id, book, again) = (ledger.open_next(), ledger.clone(), tower.clone());
        if allowed.removal && rng.chance(1, 3) {
            let floor = rng.below(tower.floors.len() as u64 + 1) as usize;
            let name = if floor == 0 { "base" } else { &tower.floors[floor - 1].0 };
            let reply = move |outcome: Result<(), BdevError>| {
                assert!(outcome.is_ok() || outcome.as_ref().is_err_and(is_going), "{outcome:?}");
                let built = again.build();
                assert!(built.is_ok() || built.as_ref().is_err_and(is_going), "{built:?}");
                book.close(id);
            };
            lifecycle::unregister(&tower.registry, name, rng.below(300_000), Box::new(reply));
        } else if allowed.resize && rng.chance(1, 2) {
            let blocks = tower.base.info.num_blocks - rng.below(2 * CELL_BLOCKS);
            let reply = move |outcome: Result<(), BdevError>| {
                assert!(outcome.is_ok() || outcome.as_ref().is_err_and(is_going), "resize to {blocks}: {outcome:?}");
                book.close(id);
            };
            lifecycle::resize(&tower.registry, "base", blocks, Box::new(reply));
        } else {
            book.close(id);
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

fn random_base(rng: &mut Rng, cells: u64) -> Info {
    // Room for what the floors leave out at the start, and for resizing.
    let mut info = Info::new("base", "sim", 512, cells * CELL_BLOCKS + 64);
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
    let info = random_base(world.rng(), count as u64 * 3);
    let base = SimDevice::new(info.clone(), plan);
    let tower = Arc::new(Tower::new(world, &base));
    tower.build().unwrap();
    // The client knows what the base can do, and sees the size of the top.
    let seen = Info { num_blocks: info.num_blocks - tower.shift(), ..info };
    let memories: Vec<_> = (0..count)
        .map(|reactor| {
            let own: Vec<u64> = (0..3).map(|cell| reactor as u64 * 3 + cell).collect();
            let ios = world.rng().between(10, 40) as u32;
            Client::start(world, reactor, &tower.registry, &seen, allowed, &own, ios)
        })
        .collect();
    let ledger = world.obligations().clone();
    world.add_actor(control(tower.clone(), allowed, ledger.clone(), 10));
    world.finish();
    let id = ledger.open_next();
    let reply = move |outcome: Result<(), BdevError>| {
        outcome.unwrap();
        ledger.close(id);
    };
    lifecycle::unregister(&tower.registry, "base", 0, Box::new(reply));
    world.finish();
    assert!(tower.registry.list(None).unwrap().is_empty(), "something still stands");
    let broken = base.shared.broken.lock().unwrap().clone();
    assert!(broken.is_empty(), "{broken:?}");
    assert_eq!(base.shared.channels.load(Ordering::SeqCst), 0, "channels leaked");
    assert_eq!(base.shared.inflight.load(Ordering::SeqCst), 0);
    for reactor in 0..count {
        let (all, free) = world.with(reactor, |reactor| Layer::of(reactor).borrow().ios());
        assert_eq!(all, free, "I/Os leaked on reactor {reactor}");
    }
    assert!(memories.iter().all(|memory| memory.upgrade().is_none()), "memory is still held");
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
