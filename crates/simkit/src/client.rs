//! A front end that does random I/O on cells of its own, one I/O a cell, and knows what each block must hold.
//!
//! It takes I/Os from the slab, fills them in, submits batches, aborts, opens and closes its channel, and ends by itself. Each I/O is an obligation of
//! the world's: it is closed when the I/O comes back, so one that comes twice, or never, fails the world. What comes back is judged: by what the test
//! allows to happen ([`Allowed`]), and by the plain model ([`Model`](crate::model::Model)).
//!
//! On a zoned bdev its cells are zones (`zones.rs`).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use qpair_bdev::{ChannelId, Descriptor, Info, IoFlags, IoId, Layer, Op, QueueId, Registry, Status, ZoneAction};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};

use crate::model::{Fills, SharedModel, Spoils, lock};

/// Blocks of a cell, on a bdev without zones.
pub const CELL_BLOCKS: u64 = 16;
/// I/Os of each reactor, unless the test made its layer before.
pub const IOS: u32 = 96;
/// When a client loses patience with an I/O.
const TIMEOUT_NS: u64 = 2_000_000;

/// What the test allows to happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// An I/O may end with an error of the media.
    pub errors: bool,
    /// Clients ask for aborts, at random and when an I/O takes long.
    pub aborts: bool,
    /// The bdev, or what it stands on, may go.
    pub removal: bool,
    /// Its size changes.
    pub resize: bool,
    /// Modules panic.
    pub panics: bool,
    /// Clients reset the bdev: by draining and by aborting.
    pub resets: bool,
    /// Channels are closed and opened again, with I/O in flight.
    pub churn: bool,
    /// Compares, copies and borrows too.
    pub composed: bool,
    /// Content changes by plain writes alone.
    pub writes_only: bool,
    /// Nothing is changed.
    pub reads_only: bool,
    /// The device answers anything, with any data.
    pub rubbish: bool,
    /// Completed writes are lost with the power unless flushed.
    pub cached: bool,
    /// There are several copies, which may differ after a failed write.
    pub mirrored: bool,
    /// What a failed write did may end within a sector.
    pub frays: bool,
    /// It stands on several bdevs: one part of an I/O may be refused when others are done.
    pub scattered: bool,
    /// Data may be spoilt on their way.
    pub spoils: Option<Spoils>,
}

/// Who does what to which bdev.
#[derive(Clone, Debug)]
pub struct Load {
    /// The bdev's name.
    pub bdev: String,
    /// What it can do, and what those below it cannot.
    pub info: Info,
    /// What may happen.
    pub allowed: Allowed,
    /// After so many I/Os the client ends.
    pub ios: u32,
}

#[derive(Clone)]
pub(crate) struct Pending {
    obligation: u64,
    pub(crate) op: Op,
    pub(crate) action: Option<ZoneAction>,
    pub(crate) cell: usize,
    /// Within the model.
    pub(crate) first: u64,
    pub(crate) blocks: u64,
    pub(crate) fill: u8,
    durable: bool,
    since_ns: u64,
    aborted: bool,
    /// Where it will be, if not at `first`: an append.
    pub(crate) landing: u64,
    /// Refused for certain, with this.
    pub(crate) refusal: Option<Status>,
    /// What a copy copies.
    content: Vec<Fills>,
}

impl Pending {
    fn range(&self) -> std::ops::Range<u64> {
        let first = if self.op == Op::ZoneAppend { self.landing } else { self.first };
        first..first + self.blocks
    }
}

/// One zone as its client knows it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cell {
    busy: bool,
    /// Blocks before a zone's write pointer, where that is known.
    pub(crate) written: Option<u64>,
}

/// See the module's doc.
pub struct Client {
    registry: Arc<Registry>,
    layer: Rc<RefCell<Layer>>,
    waker: LocalWaker,
    queue: QueueId,
    open: Option<(Descriptor, ChannelId)>,
    pub(crate) memory: Option<Region>,
    pub(crate) model: SharedModel,
    pub(crate) cell_blocks: u64,
    pub(crate) cells: Vec<Cell>,
    outstanding: BTreeMap<u64, Pending>,
    reaped: Vec<IoId>,
    pub(crate) load: Load,
    next_ns: u64,
    ledger: Obligations,
    end: Option<u64>,
    pub(crate) rng: Rng,
}

impl Client {
    /// Puts one on a reactor, on the blocks of its model. It ends by itself; its memory is then nobody's.
    pub fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, load: &Load, model: &SharedModel) -> Weak<Mapping> {
        let (rng, ledger) = (world.rng().fork(), world.obligations().clone());
        let cell_blocks = load.info.zoned.map_or(CELL_BLOCKS, |zoned| zoned.zone_blocks);
        let blocks = lock(model).blocks();
        let cells = vec![Cell::default(); blocks.div_ceil(cell_blocks) as usize];
        // The second half is what compare-and-write writes.
        let mapping = Mapping::anonymous((2 * blocks * u64::from(load.info.block_size)) as usize, Pages::Normal).expect("memory");
        let weak = Arc::downgrade(&mapping);
        let (registry, load, model) = (registry.clone(), load.clone(), model.clone());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, IOS);
            let poller = reactor.reserve_poller("client");
            let waker = reactor.waker(poller).expect("just reserved");
            let queue = layer.borrow_mut().add_queue(waker.clone());
            let client = Self {
                registry,
                layer,
                waker,
                queue,
                open: None,
                memory: Some(Region::new(mapping)),
                model,
                cell_blocks,
                cells,
                outstanding: BTreeMap::new(),
                reaped: Vec::new(),
                load,
                next_ns: 0,
                end: Some(ledger.open_next()),
                ledger,
                rng,
            };
            reactor.install_poller(poller, Box::new(client));
        });
        weak
    }

    fn wake_at(&mut self, reactor: &mut Reactor, after_ns: u64) {
        let waker = self.waker.clone();
        reactor.after(after_ns, move |_| waker.wake());
    }

    pub(crate) fn block_size(&self) -> u64 {
        u64::from(self.load.info.block_size)
    }

    pub(crate) fn region(&self) -> Region {
        self.memory.clone().expect("until the client ends")
    }

    /// Where the memory of an I/O begins.
    pub(crate) fn place(&self, pending: &Pending) -> u64 {
        pending.first * self.block_size()
    }

    // ---- asking -----------------------------------------------------------------------------------------------------------------

    fn choose(&mut self) -> Op {
        let allowed = self.load.allowed;
        if allowed.reads_only {
            return Op::Read;
        }
        let kinds = if allowed.writes_only { 32 } else { 40 + u64::from(allowed.resets) };
        let op = match self.rng.below(kinds) {
            0..16 => Op::Read,
            16..32 => Op::Write,
            32..35 => Op::WriteZeroes,
            35..37 => Op::Unmap,
            37..40 => Op::Flush,
            _ => Op::Reset,
        };
        match self.rng.below(8) {
            0 if allowed.composed => *self.rng.pick(&[Op::Copy, Op::Compare, Op::CompareAndWrite, Op::ZcopyStart]),
            _ => op,
        }
    }

    fn fill_in(&mut self, layer: &mut Layer, id: IoId, now_ns: u64) -> Option<Pending> {
        let free: Vec<usize> = (0..self.cells.len()).filter(|cell| !self.cells[*cell].busy).collect();
        if free.is_empty() {
            return None;
        }
        let cell = *self.rng.pick(&free);
        let op = self.choose();
        let start = cell as u64 * self.cell_blocks;
        let within = self.rng.below(self.cell_blocks);
        let blocks = self.rng.between(1, self.cell_blocks - within);
        let (fill, durable) = (self.rng.between(1, 255) as u8, self.rng.chance(1, 8));
        let obligation = self.ledger.open_next();
        let mut pending = Pending {
            obligation,
            op,
            action: None,
            cell,
            first: start + within,
            blocks,
            fill,
            durable,
            since_ns: now_ns,
            aborted: false,
            landing: start + within,
            refusal: None,
            content: Vec::new(),
        };
        self.cells[cell].busy = true;
        if self.load.info.zoned.is_some() {
            self.choose_in_zone(&mut pending);
        }
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (pending.op, lock(&self.model).first + pending.first, pending.blocks);
        if durable {
            io.flags |= IoFlags::FUA;
        }
        match pending.op {
            Op::Read | Op::Write | Op::ZoneAppend => self.cut(layer, id, &mut pending),
            Op::Copy => {
                let source = start + self.rng.below(self.cell_blocks - pending.blocks + 1);
                layer.io_mut(id).source_lba = lock(&self.model).first + source;
                pending.content = lock(&self.model).begin_copy(pending.range(), source);
            }
            Op::Compare | Op::CompareAndWrite => self.compare(layer, id, &mut pending),
            Op::ZcopyStart => layer.io_mut(id).flags |= IoFlags::POPULATE,
            Op::Reset if self.rng.chance(1, 2) => layer.io_mut(id).flags |= IoFlags::DRAIN,
            Op::ZoneManagement => self.manage(layer, id, &pending),
            _ => {}
        }
        if pending.op == Op::Unmap && !self.load.info.supported.has(Op::Unmap) {
            pending.refusal = Some(Status::INVALID_OPCODE);
        }
        self.begin(&pending);
        Some(pending)
    }

    /// What an I/O may do to the model from now on.
    fn begin(&self, pending: &Pending) {
        let mut model = lock(&self.model);
        match pending.op {
            _ if pending.refusal.is_some() && !(self.load.allowed.scattered && self.load.info.zoned.is_none()) => {}
            Op::Write | Op::CompareAndWrite | Op::ZcopyEnd | Op::ZoneAppend => model.begin(pending.range(), pending.fill),
            // Unmapped blocks may read as anything that devices do: as before, or as zeros.
            Op::WriteZeroes | Op::Unmap => model.begin(pending.range(), 0),
            Op::ZoneManagement if pending.action == Some(ZoneAction::Reset) => model.begin(pending.range(), 0),
            Op::Flush => model.begin_flush(pending.obligation),
            _ => {}
        }
    }

    /// Gives an I/O its data, in random pieces.
    fn cut(&mut self, layer: &mut Layer, id: IoId, pending: &mut Pending) {
        let size = self.block_size();
        let (start, total, memory) = (self.place(pending), pending.blocks * size, self.region());
        memory.fill(start, total, if pending.op == Op::Read { 0xee } else { pending.fill }).expect("own memory");
        // What cannot be split must be taken as it is.
        let whole = pending.op == Op::ZoneAppend;
        let coarse = self.rng.chance(3, 4);
        let mut at = 0;
        let mut pieces_of_block = vec![0usize; pending.blocks as usize];
        while at < total {
            let step = match (whole, coarse) {
                (true, _) => total,
                (_, true) => self.rng.between(size, 4 * size),
                _ => self.rng.between(1, size),
            };
            let step = step.min(total - at);
            layer.io_mut(id).list.push(Sge { region: memory.clone(), offset: start + at, length: step as u32 });
            (at / size..=(at + step - 1) / size).for_each(|block| pieces_of_block[block as usize] += 1);
            at += step;
        }
        let (most, pieces) = (self.load.info.max_segments as usize, layer.io(id).list.len());
        if most != 0 && pieces > most && pieces_of_block.iter().any(|pieces| *pieces > most) {
            pending.refusal = Some(Status::INVALID_SGL_COUNT);
        }
    }

    /// Gives a compare what it should find, or something that it should not; and what is to be written then.
    fn compare(&mut self, layer: &mut Layer, id: IoId, pending: &mut Pending) {
        let size = self.block_size();
        let (start, memory) = (self.place(pending), self.region());
        for (number, fills) in (0..).zip(lock(&self.model).holds(pending.range())) {
            memory.fill(start + number * size, size, fills.first()).expect("own memory");
        }
        if self.rng.chance(1, 3) {
            let at = start + self.rng.below(pending.blocks * size);
            let mut byte = [0];
            memory.read(at, &mut byte).expect("own memory");
            memory.write(at, &[!byte[0]]).expect("own memory");
            pending.refusal = Some(Status::COMPARE_FAILURE);
        }
        // What is not known may be what is looked for, or not.
        if !lock(&self.model).holds(pending.range()).iter().all(Fills::is_sure) {
            pending.refusal = None;
        }
        let list = &mut layer.io_mut(id).list;
        list.push(Sge { region: memory.clone(), offset: start, length: (pending.blocks * size) as u32 });
        if pending.op == Op::CompareAndWrite {
            let second = lock(&self.model).blocks() * size + start;
            memory.fill(second, pending.blocks * size, pending.fill).expect("own memory");
            list.push(Sge { region: memory, offset: second, length: (pending.blocks * size) as u32 });
        }
    }

    fn submit_some(&mut self, layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId) {
        let mut batch = Vec::new();
        for _ in 0..self.rng.between(1, 6).min(u64::from(self.load.ios)) {
            let Some(id) = layer.take() else { break };
            let Some(pending) = self.fill_in(layer, id, reactor.now_ns()) else {
                layer.give_back(id);
                break;
            };
            layer.io_mut(id).push(self.queue, pending.obligation);
            self.outstanding.insert(id.pack(), pending);
            batch.push(id);
            self.load.ios -= 1;
        }
        layer.submit(reactor, channel, &batch);
        layer.unplug(reactor);
    }

    fn act(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let allowed = self.load.allowed;
        if let Some((_, channel)) = self.open
            && (layer.is_closed(channel) || (allowed.churn && self.rng.chance(1, 12)))
        {
            self.open = None;
            // With I/O in flight, now and then: it ends all the same.
            layer.close_channel(reactor, channel);
        }
        if self.open.is_none()
            && let Ok(descriptor) = self.registry.open(&self.load.bdev, true, |_| {})
            && let Ok(channel) = descriptor.channel(reactor, layer)
        {
            self.open = Some((descriptor, channel));
            if allowed.removal {
                // It may be another one of the same name.
                self.cells.iter_mut().for_each(|cell| cell.written = None);
            }
        }
        match self.open.as_ref().map(|(_, channel)| *channel) {
            Some(channel) => self.submit_some(layer, reactor, channel),
            // No device: that counts too, or it would never end.
            None => self.load.ios -= 1,
        }
        if allowed.aborts && self.rng.chance(1, 4) && !self.outstanding.is_empty() {
            let keys: Vec<u64> = self.outstanding.keys().copied().collect();
            let key = *self.rng.pick(&keys);
            self.abort(layer, reactor, key);
        }
    }

    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, key: u64) {
        if let Some(pending) = self.outstanding.get_mut(&key) {
            pending.aborted = true;
            layer.abort(reactor, IoId::unpack(key));
        }
    }

    fn time_out(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let now_ns = reactor.now_ns();
        let late = self.outstanding.iter().filter(|(_, pending)| pending.since_ns + TIMEOUT_NS <= now_ns);
        for key in late.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.abort(layer, reactor, key);
        }
    }

    // ---- judging ----------------------------------------------------------------------------------------------------------------

    fn finish(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        let frame = layer.retrieve(id);
        let pending = self.outstanding.remove(&id.pack()).expect("an I/O came back that was not out");
        assert_eq!(frame.tag, pending.obligation);
        let io = layer.io(id);
        let asked = (pending.op, lock(&self.model).first + pending.first, pending.blocks);
        assert_eq!((io.op, io.lba, io.blocks), asked, "an I/O is given back as it was");
        let (status, result) = (io.status, io.result);
        self.ledger.close(pending.obligation);
        if pending.op == Op::ZcopyStart && status == Status::SUCCESS && self.give_back_lent(layer, reactor, id, pending.clone()) {
            return;
        }
        layer.give_back(id);
        self.cells[pending.cell].busy = false;
        self.judge(&pending, status);
        self.book(&pending, status);
        if self.load.info.zoned.is_some() && !self.load.allowed.rubbish {
            self.book_zone(&pending, status, result);
        }
    }

    fn judge(&self, pending: &Pending, status: Status) {
        let Allowed { errors, removal, resize, panics, resets, rubbish, .. } = self.load.allowed;
        let compares = matches!(pending.op, Op::Compare | Op::CompareAndWrite);
        let legal = match status {
            Status::SUCCESS => pending.refusal.is_none(),
            Status::ABORT_REQUESTED => pending.aborted || removal || resets,
            Status::UNRECOVERED_READ_ERROR | Status::WRITE_FAULT => errors,
            Status::INTERNAL_DEVICE_ERROR => panics || (errors && removal),
            Status::INVALID_NAMESPACE => removal || panics,
            Status::LBA_OUT_OF_RANGE => resize,
            Status::COMPARE_FAILURE if compares => pending.refusal.is_some() || !self.is_sure(pending),
            other => pending.refusal == Some(other) || self.is_of_zones(pending, other),
        };
        let allowed = self.load.allowed;
        assert!(
            legal || rubbish,
            "{:?} of {:?} ended with {status:?}, refusal {:?}, allowed {allowed:?}",
            pending.op,
            pending.range(),
            pending.refusal
        );
    }

    fn is_sure(&self, pending: &Pending) -> bool {
        lock(&self.model).holds(pending.range()).iter().all(Fills::is_sure)
    }

    fn book(&mut self, pending: &Pending, status: Status) {
        let (memory, model) = (self.region(), self.model.clone());
        let mut model = lock(&model);
        let Allowed { cached, rubbish, mirrored, frays, .. } = self.load.allowed;
        let (durable, success) = (!cached || pending.durable, status == Status::SUCCESS);
        match pending.op {
            Op::Flush => model.end_flush(pending.obligation, success),
            _ if !success => {}
            Op::Write | Op::CompareAndWrite | Op::ZcopyEnd | Op::ZoneAppend => model.end(pending.range(), pending.fill, durable),
            Op::WriteZeroes => model.end(pending.range(), 0, durable),
            Op::Copy => model.end_copy(pending.first, &pending.content, durable),
            Op::Read if !rubbish => {
                model.reads += 1;
                let mut bytes = vec![0; self.load.info.block_size as usize];
                for (number, block) in (0..).zip(pending.range()) {
                    let at = self.place(pending) + number * bytes.len() as u64;
                    memory.read(at, &mut bytes).expect("own memory");
                    if let Some(spoils) = self.load.allowed.spoils {
                        model.undo_spoils(&mut bytes, spoils);
                    }
                    model.check(block, &bytes, !mirrored, frays);
                }
            }
            _ => {}
        }
    }

    /// What a zcopy lent is as it should be; then other data go back the same way.
    fn give_back_lent(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId, mut pending: Pending) -> bool {
        let Some((_, channel)) = self.open else { return false };
        let lent = layer.io(id).list[0].clone();
        let mut bytes = vec![0; self.load.info.block_size as usize];
        for (number, block) in (0..).zip(pending.range()) {
            lent.region.read(lent.offset + number * bytes.len() as u64, &mut bytes).expect("lent memory");
            lock(&self.model).check(block, &bytes, !self.load.allowed.mirrored, self.load.allowed.frays);
        }
        lent.region.fill(lent.offset, pending.blocks * bytes.len() as u64, pending.fill).expect("lent memory");
        pending.op = Op::ZcopyEnd;
        pending.obligation = self.ledger.open_next();
        self.begin(&pending);
        let io = layer.io_mut(id);
        (io.op, io.flags) = (Op::ZcopyEnd, IoFlags::COMMIT);
        io.push(self.queue, pending.obligation);
        pending.durable = false;
        self.outstanding.insert(id.pack(), pending);
        layer.submit(reactor, channel, &[id]);
        layer.unplug(reactor);
        true
    }

    fn end(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if let Some((_, channel)) = self.open.take() {
            layer.close_channel(reactor, channel);
        }
        layer.remove_queue(self.queue);
        self.memory = None;
        if let Some(end) = self.end.take() {
            self.ledger.close(end);
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
        let mut reaped = std::mem::take(&mut self.reaped);
        layer.reap(reactor, self.queue, &mut reaped);
        let mut work = reaped.len();
        reaped.drain(..).for_each(|id| self.finish(&mut layer, reactor, id));
        self.reaped = reaped;
        if reactor.now_ns() >= self.next_ns {
            work += 1;
            let mut after_ns = TIMEOUT_NS / 2;
            if self.load.ios > 0 {
                self.act(&mut layer, reactor);
                after_ns = self.rng.below(40_000);
            }
            if self.load.allowed.aborts {
                self.time_out(&mut layer, reactor);
            }
            self.next_ns = reactor.now_ns() + after_ns;
            // One that only waits sleeps, so that an I/O that never ends is found out.
            if self.load.ios > 0 || self.load.allowed.aborts {
                self.wake_at(reactor, after_ns);
            }
        }
        if self.load.ios == 0 && self.outstanding.is_empty() {
            self.end(&mut layer, reactor);
        }
        work
    }
}
