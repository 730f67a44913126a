//! Both ends in one world: our initiator on our vhost-user-blk target over one shared memory, each queue's ends on any two reactors.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use qpair_bdev::{DeviceId, Layer, Registry};
use qpair_memory::Mapping;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{self, Rng, World};
use qpair_vhost::{Addresses, Answer, Command, Failure, MemoryRow, Options, Source, Target, VhostError};
use qpair_virtio::{Link, QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::Features;

use crate::client::{Allowed, CELL_BLOCKS, Client, IOS, Load, Tally};
use crate::device::{Manners, Slow};
use crate::outage::answer;
use crate::{CELLS, MAX_IO, QUIET, RunSome, check_reactors, count_panics, remove};

/// Long enough for whatever ends by itself.
const LONG_NS: u64 = 500_000_000;

/// What happens in the middle.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Incident {
    Nothing,
    /// The bdev over the rings is removed.
    Removal,
    /// The session ends, as when the connection breaks; then the bdev is removed, as whoever held the connection does.
    PeerLost,
    /// The disk behind the target goes.
    DiskLost,
    /// Rings are stopped and started again, and memory is shown anew.
    Restarts,
    /// The session ends, and what waits goes to the next.
    Reconnects,
}

struct Pair {
    world: World,
    registry: Arc<Registry>,
    target: Arc<Target>,
    failures: Arc<Mutex<Vec<Failure>>>,
    session: u64,
    layout: Arc<VirtioLayout>,
    disk: Arc<Slow>,
    queues: Vec<(Event, Event)>,
    features: u64,
}

impl Pair {
    fn new(seed: u64, rng: &mut Rng, manners: Manners) -> Self {
        count_panics();
        let reactors = rng.between(1, 4) as usize;
        let mut world = World::new(seed, reactors);
        for number in 0..reactors {
            world.with(number, |reactor| drop(Layer::install(reactor, IOS)));
        }
        let registry = Registry::new(world.handles());
        let disk = Arc::new(Slow::new("disk", reactors as u64 * 2 * CELLS * CELL_BLOCKS, manners, None));
        registry.register(disk.clone()).unwrap();
        let failures = Arc::new(Mutex::new(Vec::new()));
        let heard = failures.clone();
        let target = Target::new(registry.clone(), move |failure| heard.lock().unwrap().push(failure));
        // Any ring may live on any reactor.
        let count = rng.between(reactors as u64, 4) as usize;
        let places = (0..count).map(|_| world.handle(rng.below(reactors as u64) as usize)).collect();
        target.create("vd", "disk", places, Options { packed_ring: true, num_queues: count as u32, ..Options::default() }).unwrap();
        target.set_drain_ns("vd", if manners.stalls > 0 { 2_000_000 } else { LONG_NS }).unwrap();
        let session = target.open("vd").unwrap();
        let size = *rng.pick(&[4, 8, 16, 64, 512]);
        let layout = VirtioLayout::new(count as u32, size, MAX_IO).unwrap();
        let maybe = [Features::RING_EVENT_IDX, Features::INDIRECT_DESC, Features::RING_PACKED]
            .map(|bit| if rng.chance(1, 2) { bit.bits() } else { 0 });
        let features = target.controller("vd").unwrap().features() & !maybe[0] & !maybe[1] & !maybe[2];
        let queues = (0..count).map(|_| (Event::simulated(), Event::simulated())).collect();
        Self { world, registry, target, failures, session, layout, disk, queues, features }
    }

    /// What a front end says, in its order.
    fn connect(&mut self) {
        self.say(Command::SetFeatures(self.features)).unwrap();
        self.show_memory();
        for queue in 0..self.queues.len() {
            self.start(queue, if self.packed() { 0x8000_8000 } else { 0 });
        }
    }

    fn show_memory(&mut self) {
        let (mapping, user_address) = (self.layout.mapping(), self.layout.mapping().address() as u64);
        let length = mapping.len() as u64;
        let source = Source::Mapping(Mapping::shared(mapping.fd().unwrap(), length).unwrap());
        self.say(Command::SetMemTable(vec![MemoryRow { guest_address: 0, length, user_address, offset: 0, source }])).unwrap();
    }

    fn start(&mut self, index: usize, base: u32) {
        let (queue, at) = (index as u16, self.layout.queue_addresses(index).unwrap());
        let addresses = Addresses { desc: at.desc, avail: at.avail, used: at.used, log: None };
        let (kick, call) = (self.queues[index].0.twin().unwrap(), self.queues[index].1.twin().unwrap());
        for command in [
            Command::SetVringNum { queue, size: u32::from(self.layout.queue_size()) },
            Command::SetVringBase { queue, base },
            Command::SetVringAddr { queue, addresses },
            Command::SetVringKick { queue, kick: Some(kick) },
            Command::SetVringCall { queue, call: Some(call) },
            Command::SetVringEnable { queue, enabled: true },
        ] {
            self.say(command).unwrap();
        }
    }

    fn say(&mut self, command: Command) -> Result<Answer, VhostError> {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let heard = answers.clone();
        self.target.command(self.session, command, Box::new(move |answer| heard.lock().unwrap().push(answer)));
        self.world.run_until("an answer", 1_000_000, |_| !answers.lock().unwrap().is_empty());
        let answer = answers.lock().unwrap().pop();
        answer.unwrap()
    }

    fn stop(&mut self, queue: usize) -> u32 {
        match self.say(Command::GetVringBase { queue: queue as u16 }) {
            Ok(Answer::Base(base)) => base,
            other => panic!("no base but {other:?}"),
        }
    }

    fn packed(&self) -> bool {
        self.features & Features::RING_PACKED.bits() != 0
    }

    /// Whether all that was asked is answered, as both sides see it.
    fn is_idle(&self, queue: usize, base: u32) -> bool {
        if self.packed() {
            return base >> 16 == base & 0xffff;
        }
        let (avail, used) = self.indices(queue);
        (u32::from(avail), u32::from(used)) == (base, base)
    }

    /// The driver's and the device's index of a split ring.
    fn indices(&self, queue: usize) -> (u16, u16) {
        let region = qpair_memory::Region::new(self.layout.mapping().clone());
        let (base, at) = (self.layout.mapping().address() as u64, self.layout.queue_addresses(queue).unwrap());
        let index = |at: u64| {
            let mut bytes = [0; 2];
            region.read(at - base + 2, &mut bytes).unwrap();
            u16::from_le_bytes(bytes)
        };
        (index(at.avail), index(at.used))
    }

    fn attach(&mut self) -> (Link, DeviceId) {
        let config = self.target.config(self.session).unwrap();
        let size = self.layout.queue_size();
        let setup = |(kick, call): &(Event, Event)| QueueSetup { size, kick: kick.twin().unwrap(), call: call.twin().unwrap() };
        let setups = self.queues.iter().map(setup).collect();
        let device = VirtioBlk::new("v0", self.layout.clone(), self.features, &config[..60], setups).unwrap();
        let link = device.link();
        (link, self.registry.register(Arc::new(device)).unwrap())
    }

    /// The session ends, with I/O in flight; another begins, and goes on with what was not answered.
    fn reconnect(&mut self, link: &Link, device: DeviceId, pause: u64) {
        self.say(Command::Close).unwrap();
        let registry = self.registry.clone();
        answer(&mut self.world, |reply| link.leave(&registry, device, reply)).unwrap();
        self.world.run_some(pause);
        self.session = self.target.open("vd").unwrap();
        link.wipe().unwrap();
        self.connect();
        let config = self.target.config(self.session).unwrap();
        answer(&mut self.world, |reply| link.rejoin(&registry, device, self.features, &config[..60], reply)).unwrap();
    }

    fn load(&mut self, rng: &mut Rng, allowed: Allowed, tally: &Rc<RefCell<Tally>>) {
        let info = self.registry.open("v0", false, |_| {}).unwrap().info().unwrap();
        for reactor in 0..self.world.reactors() {
            for client in 0..rng.between(1, 2) {
                let first = (reactor as u64 * 2 + client) * CELLS;
                let cells: Vec<u64> = (first..first + CELLS).collect();
                let ios = rng.between(15, 40) as u32;
                let load = Load { bdev: "v0", info: info.as_ref().clone(), allowed, ios, disk: None, tally: tally.clone() };
                Client::start(&mut self.world, reactor, &self.registry, load, &cells);
            }
        }
    }
}

fn run(seed: u64, what: Incident, manners: Manners, mut allowed: Allowed) -> Tally {
    let mut rng = Rng::new(seed ^ 0x701_4ed);
    let mut pair = Pair::new(seed, &mut rng, manners);
    pair.connect();
    let (link, device) = pair.attach();
    allowed.fails |= what == Incident::DiskLost || what == Incident::PeerLost;
    allowed.removal |= matches!(what, Incident::Removal | Incident::PeerLost);
    let (tally, ledger) = (Rc::new(RefCell::new(Tally::default())), pair.world.obligations().clone());
    pair.load(&mut rng, allowed, &tally);
    pair.world.run_some(rng.below(3000));
    let (mut gone, mut closed) = (false, false);
    match what {
        Incident::Nothing => {}
        Incident::Removal => {
            remove(&pair.registry, "v0", LONG_NS, &ledger);
            gone = true;
        }
        Incident::PeerLost => {
            pair.target.set_drain_ns("vd", *rng.pick(&[0, 50_000, LONG_NS])).unwrap();
            pair.say(Command::Close).unwrap();
            remove(&pair.registry, "v0", rng.below(100_000), &ledger);
            (gone, closed) = (true, true);
        }
        Incident::DiskLost => remove(&pair.registry, "disk", rng.below(1_000_000), &ledger),
        Incident::Restarts => {
            for _ in 0..rng.between(1, 4) {
                let queue = rng.below(pair.queues.len() as u64) as usize;
                let base = pair.stop(queue);
                pair.world.run_some(rng.below(300));
                if rng.chance(1, 2) {
                    pair.show_memory();
                }
                pair.start(queue, base);
                pair.world.run_some(rng.below(500));
            }
        }
        Incident::Reconnects => {
            for _ in 0..rng.between(1, 4) {
                pair.reconnect(&link, device, rng.below(1000));
                pair.world.run_some(rng.below(1000));
            }
        }
    }
    pair.world.settle();
    if !gone {
        remove(&pair.registry, "v0", 0, &ledger);
        pair.world.settle();
    }
    if !closed {
        for queue in 0..pair.queues.len() {
            let base = pair.stop(queue);
            assert!(pair.is_idle(queue, base), "queue {queue} stopped at {base:#x}: all that was asked is answered");
        }
        pair.say(Command::Close).unwrap();
    }
    assert!(pair.failures.lock().unwrap().is_empty(), "the driver broke a rule: {:?}", pair.failures.lock().unwrap());
    if what != Incident::DiskLost {
        remove(&pair.registry, "disk", 0, &ledger);
    }
    pair.world.settle();
    pair.target.delete("vd").unwrap();
    drop(link);
    let Pair { mut world, layout, disk, .. } = pair;
    assert_eq!((disk.held.load(Ordering::Relaxed), disk.channels.load(Ordering::Relaxed)), (0, 0), "the disk's I/Os and channels");
    assert_eq!((Arc::strong_count(&layout), Arc::strong_count(layout.mapping())), (1, 1), "the shared memory is held");
    check_reactors(&mut world);
    world.finish();
    tally.take()
}

fn seeds(name: &str, count: u64, what: &[Incident], manners: Manners, allowed: Allowed) {
    let (done, ran) = (Cell::new(0), Cell::new(0));
    sim::run_seeds(name, count, |seed| {
        let tally = run(seed, what[seed as usize % what.len()], manners, allowed);
        done.set(done.get() + tally.done);
        ran.set(ran.get() + 1);
    });
    eprintln!("simulation {name}: {} I/Os", done.get());
    assert!(ran.get() < 100 || done.get() > 15 * ran.get(), "a test that looks at nothing is none");
}

const FAITHFUL: Manners = Manners { fails: 0, stalls: 0 };

#[test]
fn our_initiator_on_our_target_gives_what_was_written() {
    seeds("virtio-joined", 240, &[Incident::Nothing, Incident::Restarts], FAITHFUL, QUIET);
}

#[test]
fn our_initiator_on_our_target_loses_no_io_when_either_end_goes() {
    let allowed = Allowed { churn: true, aborts: true, resets: true, ..QUIET };
    seeds("virtio-joined-ends", 330, &[Incident::Removal, Incident::PeerLost, Incident::DiskLost], FAITHFUL, allowed);
}

#[test]
fn our_initiator_on_our_target_over_a_failing_disk_ends_each_io_once() {
    let allowed = Allowed { fails: true, churn: true, aborts: true, ..QUIET };
    let manners = Manners { fails: 50, stalls: 0 };
    seeds("virtio-joined-fails", 210, &[Incident::Nothing, Incident::Restarts, Incident::Removal], manners, allowed);
}

#[test]
fn our_initiator_loses_no_io_to_our_target_from_session_to_session() {
    let allowed = Allowed { churn: true, aborts: true, resets: true, outages: true, ..QUIET };
    seeds("virtio-joined-reconnects", 300, &[Incident::Reconnects], FAITHFUL, allowed);
}
