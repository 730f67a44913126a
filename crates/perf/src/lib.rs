//! A load generator for any bdev, on one or several reactors.
//!
//! How it works. [`start`] checks a [`Spec`], opens the bdev and gives each reactor a worker: a poller that keeps `depth`
//! I/Os in flight. An I/O that came back is filled in again and resubmitted without going through the slab, in batches as
//! large as what came back. A [`Job`] is the run under way, with counters that are stored once a batch; the [`Report`]
//! comes when the last worker is done.
//!
//! Latency. The clock is read once for each batch that came back, not once a turn: an I/O's time runs from the read that
//! preceded its submission to the read that followed its return. Preparing the batch that it is part of is thus
//! inside, as an application sees it; at depth 1 that is all of a round, so latency is 1 / IOPS. I/Os of a batch with the
//! same times are recorded with one count, so the cost at depth 128 is below a nanosecond an I/O.
//!
//! Verify. Every block written carries its seed, address and generation, and a body that follows from them; a
//! block is read back over a buffer that was overwritten. See [`verify`].
//!
//! Errors. A [`BdevError`] from [`start`] or, when a worker cannot begin, as the outcome. Failed I/Os are counted. A bdev
//! removed under the run ends it with a report that says so.
//!
//! Not implemented: rate limits, queue depth over time.
//!
//! Limits: depth 1 to [`DEPTH_MAX`] a reactor (what its slab can give), I/Os up to [`IO_BYTES_MAX`]; latencies above an hour count as an hour; three
//! digits of precision.

#![forbid(unsafe_code)]

mod content;
mod job;
mod pattern;
mod report;
mod spec;
pub mod verify;
mod worker;

pub use job::{Job, Snapshot, run, start};
pub use report::{ReactorShare, Report};
pub use spec::{DEPTH_MAX, IO_BYTES_MAX, Pattern, Spec};

pub(crate) use qpair_bdev::BdevError;
