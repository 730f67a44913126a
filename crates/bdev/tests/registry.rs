//! Bdevs by name: registering, opening, claiming, stacking, and what geometry is refused.

use std::sync::Arc;

use qpair_bdev::malloc::Malloc;
use qpair_bdev::null::Null;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::{BdevError, FRAMES_MAX, Info, Registry, lifecycle};
use qpair_reactor::sim::World;

#[test]
fn names_uuids_and_claims() {
    let world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    let null = |name: &str, uuid| Arc::new(Null::new(name, 512, 100, uuid, 4096));
    registry.register(null("a", None)).unwrap();
    let uuid = registry.list(Some("a")).unwrap()[0].info.uuid;
    let refused = |outcome: Result<(), BdevError>| outcome.unwrap_err().to_string();
    assert_eq!(refused(registry.register(null("a", None)).map(drop)), "File exists: bdev a");
    assert_eq!(refused(registry.register(null("b", Some(uuid))).map(drop)), format!("File exists: bdev a has uuid {uuid}"));
    assert_eq!(registry.list(Some(&uuid.to_string())).unwrap()[0].info.name, "a");
    assert_eq!(refused(registry.list(Some("c")).map(drop)), "No such device: bdev c");
    registry.claim("a", "lvol").unwrap();
    let claimed = "Device or resource busy: bdev a is claimed by lvol";
    assert_eq!(refused(registry.claim("a", "vhost")), claimed);
    assert_eq!(refused(registry.open("a", true, |_| {}).map(drop)), claimed);
    registry.open("a", false, |_| {}).unwrap();
    assert_eq!(refused(registry.release("a", "vhost")), claimed);
    registry.release("a", "lvol").unwrap();
    registry.open("a", true, |_| {}).unwrap();
    assert_eq!(registry.list(None).unwrap()[0].open_count, 0, "descriptors close when dropped");
    let base = registry.open_base("a", "passthru").unwrap();
    assert_eq!(refused(registry.claim("a", "lvol")), "Device or resource busy: bdev a is claimed by passthru");
    drop(base);
    registry.claim("a", "lvol").unwrap();
}

#[test]
fn bdevs_are_stacked_only_so_high_and_never_on_one_that_goes() {
    let world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Null::new("floor0", 512, 100, None, 0))).unwrap();
    let build = |name: &str, base: &str| {
        let passthru = Passthru::new(&registry, name, base, None)?;
        registry.register(Arc::new(passthru)).map(drop)
    };
    for floor in 1..FRAMES_MAX {
        build(&format!("floor{floor}"), &format!("floor{}", floor - 1)).unwrap();
    }
    let refused = |outcome: Result<(), BdevError>| outcome.unwrap_err().to_string();
    assert_eq!(refused(build("roof", "floor9")), "Invalid argument: base_bdev floor9: at most 9 bdevs below a bdev");
    assert_eq!(refused(build("annex", "floor3")), "Device or resource busy: bdev floor3 is claimed by passthru");
    assert_eq!(refused(build("annex", "floor10")), "No such device: bdev floor10");
    registry.register(Arc::new(Null::new("alone", 512, 100, None, 0))).unwrap();
    let early = Passthru::new(&registry, "early", "alone", None).unwrap();
    lifecycle::unregister(&registry, "alone", 0, Box::new(|_| {}));
    assert_eq!(refused(registry.register(Arc::new(early)).map(drop)), "No such device: bdev alone is being removed");
}

#[test]
fn geometry_that_makes_no_sense_is_refused_by_name() {
    let check = |change: fn(&mut Info)| {
        let mut info = Info::new("disk", "test", 512, 100);
        change(&mut info);
        info.check().unwrap_err().to_string()
    };
    assert_eq!(check(|info| info.block_size = 256), "Invalid argument: block_size 256: a power of two from 512 to 65536");
    assert_eq!(check(|info| info.num_blocks = 0), "Invalid argument: num_blocks 0: 1 to 18014398509481983");
    assert_eq!(check(|info| info.num_blocks = u64::MAX), format!("Invalid argument: num_blocks {}: 1 to 18014398509481983", u64::MAX));
    assert_eq!(check(|info| info.name.clear()), "Invalid argument: name : 1 to 255 bytes");
    assert_eq!(check(|info| info.physical_block_size = 256), "Invalid argument: physical_block_size 256: a multiple of block_size");
    assert_eq!(check(|info| info.write_unit_blocks = 0), "Invalid argument: write_unit_blocks 0: 1 to 2048");
    assert_eq!(
        check(|info| (info.write_unit_blocks, info.max_io_blocks) = (8, 12)),
        "Invalid argument: write_unit_blocks 8 with max_io_blocks 12 and boundary 0: a divisor of both"
    );
    let error = Malloc::new("disk", 512, 0, None, 0, 0).map(drop).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
}
