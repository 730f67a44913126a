//! Trace points under random loads: turned on and off and read at random, and what they tell of each I/O is in order.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_bdev::measures::{self, Report};
use qpair_bdev::passthru::Passthru;
use qpair_bdev::stats::Reset;
use qpair_bdev::trace::{self, ALL_POINTS, NO_IO, Page, Point, RECORDS, Record};
use qpair_bdev::{Info, Op, OpSet, Registry};
use qpair_reactor::sim::{self, Act, Obligations, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, Plan, Relay, SimDisk, check_slabs, promise, remove};

const OWN: u64 = 3 * CELL_BLOCKS;

/// An I/O at a bdev, from its start to its end there.
#[derive(Debug)]
struct Open {
    start: Record,
    issued: bool,
}

/// What is known of one reactor.
#[derive(Default)]
struct Follower {
    next: u64,
    last_ns: u64,
    points: u8,
    open: HashMap<(u64, u32), Open>,
    /// Started since points were set last.
    known: HashSet<(u64, u32)>,
    /// I/Os that ended, by bdev; without parts of others.
    ended: HashMap<u32, u64>,
    names: HashMap<u32, String>,
}

impl Follower {
    fn take(&mut self, page: &Page) {
        assert_eq!(page.lost, 0, "a ring holds all of a small world");
        assert_eq!(page.next, self.next + page.records.len() as u64);
        self.next = page.next;
        self.names.extend(page.names.iter().cloned());
        for record in &page.records {
            self.see(record);
        }
    }

    fn see(&mut self, record: &Record) {
        assert!(record.time_ns >= self.last_ns, "time went back: {record:?}");
        self.last_ns = record.time_ns;
        if record.point == Point::Set as u8 {
            assert_ne!(record.blocks as u8, self.points, "nothing changed");
            self.points = record.blocks as u8;
            self.open.clear();
            self.known.clear();
            return;
        }
        assert_ne!(self.points & 1 << record.point, 0, "a point that is off: {record:?}");
        assert!(self.names.contains_key(&record.device), "a bdev without a name: {record:?}");
        if self.points == ALL_POINTS {
            self.follow(record);
        }
    }

    fn follow(&mut self, record: &Record) {
        let key = (record.io, record.device);
        let same = |open: &Open| {
            let Record { op, lba, blocks, .. } = open.start;
            assert_eq!((op, lba, blocks), (record.op, record.lba, record.blocks), "{:?}, then {record:?}", open.start);
        };
        match record.point {
            point if point == Point::Start as u8 => {
                let before = self.open.insert(key, Open { start: *record, issued: false });
                assert!(before.is_none(), "started twice: {before:?}, {record:?}");
                self.known.insert(key);
            }
            point if point == Point::Wait as u8 => {
                if let Some(open) = self.open.get(&key) {
                    same(open);
                    assert!((1..=4).contains(&record.detail) && !open.issued, "waits with the device: {record:?}");
                }
            }
            point if point == Point::Issue as u8 => {
                if let Some(open) = self.open.get_mut(&key) {
                    same(open);
                    assert!(!std::mem::replace(&mut open.issued, true), "handed on twice: {record:?}");
                }
            }
            point if point == Point::Done as u8 => match self.open.remove(&key) {
                Some(open) => {
                    same(&open);
                    *self.ended.entry(record.device).or_default() += u64::from(open.start.parent == NO_IO);
                }
                None => assert!(!self.known.contains(&key), "ended twice: {record:?}"),
            },
            _ => assert_eq!(record.io, NO_IO),
        }
    }
}

/// Reads what is new, unless that is under way.
#[derive(Clone, Default)]
struct Readers(Arc<Mutex<(Vec<Follower>, bool)>>);

impl Readers {
    fn read(&self, registry: &Arc<Registry>, ledger: &Obligations, most: usize) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut state.1, true) {
            return;
        }
        state.0.resize_with(registry.reactors().len(), Follower::default);
        let from: Vec<u64> = state.0.iter().map(|follower| follower.next).collect();
        drop(state);
        let readers = self.clone();
        let taken = promise(ledger, Result::is_ok);
        let reply = move |outcome: Result<Vec<Page>, _>| {
            if let Ok(pages) = &outcome {
                let mut state = readers.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.0.iter_mut().zip(pages).for_each(|(follower, page)| follower.take(page));
                state.1 = false;
            }
            taken(outcome);
        };
        trace::read(registry, &from, most, Box::new(reply));
    }
}

/// Sets points at random, all of them in the end, and reads.
fn tracing(registry: Arc<Registry>, readers: Readers, ledger: Obligations, mut left: u32) -> impl FnMut(u64, &mut Rng) -> Act {
    move |now_ns, rng| {
        if left == 0 {
            return Act::Done;
        }
        left -= 1;
        let points = if left == 0 || rng.chance(1, 2) { ALL_POINTS } else { rng.below(u64::from(ALL_POINTS) + 1) as u8 };
        if left == 0 || rng.chance(2, 3) {
            trace::set(&registry, points, promise(&ledger, Result::is_ok));
        }
        readers.read(&registry, &ledger, rng.between(1, 300) as usize);
        Act::Until(now_ns + rng.below(200_000))
    }
}

fn random_base(rng: &mut Rng, blocks: u64) -> Info {
    let mut info = Info::new("base", "sim", 512, blocks + 64);
    info.queue_depth = *rng.pick(&[0, 1, 3, 16]);
    info.max_io_blocks = *rng.pick(&[0, 0, 1, 3, 8]);
    info.max_segments = *rng.pick(&[0, 0, 1, 2, 4]);
    info.write_cache = rng.chance(1, 2);
    let mut ops = vec![Op::Read, Op::Write, Op::Flush, Op::Reset];
    ops.extend([Op::Unmap, Op::WriteZeroes].into_iter().filter(|_| rng.chance(1, 2)));
    info.supported = OpSet::of(&ops);
    info
}

/// A few floors, some with a limit.
fn build(world: &mut World, registry: &Arc<Registry>) -> u64 {
    let floors = world.rng().between(1, 3);
    let (mut below, mut moved) = ("base".to_owned(), 0);
    for floor in 1..=floors {
        let name = if floor == floors { "disk".to_owned() } else { format!("floor{floor}") };
        if world.rng().chance(1, 2) {
            let shift = world.rng().below(4);
            moved += shift;
            Relay::register(registry, &name, &below, shift, 0).unwrap();
        } else {
            registry.register(Arc::new(Passthru::new(registry, &name, &below, None).unwrap())).unwrap();
        }
        if world.rng().chance(1, 4) {
            let rate = world.rng().between(20_000, 200_000);
            measures::set_limits(registry, &name, [Some(rate), None, None, None], promise(world.obligations(), Result::is_ok));
        }
        below = name;
    }
    moved
}

/// What a bdev's channels counted.
fn counted(report: &Report) -> u64 {
    let total = &report.total;
    let ios = [total.read.ios, total.write.ios, total.unmap.ios, total.copy.ios];
    ios.iter().sum::<u64>() + total.flush_ios + total.write_zeroes_ios + total.other_ios + total.errors.total()
}

fn run(world: &mut World, plan: Plan, allowed: Allowed, turns: u32) {
    let count = world.reactors();
    let info = random_base(world.rng(), count as u64 * OWN);
    let base = SimDisk::new(info.clone(), plan);
    let registry = Registry::new(world.handles());
    registry.register(base.clone()).unwrap();
    let moved = build(world, &registry);
    let (readers, ledger) = (Readers::default(), world.obligations().clone());
    if turns == 0 {
        trace::set(&registry, ALL_POINTS, promise(&ledger, Result::is_ok));
        world.settle();
    }
    let seen = Info { num_blocks: info.num_blocks - moved, ..info };
    let mut crew = Crew::new(world, 1..=1, OWN, Fills::only(0));
    crew.start(world, &registry, &Load { bdev: "disk".to_owned(), info: seen, allowed, ios: 0 }, 10..=40);
    world.add_actor(tracing(registry.clone(), readers.clone(), ledger.clone(), turns));
    world.finish();
    let told: Arc<Mutex<Option<Report>>> = Arc::default();
    let keep = told.clone();
    measures::statistics(&registry, "disk", Reset::None, Box::new(move |report| *keep.lock().unwrap() = report.ok()));
    remove(world, &registry, "base");
    readers.read(&registry, &ledger, RECORDS);
    world.finish();
    let state = readers.0.lock().unwrap();
    for follower in &state.0 {
        assert!(follower.open.is_empty(), "never ended: {:?}", follower.open.values());
    }
    if turns == 0 {
        let of_disk = |follower: &Follower| {
            let number = follower.names.iter().find(|(_, name)| *name == "disk").map(|(number, _)| *number);
            number.and_then(|number| follower.ended.get(&number).copied()).unwrap_or_default()
        };
        let report = told.lock().unwrap().take().unwrap();
        assert_eq!(state.0.iter().map(of_disk).sum::<u64>(), counted(&report), "each I/O that is counted was traced");
    }
    drop(state);
    base.check_end();
    check_slabs(world);
    crew.check_end();
}

fn scenario(name: &str, seeds: u64, turns: u32) {
    let allowed = Allowed { errors: true, aborts: true, resets: true, churn: true, composed: true, ..Allowed::default() };
    let plan = Plan { delay_ns: 100_000, error: 20, stall: 20, panic: 0 };
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        run(&mut world, plan, allowed, turns);
    });
}

#[test]
fn each_io_that_starts_at_a_bdev_ends_there_and_all_that_count_are_traced() {
    scenario("trace_on", 500, 0);
}

#[test]
fn points_are_set_while_io_runs_and_what_they_tell_is_in_order() {
    scenario("trace_on_and_off", 1000, 12);
}
