//! The simulator: the real engine on one thread, under a seed.
//!
//! How it works. A [`World`] owns N reactors, a virtual clock, simulated files ([`Disk`]) and [`Actor`]s (guests,
//! peers). One [`World::step`] picks at random somebody who can run and lets it make one turn. A reactor whose turn said
//! "idle" sleeps as a thread would: by the doorbell's own protocol, and it is stepped again only when its bell was
//! rung, a driver's operation or watch is due, or its timer is. So a lost wake-up leaves nothing to run, and
//! the world says so: "nothing can run, yet N obligations are open". When nothing can run but something is due later,
//! the clock jumps there.
//!
//! Others also run *within* a turn, where a thread may be overtaken: before completions are collected, before
//! requests are handed over, and between a poller's last look and its arming. What happens between two instructions
//! elsewhere is not simulated: that is what `tests/loom.rs` is for.
//!
//! Events are [`Event::simulated`](crate::event::Event::simulated), files are
//! [`FileRef::Simulated`](crate::driver::FileRef::Simulated). Code above this crate notices no difference, as long as it
//! reads no clock, starts no thread and keeps no lock across its calls into the reactor.
//!
//! Errors. A panic anywhere, also one that a reactor would survive (see [`World::allow_panics`]), an [`Obligations`]
//! violated and a hang panic out of the step; [`check`] then prints the seed and the command that repeats it. The same
//! seed gives the same run: [`World::fingerprint`] is a test of it.
//!
//! Not implemented: memory model effects; a clock that differs between reactors.

mod disk;
mod driver;
mod obligations;
mod rng;
mod seeds;
mod world;

pub use disk::{Disk, SECTOR, SIZE_MAX};
pub use driver::Faults;
pub use obligations::Obligations;
pub use rng::Rng;
pub use seeds::{Failure, check, first_failure, run_seeds};
pub use world::{Act, Actor, Step, World, draw};
