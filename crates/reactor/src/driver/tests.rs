//! One suite for both drivers.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use qpair_memory::{Mapping, Pages, Region, Sge};

use super::*;

type Open = fn() -> Option<Box<dyn Driver>>;

fn open_uring() -> Option<Box<dyn Driver>> {
    match open(Choice::IoUring) {
        Ok(driver) => Some(driver),
        Err(error) => {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "io_uring is not to be had in CI: {error}");
            eprintln!("SKIPPED: io_uring is not to be had here: {error}");
            None
        }
    }
}

fn open_epoll() -> Option<Box<dyn Driver>> {
    Some(open(Choice::Epoll).expect("epoll"))
}

macro_rules! both {
    ($($name:ident),* $(,)?) => {
        mod io_uring {
            $(#[test] fn $name() { super::run(super::$name, super::open_uring); })*
        }
        mod epoll {
            $(#[test] fn $name() { super::run(super::$name, super::open_epoll); })*
        }
    };
}

both!(
    what_is_written_is_read_back,
    lists_scatter_and_gather,
    sync_and_durable_writes_answer,
    punch_and_zero_do_what_fallocate_does,
    a_read_at_the_end_is_short,
    what_cannot_be_begun_is_answered_with_its_errno,
    a_full_driver_gives_the_request_back,
    each_operation_is_answered_once_also_when_cancelled,
    cancelled_before_unplug_is_answered_once,
    dropping_waits_for_what_is_outstanding,
    a_file_closed_by_others_stays_open_until_done,
    a_notification_is_reported,
    a_notification_before_the_watch_is_reported,
    every_edge_after_a_report_is_reported,
    many_notifications_from_a_thread_are_not_lost,
    nothing_is_reported_after_unwatch,
    two_watches_of_one_event_both_report,
    many_watches_all_report,
    a_descriptor_that_cannot_be_polled_is_refused,
    a_simulated_event_is_refused,
    wait_ends_in_time,
    the_bell_ends_a_wait,
    a_completion_ends_a_wait,
    a_notification_ends_a_wait,
    sixteen_drivers_can_be_open,
    a_forked_child_drops_its_copy_without_harm,
);

fn run(test: fn(&mut Box<dyn Driver>, Open), open: Open) {
    if let Some(mut driver) = open() {
        test(&mut driver, open);
    }
}

fn poller(number: u32) -> PollerId {
    PollerId { index: number, generation: 1 }
}

fn temporary() -> Arc<File> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("qpair-driver-{}-{number}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a temporary file");
    std::fs::remove_file(&path).expect("it can be removed");
    Arc::new(file)
}

fn region(length: usize) -> Region {
    Region::new(Mapping::anonymous(length, Pages::Normal).expect("memory"))
}

fn sge(region: &Region, offset: u64, length: u32) -> Sge {
    Sge { region: region.clone(), offset, length }
}

fn request(op: FileOp, file: &Arc<File>, offset: u64, list: impl IntoIterator<Item = Sge>, value: u64) -> Request {
    let list = list.into_iter().collect();
    Request { op, file: FileRef::Real(file.clone()), offset, length: 0, list, poller: poller(7), value }
}

fn submit(driver: &mut Box<dyn Driver>, request: Request) {
    driver.submit(request).expect("room");
}

/// Reaps until `count` came.
fn collect(driver: &mut Box<dyn Driver>, count: usize) -> Vec<Completion> {
    let mut out = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        driver.unplug();
        driver.reap(&mut out);
        if out.len() >= count {
            return out;
        }
        assert!(Instant::now() < deadline, "{} of {count} came: {out:?}", out.len());
        driver.wait(Some(100_000_000));
    }
}

/// The results by value, each once.
fn results(driver: &mut Box<dyn Driver>, count: usize) -> HashMap<u64, i32> {
    let mut results = HashMap::new();
    for completion in collect(driver, count) {
        let Completion::Done { poller: whose, value, result } = completion else { panic!("{completion:?}") };
        assert_eq!(whose, poller(7));
        assert!(results.insert(value, result).is_none(), "operation {value} was answered twice");
    }
    assert_eq!((results.len(), driver.outstanding()), (count, 0));
    results
}

fn only(driver: &mut Box<dyn Driver>, request: Request) -> i32 {
    let value = request.value;
    submit(driver, request);
    results(driver, 1)[&value]
}

/// What comes within some time.
fn drained(driver: &mut Box<dyn Driver>, time: Duration) -> Vec<Completion> {
    let mut out = Vec::new();
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        driver.unplug();
        driver.wait(Some(1_000_000));
        driver.reap(&mut out);
    }
    out
}

fn until_ready(driver: &mut Box<dyn Driver>, whose: PollerId) {
    assert!(collect(driver, 1).contains(&Completion::Ready { poller: whose }));
}

fn what_is_written_is_read_back(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, from, into) = (temporary(), region(8192), region(8192));
    from.write(0, &[0xa5; 4096]).unwrap();
    assert_eq!(only(driver, request(FileOp::Write, &file, 4096, [sge(&from, 0, 4096)], 1)), 4096);
    assert_eq!(only(driver, request(FileOp::Read, &file, 0, [sge(&into, 0, 8192)], 2)), 8192);
    let mut bytes = [0u8; 8192];
    into.read(0, &mut bytes).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 0) && bytes[4096..].iter().all(|byte| *byte == 0xa5));
}

fn lists_scatter_and_gather(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory, into) = (temporary(), region(1 << 20), region(1 << 20));
    let pattern: Vec<u8> = (0..1024 * 512).map(|at| (at / 512) as u8 ^ at as u8).collect();
    memory.write(0, &pattern).unwrap();
    // Backwards, 1024 pieces: the longest list there may be.
    let list = (0..1024).rev().map(|piece| sge(&memory, piece * 512, 512));
    assert_eq!(only(driver, request(FileOp::Write, &file, 0, list, 1)), 512 * 1024);
    let list = (0..1024).rev().map(|piece| sge(&into, piece * 512, 512));
    assert_eq!(only(driver, request(FileOp::Read, &file, 0, list, 2)), 512 * 1024);
    let mut bytes = vec![0; pattern.len()];
    into.read(0, &mut bytes).unwrap();
    assert!(bytes == pattern);
    let list = (0..1025).map(|_| sge(&into, 0, 1));
    assert_eq!(only(driver, request(FileOp::Read, &file, 0, list, 3)), -libc::EINVAL);
}

fn sync_and_durable_writes_answer(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    for pieces in [1, 2] {
        let list = (0..pieces).map(|piece| sge(&memory, piece * 512, 512));
        assert_eq!(only(driver, request(FileOp::WriteDurable, &file, 0, list, 1)), 512 * pieces as i32);
    }
    assert_eq!(only(driver, request(FileOp::Sync, &file, 0, [], 2)), 0);
}

fn punch_and_zero_do_what_fallocate_does(driver: &mut Box<dyn Driver>, _: Open) {
    for (op, mode) in [(FileOp::Punch, libc::FALLOC_FL_PUNCH_HOLE), (FileOp::Zero, libc::FALLOC_FL_ZERO_RANGE)] {
        let (file, twin, memory) = (temporary(), temporary(), region(16384));
        memory.write(0, &[0xff; 16384]).unwrap();
        for file in [&file, &twin] {
            assert_eq!(only(driver, request(FileOp::Write, file, 0, [sge(&memory, 0, 16384)], 0)), 16384);
        }
        // SAFETY: a system call on a descriptor of this test.
        let rc = unsafe { libc::fallocate(twin.as_raw_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, 4096, 4096) };
        let expected = if rc == 0 { 0 } else { -io::Error::last_os_error().raw_os_error().unwrap() };
        let mut range = request(op, &file, 4096, [], 1);
        range.length = 4096;
        assert_eq!(only(driver, range), expected, "{op:?}");
        assert_eq!(only(driver, request(FileOp::Read, &file, 0, [sge(&memory, 0, 16384)], 2)), 16384);
        let mut bytes = [0u8; 16384];
        memory.read(0, &mut bytes).unwrap();
        let inside = if expected == 0 { 0 } else { 0xff };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == if at / 4096 == 1 { inside } else { 0xff }), "{op:?}");
    }
}

fn a_read_at_the_end_is_short(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    file.set_len(1000).unwrap();
    assert_eq!(only(driver, request(FileOp::Read, &file, 512, [sge(&memory, 0, 4096)], 1)), 488);
    assert_eq!(only(driver, request(FileOp::Read, &file, 1000, [sge(&memory, 0, 2048), sge(&memory, 2048, 2048)], 2)), 0);
}

fn what_cannot_be_begun_is_answered_with_its_errno(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    let beyond = i64::MAX as u64 + 1;
    assert_eq!(only(driver, request(FileOp::Read, &file, beyond, [sge(&memory, 0, 512)], 1)), -libc::EINVAL);
    assert_eq!(only(driver, request(FileOp::Read, &file, u64::MAX, [sge(&memory, 0, 512)], 2)), -libc::EINVAL);
    let mut range = request(FileOp::Punch, &file, 4096, [], 3);
    range.length = u64::MAX;
    assert_eq!(only(driver, range), -libc::EINVAL);
    assert_eq!(only(driver, request(FileOp::Write, &file, 0, [sge(&memory, 4000, 512)], 4)), -libc::EFAULT);
    let mut simulated = request(FileOp::Sync, &file, 0, [], 5);
    simulated.file = FileRef::Simulated(0);
    assert_eq!(only(driver, simulated), -libc::EBADF);
    let path = std::env::temp_dir();
    let directory = Arc::new(File::options().read(true).custom_flags(libc::O_DIRECTORY).open(path).unwrap());
    assert_eq!(only(driver, request(FileOp::Write, &directory, 0, [sge(&memory, 0, 512)], 6)), -libc::EBADF);
}

fn a_full_driver_gives_the_request_back(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    for round in 0..3 {
        for value in 0..DEPTH as u64 {
            submit(driver, request(FileOp::Write, &file, value * 512, [sge(&memory, 0, 512)], value));
        }
        let refused = driver.submit(request(FileOp::Sync, &file, 0, [], 99_999)).expect_err("it is full");
        assert_eq!((refused.value, driver.outstanding()), (99_999, DEPTH), "round {round}");
        let results = results(driver, DEPTH);
        assert!(results.values().all(|result| *result == 512));
    }
    assert_eq!(memory.holds(), 1);
}

fn each_operation_is_answered_once_also_when_cancelled(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    for round in 0..20 {
        for value in 0..300 {
            let op = if value % 50 == 0 { FileOp::Sync } else { FileOp::Write };
            submit(driver, request(op, &file, value * 512, (op == FileOp::Write).then(|| sge(&memory, 0, 512)), value));
            if value == 200 {
                driver.unplug();
            }
        }
        driver.cancel_all();
        for (value, result) in results(driver, 300) {
            let done = if value % 50 == 0 { 0 } else { 512 };
            assert!(result == done || result == -libc::ECANCELED || result == -libc::EINTR, "round {round}: {value}: {result}");
        }
        driver.cancel_all();
    }
    assert_eq!(drained(driver, Duration::from_millis(20)), []);
    assert_eq!(memory.holds(), 1);
}

fn cancelled_before_unplug_is_answered_once(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    submit(driver, request(FileOp::Write, &file, 0, [sge(&memory, 0, 512)], 1));
    driver.cancel_all();
    let result = results(driver, 1)[&1];
    assert!(result == 512 || result == -libc::ECANCELED, "{result}");
}

fn dropping_waits_for_what_is_outstanding(_: &mut Box<dyn Driver>, open: Open) {
    let (file, memory) = (temporary(), region(1 << 20));
    file.set_len(1 << 30).unwrap();
    for unplug in [false, true] {
        let mut driver = open().expect("it opened before");
        for value in 0..DEPTH as u64 {
            submit(&mut driver, request(FileOp::Read, &file, value << 20, [sge(&memory, 0, 1 << 20)], value));
        }
        if unplug {
            driver.unplug();
        }
        assert_eq!(memory.holds(), 1 + DEPTH);
        drop(driver);
        assert_eq!((memory.holds(), Arc::strong_count(&file)), (1, 1));
        // Nobody writes to it any more.
        memory.write(0, &vec![0x77; 1 << 20]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let mut bytes = vec![0; 1 << 20];
        memory.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0x77));
    }
}

fn a_file_closed_by_others_stays_open_until_done(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    for value in 0..64 {
        submit(driver, request(FileOp::Write, &file, value * 512, [sge(&memory, 0, 512)], value));
    }
    drop(file);
    assert!(results(driver, 64).values().all(|result| *result == 512));
}

fn a_notification_is_reported(driver: &mut Box<dyn Driver>, _: Open) {
    let event = Event::new().unwrap();
    driver.watch(&event, poller(1)).unwrap();
    assert_eq!(drained(driver, Duration::from_millis(5)), []);
    event.notify();
    until_ready(driver, poller(1));
}

fn a_notification_before_the_watch_is_reported(driver: &mut Box<dyn Driver>, _: Open) {
    let event = Event::new().unwrap();
    event.notify();
    driver.watch(&event, poller(1)).unwrap();
    until_ready(driver, poller(1));
}

fn every_edge_after_a_report_is_reported(driver: &mut Box<dyn Driver>, _: Open) {
    let event = Event::new().unwrap();
    driver.watch(&event, poller(1)).unwrap();
    for round in 0..2000 {
        event.notify();
        // Whether anybody reads the count makes no difference.
        if round % 3 == 0 {
            event.take();
            event.notify();
        }
        until_ready(driver, poller(1));
        let mut rest = Vec::new();
        driver.reap(&mut rest);
    }
}

fn many_notifications_from_a_thread_are_not_lost(driver: &mut Box<dyn Driver>, _: Open) {
    const COUNT: u64 = 20_000;
    let event = Event::new().unwrap();
    driver.watch(&event, poller(1)).unwrap();
    let published = Arc::new(AtomicU64::new(0));
    let (twin, counter) = (event.twin().unwrap(), published.clone());
    let thread = std::thread::spawn(move || {
        for number in 1..=COUNT {
            counter.store(number, Ordering::SeqCst);
            twin.notify();
        }
    });
    let mut seen = 0;
    while seen < COUNT {
        // Each report is followed by one look, as a poller does.
        until_ready(driver, poller(1));
        seen = published.load(Ordering::SeqCst);
    }
    thread.join().unwrap();
}

fn nothing_is_reported_after_unwatch(driver: &mut Box<dyn Driver>, _: Open) {
    let (event, other) = (Event::new().unwrap(), Event::new().unwrap());
    for round in 0..50 {
        let watch = driver.watch(&event, poller(1)).unwrap();
        let kept = driver.watch(&other, poller(2)).unwrap();
        if round % 2 == 0 {
            driver.unplug();
        }
        if round % 3 == 0 {
            event.notify();
            driver.wait(Some(1_000_000));
        }
        driver.unwatch(watch);
        event.notify();
        other.notify();
        let ready = collect(driver, 1);
        assert!(ready.iter().all(|ready| *ready == Completion::Ready { poller: poller(2) }), "{ready:?}");
        driver.unwatch(kept);
        driver.unwatch(watch);
    }
    event.notify();
    assert_eq!(drained(driver, Duration::from_millis(10)), []);
}

fn two_watches_of_one_event_both_report(driver: &mut Box<dyn Driver>, _: Open) {
    let event = Event::new().unwrap();
    let first = driver.watch(&event, poller(1)).unwrap();
    driver.watch(&event, poller(2)).unwrap();
    event.notify();
    let both = collect(driver, 2);
    assert!([1, 2].iter().all(|number| both.contains(&Completion::Ready { poller: poller(*number) })), "{both:?}");
    driver.unwatch(first);
    event.notify();
    until_ready(driver, poller(2));
}

fn many_watches_all_report(driver: &mut Box<dyn Driver>, _: Open) {
    let events: Vec<Event> = (0..200).map(|_| Event::new().unwrap()).collect();
    for (number, event) in events.iter().enumerate() {
        driver.watch(event, poller(number as u32)).unwrap();
    }
    for _ in 0..20 {
        events.iter().for_each(Event::notify);
        let mut seen = [false; 200];
        while seen.contains(&false) {
            for completion in collect(driver, 1) {
                let Completion::Ready { poller } = completion else { panic!("{completion:?}") };
                seen[poller.index as usize] = true;
            }
        }
    }
}

fn a_descriptor_that_cannot_be_polled_is_refused(driver: &mut Box<dyn Driver>, _: Open) {
    let file = Event::from_fd(OwnedFd::from(temporary().try_clone().unwrap()));
    assert_eq!(driver.watch(&file, poller(1)).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(drained(driver, Duration::from_millis(5)), []);
}

fn a_simulated_event_is_refused(driver: &mut Box<dyn Driver>, _: Open) {
    let error = driver.watch(&Event::simulated(), poller(1)).unwrap_err();
    assert_eq!(error.to_string(), "a simulated event has no descriptor");
}

fn wait_ends_in_time(driver: &mut Box<dyn Driver>, _: Open) {
    for timeout in [0, 50_000, 30_000_000] {
        let begun = Instant::now();
        driver.wait(Some(timeout));
        let elapsed = begun.elapsed();
        assert!(elapsed >= Duration::from_nanos(timeout) && elapsed < Duration::from_secs(10), "{timeout} ns took {elapsed:?}");
    }
}

fn the_bell_ends_a_wait(driver: &mut Box<dyn Driver>, _: Open) {
    let bell = driver.bell();
    for _ in 0..100 {
        bell.notify();
        driver.wait(None);
        let mut out = Vec::new();
        driver.reap(&mut out);
        assert_eq!(out, []);
    }
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        bell.notify();
    });
    driver.wait(None);
    thread.join().unwrap();
}

fn a_completion_ends_a_wait(driver: &mut Box<dyn Driver>, _: Open) {
    let (file, memory) = (temporary(), region(4096));
    for value in 0..200 {
        submit(driver, request(FileOp::WriteDurable, &file, 0, [sge(&memory, 0, 512)], value));
        let mut out = Vec::new();
        // Without a time: a lost wake-up hangs here. A wait may end early, hence the loop.
        while out.is_empty() {
            driver.wait(None);
            driver.reap(&mut out);
        }
        assert_eq!(out, [Completion::Done { poller: poller(7), value, result: 512 }]);
    }
}

fn a_notification_ends_a_wait(driver: &mut Box<dyn Driver>, _: Open) {
    let event = Event::new().unwrap();
    driver.watch(&event, poller(1)).unwrap();
    for _ in 0..100 {
        event.notify();
        let mut out = Vec::new();
        while out.is_empty() {
            driver.wait(None);
            driver.reap(&mut out);
        }
    }
}

fn sixteen_drivers_can_be_open(_: &mut Box<dyn Driver>, open: Open) {
    let drivers: Vec<_> = (0..16).filter_map(|_| open()).collect();
    assert_eq!(drivers.len(), 16);
}

fn a_forked_child_drops_its_copy_without_harm(_: &mut Box<dyn Driver>, open: Open) {
    let mut driver = open().expect("it opened before");
    let (file, memory) = (temporary(), region(4096));
    assert_eq!(only(&mut driver, request(FileOp::Write, &file, 0, [sge(&memory, 0, 512)], 0)), 512);
    for value in 0..100 {
        submit(&mut driver, request(FileOp::WriteDurable, &file, value * 512, [sge(&memory, 0, 512)], value));
    }
    driver.unplug();
    // SAFETY: the child only drops what it inherited and ends without running anything else; a child that hangs is ended
    // by its alarm.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            libc::alarm(20);
            drop(driver);
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: `status` is a valid place to write to.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child ended by itself");
    assert!(results(&mut driver, 100).values().all(|result| *result == 512));
}

/// A pipe's two ends; a read of an empty one never ends by itself.
fn pipe() -> (Arc<File>, File) {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors, which nobody else owns.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (Arc::new(File::from_raw_fd(ends[0])), File::from_raw_fd(ends[1]))
    }
}

#[test]
fn io_uring_cancels_what_would_never_end_though_its_completion_ring_overflows() {
    let Some(mut driver) = open_uring() else { return };
    let ((reader, _writer), memory) = (pipe(), region(4096));
    for value in 0..DEPTH as u64 {
        submit(&mut driver, request(FileOp::Read, &reader, 0, [sge(&memory, 0, 512)], value));
    }
    assert_eq!(drained(&mut driver, Duration::from_millis(5)), []);
    // Six reports for each of 1024 requests do not fit in 4096 entries.
    (0..5).for_each(|_| driver.cancel_all());
    let results = results(&mut driver, DEPTH);
    assert!(results.values().all(|result| *result == -libc::ECANCELED || *result == -libc::EINTR));
    let event = Event::new().unwrap();
    driver.watch(&event, poller(1)).unwrap();
    event.notify();
    until_ready(&mut driver, poller(1));
}

#[test]
fn io_uring_is_dropped_with_a_read_that_would_never_end() {
    let Some(mut driver) = open_uring() else { return };
    let ((reader, _writer), memory) = (pipe(), region(4096));
    submit(&mut driver, request(FileOp::Read, &reader, 0, [sge(&memory, 0, 512)], 0));
    assert_eq!(drained(&mut driver, Duration::from_millis(5)), []);
    drop(driver);
    assert_eq!(memory.holds(), 1);
}
