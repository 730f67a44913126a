//! Situations that deserve a name: found by seeds, or met too seldom by them.

use qpair_bdev::{ChannelId, Descriptor, IoFlags, IoId, Layer, Op, QueueId, Status, lifecycle};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::Poller;
use qpair_reactor::Reactor;
use qpair_reactor::sim::{Rng, World};

use crate::client::IOS;
use crate::target::Manners;
use crate::{NONE, RunSome, Scene};

const SILENT: Manners = Manners { mutes: 1000, ..NONE };

struct Idle;
impl Poller for Idle {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

/// I/Os by hand; a reactor for each target.
struct Bench {
    world: World,
    scene: Scene,
    descriptor: Option<Descriptor>,
    /// One a reactor, which has the queue of its number.
    channels: Vec<(ChannelId, QueueId)>,
}

impl Bench {
    fn new(seed: u64, manners: &[Manners]) -> Self {
        let mut world = World::new(seed, manners.len());
        let scene = Scene::new(&mut world, &mut Rng::new(seed), manners.len(), manners);
        let descriptor = scene.registry.open("v0", true, |_| {}).unwrap();
        let open = |reactor: &mut Reactor| {
            let layer = Layer::install(reactor, IOS);
            let mut layer = layer.borrow_mut();
            let poller = reactor.add_poller("bench", Box::new(Idle));
            let waker = reactor.waker(poller).unwrap();
            (descriptor.channel(reactor, &mut layer).unwrap(), layer.add_queue(waker))
        };
        let channels = (0..manners.len()).map(|number| world.with(number, open)).collect();
        Self { world, scene, descriptor: Some(descriptor), channels }
    }

    fn submit(&mut self, number: usize, op: Op) -> IoId {
        let ((channel, queue), size) = (self.channels[number], self.scene.info.block_size);
        self.world.with(number, |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks, io.flags) = (op, 0, 1, IoFlags::empty());
            if op == Op::Read {
                let region = Region::new(Mapping::anonymous(size as usize, Pages::Normal).unwrap());
                io.list.push(Sge { region, offset: 0, length: size });
            }
            io.push(queue, 0);
            layer.submit(reactor, channel, &[id]);
            layer.unplug(reactor);
            id
        })
    }

    fn reap(&mut self, number: usize) -> Vec<(IoId, Status)> {
        let queue = self.channels[number].1;
        self.world.with(number, |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            let mut out = Vec::new();
            layer.reap(reactor, queue, &mut out);
            let ended = |id: IoId| {
                layer.retrieve(id);
                let status = layer.io(id).status;
                layer.give_back(id);
                (id, status)
            };
            out.into_iter().map(ended).collect()
        })
    }

    fn end(mut self) {
        for (number, (channel, queue)) in self.channels.iter().copied().enumerate() {
            self.world.with(number, |reactor| {
                let layer = Layer::of(reactor);
                let mut layer = layer.borrow_mut();
                layer.close_channel(reactor, channel);
                layer.remove_queue(queue);
            });
        }
        self.descriptor = None;
        self.world.settle();
        self.scene.check_end(&mut self.world);
        self.world.finish();
    }
}

/// Seed 1 of "virtio-silent-reset" found it: the reset waited for an answer, the removal for the reset.
#[test]
fn a_removal_ends_a_reset_that_waits_for_a_silent_target() {
    let mut bench = Bench::new(1, &[SILENT]);
    let read = bench.submit(0, Op::Read);
    let reset = bench.submit(0, Op::Reset);
    bench.world.run_some(5000);
    let waits = bench.submit(0, Op::Read);
    bench.world.run_some(5000);
    assert_eq!(bench.reap(0), [], "a silent target is waited for");
    bench.scene.remove(1_000_000);
    bench.world.settle();
    let mut ended = bench.reap(0);
    ended.sort_by_key(|(id, _)| *id);
    let mut expected = [(read, Status::ABORT_REQUESTED), (reset, Status::SUCCESS), (waits, Status::INVALID_NAMESPACE)];
    expected.sort_by_key(|(id, _)| *id);
    assert_eq!(ended, expected);
    bench.end();
}

#[test]
fn a_removal_ends_a_shrinking_that_waits_for_a_silent_target() {
    let mut bench = Bench::new(2, &[SILENT]);
    let read = bench.submit(0, Op::Read);
    let (answered, ledger) = (bench.scene.ledger.open_next(), bench.scene.ledger.clone());
    lifecycle::resize(
        &bench.scene.registry,
        "v0",
        1,
        Box::new(move |outcome| {
            assert_eq!(outcome.unwrap_err().to_string(), "Operation not supported: v0 cannot be resized");
            ledger.close(answered);
        }),
    );
    bench.world.run_some(5000);
    assert_eq!(bench.reap(0), [], "a silent target is waited for");
    bench.scene.remove(1_000_000);
    bench.world.settle();
    assert_eq!(bench.reap(0), [(read, Status::ABORT_REQUESTED)]);
    bench.end();
}

#[test]
fn a_lie_on_one_queue_ends_what_another_queues_silent_target_has() {
    const LIAR: Manners = Manners { blatant: 1000, ..NONE };
    for seed in 0..20 {
        let mut bench = Bench::new(seed, &[LIAR, SILENT]);
        let waits = bench.submit(1, Op::Read);
        bench.world.settle();
        assert_eq!(bench.reap(1), [], "everybody sleeps");
        let lied_about = bench.submit(0, Op::Read);
        bench.world.settle();
        assert_eq!(bench.reap(0), [(lied_about, Status::INTERNAL_DEVICE_ERROR)]);
        assert_eq!(bench.reap(1), [(waits, Status::INTERNAL_DEVICE_ERROR)]);
        bench.scene.remove(0);
        bench.end();
    }
}
