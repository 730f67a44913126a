//! A target that goes, and its successor, as an independent reader of the rings sees them.

mod support;

use std::sync::{Arc, Mutex};

use qpair_bdev::{BdevError, IoFlags, IoId, Op, Status};
use qpair_wire::virtio_blk::{BlkFeatures, RequestType};
use support::{BLOCKS, Driver, config, features};
use zerocopy::IntoBytes;

const PLAIN: IoFlags = IoFlags::empty();

fn reads(driver: &mut Driver, sectors: &[u64]) -> Vec<IoId> {
    let batch: Vec<_> = sectors.iter().map(|sector| (Op::Read, *sector, 1, PLAIN)).collect();
    driver.submit(&batch)
}

fn sectors(driver: &mut Driver) -> Vec<u64> {
    driver.target.requests().iter().map(|request| request.sector).collect()
}

/// Answers all that is asked.
fn serve(driver: &mut Driver) -> Vec<(IoId, Status)> {
    for request in driver.target.requests() {
        driver.target.answer(&request, 0);
    }
    driver.reap()
}

#[test]
fn what_was_not_answered_goes_to_the_next_target_in_the_order_of_submission() {
    for size in [16, 512] {
        let mut driver = Driver::recovering(size, features());
        // The slots that are used anew are those of the first, in another order.
        let first = reads(&mut driver, &[1, 2, 3, 4, 5, 6]);
        let asked = driver.target.requests();
        for index in [4, 1, 3] {
            driver.target.answer(&asked[index], 0);
        }
        assert_eq!(driver.reap().len(), 3);
        reads(&mut driver, &[7, 8]);
        driver.reap();
        // Answered, and not yet seen: it ends, and is not asked again.
        driver.target.answer(&asked[2], 0);
        driver.leave();
        assert_eq!(driver.reap(), [(first[2], Status::SUCCESS)]);
        // Given while there is no target.
        reads(&mut driver, &[9, 10]);
        assert_eq!(driver.reap(), []);
        driver.kick.take();
        assert_eq!(driver.rejoin(&config()), "Ok(())");
        assert_eq!(driver.kick.take(), 1, "a ring is started by its first kick");
        assert_eq!(sectors(&mut driver), [1, 6, 7, 8, 9, 10]);
        let more = reads(&mut driver, &[11]);
        let request = driver.target.requests().remove(0);
        driver.target.answer(&request, 0);
        assert_eq!(driver.reap(), [(more[0], Status::SUCCESS)]);
    }
}

#[test]
fn more_than_there_are_slots_waits_for_the_next_target_too() {
    let mut driver = Driver::recovering(16, features());
    driver.leave();
    let all: Vec<u64> = (1..=40).collect();
    reads(&mut driver, &all);
    assert_eq!(driver.rejoin(&config()), "Ok(())");
    let mut done = 0;
    let mut seen = Vec::new();
    while done < 40 {
        for request in driver.target.requests() {
            seen.push(request.sector);
            driver.target.answer(&request, 0);
        }
        let back = driver.reap();
        assert!(!back.is_empty() && back.iter().all(|(_, status)| *status == Status::SUCCESS));
        done += back.len();
    }
    assert_eq!(seen, all);
}

#[test]
fn a_durable_write_whose_flush_was_not_answered_is_written_again_with_its_data() {
    let mut driver = Driver::recovering(16, features());
    driver.plain.fill(0, 512, 0x5a).unwrap();
    let id = driver.submit(&[(Op::Write, 3, 1, IoFlags::FUA)])[0];
    let write = driver.target.requests().remove(0);
    driver.target.answer(&write, 0);
    driver.reap();
    assert_eq!(driver.target.requests()[0].kind, RequestType::FLUSH.0, "the flush is under way");
    driver.leave();
    assert_eq!(driver.rejoin(&config()), "Ok(())");
    let again = driver.target.requests().remove(0);
    assert_eq!((again.kind, again.sector), (RequestType::OUT.0, 3));
    assert_eq!(driver.target.read(again.data[0].0, 512), [0x5a; 512]);
    driver.target.answer(&again, 0);
    assert_eq!(driver.reap(), []);
    let flush = driver.target.requests().remove(0);
    assert_eq!(flush.kind, RequestType::FLUSH.0);
    driver.target.answer(&flush, 0);
    assert_eq!(driver.reap(), [(id, Status::SUCCESS)]);
}

#[test]
fn an_abort_ends_what_no_target_has_and_nothing_of_it_is_sent() {
    let mut driver = Driver::recovering(16, features());
    let ids = reads(&mut driver, &[1, 2]);
    driver.layer.borrow_mut().abort(&mut driver.reactor, ids[0]);
    assert_eq!(driver.reap(), [], "with a target it is a hint");
    driver.leave();
    driver.layer.borrow_mut().abort(&mut driver.reactor, ids[0]);
    assert_eq!(driver.reap(), [(ids[0], Status::ABORT_REQUESTED)]);
    assert_eq!(driver.rejoin(&config()), "Ok(())");
    assert_eq!(sectors(&mut driver), [2]);
}

#[test]
fn a_broken_rule_is_told_and_ends_the_connection_not_the_io() {
    let mut driver = Driver::recovering(16, features());
    for time in 0..3 {
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = told.clone();
        driver.link.as_ref().unwrap().when_broken(move |reason| heard.lock().unwrap().push(reason));
        let ids = reads(&mut driver, &[1, 2]);
        driver.target.requests();
        // What was answered on these rings.
        let at = if time == 0 { 0 } else { 3 };
        driver.target.lie(at, 77, 1, at + 1);
        assert_eq!(driver.reap(), []);
        assert_eq!(*told.lock().unwrap(), ["queue 0: used id 77 is no request's"]);
        reads(&mut driver, &[3]);
        assert_eq!(driver.reap(), []);
        assert!(driver.target.requests().is_empty(), "nothing more goes to it");
        driver.leave();
        assert_eq!(driver.rejoin(&config()), "Ok(())", "time {time}");
        let back = serve(&mut driver);
        assert_eq!(back.len(), 3);
        assert!(ids.iter().all(|id| back.contains(&(*id, Status::SUCCESS))));
    }
}

#[test]
fn a_target_that_is_no_successor_is_refused_by_name_and_io_waits_on() {
    let block_size = features() | BlkFeatures::BLK_SIZE.bits() | BlkFeatures::SIZE_MAX.bits();
    let mut driver = Driver::recovering(16, block_size);
    reads(&mut driver, &[1]);
    driver.leave();
    let mut other = config();
    other.blk_size.set(4096);
    other.capacity.set(BLOCKS);
    assert_eq!(driver.rejoin(&other), "Err(\"Invalid argument: config.blk_size 4096: 512 as before\")");
    let mut other = config();
    other.size_max.set(512);
    assert_eq!(driver.rejoin(&other), "Err(\"Invalid argument: config.size_max in blocks 1: at least 128 as before\")");
    let mut other = config();
    other.seg_max.set(1);
    assert_eq!(driver.rejoin(&other), "Err(\"Invalid argument: config.seg_max 1: at least 2 as before\")");
    assert!(driver.target.requests().is_empty());
    assert_eq!(driver.rejoin(&config()), "Ok(())");
    assert_eq!(sectors(&mut driver), [1]);
}

#[test]
fn rings_are_wiped_only_once_they_were_left() {
    let mut driver = Driver::recovering(16, features());
    let wiped = |driver: &Driver| driver.link.as_ref().unwrap().wipe().map_err(|error| error.to_string());
    let refused = Err("Operation not supported: v0 with new rings: its reactors have not left the old ones".to_owned());
    assert_eq!(wiped(&driver), refused);
    driver.leave();
    assert_eq!(wiped(&driver), Ok(()));
    driver.rejoin(&config());
    assert_eq!(wiped(&driver), refused);
}

#[test]
fn a_size_that_changed_is_the_bdevs_and_nobody_else_may_change_it() {
    let mut driver = Driver::recovering(16, features());
    let mut larger = config();
    larger.capacity.set(2 * BLOCKS);
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    let reply = move |outcome: Result<u64, BdevError>| heard.lock().unwrap().push(outcome.unwrap());
    driver.link.as_ref().unwrap().configure(&driver.registry, driver.features, larger.as_bytes(), Box::new(reply));
    driver.reap();
    assert_eq!(*told.lock().unwrap(), [2 * BLOCKS]);
    assert_eq!(driver.descriptor.info().unwrap().num_blocks, 2 * BLOCKS);
    reads(&mut driver, &[2 * BLOCKS - 1]);
    assert_eq!(sectors(&mut driver), [2 * BLOCKS - 1]);
    let refused = Arc::new(Mutex::new(String::new()));
    let heard = refused.clone();
    let reply = move |outcome: Result<(), BdevError>| *heard.lock().unwrap() = outcome.unwrap_err().to_string();
    qpair_bdev::lifecycle::resize(&driver.registry, "v0", 3 * BLOCKS, Box::new(reply));
    driver.reap();
    assert_eq!(*refused.lock().unwrap(), "Operation not supported: v0 cannot be resized");
}
