//! The inflight region: which requests were with us when we died (vhost-user, "Inflight I/O tracking").
//!
//! The front end keeps the region through our death and gives it to our successor. Each ring has a part of it, of its kind's layout: [`split`], [`packed`].
//! Before a request is submitted it is marked there; when it is answered the mark is taken off, in an order that lets a successor tell, after any
//! store, which requests were answered: it submits the others again, oldest first.
//!
//! Every store is volatile or atomic and fenced against the compiler, so that they happen in this order in memory, which is all that
//! a killed process leaves behind. The region may lie: all that is read is checked, and a contradiction is refused.
//!
//! A ring may be larger than the front end says when it has the region made: QEMU names its `queue-size`, and versions of it let the guest
//! (and its firmware) make rings of 1024 entries all the same. So a region is made for rings of at least [`ROOM`] entries; one that comes back is taken to
//! be so if it is large enough for that.

mod packed;
mod split;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use qpair_memory::{Mapping, Region};
use qpair_wire::vhost_user::{inflight_packed_queue_bytes, inflight_queue_bytes};

use crate::{Broken, QUEUES_MAX, VhostError};

pub(crate) use packed::{PackedLeft, PackedTracker};
pub(crate) use split::SplitTracker;

/// For how large a ring there is room in every region that is made here: QEMU's largest.
const ROOM: u16 = 1024;

/// The region of a session, shared by its rings.
#[derive(Clone, Debug)]
pub struct Inflight {
    mapping: Arc<Mapping>,
    offset: u64,
    num_queues: u16,
    /// Entries of the largest ring that it can track.
    queue_size: u16,
}

impl Inflight {
    /// A new, empty one, and its descriptor for the front end.
    pub fn create(num_queues: u16, queue_size: u16, packed: bool) -> Result<(Self, OwnedFd, u64), VhostError> {
        check(num_queues, queue_size)?;
        let queue_size = queue_size.max(ROOM);
        let bytes = region_bytes(num_queues, queue_size, packed);
        let mapping = Mapping::memfd("qpair-inflight", bytes as usize)?;
        let fd = mapping.fd().ok_or(VhostError::State("the inflight region has no descriptor".into()))?;
        let fd = fd.try_clone_to_owned().map_err(|error| VhostError::Os("dup", error))?;
        Ok((Self { mapping, offset: 0, num_queues, queue_size }, fd, bytes))
    }

    /// One that the front end gave back.
    pub fn adopt(fd: &OwnedFd, size: u64, offset: u64, num_queues: u16, queue_size: u16, packed: bool) -> Result<Self, VhostError> {
        check(num_queues, queue_size)?;
        let least = region_bytes(num_queues, queue_size, packed);
        if size < least {
            return Err(VhostError::invalid(
                "inflight mmap_size",
                size,
                format!("at least {least} for {num_queues} queues of {queue_size}"),
            ));
        }
        let end =
            offset.checked_add(size).ok_or_else(|| VhostError::invalid("inflight mmap_offset", offset, "offset + size below 2^64"))?;
        let mapping = Mapping::shared(fd.as_fd(), end)?;
        let roomy = queue_size.max(ROOM);
        let queue_size = if size >= region_bytes(num_queues, roomy, packed) { roomy } else { queue_size };
        Ok(Self { mapping, offset, num_queues, queue_size })
    }

    /// A split ring's part.
    pub(crate) fn queue(&self, index: u16, size: u16) -> Result<SplitTracker, Broken> {
        let base = self.part(index, size, inflight_queue_bytes(self.queue_size))?;
        SplitTracker::new(&Region::new(self.mapping.clone()), base, size).map_err(|error| Broken::Inflight(error.to_string()))
    }

    /// A packed ring's part.
    pub(crate) fn packed_queue(&self, index: u16, size: u16) -> Result<PackedTracker, Broken> {
        let base = self.part(index, size, inflight_packed_queue_bytes(self.queue_size))?;
        PackedTracker::new(&Region::new(self.mapping.clone()), base, size).map_err(|error| Broken::Inflight(error.to_string()))
    }

    fn part(&self, index: u16, size: u16, bytes: u64) -> Result<u64, Broken> {
        if index >= self.num_queues || size > self.queue_size {
            let (num, entries) = (self.num_queues, self.queue_size);
            return Err(Broken::Inflight(format!("queue {index} of {size} entries does not fit a region of {num} queues of {entries}")));
        }
        Ok(self.offset + bytes * u64::from(index))
    }

    /// The largest ring that it can track.
    pub(crate) fn queue_size(&self) -> u16 {
        self.queue_size
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.mapping.is_dead()
    }
}

fn region_bytes(num_queues: u16, queue_size: u16, packed: bool) -> u64 {
    let queue = if packed { inflight_packed_queue_bytes(queue_size) } else { inflight_queue_bytes(queue_size) };
    queue * u64::from(num_queues)
}

fn check(num_queues: u16, queue_size: u16) -> Result<(), VhostError> {
    if num_queues == 0 || u32::from(num_queues) > QUEUES_MAX {
        return Err(VhostError::invalid("inflight num_queues", num_queues, format!("1 to {QUEUES_MAX}")));
    }
    // Of any size, whatever the rings: a machine asks before its driver chooses a kind, and firmware's rings are split.
    if !(1..=32768).contains(&queue_size) {
        return Err(VhostError::invalid("inflight queue_size", queue_size, "1 to 32768"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_has_room_for_rings_that_are_larger_than_was_said_and_comes_back_so() {
        for packed in [false, true] {
            let (made, fd, bytes) = Inflight::create(2, 128, packed).unwrap();
            assert_eq!((made.queue_size(), bytes), (1024, region_bytes(2, 1024, packed)));
            assert_eq!(Inflight::adopt(&fd, bytes, 0, 2, 128, packed).unwrap().queue_size(), 1024);
            // Another server's region has the room that was asked for.
            let exact = region_bytes(2, 128, packed);
            assert_eq!(Inflight::adopt(&fd, exact, 0, 2, 128, packed).unwrap().queue_size(), 128);
            assert_eq!(Inflight::create(1, 4096, packed).unwrap().0.queue_size(), 4096);
        }
    }
}
