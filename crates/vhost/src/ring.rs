//! What the two kinds of virtqueue have in common, as the queue and the request parser see it.
//!
//! A ring is opened as one kind ([`SplitRing`](crate::SplitRing), [`PackedRing`](crate::PackedRing)) and stays it; a queue is compiled for each, so that no
//! request pays for the choice. A ring hands out one [`Chain`] at a time, the next that its driver made available; whoever has looked at
//! it and wants it says so ([`Ring::took`]), and names it by its [`Taken`] when it is answered.

use qpair_memory::{GuestMemory, SgList};
use qpair_wire::virtio::DescFlags;

use crate::inflight::Inflight;
use crate::request::Request;
use crate::session::Setup;
use crate::{Broken, VhostError};

/// One descriptor, as far as both kinds agree.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest-physical.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// NEXT, WRITE, INDIRECT; the others are the ring's.
    pub flags: DescFlags,
    /// Where the chain goes on. Of a split ring.
    pub next: u16,
}

/// What a chain is of its ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// What the driver calls it: below the ring's size if it is honest.
    pub id: u16,
    /// How many descriptors of the ring go by with it.
    pub count: u16,
}

/// The buffers of one request, in order, each copied once. Indirect tables are the parser's affair.
pub trait Chain {
    /// Whether tables are linked by NEXT (2.7.5.3), or read from first to last (2.8.7).
    const LINKED_TABLES: bool;

    /// How a failure names it: the first descriptor's index.
    fn head(&self) -> u16;

    /// Most descriptors that it can have without running in a circle.
    fn limit(&self) -> u32;

    /// The first buffer. Also begins anew.
    fn first(&mut self) -> Result<Buffer, Broken>;

    /// The buffer behind one that has NEXT.
    fn next(&mut self, after: &Buffer) -> Result<Buffer, Broken>;

    /// What was walked over, once it was walked to its end.
    fn taken(&self) -> Taken;

    /// Why it cannot be taken: a chain of that id is in flight, or there can be none.
    fn refused(&self, taken: Taken, size: u16) -> Broken;
}

/// The device's side of a ring.
pub trait Ring {
    /// The chain that the driver made available next.
    type Chain<'a>: Chain
    where
        Self: 'a;

    /// Entries.
    fn size(&self) -> u16;

    /// Where it stands, as GET_VRING_BASE has it.
    fn base(&self) -> u32;

    /// Where it takes and where it uses next, for those who look.
    fn positions(&self) -> (u16, u16);

    /// Most requests that wait as far as one look tells; 1: it seems to be alone; 0: none. Each is then asked for by [`ready`](Self::ready).
    fn waiting(&self) -> Result<u16, Broken>;

    /// Whether there is a next chain, within what [`waiting`](Self::waiting) said.
    fn ready(&self) -> Result<bool, Broken>;

    /// The next chain. Only after [`ready`](Self::ready) said so.
    fn chain(&self) -> Self::Chain<'_>;

    /// Asks the cache for a chain that is `ahead` of the next, within what [`waiting`](Self::waiting) said.
    fn prefetch(&self, ahead: u16);

    /// The next chain is ours now.
    fn took(&mut self, taken: Taken);

    /// For now no more is taken.
    fn rest(&mut self);

    /// Brings nearer what the next [`push_used`](Self::push_used) writes.
    fn prefetch_used(&self);

    /// Takes what [`publish`](Self::publish) writes from the driver that looks at it, shortly before: the store then waits less.
    fn prefetch_publish(&self);

    /// A chain is done; seen by the driver after [`publish`](Self::publish).
    fn push_used(&mut self, taken: Taken, written: u32);

    /// Shows the driver what was pushed.
    fn publish(&mut self);

    /// After publishing: does the driver want an interrupt?
    fn wants_interrupt(&mut self) -> bool;

    /// Asks for a kick at the next request and looks once more. True: nothing had come.
    fn arm(&mut self) -> bool;

    /// Kicks are not needed.
    fn disarm(&mut self);
}

/// A ring with what a queue needs to run it, and to survive its process.
pub(crate) trait Kind: Ring + Sized + 'static {
    /// Its part of the inflight region.
    type Tracker: Tracker<Self> + 'static;

    /// A chain that a predecessor took.
    type Left<'a>: Chain;

    /// Maps the areas; refuses what cannot be a ring.
    fn open(memory: &GuestMemory, setup: &Setup) -> Result<Self, VhostError>;

    /// Its part of the region, and the entries that a predecessor had not answered, oldest first. The ring then goes on behind them.
    fn track(&mut self, region: &Inflight, index: u16) -> Result<(Self::Tracker, Vec<u16>), Broken>;

    /// What the predecessor took, from the entry of the region.
    fn left<'a>(&'a self, tracker: &'a Self::Tracker, entry: u16) -> Self::Left<'a>;

    /// What a request is about to let the device write, where that is logged ([`crate::log`]). Its name is not in flight.
    #[inline]
    fn note(&mut self, _head: u16, _name: u16, _memory: &GuestMemory, _request: &Request, _data: &SgList) -> Result<(), Broken> {
        Ok(())
    }

    /// It was written.
    #[inline]
    fn mark(&self, _name: u16) {}

    /// Whether the log vanished.
    #[inline]
    fn log_is_dead(&self) -> bool {
        false
    }
}

/// Keeps account, in memory that outlives us, of what is in flight.
pub(crate) trait Tracker<R> {
    /// Whether each answer is shown before the next is prepared; else as many as there are at once.
    const ONE_BY_ONE: bool;

    /// Before the ring's next chain is submitted. Its entry.
    fn mark(&mut self, ring: &R, taken: Taken) -> u16;

    /// A chain is pushed and about to be published.
    fn add_done(&mut self, ring: &R, entry: u16);

    /// It was published.
    fn end_batch(&mut self, ring: &R);
}
