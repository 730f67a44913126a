//! A disk for the simulator that outlives its world: with a volatile cache or without, it delays, fails as told, and loses and tears what was not
//! on stable media when the power goes.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::{BdevError, Channel, ChannelId, Device, Info, Io, IoFlags, IoId, Layer, Op, OpSet, Status};
use qpair_reactor::sim::{self, Rng};
use qpair_reactor::{LocalWaker, Reactor};

pub const BLOCK: u64 = 512;

pub struct Disk {
    pub info: Info,
    pub delay_ns: u64,
    stable: Mutex<Vec<u8>>,
    cache: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// Chances per mille, changed at any time.
    pub read_errors: AtomicU64,
    pub write_errors: AtomicU64,
    /// I/O ends only when it is asked to.
    pub hangs: AtomicBool,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub blocks: AtomicU64,
    torn: Mutex<Rng>,
}

impl Disk {
    pub fn new(name: &str, number: u8, blocks: u64, cached: bool, delay_ns: u64, rng: Rng) -> Arc<Self> {
        let mut info = Info::new(name, "leg", BLOCK as u32, blocks);
        info.uuid = format!("00000000-0000-4000-8000-0000000000{number:02x}").parse().unwrap();
        info.write_cache = cached;
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
        Arc::new(Self {
            info,
            delay_ns,
            stable: Mutex::new(vec![0; (blocks * BLOCK) as usize]),
            cache: Mutex::default(),
            read_errors: AtomicU64::new(0),
            write_errors: AtomicU64::new(0),
            hangs: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            blocks: AtomicU64::new(blocks),
            torn: Mutex::new(rng),
        })
    }

    pub fn device(self: &Arc<Self>) -> Arc<Leg> {
        Arc::new(Leg(self.clone()))
    }

    /// Healthy again. What hangs does so until it is asked to end.
    pub fn heal(&self) {
        self.read_errors.store(0, Ordering::SeqCst);
        self.write_errors.store(0, Ordering::SeqCst);
    }

    /// The power goes: each block of the cache is kept or lost by itself.
    pub fn crash(&self) {
        let cache = std::mem::take(&mut *self.cache.lock().unwrap());
        let mut rng = self.torn.lock().unwrap();
        let mut stable = self.stable.lock().unwrap();
        for (block, bytes) in cache {
            if rng.chance(1, 2) {
                put(&mut stable, block, &bytes);
            }
        }
    }

    pub fn peek(&self, block: u64, blocks: u64) -> Vec<u8> {
        let cache = self.cache.lock().unwrap();
        let stable = self.stable.lock().unwrap();
        (block..block + blocks).flat_map(|block| get(&cache, &stable, block)).collect()
    }

    pub fn poke(&self, block: u64, bytes: &[u8]) {
        self.cache.lock().unwrap().retain(|cached, _| *cached < block || *cached >= block + bytes.len() as u64 / BLOCK);
        let at = (block * BLOCK) as usize;
        self.stable.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn change(&self, block: u64, bytes: &[u8], durable: bool) {
        if self.info.write_cache && !durable {
            self.cache.lock().unwrap().insert(block, bytes.to_vec());
        } else {
            self.cache.lock().unwrap().remove(&block);
            put(&mut self.stable.lock().unwrap(), block, bytes);
        }
    }

    fn flush(&self) {
        let cache = std::mem::take(&mut *self.cache.lock().unwrap());
        let mut stable = self.stable.lock().unwrap();
        cache.iter().for_each(|(block, bytes)| put(&mut stable, *block, bytes));
    }
}

fn put(stable: &mut [u8], block: u64, bytes: &[u8]) {
    let at = (block * BLOCK) as usize;
    stable[at..at + bytes.len()].copy_from_slice(bytes);
}

fn get(cache: &BTreeMap<u64, Vec<u8>>, stable: &[u8], block: u64) -> Vec<u8> {
    let at = (block * BLOCK) as usize;
    cache.get(&block).cloned().unwrap_or_else(|| stable[at..at + BLOCK as usize].to_vec())
}

pub struct Leg(Arc<Disk>);

impl Device for Leg {
    fn info(&self) -> Info {
        Info { num_blocks: self.0.blocks.load(Ordering::SeqCst), ..self.0.info.clone() }
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let waker = layer.poller(id).and_then(|poller| reactor.waker(poller)).unwrap();
        let rng = sim::draw(reactor, Rng::fork);
        Ok(Box::new(LegChannel { disk: self.0.clone(), pending: Vec::new(), waker, rng }))
    }

    fn polled(&self) -> bool {
        true
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        self.0.blocks.store(num_blocks, Ordering::SeqCst);
        Ok(())
    }
}

struct Pending {
    id: IoId,
    op: Op,
    lba: u64,
    durable: bool,
    data: Vec<u8>,
    due_ns: u64,
    aborted: bool,
}

struct LegChannel {
    disk: Arc<Disk>,
    pending: Vec<Pending>,
    waker: LocalWaker,
    rng: Rng,
}

impl LegChannel {
    fn wake_at(&self, reactor: &mut Reactor, due_ns: u64) {
        let waker = self.waker.clone();
        reactor.after(due_ns.saturating_sub(reactor.now_ns()), move |_| waker.wake());
    }

    fn take(&mut self, io: &Io, id: IoId, due_ns: u64) -> Pending {
        let data = match io.op {
            Op::Write => {
                let mut data = vec![0; (io.blocks * BLOCK) as usize];
                let mut at = 0;
                for entry in &io.list {
                    let length = entry.length as usize;
                    entry.region.read(entry.offset, &mut data[at..at + length]).unwrap();
                    at += length;
                }
                data
            }
            Op::WriteZeroes | Op::Unmap => vec![0; (io.blocks * BLOCK) as usize],
            _ => Vec::new(),
        };
        Pending { id, op: io.op, lba: io.lba, durable: io.flags.contains(IoFlags::FUA), data, due_ns, aborted: false }
    }

    /// Some of its blocks reach the disk, or all.
    fn apply(&mut self, pending: &Pending, whole: bool) {
        for (number, bytes) in pending.data.chunks(BLOCK as usize).enumerate() {
            if whole || self.rng.chance(1, 2) {
                self.disk.change(pending.lba + number as u64, bytes, pending.durable && whole);
            }
        }
    }

    fn end(&mut self, layer: &mut Layer, pending: &Pending) {
        let reading = pending.op == Op::Read;
        let chance = if reading { &self.disk.read_errors } else { &self.disk.write_errors };
        let fails = self.rng.chance(chance.load(Ordering::SeqCst), 1000);
        if reading {
            self.disk.reads.fetch_add(1, Ordering::SeqCst);
        } else {
            self.disk.writes.fetch_add(1, Ordering::SeqCst);
        }
        if fails || pending.aborted {
            self.apply(pending, false);
            let error = if reading { Status::UNRECOVERED_READ_ERROR } else { Status::WRITE_FAULT };
            return layer.complete(pending.id, if fails { error } else { Status::ABORT_REQUESTED });
        }
        self.apply(pending, true);
        match pending.op {
            Op::Flush => self.disk.flush(),
            Op::Read => {
                let io = layer.io(pending.id);
                let bytes = self.disk.peek(io.lba, io.blocks);
                let mut at = 0;
                for entry in &io.list {
                    entry.region.write(entry.offset, &bytes[at..at + entry.length as usize]).unwrap();
                    at += entry.length as usize;
                }
            }
            _ => {}
        }
        layer.complete(pending.id, Status::SUCCESS);
    }
}

impl Channel for LegChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for &id in batch {
            let hangs = self.disk.hangs.load(Ordering::SeqCst);
            let due_ns = if hangs { u64::MAX } else { reactor.now_ns() + self.rng.below(self.disk.delay_ns + 1) };
            let pending = self.take(layer.io(id), id, due_ns);
            if !hangs && self.rng.chance(1, 4) {
                self.end(layer, &pending);
                continue;
            }
            self.pending.push(pending);
            if !hangs {
                self.wake_at(reactor, due_ns);
            }
        }
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let now_ns = reactor.now_ns();
        let (mut due, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending).into_iter().partition(|pending| pending.due_ns <= now_ns);
        self.pending = rest;
        self.rng.shuffle(&mut due);
        due.iter().for_each(|pending| self.end(layer, pending));
        due.len()
    }

    fn abort(&mut self, layer: &mut Layer, _: &mut Reactor, id: IoId) {
        let Some(index) = self.pending.iter().position(|pending| pending.id == id) else { return };
        self.pending[index].aborted = true;
        if self.pending[index].due_ns == u64::MAX || self.rng.chance(1, 3) {
            let pending = self.pending.swap_remove(index);
            self.end(layer, &pending);
        }
    }
}

impl Drop for LegChannel {
    /// The power went: what was under way was done in part.
    fn drop(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        pending.iter().for_each(|pending| self.apply(pending, false));
    }
}
