//! Bytes become a ring, the memory around it and what happens to it; a real session serves it in the simulator.
//!
//! Shared by the fuzz targets (`fuzz/`) and by the test that replays what they found (`replay.rs`). Panics if the device panics,
//! never comes to rest, or keeps an I/O, a channel, a poller or memory when the session is over.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use qpair_bdev::malloc::Malloc;
use qpair_bdev::null::Null;
use qpair_bdev::{Device, Layer, Registry};
use qpair_memory::{Mapping, Region};
use qpair_reactor::event::Event;
use qpair_reactor::sim::World;
use qpair_vhost::{Addresses, Command, Inflight, MemoryRow, Options, Source, Target};
use qpair_wire::virtio::RingSize;
use qpair_wire::virtio_packed::PackedSize;

const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000;
const MEMORY: usize = 64 << 10;
/// I/Os of the reactor: few, so that a ring meets the end of them.
const IOS: u32 = 24;
const STEPS_MAX: usize = 24;

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }
}

/// A ring of any content.
pub fn ring(data: &[u8]) {
    let mut bytes = Bytes(data);
    Run::new(&mut bytes, None).play(bytes);
}

/// A ring whose predecessor left an inflight region of any content.
pub fn inflight(data: &[u8]) {
    let mut bytes = Bytes(data);
    let length = usize::from(bytes.half()).min(bytes.0.len());
    let (region, rest) = bytes.0.split_at(length);
    let mut bytes = Bytes(rest);
    Run::new(&mut bytes, Some(region)).play(bytes);
}

struct Run {
    world: World,
    target: Arc<Target>,
    session: u64,
    packed: bool,
    size: u16,
    areas: Areas,
    memory: Arc<Mapping>,
    region: Region,
    view: Weak<Mapping>,
    kick: Event,
    base: u16,
    features: u64,
}

/// From the start of memory.
struct Areas {
    desc: u64,
    avail: u64,
    used: u64,
}

impl Areas {
    fn of(size: u16, packed: bool) -> Self {
        if packed {
            let layout = PackedSize::new(size.into()).and_then(|size| size.layout(0)).expect("a layout");
            return Self { desc: layout.desc, avail: layout.driver, used: layout.device };
        }
        let layout = RingSize::new(size.into()).and_then(|size| size.layout(0, 4)).expect("a layout");
        Self { desc: layout.desc, avail: layout.avail, used: layout.used }
    }
}

impl Run {
    fn new(bytes: &mut Bytes<'_>, inflight: Option<&[u8]>) -> Self {
        let (config, power, base) = (bytes.byte(), bytes.byte(), bytes.half());
        let packed = config & 32 != 0;
        let mut world = World::new(u64::from(bytes.byte()), 1);
        world.with(0, |reactor| Layer::install(reactor, IOS));
        let registry = Registry::new(world.handles());
        let block_size = if config & 1 == 0 { 512 } else { 4096 };
        let device: Arc<dyn Device> = match config & 2 {
            0 => Arc::new(Null::new("disk", block_size, 256, None, 512)),
            _ => Arc::new(Malloc::new("disk", block_size, 256, None, 512, 0).expect("a disk")),
        };
        registry.register(device).expect("registered");
        let target = Target::new(registry, |_| {});
        target
            .create("vd", "disk", world.handles(), Options { readonly: config & 4 != 0, packed_ring: true, num_queues: 1 })
            .expect("created");
        let session = target.open("vd").expect("opened");
        let size = if packed { u16::from(power) + 1 } else { 1 << (power % 9) };
        let memory = Mapping::memfd("guest", MEMORY).expect("memory");
        let mut run = Self {
            region: Region::new(memory.clone()),
            world,
            target,
            session,
            packed,
            size,
            areas: Areas::of(size, packed),
            memory,
            view: Weak::new(),
            kick: Event::simulated(),
            base,
            features: 0,
        };
        let features =
            1 << 32 | if config & 8 != 0 { 1 << 29 } else { 0 } | if config & 16 != 0 { 1 << 28 } else { 0 } | u64::from(packed) << 34;
        run.features = features;
        run.say(Command::SetFeatures(features));
        let index = base.to_le_bytes();
        if !packed {
            run.region.write(run.areas.avail + 2, &index).expect("inside");
            run.region.write(run.areas.used + 2, &index).expect("inside");
        }
        if let Some(content) = inflight {
            let (_, fd, length) = Inflight::create(1, size, packed).expect("a region");
            let mapping = Mapping::shared(fd.as_fd(), length).expect("mapped");
            Region::new(mapping).write(0, &content[..content.len().min(length as usize)]).expect("inside");
            run.say(Command::SetInflight { fd, size: length, offset: 0, num_queues: 1, queue_size: size });
        }
        run
    }

    /// Says it and lets the world run a little: the answer may be a refusal.
    fn say(&mut self, command: Command) {
        self.target.command(self.session, command, Box::new(|_| {}));
        self.world.run(20);
    }

    fn show_memory(&mut self) {
        let view = Mapping::shared(self.memory.fd().expect("a memfd"), MEMORY as u64).expect("mapped");
        self.view = Arc::downgrade(&view);
        let source = Source::Mapping(view);
        self.say(Command::SetMemTable(vec![MemoryRow {
            guest_address: GUEST,
            length: MEMORY as u64,
            user_address: USER,
            offset: 0,
            source,
        }]));
    }

    fn play(mut self, mut bytes: Bytes<'_>) {
        let steps = usize::from(bytes.byte()) % STEPS_MAX;
        let script: Vec<[u8; 4]> = (0..steps).map(|_| [bytes.byte(), bytes.byte(), bytes.byte(), bytes.byte()]).collect();
        // Descriptors, then what they may point to. Addresses are near memory if the input's high bytes say nothing else.
        let table = bytes.0.len().min(16 * usize::from(self.size));
        self.region.write(0, &bytes.0[..table]).expect("inside");
        let rest = &bytes.0[table..];
        let room = MEMORY - 32768;
        self.region.write(32768, &rest[..rest.len().min(room)]).expect("inside");
        for index in 0..if self.packed { 0 } else { self.size } {
            let at = self.areas.avail + 4 + 2 * u64::from(index);
            self.region.write(at, &index.to_le_bytes()).expect("inside");
        }
        self.show_memory();
        self.say(Command::SetVringNum { queue: 0, size: u32::from(self.size) });
        let addresses = Addresses { desc: USER + self.areas.desc, avail: USER + self.areas.avail, used: USER + self.areas.used, log: None };
        self.say(Command::SetVringAddr { queue: 0, addresses });
        // Of a packed ring mostly the start, sometimes anything.
        let base = if self.packed && self.base & 3 != 0 { 0x8000_8000 } else { u32::from(self.base) };
        self.say(Command::SetVringBase { queue: 0, base });
        self.start();
        for [what, low, high, more] in script {
            self.step(what, u16::from_le_bytes([low, high]), more);
        }
        self.end();
    }

    fn start(&mut self) {
        let kick = self.kick.twin().ok();
        self.say(Command::SetVringKick { queue: 0, kick });
    }

    /// Makes some descriptors of a packed ring available, the last one first; or one of them anything.
    fn make_available(&mut self, value: u16, more: u8) {
        let odd = more & 0xc0 == 0xc0;
        let (first, count) = if odd { (value % self.size, 1) } else { (0, u16::from(more) % (self.size + 1)) };
        for index in (first..first + count).rev() {
            let at = 16 * u64::from(index) + 14;
            let mut flags = [0; 2];
            self.region.read(at, &mut flags).expect("inside");
            let turn = if odd { u16::from(more & 1) << 7 | u16::from(more & 2) << 14 } else { 1 << 7 };
            self.region.write(at, &(u16::from_le_bytes(flags) & 0x7f7f | turn).to_le_bytes()).expect("inside");
        }
    }

    /// A log that is as long as it says, or shorter, and covers memory or not.
    fn set_log(&mut self, value: u16, more: u8) {
        let log = Mapping::memfd("log", 4096).expect("memory");
        let fd = log.fd().expect("a memfd").try_clone_to_owned().expect("a descriptor");
        let size = if more & 3 == 0 { u64::from(value) } else { 64 };
        self.say(Command::SetLogBase { fd, size, offset: u64::from(more >> 2) });
    }

    fn step(&mut self, what: u8, value: u16, more: u8) {
        match if what < 240 { what % 8 } else { what } {
            0..=2 if self.packed => {
                self.make_available(value, more);
                self.kick.notify();
            }
            0..=2 => {
                // Most indices are a few entries ahead; some are anything.
                let index = if more & 0xc0 == 0xc0 { value } else { self.base.wrapping_add(u16::from(more) % (self.size + 1)) };
                self.region.write(self.areas.avail + 2, &index.to_le_bytes()).expect("inside");
                self.kick.notify();
            }
            3 => self.region.write(u64::from(value), &[more]).expect("inside"),
            4 => {
                self.say(Command::GetVringBase { queue: 0 });
                self.start();
            }
            5 => self.show_memory(),
            6 => self.say(Command::SetVringEnable { queue: 0, enabled: more & 1 == 0 }),
            240..=247 => self.say(Command::SetFeatures(self.features | u64::from(more & 1) << 26)),
            248..=255 => self.set_log(value, more),
            _ => self.say(Command::SetVringAddr {
                queue: 0,
                addresses: Addresses {
                    desc: USER + u64::from(value),
                    avail: USER + u64::from(more) * 64,
                    used: USER + 8192,
                    log: (more & 1 == 1).then_some(GUEST + 8192),
                },
            }),
        }
        self.world.run(100);
    }

    fn end(mut self) {
        let closed = Arc::new(AtomicUsize::new(0));
        let count = closed.clone();
        let reply = move |outcome: Result<_, _>| {
            outcome.map(drop).expect("closing is never refused");
            count.fetch_add(1, Ordering::Relaxed);
        };
        self.target.command(self.session, Command::Close, Box::new(reply));
        self.world.settle();
        assert_eq!(closed.load(Ordering::Relaxed), 1, "closed");
        assert!(self.view.upgrade().is_none(), "guest memory is held");
        self.world.with(0, |reactor| {
            let (all, free) = Layer::of(reactor).borrow().ios();
            assert_eq!(all, free, "I/Os are missing");
            assert!(reactor.stats().pollers.iter().all(|poller| !poller.name.starts_with("vhost")), "a poller is left");
        });
        self.world.finish();
    }
}
