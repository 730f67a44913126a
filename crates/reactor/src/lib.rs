//! Reactors: threads that own pollers, timers and one I/O driver, and talk by messages.
//!
//! How it works. A [`Reactor`] is stepped by [`Reactor::turn`], by its own thread ([`thread::spawn`]), by a foreign
//! loop, or by the simulator ([`sim`]). A turn reads the clock once, runs messages, timers and active pollers, and
//! hands what they queued to the driver in one go. A poller that found nothing for `spin_ns` is *armed* by itself
//! (see [`Poller::arm`]) and costs nothing until it is woken; when all are armed the thread sleeps.
//!
//! Everything above this crate is written against [`Reactor`] and never reads a clock, spawns a thread or sleeps.
//!
//! No wake-up is lost: the argument stands in [`doorbell`], and is model-checked there.
//!
//! Errors. A panic unwinds to its poller: that poller is removed, [`Poller::poisoned`] says so to its object, and
//! the reactor goes on.
//!
//! Limits. Messages a turn: all that were there when it began. Timers: unbounded, control plane only.

mod clock;
mod config;
pub mod doorbell;
pub mod driver;
pub mod event;
pub mod fanout;
pub mod log;
mod message;
mod poller;
mod reactor;
mod signal;
pub mod sim;
pub mod thread;
mod timer;

/// The model check in `tests/loom.rs` compiles `message` and `doorbell` with loom's in this place.
mod sync {
    pub(crate) use std::sync::atomic;
}

pub use clock::Clock;
pub use config::{Config, ReactorId, ReactorStats, Turn};
pub use fanout::Fanout;
pub use message::{Inbox, Message};
pub use poller::{LocalWaker, Poller, PollerId, PollerState, PollerStats};
pub use reactor::{Handle, Reactor};
pub use timer::TimerId;
