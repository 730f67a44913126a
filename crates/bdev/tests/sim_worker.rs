//! A bdev that a worker process serves, in the simulator: the worker dies, hangs and lies at any step, and another one takes its place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use qpair_bdev::python::{Down, Link, LinkConfig, PythonBdev, Ring, Service, Work, WorkerEnd, control_bytes};
use qpair_bdev::{Device, Op, Registry};
use qpair_memory::{Mapping, Region};
use qpair_reactor::event::Event;
use qpair_reactor::sim::{self, Act, Rng, World};
use qpair_simkit::{Allowed, CELL_BLOCKS, Crew, Fills, Load, check_slabs, remove};

/// Blocks of each client.
const OWN: u64 = 6 * CELL_BLOCKS;

/// What a worker is up to, per mille of its steps.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    dies: u64,
    hangs: u64,
    lies: u64,
    /// Workers there will ever be.
    workers: u64,
}

/// A process that serves, and who watches it.
struct Process {
    ring: Arc<Ring>,
    link: Link,
    plan: Plan,
    blocks: u64,
    depth: u32,
    store: Vec<u8>,
    bell: Event,
    down: Arc<Mutex<Vec<(u64, Down)>>>,
    number: u64,
    /// None: it is gone.
    end: Option<(WorkerEnd, Arc<Mapping>, Event)>,
    hung: bool,
    held: VecDeque<Work>,
    restart_ns: Option<u64>,
}

impl Process {
    fn start(&mut self) {
        self.number += 1;
        let control = self.link.control().unwrap();
        assert_eq!(control.len(), control_bytes(self.depth));
        let done = Event::simulated();
        let end = WorkerEnd::new(control.clone(), self.depth, self.ring.stride(), 512).unwrap();
        self.link.attach(self.number, control.clone(), self.bell.twin().unwrap(), done.twin().unwrap());
        (self.end, self.hung) = (Some((end, control, done)), false);
    }

    /// Requests take effect when they are fetched, so that one given up is never late.
    fn perform(&mut self, work: &Work) {
        let range = (work.offset_blocks * 512) as usize..((work.offset_blocks + work.num_blocks) * 512) as usize;
        let memory = Region::new(self.ring.mapping().clone());
        match (work.op, work.buffer) {
            (Op::Read, Some((offset, length))) => memory.write(offset, &self.store[range][..length as usize]).unwrap(),
            (Op::Write, Some((offset, length))) => memory.read(offset, &mut self.store[range][..length as usize]).unwrap(),
            (Op::WriteZeroes, None) => self.store[range].fill(0),
            (Op::Unmap | Op::Flush, None) => {}
            other => panic!("{other:?}"),
        }
    }

    /// Writes rubbish where only the engine's checks stand between it and the disk.
    fn lie(control: &Arc<Mapping>, rng: &mut Rng) {
        let memory = Region::new(control.clone());
        for _ in 0..rng.between(1, 8) {
            let word = match rng.below(3) {
                0 => rng.next(),
                1 => rng.below(300),
                _ => rng.below(8) << 32 | rng.below(70),
            };
            // The index of completions most of all.
            let offset = if rng.chance(1, 2) { 256 } else { rng.below(control.len() as u64 / 8) * 8 };
            memory.write(offset, &word.to_le_bytes()).unwrap();
        }
    }

    /// What the watcher does: sees to it that the process is gone, then starts the next.
    fn watch(&mut self, now_ns: u64, rng: &mut Rng) {
        for (number, _) in self.down.lock().unwrap().drain(..) {
            if number == self.number && self.restart_ns.is_none() {
                (self.end, self.restart_ns) = (None, Some(now_ns + rng.below(300_000)));
                self.held.clear();
            }
        }
        if self.restart_ns.is_some_and(|at| at <= now_ns) {
            self.restart_ns = None;
            if self.number == self.plan.workers {
                self.ring.close();
            } else {
                self.start();
            }
        }
    }

    fn act(&mut self, now_ns: u64, rng: &mut Rng) -> Act {
        self.watch(now_ns, rng);
        if let Some(at) = self.restart_ns {
            return Act::Until(at);
        }
        let rest = Act::On(self.bell.twin().unwrap(), None);
        let Some((end, control, done)) = &mut self.end else { return rest };
        if rng.chance(self.plan.dies, 1000) {
            // The kernel says so, some time later.
            self.end = None;
            self.held.clear();
            self.link.sever(self.number, "killed");
            return rest;
        }
        self.hung |= rng.chance(self.plan.hangs, 1000);
        if rng.chance(self.plan.lies, 1000) {
            Self::lie(control, rng);
            done.notify();
        }
        if self.hung {
            return rest;
        }
        let fetched = end.fetch(rng.between(1, 4) as usize);
        // A liar may have hurt itself.
        let sane = |work: &Work| {
            let inside = work.offset_blocks.checked_add(work.num_blocks).is_some_and(|end| end <= self.blocks);
            inside
                && work
                    .buffer
                    .is_none_or(|(offset, length)| length == work.num_blocks * 512 && offset + length <= self.ring.mapping().len() as u64)
        };
        let fetched: Vec<Work> = fetched.into_iter().filter(sane).collect();
        fetched.iter().for_each(|work| self.perform(work));
        let idle = fetched.is_empty();
        self.held.extend(fetched);
        if !self.held.is_empty()
            && rng.chance(1, 2)
            && let Some((end, _, done)) = &mut self.end
        {
            let position = rng.below(self.held.len() as u64) as usize;
            let work = self.held.remove(position).unwrap();
            if end.complete(&[(work.slot, 0)]) {
                done.notify();
            }
        }
        match (idle, self.held.is_empty()) {
            (true, true) => rest,
            (true, false) => Act::Until(now_ns + rng.below(50_000)),
            _ => Act::Again,
        }
    }
}

fn scenario(name: &str, seeds: u64, plan: Plan, while_down: Service) {
    sim::run_seeds(name, seeds, |seed| {
        let mut world = World::new(seed, 1 + (seed % 3) as usize);
        let count = world.reactors() as u64;
        let blocks = count * OWN;
        let (depth, max_io) = (*world.rng().pick(&[1, 2, 7, 64]), *world.rng().pick(&[512, 2048, 65536]));
        let (link, on_work) = Link::prepare(world.handle((seed % count) as usize), depth);
        let (bdev, ring) = PythonBdev::new("disk", blocks, 512, depth, max_io, None, false, on_work).unwrap();
        let registry = Registry::new(world.handles());
        registry.register(bdev.clone()).unwrap();
        let (bell, down) = (Event::simulated(), Arc::new(Mutex::new(Vec::new())));
        let (told, rung) = (down.clone(), bell.twin().unwrap());
        let on_down = Box::new(move |number, why| {
            told.lock().unwrap().push((number, why));
            rung.notify();
        });
        let trouble = plan.dies + plan.hangs + plan.lies > 0;
        // A slow worker is no trouble, unless it may be one that hangs.
        link.start(ring.clone(), LinkConfig { timeout_ns: if trouble { 1_000_000 } else { 0 }, while_down }, on_down);
        let allowed = Allowed { aborts: true, resets: true, churn: true, panics: trouble, rubbish: plan.lies > 0, ..Allowed::default() };
        let mut crew = Crew::new(&mut world, 1..=1, OWN, Fills::only(0));
        crew.start(&mut world, &registry, &Load { bdev: "disk".to_owned(), info: bdev.info(), allowed, ios: 0 }, 50..=50);
        let mut process = Process {
            ring: ring.clone(),
            link,
            plan,
            blocks,
            depth,
            store: vec![0; (blocks * 512) as usize],
            bell,
            down,
            number: 0,
            end: None,
            hung: false,
            held: VecDeque::new(),
            restart_ns: Some(0),
        };
        world.add_actor(move |now_ns, rng: &mut Rng| process.act(now_ns, rng));
        world.finish();
        if !trouble {
            assert_eq!(ring.free_slots(), depth as usize, "slots leaked");
        }
        remove(&mut world, &registry, "disk");
        check_slabs(&mut world);
        crew.check_end();
        drop((registry, bdev));
        world.finish();
        assert!(ring.is_closed());
    });
}

#[test]
fn a_worker_serves_and_no_wake_up_is_lost() {
    scenario("worker", 500, Plan { workers: 1, ..Plan::default() }, Service::Waiting);
}

#[test]
fn a_worker_that_dies_at_any_step_fails_what_it_had_and_the_rest_waits_for_the_next() {
    scenario("worker dies", 500, Plan { dies: 20, workers: 1000, ..Plan::default() }, Service::Waiting);
}

#[test]
fn while_no_worker_is_there_io_fails_if_it_is_not_to_wait() {
    scenario("worker dies, failing", 400, Plan { dies: 20, workers: 1000, ..Plan::default() }, Service::Failing);
}

#[test]
fn a_worker_that_hangs_is_noticed_and_replaced() {
    scenario("worker hangs", 400, Plan { hangs: 10, dies: 3, workers: 1000, ..Plan::default() }, Service::Waiting);
}

#[test]
fn after_the_last_worker_all_fails() {
    scenario("last worker", 400, Plan { dies: 20, hangs: 5, workers: 3, ..Plan::default() }, Service::Waiting);
}

#[test]
fn a_worker_that_writes_rubbish_harms_nothing_but_itself() {
    scenario("worker lies", 600, Plan { lies: 30, dies: 3, workers: 1000, ..Plan::default() }, Service::Waiting);
}
