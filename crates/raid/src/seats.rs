//! Members take their places; an array that has all it needs starts, one that is online is rebuilt onto a new member.
//!
//! Everything here is done by who has the array's turn.

use std::sync::Arc;

use qpair_bdev::{BdevError, Descriptor};
use qpair_wire::raid_superblock::{Base, BaseState, DATA_OFFSET_MIN, Level};
use zerocopy::little_endian::{U32, U64};

use crate::array::{Array, Phase, Process, RaidDevice, Slot, State, lock};
use crate::control::{Raids, os};
use crate::mask::Mask;
use crate::superblock::{Found, load};
use crate::view::View;
use crate::worker::Worker;

/// How far ahead an array gets by a start that was forced: further than the legs that it gave up can have gone by themselves.
const FORCED: u64 = 1 << 32;
/// How far it gets ahead of a stranger's superblock before it writes over that one: further than those of one array are apart.
const STRANGER: u64 = 1 << 16;

impl Raids {
    /// Takes the bdev that a slot names; starts the array if it was the last, or a rebuild if the array is online.
    pub(crate) async fn configure(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>, slot: usize) -> Result<(), BdevError> {
        let wanted = {
            let state = lock(&array.state);
            if state.deleting {
                // While this task waited for its turn: an array that nobody knows any more must not come online.
                return Err(BdevError::Removing(array.name.clone()));
            }
            let slot = &state.slots[slot];
            slot.name.clone().or_else(|| slot.uuid.map(|uuid| uuid.to_string())).unwrap_or_default()
        };
        let member = Arc::new(self.registry.open_base(&wanted, "raid")?);
        self.seat(array, slot, &member)?;
        let (phase, starts) = {
            let state = lock(&array.state);
            let count = state.slots.iter().filter(|slot| slot.configured).count();
            (state.phase, state.phase == Phase::Configuring && count == state.operational)
        };
        if starts {
            let outcome = self.bring_online(worker, array).await;
            if outcome.is_err() {
                unseat(array, slot);
            }
            return outcome;
        }
        if phase == Phase::Online { self.begin_rebuild(worker, array, slot, member).await } else { Ok(()) }
    }

    /// A bdev that is put into an array by hand must not be another array's, nor know more of this one than it does itself.
    pub(crate) async fn check_new(&self, worker: &Worker, array: &Array, base: &str) -> Result<(), BdevError> {
        let reader = Arc::new(self.registry.open(base, false, |_| {})?);
        let Found::Superblock(found) = load(worker, &reader).await? else { return Ok(()) };
        let (sequence, newest) = (lock(&array.state).sequence, found.header.seq_number.get());
        if sequence == 0 || found.header.uuid != array.uuid.into_bytes() {
            let name = found.header.name().unwrap_or("").to_owned();
            return Err(BdevError::Exists(format!("the superblock of raid bdev {name} on base bdev {base}")));
        }
        if newest > sequence {
            return Err(os(libc::EBUSY, format!("superblock {newest} on base bdev {base} is newer than the array's {sequence}")));
        }
        Ok(())
    }

    /// Checks a bdev's geometry against what the slot and the array need, and puts it there.
    pub(crate) fn seat(&self, array: &Arc<Array>, slot: usize, member: &Arc<Descriptor>) -> Result<(), BdevError> {
        let info = member.info().ok_or_else(|| BdevError::Removing(member.name().to_owned()))?;
        let array_info = lock(&array.state).device.and_then(|_| self.registry.list(Some(&array.name)).ok()?.pop());
        if let Some(listing) = array_info {
            array.fits(&listing.info, &info)?;
        }
        let mut state = lock(&array.state);
        let block = u64::from(info.block_size);
        if state.block_size != 0 && state.block_size != info.block_size {
            let limit = format!("the array's {}", state.block_size);
            return Err(BdevError::invalid("block_size", format!("{block} of base bdev {}", info.name), limit));
        }
        let place = &mut state.slots[slot];
        let mut offset = place.data_offset;
        if array.superblock && offset == 0 {
            offset = DATA_OFFSET_MIN / block;
            if info.optimal_io_boundary != 0 {
                offset = offset.next_multiple_of(u64::from(info.optimal_io_boundary));
            }
        }
        let (room, needed) = (info.num_blocks.saturating_sub(offset), place.data_size.max(1));
        if room < needed {
            let limit = format!("at least {} for data from block {offset}", offset + needed);
            return Err(BdevError::invalid("num_blocks", format!("{} of base bdev {}", info.num_blocks, info.name), limit));
        }
        place.data_offset = offset;
        if place.data_size == 0 {
            place.data_size = room;
        }
        (place.name, place.uuid) = (Some(info.name.clone()), Some(info.uuid));
        (place.member, place.configured) = (Some(member.clone()), true);
        state.block_size = info.block_size;
        Ok(())
    }

    pub(crate) async fn bring_online(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>) -> Result<(), BdevError> {
        {
            let mut state = lock(&array.state);
            if array.level != Level::RAID1 && array.strip_blocks(state.block_size) == 0 {
                return Err(BdevError::invalid("strip_size_kb", array.strip_kb, format!("at least a block of {} bytes", state.block_size)));
            }
            refit(&mut state)?;
            let (sizes, total) = array.sizes(&state);
            if state.sequence != 0 && total != state.num_blocks {
                let limit = format!("the superblock's {}", state.num_blocks);
                return Err(BdevError::invalid("num_blocks", total, limit));
            }
            if total == 0 {
                return Err(BdevError::invalid("num_blocks", 0, "at least a strip on each base bdev"));
            }
            state.slots.iter_mut().zip(sizes).for_each(|(slot, size)| slot.data_size = size);
            state.num_blocks = total;
            let mut view = View::clone(&state.view);
            // An attempt before this one may have failed.
            (view.serving, view.writing, view.recorded) = (Mask::EMPTY, Mask::EMPTY, Mask::EMPTY);
            for (number, slot) in state.slots.iter_mut().enumerate() {
                view.members[number] = slot.member.clone();
                view.offsets[number] = slot.data_offset;
                let this = Mask::of(number);
                if slot.member.is_none() {
                    view.recorded = view.recorded | this;
                    continue;
                }
                (view.serving, view.writing) = (view.serving | this, view.writing | this);
                if let Some(uuid) = slot.uuid.filter(|_| array.superblock) {
                    let (offset, size) = (U64::new(slot.data_offset), U64::new(slot.data_size));
                    let entry =
                        Base { uuid: uuid.into_bytes(), data_offset: offset, data_size: size, slot: number as u8, ..Base::default() };
                    slot.entry = Some(Base { state: U32::new(BaseState::CONFIGURED.0), ..entry });
                }
            }
            view.version += 1;
            state.view = Arc::new(view);
        }
        let info = array.describe()?;
        if array.superblock {
            let failed = array.write_superblocks(worker, array.view().serving).await;
            if !failed.is_empty() {
                return Err(os(libc::EIO, format!("the superblock of raid bdev {} could not be written to slots {failed:?}", array.name)));
            }
        }
        // Before it is one: it may be removed as soon as it is there.
        lock(&array.state).phase = Phase::Online;
        let registered = self.registry.register(Arc::new(RaidDevice { array: array.clone(), info }));
        let mut state = lock(&array.state);
        match registered {
            Ok(device) => {
                state.device = (state.phase == Phase::Online).then_some(device);
                drop(state);
                array.follow_sizes();
                Ok(())
            }
            Err(error) => {
                state.phase = Phase::Configuring;
                Err(error)
            }
        }
    }

    /// Starts a mirror that waits, with the members that are there. Those that are not are given up, and no superblock names them any more: one that
    /// comes back with writes of its own after this is neither read nor written over until somebody adds it.
    pub(crate) async fn start_now(self: &Arc<Self>, worker: &Worker, name: &str) -> Result<(), BdevError> {
        self.sweep();
        let array = self.find(name).ok_or_else(|| BdevError::NoSuchBdev(format!("raid bdev {name} not found")))?;
        let _turn = array.turn.take(worker).await;
        let before = {
            let mut state = lock(&array.state);
            if state.phase != Phase::Configuring || state.deleting {
                return Err(os(libc::EBUSY, format!("raid bdev {name} is {}, and waits for nothing", state.phase.name())));
            }
            if array.level != Level::RAID1 {
                return Err(BdevError::invalid(
                    "raid_level",
                    format!("{:?} of raid bdev {name}", array.level),
                    "raid1: no other does without a base bdev",
                ));
            }
            let discovered = state.slots.iter().filter(|slot| slot.configured).count();
            if discovered == 0 {
                return Err(BdevError::invalid("base_bdevs", format!("0 current of raid bdev {name}"), "at least 1"));
            }
            let before = (state.slots.clone(), state.operational, state.sequence);
            for slot in state.slots.iter_mut().filter(|slot| !slot.configured) {
                *slot = Slot { data_size: slot.data_size, ..Slot::default() };
            }
            state.operational = discovered;
            if array.superblock {
                state.sequence += FORCED;
            }
            before
        };
        let outcome = self.bring_online(worker, &array).await;
        if outcome.is_err() {
            let mut state = lock(&array.state);
            (state.slots, state.operational, state.sequence) = before;
        }
        outcome
    }

    /// The member of a slot of an online array becomes the target of a rebuild.
    pub(crate) async fn begin_rebuild(
        self: &Arc<Self>,
        worker: &Worker,
        array: &Arc<Array>,
        slot: usize,
        member: Arc<Descriptor>,
    ) -> Result<(), BdevError> {
        let offset = {
            let mut state = lock(&array.state);
            state.process = Some(Process::new(slot, member.name()));
            state.slots[slot].data_offset
        };
        array.tell_bases();
        let this = Mask::of(slot);
        if array.superblock && array.is_stranger(slot) && !array.disown(worker, slot).await {
            let mut state = lock(&array.state);
            state.process = None;
            state.slots[slot].clear();
            drop(state);
            array.tell_bases();
            return Err(os(libc::EIO, format!("the superblock of bdev {} could not be written", member.name())));
        }
        let target = member.clone();
        let admit = move |view: &mut View| {
            (view.members[slot], view.offsets[slot]) = (Some(target), offset);
            view.writing = view.writing | this;
        };
        let missed = array.publish(worker, admit).await;
        if missed.has(slot) || self.registry.list(Some(member.name())).map_or(true, |found| found.iter().any(|found| found.removing)) {
            lock(&array.state).process = None;
            array.blame(this, "the rebuild onto it failed, for it could not be opened");
            array.leave_now(worker, this, BaseState::FAILED, None).await;
            return Err(BdevError::Removing(member.name().to_owned()));
        }
        let (array, tasks) = (array.clone(), worker.clone());
        worker.spawn(async move { array.rebuild(&tasks, slot).await });
        Ok(())
    }
}

impl Array {
    /// Whether superblocks do not know the member of a slot.
    fn is_stranger(&self, slot: usize) -> bool {
        let state = lock(&self.state);
        let slot = &state.slots[slot];
        slot.recorded().is_none_or(|(uuid, _)| Some(uuid) != slot.uuid)
    }

    /// Before anything is written to a stranger: what it may have been a leg of, a mirror that was started by force without this one's legs, must not come back
    /// as that, half written over. Its superblock becomes one that calls only others current, and that is newer than any that calls itself current.
    async fn disown(self: &Arc<Self>, worker: &Worker, slot: usize) -> bool {
        lock(&self.state).sequence += STRANGER;
        let serving = self.view().serving;
        let failed = self.write_superblocks(worker, serving).await;
        if !failed.is_empty() {
            self.leave_now(worker, failed, BaseState::FAILED, None).await;
        }
        self.write_same(worker, Mask::of(slot)).await.is_empty()
    }
}

/// Members may have another size than when they took their places. Where there is no superblock yet the array goes by what they have now.
fn refit(state: &mut State) -> Result<(), BdevError> {
    let fresh = state.sequence == 0;
    for slot in &mut state.slots {
        let Some(member) = &slot.member else { continue };
        let info = member.info().ok_or_else(|| BdevError::Removing(member.name().to_owned()))?;
        let (room, needed) = (info.num_blocks.saturating_sub(slot.data_offset), if fresh { 1 } else { slot.data_size });
        if room < needed {
            let limit = format!("at least {} for data from block {}", slot.data_offset + needed, slot.data_offset);
            return Err(BdevError::invalid("num_blocks", format!("{} of base bdev {}", info.num_blocks, info.name), limit));
        }
        if fresh {
            slot.data_size = room;
        }
    }
    Ok(())
}

/// A member of an array that is no bdev goes.
pub(crate) fn unseat(array: &Array, slot: usize) {
    let mut state = lock(&array.state);
    let place = &mut state.slots[slot];
    let member = place.member.take();
    place.configured = false;
    // What the superblock says counts again when it comes back.
    if place.entry.is_none() {
        place.data_size = 0;
    }
    let mut view = View::clone(&state.view);
    view.members[slot] = None;
    state.view = Arc::new(view);
    drop(state);
    drop(member);
}
