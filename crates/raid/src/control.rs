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
use qpair_bdev::{BdevError, Registry};
use qpair_wire::raid_superblock::{BASES_MAX, BaseState, Level, NAME_BYTES};
use uuid::Uuid;

use crate::array::{Array, Options, Phase, Slot, State, lock};
use crate::mask::Mask;
use crate::seats::unseat;
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
    pub(crate) registry: Arc<Registry>,
    options: Arc<Mutex<Options>>,
    pub(crate) arrays: Mutex<Vec<Arc<Array>>>,
    next: AtomicU64,
    ending: Arc<AtomicBool>,
}

pub(crate) fn os(errno: i32, what: String) -> BdevError {
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

    /// Starts a mirror that waits for members without them. The last resort: what the missing ones alone had is lost, also if it was acknowledged.
    pub fn start(self: &Arc<Self>, array: &str, reply: Reply<()>) {
        let name = array.to_owned();
        self.task(array, reply, |raids, worker| async move { raids.start_now(&worker, &name).await });
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

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Array>> {
        lock(&self.arrays).iter().find(|array| array.name == name).cloned()
    }

    fn forget(&self, array: &Arc<Array>) {
        lock(&self.arrays).retain(|other| !Arc::ptr_eq(other, array));
    }

    /// Members that went without a word while their array was no bdev.
    pub(crate) fn sweep(&self) {
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

    pub(crate) fn array(&self, spec: &Spec) -> Result<Arc<Array>, BdevError> {
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
            reported: Vec::new(),
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
    pub(crate) fn discard(&self, array: &Arc<Array>) {
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

    // ---- changing --------------------------------------------------------------------------------------------------------------

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
            if found.is_none() && configuring && state.sequence != 0 {
                // It would start the array in place of one that is current, as if it were that itself.
                let limit = format!("one that the superblock of raid bdev {name} calls current, as long as it is not online");
                return Err(BdevError::invalid("base_bdev", base, limit));
            }
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
            // It may have come online while this task waited for its turn.
            if lock(&array.state).phase != Phase::Online {
                unseat(&array, slot);
                self.sweep();
                return Ok(());
            }
        }
        if array.level == Level::RAID1 {
            let refused = array.leave(worker, Mask::of(slot), BaseState::MISSING, None).await;
            if refused.is_empty() {
                return Ok(());
            }
        }
        array.tell_failure(format!("base bdev {name} in slot {slot} was removed, and the array goes offline without it"));
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
        // Who finds it set leaves that to who set it: of two that leave at once the second would set it for ever.
        if !before {
            lock(&array.state).deleting = false;
        }
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
