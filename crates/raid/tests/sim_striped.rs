//! Arrays without redundancy under random schedules: what was written is read, errors are told, a member takes the array along; each I/O ends once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use qpair_bdev::{Info, Op, OpSet, Registry, lifecycle};
use qpair_raid::{Level, Phase, Raids, Spec};
use qpair_reactor::sim::{self, Act, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, SimDisk, check_slabs, promise};

/// Blocks of each client.
const OWN: u64 = 2 * CELL_BLOCKS;

fn scenario(name: &str, seeds: u64, errors: bool, removal: bool) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        let members = world.rng().between(1, 5) as u8;
        let level = *world.rng().pick(&[Level::RAID0, Level::CONCAT]);
        let strip_kb = *world.rng().pick(&[1, 2, 4]);
        let total = Crew::blocks(&world, 1, OWN);
        // Enough on each for all of it to fit, and uneven.
        let each = total.div_ceil(members.into()).next_multiple_of(u64::from(strip_kb) * 2);
        let superblock = world.rng().chance(1, 2);
        let offset = if superblock { 2048 } else { 0 };
        let disk = |number: u8| {
            let mut info = Info::new(&format!("leg{number}"), "leg", 512, offset + each + u64::from(number % 2));
            info.write_cache = true;
            info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
            SimDisk::new(info, Plan { delay_ns: 50_000, ..Plan::default() })
        };
        let disks: Vec<_> = (0..members).map(disk).collect();
        for disk in &disks {
            registry.register(disk.clone()).unwrap();
        }
        let bases = disks.iter().map(|disk| disk.info.name.clone()).collect();
        let spec = Spec { name: "stripe".to_owned(), level, strip_kb, bases, uuid: None, superblock };
        raids.create(spec, promise(world.obligations(), Result::is_ok));
        world.settle();
        assert_eq!(raids.list()[0].phase, Phase::Online);
        let (churn, composed, scattered) = (true, true, true);
        let allowed = Allowed { errors, resets: true, removal, cached: true, churn, composed, scattered, ..Allowed::default() };
        let load = Load { bdev: "stripe".to_owned(), info: disks[0].info.clone(), allowed, ios: 0 };
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        crew.start(&mut world, &registry, &load, 50..=50);
        let (ledger, shared, sick) = (world.obligations().clone(), registry.clone(), disks.clone());
        let mut left = 4;
        world.add_actor(move |now_ns, rng: &mut Rng| {
            left -= 1;
            let disk = &sick[rng.below(sick.len() as u64) as usize];
            if errors {
                disk.illness.write_errors.store(rng.below(200), Ordering::SeqCst);
                disk.illness.read_errors.store(rng.below(200), Ordering::SeqCst);
            }
            if removal && rng.chance(1, 3) {
                lifecycle::unregister(&shared, &disk.info.name, rng.below(100_000), promise(&ledger, |_| true));
            }
            if left == 0 { Act::Done } else { Act::Until(now_ns + rng.below(400_000)) }
        });
        world.settle();
        raids.delete("stripe", false, promise(world.obligations(), |_| true));
        world.finish();
        assert!(raids.list().is_empty());
        crew.check_end();
        disks.iter().for_each(|disk| disk.check_end());
        check_slabs(&mut world);
        let left: Vec<Arc<_>> = registry.list(None).unwrap().into_iter().map(|listing| listing.info).collect();
        assert!(left.iter().all(|info| info.module == "leg"), "{left:?}");
        assert!(registry.list(None).unwrap().iter().all(|listing| listing.claimed_by.is_none()), "a claim is left");
    });
}

#[test]
fn a_stripe_gives_what_was_written() {
    scenario("stripe", 300, false, false);
}

#[test]
fn an_error_of_a_member_is_the_arrays() {
    scenario("stripe_errors", 300, true, false);
}

#[test]
fn a_member_takes_the_stripe_along() {
    scenario("stripe_removal", 300, true, true);
}

#[test]
fn two_members_that_leave_at_once_leave_no_array_behind() {
    sim::run_seeds("stripe_leaving", 100, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        let ledger = world.obligations().clone();
        let bases = vec!["leg0".to_owned(), "leg1".to_owned()];
        for name in &bases {
            registry.register(SimDisk::new(Info::new(name, "leg", 512, 64), Plan::default())).unwrap();
        }
        let spec =
            Spec { name: "stripe".to_owned(), level: Level::CONCAT, strip_kb: 1, bases: bases.clone(), uuid: None, superblock: false };
        raids.create(spec, promise(&ledger, Result::is_ok));
        world.settle();
        // One of them may find that the other has taken the array along.
        bases.iter().for_each(|base| raids.remove_base(base, promise(&ledger, |_| true)));
        world.settle();
        assert!(raids.list().is_empty(), "{:?}", raids.list());
        assert!(registry.list(None).unwrap().iter().all(|listing| listing.claimed_by.is_none()), "a claim is left");
    });
}
