//! A bdev whose I/O somebody else does: in the simulator, and with a thread.

mod common {
    pub mod real;
}

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use common::real::{Rig, drivers, exerciser, one, wait};
use qpair_bdev::python::{NotWithPython, PythonBdev, Ring, Work};
use qpair_bdev::{Device, Op, Registry, Status};
use qpair_memory::Region;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{self, Act, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, check_slabs, remove};

/// Blocks of each client.
const OWN: u64 = 6 * CELL_BLOCKS;

/// Does a request on `store`.
fn perform(ring: &Ring, work: &Work, store: &mut [u8]) {
    let range = (work.offset_blocks * 512) as usize..((work.offset_blocks + work.num_blocks) * 512) as usize;
    let memory = Region::new(ring.mapping().clone());
    match (work.op, work.buffer) {
        (Op::Read, Some((offset, length))) => memory.write(offset, &store[range][..length as usize]).unwrap(),
        (Op::Write, Some((offset, length))) => memory.read(offset, &mut store[range][..length as usize]).unwrap(),
        (Op::WriteZeroes, None) => store[range].fill(0),
        (Op::Unmap | Op::Flush, None) => {}
        other => panic!("{other:?}"),
    }
}

/// Python, slow and unordered. Requests take effect when they are fetched, so that one given up is never late.
fn python(ring: Arc<Ring>, work: Event, blocks: u64, errors: bool) -> impl FnMut(u64, &mut Rng) -> Act {
    let (mut store, mut held) = (vec![0u8; (blocks * 512) as usize], VecDeque::new());
    move |now_ns, rng| {
        let fetched = ring.fetch(rng.between(1, 4) as usize);
        fetched.iter().for_each(|work| perform(&ring, work, &mut store));
        let idle = fetched.is_empty();
        held.extend(fetched);
        if !held.is_empty() && rng.chance(1, 2) {
            let position = rng.below(held.len() as u64) as usize;
            let work = held.remove(position).unwrap();
            let errno = if errors && work.op == Op::Read && rng.chance(1, 20) { libc::ENODATA } else { 0 };
            ring.complete(work.slot, errno).unwrap();
            assert_eq!(ring.complete(work.slot, 0), Err(NotWithPython { slot: work.slot }));
        }
        match (idle, held.is_empty()) {
            // Told when there is something: to sleep for ever is right.
            (true, true) => Act::On(work.twin().unwrap(), None),
            (true, false) => Act::Until(now_ns + rng.below(100_000)),
            _ => Act::Again,
        }
    }
}

fn scenario(name: &str, seeds: u64, allowed: Allowed, closes: bool) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let count = world.reactors() as u64;
        let blocks = count * OWN;
        let depth = *world.rng().pick(&[1, 2, 7, 64]);
        let bell = Event::simulated();
        let told = bell.twin().unwrap();
        let max_io = *world.rng().pick(&[512, 2048, 65536]);
        let on_work = Box::new(move || told.notify());
        let (bdev, ring) = PythonBdev::new("disk", blocks, 512, depth, max_io, None, false, on_work).unwrap();
        let registry = Registry::new(world.handles());
        registry.register(bdev.clone()).unwrap();
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        crew.start(&mut world, &registry, &Load { bdev: "disk".to_owned(), info: bdev.info(), allowed, ios: 0 }, 50..=50);
        world.add_actor(python(ring.clone(), bell, blocks, allowed.errors));
        if closes {
            let steps = world.rng().below(2000);
            world.run(steps);
            ring.close();
        }
        world.finish();
        assert_eq!(ring.free_slots(), depth as usize, "slots leaked");
        remove(&mut world, &registry, "disk");
        check_slabs(&mut world);
        crew.check_end();
        drop((registry, bdev));
        assert!(ring.is_closed());
    });
}

#[test]
fn no_request_and_no_completion_is_lost() {
    scenario("python", 600, Allowed { churn: true, ..Allowed::default() }, false);
}

#[test]
fn aborts_cross_completions_and_each_io_ends_once() {
    scenario("python aborts", 600, Allowed { aborts: true, resets: true, churn: true, errors: true, ..Allowed::default() }, false);
}

#[test]
fn closing_the_ring_fails_what_is_out() {
    // Its status is that of a module that is gone.
    scenario("python close", 400, Allowed { aborts: true, churn: true, panics: true, ..Allowed::default() }, true);
}

/// Python on a thread of its own; ends when the ring is closed.
fn consumer(ring: Arc<Ring>, bell: mpsc::Receiver<()>, blocks: u64, calls: Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut store = vec![0u8; (blocks * 512) as usize];
        while !ring.is_closed() {
            // The timeout is for the end only; a lost call shows as a job that takes for ever.
            if bell.recv_timeout(std::time::Duration::from_millis(200)).is_err() {
                continue;
            }
            calls.fetch_add(1, Ordering::Relaxed);
            loop {
                let works = ring.fetch(16);
                for work in &works {
                    perform(&ring, work, &mut store);
                    ring.complete(work.slot, 0).unwrap();
                }
                if works.is_empty() {
                    break;
                }
            }
        }
    })
}

#[test]
fn a_thread_serves_two_reactors() {
    for choice in drivers() {
        let rig = Rig::new(choice, 2);
        let (bell, rung) = mpsc::channel();
        let bell = Mutex::new(bell);
        let on_work = Box::new(move || {
            let _ = bell.lock().unwrap().send(());
        });
        let (bdev, ring) = PythonBdev::new("disk", 6000, 512, 16, 16384, None, false, on_work).unwrap();
        rig.registry.register(bdev).unwrap();
        let calls = Arc::new(AtomicU64::new(0));
        let thread = consumer(ring.clone(), rung, 6000, calls.clone());
        let jobs: Vec<_> =
            (0..2).map(|reactor| rig.start(reactor, "disk", move || exerciser(reactor as u64, reactor as u64 * 20, 20, 1000))).collect();
        jobs.into_iter().for_each(wait);
        assert_eq!(one(&rig, Op::Unmap, 0, 8), Status::SUCCESS);
        assert!(calls.load(Ordering::Relaxed) > 0);
        assert_eq!(ring.free_slots(), 16);
        rig.finish("disk");
        thread.join().unwrap();
        assert!(ring.is_closed(), "the ring outlives its bdev, closed");
    }
}

#[test]
fn on_work_is_called_once_until_fetch_finds_nothing() {
    let called = Arc::new(AtomicU64::new(0));
    let (count, quiet) = (called.clone(), Arc::new(AtomicBool::new(false)));
    let on_work = Box::new(move || {
        let _ = count.fetch_add(1, Ordering::SeqCst);
    });
    let (bdev, ring) = PythonBdev::new("disk", 100, 512, 8, 512, None, true, on_work).unwrap();
    let rig = Rig::new(qpair_reactor::driver::Choice::Epoll, 1);
    rig.registry.register(bdev).unwrap();
    let served = ring.clone();
    let stop = quiet.clone();
    let seen = called.clone();
    let thread = std::thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            let before = seen.load(Ordering::SeqCst);
            let works = served.fetch(1);
            if let Some(work) = works.first() {
                assert!(before > 0);
                assert_eq!(work.op, Op::Read);
                served.complete(work.slot, -libc::EIO).unwrap();
            }
            std::thread::yield_now();
        }
    });
    assert_eq!(one(&rig, Op::Read, 0, 1), Status::INTERNAL_DEVICE_ERROR);
    assert_eq!(one(&rig, Op::Write, 0, 1), Status::NAMESPACE_WRITE_PROTECTED);
    quiet.store(true, Ordering::SeqCst);
    thread.join().unwrap();
    assert_eq!(called.load(Ordering::SeqCst), 1);
    assert_eq!(ring.complete(0, 0), Err(NotWithPython { slot: 0 }));
    assert_eq!(ring.complete(8, 0).unwrap_err().to_string(), "slot 8 is not with Python: each fetched request is completed once");
    rig.finish("disk");
}

#[test]
fn a_ring_that_makes_no_sense_is_refused_by_name() {
    let refused =
        |depth, max_io| PythonBdev::new("disk", 100, 512, depth, max_io, None, false, Box::new(|| {})).map(drop).unwrap_err().to_string();
    assert_eq!(refused(0, 512), "Invalid argument: depth 0: 1 to 4096");
    assert_eq!(refused(4097, 512), "Invalid argument: depth 4097: 1 to 4096");
    assert_eq!(refused(1, 513), "Invalid argument: max_io_bytes 513: a multiple of block_size 512, at most 1073741824");
    assert_eq!(refused(4096, 1 << 20), "Invalid argument: max_io_bytes 1048576: a multiple of block_size 512, at most 262144");
}
