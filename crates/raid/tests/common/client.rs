//! A front end that does random I/O on blocks of its own, and knows what each may hold: now, and after the power went.
#![allow(dead_code)]

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use qpair_bdev::{ChannelId, Descriptor, IoFlags, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};

use super::leg::BLOCK;

pub const CELL: u64 = 8;

/// What a client's blocks may hold. Outlives worlds.
pub struct Model {
    pub first: u64,
    now: Vec<BTreeSet<u8>>,
    durable: Vec<BTreeSet<u8>>,
    pub reads: u64,
}

impl Model {
    pub fn new(first: u64, blocks: u64) -> Arc<Mutex<Self>> {
        let zeros = vec![BTreeSet::from([0]); blocks as usize];
        Arc::new(Mutex::new(Self { first, now: zeros.clone(), durable: zeros, reads: 0 }))
    }

    pub fn crash(&mut self) {
        self.now = self.durable.clone();
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// An I/O may end with an error.
    pub errors: bool,
    pub resets: bool,
    /// The bdev may go.
    pub removal: bool,
    /// Completed writes are lost in a crash unless flushed.
    pub cached: bool,
}

struct Pending {
    obligation: u64,
    op: Op,
    cell: Option<usize>,
    first: u64,
    blocks: u64,
    fill: u8,
    fua: bool,
}

pub struct Client {
    registry: Arc<Registry>,
    layer: Rc<RefCell<Layer>>,
    waker: LocalWaker,
    queue: QueueId,
    open: Option<(Descriptor, ChannelId)>,
    memory: Region,
    model: Arc<Mutex<Model>>,
    busy: Vec<bool>,
    outstanding: HashMap<u64, Pending>,
    left: u32,
    next_ns: u64,
    flushing: bool,
    allowed: Allowed,
    ledger: Obligations,
    end: Option<u64>,
    rng: Rng,
    name: String,
}

impl Client {
    pub fn start(
        world: &mut World,
        reactor: usize,
        registry: &Arc<Registry>,
        name: &str,
        model: &Arc<Mutex<Model>>,
        allowed: Allowed,
        ios: u32,
    ) {
        let (rng, ledger) = (world.rng().fork(), world.obligations().clone());
        let blocks = model.lock().unwrap().now.len();
        let mapping = Mapping::anonymous(blocks * BLOCK as usize, Pages::Normal).unwrap();
        let (registry, model, name) = (registry.clone(), model.clone(), name.to_owned());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, 96);
            let poller = reactor.reserve_poller("client");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.borrow_mut().add_queue(waker.clone());
            let client = Self {
                registry,
                layer,
                waker,
                queue,
                open: None,
                memory: Region::new(mapping),
                busy: vec![false; blocks / CELL as usize],
                model,
                outstanding: HashMap::new(),
                left: ios,
                next_ns: 0,
                flushing: false,
                allowed,
                end: Some(ledger.open_next()),
                ledger,
                rng,
                name,
            };
            reactor.install_poller(poller, Box::new(client));
        });
    }

    fn fill_in(&mut self, layer: &mut Layer, id: IoId) -> Option<Pending> {
        let kind = self.rng.below(if self.allowed.resets { 42 } else { 40 });
        let obligation = self.ledger.open_next();
        let idle = self.outstanding.is_empty();
        if kind >= 40 || (kind >= 36 && idle) {
            let op = if kind >= 40 { Op::Reset } else { Op::Flush };
            self.flushing = op == Op::Flush;
            layer.io_mut(id).op = op;
            return Some(Pending { obligation, op, cell: None, first: 0, blocks: 0, fill: 0, fua: false });
        }
        let free: Vec<usize> = (0..self.busy.len()).filter(|cell| !self.busy[*cell]).collect();
        if free.is_empty() {
            self.ledger.close(obligation);
            return None;
        }
        let cell = *self.rng.pick(&free);
        let op = match kind {
            0..18 => Op::Read,
            18..33 => Op::Write,
            _ => Op::WriteZeroes,
        };
        let within = self.rng.below(CELL);
        let blocks = self.rng.between(1, CELL - within);
        let first = cell as u64 * CELL + within;
        let fill = if op == Op::Write { self.rng.between(1, 255) as u8 } else { 0 };
        let fua = op != Op::Read && self.rng.chance(1, 8);
        self.busy[cell] = true;
        let mut model = self.model.lock().unwrap();
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (op, model.first + first, blocks);
        if fua {
            io.flags |= IoFlags::FUA;
        }
        if op != Op::Read {
            for block in first..first + blocks {
                model.now[block as usize].insert(fill);
                model.durable[block as usize].insert(fill);
            }
        }
        if op != Op::WriteZeroes {
            self.memory.fill(first * BLOCK, blocks * BLOCK, if op == Op::Write { fill } else { 0xee }).unwrap();
            let cut = self.rng.below(blocks) * BLOCK;
            for (at, length) in [(0, cut), (cut, blocks * BLOCK - cut)] {
                if length > 0 {
                    io.list.push(Sge { region: self.memory.clone(), offset: first * BLOCK + at, length: length as u32 });
                }
            }
        }
        Some(Pending { obligation, op, cell: Some(cell), first, blocks, fill, fua })
    }

    fn submit_some(&mut self, layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId) {
        let mut batch = Vec::new();
        for _ in 0..self.rng.between(1, 6).min(u64::from(self.left)) {
            if self.flushing {
                break;
            }
            let Some(id) = layer.take() else { break };
            let Some(pending) = self.fill_in(layer, id) else {
                layer.give_back(id);
                break;
            };
            layer.io_mut(id).push(self.queue, id.pack());
            self.outstanding.insert(id.pack(), pending);
            batch.push(id);
            self.left -= 1;
        }
        layer.submit(reactor, channel, &batch);
        layer.unplug(reactor);
    }

    fn finish(&mut self, layer: &mut Layer, id: IoId) {
        layer.retrieve(id);
        let status = layer.io(id).status;
        let pending = self.outstanding.remove(&id.pack()).unwrap();
        layer.give_back(id);
        self.ledger.close(pending.obligation);
        let Allowed { errors, resets, removal, .. } = self.allowed;
        let legal = match status {
            Status::SUCCESS => true,
            Status::ABORT_REQUESTED => resets || removal,
            Status::INVALID_NAMESPACE => removal,
            _ => errors,
        };
        assert!(legal, "{:?} ended with {status:?}, allowed {:?}", pending.op, self.allowed);
        if let Some(cell) = pending.cell {
            self.busy[cell] = false;
        }
        if pending.op == Op::Flush {
            self.flushing = false;
        }
        if status == Status::SUCCESS {
            self.book(&pending);
        }
    }

    fn book(&mut self, pending: &Pending) {
        let mut model = self.model.lock().unwrap();
        let blocks = pending.first as usize..(pending.first + pending.blocks) as usize;
        match pending.op {
            Op::Flush => model.durable = model.now.clone(),
            Op::Write | Op::WriteZeroes => {
                for block in blocks {
                    model.now[block] = BTreeSet::from([pending.fill]);
                    if pending.fua || !self.allowed.cached {
                        model.durable[block] = BTreeSet::from([pending.fill]);
                    }
                }
            }
            Op::Read => {
                model.reads += 1;
                for block in blocks {
                    let mut bytes = [0; BLOCK as usize];
                    self.memory.read(block as u64 * BLOCK, &mut bytes).unwrap();
                    let (found, legal) = (bytes[0], &model.now[block]);
                    assert!(bytes.iter().all(|byte| *byte == found), "block {} is torn", model.first + block as u64);
                    assert!(legal.contains(&found), "block {} holds {found:#x}, not of {legal:x?}", model.first + block as u64);
                }
            }
            _ => {}
        }
    }

    fn act(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if let Some((_, channel)) = self.open
            && layer.is_closed(channel)
        {
            self.open = None;
            layer.close_channel(reactor, channel);
        }
        if self.open.is_none()
            && let Ok(descriptor) = self.registry.open(&self.name, true, |_| {})
            && let Ok(channel) = descriptor.channel(reactor, layer)
        {
            self.open = Some((descriptor, channel));
        }
        match self.open.as_ref().map(|(_, channel)| *channel) {
            Some(channel) => self.submit_some(layer, reactor, channel),
            None => self.left -= 1,
        }
    }
}

impl Poller for Client {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        if self.end.is_none() {
            return 0;
        }
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        let mut work = reaped.len();
        reaped.into_iter().for_each(|id| self.finish(&mut layer, id));
        if reactor.now_ns() >= self.next_ns && self.left > 0 {
            work += 1;
            self.act(&mut layer, reactor);
            let after_ns = self.rng.below(40_000);
            self.next_ns = reactor.now_ns() + after_ns;
            let waker = self.waker.clone();
            reactor.after(after_ns, move |_| waker.wake());
        }
        if self.left == 0 && self.outstanding.is_empty() {
            if let Some((_, channel)) = self.open.take() {
                layer.close_channel(reactor, channel);
            }
            layer.remove_queue(self.queue);
            self.ledger.close(self.end.take().unwrap());
        }
        work
    }
}
