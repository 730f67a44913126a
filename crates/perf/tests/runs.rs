//! Runs on real reactors, against the bdevs that need nothing.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use qpair_bdev::{BdevError, Channel, ChannelId, Device, Info, IoId, Layer, Op, Registry, Status, lifecycle, malloc::Malloc, null::Null};
use qpair_memory::Region;
use qpair_perf::{Job, Pattern, Report, Spec, start};
use qpair_reactor::driver::Choice;
use qpair_reactor::thread::{ReactorThread, spawn};
use qpair_reactor::{Config, Reactor, ReactorId};

type Outcome = Receiver<Result<Report, BdevError>>;

struct Stack {
    registry: Arc<Registry>,
    _threads: Vec<ReactorThread>,
}

impl Stack {
    fn new(reactors: u32, device: Arc<dyn Device>) -> Self {
        let threads: Vec<ReactorThread> =
            (0..reactors).map(|core| spawn(ReactorId(core), Config::default(), Choice::Epoll, false).unwrap()).collect();
        let registry = Registry::new(threads.iter().map(|thread| thread.handle().clone()).collect());
        registry.register(device).unwrap();
        Self { registry, _threads: threads }
    }

    fn start(&self, spec: Spec) -> Result<(Arc<Job>, Outcome), BdevError> {
        let (send, receive) = channel();
        let done = Box::new(move |outcome| send.send(outcome).unwrap());
        start(&self.registry, self.registry.reactors(), spec, done).map(|job| (job, receive))
    }

    fn run(&self, spec: Spec) -> Result<Report, BdevError> {
        let (_, receive) = self.start(spec)?;
        receive.recv_timeout(Duration::from_secs(60)).expect("the run ends")
    }
}

fn malloc(blocks: u64) -> Arc<dyn Device> {
    Arc::new(Malloc::new("disk", 512, blocks, None, 0, 0).unwrap())
}

fn null() -> Arc<dyn Device> {
    Arc::new(Null::new("disk", 512, 1 << 20, None, 0))
}

fn spec(pattern: Pattern) -> Spec {
    Spec { pattern, max_ios: 1000, depth: 32, ..Spec::new("disk") }
}

fn refusal(stack: &Stack, spec: Spec) -> String {
    stack.start(spec).err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn a_counted_run_does_exactly_so_many_ios_on_all_reactors_together() {
    let stack = Stack::new(2, null());
    let report = stack.run(Spec { max_ios: 1001, ..spec(Pattern::RandRead) }).unwrap();
    assert_eq!((report.ios, report.reads, report.writes, report.errors), (1001, 1001, 0, 0));
    assert_eq!(report.bytes, 1001 * 4096);
    assert_eq!(report.per_reactor.iter().map(|share| share.ios).collect::<Vec<_>>(), [501, 500]);
    assert_eq!(report.histogram.len(), 1001);
    assert!(report.min_ns <= report.mean_ns as u64 && report.mean_ns as u64 <= report.max_ns && !report.removed);
    assert!(!report.histogram_bytes().is_empty());
}

#[test]
fn a_count_below_the_depth_ends_too() {
    let stack = Stack::new(2, null());
    assert_eq!(stack.run(Spec { max_ios: 1, ..spec(Pattern::Read) }).unwrap().ios, 1);
}

#[test]
fn a_timed_run_ends_in_time_and_counts_live() {
    let stack = Stack::new(1, null());
    let (job, receive) = stack.start(Spec { max_ios: 0, duration_ms: 100, ..spec(Pattern::RandRw) }).unwrap();
    let report = receive.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    assert!(report.elapsed_ns >= 100_000_000 && report.ios > 0, "{report:?}");
    assert_eq!(job.snapshot().ios, report.ios);
    assert_eq!(job.snapshot().bytes, report.bytes);
}

#[test]
fn an_endless_run_ends_when_stopped() {
    let stack = Stack::new(1, null());
    let (job, receive) = stack.start(Spec { max_ios: 0, ..spec(Pattern::Write) }).unwrap();
    while job.snapshot().ios == 0 {
        std::thread::yield_now();
    }
    job.stop();
    assert!(receive.recv_timeout(Duration::from_secs(60)).unwrap().unwrap().ios > 0);
}

#[test]
fn a_mixed_run_reads_the_share_asked_for() {
    let stack = Stack::new(1, null());
    let report = stack.run(Spec { read_percent: 70, max_ios: 10_000, ..spec(Pattern::RandRw) }).unwrap();
    assert_eq!(report.reads + report.writes, 10_000);
    assert!(report.reads.abs_diff(7000) < 300, "{}", report.reads);
}

#[test]
fn flush_unmap_and_write_zeroes_carry_no_data() {
    let stack = Stack::new(1, malloc(65536));
    for pattern in [Pattern::Flush, Pattern::Unmap, Pattern::WriteZeroes] {
        let report = stack.run(spec(pattern)).unwrap();
        assert_eq!((report.ios, report.reads, report.writes, report.errors), (1000, 0, 0, 0), "{pattern:?}");
    }
}

#[test]
fn what_is_written_verifies_on_malloc_in_every_pattern() {
    let stack = Stack::new(2, malloc(65536));
    for pattern in [Pattern::RandWrite, Pattern::Write, Pattern::RandRw, Pattern::Rw] {
        let report = stack.run(Spec {
            verify: true,
            read_percent: if pattern == Pattern::RandWrite { 0 } else { 50 },
            max_ios: 20_000,
            ..spec(pattern)
        });
        let report = report.unwrap();
        assert_eq!((report.errors, report.verify_errors, report.first_mismatch), (0, 0, None), "{pattern:?}");
    }
}

#[test]
fn each_write_of_a_verifying_writer_is_read_back() {
    let stack = Stack::new(1, malloc(65536));
    let report = stack.run(Spec { verify: true, ..spec(Pattern::RandWrite) }).unwrap();
    assert_eq!((report.writes, report.reads, report.ios), (1000, 1000, 2000));
}

#[test]
fn a_reader_verifies_what_a_former_run_of_its_seed_wrote() {
    let stack = Stack::new(1, malloc(8000));
    stack.run(Spec { verify: true, ..spec(Pattern::Write) }).unwrap();
    assert_eq!(stack.run(Spec { verify: true, ..spec(Pattern::RandRead) }).unwrap().verify_errors, 0);
    let other = stack.run(Spec { verify: true, seed: 2, ..spec(Pattern::RandRead) }).unwrap();
    assert_eq!(other.verify_errors, 1000);
    assert!(other.first_mismatch.unwrap().contains("byte 8: 0x0000000000000001 instead of 0x0000000000000002"));
}

#[test]
fn a_disk_that_forgets_is_found_out() {
    let stack = Stack::new(1, null());
    let report = stack.run(Spec { verify: true, ..spec(Pattern::RandWrite) }).unwrap();
    assert_eq!((report.errors, report.verify_errors), (0, 1000));
}

/// A disk in memory that changes one bit of block 77 whenever it is read, and fails all I/O of block 200 on.
struct Faulty(Malloc);
struct FaultyChannel(Box<dyn Channel>);

impl Device for Faulty {
    fn info(&self) -> Info {
        self.0.info()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(FaultyChannel(self.0.open(reactor, layer, id)?)))
    }
}

impl Channel for FaultyChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            let (op, lba, place) = (layer.io(*id).op, layer.io(*id).lba, layer.io(*id).list[0].clone());
            if lba >= 200 {
                layer.complete(*id, Status::INTERNAL_DEVICE_ERROR);
                continue;
            }
            self.0.submit(layer, reactor, &[*id]);
            if op == Op::Read && lba == 77 {
                flip(&place.region, place.offset + 300);
            }
        }
    }
}

fn flip(region: &Region, offset: u64) {
    let mut byte = [0];
    region.read(offset, &mut byte).unwrap();
    region.write(offset, &[byte[0] ^ 0x10]).unwrap();
}

fn faulty() -> Stack {
    Stack::new(1, Arc::new(Faulty(Malloc::new("disk", 512, 400, None, 0, 0).unwrap())))
}

#[test]
fn one_flipped_bit_is_found_where_it_is() {
    let stack = faulty();
    let base = Spec { verify: true, io_bytes: 512, depth: 8, max_ios: 200, length_blocks: 200, ..Spec::new("disk") };
    let report = stack.run(Spec { pattern: Pattern::Write, ..base }).unwrap();
    assert_eq!((report.errors, report.verify_errors), (0, 1));
    assert!(report.first_mismatch.unwrap().starts_with("block 77, byte 296: "));
}

#[test]
fn failed_ios_are_counted_apart() {
    let stack = faulty();
    let base = Spec { io_bytes: 512, depth: 8, max_ios: 400, ..Spec::new("disk") };
    let report = stack.run(Spec { pattern: Pattern::Read, ..base }).unwrap();
    assert_eq!((report.ios, report.errors, report.verify_errors), (200, 200, 0));
}

#[test]
fn a_bdev_removed_under_the_run_ends_it_cleanly() {
    let stack = Stack::new(2, malloc(65536));
    let (job, receive) = stack.start(Spec { max_ios: 0, ..spec(Pattern::RandRead) }).unwrap();
    while job.snapshot().ios == 0 {
        std::thread::yield_now();
    }
    let (send, gone) = channel();
    lifecycle::unregister(&stack.registry, "disk", 1_000_000_000, Box::new(move |outcome| send.send(outcome).unwrap()));
    let report = receive.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    assert!(report.removed && report.ios > 0 && report.errors == 0, "{report:?}");
    gone.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    assert!(stack.registry.list(None).unwrap().is_empty());
    assert_eq!(refusal(&stack, spec(Pattern::Read)), "No such device: bdev disk");
}

#[test]
fn more_depth_than_the_slab_has_is_refused_and_leaves_nothing_behind() {
    let stack = Stack::new(1, null());
    let outcome = stack.run(Spec { depth: 65536, io_bytes: 512, ..spec(Pattern::Read) });
    assert_eq!(outcome.err().unwrap().errno(), libc::ENOMEM);
    assert_eq!(stack.run(spec(Pattern::Read)).unwrap().ios, 1000);
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let stack = Stack::new(1, malloc(1000));
    let base = || spec(Pattern::Read);
    assert_eq!(refusal(&stack, Spec { bdev: "none".into(), ..base() }), "No such device: bdev none");
    assert_eq!(
        refusal(&stack, Spec { io_bytes: 1000, ..base() }),
        "Invalid argument: io_bytes 1000: a multiple of the block size 512 up to 67108864"
    );
    assert_eq!(refusal(&stack, Spec { depth: 0, ..base() }), "Invalid argument: depth 0: 1 to 65536");
    assert_eq!(refusal(&stack, Spec { read_percent: 101, ..base() }), "Invalid argument: read_percent 101: 0 to 100");
    assert_eq!(
        refusal(&stack, Spec { offset_blocks: 1000, ..base() }),
        "Invalid argument: offset_blocks, length_blocks 1000+0: a range within 1000 blocks"
    );
    assert_eq!(
        refusal(&stack, Spec { length_blocks: 7, ..base() }),
        "Invalid argument: length_blocks 7: at least 4096 bytes of range for 1 parts"
    );
    assert_eq!(
        refusal(&stack, Spec { verify: true, ..spec(Pattern::Unmap) }),
        "Invalid argument: verify with Unmap: a pattern that reads or writes"
    );
    assert_eq!(
        refusal(&stack, Spec { verify: true, depth: 256, ..base() }),
        "Invalid argument: depth 256: with verify at most the 125 I/Os that the range holds"
    );
    assert_eq!("sideways".parse::<Pattern>().unwrap_err().errno(), libc::EINVAL);
}
