//! Targets that are killed at any step, and others that come: each I/O ends once, none is lost, what was acknowledged holds, and what should be durable is, also
//! where the old target's cache died with it. Meanwhile channels come and go, I/Os are aborted, devices reset and removed.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use qpair_bdev::BdevError;
use qpair_bdev::lifecycle::Reply;
use qpair_reactor::sim::{self, Rng, World};
use zerocopy::IntoBytes;

use crate::client::{Allowed, Tally};
use crate::target::Manners;
use crate::{NONE, QUIET, RunSome, Scene};

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
struct Total {
    seeds: u64,
    outages: u64,
    broken: u64,
    done: u64,
    failed: u64,
}

pub(crate) fn answer<T: Send + 'static>(world: &mut World, ask: impl FnOnce(Reply<T>)) -> Result<T, BdevError> {
    let answers = Arc::new(Mutex::new(None));
    let heard = answers.clone();
    ask(Box::new(move |outcome| *heard.lock().unwrap() = Some(outcome)));
    world.run_until("an answer", 1_000_000, |_| answers.lock().unwrap().is_some());
    let mut answers = answers.lock().unwrap();
    answers.take().unwrap()
}

impl Scene {
    fn kill(&mut self, world: &mut World, rng: &mut Rng) {
        self.disk.borrow_mut().kill(rng.chance(1, 2));
        self.evict(world);
    }

    fn leave(&self, world: &mut World) {
        let (link, device) = (self.link.as_ref().unwrap(), self.device.unwrap());
        answer(world, |reply| link.leave(&self.registry, device, reply)).unwrap();
    }

    fn rejoin(&self, world: &mut World, broken: &Arc<AtomicU64>) {
        let (link, device, broken) = (self.link.as_ref().unwrap(), self.device.unwrap(), broken.clone());
        link.when_broken(move |_| {
            broken.fetch_add(1, Ordering::Relaxed);
        });
        answer(world, |reply| link.rejoin(&self.registry, device, self.features, self.config.as_bytes(), reply)).unwrap();
    }
}

fn run(seed: u64, manners: Manners, allowed: Allowed) -> (Tally, u64, u64) {
    let mut rng = Rng::new(seed ^ 0x0a7a6e);
    let reactors = rng.between(1, 4) as usize;
    let mut world = World::new(seed, reactors);
    let queues = rng.between(if allowed.churn { 1 } else { reactors as u64 }, 6) as usize;
    let mut scene = Scene::with_link(&mut world, &mut rng, queues, &[manners], true);
    let (mut removed, mut outages, broken) = (false, 0, Arc::new(AtomicU64::new(0)));
    scene.load(&mut world, &mut rng, allowed, 60);
    let times = rng.between(1, 5);
    for time in 1..=times {
        world.run_some(rng.below(1500));
        let going = allowed.removal && rng.chance(1, 4);
        let before = rng.chance(1, 2);
        if going && before {
            scene.remove(*rng.pick(&[0, 100_000, 3_000_000]));
            world.run_some(rng.below(50));
        }
        scene.kill(&mut world, &mut rng);
        outages += 1;
        world.run_some(rng.below(200));
        scene.leave(&mut world);
        if going && !before {
            world.run_some(rng.below(300));
            scene.remove(*rng.pick(&[0, 100_000, 3_000_000]));
        }
        removed = going;
        if going {
            break;
        }
        world.run_some(rng.below(1500));
        scene.link.as_ref().unwrap().wipe().unwrap();
        // The last one stays, and is good.
        scene.connect(&mut world, &mut rng, &[if time == times { NONE } else { manners }]);
        world.run_some(rng.below(50));
        scene.rejoin(&mut world, &broken);
    }
    world.settle();
    if !removed {
        scene.remove(0);
        world.settle();
    }
    let tally = *scene.tally.borrow();
    scene.check_end(&mut world);
    world.finish();
    (tally, outages, broken.load(Ordering::Relaxed))
}

fn seeds(name: &str, count: u64, manners: Manners, allowed: Allowed) -> Total {
    let total = Cell::new(Total::default());
    sim::run_seeds(name, count, |seed| {
        let (tally, outages, broken) = run(seed, manners, allowed);
        let was = total.get();
        total.set(Total {
            seeds: was.seeds + 1,
            outages: was.outages + outages,
            broken: was.broken + broken,
            done: was.done + tally.done,
            failed: was.failed + tally.failed,
        });
    });
    let total = total.get();
    eprintln!("simulation {name}: {total:?}");
    assert!(total.seeds < 100 || (total.done > 15 * total.seeds && total.outages > total.seeds), "{total:?}");
    total
}

const OUTAGES: Allowed = Allowed { outages: true, ..QUIET };

#[test]
fn io_that_a_killed_target_had_is_done_by_the_next_and_nothing_is_lost() {
    seeds("virtio-outage", 500, Manners { mutes: 10, deaths: 10, ..NONE }, OUTAGES);
}

#[test]
fn a_target_that_broke_the_rules_and_its_successors_lose_nothing() {
    let total = seeds("virtio-outage-broken", 400, Manners { mutes: 5, blatant: 15, ..NONE }, OUTAGES);
    assert!(total.seeds < 100 || total.broken > total.seeds / 10, "{total:?}");
}

#[test]
fn channels_come_and_go_while_targets_do() {
    let allowed = Allowed { churn: true, ..OUTAGES };
    seeds("virtio-outage-churn", 400, Manners { mutes: 10, deaths: 10, ..NONE }, allowed);
}

#[test]
fn aborts_and_resets_while_a_target_is_away_end_what_waits() {
    let allowed = Allowed { aborts: true, resets: true, churn: true, ..OUTAGES };
    let total = seeds("virtio-outage-resets", 400, Manners { mutes: 5, deaths: 5, blatant: 3, ..NONE }, allowed);
    assert!(total.seeds < 100 || total.failed > total.seeds, "{total:?}");
}

#[test]
fn a_removal_at_any_time_of_an_outage_ends_all() {
    let allowed = Allowed { aborts: true, resets: true, churn: true, removal: true, ..OUTAGES };
    seeds("virtio-outage-removal", 500, Manners { mutes: 10, deaths: 10, blatant: 3, ..NONE }, allowed);
}
