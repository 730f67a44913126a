//! Sessions in the simulator: random guests, random schedules, a disk that delays, reorders, fails and vanishes.
//!
//! What is checked: each request gets exactly one used entry, or its queue failed or was left; GET_VRING_BASE is what was taken,
//! and all of it is answered, also while rings move between reactors; memory is let go of before the answer that promises it; I/Os, channels and pollers are given
//! back; a successor answers what a killed device left in the inflight region, each once.

#[path = "../guest/mod.rs"]
mod guest;

mod cases;
mod device;
mod guest_actor;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use device::{Manners, Slow};
use guest::Kind;
use guest_actor::{Guest, SLOTS};
use qpair_bdev::{Layer, Registry, lifecycle};
use qpair_memory::{Mapping, Pages};
use qpair_reactor::sim::{self, Rng, World};
use qpair_vhost::{Failure, Options, Target};

const BLOCKS: u64 = 4096;

struct Side {
    target: Arc<Target>,
    registry: Arc<Registry>,
    device: Arc<Slow>,
    failures: Arc<Mutex<Vec<Failure>>>,
}

/// A device's process: its registry, its disk, its target with one controller.
fn serve(world: &mut World, queues: usize, manners: Manners, disk: &Arc<Mapping>) -> Side {
    let registry = Registry::new(world.handles());
    let device = Arc::new(Slow::new("disk", BLOCKS, manners, Some(disk.clone())));
    registry.register(device.clone()).unwrap();
    let failures = Arc::new(Mutex::new(Vec::new()));
    let heard = failures.clone();
    let target = Target::new(registry.clone(), move |failure| heard.lock().unwrap().push(failure));
    target.create("vd", "disk", world.handles(), Options { packed_ring: true, num_queues: queues as u32, ..Options::default() }).unwrap();
    // A disk that never stalls is given all the time that a resize on four reactors may take: none of its requests may be aborted.
    let drain_ns = if manners.stalls > 0 { 2_000_000 } else { 500_000_000 };
    target.set_drain_ns("vd", drain_ns).unwrap();
    Side { target, registry, device, failures }
}

/// Nothing is left when all is over.
fn check_end(world: &mut World, side: &Side) {
    assert_eq!(side.device.held.load(Ordering::Relaxed), 0, "I/Os with the device");
    assert_eq!(side.device.channels.load(Ordering::Relaxed), 0, "open channels");
    for number in 0..world.reactors() {
        world.with(number, |reactor| {
            let layer = Layer::of(reactor);
            let (all, free) = layer.borrow().ios();
            assert_eq!(free, all, "I/Os of reactor {number}");
            let left: Vec<_> =
                reactor.stats().pollers.into_iter().map(|poller| poller.name).filter(|name| name.starts_with("vhost")).collect();
            assert!(left.is_empty(), "pollers of reactor {number}: {left:?}");
        });
    }
}

fn act(world: &mut World, guest: &Rc<RefCell<Guest>>) {
    let guest = guest.clone();
    world.add_actor(move |now_ns: u64, rng: &mut Rng| guest.borrow_mut().act(now_ns, rng));
}

/// What happened under all seeds.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    seeds: u64,
    answered: u64,
    /// Rings that failed by name.
    broken: u64,
    kills: u64,
    /// Requests unanswered when the device was killed.
    left: u64,
}

impl std::ops::Add for Total {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            seeds: self.seeds + other.seeds,
            answered: self.answered + other.answered,
            broken: self.broken + other.broken,
            kills: self.kills + other.kills,
            left: self.left + other.left,
        }
    }
}

/// A job must succeed; but while a failed seed is taken apart its answer is only in the way of the seed's name.
fn said(outcome: Result<(), qpair_bdev::BdevError>, what: &str) {
    if !std::thread::panicking() {
        outcome.expect(what);
    }
}

struct Scenario {
    manners: Manners,
    remove: bool,
    resize: bool,
    kills: u64,
}

fn run(seed: u64, kind: Kind, scenario: &Scenario) -> Total {
    let mut total = Total { seeds: 1, ..Total::default() };
    let mut rng = Rng::new(seed ^ 0x5eed);
    let (reactors, queues) = (rng.between(1, 4) as usize, rng.between(1, 3) as usize);
    let disk = Mapping::anonymous((BLOCKS * 512) as usize, Pages::Normal).unwrap();
    assert!((queues * SLOTS * 16) as u64 <= BLOCKS);
    let mut world = World::new(seed, reactors);
    let mut side = serve(&mut world, queues, scenario.manners, &disk);
    let faithful = scenario.manners.fails + scenario.manners.stalls == 0;
    let mut guest = Guest::new(side.target.clone(), side.failures.clone(), &mut rng, kind, queues, 40, faithful);
    guest.reactors = world.handles();
    guest.stalls = scenario.manners.stalls > 0;
    let guest = Rc::new(RefCell::new(guest));
    act(&mut world, &guest);
    for kill in 0..rng.below(scenario.kills + 1) {
        let steps = rng.below(1500);
        world.run(steps);
        if !guest.borrow().survives_crashes() {
            continue;
        }
        world.kill();
        total.kills += 1;
        total.left += guest.borrow().outstanding() as u64;
        total.broken += side.failures.lock().unwrap().len() as u64;
        drop(side);
        world = World::new(seed.wrapping_add(kill + 1), reactors);
        side = serve(&mut world, queues, scenario.manners, &disk);
        guest.borrow_mut().crashed(side.target.clone(), side.failures.clone(), world.handles());
        act(&mut world, &guest);
    }
    if scenario.resize {
        let steps = rng.below(1000);
        world.run(steps);
        for blocks in [BLOCKS * 2, BLOCKS] {
            lifecycle::resize(&side.registry, "disk", blocks, Box::new(|outcome| said(outcome, "resized")));
        }
    }
    if scenario.remove {
        let steps = rng.below(1500);
        world.run(steps);
        guest.borrow_mut().removed = true;
        lifecycle::unregister(&side.registry, "disk", 3_000_000, Box::new(|outcome| said(outcome, "removed")));
    }
    world.settle();
    assert!(guest.borrow().is_over(), "the guest waits in vain: {}", guest.borrow().state());
    assert!(guest.borrow().views_gone(), "guest memory is held");
    check_end(&mut world, &side);
    world.finish();
    total.answered = guest.borrow().answered;
    total.broken += side.failures.lock().unwrap().len() as u64;
    total
}

const FAITHFUL: Scenario = Scenario { manners: Manners { fails: 0, stalls: 0 }, remove: false, resize: false, kills: 0 };
const UNRULY: Manners = Manners { fails: 30, stalls: 20 };

fn seeds(name: &str, count: u64, scenario: &Scenario) {
    seeds_of(Kind::Split, name, count, scenario);
    seeds_of(Kind::Packed, &format!("{name}-packed"), count, scenario);
}

fn seeds_of(kind: Kind, name: &str, count: u64, scenario: &Scenario) {
    let total = std::cell::Cell::new(Total::default());
    sim::run_seeds(name, count, |seed| total.set(total.get() + run(seed, kind, scenario)));
    let total = total.get();
    eprintln!("simulation {name}: {total:?}");
    if count <= total.seeds {
        // Else the test looks at nothing.
        assert!(total.answered > 10 * count && total.broken > count / 10, "{total:?}");
        assert!(scenario.kills == 0 || (total.kills > count / 10 && total.left > count / 10), "{total:?}");
    }
}

#[test]
fn a_faithful_disk_answers_each_request_once_whatever_the_front_end_does() {
    seeds("vhost", 800, &FAITHFUL);
}

#[test]
fn a_disk_that_fails_and_stalls_answers_each_request_once() {
    seeds("vhost-unruly", 500, &Scenario { manners: UNRULY, ..FAITHFUL });
}

#[test]
fn a_bdev_that_is_resized_and_removed_loses_no_request() {
    seeds("vhost-removal", 500, &Scenario { remove: true, resize: true, ..FAITHFUL });
    seeds("vhost-removal-unruly", 300, &Scenario { manners: UNRULY, remove: true, ..FAITHFUL });
}

#[test]
fn a_successor_answers_what_a_killed_device_left_each_once() {
    seeds("vhost-kill", 800, &Scenario { kills: 3, ..FAITHFUL });
    seeds("vhost-kill-unruly", 400, &Scenario { manners: UNRULY, kills: 3, ..FAITHFUL });
}
