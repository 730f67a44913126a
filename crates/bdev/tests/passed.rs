//! What a module does to an I/O before it passes it down is seen by the layer: a base gets nothing that it cannot do.

mod common {
    pub mod real;
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::real::{Rig, drivers, one};
use qpair_bdev::malloc::Malloc;
use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_reactor::Reactor;

const BLOCKS: u64 = 64;

/// Passes I/O down, after it was changed; as large as its base.
struct Changing {
    info: Info,
    base: Descriptor,
    change: fn(&mut qpair_bdev::Io),
}

impl Changing {
    fn register(registry: &Arc<Registry>, change: fn(&mut qpair_bdev::Io)) {
        let base = registry.open_base("base", "changing").unwrap();
        let info = Info::over(&base.info().unwrap(), "disk", "changing");
        registry.register(Arc::new(Self { info, base, change })).unwrap();
    }
}

impl Device for Changing {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        Ok(Box::new(ChangingChannel { id, below, queue: layer.add_inner_queue(id), change: self.change }))
    }
}

struct ChangingChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
    change: fn(&mut qpair_bdev::Io),
}

impl Channel for ChangingChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        batch.iter().for_each(|id| (self.change)(layer.io_mut(*id)));
        layer.pass_down(reactor, self.below, self.queue, 0, 0, batch);
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        layer.pass_up(self.id, 0, batch);
    }
}

fn outcome(change: fn(&mut qpair_bdev::Io), op: Op) -> Status {
    let rig = Rig::new(drivers()[0], 1);
    rig.registry.register(Arc::new(Malloc::new("base", 512, BLOCKS, None, 0, 0).unwrap())).unwrap();
    Changing::register(&rig.registry, change);
    let status = one(&rig, op, 8, 8);
    rig.finish("base");
    status
}

#[test]
fn an_io_that_is_left_as_it_was_goes_through() {
    assert_eq!(outcome(|_| {}, Op::Read), Status::SUCCESS);
    assert_eq!(outcome(|_| {}, Op::Write), Status::SUCCESS);
}

#[test]
fn one_moved_past_the_end_is_refused() {
    assert_eq!(outcome(|io| io.lba = BLOCKS - 1, Op::Read), Status::LBA_OUT_OF_RANGE);
    assert_eq!(outcome(|io| io.lba = u64::MAX, Op::Write), Status::LBA_OUT_OF_RANGE);
}

#[test]
fn one_whose_range_outgrew_its_list_is_refused() {
    assert_eq!(outcome(|io| io.blocks = 16, Op::Read), Status::INVALID_FIELD);
}

#[test]
fn one_without_its_list_is_refused() {
    assert_eq!(outcome(|io| io.list.clear(), Op::Write), Status::INVALID_FIELD);
}

/// Passes everything down by a straight queue, and counts what its channels are shown all the same.
struct Straight {
    info: Info,
    base: Descriptor,
    shown: Arc<AtomicU64>,
}

impl Device for Straight {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        Ok(Box::new(StraightChannel { id, below, queue: layer.add_straight_queue(id), shown: self.shown.clone() }))
    }
}

struct StraightChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
    shown: Arc<AtomicU64>,
}

impl Channel for StraightChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        layer.pass_down(reactor, self.below, self.queue, 0, 0, batch);
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        self.shown.fetch_add(batch.len() as u64, Ordering::Relaxed);
        layer.pass_up(self.id, 0, batch);
    }
}

#[test]
fn only_what_is_not_plain_is_shown_to_a_module_whose_queue_is_straight() {
    let rig = Rig::new(drivers()[0], 1);
    rig.registry.register(Arc::new(Malloc::new("base", 512, BLOCKS, None, 0, 0).unwrap())).unwrap();
    let shown = Arc::new(AtomicU64::new(0));
    for (name, below) in [("middle", "base"), ("disk", "middle")] {
        let base = rig.registry.open_base(below, "straight").unwrap();
        let info = Info::over(&base.info().unwrap(), name, "straight");
        rig.registry.register(Arc::new(Straight { info, base, shown: shown.clone() })).unwrap();
    }
    for (op, expected) in [(Op::Read, 0), (Op::Write, 0), (Op::Unmap, 2), (Op::WriteZeroes, 2), (Op::Read, 0)] {
        assert_eq!(one(&rig, op, 8, 8), Status::SUCCESS);
        assert_eq!(shown.swap(0, Ordering::Relaxed), expected, "{op:?} over two floors");
    }
    // A refusal of the base goes up like any end.
    assert_eq!(one(&rig, Op::Read, BLOCKS, 8), Status::LBA_OUT_OF_RANGE);
    ["disk", "middle", "base"].into_iter().for_each(|name| rig.remove(name));
}

/// Ends what it gets twice.
struct Twice;

impl Device for Twice {
    fn info(&self) -> Info {
        Info::new("disk", "twice", 512, BLOCKS)
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(TwiceChannel(id)))
    }
}

struct TwiceChannel(ChannelId);

impl Channel for TwiceChannel {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        layer.complete_all(self.0, &[batch, batch].concat(), Status::SUCCESS);
    }
}

#[test]
fn what_a_module_ends_twice_ends_once_and_the_module_is_let_go() {
    let rig = Rig::new(drivers()[0], 1);
    rig.registry.register(Arc::new(Twice)).unwrap();
    assert_eq!(one(&rig, Op::Read, 0, 8), Status::SUCCESS);
    rig.finish("disk");
}
