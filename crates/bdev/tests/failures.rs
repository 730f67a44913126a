//! What fails is told once: of all its reactors and for all its I/O; again when it failed anew after it was well.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::layer::health::QUIET_NS;
use qpair_bdev::measures;
use qpair_bdev::{BdevError, Channel, ChannelId, Device, FileBdev, Info, IoId, Layer, Notice, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::driver::FileRef;
use qpair_reactor::sim::{Faults, World};
use qpair_reactor::{Poller, Reactor};

const REACTORS: usize = 3;

struct Nobody;

impl Poller for Nobody {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

/// A front end on every reactor.
struct Bench {
    world: World,
    registry: Arc<Registry>,
    notices: Arc<Mutex<Vec<Notice>>>,
    ends: Vec<(Rc<RefCell<Layer>>, QueueId, ChannelId)>,
    memory: Region,
}

impl Bench {
    fn new(make: impl FnOnce(&World) -> Arc<dyn Device>) -> Self {
        let mut world = World::new(7, REACTORS);
        let registry = Registry::new(world.handles());
        registry.register(make(&world)).unwrap();
        let notices: Arc<Mutex<Vec<Notice>>> = Arc::default();
        let heard = notices.clone();
        registry.listen(move |notice| heard.lock().unwrap().push(notice.clone()));
        let descriptor = registry.open("disk", true, |_| {}).unwrap();
        let open = |reactor: &mut Reactor| {
            let layer = Layer::of(reactor);
            let poller = reactor.add_poller("front end", Box::new(Nobody));
            let queue = layer.borrow_mut().add_queue(reactor.waker(poller).unwrap());
            let channel = descriptor.channel(reactor, &mut layer.borrow_mut()).unwrap();
            (layer, queue, channel)
        };
        let ends = (0..REACTORS).map(|number| world.with(number, open)).collect();
        let memory = Region::new(Mapping::anonymous(4096, Pages::Normal).unwrap());
        Self { world, registry, notices, ends, memory }
    }

    /// One I/O on a reactor, to its end.
    fn io(&mut self, reactor: usize, op: Op) -> Status {
        let (layer, queue, channel) = self.ends[reactor].clone();
        let memory = self.memory.clone();
        let submit = |reactor: &mut Reactor| {
            let mut layer = layer.borrow_mut();
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks) = if op == Op::Flush { (op, 0, 0) } else { (op, 5, 2) };
            if op != Op::Flush {
                io.list.push(Sge { region: memory, offset: 0, length: 1024 });
            }
            io.push(queue, 0);
            layer.submit(reactor, channel, &[id]);
            layer.unplug(reactor);
        };
        self.world.with(reactor, submit);
        self.world.settle();
        let reap = |reactor: &mut Reactor| {
            let mut done: Vec<IoId> = Vec::new();
            let mut layer = layer.borrow_mut();
            layer.reap(reactor, queue, &mut done);
            let [id] = done[..] else { panic!("{done:?}") };
            layer.finish(id).1
        };
        self.world.with(reactor, reap)
    }

    fn pass(&mut self, ns: u64) {
        self.world.with(0, move |reactor| {
            reactor.after(ns, |_| {});
        });
        self.world.settle();
    }

    fn set_errors(&mut self, chance: u64) {
        self.world.set_faults(Faults { error: chance, ..Faults::default() });
    }

    /// Begins a read; how it ended, if it did at once.
    fn io_at(&mut self, reactor: usize, lba: u64) -> Option<Status> {
        let (layer, queue, channel) = self.ends[reactor].clone();
        let memory = self.memory.clone();
        self.world.with(reactor, |reactor| {
            let mut layer = layer.borrow_mut();
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks) = (Op::Read, lba, 2);
            io.list.push(Sge { region: memory, offset: 0, length: 1024 });
            io.push(queue, 0);
            layer.submit(reactor, channel, &[id]);
            layer.unplug(reactor);
            let mut done: Vec<IoId> = Vec::new();
            layer.reap(reactor, queue, &mut done);
            done.into_iter().map(|id| layer.finish(id).1).last()
        })
    }

    /// So long, where something looks again and again.
    fn run(&mut self, ns: u64) {
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        self.world.with(0, move |reactor| {
            reactor.after(ns, move |_| told.store(true, Ordering::Relaxed));
        });
        self.world.run_until("time has passed", 1_000_000, |_| over.load(Ordering::Relaxed));
    }

    fn told_now(&self) -> Vec<String> {
        let reason = |notice: Notice| match notice {
            Notice::Failed { name, reason } if name == "disk" => reason,
            other => panic!("{other:?}"),
        };
        self.notices.lock().unwrap().drain(..).map(reason).collect()
    }

    /// Reasons told since the last time.
    fn told(&mut self) -> Vec<String> {
        self.world.settle();
        self.told_now()
    }
}

fn file(world: &World) -> Arc<dyn Device> {
    let FileRef::Simulated(number) = world.disk().create(1 << 20) else { panic!("a real file") };
    Arc::new(FileBdev::simulated("disk", number, 512, 2048, true).unwrap())
}

#[test]
fn a_medium_that_fails_is_told_once_and_again_when_it_fails_after_it_was_well() {
    let mut bench = Bench::new(file);
    let why = "a read of 2 blocks failed at byte 2560 of disk: Input/output error (os error 5)";
    for reactor in 0..REACTORS {
        assert_eq!(bench.io(reactor, Op::Read), Status::SUCCESS);
    }
    assert_eq!(bench.told(), [""; 0]);
    bench.set_errors(1000);
    for number in 0..30 {
        assert_eq!(bench.io(number % REACTORS, Op::Read), Status::UNRECOVERED_READ_ERROR);
    }
    assert_eq!(bench.told(), [why], "three reactors, thirty I/Os");
    // Still dead, however long it takes.
    for _ in 0..5 {
        bench.pass(2 * QUIET_NS);
        assert_eq!(bench.io(0, Op::Read), Status::UNRECOVERED_READ_ERROR);
    }
    assert_eq!(bench.told(), [""; 0]);
    // Well and ill by turns, without a rest.
    for _ in 0..30 {
        bench.set_errors(0);
        assert_eq!(bench.io(0, Op::Read), Status::SUCCESS);
        bench.pass(QUIET_NS / 2);
        bench.set_errors(1000);
        assert_eq!(bench.io(0, Op::Read), Status::UNRECOVERED_READ_ERROR);
    }
    assert_eq!(bench.told(), [""; 0], "one episode");
    bench.set_errors(0);
    assert_eq!(bench.io(0, Op::Read), Status::SUCCESS);
    bench.pass(QUIET_NS);
    bench.set_errors(1000);
    assert_eq!(bench.io(0, Op::Read), Status::UNRECOVERED_READ_ERROR);
    assert_eq!(bench.told(), [why]);
}

#[test]
fn a_flush_that_failed_is_told_once_for_good() {
    let mut bench = Bench::new(file);
    bench.set_errors(1000);
    assert_eq!(bench.io(1, Op::Flush), Status::WRITE_FAULT);
    bench.set_errors(0);
    for number in 0..9 {
        assert_eq!(bench.io(number % REACTORS, Op::Read), Status::SUCCESS);
        bench.pass(2 * QUIET_NS);
        assert_eq!(bench.io(number % REACTORS, Op::Flush), Status::WRITE_FAULT);
    }
    assert_eq!(bench.told(), ["flushing disk failed: Input/output error (os error 5); every later flush fails, too"]);
}

struct Panics(Info);

struct PanicsChannel;

impl Device for Panics {
    fn info(&self) -> Info {
        self.0.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, _: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(PanicsChannel))
    }
}

impl Channel for PanicsChannel {
    fn submit(&mut self, _: &mut Layer, _: &mut Reactor, _: &[IoId]) {
        panic!("a defect");
    }
}

#[test]
fn a_module_that_panics_is_told_once_for_all_its_channels() {
    let mut bench = Bench::new(|_| Arc::new(Panics(Info::new("disk", "panics", 512, 2048))));
    bench.world.allow_panics();
    assert_eq!(bench.io(0, Op::Read), Status::INTERNAL_DEVICE_ERROR);
    assert_eq!(bench.io(0, Op::Read), Status::INVALID_NAMESPACE);
    for number in 1..REACTORS {
        bench.io(number, Op::Read);
    }
    assert_eq!(bench.told(), ["its module panicked: a reactor's channel to it fails all I/O from now on"]);
    assert_eq!(bench.registry.list(Some("disk")).unwrap().len(), 1);
}

/// Keeps what it gets until it is told to let go.
struct Keeps(Info, Arc<AtomicBool>);

struct KeepsChannel(Arc<AtomicBool>, Vec<IoId>);

impl Device for Keeps {
    fn info(&self) -> Info {
        self.0.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, _: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(KeepsChannel(self.1.clone(), Vec::new())))
    }
}

impl Channel for KeepsChannel {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        self.1.extend(batch);
        if !self.0.load(Ordering::Relaxed) {
            self.1.drain(..).for_each(|id| layer.complete(id, Status::SUCCESS));
        }
    }
}

#[test]
fn io_that_takes_too_long_is_told_by_its_oldest_and_once() {
    let keeps = Arc::new(AtomicBool::new(false));
    let device = Arc::new(Keeps(Info::new("disk", "keeps", 512, 2048), keeps.clone()));
    let mut bench = Bench::new(|_| device);
    measures::set_timeout(&bench.registry, "disk", 2_000_000_000).unwrap();
    assert_eq!(bench.io_at(1, 5), Some(Status::SUCCESS));
    bench.run(30_000_000_000);
    assert_eq!(bench.told_now(), [""; 0]);
    keeps.store(true, Ordering::Relaxed);
    assert_eq!(bench.io_at(1, 40), None);
    bench.run(1_000_000_000);
    assert_eq!(bench.io_at(2, 60), None);
    bench.run(300_000_000);
    assert_eq!(bench.told_now(), [""; 0], "not yet");
    bench.run(1_400_000_000);
    let [told] = &bench.told_now()[..] else { panic!("not told once") };
    let (what, age) = told.split_once(" has been under way for 2.").unwrap();
    assert_eq!(what, "an I/O (Read of 2 blocks at block 40)");
    assert!(age.ends_with(" s, the time-out is 2 s"), "{age}");
    bench.run(60_000_000_000);
    assert_eq!(bench.told_now(), [""; 0], "it is the same");
    // They end, and others come.
    keeps.store(false, Ordering::Relaxed);
    assert_eq!((bench.io_at(1, 1), bench.io_at(2, 1)), (Some(Status::SUCCESS), Some(Status::SUCCESS)));
    bench.run(QUIET_NS + 2_000_000_000);
    keeps.store(true, Ordering::Relaxed);
    assert_eq!(bench.io_at(0, 80), None);
    bench.run(3_000_000_000);
    assert!(matches!(&bench.told_now()[..], [told] if told.contains("at block 80")));
    // Off: nothing looks any more.
    measures::set_timeout(&bench.registry, "disk", 0).unwrap();
    bench.run(2 * QUIET_NS);
    assert_eq!(bench.told_now(), [""; 0]);
    keeps.store(false, Ordering::Relaxed);
    assert_eq!(bench.io_at(0, 1), Some(Status::SUCCESS));
    bench.world.settle();
}
