//! A ring's state and figures, for those who look.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What a ring is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum QueueState {
    /// Not on any reactor.
    Stopped,
    /// Serving.
    Running,
    /// Takes nothing new.
    Draining,
    /// Its driver broke a rule.
    Failed,
}

/// A ring's figures, readable from any thread; updated once a poll.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct QueueStats {
    state: AtomicU8,
    pub requests: AtomicU64,
    pub kicks: AtomicU64,
    pub interrupts: AtomicU64,
    pub inflight: AtomicU64,
    pub avail_idx: AtomicU64,
    pub used_idx: AtomicU64,
}

impl QueueStats {
    /// What the ring is doing.
    pub fn state(&self) -> QueueState {
        match self.state.load(Ordering::Acquire) {
            0 => QueueState::Stopped,
            1 => QueueState::Running,
            2 => QueueState::Draining,
            _ => QueueState::Failed,
        }
    }

    pub(crate) fn set_state(&self, state: QueueState) {
        self.state.store(state as u8, Ordering::Release);
    }
}
