//! I/Os that are larger than their device takes: done in parts, by I/Os reserved when the channel was opened.
//!
//! A parent hands out children one after the other, as children are free and the device has room; it is complete
//! when all of it was handed out and the last child is back, with the first error any of them met. After an error, or when
//! the channel closes, nothing more is handed out. Write-zeroes on a device without it is done by writes from a
//! region of zeros.

use std::sync::{Arc, OnceLock};

use qpair_memory::{Mapping, Pages, Region, SgList, Sge};
use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;

use super::{ChannelState, Layer};
use crate::io::State;
use crate::{ChannelId, Info, Io, IoFlags, IoId, Op};

/// Size of the region of zeros in bytes.
const ZEROS: u64 = 1 << 20;

impl Layer {
    /// Hands out as many children as can start now.
    pub(super) fn pump_splits(&mut self, reactor: &mut Reactor, channel: ChannelId) {
        let mut batch = std::mem::take(&mut self.child_batch);
        while let Some((parent, child)) = self.next_pair(channel) {
            self.fill_child(channel, parent, child);
            batch.push(child);
        }
        if !batch.is_empty() {
            self.dispatch(reactor, channel, &batch);
            batch.clear();
        }
        self.child_batch = batch;
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
        let Some(slot) = &self.slots[channel.0 as usize] else { return };
        let (queue, now_ns) = (slot.split_queue, self.now_ns);
        let io = self.ios.get_mut(parent);
        let (part, lba) = (part_of(&slot.info, io), io.lba + io.split_blocks);
        io.split_blocks += part.blocks;
        io.split_pending += 1;
        let flags = (io.flags - IoFlags::SPLIT) | IoFlags::CHILD;
        let io = self.ios.get_mut(child);
        (io.op, io.lba, io.blocks, io.list, io.flags) = (part.op, lba, part.blocks, part.list, flags);
        (io.status, io.state) = (Status::SUCCESS, State::Submitted);
        io.push(queue, parent.pack());
        let frame = io.frame_mut();
        (frame.channel, frame.submitted_ns) = (channel, now_ns);
    }

    /// A child is back: its outcome is its parent's.
    pub(super) fn end_child(&mut self, channel: ChannelId, child: IoId) {
        let parent = IoId::unpack(self.retrieve(child).tag);
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

struct Part {
    op: Op,
    blocks: u64,
    list: SgList,
}

/// The next piece of a parent: as large as the device takes.
fn part_of(info: &Info, io: &Io) -> Part {
    let left = io.blocks - io.split_blocks;
    let lba = io.lba + io.split_blocks;
    let block = u64::from(info.block_size);
    let mut blocks = left;
    let emulated = io.op == Op::WriteZeroes && !info.supported.has(Op::WriteZeroes);
    let data = emulated || matches!(io.op, Op::Read | Op::Write);
    let limit = u64::from(if data { info.max_io_blocks } else { info.max_unmap_blocks });
    if limit != 0 {
        blocks = blocks.min(limit);
    }
    if data && info.split_on_boundary && info.optimal_io_boundary != 0 {
        let boundary = u64::from(info.optimal_io_boundary);
        blocks = blocks.min(boundary - lba % boundary);
    }
    if emulated {
        blocks = blocks.min(ZEROS / block);
        let whole = Sge { region: zeros(), offset: 0, length: (blocks * block) as u32 };
        return Part { op: Op::Write, blocks, list: SgList::from_iter([whole]) };
    }
    if !data {
        return Part { op: io.op, blocks, list: SgList::new() };
    }
    let list = slice(&io.list, io.split_blocks * block, blocks * block, segments_max(info));
    // A cut by segments may leave part of a block: then fewer, but whole blocks.
    let bytes: u64 = list.iter().map(|entry| u64::from(entry.length)).sum();
    if bytes == blocks * block {
        return Part { op: io.op, blocks, list };
    }
    blocks = bytes / block;
    if blocks == 0 {
        // One block in more pieces than the device takes: bounced as a whole would be the cure; it is refused by `route`.
        return Part { op: io.op, blocks: 1, list: slice(&io.list, io.split_blocks * block, block, usize::MAX) };
    }
    let list = slice(&io.list, io.split_blocks * block, blocks * block, usize::MAX);
    Part { op: io.op, blocks, list }
}

fn segments_max(info: &Info) -> usize {
    if info.max_segments == 0 { usize::MAX } else { info.max_segments as usize }
}

/// `length` bytes of a list from byte `start`, in at most `most` entries.
fn slice(list: &[Sge], start: u64, length: u64, most: usize) -> SgList {
    let mut out = SgList::new();
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
    out
}

fn zeros() -> Region {
    static ZERO: OnceLock<Option<Arc<Mapping>>> = OnceLock::new();
    let mapping = ZERO.get_or_init(|| Mapping::anonymous(ZEROS as usize, Pages::Normal).ok()).clone();
    Region::new(mapping.unwrap_or_else(|| panic!("no memory for {ZEROS} bytes of zeros")))
}
