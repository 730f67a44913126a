//! A front end that does random I/O on cells of its own, one I/O a cell, and knows what each block must hold.
#![allow(dead_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use qpair_bdev::{ChannelId, Descriptor, Info, IoFlags, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::{Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};

pub const CELL_BLOCKS: u64 = 16;
const TIMEOUT_NS: u64 = 2_000_000;

/// What the test allows to happen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    pub errors: bool,
    pub aborts: bool,
    pub removal: bool,
    pub resize: bool,
    pub panics: bool,
    pub resets: bool,
    pub churn: bool,
    /// Compares, copies and borrows too.
    pub composed: bool,
    /// Content changes by plain writes alone, and blocks are written before they are read.
    pub writes_only: bool,
    /// The device answers anything, with any data.
    pub rubbish: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Content {
    Unknown,
    Filled(u8),
}

#[derive(Clone)]
struct Pending {
    obligation: u64,
    op: Op,
    cell: usize,
    /// Within the cell.
    first: u64,
    blocks: u64,
    fill: u8,
    since_ns: u64,
    aborted: bool,
    /// Refused for certain, with this.
    refusal: Option<Status>,
    /// First block of a copy's source, within the cell.
    source: u64,
}

struct Cell {
    number: u64,
    busy: bool,
    blocks: Vec<Content>,
}

pub struct Client {
    registry: Arc<Registry>,
    layer: Rc<RefCell<Layer>>,
    waker: LocalWaker,
    queue: QueueId,
    open: Option<(Descriptor, ChannelId)>,
    memory: Option<Region>,
    cells: Vec<Cell>,
    outstanding: HashMap<u64, Pending>,
    reaped: Vec<IoId>,
    left: u32,
    next_ns: u64,
    info: Info,
    allowed: Allowed,
    ledger: Obligations,
    end: Option<u64>,
    rng: Rng,
    scratch: Vec<u8>,
}

impl Client {
    /// Puts one on a reactor; `cells`: numbers of the cells that are its own. It ends by itself after `ios` I/Os.
    pub fn start(
        world: &mut World,
        reactor: usize,
        registry: &Arc<Registry>,
        info: &Info,
        allowed: Allowed,
        cells: &[u64],
        ios: u32,
    ) -> Weak<Mapping> {
        let (rng, ledger) = (world.rng().fork(), world.obligations().clone());
        // The second half is what compare-and-write writes.
        let bytes = 2 * cells.len() as u64 * CELL_BLOCKS * u64::from(info.block_size);
        let mapping = Mapping::anonymous(bytes as usize, Pages::Normal).unwrap();
        let weak = Arc::downgrade(&mapping);
        let cell = |number: &u64| Cell {
            number: *number,
            busy: false,
            blocks: vec![if allowed.writes_only { Content::Unknown } else { Content::Filled(0) }; CELL_BLOCKS as usize],
        };
        let (registry, info, cells) = (registry.clone(), info.clone(), cells.iter().map(cell).collect());
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
                memory: Some(Region::new(mapping)),
                cells,
                outstanding: HashMap::new(),
                reaped: Vec::new(),
                left: ios,
                next_ns: 0,
                info,
                allowed,
                end: Some(ledger.open_next()),
                ledger,
                rng,
                scratch: Vec::new(),
            };
            reactor.install_poller(poller, Box::new(client));
        });
        weak
    }

    fn wake_at(&mut self, reactor: &mut Reactor, after_ns: u64) {
        let waker = self.waker.clone();
        reactor.after(after_ns, move |_| waker.wake());
    }

    fn place(&self, pending: &Pending) -> u64 {
        (pending.cell as u64 * CELL_BLOCKS + pending.first) * u64::from(self.info.block_size)
    }

    fn fill_in(&mut self, layer: &mut Layer, id: IoId, now_ns: u64) -> Option<Pending> {
        let free: Vec<usize> = (0..self.cells.len()).filter(|cell| !self.cells[*cell].busy).collect();
        if free.is_empty() {
            return None;
        }
        let rng = &mut self.rng;
        let cell = *rng.pick(&free);
        let kinds = if self.allowed.writes_only { 32 } else { 40 + u64::from(self.allowed.resets) };
        let op = match rng.below(kinds) {
            0..16 => Op::Read,
            16..32 => Op::Write,
            32..35 => Op::WriteZeroes,
            35..37 => Op::Unmap,
            37..40 => Op::Flush,
            _ => Op::Reset,
        };
        let op = match rng.below(8) {
            0 if self.allowed.composed => *rng.pick(&[Op::Copy, Op::Compare, Op::CompareAndWrite, Op::ZcopyStart]),
            _ => op,
        };
        let first = rng.below(CELL_BLOCKS);
        let blocks = rng.between(1, CELL_BLOCKS - first);
        let fill = rng.between(1, 255) as u8;
        let source = rng.below(CELL_BLOCKS - blocks + 1);
        let (obligation, since_ns) = (self.ledger.open_next(), now_ns);
        let mut pending = Pending { obligation, op, cell, first, blocks, fill, since_ns, aborted: false, refusal: None, source };
        self.cells[cell].busy = true;
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (op, self.cells[cell].number * CELL_BLOCKS + first, blocks);
        if self.rng.chance(1, 8) {
            io.flags |= IoFlags::FUA;
        }
        match op {
            Op::Read | Op::Write => self.cut(layer, id, &mut pending),
            Op::Copy => layer.io_mut(id).source_lba = self.cells[cell].number * CELL_BLOCKS + source,
            Op::Compare | Op::CompareAndWrite => self.compare(layer, id, &mut pending),
            Op::ZcopyStart => layer.io_mut(id).flags |= IoFlags::POPULATE,
            _ => {}
        }
        if op == Op::Unmap && !self.info.supported.has(op) {
            pending.refusal = Some(Status::INVALID_OPCODE);
        }
        Some(pending)
    }

    /// Gives an I/O its data, in random pieces.
    fn cut(&mut self, layer: &mut Layer, id: IoId, pending: &mut Pending) {
        let size = u64::from(self.info.block_size);
        let (start, total) = (self.place(pending), pending.blocks * size);
        let memory = self.memory.clone().unwrap();
        memory.fill(start, total, if pending.op == Op::Write { pending.fill } else { 0xee }).unwrap();
        let coarse = self.rng.chance(3, 4);
        let mut at = 0;
        let mut pieces_of_block = vec![0usize; pending.blocks as usize];
        while at < total {
            let step = if coarse { self.rng.between(size, 4 * size) } else { self.rng.between(1, size) }.min(total - at);
            layer.io_mut(id).list.push(Sge { region: memory.clone(), offset: start + at, length: step as u32 });
            (at / size..=(at + step - 1) / size).for_each(|block| pieces_of_block[block as usize] += 1);
            at += step;
        }
        let (most, pieces) = (self.info.max_segments as usize, layer.io(id).list.len());
        if most != 0 && pieces > most && pieces_of_block.iter().any(|pieces| *pieces > most) {
            pending.refusal = Some(Status::INVALID_SGL_COUNT);
        }
    }

    /// Gives a compare what it should find, or something that it should not; and what is to be written then.
    fn compare(&mut self, layer: &mut Layer, id: IoId, pending: &mut Pending) {
        let size = u64::from(self.info.block_size);
        let (start, memory) = (self.place(pending), self.memory.clone().unwrap());
        for block in 0..pending.blocks {
            let byte = match self.cells[pending.cell].blocks[(pending.first + block) as usize] {
                Content::Filled(fill) => fill,
                Content::Unknown => 0xee,
            };
            memory.fill(start + block * size, size, byte).unwrap();
        }
        if self.rng.chance(1, 3) {
            let at = start + self.rng.below(pending.blocks * size);
            let mut byte = [0];
            memory.read(at, &mut byte).unwrap();
            memory.write(at, &[!byte[0]]).unwrap();
            pending.refusal = Some(Status::COMPARE_FAILURE);
        }
        let list = &mut layer.io_mut(id).list;
        list.push(Sge { region: memory.clone(), offset: start, length: (pending.blocks * size) as u32 });
        if pending.op == Op::CompareAndWrite {
            let second = self.cells.len() as u64 * CELL_BLOCKS * size + start;
            memory.fill(second, pending.blocks * size, pending.fill).unwrap();
            list.push(Sge { region: memory, offset: second, length: (pending.blocks * size) as u32 });
        }
    }

    /// What a zcopy lent is as it should be; then other data go back the same way.
    fn give_back_lent(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId, mut pending: Pending) -> bool {
        let Some((_, channel)) = self.open else { return false };
        let size = u64::from(self.info.block_size);
        let lent = layer.io(id).list[0].clone();
        self.scratch.resize(size as usize, 0);
        for block in 0..pending.blocks {
            lent.region.read(lent.offset + block * size, &mut self.scratch).unwrap();
            if let Content::Filled(fill) = self.cells[pending.cell].blocks[(pending.first + block) as usize] {
                assert!(self.scratch.iter().all(|byte| *byte == fill), "what was lent is not {fill:#x}");
            }
        }
        lent.region.fill(lent.offset, pending.blocks * size, pending.fill).unwrap();
        pending.op = Op::ZcopyEnd;
        pending.obligation = self.ledger.open_next();
        let io = layer.io_mut(id);
        (io.op, io.flags) = (Op::ZcopyEnd, IoFlags::COMMIT);
        io.push(self.queue, pending.obligation);
        self.outstanding.insert(id.pack(), pending);
        layer.submit(reactor, channel, &[id]);
        layer.unplug(reactor);
        true
    }

    fn submit_some(&mut self, layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId) {
        let mut batch = Vec::new();
        for _ in 0..self.rng.between(1, 6).min(u64::from(self.left)) {
            let Some(id) = layer.take() else { break };
            let Some(pending) = self.fill_in(layer, id, reactor.now_ns()) else {
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
            && (layer.is_closed(channel) || (self.allowed.churn && self.rng.chance(1, 12)))
        {
            self.open = None;
            // With I/O in flight, now and then: it ends all the same.
            layer.close_channel(reactor, channel);
        }
        if self.open.is_none()
            && let Ok(descriptor) = self.registry.open("disk", true, |_| {})
            && let Ok(channel) = descriptor.channel(reactor, layer)
        {
            self.open = Some((descriptor, channel));
        }
        match self.open.as_ref().map(|(_, channel)| *channel) {
            Some(channel) => self.submit_some(layer, reactor, channel),
            // No device: that counts too, or it would never end.
            None => self.left -= 1,
        }
        if self.allowed.aborts && self.rng.chance(1, 4) {
            let mut keys: Vec<u64> = self.outstanding.keys().copied().collect();
            keys.sort_unstable();
            if !keys.is_empty() {
                let key = *self.rng.pick(&keys);
                self.outstanding.get_mut(&key).unwrap().aborted = true;
                layer.abort(reactor, IoId::unpack(key));
            }
        }
    }

    fn finish(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        let frame = layer.retrieve(id);
        let pending = self.outstanding.remove(&id.pack()).expect("an I/O came back that was not out");
        assert_eq!(frame.tag, pending.obligation);
        let status = layer.io(id).status;
        self.ledger.close(pending.obligation);
        let lent = pending.op == Op::ZcopyStart && status == Status::SUCCESS;
        if lent && self.give_back_lent(layer, reactor, id, pending.clone()) {
            return;
        }
        layer.give_back(id);
        self.cells[pending.cell].busy = false;
        self.judge(&pending, status);
        let source = pending.source as usize..(pending.source + pending.blocks) as usize;
        let copied = self.cells[pending.cell].blocks[source].to_vec();
        let blocks = pending.first as usize..(pending.first + pending.blocks) as usize;
        let content = &mut self.cells[pending.cell].blocks[blocks];
        match (pending.op, status) {
            (Op::Write | Op::CompareAndWrite | Op::ZcopyEnd, Status::SUCCESS) => content.fill(Content::Filled(pending.fill)),
            (Op::Copy, Status::SUCCESS) => content.copy_from_slice(&copied),
            (Op::WriteZeroes, Status::SUCCESS) => content.fill(Content::Filled(0)),
            // Refused before anything was begun.
            (_, Status::INVALID_SGL_COUNT | Status::INVALID_OPCODE | Status::LBA_OUT_OF_RANGE | Status::COMPARE_FAILURE) => {}
            (Op::Write | Op::WriteZeroes | Op::Unmap | Op::CompareAndWrite | Op::ZcopyEnd | Op::Copy, _) => {
                content.fill(Content::Unknown);
            }
            (Op::Read, Status::SUCCESS) if !self.allowed.rubbish => self.verify(&pending),
            _ => {}
        }
    }

    fn judge(&self, pending: &Pending, status: Status) {
        let Allowed { errors, removal, resize, panics, resets, .. } = self.allowed;
        let legal = match status {
            Status::SUCCESS => pending.refusal.is_none() || (pending.refusal == Some(Status::COMPARE_FAILURE) && self.is_unknown(pending)),
            Status::ABORT_REQUESTED => pending.aborted || removal || resets,
            Status::UNRECOVERED_READ_ERROR | Status::WRITE_FAULT => errors,
            Status::INTERNAL_DEVICE_ERROR => panics,
            Status::INVALID_NAMESPACE => removal || panics,
            Status::LBA_OUT_OF_RANGE => resize,
            // Content that is not known may be anything.
            Status::COMPARE_FAILURE if matches!(pending.op, Op::Compare | Op::CompareAndWrite) => {
                pending.refusal == Some(status) || self.is_unknown(pending)
            }
            other => pending.refusal == Some(other),
        };
        assert!(
            legal || self.allowed.rubbish,
            "{:?} ended with {status:?}, refusal {:?}, allowed {:?}",
            pending.op,
            pending.refusal,
            self.allowed
        );
    }

    fn is_unknown(&self, pending: &Pending) -> bool {
        let blocks = pending.first as usize..(pending.first + pending.blocks) as usize;
        self.cells[pending.cell].blocks[blocks].contains(&Content::Unknown)
    }

    fn verify(&mut self, pending: &Pending) {
        let size = self.info.block_size as usize;
        self.scratch.resize(size, 0);
        for block in 0..pending.blocks {
            let Content::Filled(fill) = self.cells[pending.cell].blocks[(pending.first + block) as usize] else { continue };
            let place = self.place(pending) + block * size as u64;
            self.memory.as_ref().unwrap().read(place, &mut self.scratch).unwrap();
            assert!(
                self.scratch.iter().all(|byte| *byte == fill),
                "block {} of cell {} is not {fill:#x}",
                pending.first + block,
                pending.cell
            );
        }
    }

    fn time_out(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let now_ns = reactor.now_ns();
        let late = |(key, pending): (&u64, &mut Pending)| {
            let late = pending.since_ns + TIMEOUT_NS <= now_ns;
            pending.aborted |= late;
            late.then_some(*key)
        };
        let mut late: Vec<u64> = self.outstanding.iter_mut().filter_map(late).collect();
        late.sort_unstable();
        late.into_iter().for_each(|key| layer.abort(reactor, IoId::unpack(key)));
    }

    fn end(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if let Some((_, channel)) = self.open.take() {
            layer.close_channel(reactor, channel);
        }
        layer.remove_queue(self.queue);
        self.memory = None;
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
        let mut reaped = std::mem::take(&mut self.reaped);
        layer.reap(reactor, self.queue, &mut reaped);
        let mut work = reaped.len();
        reaped.drain(..).for_each(|id| self.finish(&mut layer, reactor, id));
        self.reaped = reaped;
        if reactor.now_ns() >= self.next_ns {
            work += 1;
            let after_ns = if self.left > 0 {
                self.act(&mut layer, reactor);
                self.rng.below(40_000)
            } else {
                TIMEOUT_NS / 2
            };
            self.time_out(&mut layer, reactor);
            self.next_ns = reactor.now_ns() + after_ns;
            self.wake_at(reactor, after_ns);
        }
        if self.left == 0 && self.outstanding.is_empty() {
            self.end(&mut layer, reactor);
        }
        work
    }
}
