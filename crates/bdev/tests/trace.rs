//! What trace points tell of one I/O, and what is lost when a ring is full.

use std::sync::{Arc, Mutex};

use qpair_bdev::null::Null;
use qpair_bdev::passthru::Passthru;
use qpair_bdev::trace::{self, ALL_POINTS, NO_IO, PAGE_MAX, Page, Point, RECORDS, Record, Why};
use qpair_bdev::{Channel, ChannelId, Descriptor, Device, Info, Io, IoId, Layer, Op, OpSet, QueueId, Registry, measures};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};

struct Nobody;

impl Poller for Nobody {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

/// A bdev open on the only reactor.
struct Rig {
    world: World,
    registry: Arc<Registry>,
    channel: ChannelId,
    queue: QueueId,
    _open: Descriptor,
}

impl Rig {
    fn new(build: impl FnOnce(&Arc<Registry>), top: &str, points: u8) -> Self {
        let mut world = World::new(1, 1);
        let registry = Registry::new(world.handles());
        build(&registry);
        trace::set(&registry, points, Box::new(|outcome| outcome.unwrap()));
        world.settle();
        let open = registry.open(top, true, |_| {}).unwrap();
        let (channel, queue) = world.with(0, |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let poller = reactor.add_poller("test", Box::new(Nobody));
            (open.channel(reactor, &mut layer).unwrap(), layer.add_queue(reactor.waker(poller).unwrap()))
        });
        Self { world, registry, channel, queue, _open: open }
    }

    /// Submits one batch of I/Os of so many blocks, and takes back what is done at once.
    fn io(&mut self, ios: usize, op: Op, lba: u64, blocks: u64) {
        let (channel, queue) = (self.channel, self.queue);
        self.world.with(0, |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let memory = Region::new(Mapping::anonymous(1 << 16, Pages::Normal).unwrap());
            let fill = |io: &mut Io| {
                (io.op, io.lba, io.blocks) = (op, lba, blocks);
                io.list.push(Sge { region: memory.clone(), offset: 0, length: blocks as u32 * 512 });
                io.push(queue, 0);
            };
            let ids: Vec<IoId> = (0..ios).map(|_| layer.take().unwrap()).collect();
            ids.iter().for_each(|id| fill(layer.io_mut(*id)));
            layer.submit(reactor, channel, &ids);
            layer.unplug(reactor);
        });
        self.reap();
    }

    fn reap(&mut self) {
        let queue = self.queue;
        self.world.with(0, |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let mut done = Vec::new();
            layer.reap(reactor, queue, &mut done);
            for id in done {
                layer.finish(id);
            }
        });
    }

    fn page(&mut self, from: u64, most: usize) -> Page {
        let found: Arc<Mutex<Vec<Page>>> = Arc::default();
        let keep = found.clone();
        trace::read(&self.registry, &[from], most, Box::new(move |pages| *keep.lock().unwrap() = pages.unwrap()));
        self.world.settle();
        found.lock().unwrap().remove(0)
    }

    /// (point, bdev, first block), by age.
    fn told(&mut self) -> Vec<(u8, String, u64)> {
        let page = self.page(0, PAGE_MAX);
        let name = |record: &Record| page.names.iter().find(|(number, _)| *number == record.device).map_or("", |(_, name)| name).to_owned();
        page.records.iter().map(|record| (record.point, name(record), record.lba)).collect()
    }
}

fn null(registry: &Arc<Registry>, name: &str) {
    registry.register(Arc::new(Null::new(name, 512, 1024, None, 0))).unwrap();
}

fn tower(registry: &Arc<Registry>) {
    null(registry, "null");
    registry.register(Arc::new(Passthru::new(registry, "top", "null", None).unwrap())).unwrap();
}

#[test]
fn an_io_is_followed_through_a_tower_by_its_name() {
    let mut rig = Rig::new(tower, "top", ALL_POINTS & !Point::ChannelCreate.bit());
    rig.io(1, Op::Read, 7, 2);
    let wanted = [
        (Point::Set, ""),
        (Point::Start, "top"),
        (Point::Issue, "top"),
        (Point::Start, "null"),
        (Point::Issue, "null"),
        (Point::Done, "null"),
        (Point::Done, "top"),
    ];
    let told = rig.told();
    assert_eq!(told.iter().map(|(point, name, _)| (*point, &**name)).collect::<Vec<_>>(), wanted.map(|(point, name)| (point as u8, name)));
    let page = rig.page(1, PAGE_MAX);
    let first = page.records[0];
    assert!(page.records.iter().all(|record| (record.io, record.parent, record.lba, record.blocks) == (first.io, NO_IO, 7, 2)));
    assert!(page.records.iter().all(|record| (record.op, record.detail) == (Op::Read as u8, 0)));
}

#[test]
fn only_points_that_are_on_leave_records_and_none_when_all_are_off() {
    let mut rig = Rig::new(tower, "top", Point::Done.bit());
    rig.io(3, Op::Write, 0, 1);
    assert_eq!(rig.told().iter().filter(|(point, ..)| *point == Point::Done as u8).count(), 6);
    assert_eq!(rig.page(0, PAGE_MAX).records.len(), 7, "and one that says what is on");
    trace::set(&rig.registry, 0, Box::new(|outcome| outcome.unwrap()));
    rig.world.settle();
    rig.io(3, Op::Write, 0, 1);
    let page = rig.page(7, PAGE_MAX);
    assert_eq!(page.records.iter().map(|record| (record.point, record.blocks)).collect::<Vec<_>>(), [(Point::Set as u8, 0)]);
}

#[test]
fn channels_are_told_of() {
    let mut rig = Rig::new(tower, "top", Point::ChannelCreate.bit() | Point::ChannelDestroy.bit());
    let channel = rig.channel;
    rig.world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        layer.borrow_mut().close_channel(reactor, channel);
    });
    let told: Vec<(u8, String)> = rig.told().into_iter().skip(1).map(|(point, name, _)| (point, name)).collect();
    let (opened, closed) = (Point::ChannelCreate as u8, Point::ChannelDestroy as u8);
    let wanted = [(opened, "null"), (opened, "top"), (closed, "top"), (closed, "null")];
    assert_eq!(told, wanted.map(|(point, name)| (point, name.to_owned())));
}

#[test]
fn the_oldest_give_way_and_how_many_is_known() {
    let mut rig = Rig::new(|registry| null(registry, "null"), "null", Point::Start.bit());
    let rounds = RECORDS as u64 / 256 + 4;
    (0..rounds).for_each(|_| rig.io(256, Op::Read, 0, 1));
    let written = 1 + rounds * 256;
    let page = rig.page(0, 10);
    assert_eq!((page.lost, page.records.len()), (written - RECORDS as u64, 10));
    assert_eq!(page.next, page.lost + 10, "reading goes on where it stopped");
    let next = rig.page(page.next, usize::MAX);
    assert_eq!((next.lost, next.records.len()), (0, PAGE_MAX), "a page is bounded");
    let late = rig.page(u64::MAX, 10);
    assert_eq!((late.lost, late.records.len(), late.next), (0, 0, written), "from now on");
}

#[test]
fn a_wait_says_for_what() {
    let limited = |registry: &Arc<Registry>| {
        null(registry, "null");
        measures::set_limits(registry, "null", [Some(1000), None, None, None], Box::new(|outcome| outcome.unwrap()));
    };
    let mut rig = Rig::new(limited, "null", ALL_POINTS);
    rig.io(64, Op::Read, 0, 1);
    let waits: Vec<Record> = rig.page(0, PAGE_MAX).records.into_iter().filter(|record| record.point == Point::Wait as u8).collect();
    assert!(!waits.is_empty() && waits.iter().all(|record| record.detail == Why::Limit as u16), "{waits:?}");
}

/// Takes one block at once, and one I/O at a time.
struct Narrow;

struct Held(Vec<IoId>);

impl Device for Narrow {
    fn info(&self) -> Info {
        let mut info = Info::new("narrow", "test", 512, 1024);
        (info.max_io_blocks, info.queue_depth) = (1, 2);
        info.supported = OpSet::of(&[Op::Read, Op::Write]);
        info
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, _: ChannelId) -> Result<Box<dyn Channel>, qpair_bdev::BdevError> {
        Ok(Box::new(Held(Vec::new())))
    }
}

impl Channel for Held {
    fn submit(&mut self, _: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        self.0.extend_from_slice(batch);
    }

    fn unplug(&mut self, layer: &mut Layer, _: &mut Reactor) {
        for id in self.0.drain(..) {
            layer.complete(id, qpair_bdev::Status::SUCCESS);
        }
    }
}

#[test]
fn the_parts_of_an_io_name_it_as_their_parent() {
    let mut rig = Rig::new(|registry| registry.register(Arc::new(Narrow)).map(drop).unwrap(), "narrow", ALL_POINTS);
    rig.io(1, Op::Read, 4, 3);
    let records = rig.page(0, PAGE_MAX).records;
    let starts: Vec<&Record> = records.iter().filter(|record| record.point == Point::Start as u8).collect();
    let whole = starts[0];
    assert_eq!((whole.parent, whole.lba, whole.blocks), (NO_IO, 4, 3));
    assert_eq!(
        starts[1..].iter().map(|part| (part.parent, part.lba, part.blocks)).collect::<Vec<_>>(),
        [4, 5, 6].map(|lba| (whole.io, lba, 1))
    );
    let ends: Vec<u64> = records.iter().filter(|record| record.point == Point::Done as u8).map(|record| record.io).collect();
    assert_eq!((ends.len(), ends.last()), (4, Some(&whole.io)), "the whole ends last");
}

#[test]
fn a_full_device_is_waited_for() {
    let mut rig = Rig::new(|registry| registry.register(Arc::new(Narrow)).map(drop).unwrap(), "narrow", ALL_POINTS);
    rig.io(5, Op::Read, 0, 1);
    let records = rig.page(0, PAGE_MAX).records;
    let waits: Vec<u16> = records.iter().filter(|record| record.point == Point::Wait as u8).map(|record| record.detail).collect();
    assert_eq!(waits, [Why::Full as u16; 3]);
    assert_eq!(records.iter().filter(|record| record.point == Point::Done as u8).count(), 5);
}

#[test]
fn a_record_is_encoded_as_python_decodes_it() {
    let record = Record { time_ns: 1, io: 2, parent: NO_IO, lba: 3, blocks: 1 << 40, device: 4, detail: 0x0281, op: 1, point: 1 };
    let vector = include_bytes!("../../../tests/vectors/trace/record.bin");
    assert_eq!(&record.encode()[..], &vector[..]);
}
