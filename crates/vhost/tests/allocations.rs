//! A ring at work allocates nothing: all it needs was there when it started.

mod guest;

use std::alloc::System;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::{Ask, Driver, Kind};
use qpair_bdev::malloc::Malloc;
use qpair_bdev::null::Null;
use qpair_bdev::{Device, Registry};
use qpair_memory::Mapping;
use qpair_reactor::driver::{self, Choice};
use qpair_reactor::{Clock, Config, Reactor, ReactorId};
use qpair_vhost::{Command, Options, Source, Target};
use qpair_wire::virtio_blk::RequestType;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DEPTH: usize = 128;

fn command(target: &Arc<Target>, reactor: &mut Reactor, session: u64, command: Command) {
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    target.command(
        session,
        command,
        Box::new(move |answer| {
            answer.expect("accepted");
            seen.store(true, Ordering::Relaxed);
        }),
    );
    while !done.load(Ordering::Relaxed) {
        reactor.turn();
    }
}

/// Turns until all that is asked is answered, and asks again. Answers, and what the turns allocated.
fn rounds(reactor: &mut Reactor, driver: &mut Driver, asks: &[Ask], count: u32) -> (u64, usize) {
    let (mut answered, mut allocated) = (0, 0);
    for round in 0..count {
        while driver.next_slot().is_some() {
            driver.add(&asks[round as usize % asks.len()]).expect("room");
        }
        let _ = driver.publish();
        while driver.outstanding() > 0 {
            let region = Region::new(ALLOCATOR);
            reactor.turn();
            let change = region.change();
            allocated += change.allocations + change.reallocations;
            while let Some(done) = driver.reap() {
                assert_eq!(done.status, 0);
                answered += 1;
            }
        }
    }
    (answered, allocated)
}

/// Allocations while a warm ring answers many requests.
fn measure(kind: Kind, device: Arc<dyn Device>, inflight: bool) -> usize {
    let mut reactor =
        Reactor::new(ReactorId(0), Config { spin_ns: 0, busy_poll: true }, Clock::Monotonic, driver::open(Choice::Epoll).unwrap());
    let registry = Registry::new(vec![reactor.handle()]);
    registry.register(device).unwrap();
    let target = Target::new(registry, |failure| panic!("{failure:?}"));
    target.create("vd", "disk", vec![reactor.handle()], Options { packed_ring: true, ..Options::default() }).unwrap();
    let session = target.open("vd").unwrap();
    let bytes = Driver::bytes(1024, DEPTH);
    let memory = Mapping::memfd("guest", bytes as usize).unwrap();
    let mut driver = Driver::new(kind, &memory, 0, 1024, DEPTH, true, kind.start());
    let mut say = |what| command(&target, &mut reactor, session, what);
    say(Command::SetFeatures(1 << 32 | 1 << 29 | 1 << 28 | kind.feature()));
    say(Command::SetMemTable(vec![guest::row(Source::Mapping(memory.clone()), bytes)]));
    if inflight {
        let (_, fd, size) = qpair_vhost::Inflight::create(1, 1024, kind == Kind::Packed).unwrap();
        say(Command::SetInflight { fd, size, offset: 0, num_queues: 1, queue_size: 1024 });
    }
    say(Command::SetVringNum { queue: 0, size: 1024 });
    say(Command::SetVringAddr { queue: 0, addresses: driver.addresses() });
    say(Command::SetVringKick { queue: 0, kick: None });
    let mut asks =
        vec![Ask::new(RequestType::IN, 8, 4096), Ask::new(RequestType::OUT, 8, 4096).indirect(), Ask::new(RequestType::FLUSH, 0, 0)];
    asks[0].write_cuts = vec![512, 1024, 1536, 4096];
    rounds(&mut reactor, &mut driver, &asks, 30);
    let (answered, allocated) = rounds(&mut reactor, &mut driver, &asks, 300);
    assert_eq!(answered, 300 * DEPTH as u64);
    allocated
}

#[test]
fn a_running_ring_allocates_nothing() {
    // One test in this binary: the counter is the process's.
    let region = Region::new(ALLOCATOR);
    drop(std::hint::black_box(vec![0u8; 100]));
    assert_eq!(region.change().allocations, 1, "the counter counts");
    for (kind, inflight) in Kind::BOTH.iter().flat_map(|kind| [(*kind, false), (*kind, true)]) {
        assert_eq!(measure(kind, Arc::new(Null::new("disk", 512, 1 << 20, None, 512)), inflight), 0, "{kind:?}, null");
        assert_eq!(measure(kind, Arc::new(Malloc::new("disk", 512, 1 << 16, None, 512, 0).unwrap()), inflight), 0, "{kind:?}, malloc");
    }
}
