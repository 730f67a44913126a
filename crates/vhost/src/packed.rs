//! The device's side of a packed virtqueue (Virtio 1.2, 2.8): one ring that both sides write. Knows nothing of blocks.
//!
//! Rules. Descriptors are taken in the ring's order. A chain is as many descriptors as NEXT says, and is answered by one used descriptor, written where
//! the last answer ended; then as many descriptors are passed over as the chain had. So what is answered out of order overwrites
//! descriptors of chains that are still in flight, and nothing of a chain may be looked up in the ring once it is taken.
//!
//! Orders. The second half of a descriptor holds length, id and flags and is read and written whole, as one atomic. The driver writes all
//! of a chain, then the flags of its first descriptor: they are loaded with Acquire before anything that they announce is
//! read. Of a batch of answers we write the first one's second half last, with Release: the driver reads answers in order, and sees
//! either none of the batch or all of it. Whether to interrupt or to kick is decided as on a split ring: each side publishes, fences, and only
//! then reads what the other wants (2.8.21.3.1), so at least one of them sees the other.
//!
//! A hostile driver. Its wrap bits must be right in every descriptor of a chain ([`Broken::NotAvailable`]; 2.8.6 demands it, and
//! a successor goes by them); no more may be available than is not in flight ([`Broken::Overrun`], [`Broken::TooLong`]); an id is below the ring's size and not
//! in flight ([`Broken::BadId`], [`Broken::IdInFlight`]); an indirect descriptor is alone (2.8.7). What is checked is the copy.

use std::sync::atomic::{Ordering, fence};

use qpair_memory::{GuestMemory, Shared};
use qpair_wire::virtio::{DESC_ALIGN, DescFlags};
use qpair_wire::virtio_packed::{EVENT_ALIGN, EVENT_BYTES, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, EVENT_MASK, turn};
use qpair_wire::virtio_packed::{PackedBase, PackedSize, Position};

use crate::inflight::{Inflight, PackedTracker};
use crate::log::{Writes, Written};
use crate::ring::{Buffer, Chain, Kind, Ring, Taken};
use crate::session::Setup;
use crate::split::{area, refuse_overlap};
use crate::{Addresses, Broken, VhostError};

/// See the module's doc.
#[derive(Debug)]
pub struct PackedRing {
    size: PackedSize,
    event_idx: bool,
    /// Two a descriptor: its address; its length, id and flags.
    words: Shared<u64>,
    driver_event: Shared<u32>,
    device_event: Shared<u32>,
    next_avail: Position,
    next_used: Position,
    /// Descriptors taken and not yet used.
    outstanding: u16,
    /// The batch's first answer, not yet written: where and what.
    first: Option<(usize, u64)>,
    /// Descriptors used since the driver was last told or found not to want to be.
    unsignalled: u32,
    /// How many descriptors the last chain had: the next one's most likely has as many.
    usual: u16,
}

impl PackedRing {
    /// Maps the ring's areas and starts at `base`. Refuses what is misaligned, outside memory, or overlaps, and a base that is not on the ring.
    pub fn new(
        memory: &GuestMemory,
        size: PackedSize,
        addresses: Addresses,
        base: PackedBase,
        event_idx: bool,
    ) -> Result<Self, VhostError> {
        let (desc, desc_at) = area(memory, addresses.desc, size.desc_bytes(), DESC_ALIGN)?;
        let (driver, driver_at) = area(memory, addresses.avail, EVENT_BYTES, EVENT_ALIGN)?;
        let (device, device_at) = area(memory, addresses.used, EVENT_BYTES, EVENT_ALIGN)?;
        refuse_overlap(&[(addresses.desc, size.desc_bytes()), (addresses.avail, EVENT_BYTES), (addresses.used, EVENT_BYTES)])?;
        let outstanding = size.distance(base.used, base.avail);
        if !size.holds(base.avail) || !size.holds(base.used) || outstanding > u32::from(size.get()) {
            let limit = format!("two positions on a ring of {}, at most a lap apart", size.get());
            return Err(VhostError::invalid("vring base", format!("{:#x}", base.bits()), limit));
        }
        Ok(Self {
            size,
            event_idx,
            words: Shared::new(desc, desc_at, 2 * usize::from(size.get()))?,
            driver_event: Shared::new(driver, driver_at, 1)?,
            device_event: Shared::new(device, device_at, 1)?,
            next_avail: base.avail,
            next_used: base.used,
            outstanding: outstanding as u16,
            first: None,
            unsignalled: 0,
            usual: 1,
        })
    }

    /// Where the next used descriptor is written.
    pub(crate) fn next_used(&self) -> Position {
        self.next_used
    }

    pub(crate) fn entries(&self) -> PackedSize {
        self.size
    }

    /// The two words of the descriptor that is `ahead` of the next to take: address; length, id and flags.
    #[inline]
    pub(crate) fn words(&self, ahead: u16) -> [u64; 2] {
        let at = 2 * usize::from(self.size.advance(self.next_avail, ahead).index());
        let second = self.words.load_atomic(at + 1, Ordering::Acquire);
        [self.words.load_atomic(at, Ordering::Relaxed), second]
    }

    /// Does the descriptor here stand as the driver left it, with no answer written over it?
    #[inline]
    pub(crate) fn is_available(&self, at: Position) -> bool {
        let flags = (self.words.load_atomic(2 * usize::from(at.index()) + 1, Ordering::Acquire) >> FLAGS_SHIFT) as u16;
        turn(flags) == at.available()
    }

    #[inline]
    fn buffer(&self, at: Position, head: u16) -> Result<(Buffer, u16), Broken> {
        let place = 2 * usize::from(at.index());
        let second = self.words.load_atomic(place + 1, Ordering::Acquire);
        let flags = (second >> FLAGS_SHIFT) as u16;
        if turn(flags) != at.available() {
            return Err(Broken::NotAvailable { head, index: at.index() });
        }
        let address = self.words.load_atomic(place, Ordering::Relaxed);
        let buffer = Buffer { address, length: second as u32, flags: DescFlags::from_bits_retain(flags), next: 0 };
        Ok((buffer, (second >> ID_SHIFT) as u16))
    }

    /// A predecessor used up to `used` and took `outstanding` descriptors beyond.
    pub(crate) fn resume(&mut self, used: Position, outstanding: u16) {
        (self.next_used, self.outstanding) = (used, outstanding);
        self.next_avail = self.size.advance(used, outstanding);
        // The predecessor may have died before it interrupted.
        self.unsignalled = 2 * u32::from(self.size.get());
    }
}

/// In the second word of a descriptor.
pub(crate) const ID_SHIFT: u32 = 32;
pub(crate) const FLAGS_SHIFT: u32 = 48;

impl Ring for PackedRing {
    type Chain<'a> = PackedChain<'a>;

    #[inline]
    fn size(&self) -> u16 {
        self.size.get()
    }

    fn base(&self) -> u32 {
        PackedBase { avail: self.next_avail, used: self.next_used }.bits()
    }

    fn positions(&self) -> (u16, u16) {
        (self.next_avail.bits(), self.next_used.bits())
    }

    #[inline]
    fn waiting(&self) -> Result<u16, Broken> {
        if !self.ready()? {
            return Ok(0);
        }
        let alone = self.usual >= self.size.get() - self.outstanding || !self.is_available(self.size.advance(self.next_avail, self.usual));
        Ok(if alone { 1 } else { u16::MAX })
    }

    #[inline]
    fn ready(&self) -> Result<bool, Broken> {
        if !self.is_available(self.next_avail) {
            return Ok(false);
        }
        if self.outstanding == self.size.get() {
            return Err(Broken::Overrun { index: self.next_avail.index(), size: self.size.get() });
        }
        Ok(true)
    }

    #[inline]
    fn chain(&self) -> PackedChain<'_> {
        PackedChain { ring: self, at: self.next_avail, taken: Taken::default() }
    }

    #[inline]
    fn prefetch(&self, ahead: u16) {
        // Lines of the ring follow each other, and the processor sees that for itself.
        let _ = ahead;
    }

    #[inline]
    fn took(&mut self, taken: Taken) {
        self.next_avail = self.size.advance(self.next_avail, taken.count);
        self.outstanding += taken.count;
        self.usual = taken.count;
    }

    #[inline]
    fn rest(&mut self) {}

    #[inline]
    fn prefetch_used(&self) {}

    #[inline]
    fn prefetch_publish(&self) {
        self.words.prefetch_write(2 * usize::from(self.next_used.index()) + 1);
    }

    #[inline]
    fn push_used(&mut self, taken: Taken, written: u32) {
        let flags = u64::from(self.next_used.used() | DescFlags::WRITE.bits());
        let word = u64::from(written) | u64::from(taken.id) << ID_SHIFT | flags << FLAGS_SHIFT;
        let at = 2 * usize::from(self.next_used.index()) + 1;
        match self.first {
            None => self.first = Some((at, word)),
            Some(_) => self.words.store_atomic(at, word, Ordering::Release),
        }
        self.next_used = self.size.advance(self.next_used, taken.count);
        self.outstanding -= taken.count;
        self.unsignalled = self.unsignalled.saturating_add(u32::from(taken.count));
    }

    #[inline]
    fn publish(&mut self) {
        if let Some((at, word)) = self.first.take() {
            self.words.store_atomic(at, word, Ordering::Release);
        }
    }

    #[inline]
    fn wants_interrupt(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let count = std::mem::take(&mut self.unsignalled);
        if count == 0 {
            return false;
        }
        let wish = self.driver_event.load_atomic(0, Ordering::Relaxed);
        match (wish >> 16) as u16 & EVENT_MASK {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => self.size.need_event(Position::from_bits(wish as u16), self.next_used, count),
            _ => true,
        }
    }

    fn arm(&mut self) -> bool {
        let wish = if self.event_idx { EVENT_DESC } else { EVENT_ENABLE };
        self.device_event.store_atomic(0, u32::from(self.next_avail.bits()) | u32::from(wish) << 16, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.is_available(self.next_avail)
    }

    fn disarm(&mut self) {
        self.device_event.store_atomic(0, u32::from(EVENT_DISABLE) << 16, Ordering::Relaxed);
    }
}

/// Descriptors one after the other, from the next to take.
pub struct PackedChain<'a> {
    ring: &'a PackedRing,
    at: Position,
    taken: Taken,
}

impl PackedChain<'_> {
    #[inline]
    fn read(&mut self) -> Result<Buffer, Broken> {
        let (buffer, id) = self.ring.buffer(self.at, self.head())?;
        self.taken = Taken { id, count: self.taken.count + 1 };
        if buffer.flags.contains(DescFlags::INDIRECT) && self.taken.count > 1 {
            return Err(Broken::BadIndirect { head: self.head(), reason: "an indirect descriptor follows another" });
        }
        Ok(buffer)
    }
}

impl Chain for PackedChain<'_> {
    const LINKED_TABLES: bool = false;

    #[inline]
    fn head(&self) -> u16 {
        self.ring.next_avail.index()
    }

    #[inline]
    fn limit(&self) -> u32 {
        u32::from(self.ring.size.get() - self.ring.outstanding)
    }

    #[inline]
    fn first(&mut self) -> Result<Buffer, Broken> {
        (self.at, self.taken.count) = (self.ring.next_avail, 0);
        self.read()
    }

    #[inline]
    fn next(&mut self, _: &Buffer) -> Result<Buffer, Broken> {
        self.at = self.ring.size.advance(self.at, 1);
        if u32::from(self.taken.count) >= self.limit() {
            return Err(Broken::TooLong { head: self.head(), limit: self.limit() });
        }
        self.read()
    }

    #[inline]
    fn taken(&self) -> Taken {
        self.taken
    }

    #[cold]
    fn refused(&self, taken: Taken, size: u16) -> Broken {
        refused(self.head(), taken, size)
    }
}

pub(crate) fn refused(head: u16, taken: Taken, size: u16) -> Broken {
    let id = taken.id;
    if id < size { Broken::IdInFlight { head, id } } else { Broken::BadId { head, id, size } }
}

impl Kind for PackedRing {
    type Tracker = PackedTracker;
    type Left<'a> = crate::inflight::PackedLeft<'a>;

    fn open(memory: &GuestMemory, setup: &Setup) -> Result<Self, VhostError> {
        let size = PackedSize::new(u32::from(setup.size));
        let size = size.ok_or_else(|| VhostError::invalid("vring num", setup.size, "1 to 32768"))?;
        let base = setup.base.map_or(PackedBase::START, PackedBase::from_bits);
        Self::new(memory, size, setup.addresses, base, setup.event_idx)
    }

    fn track(&mut self, region: &Inflight, index: u16) -> Result<(PackedTracker, Vec<u16>), Broken> {
        let mut tracker = region.packed_queue(index, self.size.get())?;
        let found = tracker.recover(self)?;
        if let Some((used, outstanding)) = found.at {
            self.resume(used, outstanding);
        }
        Ok((tracker, found.entries))
    }

    fn left<'a>(&'a self, tracker: &'a PackedTracker, entry: u16) -> crate::inflight::PackedLeft<'a> {
        tracker.chain(entry)
    }
}

/// The second half of a descriptor, which an answer overwrites.
fn second_half(word: usize) -> Written {
    Written { in_table: true, offset: 8 * word as u64, length: 8 }
}

impl Writes for PackedRing {
    fn all(&self) -> [Option<Written>; 2] {
        let table = Written { in_table: true, offset: 0, length: self.size.desc_bytes() };
        [Some(table), Some(self.wish())]
    }

    fn entry(&self) -> Written {
        second_half(2 * usize::from(self.next_used.index()) + 1)
    }

    fn shown(&self) -> Option<Written> {
        self.first.map(|(at, _)| second_half(at))
    }

    fn wish(&self) -> Written {
        Written { in_table: false, offset: 0, length: EVENT_BYTES }
    }
}
