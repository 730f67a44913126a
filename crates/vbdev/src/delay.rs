//! A bdev whose reads and writes come back later than its base's.
//!
//! How it works. An I/O is passed down at once; when it is back, however it ended, it is held for a time: one in a hundred for the p99 latency,
//! the others for the average latency, each of reads or of writes. Appends, copies and compare-and-writes count as writes, compares as reads;
//! flushes, unmaps, write-zeroes and resets are not held. Each kind is a queue in the order of coming back, as in SPDK: after a latency was lowered,
//! new I/O waits behind what is held for the old one. A queue's head is what the channel's timer stands for, so nothing runs while nothing is due.
//!
//! An abort ends a held I/O at once with `ABORT_REQUESTED`; one that is still below is asked to end there, and is held as usual.
//!
//! Limits: latencies in microseconds up to 2^64 - 1; past the end of the clock they mean "until it is aborted".

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_reactor::{LocalWaker, Reactor, TimerId};
use uuid::Uuid;

/// What a latency is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// Of ninety-nine reads in a hundred.
    AverageRead,
    /// Of the hundredth.
    P99Read,
    /// Of ninety-nine writes in a hundred.
    AverageWrite,
    /// Of the hundredth.
    P99Write,
}

const KINDS: usize = 4;
/// Not held.
const NO_KIND: u64 = KINDS as u64;
/// One in so many has the p99 latency.
const RARELY: u64 = 100;
/// Held I/Os that a queue has room for from the start; it grows once where front ends have more.
const ROOM: usize = 256;

/// The four latencies of one bdev, in microseconds; they can be changed at any time, and count for what comes back from then on.
#[derive(Debug)]
pub struct Latencies([AtomicU64; KINDS]);

impl Latencies {
    /// In the order of [`Latency`].
    pub fn new(micros: [u64; KINDS]) -> Arc<Self> {
        Arc::new(Self(micros.map(AtomicU64::new)))
    }

    /// Another one.
    pub fn set(&self, latency: Latency, micros: u64) {
        self.0[latency as usize].store(micros, Ordering::Relaxed);
    }

    /// As it is.
    pub fn get(&self, latency: Latency) -> u64 {
        self.0[latency as usize].load(Ordering::Relaxed)
    }
}

/// See the module's doc.
pub struct Delay {
    info: Info,
    base: Descriptor,
    latencies: Arc<Latencies>,
}

impl Delay {
    /// On the bdev `base`, which is claimed.
    pub fn new(registry: &Arc<Registry>, name: &str, base: &str, uuid: Option<Uuid>, latencies: Arc<Latencies>) -> Result<Self, BdevError> {
        let base = registry.open_base(base, "delay")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        let mut info = Info::over(&below, name, "delay");
        info.uuid = uuid.unwrap_or(info.uuid);
        Ok(Self { info, base, latencies })
    }
}

impl Device for Delay {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let missing = || BdevError::NoMemory(format!("no poller for a channel of {}", self.info.name));
        let waker = layer.poller(id).and_then(|poller| reactor.waker(poller)).ok_or_else(missing)?;
        let below = layer.open_base(reactor, id, &self.base)?;
        // Any odd number does; one that is the same in every run keeps the simulator's runs the same.
        let dice =
            self.info.name.bytes().fold(u64::from(reactor.id().0) + 1, |sum, byte| sum.wrapping_mul(131).wrapping_add(byte.into())) | 1;
        Ok(Box::new(DelayChannel {
            below,
            queue: layer.add_inner_queue(id),
            latencies: self.latencies.clone(),
            held: std::array::from_fn(|_| VecDeque::with_capacity(ROOM)),
            waker,
            timer: None,
            dice,
        }))
    }

    fn base_resized(&self, base: &Info) -> Option<u64> {
        Some(base.num_blocks)
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let below = self.base.info().map_or(0, |info| info.num_blocks);
        if num_blocks == below { Ok(()) } else { Err(BdevError::invalid("num_blocks", num_blocks, format!("its base's {below}"))) }
    }
}

#[derive(Clone, Copy)]
struct Held {
    id: IoId,
    due_ns: u64,
    status: Status,
}

struct DelayChannel {
    below: ChannelId,
    queue: QueueId,
    latencies: Arc<Latencies>,
    held: [VecDeque<Held>; KINDS],
    waker: LocalWaker,
    /// For the head that is due first.
    timer: Option<(u64, TimerId)>,
    dice: u64,
}

impl DelayChannel {
    /// xorshift64: a fair die is not needed, a cheap one is.
    fn throws_rare(&mut self) -> bool {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice.is_multiple_of(RARELY)
    }

    fn kind(&mut self, op: Op) -> u64 {
        let first = match op {
            Op::Read | Op::Compare => Latency::AverageRead,
            Op::Write | Op::CompareAndWrite | Op::Copy | Op::ZoneAppend => Latency::AverageWrite,
            _ => return NO_KIND,
        };
        first as u64 + u64::from(self.throws_rare())
    }

    /// Has the poller woken when the next head is due.
    fn set_timer(&mut self, reactor: &mut Reactor) {
        // One that is due at the end of time is ended by somebody else.
        let next_ns = self.held.iter().filter_map(VecDeque::front).map(|held| held.due_ns).filter(|due_ns| *due_ns != u64::MAX).min();
        if self.timer.map(|(due_ns, _)| due_ns) == next_ns {
            return;
        }
        if let Some((_, timer)) = self.timer.take() {
            reactor.cancel(timer);
        }
        self.timer = next_ns.map(|due_ns| (due_ns, reactor.wake_at(due_ns, &self.waker)));
    }
}

impl Channel for DelayChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            let kind = self.kind(layer.io(*id).op);
            layer.io_mut(*id).push(self.queue, kind);
        }
        layer.submit(reactor, self.below, batch);
    }

    fn completed(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let now_ns = reactor.now_ns();
        for id in batch {
            let kind = layer.retrieve(*id).tag as usize;
            let status = layer.io(*id).status;
            if let Some(queue) = self.held.get_mut(kind) {
                let micros = self.latencies.0[kind].load(Ordering::Relaxed);
                queue.push_back(Held { id: *id, due_ns: now_ns.saturating_add(micros.saturating_mul(1000)), status });
            } else {
                layer.complete(*id, status);
            }
        }
        self.set_timer(reactor);
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let now_ns = reactor.now_ns();
        let mut count = 0;
        for queue in &mut self.held {
            while let Some(held) = queue.front().copied().filter(|held| held.due_ns <= now_ns) {
                queue.pop_front();
                layer.complete(held.id, held.status);
                count += 1;
            }
        }
        if self.timer.is_some_and(|(due_ns, _)| due_ns <= now_ns) {
            self.set_timer(reactor);
        }
        count
    }

    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        for queue in &mut self.held {
            if let Some(at) = queue.iter().position(|held| held.id == id) {
                queue.remove(at);
                layer.complete(id, Status::ABORT_REQUESTED);
                break;
            }
        }
        self.set_timer(reactor);
    }

    fn close(&mut self, _: &mut Layer, reactor: &mut Reactor) {
        if let Some((_, timer)) = self.timer.take() {
            reactor.cancel(timer);
        }
    }
}
