//! The initiator in the simulator: random loads, random schedules, targets on threads and reactors of their own, faithful and not.
//!
//! What is checked: each I/O ends exactly once, whatever the target and the control plane do; data are as written and what
//! should be durable is; the ring's rules are kept towards a target; nobody sleeps while something waits for him; I/Os, channels,
//! pollers, queues and the shared memory are given back.

mod cases;
mod client;
#[path = "../../../vhost/tests/simulation/device.rs"]
mod device;
mod joined;
mod outage;
mod target;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Once, Weak};

use client::{Allowed, CELL_BLOCKS, Client, IOS, Load, Tally};
use qpair_bdev::{BdevError, DeviceId, Info, Layer, Registry, lifecycle};
use qpair_memory::Mapping;
use qpair_reactor::PollerId;
use qpair_reactor::driver::WatchId;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{self, Obligations, Rng, World};
use qpair_virtio::{Link, QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::{BlkFeatures, Config};
use target::{Disk, Manners, OnReactor, SECTOR, Target};
use zerocopy::{FromZeros, IntoBytes};

const MAX_IO: u32 = 4096;
const CELLS: u64 = 3;

/// Features, and a configuration space that goes with them.
fn offer(rng: &mut Rng, bytes: u64) -> (u64, Config) {
    let mut features = Features::VERSION_1.bits();
    let mut maybe = |bit: u64| features |= if rng.chance(1, 2) { bit } else { 0 };
    maybe(Features::INDIRECT_DESC.bits());
    maybe(Features::RING_EVENT_IDX.bits());
    maybe(BlkFeatures::FLUSH.bits());
    maybe(BlkFeatures::DISCARD.bits());
    maybe(BlkFeatures::WRITE_ZEROES.bits());
    maybe(BlkFeatures::SEG_MAX.bits());
    maybe(BlkFeatures::BLK_SIZE.bits());
    let mut config = Config::new_zeroed();
    config.capacity.set(bytes / SECTOR as u64);
    config.blk_size.set(*rng.pick(&[512, 1024, 4096]));
    config.seg_max.set(rng.between(1, 3) as u32);
    config.max_discard_sectors.set(*rng.pick(&[0, 8, 32]));
    config.max_write_zeroes_sectors.set(*rng.pick(&[0, 8, 32]));
    (features, config)
}

/// A bdev over simulated targets, and what must be gone in the end.
struct Scene {
    registry: Arc<Registry>,
    info: Info,
    disk: Rc<RefCell<Disk>>,
    layout: Weak<VirtioLayout>,
    mapping: Weak<Mapping>,
    /// Of each queue: kick and call.
    events: Vec<(Event, Event)>,
    features: u64,
    config: Config,
    device: Option<DeviceId>,
    /// Where targets go and come.
    link: Option<Link>,
    /// Targets that live on reactors.
    hosted: Vec<(usize, PollerId, WatchId)>,
    ledger: Obligations,
    tally: Rc<RefCell<Tally>>,
}

impl Scene {
    fn new(world: &mut World, rng: &mut Rng, queues: usize, manners: &[Manners]) -> Self {
        Self::with_link(world, rng, queues, manners, false)
    }

    fn with_link(world: &mut World, rng: &mut Rng, queues: usize, manners: &[Manners], recovers: bool) -> Self {
        count_panics();
        let clients = world.reactors() as u64 * 2;
        let disk = Rc::new(RefCell::new(Disk { bytes: vec![0; (clients * CELLS * CELL_BLOCKS) as usize * 4096], ..Disk::default() }));
        let (features, config) = offer(rng, disk.borrow().bytes.len() as u64);
        let size = *rng.pick(&[4, 4, 8, 16, 64, 512]);
        let layout = VirtioLayout::new(queues as u32, size, MAX_IO).unwrap();
        let events: Vec<_> = (0..queues).map(|_| (Event::simulated(), Event::simulated())).collect();
        let setup =
            |(kick, call): &(Event, Event)| QueueSetup { size: size as u16, kick: kick.twin().unwrap(), call: call.twin().unwrap() };
        let setups = events.iter().map(setup).collect();
        let device = VirtioBlk::new("v0", layout.clone(), features, config.as_bytes(), setups).unwrap();
        let link = recovers.then(|| device.link());
        let registry = Registry::new(world.handles());
        let device = registry.register(Arc::new(device)).unwrap();
        let info = registry.open("v0", false, |_| {}).unwrap().info().map(|info| Info::clone(&info)).unwrap();
        let mapping = Arc::downgrade(layout.mapping());
        let (ledger, hosted) = (world.obligations().clone(), Vec::new());
        let mut scene = Self {
            registry,
            info,
            disk,
            layout: Arc::downgrade(&layout),
            mapping,
            events,
            features,
            config,
            device: Some(device),
            link,
            hosted,
            ledger,
            tally: Rc::default(),
        };
        scene.connect(world, rng, manners);
        scene
    }

    /// Puts a target on each queue.
    fn connect(&mut self, world: &mut World, rng: &mut Rng, manners: &[Manners]) {
        let Some(layout) = self.layout.upgrade() else { return };
        for (queue, (kick, call)) in self.events.iter().enumerate() {
            let target = Target::new(&layout, queue, self.features, &self.disk, manners[queue % manners.len()], (kick, call));
            if rng.chance(1, 2) {
                world.add_actor(target);
            } else {
                let place = rng.below(world.reactors() as u64) as usize;
                let (poller, watch) = host(world, place, target, rng.fork());
                self.hosted.push((place, poller, watch));
            }
        }
    }

    /// Takes targets off their reactors.
    fn evict(&mut self, world: &mut World) {
        for (place, poller, watch) in self.hosted.drain(..) {
            if world.is_alive(place) {
                world.with(place, |reactor| {
                    reactor.unwatch(watch);
                    reactor.remove_poller(poller);
                });
            }
        }
    }

    fn load(&self, world: &mut World, rng: &mut Rng, allowed: Allowed, ios: u64) {
        for reactor in 0..world.reactors() {
            for client in 0..rng.between(1, 2) {
                let first = (reactor as u64 * 2 + client) * CELLS;
                let cells: Vec<u64> = (first..first + CELLS).collect();
                let ios = rng.between(ios / 2, ios) as u32;
                let load =
                    Load { bdev: "v0", info: self.info.clone(), allowed, ios, disk: Some(self.disk.clone()), tally: self.tally.clone() };
                Client::start(world, reactor, &self.registry, load, &cells);
            }
        }
    }

    fn remove(&self, deadline_ns: u64) {
        remove(&self.registry, "v0", deadline_ns, &self.ledger);
    }

    /// Nothing is left when all is over.
    fn check_end(&mut self, world: &mut World) {
        self.evict(world);
        self.link = None;
        assert!(self.layout.upgrade().is_none() && self.mapping.upgrade().is_none(), "the shared memory is held");
        check_reactors(world);
    }
}

/// Runs a target on a reactor.
fn host(world: &mut World, place: usize, target: Target, rng: Rng) -> (PollerId, WatchId) {
    world.with(place, |reactor| {
        let poller = reactor.reserve_poller("target");
        let watch = reactor.watch(&target.kick(), poller).unwrap();
        let waker = reactor.waker(poller).unwrap();
        reactor.install_poller(poller, Box::new(OnReactor { target, waker, rng, timer_ns: None }));
        (poller, watch)
    })
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// Counts panics from now on. The bdev layer survives those of a module, and says so in the log only.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}

fn check_reactors(world: &mut World) {
    assert_eq!(PANICS.get(), 0, "something panicked and was survived");
    for number in (0..world.reactors()).filter(|number| world.is_alive(*number)).collect::<Vec<_>>() {
        world.with(number, |reactor| {
            let layer = Layer::install(reactor, IOS);
            let (all, free) = layer.borrow().ios();
            assert_eq!(free, all, "I/Os of reactor {number}");
            let left: Vec<_> =
                reactor.stats().pollers.into_iter().map(|poller| poller.name).filter(|name| name.starts_with("bdev_v")).collect();
            assert!(left.is_empty(), "channels of reactor {number}: {left:?}");
        });
    }
}

/// Unregisters, which must succeed, once.
fn remove(registry: &Arc<Registry>, name: &str, deadline_ns: u64, ledger: &Obligations) {
    let (id, ledger) = (ledger.open_next(), ledger.clone());
    let reply = move |outcome: Result<(), BdevError>| {
        // While a failed seed is taken apart its answer is only in the way of the seed's name.
        if !std::thread::panicking() {
            outcome.expect("removed");
            ledger.close(id);
        }
    };
    lifecycle::unregister(registry, name, deadline_ns, Box::new(reply));
}

/// What happened under all seeds.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    seeds: u64,
    done: u64,
    failed: u64,
    lent: u64,
    opened: u64,
    crowded: u64,
    lies: u64,
    silent: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Scenario {
    manners: Manners,
    allowed: Allowed,
    /// Queues may be fewer or more than reactors.
    any_queues: bool,
}

fn run(seed: u64, scenario: &Scenario) -> (Tally, u64, u64) {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let reactors = rng.between(1, 4) as usize;
    let mut world = World::new(seed, reactors);
    let queues = if scenario.any_queues { rng.between(1, 6) as usize } else { reactors };
    let mut scene = Scene::new(&mut world, &mut rng, queues, &[scenario.manners]);
    scene.load(&mut world, &mut rng, scenario.allowed, 40);
    let early = scenario.allowed.removal && !(scenario.allowed.ends && rng.chance(1, 2));
    if early {
        let steps = rng.below(4000);
        world.run_some(steps);
        let deadline_ns = *rng.pick(&[0, 100_000, 3_000_000]);
        scene.remove(deadline_ns);
    }
    if scenario.allowed.ends {
        let steps = rng.below(2000);
        world.run_some(steps);
        let victim = rng.below(reactors as u64) as usize;
        world.handle(victim).stop();
        // A target may have lived there too: then its queue is silent until the device goes.
        world.run_some(rng.between(2000, 10_000));
    } else {
        world.settle();
    }
    if !early {
        scene.remove(if scenario.allowed.ends { 100_000 } else { 0 });
        world.settle();
    }
    assert!(scene.registry.list(None).unwrap().is_empty());
    let (tally, lies, silent) = (*scene.tally.borrow(), scene.disk.borrow().lies, scene.disk.borrow().silent);
    scene.check_end(&mut world);
    world.finish();
    (tally, lies, silent)
}

/// Steps that need not close anything.
trait RunSome {
    fn run_some(&mut self, steps: u64);
}

impl RunSome for World {
    fn run_some(&mut self, steps: u64) {
        for _ in 0..steps {
            if self.step() == sim::Step::Quiet {
                return;
            }
        }
    }
}

fn seeds(name: &str, count: u64, scenario: &Scenario) -> Total {
    let total = Cell::new(Total::default());
    sim::run_seeds(name, count, |seed| {
        let (tally, lies, silent) = run(seed, scenario);
        let was = total.get();
        total.set(Total {
            seeds: was.seeds + 1,
            done: was.done + tally.done,
            failed: was.failed + tally.failed,
            lent: was.lent + tally.lent,
            opened: was.opened + tally.opened,
            crowded: was.crowded + tally.crowded,
            lies: was.lies + lies,
            silent: was.silent + silent,
        });
    });
    let total = total.get();
    eprintln!("simulation {name}: {total:?}");
    // A test that looks at nothing is none; one seed alone may.
    assert!(total.seeds < 100 || total.done > 15 * total.seeds, "{total:?}");
    total
}

const NONE: Manners = Manners { fails: 0, shorts: 0, mutes: 0, deaths: 0, blatant: 0, sly: 0 };
const QUIET: Allowed = Allowed {
    fails: false,
    shorts: false,
    lies: false,
    aborts: false,
    resets: false,
    removal: false,
    churn: false,
    ends: false,
    outages: false,
};

#[test]
fn a_faithful_target_gives_what_was_written_and_each_io_ends_once() {
    let total = seeds("virtio", 400, &Scenario::default());
    assert!(total.seeds < 100 || (total.failed < total.done / 4 && total.lent > total.done / 4), "{total:?}");
}

#[test]
fn channels_come_and_go_and_their_queues_go_on_where_they_were() {
    let allowed = Allowed { churn: true, aborts: true, resets: true, ..QUIET };
    let total = seeds("virtio-churn", 350, &Scenario { allowed, any_queues: true, ..Scenario::default() });
    assert!(total.seeds < 100 || (total.opened > 3 * total.seeds && total.crowded > 0), "{total:?}");
}

#[test]
fn errors_and_short_answers_are_those_of_their_io_alone() {
    let manners = Manners { fails: 50, shorts: 30, ..NONE };
    let allowed = Allowed { fails: true, shorts: true, aborts: true, resets: true, churn: true, ..QUIET };
    seeds("virtio-errors", 300, &Scenario { manners, allowed, any_queues: true });
}

#[test]
fn a_removal_with_io_in_flight_loses_none() {
    let allowed = Allowed { removal: true, aborts: true, churn: true, ..QUIET };
    seeds("virtio-removal", 300, &Scenario { allowed, any_queues: true, ..Scenario::default() });
}

#[test]
fn a_target_that_falls_silent_is_given_up_with_its_device() {
    let manners = Manners { mutes: 10, deaths: 10, ..NONE };
    let allowed = Allowed { removal: true, aborts: true, churn: true, ..QUIET };
    let total = seeds("virtio-silent", 300, &Scenario { manners, allowed, any_queues: true });
    assert!(total.seeds < 100 || total.silent > total.seeds / 4, "{total:?}");
}

#[test]
fn a_reset_that_waits_for_a_silent_target_does_not_hold_up_the_removal() {
    let manners = Manners { mutes: 10, deaths: 10, ..NONE };
    let allowed = Allowed { removal: true, resets: true, aborts: true, churn: true, ..QUIET };
    seeds("virtio-silent-reset", 300, &Scenario { manners, allowed, any_queues: true });
}

#[test]
fn a_lie_that_cannot_be_overlooked_fails_the_device_without_anybodys_help() {
    let manners = Manners { blatant: 15, ..NONE };
    let allowed = Allowed { lies: true, aborts: true, resets: true, churn: true, ..QUIET };
    let total = seeds("virtio-liar", 300, &Scenario { manners, allowed, any_queues: true });
    assert!(total.seeds < 100 || (total.lies > total.seeds / 4 && total.failed > total.seeds), "{total:?}");
}

#[test]
fn whatever_a_target_does_each_io_ends_once() {
    let manners = Manners { fails: 20, shorts: 10, mutes: 5, deaths: 3, blatant: 3, sly: 40 };
    let allowed = Allowed { fails: true, shorts: true, lies: true, aborts: true, resets: true, removal: true, churn: true, ..QUIET };
    let total = seeds("virtio-unruly", 500, &Scenario { manners, allowed, any_queues: true });
    assert!(total.seeds < 100 || total.lies > total.seeds / 4, "{total:?}");
}

#[test]
fn a_reactor_that_ends_with_io_in_flight_leaves_the_others_to_theirs() {
    let allowed = Allowed { ends: true, aborts: true, lies: true, removal: true, ..QUIET };
    seeds("virtio-ends", 250, &Scenario { allowed, ..Scenario::default() });
}
