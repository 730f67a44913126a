//! One I/O, whole, and the slab it lives in.

use bitflags::bitflags;
use qpair_memory::SgList;
use qpair_wire::nvme::Status;

use crate::layer::{ChannelId, QueueId};

/// How deep bdevs can be stacked: one frame for each layer that an I/O passes. Ten, because [`Io`] is then an odd number of cache lines.
pub const FRAMES_MAX: usize = 10;

/// What an I/O does. Numbers are bit positions in [`crate::OpSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// `blocks` at `lba` into the list.
    Read,
    /// `blocks` at `lba` from the list.
    Write,
    /// All writes completed before, on all channels, are on stable media.
    Flush,
    /// The range's content is no longer wanted (discard, deallocate).
    Unmap,
    /// The range reads as zeros.
    WriteZeroes,
    /// The device drops what it does, on all channels.
    Reset,
    /// Compare the range with the list.
    Compare,
    /// Compare with the list's first half, then write its second.
    CompareAndWrite,
    /// `blocks` from `source_lba` to `lba`.
    Copy,
    /// Borrow the device's own memory of a range.
    ZcopyStart,
    /// Give it back.
    ZcopyEnd,
    /// Append to the zone at `lba`; `result` is where.
    ZoneAppend,
    /// Zone management; action in `command`.
    ZoneManagement,
    /// Where data and holes are: `result` is the next data block.
    SeekData,
    /// As `SeekData`, for holes.
    SeekHole,
    /// The inline NVMe command, I/O set.
    NvmeIo,
    /// The inline NVMe command, admin set.
    NvmeAdmin,
    /// Verify the media.
    Verify,
    /// Make a range unreadable until written.
    WriteUncorrectable,
}

bitflags! {
    /// How an I/O is to be done.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct IoFlags: u16 {
        /// On stable media when done.
        const FUA = 1 << 0;
        /// Write zeroes must keep the range allocated (virtio: no UNMAP flag).
        const NO_UNMAP = 1 << 1;
        /// Reset: I/O in flight ends by itself, and is not asked to.
        const DRAIN = 1 << 4;
        /// Zcopy: the memory that is lent holds the range's data when it is had.
        const POPULATE = 1 << 2;
        /// Zcopy: what is in the memory that was lent becomes the range's data.
        const COMMIT = 1 << 3;
        /// A range lock waits for its end.
        const AWAITED = 1 << 12;
        /// Done by the layer by other operations.
        const EMULATED = 1 << 13;
        /// Made by the layer itself out of a larger one.
        const CHILD = 1 << 14;
        /// Being done in parts.
        const SPLIT = 1 << 15;
    }
}

/// What a layer leaves on an I/O for its completion.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame {
    /// Where the finished I/O is put.
    pub queue: QueueId,
    /// The channel it was submitted to; set by `submit`.
    pub channel: ChannelId,
    /// The submitter's own.
    pub tag: u64,
    /// The block address before this layer moved it.
    pub lba: u64,
    /// When it was submitted, reactor time.
    pub submitted_ns: u64,
}

/// An I/O's name within its reactor: the slot, and which use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct IoId {
    index: u32,
    generation: u32,
}

impl IoId {
    /// As one number, for tags and completion values.
    #[inline]
    pub fn pack(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The way back.
    #[inline]
    pub fn unpack(packed: u64) -> Self {
        Self { index: packed as u32, generation: (packed >> 32) as u32 }
    }

    /// The slot: dense from 0, for tables beside the slab.
    #[inline]
    pub fn slot(self) -> usize {
        self.index as usize
    }
}

/// Where an I/O is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// With its front end.
    Held,
    /// In the layer, waiting for the device to have room or to resume.
    Waiting,
    /// With the device (or being split, or a reset under way).
    Submitted,
    /// On a completion queue.
    Done,
}

/// One request from front end to device and back: the only such object.
///
/// Laid out as written, by cache lines: what the device moves; what every layer looks at, with the front end's frame; two frames a line for the
/// layers below. A slab's I/Os lie an odd number of lines apart: were it a power of two, those in flight would compete for a few sets of the cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Io {
    /// Data.
    pub list: SgList,
    /// Append's address, seek's offset, a key-value command's length.
    pub result: u64,
    pub(crate) generation: u32,
    pub(crate) state: State,
    pub(crate) depth: u8,
    /// Set aside for a channel: it never goes to the front ends.
    reserved: bool,
    /// What to do.
    pub op: Op,
    /// How.
    pub flags: IoFlags,
    /// How it ended.
    pub status: Status,
    /// Children under way: a channel has few.
    pub(crate) split_pending: u16,
    /// The block size, as a power of two, at which the list was seen to be as long as the range; 0: not since it was last written to. So no layer below
    /// has to look at the list.
    pub(crate) sized: u8,
    /// First block.
    pub lba: u64,
    /// How many blocks.
    pub blocks: u64,
    pub(crate) frames: [Frame; FRAMES_MAX],
    /// Blocks the layer has already handed out as children.
    pub(crate) split_blocks: u64,
    /// First block of a copy's source.
    pub source_lba: u64,
    /// Metadata, all of the range's or none; a device that has none does not look at it.
    pub metadata: SgList,
    /// For [`Op::NvmeIo`] and [`Op::NvmeAdmin`].
    pub command: [u8; 64],
    /// Of one out of a channel's reserve: which I/O it does a part of, by [`IoId::pack`]; for trace points.
    pub(crate) origin: u64,
}

/// No I/O, where one could be named.
pub(crate) const NO_IO: u64 = u64::MAX;

const _: () = assert!(std::mem::offset_of!(Io, generation) == 64 && std::mem::offset_of!(Io, frames) == 96, "a line for each visit");
const _: () = assert!(size_of::<Frame>() == 32 && (size_of::<Io>() / 64) % 2 == 1, "an odd number of lines");

impl Io {
    fn vacant() -> Self {
        Self {
            generation: 0,
            state: State::Free,
            depth: 0,
            reserved: false,
            op: Op::Read,
            flags: IoFlags::empty(),
            status: Status::SUCCESS,
            split_blocks: 0,
            split_pending: 0,
            sized: 0,
            lba: 0,
            blocks: 0,
            result: 0,
            list: SgList::new(),
            frames: [Frame::default(); FRAMES_MAX],
            source_lba: 0,
            metadata: SgList::new(),
            command: [0; 64],
            origin: NO_IO,
        }
    }

    /// The newest frame: the submitter's own. Panics if none was pushed, which is a bug of the submitter.
    #[inline]
    pub fn frame(&self) -> &Frame {
        &self.frames[usize::from(self.depth) - 1]
    }

    /// The I/O that it does a part of, if it is made for one.
    pub(crate) fn parent(&self) -> u64 {
        match self.passed().first() {
            Some(first) if self.flags.contains(IoFlags::CHILD) => first.tag,
            _ => self.origin,
        }
    }

    /// All frames, the front end's first.
    #[inline]
    pub(crate) fn passed(&self) -> &[Frame] {
        &self.frames[..usize::from(self.depth)]
    }

    /// Its first block as a channel that it passed has it; None: it never came there.
    pub(crate) fn lba_at(&self, channel: ChannelId) -> Option<u64> {
        let frames = self.passed();
        let at = frames.iter().position(|frame| frame.channel == channel)?;
        Some(frames.get(at + 1).map_or(self.lba, |next| next.lba))
    }

    #[inline]
    pub(crate) fn frame_mut(&mut self) -> &mut Frame {
        &mut self.frames[usize::from(self.depth) - 1]
    }

    /// Whether it is its submitter's to submit: a front end's own, or one that a channel has and passes down.
    #[inline]
    pub(crate) fn may_be_submitted(&self) -> bool {
        self.state == State::Held || (self.state == State::Submitted && self.depth > 1)
    }

    /// Leaves a frame: a finished I/O goes to `queue` with `tag`. Depth is checked when bdevs are stacked.
    #[inline]
    pub fn push(&mut self, queue: QueueId, tag: u64) {
        let frame = &mut self.frames[usize::from(self.depth)];
        // Not submitted to any channel yet: one that is poisoned now, and had a use of this frame before, must not end it.
        *frame = Frame { queue, channel: ChannelId::NOWHERE, tag, lba: self.lba, submitted_ns: frame.submitted_ns };
        self.depth += 1;
    }

    /// Takes the newest frame off, when its owner reaps the I/O.
    #[inline]
    pub fn pop(&mut self) -> Frame {
        self.depth -= 1;
        self.frames[usize::from(self.depth)]
    }

    /// Bytes in the list of metadata.
    pub fn metadata_bytes(&self) -> u64 {
        self.metadata.iter().map(|entry| u64::from(entry.length)).sum()
    }

    /// Bytes in the list.
    #[inline]
    pub fn list_bytes(&self) -> u64 {
        self.list.iter().map(|entry| u64::from(entry.length)).sum()
    }
}

/// The I/Os of one reactor: those for its front ends, as many as configured, and those that channels set aside when they are opened.
/// Nothing here allocates between.
pub(crate) struct Slab {
    ios: Vec<Io>,
    free: Vec<u32>,
    spare: Vec<u32>,
}

impl Slab {
    pub(crate) fn new(count: u32) -> Self {
        Self { ios: (0..count).map(|_| Io::vacant()).collect(), free: (0..count).rev().collect(), spare: Vec::new() }
    }

    /// I/Os for a channel, beside those of the front ends; they come back by [`give_back`](Self::give_back).
    pub(crate) fn reserve(&mut self, count: usize) -> Vec<IoId> {
        while self.spare.len() < count {
            self.spare.push(self.ios.len() as u32);
            self.ios.push(Io { reserved: true, ..Io::vacant() });
        }
        let indices = self.spare.split_off(self.spare.len() - count);
        for index in &indices {
            self.ios[*index as usize].origin = NO_IO;
        }
        indices.into_iter().map(|index| self.start(index)).collect()
    }

    /// Takes an I/O: last returned first, because that one is in the cache.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<IoId> {
        let index = self.free.pop()?;
        Some(self.start(index))
    }

    #[inline]
    fn start(&mut self, index: u32) -> IoId {
        let io = &mut self.ios[index as usize];
        io.state = State::Held;
        io.depth = 0;
        io.flags = IoFlags::empty();
        io.status = Status::SUCCESS;
        io.result = 0;
        io.sized = 0;
        IoId { index, generation: io.generation }
    }

    #[inline]
    pub(crate) fn give_back(&mut self, id: IoId) {
        let io = self.get_mut(id);
        assert!(io.state == State::Held, "I/O freed in state {:?}", io.state);
        io.state = State::Free;
        io.generation = io.generation.wrapping_add(1);
        io.list.clear();
        if !io.metadata.is_empty() {
            io.metadata.clear();
        }
        if io.reserved { self.spare.push(id.index) } else { self.free.push(id.index) }
    }

    /// A reaped I/O of a front end back into the slab: the front end's tag, and how it ended.
    #[inline]
    pub(crate) fn finish(&mut self, id: IoId) -> (u64, Status) {
        let io = self.get_mut(id);
        assert!(io.state == State::Done && io.depth == 1, "I/O finished in state {:?} at depth {}", io.state, io.depth);
        let outcome = (io.frames[0].tag, io.status);
        io.state = State::Held;
        self.give_back(id);
        outcome
    }

    /// Panics on a stale name: whoever uses one has a bug, and its poller is poisoned for it.
    #[inline(always)]
    pub(crate) fn get(&self, id: IoId) -> &Io {
        let io = &self.ios[id.slot()];
        assert!(io.generation == id.generation, "stale I/O name");
        io
    }

    #[inline(always)]
    pub(crate) fn get_mut(&mut self, id: IoId) -> &mut Io {
        let io = &mut self.ios[id.slot()];
        assert!(io.generation == id.generation, "stale I/O name");
        io
    }

    /// None for a stale name.
    #[inline(always)]
    pub(crate) fn find_mut(&mut self, id: IoId) -> Option<&mut Io> {
        self.ios.get_mut(id.slot()).filter(|io| io.generation == id.generation)
    }

    #[inline]
    pub(crate) fn is_current(&self, id: IoId) -> bool {
        self.ios.get(id.slot()).is_some_and(|io| io.generation == id.generation && io.state != State::Free)
    }

    /// The names of all I/Os in use.
    pub(crate) fn names(&self) -> impl Iterator<Item = IoId> + '_ {
        let used = self.ios.iter().enumerate().filter(|(_, io)| io.state != State::Free);
        used.map(|(index, io)| IoId { index: index as u32, generation: io.generation })
    }

    /// Whether an I/O in use would be put on this queue some time. Walks the slab: control plane only.
    pub(crate) fn names_queue(&self, queue: QueueId) -> bool {
        let used = self.ios.iter().filter(|io| io.state != State::Free);
        used.flat_map(|io| &io.frames[..usize::from(io.depth)]).any(|frame| frame.queue == queue)
    }

    pub(crate) fn free_count(&self) -> usize {
        self.free.len() + self.spare.len()
    }

    pub(crate) fn count(&self) -> usize {
        self.ios.len()
    }
}

#[cfg(test)]
impl Slab {
    /// The I/O of a slab of one.
    pub(crate) fn into_only(mut self) -> Io {
        self.ios.remove(0)
    }
}
