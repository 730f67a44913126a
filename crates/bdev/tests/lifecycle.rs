//! Registry and jobs, each refusal and each outcome by name; a scripted device that ends I/Os when it is told to.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use qpair_bdev::measures::{self, Report};
use qpair_bdev::null::Null;
use qpair_bdev::stats::Reset;
use qpair_bdev::{
    BdevError, Channel, ChannelId, Device, Info, Io, IoFlags, IoId, Layer, Notice, Op, OpSet, QueueId, Registry, Status, lifecycle,
};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};

/// The I/Os a device has.
type Has = Arc<Mutex<Vec<(IoId, Op, u64, u64)>>>;

/// Keeps what it gets until the test ends it.
struct Scripted {
    info: Info,
    /// Ids and what they were, oldest first.
    has: Has,
    aborts: Arc<Mutex<Vec<IoId>>>,
}

impl Device for Scripted {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, _: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(ScriptedChannel { has: self.has.clone(), aborts: self.aborts.clone() }))
    }

    fn resize(&self, _: u64) -> Result<(), BdevError> {
        Ok(())
    }
}

struct ScriptedChannel {
    has: Has,
    aborts: Arc<Mutex<Vec<IoId>>>,
}

impl Channel for ScriptedChannel {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        let entry = |id: &IoId| {
            let io = layer.io(*id);
            (*id, io.op, io.lba, io.blocks)
        };
        self.has.lock().unwrap().extend(batch.iter().map(entry));
    }

    fn abort(&mut self, _: &mut Layer, _: &mut Reactor, id: IoId) {
        self.aborts.lock().unwrap().push(id);
    }
}

struct Sleeper;

impl Poller for Sleeper {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

/// One reactor, one bdev "disk", one front end.
struct Bench {
    world: World,
    registry: Arc<Registry>,
    has: Has,
    aborts: Arc<Mutex<Vec<IoId>>>,
    layer: Rc<RefCell<Layer>>,
    queue: QueueId,
    channel: ChannelId,
    memory: Region,
    ended: HashMap<u64, Status>,
}

impl Bench {
    fn new(change: impl FnOnce(&mut Info)) -> Self {
        let mut info = Info::new("disk", "scripted", 512, 1000);
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Reset, Op::Unmap]);
        change(&mut info);
        let (has, aborts) = (Arc::default(), Arc::default());
        let device = Scripted { info, has: Arc::clone(&has), aborts: Arc::clone(&aborts) };
        let mut world = World::new(3, 1);
        let registry = Registry::new(world.handles());
        registry.register(Arc::new(device)).unwrap();
        let descriptor = registry.open("disk", true, |_| {}).unwrap();
        let (layer, queue, channel) = world.with(0, |reactor| {
            let layer = Layer::install(reactor, 128);
            let poller = reactor.add_poller("front end", Box::new(Sleeper));
            let queue = layer.borrow_mut().add_queue(reactor.waker(poller).unwrap());
            let channel = descriptor.channel(reactor, &mut layer.borrow_mut()).unwrap();
            (layer, queue, channel)
        });
        let memory = Region::new(Mapping::anonymous(1 << 20, Pages::Normal).unwrap());
        Self { world, registry, has, aborts, layer, queue, channel, memory, ended: HashMap::new() }
    }

    fn submit(&mut self, tag: u64, op: Op, lba: u64, blocks: u64, segments: &[u32]) -> IoId {
        self.submit_with(tag, |io, memory| {
            (io.op, io.lba, io.blocks) = (op, lba, blocks);
            let mut offset = 0;
            for length in segments {
                io.list.push(Sge { region: memory.clone(), offset, length: *length });
                offset += u64::from(*length);
            }
        })
    }

    fn submit_with(&mut self, tag: u64, fill: impl FnOnce(&mut Io, &Region)) -> IoId {
        let (layer, queue, channel, memory) = (self.layer.clone(), self.queue, self.channel, self.memory.clone());
        self.world.with(0, move |reactor| {
            let mut layer = layer.borrow_mut();
            let id = layer.take().unwrap();
            fill(layer.io_mut(id), &memory);
            layer.io_mut(id).push(queue, tag);
            layer.submit(reactor, channel, &[id]);
            layer.unplug(reactor);
            id
        })
    }

    /// Lets all come to rest, and reaps.
    fn rest(&mut self) {
        for _ in 0..3000 {
            self.world.step();
        }
        let (layer, queue) = (self.layer.clone(), self.queue);
        let ended = self.world.with(0, move |reactor| {
            let mut layer = layer.borrow_mut();
            let mut reaped = Vec::new();
            layer.reap(reactor, queue, &mut reaped);
            let outcome = |id: IoId| {
                let tag = layer.retrieve(id).tag;
                let status = layer.io(id).status;
                layer.give_back(id);
                (tag, status)
            };
            reaped.into_iter().map(outcome).collect::<Vec<_>>()
        });
        for (tag, status) in ended {
            assert_eq!(self.ended.insert(tag, status), None, "I/O {tag} ended twice");
        }
    }

    fn status(&mut self, tag: u64) -> Option<Status> {
        self.rest();
        self.ended.get(&tag).copied()
    }

    /// The status of an I/O that the device must not see.
    fn refusal(&mut self, op: Op, lba: u64, blocks: u64, segments: &[u32]) -> Option<Status> {
        let tag = 1_000_000 + self.ended.len() as u64;
        self.submit(tag, op, lba, blocks, segments);
        assert!(self.has.lock().unwrap().is_empty(), "the device got it");
        self.status(tag)
    }

    /// The device ends the oldest it has.
    fn end_one(&mut self, status: Status) -> (Op, u64, u64) {
        let (id, op, lba, blocks) = self.has.lock().unwrap().remove(0);
        let layer = self.layer.clone();
        self.world.with(0, move |_| layer.borrow_mut().complete(id, status));
        self.rest();
        (op, lba, blocks)
    }

    fn device_has(&self) -> Vec<(Op, u64, u64)> {
        self.has.lock().unwrap().iter().map(|(_, op, lba, blocks)| (*op, *lba, *blocks)).collect()
    }

    fn abort(&mut self, id: IoId) {
        let layer = self.layer.clone();
        self.world.with(0, move |reactor| layer.borrow_mut().abort(reactor, id));
    }

    fn close(&mut self) {
        let (layer, channel) = (self.layer.clone(), self.channel);
        self.world.with(0, move |reactor| layer.borrow_mut().close_channel(reactor, channel));
    }
}

type Outcome<T> = Arc<Mutex<Vec<Result<T, String>>>>;

fn reply<T: Send + 'static>(to: &Outcome<T>) -> lifecycle::Reply<T> {
    let to = to.clone();
    Box::new(move |outcome| to.lock().unwrap().push(outcome.map_err(|error| error.to_string())))
}

fn outcomes<T: Clone>(of: &Outcome<T>) -> Vec<Result<T, String>> {
    of.lock().unwrap().clone()
}

#[test]
fn what_the_device_cannot_do_is_refused_before_it_sees_it() {
    let mut bench = Bench::new(|_| {});
    assert_eq!(bench.refusal(Op::Read, 1000, 1, &[512]), Some(Status::LBA_OUT_OF_RANGE));
    assert_eq!(bench.refusal(Op::Read, 999, 2, &[1024]), Some(Status::LBA_OUT_OF_RANGE));
    assert_eq!(bench.refusal(Op::Read, u64::MAX, 1, &[512]), Some(Status::LBA_OUT_OF_RANGE));
    assert_eq!(bench.refusal(Op::Unmap, 1, u64::MAX, &[]), Some(Status::LBA_OUT_OF_RANGE));
    assert_eq!(bench.refusal(Op::Write, 0, 0, &[]), Some(Status::INVALID_FIELD));
    assert_eq!(bench.refusal(Op::Write, 0, 2, &[512]), Some(Status::INVALID_FIELD));
    assert_eq!(bench.refusal(Op::Read, 0, 1, &[512, 1]), Some(Status::INVALID_FIELD));
    assert_eq!(bench.refusal(Op::Compare, 0, 1, &[513]), Some(Status::INVALID_FIELD));
    assert_eq!(bench.refusal(Op::CompareAndWrite, 0, 1, &[512]), Some(Status::INVALID_FIELD), "half of it is missing");
    assert_eq!(bench.refusal(Op::Copy, 999, 2, &[]), Some(Status::LBA_OUT_OF_RANGE));
    assert_eq!(bench.refusal(Op::ZcopyStart, 0, 1, &[512]), Some(Status::INVALID_FIELD), "what is lent is not brought along");
    assert_eq!(bench.refusal(Op::ZoneAppend, 0, 1, &[512]), Some(Status::INVALID_OPCODE));
    assert_eq!(bench.refusal(Op::NvmeIo, 0, 1, &[]), Some(Status::INVALID_OPCODE));
    assert_eq!(bench.refusal(Op::Flush, 0, 0, &[]), Some(Status::SUCCESS), "no write cache, nothing to flush");
    let mut bench = Bench::new(|info| info.readonly = true);
    for op in [Op::Write, Op::Unmap, Op::WriteZeroes, Op::Copy, Op::ZoneAppend, Op::WriteUncorrectable, Op::CompareAndWrite] {
        assert_eq!(bench.refusal(op, 0, 1, &[512]), Some(Status::NAMESPACE_WRITE_PROTECTED), "{op:?}");
    }
    let mut bench = Bench::new(|info| info.write_unit_blocks = 8);
    assert_eq!(bench.refusal(Op::Write, 4, 8, &[4096]), Some(Status::INVALID_FIELD));
    assert_eq!(bench.refusal(Op::Write, 8, 4, &[2048]), Some(Status::INVALID_FIELD));
    assert_eq!(bench.refusal(Op::WriteZeroes, 4, 8, &[]), Some(Status::INVALID_FIELD), "emulated by writes");
    assert_eq!(bench.refusal(Op::Copy, 4, 8, &[]), Some(Status::INVALID_FIELD), "emulated by writes");
    assert_eq!(bench.refusal(Op::CompareAndWrite, 4, 8, &[8192]), Some(Status::INVALID_FIELD));
}

#[test]
fn a_block_in_more_segments_than_the_device_takes_is_refused() {
    let mut bench = Bench::new(|info| info.max_segments = 2);
    assert_eq!(bench.refusal(Op::Write, 0, 1, &[100, 400, 12]), Some(Status::INVALID_SGL_COUNT));
    assert_eq!(bench.refusal(Op::Read, 0, 3, &[512, 500, 6, 6, 512]), Some(Status::INVALID_SGL_COUNT));
    // The same number of segments with no block in more than two.
    bench.submit(1, Op::Read, 0, 3, &[256, 512, 512, 256]);
    bench.rest();
    assert_eq!(bench.device_has(), [(Op::Read, 0, 1), (Op::Read, 1, 1), (Op::Read, 2, 1)]);
    for _ in 0..3 {
        bench.end_one(Status::SUCCESS);
    }
    assert_eq!(bench.status(1), Some(Status::SUCCESS));
}

#[test]
fn a_split_io_ends_once_with_the_first_error() {
    let mut bench = Bench::new(|info| info.max_io_blocks = 2);
    bench.submit(1, Op::Write, 10, 5, &[2560]);
    bench.rest();
    assert_eq!(bench.device_has(), [(Op::Write, 10, 2), (Op::Write, 12, 2), (Op::Write, 14, 1)]);
    bench.end_one(Status::SUCCESS);
    bench.end_one(Status::WRITE_FAULT);
    assert_eq!(bench.status(1), None, "a child is still out");
    bench.end_one(Status::CAPACITY_EXCEEDED);
    assert_eq!(bench.status(1), Some(Status::WRITE_FAULT));
}

#[test]
fn after_an_error_or_an_abort_no_more_children_are_handed_out() {
    let mut bench = Bench::new(|info| (info.max_io_blocks, info.queue_depth) = (1, 1));
    bench.submit(1, Op::Read, 0, 4, &[2048]);
    bench.rest();
    bench.end_one(Status::UNRECOVERED_READ_ERROR);
    assert_eq!(bench.status(1), Some(Status::UNRECOVERED_READ_ERROR));
    assert_eq!(bench.device_has(), []);
    let id = bench.submit(2, Op::Read, 0, 4, &[2048]);
    bench.abort(id);
    assert_eq!(bench.aborts.lock().unwrap().len(), 1, "the child is asked to end");
    bench.end_one(Status::SUCCESS);
    assert_eq!(bench.status(2), Some(Status::ABORT_REQUESTED));
    assert_eq!(bench.device_has(), []);
}

#[test]
fn what_finds_no_room_waits_in_order_and_can_be_aborted() {
    let mut bench = Bench::new(|info| info.queue_depth = 2);
    let ids: Vec<IoId> = (0..5).map(|lba| bench.submit(lba, Op::Read, lba, 1, &[512])).collect();
    bench.rest();
    assert_eq!(bench.device_has(), [(Op::Read, 0, 1), (Op::Read, 1, 1)]);
    bench.abort(ids[3]);
    assert_eq!(bench.status(3), Some(Status::ABORT_REQUESTED));
    assert_eq!(bench.end_one(Status::SUCCESS), (Op::Read, 0, 1));
    assert_eq!(bench.device_has(), [(Op::Read, 1, 1), (Op::Read, 2, 1)]);
    bench.end_one(Status::SUCCESS);
    assert_eq!(bench.device_has(), [(Op::Read, 2, 1), (Op::Read, 4, 1)]);
    for _ in 0..2 {
        bench.end_one(Status::SUCCESS);
    }
    assert_eq!(bench.ended.len(), 5);
    bench.abort(ids[0]);
}

#[test]
fn removal_drains_then_aborts_then_is_gone() {
    let mut bench = Bench::new(|_| {});
    let notices: Arc<Mutex<Vec<Notice>>> = Arc::default();
    let heard = notices.clone();
    let descriptor = bench.registry.open("disk", false, move |notice| heard.lock().unwrap().push(notice.clone())).unwrap();
    bench.submit(1, Op::Read, 0, 1, &[512]);
    let (gone, twice, late) = (Outcome::default(), Outcome::default(), Outcome::default());
    lifecycle::unregister(&bench.registry, "disk", 1_000_000, reply(&gone));
    lifecycle::unregister(&bench.registry, "disk", 0, reply(&twice));
    lifecycle::resize(&bench.registry, "disk", 5, reply(&late));
    let removing = Err("No such device: bdev disk is being removed".to_owned());
    assert_eq!((outcomes(&twice), outcomes(&late)), (vec![removing.clone()], vec![removing]));
    assert!(bench.registry.open("disk", false, |_| {}).is_err());
    bench.rest();
    bench.submit(2, Op::Read, 0, 1, &[512]);
    assert_eq!(bench.status(2), Some(Status::INVALID_NAMESPACE));
    assert_eq!(bench.aborts.lock().unwrap().len(), 1, "the deadline passed");
    assert_eq!(outcomes(&gone), []);
    bench.end_one(Status::ABORT_REQUESTED);
    assert_eq!(outcomes(&gone), [Ok(())]);
    assert_eq!(bench.status(1), Some(Status::ABORT_REQUESTED));
    assert_eq!(*notices.lock().unwrap(), [Notice::Removing("disk".into()), Notice::Removed("disk".into())]);
    assert_eq!(descriptor.info().map(drop), None);
    bench.close();
    let layer = bench.layer.clone();
    assert_eq!(layer.borrow().ios(), (164, 164), "128, and the channel's own: 32 children, 4 helpers");
}

#[test]
fn a_reset_leaves_alone_what_waits_for_room() {
    let mut bench = Bench::new(|info| info.queue_depth = 1);
    for (tag, op, blocks) in [(1, Op::Read, 1), (2, Op::Read, 1), (3, Op::Reset, 0)] {
        bench.submit(tag, op, tag - 1, blocks, &[512][..blocks as usize]);
    }
    bench.rest();
    assert_eq!(bench.ended.len(), 0, "the second waits through the reset");
    assert_eq!(bench.end_one(Status::ABORT_REQUESTED), (Op::Read, 0, 1));
    assert_eq!((bench.status(1), bench.status(3)), (Some(Status::ABORT_REQUESTED), Some(Status::SUCCESS)));
    assert_eq!((bench.end_one(Status::SUCCESS), bench.status(2)), ((Op::Read, 1, 1), Some(Status::SUCCESS)));
}

#[test]
fn a_reset_aborts_or_drains() {
    for (flags, aborts) in [(IoFlags::empty(), 1), (IoFlags::DRAIN, 0)] {
        let mut bench = Bench::new(|_| {});
        bench.submit(1, Op::Read, 0, 1, &[512]);
        bench.submit_with(2, |io, _| (io.op, io.flags) = (Op::Reset, flags));
        bench.rest();
        bench.submit(3, Op::Read, 0, 1, &[512]);
        assert_eq!((bench.aborts.lock().unwrap().len(), bench.ended.len()), (aborts, 0), "{flags:?}");
        bench.end_one(Status::SUCCESS);
        assert_eq!((bench.status(1), bench.status(2)), (Some(Status::SUCCESS), Some(Status::SUCCESS)));
        assert_eq!(bench.device_has(), [(Op::Read, 0, 1)], "what came meanwhile goes on");
        bench.end_one(Status::SUCCESS);
        assert_eq!(bench.status(3), Some(Status::SUCCESS));
    }
}

#[test]
fn a_reset_that_waits_behind_a_removal_is_answered() {
    let mut bench = Bench::new(|_| {});
    bench.submit(1, Op::Read, 0, 1, &[512]);
    // The reset is first in line; the removal, another reset and a resize wait behind it.
    bench.submit(2, Op::Reset, 0, 0, &[]);
    bench.submit(3, Op::Reset, 0, 0, &[]);
    let (resized, gone) = (Outcome::default(), Outcome::default());
    lifecycle::unregister(&bench.registry, "disk", 0, reply(&gone));
    bench.rest();
    assert_eq!(bench.ended.len(), 0);
    assert_eq!(bench.aborts.lock().unwrap().len(), 2, "a reset asks what is in flight to end, and so does the removal at its deadline");
    bench.end_one(Status::ABORT_REQUESTED);
    assert_eq!(outcomes(&gone), [Ok(())]);
    assert_eq!(bench.status(1), Some(Status::ABORT_REQUESTED));
    assert_eq!(bench.status(2), Some(Status::SUCCESS));
    assert_eq!(bench.status(3), Some(Status::SUCCESS));
    lifecycle::resize(&bench.registry, "disk", 5, reply(&resized));
    assert_eq!(outcomes(&resized), [Err("No such device: bdev disk".to_owned())]);
    bench.close();
}

#[test]
fn jobs_queued_behind_a_removal_are_answered_when_it_ends() {
    let mut bench = Bench::new(|_| {});
    let (first, gone) = (Outcome::default(), Outcome::default());
    bench.submit(1, Op::Read, 0, 1, &[512]);
    // A shrink that waits for the read holds the device; the removal is next, the reset last.
    lifecycle::resize(&bench.registry, "disk", 5, reply(&first));
    lifecycle::unregister(&bench.registry, "disk", 0, reply(&gone));
    bench.submit(2, Op::Reset, 0, 0, &[]);
    bench.rest();
    assert_eq!((outcomes(&first), outcomes(&gone)), (vec![], vec![]));
    bench.end_one(Status::SUCCESS);
    assert_eq!((outcomes(&first), outcomes(&gone)), (vec![Ok(())], vec![Ok(())]));
    assert_eq!(bench.status(2), Some(Status::INVALID_NAMESPACE));
}

#[test]
fn a_channel_that_closes_with_io_under_way_is_waited_for() {
    let mut bench = Bench::new(|_| {});
    bench.submit(1, Op::Read, 0, 1, &[512]);
    bench.close();
    let gone = Outcome::default();
    lifecycle::unregister(&bench.registry, "disk", 0, reply(&gone));
    bench.rest();
    assert_eq!(outcomes(&gone), [], "its last I/O is still out");
    bench.end_one(Status::SUCCESS);
    assert_eq!(outcomes(&gone), [Ok(())]);
    assert_eq!(bench.status(1), Some(Status::SUCCESS));
}

#[test]
fn what_waits_while_a_device_stands_still_outlives_the_close_of_its_channel() {
    let mut bench = Bench::new(|_| {});
    bench.submit(1, Op::Read, 0, 1, &[512]);
    let shrunk = Outcome::default();
    lifecycle::resize(&bench.registry, "disk", 100, reply(&shrunk));
    bench.rest();
    bench.submit(2, Op::Read, 0, 1, &[512]);
    bench.submit(3, Op::Read, 500, 1, &[512]);
    bench.close();
    assert_eq!(bench.device_has(), [(Op::Read, 0, 1)], "the others wait");
    bench.end_one(Status::SUCCESS);
    assert_eq!(outcomes(&shrunk), [Ok(())]);
    assert_eq!(bench.device_has(), [(Op::Read, 0, 1)]);
    bench.end_one(Status::SUCCESS);
    assert_eq!(bench.status(2), Some(Status::SUCCESS));
    assert_eq!(bench.status(3), Some(Status::LBA_OUT_OF_RANGE), "judged by the size that is in force when it goes on");
}

#[test]
fn what_an_absent_front_end_left_goes_back_to_the_slab() {
    let mut bench = Bench::new(|_| {});
    bench.submit(1, Op::Read, 0, 1, &[512]);
    bench.layer.borrow_mut().remove_queue(bench.queue);
    let (id, ..) = bench.has.lock().unwrap().remove(0);
    let layer = bench.layer.clone();
    layer.borrow_mut().complete(id, Status::SUCCESS);
    for _ in 0..3000 {
        bench.world.step();
    }
    assert_eq!(layer.borrow().ios(), (164, 128), "all but the channel's own");
}

#[test]
fn an_engine_that_goes_first_leaves_no_memory_behind() {
    let mut bench = Bench::new(|_| {});
    bench.submit(1, Op::Write, 0, 1, &[512]);
    let gone = Outcome::default();
    lifecycle::unregister(&bench.registry, "disk", 0, reply(&gone));
    let memory = Arc::downgrade(bench.memory.mapping());
    let Bench { world, registry, layer, memory: region, .. } = bench;
    drop((layer, region));
    assert!(memory.upgrade().is_some(), "the write holds its memory");
    drop(world);
    assert!(memory.upgrade().is_none());
    assert_eq!(outcomes(&gone), [Ok(())]);
    assert!(registry.list(None).unwrap().is_empty());
}

#[test]
fn a_claim_keeps_writers_out_but_not_the_removal() {
    let bench = Bench::new(|_| {});
    bench.registry.claim("disk", "lvol").unwrap();
    let gone: Outcome<()> = Outcome::default();
    lifecycle::unregister(&bench.registry, "disk", 0, reply(&gone));
    let mut bench = bench;
    bench.rest();
    assert_eq!(outcomes(&gone), [Ok(())]);
}

#[test]
fn statistics_are_of_all_channels_also_those_that_closed() {
    let mut bench = Bench::new(|info| info.max_io_blocks = 1);
    bench.submit(1, Op::Write, 0, 2, &[1024]);
    bench.submit(2, Op::Read, 0, 1, &[512]);
    for _ in 0..3 {
        bench.end_one(Status::SUCCESS);
    }
    bench.submit(3, Op::Read, 5000, 1, &[512]);
    bench.rest();
    bench.close();
    for expected in [2560 - 1024, 0] {
        let got: Outcome<Report> = Outcome::default();
        measures::statistics(&bench.registry, "disk", Reset::All, reply(&got));
        bench.rest();
        let stats = got.lock().unwrap().pop().unwrap().unwrap().total;
        assert_eq!(stats.read.bytes + stats.write.bytes, expected);
        assert_eq!(stats.write.ios, u64::from(expected > 0), "a split write is one write");
        assert_eq!(stats.errors.total(), u64::from(expected > 0));
    }
}

/// A bdev stacked on "disk": passes everything down, two blocks further.
struct Stacked(Arc<Registry>);

struct StackedChannel {
    base: ChannelId,
    queue: QueueId,
}

impl Device for Stacked {
    fn info(&self) -> Info {
        let mut info = Info::new("top", "stacked", 512, 900);
        info.depth = 1;
        info
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let base = self.0.open("disk", true, |_| {})?.channel(reactor, layer)?;
        Ok(Box::new(StackedChannel { base, queue: layer.add_inner_queue(id) }))
    }
}

impl Channel for StackedChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            let io = layer.io_mut(*id);
            io.push(self.queue, 0);
            io.lba += 2;
        }
        layer.submit(reactor, self.base, batch);
    }

    fn unplug(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        layer.unplug(reactor);
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        for id in batch {
            let frame = layer.retrieve(*id);
            let io = layer.io_mut(*id);
            io.lba = frame.lba;
            let status = io.status;
            layer.complete(*id, status);
        }
    }

    fn close(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        layer.remove_queue(self.queue);
        layer.close_channel(reactor, self.base);
    }
}

/// Gives back what comes.
struct Waiter {
    queue: QueueId,
    ended: Arc<Mutex<Vec<(u64, Status)>>>,
}

impl Poller for Waiter {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        for id in &reaped {
            layer.retrieve(*id);
            self.ended.lock().unwrap().push((layer.io(*id).lba, layer.io(*id).status));
            layer.give_back(*id);
        }
        reaped.len()
    }
}

#[test]
fn a_stacked_bdev_passes_io_down_and_up_and_its_front_end_is_woken() {
    let mut world = World::new(5, 1);
    let registry = Registry::new(world.handles());
    registry.register(Arc::new(Null::new("disk", 512, 1000, None, 0))).unwrap();
    registry.register(Arc::new(Stacked(registry.clone()))).unwrap();
    let ended: Arc<Mutex<Vec<(u64, Status)>>> = Arc::default();
    let descriptor = registry.open("top", true, |_| {}).unwrap();
    let heard = ended.clone();
    let (queue, channel) = world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.reserve_poller("waiter");
        let queue = layer.add_queue(reactor.waker(poller).unwrap());
        reactor.install_poller(poller, Box::new(Waiter { queue, ended: heard }));
        (queue, descriptor.channel(reactor, &mut layer).unwrap())
    });
    world.finish();
    // All sleep. What is submitted now ends at once below; nobody but the layer is there to bring it up.
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let memory = Region::new(Mapping::anonymous(4096, Pages::Normal).unwrap());
        for lba in [0, 7, 899] {
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks) = (Op::Write, lba, 1);
            io.list.push(Sge { region: memory.clone(), offset: 0, length: 512 });
            io.push(queue, 0);
            layer.submit(reactor, channel, &[id]);
        }
        layer.unplug(reactor);
    });
    world.finish();
    assert_eq!(*ended.lock().unwrap(), [(0, Status::SUCCESS), (7, Status::SUCCESS), (899, Status::SUCCESS)]);
    world.with(0, |reactor| Layer::of(reactor).borrow_mut().close_channel(reactor, channel));
    let gone = Outcome::default();
    lifecycle::unregister(&registry, "top", 0, reply(&gone));
    lifecycle::unregister(&registry, "disk", 0, reply(&gone));
    world.finish();
    assert_eq!(outcomes(&gone), [Ok(()), Ok(())]);
    let (all, free) = world.with(0, |reactor| Layer::of(reactor).borrow().ios());
    assert_eq!(all, free);
}
