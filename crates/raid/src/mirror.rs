//! One reactor's channel to a mirror (raid1).
//!
//! How it works. A read goes to the leg with the fewest blocks asked for; the I/O itself is passed down. If it fails it goes to the other legs in turn;
//! when one has it the read is done, and the legs that failed are rewritten in the background, under a range lock. A write is copied to every leg by
//! I/Os reserved when the channel was opened; the I/O itself stays here until all are back.
//!
//! **An acknowledged write is never lost, and never read stale.** A write is acknowledged when every slot either has it or is *recorded* out: all
//! superblocks of the legs that serve say so on stable media ([`View::recorded`]). A leg that failed the write is therefore first dropped on
//! every reactor (nobody reads from it any more), then recorded, and only then do the writes that wait for it go on (`failing.rs`). So
//! whatever legs are there after a crash: those with the newest superblock have every acknowledged write. And it is the newest that is found, because *a
//! leg is only left behind by legs that its own superblock calls current*: an array of stale legs alone waits for one of those, whose newer superblock
//! then decides (`control.rs`). To drop a leg keeps to that by itself. To let one in, the superblocks of all that serve
//! call it current before its own does; a leg that cannot write that leaves only if others of the old ones stay, else the new
//! one goes (`rebuild.rs`). Until then the target of a rebuild is recorded out; before superblocks say otherwise it has
//! everything, and its failures count on every reactor.
//!
//! A write that no leg has fails and drops no leg: the last one stays, and tells its errors as a plain disk would. So do errors that are the
//! initiator's (memory that is gone, a list that no device takes): a hostile guest degrades nothing. Where such a write, or one that was aborted, left
//! the legs different they are made equal in the background.
//!
//! Not implemented: what legs hold of writes that were under way in a crash differs until it is written again; there is no write-intent log, as
//! there is none in SPDK.
//!
//! Limits: [`writes_of`] writes at once on a channel, the rest wait here.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::{Channel, ChannelId, IoId, Layer, Op, QueueId, Status};
use qpair_reactor::Reactor;

use crate::array::{Array, Repair};
use crate::mask::Mask;
use crate::view::View;

/// The tag of a read: this bit, and the slot.
const READ: u64 = 1 << 63;

/// How many writes are under way at once in an array of so many slots.
fn writes_of(slots: usize) -> usize {
    (512 / slots).clamp(4, 128)
}

/// A write (or whatever else goes to all legs) under way.
struct Write {
    parent: Option<IoId>,
    children: Vec<(usize, IoId)>,
    /// Each of these has it, or is recorded out, before it is acknowledged.
    required: Mask,
    done: Mask,
    failed: Mask,
    status: Status,
    aborted: bool,
    /// Waits for a record.
    held: bool,
}

/// A read that some leg could not do.
struct Retry {
    id: IoId,
    tried: Mask,
    /// Those that may be cured by writing.
    faulty: Mask,
    status: Status,
}

/// See the module's doc.
pub(crate) struct Mirror {
    id: ChannelId,
    queue: QueueId,
    array: Arc<Array>,
    view: Arc<View>,
    /// Every slot.
    all: Mask,
    below: Vec<Option<ChannelId>>,
    /// Blocks being read, by slot.
    load: Vec<u64>,
    writes: Vec<Write>,
    free: Vec<u32>,
    /// Found no room.
    waiting: VecDeque<IoId>,
    retries: Vec<Retry>,
    /// Slots written to that missed something that was acknowledged.
    missed: Mask,
    /// By slot: what is about to be submitted there.
    ready: Vec<Vec<IoId>>,
    up: Vec<IoId>,
}

/// What the layer holds; changes of the view reach the rest by another way.
pub(crate) struct MirrorChannel(pub Rc<RefCell<Mirror>>);

/// Whether the leg is to blame, and not who asked.
fn blames(status: Status) -> bool {
    !matches!(
        status,
        Status::DATA_TRANSFER_ERROR | Status::INVALID_FIELD | Status::INVALID_SGL_COUNT | Status::LBA_OUT_OF_RANGE | Status::INVALID_OPCODE
    )
}

/// Whether writing the blocks anew may help.
fn is_curable(status: Status) -> bool {
    blames(status) && !matches!(status, Status::ABORT_REQUESTED | Status::INVALID_NAMESPACE | Status::INTERNAL_DEVICE_ERROR)
}

impl Mirror {
    pub(crate) fn open(array: &Arc<Array>, layer: &mut Layer, reactor: &mut Reactor, id: ChannelId) -> Rc<RefCell<Self>> {
        let slots = array.slots;
        let count = writes_of(slots);
        layer.reserve(id, count * slots);
        let vacant = || Write {
            parent: None,
            children: Vec::with_capacity(slots),
            required: Mask::EMPTY,
            done: Mask::EMPTY,
            failed: Mask::EMPTY,
            status: Status::SUCCESS,
            aborted: false,
            held: false,
        };
        let mut mirror = Self {
            id,
            queue: layer.add_inner_queue(id),
            array: array.clone(),
            view: Arc::default(),
            all: Mask::first(slots),
            below: vec![None; slots],
            load: vec![0; slots],
            writes: (0..count).map(|_| vacant()).collect(),
            free: (0..count as u32).rev().collect(),
            waiting: VecDeque::with_capacity(256),
            retries: Vec::new(),
            missed: Mask::EMPTY,
            ready: (0..slots).map(|_| Vec::with_capacity(256)).collect(),
            up: Vec::with_capacity(256),
        };
        mirror.apply(layer, reactor, &array.view());
        let mirror = Rc::new(RefCell::new(mirror));
        crate::view::enlist(reactor, array.id, &mirror);
        mirror
    }

    /// Puts a view in force; which of the slots that are written to have missed a write here.
    pub(crate) fn apply(&mut self, layer: &mut Layer, reactor: &mut Reactor, view: &Arc<View>) -> Mask {
        if view.version < self.view.version {
            return self.missed & view.writing;
        }
        // One that is closing opens nothing more, but ends what it has.
        let closing = layer.is_closed(self.id);
        let old = std::mem::replace(&mut self.view, view.clone());
        for slot in 0..self.below.len() {
            let (before, after) = (member(&old, slot), member(view, slot));
            let same = match (before, after) {
                (Some(before), Some(after)) => Arc::ptr_eq(before, after),
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            self.missed = self.missed.minus(Mask::of(slot));
            if let Some(below) = self.below[slot].take() {
                layer.close_base(self.id, below);
            }
            if let Some(base) = after.filter(|_| !closing) {
                match layer.open_base(reactor, self.id, base) {
                    Ok(below) => self.below[slot] = Some(below),
                    Err(_) => self.missed = self.missed | Mask::of(slot),
                }
            }
        }
        self.judge_held(layer, old.refused.0);
        self.start_waiting(layer, reactor);
        self.missed & view.writing
    }

    // ---- reads ------------------------------------------------------------------------------------------------------------------

    fn least_loaded(&self, except: Mask) -> Option<usize> {
        let open = self.view.serving.minus(except).slots().filter(|slot| self.below[*slot].is_some());
        open.min_by_key(|slot| self.load[*slot])
    }

    /// Puts a read with those that go to its leg; false: there is none.
    fn aim(&mut self, layer: &mut Layer, id: IoId, except: Mask) -> bool {
        let Some(slot) = self.least_loaded(except) else { return false };
        let io = layer.io_mut(id);
        io.push(self.queue, READ | slot as u64);
        io.lba += self.view.offsets[slot];
        self.load[slot] += io.blocks;
        self.ready[slot].push(id);
        true
    }

    fn read_done(&mut self, layer: &mut Layer, id: IoId, slot: usize) {
        let io = layer.io(id);
        let (status, blocks) = (io.status, io.blocks);
        self.load[slot] = self.load[slot].saturating_sub(blocks);
        let again = self.retries.iter().position(|retry| retry.id == id);
        if !status.is_error() {
            if let Some(at) = again {
                self.cure(layer, id, slot, at);
            }
            return self.up.push(id);
        }
        let at = again.unwrap_or_else(|| {
            self.retries.push(Retry { id, tried: Mask::EMPTY, faulty: Mask::EMPTY, status });
            self.retries.len() - 1
        });
        let retry = &mut self.retries[at];
        retry.tried = retry.tried | Mask::of(slot);
        if is_curable(status) {
            retry.faulty = retry.faulty | Mask::of(slot);
        }
        let tried = retry.tried;
        // Of no use: the device goes, and what it asks to end shall end.
        let ends = layer.is_closed(self.id) || !blames(status);
        layer.retrieve(id);
        let lba = layer.io(id).lba;
        if ends || !self.aim(layer, id, tried) {
            let retry = self.retries.swap_remove(at);
            let told = if ends || status == Status::ABORT_REQUESTED { status } else { retry.status };
            if !ends && told != Status::ABORT_REQUESTED {
                layer.report_failure(self.id, "read", |_| format!("no member could do a read of {blocks} blocks at block {lba}: {told}"));
            }
            layer.complete(id, told);
        }
    }

    /// A leg has what others could not read: they get it written anew.
    fn cure(&mut self, layer: &Layer, id: IoId, slot: usize, at: usize) {
        let retry = self.retries.swap_remove(at);
        let io = layer.io(id);
        let lba = io.lba - self.view.offsets[slot];
        if !retry.faulty.is_empty() {
            self.array.repair(Repair { slots: retry.faulty, source: Mask::of(slot), lba, blocks: io.blocks });
        }
    }

    // ---- writes -----------------------------------------------------------------------------------------------------------------

    /// Copies a write for each leg; false: no room.
    fn spread(&mut self, layer: &mut Layer, parent: IoId) -> bool {
        let Some(&index) = self.free.last() else { return false };
        self.free.pop();
        let write = &mut self.writes[index as usize];
        (write.parent, write.done, write.failed) = (Some(parent), Mask::EMPTY, Mask::EMPTY);
        (write.status, write.aborted, write.held) = (Status::SUCCESS, false, false);
        let mut legs = Mask::EMPTY;
        for slot in self.view.writing.slots() {
            if self.below[slot].is_none() {
                continue;
            }
            // As many were reserved as all writes can need.
            let Some(child) = layer.take_reserved(self.id) else { continue };
            layer.copy_request(parent, child);
            let io = layer.io_mut(child);
            if io.op != Op::Flush {
                io.lba += self.view.offsets[slot];
            }
            io.push(self.queue, u64::from(index) << 8 | slot as u64);
            write.children.push((slot, child));
            legs = legs | Mask::of(slot);
            self.ready[slot].push(child);
        }
        write.required = self.all.minus(self.view.recorded) | legs;
        if legs.is_empty() {
            write.status = Status::INTERNAL_DEVICE_ERROR;
            self.judge(layer, index, false);
        }
        true
    }

    fn part_done(&mut self, layer: &mut Layer, child: IoId) {
        let status = layer.io(child).status;
        let tag = layer.retrieve(child).tag;
        let (index, slot) = ((tag >> 8) as u32, (tag & 0xff) as usize);
        layer.return_reserved(self.id, child);
        let write = &mut self.writes[index as usize];
        write.children.retain(|(_, other)| *other != child);
        if status.is_error() {
            write.failed = write.failed | Mask::of(slot);
            // What the initiator did wrong is said before what a leg did.
            if !write.status.is_error() || !blames(status) {
                write.status = status;
            }
        } else {
            write.done = write.done | Mask::of(slot);
        }
        if write.children.is_empty() {
            self.judge(layer, index, false);
        }
    }

    /// All legs have answered: acknowledges the write, fails it, or has it wait for a record. `refused`: the record that it waits for could not be made.
    fn judge(&mut self, layer: &mut Layer, index: u32, refused: bool) {
        let View { serving, writing, recorded, .. } = *self.view;
        let write = &mut self.writes[index as usize];
        let Some(parent) = write.parent else { return };
        let missing = write.required.minus(write.done).minus(recorded);
        let nobody = (write.done & serving).is_empty();
        let blamed = blames(write.status) && !(write.aborted && write.status == Status::ABORT_REQUESTED);
        let failed = write.failed;
        // A target that missed what is acknowledged has to be told apart from one that has all.
        if blamed && !nobody {
            self.missed = self.missed | (failed & writing);
        }
        if nobody && blamed && !write.aborted && !layer.is_closed(self.id) {
            let (status, blocks, lba) = (write.status, layer.io(parent).blocks, layer.io(parent).lba);
            layer.report_failure(self.id, "write", |_| format!("no member could do a write of {blocks} blocks at block {lba}: {status}"));
        }
        if nobody || refused || !blamed && write.status.is_error() {
            // Who asked for an end is told that, and not what ails a leg besides.
            let status = match write.status {
                _ if write.aborted => Status::ABORT_REQUESTED,
                status if status.is_error() => status,
                _ => Status::WRITE_FAULT,
            };
            let uneven = !(write.done | failed).is_empty() && writing.count() > 1;
            if uneven && !refused {
                let io = layer.io(parent);
                let source = if nobody { serving } else { write.done & serving };
                let repair = Repair { slots: writing, source, lba: io.lba, blocks: io.blocks };
                if io.op != Op::Flush {
                    self.array.repair(repair);
                }
            }
            return self.end(layer, index, status);
        }
        let dropped = missing | (failed & writing);
        if missing.is_empty() {
            self.end(layer, index, Status::SUCCESS);
        } else {
            write.held = true;
        }
        if !dropped.is_empty() {
            let status = self.writes[index as usize].status;
            let why = if status.is_error() { format!("a write failed there: {status}") } else { "it missed a write".to_owned() };
            self.array.report(dropped, &self.view, &why);
        }
    }

    fn end(&mut self, layer: &mut Layer, index: u32, status: Status) {
        let write = &mut self.writes[index as usize];
        write.held = false;
        if let Some(parent) = write.parent.take() {
            self.free.push(index);
            layer.complete(parent, status);
        }
    }

    /// The view has changed: some writes that waited may go on.
    fn judge_held(&mut self, layer: &mut Layer, attempt: u64) {
        let (latest, slots) = self.view.refused;
        for index in 0..self.writes.len() as u32 {
            let write = &self.writes[index as usize];
            if !write.held {
                continue;
            }
            let missing = write.required.minus(write.done).minus(self.view.recorded);
            let refused = latest != attempt && !(missing & slots).is_empty();
            if missing.is_empty() || refused || (write.done & self.view.serving).is_empty() {
                self.judge(layer, index, refused);
            }
        }
    }

    // ---- both -------------------------------------------------------------------------------------------------------------------

    fn take_in(&mut self, layer: &mut Layer, batch: &[IoId]) {
        for &id in batch {
            if layer.io(id).op == Op::Read {
                if !self.aim(layer, id, Mask::EMPTY) {
                    layer.complete(id, Status::INTERNAL_DEVICE_ERROR);
                }
            } else if !self.waiting.is_empty() || !self.spread(layer, id) {
                self.waiting.push_back(id);
            }
        }
    }

    fn start_waiting(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        while let Some(id) = self.waiting.front().copied() {
            if !self.spread(layer, id) {
                break;
            }
            self.waiting.pop_front();
        }
        self.send(layer, reactor);
    }

    /// Submits what is ready, one batch a leg.
    fn send(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        for slot in 0..self.ready.len() {
            if self.ready[slot].is_empty() {
                continue;
            }
            let mut batch = std::mem::take(&mut self.ready[slot]);
            if let Some(below) = self.below[slot] {
                layer.submit(reactor, below, &batch);
            }
            batch.clear();
            self.ready[slot] = batch;
        }
    }

    fn completed(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for &id in batch {
            let tag = layer.io(id).frame().tag;
            if tag & READ != 0 {
                self.read_done(layer, id, (tag & 0xff) as usize);
            } else {
                self.part_done(layer, id);
            }
        }
        if !self.up.is_empty() {
            layer.pass_up(self.id, 0, &self.up);
            self.up.clear();
        }
        self.start_waiting(layer, reactor);
    }

    /// A hint: what waits ends at once, legs are asked to hurry.
    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        if let Some(at) = self.waiting.iter().position(|other| *other == id) {
            self.waiting.remove(at);
            return layer.complete(id, Status::ABORT_REQUESTED);
        }
        let Some(index) = self.writes.iter().position(|write| write.parent == Some(id)) else { return };
        let write = &mut self.writes[index];
        write.aborted = true;
        if write.held {
            return self.end(layer, index as u32, Status::ABORT_REQUESTED);
        }
        let children: Vec<IoId> = write.children.iter().map(|(_, child)| *child).collect();
        children.into_iter().for_each(|child| layer.abort(reactor, child));
    }
}

fn member(view: &View, slot: usize) -> Option<&Arc<qpair_bdev::Descriptor>> {
    let member = view.members.get(slot)?.as_ref()?;
    view.writing.has(slot).then_some(member)
}

impl Channel for MirrorChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let mut mirror = self.0.borrow_mut();
        mirror.take_in(layer, batch);
        mirror.send(layer, reactor);
    }

    fn completed(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        self.0.borrow_mut().completed(layer, reactor, batch);
    }

    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        self.0.borrow_mut().abort(layer, reactor, id);
    }
}
