//! What happens to a tower: at random, to anything, or to one leg of the mirror at its top.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use qpair_bdev::histogram::{GRANULARITY, Shape};
use qpair_bdev::limit::Rates;
use qpair_bdev::ranges::{self, Keep, RangeLock};
use qpair_bdev::stats::Reset;
use qpair_bdev::{BdevError, DeviceId, Op, OpSet, Status, lifecycle, measures};
use qpair_reactor::sim::{Act, Actor, Obligations, Rng};
use qpair_simkit::model::{SharedModel, lock};
use qpair_simkit::{SimDisk, promise};
use qpair_vbdev::delay::{Latencies, Latency};
use qpair_vbdev::error::{Errors, TARGETS, What};

use super::tower::{Module, Tower};

/// To whom.
pub enum Target {
    Anything,
    /// One member of the mirror at the top, and what only that stands on.
    Leg {
        member: String,
        names: Vec<String>,
    },
}

impl Target {
    pub fn leg(tower: &Tower, rng: &mut Rng) -> Self {
        let top = tower.floor("disk").expect("the top");
        let member = rng.pick(&top.below).clone();
        let names = tower.under(&member);
        Self::Leg { member, names }
    }
}

/// A range that is had: where, against whom, and until it is given back.
struct Had {
    lock: RangeLock,
    device: DeviceId,
    disk: Option<Arc<SimDisk>>,
    lba: u64,
    blocks: u64,
    keep: Keep,
}

/// The value that data are spoilt with.
pub const SPOILT: u8 = 0x5a;

/// What happens beside all the rest.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    /// Modules panic.
    pub panics: bool,
    /// Data of these are spoilt.
    pub spoils: Option<Op>,
}

/// See the module's doc. After its acts all is well again.
pub struct Storm {
    tower: Arc<Tower>,
    target: Target,
    faults: Faults,
    ledger: Obligations,
    left: u32,
    had: Arc<Mutex<Vec<Had>>>,
    /// One for each lock that was asked for and is not answered.
    asked: Arc<()>,
    /// What clients know.
    models: Vec<SharedModel>,
    /// The smallest size that each disk was told to have.
    least: Mutex<BTreeMap<String, u64>>,
}

impl Storm {
    pub fn new(tower: Arc<Tower>, (target, faults): (Target, Faults), models: Vec<SharedModel>, ledger: Obligations, left: u32) -> Self {
        measures::create_group(&tower.registry, "group", Rates { rw_bytes: 50_000_000, ..Rates::default() }).expect("the first group");
        Self { tower, target, faults, ledger, left, had: Arc::default(), asked: Arc::default(), models, least: Mutex::default() }
    }

    /// The bdevs that something may happen to.
    fn names(&self) -> Vec<String> {
        match &self.target {
            Target::Anything => self.tower.floors.iter().flat_map(|floor| floor.names.clone()).collect(),
            Target::Leg { names, .. } => names.clone(),
        }
    }

    fn modules(&self) -> impl Iterator<Item = &Module> {
        let names = self.names();
        self.tower.floors.iter().filter(move |floor| names.contains(&floor.names[0])).map(|floor| &floor.module)
    }

    fn one<T: Clone>(&self, rng: &mut Rng, of: impl Fn(&Module) -> Option<T>) -> Option<T> {
        let all: Vec<T> = self.modules().filter_map(of).collect();
        (!all.is_empty()).then(|| rng.pick(&all).clone())
    }

    fn disk(&self, rng: &mut Rng) -> Option<Arc<SimDisk>> {
        self.one(rng, |module| if let Module::Disk(disk) = module { Some(disk.clone()) } else { None })
    }

    fn sicken(&self, rng: &mut Rng) {
        use std::sync::atomic::Ordering::SeqCst;
        let Some(disk) = self.disk(rng) else { return };
        let chance = *rng.pick(&[30, 300, 1000]);
        match rng.below(8) {
            0..3 => disk.illness.write_errors.store(chance, SeqCst),
            3..5 => disk.illness.read_errors.store(chance, SeqCst),
            5 => disk.illness.hangs.store(true, SeqCst),
            _ => {
                disk.illness.ends();
                self.poke(&disk.info.name);
            }
        }
    }

    fn poke(&self, name: &str) {
        if let Some(listing) = self.tower.registry.list(Some(name)).ok().and_then(|mut found| found.pop()) {
            lifecycle::poke(&self.tower.registry, listing.id, promise(&self.ledger, |_| true));
        }
    }

    fn inject(&self, rng: &mut Rng) {
        let errors = |module: &Module| if let Module::Error(errors) = module { Some(errors.clone()) } else { None };
        let Some(errors): Option<Arc<Errors>> = self.one(rng, errors) else { return };
        let what = *rng.pick(&[What::Fail(Status::WRITE_FAULT), What::Fail(Status::UNRECOVERED_READ_ERROR), What::Keep, What::PutOff]);
        let ops: Vec<Op> = TARGETS.into_iter().filter(|_| rng.chance(1, 2)).collect();
        match rng.below(3) {
            0 => {
                errors.resume();
                self.names().iter().for_each(|name| self.poke(name));
            }
            _ => errors.inject(&ops, what, rng.below(8) as u32, rng.below(4)).expect("within limits"),
        }
    }

    /// Some calls of a module panic from now on, or all of them.
    fn have_panic(&self, rng: &mut Rng) {
        use std::sync::atomic::Ordering::SeqCst;
        let chance = *rng.pick(&[0, 5, 50, 1000]);
        if rng.chance(1, 2) {
            self.disk(rng).iter().for_each(|disk| disk.illness.panics.store(chance, SeqCst));
        } else {
            let relay = |module: &Module| if let Module::Relay(panics, _) = module { Some(panics.clone()) } else { None };
            self.one(rng, relay).iter().for_each(|panics| panics.store(chance, SeqCst));
        }
    }

    fn spoil(&self, op: Op, rng: &mut Rng) {
        let errors = |module: &Module| if let Module::Error(errors) = module { Some(errors.clone()) } else { None };
        let Some(errors): Option<Arc<Errors>> = self.one(rng, errors) else { return };
        let what = What::Spoil { offset: rng.below(4 * u64::from(self.tower.block_size)), value: SPOILT };
        errors.inject(&[op], what, rng.below(8) as u32, 0).expect("within limits");
    }

    fn slow_down(&self, rng: &mut Rng) {
        let latencies = |module: &Module| if let Module::Delay(latencies) = module { Some(latencies.clone()) } else { None };
        if let Some(latencies) = self.one::<Arc<Latencies>>(rng, latencies) {
            let which = *rng.pick(&[Latency::AverageRead, Latency::AverageWrite, Latency::P99Read, Latency::P99Write]);
            latencies.set(which, rng.below(500));
        }
    }

    fn resize(&self, rng: &mut Rng) {
        // A leg must have room for all that is asked of it.
        let Some(disk) = self.disk(rng).filter(|_| matches!(self.target, Target::Anything) && !self.tower.keeps_sizes()) else { return };
        let blocks = if rng.chance(1, 2) { disk.info.num_blocks - rng.below(disk.info.num_blocks / 2) } else { disk.info.num_blocks };
        let legal = |outcome: &Result<(), BdevError>| outcome.is_ok() || outcome.as_ref().is_err_and(qpair_simkit::is_going);
        self.forget(&disk.info.name, blocks);
        lifecycle::resize(&self.tower.registry, &disk.info.name, blocks, promise(&self.ledger, legal));
    }

    /// What a mirror was without, its legs may differ in when it has it again: a leg that was out meanwhile is rebuilt as far as the mirror goes then.
    fn forget(&self, disk: &str, blocks: u64) {
        let mut least = self.least.lock().unwrap_or_else(PoisonError::into_inner);
        let before = least.entry(disk.to_owned()).or_insert(blocks);
        *before = blocks.min(*before);
        if self.tower.is_mirrored() {
            let kept = self.tower.kept_blocks("disk", &least);
            self.models.iter().for_each(|model| lock(model).forget_from(kept));
        }
    }

    fn remove(&self, rng: &mut Rng) {
        let name = rng.pick(&self.names()).clone();
        let legal = |outcome: &Result<(), BdevError>| outcome.is_ok() || outcome.as_ref().is_err_and(qpair_simkit::is_going);
        lifecycle::unregister(&self.tower.registry, &name, rng.below(300_000), promise(&self.ledger, legal));
    }

    /// A member leaves its array, whatever that means to it.
    fn take_out(&self, rng: &mut Rng) {
        let name = match &self.target {
            Target::Leg { member, .. } => member.clone(),
            Target::Anything => rng.pick(&self.names()).clone(),
        };
        self.tower.raids.remove_base(&name, promise(&self.ledger, |_| true));
    }

    fn measure(&self, rng: &mut Rng) {
        let (registry, names) = (&self.tower.registry, self.tower.floors.iter().flat_map(|floor| &floor.names).collect::<Vec<_>>());
        let (name, reply) = (*rng.pick(&names), promise(&self.ledger, |_: &Result<(), BdevError>| true));
        let mut rates = || [0; 4].map(|_: u64| rng.chance(1, 3).then(|| *rng.pick(&[0, 0, 20_000, 50_000_000, 1 << 40])));
        let (first, second) = (rates(), rates());
        match rng.below(7) {
            0 | 1 => measures::set_limits(registry, name, first, reply),
            2 => measures::join_group(registry, "group", name, reply),
            3 => measures::leave_group(registry, "group", name, reply),
            4 => measures::set_group(registry, "group", second, reply),
            5 => {
                let shape = rng.chance(2, 3).then(|| Shape::new(GRANULARITY, 1000, 1 << 30, OpSet::of(&[Op::Read])).expect("a shape"));
                measures::enable_histogram(registry, name, shape, reply);
            }
            _ => {
                let told = move |outcome: Result<measures::Report, BdevError>| reply(outcome.map(drop));
                measures::statistics(registry, name, Reset::MaxMin, Box::new(told));
            }
        }
    }

    /// Locks a range of any bdev for a while; those of a disk are looked into.
    fn lock(&self, rng: &mut Rng) {
        let Some(listing) = self.tower.registry.list(None).ok().filter(|all| !all.is_empty()).map(|all| rng.pick(&all).clone()) else {
            return;
        };
        let disk = self.tower.floor(&listing.info.name).and_then(|floor| match &floor.module {
            Module::Disk(disk) => Some(disk.clone()),
            _ => None,
        });
        let (lba, blocks) = (rng.below(listing.info.num_blocks), rng.between(1, 40));
        let keep = *rng.pick(&[Keep::Writers, Keep::Everything]);
        let (mine, asked) = (self.had.clone(), self.asked.clone());
        let reply = promise(&self.ledger, |_: &Result<(), BdevError>| true);
        ranges::lock(&self.tower.registry, listing.id, lba, blocks, keep, move |lock| {
            if let Some(lock) = lock {
                mine.lock().unwrap_or_else(PoisonError::into_inner).push(Had { lock, device: listing.id, disk, lba, blocks, keep });
            }
            drop(asked);
            reply(Ok(()));
        });
    }

    /// Nobody is in a range that is had; some are given back, or all.
    fn look_after_locks(&self, rng: &mut Rng, all: bool) {
        let mut had = self.had.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = std::mem::take(&mut *had);
        drop(had);
        for one in taken {
            if let Some(disk) = &one.disk {
                // One that was removed may be registered again, and knows nothing of this lock.
                let same = self.tower.registry.list(Some(&disk.info.name)).is_ok_and(|found| found[0].id == one.device);
                let inside = disk.inside(one.lba, one.blocks, one.keep == Keep::Everything);
                assert!(!same || inside.is_empty(), "{inside:?} in {}+{}, which is had against {:?}", one.lba, one.blocks, one.keep);
            }
            if all || rng.chance(1, 2) {
                drop(one.lock);
            } else {
                self.had.lock().unwrap_or_else(PoisonError::into_inner).push(one);
            }
        }
    }

    /// All is well again, and stays so.
    fn calm(&mut self, now_ns: u64, rng: &mut Rng) -> Act {
        self.tower.heal(&self.ledger);
        self.look_after_locks(rng, true);
        for listing in self.tower.registry.list(None).unwrap_or_default() {
            let none = [Some(0); 4];
            measures::set_limits(&self.tower.registry, &listing.info.name, none, promise(&self.ledger, |_| true));
        }
        // Locks and hanging I/O may still be on their way.
        self.left = 0;
        if Arc::strong_count(&self.asked) > 1 { Act::Until(now_ns + 50_000) } else { Act::Done }
    }
}

impl Actor for Storm {
    fn act(&mut self, now_ns: u64, rng: &mut Rng) -> Act {
        if self.left == 0 {
            return self.calm(now_ns, rng);
        }
        self.left -= 1;
        self.look_after_locks(rng, false);
        if self.faults.panics && rng.chance(1, 3) {
            self.have_panic(rng);
        }
        if let Some(op) = self.faults.spoils
            && rng.chance(2, 3)
        {
            self.spoil(op, rng);
        }
        match rng.below(16) {
            0..4 => self.sicken(rng),
            4 | 5 => self.inject(rng),
            6 => self.slow_down(rng),
            7 => self.resize(rng),
            8 | 9 => self.remove(rng),
            10 => self.take_out(rng),
            11 | 12 => self.measure(rng),
            13 => self.lock(rng),
            _ => self.tower.build(&self.ledger),
        }
        Act::Until(now_ns + rng.below(400_000))
    }
}
