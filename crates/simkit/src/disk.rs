//! A simulated disk: it delays, reorders, fails, tears, stalls until it is asked to abort, panics, loses its cache with the power, and changes its
//! size, as planned or as told. It also checks what the layer promises to devices.
//!
//! It outlives worlds and registries: what was registered once can be registered again, and holds what it held.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qpair_bdev::{BdevError, Channel, ChannelId, Device, Info, Io, IoFlags, IoId, Layer, Op, Status};
use qpair_memory::SgList;
use qpair_reactor::sim::{self, Rng};
use qpair_reactor::{LocalWaker, Reactor};

/// What is never torn, in bytes.
pub const SECTOR: u64 = 512;

/// How a disk behaves all its life; chances are per mille of I/Os.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// The longest time of an I/O.
    pub delay_ns: u64,
    /// Fails, done in part.
    pub error: u64,
    /// Ends only when it is asked to.
    pub stall: u64,
    /// Of calls: the module panics.
    pub panic: u64,
}

/// What ails a disk just now; can be changed at any time.
#[derive(Debug, Default)]
pub struct Illness {
    /// Reads that fail, per mille.
    pub read_errors: AtomicU64,
    /// Whatever else fails, per mille.
    pub write_errors: AtomicU64,
    /// I/O that comes now ends only when it is asked to.
    pub hangs: AtomicBool,
    /// Calls in which the module panics, per mille.
    pub panics: AtomicU64,
}

impl Illness {
    /// Whether there is any.
    pub fn is_well(&self) -> bool {
        self.read_errors.load(Ordering::SeqCst) + self.write_errors.load(Ordering::SeqCst) == 0 && !self.hangs.load(Ordering::SeqCst)
    }

    /// Errors end. What hangs does so until it is asked to end.
    pub fn ends_errors(&self) {
        self.panics.store(0, Ordering::SeqCst);
        self.read_errors.store(0, Ordering::SeqCst);
        self.write_errors.store(0, Ordering::SeqCst);
    }

    /// All of it ends; what hangs goes on when the channels are polled.
    pub fn ends(&self) {
        self.ends_errors();
        self.hangs.store(false, Ordering::SeqCst);
    }
}

/// For what has no business panicking while it is held, but for planned panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Media {
    stable: Vec<u8>,
    /// Blocks written since the last flush, on a disk with a cache.
    cache: BTreeMap<u64, Vec<u8>>,
    rng: Rng,
}

struct Shared {
    media: Mutex<Media>,
    blocks: AtomicU64,
    inflight: AtomicU64,
    channels: AtomicU64,
    /// I/Os that went with their channel.
    dropped: AtomicU64,
    /// How often a channel was reset.
    resets: AtomicU64,
    /// What is with it: operation, first block, blocks.
    present: Mutex<Vec<(IoId, Op, u64, u64)>>,
    /// Promises of the layer that were broken.
    broken: Mutex<Vec<String>>,
}

impl Shared {
    fn demand(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            lock(&self.broken).push(what());
        }
    }

    fn leave(&self, id: IoId, io: &Io) {
        let mut present = lock(&self.present);
        // Names are a reactor's own: two may be alike.
        let at = present.iter().position(|other| *other == (id, io.op, io.lba, io.blocks));
        present.swap_remove(at.expect("it is here"));
    }
}

/// See the module's doc.
pub struct SimDisk {
    /// As registered first.
    pub info: Info,
    /// Can be changed at any time.
    pub illness: Arc<Illness>,
    plan: Plan,
    shared: Arc<Shared>,
}

impl SimDisk {
    /// Zeroed. Its write cache is volatile if `info` says that it has one.
    pub fn new(info: Info, plan: Plan) -> Arc<Self> {
        let media = Media { stable: vec![0; info.bytes() as usize], cache: BTreeMap::new(), rng: Rng::new(info.num_blocks) };
        let shared = Shared {
            media: Mutex::new(media),
            blocks: AtomicU64::new(info.num_blocks),
            inflight: AtomicU64::new(0),
            channels: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            present: Mutex::default(),
            broken: Mutex::default(),
        };
        Arc::new(Self { info, illness: Arc::default(), plan, shared: Arc::new(shared) })
    }

    /// What reads see.
    pub fn bytes(&self) -> Vec<u8> {
        let media = lock(&self.shared.media);
        let mut bytes = media.stable.clone();
        let size = self.info.block_size as usize;
        media.cache.iter().for_each(|(block, content)| bytes[*block as usize * size..][..size].copy_from_slice(content));
        bytes
    }

    /// Has all of it hold `byte`, on stable media.
    pub fn fill(&self, byte: u8) {
        let mut media = lock(&self.shared.media);
        media.stable.fill(byte);
        media.cache.clear();
    }

    /// The power goes: each block of the cache is kept or lost by itself.
    pub fn crash(&self) {
        let mut media = lock(&self.shared.media);
        let media = &mut *media;
        for (block, content) in std::mem::take(&mut media.cache) {
            if media.rng.chance(1, 2) {
                media.stable[block as usize * content.len()..][..content.len()].copy_from_slice(&content);
            }
        }
        // Nobody is left to have anything with it.
        lock(&self.shared.present).clear();
        self.shared.dropped.store(0, Ordering::SeqCst);
    }

    /// How often one of its channels was reset.
    pub fn resets(&self) -> u64 {
        self.shared.resets.load(Ordering::SeqCst)
    }

    /// How many channels it has.
    pub fn channels(&self) -> u64 {
        self.shared.channels.load(Ordering::SeqCst)
    }

    /// I/Os that are with it.
    pub fn inflight(&self) -> u64 {
        self.shared.inflight.load(Ordering::SeqCst)
    }

    /// The I/Os in a range; reads only if asked for.
    pub fn inside(&self, lba: u64, blocks: u64, reads: bool) -> Vec<(Op, u64, u64)> {
        let present = lock(&self.shared.present);
        let meets = |at: u64, count: u64| at < lba + blocks && lba < at + count;
        let those = present.iter().filter(|(_, op, at, count)| *op != Op::Flush && (reads || *op != Op::Read) && meets(*at, *count));
        those.map(|(_, op, at, count)| (*op, *at, *count)).collect()
    }

    /// The end of a test: the layer has kept its promises, and nothing is left here.
    pub fn check_end(&self) {
        let broken = lock(&self.shared.broken).clone();
        assert!(broken.is_empty(), "{}: {broken:?}", self.info.name);
        assert_eq!(self.shared.channels.load(Ordering::SeqCst), 0, "channels of {} leaked", self.info.name);
        assert_eq!(self.inflight(), 0, "I/O with {} is left", self.info.name);
        assert_eq!(self.shared.dropped.load(Ordering::SeqCst), 0, "I/Os of {} were dropped with their channels", self.info.name);
    }
}

impl Device for SimDisk {
    fn info(&self) -> Info {
        Info { num_blocks: self.shared.blocks.load(Ordering::SeqCst), ..self.info.clone() }
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let waker = layer.poller(id).and_then(|poller| reactor.waker(poller)).expect("a polled channel has a poller");
        let rng = sim::draw(reactor, Rng::fork);
        self.shared.channels.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(DiskChannel {
            shared: self.shared.clone(),
            info: self.info.clone(),
            plan: self.plan,
            illness: self.illness.clone(),
            pending: Vec::new(),
            waker,
            rng,
        }))
    }

    fn polled(&self) -> bool {
        true
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let before = self.shared.blocks.swap(num_blocks, Ordering::SeqCst);
        let inflight = self.inflight();
        self.shared.demand(num_blocks >= before || inflight == 0, || format!("shrunk with {inflight} I/Os in flight"));
        if num_blocks > self.info.num_blocks {
            self.shared.blocks.store(before, Ordering::SeqCst);
            return Err(BdevError::invalid("num_blocks", num_blocks, self.info.num_blocks));
        }
        Ok(())
    }
}

struct Pending {
    id: IoId,
    op: Op,
    lba: u64,
    blocks: u64,
    flags: IoFlags,
    /// Of its own, for what is done after the world is gone.
    list: SgList,
    due_ns: u64,
    aborted: bool,
    /// It ends when the disk is well again.
    hangs: bool,
}

struct DiskChannel {
    shared: Arc<Shared>,
    info: Info,
    plan: Plan,
    illness: Arc<Illness>,
    pending: Vec<Pending>,
    waker: LocalWaker,
    rng: Rng,
}

impl DiskChannel {
    fn check(&self, io: &Io) {
        let info = &self.info;
        let demand = |holds: bool, what: &str| {
            self.shared.demand(holds, || format!("{what}: {:?} {}+{}, {} segments", io.op, io.lba, io.blocks, io.list.len()))
        };
        demand(info.supported.has(io.op), "an operation that is not supported");
        if io.op == Op::Flush {
            return;
        }
        demand(io.blocks > 0 && io.lba + io.blocks <= self.shared.blocks.load(Ordering::SeqCst), "out of range");
        if !matches!(io.op, Op::Read | Op::Write) {
            return demand(info.max_unmap_blocks == 0 || io.blocks <= u64::from(info.max_unmap_blocks), "too large");
        }
        demand(io.list_bytes() == io.blocks * u64::from(info.block_size), "a list of another size");
        demand(info.max_io_blocks == 0 || io.blocks <= u64::from(info.max_io_blocks), "too large");
        demand(info.max_segments == 0 || io.list.len() <= info.max_segments as usize, "too many segments");
        let boundary = u64::from(info.optimal_io_boundary);
        demand(!info.split_on_boundary || boundary == 0 || io.lba / boundary == (io.lba + io.blocks - 1) / boundary, "across a boundary");
    }

    /// Does an I/O, or some sectors of it.
    fn perform(&mut self, pending: &Pending, whole: bool) {
        let size = self.info.block_size as usize;
        let mut bytes = vec![0; pending.blocks as usize * size];
        let mut media = lock(&self.shared.media);
        let media = &mut *media;
        let durable = !self.info.write_cache || (whole && pending.flags.contains(IoFlags::FUA));
        match pending.op {
            Op::Flush if whole => {
                for (block, content) in std::mem::take(&mut media.cache) {
                    media.stable[block as usize * size..][..size].copy_from_slice(&content);
                }
            }
            Op::Read => {
                for (number, block) in bytes.chunks_mut(size).enumerate() {
                    block.copy_from_slice(media.block(pending.lba + number as u64, size));
                }
                transfer(&pending.list, &mut bytes, true);
            }
            Op::Write | Op::WriteZeroes | Op::Unmap => {
                transfer(&pending.list, &mut bytes, false);
                for (number, wanted) in bytes.chunks(size).enumerate() {
                    let at = pending.lba + number as u64;
                    let mut block = media.block(at, size).to_vec();
                    for sector in (0..size).step_by(SECTOR as usize) {
                        if whole || self.rng.chance(1, 2) {
                            let sector = sector..sector + SECTOR as usize;
                            block[sector.clone()].copy_from_slice(&wanted[sector]);
                        }
                    }
                    media.put(at, block, durable);
                }
            }
            _ => {}
        }
    }

    fn wake_at(&self, reactor: &mut Reactor, due_ns: u64) {
        let waker = self.waker.clone();
        reactor.after(due_ns.saturating_sub(reactor.now_ns()), move |_| waker.wake());
    }

    fn end(&mut self, layer: &mut Layer, pending: &Pending) {
        self.shared.inflight.fetch_sub(1, Ordering::SeqCst);
        let io = layer.io(pending.id);
        assert!((io.op, io.lba, io.blocks) == (pending.op, pending.lba, pending.blocks), "an I/O changed while the disk had it");
        self.shared.leave(pending.id, io);
        let reads = pending.op == Op::Read;
        let ill = if reads { &self.illness.read_errors } else { &self.illness.write_errors };
        let fails = self.rng.chance(self.plan.error.max(ill.load(Ordering::SeqCst)), 1000);
        self.perform(pending, !(pending.aborted || fails));
        let error = if reads { Status::UNRECOVERED_READ_ERROR } else { Status::WRITE_FAULT };
        let status = match (fails, pending.aborted) {
            (true, _) => error,
            (_, true) => Status::ABORT_REQUESTED,
            _ => Status::SUCCESS,
        };
        layer.complete(pending.id, status);
    }

    fn panic_as_planned(&mut self) {
        if self.rng.chance(self.plan.panic.max(self.illness.panics.load(Ordering::SeqCst)), 1000) {
            self.shared.inflight.fetch_sub(self.pending.len() as u64, Ordering::SeqCst);
            let mut present = lock(&self.shared.present);
            for pending in self.pending.drain(..) {
                let known = (pending.id, pending.op, pending.lba, pending.blocks);
                present.iter().position(|other| *other == known).map(|at| present.swap_remove(at));
            }
            drop(present);
            panic!("planned");
        }
    }
}

impl Media {
    fn block(&self, at: u64, size: usize) -> &[u8] {
        self.cache.get(&at).map_or_else(|| &self.stable[at as usize * size..][..size], Vec::as_slice)
    }

    fn put(&mut self, at: u64, content: Vec<u8>, durable: bool) {
        if durable {
            self.cache.remove(&at);
            self.stable[at as usize * content.len()..][..content.len()].copy_from_slice(&content);
        } else {
            self.cache.insert(at, content);
        }
    }
}

/// Moves bytes between a list, which may be empty, and `bytes`.
fn transfer(list: &SgList, bytes: &mut [u8], into_list: bool) {
    let mut rest = bytes;
    for entry in list {
        let (now, later) = rest.split_at_mut(rest.len().min(entry.length as usize));
        let moved = if into_list { entry.region.write(entry.offset, now) } else { entry.region.read(entry.offset, now) };
        moved.expect("the initiator's memory is there");
        rest = later;
    }
}

impl Channel for DiskChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        self.panic_as_planned();
        for &id in batch {
            let io = layer.io(id);
            self.check(io);
            self.shared.inflight.fetch_add(1, Ordering::SeqCst);
            lock(&self.shared.present).push((id, io.op, io.lba, io.blocks));
            let hangs = self.illness.hangs.load(Ordering::SeqCst);
            let stalls = hangs || self.rng.chance(self.plan.stall, 1000);
            let due_ns = if stalls { u64::MAX } else { reactor.now_ns() + self.rng.below(self.plan.delay_ns + 1) };
            let io = layer.io(id);
            let (op, lba, blocks, flags, list) = (io.op, io.lba, io.blocks, io.flags, io.list.clone());
            let pending = Pending { id, op, lba, blocks, flags, list, due_ns, aborted: false, hangs };
            if !stalls && self.rng.chance(1, 4) {
                self.end(layer, &pending);
                continue;
            }
            self.pending.push(pending);
            if !stalls {
                self.wake_at(reactor, due_ns);
            }
        }
        let (count, depth) = (self.pending.len(), self.info.queue_depth as usize);
        self.shared.demand(depth == 0 || count <= depth, || format!("{count} I/Os in flight, {depth} allowed"));
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        self.panic_as_planned();
        let (now_ns, well) = (reactor.now_ns(), !self.illness.hangs.load(Ordering::SeqCst));
        let mut due: Vec<Pending> = Vec::new();
        let mut index = 0;
        while index < self.pending.len() {
            let pending = &self.pending[index];
            if pending.due_ns <= now_ns || (pending.hangs && well) { due.push(self.pending.swap_remove(index)) } else { index += 1 }
        }
        self.rng.shuffle(&mut due);
        due.iter().for_each(|pending| self.end(layer, pending));
        due.len()
    }

    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        let now_ns = reactor.now_ns();
        let Some(index) = self.pending.iter().position(|pending| pending.id == id) else { return };
        self.pending[index].aborted = true;
        if self.rng.chance(1, 3) {
            let pending = self.pending.swap_remove(index);
            self.end(layer, &pending);
        } else if self.pending[index].due_ns == u64::MAX {
            let due_ns = now_ns + self.rng.below(100_000);
            self.pending[index].due_ns = due_ns;
            self.wake_at(reactor, due_ns);
        }
    }

    fn reset(&mut self, _: &mut Layer, _: &mut Reactor) {
        let inflight = self.shared.inflight.load(Ordering::SeqCst);
        self.shared.demand(inflight == 0, || format!("reset with {inflight} I/Os in flight"));
        self.shared.resets.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for DiskChannel {
    /// With I/O in hand only when the power went: that was done in part.
    fn drop(&mut self) {
        self.shared.channels.fetch_sub(1, Ordering::SeqCst);
        let left = std::mem::take(&mut self.pending);
        self.shared.dropped.fetch_add(left.len() as u64, Ordering::SeqCst);
        self.shared.inflight.fetch_sub(left.len() as u64, Ordering::SeqCst);
        left.iter().for_each(|pending| self.perform(pending, false));
    }
}
