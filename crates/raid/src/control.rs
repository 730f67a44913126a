//! The arrays of a process: made, examined, changed, deleted.
//!
//! How it works. Every operation is a task on the home reactor; between two of its waits nothing else changes. An array begins as *configuring* with
//! slots that name members (by name, or by the UUIDs of a superblock); whenever all that it needs are there it starts: its geometry is fixed, its
//! superblock written with the next sequence number, its bdev registered.
//!
//! **Which superblock counts.** The newest that was seen of an array while it was configuring: a newer one replaces what an older one made. All members
//! that it calls current must be there before the array starts, so that an older superblock, which calls a member current that a newer one
//! has out, never starts an array without that member, and that member brings the newer one. A member that the newest superblock has out is rebuilt
//! as soon as the array is online.
//!
//! Errors. [`BdevError`], with SPDK's errno for each.
//!
//! Differences from SPDK. A member with an older superblock that comes before its array is online is rebuilt once it is, where SPDK ignores it until it
//! is examined again. An array whose last leg fails an I/O stays, where SPDK takes it offline.
//!
//! Limits: 255 members; names of 63 bytes; [`RAID5F`](qpair_wire::raid_superblock::Level::RAID5F) is refused by name.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::lifecycle::{self, Reply};
use qpair_bdev::{BdevError, Descriptor, Registry};
use qpair_reactor::log::{self, Level as Severity};
use qpair_wire::raid_superblock::{BASES_MAX, Base, BaseState, DATA_OFFSET_MIN, Level, NAME_BYTES};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};

use crate::array::{Array, Options, Phase, Process, RaidDevice, Slot, State, lock};
use crate::mask::Mask;
use crate::superblock::{Found, Superblock, load};
use crate::view::View;
use crate::worker::{self, Turn, Worker};

/// How a removal's I/O is given time to end by itself.
const DEADLINE_NS: u64 = 10_000_000_000;

/// What an array is to be.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Of the bdev.
    pub name: String,
    /// How members make a whole.
    pub level: Level,
    /// KiB a strip; 0 for a mirror.
    pub strip_kb: u32,
    /// Members by name, one a slot; those that are not there are waited for.
    pub bases: Vec<String>,
    /// Of the bdev; None: a new one.
    pub uuid: Option<Uuid>,
    /// Whether members say what they are.
    pub superblock: bool,
}

/// One slot, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    /// Of the bdev there, or waited for.
    pub name: Option<String>,
    /// Of the bdev there, or waited for; zero: of nobody.
    pub uuid: Uuid,
    /// It is there.
    pub is_configured: bool,
    /// Blocks.
    pub data_offset: u64,
    /// Blocks.
    pub data_size: u64,
}

/// An array, as it is shown.
#[derive(Clone, Debug)]
pub struct ArrayInfo {
    /// Of the bdev.
    pub name: String,
    /// Of the bdev.
    pub uuid: Uuid,
    /// KiB.
    pub strip_kb: u32,
    /// Where it is in its life.
    pub phase: Phase,
    /// How members make a whole.
    pub level: Level,
    /// Whether members say what they are.
    pub superblock: bool,
    /// Members there.
    pub discovered: usize,
    /// Members that it works with, or starts with.
    pub operational: usize,
    /// A rebuild: its target, blocks done, and of how many.
    pub process: Option<(String, u64, u64)>,
    /// All slots.
    pub members: Vec<MemberInfo>,
}

/// See the module's doc.
pub struct Raids {
    registry: Arc<Registry>,
    options: Arc<Mutex<Options>>,
    arrays: Mutex<Vec<Arc<Array>>>,
    next: AtomicU64,
    ending: Arc<AtomicBool>,
}

fn os(errno: i32, what: String) -> BdevError {
    BdevError::Os { what, source: std::io::Error::from_raw_os_error(errno) }
}

/// A reply that is sent in any case.
struct Answer<T>(Option<Reply<T>>, String);

impl<T> Answer<T> {
    fn send(mut self, outcome: Result<T, BdevError>) {
        if let Some(reply) = self.0.take() {
            reply(outcome);
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if let Some(reply) = self.0.take() {
            reply(Err(BdevError::Removing(std::mem::take(&mut self.1))));
        }
    }
}

impl Raids {
    /// For the bdevs of a registry.
    pub fn new(registry: &Arc<Registry>) -> Arc<Self> {
        let (options, arrays) = (Arc::default(), Mutex::default());
        Arc::new(Self { registry: registry.clone(), options, arrays, next: AtomicU64::new(1), ending: Arc::default() })
    }

    /// For rebuilds that begin from now on.
    pub fn set_options(&self, options: Options) -> Result<(), BdevError> {
        if options.window_kb == 0 {
            return Err(BdevError::invalid("process_window_size_kb", 0, "at least 1"));
        }
        *lock(&self.options) = options;
        Ok(())
    }

    /// As set.
    pub fn options(&self) -> Options {
        *lock(&self.options)
    }

    fn task<T: Send + 'static, F: Future<Output = Result<T, BdevError>> + 'static>(
        self: &Arc<Self>,
        name: &str,
        reply: Reply<T>,
        work: impl FnOnce(Arc<Self>, Worker) -> F + Send + 'static,
    ) {
        let (raids, answer) = (self.clone(), Answer(Some(reply), name.to_owned()));
        let Some(home) = self.registry.reactors().first() else { return };
        worker::start(home, move |worker| async move { answer.send(work(raids, worker).await) });
    }

    /// Makes an array; it is online at once if all members are there.
    pub fn create(self: &Arc<Self>, spec: Spec, reply: Reply<()>) {
        let name = spec.name.clone();
        self.task(&name, reply, |raids, worker| async move { raids.create_now(&worker, spec).await });
    }

    /// A bdev that appeared: it becomes a member if some array waits for it, or if it says so itself. Replies whether it did.
    pub fn examine(self: &Arc<Self>, bdev: &str, reply: Reply<bool>) {
        let name = bdev.to_owned();
        self.task(bdev, reply, |raids, worker| async move { raids.examine_now(&worker, &name).await });
    }

    /// Puts a bdev into an empty slot. An online mirror begins to rebuild onto it before the reply.
    pub fn add_base(self: &Arc<Self>, array: &str, base: &str, reply: Reply<()>) {
        let (array, base) = (array.to_owned(), base.to_owned());
        self.task(&array.clone(), reply, |raids, worker| async move { raids.add_now(&worker, &array, &base).await });
    }

    /// Has a member leave. An array that cannot do without goes offline.
    pub fn remove_base(self: &Arc<Self>, base: &str, reply: Reply<()>) {
        let name = base.to_owned();
        self.task(base, reply, |raids, worker| async move { raids.remove_now(&worker, &name).await });
    }

    /// Deletes an array; `clear`: and its superblocks.
    pub fn delete(self: &Arc<Self>, array: &str, clear: bool, reply: Reply<()>) {
        let name = array.to_owned();
        self.task(array, reply, move |raids, worker| async move { raids.delete_now(&worker, &name, clear).await });
    }

    /// From now on an array goes with any of its members, and none is recorded as missing: the process ends.
    pub fn shut_down(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// All arrays, in the order in which they came.
    pub fn list(&self) -> Vec<ArrayInfo> {
        self.sweep();
        lock(&self.arrays).iter().map(|array| array.show()).collect()
    }

    fn find(&self, name: &str) -> Option<Arc<Array>> {
        lock(&self.arrays).iter().find(|array| array.name == name).cloned()
    }

    fn forget(&self, array: &Arc<Array>) {
        lock(&self.arrays).retain(|other| !Arc::ptr_eq(other, array));
    }

    /// Members that went without a word while their array was no bdev.
    fn sweep(&self) {
        let arrays = lock(&self.arrays).clone();
        for array in arrays {
            let mut state = lock(&array.state);
            if state.phase == Phase::Online {
                continue;
            }
            let offline = state.phase == Phase::Offline;
            for slot in &mut state.slots {
                if slot.member.as_ref().is_some_and(|member| member.info().is_none()) {
                    if offline {
                        slot.clear();
                    } else {
                        (slot.member, slot.configured) = (None, false);
                    }
                }
            }
            let empty = offline && !state.deleting && state.slots.iter().all(|slot| slot.member.is_none());
            drop(state);
            if empty {
                self.forget(&array);
            }
        }
    }

    // ---- making -----------------------------------------------------------------------------------------------------------------

    fn array(&self, spec: &Spec) -> Result<Arc<Array>, BdevError> {
        let slots = spec.bases.len();
        if spec.name.is_empty() || spec.name.len() >= NAME_BYTES {
            return Err(BdevError::invalid("name", &spec.name, format!("1 to {} bytes", NAME_BYTES - 1)));
        }
        if self.find(&spec.name).is_some() || self.registry.list(Some(&spec.name)).is_ok() {
            return Err(BdevError::Exists(spec.name.clone()));
        }
        let least = match spec.level {
            Level::RAID0 | Level::CONCAT => 1,
            Level::RAID1 => 2,
            other => return Err(BdevError::invalid("raid_level", format!("{other:?}"), "raid0, raid1 or concat")),
        };
        if !(least..=BASES_MAX).contains(&slots) {
            return Err(BdevError::invalid("base_bdevs", format!("of {slots}"), format!("{least} to {BASES_MAX} for {:?}", spec.level)));
        }
        let strip = spec.strip_kb;
        if spec.level == Level::RAID1 && strip != 0 {
            return Err(BdevError::invalid("strip_size_kb", strip, "0 for raid1"));
        }
        if spec.level != Level::RAID1 && (!strip.is_power_of_two() || strip > 1 << 20) {
            return Err(BdevError::invalid("strip_size_kb", strip, "a power of two up to 1048576"));
        }
        let uuid = spec.uuid.filter(|uuid| !uuid.is_nil()).unwrap_or_else(Uuid::new_v4);
        let slot = |name: &String| Slot { name: Some(name.clone()), ..Slot::default() };
        let state = State {
            phase: Phase::Configuring,
            slots: spec.bases.iter().map(slot).collect(),
            view: Arc::new(View { members: vec![None; slots], offsets: vec![0; slots], ..View::default() }),
            device: None,
            block_size: 0,
            num_blocks: 0,
            operational: slots,
            sequence: 0,
            process: None,
            deleting: false,
            reported: Mask::EMPTY,
            reconciling: false,
            repairs: Default::default(),
            repairing: false,
        };
        let array = Arc::new(Array {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            name: spec.name.clone(),
            uuid,
            level: spec.level,
            slots,
            strip_kb: strip,
            superblock: spec.superblock,
            registry: self.registry.clone(),
            options: self.options.clone(),
            ending: self.ending.clone(),
            state: Mutex::new(state),
            turn: Turn::default(),
        });
        lock(&self.arrays).push(array.clone());
        Ok(array)
    }

    async fn create_now(self: &Arc<Self>, worker: &Worker, spec: Spec) -> Result<(), BdevError> {
        self.sweep();
        if spec.bases.iter().any(String::is_empty) {
            return Err(BdevError::invalid("base_bdevs", "an empty name", "names of bdevs"));
        }
        let array = self.array(&spec)?;
        let turn = array.turn.take(worker).await;
        for slot in 0..array.slots {
            let outcome = match self.check_new(worker, &array, &spec.bases[slot]).await {
                Ok(()) => self.configure(worker, &array, slot).await,
                refused => refused,
            };
            match outcome {
                Ok(()) | Err(BdevError::NoSuchBdev(_)) => {}
                Err(error) => {
                    if spec.superblock && lock(&array.state).sequence != 0 {
                        array.clear_superblocks(worker).await;
                    }
                    drop(turn);
                    self.discard(&array);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// An array that is no bdev goes, and lets go of its members.
    fn discard(&self, array: &Arc<Array>) {
        self.forget(array);
        let mut state = lock(&array.state);
        state.deleting = true;
        let members: Vec<_> = state.slots.iter_mut().filter_map(|slot| slot.member.take()).collect();
        let mut view = View::clone(&state.view);
        view.members.iter_mut().for_each(|member| *member = None);
        state.view = Arc::new(view);
        drop(state);
        drop(members);
    }

    // ---- members ----------------------------------------------------------------------------------------------------------------

    /// Takes the bdev that a slot names; starts the array if it was the last, or a rebuild if the array is online.
    async fn configure(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>, slot: usize) -> Result<(), BdevError> {
        let wanted = {
            let state = lock(&array.state);
            let slot = &state.slots[slot];
            slot.name.clone().or_else(|| slot.uuid.map(|uuid| uuid.to_string())).unwrap_or_default()
        };
        let member = Arc::new(self.registry.open_base(&wanted, "raid")?);
        self.seat(array, slot, &member)?;
        let state = lock(&array.state);
        let (phase, count) = (state.phase, state.slots.iter().filter(|slot| slot.configured).count());
        let starts = phase == Phase::Configuring && count == state.operational;
        drop(state);
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
    async fn check_new(&self, worker: &Worker, array: &Array, base: &str) -> Result<(), BdevError> {
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
    fn seat(&self, array: &Arc<Array>, slot: usize, member: &Arc<Descriptor>) -> Result<(), BdevError> {
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

    async fn bring_online(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>) -> Result<(), BdevError> {
        {
            let mut state = lock(&array.state);
            if array.level != Level::RAID1 && array.strip_blocks(state.block_size) == 0 {
                return Err(BdevError::invalid("strip_size_kb", array.strip_kb, format!("at least a block of {} bytes", state.block_size)));
            }
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
                    let entry = Base { uuid: uuid.into_bytes(), data_offset: offset, data_size: size, slot: number as u8, ..Base::default() };
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
                Ok(())
            }
            Err(error) => {
                state.phase = Phase::Configuring;
                Err(error)
            }
        }
    }

    /// The member of a slot of an online array becomes the target of a rebuild.
    async fn begin_rebuild(
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
        let target = member.clone();
        let admit = move |view: &mut View| {
            (view.members[slot], view.offsets[slot]) = (Some(target), offset);
            view.writing = view.writing | this;
        };
        let missed = array.publish(worker, admit).await;
        if missed.has(slot) || self.registry.list(Some(member.name())).map_or(true, |found| found.iter().any(|found| found.removing)) {
            lock(&array.state).process = None;
            array.leave_now(worker, this, BaseState::FAILED, None).await;
            return Err(BdevError::Removing(member.name().to_owned()));
        }
        let (array, tasks) = (array.clone(), worker.clone());
        worker.spawn(async move { array.rebuild(&tasks, slot).await });
        Ok(())
    }

    async fn add_now(self: &Arc<Self>, worker: &Worker, name: &str, base: &str) -> Result<(), BdevError> {
        self.sweep();
        let array = self.find(name).ok_or_else(|| BdevError::NoSuchBdev(format!("raid bdev {name} is not found in config")))?;
        // Before it is this task's turn: a bdev that says nothing must not keep a leg from leaving.
        match self.check_new(worker, &array, base).await {
            Ok(()) | Err(BdevError::NoSuchBdev(_)) => {}
            Err(error) => return Err(error),
        }
        let _turn = array.turn.take(worker).await;
        let uuid = self.registry.list(Some(base)).ok().and_then(|found| Some(found.first()?.info.uuid));
        let slot = {
            let mut state = lock(&array.state);
            if state.process.is_some() {
                return Err(os(libc::EPERM, format!("raid bdev {name} is being rebuilt")));
            }
            let was_here = |slot: &Slot| slot.is_empty() && slot.recorded().is_some_and(|(recorded, _)| Some(recorded) == uuid);
            let awaited = |slot: &Slot| slot.name.is_none() && slot.uuid.is_some() && slot.uuid == uuid;
            let configuring = state.phase == Phase::Configuring;
            let found = state.slots.iter().position(|slot| configuring && awaited(slot));
            let found = found.or_else(|| state.slots.iter().position(was_here));
            let found = found.or_else(|| state.slots.iter().position(Slot::is_empty));
            let limit = || BdevError::invalid("base_bdev", base, format!("an empty slot of raid bdev {name}: there is none"));
            let slot = found.filter(|_| state.phase != Phase::Offline).ok_or_else(limit)?;
            state.slots[slot].name = Some(base.to_owned());
            slot
        };
        let outcome = self.configure(worker, &array, slot).await;
        let mut state = lock(&array.state);
        let waits = matches!(outcome, Err(BdevError::NoSuchBdev(_))) && state.phase == Phase::Configuring;
        if outcome.is_err() && !waits && !state.slots[slot].configured {
            state.slots[slot].name = None;
        }
        outcome
    }

    async fn remove_now(self: &Arc<Self>, worker: &Worker, base: &str) -> Result<(), BdevError> {
        self.sweep();
        let listing = self.registry.list(Some(base))?;
        let name = listing.first().map_or_else(|| base.to_owned(), |listing| listing.info.name.clone());
        let holds = |array: &Arc<Array>| {
            let state = lock(&array.state);
            let slot = state.slots.iter().position(|slot| slot.member.is_some() && slot.name.as_deref() == Some(&name))?;
            Some((array.clone(), slot, state.phase))
        };
        let found = lock(&self.arrays).iter().find_map(holds);
        let (array, slot, phase) = found.ok_or_else(|| BdevError::NoSuchBdev(format!("{base} is no base bdev")))?;
        if phase != Phase::Online {
            let _turn = array.turn.take(worker).await;
            unseat(&array, slot);
            self.sweep();
            return Ok(());
        }
        if array.level == Level::RAID1 {
            let refused = array.leave(worker, Mask::of(slot), BaseState::MISSING, None).await;
            if refused.is_empty() {
                return Ok(());
            }
        }
        self.take_offline(worker, &array).await?;
        unseat(&array, slot);
        lock(&array.state).slots[slot].clear();
        self.sweep();
        Ok(())
    }

    /// Ends a rebuild, and the bdev.
    async fn take_offline(&self, worker: &Worker, array: &Arc<Array>) -> Result<(), BdevError> {
        let before = std::mem::replace(&mut lock(&array.state).deleting, true);
        worker.until(|| lock(&array.state).process.is_none().then_some(())).await;
        let answer = Arc::new(Mutex::new(None));
        let (told, home) = (answer.clone(), array.home().clone());
        let reply = move |outcome| {
            *lock(&told) = Some(outcome);
            home.call(Worker::wake);
        };
        lifecycle::unregister(&self.registry, &array.name, DEADLINE_NS, Box::new(reply));
        let outcome = worker.until(|| lock(&answer).take()).await;
        if matches!(outcome, Err(BdevError::Removing(_))) {
            // Somebody else has it removed.
            worker.until(|| (lock(&array.state).phase != Phase::Online).then_some(())).await;
        }
        lock(&array.state).deleting = before;
        match outcome {
            Ok(()) | Err(BdevError::NoSuchBdev(_) | BdevError::Removing(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn delete_now(self: &Arc<Self>, worker: &Worker, name: &str, clear: bool) -> Result<(), BdevError> {
        self.sweep();
        let array = self.find(name).ok_or_else(|| BdevError::NoSuchBdev(format!("raid bdev {name} not found")))?;
        if std::mem::replace(&mut lock(&array.state).deleting, true) {
            return Err(os(libc::EALREADY, format!("raid bdev {name} is being deleted")));
        }
        let _turn = loop {
            if lock(&array.state).phase == Phase::Online
                && let Err(error) = self.take_offline(worker, &array).await
            {
                lock(&array.state).deleting = false;
                return Err(error);
            }
            let turn = array.turn.take(worker).await;
            if lock(&array.state).phase != Phase::Online {
                break turn;
            }
        };
        if clear && array.superblock && lock(&array.state).sequence != 0 {
            array.clear_superblocks(worker).await;
        }
        self.discard(&array);
        Ok(())
    }

    // ---- examining --------------------------------------------------------------------------------------------------------------

    fn is_member(&self, name: &str) -> bool {
        let has = |array: &Arc<Array>| lock(&array.state).slots.iter().any(|slot| slot.member.is_some() && slot.name.as_deref() == Some(name));
        lock(&self.arrays).iter().any(has)
    }

    async fn examine_now(self: &Arc<Self>, worker: &Worker, bdev: &str) -> Result<bool, BdevError> {
        self.sweep();
        let listing = self.registry.list(Some(bdev))?.pop().ok_or_else(|| BdevError::NoSuchBdev(bdev.to_owned()))?;
        if self.is_member(&listing.info.name) {
            return Ok(true);
        }
        if listing.claimed_by.is_some() {
            return Ok(false);
        }
        let found = {
            let reader = Arc::new(self.registry.open(&listing.info.name, false, |_| {})?);
            load(worker, &reader).await?
        };
        match found {
            Found::Superblock(found) => self.join(worker, *found, &listing.info.name, listing.info.uuid, listing.info.block_size).await,
            Found::Nothing => self.join_by_name(worker, &listing.info.name, listing.info.uuid).await,
        }
    }

    /// A bdev without a superblock is what arrays wait for that have none either.
    async fn join_by_name(self: &Arc<Self>, worker: &Worker, name: &str, uuid: Uuid) -> Result<bool, BdevError> {
        let waits = |array: &Arc<Array>| {
            let state = lock(&array.state);
            let this = |slot: &Slot| slot.member.is_none() && (slot.name.as_deref() == Some(name) || slot.uuid == Some(uuid));
            let slot = state.slots.iter().position(this)?;
            (state.phase == Phase::Configuring && state.sequence == 0 && !state.deleting).then(|| (array.clone(), slot))
        };
        let found = lock(&self.arrays).iter().find_map(waits);
        let Some((array, slot)) = found else { return Ok(false) };
        let _turn = array.turn.take(worker).await;
        if self.is_member(name) || lock(&array.state).slots[slot].member.is_some() {
            return Ok(self.is_member(name));
        }
        self.configure(worker, &array, slot).await.map(|()| true)
    }

    /// A bdev that says itself what it is a member of.
    async fn join(self: &Arc<Self>, worker: &Worker, found: Superblock, name: &str, uuid: Uuid, block_size: u32) -> Result<bool, BdevError> {
        if found.header.block_size.get() != block_size {
            let limit = format!("{}, by its superblock", found.header.block_size.get());
            return Err(BdevError::invalid("block_size", format!("{block_size} of bdev {name}"), limit));
        }
        let same = |array: &&Arc<Array>| array.uuid.into_bytes() == found.header.uuid;
        let known = lock(&self.arrays).iter().find(same).cloned();
        let array = match known {
            Some(array) => self.newest(worker, array, &found, name).await?,
            None => self.array_of(&found)?,
        };
        let joined = self.admit(worker, &array, name, uuid).await;
        self.gather(worker, &array).await;
        joined
    }

    /// The array, made anew if what was found is newer than what it was made of.
    async fn newest(&self, worker: &Worker, array: Arc<Array>, found: &Superblock, name: &str) -> Result<Arc<Array>, BdevError> {
        // It may be about to come online.
        let _turn = array.turn.take(worker).await;
        let (sequence, phase, deleting) = {
            let state = lock(&array.state);
            (state.sequence, state.phase, state.deleting)
        };
        if deleting {
            return Err(BdevError::Removing(array.name.clone()));
        }
        if sequence == 0 {
            return Err(BdevError::invalid("superblock", format!("on bdev {name}"), format!("none: raid bdev {} has none", array.name)));
        }
        if found.header.seq_number.get() <= sequence {
            return Ok(array.clone());
        }
        if phase != Phase::Configuring {
            let what = format!("raid bdev {} is {}, and the superblock of bdev {name} is newer", array.name, phase.name());
            return Err(os(libc::EBUSY, what));
        }
        self.discard(&array);
        self.array_of(found)
    }

    /// The array that a superblock tells of.
    fn array_of(&self, found: &Superblock) -> Result<Arc<Array>, BdevError> {
        let header = &found.header;
        let slots = usize::from(header.num_base_bdevs);
        let spec = Spec {
            name: header.name().unwrap_or("").to_owned(),
            level: header.level(),
            strip_kb: (u64::from(header.strip_size.get()) * u64::from(header.block_size.get()) / 1024) as u32,
            bases: vec![String::new(); slots],
            uuid: Some(Uuid::from_bytes(header.uuid)),
            superblock: true,
        };
        let array = self.array(&spec)?;
        let mut state = lock(&array.state);
        (state.sequence, state.num_blocks, state.block_size) = (header.seq_number.get(), header.raid_size.get(), header.block_size.get());
        state.slots.iter_mut().for_each(|slot| *slot = Slot::default());
        state.operational = 0;
        for base in &found.bases {
            let slot = &mut state.slots[usize::from(base.slot)];
            slot.entry = Some(*base);
            slot.data_size = base.data_size.get();
            if base.state() == BaseState::CONFIGURED {
                (slot.uuid, slot.data_offset) = (Some(Uuid::from_bytes(base.uuid)), base.data_offset.get());
            }
        }
        state.operational = state.slots.iter().filter(|slot| slot.uuid.is_some()).count();
        if state.operational == 0 || (array.level != Level::RAID1 && state.operational != slots) {
            let value = state.operational;
            drop(state);
            self.discard(&array);
            return Err(BdevError::invalid("superblock", format!("with {value} current base bdevs"), "enough for its level"));
        }
        drop(state);
        Ok(array)
    }

    /// Gives a bdev the slot that the array's superblock has for it.
    async fn admit(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>, name: &str, uuid: Uuid) -> Result<bool, BdevError> {
        let _turn = array.turn.take(worker).await;
        let (slot, phase) = {
            let mut state = lock(&array.state);
            let (phase, busy) = (state.phase, state.process.is_some());
            let recorded = |slot: &Slot| slot.recorded().filter(|(recorded, _)| *recorded == uuid).map(|(_, state)| state);
            let Some(number) = state.slots.iter().position(|slot| recorded(slot).is_some()) else {
                return Err(BdevError::invalid("uuid", format!("{uuid} of bdev {name}"), format!("one of raid bdev {}'s superblock", array.name)));
            };
            let current = recorded(&state.slots[number]) == Some(BaseState::CONFIGURED);
            let slot = &mut state.slots[number];
            if slot.member.is_some() {
                return if slot.name.as_deref() == Some(name) { Ok(true) } else { Err(BdevError::Exists(name.to_owned())) };
            }
            match phase {
                Phase::Configuring if current => {}
                Phase::Online if slot.is_empty() && !busy => (slot.name, slot.uuid) = (Some(name.to_owned()), Some(uuid)),
                // Its turn comes when the array is online, or when the rebuild under way is over.
                _ => return Ok(false),
            }
            (number, phase)
        };
        let outcome = self.configure(worker, array, slot).await;
        if outcome.is_err() && phase == Phase::Online {
            let mut state = lock(&array.state);
            if !state.slots[slot].configured {
                state.slots[slot].clear();
            }
        }
        outcome.map(|()| true)
    }

    /// Looks for the other members of an array among the bdevs there are: first the current ones; once it is online, those that are to be rebuilt.
    async fn gather(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>) {
        for slot in 0..array.slots {
            let wanted = {
                let state = lock(&array.state);
                let slot = &state.slots[slot];
                let current = slot.recorded().filter(|(_, state)| *state == BaseState::CONFIGURED);
                current.filter(|_| slot.member.is_none() && state.phase == Phase::Configuring && !state.deleting)
            };
            if let Some((uuid, _)) = wanted {
                self.admit_found(worker, array, uuid).await;
            }
        }
        if lock(&array.state).phase == Phase::Online {
            let (raids, array, tasks) = (self.clone(), array.clone(), worker.clone());
            worker.spawn(async move { raids.take_back(&tasks, &array).await });
        }
    }

    /// Rebuilds, one after the other, onto the members that were out when the array came online and are there.
    async fn take_back(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>) {
        let out: Vec<Uuid> = {
            let state = lock(&array.state);
            let empty = state.slots.iter().filter(|slot| slot.is_empty());
            empty.filter_map(|slot| slot.recorded().map(|(uuid, _)| uuid)).collect()
        };
        for uuid in out {
            worker.until(|| lock(&array.state).process.is_none().then_some(())).await;
            if lock(&array.state).deleting || lock(&array.state).phase != Phase::Online {
                return;
            }
            self.admit_found(worker, array, uuid).await;
        }
    }

    /// A bdev of that UUID, if it is there, free, and its own superblock is this array's.
    async fn admit_found(self: &Arc<Self>, worker: &Worker, array: &Arc<Array>, uuid: Uuid) {
        let Some(listing) = self.registry.list(Some(&uuid.to_string())).ok().and_then(|mut found| found.pop()) else { return };
        if listing.claimed_by.is_some() || listing.removing {
            return;
        }
        let Ok(reader) = self.registry.open(&listing.info.name, false, |_| {}).map(Arc::new) else { return };
        let found = load(worker, &reader).await;
        drop(reader);
        let Ok(Found::Superblock(found)) = found else { return };
        let sequence = lock(&array.state).sequence;
        if found.header.uuid != array.uuid.into_bytes() || found.header.seq_number.get() > sequence {
            return;
        }
        if let Err(error) = self.admit(worker, array, &listing.info.name, uuid).await {
            log::say(Severity::Warning, "raid", format_args!("{}: bdev {}: {error}", array.name, listing.info.name));
        }
    }
}

fn unseat(array: &Array, slot: usize) {
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

impl Array {
    fn show(&self) -> ArrayInfo {
        let state = lock(&self.state);
        let member = |slot: &Slot| MemberInfo {
            name: slot.name.clone(),
            uuid: slot.uuid.unwrap_or_default(),
            is_configured: slot.configured,
            data_offset: slot.data_offset,
            data_size: slot.data_size,
        };
        let discovered = state.slots.iter().filter(|slot| slot.configured).count();
        ArrayInfo {
            name: self.name.clone(),
            uuid: self.uuid,
            strip_kb: self.strip_kb,
            phase: state.phase,
            level: self.level,
            superblock: self.superblock,
            discovered,
            operational: if state.phase == Phase::Configuring { state.operational } else { discovered },
            process: state.process.as_ref().map(|process| (process.target.clone(), process.blocks, state.num_blocks)),
            members: state.slots.iter().map(member).collect(),
        }
    }
}
