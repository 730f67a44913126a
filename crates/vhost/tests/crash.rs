//! A device killed at every store it makes to a ring of either kind and the inflight region: no request is lost, none answered twice.
//!
//! How it works. This program runs itself as the device, single-stepped by ptrace. After each instruction that changed the ring
//! or the region, what a kill would leave at that point is copied; later a successor is started on each copy, and the used
//! ring must then name every request exactly once.

mod guest;

#[path = "simulation/device.rs"]
mod device;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use device::{Manners, Slow};
use guest::{Ask, Driver, Kind, RingSide};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use qpair_bdev::Registry;
use qpair_memory::{Mapping, Region};
use qpair_reactor::Config;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{Disk, World};
use qpair_vhost::{Command, Options, Source, Target};
use qpair_wire::vhost_user::{inflight_packed_queue_bytes, inflight_region_bytes};
use qpair_wire::virtio::RingSize;
use qpair_wire::virtio_blk::RequestType;

const ENTRIES: u16 = 16;
const SLOTS: usize = 8;
const MEMORY: u64 = 256 << 10;
const CHILD: &str = "QPAIR_CRASH_DEVICE";
/// Instructions after which something is wrong.
const STEPS_MAX: u64 = 20_000_000;

fn region_bytes(kind: Kind) -> u64 {
    if kind == Kind::Packed { inflight_packed_queue_bytes(ENTRIES) } else { inflight_region_bytes(1, ENTRIES) }
}

fn open(path: &Path) -> (File, Arc<Mapping>) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mapping = Mapping::shared(file.as_fd(), file.metadata().unwrap().len()).unwrap();
    (file, mapping)
}

/// A device whose session serves the file's ring; not yet started.
fn device(seed: u64, file: &File, driver: &Driver, base: u32) -> (World, Arc<Target>, u64) {
    let mut world = World::with_config(seed, 1, Config { spin_ns: 0, busy_poll: false }, Disk::default());
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Slow::new("disk", 256, Manners::default(), None))).unwrap();
    let target = Target::new(registry, |failure| panic!("{failure:?}"));
    target.create("vd", "disk", world.handles(), Options { packed_ring: true, ..Options::default() }).unwrap();
    let session = target.open("vd").unwrap();
    let fd = || file.try_clone().unwrap().into();
    let (kind, region) = (driver.kind(), region_bytes(driver.kind()));
    for command in [
        Command::SetFeatures(1 << 32 | 1 << 29 | 1 << 28 | kind.feature()),
        Command::SetInflight { fd: fd(), size: region, offset: MEMORY, num_queues: 1, queue_size: ENTRIES },
        Command::SetMemTable(vec![guest::row(Source::Fd(fd()), MEMORY)]),
        Command::SetVringNum { queue: 0, size: ENTRIES.into() },
        Command::SetVringAddr { queue: 0, addresses: driver.addresses() },
        Command::SetVringBase { queue: 0, base },
    ] {
        target.command(session, command, Box::new(|answer| drop(answer.expect("accepted"))));
    }
    world.settle();
    (world, target, session)
}

fn start(target: &Arc<Target>, session: u64) {
    let kick = Command::SetVringKick { queue: 0, kick: Some(Event::simulated()) };
    target.command(session, kick, Box::new(|answer| drop(answer.expect("started"))));
}

/// A driver that finds its ring as it lies there, for its addresses and indices only.
fn driver(kind: Kind, memory: &Arc<Mapping>, fresh: bool) -> Driver {
    if fresh {
        return Driver::new(kind, memory, 0, ENTRIES, SLOTS, true, kind.start());
    }
    let scratch = Mapping::memfd("scratch", MEMORY as usize).unwrap();
    Driver::new(kind, &scratch, 0, ENTRIES, SLOTS, true, kind.start())
}

fn child(path: &Path, kind: Kind, seed: u64) {
    let (file, mapping) = open(path);
    let (mut world, target, session) = device(seed, &file, &driver(kind, &mapping, false), kind.start());
    ptrace::traceme().expect("traced");
    raise(Signal::SIGSTOP).unwrap();
    start(&target, session);
    world.settle();
    raise(Signal::SIGSTOP).unwrap();
}

/// What the used entries say was answered, and the base that a front end would send who lost its device.
fn used(driver: &Driver, memory: &Region) -> (u32, Vec<u16>) {
    match driver.kind() {
        Kind::Split => used_of_split(memory),
        Kind::Packed => used_of_packed(driver, memory),
    }
}

fn used_of_split(memory: &Region) -> (u32, Vec<u16>) {
    let size = RingSize::new(ENTRIES.into()).unwrap();
    let layout = size.layout(0, 4).unwrap();
    let half = |at: u64| {
        let mut bytes = [0; 2];
        memory.read(at, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    };
    let index = half(layout.used + 2);
    (index.into(), (0..index).map(|entry| half(layout.used + size.used_entry_offset(entry))).collect())
}

/// Walks as the driver does: the ring is in its first lap.
fn used_of_packed(driver: &Driver, memory: &Region) -> (u32, Vec<u16>) {
    let RingSide::Packed(side) = &driver.side else { unreachable!() };
    let (mut ids, mut at) = (Vec::new(), 0);
    while at < u64::from(ENTRIES) {
        let mut tail = [0; 4];
        memory.read(16 * at + 12, &mut tail).unwrap();
        if u16::from_le_bytes([tail[2], tail[3]]) & 0x8080 != 0x8080 {
            break;
        }
        ids.push(u16::from_le_bytes([tail[0], tail[1]]));
        at += u64::from(side.counts[ids.last().unwrap()]);
    }
    // Whatever it sends: the inflight region knows.
    (driver.kind().start(), ids)
}

/// What lay in memory after each instruction that changed what is watched.
fn snapshots(path: &Path, kind: Kind, seed: u64) -> Vec<Vec<u8>> {
    let (_file, mapping) = open(path);
    let memory = Region::new(mapping);
    let ring = match kind {
        Kind::Split => {
            let layout = RingSize::new(ENTRIES.into()).unwrap().layout(0, 4).unwrap();
            (layout.used, layout.end - layout.used)
        }
        Kind::Packed => (0, 16 * u64::from(ENTRIES)),
    };
    let watched = [ring, (MEMORY, region_bytes(kind))];
    let look = || {
        watched.map(|(at, length)| {
            let mut bytes = vec![0; length as usize];
            memory.read(at, &mut bytes).unwrap();
            bytes
        })
    };
    let program = std::env::current_exe().unwrap();
    let mut process = std::process::Command::new(program).env(CHILD, format!("{kind:?} {seed} {}", path.display())).spawn().unwrap();
    let pid = Pid::from_raw(process.id() as i32);
    assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(pid, Signal::SIGSTOP), "the device did not come up");
    let mut found = Vec::new();
    let mut last = look();
    for step in 0.. {
        assert!(step < STEPS_MAX, "the device never ends");
        ptrace::step(pid, None).unwrap();
        match waitpid(pid, None).unwrap() {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
            WaitStatus::Stopped(_, Signal::SIGSTOP) => break,
            other => panic!("the device: {other:?}"),
        }
        let now = look();
        if now != last {
            last = now;
            let mut all = vec![0; memory.len() as usize];
            memory.read(0, &mut all).unwrap();
            found.push(all);
        }
    }
    ptrace::kill(pid).unwrap();
    process.wait().unwrap();
    found
}

fn succeed(content: &[u8], asked: &Driver, ids: &[u16], point: usize) {
    let mapping = Mapping::memfd("crashed", content.len()).unwrap();
    let memory = Region::new(mapping.clone());
    memory.write(0, content).unwrap();
    let (base, before) = used(asked, &memory);
    let file = File::from(mapping.fd().unwrap().try_clone_to_owned().unwrap());
    let (mut world, target, session) = device(point as u64, &file, &driver(asked.kind(), &mapping, false), base);
    start(&target, session);
    world.settle();
    let (_, mut after) = used(asked, &memory);
    assert_eq!(after[..before.len()], before, "store {point}: what was answered stays answered");
    after.sort_unstable();
    assert_eq!(after, ids, "store {point}: {} were answered before the kill", before.len());
}

fn main() {
    if let Ok(child_of) = std::env::var(CHILD) {
        let words: Vec<&str> = child_of.splitn(3, ' ').collect();
        let kind = if words[0] == "Packed" { Kind::Packed } else { Kind::Split };
        return child(Path::new(words[2]), kind, words[1].parse().unwrap());
    }
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    for kind in Kind::BOTH {
        let total: usize = (1..=2).map(|seed| kill_everywhere(kind, seed)).sum();
        println!("test killed_at_each_of_{total}_stores_of_a_{kind:?}_ring_loses_no_request_and_answers_none_twice ... ok");
    }
}

/// At how many stores.
fn kill_everywhere(kind: Kind, seed: u64) -> usize {
    let path = std::env::temp_dir().join(format!("qpair-crash-{}", std::process::id()));
    let file = File::options().create(true).truncate(true).write(true).read(true).open(&path).unwrap();
    file.set_len(MEMORY + region_bytes(kind)).unwrap();
    let (_, mapping) = open(&path);
    let mut driver = driver(kind, &mapping, true);
    let kinds = [
        RequestType::IN,
        RequestType::GET_ID,
        RequestType::OUT,
        RequestType(99),
        RequestType::IN,
        RequestType::FLUSH,
        RequestType::OUT,
        RequestType::IN,
    ];
    let mut ids: Vec<_> = kinds
        .iter()
        .enumerate()
        .map(|(number, kind)| {
            let ask = Ask::new(*kind, 8, if *kind == RequestType::FLUSH { 0 } else { 512 });
            // Chains of one descriptor and of three.
            driver.add(&if number % 3 == 0 { ask } else { ask.indirect() }).expect("room").0
        })
        .collect();
    ids.sort_unstable();
    let _ = driver.publish();
    let found = snapshots(&path, kind, seed);
    assert!(found.len() > 40, "only {} stores were seen", found.len());
    for (point, content) in found.iter().enumerate() {
        succeed(content, &driver, &ids, point);
    }
    let _ = std::fs::remove_file(&path);
    found.len()
}
