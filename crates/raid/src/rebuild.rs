//! Background work on a mirror: a rebuild onto a new leg, and repairs of ranges on which legs may differ.
//!
//! How it works. From its start on the target gets every write that the others get. The rebuild goes through the array window by window: it locks the
//! window against writers on all reactors (reads go on), copies it from a leg that serves, and lets go. What was written before the target
//! came is thereby copied, what is written later reaches it by itself; its failures end the rebuild. At the end it is flushed, its
//! failures are made to count everywhere, the superblocks say that it is current (its own last), and it is read from.
//!
//! A rebuild that is interrupted starts anew when the leg is added again: until the end superblocks say that it is out.
//!
//! Limits: [`STEP_BYTES`] are copied at a time, so much memory a rebuild has.

use std::sync::Arc;
use std::sync::Mutex;

use qpair_bdev::Descriptor;
use qpair_bdev::ranges::{self, Keep, RangeLock};
use qpair_memory::{Mapping, Pages, Region};
use qpair_reactor::log::{self, Level as Severity};
use qpair_wire::raid_superblock::{Base, BaseState};
use zerocopy::little_endian::{U32, U64};

use crate::array::{Array, Process, Repair, lock};
use crate::mask::Mask;
use crate::worker::{Line, Worker};

/// See the module's doc.
const STEP_BYTES: u64 = 1 << 20;

/// Why a rebuild ended before its end.
enum Stop {
    /// The target failed, or went.
    Target,
    /// The array goes, or no leg can be read.
    Array,
}

impl Array {
    /// Rebuilds onto the member of `slot`, which is written to already.
    pub(crate) async fn rebuild(self: Arc<Self>, worker: &Worker, slot: usize) {
        let Some(target) = lock(&self.state).slots[slot].member.clone() else { return };
        log::say(Severity::Info, "raid", format_args!("{}: rebuilding onto {} in slot {slot}", self.name, target.name()));
        let outcome = match self.copy_all(worker, slot, &target).await {
            Ok(()) => self.promote(worker, slot, &target).await,
            Err(stop) => Err(stop),
        };
        match outcome {
            Ok(()) => log::say(Severity::Info, "raid", format_args!("{}: {} is current", self.name, target.name())),
            Err(stop) => {
                log::say(Severity::Warning, "raid", format_args!("{}: the rebuild onto {} was given up", self.name, target.name()));
                let why = if matches!(stop, Stop::Target) { BaseState::FAILED } else { BaseState::MISSING };
                if self.is_target(slot, &target) {
                    self.blame(Mask::of(slot), "the rebuild onto it failed, for it could not be written");
                    if why == BaseState::MISSING && !lock(&self.state).deleting {
                        let name = target.name();
                        self.tell_failure(format!(
                            "the rebuild onto base bdev {name} in slot {slot} was given up, for no member could be read"
                        ));
                    }
                    self.leave(worker, Mask::of(slot), why, None).await;
                }
            }
        }
        lock(&self.state).process = None;
        worker.look_again();
    }

    fn is_target(&self, slot: usize, target: &Arc<Descriptor>) -> bool {
        let view = self.view();
        view.writing.has(slot) && view.members[slot].as_ref().is_some_and(|member| Arc::ptr_eq(member, target))
    }

    async fn copy_all(&self, worker: &Worker, slot: usize, target: &Arc<Descriptor>) -> Result<(), Stop> {
        let options = *lock(&self.options);
        let (block_size, unit) = {
            let unit = target.info().map_or(1, |info| info.write_unit_blocks);
            (u64::from(lock(&self.state).block_size), u64::from(unit))
        };
        let window = (u64::from(options.window_kb) * 1024).div_ceil(block_size).next_multiple_of(unit);
        let mut copier = Copier::new(block_size, unit).ok_or(Stop::Array)?;
        let (began_ns, mut lba) = (worker.now_ns(), 0);
        loop {
            let (end, deleting) = {
                let state = lock(&self.state);
                (state.num_blocks, state.deleting || state.device.is_none())
            };
            if deleting {
                return Err(Stop::Array);
            }
            if !self.is_target(slot, target) {
                return Err(Stop::Target);
            }
            if lba >= end {
                break;
            }
            let blocks = window.min(end - lba);
            let range = self.lock_range(worker, lba, blocks).await.ok_or(Stop::Array)?;
            let outcome = copier.copy(self, worker, self.view().serving, Mask::of(slot), lba, blocks).await;
            drop(range);
            match outcome {
                Copied::Whole => {}
                Copied::Unread => return Err(Stop::Array),
                Copied::Unwritten(_) => return Err(Stop::Target),
            }
            lba += blocks;
            if let Some(process) = &mut lock(&self.state).process {
                process.blocks = lba;
            }
            if options.bandwidth_mb != 0 {
                let due_ns = began_ns + (u128::from(lba * block_size) * 1_000_000_000 / (u128::from(options.bandwidth_mb) << 20)) as u64;
                worker.sleep(due_ns.saturating_sub(worker.now_ns())).await;
            }
        }
        let line = worker.line(target).await.map_err(|_| Stop::Target)?;
        if line.flush().await.is_error() { Err(Stop::Target) } else { Ok(()) }
    }

    /// The target has all: it becomes a leg like the others.
    async fn promote(self: &Arc<Self>, worker: &Worker, slot: usize, target: &Arc<Descriptor>) -> Result<(), Stop> {
        let this = Mask::of(slot);
        let _turn = self.turn.take(worker).await;
        if !self.is_target(slot, target) {
            return Err(Stop::Target);
        }
        // From here on no write is acknowledged without it; none that was has missed it.
        let missed = self.publish(worker, |view| view.recorded = view.recorded.minus(this)).await;
        if missed.has(slot) || (self.superblock && !self.admit_on_media(worker, slot).await) {
            self.blame(this, "the rebuild onto it failed, for it missed a write or the superblocks could not say that it is current");
            self.leave_now(worker, this, BaseState::FAILED, None).await;
            return Err(Stop::Target);
        }
        self.publish(worker, |view| view.serving = view.serving | this).await;
        self.follow_sizes();
        Ok(())
    }

    /// Has the superblocks say that the target is current: those of all that serve before its own, so that none of them can be left behind by an array
    /// that goes on with the target alone, and does not know it. False: the target stays out.
    async fn admit_on_media(self: &Arc<Self>, worker: &Worker, slot: usize) -> bool {
        let this = Mask::of(slot);
        // First of all it says whose it is: when the others say that it is current, it must be found.
        if !self.write_same(worker, this).await.is_empty() {
            return false;
        }
        {
            let mut state = lock(&self.state);
            let Some(uuid) = state.slots[slot].uuid else { return false };
            let (offset, size) = (U64::new(state.slots[slot].data_offset), U64::new(state.slots[slot].data_size));
            let entry = Base { uuid: uuid.into_bytes(), data_offset: offset, data_size: size, slot: slot as u8, ..Base::default() };
            state.slots[slot].entry = Some(Base { state: U32::new(BaseState::CONFIGURED.0), ..entry });
        }
        let serving = self.view().serving;
        let failed = self.write_superblocks(worker, serving).await;
        if !failed.is_empty() {
            // Among themselves they may do without some, and then record that; not all of them for the target's sake.
            let refused = serving.minus(failed).is_empty() || !self.leave_now(worker, failed, BaseState::FAILED, None).await.is_empty();
            if refused {
                return false;
            }
        }
        self.write_same(worker, this).await.is_empty()
    }

    async fn lock_range(&self, worker: &Worker, lba: u64, blocks: u64) -> Option<RangeLock> {
        let device = lock(&self.state).device?;
        let answer = Arc::new(Mutex::new(None));
        let (told, home) = (answer.clone(), self.home().clone());
        ranges::lock(&self.registry, device, lba, blocks, Keep::Writers, move |range| {
            *lock(&told) = Some(range);
            home.call(Worker::wake);
        });
        worker.until(|| lock(&answer).take()).await
    }

    /// Makes legs equal, range after range.
    pub(crate) async fn run_repairs(self: Arc<Self>, worker: &Worker) {
        loop {
            let next = {
                let mut state = lock(&self.state);
                let next = state.repairs.pop_front();
                state.repairing = next.is_some();
                next
            };
            let Some(repair) = next else { return };
            self.run_repair(worker, repair).await;
        }
    }

    async fn run_repair(self: &Arc<Self>, worker: &Worker, repair: Repair) {
        let unit = {
            let state = lock(&self.state);
            let units = state.slots.iter().filter_map(|slot| Some(slot.member.as_ref()?.info()?.write_unit_blocks));
            u64::from(units.max().unwrap_or(1))
        };
        let block_size = u64::from(lock(&self.state).block_size);
        let Some(mut copier) = Copier::new(block_size, unit) else { return };
        let end = (repair.lba + repair.blocks).next_multiple_of(unit).min(lock(&self.state).num_blocks);
        let mut lba = repair.lba - repair.lba % unit;
        while lba < end {
            let blocks = copier.step.min(end - lba);
            let Some(_range) = self.lock_range(worker, lba, blocks).await else { return };
            let view = self.view();
            let some = repair.source & view.serving;
            let source = if some.is_empty() { view.serving } else { some };
            match copier.copy(self, worker, source, repair.slots & view.writing, lba, blocks).await {
                Copied::Whole => {}
                // Nothing to make them equal to.
                Copied::Unread => return,
                Copied::Unwritten(slots) => self.report(slots, &view, "what it could not read could not be written anew"),
            }
            lba += blocks;
        }
    }
}

impl Process {
    pub(crate) fn new(slot: usize, target: &str) -> Self {
        Self { slot, target: target.to_owned(), blocks: 0 }
    }
}

enum Copied {
    Whole,
    Unread,
    Unwritten(Mask),
}

/// Copies ranges between members, with memory and channels of its own.
struct Copier {
    region: Region,
    /// Blocks.
    step: u64,
    lines: Vec<(usize, Arc<Descriptor>, Line)>,
}

impl Copier {
    fn new(block_size: u64, unit: u64) -> Option<Self> {
        let step = (STEP_BYTES / block_size).max(1).next_multiple_of(unit);
        let mapping = Mapping::anonymous((step * block_size) as usize, Pages::Normal).ok()?;
        Some(Self { region: Region::new(mapping), step, lines: Vec::new() })
    }

    /// The channel to the member of a slot, and where its data begin. Channels are kept: a window each would be dear.
    async fn line(&mut self, array: &Array, worker: &Worker, slot: usize) -> Option<(usize, u64)> {
        let view = array.view();
        let member = view.members[slot].clone()?;
        let known = self.lines.iter().position(|(other, of, _)| *other == slot && Arc::ptr_eq(of, &member));
        let at = match known {
            Some(at) => at,
            None => {
                self.lines.retain(|(other, ..)| *other != slot);
                let line = worker.line(&member).await.ok()?;
                self.lines.push((slot, member, line));
                self.lines.len() - 1
            }
        };
        Some((at, view.offsets[slot]))
    }

    async fn copy(&mut self, array: &Array, worker: &Worker, source: Mask, targets: Mask, lba: u64, blocks: u64) -> Copied {
        let (mut at, end) = (lba, lba + blocks);
        let mut unwritten = Mask::EMPTY;
        while at < end {
            let count = self.step.min(end - at);
            let Some(from) = self.read(array, worker, source, at, count).await else { return Copied::Unread };
            for slot in targets.minus(Mask::of(from)).slots() {
                let Some((line, offset)) = self.line(array, worker, slot).await else {
                    unwritten = unwritten | Mask::of(slot);
                    continue;
                };
                if self.lines[line].2.write(at + offset, count, &self.region).await.is_error() {
                    unwritten = unwritten | Mask::of(slot);
                }
            }
            at += count;
        }
        if unwritten.is_empty() { Copied::Whole } else { Copied::Unwritten(unwritten) }
    }

    /// Reads from the first leg that can; which.
    async fn read(&mut self, array: &Array, worker: &Worker, source: Mask, lba: u64, blocks: u64) -> Option<usize> {
        for slot in source.slots() {
            let Some((line, offset)) = self.line(array, worker, slot).await else { continue };
            if !self.lines[line].2.read(lba + offset, blocks, &self.region).await.is_error() {
                return Some(slot);
            }
        }
        None
    }
}
