//! Situations that a random guest meets too seldom.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use qpair_bdev::Layer;
use qpair_memory::{Mapping, Pages};
use qpair_reactor::event::Event;
use qpair_reactor::sim::World;
use qpair_vhost::{Answer, Broken, Command, QueueState, Source, VhostError};
use qpair_wire::virtio_blk::RequestType;

use crate::device::Manners;
use crate::guest::packed::PackedSide;
use crate::guest::{self, Ask, Driver, Kind, RingSide};
use crate::{BLOCKS, Side, check_end, serve};

const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28;

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
    fn new(kind: Kind) -> Self {
        Self::seeded(kind, 7)
    }

    fn seeded(kind: Kind, seed: u64) -> Self {
        let mut world = World::new(seed, 2);
        let disk = Mapping::anonymous((BLOCKS * 512) as usize, Pages::Normal).unwrap();
        let side = serve(&mut world, 2, Manners::default(), &disk);
        let session = side.target.open("vd").unwrap();
        let memory = Mapping::memfd("guest", 1 << 20).unwrap();
        let driver = Driver::new(kind, &memory, 0, 16, 4, true, kind.start());
        let mut bench = Self { world, side, session, memory, driver, kick: Event::simulated() };
        bench.say(Command::SetFeatures(FEATURES | kind.feature())).unwrap();
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
        self.break_rule();
        self.world.run(2000);
        assert_eq!(self.state(), QueueState::Failed);
        match &mut self.driver.side {
            RingSide::Split(side) => side.publish_index(side.avail_idx),
            RingSide::Packed(side) => side.take_back(side.next),
        }
    }

    /// Shows the device what no honest driver would; a packed ring's driver may go on from where it is.
    fn break_rule(&mut self) {
        match &mut self.driver.side {
            RingSide::Split(side) => side.publish_index(side.avail_idx.wrapping_add(100)),
            RingSide::Packed(side) => {
                side.set_descriptor(side.next.index, guest::GUEST, 16, 1000);
                side.set_flags(side.next.index, PackedSide::available(side.next));
            }
        }
        self.kick.notify();
    }

    fn end(mut self) {
        self.say(Command::Close).unwrap();
        self.world.settle();
        check_end(&mut self.world, &self.side);
    }
}

#[test]
fn a_kick_that_cannot_be_watched_is_refused_and_nothing_is_kept() {
    Kind::BOTH.iter().for_each(|kind| watch_a_bad_kick(*kind));
}

fn watch_a_bad_kick(kind: Kind) {
    let mut bench = Bench::new(kind);
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
    Kind::BOTH.iter().for_each(|kind| send_many_commands(*kind));
}

fn send_many_commands(kind: Kind) {
    let mut bench = Bench::new(kind);
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
    let taken = if kind == Kind::Packed { 0x8003_8003 } else { 1 };
    assert!(base(&answers[0]).is_some_and(|base| base == kind.start() || base == taken));
    assert_eq!(base(&answers[100_001]), Some(99_999 % 65536));
    bench.end();
}

#[test]
fn a_failed_ring_runs_again_only_after_it_was_stopped_in_order() {
    Kind::BOTH.iter().for_each(|kind| fail_and_restart(*kind));
}

fn fail_and_restart(kind: Kind) {
    let mut bench = Bench::new(kind);
    bench.start().unwrap();
    bench.ask();
    assert_eq!(bench.answered(), 1);
    bench.break_ring();
    match (kind, &bench.side.failures.lock().unwrap()[0].broken) {
        (Kind::Split, Broken::AvailJumped { ahead: 100, size: 16, .. }) | (Kind::Packed, Broken::TooShort { head: 3, .. }) => {}
        (_, other) => panic!("{other}"),
    }
    bench.show_memory();
    let addresses = bench.driver.addresses();
    bench.say(Command::SetVringAddr { queue: 0, addresses }).unwrap();
    bench.start().unwrap();
    bench.ask();
    assert_eq!((bench.answered(), bench.state()), (0, QueueState::Failed), "it stays as it is");
    let base = bench.driver.base();
    assert!(matches!(bench.say(Command::GetVringBase { queue: 0 }), Ok(Answer::Base(found)) if found == base));
    bench.start().unwrap();
    assert_eq!(bench.answered(), 1);
    bench.end();
}

#[test]
fn repeated_features_leave_a_ring_running() {
    Kind::BOTH.iter().for_each(|kind| repeat_features(*kind));
}

fn repeat_features(kind: Kind) {
    let mut bench = Bench::new(kind);
    bench.start().unwrap();
    bench.say(Command::SetFeatures(FEATURES | kind.feature())).unwrap();
    bench.show_memory();
    bench.ask();
    assert_eq!(bench.answered(), 1);
    bench.end();
}

#[test]
fn a_bad_request_among_those_left_by_a_predecessor_does_not_hold_up_the_drain() {
    let mut bench = Bench::new(Kind::Split);
    let Ok(Answer::Inflight(fd, size)) = bench.say(Command::GetInflight { num_queues: 1, queue_size: 16 }) else { panic!("a region") };
    // A predecessor that took two requests and died; the second is none.
    let (head, _) = bench.driver.add(&Ask::new(RequestType::IN, 0, 512)).unwrap();
    bench.driver.split().push(9);
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
    Kind::BOTH.iter().for_each(|kind| close_with_a_full_slab(*kind));
}

fn close_with_a_full_slab(kind: Kind) {
    let mut bench = Bench::new(kind);
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
    for (kind, seed) in Kind::BOTH.iter().flat_map(|kind| (0..20).map(|seed| (*kind, seed))) {
        let mut bench = Bench::seeded(kind, seed);
        bench.start().unwrap();
        bench.world.run(2000);
        let slots: Vec<_> = (0..3).map(|_| bench.driver.add(&Ask::new(RequestType::IN, 0, 512)).unwrap().1).collect();
        let _ = bench.driver.publish();
        bench.kick.notify();
        let held = bench.side.device.held.clone();
        bench.world.run_until("requests are with the disk", 5000, |_| held.load(Ordering::Relaxed) > 0);
        bench.break_rule();
        let target = bench.side.target.clone();
        let state = move || target.info(Some("vd")).unwrap()[0].sessions[0].queues[0].state;
        bench.world.run_until("it failed", 20_000, |_| state() == QueueState::Failed);
        let look = |bench: &Bench| (bench.driver.base(), slots.iter().map(|slot| bench.driver.read(*slot, 513)[512]).collect::<Vec<_>>());
        let before = look(&bench);
        seen += held.load(Ordering::Relaxed);
        bench.world.run(5000);
        assert_eq!((look(&bench), held.load(Ordering::Relaxed)), (before, 0), "the disk is done, the ring silent");
        bench.end();
    }
    assert!(seen > 0, "no request was in flight when its ring failed");
}

#[test]
fn a_write_is_durable_before_it_is_answered_where_the_driver_wants_no_write_cache() {
    Kind::BOTH.iter().for_each(|kind| write_through(*kind));
}

fn write_through(kind: Kind) {
    let mut bench = Bench::new(kind);
    bench.start().unwrap();
    let (target, session) = (bench.side.target.clone(), bench.session);
    let writeback = move || target.config(session).unwrap()[32];
    let asked = |bench: &mut Bench| {
        let before = bench.side.device.durable.load(Ordering::Relaxed);
        for request in [RequestType::OUT, RequestType::IN, RequestType::FLUSH] {
            bench.driver.add(&Ask::new(request, 0, if request == RequestType::FLUSH { 0 } else { 4096 })).unwrap();
        }
        let _ = bench.driver.publish();
        bench.kick.notify();
        assert_eq!(bench.answered(), 3);
        (writeback(), bench.side.device.durable.load(Ordering::Relaxed) - before)
    };
    assert_eq!(asked(&mut bench), (1, 0));
    bench.say(Command::SetWriteback(false)).unwrap();
    assert_eq!(asked(&mut bench), (0, 1), "the write, and nothing else");
    bench.say(Command::SetWriteback(true)).unwrap();
    assert_eq!(asked(&mut bench), (1, 0));
    bench.say(Command::SetWriteback(false)).unwrap();
    bench.say(Command::ResetDevice).unwrap();
    assert_eq!(bench.side.target.config(bench.session).unwrap()[32], 1, "as at first");
    bench.end();
}

#[test]
fn a_split_ring_is_tracked_in_a_region_for_rings_of_any_size() {
    let mut bench = Bench::new(Kind::Split);
    let Ok(Answer::Inflight(fd, size)) = bench.say(Command::GetInflight { num_queues: 2, queue_size: 100 }) else { panic!("a region") };
    bench.say(Command::SetInflight { fd, size, offset: 0, num_queues: 2, queue_size: 100 }).unwrap();
    bench.start().unwrap();
    bench.ask();
    assert_eq!((bench.answered(), bench.state()), (1, QueueState::Running));
    bench.end();
}
