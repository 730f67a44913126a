//! Pollers: what a reactor runs every turn, and how one goes to sleep by itself.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::Reactor;

/// Something polled. All calls come from the reactor it was added to.
pub trait Poller {
    /// Does what there is to do, bounded; returns how many things were done (0: nothing).
    fn poll(&mut self, reactor: &mut Reactor) -> usize;

    /// Asks the other side for a wake-up (a kick, an event), then looks once more. True: nothing came meanwhile, and
    /// a wake-up will follow whatever comes now. False: there is work; the poller stays active.
    fn arm(&mut self, _reactor: &mut Reactor) -> bool {
        true
    }

    /// Was woken: tells the other side that wake-ups are not needed for now.
    fn disarm(&mut self, _reactor: &mut Reactor) {}

    /// A file operation submitted with this poller's id is done. `result`: bytes, or a negative errno.
    fn done(&mut self, _reactor: &mut Reactor, _value: u64, _result: i32) {}

    /// `poll`, `arm`, `disarm` or `done` panicked with `why`. The poller is removed after this call.
    fn poisoned(&mut self, _reactor: &mut Reactor, _why: &str) {}
}

/// Names a poller of one reactor. Never reused within a reactor's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PollerId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// Whether a poller is run each turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollerState {
    /// Polled every turn.
    Active,
    /// Asleep until woken.
    Armed,
}

/// One poller's figures.
#[derive(Clone, Debug)]
pub struct PollerStats {
    /// As given to `add_poller`.
    pub name: String,
    /// Active or armed.
    pub state: PollerState,
    /// Times polled.
    pub runs: u64,
    /// Times it found something.
    pub busy_runs: u64,
    /// Its share of busy turns: a turn's time is divided by work done, so that no poller needs a clock of its own.
    pub busy_ns: u64,
}

pub(crate) struct Slot {
    pub(crate) id: PollerId,
    pub(crate) name: String,
    pub(crate) poller: Option<Box<dyn Poller>>,
    pub(crate) wake: Rc<Wake>,
    pub(crate) last_busy_ns: u64,
    pub(crate) runs: u64,
    pub(crate) busy_runs: u64,
    pub(crate) busy_ns: u64,
    pub(crate) removed: bool,
    /// Was ever filled: else it is only reserved.
    pub(crate) installed: bool,
}

/// Shared by a poller's slot and its wakers.
pub(crate) struct Wake {
    pub(crate) id: PollerId,
    pub(crate) active: Cell<bool>,
    pub(crate) ready: Rc<RefCell<Vec<PollerId>>>,
}

/// Wakes a poller of the same reactor. Free when it is active already.
#[derive(Clone)]
pub struct LocalWaker(pub(crate) Rc<Wake>);

impl LocalWaker {
    /// The poller is polled again from this turn on.
    #[inline]
    pub fn wake(&self) {
        if !self.0.active.replace(true) {
            self.0.ready.borrow_mut().push(self.0.id);
        }
    }
}
