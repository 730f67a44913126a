//! A front end for tests that say what happens step by step: I/Os by name, each with a buffer of its own, and when and how each ended.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::{ChannelId, Descriptor, Device, Info, Io, IoId, Layer, Op, QueueId, Registry, Status, ZoneAction, lifecycle};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::World;
use qpair_reactor::{Config, Poller, Reactor};
use qpair_simkit::{Plan, SimDisk};

/// How an I/O ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub status: Status,
    pub result: u64,
    pub at_ns: u64,
}

#[derive(Default)]
struct Desk {
    queue: QueueId,
    open: HashMap<String, (Descriptor, ChannelId)>,
    out: HashMap<u64, IoId>,
    ended: BTreeMap<u64, Outcome>,
}

struct Reaper(Rc<RefCell<Desk>>);

impl Poller for Reaper {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let (mut layer, mut desk) = (layer.borrow_mut(), self.0.borrow_mut());
        let mut reaped = Vec::new();
        layer.reap(reactor, desk.queue, &mut reaped);
        for id in &reaped {
            let tag = layer.retrieve(*id).tag;
            let io = layer.io(*id);
            let outcome = Outcome { status: io.status, result: io.result, at_ns: reactor.now_ns() };
            layer.give_back(*id);
            desk.out.remove(&tag).expect("an I/O came back that was not out");
            assert!(desk.ended.insert(tag, outcome).is_none(), "an I/O ended twice");
        }
        reaped.len()
    }
}

/// One I/O of a [`Bench`].
#[derive(Clone, Debug)]
pub struct Ticket {
    reactor: usize,
    tag: u64,
    pub memory: Region,
    pub since_ns: u64,
}

impl Ticket {
    /// The buffer's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.len() as usize];
        self.memory.read(0, &mut bytes).unwrap();
        bytes
    }
}

/// A world, a registry with a simulated device "base", and a desk on each reactor.
pub struct Bench {
    pub world: World,
    pub registry: Arc<Registry>,
    pub base: Arc<SimDisk>,
    desks: Vec<Rc<RefCell<Desk>>>,
    next: u64,
}

impl Bench {
    pub fn new(info: Info, plan: Plan, reactors: usize) -> Self {
        let mut world = World::with_config(7, reactors, Config { spin_ns: 0, busy_poll: false }, Default::default());
        let registry = Registry::new(world.handles());
        let base = SimDisk::new(info, plan);
        registry.register(base.clone()).unwrap();
        let desk = |reactor: &mut Reactor| {
            let desk = Rc::new(RefCell::new(Desk::default()));
            let poller = reactor.add_poller("desk", Box::new(Reaper(desk.clone())));
            let layer = Layer::install(reactor, 4096);
            desk.borrow_mut().queue = layer.borrow_mut().add_queue(reactor.waker(poller).unwrap());
            desk
        };
        let desks = (0..reactors).map(|reactor| world.with(reactor, desk)).collect();
        Self { world, registry, base, desks, next: 0 }
    }

    pub fn register(&self, device: impl Device + 'static) {
        self.registry.register(Arc::new(device)).unwrap();
    }

    /// Submits what `fill` makes of an I/O whose list is a buffer of `bytes` that it may fill first.
    pub fn submit(&mut self, reactor: usize, name: &str, bytes: usize, fill: impl FnOnce(&mut Io, &Region)) -> Ticket {
        self.next += 1;
        let (tag, registry, desk) = (self.next, self.registry.clone(), self.desks[reactor].clone());
        let memory = Region::new(Mapping::anonymous(bytes.max(1), Pages::Normal).unwrap());
        let ticket = Ticket { reactor, tag, memory: memory.clone(), since_ns: self.world.now_ns() };
        self.world.with(reactor, |reactor| {
            let layer = Layer::of(reactor);
            let (mut layer, mut desk) = (layer.borrow_mut(), desk.borrow_mut());
            let queue = desk.queue;
            let (_, channel) = desk.open.entry(name.to_owned()).or_insert_with(|| {
                let descriptor = registry.open(name, true, |_| {}).unwrap();
                let channel = descriptor.channel(reactor, &mut layer).unwrap();
                (descriptor, channel)
            });
            let channel = *channel;
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            if bytes > 0 {
                io.list.push(Sge { region: memory.clone(), offset: 0, length: bytes as u32 });
            }
            fill(io, &memory);
            io.push(queue, tag);
            desk.out.insert(tag, id);
            layer.submit(reactor, channel, &[id]);
            layer.unplug(reactor);
        });
        ticket
    }

    /// An I/O of `blocks` of 512 bytes; a write's are filled with `fill`.
    pub fn start(&mut self, reactor: usize, name: &str, op: Op, lba: u64, blocks: u64, fill: u8) -> Ticket {
        let data = matches!(op, Op::Read | Op::Write | Op::ZoneAppend);
        self.submit(reactor, name, if data { blocks as usize * 512 } else { 0 }, |io, memory| {
            (io.op, io.lba, io.blocks) = (op, lba, blocks);
            if data {
                memory.fill(0, blocks * 512, fill).unwrap();
            }
        })
    }

    pub fn manage(&mut self, reactor: usize, name: &str, action: ZoneAction, lba: u64, blocks: u64, bytes: usize) -> Ticket {
        self.submit(reactor, name, bytes, |io, _| {
            (io.op, io.lba, io.blocks, io.command[0]) = (Op::ZoneManagement, lba, blocks, action as u8);
        })
    }

    pub fn ended(&self, ticket: &Ticket) -> Option<Outcome> {
        self.desks[ticket.reactor].borrow().ended.get(&ticket.tag).cloned()
    }

    /// Runs until it has ended.
    pub fn wait(&mut self, ticket: &Ticket) -> Outcome {
        let (desk, tag) = (self.desks[ticket.reactor].clone(), ticket.tag);
        self.world.run_until("an I/O ends", 100_000, move |_| desk.borrow().ended.contains_key(&tag));
        self.ended(ticket).unwrap()
    }

    /// Starts it and runs until it has ended.
    pub fn run(&mut self, name: &str, op: Op, lba: u64, blocks: u64, fill: u8) -> Status {
        let ticket = self.start(0, name, op, lba, blocks, fill);
        self.wait(&ticket).status
    }

    /// What `blocks` hold now.
    pub fn read(&mut self, name: &str, lba: u64, blocks: u64) -> Vec<u8> {
        let ticket = self.start(0, name, Op::Read, lba, blocks, 0xee);
        assert_eq!(self.wait(&ticket).status, Status::SUCCESS);
        ticket.bytes()
    }

    pub fn abort(&mut self, ticket: &Ticket) {
        let (desk, tag) = (self.desks[ticket.reactor].clone(), ticket.tag);
        self.world.with(ticket.reactor, |reactor| {
            let id = desk.borrow().out.get(&tag).copied();
            let layer = Layer::of(reactor);
            id.into_iter().for_each(|id| layer.borrow_mut().abort(reactor, id));
        });
    }

    /// Lets time pass.
    pub fn pass(&mut self, ns: u64) {
        let until_ns = self.world.now_ns() + ns;
        let act = move |now_ns, _: &mut qpair_reactor::sim::Rng| {
            if now_ns >= until_ns { qpair_reactor::sim::Act::Done } else { qpair_reactor::sim::Act::Until(until_ns) }
        };
        self.world.add_actor(act);
        self.world.run_until("time passes", 1_000_000, move |world| world.now_ns() >= until_ns);
    }

    /// Removes a bdev, and what stands on it; runs until it is gone.
    pub fn remove(&mut self, name: &str, deadline_ns: u64) {
        let (ledger, id) = (self.world.obligations().clone(), self.world.obligations().open_next());
        let reply = move |outcome: Result<(), qpair_bdev::BdevError>| {
            outcome.unwrap();
            ledger.close(id);
        };
        lifecycle::unregister(&self.registry, name, deadline_ns, Box::new(reply));
        let ledger = self.world.obligations().clone();
        self.world.run_until("it is gone", 1_000_000, move |_| !ledger.is_open(id));
    }
}
