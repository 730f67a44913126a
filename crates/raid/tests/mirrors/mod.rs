//! Mirrors whose legs outlive the worlds that they are in.

use std::sync::Arc;

use qpair_bdev::{Info, Op, OpSet, Registry, lifecycle};
use qpair_raid::{Level, Options, Phase, Raids, Spec};
use qpair_reactor::sim::{Obligations, World};
use qpair_simkit::{CELL_BLOCKS, Plan, SimDisk, check_slabs, promise};

/// Where data begin behind a superblock.
pub const OFFSET: u64 = 2048;
/// Blocks of each client.
pub const OWN: u64 = 2 * CELL_BLOCKS;

/// A disk for one leg, known by its UUID.
pub fn leg(number: u8, blocks: u64, cached: bool, delay_ns: u64) -> Arc<SimDisk> {
    let mut info = Info::new(&format!("leg{number}"), "leg", 512, blocks + u64::from(number));
    info.uuid = format!("00000000-0000-4000-8000-0000000000{number:02x}").parse().unwrap();
    info.write_cache = cached;
    info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
    SimDisk::new(info, Plan { delay_ns, ..Plan::default() })
}

/// One process.
pub struct Stage {
    pub registry: Arc<Registry>,
    pub raids: Arc<Raids>,
    pub disks: Vec<Arc<SimDisk>>,
}

impl Stage {
    pub fn new(world: &World, disks: &[Arc<SimDisk>]) -> Arc<Self> {
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        raids.set_options(Options { window_kb: 4, bandwidth_mb: 0 }).unwrap();
        Arc::new(Self { registry, raids, disks: disks.to_vec() })
    }

    /// A leg appears, and is examined.
    pub fn appear(&self, number: usize, ledger: &Obligations) {
        if self.registry.register(self.disks[number].clone()).is_ok() {
            self.raids.examine(&format!("leg{number}"), promise(ledger, |_| true));
        }
    }

    pub fn phase(&self) -> Option<Phase> {
        self.raids.list().first().map(|array| array.phase)
    }
}

pub fn create(world: &mut World, stage: &Stage, superblock: bool) {
    for disk in &stage.disks {
        stage.registry.register(disk.clone()).unwrap();
    }
    let bases = stage.disks.iter().map(|disk| disk.info.name.clone()).collect();
    let spec = Spec { name: "mirror".to_owned(), level: Level::RAID1, strip_kb: 0, bases, uuid: None, superblock };
    stage.raids.create(spec, promise(world.obligations(), Result::is_ok));
    world.settle();
    assert_eq!(stage.phase(), Some(Phase::Online));
}

pub fn demolish(world: &mut World, stage: &Arc<Stage>) {
    let ledger = world.obligations().clone();
    stage.raids.delete("mirror", false, promise(&ledger, |_| true));
    world.settle();
    for disk in &stage.disks {
        lifecycle::unregister(&stage.registry, &disk.info.name, 0, promise(&ledger, |_| true));
    }
    world.finish();
    assert!(stage.raids.list().is_empty() && stage.registry.list(None).unwrap().is_empty(), "something still stands");
    stage.disks.iter().for_each(|disk| disk.check_end());
    check_slabs(world);
}

/// The process is gone, and so are its bdevs, which hold their registry as it holds them.
pub fn bury(stage: &Stage) {
    for listing in stage.registry.list(None).unwrap() {
        lifecycle::unregister(&stage.registry, &listing.info.name, 0, Box::new(|_| {}));
    }
}
