//! Files in the simulator: short transfers, a full driver, errors, unaligned memory; and what a power cut leaves.

use std::sync::{Arc, Mutex};

use qpair_bdev::{Device, FileBdev, IoFlags, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::driver::FileRef;
use qpair_reactor::sim::{self, Disk, Faults, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, check_slabs, remove};

/// Blocks of each client.
const OWN: u64 = 6 * CELL_BLOCKS;

fn number(file: &FileRef) -> u32 {
    let FileRef::Simulated(number) = file else { panic!("a real file") };
    *number
}

fn scenario(name: &str, seeds: u64, allowed: Allowed, error: u64) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let count = world.reactors() as u64;
        let file = world.disk().create(count * OWN * 512);
        let depth = *world.rng().pick(&[1, 2, 5, 1024]);
        world.set_faults(Faults { short: 200, error, depth, ..Faults::default() });
        let blocks = count * OWN;
        let alignment = *world.rng().pick(&[0, 4, 512]);
        let bdev = match alignment {
            0 => FileBdev::simulated("disk", number(&file), 512, blocks, seed % 2 == 0),
            _ => FileBdev::simulated_direct("disk", number(&file), 512, blocks, alignment),
        };
        let bdev = Arc::new(bdev.unwrap());
        let registry = Registry::new(world.handles());
        registry.register(bdev.clone()).unwrap();
        let info = bdev.info();
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        crew.start(&mut world, &registry, &Load { bdev: "disk".to_owned(), info, allowed, ios: 0 }, 50..=50);
        world.finish();
        remove(&mut world, &registry, "disk");
        check_slabs(&mut world);
        crew.check_end();
        drop(registry);
        assert_eq!(Arc::strong_count(&bdev), 1, "the device is still held");
    });
}

#[test]
fn short_transfers_and_a_full_driver_are_not_seen_above() {
    scenario("file", 500, Allowed { churn: true, resets: true, ..Allowed::default() }, 0);
}

#[test]
fn a_failing_file_fails_each_io_once() {
    scenario("file errors", 300, Allowed { frays: true, errors: true, aborts: true, churn: true, resets: true, ..Allowed::default() }, 50);
}

/// What each block may hold: the versions written, and up to which of them the disk must keep.
#[derive(Default)]
struct Block {
    versions: Vec<u8>,
    /// Index of the newest version that was answered.
    answered: usize,
    /// Index of the oldest that a power cut may leave.
    durable: usize,
    busy: bool,
}

const BLOCKS: u64 = 48;

/// Writes versions and flushes, for ever.
struct Writer {
    blocks: Arc<Mutex<Vec<Block>>>,
    queue: QueueId,
    channel: qpair_bdev::ChannelId,
    memory: Region,
    waker: LocalWaker,
    /// By tag: the range, or what a flush will cover.
    out: Vec<Option<Out>>,
    rng: Rng,
    reaped: Vec<IoId>,
}

enum Out {
    Write { first: u64, count: u64, durable: bool },
    Flush(Vec<usize>),
}

impl Writer {
    fn begin(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let Some(tag) = self.out.iter().position(Option::is_none) else { return };
        let mut blocks = self.blocks.lock().unwrap();
        let id = layer.take().unwrap();
        let io = layer.io_mut(id);
        if self.rng.chance(1, 6) {
            (io.op, io.lba, io.blocks) = (Op::Flush, 0, 0);
            self.out[tag] = Some(Out::Flush(blocks.iter().map(|block| block.answered).collect()));
        } else {
            let first = self.rng.below(BLOCKS);
            let count = self.rng.between(1, 6.min(BLOCKS - first));
            let range = &mut blocks[first as usize..(first + count) as usize];
            if range.iter().any(|block| block.busy || block.versions.len() == 255) {
                return layer.give_back(id);
            }
            let durable = self.rng.chance(1, 6);
            (io.op, io.lba, io.blocks) = (Op::Write, first, count);
            io.flags.set(IoFlags::FUA, durable);
            for (index, block) in range.iter_mut().enumerate() {
                let version = block.versions.len() as u8;
                block.versions.push(version);
                block.busy = true;
                let offset = (tag as u64 * 6 + index as u64) * 512;
                self.memory.fill(offset, 512, version).unwrap();
                io.list.push(Sge { region: self.memory.clone(), offset, length: 512 });
            }
            self.out[tag] = Some(Out::Write { first, count, durable });
        }
        drop(blocks);
        layer.io_mut(id).push(self.queue, tag as u64);
        layer.submit(reactor, self.channel, &[id]);
    }

    fn end(&mut self, layer: &mut Layer, id: IoId) {
        let tag = layer.retrieve(id).tag as usize;
        assert_eq!(layer.io(id).status, Status::SUCCESS);
        layer.give_back(id);
        let mut blocks = self.blocks.lock().unwrap();
        match self.out[tag].take().unwrap() {
            Out::Flush(covered) => {
                for (block, covered) in blocks.iter_mut().zip(covered) {
                    block.durable = block.durable.max(covered);
                }
            }
            Out::Write { first, count, durable } => {
                for block in &mut blocks[first as usize..(first + count) as usize] {
                    block.busy = false;
                    block.answered = block.versions.len() - 1;
                    if durable {
                        block.durable = block.answered;
                    }
                }
            }
        }
    }
}

impl Poller for Writer {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = std::mem::take(&mut self.reaped);
        layer.reap(reactor, self.queue, &mut reaped);
        let work = reaped.len();
        reaped.drain(..).for_each(|id| self.end(&mut layer, id));
        self.reaped = reaped;
        for _ in 0..self.rng.below(3) {
            self.begin(&mut layer, reactor);
        }
        layer.unplug(reactor);
        let waker = self.waker.clone();
        let after_ns = self.rng.below(100_000);
        reactor.after(after_ns, move |_| waker.wake());
        work
    }
}

fn writers(world: &mut World, blocks: &Arc<Mutex<Vec<Block>>>, registry: &Arc<Registry>) {
    for reactor in 0..world.reactors() {
        let (rng, blocks, registry) = (world.rng().fork(), blocks.clone(), registry.clone());
        world.with(reactor, move |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let descriptor = registry.open("disk", true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer).unwrap();
            let poller = reactor.reserve_poller("writer");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.add_queue(waker.clone());
            let memory = Region::new(Mapping::anonymous(8 * 6 * 512, Pages::Normal).unwrap());
            let out = (0..8).map(|_| None).collect();
            reactor.install_poller(poller, Box::new(Writer { blocks, queue, channel, memory, waker, out, rng, reaped: Vec::new() }));
        });
    }
}

/// Runs writers on two reactors, ends it all with `end`, and returns what is on the disk and what may be.
fn interrupted(seed: u64, end: impl FnOnce(&mut World) -> Disk) -> Vec<(u8, Block)> {
    let mut world = World::new(seed, 2);
    let file = world.disk().create(BLOCKS * 512);
    let registry = Registry::new(world.handles());
    let bdev = FileBdev::simulated_direct("disk", number(&file), 512, BLOCKS, 4).unwrap();
    registry.register(Arc::new(bdev)).unwrap();
    let fresh = || Block { versions: vec![0], ..Block::default() };
    let blocks = Arc::new(Mutex::new((0..BLOCKS).map(|_| fresh()).collect::<Vec<_>>()));
    writers(&mut world, &blocks, &registry);
    let steps = world.rng().between(50, 3000);
    world.run(steps);
    let disk = end(&mut world);
    let bytes = disk.read(&file, 0, BLOCKS * 512).unwrap();
    let found = bytes.chunks(512).map(|sector| {
        assert!(sector.iter().all(|byte| *byte == sector[0]), "a torn sector");
        sector[0]
    });
    found.zip(std::mem::take(&mut *blocks.lock().unwrap())).collect()
}

#[test]
fn a_power_cut_leaves_what_was_flushed_or_newer() {
    let lost = std::cell::Cell::new(0u64);
    sim::run_seeds("power cut", 500, |seed| {
        for (lba, (found, block)) in interrupted(seed, World::power_cut).into_iter().enumerate() {
            let found = usize::from(found);
            assert!(found >= block.durable && found < block.versions.len(), "block {lba}: {found} is older than {}", block.durable);
            lost.set(lost.get() + u64::from(found < block.answered));
        }
    });
    assert!(lost.get() > 0 || std::env::var_os("QPAIR_SIM_SEED").is_some(), "no power cut lost what it may lose: it proves nothing");
}

#[test]
fn a_killed_process_loses_nothing_that_was_answered() {
    sim::run_seeds("kill", 200, |seed| {
        for (lba, (found, block)) in interrupted(seed, World::kill).into_iter().enumerate() {
            assert!(usize::from(found) >= block.answered, "block {lba}: {found} is older than {}", block.answered);
        }
    });
}

#[test]
fn a_file_that_vanishes_fails_what_is_under_way_and_after() {
    for (errno, status) in [(libc::ENOSPC, Status::CAPACITY_EXCEEDED), (libc::ENODEV, Status::INVALID_NAMESPACE)] {
        let mut world = World::new(7, 1);
        let file = world.disk().create(BLOCKS * 512);
        let registry = Registry::new(world.handles());
        registry.register(Arc::new(FileBdev::simulated("disk", number(&file), 512, BLOCKS, true).unwrap())).unwrap();
        let ended = Arc::new(Mutex::new(Vec::new()));
        let descriptor = registry.open("disk", true, |_| {}).unwrap();
        let channel = world.with(0, |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let channel = descriptor.channel(reactor, &mut layer).unwrap();
            let poller = reactor.reserve_poller("collector");
            let queue = layer.add_queue(reactor.waker(poller).unwrap());
            reactor.install_poller(poller, Box::new(Collector { queue, ended: ended.clone() }));
            let memory = Region::new(Mapping::anonymous(4096, Pages::Normal).unwrap());
            for op in [Op::Read, Op::Write, Op::Unmap, Op::WriteZeroes] {
                let id = layer.take().unwrap();
                let io = layer.io_mut(id);
                (io.op, io.lba, io.blocks) = (op, 0, 8);
                if matches!(op, Op::Read | Op::Write) {
                    io.list.push(Sge { region: memory.clone(), offset: 0, length: 4096 });
                }
                io.push(queue, 0);
                layer.submit(reactor, channel, &[id]);
            }
            channel
        });
        world.disk().vanish(&file, errno);
        world.finish();
        assert_eq!(*ended.lock().unwrap(), [status; 4]);
        world.with(0, |reactor| Layer::of(reactor).borrow_mut().close_channel(reactor, channel));
        remove(&mut world, &registry, "disk");
    }
}

struct Collector {
    queue: QueueId,
    ended: Arc<Mutex<Vec<Status>>>,
}

impl Poller for Collector {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        for id in &reaped {
            layer.retrieve(*id);
            self.ended.lock().unwrap().push(layer.io(*id).status);
            layer.give_back(*id);
        }
        reaped.len()
    }
}
