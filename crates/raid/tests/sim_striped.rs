//! Arrays without redundancy under random schedules: what was written is read, errors are told, a member takes the array along; each I/O ends once.

mod common {
    pub mod client;
    pub mod leg;
}

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::client::{Allowed, CELL, Client, Model};
use common::leg::Disk;
use qpair_bdev::{BdevError, Layer, Registry, lifecycle};
use qpair_raid::{Level, Phase, Raids, Spec};
use qpair_reactor::sim::{self, Act, Rng, World};

const CELLS: u64 = 3;

fn scenario(name: &str, seeds: u64, errors: bool, removal: bool) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        let members = world.rng().between(1, 5) as u8;
        let level = *world.rng().pick(&[Level::RAID0, Level::CONCAT]);
        let strip_kb = *world.rng().pick(&[1, 2, 4]);
        let total = world.reactors() as u64 * CELLS * CELL;
        // Enough on each for all of it to fit, and uneven.
        let each = total.div_ceil(members.into()).next_multiple_of(u64::from(strip_kb) * 2);
        let superblock = world.rng().chance(1, 2);
        let offset = if superblock { 2048 } else { 0 };
        let disk = |number: u8| {
            Disk::new(&format!("leg{number}"), number, offset + each + u64::from(number % 2), true, 50_000, Rng::new(number.into()))
        };
        let disks: Vec<_> = (0..members).map(disk).collect();
        for disk in &disks {
            registry.register(disk.device()).unwrap();
        }
        let bases = disks.iter().map(|disk| disk.info.name.clone()).collect();
        let ledger = world.obligations().clone();
        let id = ledger.open_next();
        let spec = Spec { name: "stripe".to_owned(), level, strip_kb, bases, uuid: None, superblock };
        raids.create(
            spec,
            Box::new(move |outcome: Result<(), BdevError>| {
                outcome.unwrap();
                ledger.close(id);
            }),
        );
        world.settle();
        assert_eq!(raids.list()[0].phase, Phase::Online);
        let allowed = Allowed { errors, resets: true, removal, cached: true };
        for reactor in 0..world.reactors() {
            let model = Model::new(reactor as u64 * CELLS * CELL, CELLS * CELL);
            Client::start(&mut world, reactor, &registry, "stripe", &model, allowed, 50);
        }
        let (ledger, shared, sick) = (world.obligations().clone(), registry.clone(), disks.clone());
        let mut left = 4;
        world.add_actor(move |now_ns, rng: &mut Rng| {
            left -= 1;
            let disk = &sick[rng.below(sick.len() as u64) as usize];
            if errors {
                disk.write_errors.store(rng.below(200), Ordering::SeqCst);
                disk.read_errors.store(rng.below(200), Ordering::SeqCst);
            }
            if removal && rng.chance(1, 3) {
                let (id, book) = (ledger.open_next(), ledger.clone());
                lifecycle::unregister(&shared, &disk.info.name, rng.below(100_000), Box::new(move |_| book.close(id)));
            }
            if left == 0 { Act::Done } else { Act::Until(now_ns + rng.below(400_000)) }
        });
        world.settle();
        let ledger = world.obligations().clone();
        let id = ledger.open_next();
        raids.delete("stripe", false, Box::new(move |_| ledger.close(id)));
        world.finish();
        assert!(raids.list().is_empty());
        for reactor in 0..world.reactors() {
            let (all, free) = world.with(reactor, |reactor| Layer::of(reactor).borrow().ios());
            assert_eq!(all, free, "I/Os leaked on reactor {reactor}");
        }
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
