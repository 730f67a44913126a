//! Situations that a random guest meets too seldom.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use qpair_bdev::Layer;
use qpair_memory::{Mapping, Pages};
use qpair_reactor::event::Event;
use qpair_reactor::sim::World;
use qpair_vhost::{Answer, Broken, Command, QueueState, Source, VhostError};
use qpair_wire::virtio::RingSize;
use qpair_wire::virtio_blk::RequestType;

use crate::device::Manners;
use crate::guest::{self, Ask, Driver};
use crate::{BLOCKS, Side, check_end, serve};

struct Bench {
    world: World,
    side: Side,
    session: u64,
    memory: Arc<Mapping>,
    driver: Driver,
    kick: Event,
}

type Answers = Arc<Mutex<Vec<Result<Answer, VhostError>>>>;

impl Bench {
    fn new() -> Self {
        Self::seeded(7)
    }

    fn seeded(seed: u64) -> Self {
        let mut world = World::new(seed, 2);
        let disk = Mapping::anonymous((BLOCKS * 512) as usize, Pages::Normal).unwrap();
        let side = serve(&mut world, 2, Manners::default(), &disk);
        let session = side.target.open("vd").unwrap();
        let memory = Mapping::memfd("guest", 1 << 20).unwrap();
        let driver = Driver::new(&memory, 0, RingSize::new(16).unwrap(), 4, true, 0);
        let mut bench = Self { world, side, session, memory, driver, kick: Event::simulated() };
        bench.say(Command::SetFeatures(1 << 32 | 1 << 29 | 1 << 28)).unwrap();
        bench.show_memory();
        bench.say(Command::SetVringNum { queue: 0, size: 16 }).unwrap();
        bench.say(Command::SetVringAddr { queue: 0, addresses: bench.driver.addresses() }).unwrap();
        bench
    }

    fn show_memory(&mut self) {
        let view = guest::view(&self.memory);
        self.say(Command::SetMemTable(vec![guest::row(Source::Mapping(view), 1 << 20)])).unwrap();
    }

    fn post(&self, command: Command, answers: &Answers) {
        let answers = answers.clone();
        self.side.target.command(self.session, command, Box::new(move |answer| answers.lock().unwrap().push(answer)));
    }

    fn say(&mut self, command: Command) -> Result<Answer, VhostError> {
        let answers = Answers::default();
        self.post(command, &answers);
        self.world.run_until("an answer", 100_000, |_| !answers.lock().unwrap().is_empty());
        let answer = answers.lock().unwrap().pop();
        answer.expect("just seen")
    }

    fn start(&mut self) -> Result<Answer, VhostError> {
        self.say(Command::SetVringKick { queue: 0, kick: Some(self.kick.twin().unwrap()) })
    }

    fn ask(&mut self) {
        self.driver.add(&Ask::new(RequestType::IN, 0, 512)).unwrap();
        if self.driver.publish() {
            self.kick.notify();
        }
    }

    fn answered(&mut self) -> usize {
        self.world.run(5000);
        std::iter::from_fn(|| self.driver.reap()).count()
    }

    fn state(&self) -> QueueState {
        self.side.target.info(Some("vd")).unwrap()[0].sessions[0].queues[0].state
    }

    fn break_ring(&mut self) {
        self.driver.publish_index(self.driver.avail_idx.wrapping_add(100));
        self.kick.notify();
        self.world.run(2000);
        assert_eq!(self.state(), QueueState::Failed);
        self.driver.publish_index(self.driver.avail_idx);
    }

    fn end(mut self) {
        self.say(Command::Close).unwrap();
        self.world.settle();
        check_end(&mut self.world, &self.side);
    }
}

#[test]
fn a_kick_that_cannot_be_watched_is_refused_and_nothing_is_kept() {
    let mut bench = Bench::new();
    for _ in 0..3 {
        // A real descriptor, which a simulated driver cannot watch.
        let refused = bench.say(Command::SetVringKick { queue: 0, kick: Some(Event::new().unwrap()) });
        assert!(matches!(refused, Err(VhostError::Os("watch the kick descriptor", _))), "{refused:?}");
        bench.world.run(1000);
        assert_eq!(bench.side.device.channels.load(Ordering::Relaxed), 0);
    }
    bench.start().unwrap();
    bench.ask();
    assert_eq!(bench.answered(), 1);
    bench.end();
}

#[test]
fn a_hundred_thousand_commands_sent_during_a_drain_are_answered_in_order() {
    let mut bench = Bench::new();
    bench.start().unwrap();
    bench.ask();
    let answers = Answers::default();
    bench.post(Command::GetVringBase { queue: 0 }, &answers);
    for base in 0..100_000 {
        bench.post(Command::SetVringBase { queue: 1, base: base % 65536 }, &answers);
    }
    bench.post(Command::GetVringBase { queue: 1 }, &answers);
    bench.world.run_until("all answers", 2_000_000, |_| answers.lock().unwrap().len() == 100_002);
    let answers = std::mem::take(&mut *answers.lock().unwrap());
    let base = |answer: &Result<Answer, VhostError>| if let Ok(Answer::Base(base)) = answer { Some(*base) } else { None };
    assert!(matches!(base(&answers[0]), Some(0 | 1)) && base(&answers[100_001]) == Some((99_999 % 65536) as u16));
    bench.end();
}

#[test]
fn a_failed_ring_runs_again_only_after_it_was_stopped_in_order() {
    let mut bench = Bench::new();
    bench.start().unwrap();
    bench.ask();
    assert_eq!(bench.answered(), 1);
    bench.break_ring();
    assert!(matches!(bench.side.failures.lock().unwrap()[0].broken, Broken::AvailJumped { ahead: 100, size: 16, .. }));
    bench.show_memory();
    let addresses = bench.driver.addresses();
    bench.say(Command::SetVringAddr { queue: 0, addresses }).unwrap();
    bench.start().unwrap();
    bench.ask();
    assert_eq!((bench.answered(), bench.state()), (0, QueueState::Failed), "it stays as it is");
    assert!(matches!(bench.say(Command::GetVringBase { queue: 0 }), Ok(Answer::Base(1))));
    bench.start().unwrap();
    assert_eq!(bench.answered(), 1);
    bench.end();
}

#[test]
fn repeated_features_leave_a_ring_running() {
    let mut bench = Bench::new();
    bench.start().unwrap();
    bench.say(Command::SetFeatures(1 << 32 | 1 << 29 | 1 << 28)).unwrap();
    bench.show_memory();
    bench.ask();
    assert_eq!(bench.answered(), 1);
    bench.end();
}

#[test]
fn a_bad_request_among_those_left_by_a_predecessor_does_not_hold_up_the_drain() {
    let mut bench = Bench::new();
    let Ok(Answer::Inflight(fd, size)) = bench.say(Command::GetInflight { num_queues: 1, queue_size: 16 }) else { panic!("a region") };
    // A predecessor that took two requests and died; the second is none.
    let (head, _) = bench.driver.add(&Ask::new(RequestType::IN, 0, 512)).unwrap();
    bench.driver.push(9);
    let _ = bench.driver.publish();
    let region = qpair_memory::Region::new(Mapping::shared(std::os::fd::AsFd::as_fd(&fd), size).unwrap());
    let entry = |head: u64| 16 + 16 * head;
    region.write(8, &[1, 0, 16, 0]).unwrap();
    region.write(entry(u64::from(head)), &[1]).unwrap();
    region.write(entry(9), &[1]).unwrap();
    region.write(entry(9) + 8, &[1]).unwrap();
    bench.say(Command::SetInflight { fd, size, offset: 0, num_queues: 1, queue_size: 16 }).unwrap();
    bench.start().unwrap();
    bench.world.run(3000);
    assert_eq!(bench.side.failures.lock().unwrap()[0].broken, Broken::Empty { head: 9, index: 0 });
    assert!(matches!(bench.say(Command::GetVringBase { queue: 0 }), Ok(Answer::Base(2))));
    bench.end();
}

#[test]
fn a_session_that_closes_with_a_full_slab_gives_all_back() {
    let mut bench = Bench::new();
    bench.world.with(0, |reactor| {
        let layer = Layer::of(reactor);
        assert!(layer.borrow().ios().1 > 4);
    });
    bench.start().unwrap();
    for _ in 0..4 {
        bench.ask();
    }
    bench.end();
}

#[test]
fn a_ring_that_failed_writes_nothing_more() {
    let mut seen = 0;
    for seed in 0..20 {
        let mut bench = Bench::seeded(seed);
        bench.start().unwrap();
        bench.world.run(2000);
        let slots: Vec<_> = (0..3).map(|_| bench.driver.add(&Ask::new(RequestType::IN, 0, 512)).unwrap().1).collect();
        let _ = bench.driver.publish();
        bench.kick.notify();
        let held = bench.side.device.held.clone();
        bench.world.run_until("requests are with the disk", 5000, |_| held.load(Ordering::Relaxed) > 0);
        bench.driver.publish_index(bench.driver.avail_idx.wrapping_add(100));
        bench.kick.notify();
        let target = bench.side.target.clone();
        let state = move || target.info(Some("vd")).unwrap()[0].sessions[0].queues[0].state;
        bench.world.run_until("it failed", 20_000, |_| state() == QueueState::Failed);
        let look =
            |bench: &Bench| (bench.driver.used_index(), slots.iter().map(|slot| bench.driver.read(*slot, 513)[512]).collect::<Vec<_>>());
        let before = look(&bench);
        seen += held.load(Ordering::Relaxed);
        bench.world.run(5000);
        assert_eq!((look(&bench), held.load(Ordering::Relaxed)), (before, 0), "the disk is done, the ring silent");
        bench.end();
    }
    assert!(seen > 0, "no request was in flight when its ring failed");
}
