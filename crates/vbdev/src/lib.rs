//! Bdevs that stand on one other bdev, one file each: what SPDK calls its virtual bdev modules.
//!
//! * [`part`]: a range of a bdev, for split and GPT;
//! * [`delay`]: the same bdev, later;
//! * [`error`]: the same bdev, with errors on request;
//! * [`zone_block`]: a zoned bdev on a plain one.
//!
//! How it works. Each opens its base's channel when its own is opened, and passes I/O down and up as `qpair_bdev::passthru` does, by the
//! public interface of that crate. What Python changes at run time (latencies, injected errors) lies in an object that the device and
//! Python share: atomics, or a snapshot whose version the channels compare, so that no I/O takes a lock.
//!
//! Errors. [`qpair_bdev::BdevError`] when one is made; an I/O ends with its base's status, or one named in the module's file.
//!
//! In steady state no I/O allocates. Limits stand in the files.

#![forbid(unsafe_code)]

pub mod delay;
pub mod error;
pub mod part;
pub mod zone_block;
