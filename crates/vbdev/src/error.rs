//! A bdev that fails, keeps, spoils or puts off I/O of its base on request.
//!
//! How it works. For each of read, write, unmap and flush there is at most one [`Injection`], which counts down; an I/O takes one off it, or passes. An
//! I/O takes nothing while fewer I/Os of this channel than `queue_depth` are below. What is kept (*pending*) stays until it is resumed, aborted, reset
//! or the bdev goes. *No memory* is what a device says that cannot take an I/O now: it is tried again when another one of this channel ends, or
//! after 10 ms. What is spoilt has one byte changed: a write's in a copy, so that its owner's data stay as they are; a read's when it is back.
//!
//! [`Errors`] is what Python and the channels share. A channel looks at its version once a batch, and takes its lock when that changed.
//!
//! Unlike SPDK's, a spoilt write goes where it was meant to, and a flush reaches this bdev also when its base has no cache.
//!
//! Errors: `INTERNAL_DEVICE_ERROR` for a plain failure, or any NVMe status. Limits: 2^55 - 1 for an offset that is spoilt; past the data it spoils nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, SgList, Sge, copy_list};
use qpair_reactor::{LocalWaker, Reactor, TimerId};
use uuid::Uuid;

use crate::part::each_piece;

/// The operations that errors are injected into.
pub const TARGETS: [Op; 4] = [Op::Read, Op::Write, Op::Unmap, Op::Flush];
/// How long one that found no memory waits where nothing else ends.
const RETRY_NS: u64 = 10_000_000;
const OFFSET_MAX: u64 = (1 << 55) - 1;
/// A frame's tag: to be spoilt when it is back; offset and value follow.
const SPOIL: u64 = 1 << 63;
/// A frame's tag: its list is a copy.
const COPIED: u64 = 1;
/// Kept I/Os that there is room for from the start.
const ROOM: usize = 256;

/// What is to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It ends with this.
    Fail(Status),
    /// It does not end.
    Keep,
    /// Byte `offset` of its data is exclusive-ored with `value`.
    Spoil {
        /// Within the I/O's data.
        offset: u64,
        /// Not 0.
        value: u8,
    },
    /// It is tried again.
    PutOff,
}

/// One kind of error for one kind of I/O.
#[derive(Debug)]
struct Injection {
    what: What,
    queue_depth: u64,
    left: AtomicU32,
}

impl Injection {
    fn takes_one(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }
}

type Table = [Option<Arc<Injection>>; TARGETS.len()];

/// What is injected into one bdev, for Python to change.
#[derive(Debug, Default)]
pub struct Errors {
    version: AtomicU64,
    /// Counts resumptions: what a channel kept before the last one goes on.
    resumed: AtomicU64,
    table: Mutex<Table>,
}

impl Errors {
    /// Nothing injected.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The next `count` I/Os of each of `ops` are treated so, instead of whatever was said before.
    pub fn inject(&self, ops: &[Op], what: What, count: u32, queue_depth: u64) -> Result<(), BdevError> {
        match what {
            What::Spoil { value: 0, .. } => return Err(BdevError::invalid("corrupt_value", 0, "1 to 255, or nothing would change")),
            What::Spoil { offset, .. } if offset > OFFSET_MAX => {
                return Err(BdevError::invalid("corrupt_offset", offset, format!("0 to {OFFSET_MAX}")));
            }
            _ => {}
        }
        self.change(|op, place| {
            if ops.contains(&op) {
                *place = Some(Arc::new(Injection { what, queue_depth, left: AtomicU32::new(count) }));
            }
        });
        Ok(())
    }

    /// Nothing more is injected. What is kept stays kept.
    pub fn clear(&self) {
        self.change(|_, place| *place = None);
    }

    /// No more I/O is kept, and what was kept goes on once the channels are polled (`lifecycle::poke`).
    pub fn resume(&self) {
        self.change(|_, place| {
            if place.as_ref().is_some_and(|injection| injection.what == What::Keep) {
                *place = None;
            }
        });
        self.resumed.fetch_add(1, Ordering::Release);
    }

    fn change(&self, mut change: impl FnMut(Op, &mut Option<Arc<Injection>>)) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        TARGETS.iter().zip(table.iter_mut()).for_each(|(op, place)| change(*op, place));
        // Under the lock: whoever sees this version finds at least this table.
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// See the module's doc.
pub struct ErrorBdev {
    info: Info,
    base: Descriptor,
    errors: Arc<Errors>,
}

impl ErrorBdev {
    /// On the bdev `base`, which is claimed.
    pub fn new(registry: &Arc<Registry>, name: &str, base: &str, uuid: Option<Uuid>, errors: Arc<Errors>) -> Result<Self, BdevError> {
        let base = registry.open_base(base, "error")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        let mut info = Info::over(&below, name, "error");
        info.uuid = uuid.unwrap_or(info.uuid);
        // So that flushes come here, to be failed; the base's layer answers those that pass if there is nothing to flush.
        info.write_cache = true;
        info.supported = info.supported.with(Op::Flush);
        Ok(Self { info, base, errors })
    }
}

impl Device for ErrorBdev {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let missing = || BdevError::NoMemory(format!("no poller for a channel of {}", self.info.name));
        let waker = layer.poller(id).and_then(|poller| reactor.waker(poller)).ok_or_else(missing)?;
        let below = layer.open_base(reactor, id, &self.base)?;
        Ok(Box::new(ErrorChannel {
            below,
            queue: layer.add_inner_queue(id),
            errors: self.errors.clone(),
            version: u64::MAX,
            resumed: self.errors.resumed.load(Ordering::Acquire),
            table: Table::default(),
            inflight: 0,
            kept: VecDeque::with_capacity(ROOM),
            put_off: VecDeque::with_capacity(ROOM),
            copies: Vec::new(),
            ready: Vec::with_capacity(ROOM),
            waker,
            timer: None,
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

struct ErrorChannel {
    below: ChannelId,
    queue: QueueId,
    errors: Arc<Errors>,
    version: u64,
    resumed: u64,
    table: Table,
    /// I/Os below.
    inflight: u64,
    kept: VecDeque<IoId>,
    put_off: VecDeque<IoId>,
    /// The lists of writes that go down as a spoilt copy.
    copies: Vec<(IoId, SgList)>,
    ready: Vec<IoId>,
    waker: LocalWaker,
    /// For those put off, where nothing below will end: when, and which.
    timer: Option<(u64, TimerId)>,
}

impl ErrorChannel {
    fn refresh(&mut self) {
        let version = self.errors.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            self.table = self.errors.table.lock().unwrap_or_else(PoisonError::into_inner).clone();
        }
    }

    fn injected(&self, op: Op) -> Option<What> {
        let at = TARGETS.iter().position(|target| *target == op)?;
        let injection = self.table[at].as_ref()?;
        (self.inflight >= injection.queue_depth && injection.takes_one()).then_some(injection.what)
    }

    /// Decides for one I/O; those that pass are added to `ready`, with their frame pushed.
    fn treat(&mut self, layer: &mut Layer, id: IoId) {
        let mut tag = 0;
        match self.injected(layer.io(id).op) {
            None => {}
            Some(What::Fail(status)) => return layer.complete(id, status),
            Some(What::Keep) => return self.kept.push_back(id),
            Some(What::PutOff) => return self.put_off.push_back(id),
            Some(What::Spoil { offset, value }) if layer.io(id).op == Op::Write => match spoilt_copy(&layer.io(id).list, offset, value) {
                Ok(copy) => {
                    self.copies.push((id, std::mem::replace(&mut layer.io_mut(id).list, copy)));
                    tag = COPIED;
                }
                Err(_) => return layer.complete(id, Status::INTERNAL_DEVICE_ERROR),
            },
            Some(What::Spoil { offset, value }) => tag = SPOIL | offset << 8 | u64::from(value),
        }
        layer.io_mut(id).push(self.queue, tag);
        self.inflight += 1;
        self.ready.push(id);
    }

    fn pass_ready(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if !self.ready.is_empty() {
            layer.submit(reactor, self.below, &self.ready);
            self.ready.clear();
        }
        if self.put_off.is_empty() {
            self.stop_timer(reactor);
        } else if self.inflight == 0 && self.timer.is_none() {
            let due_ns = reactor.now_ns().saturating_add(RETRY_NS);
            self.timer = Some((due_ns, reactor.wake_at(due_ns, &self.waker)));
        }
    }

    fn stop_timer(&mut self, reactor: &mut Reactor) {
        if let Some((_, timer)) = self.timer.take() {
            reactor.cancel(timer);
        }
    }

    /// Those that waited for memory, each once.
    fn try_again(&mut self, layer: &mut Layer) {
        for _ in 0..self.put_off.len() {
            let Some(id) = self.put_off.pop_front() else { break };
            self.treat(layer, id);
        }
    }
}

fn spoilt_copy(list: &[Sge], offset: u64, value: u8) -> Result<SgList, BdevError> {
    let bytes: u64 = list.iter().map(|entry| u64::from(entry.length)).sum();
    let copy = Region::new(Mapping::anonymous(bytes as usize, Pages::Normal)?);
    copy_list(list, &copy, 0, bytes, false)?;
    if offset < bytes {
        let mut byte = [0];
        copy.read(offset, &mut byte)?;
        copy.write(offset, &[byte[0] ^ value])?;
    }
    let mut spoilt = SgList::new();
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(1 << 30);
        spoilt.push(Sge { region: copy.clone(), offset: at, length: length as u32 });
        at += length;
    }
    Ok(spoilt)
}

fn spoil(list: &[Sge], offset: u64, value: u8) {
    let mut byte = [0];
    if each_piece(list, offset, 1, |region, at, _| region.read(at, &mut byte).is_ok()) {
        each_piece(list, offset, 1, |region, at, _| region.write(at, &[byte[0] ^ value]).is_ok());
    }
}

impl Channel for ErrorChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        self.refresh();
        for id in batch {
            self.treat(layer, *id);
        }
        self.pass_ready(layer, reactor);
    }

    fn completed(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            let tag = layer.retrieve(*id).tag;
            let status = layer.io(*id).status;
            self.inflight -= 1;
            if tag & SPOIL != 0 {
                if !status.is_error() {
                    spoil(&layer.io(*id).list, (tag & !SPOIL) >> 8, tag as u8);
                }
            } else if tag == COPIED
                && let Some(at) = self.copies.iter().position(|(copied, _)| copied == id)
            {
                layer.io_mut(*id).list = self.copies.swap_remove(at).1;
            }
            layer.complete(*id, status);
        }
        if !self.put_off.is_empty() {
            self.refresh();
            self.try_again(layer);
            self.pass_ready(layer, reactor);
        }
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let resumed = self.errors.resumed.load(Ordering::Acquire);
        let goes_on = std::mem::replace(&mut self.resumed, resumed) != resumed;
        let before = self.kept.len() + self.put_off.len();
        if before == 0 {
            return 0;
        }
        self.refresh();
        if goes_on {
            for _ in 0..self.kept.len() {
                let Some(id) = self.kept.pop_front() else { break };
                self.treat(layer, id);
            }
        }
        if self.timer.is_some_and(|(due_ns, _)| due_ns <= reactor.now_ns()) {
            self.timer = None;
            self.try_again(layer);
        }
        self.pass_ready(layer, reactor);
        before - (self.kept.len() + self.put_off.len()).min(before)
    }

    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        for queue in [&mut self.kept, &mut self.put_off] {
            if let Some(at) = queue.iter().position(|other| *other == id) {
                queue.remove(at);
                layer.complete(id, Status::ABORT_REQUESTED);
                break;
            }
        }
        self.pass_ready(layer, reactor);
    }

    fn close(&mut self, _: &mut Layer, reactor: &mut Reactor) {
        self.stop_timer(reactor);
    }
}
