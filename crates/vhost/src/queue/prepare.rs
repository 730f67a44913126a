//! From one request to its I/Os: what a read, write, flush, discard, write-zeroes or get-id needs (Virtio 1.2, 5.2.6).

use qpair_bdev::{Io, IoFlags, IoId, Layer, Op};
use qpair_wire::virtio_blk::{BlkStatus, ID_BYTES, RequestType, SECTOR_BYTES, Segment};
use zerocopy::FromBytes;

use super::Queue;
use crate::config::{RANGES_MAX, serial};
use crate::request::Request;
use crate::ring::Kind;

impl<R: Kind> Queue<R> {
    /// Whether a read or write is in whole blocks.
    #[inline]
    pub(super) fn fits_blocks(&self, request: &Request) -> bool {
        let bytes = request.readable + request.writable;
        let within_block = (1u64 << self.block_shift) - 1;
        let within_sectors = within_block >> SECTOR_BYTES.trailing_zeros();
        bytes & within_block == 0 && request.header.sector.get() & within_sectors == 0
    }

    /// Fills in the I/O (and more of them, for several ranges) and puts it on the batch.
    #[inline]
    pub(super) fn prepare(&mut self, layer: &mut Layer, id: IoId, name: u16, request: &Request) -> Result<(), Refused> {
        let bad = Refused::Answer(BlkStatus::IOERR);
        match request.header.kind() {
            RequestType::IN | RequestType::OUT => usual(request).map_or(Err(bad), |op| self.transfer(layer, id, name, op, request)),
            RequestType::FLUSH => {
                let io = layer.io_mut(id);
                (io.op, io.lba, io.blocks) = (Op::Flush, 0, 0);
                io.list.clear();
                self.enlist(layer, id, name);
                Ok(())
            }
            RequestType::GET_ID => Err(Refused::Answer(self.write_id(layer, id, name, request))),
            RequestType::DISCARD => self.ranges(layer, id, name, Op::Unmap, request),
            RequestType::WRITE_ZEROES => self.ranges(layer, id, name, Op::WriteZeroes, request),
            _ => Err(Refused::Answer(BlkStatus::UNSUPP)),
        }
    }

    #[inline]
    fn enlist(&mut self, layer: &mut Layer, id: IoId, name: u16) {
        layer.io_mut(id).push(self.completions, u64::from(name));
        self.slots[usize::from(name)].pending += 1;
        self.batch.push(id);
    }

    #[inline]
    fn transfer(&mut self, layer: &mut Layer, id: IoId, name: u16, op: Op, request: &Request) -> Result<(), Refused> {
        let bytes = request.readable + request.writable;
        let allowed = op == Op::Read || !self.setup.readonly;
        if bytes == 0 || !allowed || !self.fits_blocks(request) {
            return Err(Refused::Answer(BlkStatus::IOERR));
        }
        let io = layer.io_mut(id);
        self.slots[usize::from(name)].written = fill(io, op, request, self.block_shift);
        io.flags.set(IoFlags::FUA, op == Op::Write && self.setup.durable);
        self.enlist(layer, id, name);
        Ok(())
    }

    /// Discard and write-zeroes: one I/O for each range (5.2.6).
    fn ranges(&mut self, layer: &mut Layer, first: IoId, name: u16, op: Op, request: &Request) -> Result<(), Refused> {
        let bad = Refused::Answer(BlkStatus::IOERR);
        let count = (request.readable / 16) as usize;
        let whole = request.readable.is_multiple_of(16) && request.writable == 0 && (1..=RANGES_MAX).contains(&count);
        if self.setup.readonly || !whole {
            return Err(bad);
        }
        let mut bytes = [0u8; 16 * RANGES_MAX];
        gather(&layer.io(first).list, &mut bytes[..16 * count]).map_err(|()| Refused::Answer(BlkStatus::IOERR))?;
        let sectors_shift = self.block_shift - SECTOR_BYTES.trailing_zeros();
        let mut ranges = [(0u64, 0u64, false); RANGES_MAX];
        for (range, bytes) in ranges.iter_mut().zip(bytes.chunks_exact(16)).take(count) {
            let segment = Segment::read_from_bytes(bytes).unwrap_or_default();
            let (sector, sectors, flags) = (segment.sector.get(), u64::from(segment.num_sectors.get()), segment.flags.get());
            if flags & !1 != 0 || (op == Op::Unmap && flags != 0) {
                return Err(Refused::Answer(BlkStatus::UNSUPP));
            }
            if (sector | sectors) & ((1 << sectors_shift) - 1) != 0 {
                return Err(bad);
            }
            *range = (sector >> sectors_shift, sectors >> sectors_shift, flags & 1 != 0);
        }
        if layer.ios().1 < count {
            return Err(Refused::NoRoom);
        }
        layer.io_mut(first).list.clear();
        for (position, (lba, blocks, unmap)) in ranges[..count].iter().enumerate() {
            let id = if position == 0 { first } else { layer.take().ok_or(Refused::NoRoom)? };
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks) = (op, *lba, *blocks);
            io.flags.set(IoFlags::NO_UNMAP, op == Op::WriteZeroes && !unmap);
            io.flags.set(IoFlags::FUA, op == Op::WriteZeroes && self.setup.durable);
            self.enlist(layer, id, name);
        }
        Ok(())
    }

    /// GET_ID: the serial into the data buffer, as much as fits.
    fn write_id(&mut self, layer: &mut Layer, id: IoId, name: u16, request: &Request) -> BlkStatus {
        let Some(info) = self.setup.descriptor.info() else { return BlkStatus::IOERR };
        if request.readable != 0 || request.writable == 0 {
            return BlkStatus::IOERR;
        }
        let serial = serial(&info);
        let mut rest = &serial[..ID_BYTES.min(request.writable as usize)];
        self.slots[usize::from(name)].written = rest.len() as u32 + 1;
        for entry in &layer.io(id).list {
            let (now, later) = rest.split_at(rest.len().min(entry.length as usize));
            if entry.region.write(entry.offset, now).is_err() {
                return BlkStatus::IOERR;
            }
            rest = later;
        }
        BlkStatus::OK
    }
}

/// Makes a read or write of a request that fits blocks; returns the used length of its success.
#[inline]
pub(super) fn fill(io: &mut Io, op: Op, request: &Request, block_shift: u32) -> u32 {
    let bytes = request.readable + request.writable;
    let sectors_shift = block_shift - SECTOR_BYTES.trailing_zeros();
    (io.op, io.lba, io.blocks) = (op, request.header.sector.get() >> sectors_shift, bytes >> block_shift);
    // The used length covers the status byte too (2.7.8); a longer one cannot be told in 32 bits.
    if op == Op::Read { u32::try_from(bytes + 1).unwrap_or(u32::MAX) } else { 1 }
}

/// The operation of a read or write whose data goes the right way.
#[inline]
pub(super) fn usual(request: &Request) -> Option<Op> {
    match request.header.kind() {
        RequestType::IN if request.readable == 0 => Some(Op::Read),
        RequestType::OUT if request.writable == 0 => Some(Op::Write),
        _ => None,
    }
}

pub(super) enum Refused {
    Answer(BlkStatus),
    NoRoom,
}

/// Copies a list's first bytes out.
fn gather(list: &[qpair_memory::Sge], into: &mut [u8]) -> Result<(), ()> {
    let mut at = 0;
    for entry in list {
        let step = (into.len() - at).min(entry.length as usize);
        entry.region.read(entry.offset, &mut into[at..at + step]).map_err(|_| ())?;
        at += step;
    }
    if at == into.len() { Ok(()) } else { Err(()) }
}
