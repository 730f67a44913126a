//! The driver's ring against an independent device side (rust-vmm's `virtio-queue`).

mod support;

use proptest::prelude::*;
use qpair_bdev::{IoFlags, Op, Status};
use qpair_wire::virtio::Features;
use support::{Driver, features};
use virtio_queue::QueueT;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const NONE: IoFlags = IoFlags::empty();

/// A small ring goes through indirect tables, a large one does not, and one without the feature never does.
fn rings() -> [(u32, u64); 3] {
    [(16, features()), (512, features()), (64, features() & !Features::INDIRECT_DESC.bits())]
}

#[test]
fn a_read_is_seen_as_header_data_status_and_its_data_arrives() {
    for (size, features) in rings() {
        let mut driver = Driver::new(size, features);
        let id = driver.read(40);
        let requests = driver.target.requests();
        assert_eq!(requests.len(), 1);
        let request = &requests[0];
        assert_eq!((request.kind, request.sector, request.bytes()), (IN, 40, 4096));
        assert!(request.data.iter().all(|piece| piece.2));
        driver.target.write(request.data[0].0, &[0x5c; 4096]);
        driver.target.answer(request, 0);
        assert_eq!(driver.reap(), [(id, Status::SUCCESS)]);
        let mut bytes = [0; 4096];
        driver.plain.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0x5c; 4096]);
    }
}

#[test]
fn a_write_carries_its_data() {
    let mut driver = Driver::new(16, features());
    driver.plain.write(0, &[0xab; 1024]).unwrap();
    let ids = driver.submit(&[(Op::Write, 7, 2, NONE)]);
    let requests = driver.target.requests();
    assert_eq!((requests[0].kind, requests[0].sector), (OUT, 7));
    assert_eq!(driver.target.read(requests[0].data[0].0, requests[0].bytes()), [0xab; 1024]);
    driver.target.answer(&requests[0], 0);
    assert_eq!(driver.reap(), [(ids[0], Status::SUCCESS)]);
}

#[test]
fn data_in_the_memfd_is_used_where_it_is() {
    let mut driver = Driver::new(16, features());
    let buffer = driver.descriptor.buffer(8192).unwrap();
    driver.plain = qpair_memory::Region::new(buffer.mapping().clone());
    let start = buffer.offset();
    let mut layer = driver.layer.borrow_mut();
    let id = layer.take().unwrap();
    let io = layer.io_mut(id);
    (io.op, io.lba, io.blocks) = (Op::Read, 0, 2);
    for piece in [0, 4096] {
        io.list.push(qpair_memory::Sge { region: driver.plain.clone(), offset: start + piece, length: 512 });
    }
    io.push(driver.queue, 0);
    layer.submit(&mut driver.reactor, driver.channel, &[id]);
    layer.unplug(&mut driver.reactor);
    drop(layer);
    let requests = driver.target.requests();
    assert_eq!(requests[0].data, [(start, 512, true), (start + 4096, 512, true)]);
    driver.target.answer(&requests[0], 0);
    assert_eq!(driver.reap(), [(id, Status::SUCCESS)]);
}

#[test]
fn flush_discard_and_write_zeroes_are_what_the_standard_says() {
    let mut driver = Driver::new(64, features());
    driver.submit(&[
        (Op::Flush, 0, 0, NONE),
        (Op::Unmap, 100, 16, NONE),
        (Op::WriteZeroes, 200, 8, NONE),
        (Op::WriteZeroes, 300, 8, IoFlags::NO_UNMAP),
    ]);
    let requests = driver.target.requests();
    let kinds: Vec<u32> = requests.iter().map(|request| request.kind).collect();
    assert_eq!(kinds, [FLUSH, DISCARD, WRITE_ZEROES, WRITE_ZEROES]);
    assert!(requests[0].data.is_empty());
    let segment = |index: usize| {
        let (address, length, writes) = requests[index].data[0];
        assert_eq!((length, writes), (16, false));
        let bytes = driver.target.read(address, 16);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(8), word(12))
    };
    assert_eq!([segment(1), segment(2), segment(3)], [(100, 16, 0), (200, 8, 1), (300, 8, 0)]);
    for request in &requests {
        driver.target.answer(request, 0);
    }
    assert!(driver.reap().iter().all(|(_, status)| *status == Status::SUCCESS));
}

#[test]
fn a_durable_write_is_done_only_after_the_flush_that_follows_it() {
    let mut driver = Driver::new(64, features());
    let ids = driver.submit(&[(Op::Write, 0, 1, IoFlags::FUA)]);
    let write = driver.target.requests().remove(0);
    assert_eq!(write.kind, OUT);
    driver.target.answer(&write, 0);
    assert_eq!(driver.reap(), []);
    let flush = driver.target.requests().remove(0);
    assert_eq!(flush.kind, FLUSH);
    driver.target.answer(&flush, 0);
    assert_eq!(driver.reap(), [(ids[0], Status::SUCCESS)]);
}

#[test]
fn durable_write_zeroes_and_unmap_are_flushed_as_writes_are() {
    for op in [Op::WriteZeroes, Op::Unmap] {
        let mut driver = Driver::new(64, features());
        let ids = driver.submit(&[(op, 0, 8, IoFlags::FUA)]);
        let change = driver.target.requests().remove(0);
        driver.target.answer(&change, 0);
        assert_eq!(driver.reap(), [], "{op:?}");
        let flush = driver.target.requests().remove(0);
        assert_eq!(flush.kind, FLUSH);
        driver.target.answer(&flush, 0);
        assert_eq!(driver.reap(), [(ids[0], Status::SUCCESS)]);
    }
}

#[test]
fn a_failed_durable_write_is_not_flushed() {
    let mut driver = Driver::new(64, features());
    let ids = driver.submit(&[(Op::Write, 0, 1, IoFlags::FUA)]);
    let write = driver.target.requests().remove(0);
    driver.target.answer(&write, 1);
    assert_eq!(driver.reap(), [(ids[0], Status::INTERNAL_DEVICE_ERROR)]);
    assert_eq!(driver.target.requests(), []);
}

#[test]
fn the_targets_status_is_the_ios() {
    let mut driver = Driver::new(64, features());
    for (status, expected) in
        [(0, Status::SUCCESS), (1, Status::INTERNAL_DEVICE_ERROR), (2, Status::INVALID_OPCODE), (99, Status::INTERNAL_DEVICE_ERROR)]
    {
        let id = driver.read(0);
        let request = driver.target.requests().remove(0);
        driver.target.answer(&request, status);
        assert_eq!(driver.reap(), [(id, expected)]);
    }
}

#[test]
fn more_than_the_ring_takes_waits_and_goes_out_later() {
    let mut driver = Driver::new(16, features());
    let batch: Vec<_> = (0..40).map(|index| (Op::Read, index, 1, NONE)).collect();
    driver.submit(&batch);
    let mut done = 0;
    let mut sectors = Vec::new();
    while done < 40 {
        let requests = driver.target.requests();
        assert!(!requests.is_empty() && requests.len() <= 16);
        for request in &requests {
            sectors.push(request.sector);
            driver.target.answer(request, 0);
        }
        done += driver.reap().len();
    }
    assert_eq!(sectors, (0..40).collect::<Vec<u64>>());
}

#[test]
fn a_polling_target_gets_no_kick_and_a_sleeping_one_gets_one_a_batch() {
    let mut driver = Driver::new(64, features());
    driver.target.queue.enable_notification(&driver.target.memory).unwrap();
    driver.submit(&[(Op::Read, 0, 1, NONE), (Op::Read, 1, 1, NONE)]);
    assert_eq!(driver.kick.take(), 1);
    // `avail_event` still names the first entry: nobody asked for the next.
    driver.read(2);
    assert_eq!(driver.kick.take(), 0);
}

#[test]
fn without_event_index_the_flag_decides_about_kicks() {
    let mut driver = Driver::new(64, features() & !Features::RING_EVENT_IDX.bits());
    driver.target.queue.disable_notification(&driver.target.memory).unwrap();
    driver.read(0);
    assert_eq!(driver.kick.take(), 0);
    driver.target.queue.enable_notification(&driver.target.memory).unwrap();
    driver.read(8);
    assert_eq!(driver.kick.take(), 1);
}

#[test]
fn an_armed_driver_asks_for_an_interrupt_and_wakes_by_it() {
    for mask in [0, Features::RING_EVENT_IDX.bits()] {
        let mut driver = Driver::with_spin(64, features() & !mask, 0);
        let id = driver.read(0);
        assert_eq!(driver.reap(), [], "turns without work arm the poller (spin time 0)");
        let request = driver.target.requests().remove(0);
        assert!(driver.target.answer(&request, 0), "armed: it wants an interrupt");
        assert_eq!(driver.reap(), [], "asleep: it does not look by itself");
        driver.call.notify();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(driver.reap(), [(id, Status::SUCCESS)]);
    }
}

#[test]
fn indices_wrap_at_65536_with_and_without_event_index() {
    for features in [features(), features() & !Features::RING_EVENT_IDX.bits()] {
        let mut driver = Driver::new(16, features);
        driver.target.queue.enable_notification(&driver.target.memory).unwrap();
        let mut total = 0u32;
        while total < 70_000 {
            let batch: Vec<_> = (0..15).map(|index| (Op::Flush, index, 0, NONE)).collect();
            driver.submit(&batch);
            assert_eq!(driver.kick.take(), 1, "after {total}");
            let requests = driver.target.requests();
            assert_eq!(requests.len(), 15);
            for request in &requests {
                driver.target.answer(request, 0);
            }
            driver.target.queue.enable_notification(&driver.target.memory).unwrap();
            let mut back = 0;
            while back < 15 {
                back += driver.reap().len();
            }
            total += 15;
            if total.is_multiple_of(6000) {
                // Another channel goes on where this one left the ring.
                driver.reopen();
                assert_eq!(driver.kick.take(), 1, "a ring is started by its first kick");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is submitted and in whatever order it is answered: each I/O ends once, with its own status and data.
    #[test]
    fn answers_in_any_order_reach_their_own(ring in 0usize..3, order in prop::collection::vec((any::<u16>(), 1u64..17, 0u8..3), 1..60)) {
        let (size, features) = rings()[ring];
        let mut driver = Driver::new(size, features);
        let mut expected = std::collections::HashMap::new();
        let mut batch = Vec::new();
        for (index, (_, blocks, _)) in order.iter().enumerate() {
            batch.push((if index % 3 == 0 { Op::Write } else { Op::Read }, index as u64 * 17, *blocks, NONE));
        }
        for (index, id) in driver.submit(&batch).into_iter().enumerate() {
            expected.insert(index as u64 * 17, (id, order[index]));
        }
        let mut results = std::collections::HashMap::new();
        let mut waiting = Vec::new();
        let mut step = 0usize;
        while results.len() < order.len() {
            waiting.extend(driver.target.requests());
            prop_assert!(!waiting.is_empty());
            let pick = usize::from(order[step % order.len()].0) % waiting.len();
            step += 1;
            let request = waiting.swap_remove(pick);
            let (_, (_, blocks, status)) = expected[&request.sector];
            prop_assert_eq!(u64::from(request.bytes()), blocks * 512);
            driver.target.answer(&request, status);
            for (id, status) in driver.reap() {
                prop_assert!(results.insert(id, status).is_none(), "twice");
            }
        }
        for (id, (_, _, status)) in expected.values() {
            let good = [Status::SUCCESS, Status::INTERNAL_DEVICE_ERROR, Status::INVALID_OPCODE][usize::from(*status)];
            prop_assert_eq!(results[id], good);
        }
    }
}
