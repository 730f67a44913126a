//! Interrupt coalescing, as SPDK computes it: the more requests a ring answers, the longer an interrupt waits for others to join it.
//!
//! Every [`INTERVAL_NS`] the requests answered since the last look are held against the threshold's share of that time. Above it, interrupts keep a distance
//! of `delay_base * (requests - threshold) / threshold` from each other; at or below it, none. What becomes due earlier is owed, and sent by
//! a timer: also by a ring that has gone to sleep, and at the latest when the ring stops. Unlike SPDK's, the distance is at most [`DELAY_MAX_NS`], and is
//! given up as soon as an interval stays below the threshold.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use qpair_reactor::event::Event;
use qpair_reactor::{Reactor, TimerId};

use crate::QueueStats;

/// Between two looks at the rate.
const INTERVAL_NS: u64 = 10_000_000;
/// Longest distance of two interrupts.
const DELAY_MAX_NS: u64 = 1_000_000_000;

/// SPDK's vhost_controller_set_coalescing; a `delay_base_us` of 0 turns it off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Coalescing {
    pub delay_base_us: u32,
    /// Requests a second of one ring.
    pub iops_threshold: u32,
}

impl Coalescing {
    /// Nanoseconds between interrupts of a ring that answered `requests` in `elapsed_ns`.
    fn delay_ns(self, requests: u64, elapsed_ns: u64) -> u64 {
        let threshold = u128::from(self.iops_threshold) * u128::from(INTERVAL_NS) / 1_000_000_000;
        let rate = u128::from(requests) * u128::from(INTERVAL_NS) / u128::from(elapsed_ns.max(1));
        let delay = u128::from(self.delay_base_us) * 1000 * rate.saturating_sub(threshold) / threshold.max(1);
        delay.min(u128::from(DELAY_MAX_NS)) as u64
    }
}

/// The interrupts of one ring, on its reactor.
pub(crate) struct Interrupts {
    coalescing: Coalescing,
    call: Option<Event>,
    stats: Arc<QueueStats>,
    looked_ns: u64,
    /// Requests at that look.
    requests: u64,
    delay_ns: u64,
    /// The next may be sent from then on.
    due_ns: u64,
    /// Sends the one that is owed.
    timer: Option<TimerId>,
}

impl Interrupts {
    pub(crate) fn new(reactor: &Reactor, coalescing: Coalescing, call: Option<Event>, stats: Arc<QueueStats>) -> Rc<RefCell<Self>> {
        let requests = stats.requests.load(Ordering::Relaxed);
        let looked_ns = reactor.now_ns();
        Rc::new(RefCell::new(Self { coalescing, call, stats, looked_ns, requests, delay_ns: 0, due_ns: 0, timer: None }))
    }

    pub(crate) fn set_call(&mut self, call: Option<Event>) {
        self.call = call;
    }

    /// The driver is to be interrupted, now or soon.
    pub(crate) fn want(interrupts: &Rc<RefCell<Self>>, reactor: &mut Reactor) {
        let mut state = interrupts.borrow_mut();
        let now_ns = reactor.now_ns();
        state.look(now_ns);
        if state.timer.is_some() {
            return;
        }
        if now_ns >= state.due_ns {
            return state.send(now_ns);
        }
        let later = interrupts.clone();
        state.timer = Some(reactor.after(state.due_ns - now_ns, move |reactor| {
            let mut state = later.borrow_mut();
            state.timer = None;
            state.send(reactor.now_ns());
        }));
    }

    /// The ring stops: what is owed is sent.
    pub(crate) fn end(&mut self, reactor: &mut Reactor) {
        if let Some(timer) = self.timer.take() {
            reactor.cancel(timer);
            self.send(reactor.now_ns());
        }
    }

    fn look(&mut self, now_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.looked_ns);
        if elapsed_ns >= INTERVAL_NS {
            let requests = self.stats.requests.load(Ordering::Relaxed);
            self.delay_ns = self.coalescing.delay_ns(requests.wrapping_sub(self.requests), elapsed_ns);
            (self.looked_ns, self.requests) = (now_ns, requests);
        }
    }

    fn send(&mut self, now_ns: u64) {
        self.due_ns = now_ns + self.delay_ns;
        if let Some(call) = &self.call {
            call.notify();
            self.stats.interrupts.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_grows_with_what_is_above_the_threshold() {
        let coalescing = Coalescing { delay_base_us: 50, iops_threshold: 60_000 };
        // 600 requests in ten milliseconds are the threshold.
        assert_eq!(coalescing.delay_ns(0, INTERVAL_NS), 0);
        assert_eq!(coalescing.delay_ns(600, INTERVAL_NS), 0);
        assert_eq!(coalescing.delay_ns(1200, INTERVAL_NS), 50_000);
        assert_eq!(coalescing.delay_ns(900, INTERVAL_NS), 25_000);
        assert_eq!(coalescing.delay_ns(2400, 2 * INTERVAL_NS), 50_000, "what counts is the rate");
        assert_eq!(coalescing.delay_ns(1200, INTERVAL_NS * 100), 0, "an idle second is no load");
        assert_eq!(coalescing.delay_ns(u64::MAX, 1), DELAY_MAX_NS);
        assert_eq!(Coalescing { delay_base_us: 0, ..coalescing }.delay_ns(100_000, INTERVAL_NS), 0);
    }
}
