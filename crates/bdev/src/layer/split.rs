//! I/Os that are larger than their device takes: done in parts, by I/Os reserved when the channel was opened.
//!
//! A parent hands out children one after the other, as children are free and the device has room; it is complete
//! when all of it was handed out and the last child is back, with the first error any of them met. After an error, or when
//! the channel closes, nothing more is handed out. Write-zeroes on a device without it is done by writes from a
//! region of zeros. Children are whole blocks (writes: whole write units), so an I/O with a block in more segments than
//! the device takes cannot be split: it is refused before anything of it is begun ([`spans_too_much`]).

use std::sync::{Arc, Mutex, PoisonError};

use qpair_memory::{Mapping, MemoryError, Pages, Region, SgList, Sge};
use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;

use super::trace::ENTERED;
use super::{ChannelState, Layer};
use crate::io::State;
use crate::{ChannelId, Info, Io, IoFlags, IoId, Op};

/// Size of the region of zeros in bytes.
pub(crate) const ZEROS: u64 = 1 << 20;

impl Layer {
    /// Hands out as many children as can start now.
    pub(super) fn pump_splits(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        let mut batch = self.borrow_list();
        while let Some((parent, child)) = self.next_pair(channel) {
            self.fill_child(channel, parent, child);
            batch.push(child);
        }
        if !batch.is_empty() {
            self.dispatch(reactor, channel, &batch, ENTERED);
        }
        self.return_list(batch);
    }

    /// A parent with something left to do and a child to do it, booked in flight. Ends parents that are through.
    fn next_pair(&mut self, channel: ChannelId) -> Option<(IoId, IoId)> {
        loop {
            let slot = self.slots[channel.0 as usize].as_mut()?;
            let parent = *slot.splitting.front()?;
            let io = self.ios.get_mut(parent);
            if slot.state == ChannelState::Closed && !io.status.is_error() {
                io.status = Status::INVALID_NAMESPACE;
            }
            if io.split_blocks == io.blocks || io.status.is_error() {
                slot.splitting.pop_front();
                self.end_parent(channel, parent);
                continue;
            }
            if slot.room() == 0 {
                return None;
            }
            let child = slot.children.pop()?;
            slot.inflight += 1;
            return Some((parent, child));
        }
    }

    fn fill_child(&mut self, channel: ChannelId, parent: IoId, child: IoId) {
        let mut list = std::mem::take(&mut self.ios.get_mut(child).list);
        let Some(slot) = &self.slots[channel.0 as usize] else { return };
        let (queue, now_ns) = (slot.split_queue, self.now_ns);
        let io = self.ios.get(parent);
        let (op, blocks) = part_of(&slot.info, io, self.zeros.as_ref(), &mut list);
        let metadata = metadata_of(&slot.info, io, blocks);
        let io = self.ios.get_mut(parent);
        let lba = io.lba + io.split_blocks;
        io.split_blocks += blocks;
        io.split_pending += 1;
        let flags = (io.flags - IoFlags::SPLIT) | IoFlags::CHILD;
        let io = self.ios.get_mut(child);
        (io.op, io.lba, io.blocks, io.list, io.flags) = (op, lba, blocks, list, flags);
        if let Some(metadata) = metadata {
            io.metadata = metadata;
        }
        (io.status, io.state, io.sized) = (Status::SUCCESS, State::Submitted, 0);
        io.push(queue, parent.pack());
        let frame = io.frame_mut();
        (frame.channel, frame.submitted_ns) = (channel, now_ns);
    }

    /// A child is back: its outcome is its parent's.
    pub(super) fn end_child(&mut self, channel: ChannelId, child: IoId) {
        let parent = IoId::unpack(self.retrieve(child).tag);
        if self.ios.get(parent).flags.contains(IoFlags::EMULATED) {
            return self.end_helper(channel, parent, child);
        }
        let io = self.ios.get_mut(child);
        let status = io.status;
        io.list.clear();
        let io = self.ios.get_mut(parent);
        io.split_pending -= 1;
        if status.is_error() && !io.status.is_error() {
            io.status = status;
        }
        let through = io.split_blocks == io.blocks || io.status.is_error();
        let Some(slot) = &mut self.slots[channel.0 as usize] else { return };
        slot.children.push(child);
        // A parent still on the list ends when the list is pumped.
        if through && slot.splitting.front() != Some(&parent) {
            self.end_parent(channel, parent);
        }
        self.call_attention(channel);
    }

    fn end_parent(&mut self, channel: ChannelId, parent: IoId) {
        let io = self.ios.get(parent);
        if io.split_pending > 0 || io.state != State::Submitted {
            return;
        }
        let status = io.status;
        if let Some(slot) = &mut self.slots[channel.0 as usize] {
            slot.parents -= 1;
        }
        self.complete(parent, status);
        self.call_attention(channel);
    }
}

/// The next piece of a parent, as large as the device takes: what to do with how many blocks. Its data go to `list`, which
/// is empty and keeps its heap space.
fn part_of(info: &Info, io: &Io, zeros: Option<&Region>, list: &mut SgList) -> (Op, u64) {
    let left = io.blocks - io.split_blocks;
    let emulated = io.op == Op::WriteZeroes && !info.supported.has(Op::WriteZeroes);
    if !emulated && !matches!(io.op, Op::Read | Op::Write) {
        let limit = u64::from(info.max_unmap_blocks);
        return (io.op, if limit == 0 { left } else { left.min(limit) });
    }
    let block = u64::from(info.block_size);
    let mut blocks = transfer_max(info, io.lba + io.split_blocks, left);
    if emulated {
        blocks = whole_units(info, blocks.min(ZEROS / block));
        // Reserved when the channel was opened; without it the child fails at the device for its missing data.
        list.extend(zeros.map(|zeros| Sge { region: zeros.clone(), offset: 0, length: (blocks * block) as u32 }));
        return (Op::Write, blocks);
    }
    let unit = if io.op == Op::Write { u64::from(info.write_unit_blocks) } else { 1 };
    let start = io.split_blocks * block;
    let taken = slice(&io.list, start, blocks * block, segments_max(info), list);
    if taken < blocks * block {
        // Cut by the limit of segments, perhaps within a block: then fewer, but whole ones. `spans_too_much` saw to it
        // that one is left.
        blocks = taken / (block * unit) * unit;
        list.clear();
        slice(&io.list, start, blocks * block, usize::MAX, list);
    }
    (io.op, blocks)
}

/// The metadata of a piece of a parent, where there are any.
fn metadata_of(info: &Info, io: &Io, blocks: u64) -> Option<SgList> {
    if info.metadata_bytes == 0 {
        return None;
    }
    let bytes = u64::from(info.metadata_bytes);
    let mut list = SgList::new();
    slice(&io.metadata, io.split_blocks * bytes, blocks * bytes, usize::MAX, &mut list);
    Some(list)
}

/// How many of `left` blocks at `lba` one transfer may have, by size and boundary.
fn transfer_max(info: &Info, lba: u64, left: u64) -> u64 {
    let mut blocks = left;
    if info.max_io_blocks != 0 {
        blocks = blocks.min(whole_units(info, u64::from(info.max_io_blocks)));
    }
    if info.split_on_boundary && info.optimal_io_boundary != 0 {
        let boundary = u64::from(info.optimal_io_boundary);
        blocks = blocks.min(boundary - lba % boundary);
    }
    blocks
}

/// `blocks` rounded down to what the device writes at once; both are such that this leaves one unit at least.
pub(super) fn whole_units(info: &Info, blocks: u64) -> u64 {
    let unit = u64::from(info.write_unit_blocks);
    blocks / unit * unit
}

fn segments_max(info: &Info) -> usize {
    if info.max_segments == 0 { usize::MAX } else { info.max_segments as usize }
}

/// Whether some block (or write unit) lies in more pieces than the device takes: no way of splitting helps then.
pub(super) fn spans_too_much(info: &Info, io: &Io) -> bool {
    let unit = if io.op == Op::Write { u64::from(info.write_unit_blocks) } else { 1 };
    let size = u64::from(info.block_size) * unit;
    let (mut at, mut pieces) = (0, 0);
    for entry in io.list.iter().filter(|entry| entry.length > 0) {
        let end = at + u64::from(entry.length);
        pieces = if at % size == 0 { 1 } else { pieces + 1 };
        if pieces > segments_max(info) {
            return true;
        }
        // The piece that crosses into a later unit is that unit's first.
        if end / size != at / size {
            pieces = 1;
        }
        at = end;
    }
    false
}

/// Appends `length` bytes of a list from byte `start` to `out`, in at most `most` entries; returns the bytes.
pub(crate) fn slice(list: &[Sge], start: u64, length: u64, most: usize, out: &mut SgList) -> u64 {
    let (mut skip, mut left) = (start, length);
    for entry in list {
        let size = u64::from(entry.length);
        if skip >= size {
            skip -= size;
            continue;
        }
        if left == 0 || out.len() == most {
            break;
        }
        let take = left.min(size - skip);
        out.push(Sge { region: entry.region.clone(), offset: entry.offset + skip, length: take as u32 });
        (skip, left) = (0, left - take);
    }
    length - left
}

/// The region that zeros are written from.
pub(super) fn zeros() -> Result<Region, MemoryError> {
    static ZERO: Mutex<Option<Arc<Mapping>>> = Mutex::new(None);
    let mut shared = ZERO.lock().unwrap_or_else(PoisonError::into_inner);
    let mapping = match &*shared {
        Some(mapping) => mapping.clone(),
        None => shared.insert(Mapping::anonymous(ZEROS as usize, Pages::Normal)?).clone(),
    };
    Ok(Region::new(mapping))
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
