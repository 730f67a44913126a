//! What the two kinds of virtqueue have in common, as a channel drives them. A channel is compiled for each kind.

use qpair_memory::{MemoryError, Region};
use qpair_wire::virtio::RingSize;

use crate::chain::Chains;
use crate::config::Agreed;
use crate::layout::QueueLayout;

/// Where a ring stands when no channel has it: the target remembers its own. Indices, or a packed ring's positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) avail: u16,
    pub(crate) used: u16,
}

/// The driver's side of a ring. What the device may not do is the channel's to find out.
pub(crate) trait Ring: Sized {
    /// Takes up the ring where it stands, or from its beginning, without interrupts.
    fn new(region: &Region, layout: &QueueLayout, size: RingSize, agreed: &Agreed, place: Option<Place>) -> Result<Self, MemoryError>;

    fn place(&self) -> Place;

    /// Takes what the next [`publish`](Self::publish) writes from the device, shortly before.
    fn prefetch_publish(&self);

    /// Brings what the next [`add`](Self::add) writes nearer.
    fn prefetch_avail(&self);

    /// Adds a slot's chain to the batch. There is room: there are no more slots than the ring holds chains.
    fn add(&mut self, chains: &Chains, slot: u16);

    /// Shows the batch to the device. True: it wants a kick.
    fn publish(&mut self) -> bool;

    /// Drops the batch: the device never sees it.
    fn forget(&mut self);

    /// How many answers wait, as far as one look tells; 0: none.
    fn waiting(&self) -> u16;

    /// The next answer: id and length. Only as many times as [`waiting`](Self::waiting) said.
    fn next_used(&mut self) -> (u32, u32);

    /// Asks for an interrupt at the next answer. True: none came meanwhile.
    fn listen(&mut self) -> bool;

    /// Asks for no interrupts.
    fn silence(&mut self);

    /// Keeps to that while the ring is polled.
    fn stay_silent(&mut self);
}
