//! Limits under random schedules: never above the rate, never below it while somebody wants more, on however many reactors; and whatever
//! happens to I/O that waits for its turn, it ends once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use qpair_bdev::histogram::{GRANULARITY, Shape};
use qpair_bdev::limit::{BURST_NS, Rates, SLICE_NS};
use qpair_bdev::passthru::Passthru;
use qpair_bdev::stats::Reset;
use qpair_bdev::{
    BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, OpSet, QueueId, Registry, Status, lifecycle, measures,
};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_reactor::{Poller, Reactor};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Plan, SimDisk, check_slabs, quiet_panics, remove};

const MS: u64 = 1_000_000;
const BLOCKS_MAX: u64 = 64;
/// Blocks of each client that does anything.
const OWN: u64 = 3 * CELL_BLOCKS;

/// What came to a device: when, on which reactor, and what.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at_ns: u64,
    reactor: u32,
    op: Op,
    blocks: u64,
}

/// Does nothing, at once, and keeps a record.
struct Recorder {
    info: Info,
    seen: Arc<Mutex<Vec<Seen>>>,
}

struct RecorderChannel {
    id: ChannelId,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Recorder {
    fn register(registry: &Arc<Registry>, name: &str, max_io_blocks: u32, queue_depth: u32) -> Arc<Mutex<Vec<Seen>>> {
        let mut info = Info::new(name, "recorder", 512, 1 << 20);
        (info.max_io_blocks, info.queue_depth) = (max_io_blocks, queue_depth);
        let seen = Arc::new(Mutex::default());
        registry.register(Arc::new(Self { info, seen: Arc::clone(&seen) })).unwrap();
        seen
    }
}

impl Device for Recorder {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(RecorderChannel { id, seen: self.seen.clone() }))
    }
}

impl Channel for RecorderChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let mut seen = self.seen.lock().unwrap();
        for id in batch {
            let io = layer.io(*id);
            seen.push(Seen { at_ns: reactor.now_ns(), reactor: reactor.id().0, op: io.op, blocks: io.blocks });
        }
        drop(seen);
        layer.complete_all(self.id, batch, Status::SUCCESS);
    }
}

/// Somebody who always wants more: so many I/Os under way until a time.
struct Demand {
    depth: usize,
    /// Of a hundred.
    reads: u64,
    blocks_max: u64,
    until_ns: u64,
    aborts: bool,
}

struct Load {
    plan: Demand,
    open: Option<(Descriptor, ChannelId)>,
    queue: QueueId,
    region: Option<Region>,
    under_way: BTreeMap<u64, IoId>,
    reaped: Vec<IoId>,
    ledger: Obligations,
    rng: Rng,
}

impl Load {
    fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, name: &str, plan: Demand) {
        let (ledger, rng, registry, name) = (world.obligations().clone(), world.rng().fork(), registry.clone(), name.to_owned());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, 256);
            let mut layer = layer.borrow_mut();
            let poller = reactor.reserve_poller("load");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.add_queue(waker.clone());
            let descriptor = registry.open(&name, true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer).unwrap();
            let region = Region::new(Mapping::anonymous((BLOCKS_MAX * 512) as usize, Pages::Normal).unwrap());
            waker.wake();
            let load = Self {
                plan,
                open: Some((descriptor, channel)),
                queue,
                region: Some(region),
                under_way: BTreeMap::new(),
                reaped: Vec::new(),
                ledger,
                rng,
            };
            reactor.install_poller(poller, Box::new(load));
        });
    }

    fn fill(&mut self, layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId) {
        let Some(region) = self.region.clone() else { return };
        let mut batch = Vec::new();
        while self.under_way.len() < self.plan.depth {
            let Some(id) = layer.take() else { break };
            let blocks = self.rng.between(1, self.plan.blocks_max);
            let io = layer.io_mut(id);
            io.op = if self.rng.below(100) < self.plan.reads { Op::Read } else { Op::Write };
            (io.lba, io.blocks) = (self.rng.below(1000), blocks);
            io.list.push(Sge { region: region.clone(), offset: 0, length: (blocks * 512) as u32 });
            let obligation = self.ledger.open_next();
            io.push(self.queue, obligation);
            self.under_way.insert(obligation, id);
            batch.push(id);
        }
        layer.submit(reactor, channel, &batch);
        layer.unplug(reactor);
        if self.plan.aborts && self.rng.chance(1, 8) {
            let keys: Vec<u64> = self.under_way.keys().copied().collect();
            if !keys.is_empty() {
                layer.abort(reactor, self.under_way[self.rng.pick(&keys)]);
            }
        }
    }
}

impl Poller for Load {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let Some(channel) = self.open.as_ref().map(|(_, channel)| *channel) else { return 0 };
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = std::mem::take(&mut self.reaped);
        layer.reap(reactor, self.queue, &mut reaped);
        let work = reaped.len();
        for id in reaped.drain(..) {
            let (tag, status) = layer.finish(id);
            assert_eq!(self.under_way.remove(&tag), Some(id));
            self.ledger.close(tag);
            let legal = status == Status::SUCCESS || (self.plan.aborts && status == Status::ABORT_REQUESTED);
            assert!(legal, "{status}");
        }
        self.reaped = reaped;
        if reactor.now_ns() < self.plan.until_ns {
            self.fill(&mut layer, reactor, channel);
        } else if self.under_way.is_empty() {
            layer.close_channel(reactor, channel);
            layer.remove_queue(self.queue);
            (self.open, self.region) = (None, None);
        }
        work
    }

    fn arm(&mut self, reactor: &mut Reactor) -> bool {
        !Layer::of(reactor).borrow().has_completions(self.queue)
    }
}

fn cost(seen: &Seen, kind: usize) -> u64 {
    match (kind, seen.op) {
        (0, _) => 1,
        (1, _) | (2, Op::Read) | (3, Op::Write) => seen.blocks * 512,
        _ => 0,
    }
}

/// How far the device was ahead of a rate at most: of any window, what came in it less what the rate allows in its time.
fn ahead(seen: &[Seen], kind: usize, rate: u64) -> f64 {
    let (mut level, mut last_ns, mut most) = (0.0f64, 0, 0.0f64);
    for one in seen {
        level = (level - (one.at_ns - last_ns) as f64 * rate as f64 / 1e9).max(0.0) + cost(one, kind) as f64;
        (last_ns, most) = (one.at_ns, most.max(level));
    }
    most
}

fn set(world: &mut World, registry: &Arc<Registry>, name: &str, rates: [Option<u64>; 4]) {
    let ledger = world.obligations().clone();
    let id = ledger.open_next();
    let reply = move |outcome: Result<(), BdevError>| {
        outcome.unwrap();
        ledger.close(id);
    };
    measures::set_limits(registry, name, rates, Box::new(reply));
    world.settle();
}

/// What a window may hold beside what its time allows: the millisecond that is never lost, a slice for each channel, the I/O that starts last, and
/// how late a reactor may be.
fn slack(rate: u64, channels: usize, largest: u64) -> f64 {
    rate as f64 * (BURST_NS + (channels as u64 + 1) * SLICE_NS) as f64 / 1e9
        + (largest * (channels as u64 + 1)) as f64
        + rate as f64 * LATE_NS / 1e9
}

/// The simulator lets reactors oversleep, as machines do: now and then by up to a millisecond, rarely several times in a row.
const LATE_NS: f64 = 6e6;

#[test]
fn a_rate_is_kept_to_the_slice_on_all_reactors_together() {
    sim::run_seeds("rates", 80, |seed| {
        let reactors = 1 + (seed % 4) as usize;
        let mut world = World::new(seed, reactors);
        let registry = Registry::new(world.handles());
        let split = *world.rng().pick(&[0, 0, 4]);
        let seen = Recorder::register(&registry, "disk", split, *world.rng().pick(&[0, 0, 5]));
        let kind = world.rng().below(4) as usize;
        let rate = if kind == 0 { *world.rng().pick(&[150, 1000, 20_000]) } else { *world.rng().pick(&[1 << 18, 1 << 20, 40 << 20]) };
        let mut rates = [None; 4];
        rates[kind] = Some(rate);
        set(&mut world, &registry, "disk", rates);
        let begun_ns = world.now_ns();
        let until_ns = begun_ns + 400 * MS;
        let blocks_max = *world.rng().pick(&[1, 8, BLOCKS_MAX]);
        for reactor in 0..reactors {
            // One of them at least has more in hand than a late reactor needs.
            let depth = if reactor == 0 { 64 } else { *world.rng().pick(&[1, 7, 32]) };
            let plan = Demand { depth, reads: if kind == 3 { 0 } else { 100 }, blocks_max, until_ns, aborts: false };
            Load::start(&mut world, reactor, &registry, "disk", plan);
        }
        world.finish();
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.sort_by_key(|one| one.at_ns);
        let largest = if kind == 0 { 1 } else { blocks_max * 512 };
        if split == 0 {
            let (found, limit) = (ahead(&seen, kind, rate), slack(rate, reactors, largest));
            assert!(found <= limit, "rate {rate} of {kind}: {found} ahead in some window, at most {limit}");
        } else if kind > 0 {
            assert!(seen.iter().all(|one| one.blocks <= 4));
        }
        // Whatever the demand, while there was some: never below.
        let done: u64 = seen.iter().filter(|one| one.at_ns < until_ns).map(|one| cost(one, kind)).sum();
        let (allowed, largest) = (rate as f64 * 0.4, largest as f64);
        if kind > 0 || split == 0 {
            let least = allowed * 0.98 - largest * (1 + reactors) as f64;
            assert!(done as f64 >= least, "rate {rate} of {kind}: {done} done of {allowed}");
        }
        remove(&mut world, &registry, "disk");
    });
}

#[test]
fn reactors_that_want_alike_get_alike() {
    sim::run_seeds("fair", 40, |seed| {
        let reactors = 2 + (seed % 3) as usize;
        let mut world = World::new(seed, reactors);
        let registry = Registry::new(world.handles());
        let seen = Recorder::register(&registry, "disk", 0, 0);
        let rate = *world.rng().pick(&[200, 1000, 50_000]);
        set(&mut world, &registry, "disk", [Some(rate), None, None, None]);
        let until_ns = world.now_ns() + 400 * MS;
        for reactor in 0..reactors {
            let plan = Demand { depth: 32, reads: 50, blocks_max: 4, until_ns, aborts: false };
            Load::start(&mut world, reactor, &registry, "disk", plan);
        }
        world.finish();
        let mut shares = vec![0u64; reactors];
        seen.lock().unwrap().iter().filter(|one| one.at_ns < until_ns).for_each(|one| shares[one.reactor as usize] += 1);
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        let slices = 4 + rate * 4 * SLICE_NS / 1_000_000_000;
        assert!(most - least <= slices + most / 8, "{shares:?} of {rate} a second");
        remove(&mut world, &registry, "disk");
    });
}

#[test]
fn a_group_keeps_one_rate_and_each_bdev_its_own() {
    sim::run_seeds("groups", 40, |seed| {
        let reactors = 1 + (seed % 3) as usize;
        let mut world = World::new(seed, reactors);
        let registry = Registry::new(world.handles());
        let rates = Rates { rw_ios: 8000, ..Rates::default() };
        measures::create_group(&registry, "gold", rates).unwrap();
        let names = ["a", "b", "c"];
        let records: Vec<_> = names.iter().map(|name| Recorder::register(&registry, name, 0, 0)).collect();
        set(&mut world, &registry, "a", [Some(1000), None, None, None]);
        set(&mut world, &registry, "c", [Some(10_000), None, None, None]);
        for name in &names[..2] {
            measures::join_group(&registry, "gold", name, Box::new(|outcome| outcome.unwrap()));
        }
        world.settle();
        let until_ns = world.now_ns() + 300 * MS;
        for reactor in 0..reactors {
            for name in names {
                Load::start(&mut world, reactor, &registry, name, Demand { depth: 16, reads: 50, blocks_max: 4, until_ns, aborts: true });
            }
        }
        world.finish();
        let taken = |at: usize| std::mem::take(&mut *records[at].lock().unwrap());
        let (own, other, outside) = (taken(0), taken(1), taken(2));
        let mut both: Vec<Seen> = own.iter().chain(&other).copied().collect();
        both.sort_by_key(|one| one.at_ns);
        assert!(ahead(&own, 0, 1000) <= slack(1000, reactors, 1));
        assert!(ahead(&both, 0, 8000) <= slack(8000, 2 * reactors, 1));
        assert!(both.len() >= 2300, "{} in 0.3 s of 8000 a second", both.len());
        assert!(outside.len() >= 2850, "{} in 0.3 s of 10000 a second, in no group", outside.len());
        assert!(own.len() >= 280, "{} in 0.3 s of 1000 a second", own.len());
        names.iter().for_each(|name| remove(&mut world, &registry, name));
        assert!(measures::groups(&registry)[0].bdevs.is_empty(), "who is gone is in no group");
    });
}

#[test]
fn a_limit_changed_under_load_holds_from_then_on() {
    sim::run_seeds("changes", 40, |seed| {
        let reactors = 1 + (seed % 4) as usize;
        let mut world = World::new(seed, reactors);
        let registry = Registry::new(world.handles());
        let seen = Recorder::register(&registry, "disk", 0, 0);
        let rates: Vec<u64> = (0..3).map(|_| *world.rng().pick(&[1000, 5000, 20_000])).collect();
        set(&mut world, &registry, "disk", [Some(rates[0]), None, None, None]);
        let begun_ns = world.now_ns();
        let until_ns = begun_ns + 600 * MS;
        for reactor in 0..reactors {
            let plan = Demand { depth: 32, reads: 50, blocks_max: 4, until_ns, aborts: true };
            Load::start(&mut world, reactor, &registry, "disk", plan);
        }
        let (ledger, shared, mut left) = (world.obligations().clone(), registry.clone(), rates.clone());
        left.remove(0);
        // At the end no limit at all: what waits goes.
        left.push(0);
        let mut next_ns = begun_ns;
        world.add_actor(move |now_ns: u64, _: &mut Rng| {
            if now_ns < next_ns + 200 * MS {
                return Act::Until(next_ns + 200 * MS);
            }
            next_ns += 200 * MS;
            if left.is_empty() {
                return Act::Done;
            }
            let (id, book) = (ledger.open_next(), ledger.clone());
            let reply = move |outcome: Result<(), BdevError>| {
                outcome.unwrap();
                book.close(id);
            };
            measures::set_limits(&shared, "disk", [Some(left.remove(0)), None, None, None], Box::new(reply));
            Act::Again
        });
        world.finish();
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        for (number, rate) in rates.iter().enumerate() {
            // A change takes a message to each reactor.
            let (first, last) = (begun_ns + number as u64 * 200 * MS + 10 * MS, begun_ns + (number as u64 + 1) * 200 * MS);
            let within: Vec<Seen> = seen.iter().filter(|one| (first..last).contains(&one.at_ns)).copied().collect();
            let allowed = *rate as f64 * 0.19;
            assert!(within.len() as f64 >= allowed * 0.98 - 4.0, "{} of {allowed} in phase {number} of {rates:?}", within.len());
            assert!(
                within.len() as f64 <= allowed + slack(*rate, reactors, 1),
                "{} of {allowed} in phase {number} of {rates:?}",
                within.len()
            );
        }
        remove(&mut world, &registry, "disk");
    });
}

#[test]
fn reads_and_writes_have_limits_of_their_own() {
    sim::run_seeds("directions", 50, |seed| {
        let mut world = World::new(seed, 2);
        let registry = Registry::new(world.handles());
        let seen = Recorder::register(&registry, "disk", 0, 0);
        let (r_bytes, w_bytes) = (8 << 20, 2 << 20);
        set(&mut world, &registry, "disk", [None, None, Some(r_bytes), Some(w_bytes)]);
        let until_ns = world.now_ns() + 300 * MS;
        for (reactor, reads) in [(0, 100), (1, 0)] {
            let plan = Demand { depth: 16, reads, blocks_max: 8, until_ns, aborts: false };
            Load::start(&mut world, reactor, &registry, "disk", plan);
        }
        world.finish();
        let seen = std::mem::take(&mut *seen.lock().unwrap());
        for (kind, rate) in [(2, r_bytes), (3, w_bytes)] {
            let done: u64 = seen.iter().filter(|one| one.at_ns < until_ns).map(|one| cost(one, kind)).sum();
            let allowed = rate as f64 * 0.3;
            assert!((allowed * 0.99 - 8192.0..=allowed + slack(rate, 1, 4096)).contains(&(done as f64)), "{done} of {allowed}");
        }
        remove(&mut world, &registry, "disk");
    });
}

#[test]
fn an_io_pays_once_at_each_bdev_that_has_a_limit() {
    sim::run_seeds("stacked_limits", 50, |seed| {
        let mut world = World::new(seed, 2);
        let registry = Registry::new(world.handles());
        let seen = Recorder::register(&registry, "base", 0, 0);
        registry.register(Arc::new(Passthru::new(&registry, "disk", "base", None).unwrap())).unwrap();
        let (above, below) = *world.rng().pick(&[(2000, 5000), (5000, 2000), (3000, 3000)]);
        set(&mut world, &registry, "disk", [Some(above), None, None, None]);
        set(&mut world, &registry, "base", [Some(below), None, None, None]);
        let until_ns = world.now_ns() + 300 * MS;
        for reactor in 0..2 {
            Load::start(&mut world, reactor, &registry, "disk", Demand { depth: 16, reads: 50, blocks_max: 8, until_ns, aborts: true });
        }
        world.finish();
        let count = seen.lock().unwrap().iter().filter(|one| one.at_ns < until_ns).count() as f64;
        let (rate, allowed) = (above.min(below), above.min(below) as f64 * 0.3);
        assert!((allowed * 0.97..=allowed + slack(rate, 4, 1)).contains(&count), "{count} of {allowed}");
        remove(&mut world, &registry, "base");
    });
}

fn any_rates(rng: &mut Rng) -> [Option<u64>; 4] {
    [0; 4].map(|_: u64| rng.chance(1, 3).then(|| *rng.pick(&[0, 0, 600, 100_000, 5_000_000, 1 << 40])))
}

/// Does whatever can be done to a bdev's measures, at random, and removes it now and then.
fn meddler(registry: Arc<Registry>, device: Arc<SimDisk>, allowed: Allowed, ledger: Obligations) -> impl FnMut(u64, &mut Rng) -> Act {
    let mut left = 12;
    move |now_ns, rng| {
        if left == 0 {
            return Act::Done;
        }
        left -= 1;
        let (id, book) = (ledger.open_next(), ledger.clone());
        let reply = Box::new(move |outcome: Result<(), BdevError>| {
            let going = |error: &BdevError| {
                let known = matches!(error, BdevError::NoSuchBdev(_) | BdevError::Removing(_) | BdevError::Claimed { .. });
                known || matches!(error, BdevError::Invalid { field: "name", .. })
            };
            assert!(outcome.is_ok() || outcome.as_ref().is_err_and(going), "{outcome:?}");
            book.close(id);
        });
        match rng.below(9) {
            0..3 => measures::set_limits(&registry, "disk", any_rates(rng), reply),
            3 => measures::join_group(&registry, "group", "disk", reply),
            4 => measures::leave_group(&registry, "group", "disk", reply),
            5 => measures::set_group(&registry, "group", any_rates(rng), reply),
            6 => {
                let shape = rng.chance(2, 3).then(|| Shape::new(GRANULARITY, 1000, 1 << 30, OpSet::of(&[Op::Read])).unwrap());
                measures::enable_histogram(&registry, "disk", shape, reply);
            }
            7 if allowed.removal => {
                let (again, module) = (registry.clone(), device.clone());
                let reply = move |outcome: Result<(), BdevError>| {
                    if outcome.is_ok() {
                        assert_eq!(module.inflight(), 0, "gone with I/O in flight");
                        again.register(module).unwrap();
                    }
                    reply(outcome);
                };
                lifecycle::unregister(&registry, "disk", rng.below(300_000), Box::new(reply));
            }
            _ => {
                let told = move |outcome: Result<measures::Report, BdevError>| reply(outcome.map(|_| ()));
                measures::statistics(&registry, "disk", Reset::MaxMin, Box::new(told));
            }
        }
        Act::Until(now_ns + rng.below(200_000))
    }
}

fn meddle(world: &mut World, plan: Plan, allowed: Allowed) {
    quiet_panics();
    let mut info = Info::new("disk", "sim", 512, Crew::blocks(world, 2, OWN));
    info.queue_depth = *world.rng().pick(&[0, 1, 3]);
    info.max_io_blocks = *world.rng().pick(&[0, 1, 8]);
    info.write_cache = true;
    info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset, Op::WriteZeroes, Op::Unmap]);
    let registry = Registry::new(world.handles());
    let device = SimDisk::new(info.clone(), plan);
    registry.register(device.clone()).unwrap();
    measures::create_group(&registry, "group", Rates { rw_bytes: 5_000_000, ..Rates::default() }).unwrap();
    let mut crew = Crew::new(world, 1..=2, OWN, Fills::only(0));
    crew.start(world, &registry, &qpair_simkit::Load { bdev: "disk".to_owned(), info, allowed, ios: 0 }, 10..=40);
    let ledger = world.obligations().clone();
    world.add_actor(meddler(registry.clone(), device.clone(), allowed, ledger));
    world.finish();
    remove(world, &registry, "disk");
    device.check_end();
    check_slabs(world);
    crew.check_end();
}

#[test]
fn io_that_waits_for_its_turn_ends_once_whatever_happens() {
    let allowed = Allowed { aborts: true, resets: true, removal: true, churn: true, ..Allowed::default() };
    sim::run_seeds("meddling", 600, |seed| {
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        meddle(&mut world, Plan { delay_ns: 100_000, stall: 20, ..Plan::default() }, allowed);
    });
}

#[test]
fn limits_change_nothing_of_what_is_written() {
    let allowed = Allowed { aborts: true, churn: true, ..Allowed::default() };
    sim::run_seeds("limited_data", 200, |seed| {
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        meddle(&mut world, Plan { delay_ns: 50_000, ..Plan::default() }, allowed);
    });
}

#[test]
fn a_reactor_that_is_late_again_and_again_loses_nothing() {
    sim::run_seeds("late", 4, |seed| {
        let mut world = World::new(seed, 1);
        let registry = Registry::new(world.handles());
        let names = ["a", "b"];
        let records: Vec<_> = names.iter().map(|name| Recorder::register(&registry, name, 0, 0)).collect();
        measures::create_group(&registry, "gold", Rates { rw_ios: 4000, ..Rates::default() }).unwrap();
        for name in names {
            measures::join_group(&registry, "gold", name, Box::new(|outcome| outcome.unwrap()));
        }
        world.settle();
        let until_ns = world.now_ns() + 200 * MS;
        for name in names {
            Load::start(&mut world, 0, &registry, name, Demand { depth: 100, reads: 50, blocks_max: 4, until_ns, aborts: false });
        }
        // A thousand others have their turns between two of the reactor's: some milliseconds.
        for _ in 0..1000 {
            world.add_actor(move |now_ns: u64, _: &mut Rng| if now_ns < until_ns { Act::Again } else { Act::Done });
        }
        world.finish();
        let seen: Vec<Vec<Seen>> = records.iter().map(|record| record.lock().unwrap().clone()).collect();
        let last_ns = seen.iter().flatten().filter(|one| one.at_ns < until_ns).map(|one| one.at_ns).max().unwrap();
        let counts: Vec<u64> = seen.iter().map(|seen| seen.iter().filter(|one| one.at_ns <= last_ns).count() as u64).collect();
        let (sum, allowed) = (counts.iter().sum::<u64>(), (last_ns + 200 * MS - until_ns) * 4000 / 1_000_000_000);
        // What came since the reactor's last turn but one is still to be given out.
        assert!((allowed * 98 / 100 - 60..=allowed + 8).contains(&sum), "{counts:?} of {allowed}");
        assert!(counts.iter().all(|count| *count > sum / 3), "{counts:?}: one starves");
        names.iter().for_each(|name| remove(&mut world, &registry, name));
    });
}
