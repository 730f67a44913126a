//! Several reactors write, append, reset and manage the same few zones without asking each other, over a device that delays, reorders and fails, under
//! resets of the whole bdev and aborts. What each was told must fit what is there in the end:
//!
//! * an append that succeeded after the last reset of its zone has its data where it said, and no two of them overlap;
//! * a write succeeds only in a zone that is not full, and below the capacity;
//! * a report shows a write pointer and a state that belong together, and nothing is under way for ever.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use qpair_bdev::{
    ChannelId, Descriptor, Info, IoId, Layer, Op, OpSet, QueueId, Registry, Status, ZONE_DESCRIPTOR_BYTES, ZoneAction, ZoneDescriptor,
    ZoneState,
};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{self, Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};
use qpair_simkit::{Plan, SimDisk, check_slabs, quiet_panics, remove};
use qpair_vbdev::delay::{Delay, Latencies};
use qpair_vbdev::zone_block::ZoneBlock;

const ZONE: u64 = 16;
const CAPACITY: u64 = 12;
const ZONES: u64 = 3;
const TIMEOUT_NS: u64 = 2_000_000;

#[derive(Clone, Debug)]
struct Event {
    op: Op,
    action: Option<ZoneAction>,
    zone: u64,
    place: u64,
    blocks: u64,
    fill: u8,
    status: Status,
    /// Order of submission and of completion, over all reactors.
    begun: u64,
    ended: u64,
}

#[derive(Default)]
struct History {
    clock: u64,
    events: Vec<Event>,
}

impl History {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

struct Host {
    layer: Rc<RefCell<Layer>>,
    queue: QueueId,
    channel: ChannelId,
    _descriptor: Descriptor,
    waker: LocalWaker,
    history: Arc<Mutex<History>>,
    out: HashMap<u64, (Event, Region, u64)>,
    left: u32,
    next_ns: u64,
    ledger: Obligations,
    end: Option<u64>,
    rng: Rng,
    resets: bool,
}

impl Host {
    fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, history: &Arc<Mutex<History>>, resets: bool) {
        let (rng, ledger) = (world.rng().fork(), world.obligations().clone());
        let (registry, history) = (registry.clone(), history.clone());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, 64);
            let poller = reactor.reserve_poller("host");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.borrow_mut().add_queue(waker.clone());
            let descriptor = registry.open("disk", true, |_| {}).unwrap();
            let channel = descriptor.channel(reactor, &mut layer.borrow_mut()).unwrap();
            let end = Some(ledger.open_next());
            let host = Self {
                layer,
                queue,
                channel,
                _descriptor: descriptor,
                waker,
                history,
                out: HashMap::new(),
                left: 60,
                next_ns: 0,
                ledger,
                end,
                rng,
                resets,
            };
            reactor.install_poller(poller, Box::new(host));
        });
    }

    fn fill_in(&mut self, layer: &mut Layer, id: IoId) -> (Event, Region) {
        let zone = self.rng.below(ZONES);
        let (mut blocks, fill) = (self.rng.between(1, 3), self.rng.between(1, 255) as u8);
        let (mut place, mut action) = (zone * ZONE, None);
        let op = match self.rng.below(if self.resets { 41 } else { 40 }) {
            0..18 => Op::ZoneAppend,
            18..24 => {
                place += self.rng.below(CAPACITY - blocks + 1);
                Op::Write
            }
            24..28 => {
                place += self.rng.below(CAPACITY - blocks + 1);
                Op::Read
            }
            28..40 => {
                let choices =
                    [ZoneAction::Reset, ZoneAction::Reset, ZoneAction::Open, ZoneAction::Close, ZoneAction::Finish, ZoneAction::Report];
                action = Some(*self.rng.pick(&choices));
                blocks = ZONE;
                Op::ZoneManagement
            }
            _ => Op::Reset,
        };
        let bytes = match (op, action) {
            (Op::ZoneManagement, Some(ZoneAction::Report)) => ZONE_DESCRIPTOR_BYTES,
            (Op::ZoneManagement | Op::Reset, _) => 0,
            _ => blocks * 512,
        };
        let memory = Region::new(Mapping::anonymous(bytes.max(1) as usize, Pages::Normal).unwrap());
        memory.fill(0, bytes, fill).unwrap();
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (op, place, blocks);
        io.command[0] = action.map_or(0xff, |action| action as u8);
        if bytes > 0 {
            io.list.push(Sge { region: memory.clone(), offset: 0, length: bytes as u32 });
        }
        let begun = self.history.lock().unwrap().tick();
        (Event { op, action, zone, place, blocks, fill, status: Status::SUCCESS, begun, ended: 0 }, memory)
    }

    fn finish(&mut self, layer: &mut Layer, id: IoId) {
        layer.retrieve(id);
        let (mut event, memory, obligation) = self.out.remove(&id.pack()).expect("an I/O came back that was not out");
        self.ledger.close(obligation);
        let io = layer.io(id);
        assert_eq!(io.op, event.op, "an I/O is given back as it was");
        assert_eq!((io.lba, io.blocks), (event.place, event.blocks));
        event.status = io.status;
        if event.op == Op::ZoneAppend && !io.status.is_error() {
            event.place = io.result;
            assert!(event.place / ZONE == event.zone && event.place % ZONE + event.blocks <= CAPACITY, "{event:?}");
        }
        if event.action == Some(ZoneAction::Report) && !io.status.is_error() {
            check_report(&memory, event.zone);
        }
        layer.give_back(id);
        self.judge(&event);
        let mut history = self.history.lock().unwrap();
        event.ended = history.tick();
        history.events.push(event);
    }

    fn judge(&self, event: &Event) {
        let writes = matches!(event.op, Op::Write | Op::ZoneAppend);
        let legal = match event.status {
            Status::SUCCESS | Status::ABORT_REQUESTED | Status::UNRECOVERED_READ_ERROR | Status::WRITE_FAULT => true,
            Status::ZONE_IS_FULL | Status::ZONE_BOUNDARY_ERROR => writes,
            Status::ZONE_INVALID_WRITE => event.op == Op::Write,
            Status::COMMAND_INTERRUPTED => writes || event.action.is_some(),
            Status::ZONE_INVALID_STATE_TRANSITION => matches!(event.action, Some(ZoneAction::Open | ZoneAction::Close)),
            _ => false,
        };
        assert!(legal, "{event:?}");
    }
}

fn check_report(memory: &Region, zone: u64) -> ZoneDescriptor {
    let mut bytes = [0; ZONE_DESCRIPTOR_BYTES as usize];
    memory.read(0, &mut bytes).unwrap();
    let found = ZoneDescriptor::decode(&bytes).expect("a descriptor");
    let written = found.write_pointer - found.start;
    assert_eq!((found.start, found.capacity_blocks), (zone * ZONE, CAPACITY));
    let fits = match found.state {
        ZoneState::Empty => written == 0,
        ZoneState::Full => written == CAPACITY,
        ZoneState::ImplicitlyOpen => written > 0 && written < CAPACITY,
        _ => written < CAPACITY,
    };
    assert!(fits, "{found:?}");
    found
}

impl Poller for Host {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        if self.end.is_none() {
            return 0;
        }
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        reaped.iter().for_each(|id| self.finish(&mut layer, *id));
        let mut work = reaped.len();
        if reactor.now_ns() >= self.next_ns {
            work += 1;
            if self.left > 0 {
                self.left -= 1;
                let id = layer.take().unwrap();
                let (event, memory) = self.fill_in(&mut layer, id);
                let obligation = self.ledger.open_next();
                layer.io_mut(id).push(self.queue, 0);
                self.out.insert(id.pack(), (event, memory, obligation));
                layer.submit(reactor, self.channel, &[id]);
                layer.unplug(reactor);
            }
            let mut keys: Vec<u64> = self.out.keys().copied().collect();
            keys.sort_unstable();
            if !keys.is_empty() && (self.left == 0 || self.rng.chance(1, 10)) {
                layer.abort(reactor, IoId::unpack(*self.rng.pick(&keys)));
            }
            let after_ns = if self.left > 0 { self.rng.below(30_000) } else { TIMEOUT_NS };
            self.next_ns = reactor.now_ns() + after_ns;
            let waker = self.waker.clone();
            reactor.after(after_ns, move |_| waker.wake());
        }
        if self.left == 0 && self.out.is_empty() {
            layer.close_channel(reactor, self.channel);
            layer.remove_queue(self.queue);
            self.ledger.close(self.end.take().unwrap());
        }
        work
    }
}

/// The appends and writes of a zone that no reset can have taken back.
fn lasting(history: &History, zone: u64) -> Vec<Event> {
    let emptied = |event: &&Event| {
        event.zone == zone && event.action == Some(ZoneAction::Reset) && !matches!(event.status, Status::COMMAND_INTERRUPTED)
    };
    let last = history.events.iter().filter(emptied).map(|event| event.ended).max().unwrap_or(0);
    let lasts = |event: &&Event| {
        event.zone == zone && matches!(event.op, Op::Write | Op::ZoneAppend) && event.status == Status::SUCCESS && event.begun > last
    };
    history.events.iter().filter(lasts).cloned().collect()
}

fn run(world: &mut World, plan: Plan, resets: bool) {
    quiet_panics();
    let mut info = Info::new("base", "sim", 512, ZONES * ZONE + 5);
    info.queue_depth = *world.rng().pick(&[0, 2, 16]);
    info.max_io_blocks = *world.rng().pick(&[0, 0, 1, 2]);
    info.supported =
        OpSet::of(if world.rng().chance(2, 3) { &[Op::Read, Op::Write, Op::Unmap, Op::Reset] } else { &[Op::Read, Op::Write, Op::Reset] });
    let base = SimDisk::new(info, plan);
    let registry = Registry::new(world.handles());
    registry.register(base.clone()).unwrap();
    let under = world.rng().chance(1, 2);
    let (zoned, name) = if under { ("zoned", "zoned") } else { ("disk", "disk") };
    registry.register(Arc::new(ZoneBlock::new(&registry, zoned, "base", None, CAPACITY, 1).unwrap())).unwrap();
    if under {
        registry.register(Arc::new(Delay::new(&registry, "disk", name, None, Latencies::new([5, 50, 10, 90])).unwrap())).unwrap();
    }
    let history = Arc::new(Mutex::new(History::default()));
    for reactor in 0..world.reactors() {
        Host::start(world, reactor, &registry, &history, resets);
    }
    world.finish();
    let history = history.lock().unwrap();
    let bytes = base.bytes();
    for zone in 0..ZONES {
        let mut owner = [None; CAPACITY as usize];
        for event in lasting(&history, zone) {
            for block in event.place..event.place + event.blocks {
                let other = owner[(block % ZONE) as usize].replace(event.clone().begun);
                assert_eq!(other, None, "block {block} was given twice: {event:?}");
                let start = block as usize * 512;
                assert!(
                    bytes[start..start + 512].iter().all(|byte| *byte == event.fill),
                    "block {block} lost what it was given: {event:?}"
                );
            }
        }
    }
    drop(history);
    remove(world, &registry, "base");
    base.check_end();
    check_slabs(world);
}

fn scenario(name: &str, seeds: u64, plan: Plan, resets: bool) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 4) as usize);
        run(&mut world, plan, resets);
    });
}

#[test]
fn reactors_that_share_zones_lose_nothing() {
    scenario("zones", 1500, Plan { delay_ns: 100_000, ..Plan::default() }, false);
}

#[test]
fn zones_stay_sound_under_errors_stalls_and_resets() {
    scenario("zones_errors", 1500, Plan { delay_ns: 100_000, error: 30, stall: 20, panic: 0 }, true);
}
