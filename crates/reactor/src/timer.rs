//! Timers of one reactor: a heap of deadlines.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::{LocalWaker, Reactor};

/// Names a timer of one reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimerId(u64);

/// What a timer does. A wake-up is a kind of its own because it needs no memory.
pub(crate) enum Callback {
    Run(Box<dyn FnOnce(&mut Reactor)>),
    Wake(LocalWaker),
}

impl Callback {
    pub(crate) fn call(self, reactor: &mut Reactor) {
        match self {
            Self::Run(run) => run(reactor),
            Self::Wake(waker) => waker.wake(),
        }
    }
}

/// Deadlines and what to do then. Cancelled ones stay in the heap until their time, without their callback.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(u64, TimerId)>>,
    callbacks: HashMap<TimerId, Callback>,
    next: u64,
}

impl Timers {
    pub(crate) fn add(&mut self, at_ns: u64, callback: Callback) -> TimerId {
        self.next += 1;
        let id = TimerId(self.next);
        self.heap.push(Reverse((at_ns, id)));
        self.callbacks.insert(id, callback);
        id
    }

    pub(crate) fn cancel(&mut self, id: TimerId) -> bool {
        self.callbacks.remove(&id).is_some()
    }

    /// The next deadline of a live timer.
    pub(crate) fn deadline(&mut self) -> Option<u64> {
        while let Some(Reverse((at_ns, id))) = self.heap.peek().copied() {
            if self.callbacks.contains_key(&id) {
                return Some(at_ns);
            }
            self.heap.pop();
        }
        None
    }

    /// The newest timer. Those made from here on wait for the next turn, so that one which begins itself anew at once
    /// does not keep the reactor.
    pub(crate) fn newest(&self) -> TimerId {
        TimerId(self.next)
    }

    /// Takes out the first timer due that is no newer than `newest`.
    pub(crate) fn due(&mut self, now_ns: u64, newest: TimerId) -> Option<Callback> {
        // Only the heap's top is looked at in a turn where nothing is due.
        if self.heap.peek().is_none_or(|Reverse((at_ns, _))| *at_ns > now_ns) || self.deadline()? > now_ns {
            return None;
        }
        // New ones are due now at the earliest, so no older one that is due stands behind them.
        if self.heap.peek().is_none_or(|Reverse((_, id))| *id > newest) {
            return None;
        }
        let Reverse((_, id)) = self.heap.pop()?;
        self.callbacks.remove(&id)
    }
}
