//! In steady state a read or write through these modules allocates nothing.

use std::alloc::System;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::null::Null;
use qpair_bdev::{ChannelId, IoId, Layer, Op, QueueId, Registry, Status, ZoneAction};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};
use qpair_vbdev::delay::{Delay, Latencies};
use qpair_vbdev::error::{ErrorBdev, Errors, What};
use qpair_vbdev::part::{Part, Range};
use qpair_vbdev::zone_block::ZoneBlock;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DEPTH: u64 = 64;
/// Long enough that hash tables have seen their worst.
const WARM_UP: u32 = 300;
const ROUNDS: u32 = 600;

fn allocations() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

/// What a round submits: operation, first block, blocks, of round and number.
type Pattern = fn(u32, u64) -> (Op, u64, u64);

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
            layer.retrieve(id);
            assert_eq!(layer.io(id).status, Status::SUCCESS);
            layer.give_back(id);
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
            (io.op, io.lba, io.blocks) = (self.pattern)(self.rounds, number);
            if io.op == Op::ZoneManagement {
                io.command[0] = ZoneAction::Reset as u8;
            } else {
                io.list.push(Sge { region: self.memory.clone(), offset: number << 12, length: (io.blocks << 9) as u32 });
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

fn allocations_of(name: &str, pattern: Pattern, make: impl FnOnce(&Arc<Registry>)) -> usize {
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Null::new("null", 512, 4096, None, 0))).unwrap();
    make(&registry);
    let descriptor = registry.open(name, true, |_| {}).unwrap();
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

fn mixed(_: u32, number: u64) -> (Op, u64, u64) {
    (if number.is_multiple_of(2) { Op::Read } else { Op::Write }, number * 8, 8)
}

/// All zones are reset, written, filled by appends, and read, round by round.
fn zones(round: u32, number: u64) -> (Op, u64, u64) {
    match round % 4 {
        1 => (Op::ZoneManagement, number * 8, 8),
        2 => (Op::Write, number * 8, 2),
        3 => (Op::ZoneAppend, number * 8, 4),
        _ => (Op::Read, number * 8, 6),
    }
}

/// One test, because the count is the process's.
#[test]
fn reads_and_writes_through_each_module_allocate_nothing() {
    let part = |registry: &Arc<Registry>| {
        let range = Range { name: "part".to_owned(), offset_blocks: 1024, num_blocks: 1024, uuid: None };
        registry.register(Arc::new(Part::cut(registry, "null", "split", &[range]).unwrap().remove(0))).unwrap();
    };
    assert_eq!(allocations_of("part", mixed, part), 0, "part");
    let delay = |registry: &Arc<Registry>| {
        let latencies = Latencies::new([50, 90, 70, 110]);
        registry.register(Arc::new(Delay::new(registry, "delay", "null", None, latencies).unwrap())).unwrap();
    };
    assert_eq!(allocations_of("delay", mixed, delay), 0, "delay");
    let error = |registry: &Arc<Registry>| {
        let errors = Errors::new();
        errors.inject(&[Op::Read], What::Spoil { offset: 1 << 20, value: 1 }, u32::MAX, 0).unwrap();
        errors.inject(&[Op::Write], What::Fail(Status::WRITE_FAULT), u32::MAX, u64::MAX).unwrap();
        registry.register(Arc::new(ErrorBdev::new(registry, "error", "null", None, errors).unwrap())).unwrap();
    };
    assert_eq!(allocations_of("error", mixed, error), 0, "error");
    let zoned = |registry: &Arc<Registry>| {
        registry.register(Arc::new(ZoneBlock::new(registry, "zoned", "null", None, 6, 1).unwrap())).unwrap();
    };
    assert_eq!(allocations_of("zoned", zones, zoned), 0, "zone_block");
}
