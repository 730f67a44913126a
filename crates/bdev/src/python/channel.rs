//! One reactor's end of the ring.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use crossbeam_queue::ArrayQueue;
use qpair_memory::{Region, copy_list};
use qpair_reactor::Reactor;
use qpair_reactor::doorbell::Doorbell;

use super::ring::{CANCELLED, GIVEN_UP, OUT, Port, QUEUED, Ring, Service, Stage, Work};
use crate::{BdevError, Channel, ChannelId, IoFlags, IoId, Layer, Op, Status};

/// What a slot of the ring is used for by this channel.
#[derive(Clone, Copy)]
struct Use {
    io: IoId,
    /// The data are written; this is the flush that FUA asks for.
    flushing: bool,
}

pub(super) struct PythonChannel {
    ring: Arc<Ring>,
    port: Arc<Port>,
    memory: Region,
    shift: u32,
    /// By slot of the ring.
    uses: Vec<Option<Use>>,
    /// By slot of the slab: the ring's slot.
    slot_of: Vec<Option<u32>>,
    waiting: VecDeque<IoId>,
    pushed: bool,
}

/// A channel's place on the ring.
pub(super) fn open_port(ring: &Ring, reactor: &Reactor, layer: &Layer, id: ChannelId) -> Result<Arc<Port>, BdevError> {
    let poller = layer.poller(id).ok_or_else(|| BdevError::Unsupported("a channel without a poller".to_owned()))?;
    let port = Arc::new(Port {
        number: ring.next_port(),
        handle: reactor.handle(),
        poller,
        returned: ArrayQueue::new(ring.depth() as usize),
        doorbell: Doorbell::default(),
        starving: AtomicBool::new(false),
        gone: AtomicBool::new(false),
    });
    ring.add_port(port.clone());
    Ok(port)
}

impl PythonChannel {
    pub(super) fn new(ring: Arc<Ring>, block_size: u32, reactor: &mut Reactor, layer: &Layer, id: ChannelId) -> Result<Self, BdevError> {
        let depth = ring.depth() as usize;
        let port = open_port(&ring, reactor, layer, id)?;
        Ok(Self {
            memory: Region::new(ring.mapping().clone()),
            port,
            shift: block_size.trailing_zeros(),
            uses: vec![None; depth],
            slot_of: vec![None; layer.ios().0],
            waiting: VecDeque::with_capacity(depth),
            pushed: false,
            ring,
        })
    }

    fn buffer(&self, slot: u32) -> u64 {
        u64::from(slot) * self.ring.stride
    }

    /// Takes a free slot; if there is none, sees to it that one that becomes free is announced.
    fn take_slot(&mut self) -> Option<u32> {
        self.ring.free_slot().or_else(|| {
            self.starve(true);
            fence(Ordering::SeqCst);
            let slot = self.ring.free_slot();
            if slot.is_some() && self.waiting.is_empty() {
                self.starve(false);
            }
            slot
        })
    }

    fn starve(&self, starving: bool) {
        self.ring.starve(&self.port, starving);
    }

    /// Queues a request; false: no slot is free.
    fn start(&mut self, layer: &mut Layer, id: IoId) -> bool {
        let Some(slot) = self.take_slot() else { return false };
        let io = layer.io(id);
        let bytes = io.blocks << self.shift;
        if io.op == Op::Write && copy_list(&io.list, &self.memory, self.buffer(slot), bytes, false).is_err() {
            self.ring.release(slot);
            layer.complete(id, Status::DATA_TRANSFER_ERROR);
            return true;
        }
        let buffer = matches!(io.op, Op::Read | Op::Write).then(|| (self.buffer(slot), bytes));
        let (offset_blocks, num_blocks) = if io.op == Op::Flush { (0, 0) } else { (io.lba, io.blocks) };
        let work = Work { slot, op: io.op, offset_blocks, num_blocks, buffer, stage: Stage::Whole };
        self.slot_of[id.slot()] = Some(slot);
        self.queue(work, Use { io: id, flushing: false });
        true
    }

    fn queue(&mut self, work: Work, used: Use) {
        self.uses[work.slot as usize] = Some(used);
        self.ring.push(&self.port, work);
        self.pushed = true;
    }

    fn start_waiting(&mut self, layer: &mut Layer) -> usize {
        let before = self.waiting.len();
        while let Some(id) = self.waiting.pop_front() {
            if !self.start(layer, id) {
                self.waiting.push_front(id);
                break;
            }
        }
        if self.waiting.is_empty() {
            self.starve(false);
        }
        before - self.waiting.len()
    }

    fn tell(&mut self) {
        if std::mem::take(&mut self.pushed) {
            self.ring.notify();
        }
    }

    /// A slot came back.
    fn returned(&mut self, layer: &mut Layer, slot: u32, errno: i32) {
        let Some(used) = self.uses[slot as usize].take() else { return self.ring.release(slot) };
        let io = layer.io(used.io);
        let mut status = if errno == 0 { Status::SUCCESS } else { Status::from_errno(errno) };
        if errno == 0 && io.op == Op::Read {
            let bytes = io.blocks << self.shift;
            if copy_list(&io.list, &self.memory, self.buffer(slot), bytes, true).is_err() {
                status = Status::DATA_TRANSFER_ERROR;
            }
        }
        let changes = matches!(io.op, Op::Write | Op::Unmap | Op::WriteZeroes);
        if errno == 0 && changes && io.flags.contains(IoFlags::FUA) && !used.flushing {
            let work = Work { slot, op: Op::Flush, offset_blocks: 0, num_blocks: 0, buffer: None, stage: Stage::Whole };
            return self.queue(work, Use { flushing: true, ..used });
        }
        self.slot_of[used.io.slot()] = None;
        self.ring.release(slot);
        layer.complete(used.io, status);
    }

    /// Lets go of a slot that is queued or out. False: it is on its way back.
    fn give_up(&mut self, slot: u32) -> bool {
        let given_up = self.ring.move_slot(slot, QUEUED, CANCELLED) || self.ring.move_slot(slot, OUT, GIVEN_UP);
        if given_up {
            self.uses[slot as usize] = None;
        }
        given_up
    }

    /// Nobody serves the ring, and I/O is not to wait for it.
    fn is_failing(&self) -> bool {
        matches!(self.ring.service(), Service::Failing | Service::Closed)
    }

    /// The ring fails: everything here does.
    fn fail_all(&mut self, layer: &mut Layer) -> usize {
        let mut count = 0;
        for slot in 0..self.uses.len() as u32 {
            if let Some(used) = self.uses[slot as usize]
                && self.give_up(slot)
            {
                self.slot_of[used.io.slot()] = None;
                layer.complete(used.io, Status::INTERNAL_DEVICE_ERROR);
                count += 1;
            }
        }
        while let Some(id) = self.waiting.pop_front() {
            layer.complete(id, Status::INTERNAL_DEVICE_ERROR);
            count += 1;
        }
        self.starve(false);
        count
    }

    fn has_uses(&self) -> bool {
        self.uses.iter().any(Option::is_some)
    }
}

impl Channel for PythonChannel {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        let closed = self.is_failing();
        for &id in batch {
            if closed {
                layer.complete(id, Status::INTERNAL_DEVICE_ERROR);
            } else if !self.waiting.is_empty() || !self.start(layer, id) {
                self.waiting.push_back(id);
            }
        }
    }

    fn unplug(&mut self, _: &mut Layer, _: &mut Reactor) {
        self.tell();
    }

    fn poll(&mut self, layer: &mut Layer, _: &mut Reactor) -> usize {
        let mut count = 0;
        while let Some((slot, errno)) = self.port.returned.pop() {
            self.returned(layer, slot, errno);
            count += 1;
        }
        if self.is_failing() {
            count += self.fail_all(layer);
        } else if !self.waiting.is_empty() {
            count += self.start_waiting(layer);
        }
        self.tell();
        count
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        let port = self.port.clone();
        port.doorbell.may_sleep(|| {
            let idle = port.returned.is_empty() && (self.waiting.is_empty() || !self.ring.has_room());
            idle && !(self.is_failing() && (self.has_uses() || !self.waiting.is_empty()))
        })
    }

    fn disarm(&mut self, _: &mut Reactor) {
        self.port.doorbell.awake();
    }

    fn abort(&mut self, layer: &mut Layer, _: &mut Reactor, id: IoId) {
        if let Some(position) = self.waiting.iter().position(|other| *other == id) {
            self.waiting.remove(position);
        } else {
            let slot = self.slot_of[id.slot()];
            if !slot.is_some_and(|slot| self.give_up(slot)) {
                // It is on its way back.
                return;
            }
            self.slot_of[id.slot()] = None;
        }
        layer.complete(id, Status::ABORT_REQUESTED);
    }
}

impl Drop for PythonChannel {
    /// Also after a panic, and when the reactor goes: what is out comes back to nobody.
    fn drop(&mut self) {
        self.starve(false);
        let number = self.port.number;
        self.ring.remove_port(number);
        for slot in 0..self.uses.len() as u32 {
            if self.uses[slot as usize].is_some() {
                self.give_up(slot);
            }
        }
        self.port.gone.store(true, Ordering::SeqCst);
        self.ring.take_back(&self.port);
    }
}
