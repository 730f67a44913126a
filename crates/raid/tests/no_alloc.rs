//! In steady state a read or write through an array allocates nothing, nor does what several members have a part of.

use std::alloc::System;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::malloc::Malloc;
use qpair_bdev::{ChannelId, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_raid::{Level, Phase, Raids, Spec};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DEPTH: u64 = 64;
/// Long enough that hash tables have seen their worst.
const WARM_UP: u32 = 300;
const ROUNDS: u32 = 600;
/// A strip, and what most I/Os have.
const BLOCKS: u64 = 8;

fn allocations() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

/// What a round submits: operation and first block, of round and number.
type Pattern = fn(u32, u64) -> (Op, u64);

/// Submits `DEPTH` I/Os, reaps them whenever they come, and begins again.
struct Load {
    queue: QueueId,
    channel: ChannelId,
    memory: Region,
    pattern: Pattern,
    batch: Vec<IoId>,
    reaped: Vec<IoId>,
    out: u64,
    rounds: u32,
    /// Allocations when the warm-up was over, and at the end.
    counts: Rc<RefCell<(usize, usize)>>,
}

impl Poller for Load {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        layer.reap(reactor, self.queue, &mut self.reaped);
        let count = self.reaped.len();
        for id in self.reaped.drain(..) {
            let (_, status) = layer.finish(id);
            assert_eq!(status, Status::SUCCESS);
            self.out -= 1;
        }
        if self.out > 0 || self.rounds == ROUNDS {
            return count;
        }
        self.rounds += 1;
        match self.rounds {
            WARM_UP => self.counts.borrow_mut().0 = allocations(),
            ROUNDS => {
                self.counts.borrow_mut().1 = allocations();
                return count;
            }
            _ => {}
        }
        for number in 0..DEPTH {
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            (io.op, io.lba) = (self.pattern)(self.rounds, number);
            io.blocks = BLOCKS;
            if matches!(io.op, Op::Read | Op::Write) {
                io.list.push(Sge { region: self.memory.clone(), offset: number << 12, length: 4096 });
            }
            io.push(self.queue, number);
            self.batch.push(id);
        }
        self.out = DEPTH;
        layer.submit(reactor, self.channel, &self.batch);
        layer.unplug(reactor);
        self.batch.clear();
        count + 1
    }
}

/// Of an array of `members` without superblocks.
fn allocations_of(level: Level, members: usize, pattern: Pattern) -> usize {
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    let bases: Vec<String> = (0..members).map(|number| format!("leg{number}")).collect();
    for name in &bases {
        registry.register(Arc::new(Malloc::new(name, 512, 1024, None, 0, 0).unwrap())).unwrap();
    }
    let raids = Raids::new(&registry);
    let strip_kb = if level == Level::RAID1 { 0 } else { 4 };
    let spec = Spec { name: "array".to_owned(), level, strip_kb, bases, uuid: None, superblock: false };
    raids.create(spec, Box::new(|outcome| outcome.unwrap()));
    world.settle();
    assert_eq!(raids.list()[0].phase, Phase::Online);
    let descriptor = registry.open("array", true, |_| {}).unwrap();
    let counts = Rc::new(RefCell::new((0, 0)));
    let told = counts.clone();
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.reserve_poller("load");
        let queue = layer.add_queue(reactor.waker(poller).unwrap());
        let channel = descriptor.channel(reactor, &mut layer).unwrap();
        let memory = Region::new(Mapping::anonymous((DEPTH as usize) << 12, Pages::Normal).unwrap());
        let (batch, reaped) = (Vec::with_capacity(DEPTH as usize), Vec::with_capacity(DEPTH as usize));
        let load = Load { queue, channel, memory, pattern, batch, reaped, out: 0, rounds: 0, counts: told };
        reactor.install_poller(poller, Box::new(load));
    });
    let done = counts.clone();
    world.run_until("the load ends", 10_000_000, move |_| done.borrow().1 != 0);
    let (before, after) = *counts.borrow();
    after - before
}

fn mixed(round: u32, number: u64) -> (Op, u64) {
    (if (u64::from(round) + number).is_multiple_of(2) { Op::Read } else { Op::Write }, number * BLOCKS)
}

/// All on one member, in turn: batches are as uneven as can be.
fn lopsided(round: u32, number: u64) -> (Op, u64) {
    (if round.is_multiple_of(2) { Op::Read } else { Op::Write }, number / 8 * 16 + u64::from(round / 2 % 2) * BLOCKS)
}

/// Half a strip on, among whole ones: two members have a part of each, and there are more than are fanned out at once.
fn across(round: u32, number: u64) -> (Op, u64) {
    match (u64::from(round) + number) % 4 {
        0 => (Op::WriteZeroes, number * BLOCKS + BLOCKS / 2),
        1 => (Op::Unmap, number * BLOCKS + BLOCKS / 2),
        2 => (Op::Read, number * BLOCKS),
        _ => (Op::Write, number * BLOCKS),
    }
}

/// As `across`, and reads and writes are split at the strip.
fn split(round: u32, number: u64) -> (Op, u64) {
    let (op, _) = mixed(round, number);
    (op, number * BLOCKS + BLOCKS / 2)
}

/// One test, because the count is the process's.
#[test]
fn reads_and_writes_through_each_level_allocate_nothing() {
    let levels = [(Level::RAID0, 2), (Level::RAID0, 3), (Level::CONCAT, 2), (Level::RAID1, 2), (Level::RAID1, 3)];
    let patterns: [(&str, Pattern); 4] = [("mixed", mixed), ("lopsided", lopsided), ("across", across), ("split", split)];
    for (level, members) in levels {
        for (name, pattern) in patterns {
            assert_eq!(allocations_of(level, members, pattern), 0, "{level:?} of {members}, {name}");
        }
    }
}
