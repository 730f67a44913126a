//! The dirty log: what is marked is what a plain model says, before the guest can see an answer; logs that lie, are too small or vanish.

mod guest;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use guest::{Ask, Done, Driver, GUEST, Kind, RingSide, USER};
use proptest::prelude::*;
use qpair_bdev::Registry;
use qpair_bdev::malloc::Malloc;
use qpair_memory::{Mapping, Region};
use qpair_reactor::driver::Choice;
use qpair_reactor::event::Event;
use qpair_reactor::thread::{ReactorThread, spawn};
use qpair_reactor::{Config, ReactorId};
use qpair_vhost::{Addresses, Answer, Broken, Command, Failure, Options, QueueState, Source, Target, VhostError};
use qpair_wire::virtio::RingSize;
use qpair_wire::virtio_blk::RequestType;

const SLOTS: usize = 8;
const SIZE: u16 = 32;
const LOG_ALL: u64 = 1 << 26;
const PAGE: u64 = 4096;
/// Where the used area is marked from: no address of the guest's.
const USED_LOG: u64 = 0x10_0000 + 64;
const PATIENCE: Duration = Duration::from_secs(20);

fn bytes() -> u64 {
    Driver::bytes(SIZE, SLOTS).next_multiple_of(PAGE)
}

/// A log that covers all of the guest.
fn log_bytes() -> u64 {
    (GUEST + bytes()) / PAGE / 8 + 1
}

struct Bench {
    target: Arc<Target>,
    failures: Arc<Mutex<Vec<Failure>>>,
    reactor: Option<ReactorThread>,
    session: u64,
    driver: Driver,
    kick: Event,
    features: u64,
    log: Arc<Mapping>,
    ring_pages: u64,
    _memory: Arc<Mapping>,
}

impl Bench {
    fn new(kind: Kind, event_idx: bool) -> Self {
        let reactor = spawn(ReactorId(0), Config { spin_ns: 20_000, busy_poll: false }, Choice::Epoll, false).unwrap();
        let registry = Registry::new(vec![reactor.handle().clone()]);
        registry.register(Arc::new(Malloc::new("disk", 512, 4096, None, 512, 0).unwrap())).unwrap();
        let failures = Arc::new(Mutex::new(Vec::new()));
        let heard = failures.clone();
        let target = Target::new(registry, move |failure| heard.lock().unwrap().push(failure));
        target.create("vd", "disk", vec![reactor.handle().clone()], Options { packed_ring: true, ..Options::default() }).unwrap();
        let session = target.open("vd").unwrap();
        let memory = Mapping::memfd("guest", bytes() as usize).unwrap();
        let driver = Driver::new(kind, &memory, 0, SIZE, SLOTS, event_idx, kind.start());
        let features = 1 << 32 | 1 << 28 | kind.feature() | if event_idx { 1 << 29 } else { 0 };
        let ring_pages = driver.data_at(0) / PAGE;
        let fd: OwnedFd = memory.fd().unwrap().try_clone_to_owned().unwrap();
        let log = Mapping::memfd("log", log_bytes() as usize).unwrap();
        let bench = Self {
            target,
            failures,
            reactor: Some(reactor),
            session,
            driver,
            kick: Event::new().unwrap(),
            features,
            log,
            ring_pages,
            _memory: memory,
        };
        bench.say(Command::SetFeatures(features)).unwrap();
        bench.say(Command::SetMemTable(vec![guest::row(Source::Fd(fd), bytes())])).unwrap();
        bench.say(Command::SetVringNum { queue: 0, size: SIZE.into() }).unwrap();
        bench.say(Command::SetVringAddr { queue: 0, addresses: bench.driver.addresses() }).unwrap();
        bench
    }

    /// Running, and all of it logged.
    fn logging(kind: Kind, event_idx: bool) -> Self {
        let bench = Self::new(kind, event_idx);
        bench.log_to(bench.log.clone()).unwrap();
        bench.start().unwrap();
        bench
    }

    fn log_to(&self, log: Arc<Mapping>) -> Result<Answer, VhostError> {
        let fd = log.fd().unwrap().try_clone_to_owned().unwrap();
        self.say(Command::SetLogBase { fd, size: log.len() as u64, offset: 0 })?;
        self.say(Command::SetFeatures(self.features | LOG_ALL))?;
        self.say(Command::SetVringAddr { queue: 0, addresses: Addresses { log: Some(USED_LOG), ..self.driver.addresses() } })
    }

    fn start(&self) -> Result<Answer, VhostError> {
        self.say(Command::SetVringKick { queue: 0, kick: Some(self.kick.twin().unwrap()) })
    }

    fn say(&self, command: Command) -> Result<Answer, VhostError> {
        let (send, receive) = mpsc::channel();
        self.target.command(self.session, command, Box::new(move |answer| send.send(answer).unwrap()));
        receive.recv_timeout(PATIENCE).expect("an answer")
    }

    fn publish(&mut self) {
        if self.driver.publish() {
            self.kick.notify();
        }
    }

    fn reap(&mut self) -> Done {
        let begun = Instant::now();
        loop {
            if let Some(done) = self.driver.reap() {
                return done;
            }
            assert!(begun.elapsed() < PATIENCE, "no answer");
            std::hint::spin_loop();
        }
    }

    fn ask(&mut self, ask: &Ask) -> Done {
        self.driver.add(ask).expect("room");
        self.publish();
        self.reap()
    }

    /// The pages that are marked.
    fn marked(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; self.log.len()];
        Region::new(self.log.clone()).read(0, &mut bytes).unwrap();
        let bits = |(at, byte): (usize, u8)| (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| 8 * at as u64 + bit);
        bytes.into_iter().enumerate().filter(|(_, byte)| *byte != 0).flat_map(bits).collect()
    }

    /// Those of requests, not of the ring.
    fn marked_data(&self) -> BTreeSet<u64> {
        self.marked().into_iter().filter(|page| *page >= GUEST / PAGE + self.ring_pages).collect()
    }

    fn clear(&self) {
        let log = Region::new(self.log.clone());
        log.fill(0, self.log.len() as u64, 0).unwrap();
    }

    /// What a request lets the device write.
    fn model(&self, ask: &Ask, slot: usize) -> BTreeSet<u64> {
        let data = GUEST + self.driver.data_at(slot);
        let mut pages = BTreeSet::from([(data + u64::from(ask.bytes)) / PAGE]);
        if matches!(ask.kind, RequestType::IN | RequestType::GET_ID) && ask.bytes > 0 {
            pages.extend(data / PAGE..=(data + u64::from(ask.bytes) - 1) / PAGE);
        }
        pages
    }

    /// Where the ring's own writes of an answer to the used entry at `position` are marked: the entry and what publishes it.
    fn own(&self, position: u16) -> BTreeSet<u64> {
        match &self.driver.side {
            RingSide::Split(_) => {
                let size = RingSize::new(SIZE.into()).unwrap();
                let entry = USED_LOG + size.used_entry_offset(position % SIZE);
                BTreeSet::from([entry / PAGE, (entry + 7) / PAGE, (USED_LOG + 2) / PAGE])
            }
            RingSide::Packed(_) => BTreeSet::from([(self.driver.addresses().desc - USER + GUEST) / PAGE]),
        }
    }

    fn state(&self) -> QueueState {
        self.target.info(Some("vd")).unwrap()[0].sessions[0].queues[0].state
    }

    fn wait_for_failure(&self) -> Broken {
        let begun = Instant::now();
        loop {
            if let Some(failure) = self.failures.lock().unwrap().first() {
                return failure.broken.clone();
            }
            assert!(begun.elapsed() < PATIENCE, "no failure");
            std::thread::yield_now();
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let (send, receive) = mpsc::channel();
        self.target.command(
            self.session,
            Command::Close,
            Box::new(move |answer| {
                let _ = send.send(answer.is_ok());
            }),
        );
        let closed = receive.recv_timeout(PATIENCE);
        if let Some(mut reactor) = self.reactor.take() {
            reactor.join();
        }
        assert!(closed == Ok(true) || std::thread::panicking());
    }
}

fn asks() -> impl Strategy<Value = (Ask, bool)> {
    let kind = prop::sample::select(vec![
        RequestType::IN,
        RequestType::IN,
        RequestType::OUT,
        RequestType::FLUSH,
        RequestType::GET_ID,
        RequestType(99),
    ]);
    let cuts = || prop::collection::vec(0u32..8300, 0..3);
    (kind, 0u64..5000, 0u32..=16, cuts(), cuts(), prop::option::of(0usize..3), any::<bool>()).prop_map(
        |(kind, sector, blocks, mut read_cuts, mut write_cuts, direct, last)| {
            let bytes = match kind {
                RequestType::FLUSH => 0,
                RequestType::GET_ID => 20,
                _ => blocks * 512,
            };
            read_cuts.sort_unstable();
            write_cuts.sort_unstable();
            (Ask { read_cuts, write_cuts, direct, ..Ask::new(kind, sector, bytes) }, last)
        },
    )
}

fn marks_are_the_models(kind: Kind, event_idx: bool, asks: &[(Ask, bool)]) {
    let mut bench = Bench::logging(kind, event_idx);
    bench.clear();
    let (mut expected, mut open) = (BTreeSet::new(), vec![None; SLOTS]);
    let (mut own, mut position) = (BTreeSet::new(), 0);
    for (at, (ask, last)) in asks.iter().enumerate() {
        if let Some((_, slot)) = bench.driver.add(ask) {
            open[slot] = Some(bench.model(ask, slot));
        }
        if !last && at + 1 < asks.len() && bench.driver.next_slot().is_some() {
            continue;
        }
        bench.publish();
        while bench.driver.outstanding() > 0 {
            let done = bench.reap();
            let pages = open[done.slot].take().expect("asked");
            assert!(bench.marked().is_superset(&pages), "an answer is seen before what was written for it is marked");
            expected.extend(pages);
            own.extend(bench.own(position));
            position += 1;
        }
        if *last {
            // A front end that reads and clears: what is written after that is marked again.
            assert_eq!(bench.marked_data(), expected);
            bench.say(Command::SetVringEnable { queue: 0, enabled: false }).unwrap();
            assert!(bench.marked().is_superset(&own), "what the ring wrote of itself: {own:x?}");
            bench.say(Command::SetVringEnable { queue: 0, enabled: true }).unwrap();
            bench.clear();
            expected.clear();
            own.clear();
        }
    }
    assert_eq!(bench.marked_data(), expected);
    assert!(bench.failures.lock().unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn the_marked_pages_are_those_of_a_plain_model(packed in any::<bool>(), event_idx in any::<bool>(), asks in prop::collection::vec(asks(), 1..60)) {
        marks_are_the_models(if packed { Kind::Packed } else { Kind::Split }, event_idx, &asks);
    }
}

#[test]
fn a_buffer_is_marked_before_its_answer_can_be_seen() {
    for kind in Kind::BOTH {
        let mut bench = Bench::logging(kind, true);
        for number in 0..2000 {
            let ask = Ask::new(RequestType::IN, number % 4000, 4096);
            let (_, slot) = bench.driver.add(&ask).unwrap();
            let model = bench.model(&ask, slot);
            bench.publish();
            bench.reap();
            assert!(bench.marked().is_superset(&model), "request {number}");
            bench.clear();
        }
    }
}

#[test]
fn without_the_flag_of_the_ring_only_buffers_are_marked() {
    for kind in Kind::BOTH {
        let mut bench = Bench::logging(kind, true);
        bench.say(Command::SetVringAddr { queue: 0, addresses: bench.driver.addresses() }).unwrap();
        bench.clear();
        let ask = Ask::new(RequestType::IN, 0, 8192);
        let slot = bench.driver.next_slot().unwrap();
        bench.ask(&ask);
        bench.say(Command::GetVringBase { queue: 0 }).unwrap();
        assert_eq!(bench.marked(), bench.model(&ask, slot));
    }
}

#[test]
fn logging_is_switched_on_and_off_under_load_and_loses_no_request() {
    for kind in Kind::BOTH {
        let mut bench = Bench::new(kind, true);
        bench.start().unwrap();
        let mut answered = 0;
        for round in 0..60u64 {
            let mut asked = 0;
            while let Some((_, slot)) = bench.driver.add(&Ask::new(RequestType::OUT, round, 512)) {
                assert!(slot < SLOTS);
                asked += 1;
            }
            bench.publish();
            match round % 3 {
                0 => bench.log_to(bench.log.clone()),
                1 => bench.log_to(Mapping::memfd("another", log_bytes() as usize).unwrap()),
                _ => bench.say(Command::SetFeatures(bench.features)),
            }
            .unwrap();
            for _ in 0..asked {
                assert_eq!(bench.reap().status, 0);
                answered += 1;
            }
            if round % 3 == 2 {
                bench.clear();
                bench.ask(&Ask::new(RequestType::IN, 0, 4096));
                assert_eq!(bench.marked(), BTreeSet::new(), "logging is off");
            }
        }
        assert_eq!((answered, bench.state()), (60 * SLOTS, QueueState::Running));
    }
}

#[test]
fn log_all_without_a_log_logs_nothing_and_serves() {
    let mut bench = Bench::new(Kind::Split, true);
    bench.say(Command::SetFeatures(bench.features | LOG_ALL)).unwrap();
    bench.start().unwrap();
    assert_eq!(bench.ask(&Ask::new(RequestType::IN, 0, 4096)).status, 0);
}

#[test]
fn a_reset_forgets_the_log() {
    let bench = Bench::logging(Kind::Split, true);
    let before = Arc::strong_count(&bench.log);
    bench.say(Command::ResetDevice).unwrap();
    assert_eq!(bench.state(), QueueState::Stopped);
    bench.clear();
    bench.say(Command::SetFeatures(bench.features | LOG_ALL)).unwrap();
    assert_eq!((Arc::strong_count(&bench.log), bench.marked()), (before, BTreeSet::new()));
}

#[test]
fn the_front_end_is_told_that_something_was_marked() {
    let mut bench = Bench::logging(Kind::Split, true);
    let told = Event::new().unwrap();
    bench.say(Command::SetLogFd(told.twin().unwrap())).unwrap();
    bench.ask(&Ask::new(RequestType::IN, 0, 512));
    bench.say(Command::GetVringBase { queue: 0 }).unwrap();
    assert!(told.take() > 0, "the event was notified");
}

// -- logs that cannot be used -----------------------------------------------------------------------

#[test]
fn a_log_that_does_not_cover_the_used_ring_is_refused_and_the_ring_stays_stopped() {
    let bench = Bench::new(Kind::Split, true);
    let small = Mapping::memfd("small", 8).unwrap();
    bench.start().unwrap();
    let refused = bench.log_to(small).unwrap_err();
    assert_eq!(refused.to_string(), "Invalid argument: log address 0x100040: within the dirty log, which ends at 0x40000");
    assert_eq!(bench.state(), QueueState::Stopped);
    let addresses = Addresses { log: Some(u64::MAX - 3), ..bench.driver.addresses() };
    let wraps = bench.say(Command::SetVringAddr { queue: 0, addresses });
    assert!(wraps.is_ok(), "it was not started again by itself");
    assert!(bench.start().unwrap_err().to_string().starts_with("Invalid argument: log address 0xfffffffffffffffc: within the dirty log"));
}

#[test]
fn a_log_that_does_not_cover_a_packed_ring_is_refused() {
    let bench = Bench::new(Kind::Packed, true);
    bench.start().unwrap();
    let refused = bench.log_to(Mapping::memfd("small", 64).unwrap()).unwrap_err();
    assert!(
        refused.to_string().starts_with("Invalid argument: the descriptor table's address 0x40000000: within the dirty log"),
        "{refused}"
    );
}

#[test]
fn a_page_beyond_the_log_ends_the_queue_before_anything_is_written_there() {
    for (kind, ring) in [(Kind::Split, true), (Kind::Packed, false)] {
        let mut bench = Bench::new(kind, true);
        // The used ring's marks fit, the guest's pages do not.
        let log = Mapping::memfd("small", 64).unwrap();
        let fd = log.fd().unwrap().try_clone_to_owned().unwrap();
        bench.say(Command::SetLogBase { fd, size: 64, offset: 0 }).unwrap();
        bench.say(Command::SetFeatures(bench.features | LOG_ALL)).unwrap();
        let addresses = Addresses { log: ring.then_some(USED_LOG), ..bench.driver.addresses() };
        bench.say(Command::SetVringAddr { queue: 0, addresses }).unwrap();
        bench.start().unwrap();
        let slot = bench.driver.next_slot().unwrap();
        bench.driver.fill(slot, 4097, 0x5a);
        bench.driver.add(&Ask::new(RequestType::IN, 0, 4096)).unwrap();
        bench.publish();
        let Broken::Unlogged { address, length, end, .. } = bench.wait_for_failure() else { panic!("another reason") };
        assert_eq!((address, length, end), (GUEST + bench.driver.data_at(slot) + 4096, 1, 64 * 8 * PAGE));
        assert!(bench.driver.read(slot, 4096).iter().all(|byte| *byte == 0x5a));
    }
}

#[test]
fn a_log_that_ends_within_a_buffer_refuses_the_buffer() {
    let mut bench = Bench::new(Kind::Split, true);
    let pages = GUEST / PAGE + bench.driver.data_at(0) / PAGE;
    let log = Mapping::memfd("short", (pages / 8) as usize).unwrap();
    bench.log_to(log).unwrap();
    bench.start().unwrap();
    bench.driver.add(&Ask::new(RequestType::IN, 0, 8192)).unwrap();
    bench.publish();
    assert!(matches!(bench.wait_for_failure(), Broken::Unlogged { .. }));
}

/// A file without seals, which may shrink.
fn file(bytes: u64) -> File {
    let path = std::env::temp_dir().join(format!("qpair-log-{}-{:?}", std::process::id(), std::thread::current().id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn a_log_that_is_truncated_ends_the_session_by_name() {
    for kind in Kind::BOTH {
        let mut bench = Bench::new(kind, true);
        let log = file(log_bytes());
        bench.say(Command::SetLogBase { fd: log.try_clone().unwrap().into(), size: log_bytes(), offset: 0 }).unwrap();
        bench.say(Command::SetFeatures(bench.features | LOG_ALL)).unwrap();
        bench.start().unwrap();
        bench.ask(&Ask::new(RequestType::IN, 0, 512));
        log.set_len(0).unwrap();
        bench.ask(&Ask::new(RequestType::IN, 0, 512));
        let broken = bench.wait_for_failure();
        assert!(broken == Broken::LogVanished && broken.ends_session(), "{broken}");
        assert_eq!(broken.to_string(), "the dirty log vanished: its file was truncated");
    }
}

#[test]
fn a_log_that_is_smaller_than_it_is_said_to_be_is_refused() {
    let bench = Bench::new(Kind::Split, true);
    let say = |fd: OwnedFd, size, offset| bench.say(Command::SetLogBase { fd, size, offset }).unwrap_err().to_string();
    let log = || OwnedFd::from(file(4096));
    assert_eq!(say(log(), 8192, 0), "range 0x0+0x2000 leaves its region of 0x1000 bytes");
    assert_eq!(say(log(), 4096, 1), "range 0x0+0x1001 leaves its region of 0x1000 bytes");
    assert_eq!(say(log(), 0, 0), "Invalid argument: log mmap_size 0: more than 0");
    assert_eq!(say(log(), 2, u64::MAX), format!("Invalid argument: log mmap_offset {}: offset + size below 2^64", u64::MAX));
}

#[test]
fn what_is_no_memory_is_refused_as_a_log() {
    let bench = Bench::new(Kind::Split, true);
    let (reader, _writer) = std::io::pipe().unwrap();
    let null = File::open("/dev/null").unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    for fd in [OwnedFd::from(reader), null.into(), read_only.into()] {
        bench.say(Command::SetLogBase { fd, size: 4096, offset: 0 }).unwrap_err();
    }
    bench.start().unwrap();
    assert_eq!(bench.state(), QueueState::Running);
}
