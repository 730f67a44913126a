//! An array does not shuffle a batch that ends at once, although its members get their parts one after the other.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::malloc::Malloc;
use qpair_bdev::{ChannelId, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_raid::{Level, Raids, Spec};
use qpair_reactor::sim::World;
use qpair_reactor::{Poller, Reactor};

/// A strip, and what each I/O has.
const BLOCKS: u64 = 8;
/// First blocks: of members 0, 1, 0, 0, 1, 2 and so on.
const STRIPS: [u64; 9] = [0, 1, 3, 6, 4, 2, 5, 0, 7];

/// Submits one batch, and keeps the tags of what comes back, in its order.
struct Once {
    queue: QueueId,
    channel: ChannelId,
    ops: [Op; STRIPS.len()],
    begun: bool,
    tags: Rc<RefCell<Vec<u64>>>,
}

impl Poller for Once {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        if !std::mem::replace(&mut self.begun, true) {
            let memory = Region::new(Mapping::anonymous(STRIPS.len() << 12, Pages::Normal).unwrap());
            let fill = |(number, strip): (usize, u64)| {
                let id = layer.take().unwrap();
                let io = layer.io_mut(id);
                (io.op, io.lba, io.blocks) = (self.ops[number], strip * BLOCKS, BLOCKS);
                io.list.push(Sge { region: memory.clone(), offset: (number as u64) << 12, length: 4096 });
                io.push(self.queue, number as u64);
                id
            };
            let batch: Vec<IoId> = STRIPS.into_iter().enumerate().map(fill).collect();
            layer.submit(reactor, self.channel, &batch);
            layer.unplug(reactor);
        }
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        for id in &reaped {
            let (tag, status) = layer.finish(*id);
            assert_eq!(status, Status::SUCCESS);
            self.tags.borrow_mut().push(tag);
        }
        reaped.len()
    }
}

fn tags_of(level: Level, ops: [Op; STRIPS.len()]) -> Vec<u64> {
    let mut world = World::new(1, 1);
    let registry = Registry::new(world.handles());
    let bases: Vec<String> = (0..3).map(|number| format!("leg{number}")).collect();
    for name in &bases {
        registry.register(Arc::new(Malloc::new(name, 512, 3 * BLOCKS, None, 0, 0).unwrap())).unwrap();
    }
    let raids = Raids::new(&registry);
    raids.create(
        Spec { name: "array".to_owned(), level, strip_kb: 4, bases, uuid: None, superblock: false },
        Box::new(|outcome| outcome.unwrap()),
    );
    world.settle();
    let descriptor = registry.open("array", true, |_| {}).unwrap();
    let tags = Rc::new(RefCell::new(Vec::new()));
    let told = tags.clone();
    world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        let poller = reactor.reserve_poller("once");
        let queue = layer.add_queue(reactor.waker(poller).unwrap());
        let channel = descriptor.channel(reactor, &mut layer).unwrap();
        reactor.install_poller(poller, Box::new(Once { queue, channel, ops, begun: false, tags: told }));
    });
    let done = tags.clone();
    world.run_until("all is back", 1_000_000, move |_| done.borrow().len() == STRIPS.len());
    tags.take()
}

#[test]
fn a_batch_comes_back_in_its_order() {
    let order: Vec<u64> = (0..STRIPS.len() as u64).collect();
    for level in [Level::RAID0, Level::CONCAT] {
        assert_eq!(tags_of(level, [Op::Read; STRIPS.len()]), order, "{level:?}");
        assert_eq!(tags_of(level, [Op::Write; STRIPS.len()]), order, "{level:?}");
    }
}

#[test]
fn one_that_several_members_have_a_part_of_leaves_none_out() {
    let mut ops = [Op::Read; STRIPS.len()];
    (ops[2], ops[5]) = (Op::WriteZeroes, Op::Unmap);
    let mut tags = tags_of(Level::RAID0, ops);
    tags.sort_unstable();
    assert_eq!(tags, (0..STRIPS.len() as u64).collect::<Vec<u64>>());
}
