//! The target alone: one thread plays the guest and turns the reactor, so that what is counted is the ring's and the layer's work.
//!
//! `cargo run --release -p qpair-vhost --example ring -- [null|malloc] [depth] [requests] [cross] [packed] [inflight]` prints one line of JSON. Under
//! `valgrind --tool=callgrind`, the difference of two runs with different request counts gives instructions a request.
//!
//! With `packed` the ring is a packed one, its chains direct as the split one's are: the driver writes three descriptors for each request.
//!
//! With `inflight` the requests are tracked in an inflight region.
//!
//! With `cross` the reactor runs on core 0 and the guest on core 1: the round trip as a guest sees it that does nothing but wait.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use qpair_bdev::{Device, Registry, malloc::Malloc, null::Null};
use qpair_memory::{Mapping, Pages, Region, Shared, SharedIndex};
use qpair_reactor::driver::{Choice, open};
use qpair_reactor::{Clock, Config, Handle, Reactor, ReactorId, Turn, thread};
use qpair_vhost::{Addresses, Command, MemoryRow, Options, Source, Target};
use qpair_wire::vhost_user::{inflight_packed_queue_bytes, inflight_queue_bytes};
use qpair_wire::virtio::{Desc, DescFlags, Features, RingLayout, RingSize};
use qpair_wire::virtio_blk::{RequestHeader, RequestType};
use qpair_wire::virtio_packed::{PackedSize, Position, turn};
use zerocopy::IntoBytes;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = (512 << 20) / BLOCK;
const QUEUE: u32 = 512;
const HEADERS: u64 = 1 << 20;
const STATUSES: u64 = 2 << 20;
const DATA: u64 = 4 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let module = arguments.next().unwrap_or_else(|| "null".to_owned());
    let depth: u16 = arguments.next().map_or(Ok(128), |text| text.parse())?;
    let requests: u64 = arguments.next().map_or(Ok(1_000_000), |text| text.parse())?;
    let device: Arc<dyn Device> = match module.as_str() {
        "null" => Arc::new(Null::new("bench", 4096, BLOCKS, None, 0)),
        "malloc" => Arc::new(Malloc::new("bench", 4096, BLOCKS, None, 0, 0)?),
        other => return Err(format!("module {other}: null or malloc").into()),
    };
    let polling = Config::default();
    let words: Vec<String> = arguments.collect();
    let [cross, packed, tracked] = ["cross", "packed", "inflight"].map(|word| words.iter().any(|given| given == word));
    let mut guest = Guest::new(packed)?;
    guest.tracked = tracked;
    let each = if cross {
        let server = thread::spawn(ReactorId(0), polling, Choice::Auto, true)?;
        thread::pin_to(1)?;
        guest.connect(server.handle(), device, std::thread::yield_now)?;
        guest.measure(depth, requests, std::hint::spin_loop)
    } else {
        let mut reactor = Reactor::new(ReactorId(0), polling, Clock::Monotonic, open(Choice::Epoll)?);
        let handle = reactor.handle();
        guest.connect(&handle, device, || assert!(reactor.turn() != Turn::Stopped))?;
        guest.measure(depth, requests, || assert!(reactor.turn() != Turn::Stopped))
    };
    println!(
        r#"{{"module":"{module}","packed":{packed},"inflight":{tracked},"depth":{depth},"requests":{requests},"ns_per_request":{each:.1}}}"#
    );
    Ok(())
}

/// The driver's side, as plain as can be: chains that never change, 128 or so of them, in order.
struct Guest {
    memory: Arc<Mapping>,
    region: Region,
    layout: RingLayout,
    avail: SharedIndex,
    ring: Shared<u16>,
    used: SharedIndex,
    next: u16,
    random: u64,
    packed: Option<Packed>,
    tracked: bool,
}

/// A packed ring in the same memory: two words a descriptor, and where its driver writes and reads next.
struct Packed {
    words: Shared<u64>,
    size: PackedSize,
    next: Position,
    used: Position,
}

impl Packed {
    /// A batch of requests, the first descriptor's flags last.
    fn add(&mut self, depth: u16) {
        let (mut first, start) = (0, self.next);
        for slot in 0..u64::from(depth) {
            let chain = [
                (HEADERS + 16 * slot, 16, DescFlags::NEXT),
                (DATA + BLOCK * slot, BLOCK, DescFlags::NEXT | DescFlags::WRITE),
                (STATUSES + slot, 1, DescFlags::WRITE),
            ];
            for (address, length, flags) in chain {
                let at = 2 * usize::from(self.next.index());
                let second = length | slot << 32 | u64::from(flags.bits() | self.next.available()) << 48;
                self.words.store_atomic(at, address, Ordering::Relaxed);
                if self.next == start {
                    first = second;
                } else {
                    self.words.store_atomic(at + 1, second, Ordering::Relaxed);
                }
                self.next = self.size.advance(self.next, 1);
            }
        }
        self.words.store_atomic(2 * usize::from(start.index()) + 1, first, Ordering::Release);
    }

    fn wait(&mut self, depth: u16, mut until: impl FnMut()) {
        for _ in 0..depth {
            let at = 2 * usize::from(self.used.index()) + 1;
            while turn((self.words.load_atomic(at, Ordering::Acquire) >> 48) as u16) != self.used.used() {
                until();
            }
            self.used = self.size.advance(self.used, 3);
        }
    }
}

impl Guest {
    fn new(packed: bool) -> Result<Self, Box<dyn Error>> {
        let memory = Mapping::anonymous(8 << 20, Pages::Normal)?;
        let region = Region::new(memory.clone());
        let size = RingSize::new(QUEUE).ok_or("queue size")?;
        let layout = size.layout(0, 4096).ok_or("layout")?;
        let ring = || -> Result<Packed, Box<dyn Error>> {
            let words = Shared::new(&region, 0, 2 * QUEUE as usize)?;
            Ok(Packed { words, size: PackedSize::new(QUEUE).ok_or("queue size")?, next: Position::START, used: Position::START })
        };
        let packed = packed.then(ring).transpose()?;
        for index in 0..if packed.is_some() { 0 } else { QUEUE as u16 / 4 } {
            let slot = u64::from(index);
            let (header, data, status) = (HEADERS + 16 * slot, DATA + BLOCK * slot, STATUSES + slot);
            let chain = [
                Desc::new(header, 16, DescFlags::NEXT, 3 * index + 1),
                Desc::new(data, BLOCK as u32, DescFlags::NEXT | DescFlags::WRITE, 3 * index + 2),
                Desc::new(status, 1, DescFlags::WRITE, 0),
            ];
            region.write(layout.desc + size.desc_offset(3 * index), chain.as_bytes())?;
        }
        Ok(Self {
            avail: SharedIndex::new(&region, layout.avail + 2)?,
            ring: Shared::new(&region, layout.avail + 4, QUEUE as usize)?,
            used: SharedIndex::new(&region, layout.used + 2)?,
            memory,
            region,
            layout,
            next: 0,
            random: 0x9E37_79B9_7F4A_7C15,
            packed,
            tracked: false,
        })
    }

    /// Starts the ring; `turn` is called until it runs.
    fn connect(&mut self, reactor: &Handle, device: Arc<dyn Device>, mut turn: impl FnMut()) -> Result<(), Box<dyn Error>> {
        let registry = Registry::new(vec![reactor.clone()]);
        registry.register(device)?;
        let target = Target::new(registry, |failure| panic!("{}", failure.broken));
        target.create("disk", "bench", vec![reactor.clone()], Options { packed_ring: true, ..Options::default() })?;
        let session = target.open("disk")?;
        let row = MemoryRow { guest_address: 0, length: 8 << 20, user_address: 0, offset: 0, source: Source::Mapping(self.memory.clone()) };
        let addresses = Addresses { desc: self.layout.desc, avail: self.layout.avail, used: self.layout.used, log: None };
        let mut features = Features::VERSION_1 | Features::RING_EVENT_IDX;
        features.set(Features::RING_PACKED, self.packed.is_some());
        let inflight = if self.tracked { Some(self.inflight()?) } else { None };
        let commands = [
            Some(Command::SetFeatures(features.bits())),
            inflight,
            Some(Command::SetMemTable(vec![row])),
            Some(Command::SetVringNum { queue: 0, size: QUEUE }),
            Some(Command::SetVringAddr { queue: 0, addresses }),
            Some(Command::SetVringKick { queue: 0, kick: None }),
        ];
        let answered = Arc::new(AtomicUsize::new(0));
        let commands: Vec<_> = commands.into_iter().flatten().collect();
        let asked = commands.len();
        for command in commands {
            let answered = answered.clone();
            let done = move |outcome: Result<_, _>| {
                drop(outcome.unwrap_or_else(|error| panic!("{error}")));
                answered.fetch_add(1, Ordering::Relaxed);
            };
            target.command(session, command, Box::new(done));
        }
        while answered.load(Ordering::Relaxed) < asked {
            turn();
        }
        Ok(())
    }

    /// A new region, as a front end gives it.
    fn inflight(&self) -> Result<Command, Box<dyn Error>> {
        let queue_size = QUEUE as u16;
        let size = if self.packed.is_some() { inflight_packed_queue_bytes(queue_size) } else { inflight_queue_bytes(queue_size) };
        let mapping = Mapping::memfd("inflight", size as usize)?;
        let fd = mapping.fd().ok_or("a memfd")?.try_clone_to_owned()?;
        Ok(Command::SetInflight { fd, size, offset: 0, num_queues: 1, queue_size })
    }

    /// Nanoseconds a request.
    fn measure(&mut self, depth: u16, requests: u64, mut turn: impl FnMut()) -> f64 {
        self.run(depth, 1000, &mut turn);
        let start = Instant::now();
        self.run(depth, requests, &mut turn);
        start.elapsed().as_nanos() as f64 / requests as f64
    }

    fn run(&mut self, depth: u16, requests: u64, turn: &mut impl FnMut()) {
        let mut done = 0;
        while done < requests {
            for position in 0..depth {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                let header = RequestHeader::new(RequestType::IN, (self.random % BLOCKS) * (BLOCK / 512));
                let written = self.region.write(HEADERS + 16 * u64::from(position), header.as_bytes());
                written.unwrap_or_else(|error| panic!("{error}"));
                if self.packed.is_none() {
                    self.ring.store(usize::from(self.next.wrapping_add(position)) % QUEUE as usize, 3 * position);
                }
            }
            self.next = self.next.wrapping_add(depth);
            match &mut self.packed {
                Some(ring) => {
                    ring.add(depth);
                    ring.wait(depth, &mut *turn);
                }
                None => {
                    self.avail.store(self.next, Ordering::Release);
                    while self.used.load(Ordering::Acquire) != self.next {
                        turn();
                    }
                }
            }
            done += u64::from(depth);
        }
    }
}
