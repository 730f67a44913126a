//! Resets of arrays under random schedules: each goes on to every member, also through an array that is a member itself, is answered once, when all of them
//! have answered, finds them quiet, and costs no leg its place.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qpair_bdev::{ChannelId, Descriptor, Info, IoFlags, Layer, Op, OpSet, QueueId, Registry, Status, lifecycle};
use qpair_raid::{Level, Phase, Raids, Spec};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_reactor::{LocalWaker, Poller, Reactor};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, IOS, Load, Plan, SimDisk, check_slabs, promise};

/// Blocks of each client.
const OWN: u64 = 2 * CELL_BLOCKS;
const OFFSET: u64 = 2048;
const RESETS: u32 = 6;

/// A front end that resets the array, one time after the other, and counts what its disks saw of it.
struct Resetter {
    registry: Arc<Registry>,
    disks: Vec<Arc<SimDisk>>,
    layer: Rc<RefCell<Layer>>,
    waker: LocalWaker,
    queue: QueueId,
    open: Option<(Descriptor, ChannelId)>,
    /// What the disks had seen when the one under way was submitted.
    before: Option<Vec<u64>>,
    left: u32,
    next_ns: u64,
    done: Arc<AtomicU64>,
    ledger: Obligations,
    rng: Rng,
}

impl Resetter {
    fn start(world: &mut World, reactor: usize, registry: &Arc<Registry>, disks: &[Arc<SimDisk>]) -> Arc<AtomicU64> {
        let done = Arc::new(AtomicU64::new(0));
        let (rng, ledger) = (world.rng().fork(), world.obligations().clone());
        let (registry, disks, told) = (registry.clone(), disks.to_vec(), done.clone());
        world.with(reactor, move |reactor| {
            let layer = Layer::install(reactor, IOS);
            let poller = reactor.reserve_poller("resetter");
            let waker = reactor.waker(poller).expect("just reserved");
            let queue = layer.borrow_mut().add_queue(waker.clone());
            let left = RESETS;
            let resetter =
                Self { registry, disks, layer, waker, queue, open: None, before: None, left, next_ns: 0, done: told, ledger, rng };
            reactor.install_poller(poller, Box::new(resetter));
        });
        done
    }

    fn seen(&self) -> Vec<u64> {
        self.disks.iter().map(|disk| disk.resets()).collect()
    }

    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        if self.open.is_none() {
            let descriptor = self.registry.open("array", true, |_| {}).expect("it stays");
            let channel = descriptor.channel(reactor, layer).expect("it stays");
            self.open = Some((descriptor, channel));
        }
        let channel = self.open.as_ref().expect("just opened").1;
        let id = layer.take().expect("enough of them");
        let (obligation, drains) = (self.ledger.open_next(), self.rng.chance(1, 2));
        let io = layer.io_mut(id);
        io.op = Op::Reset;
        if drains {
            io.flags |= IoFlags::DRAIN;
        }
        io.push(self.queue, obligation);
        self.before = Some(self.seen());
        layer.submit(reactor, channel, &[id]);
        layer.unplug(reactor);
    }
}

impl Poller for Resetter {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        let mut reaped = Vec::new();
        layer.reap(reactor, self.queue, &mut reaped);
        for id in &reaped {
            self.ledger.close(layer.retrieve(*id).tag);
            assert_eq!(layer.io(*id).status, Status::SUCCESS);
            layer.give_back(*id);
            let before = self.before.take().expect("one was under way");
            let missed = self.seen().iter().zip(&before).position(|(after, before)| after <= before);
            assert_eq!(missed, None, "a disk whose channels were not reset: {before:?}, then {:?}", self.seen());
            self.done.fetch_add(1, Ordering::SeqCst);
            self.next_ns = reactor.now_ns() + self.rng.below(200_000);
            reactor.wake_at(self.next_ns, &self.waker);
        }
        if self.before.is_none() && reactor.now_ns() >= self.next_ns {
            if self.left > 0 {
                self.left -= 1;
                self.submit(&mut layer, reactor);
                return 1;
            }
            if let Some((_, channel)) = self.open.take() {
                layer.close_channel(reactor, channel);
                layer.remove_queue(self.queue);
            }
        }
        reaped.len()
    }
}

struct Stage {
    registry: Arc<Registry>,
    raids: Arc<Raids>,
    disks: Vec<Arc<SimDisk>>,
}

impl Stage {
    /// So many disks, each with room for `blocks` of data.
    fn new(world: &World, count: usize, blocks: u64) -> Self {
        let registry = Registry::new(world.handles());
        let raids = Raids::new(&registry);
        let disk = |number: usize| {
            let mut info = Info::new(&format!("leg{number}"), "leg", 512, OFFSET + blocks);
            info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Flush, Op::Unmap, Op::WriteZeroes, Op::Reset]);
            let disk = SimDisk::new(info, Plan { delay_ns: 50_000, ..Plan::default() });
            registry.register(disk.clone()).unwrap();
            disk
        };
        let disks = (0..count).map(disk).collect();
        Self { registry, raids, disks }
    }

    fn create(&self, world: &mut World, name: &str, level: Level, bases: &[&str], superblock: bool) {
        let strip_kb = if level == Level::RAID1 { 0 } else { 4 };
        let bases = bases.iter().map(|base| (*base).to_owned()).collect();
        let spec = Spec { name: name.to_owned(), level, strip_kb, bases, uuid: None, superblock };
        self.raids.create(spec, promise(world.obligations(), Result::is_ok));
        world.settle();
    }

    fn end(&self, world: &mut World, crew: &Crew) {
        for name in ["array", "inner"] {
            self.raids.delete(name, false, promise(world.obligations(), |_| true));
            world.settle();
        }
        world.finish();
        assert!(self.raids.list().is_empty());
        for disk in &self.disks {
            lifecycle::unregister(&self.registry, &disk.info.name, 0, promise(world.obligations(), Result::is_ok));
        }
        world.finish();
        crew.check_end();
        self.disks.iter().for_each(|disk| disk.check_end());
        check_slabs(world);
    }

    fn load(&self, allowed: Allowed) -> Load {
        Load { bdev: "array".to_owned(), info: self.disks[0].info.clone(), allowed, ios: 0 }
    }
}

#[test]
fn a_reset_of_an_array_is_one_of_each_disk_below_it() {
    sim::run_seeds("raid_reset", 200, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let blocks = Crew::blocks(&world, 1, OWN).next_multiple_of(8) + 16;
        let stage = Stage::new(&world, 3, blocks);
        let level = *world.rng().pick(&[Level::RAID0, Level::CONCAT, Level::RAID1]);
        let superblock = world.rng().chance(1, 2);
        if world.rng().chance(1, 2) {
            stage.create(&mut world, "inner", Level::RAID0, &["leg1", "leg2"], false);
            stage.create(&mut world, "array", level, &["leg0", "inner"], superblock);
        } else {
            stage.create(&mut world, "array", level, &["leg0", "leg1", "leg2"], superblock);
        }
        assert!(stage.raids.list().iter().all(|array| array.phase == Phase::Online), "{:?}", stage.raids.list());
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        // Clients that write only ask for none themselves: all that disks see come from one.
        let (resets, writes_only, scattered) = (true, true, true);
        let allowed = Allowed { resets, writes_only, scattered, mirrored: level == Level::RAID1, ..Allowed::default() };
        crew.start(&mut world, &stage.registry, &stage.load(allowed), 20..=40);
        let reactors = world.reactors() as u64;
        let reactor = world.rng().below(reactors) as usize;
        let done = Resetter::start(&mut world, reactor, &stage.registry, &stage.disks);
        world.settle();
        assert_eq!(done.load(Ordering::SeqCst), u64::from(RESETS));
        // One channel of each disk a reactor, and each is reset once; on one reactor it is open all the time.
        let seen = stage.disks.iter().map(|disk| disk.resets());
        let most = u64::from(RESETS) * reactors;
        assert!(seen.clone().all(|seen| (u64::from(RESETS)..=most).contains(&seen)), "{:?}", seen.collect::<Vec<_>>());
        stage.end(&mut world, &crew);
    });
}

#[test]
fn what_an_array_does_of_its_own_outlives_resets() {
    sim::run_seeds("raid_reset_rebuild", 200, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let stage = Stage::new(&world, 3, Crew::blocks(&world, 1, OWN));
        stage.raids.set_options(qpair_raid::Options { window_kb: 1, bandwidth_mb: 0 }).unwrap();
        stage.create(&mut world, "array", Level::RAID1, &["leg0", "leg1", "leg2"], true);
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        let allowed = Allowed { resets: true, mirrored: true, ..Allowed::default() };
        crew.start(&mut world, &stage.registry, &stage.load(allowed), 40..=60);
        Resetter::start(&mut world, 0, &stage.registry, &stage.disks[..2]);
        let (raids, ledger, mut out) = (stage.raids.clone(), world.obligations().clone(), false);
        let mut left = 8;
        world.add_actor(move |now_ns, rng: &mut Rng| {
            let again = Act::Until(now_ns + rng.below(400_000));
            let array = &raids.list()[0];
            if array.process.is_some() || array.members[2].is_configured == out {
                return again;
            }
            left -= 1;
            out = !out;
            match out {
                true => raids.remove_base("leg2", promise(&ledger, Result::is_ok)),
                false => raids.add_base("array", "leg2", promise(&ledger, Result::is_ok)),
            }
            if left == 0 { Act::Done } else { again }
        });
        world.settle();
        let array = &stage.raids.list()[0];
        let members: Vec<_> = array.members.iter().map(|member| member.is_configured).collect();
        assert_eq!((array.phase, &array.process, members), (Phase::Online, &None, vec![true; 3]), "a reset cost a leg its place");
        stage.end(&mut world, &crew);
    });
}
