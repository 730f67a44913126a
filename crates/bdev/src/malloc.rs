//! A disk in memory. Zcopy lends its own pages.
//!
//! Each reactor copies by itself: the bytes are shared, and overlapping I/O is the initiator's business, as with any
//! disk. `submit` gets a batch so that the blocks of the next I/Os are on their way into the cache while one is copied.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use qpair_memory::{Mapping, MemoryError, Pages, Region, Sge, copy_list};
use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;
use uuid::Uuid;

use crate::{BdevError, Channel, ChannelId, Device, Info, Io, IoId, Layer, Op, OpSet};

/// How many I/Os ahead the first lines of a block are fetched.
const AHEAD: usize = 2;
/// How many I/Os are copied before they are completed: so few that their data leave them in the cache.
const TOGETHER: usize = 8;
/// How many lines of 64 bytes are fetched ahead; the hardware follows from there.
const LINES: u64 = 16;
const PAGE: u64 = 65536;
const COPY_BYTES: usize = 65536;

/// See the module's doc.
pub struct Malloc {
    info: Info,
    memory: Arc<Mapping>,
    /// Of all blocks, one after the other.
    metadata: Option<Arc<Mapping>>,
}

impl Malloc {
    /// Zeroed, on transparent hugepages where the kernel has them.
    pub fn new(
        name: &str,
        block_size: u32,
        num_blocks: u64,
        uuid: Option<Uuid>,
        physical_block_size: u32,
        optimal_io_boundary: u32,
    ) -> Result<Self, BdevError> {
        let mut info = Info::new(name, "malloc", block_size, num_blocks);
        info.uuid = uuid.unwrap_or(info.uuid);
        info.physical_block_size = block_size.max(physical_block_size);
        info.optimal_io_boundary = optimal_io_boundary;
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::WriteZeroes, Op::Unmap, Op::Copy, Op::ZcopyStart, Op::ZcopyEnd, Op::Reset]);
        info.check()?;
        let bytes = usize::try_from(info.bytes()).map_err(|_| BdevError::invalid("num_blocks", num_blocks, "what memory can hold"))?;
        let memory = Mapping::anonymous(bytes, Pages::Transparent)?;
        Ok(Self { info, memory, metadata: None })
    }

    /// With so many bytes of metadata for each block, kept apart from its data.
    pub fn with_metadata(mut self, bytes: u32) -> Result<Self, BdevError> {
        if ![0, 8, 16, 32, 64, 128].contains(&bytes) {
            return Err(BdevError::invalid("md_size", bytes, "0, 8, 16, 32, 64 or 128"));
        }
        self.info.metadata_bytes = bytes;
        if bytes > 0 {
            let length = self.info.num_blocks.checked_mul(u64::from(bytes)).and_then(|length| usize::try_from(length).ok());
            let length = length.ok_or_else(|| BdevError::invalid("num_blocks", self.info.num_blocks, "what memory can hold"))?;
            self.metadata = Some(Mapping::anonymous(length, Pages::Normal)?);
        }
        Ok(self)
    }

    /// With what another process's disk of this shape held: what [`contents`](Self::contents) gave there.
    pub fn with_contents(mut self, contents: OwnedFd) -> Result<Self, BdevError> {
        if let Some(metadata) = &self.metadata {
            let twin = contents.try_clone().map_err(|source| MemoryError::Os { call: "dup", source })?;
            self.metadata = Some(Mapping::sealed(twin, pages(self.memory.len()), metadata.len())?);
        }
        self.memory = Mapping::sealed(contents, 0, self.memory.len())?;
        Ok(self)
    }

    /// All that it holds, as a memfd: blocks, and from the next page on their metadata. What is written meanwhile may be in it or not. Copied once; what came as such a
    /// memfd is one already.
    pub fn contents(&self) -> Result<OwnedFd, BdevError> {
        let duplicate = |mapping: &Mapping| {
            let fd = mapping.fd().map(|fd| fd.try_clone_to_owned());
            fd.transpose().map_err(|source| MemoryError::Os { call: "dup", source })
        };
        if let Some(fd) = duplicate(&self.memory)? {
            return Ok(fd);
        }
        let data = pages(self.memory.len());
        let whole = Mapping::memfd(&self.info.name, data as usize + self.metadata.as_ref().map_or(0, |mapping| mapping.len()))?;
        let into = Region::new(whole.clone());
        copy_what_is_not_zero(&into, 0, &Region::new(self.memory.clone()))?;
        if let Some(metadata) = &self.metadata {
            copy_what_is_not_zero(&into, data, &Region::new(metadata.clone()))?;
        }
        duplicate(&whole)?.ok_or(BdevError::Unsupported("a memfd without a descriptor".into()))
    }
}

/// Rounded up to whole pages, of the largest size that is in use anywhere.
fn pages(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(PAGE)
}

/// What was never written costs no memory in the copy either.
fn copy_what_is_not_zero(into: &Region, at: u64, from: &Region) -> Result<(), MemoryError> {
    let (mut piece, zeros) = (vec![0; COPY_BYTES], vec![0; COPY_BYTES]);
    let mut offset = 0;
    while offset < from.len() {
        let length = (from.len() - offset).min(COPY_BYTES as u64);
        let piece = &mut piece[..length as usize];
        from.read(offset, piece)?;
        if *piece != zeros[..piece.len()] {
            into.write(at + offset, piece)?;
        }
        offset += length;
    }
    Ok(())
}

impl Device for Malloc {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let metadata = self.metadata.as_ref().map(|mapping| (Region::new(mapping.clone()), u64::from(self.info.metadata_bytes)));
        Ok(Box::new(MallocChannel { id, memory: Region::new(self.memory.clone()), metadata, shift: self.info.block_size.trailing_zeros() }))
    }
}

struct MallocChannel {
    id: ChannelId,
    memory: Region,
    /// And how many bytes a block.
    metadata: Option<(Region, u64)>,
    shift: u32,
}

impl MallocChannel {
    #[inline]
    fn perform(&self, io: &Io) -> Result<(), MemoryError> {
        let (offset, length) = (io.lba << self.shift, io.blocks << self.shift);
        match io.op {
            Op::Read => copy_list(&io.list, &self.memory, offset, length, true).map(drop),
            Op::Write => copy_list(&io.list, &self.memory, offset, length, false).map(drop),
            Op::Copy => self.memory.copy_from(offset, &self.memory, io.source_lba << self.shift, length),
            Op::ZcopyStart | Op::ZcopyEnd => Ok(()),
            _ => self.memory.release(offset, length),
        }
    }

    /// What goes with the data, where the disk has such.
    fn perform_metadata(&self, io: &Io) -> Result<(), MemoryError> {
        let Some((metadata, bytes)) = &self.metadata else { return Ok(()) };
        let (offset, length) = (io.lba * bytes, io.blocks * bytes);
        match io.op {
            Op::Read | Op::Write if io.metadata.is_empty() => Ok(()),
            Op::Read => copy_list(&io.metadata, metadata, offset, length, true).map(drop),
            Op::Write => copy_list(&io.metadata, metadata, offset, length, false).map(drop),
            Op::Copy => metadata.copy_from(offset, metadata, io.source_lba * bytes, length),
            Op::ZcopyStart | Op::ZcopyEnd => Ok(()),
            _ => metadata.release(offset, length),
        }
    }

    /// What is lent is the disk itself: giving it back changes nothing, and committing has happened.
    fn lend(&self, io: &mut Io) {
        io.list.clear();
        if io.op == Op::ZcopyStart {
            let (offset, length) = (io.lba << self.shift, (io.blocks << self.shift) as u32);
            io.list.push(Sge { region: self.memory.clone(), offset, length });
        }
    }

    /// Copies a few I/Os and completes them while they are still in the cache.
    fn run(&self, layer: &mut Layer, batch: &[IoId], ahead: &[IoId]) {
        let mut start = 0;
        for (position, id) in batch.iter().enumerate() {
            if let Some(next) = batch[position..].get(AHEAD).or_else(|| ahead.get((position + AHEAD).saturating_sub(batch.len()))) {
                self.memory.prefetch(layer.io(*next).lba << self.shift, LINES);
            }
            if matches!(layer.io(*id).op, Op::ZcopyStart | Op::ZcopyEnd) {
                self.lend(layer.io_mut(*id));
            }
            let io = layer.io(*id);
            if self.perform(io).is_err() || (self.metadata.is_some() && self.perform_metadata(io).is_err()) {
                // A list that leaves its region: the front end's fault, and only this I/O's.
                layer.complete_all(self.id, &batch[start..position], Status::SUCCESS);
                layer.complete(*id, Status::DATA_TRANSFER_ERROR);
                start = position + 1;
            }
        }
        layer.complete_all(self.id, &batch[start..], Status::SUCCESS);
    }
}

impl Channel for MallocChannel {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        let mut rest = batch;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(TOGETHER));
            self.run(layer, now, later);
            rest = later;
        }
    }
}
