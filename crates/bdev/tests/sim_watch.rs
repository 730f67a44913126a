//! Time-outs and queue depth on the simulator's clock: who is told of what, when, and how often.

use std::sync::{Arc, Mutex};

use qpair_bdev::layer::watch::{Late, Sampled};
use qpair_bdev::measures;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::stats::Reset;
use qpair_bdev::{ChannelId, Descriptor, Info, IoId, Layer, Op, QueueId, Registry, Status, lifecycle};
use qpair_reactor::sim::{self, World};
use qpair_reactor::{Poller, Reactor};
use qpair_simkit::{Plan, SimDisk, check_slabs};

const MS: u64 = 1_000_000;

struct Nobody;

impl Poller for Nobody {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

/// A world with a device that finishes nothing until it is asked to abort, and something upon it.
fn stalled(seed: u64) -> (World, Arc<Registry>) {
    let world = World::new(seed, 2);
    let registry = Registry::new(world.handles());
    let mut info = Info::new("base", "sim", 512, 1024);
    info.supported = qpair_bdev::OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset]);
    info.write_cache = true;
    registry.register(SimDisk::new(info, Plan { stall: 1000, ..Plan::default() })).unwrap();
    registry.register(Arc::new(Passthru::new(&registry, "disk", "base", None).unwrap())).unwrap();
    (world, registry)
}

struct User {
    descriptor: Descriptor,
    channel: ChannelId,
    queue: QueueId,
}

fn user(world: &mut World, registry: &Arc<Registry>) -> User {
    let descriptor = registry.open("disk", false, |_| {}).unwrap();
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.add_poller("user", Box::new(Nobody));
        let queue = layer.add_queue_for(reactor.waker(poller).unwrap(), &descriptor);
        let channel = descriptor.channel(reactor, &mut layer).unwrap();
        User { descriptor, channel, queue }
    })
}

fn flush(world: &mut World, user: &User) -> IoId {
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let id = layer.take().unwrap();
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (Op::Flush, 0, 0);
        io.push(user.queue, 7);
        layer.submit(reactor, user.channel, &[id]);
        layer.unplug(reactor);
        id
    })
}

fn reap(world: &mut World, user: &User) -> Vec<(IoId, Status)> {
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, user.queue, &mut reaped);
        reaped.into_iter().map(|id| (id, layer.finish(id).1)).collect()
    })
}

fn end(mut world: World, registry: &Arc<Registry>, users: Vec<User>) {
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        for user in &users {
            let mut layer = layer.borrow_mut();
            layer.close_channel(reactor, user.channel);
            layer.remove_queue(user.queue);
        }
    });
    drop(users);
    lifecycle::unregister(registry, "base", 0, Box::new(|outcome| outcome.unwrap()));
    world.finish();
    check_slabs(&mut world);
}

#[test]
fn a_late_io_is_told_once_in_each_timeout_and_only_to_its_descriptor() {
    sim::run_seeds("timeouts", 100, |seed| {
        let (mut world, registry) = stalled(seed);
        let (mine, other) = (user(&mut world, &registry), user(&mut world, &registry));
        let told: Arc<Mutex<Vec<Late>>> = Arc::default();
        let seen = told.clone();
        mine.descriptor.set_timeout(10 * MS, move |_, _, late| seen.lock().unwrap().push(late));
        other.descriptor.set_timeout(500 * MS, |_, _, late| panic!("told of {late:?}"));
        let (id, _) = (flush(&mut world, &mine), flush(&mut world, &other));
        let begun_ns = world.now_ns();
        world.run_until("a while", 5_000_000, |world| world.now_ns() > begun_ns + 55 * MS);
        let ages: Vec<u64> = told.lock().unwrap().iter().map(|late| late.age_ns / MS).collect();
        assert_eq!(ages.len(), 5, "{ages:?}");
        for (number, age_ms) in (1..).zip(&ages) {
            assert!((number * 10..number * 10 + 6).contains(age_ms), "{ages:?}");
        }
        assert!(told.lock().unwrap().iter().all(|late| (late.id, late.op, late.tag) == (id, Op::Flush, 7)));
        mine.descriptor.set_timeout(0, |_, _, _| {});
        other.descriptor.set_timeout(0, |_, _, _| {});
        end(world, &registry, vec![mine, other]);
    });
}

#[test]
fn who_is_told_may_abort() {
    sim::run_seeds("timeout_aborts", 200, |seed| {
        let (mut world, registry) = stalled(seed);
        let mine = user(&mut world, &registry);
        mine.descriptor.set_timeout(5 * MS, |layer, reactor, late| layer.abort(reactor, late.id));
        let ids: Vec<IoId> = (0..8).map(|_| flush(&mut world, &mine)).collect();
        let mut ended = Vec::new();
        world.run_until("all have ended", 5_000_000, |world| {
            ended.extend(reap(world, &mine));
            ended.len() == ids.len()
        });
        assert!(ended.iter().all(|(id, status)| ids.contains(id) && *status == Status::ABORT_REQUESTED), "{ended:?}");
        mine.descriptor.set_timeout(0, |_, _, _| {});
        end(world, &registry, vec![mine]);
    });
}

#[test]
fn a_descriptor_that_is_dropped_takes_its_timeout_along() {
    let (mut world, registry) = stalled(1);
    let mine = user(&mut world, &registry);
    mine.descriptor.set_timeout(5 * MS, |_, _, late| panic!("told of {late:?}"));
    // Its timers are gone: else the world would never come to rest.
    end(world, &registry, vec![mine]);
}

fn sampled(world: &mut World, registry: &Arc<Registry>) -> Option<Sampled> {
    let got: Arc<Mutex<Option<measures::Report>>> = Arc::default();
    let reply = got.clone();
    measures::statistics(registry, "disk", Reset::None, Box::new(move |outcome| *reply.lock().unwrap() = Some(outcome.unwrap())));
    world.run_until("figures", 5_000_000, |_| got.lock().unwrap().is_some());
    got.lock().unwrap().take().unwrap().sampled
}

#[test]
fn queue_depth_counts_time_as_spdk_does() {
    sim::run_seeds("sampling", 100, |seed| {
        let (mut world, registry) = stalled(seed);
        let mine = user(&mut world, &registry);
        assert_eq!(sampled(&mut world, &registry), None);
        measures::set_sampling(&registry, "disk", 1000).unwrap();
        let begun_ns = world.now_ns();
        world.run_until("a while of nothing", 5_000_000, |world| world.now_ns() > begun_ns + 20 * MS);
        let idle = sampled(&mut world, &registry).unwrap();
        assert_eq!(idle, Sampled { period_us: 1000, depth: 0, io_time_us: 0, weighted_io_time_us: 0 });
        let begun_ns = world.now_ns();
        for _ in 0..3 {
            flush(&mut world, &mine);
        }
        world.run_until("a while of three", 5_000_000, |world| world.now_ns() > begun_ns + 50 * MS);
        let busy = sampled(&mut world, &registry).unwrap();
        assert_eq!((busy.period_us, busy.depth), (1000, 3));
        assert!((45_000..=55_000).contains(&busy.io_time_us), "{busy:?}");
        assert_eq!(busy.weighted_io_time_us, 3 * busy.io_time_us);
        measures::set_sampling(&registry, "disk", 0).unwrap();
        assert_eq!(sampled(&mut world, &registry), None);
        end(world, &registry, vec![mine]);
    });
}
