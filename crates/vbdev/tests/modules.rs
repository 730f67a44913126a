//! Each module, step by step, on the simulator's clock.

mod common;

use std::sync::Arc;

use common::desk::{Bench, Outcome, Ticket};
use qpair_bdev::passthru::Passthru;
use qpair_bdev::{Info, Op, OpSet, Status, ZONE_DESCRIPTOR_BYTES, ZoneAction, ZoneDescriptor, ZoneState, lifecycle};
use qpair_simkit::Plan;
use qpair_vbdev::delay::{Delay, Latencies, Latency};
use qpair_vbdev::error::{ErrorBdev, Errors, What};
use qpair_vbdev::part::{Part, Range};
use qpair_vbdev::zone_block::ZoneBlock;

const MS: u64 = 1_000_000;

fn info(blocks: u64) -> Info {
    Info { supported: OpSet::of(&[Op::Read, Op::Write, Op::Unmap, Op::WriteZeroes, Op::Reset]), ..Info::new("base", "sim", 512, blocks) }
}

fn bench(blocks: u64) -> Bench {
    Bench::new(info(blocks), Plan::default(), 2)
}

fn range(name: &str, offset_blocks: u64, num_blocks: u64) -> Range {
    Range { name: name.to_owned(), offset_blocks, num_blocks, uuid: None }
}

// -- part -------------------------------------------------------------------------------------------

#[test]
fn parts_have_ranges_of_their_own_and_one_claim_that_goes_with_the_last() {
    let mut bench = bench(64);
    let parts = Part::cut(&bench.registry, "base", "split", &[range("basep0", 0, 32), range("basep1", 32, 32)]).unwrap();
    parts.into_iter().for_each(|part| bench.register(part));
    assert_eq!(bench.run("basep0", Op::Write, 3, 2, 0xaa), Status::SUCCESS);
    assert_eq!(bench.run("basep1", Op::Write, 3, 2, 0xbb), Status::SUCCESS);
    assert_eq!(bench.run("basep1", Op::Read, 31, 2, 0), Status::LBA_OUT_OF_RANGE);
    let bytes = bench.base.bytes();
    assert_eq!((bytes[3 * 512], bytes[35 * 512]), (0xaa, 0xbb));
    let busy = |bench: &Bench| bench.registry.open_base("base", "test").err().map(|error| error.to_string());
    assert_eq!(busy(&bench).as_deref(), Some("Device or resource busy: bdev base is claimed by split"));
    bench.remove("basep0", 0);
    assert!(busy(&bench).is_some());
    bench.remove("basep1", 0);
    assert_eq!(busy(&bench), None);
}

#[test]
fn a_part_outside_its_base_is_refused_and_leaves_no_claim() {
    let bench = bench(64);
    let refused = Part::cut(&bench.registry, "base", "gpt", &[range("a", 0, 8), range("b", 60, 5)]).err().unwrap().to_string();
    assert_eq!(refused, "Invalid argument: offset_blocks + num_blocks 60 + 5: within the 64 blocks of base");
    assert!(Part::cut(&bench.registry, "base", "gpt", &[range("a", u64::MAX, 1)]).is_err());
    bench.registry.open_base("base", "test").unwrap();
}

#[test]
fn a_base_that_goes_takes_its_parts_along() {
    let mut bench = bench(64);
    Part::cut(&bench.registry, "base", "split", &[range("p0", 0, 32), range("p1", 32, 32)])
        .unwrap()
        .into_iter()
        .for_each(|part| bench.register(part));
    bench.remove("base", 0);
    assert!(bench.registry.list(None).unwrap().is_empty());
}

#[test]
fn io_past_a_base_that_shrank_fails() {
    let mut bench = bench(64);
    bench.register(Part::cut(&bench.registry, "base", "split", &[range("p0", 32, 32)]).unwrap().remove(0));
    lifecycle::resize(&bench.registry, "base", 48, Box::new(|outcome| outcome.unwrap()));
    bench.pass(MS);
    assert_eq!(bench.run("p0", Op::Write, 15, 1, 1), Status::SUCCESS);
    assert_eq!(bench.run("p0", Op::Write, 16, 1, 1), Status::LBA_OUT_OF_RANGE);
}

// -- delay ------------------------------------------------------------------------------------------

fn delayed(bench: &Bench, micros: [u64; 4]) -> Arc<Latencies> {
    let latencies = Latencies::new(micros);
    bench.register(Delay::new(&bench.registry, "disk", "base", None, latencies.clone()).unwrap());
    latencies
}

fn latency_ns(bench: &mut Bench, op: Op) -> u64 {
    let ticket = bench.start(0, "disk", op, 0, 1, 1);
    let Outcome { status, at_ns, .. } = bench.wait(&ticket);
    assert_eq!(status, Status::SUCCESS);
    at_ns - ticket.since_ns
}

/// The simulator lets a reactor wait for its turn now and then.
const LATE_NS: u64 = 1_500_000;

fn is_about(latency_ns: u64, micros: u64) -> bool {
    (micros * 1000..micros * 1000 + LATE_NS).contains(&latency_ns)
}

#[test]
fn one_in_a_hundred_comes_back_after_the_p99_latency_the_others_after_the_average() {
    for (op, micros) in [(Op::Read, [300, 5000, 0, 0]), (Op::Write, [0, 0, 700, 9000])] {
        let mut bench = bench(64);
        delayed(&bench, micros);
        let (average, p99) = if op == Op::Read { (micros[0], micros[1]) } else { (micros[2], micros[3]) };
        let all: Vec<u64> = (0..2000).map(|_| latency_ns(&mut bench, op)).collect();
        let rare = all.iter().filter(|latency| is_about(**latency, p99)).count();
        let odd = all.iter().find(|latency| !is_about(**latency, average) && !is_about(**latency, p99));
        assert_eq!(odd, None);
        assert!((5..=50).contains(&rare), "{rare} of 2000 had the p99 latency");
    }
}

#[test]
fn a_latency_that_is_changed_counts_for_what_comes_back_from_then_on() {
    let mut bench = bench(64);
    let latencies = delayed(&bench, [100, 100, 100, 100]);
    assert!(is_about(latency_ns(&mut bench, Op::Read), 100));
    latencies.set(Latency::AverageRead, 2000);
    latencies.set(Latency::P99Read, 2000);
    assert!(is_about(latency_ns(&mut bench, Op::Read), 2000));
    assert!(is_about(latency_ns(&mut bench, Op::Write), 100));
    assert_eq!(latencies.get(Latency::AverageRead), 2000);
}

#[test]
fn what_is_neither_read_nor_write_is_not_held() {
    let mut bench = bench(64);
    delayed(&bench, [10_000; 4]);
    for op in [Op::Unmap, Op::WriteZeroes, Op::Flush, Op::Reset] {
        assert!(latency_ns(&mut bench, op) < 2 * MS, "{op:?}");
    }
}

#[test]
fn nothing_runs_while_nothing_is_due() {
    let mut bench = bench(64);
    delayed(&bench, [3_000_000; 4]);
    let tickets: Vec<Ticket> = (0..500).map(|number| bench.start(0, "disk", Op::Read, number % 64, 1, 0)).collect();
    bench.pass(1000 * MS);
    let before = bench.world.steps();
    bench.pass(1000 * MS);
    assert!(bench.world.steps() - before < 50, "{} steps in a second of waiting", bench.world.steps() - before);
    for ticket in tickets {
        let latency_ns = bench.wait(&ticket).at_ns - ticket.since_ns;
        assert!((3000 * MS..3002 * MS).contains(&latency_ns), "{latency_ns}");
    }
}

#[test]
fn an_abort_ends_what_is_held_at_once() {
    let mut bench = bench(64);
    delayed(&bench, [u64::MAX, u64::MAX, 60_000_000, 60_000_000]);
    let for_ever = bench.start(0, "disk", Op::Read, 0, 1, 0);
    let long = bench.start(0, "disk", Op::Write, 0, 1, 0);
    bench.pass(5 * MS);
    for ticket in [for_ever, long] {
        let asked_ns = bench.world.now_ns();
        bench.abort(&ticket);
        let outcome = bench.wait(&ticket);
        assert_eq!(outcome.status, Status::ABORT_REQUESTED);
        assert!(outcome.at_ns - asked_ns < LATE_NS);
    }
}

#[test]
fn a_reset_ends_what_is_held_on_all_reactors() {
    let mut bench = bench(64);
    delayed(&bench, [60_000_000; 4]);
    let held = [bench.start(0, "disk", Op::Read, 0, 1, 0), bench.start(1, "disk", Op::Write, 1, 1, 0)];
    bench.pass(MS);
    let asked_ns = bench.world.now_ns();
    assert_eq!(bench.run("disk", Op::Reset, 0, 0, 0), Status::SUCCESS);
    for ticket in held {
        let outcome = bench.wait(&ticket);
        assert_eq!(outcome.status, Status::ABORT_REQUESTED);
        assert!(outcome.at_ns - asked_ns < 3 * MS);
    }
}

#[test]
fn a_removal_ends_what_is_held_at_its_deadline() {
    let mut bench = bench(64);
    delayed(&bench, [60_000_000; 4]);
    let held = bench.start(1, "disk", Op::Read, 0, 1, 0);
    let asked_ns = bench.world.now_ns();
    bench.remove("base", 7 * MS);
    let outcome = bench.ended(&held).unwrap();
    assert_eq!(outcome.status, Status::ABORT_REQUESTED);
    assert!((7 * MS..10 * MS).contains(&(outcome.at_ns - asked_ns)), "{}", outcome.at_ns - asked_ns);
}

#[test]
fn the_status_of_the_base_comes_back_late_too() {
    let mut bench = Bench::new(info(64), Plan { error: 1000, ..Plan::default() }, 1);
    delayed(&bench, [400; 4]);
    let ticket = bench.start(0, "disk", Op::Read, 0, 1, 0);
    let outcome = bench.wait(&ticket);
    assert_eq!(outcome.status, Status::UNRECOVERED_READ_ERROR);
    assert!(is_about(outcome.at_ns - ticket.since_ns, 400));
}

// -- error ------------------------------------------------------------------------------------------

fn spoilable(bench: &Bench) -> (Arc<Errors>, qpair_bdev::DeviceId) {
    let errors = Errors::new();
    let device = ErrorBdev::new(&bench.registry, "EE_base", "base", None, errors.clone()).unwrap();
    let id = bench.registry.register(Arc::new(device)).unwrap();
    (errors, id)
}

#[test]
fn so_many_ios_of_a_kind_fail_and_then_none() {
    let mut bench = bench(64);
    let (errors, _) = spoilable(&bench);
    for (op, status) in [
        (Op::Read, Status::INTERNAL_DEVICE_ERROR),
        (Op::Write, Status::WRITE_FAULT),
        (Op::Unmap, Status::LBA_OUT_OF_RANGE),
        (Op::Flush, Status::ABORTED_POWER_LOSS),
    ] {
        errors.inject(&[op], What::Fail(status), 3, 0).unwrap();
        let all: Vec<Status> = (0..5).map(|_| bench.run("EE_base", op, 0, 1, 1)).collect();
        assert_eq!(all, [status, status, status, Status::SUCCESS, Status::SUCCESS], "{op:?}");
    }
}

#[test]
fn a_kind_that_nothing_is_injected_into_passes_and_clear_ends_all() {
    let mut bench = bench(64);
    let (errors, _) = spoilable(&bench);
    errors.inject(&[Op::Read, Op::Unmap], What::Fail(Status::WRITE_FAULT), u32::MAX, 0).unwrap();
    assert_eq!(bench.run("EE_base", Op::Write, 0, 1, 1), Status::SUCCESS);
    assert_eq!(bench.run("EE_base", Op::WriteZeroes, 0, 1, 1), Status::SUCCESS);
    assert_eq!(bench.run("EE_base", Op::Read, 0, 1, 1), Status::WRITE_FAULT);
    errors.clear();
    assert_eq!(bench.run("EE_base", Op::Read, 0, 1, 1), Status::SUCCESS);
}

#[test]
fn an_error_is_injected_only_while_so_many_ios_are_below() {
    let mut bench = Bench::new(info(64), Plan { stall: 1000, ..Plan::default() }, 1);
    let (errors, _) = spoilable(&bench);
    errors.inject(&[Op::Read], What::Fail(Status::WRITE_FAULT), 10, 2).unwrap();
    let stalled = [bench.start(0, "EE_base", Op::Read, 0, 1, 0), bench.start(0, "EE_base", Op::Read, 0, 1, 0)];
    assert_eq!(bench.run("EE_base", Op::Read, 0, 1, 0), Status::WRITE_FAULT);
    stalled.iter().for_each(|ticket| assert!(bench.ended(ticket).is_none()));
    stalled.iter().for_each(|ticket| bench.abort(ticket));
    stalled.iter().for_each(|ticket| assert_eq!(bench.wait(ticket).status, Status::ABORT_REQUESTED));
}

#[test]
fn what_is_kept_goes_on_when_it_is_resumed() {
    let mut bench = bench(64);
    let (errors, device) = spoilable(&bench);
    errors.inject(&[Op::Write], What::Keep, 100, 0).unwrap();
    let kept: Vec<Ticket> = (0..4).map(|number| bench.start(number % 2, "EE_base", Op::Write, number as u64, 1, 0x55)).collect();
    bench.pass(1000 * MS);
    kept.iter().for_each(|ticket| assert!(bench.ended(ticket).is_none()));
    assert_eq!(bench.base.bytes()[0], 0);
    errors.clear();
    bench.pass(MS);
    kept.iter().for_each(|ticket| assert!(bench.ended(ticket).is_none(), "clearing is not resuming"));
    errors.resume();
    lifecycle::poke(&bench.registry, device, Box::new(|outcome| outcome.unwrap()));
    kept.iter().for_each(|ticket| assert_eq!(bench.wait(ticket).status, Status::SUCCESS));
    assert_eq!(bench.read("EE_base", 0, 4), vec![0x55; 4 * 512]);
    assert_eq!(bench.run("EE_base", Op::Write, 0, 1, 1), Status::SUCCESS);
}

#[test]
fn what_is_kept_ends_by_abort_reset_and_removal() {
    let mut bench = bench(64);
    let (errors, _) = spoilable(&bench);
    errors.inject(&[Op::Read, Op::Write, Op::Unmap, Op::Flush], What::Keep, 3, 0).unwrap();
    let aborted = bench.start(0, "EE_base", Op::Read, 0, 1, 0);
    bench.abort(&aborted);
    assert_eq!(bench.wait(&aborted).status, Status::ABORT_REQUESTED);
    let reset = [bench.start(0, "EE_base", Op::Flush, 0, 1, 0), bench.start(1, "EE_base", Op::Unmap, 0, 1, 0)];
    assert_eq!(bench.run("EE_base", Op::Reset, 0, 0, 0), Status::SUCCESS);
    reset.iter().for_each(|ticket| assert_eq!(bench.wait(ticket).status, Status::ABORT_REQUESTED));
    let removed = bench.start(1, "EE_base", Op::Write, 0, 1, 0);
    bench.pass(100 * MS);
    assert!(bench.ended(&removed).is_none());
    bench.remove("base", MS);
    assert_eq!(bench.ended(&removed).unwrap().status, Status::ABORT_REQUESTED);
}

#[test]
fn a_spoilt_read_has_one_byte_changed_wherever_it_lies() {
    let mut bench = bench(64);
    let (errors, _) = spoilable(&bench);
    assert_eq!(bench.run("EE_base", Op::Write, 0, 4, 0x11), Status::SUCCESS);
    errors.inject(&[Op::Read], What::Spoil { offset: 1300, value: 0x0f }, 1, 0).unwrap();
    let bytes = bench.read("EE_base", 0, 4);
    let changed: Vec<usize> = (0..2048).filter(|at| bytes[*at] != 0x11).collect();
    assert_eq!((changed, bytes[1300]), (vec![1300], 0x1e));
    assert_eq!(bench.read("EE_base", 0, 4), vec![0x11; 2048]);
    errors.inject(&[Op::Read], What::Spoil { offset: 2048, value: 1 }, 1, 0).unwrap();
    assert_eq!(bench.read("EE_base", 0, 4), vec![0x11; 2048], "past the end nothing is spoilt");
}

#[test]
fn a_spoilt_write_goes_where_it_was_meant_to_and_its_owner_keeps_his_data() {
    let mut bench = bench(64);
    let (errors, _) = spoilable(&bench);
    errors.inject(&[Op::Write], What::Spoil { offset: 513, value: 0xff }, 1, 0).unwrap();
    let ticket = bench.start(0, "EE_base", Op::Write, 7, 2, 0x22);
    assert_eq!(bench.wait(&ticket).status, Status::SUCCESS);
    assert_eq!(ticket.bytes(), vec![0x22; 1024]);
    let stored = bench.base.bytes();
    let changed: Vec<usize> = (0..stored.len()).filter(|at| stored[*at] != if (3584..4608).contains(at) { 0x22 } else { 0 }).collect();
    assert_eq!((changed, stored[4097]), (vec![4097], 0xdd));
}

#[test]
fn one_that_finds_no_memory_is_tried_again() {
    let mut bench = bench(64);
    let (errors, _) = spoilable(&bench);
    errors.inject(&[Op::Read], What::PutOff, 1, 0).unwrap();
    let alone = bench.start(0, "EE_base", Op::Read, 0, 1, 0);
    let outcome = bench.wait(&alone);
    assert_eq!(outcome.status, Status::SUCCESS);
    assert!((10 * MS..12 * MS).contains(&(outcome.at_ns - alone.since_ns)), "{}", outcome.at_ns - alone.since_ns);
    errors.inject(&[Op::Read], What::PutOff, 1, 0).unwrap();
    let put_off = bench.start(0, "EE_base", Op::Read, 0, 1, 0);
    assert_eq!(bench.run("EE_base", Op::Write, 0, 1, 0), Status::SUCCESS);
    let outcome = bench.wait(&put_off);
    assert!(outcome.at_ns - put_off.since_ns < 5 * MS, "it goes when another one ends");
    errors.inject(&[Op::Read], What::PutOff, u32::MAX, 0).unwrap();
    let never = bench.start(0, "EE_base", Op::Read, 0, 1, 0);
    bench.pass(100 * MS);
    bench.abort(&never);
    assert_eq!(bench.wait(&never).status, Status::ABORT_REQUESTED);
}

#[test]
fn what_would_change_nothing_is_refused() {
    let errors = Errors::new();
    let refused = |what| errors.inject(&[Op::Read], what, 1, 0).unwrap_err().to_string();
    assert_eq!(refused(What::Spoil { offset: 0, value: 0 }), "Invalid argument: corrupt_value 0: 1 to 255, or nothing would change");
    assert_eq!(
        refused(What::Spoil { offset: 1 << 55, value: 1 }),
        "Invalid argument: corrupt_offset 36028797018963968: 0 to 36028797018963967"
    );
}

// -- zone_block -------------------------------------------------------------------------------------

fn zoned(blocks: u64) -> Bench {
    let bench = bench(blocks);
    bench.register(ZoneBlock::new(&bench.registry, "zoned", "base", None, 6, 2).unwrap());
    bench
}

fn act(bench: &mut Bench, action: ZoneAction, lba: u64) -> Status {
    let ticket = bench.manage(0, "zoned", action, lba, 8, 0);
    bench.wait(&ticket).status
}

fn report(bench: &mut Bench, name: &str, lba: u64, zones: u64) -> Vec<ZoneDescriptor> {
    let ticket = bench.manage(0, name, ZoneAction::Report, lba, zones * 8, (zones * ZONE_DESCRIPTOR_BYTES) as usize);
    let outcome = bench.wait(&ticket);
    assert_eq!((outcome.status, outcome.result), (Status::SUCCESS, zones));
    ticket.bytes().chunks(64).map(|bytes| ZoneDescriptor::decode(bytes.try_into().unwrap()).unwrap()).collect()
}

fn zone(bench: &mut Bench, lba: u64) -> (ZoneState, u64) {
    let descriptor = report(bench, "zoned", lba, 1)[0];
    (descriptor.state, descriptor.write_pointer)
}

#[test]
fn zones_begin_full_and_are_written_from_their_start_after_a_reset() {
    let mut bench = zoned(67);
    let shown = bench.registry.list(Some("zoned")).unwrap()[0].info.clone();
    assert_eq!((shown.num_blocks, shown.zoned.unwrap().zone_blocks, shown.zoned.unwrap().optimal_open_zones), (64, 8, 2));
    let all = report(&mut bench, "zoned", 0, 8);
    assert!(all.iter().all(|zone| zone.state == ZoneState::Full && zone.capacity_blocks == 6 && zone.write_pointer == zone.start + 6));
    assert_eq!(bench.run("zoned", Op::Write, 8, 1, 1), Status::ZONE_IS_FULL);
    assert_eq!(act(&mut bench, ZoneAction::Reset, 8), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 8), (ZoneState::Empty, 8));
    assert_eq!(bench.run("zoned", Op::Write, 9, 1, 1), Status::ZONE_INVALID_WRITE);
    assert_eq!(bench.run("zoned", Op::Write, 8, 4, 1), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 8), (ZoneState::ImplicitlyOpen, 12));
    assert_eq!(bench.run("zoned", Op::Write, 12, 3, 1), Status::ZONE_BOUNDARY_ERROR);
    assert_eq!(bench.run("zoned", Op::Write, 12, 2, 2), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 8), (ZoneState::Full, 14));
    assert_eq!(bench.read("zoned", 8, 6), [vec![1; 4 * 512], vec![2; 2 * 512]].concat());
}

#[test]
fn an_append_says_where_it_went() {
    let mut bench = zoned(64);
    assert_eq!(act(&mut bench, ZoneAction::Reset, 16), Status::SUCCESS);
    for (blocks, expected) in [(2, Ok(16)), (3, Ok(18)), (2, Err(Status::ZONE_BOUNDARY_ERROR)), (1, Ok(21)), (1, Err(Status::ZONE_IS_FULL))]
    {
        let ticket = bench.start(0, "zoned", Op::ZoneAppend, 16, blocks, blocks as u8);
        let outcome = bench.wait(&ticket);
        let place = if outcome.status.is_error() { Err(outcome.status) } else { Ok(outcome.result) };
        assert_eq!(place, expected);
    }
    assert_eq!(bench.read("zoned", 16, 6), [vec![2; 1024], vec![3; 3 * 512], vec![1; 512]].concat());
    assert_eq!(bench.run("zoned", Op::ZoneAppend, 17, 1, 1), Status::INVALID_FIELD);
}

#[test]
fn zones_are_opened_closed_and_finished_on_request() {
    let mut bench = zoned(64);
    assert_eq!(act(&mut bench, ZoneAction::Open, 0), Status::ZONE_INVALID_STATE_TRANSITION);
    assert_eq!(act(&mut bench, ZoneAction::Reset, 0), Status::SUCCESS);
    assert_eq!(act(&mut bench, ZoneAction::Close, 0), Status::ZONE_INVALID_STATE_TRANSITION);
    assert_eq!(act(&mut bench, ZoneAction::Open, 0), Status::SUCCESS);
    assert_eq!(bench.run("zoned", Op::Write, 0, 1, 1), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 0), (ZoneState::ExplicitlyOpen, 1));
    assert_eq!(act(&mut bench, ZoneAction::Close, 0), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 0), (ZoneState::Closed, 1));
    assert_eq!(act(&mut bench, ZoneAction::Finish, 0), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 0), (ZoneState::Full, 6));
    assert_eq!(act(&mut bench, ZoneAction::Reset, 0), Status::SUCCESS);
    assert_eq!(zone(&mut bench, 0), (ZoneState::Empty, 0));
}

#[test]
fn a_reset_unmaps_on_a_base_that_can_and_only_its_zone() {
    let mut bench = zoned(64);
    assert_eq!(bench.run("zoned", Op::Read, 0, 6, 0), Status::SUCCESS);
    bench.base.fill(0x77);
    assert_eq!(act(&mut bench, ZoneAction::Reset, 8), Status::SUCCESS);
    let bytes = bench.base.bytes();
    assert!((0..bytes.len()).all(|at| bytes[at] == if (8 * 512..14 * 512).contains(&at) { 0 } else { 0x77 }));
}

#[test]
fn a_reset_does_not_begin_while_a_write_is_under_way() {
    let mut bench = Bench::new(info(64), Plan { stall: 300, ..Plan::default() }, 2);
    bench.register(ZoneBlock::new(&bench.registry, "zoned", "base", None, 6, 2).unwrap());
    for lba in (0..64).step_by(8) {
        let ticket = bench.manage(0, "zoned", ZoneAction::Reset, lba, 8, 0);
        bench.pass(MS);
        if bench.ended(&ticket).is_none() {
            // Its unmap stalls: what would write meanwhile is told to try again.
            assert_eq!(bench.run("zoned", Op::ZoneAppend, lba, 1, 1), Status::COMMAND_INTERRUPTED);
            bench.abort(&ticket);
            bench.wait(&ticket);
        }
        let write = bench.start(1, "zoned", Op::ZoneAppend, lba, 1, 1);
        bench.pass(MS);
        if bench.ended(&write).is_none() {
            assert_eq!(act(&mut bench, ZoneAction::Reset, lba), Status::COMMAND_INTERRUPTED);
            bench.abort(&write);
            bench.wait(&write);
        }
    }
}

#[test]
fn what_crosses_a_zone_is_refused_on_every_layer_above() {
    let mut bench = zoned(64);
    bench.register(Passthru::new(&bench.registry, "above", "zoned", None).unwrap());
    bench.register(Delay::new(&bench.registry, "top", "above", None, Latencies::new([1; 4])).unwrap());
    for (lba, blocks) in [(7, 2), (0, 7), (6, 1)] {
        assert_eq!(bench.run("top", Op::Read, lba, blocks, 0), Status::ZONE_BOUNDARY_ERROR, "{lba}+{blocks}");
    }
    let ticket = bench.manage(0, "top", ZoneAction::Reset, 8, 8, 0);
    assert_eq!(bench.wait(&ticket).status, Status::SUCCESS);
    let ticket = bench.start(0, "top", Op::ZoneAppend, 8, 2, 9);
    assert_eq!(bench.wait(&ticket).result, 8);
    assert_eq!(report(&mut bench, "top", 8, 1)[0].write_pointer, 10);
}

#[test]
fn a_part_of_a_zoned_bdev_is_zoned_and_counts_from_its_own_start() {
    let mut bench = zoned(64);
    let refused = Part::cut(&bench.registry, "zoned", "split", &[range("odd", 4, 16)]).err().unwrap().to_string();
    assert_eq!(refused, "Invalid argument: offset_blocks, num_blocks 4, 16: multiples of the 8 blocks of a zone of zoned");
    bench.register(Part::cut(&bench.registry, "zoned", "split", &[range("part", 16, 32)]).unwrap().remove(0));
    let ticket = bench.manage(0, "part", ZoneAction::Reset, 8, 8, 0);
    assert_eq!(bench.wait(&ticket).status, Status::SUCCESS);
    let ticket = bench.start(0, "part", Op::ZoneAppend, 8, 2, 9);
    assert_eq!(bench.wait(&ticket).result, 8);
    let found: Vec<_> = report(&mut bench, "part", 0, 4).iter().map(|zone| (zone.start, zone.write_pointer)).collect();
    assert_eq!(found, [(0, 6), (8, 10), (16, 22), (24, 30)]);
    assert_eq!(bench.base.bytes()[24 * 512], 9);
}

#[test]
fn geometry_that_makes_no_zones_is_refused() {
    let bench = zoned(64);
    let on = |base: &str, capacity, optimal| {
        ZoneBlock::new(&bench.registry, "z", base, None, capacity, optimal).err().map(|error| error.to_string())
    };
    assert_eq!(on("zoned", 6, 1).unwrap(), "File exists: bdev zoned is zoned already");
    bench.registry.register(Arc::new(qpair_bdev::null::Null::new("null", 512, 1 << 40, None, 0))).unwrap();
    assert_eq!(on("null", 0, 1).unwrap(), "Invalid argument: zone_capacity 0: 1 to 1099511627775 blocks");
    assert_eq!(on("null", 6, 0).unwrap(), "Invalid argument: optimal_open_zones 0: at least 1");
    assert!(on("null", 1, 1).unwrap().contains("1 to 16777216 zones"));
    bench.registry.register(Arc::new(qpair_bdev::null::Null::new("small", 512, 1000, None, 0))).unwrap();
    assert_eq!(
        on("small", 513, 1).unwrap(),
        "Invalid argument: zone_capacity 513: 1 to 16777216 zones; 0 of 1024 blocks each fit on small"
    );
    assert_eq!(on("null", 1 << 30, 1), None);
}
