//! Mirrors that are started by force: some of their legs are lost with whatever they had alone, and come back, having gone on by themselves or not. The power
//! goes at any step, also while the start or a rebuild is under way. Whichever side is the array then has all that it acknowledged; the legs of the other
//! are as they were, until one is added by hand; each I/O ends once.

mod mirrors;

use std::cell::Cell;
use std::sync::{Arc, Mutex};

use mirrors::{OFFSET, OWN, Stage, bury, create, demolish, leg};
use qpair_bdev::BdevError;
use qpair_raid::Phase;
use qpair_reactor::sim::{self, World};
use qpair_simkit::{Allowed, Crew, Fills, Load, SimDisk, promise};

/// What happened under all seeds, lest it be nothing.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    forced: u64,
    divided: u64,
    met: u64,
    added: u64,
    refused: u64,
    reads: u64,
}

/// Legs that were current together when they were parted from the others, what the clients know of them, and legs that were out.
struct Side {
    legs: Vec<usize>,
    stale: Vec<usize>,
    crew: Crew,
}

struct Case<'a> {
    disks: Vec<Arc<SimDisk>>,
    cached: bool,
    reactors: usize,
    seed: u64,
    worlds: u64,
    total: &'a Cell<Total>,
}

impl Case<'_> {
    /// The next process.
    fn begin(&mut self) -> (World, Arc<Stage>) {
        self.worlds += 1;
        let world = World::new(self.seed ^ self.worlds << 32, self.reactors);
        let stage = Stage::new(&world, &self.disks);
        (world, stage)
    }

    /// The power goes, now or later.
    fn end(&self, mut world: World, stage: &Stage, crew: &mut Crew) {
        world.kill();
        world.obligations().abandon_open();
        self.disks.iter().for_each(|disk| disk.crash());
        bury(stage);
        crew.crash();
    }

    fn load(&self, reads_only: bool) -> Load {
        let (cached, mirrored, composed, churn, resets) = (self.cached, true, !reads_only, true, !reads_only);
        let allowed = Allowed { cached, mirrored, composed, churn, resets, reads_only, ..Allowed::default() };
        Load { bdev: "mirror".to_owned(), info: self.disks[0].info.clone(), allowed, ios: 0 }
    }

    fn count(&self, change: impl FnOnce(&mut Total)) {
        let mut total = self.total.get();
        change(&mut total);
        self.total.set(total);
    }

    /// Everything is read, then written to, for a while or until all is done.
    fn work(&self, world: &mut World, stage: &Arc<Stage>, crew: &mut Crew) {
        crew.start(world, &stage.registry, &self.load(true), 20..=20);
        world.settle();
        crew.start(world, &stage.registry, &self.load(false), 10..=30);
        some_steps(world, 2000);
    }
}

/// Until all is done, or the power goes.
fn some_steps(world: &mut World, most: u64) {
    match world.rng().chance(1, 3) {
        true => world.settle(),
        false => {
            let steps = world.rng().below(most);
            world.run(steps);
        }
    }
}

fn appear(world: &mut World, stage: &Stage, legs: impl IntoIterator<Item = usize>) {
    let mut order: Vec<usize> = legs.into_iter().collect();
    world.rng().shuffle(&mut order);
    let ledger = world.obligations().clone();
    for number in order {
        stage.appear(number, &ledger);
        if world.rng().chance(1, 2) {
            world.settle();
        }
    }
    world.settle();
}

/// The legs that the array works with.
fn members(stage: &Stage) -> Vec<usize> {
    let array = stage.raids.list().pop().expect("an array");
    let number = |name: &String| name.strip_prefix("leg").and_then(|number| number.parse().ok());
    let mut found: Vec<usize> = array.members.iter().filter_map(|member| member.name.as_ref().and_then(number)).collect();
    found.sort_unstable();
    found
}

/// The mirror as it was before: made, perhaps without one of its legs since, and written to until the power goes. Two sides of it, which will not see each other
/// for a while.
fn parted<'a>(seed: u64, total: &'a Cell<Total>) -> (Case<'a>, Side, Side) {
    let reactors = 1 + (seed % 3) as usize;
    let mut world = World::new(seed, reactors);
    let (cached, delay_ns, legs) = (world.rng().chance(1, 2), *world.rng().pick(&[0, 20_000, 200_000]), world.rng().between(2, 3) as u8);
    let disks: Vec<_> = (0..legs).map(|number| leg(number, OFFSET + reactors as u64 * OWN, cached, delay_ns)).collect();
    let case = Case { disks, cached, reactors, seed, worlds: 0, total };
    let stage = Stage::new(&world, &case.disks);
    create(&mut world, &stage, true);
    let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
    let mut order: Vec<usize> = (0..usize::from(legs)).collect();
    world.rng().shuffle(&mut order);
    let mut stale = Vec::new();
    if legs == 3 && world.rng().chance(1, 3) {
        let out = order.remove(0);
        stage.raids.remove_base(&format!("leg{out}"), promise(world.obligations(), Result::is_ok));
        world.settle();
        stale.push(out);
    }
    let one_alone = world.rng().chance(1, 2);
    case.work(&mut world, &stage, &mut crew);
    case.end(world, &stage, &mut crew);
    let rest = order.split_off(if one_alone { 1 } else { order.len() - 1 });
    let (one, other) = (crew.fork(), crew);
    (case, Side { legs: order, stale, crew: one }, Side { legs: rest, stale: Vec::new(), crew: other })
}

/// One side is alone, and started. The power may go at any step, several times; in the end it has been an array of these legs.
fn go_on(case: &mut Case, side: &mut Side) {
    let mut rounds = 3;
    loop {
        let (mut world, stage) = case.begin();
        rounds -= 1;
        appear(&mut world, &stage, side.legs.iter().chain(&side.stale).copied());
        if stage.phase() == Some(Phase::Configuring) {
            // When the power goes, the task does, and says that the array does.
            let legal = |outcome: &Result<(), BdevError>| matches!(outcome, Ok(()) | Err(BdevError::Removing(_)));
            stage.raids.start("mirror", promise(world.obligations(), legal));
            if rounds > 0 && world.rng().chance(1, 2) {
                some_steps(&mut world, 200);
                case.end(world, &stage, &mut side.crew);
                continue;
            }
            world.settle();
            case.count(|total| total.forced += 1);
        }
        assert_eq!((stage.phase(), members(&stage)), (Some(Phase::Online), sorted(&side.legs)), "{:?}", stage.raids.list());
        case.work(&mut world, &stage, &mut side.crew);
        let last = rounds <= 0 || world.rng().chance(1, 2);
        case.end(world, &stage, &mut side.crew);
        if last {
            return;
        }
    }
}

fn sorted(legs: &[usize]) -> Vec<usize> {
    let mut legs = legs.to_vec();
    legs.sort_unstable();
    legs
}

/// What was asked for: a leg of the other side is to be one of this side.
#[derive(Clone, Copy)]
struct Added {
    leg: usize,
    to: usize,
}

/// All legs are there again, and one side is the array; which. None: of the other side a leg was taken away that it cannot do without, and it waits for that.
fn meet(case: &Case, world: &mut World, stage: &Stage, sides: &[Side; 2], divided: bool, added: Option<Added>) -> Option<usize> {
    appear(world, stage, 0..case.disks.len());
    let found = members(stage);
    let robbed = |side: usize| added.is_some_and(|added| added.to != side && sides[side].legs.contains(&added.leg));
    let is_side = |side: &usize| {
        let more = added.filter(|added| added.to == *side).map(|added| sorted(&[&sides[*side].legs[..], &[added.leg]].concat()));
        !robbed(*side) && (sorted(&sides[*side].legs) == found || more.is_some_and(|more| more == found))
    };
    let which = (0..2).find(is_side);
    if which.is_none() && divided && robbed(1 - added?.to) && stage.phase() == Some(Phase::Configuring) {
        assert!(!found.contains(&added?.leg), "a leg that is another's by now: {:?}", stage.raids.list());
        return None;
    }
    let which = which.unwrap_or_else(|| panic!("an array of {found:?}, not of {:?} or {:?}", sides[0].legs, sides[1].legs));
    assert_eq!(stage.phase(), Some(Phase::Online), "all legs are there: {:?}", stage.raids.list());
    assert!(which == 0 || divided, "legs that were given up are the array, and nobody had started them");
    case.count(|total| total.met += 1);
    Some(which)
}

/// The sides meet, and work goes on, until the power goes. Legs of the other side are not written to, unless one is added by hand.
fn live_together(case: &mut Case, sides: &mut [Side; 2], divided: bool) -> Option<Added> {
    let before: Vec<Vec<u8>> = case.disks.iter().map(|disk| disk.bytes()).collect();
    let (mut world, stage) = case.begin();
    let which = meet(case, &mut world, &stage, sides, divided, None).expect("both sides have their legs");
    case.work(&mut world, &stage, &mut sides[which].crew);
    let others: Vec<usize> = (0..case.disks.len()).filter(|leg| !sides[which].legs.contains(leg)).collect();
    let untouched = |leg: &usize| case.disks[*leg].bytes() == before[*leg];
    assert!(others.iter().all(untouched), "legs {others:?} of the other side are written over");
    let mut added = None;
    if world.rng().chance(1, 2) {
        let leg = *world.rng().pick(&others);
        let (answer, ledger) = (Arc::new(Mutex::new(None)), world.obligations().clone());
        let told = answer.clone();
        let newer = |error: &BdevError| error.to_string().contains("is newer than the array's");
        let legal = move |outcome: &Result<(), BdevError>| {
            *told.lock().unwrap() = Some(outcome.is_ok());
            matches!(outcome, Ok(()) | Err(BdevError::Removing(_))) || divided && outcome.as_ref().is_err_and(newer)
        };
        stage.raids.add_base("mirror", &format!("leg{leg}"), promise(&ledger, legal));
        some_steps(&mut world, 1500);
        // Before the power goes, and the task with it.
        if *answer.lock().unwrap() == Some(false) {
            assert!(untouched(&leg), "refused, and yet written over");
            case.count(|total| total.refused += 1);
        } else {
            case.count(|total| total.added += 1);
            added = Some(Added { leg, to: which });
        }
    }
    case.end(world, &stage, &mut sides[which].crew);
    // Whether the power went before or after that: it is what it was, or says whose it is now before anything else is written to it.
    added.filter(|added| {
        let (now, superblock) = (case.disks[added.leg].bytes(), OFFSET as usize * 512);
        let same = now[..superblock] == before[added.leg][..superblock];
        assert!(!same || now == before[added.leg], "leg {} is written over, and its superblock says nothing of it", added.leg);
        !same
    })
}

fn run(seed: u64, total: &Cell<Total>) {
    let (mut case, one, other) = parted(seed, total);
    let mut sides = [one, other];
    go_on(&mut case, &mut sides[0]);
    let divided = seed.is_multiple_of(2);
    if divided {
        go_on(&mut case, &mut sides[1]);
        case.count(|total| total.divided += 1);
    }
    let added = (0..3).find_map(|_| live_together(&mut case, &mut sides, divided));
    let (mut world, stage) = case.begin();
    if let Some(which) = meet(&case, &mut world, &stage, &sides, divided, added) {
        let crew = &mut sides[which].crew;
        case.work(&mut world, &stage, crew);
        world.settle();
        crew.start(&mut world, &stage.registry, &case.load(true), 40..=40);
        world.settle();
        case.count(|total| total.reads += crew.reads());
    }
    demolish(&mut world, &stage);
    sides.iter().for_each(|side| side.crew.check_end());
}

/// Found by 14: two legs of different generations, examined at once, had the older array come online, which nobody knew any more. By 36: a leg that was half
/// written over when the power went came back as the array that it had been started as.
#[test]
fn who_was_given_up_is_never_written_over_unasked() {
    let total = Cell::new(Total::default());
    sim::run_seeds("mirror_forced", 200, |seed| run(seed, &total));
    let total = total.get();
    eprintln!("simulation mirror_forced: {total:?}");
    let seen = [total.divided, total.added, total.refused, total.reads].iter().all(|count| *count > 0);
    assert!(total.forced < 100 || seen, "{total:?}");
}
