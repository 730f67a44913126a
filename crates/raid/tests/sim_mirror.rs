//! Mirrors under random schedules: legs fail, hang, go and come back at any time, the power goes at any step, and still an acknowledged write is never
//! lost and never read stale, and each I/O ends once.

mod common {
    pub mod client;
    pub mod leg;
}

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::client::{Allowed, CELL, Client, Model};
use common::leg::Disk;
use qpair_bdev::{BdevError, Layer, Registry, lifecycle};
use qpair_raid::{Level, Options, Phase, Raids, Spec};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};

const OFFSET: u64 = 2048;
const CELLS: u64 = 3;

/// What happens to legs.
#[derive(Clone, Copy, Default)]
struct Trouble {
    write_errors: bool,
    read_errors: bool,
    removal: bool,
    hangs: bool,
    crashes: bool,
    cached: bool,
    superblock: bool,
    resets: bool,
}

struct Rig {
    disks: Vec<Arc<Disk>>,
    models: Vec<Arc<Mutex<Model>>>,
    trouble: Trouble,
}

struct Stage {
    registry: Arc<Registry>,
    raids: Arc<Raids>,
    disks: Vec<Arc<Disk>>,
}

impl Rig {
    fn new(world: &mut World, trouble: Trouble) -> Self {
        let (legs, reactors) = (world.rng().between(2, 3) as u8, world.reactors() as u64);
        let blocks = OFFSET * u64::from(trouble.superblock) + reactors * CELLS * CELL;
        let delay_ns = *world.rng().pick(&[0, 20_000, 200_000]);
        let disk = |number: u8| {
            Disk::new(&format!("leg{number}"), number, blocks + u64::from(number), trouble.cached, delay_ns, Rng::new(number.into()))
        };
        let disks = (0..legs).map(disk).collect();
        let models = (0..reactors).map(|reactor| Model::new(reactor * CELLS * CELL, CELLS * CELL)).collect();
        Self { disks, models, trouble }
    }

    fn stage(&self, world: &World) -> Arc<Stage> {
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        raids.set_options(Options { window_kb: 4, bandwidth_mb: 0 }).unwrap();
        Arc::new(Stage { registry, raids, disks: self.disks.clone() })
    }
}

impl Stage {
    /// A leg appears, and is examined.
    fn appear(&self, number: usize, ledger: &Obligations) {
        if self.registry.register(self.disks[number].device()).is_err() {
            return;
        }
        let (id, book) = (ledger.open_next(), ledger.clone());
        self.raids.examine(&format!("leg{number}"), Box::new(move |_| book.close(id)));
    }

    fn phase(&self) -> Option<Phase> {
        self.raids.list().first().map(|array| array.phase)
    }
}

fn create(world: &mut World, stage: &Stage, superblock: bool) {
    for disk in &stage.disks {
        stage.registry.register(disk.device()).unwrap();
    }
    let bases = stage.disks.iter().map(|disk| disk.info.name.clone()).collect();
    let spec = Spec { name: "mirror".to_owned(), level: Level::RAID1, strip_kb: 0, bases, uuid: None, superblock };
    let ledger = world.obligations().clone();
    let id = ledger.open_next();
    let reply = move |outcome: Result<(), BdevError>| {
        outcome.unwrap();
        ledger.close(id);
    };
    stage.raids.create(spec, Box::new(reply));
    world.settle();
    assert_eq!(stage.phase(), Some(Phase::Online));
}

/// One thing to one leg.
fn torment(stage: &Stage, trouble: Trouble, ledger: &Obligations, rng: &mut Rng) {
    let number = rng.below(stage.disks.len() as u64) as usize;
    let (disk, name) = (&stage.disks[number], format!("leg{number}"));
    let closes = || {
        let (id, book) = (ledger.open_next(), ledger.clone());
        Box::new(move |_: Result<(), BdevError>| book.close(id))
    };
    // One leg at a time is ill: an array all of whose legs fail has nothing to promise.
    let others_well = stage.disks.iter().enumerate().all(|(other, disk)| {
        other == number
            || disk.write_errors.load(Ordering::SeqCst) + disk.read_errors.load(Ordering::SeqCst) == 0 && !disk.hangs.load(Ordering::SeqCst)
    });
    match rng.below(8) {
        0 if trouble.write_errors && others_well => disk.write_errors.store(*rng.pick(&[30, 300, 1000]), Ordering::SeqCst),
        1 if trouble.read_errors && others_well => disk.read_errors.store(*rng.pick(&[30, 300, 1000]), Ordering::SeqCst),
        2 if trouble.hangs && others_well => disk.hangs.store(true, Ordering::SeqCst),
        3 | 4 => disk.heal(),
        5 if trouble.removal && others_well => {
            disk.hangs.store(false, Ordering::SeqCst);
            lifecycle::unregister(&stage.registry, &name, rng.below(300_000), closes());
        }
        6 if trouble.removal => stage.raids.remove_base(&name, closes()),
        6 | 7 => {
            stage.appear(number, ledger);
            stage.raids.add_base("mirror", &name, closes());
        }
        _ => {}
    }
}

fn controller(stage: Arc<Stage>, trouble: Trouble, ledger: Obligations, mut left: u32) -> impl FnMut(u64, &mut Rng) -> Act {
    move |now_ns, rng| {
        if left == 0 {
            // What hangs ends when it is removed; everything else goes on.
            for (number, disk) in stage.disks.iter().enumerate() {
                if disk.hangs.swap(false, Ordering::SeqCst) {
                    let (id, book) = (ledger.open_next(), ledger.clone());
                    lifecycle::unregister(&stage.registry, &format!("leg{number}"), 0, Box::new(move |_| book.close(id)));
                }
                disk.heal();
            }
            return Act::Done;
        }
        left -= 1;
        torment(&stage, trouble, &ledger, rng);
        Act::Until(now_ns + rng.below(400_000))
    }
}

fn clients(world: &mut World, rig: &Rig, stage: &Arc<Stage>, removal: bool) {
    let Trouble { write_errors, hangs, resets, cached, removal: removes, .. } = rig.trouble;
    // With hangs and removals all of a write's legs may go under it; what two ill legs do to one write is told as its error.
    let errors = write_errors || hangs || removes;
    let allowed = Allowed { errors, resets, removal: removal || removes || hangs, cached };
    for (reactor, model) in rig.models.iter().enumerate() {
        let ios = world.rng().between(20, 60) as u32;
        Client::start(world, reactor, &stage.registry, "mirror", model, allowed, ios);
    }
    let (ledger, left) = (world.obligations().clone(), world.rng().between(2, 12) as u32);
    world.add_actor(controller(stage.clone(), rig.trouble, ledger, left));
}

/// After a crash: legs appear in any order, perhaps one of them later than all the others.
fn assemble(world: &mut World, stage: &Arc<Stage>) {
    let mut order: Vec<usize> = (0..stage.disks.len()).collect();
    world.rng().shuffle(&mut order);
    let ledger = world.obligations().clone();
    for number in order {
        stage.disks[number].heal();
        stage.disks[number].hangs.store(false, Ordering::SeqCst);
        stage.appear(number, &ledger);
        if world.rng().chance(1, 2) {
            world.settle();
        }
    }
    world.settle();
    assert_eq!(stage.phase(), Some(Phase::Online), "all legs are there: {:?}", stage.raids.list());
}

fn demolish(world: &mut World, stage: &Arc<Stage>) {
    let ledger = world.obligations().clone();
    let id = ledger.open_next();
    stage.raids.delete("mirror", false, Box::new(move |_| ledger.close(id)));
    world.settle();
    for disk in &stage.disks {
        let ledger = world.obligations().clone();
        let id = ledger.open_next();
        lifecycle::unregister(&stage.registry, &disk.info.name, 0, Box::new(move |_| ledger.close(id)));
    }
    world.finish();
    assert!(stage.raids.list().is_empty() && stage.registry.list(None).unwrap().is_empty(), "something still stands");
    for reactor in 0..world.reactors() {
        let (all, free) = world.with(reactor, |reactor| Layer::of(reactor).borrow().ios());
        assert_eq!(all, free, "I/Os leaked on reactor {reactor}");
    }
}

/// Reads everything, often enough that each leg is read.
fn verify(world: &mut World, rig: &Rig, stage: &Arc<Stage>) {
    let calm = Allowed { cached: rig.trouble.cached, ..Allowed::default() };
    for (reactor, model) in rig.models.iter().enumerate() {
        Client::start(world, reactor, &stage.registry, "mirror", model, calm, 40);
    }
    world.settle();
}

fn run(seed: u64, trouble: Trouble, reads: &AtomicU64) {
    let reactors = 1 + (seed % 3) as usize;
    let mut world = World::new(seed, reactors);
    let rig = Rig::new(&mut world, trouble);
    let mut stage = rig.stage(&world);
    create(&mut world, &stage, trouble.superblock);
    let generations = if trouble.crashes { world.rng().between(1, 4) } else { 0 };
    for generation in 0..generations {
        clients(&mut world, &rig, &stage, false);
        let steps = world.rng().below(3000);
        world.run(steps);
        world.kill();
        world.obligations().abandon_open();
        rig.disks.iter().for_each(|disk| disk.crash());
        rig.models.iter().for_each(|model| model.lock().unwrap().crash());
        world = World::new(seed ^ (generation + 1) << 32, reactors);
        stage = rig.stage(&world);
        assemble(&mut world, &stage);
        verify(&mut world, &rig, &stage);
    }
    clients(&mut world, &rig, &stage, false);
    world.settle();
    if stage.phase() == Some(Phase::Online) {
        verify(&mut world, &rig, &stage);
    }
    demolish(&mut world, &stage);
    reads.fetch_add(rig.models.iter().map(|model| model.lock().unwrap().reads).sum(), Ordering::Relaxed);
}

fn scenario(name: &str, seeds: u64, trouble: Trouble) {
    let reads = AtomicU64::new(0);
    sim::run_seeds(name, seeds, |seed| run(seed, trouble, &reads));
    assert!(reads.load(Ordering::Relaxed) > 0, "nothing was ever read");
}

#[test]
fn a_mirror_gives_what_was_written() {
    scenario("mirror", 100, Trouble { resets: true, ..Trouble::default() });
}

#[test]
fn a_leg_that_fails_is_dropped_and_rebuilt() {
    scenario(
        "mirror_failing",
        200,
        Trouble { write_errors: true, read_errors: true, superblock: true, resets: true, ..Trouble::default() },
    );
}

#[test]
fn legs_come_and_go() {
    let trouble = Trouble { write_errors: true, read_errors: true, removal: true, hangs: true, resets: true, ..Trouble::default() };
    scenario("mirror_removal", 200, trouble);
}

#[test]
fn an_acknowledged_write_outlives_crashes() {
    let trouble = Trouble { write_errors: true, read_errors: true, removal: true, crashes: true, superblock: true, ..Trouble::default() };
    scenario("mirror_crash", 250, trouble);
}

#[test]
fn a_flushed_write_outlives_power_cuts() {
    let trouble = Trouble {
        write_errors: true,
        read_errors: true,
        removal: true,
        crashes: true,
        superblock: true,
        cached: true,
        ..Trouble::default()
    };
    scenario("mirror_power_cut", 250, trouble);
}
