//! Sessions on real reactor threads, with real eventfds: kicks, interrupts, data, every request, and memory that vanishes.

mod guest;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use guest::{Ask, Done, Driver, Kind};
use qpair_bdev::Registry;
use qpair_bdev::malloc::Malloc;
use qpair_memory::Mapping;
use qpair_reactor::driver::Choice;
use qpair_reactor::event::Event;
use qpair_reactor::thread::{ReactorThread, spawn};
use qpair_reactor::{Config, ReactorId};
use qpair_vhost::{Answer, Broken, Change, Coalescing, Command, Failure, Options, QueueState, Source, Target, VhostError};
use qpair_wire::virtio_blk::{RequestType, Segment, SegmentFlags};
use zerocopy::IntoBytes;

const SLOTS: usize = 32;
const FEATURES: u64 = 1 << 32 | 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const PATIENCE: Duration = Duration::from_secs(20);

struct Stack {
    target: Arc<Target>,
    failures: Arc<Mutex<Vec<Failure>>>,
    reactors: Vec<ReactorThread>,
}

impl Stack {
    fn new(reactors: u32, choice: Choice) -> Self {
        let threads: Vec<_> =
            (0..reactors).map(|id| spawn(ReactorId(id), Config { spin_ns: 20_000, busy_poll: false }, choice, false).unwrap()).collect();
        let registry = Registry::new(threads.iter().map(|thread| thread.handle().clone()).collect());
        for (name, block_size) in [("small", 512), ("large", 4096)] {
            registry
                .register(Arc::new(Malloc::new(name, block_size, (4 << 20) / u64::from(block_size), None, block_size, 0).unwrap()))
                .unwrap();
        }
        let failures = Arc::new(Mutex::new(Vec::new()));
        let heard = failures.clone();
        let target = Target::new(registry, move |failure| heard.lock().unwrap().push(failure));
        Self { target, failures, reactors: threads }
    }

    fn export(&self, name: &str, bdev: &str, readonly: bool, queues: u32) {
        let handles = self.reactors.iter().map(|thread| thread.handle().clone()).collect();
        self.target.create(name, bdev, handles, Options { readonly, packed_ring: true, num_queues: queues }).unwrap();
    }
}

struct Machine {
    target: Arc<Target>,
    name: String,
    session: u64,
    _memory: Arc<Mapping>,
    queues: Vec<(Driver, Event, Event)>,
}

impl Machine {
    /// Connects; `file`: memory that can be truncated.
    fn new(stack: &Stack, name: &str, kind: Kind, queues: usize, entries: u16, event_idx: bool, file: Option<&File>) -> Self {
        let each = Driver::bytes(entries, SLOTS).next_multiple_of(4096);
        let bytes = each * queues as u64;
        let memory = match file {
            None => Mapping::memfd("guest", bytes as usize).unwrap(),
            Some(file) => {
                file.set_len(bytes).unwrap();
                Mapping::shared(std::os::fd::AsFd::as_fd(file), bytes).unwrap()
            }
        };
        let fd: OwnedFd = match file {
            None => memory.fd().unwrap().try_clone_to_owned().unwrap(),
            Some(file) => file.try_clone().unwrap().into(),
        };
        let driver = |queue| Driver::new(kind, &memory, queue * each, entries, SLOTS, event_idx, kind.start());
        let rings = (0..queues as u64).map(|queue| (driver(queue), Event::new().unwrap(), Event::new().unwrap()));
        let machine = Self {
            target: stack.target.clone(),
            name: name.to_owned(),
            session: stack.target.open(name).unwrap(),
            queues: rings.collect(),
            _memory: memory,
        };
        machine.say(Command::SetFeatures(FEATURES | kind.feature() | if event_idx { EVENT_IDX } else { 0 })).unwrap();
        machine.say(Command::SetMemTable(vec![guest::row(Source::Fd(fd), bytes)])).unwrap();
        for (index, (driver, kick, call)) in machine.queues.iter().enumerate() {
            let queue = index as u16;
            machine.say(Command::SetVringNum { queue, size: entries.into() }).unwrap();
            machine.say(Command::SetVringAddr { queue, addresses: driver.addresses() }).unwrap();
            machine.say(Command::SetVringCall { queue, call: Some(call.twin().unwrap()) }).unwrap();
            machine.say(Command::SetVringKick { queue, kick: Some(kick.twin().unwrap()) }).unwrap();
        }
        machine
    }

    fn say(&self, command: Command) -> Result<Answer, VhostError> {
        let (send, receive) = mpsc::channel();
        self.target.command(self.session, command, Box::new(move |answer| send.send(answer).unwrap()));
        receive.recv_timeout(PATIENCE).expect("an answer")
    }

    fn kick(&mut self, queue: usize) -> bool {
        let (driver, kick, _) = &mut self.queues[queue];
        let wanted = driver.publish();
        if wanted {
            kick.notify();
        }
        wanted
    }

    fn reap(&mut self, queue: usize) -> Done {
        let begun = Instant::now();
        loop {
            if let Some(done) = self.queues[queue].0.reap() {
                return done;
            }
            assert!(begun.elapsed() < PATIENCE, "no answer");
            std::thread::yield_now();
        }
    }

    fn ask(&mut self, ask: &Ask) -> Done {
        self.queues[0].0.add(ask).expect("room");
        self.kick(0);
        self.reap(0)
    }

    /// Asks with data; the status.
    fn send(&mut self, kind: RequestType, sector: u64, data: &[u8]) -> u8 {
        let slot = self.queues[0].0.next_slot().unwrap();
        self.queues[0].0.write(slot, data);
        self.ask(&Ask { out: true, ..Ask::new(kind, sector, data.len() as u32) }).status
    }

    fn receive(&mut self, sector: u64, bytes: u32) -> Vec<u8> {
        let done = self.ask(&Ask::new(RequestType::IN, sector, bytes));
        assert_eq!((done.status, done.written), (0, bytes + 1));
        self.queues[0].0.read(done.slot, bytes)
    }

    fn close(self) {
        self.say(Command::Close).unwrap();
    }

    fn state(&self, queue: usize) -> QueueState {
        self.target.info(Some(&self.name)).unwrap()[0].sessions[0].queues[queue].state
    }
}

const WAYS: [(Kind, bool); 4] = [(Kind::Split, true), (Kind::Split, false), (Kind::Packed, true), (Kind::Packed, false)];
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn two_rings_on_two_reactors_keep_their_data() {
    for choice in [Choice::Auto, Choice::Epoll] {
        let stack = Stack::new(2, choice);
        stack.export("vd", "small", false, 2);
        let info = stack.target.info(Some("vd")).unwrap();
        assert_eq!(info[0].reactors, [0, 1]);
        for (kind, event_idx) in WAYS {
            let mut machine = Machine::new(&stack, "vd", kind, 2, 128, event_idx, None);
            for round in 0..50u64 {
                for queue in 0..2 {
                    for kind in [RequestType::OUT, RequestType::IN] {
                        for number in 0..8u64 {
                            let driver = &mut machine.queues[queue].0;
                            let slot = driver.next_slot().unwrap();
                            let value = (round + number + 100 * queue as u64) as u8;
                            driver.fill(slot, 4096, if kind == RequestType::OUT { value } else { 0xee });
                            let ask = Ask::new(kind, (queue as u64 * 8 + number) * 8, 4096);
                            driver.add(&if number % 2 == 0 { ask } else { ask.indirect() }).unwrap();
                        }
                        machine.kick(queue);
                        let mut seen = Vec::new();
                        for _ in 0..8 {
                            let done = machine.reap(queue);
                            assert_eq!(done.status, OK);
                            seen.push(machine.queues[queue].0.read(done.slot, 4096)[4095]);
                        }
                        seen.sort_unstable();
                        let expected: Vec<_> = (0..8).map(|number| (round + number + 100 * queue as u64) as u8).collect();
                        assert_eq!(seen, expected, "{choice:?} round {round} queue {queue}");
                    }
                }
            }
            machine.close();
        }
    }
}

#[test]
fn a_sleeping_ring_is_kicked_and_one_interrupt_tells_of_a_batch() {
    let stack = Stack::new(1, Choice::Auto);
    stack.export("vd", "small", false, 1);
    for (kind, event_idx) in WAYS {
        let mut machine = Machine::new(&stack, "vd", kind, 1, 64, event_idx, None);
        assert_eq!(machine.ask(&Ask::new(RequestType::FLUSH, 0, 0)).status, OK);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(60));
            let _ = machine.queues[0].2.take();
            assert!(machine.queues[0].0.want_interrupts(true));
            for _ in 0..10 {
                machine.queues[0].0.add(&Ask::new(RequestType::IN, 0, 512)).unwrap();
            }
            assert!(machine.kick(0), "asleep: it wants a kick");
            for _ in 0..10 {
                assert_eq!(machine.reap(0).status, OK);
            }
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(machine.queues[0].2.take(), 1, "one interrupt for ten requests");
        }
        machine.close();
    }
}

fn change(stack: &Stack, change: Change) {
    let (send, receive) = mpsc::channel();
    stack.target.change("vd", change, Box::new(move |answer| send.send(answer).unwrap()));
    receive.recv_timeout(PATIENCE).expect("an answer").unwrap();
}

#[test]
fn a_ring_moves_between_reactors_under_its_requests() {
    let stack = Stack::new(2, Choice::Auto);
    stack.export("vd", "small", false, 1);
    let handles: Vec<_> = stack.reactors.iter().map(|thread| thread.handle().clone()).collect();
    for (kind, event_idx) in WAYS {
        let mut machine = Machine::new(&stack, "vd", kind, 1, 64, event_idx, None);
        for round in 0..60 {
            for _ in 0..10 {
                machine.queues[0].0.add(&Ask::new(RequestType::IN, 0, 512)).unwrap();
            }
            machine.kick(0);
            change(&stack, Change::Reactors(vec![handles[round % 2].clone()]));
            for _ in 0..10 {
                assert_eq!(machine.reap(0).status, OK);
            }
            let info = &stack.target.info(Some("vd")).unwrap()[0];
            assert_eq!((&info.reactors[..], info.sessions[0].queues[0].lcore), (&[round as u32 % 2][..], round as u32 % 2));
        }
        machine.close();
    }
    assert!(stack.failures.lock().unwrap().is_empty());
}

#[test]
fn interrupts_of_a_busy_ring_are_held_back_and_the_last_one_comes() {
    let stack = Stack::new(1, Choice::Auto);
    stack.export("vd", "small", false, 1);
    for (kind, event_idx) in WAYS {
        let mut machine = Machine::new(&stack, "vd", kind, 1, 64, event_idx, None);
        for (delay_base_us, coalesces) in [(0, false), (1000, true)] {
            change(&stack, Change::Coalescing(Coalescing { delay_base_us, iops_threshold: 1000 }));
            let interrupts = |stack: &Stack| stack.target.info(Some("vd")).unwrap()[0].sessions[0].queues[0].interrupts;
            let (before, begun, mut requests) = (interrupts(&stack), Instant::now(), 0);
            while begun.elapsed() < Duration::from_millis(200) {
                let _ = machine.queues[0].2.take();
                machine.queues[0].0.want_interrupts(true);
                assert_eq!(machine.ask(&Ask::new(RequestType::IN, 0, 512)).status, OK);
                requests += 1;
            }
            let sent = interrupts(&stack) - before;
            assert_eq!(sent < requests / 4, coalesces, "{kind:?}: {sent} interrupts for {requests} requests");
            if coalesces {
                let waited = Instant::now();
                while machine.queues[0].2.take() == 0 {
                    assert!(waited.elapsed() < PATIENCE, "the last interrupt never came");
                    std::thread::yield_now();
                }
            }
        }
        machine.close();
    }
}

#[test]
fn each_kind_of_request_has_its_answer() {
    let stack = Stack::new(1, Choice::Auto);
    stack.export("vd", "small", false, 1);
    Kind::BOTH.iter().for_each(|kind| ask_everything(&stack, *kind));
}

fn ask_everything(stack: &Stack, kind: Kind) {
    let mut machine = Machine::new(stack, "vd", kind, 1, 64, true, None);
    assert_eq!(machine.send(RequestType::OUT, 0, &[7; 8192]), OK);
    assert_eq!(machine.receive(4, 1024), [7; 1024]);
    assert_eq!(machine.ask(&Ask::new(RequestType::FLUSH, 0, 0)).status, OK);
    let ranges = |ranges: &[(u64, u32, u32)]| -> Vec<u8> {
        ranges
            .iter()
            .flat_map(|(sector, count, flags)| Segment::new(*sector, *count, SegmentFlags::from_bits_retain(*flags)).as_bytes().to_vec())
            .collect()
    };
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, &ranges(&[(0, 1, 0), (2, 1, 1), (15, 1, 0)])), OK);
    let content = machine.receive(0, 8192);
    let zeroed: Vec<_> = content.chunks(512).map(|sector| sector.iter().all(|byte| *byte == 0)).collect();
    assert_eq!(zeroed.iter().enumerate().filter(|(_, zero)| **zero).map(|(index, _)| index).collect::<Vec<_>>(), [0, 2, 15]);
    assert_eq!(machine.send(RequestType::DISCARD, 0, &ranges(&[(4, 8, 0), (1, 1, 0)])), OK);
    assert_eq!(machine.receive(4, 4096), [0; 4096]);
    assert_eq!(machine.send(RequestType::DISCARD, 0, &ranges(&[(0, 8, 1)])), UNSUPP, "UNMAP means nothing to a discard");
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, &ranges(&[(0, 8, 2)])), UNSUPP, "an unknown flag");
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, &ranges(&[(8192, 1, 0)])), IOERR, "beyond the end");
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, &ranges(&[(0, 1, 0); 17])), IOERR, "more ranges than told");
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, &[0; 15]), IOERR, "a range in part");
    assert_eq!(machine.send(RequestType::DISCARD, 0, &[]), IOERR, "no range");
    let done = machine.ask(&Ask::new(RequestType::GET_ID, 0, 20));
    assert_eq!((done.status, done.written, &machine.queues[0].0.read(done.slot, 6)[..]), (OK, 21, &b"small\0"[..]));
    let done = machine.ask(&Ask::new(RequestType::GET_ID, 0, 3));
    assert_eq!((done.status, done.written, &machine.queues[0].0.read(done.slot, 3)[..]), (OK, 4, &b"sma"[..]));
    for kind in [2, 10, 14, 15, 77, u32::MAX] {
        assert_eq!(machine.ask(&Ask::new(RequestType(kind), 0, 512)).status, UNSUPP, "request {kind}");
    }
    assert_eq!(machine.ask(&Ask::new(RequestType::IN, 0, 0)).status, IOERR, "no bytes");
    assert_eq!(machine.send(RequestType::OUT, 0, &[]), IOERR, "no bytes");
    assert_eq!(machine.ask(&Ask::new(RequestType::IN, 8192, 512)).status, IOERR, "the first sector that is not there");
    assert_eq!(machine.ask(&Ask::new(RequestType::IN, u64::MAX, 512)).status, IOERR);
    assert_eq!(machine.ask(&Ask::new(RequestType::IN, 0, 511)).status, IOERR, "half a sector");
    assert_eq!(machine.ask(&Ask { out: true, ..Ask::new(RequestType::IN, 0, 512) }).status, IOERR, "a read into nothing");
    assert_eq!(
        machine.ask(&Ask { out: false, write_cuts: vec![512], ..Ask::new(RequestType::OUT, 0, 512) }).status,
        IOERR,
        "a write of nothing"
    );
    assert!(stack.failures.lock().unwrap().is_empty(), "none of this breaks a ring");
    machine.close();
}

#[test]
fn large_blocks_and_readonly_disks_refuse_what_does_not_fit() {
    let stack = Stack::new(1, Choice::Auto);
    stack.export("large", "large", false, 1);
    let mut machine = Machine::new(&stack, "large", Kind::Packed, 1, 64, true, None);
    assert_eq!(machine.send(RequestType::OUT, 8, &[9; 4096]), OK);
    assert_eq!(machine.receive(8, 4096), [9; 4096]);
    for (sector, bytes) in [(1, 4096), (7, 4096), (8, 512), (8, 4608)] {
        assert_eq!(machine.ask(&Ask::new(RequestType::IN, sector, bytes)).status, IOERR, "{bytes} bytes at sector {sector}");
        assert_eq!(machine.send(RequestType::OUT, sector, &vec![1; bytes as usize]), IOERR);
    }
    let range = Segment::new(8, 4, SegmentFlags::empty());
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, range.as_bytes()), IOERR, "half a block");
    assert_eq!(machine.receive(8, 4096), [9; 4096]);
    machine.close();
    stack.export("ro", "small", true, 1);
    let mut machine = Machine::new(&stack, "ro", Kind::Split, 1, 64, true, None);
    let range = Segment::new(0, 8, SegmentFlags::empty());
    assert_eq!(machine.send(RequestType::OUT, 0, &[1; 512]), IOERR);
    assert_eq!(machine.send(RequestType::WRITE_ZEROES, 0, range.as_bytes()), IOERR);
    assert_eq!(machine.send(RequestType::DISCARD, 0, range.as_bytes()), IOERR);
    assert_eq!(machine.ask(&Ask::new(RequestType::FLUSH, 0, 0)).status, OK);
    assert_eq!(machine.receive(0, 512), [0; 512]);
    machine.close();
}

#[test]
fn memory_that_shrinks_ends_its_session_by_name_and_no_other() {
    Kind::BOTH.iter().for_each(|kind| shrink_memory(*kind));
}

fn shrink_memory(kind: Kind) {
    let stack = Stack::new(2, Choice::Auto);
    stack.export("victim", "small", false, 2);
    stack.export("other", "large", false, 2);
    let path = std::env::temp_dir().join(format!("qpair-shrink-{kind:?}-{}", std::process::id()));
    let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let mut other = Machine::new(&stack, "other", Kind::Split, 2, 64, true, None);
    let mut victim = Machine::new(&stack, "victim", kind, 2, 64, true, Some(&file));
    assert_eq!(victim.send(RequestType::OUT, 0, &[1; 512]), OK);
    for round in 0..200 {
        if round == 20 {
            for queue in 0..2 {
                for _ in 0..8 {
                    victim.queues[queue].0.add(&Ask::new(RequestType::IN, 0, 8192)).unwrap();
                }
                victim.queues[queue].0.publish();
            }
            file.set_len(0).unwrap();
            victim.queues.iter().for_each(|(_, kick, _)| kick.notify());
        }
        assert_eq!(other.send(RequestType::OUT, 8, &[round as u8; 4096]), OK);
        assert_eq!(other.receive(8, 4096), [round as u8; 4096]);
    }
    let begun = Instant::now();
    while stack.failures.lock().unwrap().len() < 2 && begun.elapsed() < PATIENCE {
        std::thread::yield_now();
    }
    let failures = std::mem::take(&mut *stack.failures.lock().unwrap());
    let mut queues: Vec<_> = failures.iter().map(|failure| failure.queue).collect();
    queues.sort_unstable();
    assert_eq!(queues, [0, 1], "{failures:?}");
    assert!(failures.iter().all(|failure| failure.session == victim.session && failure.broken == Broken::MemoryVanished), "{failures:?}");
    assert_eq!((victim.state(0), other.state(0)), (QueueState::Failed, QueueState::Running));
    victim.close();
    other.close();
}
