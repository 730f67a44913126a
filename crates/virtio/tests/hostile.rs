//! Targets that break the rules, or say nothing.

mod support;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::{BdevError, IoFlags, Notice, Op, Status, lifecycle};
use qpair_virtio::{QueueSetup, VirtioBlk, VirtioLayout};
use support::{Driver, config, features};
use zerocopy::IntoBytes;

/// After `lie` everything in flight ends once with an error, and so does all that comes later.
fn fails(size: u32, lie: impl Fn(&mut Driver)) {
    let mut driver = Driver::new(size, features());
    let told = failures(&driver);
    let ids = driver.submit(&[(Op::Read, 0, 8, IoFlags::empty()), (Op::Read, 8, 8, IoFlags::empty())]);
    driver.target.requests();
    lie(&mut driver);
    let mut back = Vec::new();
    for _ in 0..3 {
        back.extend(driver.reap());
    }
    back.sort_by_key(|(id, _)| *id);
    assert_eq!(back, [(ids[0], Status::INTERNAL_DEVICE_ERROR), (ids[1], Status::INTERNAL_DEVICE_ERROR)]);
    let later = driver.read(16);
    assert_eq!(driver.reap(), [(later, Status::INTERNAL_DEVICE_ERROR)]);
    assert!(driver.target.requests().is_empty(), "nothing more goes to it");
    let told = told.lock().unwrap();
    let [reason] = &told[..] else { panic!("told {told:?}") };
    assert!(reason.starts_with("queue 0: ") && reason.ends_with("; the device fails all I/O from now on"), "{reason}");
}

/// The reasons of failures that are told.
fn failures(driver: &Driver) -> Arc<Mutex<Vec<String>>> {
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = told.clone();
    driver.registry.listen(move |notice| {
        if let Notice::Failed { name, reason } = notice {
            assert_eq!(name, "v0");
            heard.lock().unwrap().push(reason.clone());
        }
    });
    told
}

#[test]
fn a_target_that_fails_io_is_told_once() {
    let mut driver = Driver::new(16, features());
    let told = failures(&driver);
    for _ in 0..5 {
        let id = driver.read(8);
        let request = driver.target.requests().remove(0);
        driver.target.answer(&request, 1);
        assert_eq!(driver.reap(), [(id, Status::INTERNAL_DEVICE_ERROR)]);
    }
    assert_eq!(*told.lock().unwrap(), ["the target failed an I/O (Read of 8 blocks at block 8)"]);
}

#[test]
fn a_used_id_out_of_range_fails_the_device() {
    fails(16, |driver| driver.target.lie(0, 16, 1, 1));
    fails(16, |driver| driver.target.lie(0, u32::MAX, 1, 1));
    fails(512, |driver| driver.target.lie(0, 512, 1, 1));
}

#[test]
fn a_used_id_inside_a_chain_fails_the_device() {
    fails(512, |driver| driver.target.lie(0, 1, 1, 1));
}

#[test]
fn a_used_id_not_under_way_fails_the_device() {
    fails(16, |driver| driver.target.lie(0, 9, 1, 1));
}

#[test]
fn a_jumping_used_index_fails_the_device() {
    fails(16, |driver| driver.target.lie(0, 0, 4097, 3));
    fails(16, |driver| driver.target.lie(0, 0, 4097, 40_000));
}

#[test]
fn a_used_length_beyond_the_buffers_fails_the_device() {
    fails(16, |driver| driver.target.lie(0, 0, 4098, 1));
    fails(16, |driver| driver.target.lie(0, 0, u32::MAX, 1));
}

#[test]
fn a_request_used_twice_ends_once() {
    let mut driver = Driver::new(16, features());
    let ids = driver.submit(&[(Op::Read, 0, 8, IoFlags::empty()), (Op::Read, 8, 8, IoFlags::empty())]);
    let request = driver.target.requests().remove(0);
    driver.target.answer(&request, 0);
    driver.target.lie(1, u32::from(request.head), 4097, 2);
    let mut back = driver.reap();
    back.sort_by_key(|(id, _)| *id);
    assert_eq!(back, [(ids[0], Status::SUCCESS), (ids[1], Status::INTERNAL_DEVICE_ERROR)]);
}

#[test]
fn a_flush_that_was_about_to_follow_never_goes_to_a_target_found_lying() {
    let mut driver = Driver::new(16, features());
    driver.submit(&[(Op::Write, 0, 1, IoFlags::FUA), (Op::Write, 8, 1, IoFlags::FUA)]);
    let first = driver.target.requests().remove(0);
    driver.target.lie(1, 99, 1, 0);
    driver.target.lie(0, u32::from(first.head), 1, 2);
    assert_eq!(driver.reap().len(), 2);
    let later = driver.read(16);
    assert_eq!(driver.reap(), [(later, Status::INTERNAL_DEVICE_ERROR)]);
    assert_eq!(driver.target.requests(), []);
}

#[test]
fn a_read_without_its_data_or_status_is_an_error_of_that_read_alone() {
    for length in [0, 1, 4096] {
        let mut driver = Driver::new(16, features());
        let id = driver.read(0);
        let request = driver.target.requests().remove(0);
        driver.target.lie(0, u32::from(request.head), length, 1);
        assert_eq!(driver.reap(), [(id, Status::DATA_TRANSFER_ERROR)]);
    }
}

#[test]
fn a_silent_target_is_given_up_when_the_device_is_unregistered_and_not_before() {
    let mut driver = Driver::new(16, features());
    let id = driver.read(0);
    driver.layer.borrow_mut().abort(&mut driver.reactor, id);
    assert_eq!(driver.reap(), [], "an abort is a hint");
    let gone = Arc::new(AtomicU32::new(0));
    let told = gone.clone();
    let reply = Box::new(move |outcome: Result<(), BdevError>| {
        outcome.unwrap();
        told.fetch_add(1, Ordering::SeqCst);
    });
    lifecycle::unregister(&driver.registry, "v0", 1_000_000, reply);
    assert_eq!(driver.reap(), []);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(driver.reap(), [(id, Status::ABORT_REQUESTED)]);
    driver.reap();
    assert_eq!(gone.load(Ordering::SeqCst), 1);
    assert!(driver.registry.list(Some("v0")).is_err());
    // A late answer finds memory, and nobody.
    let request = driver.target.requests().remove(0);
    driver.target.answer(&request, 0);
    assert_eq!(driver.reap(), []);
}

fn refusal(features: u64, bytes: &[u8]) -> String {
    let layout = VirtioLayout::new(1, 16, 65536).unwrap();
    let event = || qpair_reactor::event::Event::new().unwrap();
    let queues = vec![QueueSetup { size: 16, kick: event(), call: event() }];
    VirtioBlk::new("v0", layout, features, bytes, queues).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn features_and_configuration_that_cannot_work_are_refused_by_name() {
    use qpair_wire::virtio_blk::BlkFeatures;
    assert_eq!(refusal(features(), &[0; 4]), "Invalid argument: config of 4 bytes: at least 8 bytes");
    assert_eq!(refusal(features(), &[0; 60]), "Invalid argument: config.capacity 0: at least one block of 1 sectors");
    let mut odd = config();
    odd.blk_size.set(1000);
    assert_eq!(
        refusal(features() | BlkFeatures::BLK_SIZE.bits(), odd.as_bytes()),
        "Invalid argument: config.blk_size 1000: a power of two from 512 to 65536"
    );
    let mut huge = config();
    huge.capacity.set(u64::MAX);
    assert!(refusal(features(), huge.as_bytes()).starts_with("Invalid argument: num_blocks 18446744073709551615"));
    assert_eq!(refusal(features(), config().as_bytes()), "");
}
