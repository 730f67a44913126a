//! An array: what is known of it, from being asked for until it is deleted; and the bdev that it is while it is online.
//!
//! State is changed by tasks on the home reactor, and read from anywhere under a lock that is never held while something is waited for. What I/O
//! goes by is the [`View`] alone.
//!
//! **How large it is.** As large as its smallest member has room for, in whole strips and write units. It learns that when the layer says that a member has
//! another size. But a member may change while it is no member, or while the array is no bdev yet: so it looks for itself, too, when it has come online and
//! when a leg is current again. A mirror shrinks with any member it has, and grows only when none is out: one that came back would have no room for it, and of
//! a leg that is out nobody knows how large it is. Both looks and the layer's word end in the same job, which goes by what is true when it runs, so their order
//! does not matter. concat keeps its size. What has no room for a block stays as it was, and its I/O is told that it is out of range.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, DeviceId, Fate, Hold, Info, Layer, Op, OpSet, Registry, lifecycle};
use qpair_reactor::{Handle, Reactor};
use qpair_wire::raid_superblock::{Base, BaseState, Level};
use uuid::Uuid;

use crate::geometry::Layout;
use crate::mask::Mask;
use crate::mirror::{Mirror, MirrorChannel};
use crate::striped::Striped;
use crate::view::View;
use crate::worker::{self, Turn};

/// Repairs that wait; more are not remembered.
const REPAIRS_MAX: usize = 1024;

/// For what has no business panicking while it is held.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How background work is done; what is under way goes by what was set when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// What a rebuild has for itself at a time, in KiB.
    pub window_kb: u32,
    /// MiB a second that a rebuild writes at most; 0: no limit.
    pub bandwidth_mb: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { window_kb: 1024, bandwidth_mb: 0 }
    }
}

/// Where an array is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A bdev.
    Online,
    /// Members are missing.
    Configuring,
    /// Was a bdev.
    Offline,
}

impl Phase {
    /// SPDK's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Configuring => "configuring",
            Self::Offline => "offline",
        }
    }
}

/// One place for a member.
#[derive(Clone, Default)]
pub(crate) struct Slot {
    pub name: Option<String>,
    /// Of the member, or of the one that is waited for.
    pub uuid: Option<Uuid>,
    pub member: Option<Arc<Descriptor>>,
    pub configured: bool,
    pub data_offset: u64,
    pub data_size: u64,
    /// As the superblock has it.
    pub entry: Option<Base>,
    /// What the member did last that it may be dropped for.
    pub blame: Option<String>,
}

impl Slot {
    /// Nobody is here, and nobody in particular is waited for.
    pub(crate) fn is_empty(&self) -> bool {
        self.name.is_none() && self.uuid.is_none()
    }

    /// The member goes; what the superblock says stays.
    pub(crate) fn clear(&mut self) {
        let (entry, data_size) = (self.entry, self.data_size);
        *self = Self { entry, data_size, ..Self::default() };
    }

    pub(crate) fn recorded(&self) -> Option<(Uuid, BaseState)> {
        self.entry.map(|entry| (Uuid::from_bytes(entry.uuid), entry.state()))
    }
}

/// A rebuild under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub slot: usize,
    pub target: String,
    pub blocks: u64,
}

/// A range on which legs may differ.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Repair {
    /// Which get it written.
    pub slots: Mask,
    /// From one of these, if any serves.
    pub source: Mask,
    pub lba: u64,
    pub blocks: u64,
}

pub(crate) struct State {
    pub phase: Phase,
    pub slots: Vec<Slot>,
    pub view: Arc<View>,
    pub device: Option<DeviceId>,
    pub block_size: u32,
    pub num_blocks: u64,
    /// How many members make it start.
    pub operational: usize,
    /// Of the superblock; 0: there is none yet.
    pub sequence: u64,
    pub process: Option<Process>,
    pub deleting: bool,
    /// Legs to be dropped, as they were when they failed.
    pub reported: Vec<(usize, Weak<Descriptor>)>,
    pub reconciling: bool,
    pub repairs: VecDeque<Repair>,
    pub repairing: bool,
}

/// See the module's doc.
pub(crate) struct Array {
    pub id: u64,
    pub name: String,
    pub uuid: Uuid,
    pub level: Level,
    pub slots: usize,
    pub strip_kb: u32,
    pub superblock: bool,
    pub registry: Arc<Registry>,
    pub options: Arc<Mutex<Options>>,
    /// The process ends: nobody is missed.
    pub ending: Arc<AtomicBool>,
    pub state: Mutex<State>,
    /// For what changes members or superblocks.
    pub turn: Turn,
}

impl Array {
    pub(crate) fn home(&self) -> &Handle {
        &self.registry.reactors()[0]
    }

    /// Data blocks a strip.
    pub(crate) fn strip_blocks(&self, block_size: u32) -> u32 {
        (u64::from(self.strip_kb) * 1024 / u64::from(block_size)) as u32
    }

    pub(crate) fn layout(&self) -> Layout {
        let state = lock(&self.state);
        let sizes: Vec<u64> = state.slots.iter().map(|slot| slot.data_size).collect();
        Layout::new(self.level, self.strip_blocks(state.block_size).max(1), &sizes)
    }

    /// Says that it cannot do what it should. Each call is told.
    pub(crate) fn tell_failure(&self, reason: String) {
        let device = lock(&self.state).device;
        if let Some(device) = device {
            self.registry.report_failure(device, reason);
        }
    }

    /// What will be said of members if they are dropped.
    pub(crate) fn blame(&self, slots: Mask, why: &str) {
        let mut state = lock(&self.state);
        slots.slots().for_each(|slot| state.slots[slot].blame = Some(why.to_owned()));
    }

    /// Legs are to be dropped, those of that view, and why: writes wait for that.
    pub(crate) fn report(self: &Arc<Self>, slots: Mask, view: &View, why: &str) {
        let mut state = lock(&self.state);
        for slot in slots.slots() {
            // What came first is the reason: a write that misses it is what follows from that.
            state.slots[slot].blame.get_or_insert_with(|| why.to_owned());
            let member = view.members[slot].as_ref().map(Arc::downgrade).unwrap_or_default();
            if !state.reported.iter().any(|(other, known)| *other == slot && known.ptr_eq(&member)) {
                state.reported.push((slot, member));
            }
        }
        if !std::mem::replace(&mut state.reconciling, true) {
            let array = self.clone();
            worker::start(self.home(), move |worker| async move { array.reconcile(&worker).await });
        }
    }

    /// Legs are to be made equal.
    pub(crate) fn repair(self: &Arc<Self>, repair: Repair) {
        let mut state = lock(&self.state);
        if state.repairs.len() < REPAIRS_MAX {
            state.repairs.push_back(repair);
        }
        if !std::mem::replace(&mut state.repairing, true) {
            let array = self.clone();
            worker::start(self.home(), move |worker| async move { array.run_repairs(&worker).await });
        }
    }

    /// What the members there are allow: blocks of data each, and of the whole. None: that does not follow its members' sizes.
    pub(crate) fn sizes(&self, state: &State) -> (Vec<u64>, u64) {
        let strip = u64::from(self.strip_blocks(state.block_size).max(1));
        let cut = |size: u64| size - size % strip;
        let sizes: Vec<u64> = state.slots.iter().map(|slot| slot.data_size).collect();
        let least = state.slots.iter().filter(|slot| slot.data_size != 0).map(|slot| slot.data_size).min().unwrap_or(0);
        match self.level {
            Level::RAID1 => {
                let units = state.slots.iter().filter_map(|slot| Some(slot.member.as_ref()?.info()?.write_unit_blocks));
                let least = least - least % u64::from(units.max().unwrap_or(1));
                (vec![least; sizes.len()], least)
            }
            Level::CONCAT => {
                let sizes: Vec<u64> = sizes.into_iter().map(cut).collect();
                let sum = sizes.iter().sum();
                (sizes, sum)
            }
            _ => (vec![cut(least); sizes.len()], cut(least) * sizes.len() as u64),
        }
    }

    /// How many blocks it has by the present sizes of its members, in units that it is written in; see the module's doc.
    fn wanted_blocks(&self, unit: u64) -> Option<u64> {
        let state = lock(&self.state);
        let room = |slot: &Slot| Some(slot.member.as_ref()?.info()?.num_blocks.saturating_sub(slot.data_offset));
        let least = state.slots.iter().filter_map(room).min()?;
        let strip = u64::from(self.strip_blocks(state.block_size).max(1));
        let whole = state.view.serving.count() == self.slots;
        match self.level {
            Level::RAID1 if whole => Some(least - least % unit),
            Level::RAID1 => Some((least - least % unit).min(state.num_blocks)),
            Level::RAID0 => {
                let blocks = (least - least % strip) * self.slots as u64;
                Some(blocks - blocks % unit)
            }
            _ => None,
        }
    }

    /// Has the bdev take the size that its members allow by now: they may have changed while nobody told it.
    pub(crate) fn follow_sizes(&self) {
        lifecycle::rescan(&self.registry, &self.name, Box::new(|_| {}));
    }

    /// The bdev that it is: what all its members can do.
    pub(crate) fn describe(&self) -> Result<Info, BdevError> {
        let state = lock(&self.state);
        let members: Vec<Arc<Info>> = state.slots.iter().filter_map(|slot| slot.member.as_ref()?.info()).collect();
        let first = members.first().ok_or_else(|| BdevError::NoSuchBdev(self.name.clone()))?;
        let mut info = Info::over(first, &self.name, "raid");
        (info.uuid, info.num_blocks, info.optimal_io_boundary) = (self.uuid, state.num_blocks, 0);
        info.bases = members.iter().map(|member| member.name.clone()).collect();
        info.depth = members.iter().map(|member| member.depth).max().unwrap_or(0).saturating_add(1);
        info.physical_block_size = members.iter().map(|member| member.physical_block_size).max().unwrap_or(info.block_size);
        info.write_unit_blocks = members.iter().map(|member| member.write_unit_blocks).max().unwrap_or(1);
        info.zoned = None;
        info.readonly = members.iter().any(|member| member.readonly);
        // A mirror's legs come and go: any of them may have a cache.
        info.write_cache = self.level == Level::RAID1 || members.iter().any(|member| member.write_cache);
        let mut ops = vec![Op::Read, Op::Write, Op::WriteZeroes, Op::Flush, Op::Reset];
        if members.iter().all(|member| member.supported.has(Op::Unmap)) {
            ops.push(Op::Unmap);
        }
        info.supported = OpSet::of(&ops);
        if self.level == Level::CONCAT || (self.level == Level::RAID0 && self.slots > 1) {
            (info.optimal_io_boundary, info.split_on_boundary) = (self.strip_blocks(info.block_size), true);
        }
        for member in &members {
            self.fits(&info, member)?;
        }
        Ok(info)
    }

    /// Whether a bdev can be a member of what the array is.
    pub(crate) fn fits(&self, info: &Info, member: &Info) -> Result<(), BdevError> {
        let refuse = |what: &'static str, value: u64, limit: String| {
            Err(BdevError::Invalid { field: what, value: format!("{value} of base bdev {}", member.name), limit })
        };
        if member.block_size != info.block_size {
            return refuse("block_size", member.block_size.into(), format!("the array's {}", info.block_size));
        }
        if member.metadata_bytes != info.metadata_bytes {
            return refuse("metadata_bytes", member.metadata_bytes.into(), format!("the array's {}", info.metadata_bytes));
        }
        if !info.write_unit_blocks.is_multiple_of(member.write_unit_blocks) {
            return refuse("write_unit_blocks", member.write_unit_blocks.into(), format!("a divisor of {}", info.write_unit_blocks));
        }
        if member.zoned.is_some() {
            return refuse("zoned", 1, "0: zones cannot be members".to_owned());
        }
        if member.readonly && !info.readonly {
            return refuse("readonly", 1, "writable, as the array is".to_owned());
        }
        if info.supported.has(Op::Unmap) && !member.supported.has(Op::Unmap) {
            return refuse("unmap", 0, "supported, as by the array".to_owned());
        }
        if member.write_cache && !member.supported.has(Op::Flush) {
            return refuse("flush", 0, "supported by a bdev with a write cache".to_owned());
        }
        Ok(())
    }

    /// The bdevs that it stands on have changed.
    pub(crate) fn tell_bases(&self) {
        let state = lock(&self.state);
        let bases = state.slots.iter().filter(|slot| slot.member.is_some()).filter_map(|slot| slot.name.clone()).collect();
        let device = state.device;
        drop(state);
        if let Some(device) = device {
            self.registry.set_bases(device, bases);
        }
    }
}

/// The bdev.
pub(crate) struct RaidDevice {
    pub array: Arc<Array>,
    pub info: Info,
}

impl RaidDevice {
    fn wanted_blocks(&self) -> Option<u64> {
        self.array.wanted_blocks(self.info.write_unit_blocks.into())
    }
}

impl Drop for RaidDevice {
    fn drop(&mut self) {
        let mut state = lock(&self.array.state);
        if state.phase == Phase::Online {
            (state.phase, state.device) = (Phase::Offline, None);
        }
        drop(state);
        self.array.home().call(worker::Worker::wake);
    }
}

impl Device for RaidDevice {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        if self.array.level == Level::RAID1 {
            return Ok(Box::new(MirrorChannel(Mirror::open(&self.array, layer, reactor, id))));
        }
        Ok(Box::new(Striped::open(&self.array, layer, reactor, id)?))
    }

    fn base_removing(&self, base: &str, hold: Hold) -> Fate {
        let array = &self.array;
        let state = lock(&array.state);
        let Some(slot) = state.slots.iter().position(|slot| slot.name.as_deref() == Some(base)) else { return Fate::Stays };
        let others = !state.view.serving.minus(Mask::of(slot)).is_empty();
        drop(state);
        let ending = array.ending.load(Ordering::Acquire);
        if array.level != Level::RAID1 || !others || ending {
            if !ending {
                array.tell_failure(format!("base bdev {base} in slot {slot} is gone, and the array goes offline without it"));
            }
            return Fate::Goes;
        }
        let base = base.to_owned();
        let array = array.clone();
        worker::start(&array.home().clone(), move |worker| async move {
            let hold = Arc::new(hold);
            let refused = array.leave(&worker, Mask::of(slot), BaseState::MISSING, Some(hold.clone())).await;
            if !refused.is_empty() {
                // The others went meanwhile.
                array.tell_failure(format!("base bdev {base} in slot {slot} is gone after all others: the array goes offline"));
                lifecycle::unregister(&array.registry, &array.name, 0, Box::new(move |_| drop(hold)));
            }
        });
        Fate::Stays
    }

    fn resets_bases(&self) -> bool {
        true
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        Ok(self.wanted_blocks().unwrap_or_else(|| lock(&self.array.state).num_blocks))
    }

    fn base_resized(&self, _: &Info) -> Option<u64> {
        self.wanted_blocks().filter(|wanted| *wanted != lock(&self.array.state).num_blocks)
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let wanted = self.wanted_blocks();
        if wanted != Some(num_blocks) {
            let limit = wanted.map_or_else(|| "the sum of its members".to_owned(), |wanted| format!("{wanted}, by its members"));
            return Err(BdevError::invalid("num_blocks", num_blocks, limit));
        }
        let array = self.array.clone();
        {
            let mut state = lock(&array.state);
            state.num_blocks = num_blocks;
            let each = if array.level == Level::RAID0 { num_blocks / array.slots as u64 } else { num_blocks };
            state.slots.iter_mut().for_each(|slot| slot.data_size = each);
        }
        if array.superblock {
            worker::start(&array.home().clone(), move |worker| async move { array.write_anew(&worker).await });
        }
        Ok(())
    }
}
