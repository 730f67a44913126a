//! RAID bdevs: strips in turn (raid0), mirrored (raid1), one after the other (concat); with SPDK's superblock, degraded, rebuilt.
//!
//! How it works. [`Raids`] has the arrays of a process, and makes, examines, changes and deletes them by tasks on the home reactor (`worker.rs`). An online array is a
//! bdev (`array.rs`) whose channels pass I/O down: `striped.rs` as it is, `mirror.rs` by copies. What a mirror's channels go by is one
//! snapshot, replaced as a whole and acknowledged by every reactor (`view.rs`). How a leg leaves stands in `failing.rs`, how one comes in
//! `rebuild.rs`, which superblock counts in `control.rs`, and why an acknowledged write is never lost in `mirror.rs`.
//!
//! Errors. [`qpair_bdev::BdevError`]; members' superblocks are refused by field, in the log.
//!
//! Not implemented: raid5f, metadata bytes that differ, spares, a write-intent log.
//!
//! Limits: 255 members; names of 63 bytes.

#![forbid(unsafe_code)]

mod array;
mod control;
mod examine;
mod failing;
mod geometry;
mod mask;
mod mirror;
mod rebuild;
mod seats;
mod striped;
mod superblock;
mod view;
mod worker;

pub use array::{Options, Phase};
pub use control::{ArrayInfo, MemberInfo, Raids, Spec};
pub use qpair_wire::raid_superblock::Level;
