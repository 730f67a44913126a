//! For tests alone: simulated disks and clients, and the plain model that they are compared with.
//!
//! How it works. A test makes a world (`qpair_reactor::sim`), registers [`SimDisk`]s, builds on them what it is about, and sets a [`Crew`] of [`Client`]s
//! on the bdev at the top, each with a [`Model`](model::Model) of its blocks. Clients do random I/O and judge all that comes back. At the end
//! [`Crew::check_end`], [`SimDisk::check_end`] and [`check_slabs`] say whether each I/O ended exactly once and nothing is left behind; each I/O, and
//! each reply to a control operation ([`promise`]), is an obligation of the world's.
//!
//! Errors are panics, with what was found and what was legal; the simulator adds the seed.
//!
//! Not implemented: metadata; clients that share blocks.

#![forbid(unsafe_code)]

mod client;
pub mod disk;
pub mod model;
mod relay;
mod rig;
mod zones;

pub use client::{Allowed, CELL_BLOCKS, Client, IOS, Load};
pub use disk::{Illness, Plan, SimDisk};
pub use model::{Fills, Model, SharedModel, Spoils};
pub use relay::Relay;
pub use rig::{Crew, check_slabs, is_going, planned_panics, promise, quiet_panics, remove};
