//! A reactor's name and settings, what a turn answers, and the figures it keeps.

use crate::poller::PollerStats;

/// A reactor's number: its logical core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReactorId(pub u32);

/// How a reactor behaves.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long a poller without work stays active.
    pub spin_ns: u64,
    /// Never arm, never sleep.
    pub busy_poll: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { spin_ns: 50_000, busy_poll: false }
    }
}

/// What a turn found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Things were done, or active pollers may find some soon: turn again.
    Again,
    /// All is armed: sleep until woken or until the deadline.
    Idle {
        /// The next timer, in clock nanoseconds.
        until_ns: Option<u64>,
    },
    /// Told to stop.
    Stopped,
}

/// A reactor's figures.
#[derive(Clone, Debug)]
pub struct ReactorStats {
    /// Logical core.
    pub id: ReactorId,
    /// Driver in use.
    pub driver: &'static str,
    /// Time in turns that did something.
    pub busy_ns: u64,
    /// Time in turns that found nothing, and asleep.
    pub idle_ns: u64,
    /// Turns made.
    pub turns: u64,
    /// Times gone to sleep.
    pub sleeps: u64,
    /// Messages run.
    pub messages: u64,
    /// Its pollers.
    pub pollers: Vec<PollerStats>,
}
