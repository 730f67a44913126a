//! A guest under a seed: asks, kicks, stops, moves, resets, leaves and lies, and holds the device to what it promised.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};

use qpair_memory::Mapping;
use qpair_reactor::Handle;
use qpair_reactor::event::Event;
use qpair_reactor::sim::{Act, Rng};
use qpair_vhost::{Addresses, Answer, Broken, Change, Coalescing, Command, Failure, Reply, Source, Target, VhostError};
use qpair_wire::virtio_blk::RequestType;
use std::os::fd::OwnedFd;

use crate::guest::{self, Ask, Driver, Kind};

pub const SLOTS: usize = 6;
/// Blocks that belong to one slot of one queue: nobody else touches them.
const SLOT_SECTORS: u64 = 16;
const MEMORY: u64 = 4 << 20;

type Outcome = Arc<Mutex<Option<Result<Answer, VhostError>>>>;

/// What of the guest survives the device: memory, rings, the inflight region, what it knows of its disk.
pub struct Guest {
    pub target: Arc<Target>,
    pub failures: Arc<Mutex<Vec<Failure>>>,
    /// Where its rings may be moved.
    pub reactors: Vec<Handle>,
    session: Option<u64>,
    queues: Vec<Queue>,
    memory: Arc<Mapping>,
    /// The device's views of memory: dead once a later table was answered.
    view: Weak<Mapping>,
    old_views: Vec<Weak<Mapping>>,
    pub call: Event,
    inflight: Option<(OwnedFd, u64)>,
    with_inflight: bool,
    /// A dirty log that covers all of memory.
    log: Arc<Mapping>,
    kind: Kind,
    size: u16,
    event_idx: bool,
    in_order: bool,
    plan: VecDeque<Step>,
    pending: Option<(Expect, Outcome)>,
    left: u32,
    /// Requests must succeed.
    faithful: bool,
    pub answered: u64,
    /// The bdev went away: errors are in order.
    pub removed: bool,
    /// Requests may take for ever, until their ring is stopped.
    pub stalls: bool,
}

struct Queue {
    driver: Driver,
    kick: Event,
    running: bool,
    base: u32,
    asked: Vec<Option<(Ask, u8)>>,
    /// Slots under way, oldest first.
    order: VecDeque<usize>,
    /// What each slot's blocks hold, if known.
    content: [Option<u8>; SLOTS],
    broken: bool,
}

enum Step {
    Send(Command),
    /// As `Send` of GET_VRING_BASE.
    Stop(usize),
    Open,
    Move,
    Remap,
    NewInflight,
    Close,
    Mark(usize, bool),
    /// Not of the front end: an operator changes the controller.
    Change(Change),
}

enum Expect {
    Done,
    Base(usize),
    Inflight,
    Table,
    Closed,
}

impl Guest {
    pub fn new(
        target: Arc<Target>,
        failures: Arc<Mutex<Vec<Failure>>>,
        rng: &mut Rng,
        kind: Kind,
        queues: usize,
        left: u32,
        faithful: bool,
    ) -> Self {
        let size = match kind {
            Kind::Split => *rng.pick(&[1, 2, 8, 16, 64]),
            Kind::Packed => *rng.pick(&[1, 2, 5, 7, 16, 64, 100]),
        };
        let (event_idx, with_inflight, in_order) = (rng.chance(1, 2), rng.chance(1, 2), rng.chance(1, 3));
        let memory = Mapping::memfd("guest", MEMORY as usize).unwrap();
        let base = match kind {
            Kind::Split => *rng.pick(&[0, 65530, 40000]),
            // A ring that is in its first lap, or at the end of its second.
            Kind::Packed => *rng.pick(&[0x8000_8000, u32::from(size - 1) << 16 | u32::from(size - 1)]),
        };
        let mut guest = Self {
            target,
            failures,
            reactors: Vec::new(),
            session: None,
            queues: Vec::new(),
            memory,
            view: Weak::new(),
            old_views: Vec::new(),
            call: Event::simulated(),
            inflight: None,
            with_inflight,
            log: Mapping::memfd("log", ((guest::GUEST + MEMORY) / 4096 / 8) as usize).unwrap(),
            kind,
            size,
            event_idx,
            in_order,
            plan: VecDeque::new(),
            pending: None,
            left,
            faithful,
            answered: 0,
            removed: false,
            stalls: false,
        };
        for index in 0..queues {
            let queue = guest.fresh_queue(index, base);
            guest.queues.push(queue);
        }
        guest.plan.push_back(Step::Open);
        guest.connect();
        guest
    }

    fn fresh_queue(&self, index: usize, base: u32) -> Queue {
        let at = index as u64 * Driver::bytes(self.size, SLOTS).next_multiple_of(4096);
        let driver = Driver::new(self.kind, &self.memory, at, self.size, SLOTS, self.event_idx, base);
        let asked = vec![None; SLOTS];
        Queue {
            driver,
            kick: Event::simulated(),
            running: false,
            base,
            asked,
            order: VecDeque::new(),
            content: [None; SLOTS],
            broken: false,
        }
    }

    fn features(&self) -> u64 {
        1 << 32 | 1 << 30 | 1 << 28 | u64::from(self.event_idx) << 29 | u64::from(self.in_order) << 35 | self.kind.feature()
    }

    /// All that a front end says before its rings run.
    fn connect(&mut self) {
        self.plan.push_back(Step::Send(Command::SetFeatures(self.features())));
        if self.with_inflight {
            self.plan.push_back(Step::NewInflight);
        }
        self.plan.push_back(Step::Remap);
        for queue in 0..self.queues.len() {
            self.start(queue);
        }
    }

    fn start(&mut self, index: usize) {
        let queue = index as u16;
        let (size, addresses) = (u32::from(self.size), self.queues[index].driver.addresses());
        let steps = [
            Command::SetVringNum { queue, size },
            Command::SetVringAddr { queue, addresses },
            Command::SetVringCall { queue, call: Some(self.call.twin().unwrap()) },
            Command::SetVringEnable { queue, enabled: true },
        ];
        self.plan.extend(steps.map(Step::Send));
        self.plan.push_back(Step::Mark(index, true));
    }

    fn stop_all(&mut self) {
        (0..self.queues.len()).for_each(|queue| self.plan.push_back(Step::Stop(queue)));
    }

    /// A device that died is followed by another: the rings go on where the inflight region says.
    pub fn crashed(&mut self, target: Arc<Target>, failures: Arc<Mutex<Vec<Failure>>>, reactors: Vec<Handle>) {
        (self.target, self.failures, self.reactors, self.session) = (target, failures, reactors, None);
        self.call = Event::simulated();
        (self.plan, self.pending) = (VecDeque::new(), None);
        self.old_views.clear();
        for queue in &mut self.queues {
            (queue.running, queue.kick) = (false, Event::simulated());
            // What a front end does that lost its device without a base: the used index.
            queue.base = queue.driver.base();
        }
        self.plan.push_back(Step::Open);
        self.connect();
    }

    /// Whether a crash can be got over: without the region, what was in flight is lost.
    pub fn survives_crashes(&self) -> bool {
        self.with_inflight
            && self.inflight.is_some()
            && self.pending.is_none()
            && self.plan.is_empty()
            && !self.queues.iter().any(|queue| queue.broken)
    }

    pub fn is_over(&self) -> bool {
        self.left == 0 && self.session.is_none() && self.pending.is_none() && self.plan.is_empty()
    }

    pub fn state(&self) -> String {
        let open: Vec<_> = self.queues.iter().map(|queue| (queue.driver.outstanding(), queue.running, queue.driver.base())).collect();
        format!("left {}, pending {}, plan {}, queues {open:?}", self.left, self.pending.is_some(), self.plan.len())
    }

    pub fn views_gone(&self) -> bool {
        self.view.upgrade().is_none() && self.old_views.iter().all(|view| view.upgrade().is_none())
    }

    pub fn act(&mut self, now_ns: u64, rng: &mut Rng) -> Act {
        self.reap();
        self.check_answer();
        if self.pending.is_none() {
            self.advance();
        }
        if rng.chance(3, 4) && self.left > 0 {
            self.left -= 1;
            let queue = rng.below(self.queues.len() as u64) as usize;
            for _ in 0..rng.between(1, 5) {
                self.ask(queue, rng);
            }
            if self.queues[queue].driver.publish() {
                self.queues[queue].kick.notify();
            }
        }
        if self.pending.is_none() && self.plan.is_empty() {
            self.reap();
            match self.left {
                0 if self.outstanding() == 0 && self.session.is_some() => self.plan.push_back(Step::Close),
                0 if self.session.is_none() => return Act::Done,
                0 if self.stalls && rng.chance(1, 4) => {
                    self.stop_all();
                    (0..self.queues.len()).for_each(|queue| self.start(queue));
                }
                0 => {}
                _ if rng.chance(1, 6) => self.decide(rng),
                _ => {}
            }
            if !self.plan.is_empty() {
                return Act::Again;
            }
        }
        let quiet = self.queues.iter().filter(|queue| !queue.broken).all(|queue| queue.driver.want_interrupts(true));
        let answered = self.pending.as_ref().is_some_and(|(_, outcome)| outcome.lock().unwrap().is_some());
        if !quiet || answered || (self.pending.is_none() && !self.plan.is_empty()) {
            return Act::Again;
        }
        let until = (self.left > 0 || self.stalls).then(|| now_ns + rng.below(100_000));
        Act::On(self.call.twin().unwrap(), until)
    }

    pub fn outstanding(&self) -> usize {
        self.queues.iter().filter(|queue| !queue.broken).map(|queue| queue.driver.outstanding()).sum()
    }

    fn reap(&mut self) {
        // A ring that lied gets answers to what was never asked.
        for queue in self.queues.iter_mut().filter(|queue| !queue.broken) {
            while let Some(done) = queue.driver.reap() {
                self.answered += 1;
                let place = queue.order.iter().position(|slot| *slot == done.slot).expect("under way");
                queue.order.remove(place);
                assert!(!self.in_order || place == 0, "{place} requests are older than the one that is answered");
                let (ask, value) = queue.asked[done.slot].take().expect("asked");
                assert!(done.status <= 2, "status {} of {ask:?}", done.status);
                if self.faithful && !self.removed {
                    assert_eq!(done.status, 0, "{ask:?}");
                }
                let content = &mut queue.content[done.slot];
                let ok = done.status == 0;
                match ask.kind {
                    RequestType::OUT => *content = ok.then_some(value),
                    RequestType::IN if ok => {
                        assert_eq!(done.written, ask.bytes + 1);
                        let data = queue.driver.read(done.slot, ask.bytes);
                        if let Some(content) = content {
                            assert!(data.iter().all(|byte| byte == content), "slot {} holds {content}, read {:?}", done.slot, &data[..4]);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    fn ask(&mut self, index: usize, rng: &mut Rng) {
        let queue = &mut self.queues[index];
        let Some(slot) = queue.driver.next_slot().filter(|_| !queue.broken) else { return };
        let sector = (index * SLOTS + slot) as u64 * SLOT_SECTORS;
        let (kind, bytes) = match rng.below(10) {
            0 => (RequestType::FLUSH, 0),
            1 => (RequestType::GET_ID, 20),
            2..6 => (RequestType::OUT, SLOT_SECTORS as u32 * 512),
            _ => (RequestType::IN, SLOT_SECTORS as u32 * 512),
        };
        let mut ask = Ask::new(kind, sector, bytes);
        for _ in 0..rng.below(3) {
            let runs = ask.runs();
            ask.read_cuts.push(rng.below(u64::from(runs.0)) as u32);
            ask.write_cuts.push(rng.below(u64::from(runs.1)) as u32);
        }
        if rng.chance(1, 4) {
            (ask.read_cuts, ask.write_cuts) = (vec![], vec![]);
        }
        ask.read_cuts.sort_unstable();
        ask.write_cuts.sort_unstable();
        ask.direct = rng.chance(1, 2).then(|| rng.below(3) as usize);
        if queue.driver.size() < 8 {
            ask.direct = Some(0);
        }
        let value = rng.next() as u8;
        queue.driver.fill(slot, bytes, if ask.out { value } else { !value });
        if queue.driver.add(&ask).is_some() {
            queue.asked[slot] = Some((ask, value));
            queue.order.push_back(slot);
        }
    }

    /// Something out of the ordinary.
    fn decide(&mut self, rng: &mut Rng) {
        let queue = rng.below(self.queues.len() as u64) as usize;
        match rng.below(11) {
            0 | 1 => {
                self.plan.push_back(Step::Stop(queue));
                self.start(queue);
            }
            2 | 3 => self.plan.push_back(Step::Remap),
            4 => {
                let queue = queue as u16;
                self.plan.extend([false, true].map(|enabled| Step::Send(Command::SetVringEnable { queue, enabled })));
            }
            5 => {
                self.stop_all();
                self.plan.push_back(Step::Send(Command::ResetDevice));
                self.plan.push_back(Step::Move);
            }
            6 => {
                self.plan.push_back(Step::Close);
                self.plan.push_back(Step::Open);
                self.connect();
            }
            7 => {
                // Logging begins, goes on elsewhere, or ends.
                let features = self.features();
                let fd = self.log.fd().expect("a memfd").try_clone_to_owned().unwrap();
                self.plan.push_back(Step::Send(Command::SetLogBase { fd, size: self.log.len() as u64, offset: 0 }));
                self.plan.push_back(Step::Send(Command::SetFeatures(features | if rng.chance(3, 4) { 1 << 26 } else { 0 })));
                let addresses = Addresses { log: Some(guest::GUEST), ..self.queues[queue].driver.addresses() };
                self.plan.push_back(Step::Send(Command::SetVringAddr { queue: queue as u16, addresses }));
            }
            8 => {
                let mut reactors = self.reactors.clone();
                let count = reactors.len() as u64;
                reactors.rotate_left(rng.below(count) as usize);
                reactors.truncate(rng.between(1, count) as usize);
                self.plan.push_back(Step::Change(Change::Reactors(reactors)));
            }
            9 => {
                let coalescing = Coalescing { delay_base_us: rng.below(2) as u32 * 20, iops_threshold: 100 };
                self.plan.push_back(Step::Change(Change::Coalescing(coalescing)));
            }
            _ => self.lie(queue, rng),
        }
    }

    /// Breaks a rule; then starts all over.
    fn lie(&mut self, index: usize, rng: &mut Rng) {
        let queue = &mut self.queues[index];
        if !queue.running {
            return;
        }
        queue.broken = true;
        queue.driver.lie(rng.next(), rng.next());
        let _ = queue.driver.publish();
        queue.kick.notify();
        self.stop_all();
        self.plan.push_back(Step::Move);
    }

    fn check_answer(&mut self) {
        let Some((_, outcome)) = &self.pending else { return };
        let Some(outcome) = outcome.lock().unwrap().take() else { return };
        let Some((expect, _)) = self.pending.take() else { return };
        let answer = match outcome {
            Ok(answer) => answer,
            // A ring that lied is refused; nothing else is, also if its bdev is gone.
            Err(VhostError::Broken(Broken::Inflight(_))) if self.queues.iter().any(|queue| queue.broken) => Answer::Done,
            Err(error) => panic!("refused: {error}"),
        };
        match (expect, answer) {
            (Expect::Base(index), Answer::Base(base)) => {
                let queue = &mut self.queues[index];
                if !queue.broken {
                    assert_eq!(base, queue.driver.base(), "the base is what was taken, and all of it is answered");
                }
                (queue.base, queue.running) = (base, false);
            }
            (Expect::Inflight, Answer::Inflight(fd, size)) => {
                self.inflight = Some((fd.try_clone().unwrap(), size));
                self.plan.push_front(Step::Send(self.set_inflight(fd, size)));
            }
            (Expect::Table, _) => {
                for view in self.old_views.drain(..) {
                    assert!(view.upgrade().is_none(), "the old table was replaced and answered, yet its memory is held");
                }
            }
            (Expect::Closed, _) => {
                assert!(self.view.upgrade().is_none(), "the session is closed, yet its memory is held");
                for queue in &mut self.queues {
                    queue.running = false;
                    queue.base = queue.driver.base();
                }
            }
            _ => {}
        }
    }

    fn set_inflight(&self, fd: OwnedFd, size: u64) -> Command {
        let (num_queues, queue_size) = (self.queues.len() as u16, self.size);
        Command::SetInflight { fd, size, offset: 0, num_queues, queue_size }
    }

    fn advance(&mut self) {
        let Some(step) = self.plan.pop_front() else { return };
        match step {
            Step::Open => self.session = Some(self.target.open("vd").expect("opened")),
            Step::Close => {
                self.send(Command::Close, Expect::Closed);
                self.session = None;
            }
            Step::Send(command) => self.send(command, Expect::Done),
            Step::Change(change) => {
                let reply = self.expect(Expect::Done);
                self.target.change("vd", change, reply);
            }
            Step::Stop(queue) => self.send(Command::GetVringBase { queue: queue as u16 }, Expect::Base(queue)),
            Step::Remap => {
                let view = guest::view(&self.memory);
                self.old_views.push(std::mem::replace(&mut self.view, Arc::downgrade(&view)));
                self.send(Command::SetMemTable(vec![guest::row(Source::Mapping(view), MEMORY)]), Expect::Table);
            }
            Step::NewInflight => match &self.inflight {
                Some((fd, size)) => {
                    let command = self.set_inflight(fd.try_clone().unwrap(), *size);
                    self.send(command, Expect::Done);
                }
                None => {
                    let (num_queues, queue_size) = (self.queues.len() as u16, self.size);
                    self.send(Command::GetInflight { num_queues, queue_size }, Expect::Inflight);
                }
            },
            Step::Move => {
                // The guest boots again, elsewhere; what was asked before is forgotten.
                self.memory = Mapping::memfd("guest", MEMORY as usize).unwrap();
                self.inflight = None;
                for index in 0..self.queues.len() {
                    self.queues[index] = self.fresh_queue(index, self.kind.start());
                }
                self.connect();
            }
            Step::Mark(index, running) => {
                let queue = &mut self.queues[index];
                queue.running = running;
                let (number, base, kick) = (index as u16, queue.base, queue.kick.twin().unwrap());
                self.plan.push_front(Step::Send(Command::SetVringKick { queue: number, kick: Some(kick) }));
                self.plan.push_front(Step::Send(Command::SetVringBase { queue: number, base }));
                self.advance();
            }
        }
    }

    fn send(&mut self, command: Command, expect: Expect) {
        let Some(session) = self.session else { return };
        let reply = self.expect(expect);
        self.target.command(session, command, reply);
    }

    fn expect(&mut self, expect: Expect) -> Reply {
        let outcome: Outcome = Arc::default();
        let (place, call) = (outcome.clone(), self.call.twin().unwrap());
        self.pending = Some((expect, outcome));
        Box::new(move |answer| {
            *place.lock().unwrap() = Some(answer);
            call.notify();
        })
    }
}
