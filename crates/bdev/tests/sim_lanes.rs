//! Who passes whom while limits hold I/O back, under random schedules: no kind of I/O waits for a rate that it does not owe, none starves, and each keeps
//! its order.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use qpair_bdev::limit::{BURST_NS, SLICE_NS};
use qpair_bdev::ranges::{self, Keep};
use qpair_bdev::{
    BdevError, Channel, ChannelId, Descriptor, Device, DeviceId, Info, IoId, Layer, Op, OpSet, QueueId, Registry, Status, lifecycle,
    measures,
};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};

const MS: u64 = 1_000_000;
const BLOCK: u64 = 512;
const BLOCKS_MAX: u64 = 64;
/// The simulator lets reactors oversleep, as machines do: now and then by up to a millisecond, rarely several times in a row.
const LATE_NS: u64 = 6 * MS;

/// An I/O that came to the device.
#[derive(Clone, Copy, Debug)]
struct Seen {
    at_ns: u64,
    submitted_ns: u64,
    /// Grows from one I/O of a front end to its next.
    tag: u64,
    reactor: u32,
    op: Op,
    blocks: u64,
}

impl Seen {
    fn waited_ns(&self) -> u64 {
        self.at_ns - self.submitted_ns
    }
}

type Record = Arc<Mutex<Vec<Seen>>>;

/// Does nothing, after a while, and keeps a record.
struct Desk {
    info: Info,
    delay_ns: u64,
    seen: Record,
}

struct DeskChannel {
    id: ChannelId,
    delay_ns: u64,
    seen: Record,
    pending: Vec<(u64, IoId)>,
    waker: LocalWaker,
}

impl Desk {
    fn register(registry: &Arc<Registry>, delay_ns: u64, queue_depth: u32, max_io_blocks: u32) -> Record {
        let mut info = Info::new("disk", "desk", BLOCK as u32, 1 << 20);
        (info.queue_depth, info.max_io_blocks, info.write_cache) = (queue_depth, max_io_blocks, true);
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::Reset]);
        let seen = Record::default();
        registry.register(Arc::new(Self { info, delay_ns, seen: seen.clone() })).unwrap();
        seen
    }
}

impl Device for Desk {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let waker = layer.poller(id).and_then(|poller| reactor.waker(poller)).unwrap();
        Ok(Box::new(DeskChannel { id, delay_ns: self.delay_ns, seen: self.seen.clone(), pending: Vec::new(), waker }))
    }

    fn polled(&self) -> bool {
        true
    }
}

impl Channel for DeskChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let (at_ns, number) = (reactor.now_ns(), reactor.id().0);
        for id in batch {
            let io = layer.io(*id);
            let (frame, op, blocks) = (io.frame(), io.op, io.blocks);
            let seen = Seen { at_ns, submitted_ns: frame.submitted_ns, tag: frame.tag, reactor: number, op, blocks };
            self.seen.lock().unwrap().push(seen);
        }
        if self.delay_ns == 0 {
            return layer.complete_all(self.id, batch, Status::SUCCESS);
        }
        for id in batch {
            self.pending.push((at_ns + self.delay_ns, *id));
            let waker = self.waker.clone();
            reactor.after(self.delay_ns, move |_| waker.wake());
        }
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let now_ns = reactor.now_ns();
        let before = self.pending.len();
        self.pending.retain(|(due_ns, id)| {
            if *due_ns <= now_ns {
                layer.complete(*id, Status::SUCCESS);
            }
            *due_ns > now_ns
        });
        before - self.pending.len()
    }

    fn arm(&mut self, reactor: &mut Reactor) -> bool {
        self.pending.iter().all(|(due_ns, _)| *due_ns > reactor.now_ns())
    }
}

/// What a front end keeps under way.
#[derive(Clone, Copy)]
struct Wish {
    op: Op,
    depth: usize,
    blocks: u64,
}

fn wish(op: Op, depth: usize, blocks: u64) -> Wish {
    Wish { op, depth, blocks }
}

struct Front {
    wishes: Vec<Wish>,
    until_ns: u64,
    /// How many it may still submit.
    left: usize,
    aborts: bool,
    open: Option<(Descriptor, ChannelId)>,
    queue: QueueId,
    region: Option<Region>,
    under_way: BTreeMap<u64, (IoId, usize)>,
    ledger: Obligations,
    rng: Rng,
}

impl Front {
    fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, wishes: &[Wish], until_ns: u64, aborts: bool) {
        Self::start_some(world, reactor, registry, wishes, (until_ns, usize::MAX), aborts);
    }

    fn start_some(world: &mut World, reactor: usize, registry: &Arc<Registry>, wishes: &[Wish], most: (u64, usize), aborts: bool) {
        let (ledger, rng, registry, wishes) = (world.obligations().clone(), world.rng().fork(), registry.clone(), wishes.to_vec());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, 512);
            let mut layer = layer.borrow_mut();
            let poller = reactor.reserve_poller("front");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.add_queue(waker.clone());
            let descriptor = registry.open("disk", true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer).unwrap();
            let region = Region::new(Mapping::anonymous((BLOCKS_MAX * BLOCK) as usize, Pages::Normal).unwrap());
            waker.wake();
            let under_way = BTreeMap::new();
            let front = Self {
                wishes,
                until_ns: most.0,
                left: most.1,
                aborts,
                open: Some((descriptor, channel)),
                queue,
                region: Some(region),
                under_way,
                ledger,
                rng,
            };
            reactor.install_poller(poller, Box::new(front));
        });
    }

    fn one(&mut self, layer: &mut Layer, which: usize) -> Option<IoId> {
        let (wish, region) = (self.wishes[which], self.region.clone()?);
        let id = layer.take()?;
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (wish.op, self.rng.below(1000), wish.blocks);
        if matches!(wish.op, Op::Read | Op::Write) {
            io.list.push(Sge { region, offset: 0, length: (wish.blocks * BLOCK) as u32 });
        }
        let tag = self.ledger.open_next();
        io.push(self.queue, tag);
        self.under_way.insert(tag, (id, which));
        Some(id)
    }

    fn fill(&mut self, layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId) {
        let mut wanted = Vec::new();
        for (which, wish) in self.wishes.iter().enumerate() {
            let there = self.under_way.values().filter(|(_, other)| *other == which).count();
            wanted.extend(std::iter::repeat_n(which, wish.depth - there));
        }
        self.rng.shuffle(&mut wanted);
        wanted.truncate(self.left);
        self.left -= wanted.len();
        // Whole batches and small ones: both ways through the layer.
        while !wanted.is_empty() {
            let count = self.rng.between(1, wanted.len() as u64) as usize;
            let batch: Vec<IoId> = wanted.drain(..count).filter_map(|which| self.one(layer, which)).collect();
            layer.submit(reactor, channel, &batch);
        }
        layer.unplug(reactor);
        if self.aborts && self.rng.chance(1, 4) {
            let ids: Vec<IoId> = self.under_way.values().map(|(id, _)| *id).collect();
            if !ids.is_empty() {
                layer.abort(reactor, *self.rng.pick(&ids));
            }
        }
    }
}

impl Poller for Front {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let Some(channel) = self.open.as_ref().map(|(_, channel)| *channel) else { return 0 };
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        for id in &reaped {
            let (tag, status) = layer.finish(*id);
            assert_eq!(self.under_way.remove(&tag).map(|(own, _)| own), Some(*id));
            self.ledger.close(tag);
            let legal = status == Status::SUCCESS || (self.aborts && status == Status::ABORT_REQUESTED);
            assert!(legal, "{status}");
        }
        if self.left > 0 && reactor.now_ns() < self.until_ns {
            self.fill(&mut layer, reactor, channel);
        } else if self.under_way.is_empty() {
            layer.close_channel(reactor, channel);
            layer.remove_queue(self.queue);
            (self.open, self.region) = (None, None);
        }
        reaped.len()
    }

    fn arm(&mut self, reactor: &mut Reactor) -> bool {
        !Layer::of(reactor).borrow().has_completions(self.queue)
    }
}

fn must(world: &mut World) -> Box<dyn FnOnce(Result<(), BdevError>) + Send> {
    let ledger = world.obligations().clone();
    let id = ledger.open_next();
    Box::new(move |outcome| {
        outcome.unwrap();
        ledger.close(id);
    })
}

/// A world of so many reactors with a limited disk.
fn limited(seed: u64, reactors: usize, disk: (u64, u32, u32), rates: [Option<u64>; 4]) -> (World, Arc<Registry>, Record) {
    let mut world = World::new(seed, reactors);
    let registry = Registry::new(world.handles());
    let (delay_ns, queue_depth, max_io_blocks) = disk;
    let seen = Desk::register(&registry, delay_ns, queue_depth, max_io_blocks);
    let reply = must(&mut world);
    measures::set_limits(&registry, "disk", rates, reply);
    world.settle();
    (world, registry, seen)
}

/// Runs to the end, removes the disk, and tells what came to it.
fn finish(mut world: World, registry: &Arc<Registry>, seen: &Record) -> Vec<Seen> {
    world.finish();
    let reply = must(&mut world);
    lifecycle::unregister(registry, "disk", 0, reply);
    world.finish();
    for reactor in 0..world.reactors() {
        let (all, free) = world.with(reactor, |reactor| Layer::of(reactor).borrow().ios());
        assert_eq!(all, free, "I/Os leaked on reactor {reactor}");
    }
    std::mem::take(&mut *seen.lock().unwrap())
}

fn of(seen: &[Seen], op: Op) -> impl Iterator<Item = &Seen> {
    seen.iter().filter(move |one| one.op == op)
}

/// I/O of each kind came in the order in which its front end submitted it.
fn assert_order_of_kinds(seen: &[Seen]) {
    let mut last: BTreeMap<(u32, u8), u64> = BTreeMap::new();
    for one in seen {
        let before = last.insert((one.reactor, one.op as u8), one.tag);
        assert!(before.is_none_or(|before| before < one.tag), "{one:?} came after {before:?}");
    }
}

fn blocks_before(seen: &[Seen], op: Op, until_ns: u64) -> f64 {
    of(seen, op).filter(|one| one.at_ns < until_ns).map(|one| one.blocks).sum::<u64>() as f64
}

/// What comes in a time at a rate: from just below to what bursts, slices and late reactors allow above.
fn allowed(rate: f64, time_ns: u64, payers: usize, largest: f64) -> std::ops::RangeInclusive<f64> {
    let exact = rate * time_ns as f64 / 1e9;
    let above = rate * (BURST_NS + (payers as u64 + 1) * SLICE_NS + LATE_NS) as f64 / 1e9 + largest * (payers + 1) as f64;
    exact * 0.98 - largest * (payers + 1) as f64..=exact + above
}

#[test]
fn what_owes_nothing_waits_for_no_limit() {
    sim::run_seeds("free", 100, |seed| {
        let (slow, fast) = if seed % 2 == 0 { (Op::Write, Op::Read) } else { (Op::Read, Op::Write) };
        let rate = 128 << 10;
        let rates = if slow == Op::Write { [None, None, None, Some(rate)] } else { [None, None, Some(rate), None] };
        let reactors = 1 + (seed / 2 % 3) as usize;
        let (mut world, registry, seen) = limited(seed, reactors, (100_000, 0, 0), rates);
        let until_ns = world.now_ns() + 150 * MS;
        let wishes = [wish(slow, 16, 8), wish(fast, 8, 4), wish(Op::Flush, 1, 0), wish(Op::Unmap, 1, 8)];
        for reactor in 0..reactors {
            Front::start(&mut world, reactor, &registry, &wishes, until_ns, false);
        }
        let seen = finish(world, &registry, &seen);
        assert_order_of_kinds(&seen);
        for one in seen.iter().filter(|one| one.op != slow) {
            assert_eq!(one.waited_ns(), 0, "{one:?} waited");
        }
        assert!(of(&seen, fast).count() > 10 * of(&seen, slow).count(), "the limited kind sets the pace");
        let range = allowed(rate as f64 / 512.0, 150 * MS, reactors, 8.0);
        let done = blocks_before(&seen, slow, until_ns);
        assert!(range.contains(&done), "{done} blocks of {range:?}");
    });
}

#[test]
fn under_shared_limits_alone_all_io_of_a_channel_keeps_its_order() {
    sim::run_seeds("one_line", 100, |seed| {
        let kind = (seed % 2) as usize;
        let mut rates = [None; 4];
        rates[kind] = Some([4000, 8 << 20][kind]);
        let (mut world, registry, seen) = limited(seed, 2, (0, 0, 0), rates);
        let until_ns = world.now_ns() + 100 * MS;
        for reactor in 0..2 {
            Front::start(&mut world, reactor, &registry, &[wish(Op::Read, 16, 4), wish(Op::Write, 2, 4)], until_ns, false);
        }
        let seen = finish(world, &registry, &seen);
        let mut last = [0; 2];
        for one in &seen {
            let before = std::mem::replace(&mut last[one.reactor as usize], one.tag);
            assert!(before < one.tag, "{one:?} came after {before}");
        }
    });
}

#[test]
fn a_kind_with_a_rate_of_its_own_gets_it_and_the_other_the_rest() {
    sim::run_seeds("shares", 60, |seed| {
        let reactors = 1 + (seed % 3) as usize;
        let (both, writes) = (8000u64, 1000u64);
        let rates = [Some(both), None, None, Some(writes * 4 * BLOCK)];
        let disk = if seed % 2 == 0 { (0, 0, 0) } else { (50_000, 8, 0) };
        let (mut world, registry, seen) = limited(seed, reactors, disk, rates);
        let until_ns = world.now_ns() + 250 * MS;
        for reactor in 0..reactors {
            Front::start(&mut world, reactor, &registry, &[wish(Op::Read, 64, 4), wish(Op::Write, 32, 4)], until_ns, false);
        }
        let seen = finish(world, &registry, &seen);
        assert_order_of_kinds(&seen);
        let (read, written) = (blocks_before(&seen, Op::Read, until_ns) / 4.0, blocks_before(&seen, Op::Write, until_ns) / 4.0);
        let range = allowed(both as f64, 250 * MS, reactors, 1.0);
        assert!(range.contains(&(read + written)), "{read} reads and {written} writes: {range:?} together");
        let range = allowed(writes as f64, 250 * MS, reactors, 1.0);
        assert!(range.contains(&written), "{read} reads and {written} writes: {range:?} writes");
    });
}

#[test]
fn a_full_device_starves_nobody() {
    sim::run_seeds("room", 200, |seed| {
        let (depth, delay_ns) = (1 + (seed % 3) as u32, 100_000);
        let split = if seed % 5 == 0 { 2 } else { 0 };
        // Sixteen writes wait a second for their rate.
        let (mut world, registry, seen) = limited(seed, 1, (delay_ns, depth, split), [None, None, Some(100 << 20), Some(64 << 10)]);
        let until_ns = world.now_ns() + 200 * MS;
        let wishes = [wish(Op::Write, 16, 8), wish(Op::Read, 6, 4), wish(Op::Flush, 1, 0), wish(Op::Unmap, 1, 8)];
        Front::start(&mut world, 0, &registry, &wishes, until_ns, false);
        let seen = finish(world, &registry, &seen);
        if split == 0 {
            assert_order_of_kinds(&seen);
            // Before each are at most the others that want the device; a reactor that oversleeps does so for them one after the other.
            let most = 40 * (delay_ns + MS);
            for one in seen.iter().filter(|one| one.op != Op::Write) {
                assert!(one.waited_ns() < most, "{one:?} waited {} ns", one.waited_ns());
            }
            let range = allowed(128.0, 200 * MS, 1, 8.0);
            let done = blocks_before(&seen, Op::Write, until_ns);
            assert!(range.contains(&done), "{done} blocks of {range:?}");
        }
        assert!(of(&seen, Op::Flush).count() > 10 && of(&seen, Op::Unmap).count() > 10, "one of them starves");
    });
}

#[test]
fn the_place_of_one_that_was_aborted_is_for_others() {
    sim::run_seeds("place", 50, |seed| {
        let (mut world, registry, seen) = limited(seed, 2, (0, 0, 0), [None, None, None, Some(64 << 10)]);
        // The first write owes half a second; the second, on the other reactor, takes its place for as much, and is aborted.
        Front::start_some(&mut world, 0, &registry, &[wish(Op::Write, 1, BLOCKS_MAX)], (u64::MAX, 1), false);
        world.settle();
        let (ledger, shared) = (world.obligations().clone(), registry.clone());
        let tag = ledger.open_next();
        world.with(1, move |reactor| {
            let layer = Layer::install(reactor, 512);
            let mut layer = layer.borrow_mut();
            let poller = reactor.reserve_poller("one");
            let queue = layer.add_queue(reactor.waker(poller).unwrap());
            let descriptor = shared.open("disk", true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer).unwrap();
            let id = layer.take().unwrap();
            let region = Region::new(Mapping::anonymous((BLOCKS_MAX * BLOCK) as usize, Pages::Normal).unwrap());
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks) = (Op::Write, 0, BLOCKS_MAX);
            io.list.push(Sge { region, offset: 0, length: (BLOCKS_MAX * BLOCK) as u32 });
            io.push(queue, tag);
            layer.submit(reactor, channel, &[id]);
            layer.abort(reactor, id);
            let mut reaped = Vec::new();
            layer.reap(reactor, queue, &mut reaped);
            assert_eq!(reaped.iter().map(|id| layer.finish(*id)).collect::<Vec<_>>(), [(tag, Status::ABORT_REQUESTED)]);
            layer.remove_queue(queue);
            reactor.install_poller(poller, Box::new(Nothing));
            // Its channel stays: it is not the end of that which gives the place back.
            reactor.after(700 * MS, move |reactor| {
                let layer = Layer::of(reactor);
                layer.borrow_mut().close_channel(reactor, channel);
                drop(descriptor);
            });
        });
        ledger.close(tag);
        Front::start_some(&mut world, 0, &registry, &[wish(Op::Write, 1, 1)], (u64::MAX, 1), false);
        let seen = finish(world, &registry, &seen);
        let third = seen.last().unwrap();
        assert_eq!(third.blocks, 1);
        assert!((400 * MS..520 * MS).contains(&third.waited_ns()), "{third:?} waited {} ns", third.waited_ns());
    });
}

/// Stops its reactor for a while, again and again, as a machine does that takes a processor away.
#[test]
fn a_front_end_with_few_in_hand_loses_nothing_when_its_reactor_was_away() {
    sim::run_seeds("away", 20, |seed| {
        let (rate, reactors) = (8000u64, 1 + (seed % 2) as usize);
        let (mut world, registry, seen) = limited(seed, reactors, (0, 0, 0), [Some(rate), None, None, None]);
        let begun_ns = world.now_ns();
        let until_ns = begun_ns + 300 * MS;
        for reactor in 0..reactors {
            Front::start(&mut world, reactor, &registry, &[wish(Op::Read, 4, 4), wish(Op::Write, 4, 4)], until_ns, false);
        }
        // So many others have their turns in a burst that the reactors come late by some milliseconds, and then by none.
        for _ in 0..1000 {
            world.add_actor(move |now_ns: u64, _: &mut Rng| match now_ns {
                _ if now_ns >= until_ns => Act::Done,
                _ if now_ns >= begun_ns + 40 * MS && (now_ns - begun_ns) % (40 * MS) < 4 * MS => Act::Again,
                _ => Act::Until(begun_ns + ((now_ns - begun_ns) / (40 * MS) + 1) * 40 * MS),
            });
        }
        let seen = finish(world, &registry, &seen);
        let last_ns = seen.iter().filter(|one| one.at_ns < until_ns).map(|one| one.at_ns).max().unwrap();
        let done = seen.iter().filter(|one| one.at_ns <= last_ns).count() as f64;
        // The front ends too begin late; what is missed in the last burst comes after the end.
        let range = allowed(0.98 * rate as f64, last_ns - begun_ns, reactors, 1.0);
        let most = *allowed(rate as f64, last_ns - begun_ns, reactors, 1.0).end();
        assert!((*range.start()..=most).contains(&done), "{done} of {range:?}");
    });
}

struct Nothing;

impl Poller for Nothing {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        true
    }
}

/// Changes limits, locks ranges and resets, at random.
fn meddler(registry: Arc<Registry>, device: DeviceId, ledger: Obligations, until_ns: u64) -> impl FnMut(u64, &mut Rng) -> Act {
    move |now_ns, rng| {
        if now_ns >= until_ns {
            return Act::Done;
        }
        let (id, book) = (ledger.open_next(), ledger.clone());
        if rng.chance(1, 2) {
            let (lba, blocks) = (rng.below(900), rng.between(1, 200));
            // Let go when it is had.
            ranges::lock(&registry, device, lba, blocks, *rng.pick(&[Keep::Writers, Keep::Everything]), move |_| book.close(id));
        } else {
            let rates = [0; 4].map(|_: u64| rng.chance(1, 2).then(|| *rng.pick(&[0, 2000, 1 << 20, 10 << 20])));
            measures::set_limits(&registry, "disk", rates, Box::new(move |outcome| outcome.map(|()| book.close(id)).unwrap()));
        }
        Act::Until(now_ns + rng.below(3 * MS))
    }
}

#[test]
fn each_io_ends_once_whatever_lets_it_go() {
    sim::run_seeds("lanes", 300, |seed| {
        let reactors = 1 + (seed % 3) as usize;
        let disk = (20_000, (seed % 4) as u32, if seed % 3 == 0 { 3 } else { 0 });
        let (mut world, registry, seen) = limited(seed, reactors, disk, [Some(4000), None, None, Some(1 << 20)]);
        let until_ns = world.now_ns() + 60 * MS;
        let wishes = [wish(Op::Read, 8, 8), wish(Op::Write, 8, 8), wish(Op::Flush, 1, 0), wish(Op::Unmap, 2, 8)];
        for reactor in 0..reactors {
            Front::start(&mut world, reactor, &registry, &wishes, until_ns, true);
        }
        let ledger = world.obligations().clone();
        let device = registry.open("disk", false, |_| {}).unwrap().device();
        world.add_actor(meddler(registry.clone(), device, ledger, until_ns));
        // Front ends that were served all the time have as many done as wanted: none waits for ever, or this never ends.
        let seen = finish(world, &registry, &seen);
        assert!(!seen.is_empty());
    });
}
