//! A random tree of bdevs: every module there is, upon one another up to the limit, with simulated disks at the bottom.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qpair_bdev::passthru::Passthru;
use qpair_bdev::{BdevError, FRAMES_MAX, Info, Op, OpSet, Registry, lifecycle};
use qpair_raid::{Level, MemberInfo, Options, Phase, Raids, Spec};
use qpair_reactor::sim::{Obligations, Rng, World};
use qpair_simkit::{Plan, Relay, SimDisk, promise};
use qpair_vbdev::delay::{Delay, Latencies};
use qpair_vbdev::error::{ErrorBdev, Errors};
use qpair_vbdev::part::{Part, Range};
use qpair_vbdev::zone_block::ZoneBlock;

/// Blocks before the data of a member that has a superblock, in bytes.
const SUPERBLOCK_BYTES: u64 = 1 << 20;
/// More would only make the world slow.
const DISKS_MAX: usize = 5;
pub const ZONE_BLOCKS: u64 = 16;

pub struct Array {
    pub level: Level,
    strip_kb: u32,
    pub superblock: bool,
    /// Was made once: a mirror without superblocks is not made anew, as nobody knows which of its legs is current.
    created: Arc<AtomicBool>,
}

pub enum Module {
    Disk(Arc<SimDisk>),
    Passthru,
    /// First block of each, and blocks.
    Parts(Vec<(u64, u64)>),
    Delay(Arc<Latencies>),
    Error(Arc<Errors>),
    Zones {
        capacity: u64,
    },
    Raid(Array),
    /// Panics, per mille of calls; and how far it moves its I/O.
    Relay(Arc<AtomicU64>, u64),
}

/// What one module makes, of what is below.
pub struct Floor {
    pub names: Vec<String>,
    pub module: Module,
    pub below: Vec<String>,
}

pub struct Tower {
    pub registry: Arc<Registry>,
    pub raids: Arc<Raids>,
    /// From the bottom up; the last makes "disk".
    pub floors: Vec<Floor>,
    pub block_size: u32,
    wish: Wish,
}

/// Members of arrays are known by their UUIDs: the same one each time that a bdev is made.
fn uuid_of<T: std::str::FromStr>(name: &str) -> Option<T> {
    let digits: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("00000000-0000-4000-8000-{digits:0>12.12}").parse().ok()
}

/// What a tower is to be.
#[derive(Clone, Copy)]
pub struct Wish {
    pub blocks: u64,
    pub zoned: bool,
    /// A mirror whose one leg may fail, at the top.
    pub mirror: bool,
    /// Modules that panic are among the others.
    pub panics: bool,
    /// An error bdev at the top, and no mirror: each block is in one place.
    pub spoils: bool,
}

impl Tower {
    pub fn new(world: &mut World, wish: Wish) -> Self {
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        let block_size = *world.rng().pick(&[512, 512, 512, 1024]);
        let mut tower = Self { registry, raids, floors: Vec::new(), block_size, wish };
        let mut rng = world.rng().fork();
        let height = rng.between(1, FRAMES_MAX as u64 - 1) as usize;
        let zones = if wish.zoned { rng.between(1, 3) as usize } else { 0 };
        let above = zones + usize::from(wish.spoils);
        let base = tower.grow(&mut rng, wish.blocks + 2 * ZONE_BLOCKS, height.saturating_sub(above).max(2), false, wish.mirror);
        if wish.spoils {
            tower.add(Module::Error(Errors::new()), vec![base.clone()], 1);
        }
        if wish.zoned {
            tower.grow_zones(&mut rng, base, wish.blocks, zones);
        }
        let alone = tower.floors.last().filter(|floor| matches!(floor.module, Module::Disk(_))).map(|floor| floor.names[0].clone());
        alone.map(|disk| tower.add(Module::Passthru, vec![disk], 1));
        if let Some(top) = tower.floors.last_mut() {
            top.names[0] = "disk".to_owned();
        }
        // A rebuild copies inner superblocks too: by large steps where there are some.
        let deep = tower.floors.iter().filter(|floor| matches!(&floor.module, Module::Raid(array) if array.superblock)).count() > 1;
        let window_kb = if deep { 1024 } else { *rng.pick(&[4, 16, 1024]) };
        tower.raids.set_options(Options { window_kb, bandwidth_mb: 0 }).unwrap();
        tower
    }

    fn add(&mut self, module: Module, below: Vec<String>, count: usize) -> Vec<String> {
        let number = self.floors.len();
        let names: Vec<String> = (0..count).map(|part| format!("n{number}.{part}")).collect();
        self.floors.push(Floor { names: names.clone(), module, below });
        names
    }

    fn disks(&self) -> usize {
        self.floors.iter().filter(|floor| matches!(floor.module, Module::Disk(_))).count()
    }

    /// Something with at least so many blocks, at most `height` bdevs upon a disk; its name. `superblock`: arrays need one, or those above would be
    /// found in their members' first blocks.
    fn grow(&mut self, rng: &mut Rng, blocks: u64, height: usize, superblock: bool, mirror: bool) -> String {
        if !mirror && (height == 0 || self.disks() >= DISKS_MAX || rng.chance(1, 6)) {
            let disk = self.disk(rng, blocks);
            return self.add(Module::Disk(disk), Vec::new(), 1).remove(0);
        }
        let kind = if mirror { 6 } else { rng.below(8 + 2 * u64::from(self.wish.panics)) };
        let (module, room) = match kind {
            0 => (Module::Passthru, blocks),
            1 => (Module::Delay(Latencies::new([20, 400, 60, 900])), blocks),
            2 => (Module::Error(Errors::new()), blocks),
            3 => {
                let shift = rng.below(8);
                (Module::Parts(vec![(shift, blocks)]), blocks + shift)
            }
            8 | 9 => {
                let shift = rng.below(8);
                (Module::Relay(Arc::default(), shift), blocks + shift)
            }
            _ => return self.grow_raid(rng, blocks, height, superblock, mirror),
        };
        let below = self.grow(rng, room, height - 1, superblock, false);
        self.add(module, vec![below], 1).remove(0)
    }

    fn grow_raid(&mut self, rng: &mut Rng, blocks: u64, height: usize, superblock: bool, mirror: bool) -> String {
        let level = if mirror { Level::RAID1 } else { *rng.pick(&[Level::RAID0, Level::CONCAT, Level::RAID1, Level::RAID1]) };
        let level = if self.wish.spoils && level == Level::RAID1 { Level::RAID0 } else { level };
        let superblock = superblock || rng.chance(1, 4);
        let strip_kb = if level == Level::RAID1 { 0 } else { *rng.pick(&[1, 2, 4]) };
        let members = if level == Level::RAID1 { rng.between(2, 3) } else { rng.between(1, 3) };
        let strip = u64::from(strip_kb) * 1024 / u64::from(self.block_size);
        let data = if level == Level::RAID1 { blocks } else { blocks.div_ceil(members).next_multiple_of(strip.max(1)) };
        let offset = if superblock { SUPERBLOCK_BYTES / u64::from(self.block_size) } else { 0 };
        // A member's borders may ask for data that begin with one.
        let each = data + if superblock { (offset + 8).next_multiple_of(8) } else { 0 };
        // All of them parts of one bdev, or each on its own.
        let below: Vec<String> = if height > 1 && !mirror && rng.chance(1, 4) {
            let whole = self.grow(rng, each * members, height - 2, superblock, false);
            let ranges = (0..members).map(|part| (part * each, each)).collect();
            self.add(Module::Parts(ranges), vec![whole], members as usize)
        } else {
            (0..members).map(|_| self.grow(rng, each, height - 1, superblock, false)).collect()
        };
        let array = Array { level, strip_kb, superblock, created: Arc::default() };
        self.add(Module::Raid(array), below, 1).remove(0)
    }

    fn grow_zones(&mut self, rng: &mut Rng, base: String, blocks: u64, count: usize) {
        let capacity = *rng.pick(&[12, ZONE_BLOCKS]);
        let mut below = self.add(Module::Zones { capacity }, vec![base], 1).remove(0);
        for _ in 1..count {
            let module = match rng.below(4) {
                0 => Module::Passthru,
                1 => Module::Delay(Latencies::new([20, 400, 60, 900])),
                2 => Module::Error(Errors::new()),
                _ => Module::Parts(vec![(0, blocks)]),
            };
            below = self.add(module, vec![below], 1).remove(0);
        }
    }

    fn disk(&self, rng: &mut Rng, blocks: u64) -> Arc<SimDisk> {
        let number = self.floors.len();
        let mut info = Info::new(&format!("n{number}.0"), "sim", self.block_size, blocks + rng.below(16));
        info.uuid = uuid_of(&info.name).unwrap_or(info.uuid);
        info.queue_depth = *rng.pick(&[0, 1, 3, 16]);
        info.max_io_blocks = *rng.pick(&[0, 0, 1, 3, 8]);
        info.max_unmap_blocks = *rng.pick(&[0, 0, 5]);
        info.write_cache = rng.chance(1, 2);
        let mut ops = vec![Op::Read, Op::Write, Op::Flush, Op::Reset];
        // A mirror that started without those that cannot unmap refuses them afterwards: then it is not whole again.
        ops.extend([Op::Unmap, Op::WriteZeroes].into_iter().filter(|_| self.wish.mirror || rng.chance(2, 3)));
        // All disks of a tower are alike in this: what is made anew on other members may do what it did, or clients would expect refusals in vain.
        let before = self.floors.iter().find_map(|floor| match &floor.module {
            Module::Disk(disk) => Some(disk.info.supported),
            _ => None,
        });
        info.supported = before.unwrap_or_else(|| OpSet::of(&ops));
        SimDisk::new(info, Plan { delay_ns: *rng.pick(&[0, 20_000, 100_000]), ..Plan::default() })
    }

    /// How many error bdevs there are.
    pub fn errors(&self) -> usize {
        self.floors.iter().filter(|floor| matches!(floor.module, Module::Error(_))).count()
    }

    pub fn is_mirrored(&self) -> bool {
        self.floors.iter().any(|floor| matches!(&floor.module, Module::Raid(array) if array.level == Level::RAID1))
    }

    /// Whether what lies where depends on how large members are: then they keep their sizes.
    pub fn keeps_sizes(&self) -> bool {
        self.floors.iter().any(|floor| match &floor.module {
            Module::Zones { .. } => true,
            Module::Raid(array) => array.level == Level::CONCAT,
            _ => false,
        })
    }

    pub fn floor(&self, name: &str) -> Option<&Floor> {
        self.floors.iter().find(|floor| floor.names.iter().any(|other| other == name))
    }

    /// That bdev and all below it.
    pub fn under(&self, name: &str) -> Vec<String> {
        let mut found = vec![name.to_owned()];
        if let Some(floor) = self.floor(name) {
            found.extend(floor.below.iter().flat_map(|below| self.under(below)));
        }
        found
    }

    fn is_there(&self, name: &str) -> bool {
        self.registry.list(Some(name)).is_ok_and(|found| found.iter().all(|found| !found.removing))
    }

    /// Registers and asks for what is missing, as far as what is below it is there.
    pub fn build(&self, ledger: &Obligations) {
        for floor in &self.floors {
            if let Module::Raid(array) = &floor.module {
                self.build_array(floor, array, ledger);
            } else if !floor.names.iter().all(|name| self.is_there(name)) {
                // Parts of one bdev share its claim, and are made together.
                for part in floor.names.iter().filter(|name| floor.names.len() > 1 && self.is_there(name)) {
                    lifecycle::unregister(&self.registry, part, 0, promise(ledger, |_| true));
                }
                let built = self.register(floor);
                let passable = |error: &BdevError| {
                    matches!(
                        error,
                        BdevError::Exists(_)
                            | BdevError::Claimed { .. }
                            | BdevError::NoSuchBdev(_)
                            | BdevError::Removing(_)
                            | BdevError::Invalid { .. }
                    )
                };
                assert!(built.is_ok() || built.as_ref().is_err_and(passable), "{:?}: {built:?}", floor.names);
            }
        }
    }

    fn register(&self, floor: &Floor) -> Result<(), BdevError> {
        let (registry, name) = (&self.registry, &floor.names[0]);
        let below = floor.below.first().map_or("", String::as_str);
        match &floor.module {
            Module::Disk(disk) => registry.register(disk.clone()).map(drop),
            Module::Passthru => registry.register(Arc::new(Passthru::new(registry, name, below, uuid_of(name))?)).map(drop),
            Module::Delay(latencies) => {
                registry.register(Arc::new(Delay::new(registry, name, below, uuid_of(name), latencies.clone())?)).map(drop)
            }
            Module::Error(errors) => {
                registry.register(Arc::new(ErrorBdev::new(registry, name, below, uuid_of(name), errors.clone())?)).map(drop)
            }
            Module::Zones { capacity } => {
                registry.register(Arc::new(ZoneBlock::new(registry, name, below, uuid_of(name), *capacity, 1)?)).map(drop)
            }
            Module::Parts(ranges) => {
                let range = |(name, (offset_blocks, num_blocks)): (&String, &(u64, u64))| Range {
                    name: name.clone(),
                    offset_blocks: *offset_blocks,
                    num_blocks: *num_blocks,
                    uuid: uuid_of(name),
                };
                let ranges: Vec<Range> = floor.names.iter().zip(ranges).map(range).collect();
                Part::cut(registry, below, "split", &ranges)?.into_iter().try_for_each(|part| registry.register(Arc::new(part)).map(drop))
            }
            Module::Relay(panics, shift) => {
                let mut relay = Relay::new(registry, name, below, *shift, panics)?;
                relay.info.uuid = uuid_of(name).unwrap_or(relay.info.uuid);
                registry.register(Arc::new(relay)).map(drop)
            }
            Module::Raid(_) => Ok(()),
        }
    }

    fn build_array(&self, floor: &Floor, array: &Array, ledger: &Obligations) {
        let name = &floor.names[0];
        let known = self.raids.list().into_iter().find(|known| known.name == *name);
        let there: Vec<&String> = floor.below.iter().filter(|member| self.is_there(member)).collect();
        let examine = || there.iter().for_each(|member| self.raids.examine(member, promise(ledger, |_: &Result<bool, _>| true)));
        match known {
            Some(known) if known.phase == Phase::Offline => self.raids.delete(name, false, promise(ledger, |_| true)),
            Some(known) if known.phase == Phase::Online => {
                let has = |member: &str| known.members.iter().any(|slot| slot.name.as_deref() == Some(member));
                for member in there.iter().filter(|member| array.level == Level::RAID1 && !has(member)) {
                    self.raids.add_base(name, member, promise(ledger, |_| true));
                }
            }
            Some(_) => examine(),
            None if array.created.load(Ordering::Relaxed) && array.superblock => examine(),
            // In a leg that is rebuilt as a whole, its content does not matter.
            None if array.created.load(Ordering::Relaxed) && array.level == Level::RAID1 && !self.wish.mirror => {}
            None if there.len() < floor.below.len() => {}
            None => {
                let Array { level, strip_kb, superblock, .. } = *array;
                let spec = Spec { name: name.clone(), level, strip_kb, bases: floor.below.clone(), uuid: uuid_of(name), superblock };
                let created = array.created.clone();
                let made = move |outcome: &Result<(), BdevError>| {
                    created.fetch_or(outcome.is_ok(), Ordering::Relaxed);
                    true
                };
                self.raids.create(spec, promise(ledger, made));
            }
        }
    }

    /// All disks well, no injected errors, nothing held; everything polled.
    pub fn heal(&self, ledger: &Obligations) {
        for floor in &self.floors {
            match &floor.module {
                Module::Disk(disk) => disk.illness.ends(),
                Module::Error(errors) => {
                    errors.resume();
                    errors.clear();
                }
                Module::Relay(panics, _) => panics.store(0, Ordering::SeqCst),
                _ => {}
            }
        }
        for listing in self.registry.list(None).unwrap() {
            if let Some(Floor { module: Module::Disk(disk), .. }) = self.floor(&listing.info.name)
                && listing.info.num_blocks != disk.info.num_blocks
            {
                lifecycle::resize(&self.registry, &disk.info.name, disk.info.num_blocks, promise(ledger, |_| true));
            }
            lifecycle::poke(&self.registry, listing.id, promise(ledger, |_| true));
        }
    }

    /// Builds until nothing more appears; whether the top is there.
    pub fn finish(&self, world: &mut World) -> bool {
        let ledger = world.obligations().clone();
        for _ in 0..2 * FRAMES_MAX {
            self.heal(&ledger);
            self.build(&ledger);
            world.settle();
            if self.is_whole() {
                return true;
            }
        }
        false
    }

    /// What stands on what.
    pub fn plan(&self) -> String {
        let module = |floor: &Floor| match &floor.module {
            Module::Disk(disk) => format!("disk of {} blocks", disk.info.num_blocks),
            Module::Passthru => "passthru".to_owned(),
            Module::Parts(ranges) => format!("parts {ranges:?}"),
            Module::Delay(_) => "delay".to_owned(),
            Module::Error(_) => "error".to_owned(),
            Module::Zones { capacity } => format!("zones of {capacity}"),
            Module::Relay(_, shift) => format!("relay by {shift}"),
            Module::Raid(array) => format!("{:?} strip {} superblock {}", array.level, array.strip_kb, array.superblock),
        };
        let line = |floor: &Floor| format!("{} {} over {}", floor.names.join(" "), module(floor), floor.below.join(" "));
        self.floors.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// What is not there, and why not.
    pub fn lacks(&self) -> String {
        let missing = self.floors.iter().filter(|floor| !floor.names.iter().all(|name| self.is_there(name)));
        let bdevs = missing.map(|floor| format!("{:?} over {:?}: {:?}", floor.names, floor.below, self.register(floor)));
        let arrays = self.raids.list().into_iter().map(|array| {
            let members: Vec<_> = array.members.iter().map(|member| (member.name.clone(), member.is_configured)).collect();
            format!("{} {:?} {:?} of {members:?}", array.name, array.phase, array.process)
        });
        bdevs.chain(arrays).collect::<Vec<_>>().join("\n")
    }

    /// The top is there, disks are as large as they were, and no mirror waits for a leg or rebuilds one.
    pub fn is_whole(&self) -> bool {
        let whole = |array: &qpair_raid::ArrayInfo| {
            array.phase == Phase::Online && array.process.is_none() && array.members.iter().all(|member| member.is_configured)
        };
        let large =
            |floor: &Floor| !matches!(&floor.module, Module::Disk(disk) if self.blocks(&disk.info.name) != Some(disk.info.num_blocks));
        self.is_there("disk") && self.floors.iter().all(large) && self.raids.list().iter().all(whole)
    }

    fn blocks(&self, name: &str) -> Option<u64> {
        self.registry.list(Some(name)).ok().map(|found| found[0].info.num_blocks)
    }

    /// How many blocks a floor should have by what it stands on just now; None: nobody says.
    fn due_blocks(&self, floor: &Floor) -> Option<u64> {
        let below = self.blocks(floor.below.first()?)?;
        match &floor.module {
            Module::Disk(_) | Module::Zones { .. } => None,
            Module::Passthru | Module::Delay(_) | Module::Error(_) => Some(below),
            Module::Relay(_, shift) => Some(below.saturating_sub(*shift)),
            Module::Parts(ranges) => ranges.first().map(|(first, count)| below.saturating_sub(*first).min(*count)),
            Module::Raid(array) => {
                let known = self.raids.list().into_iter().find(|known| known.name == floor.names[0])?;
                let room = |slot: &MemberInfo| Some(self.blocks(slot.name.as_ref()?)?.saturating_sub(slot.data_offset));
                let least = known.members.iter().filter(|slot| slot.is_configured).filter_map(room).min()?;
                let strip = (u64::from(array.strip_kb) * 1024 / u64::from(self.block_size)).max(1);
                match array.level {
                    Level::RAID1 => Some(least),
                    Level::RAID0 => Some((least - least % strip) * known.members.len() as u64),
                    _ => None,
                }
            }
        }
    }

    /// How many of a bdev's first blocks have been there all the time, when disks were as small as `least` says.
    pub fn kept_blocks(&self, name: &str, least: &BTreeMap<String, u64>) -> u64 {
        let Some(floor) = self.floor(name) else { return 0 };
        let below = floor.below.iter().map(|base| self.kept_blocks(base, least)).min().unwrap_or(0);
        match &floor.module {
            Module::Disk(disk) => least.get(name).copied().unwrap_or(disk.info.num_blocks),
            Module::Passthru | Module::Delay(_) | Module::Error(_) | Module::Zones { .. } => below,
            Module::Relay(_, shift) => below.saturating_sub(*shift),
            Module::Parts(ranges) => {
                let part = floor.names.iter().position(|part| part == name).map_or((0, 0), |at| ranges[at]);
                below.saturating_sub(part.0).min(part.1)
            }
            Module::Raid(array) => {
                let offset = if array.superblock { SUPERBLOCK_BYTES / u64::from(self.block_size) } else { 0 };
                let strip = (u64::from(array.strip_kb) * 1024 / u64::from(self.block_size)).max(1);
                let each = below.saturating_sub(offset);
                if array.level == Level::RAID1 { each } else { (each - each % strip) * floor.below.len() as u64 }
            }
        }
    }

    /// Bdevs that have another size than they should: name, blocks, and how many there should be.
    pub fn misfits(&self) -> Vec<(String, u64, u64)> {
        let misfit = |floor: &Floor| {
            let (name, due) = (floor.names[0].clone(), self.due_blocks(floor)?);
            let blocks = self.blocks(&name)?;
            (blocks != due).then_some((name, blocks, due))
        };
        self.floors.iter().filter_map(misfit).collect()
    }

    pub fn demolish(&self, world: &mut World) {
        let ledger = world.obligations().clone();
        for array in self.raids.list() {
            self.raids.delete(&array.name, false, promise(&ledger, |_| true));
        }
        world.settle();
        while let Some(listing) = self.registry.list(None).unwrap().pop() {
            lifecycle::unregister(&self.registry, &listing.info.name, 0, promise(&ledger, Result::is_ok));
            world.settle();
            for array in self.raids.list() {
                self.raids.delete(&array.name, false, promise(&ledger, |_| true));
            }
            world.settle();
        }
        assert!(self.raids.list().is_empty(), "{:?}", self.raids.list());
        for floor in &self.floors {
            if let Module::Disk(disk) = &floor.module {
                disk.check_end();
            }
        }
    }
}
