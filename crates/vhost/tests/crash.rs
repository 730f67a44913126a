//! A device killed at every store it makes to the used ring and the inflight region: no request is lost, none answered twice.
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
use guest::{Ask, Driver};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use qpair_bdev::Registry;
use qpair_memory::{Mapping, Region};
use qpair_reactor::Config;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{Disk, World};
use qpair_vhost::{Command, Source, Target};
use qpair_wire::vhost_user::inflight_region_bytes;
use qpair_wire::virtio::RingSize;
use qpair_wire::virtio_blk::RequestType;

const ENTRIES: u16 = 16;
const SLOTS: usize = 8;
const MEMORY: u64 = 256 << 10;
const CHILD: &str = "QPAIR_CRASH_DEVICE";
/// Instructions after which something is wrong.
const STEPS_MAX: u64 = 20_000_000;

fn size() -> RingSize {
    RingSize::new(ENTRIES.into()).unwrap()
}

fn open(path: &Path) -> (File, Arc<Mapping>) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mapping = Mapping::shared(file.as_fd(), file.metadata().unwrap().len()).unwrap();
    (file, mapping)
}

/// A device whose session serves the file's ring; not yet started.
fn device(seed: u64, file: &File, driver: &Driver, base: u16) -> (World, Arc<Target>, u64) {
    let mut world = World::with_config(seed, 1, Config { spin_ns: 0, busy_poll: false }, Disk::default());
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Slow::new("disk", 256, Manners::default(), None))).unwrap();
    let target = Target::new(registry, |failure| panic!("{failure:?}"));
    target.create("vd", "disk", world.handles(), false, 1).unwrap();
    let session = target.open("vd").unwrap();
    let fd = || file.try_clone().unwrap().into();
    let region = inflight_region_bytes(1, ENTRIES);
    for command in [
        Command::SetFeatures(1 << 32 | 1 << 29 | 1 << 28),
        Command::SetInflight { fd: fd(), size: region, offset: MEMORY, num_queues: 1, queue_size: ENTRIES },
        Command::SetMemTable(vec![guest::row(Source::Fd(fd()), MEMORY)]),
        Command::SetVringNum { queue: 0, size: ENTRIES.into() },
        Command::SetVringAddr { queue: 0, addresses: driver.addresses() },
        Command::SetVringBase { queue: 0, base: base.into() },
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
fn driver(memory: &Arc<Mapping>, fresh: bool) -> Driver {
    if fresh {
        return Driver::new(memory, 0, size(), SLOTS, true, 0);
    }
    let scratch = Mapping::memfd("scratch", MEMORY as usize).unwrap();
    Driver::new(&scratch, 0, size(), SLOTS, true, 0)
}

fn child(path: &Path, seed: u64) {
    let (file, mapping) = open(path);
    let (mut world, target, session) = device(seed, &file, &driver(&mapping, false), 0);
    ptrace::traceme().expect("traced");
    raise(Signal::SIGSTOP).unwrap();
    start(&target, session);
    world.settle();
    raise(Signal::SIGSTOP).unwrap();
}

fn used(memory: &Region, heads: &mut Vec<u16>) -> u16 {
    let layout = size().layout(0, 4).unwrap();
    let mut index = [0; 2];
    memory.read(layout.used + 2, &mut index).unwrap();
    let index = u16::from_le_bytes(index);
    for entry in 0..index {
        let mut head = [0; 2];
        memory.read(layout.used + size().used_entry_offset(entry), &mut head).unwrap();
        heads.push(u16::from_le_bytes(head));
    }
    index
}

/// What lay in memory after each instruction that changed what is watched.
fn snapshots(path: &Path, seed: u64) -> Vec<Vec<u8>> {
    let (_file, mapping) = open(path);
    let memory = Region::new(mapping);
    let layout = size().layout(0, 4).unwrap();
    let watched = [(layout.used, layout.end - layout.used), (MEMORY, inflight_region_bytes(1, ENTRIES))];
    let look = || {
        watched.map(|(at, length)| {
            let mut bytes = vec![0; length as usize];
            memory.read(at, &mut bytes).unwrap();
            bytes
        })
    };
    let program = std::env::current_exe().unwrap();
    let mut process = std::process::Command::new(program).env(CHILD, format!("{seed} {}", path.display())).spawn().unwrap();
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

fn succeed(content: &[u8], heads: &[u16], point: usize) {
    let mapping = Mapping::memfd("crashed", content.len()).unwrap();
    let memory = Region::new(mapping.clone());
    memory.write(0, content).unwrap();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let base = used(&memory, &mut before);
    let file = File::from(mapping.fd().unwrap().try_clone_to_owned().unwrap());
    let (mut world, target, session) = device(point as u64, &file, &driver(&mapping, false), base);
    start(&target, session);
    world.settle();
    used(&memory, &mut after);
    assert_eq!(after[..before.len()], before, "store {point}: what was answered stays answered");
    after.sort_unstable();
    assert_eq!(after, heads, "store {point}: {} were answered before the kill", before.len());
}

fn main() {
    if let Ok(child_of) = std::env::var(CHILD) {
        let (seed, path) = child_of.split_once(' ').expect("seed and path");
        return child(Path::new(path), seed.parse().unwrap());
    }
    if std::env::args().any(|argument| argument == "--list") {
        return;
    }
    let path = std::env::temp_dir().join(format!("qpair-crash-{}", std::process::id()));
    let mut total = 0;
    for seed in 1..=2 {
        let file = File::options().create(true).truncate(true).write(true).read(true).open(&path).unwrap();
        file.set_len(MEMORY + inflight_region_bytes(1, ENTRIES)).unwrap();
        let (_, mapping) = open(&path);
        let mut driver = driver(&mapping, true);
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
        let ask = |kind: &RequestType| Ask::new(*kind, 8, if *kind == RequestType::FLUSH { 0 } else { 512 }).indirect();
        let mut heads: Vec<_> = kinds.iter().map(|kind| driver.add(&ask(kind)).expect("room").0).collect();
        heads.sort_unstable();
        let _ = driver.publish();
        let found = snapshots(&path, seed);
        assert!(found.len() > 40, "only {} stores were seen", found.len());
        for (point, content) in found.iter().enumerate() {
            succeed(content, &heads, point);
        }
        total += found.len();
    }
    let _ = std::fs::remove_file(&path);
    println!("test killed_at_each_of_{total}_stores_loses_no_request_and_answers_none_twice ... ok");
}
