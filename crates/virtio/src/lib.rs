//! virtio-user initiator: the driver's side of a vhost-user-blk target's rings, as a bdev.
//!
//! Virtio 1.2: 2.7 (split virtqueues), 2.8 (packed virtqueues), 5.2 (block device).
//!
//! How it works. [`VirtioLayout`] lays out one memfd: for each queue its rings, request headers, status bytes and
//! bounce space, and behind them memory that front ends borrow ([`qpair_bdev::Descriptor::buffer`]), so that their data needs no copy.
//! Whoever speaks vhost-user hands the memfd and the ring addresses to the target; then [`VirtioBlk`] is registered
//! like any device. Each of its channels takes one queue.
//!
//! Every request slot owns a chain of four descriptors on one cache line of its own (in the descriptor table, or in an
//! indirect table where the ring is small), a header and a status byte; an I/O goes to the slot it had last time, so in a
//! steady state nothing but the header, the avail entry and the avail index is written (of a packed ring, the header and one descriptor). One batch is one store of
//! the avail index and at most one kick. Data outside the memfd, or in more than two pieces, is copied through the slot's
//! bounce space. A write that must be durable (FUA) is followed by a flush in the same slot.
//!
//! Polled. When the poller arms, it asks for an interrupt at the next used entry, and looks again (the argument stands in
//! [`qpair_reactor::doorbell`]).
//!
//! Errors. [`qpair_bdev::BdevError`] from control. A target that breaks the ring's rules (a used index that jumps, an
//! entry that names no request, a length beyond the request's buffers) loses its connection by a logged name. Who can connect again has a [`Link`]:
//! then I/O waits, and goes to the next target; without one all that was in flight ends with an error, once, and further I/O is refused. A target that says nothing
//! is waited for, until its connection ends, or the device is unregistered and the deadline has passed. What a target had when it went: [`link`](Link).
//!
//! Not implemented: in-order use, GET_ID, secure erase, zones.
//!
//! Limits: one reactor a queue; rings of 4 to 32768 entries; I/Os as large as the bounce space, larger ones are split.

#![forbid(unsafe_code)]

mod chain;
mod channel;
mod config;
mod device;
mod layout;
mod link;
mod outage;
mod packed;
mod ring;
mod split;

pub use device::{QueueSetup, VirtioBlk};
pub use layout::{MAX_IO_BYTES, QueueAddresses, VirtioLayout};
pub use link::Link;

pub(crate) use qpair_bdev::BdevError;
