//! A bdev on another one that shows some of its I/O to Python on the way: before the base has it, after, or both.
//!
//! How it works. An [`Interest`] says which operations on which blocks are shown; it can be changed at any time and holds for what is submitted from then on.
//! Everything else is passed down and up here, whole batches at a time, and Python knows nothing of it. What is shown takes a slot of a [`Ring`] for as long as it
//! lives here; its data are the slot's buffer's, below as above: a write's are copied in when it comes, a read's out when it ends, so Python may change what is written
//! and what is read, and the initiator sees nothing that Python has not let through.
//!
//! Before: the consumer completes with 0 to pass it on, with [`ANSWERED`] to end it well without the base, or with an errno. After: with 0 to leave it as the base ended it, with
//! [`ANSWERED`] to have it end well, or with an errno. When no slot is free, I/O that is to be shown waits; what is not shown overtakes it, as nothing orders I/O but its
//! completion.
//!
//! An abort ends what waits or is with Python at once, and its slot is set aside until Python is done with it; what is with the base is aborted there.
//!
//! Errors. When the ring is closed, what is to be shown fails: a filter that is gone lets nothing by that it was to look at.
//!
//! Limits: reads, writes, flushes, unmaps and write-zeroes are what a filter's bdev does; what copies or compares is made of those by the layer, so no write goes by unseen.
//! Zoned bases are refused. Larger I/Os than a slot holds are split, also those that are not shown.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_memory::{Region, SgList, Sge, copy_list};
use qpair_reactor::Reactor;
use uuid::Uuid;

use super::ring::{CANCELLED, GIVEN_UP, OUT, Port, QUEUED, Ring, Service, Stage, Work};
use super::{channel, check_ring};
use crate::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, OpSet, QueueId, Registry, Status};

/// What a consumer completes with that ends a request well without, or in spite of, the base.
pub const ANSWERED: i32 = 1 << 16;
/// Ranges that one interest may name.
pub const RANGES_MAX: usize = 1024;

/// What a filter's bdev does.
const SHOWABLE: [Op; 5] = [Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes];

/// Which I/O is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    before: OpSet,
    after: OpSet,
    /// First block and the one past the last, apart and in order. None: all blocks.
    ranges: Option<Vec<(u64, u64)>>,
}

impl Interest {
    /// These operations, where they touch one of `ranges` (first block, number of blocks), in any order; None is everywhere. A flush is of all blocks.
    pub fn new(before: &[Op], after: &[Op], ranges: Option<&[(u64, u64)]>) -> Result<Self, BdevError> {
        let mut merged: Option<Vec<(u64, u64)>> = None;
        if let Some(ranges) = ranges {
            if ranges.len() > RANGES_MAX {
                return Err(BdevError::invalid("ranges", ranges.len(), format!("at most {RANGES_MAX}")));
            }
            let end = |(first, count): &(u64, u64)| first.checked_add(*count).map(|end| (*first, end));
            let mut sorted: Vec<(u64, u64)> = ranges
                .iter()
                .map(end)
                .collect::<Option<_>>()
                .ok_or_else(|| BdevError::invalid("ranges", "one", "to end by block 2^64 - 1"))?;
            sorted.retain(|(first, end)| first < end);
            sorted.sort_unstable();
            let mut apart: Vec<(u64, u64)> = Vec::with_capacity(sorted.len());
            for (first, end) in sorted {
                match apart.last_mut() {
                    Some(last) if last.1 >= first => last.1 = last.1.max(end),
                    _ => apart.push((first, end)),
                }
            }
            merged = Some(apart);
        }
        Ok(Self { before: OpSet::of(before), after: OpSet::of(after), ranges: merged })
    }

    fn touches(&self, op: Op, lba: u64, blocks: u64) -> bool {
        let Some(ranges) = &self.ranges else { return true };
        if op == Op::Flush {
            return !ranges.is_empty();
        }
        let at = ranges.partition_point(|(_, end)| *end <= lba);
        ranges.get(at).is_some_and(|(first, _)| *first < lba.saturating_add(blocks))
    }

    /// Whether it is shown before and after.
    fn of(&self, op: Op, lba: u64, blocks: u64) -> (bool, bool) {
        let (before, after) = (self.before.has(op), self.after.has(op));
        if (before || after) && self.touches(op, lba, blocks) { (before, after) } else { (false, false) }
    }
}

/// An interest that channels look at, and its number.
struct Shown {
    interest: Mutex<Arc<Interest>>,
    version: AtomicU64,
}

/// See the module's doc.
pub struct FilterBdev {
    info: Info,
    base: Descriptor,
    ring: Arc<Ring>,
    shown: Arc<Shown>,
}

impl FilterBdev {
    /// On the bdev `base`, which is claimed. `on_work` as for [`PythonBdev`](super::PythonBdev).
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        registry: &Arc<Registry>,
        name: &str,
        base: &str,
        uuid: Option<Uuid>,
        depth: u32,
        max_io_bytes: u32,
        interest: Interest,
        on_work: Box<dyn Fn() + Send + Sync>,
    ) -> Result<(Arc<Self>, Arc<Ring>), BdevError> {
        let base = registry.open_base(base, "filter")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        if below.zoned.is_some() {
            return Err(BdevError::Unsupported(format!("a filter on the zoned bdev {}", below.name)));
        }
        check_ring(below.block_size, depth, max_io_bytes)?;
        let mut info = Info::over(&below, name, "filter");
        info.uuid = uuid.unwrap_or(info.uuid);
        info.max_io_blocks = max_io_bytes / below.block_size;
        info.max_io_blocks -= info.max_io_blocks % info.write_unit_blocks;
        if info.max_io_blocks == 0 {
            let limit = format!("at least a write unit of {} blocks", info.write_unit_blocks);
            return Err(BdevError::invalid("max_io_bytes", max_io_bytes, limit));
        }
        let kept: Vec<Op> = SHOWABLE.into_iter().chain([Op::Reset]).filter(|op| below.supported.has(*op)).collect();
        info.supported = OpSet::of(&kept);
        let ring = Arc::new(Ring::new(depth, max_io_bytes, on_work)?);
        let shown = Arc::new(Shown { interest: Mutex::new(Arc::new(interest)), version: AtomicU64::new(1) });
        Ok((Arc::new(Self { info, base, ring: ring.clone(), shown }), ring))
    }

    /// Shows this from now on. I/O that was submitted before goes on as it was.
    pub fn show(&self, interest: Interest) {
        *self.shown.interest.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(interest);
        self.shown.version.fetch_add(1, Ordering::Release);
    }
}

impl Device for FilterBdev {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        let port = channel::open_port(&self.ring, reactor, layer, id)?;
        let slots = self.ring.depth() as usize;
        Ok(Box::new(FilterChannel {
            id,
            below,
            queue: layer.add_inner_queue(id),
            memory: Region::new(self.ring.mapping().clone()),
            ring: self.ring.clone(),
            port,
            shown: self.shown.clone(),
            interest: Arc::default(),
            version: 0,
            shift: self.info.block_size.trailing_zeros(),
            uses: (0..slots).map(|_| None).collect(),
            slot_of: vec![None; layer.ios().0],
            waiting: VecDeque::with_capacity(slots),
            plain: Vec::with_capacity(64),
            pushed: false,
        }))
    }

    fn polled(&self) -> bool {
        true
    }

    fn base_resized(&self, base: &Info) -> Option<u64> {
        Some(base.num_blocks)
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let below = self.base.info().map_or(0, |info| info.num_blocks);
        if num_blocks == below { Ok(()) } else { Err(BdevError::invalid("num_blocks", num_blocks, format!("its base's {below}"))) }
    }
}

impl Drop for FilterBdev {
    fn drop(&mut self) {
        self.ring.close();
    }
}

/// A slot that an I/O has.
struct Use {
    io: IoId,
    /// The initiator's data, while the I/O has the slot's.
    list: SgList,
    after: bool,
    /// How the base ended it, once it has.
    status: Option<Status>,
}

struct FilterChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
    memory: Region,
    ring: Arc<Ring>,
    port: Arc<Port>,
    shown: Arc<Shown>,
    interest: Arc<Interest>,
    version: u64,
    shift: u32,
    uses: Vec<Option<Use>>,
    /// By slot of the slab: the ring's slot.
    slot_of: Vec<Option<u32>>,
    waiting: VecDeque<IoId>,
    plain: Vec<IoId>,
    pushed: bool,
}

/// The tag of what is passed down unseen. Others have their slot's number and one.
const UNSEEN: u64 = 0;

impl FilterChannel {
    fn buffer(&self, slot: u32) -> u64 {
        u64::from(slot) * self.ring.stride()
    }

    fn look(&mut self) {
        let version = self.shown.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            self.interest = self.shown.interest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        }
    }

    fn is_failing(&self) -> bool {
        self.ring.service() != Service::Open
    }

    fn take_slot(&mut self) -> Option<u32> {
        self.ring.free_slot().or_else(|| {
            self.ring.starve(&self.port, true);
            fence(Ordering::SeqCst);
            let slot = self.ring.free_slot();
            if slot.is_some() && self.waiting.is_empty() {
                self.ring.starve(&self.port, false);
            }
            slot
        })
    }

    /// Begins what is to be shown; false: no slot is free.
    fn start(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) -> bool {
        let Some(slot) = self.take_slot() else { return false };
        let io = layer.io(id);
        let (op, lba, blocks) = (io.op, io.lba, io.blocks);
        let (before, after) = self.interest.of(op, lba, blocks);
        let bytes = blocks << self.shift;
        if op == Op::Write && copy_list(&io.list, &self.memory, self.buffer(slot), bytes, false).is_err() {
            self.ring.release(slot);
            layer.complete(id, Status::DATA_TRANSFER_ERROR);
            return true;
        }
        let mut list = SgList::new();
        if matches!(op, Op::Read | Op::Write) {
            list.push(Sge { region: self.memory.clone(), offset: self.buffer(slot), length: bytes as u32 });
            std::mem::swap(&mut list, &mut layer.io_mut(id).list);
        }
        self.slot_of[id.slot()] = Some(slot);
        self.uses[slot as usize] = Some(Use { io: id, list, after, status: None });
        if before {
            self.show(layer, slot, Stage::Before);
        } else {
            // Also one that is not shown any more, because the interest changed while it waited.
            layer.pass_down(reactor, self.below, self.queue, u64::from(slot) + 1, 0, &[id]);
        }
        true
    }

    fn show(&mut self, layer: &Layer, slot: u32, stage: Stage) {
        let Some(used) = &self.uses[slot as usize] else { return };
        let io = layer.io(used.io);
        let buffer = matches!(io.op, Op::Read | Op::Write).then(|| (self.buffer(slot), io.blocks << self.shift));
        let (offset_blocks, num_blocks) = if io.op == Op::Flush { (0, 0) } else { (io.lba, io.blocks) };
        self.ring.push(&self.port, Work { slot, op: io.op, offset_blocks, num_blocks, buffer, stage });
        self.pushed = true;
    }

    fn start_waiting(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let before = self.waiting.len();
        while let Some(id) = self.waiting.pop_front() {
            if !self.start(layer, reactor, id) {
                self.waiting.push_front(id);
                break;
            }
        }
        if self.waiting.is_empty() {
            self.ring.starve(&self.port, false);
        }
        before - self.waiting.len()
    }

    /// Python is done with a slot.
    fn returned(&mut self, layer: &mut Layer, reactor: &mut Reactor, slot: u32, code: i32) {
        let Some(used) = &self.uses[slot as usize] else { return self.ring.release(slot) };
        match (code, used.status) {
            (0, None) => {
                let id = used.io;
                layer.pass_down(reactor, self.below, self.queue, u64::from(slot) + 1, 0, &[id]);
            }
            (0, Some(status)) => self.end(layer, slot, status, true),
            (ANSWERED, _) => self.end(layer, slot, Status::SUCCESS, true),
            (errno, _) => self.end(layer, slot, Status::from_errno(errno), true),
        }
    }

    /// Gives an I/O its own data back and completes it. The slot is freed, unless Python has it still.
    fn end(&mut self, layer: &mut Layer, slot: u32, mut status: Status, free: bool) {
        let Some(used) = self.uses[slot as usize].take() else { return };
        let io = layer.io_mut(used.io);
        if matches!(io.op, Op::Read | Op::Write) {
            io.list = used.list;
        }
        let bytes = io.blocks << self.shift;
        let failed =
            io.op == Op::Read && status == Status::SUCCESS && copy_list(&io.list, &self.memory, self.buffer(slot), bytes, true).is_err();
        if failed {
            status = Status::DATA_TRANSFER_ERROR;
        }
        self.slot_of[used.io.slot()] = None;
        if free {
            self.ring.release(slot);
        }
        layer.complete(used.io, status);
    }

    /// Lets go of a slot that Python is to look at or looks at. False: it is with the base, or on its way back.
    fn give_up(&mut self, layer: &mut Layer, slot: u32, status: Status) -> bool {
        let given_up = self.ring.move_slot(slot, QUEUED, CANCELLED) || self.ring.move_slot(slot, OUT, GIVEN_UP);
        if given_up {
            self.end(layer, slot, status, false);
        }
        given_up
    }

    fn fail_all(&mut self, layer: &mut Layer) -> usize {
        let mut count = 0;
        for slot in 0..self.uses.len() as u32 {
            if self.uses[slot as usize].is_some() && self.give_up(layer, slot, Status::INTERNAL_DEVICE_ERROR) {
                count += 1;
            }
        }
        while let Some(id) = self.waiting.pop_front() {
            layer.complete(id, Status::INTERNAL_DEVICE_ERROR);
            count += 1;
        }
        self.ring.starve(&self.port, false);
        count
    }

    fn tell(&mut self) {
        if std::mem::take(&mut self.pushed) {
            self.ring.notify();
        }
    }

    /// One that was passed down with a slot is back.
    fn back(&mut self, layer: &mut Layer, id: IoId) {
        let slot = (layer.retrieve(id).tag - 1) as u32;
        let status = layer.io(id).status;
        let Some(used) = &mut self.uses[slot as usize] else { return };
        used.status = Some(status);
        if used.after && !self.is_failing() {
            let errno = if status == Status::SUCCESS { 0 } else { status.to_errno() };
            self.show(layer, slot, Stage::After(errno));
        } else {
            let shown = used_after(&self.uses[slot as usize]);
            self.end(layer, slot, if shown { Status::INTERNAL_DEVICE_ERROR } else { status }, true);
        }
    }
}

/// Whether it was to be shown after; here, it cannot be any more.
fn used_after(used: &Option<Use>) -> bool {
    used.as_ref().is_some_and(|used| used.after)
}

impl Channel for FilterChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        self.look();
        let is_shown = |layer: &Layer, id: &IoId| {
            let io = layer.io(*id);
            self.interest.of(io.op, io.lba, io.blocks) != (false, false)
        };
        let Some(first) = batch.iter().position(|id| is_shown(layer, id)) else {
            return layer.pass_down(reactor, self.below, self.queue, UNSEEN, 0, batch);
        };
        let mut plain = std::mem::take(&mut self.plain);
        plain.extend_from_slice(&batch[..first]);
        plain.extend(batch[first..].iter().filter(|id| !is_shown(layer, id)));
        let shown: Vec<IoId> = batch[first..].iter().copied().filter(|id| is_shown(layer, id)).collect();
        if !plain.is_empty() {
            layer.pass_down(reactor, self.below, self.queue, UNSEEN, 0, &plain);
        }
        plain.clear();
        self.plain = plain;
        let failing = self.is_failing();
        for id in shown {
            if failing {
                layer.complete(id, Status::INTERNAL_DEVICE_ERROR);
            } else if !self.waiting.is_empty() || !self.start(layer, reactor, id) {
                self.waiting.push_back(id);
            }
        }
    }

    fn unplug(&mut self, _: &mut Layer, _: &mut Reactor) {
        self.tell();
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        let mut rest = batch;
        while let Some(first) = rest.first() {
            let unseen = layer.io(*first).frame().tag == UNSEEN;
            let same = rest.iter().take_while(|id| (layer.io(**id).frame().tag == UNSEEN) == unseen).count();
            let (run, left) = rest.split_at(same);
            if unseen {
                layer.pass_up(self.id, 0, run);
            } else {
                run.iter().for_each(|id| self.back(layer, *id));
            }
            rest = left;
        }
        self.tell();
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let mut count = 0;
        while let Some((slot, code)) = self.port.returned.pop() {
            self.returned(layer, reactor, slot, code);
            count += 1;
        }
        if self.is_failing() {
            count += self.fail_all(layer);
        } else if !self.waiting.is_empty() {
            count += self.start_waiting(layer, reactor);
        }
        self.tell();
        count
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        let port = self.port.clone();
        port.doorbell.may_sleep(|| {
            let idle = port.returned.is_empty() && (self.waiting.is_empty() || !self.ring.has_room());
            // What is with Python when it is gone is given up by the next poll; what is with the base comes back by itself.
            idle && !(self.is_failing() && (!self.waiting.is_empty() || self.has_shown()))
        })
    }

    fn disarm(&mut self, _: &mut Reactor) {
        self.port.doorbell.awake();
    }

    fn abort(&mut self, layer: &mut Layer, _: &mut Reactor, id: IoId) {
        if let Some(position) = self.waiting.iter().position(|other| *other == id) {
            self.waiting.remove(position);
            layer.complete(id, Status::ABORT_REQUESTED);
        } else if let Some(slot) = self.slot_of[id.slot()] {
            self.give_up(layer, slot, Status::ABORT_REQUESTED);
        }
    }
}

impl FilterChannel {
    fn has_shown(&self) -> bool {
        (0..self.uses.len() as u32).any(|slot| self.uses[slot as usize].is_some() && self.ring.is_shown(slot))
    }
}

impl Drop for FilterChannel {
    /// Also after a panic, and when the reactor goes: what is out comes back to nobody.
    fn drop(&mut self) {
        self.ring.starve(&self.port, false);
        self.ring.remove_port(self.port.number);
        for slot in 0..self.uses.len() as u32 {
            // One that is with the base is not used again: the base may still write into it.
            if self.uses[slot as usize].is_some() && !self.ring.move_slot(slot, QUEUED, CANCELLED) {
                self.ring.move_slot(slot, OUT, GIVEN_UP);
            }
        }
        self.port.gone.store(true, Ordering::SeqCst);
        self.ring.take_back(&self.port);
    }
}
