//! One memfd for everything that the target must see: who lies where, and the part that front ends borrow.

use std::sync::{Arc, Mutex, PoisonError};

use qpair_bdev::Buffer;
use qpair_memory::{Mapping, Region};
use qpair_wire::virtio::RingSize;

use crate::BdevError;

/// Largest bounce space of a request in bytes.
pub const MAX_IO_BYTES: u32 = 16 << 20;
/// Most queues: as many as virtio-blk's field counts, and few enough that the memfd stays addressable.
const QUEUES_MAX: u32 = 256;
/// Fewest ring entries: one chain.
const SIZE_MIN: u32 = 4;
/// Areas that different sides write start on lines of their own; two, because lines are fetched in pairs.
const AREA_ALIGN: u64 = 128;
const PAGE: u64 = 4096;

/// Where a queue's areas lie, from the start of the mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLayout {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    /// Indirect tables, 64 bytes a slot.
    pub(crate) tables: u64,
    /// Request headers, 16 bytes a slot.
    pub(crate) headers: u64,
    /// Discard and write-zeroes segments, 16 bytes a slot.
    pub(crate) segments: u64,
    /// One byte a slot.
    pub(crate) statuses: u64,
    /// `max_io_bytes` a slot.
    pub(crate) bounce: u64,
    end: u64,
}

impl QueueLayout {
    fn at(start: u64, size: RingSize, max_io_bytes: u32) -> Self {
        let count = u64::from(size.get());
        let after = |at: u64, bytes: u64| (at + bytes).next_multiple_of(AREA_ALIGN);
        let desc = start.next_multiple_of(AREA_ALIGN);
        let avail = after(desc, size.desc_bytes());
        let used = after(avail, size.avail_bytes(true));
        let tables = after(used, size.used_bytes(true));
        let headers = after(tables, 64 * count);
        let segments = after(headers, 16 * count);
        let statuses = after(segments, 16 * count);
        let bounce = (statuses + count).next_multiple_of(PAGE);
        Self { desc, avail, used, tables, headers, segments, statuses, bounce, end: bounce + count * u64::from(max_io_bytes) }
    }
}

/// Addresses of a queue's rings for SET_VRING_ADDR: this process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Avail ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

/// See the module's doc. Guest addresses are offsets in the memfd.
pub struct VirtioLayout {
    mapping: Arc<Mapping>,
    size: RingSize,
    max_io_bytes: u32,
    queues: Vec<QueueLayout>,
    pool: Arc<Pool>,
}

impl VirtioLayout {
    /// Lays out `num_queues` queues of `queue_size` entries. The memfd costs only what is touched of it.
    pub fn new(num_queues: u32, queue_size: u32, max_io_bytes: u32) -> Result<Arc<Self>, BdevError> {
        if num_queues == 0 || num_queues > QUEUES_MAX {
            return Err(BdevError::invalid("num_queues", num_queues, format!("1 to {QUEUES_MAX}")));
        }
        let size = RingSize::new(queue_size).filter(|_| queue_size >= SIZE_MIN);
        let size = size.ok_or_else(|| BdevError::invalid("queue_size", queue_size, format!("a power of two from {SIZE_MIN} to 32768")))?;
        if max_io_bytes == 0 || max_io_bytes > MAX_IO_BYTES || !max_io_bytes.is_multiple_of(PAGE as u32) {
            return Err(BdevError::invalid("max_io_bytes", max_io_bytes, format!("a multiple of {PAGE} up to {MAX_IO_BYTES}")));
        }
        let mut queues: Vec<QueueLayout> = Vec::new();
        for _ in 0..num_queues {
            let start = queues.last().map_or(0, |queue| queue.end);
            queues.push(QueueLayout::at(start, size, max_io_bytes));
        }
        let start = queues.last().map_or(0, |queue| queue.end).next_multiple_of(PAGE);
        let lent = u64::from(num_queues) * u64::from(queue_size) * u64::from(max_io_bytes);
        let length = usize::try_from(start + lent).map_err(|_| BdevError::invalid("queue_size", queue_size, "what can be addressed"))?;
        let mapping = Mapping::memfd("qpair-virtio", length)?;
        Ok(Arc::new(Self { mapping, size, max_io_bytes, queues, pool: Arc::new(Pool { free: Mutex::new(vec![(start, lent)]) }) }))
    }

    /// The memfd, mapped: its descriptor, address and size are what the target's memory table needs.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Ring addresses of a queue, unless there is no such.
    pub fn queue_addresses(&self, queue: usize) -> Option<QueueAddresses> {
        let base = self.mapping.address() as u64;
        self.queues.get(queue).map(|q| QueueAddresses { desc: base + q.desc, avail: base + q.avail, used: base + q.used })
    }

    /// How many queues.
    pub fn num_queues(&self) -> usize {
        self.queues.len()
    }

    /// Entries of each ring.
    pub fn queue_size(&self) -> u16 {
        self.size.get()
    }

    pub(crate) fn size(&self) -> RingSize {
        self.size
    }

    pub(crate) fn max_io_bytes(&self) -> u32 {
        self.max_io_bytes
    }

    pub(crate) fn queue(&self, queue: usize) -> QueueLayout {
        self.queues[queue]
    }

    /// Makes all rings as they were in the beginning. Nobody may use them.
    pub(crate) fn wipe_rings(&self) -> Result<(), BdevError> {
        let region = Region::new(self.mapping.clone());
        self.queues.iter().try_for_each(|queue| region.fill(queue.desc, queue.tables - queue.desc, 0).map_err(BdevError::from))
    }

    /// Lends `bytes` of the memory behind the queues, if so much is free in one piece.
    pub(crate) fn lend(&self, bytes: u64) -> Option<Buffer> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE)?;
        let offset = self.pool.take(bytes)?;
        let lease = Lease { pool: self.pool.clone(), offset, bytes };
        Some(Buffer::lent(self.mapping.clone(), offset, bytes, Box::new(lease)))
    }
}

/// Free ranges (offset, bytes), sorted, never adjoining. Control plane: first fit.
struct Pool {
    free: Mutex<Vec<(u64, u64)>>,
}

impl Pool {
    fn take(&self, bytes: u64) -> Option<u64> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = free.iter().position(|(_, length)| *length >= bytes)?;
        let (offset, length) = free[index];
        if length == bytes {
            free.remove(index);
        } else {
            free[index] = (offset + bytes, length - bytes);
        }
        Some(offset)
    }

    fn give_back(&self, offset: u64, bytes: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = free.partition_point(|(start, _)| *start < offset);
        free.insert(index, (offset, bytes));
        if free.get(index + 1).is_some_and(|(next, _)| *next == offset + bytes) {
            free[index].1 += free.remove(index + 1).1;
        }
        if index > 0 && free[index - 1].0 + free[index - 1].1 == offset {
            free[index - 1].1 += free.remove(index).1;
        }
    }
}

struct Lease {
    pool: Arc<Pool>,
    offset: u64,
    bytes: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.pool.give_back(self.offset, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_aligned_in_order_and_apart() {
        let layout = VirtioLayout::new(3, 256, 65536).unwrap();
        let mut end = 0;
        for index in 0..3 {
            let q = layout.queue(index);
            let areas = [q.desc, q.avail, q.used, q.tables, q.headers, q.segments, q.statuses, q.bounce];
            assert!(areas.windows(2).all(|pair| pair[0] < pair[1]) && q.desc >= end, "{areas:?}");
            assert!(areas.iter().all(|area| area % 128 == 0), "{areas:?}");
            assert!(q.avail - q.desc >= 16 * 256 && q.used - q.avail >= 6 + 2 * 256 && q.tables - q.used >= 6 + 8 * 256);
            end = q.end;
        }
        assert!(layout.mapping().len() as u64 >= end);
        assert_eq!(layout.queue_addresses(3), None);
    }

    #[test]
    fn sizes_out_of_range_are_refused_by_name() {
        let text = |result: Result<Arc<VirtioLayout>, BdevError>| result.err().map(|error| error.to_string()).unwrap_or_default();
        assert_eq!(text(VirtioLayout::new(0, 256, 4096)), "Invalid argument: num_queues 0: 1 to 256");
        assert_eq!(text(VirtioLayout::new(1, 100, 4096)), "Invalid argument: queue_size 100: a power of two from 4 to 32768");
        assert_eq!(text(VirtioLayout::new(1, 2, 4096)), "Invalid argument: queue_size 2: a power of two from 4 to 32768");
        assert_eq!(text(VirtioLayout::new(1, 4, 100)), "Invalid argument: max_io_bytes 100: a multiple of 4096 up to 16777216");
    }

    #[test]
    fn lent_memory_comes_back_whole() {
        let layout = VirtioLayout::new(1, 4, 4096).unwrap();
        let buffers: Vec<Buffer> = (0..4).filter_map(|_| layout.lend(4096)).collect();
        assert_eq!(buffers.len(), 4);
        assert!(layout.lend(1).is_none());
        let mut buffers = buffers;
        buffers.swap(0, 2);
        drop(buffers);
        assert!(layout.lend(4 * 4096).is_some());
    }
}
