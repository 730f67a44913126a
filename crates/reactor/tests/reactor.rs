//! The reactor, turned by hand under a virtual clock.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qpair_reactor::driver::{self, Choice};
use qpair_reactor::event::Event;
use qpair_reactor::{Clock, Config, Fanout, LocalWaker, Poller, PollerId, PollerState, Reactor, ReactorId, Turn, log, thread};

const SPIN_NS: u64 = 1000;

struct Rig {
    reactor: Reactor,
    clock: Rc<Cell<u64>>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Config { spin_ns: SPIN_NS, busy_poll: false })
    }

    fn with(config: Config) -> Self {
        let clock = Rc::new(Cell::new(1_000_000));
        let driver = driver::open(Choice::Epoll).expect("epoll");
        Self { reactor: Reactor::new(ReactorId(3), config, Clock::Virtual(clock.clone()), driver), clock }
    }

    fn turn(&mut self) -> Turn {
        self.reactor.turn()
    }

    fn pass(&mut self, ns: u64) {
        self.clock.set(self.clock.get() + ns);
    }

    /// Turns until all is armed.
    fn settle(&mut self) -> Option<u64> {
        for _ in 0..100 {
            if let Turn::Idle { until_ns } = self.turn() {
                return until_ns;
            }
            self.pass(SPIN_NS);
        }
        panic!("it never came to rest");
    }

    fn state(&self, name: &str) -> Option<PollerState> {
        self.reactor.stats().pollers.iter().find(|poller| poller.name == name).map(|poller| poller.state)
    }
}

type Log = Rc<RefCell<Vec<String>>>;
type Hook = Box<dyn FnMut(&mut Reactor) -> usize>;
type ArmHook = Box<dyn FnMut(&mut Reactor) -> bool>;

/// A poller that notes its calls and does what it is told.
struct Probe {
    name: &'static str,
    log: Log,
    poll: Hook,
    arm: ArmHook,
}

impl Probe {
    fn new(name: &'static str, log: &Log) -> Self {
        Self { name, log: log.clone(), poll: Box::new(|_| 0), arm: Box::new(|_| true) }
    }

    fn note(&self, what: &str) {
        self.log.borrow_mut().push(format!("{}.{what}", self.name));
    }
}

impl Poller for Probe {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        self.note("poll");
        (self.poll)(reactor)
    }

    fn arm(&mut self, reactor: &mut Reactor) -> bool {
        self.note("arm");
        (self.arm)(reactor)
    }

    fn disarm(&mut self, _: &mut Reactor) {
        self.note("disarm");
    }

    fn done(&mut self, _: &mut Reactor, value: u64, result: i32) {
        self.note(&format!("done {value} {result}"));
    }

    fn poisoned(&mut self, _: &mut Reactor, why: &str) {
        self.note(&format!("poisoned: {why}"));
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.note("drop");
    }
}

fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut *log.borrow_mut())
}

fn count_one(count: &AtomicUsize) {
    count.fetch_add(1, Ordering::Relaxed);
}

fn add(rig: &mut Rig, probe: Probe) -> PollerId {
    rig.reactor.add_poller(probe.name, Box::new(probe))
}

#[test]
fn a_poller_without_work_is_armed_after_the_spin_time_and_woken_by_its_waker() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let id = add(&mut rig, Probe::new("a", &log));
    assert_eq!(rig.turn(), Turn::Again);
    rig.pass(SPIN_NS - 1);
    assert_eq!(rig.turn(), Turn::Again);
    assert_eq!((taken(&log), rig.state("a")), (vec!["a.disarm".into(), "a.poll".into(), "a.poll".into()], Some(PollerState::Active)));
    rig.pass(1);
    assert_eq!(rig.turn(), Turn::Idle { until_ns: None });
    assert_eq!((taken(&log), rig.state("a")), (vec!["a.poll".into(), "a.arm".into()], Some(PollerState::Armed)));
    assert_eq!(rig.turn(), Turn::Idle { until_ns: None });
    assert_eq!(taken(&log), Vec::<String>::new());
    let waker: LocalWaker = rig.reactor.waker(id).unwrap();
    waker.wake();
    waker.wake();
    assert_eq!(rig.turn(), Turn::Again);
    assert_eq!(taken(&log), ["a.disarm", "a.poll"]);
}

#[test]
fn a_poller_that_finds_work_while_arming_stays_active() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let mut probe = Probe::new("a", &log);
    let mut refusals = 2;
    probe.arm = Box::new(move |_| {
        refusals -= 1;
        refusals < 0
    });
    add(&mut rig, probe);
    rig.turn();
    taken(&log);
    rig.pass(SPIN_NS);
    assert_eq!(rig.turn(), Turn::Again);
    assert_eq!((taken(&log), rig.state("a")), (vec!["a.poll".into(), "a.arm".into(), "a.disarm".into()], Some(PollerState::Active)));
    assert_eq!(rig.settle(), None);
    assert_eq!(taken(&log).iter().filter(|call| *call == "a.arm").count(), 2);
}

#[test]
fn a_wake_during_arm_is_not_lost_and_counts_once() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let id = rig.reactor.reserve_poller("a");
    let waker = rig.reactor.waker(id).unwrap();
    let mut probe = Probe::new("a", &log);
    let mut first = true;
    probe.arm = Box::new(move |_| {
        if std::mem::take(&mut first) {
            waker.wake();
        }
        true
    });
    rig.reactor.install_poller(id, Box::new(probe));
    rig.turn();
    taken(&log);
    rig.pass(SPIN_NS);
    assert_eq!(rig.turn(), Turn::Again);
    assert_eq!(taken(&log), ["a.poll", "a.arm", "a.disarm"]);
    rig.turn();
    assert_eq!(taken(&log), ["a.poll"], "woken once, polled once");
    rig.settle();
    assert_eq!(rig.state("a"), Some(PollerState::Armed));
}

#[test]
fn a_poller_may_remove_itself_from_inside_poll_and_arm() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let own = Rc::new(Cell::new(None));
    let (in_poll, in_arm) = (own.clone(), Rc::new(Cell::new(None)));
    let mut first = Probe::new("a", &log);
    first.poll = Box::new(move |reactor| {
        reactor.remove_poller(in_poll.get().unwrap());
        1
    });
    let mut second = Probe::new("b", &log);
    let mine = in_arm.clone();
    second.arm = Box::new(move |reactor| {
        reactor.remove_poller(mine.get().unwrap());
        false
    });
    own.set(Some(add(&mut rig, first)));
    in_arm.set(Some(add(&mut rig, second)));
    rig.turn();
    assert_eq!(taken(&log), ["a.disarm", "b.disarm", "a.poll", "a.drop", "b.poll"], "and its neighbour misses no turn");
    assert_eq!(rig.state("a"), None);
    rig.settle();
    assert_eq!(rig.state("b"), None);
    assert!(taken(&log).ends_with(&["b.poll".into(), "b.arm".into(), "b.drop".into()]));
    assert_eq!(rig.reactor.waker(own.get().unwrap()).map(|_| ()), None, "its name names nothing");
}

#[test]
fn a_poller_may_remove_another_and_its_place_is_used_anew() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let victim = add(&mut rig, Probe::new("victim", &log));
    let stale = rig.reactor.waker(victim).unwrap();
    let mut killer = Probe::new("killer", &log);
    killer.poll = Box::new(move |reactor| {
        reactor.remove_poller(victim);
        0
    });
    add(&mut rig, killer);
    rig.turn();
    assert_eq!(rig.state("victim"), None);
    add(&mut rig, Probe::new("heir", &log));
    rig.settle();
    taken(&log);
    stale.wake();
    rig.turn();
    assert_eq!(taken(&log), Vec::<String>::new(), "an old waker wakes nobody");
    rig.reactor.remove_poller(victim);
    assert_eq!(rig.state("heir"), Some(PollerState::Armed), "an old name removes nobody");
}

#[test]
fn a_place_that_was_reserved_and_never_filled_can_be_given_back() {
    let mut rig = Rig::new();
    let id = rig.reactor.reserve_poller("reserved");
    assert!(rig.state("reserved").is_some());
    rig.reactor.remove_poller(id);
    assert!(rig.state("reserved").is_none());
    assert!(rig.reactor.waker(id).is_none());
}

#[test]
fn a_panic_poisons_only_its_poller() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let mut bad = Probe::new("bad", &log);
    let mut turns = 0;
    bad.poll = Box::new(move |_| {
        turns += 1;
        assert!(turns < 3, "turn {turns} is too much");
        0
    });
    let mut worse = Probe::new("worse", &log);
    worse.arm = Box::new(|_| panic!("no arms"));
    add(&mut rig, bad);
    add(&mut rig, Probe::new("good", &log));
    add(&mut rig, worse);
    for _ in 0..4 {
        rig.turn();
    }
    rig.settle();
    let calls = taken(&log);
    assert!(calls.contains(&"bad.poisoned: turn 3 is too much".into()) && calls.contains(&"bad.drop".into()), "{calls:?}");
    assert!(calls.contains(&"worse.poisoned: no arms".into()) && calls.contains(&"worse.drop".into()), "{calls:?}");
    assert_eq!((rig.state("bad"), rig.state("worse"), rig.state("good")), (None, None, Some(PollerState::Armed)));
    let said = log::take();
    assert!(said.iter().any(|line| line.message == "poller bad panicked and is removed: turn 3 is too much"), "{said:?}");
}

#[test]
fn a_panicking_message_or_timer_ends_alone() {
    let mut rig = Rig::new();
    let ran = Rc::new(Cell::new(0));
    rig.reactor.handle().call(|_| panic!("message"));
    rig.reactor.after(0, |_| panic!("timer"));
    let counter = ran.clone();
    rig.reactor.after(0, move |_| counter.set(counter.get() + 1));
    rig.turn();
    assert_eq!(ran.get(), 1);
}

struct Counts(Rc<Cell<u32>>);

impl Poller for Counts {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        self.0.set(self.0.get() + 1);
        0
    }
}

#[test]
fn a_poller_is_woken_at_its_time_and_not_when_that_was_cancelled() {
    let (mut rig, runs) = (Rig::new(), Rc::new(Cell::new(0)));
    let id = rig.reactor.add_poller("counts", Box::new(Counts(runs.clone())));
    let waker = rig.reactor.waker(id).unwrap();
    let asleep = |rig: &mut Rig| {
        while rig.turn() == Turn::Again {
            rig.pass(10_000);
        }
        runs.get()
    };
    let before = asleep(&mut rig);
    let now_ns = rig.reactor.now_ns();
    let cancelled = rig.reactor.wake_at(now_ns + 1_000_000, &waker);
    rig.reactor.wake_at(now_ns + 2_000_000, &waker);
    assert!(rig.reactor.cancel(cancelled));
    assert_eq!(rig.turn(), Turn::Idle { until_ns: Some(now_ns + 2_000_000) });
    rig.pass(1_500_000);
    rig.turn();
    assert_eq!(runs.get(), before, "it is not its time yet");
    rig.pass(500_000);
    assert!(asleep(&mut rig) > before);
    assert_eq!(rig.turn(), Turn::Idle { until_ns: None });
}

#[test]
fn timers_run_in_order_of_their_time_and_not_when_cancelled() {
    let (mut rig, log) = (Rig::new(), Log::default());
    for (name, after) in [("late", 300), ("early", 100), ("same", 100), ("never", 200)] {
        let log = log.clone();
        let id = rig.reactor.after(after, move |reactor| log.borrow_mut().push(format!("{name} {}", reactor.now_ns() - 1_000_000)));
        if name == "never" {
            assert!(rig.reactor.cancel(id));
            assert!(!rig.reactor.cancel(id));
        }
    }
    assert_eq!(rig.turn(), Turn::Idle { until_ns: Some(1_000_100) });
    rig.pass(100);
    assert_eq!(rig.turn(), Turn::Again);
    assert_eq!(taken(&log), ["early 100", "same 100"]);
    assert_eq!(rig.turn(), Turn::Idle { until_ns: Some(1_000_300) }, "a cancelled timer wakes nobody");
    rig.pass(1000);
    rig.turn();
    assert_eq!(taken(&log), ["late 1100"]);
    assert_eq!(rig.turn(), Turn::Idle { until_ns: None });
}

#[test]
fn a_timer_that_begins_itself_anew_at_once_does_not_keep_the_reactor() {
    fn again(reactor: &mut Reactor, count: Rc<Cell<usize>>) {
        count.set(count.get() + 1);
        reactor.after(0, move |reactor| again(reactor, count));
    }
    let (mut rig, count) = (Rig::new(), Rc::new(Cell::new(0)));
    again(&mut rig.reactor, count.clone());
    for turns in 1..5 {
        rig.turn();
        assert_eq!(count.get(), 1 + turns);
    }
}

#[test]
fn messages_of_one_sender_run_in_the_order_sent() {
    let mut rig = Rig::new();
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let senders: Vec<_> = (0..4)
        .map(|sender| {
            let (handle, seen) = (rig.reactor.handle(), seen.clone());
            std::thread::spawn(move || {
                for number in 0..1000 {
                    let seen = seen.clone();
                    handle.call(move |_| seen.lock().unwrap().push((sender, number)));
                }
            })
        })
        .collect();
    while seen.lock().unwrap().len() < 4000 {
        rig.turn();
    }
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    let seen = seen.lock().unwrap();
    for sender in 0..4 {
        assert!(seen.iter().filter(|(whose, _)| *whose == sender).map(|(_, number)| *number).eq(0..1000));
    }
    assert_eq!(rig.reactor.stats().messages, 4000);
}

#[test]
fn a_message_sent_while_messages_run_runs_in_the_next_turn() {
    let mut rig = Rig::new();
    let count = Arc::new(AtomicUsize::new(0));
    let (handle, counter) = (rig.reactor.handle(), count.clone());
    rig.reactor.handle().call(move |_| handle.call(move |_| count_one(&counter)));
    assert_eq!((rig.turn(), count.load(Ordering::Relaxed)), (Turn::Again, 0));
    rig.turn();
    assert_eq!(count.load(Ordering::Relaxed), 1);
}

#[test]
fn messages_to_a_reactor_that_is_gone_are_dropped_with_what_they_captured() {
    let rig = Rig::new();
    let (handle, captured) = (rig.reactor.handle(), Arc::new(()));
    let (before, own) = (captured.clone(), handle.clone());
    handle.call(move |_| drop((before, own)));
    drop(rig);
    assert_eq!(Arc::strong_count(&captured), 1, "what waited is dropped with the reactor, though handles live on");
    let after = captured.clone();
    handle.call(move |_| drop(after));
    assert_eq!(Arc::strong_count(&captured), 1, "what comes later is dropped at once");
    assert!(!handle.has_messages());
}

#[test]
fn a_fanout_goes_on_though_one_of_its_reactors_is_gone() {
    let (mut home, gone, mut other) = (Rig::new(), Rig::new(), Rig::new());
    let done = Arc::new(AtomicUsize::new(0));
    let counter = done.clone();
    let fanout = Fanout::new(home.reactor.handle(), move |_| count_one(&counter));
    fanout.on_each(&[gone.reactor.handle(), other.reactor.handle()], |_, part| drop(part));
    home.turn();
    other.turn();
    home.turn();
    assert_eq!(done.load(Ordering::Relaxed), 0);
    drop(gone);
    home.turn();
    assert_eq!(done.load(Ordering::Relaxed), 1);
}

#[test]
fn local_state_is_made_once_for_each_type() {
    let mut rig = Rig::new();
    rig.reactor.local::<Cell<u32>>().set(7);
    assert_eq!(rig.reactor.local::<Cell<u32>>().get(), 7);
    assert_eq!(rig.reactor.local::<Cell<u64>>().get(), 0);
}

#[test]
fn a_watched_event_wakes_its_poller() {
    let (mut rig, log) = (Rig::new(), Log::default());
    let id = add(&mut rig, Probe::new("a", &log));
    let event = Event::new().unwrap();
    let watch = rig.reactor.watch(&event, id).unwrap();
    rig.settle();
    taken(&log);
    event.notify();
    rig.reactor.sleep(None);
    rig.turn();
    assert_eq!(taken(&log), ["a.disarm", "a.poll"]);
    rig.reactor.unwatch(watch);
    rig.settle();
    taken(&log);
    event.notify();
    rig.reactor.sleep(Some(0));
    rig.turn();
    assert_eq!(taken(&log), Vec::<String>::new());
}

#[test]
fn busy_polling_neither_arms_nor_idles() {
    let (mut rig, log) = (Rig::with(Config { spin_ns: SPIN_NS, busy_poll: true }), Log::default());
    assert_eq!(rig.turn(), Turn::Again, "nor without pollers");
    add(&mut rig, Probe::new("a", &log));
    for _ in 0..5 {
        rig.pass(SPIN_NS * 10);
        assert_eq!(rig.turn(), Turn::Again);
    }
    assert!(!taken(&log).contains(&"a.arm".into()));
}

#[test]
fn busy_time_is_shared_by_work_done_and_the_rest_is_idle() {
    let (mut rig, log) = (Rig::new(), Log::default());
    for (name, work) in [("one", 1), ("three", 3)] {
        let mut probe = Probe::new(name, &log);
        let mut busy = 10;
        probe.poll = Box::new(move |_| {
            busy -= 1;
            if busy >= 0 { work } else { 0 }
        });
        add(&mut rig, probe);
    }
    for _ in 0..20 {
        rig.turn();
        rig.pass(400);
    }
    rig.turn();
    let stats = rig.reactor.stats();
    let of = |name| stats.pollers.iter().find(|poller| poller.name == name).unwrap();
    assert_eq!((of("one").busy_ns, of("three").busy_ns), (1000, 3000));
    assert_eq!((of("one").busy_runs, of("three").busy_runs), (10, 10));
    assert_eq!((stats.busy_ns, stats.busy_ns + stats.idle_ns), (4000, 8000));
    assert_eq!((stats.id, stats.driver, stats.turns), (ReactorId(3), "epoll", 21));
}

#[test]
fn a_stopped_reactor_says_so() {
    let mut rig = Rig::new();
    rig.reactor.handle().stop();
    assert_eq!(rig.turn(), Turn::Stopped);
}

#[test]
fn a_sleeping_thread_is_woken_by_each_message_and_ends_when_told() {
    for choice in [Choice::Auto, Choice::Epoll] {
        let mut spawned = thread::spawn(ReactorId(0), Config { spin_ns: 0, busy_poll: false }, choice, false).unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        for number in 0..2000 {
            let send = send.clone();
            spawned.handle().call(move |_| send.send(number).unwrap());
            assert_eq!(receive.recv_timeout(std::time::Duration::from_secs(20)), Ok(number));
        }
        spawned.join();
    }
}
