//! Range locks and compare-and-write under random schedules: nobody else is in a range that is had, every lock is answered,
//! and a counter that several reactors count up by compare-and-write loses nothing.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::ranges::{self, Keep, RangeLock};
use qpair_bdev::{ChannelId, Descriptor, Info, IoId, Layer, Op, OpSet, QueueId, Registry, Status, lifecycle};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, SimDisk, check_slabs, quiet_panics, remove};

/// Blocks of each client.
const OWN: u64 = 3 * CELL_BLOCKS;

fn random_info(rng: &mut Rng, blocks: u64) -> Info {
    let mut info = Info::new("disk", "sim", 512, blocks);
    info.queue_depth = *rng.pick(&[0, 1, 3]);
    info.max_io_blocks = *rng.pick(&[0, 0, 1, 3]);
    info.max_segments = *rng.pick(&[0, 1, 2]);
    info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Unmap, Op::WriteZeroes, Op::Reset]);
    info
}

/// Counts the first bytes of one block up, reading it when it does not know them.
struct Counter {
    layer: Rc<RefCell<Layer>>,
    queue: QueueId,
    waker: LocalWaker,
    open: Option<(Descriptor, ChannelId)>,
    memory: Option<Region>,
    lba: u64,
    seen: u64,
    left: u32,
    out: Option<(IoId, u64)>,
    counted: Arc<AtomicU64>,
    doubtful: Arc<AtomicU64>,
    aborts: bool,
    ledger: Obligations,
    end: Option<u64>,
    rng: Rng,
}

impl Counter {
    fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, lba: u64, totals: &[Arc<AtomicU64>; 2], aborts: bool) {
        let (rng, ledger, registry) = (world.rng().fork(), world.obligations().clone(), registry.clone());
        let left = world.rng().between(3, 15) as u32;
        let [counted, doubtful] = totals.clone();
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, 96);
            let poller = reactor.reserve_poller("counter");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.borrow_mut().add_queue(waker.clone());
            let descriptor = registry.open("disk", true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer.borrow_mut()).unwrap();
            let memory = Some(Region::new(Mapping::anonymous(1024, Pages::Normal).unwrap()));
            let (open, end) = (Some((descriptor, channel)), Some(ledger.open_next()));
            let counter =
                Self { layer, queue, waker, open, memory, lba, seen: 0, left, out: None, counted, doubtful, aborts, ledger, end, rng };
            reactor.install_poller(poller, Box::new(counter));
        });
    }

    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, op: Op) {
        let (Some((_, channel)), Some(id)) = (&self.open, layer.take()) else { return };
        let memory = self.memory.clone().unwrap();
        let obligation = self.ledger.open_next();
        let length = if op == Op::Read { 512 } else { 1024 };
        if op == Op::CompareAndWrite {
            memory.fill(0, 1024, 0).unwrap();
            memory.write(0, &self.seen.to_le_bytes()).unwrap();
            memory.write(512, &(self.seen + 1).to_le_bytes()).unwrap();
        }
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (op, self.lba, 1);
        io.list.push(Sge { region: memory, offset: 0, length });
        io.push(self.queue, obligation);
        self.out = Some((id, obligation));
        layer.submit(reactor, *channel, &[id]);
        layer.unplug(reactor);
    }

    fn finish(&mut self, layer: &mut Layer, id: IoId) -> Op {
        let (expected, obligation) = self.out.take().expect("an I/O came back that was not out");
        assert_eq!(expected, id);
        layer.retrieve(id);
        let (op, status) = (layer.io(id).op, layer.io(id).status);
        layer.give_back(id);
        self.ledger.close(obligation);
        let mut bytes = [0; 8];
        match (op, status) {
            (Op::Read, Status::SUCCESS) => {
                self.memory.as_ref().unwrap().read(0, &mut bytes).unwrap();
                self.seen = u64::from_le_bytes(bytes);
                Op::CompareAndWrite
            }
            (Op::CompareAndWrite, Status::SUCCESS) => {
                self.counted.fetch_add(1, Ordering::SeqCst);
                self.seen += 1;
                Op::CompareAndWrite
            }
            (_, Status::COMPARE_FAILURE) => Op::Read,
            (_, Status::ABORT_REQUESTED) if self.aborts => {
                self.doubtful.fetch_add(u64::from(op == Op::CompareAndWrite), Ordering::SeqCst);
                Op::Read
            }
            (op, status) => panic!("{op:?} ended with {status:?}"),
        }
    }
}

impl Poller for Counter {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        if self.end.is_none() {
            return 0;
        }
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        let next = reaped.pop().map(|id| self.finish(&mut layer, id));
        if self.out.is_none() && self.left > 0 {
            self.left -= 1;
            self.submit(&mut layer, reactor, next.unwrap_or(Op::CompareAndWrite));
        }
        if self.aborts
            && self.rng.chance(1, 10)
            && let Some((id, _)) = self.out
        {
            layer.abort(reactor, id);
        }
        if self.out.is_none() {
            if let Some((_, channel)) = self.open.take() {
                layer.close_channel(reactor, channel);
            }
            layer.remove_queue(self.queue);
            self.memory = None;
            self.ledger.close(self.end.take().unwrap());
        } else if self.aborts {
            let waker = self.waker.clone();
            reactor.after(50_000, move |_| waker.wake());
        }
        usize::from(next.is_some())
    }
}

fn counters(name: &str, seeds: u64, aborts: bool, plan: Plan) {
    sim::run_seeds(name, seeds, |seed| {
        quiet_panics();
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        let info = random_info(world.rng(), 64);
        let registry = Registry::new(world.handles());
        let device = SimDisk::new(info, plan);
        registry.register(device.clone()).unwrap();
        let totals: [Arc<AtomicU64>; 2] = Default::default();
        let lba = world.rng().below(64);
        for reactor in 0..world.reactors() {
            for _ in 0..world.rng().between(1, 3) {
                Counter::start(&mut world, reactor, &registry, lba, &totals, aborts);
            }
        }
        world.finish();
        let at = lba as usize * 512;
        let bytes: [u8; 8] = device.bytes()[at..at + 8].try_into().unwrap();
        let [counted, doubtful] = totals.map(|total| total.load(Ordering::SeqCst));
        let found = u64::from_le_bytes(bytes);
        assert!((counted..=counted + doubtful).contains(&found), "{found} on the disk, {counted} counted, {doubtful} in doubt");
        remove(&mut world, &registry, "disk");
        check_slabs(&mut world);
    });
}

#[test]
fn counting_by_compare_and_write_loses_nothing() {
    counters("counters", 1000, false, Plan { delay_ns: 100_000, ..Plan::default() });
}

#[test]
fn counting_with_aborts_is_wrong_by_those_in_doubt_at_most() {
    counters("counters_aborted", 1000, true, Plan { delay_ns: 100_000, stall: 30, ..Plan::default() });
}

/// A range that is had: first block, blocks, against whom, and the promise to give it back.
type Had = (RangeLock, u64, u64, Keep, u64);

/// Locks ranges for a while, several at a time, and looks whether anybody is in them.
fn locker(registry: Arc<Registry>, device: Arc<SimDisk>, ledger: Obligations, mut left: u32) -> impl FnMut(u64, &mut Rng) -> Act {
    let had: Arc<Mutex<Vec<Had>>> = Arc::default();
    let unanswered = Arc::new(());
    move |now_ns, rng| {
        let mut mine = had.lock().unwrap();
        for (_, lba, blocks, keep, _) in mine.iter() {
            let inside = device.inside(*lba, *blocks, *keep == Keep::Everything);
            assert!(inside.is_empty(), "{inside:?} in {lba}+{blocks}, which is had against {keep:?}");
        }
        for at in (0..mine.len()).rev().collect::<Vec<_>>() {
            if left == 0 || rng.chance(1, 3) {
                let (lock, _, _, _, id) = mine.swap_remove(at);
                ledger.close(id);
                drop(lock);
            }
        }
        drop(mine);
        if left == 0 {
            let on_their_way = Arc::strong_count(&unanswered) > 1;
            return if on_their_way { Act::Until(now_ns + 50_000) } else { Act::Done };
        }
        left -= 1;
        let (asked, kept) = (ledger.open_next(), ledger.open_next());
        let (book, mine, answer) = (ledger.clone(), had.clone(), unanswered.clone());
        let lba = rng.below(device.info.num_blocks);
        let blocks = rng.between(1, 2 * CELL_BLOCKS);
        let keep = *rng.pick(&[Keep::Writers, Keep::Everything]);
        let id = registry.list(Some("disk")).ok().and_then(|_| registry.open("disk", false, |_| {}).ok()).map(|open| open.device());
        let reply = move |lock: Option<RangeLock>| {
            book.close(asked);
            match lock {
                Some(lock) => mine.lock().unwrap().push((lock, lba, blocks, keep, kept)),
                None => book.close(kept),
            }
            drop(answer);
        };
        match id {
            Some(id) => ranges::lock(&registry, id, lba, blocks, keep, reply),
            None => reply(None),
        }
        Act::Until(now_ns + rng.below(200_000))
    }
}

fn locked(name: &str, seeds: u64, plan: Plan, allowed: Allowed) {
    sim::run_seeds(name, seeds, |seed| {
        quiet_panics();
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        let count = world.reactors();
        let info = random_info(world.rng(), count as u64 * OWN);
        let registry = Registry::new(world.handles());
        let device = SimDisk::new(info.clone(), plan);
        registry.register(device.clone()).unwrap();
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        crew.start(&mut world, &registry, &Load { bdev: "disk".to_owned(), info, allowed, ios: 0 }, 10..=40);
        let ledger = world.obligations().clone();
        world.add_actor(locker(registry.clone(), device.clone(), ledger.clone(), 12));
        if allowed.removal {
            let (registry, id) = (registry.clone(), ledger.open_next());
            let mut waited = false;
            world.add_actor(move |now_ns: u64, rng: &mut Rng| {
                if !std::mem::replace(&mut waited, true) {
                    return Act::Until(now_ns + rng.below(1_500_000));
                }
                let book = ledger.clone();
                lifecycle::unregister(&registry, "disk", rng.below(300_000), Box::new(move |_| book.close(id)));
                Act::Done
            });
        }
        world.finish();
        lifecycle::unregister(&registry, "disk", 0, Box::new(|_| {}));
        world.finish();
        device.check_end();
        check_slabs(&mut world);
        crew.check_end();
    });
}

#[test]
fn nobody_is_in_a_range_that_is_had() {
    let allowed = Allowed { aborts: true, churn: true, composed: true, ..Allowed::default() };
    locked("ranges", 600, Plan { delay_ns: 100_000, stall: 20, ..Plan::default() }, allowed);
}

#[test]
fn locks_are_answered_through_resets_and_removal() {
    let allowed = Allowed { errors: true, aborts: true, churn: true, resets: true, removal: true, composed: true, ..Allowed::default() };
    locked("ranges_removal", 1000, Plan { delay_ns: 100_000, error: 10, stall: 30, panic: 0 }, allowed);
}
