//! A front end on one reactor: random I/O on cells of its own, one I/O a cell, from plain and from lent memory; it knows what each block
//! must hold.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::{BdevError, Buffer, ChannelId, Descriptor, Info, IoFlags, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};

use crate::target::{Disk, SECTOR};

pub const CELL_BLOCKS: u64 = 16;
/// I/Os of each reactor: those of the bdev layer.
pub const IOS: u32 = 192;

/// What the test allows to happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// The target answers by errors.
    pub fails: bool,
    /// It forgets data or status.
    pub shorts: bool,
    /// It lies: nothing is sure but that each I/O ends once.
    pub lies: bool,
    /// Clients ask for aborts.
    pub aborts: bool,
    pub resets: bool,
    /// The device goes, also while I/O is in flight.
    pub removal: bool,
    /// Channels are closed and opened again.
    pub churn: bool,
    /// Reactors end with I/O in flight.
    pub ends: bool,
    /// Targets go and come: in between a reset ends what waits.
    pub outages: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Content {
    Unknown,
    Filled(u8),
}

struct Pending {
    obligation: u64,
    op: Op,
    cell: usize,
    /// Within the cell.
    first: u64,
    blocks: u64,
    fill: u8,
    durable: bool,
    aborted: bool,
    /// Data are in lent memory.
    lent: bool,
}

struct Cell {
    number: u64,
    busy: bool,
    blocks: Vec<Content>,
}

/// What clients did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub done: u64,
    pub failed: u64,
    /// In lent memory.
    pub lent: u64,
    pub opened: u64,
    /// No queue was free.
    pub crowded: u64,
}

/// Whose I/O, on what.
pub struct Load {
    pub bdev: &'static str,
    pub info: Info,
    pub allowed: Allowed,
    pub ios: u32,
    /// Where it can be seen whether a durable write is.
    pub disk: Option<Rc<RefCell<Disk>>>,
    pub tally: Rc<RefCell<Tally>>,
}

pub struct Client {
    load: Load,
    registry: Arc<Registry>,
    layer: Rc<RefCell<Layer>>,
    waker: LocalWaker,
    queue: QueueId,
    open: Option<(Descriptor, ChannelId)>,
    plain: Region,
    lent: Option<(Buffer, Region)>,
    cells: Vec<Cell>,
    outstanding: BTreeMap<u64, Pending>,
    left: u32,
    next_ns: u64,
    ledger: Obligations,
    end: Option<u64>,
    rng: Rng,
}

impl Client {
    /// Puts one on a reactor; `cells`: numbers of the cells that are its own. It ends by itself after its I/Os.
    pub fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, load: Load, cells: &[u64]) {
        let (rng, ledger) = (world.rng().fork(), world.obligations().clone());
        let bytes = cells.len() as u64 * CELL_BLOCKS * u64::from(load.info.block_size);
        let mapping = Mapping::anonymous(bytes as usize, Pages::Normal).unwrap();
        let cell = |number: &u64| Cell { number: *number, busy: false, blocks: vec![Content::Filled(0); CELL_BLOCKS as usize] };
        let (registry, cells) = (registry.clone(), cells.iter().map(cell).collect());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, IOS);
            let poller = reactor.reserve_poller("client");
            let waker = reactor.waker(poller).unwrap();
            let queue = layer.borrow_mut().add_queue(waker.clone());
            let client = Self {
                registry,
                layer,
                waker,
                queue,
                open: None,
                plain: Region::new(mapping),
                lent: None,
                cells,
                outstanding: BTreeMap::new(),
                left: load.ios,
                next_ns: 0,
                end: Some(ledger.open_next()),
                ledger,
                rng,
                load,
            };
            reactor.install_poller(poller, Box::new(client));
        });
    }

    fn block(&self) -> u64 {
        u64::from(self.load.info.block_size)
    }

    /// Where an I/O's data are.
    fn place(&self, pending: &Pending) -> (Region, u64) {
        let offset = (pending.cell as u64 * CELL_BLOCKS + pending.first) * self.block();
        match &self.lent {
            Some((buffer, region)) if pending.lent => (region.clone(), buffer.offset() + offset),
            _ => (self.plain.clone(), offset),
        }
    }

    fn fill_in(&mut self, layer: &mut Layer, id: IoId) -> Option<Pending> {
        let free: Vec<usize> = (0..self.cells.len()).filter(|cell| !self.cells[*cell].busy).collect();
        if free.is_empty() {
            return None;
        }
        let rng = &mut self.rng;
        let cell = *rng.pick(&free);
        let op = match rng.below(if self.load.allowed.resets { 62 } else { 60 }) {
            0..25 => Op::Read,
            25..50 => Op::Write,
            50..54 => Op::WriteZeroes,
            54..57 => Op::Unmap,
            57..60 => Op::Flush,
            _ => Op::Reset,
        };
        let first = rng.below(CELL_BLOCKS);
        let blocks = rng.between(1, CELL_BLOCKS - first);
        let (fill, durable, lent) = (rng.between(1, 255) as u8, rng.chance(1, 6), self.lent.is_some() && rng.chance(1, 2));
        let obligation = self.ledger.open_next();
        let pending = Pending { obligation, op, cell, first, blocks, fill, durable, aborted: false, lent };
        self.cells[cell].busy = true;
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (op, self.cells[cell].number * CELL_BLOCKS + first, blocks);
        if durable {
            io.flags |= IoFlags::FUA;
        }
        if rng.chance(1, 2) {
            io.flags |= IoFlags::NO_UNMAP;
        }
        if matches!(op, Op::Read | Op::Write) {
            self.cut(layer, id, &pending);
        }
        Some(pending)
    }

    /// Gives an I/O its data: in one piece, two or many, of which some may be in the other memory.
    fn cut(&mut self, layer: &mut Layer, id: IoId, pending: &Pending) {
        let total = pending.blocks * self.block();
        let (region, start) = self.place(pending);
        region.fill(start, total, if pending.op == Op::Write { pending.fill } else { 0xee }).unwrap();
        let pieces = *self.rng.pick(&[1, 1, 2, 2, 3, 7]);
        let mut at = 0;
        for left in (0..pieces).rev() {
            let step = if left == 0 { total - at } else { self.rng.between(1, (total - at) / 2).min(total - at - left) };
            layer.io_mut(id).list.push(Sge { region: region.clone(), offset: start + at, length: step as u32 });
            at += step;
        }
    }

    fn submit_some(&mut self, layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId) {
        let mut batch = Vec::new();
        for _ in 0..self.rng.between(1, 8).min(u64::from(self.left)) {
            let Some(id) = layer.take() else { break };
            let Some(pending) = self.fill_in(layer, id) else {
                layer.give_back(id);
                break;
            };
            layer.io_mut(id).push(self.queue, pending.obligation);
            self.outstanding.insert(id.pack(), pending);
            batch.push(id);
            self.left -= 1;
        }
        layer.submit(reactor, channel, &batch);
        layer.unplug(reactor);
    }

    fn act(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if let Some((_, channel)) = self.open
            && (layer.is_closed(channel) || (self.load.allowed.churn && self.rng.chance(1, 8)))
        {
            self.open = None;
            // With I/O in flight, now and then: it ends all the same.
            layer.close_channel(reactor, channel);
        }
        if self.open.is_none() {
            self.open(layer, reactor);
        }
        match self.open.as_ref().map(|(_, channel)| *channel) {
            Some(channel) => self.submit_some(layer, reactor, channel),
            // That counts too, or it would never end.
            None => self.left -= 1,
        }
        if self.load.allowed.aborts && self.rng.chance(1, 4) {
            let keys: Vec<u64> = self.outstanding.keys().copied().collect();
            if let Some(pending) =
                (!keys.is_empty()).then(|| *self.rng.pick(&keys)).and_then(|key| self.outstanding.get_mut(&key).map(|it| (key, it)))
            {
                pending.1.aborted = true;
                layer.abort(reactor, IoId::unpack(pending.0));
            }
        }
    }

    fn open(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let allowed = self.load.allowed;
        let opened = self.registry.open(self.load.bdev, true, |_| {}).and_then(|descriptor| {
            let channel = descriptor.channel(reactor, layer)?;
            Ok((descriptor, channel))
        });
        match opened {
            Ok((descriptor, channel)) => {
                self.load.tally.borrow_mut().opened += 1;
                if self.lent.is_none() && self.rng.chance(3, 4) {
                    let buffer = descriptor.buffer(self.cells.len() as u64 * CELL_BLOCKS * self.block()).unwrap();
                    let region = Region::new(buffer.mapping().clone());
                    self.lent = Some((buffer, region));
                }
                self.open = Some((descriptor, channel));
            }
            // Queues whose channels still close are taken.
            Err(BdevError::Unsupported(text)) if text.ends_with("queues are taken") => {
                assert!(allowed.churn || allowed.removal, "{text}");
                self.load.tally.borrow_mut().crowded += 1;
            }
            Err(error) => {
                assert!(allowed.removal && matches!(error, BdevError::NoSuchBdev(_) | BdevError::Removing(_)), "{error}");
            }
        }
    }

    fn finish(&mut self, layer: &mut Layer, id: IoId) {
        let frame = layer.retrieve(id);
        let pending = self.outstanding.remove(&id.pack()).expect("an I/O came back that was not out");
        assert_eq!(frame.tag, pending.obligation);
        let status = layer.io(id).status;
        self.ledger.close(pending.obligation);
        layer.give_back(id);
        self.cells[pending.cell].busy = false;
        self.judge(&pending, status);
        {
            let mut tally = self.load.tally.borrow_mut();
            tally.done += 1;
            tally.failed += u64::from(status.is_error());
            tally.lent += u64::from(pending.lent && matches!(pending.op, Op::Read | Op::Write));
        }
        if self.load.allowed.lies {
            return;
        }
        let blocks = pending.first as usize..(pending.first + pending.blocks) as usize;
        let content = &mut self.cells[pending.cell].blocks[blocks];
        match (pending.op, status) {
            (Op::Write, Status::SUCCESS) => content.fill(Content::Filled(pending.fill)),
            (Op::WriteZeroes, Status::SUCCESS) => content.fill(Content::Filled(0)),
            (Op::Write | Op::WriteZeroes | Op::Unmap, _) => content.fill(Content::Unknown),
            (Op::Read, Status::SUCCESS) => self.verify(&pending),
            _ => {}
        }
        if status == Status::SUCCESS && pending.durable && matches!(pending.op, Op::Write | Op::WriteZeroes | Op::Unmap) {
            self.verify_durable(&pending);
        }
    }

    fn judge(&self, pending: &Pending, status: Status) {
        let Allowed { fails, shorts, lies, aborts: _, resets, removal, churn: _, ends: _, outages } = self.load.allowed;
        let legal = match status {
            Status::SUCCESS => true,
            Status::ABORT_REQUESTED => pending.aborted || removal || (outages && resets),
            Status::INTERNAL_DEVICE_ERROR => fails || lies,
            Status::INVALID_OPCODE => fails || lies || !self.load.info.supported.has(pending.op),
            Status::DATA_TRANSFER_ERROR => shorts || lies,
            Status::INVALID_NAMESPACE => removal,
            _ => false,
        };
        assert!(legal, "{:?} ended with {status:?}, allowed {:?}", pending.op, self.load.allowed);
    }

    fn verify(&self, pending: &Pending) {
        let (region, start) = self.place(pending);
        let mut bytes = vec![0; self.block() as usize];
        for block in 0..pending.blocks {
            let Content::Filled(fill) = self.cells[pending.cell].blocks[(pending.first + block) as usize] else { continue };
            region.read(start + block * self.block(), &mut bytes).unwrap();
            let wrong = bytes.iter().position(|byte| *byte != fill);
            assert!(
                wrong.is_none(),
                "block {} of cell {} is not {fill:#x}, but {:#x} from byte {wrong:?} on",
                pending.first + block,
                pending.cell,
                bytes[wrong.unwrap_or(0)]
            );
        }
    }

    fn verify_durable(&self, pending: &Pending) {
        let Some(disk) = self.load.disk.as_ref().filter(|_| self.load.info.write_cache) else { return };
        let sectors = self.block() / SECTOR as u64;
        let first = (self.cells[pending.cell].number * CELL_BLOCKS + pending.first) * sectors;
        let dirty = disk.borrow().dirty.range(first..first + pending.blocks * sectors).next().is_some();
        assert!(!dirty, "a durable {:?} is in the cache", pending.op);
    }

    fn end(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if let Some((_, channel)) = self.open.take() {
            layer.close_channel(reactor, channel);
        }
        layer.remove_queue(self.queue);
        self.lent = None;
        self.ledger.close(self.end.take().unwrap());
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
        if self.left > 0 && reactor.now_ns() >= self.next_ns {
            work += 1;
            self.act(&mut layer, reactor);
            let after_ns = self.rng.below(20_000);
            self.next_ns = reactor.now_ns() + after_ns;
            let waker = self.waker.clone();
            reactor.after(after_ns, move |_| waker.wake());
        }
        if self.left == 0 && self.outstanding.is_empty() {
            self.end(&mut layer, reactor);
        }
        work
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Its reactor ended: nobody is left to be answered.
        if self.load.allowed.ends {
            std::mem::take(&mut self.outstanding).into_values().for_each(|pending| self.ledger.close(pending.obligation));
            self.end.take().into_iter().for_each(|end| self.ledger.close(end));
        }
    }
}
