//! Is this I/O one that the device can do as it is? Ranges, sizes and abilities are checked here and nowhere else.

use qpair_wire::nvme::Status;

use super::emulate::LENT_BYTES_MAX;
use super::split::spans_too_much;
use crate::{Info, Io, IoFlags, Op, ZoneAction};

/// What becomes of an I/O.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// To the device as it is.
    Plain,
    /// In parts.
    Split,
    /// By other operations, one after the other.
    Emulate,
    /// By draining all channels.
    Reset,
    /// Not to the device at all.
    Answer(Status),
}

/// The fast question for reads and writes; everything else takes [`route`].
#[inline(always)]
pub(super) fn is_plain(info: &Info, io: &Io) -> bool {
    let writes = io.op == Op::Write;
    (writes || io.op == Op::Read)
        && !(writes && info.readonly)
        && io.blocks != 0
        && io.lba < info.num_blocks
        && io.blocks <= info.num_blocks - io.lba
        && fits(info, io)
        && info.zoned.as_ref().is_none_or(|zoned| zoned.holds(io.lba, io.blocks))
        && (u32::from(io.sized) == info.block_size.trailing_zeros() || io.list_bytes() == io.blocks << info.block_size.trailing_zeros())
        && (info.metadata_bytes == 0 || metadata_fits(info, io))
        && (!writes || info.write_unit_blocks == 1)
}

/// Whether every I/O that [`is_plain`] for `above` is so for `below`, `shift` blocks further on.
#[inline]
pub(super) fn covers(below: &Info, above: &Info, shift: u64) -> bool {
    let unlimited = below.max_io_blocks == 0 && below.max_segments == 0 && !below.split_on_boundary && below.zoned.is_none();
    unlimited
        && below.block_size == above.block_size
        && shift.checked_add(above.num_blocks).is_some_and(|end| end <= below.num_blocks)
        && (above.readonly || !below.readonly)
        && below.write_unit_blocks == 1
        && (below.metadata_bytes == 0 || below.metadata_bytes == above.metadata_bytes)
}

#[inline]
fn fits(info: &Info, io: &Io) -> bool {
    (info.max_io_blocks == 0 || io.blocks <= u64::from(info.max_io_blocks))
        && (info.max_segments == 0 || io.list.len() <= info.max_segments as usize)
        && (!info.split_on_boundary || !crosses(info, io))
}

/// Metadata is for those who want it. Devices without any ignore it: to look would cost each I/O a cache line.
fn metadata_fits(info: &Info, io: &Io) -> bool {
    io.metadata.is_empty() || io.metadata_bytes() == io.blocks * u64::from(info.metadata_bytes)
}

fn crosses(info: &Info, io: &Io) -> bool {
    let boundary = u64::from(info.optimal_io_boundary);
    boundary != 0 && io.lba / boundary != (io.lba + io.blocks - 1) / boundary
}

/// The whole question.
pub(super) fn route(info: &Info, io: &Io) -> Route {
    let changes = matches!(
        io.op,
        Op::Write
            | Op::Unmap
            | Op::WriteZeroes
            | Op::CompareAndWrite
            | Op::Copy
            | Op::ZoneAppend
            | Op::ZoneManagement
            | Op::WriteUncorrectable
    ) && !(io.op == Op::ZoneManagement && io.command[0] == ZoneAction::Report as u8)
        || (io.op == Op::ZcopyEnd && io.flags.contains(IoFlags::COMMIT));
    if changes && info.readonly {
        return Route::Answer(Status::NAMESPACE_WRITE_PROTECTED);
    }
    match io.op {
        Op::Reset => return Route::Reset,
        Op::Flush if !info.write_cache => return Route::Answer(Status::SUCCESS),
        Op::Flush | Op::NvmeIo | Op::NvmeAdmin if info.supported.has(io.op) => return Route::Plain,
        Op::WriteZeroes if !info.supported.has(io.op) && info.supported.has(Op::Write) => {}
        _ if !info.supported.has(io.op) && !can_emulate(info, io.op) => return Route::Answer(Status::INVALID_OPCODE),
        _ => {}
    }
    if io.blocks == 0 {
        return Route::Answer(Status::INVALID_FIELD);
    }
    if io.lba >= info.num_blocks || io.blocks > info.num_blocks - io.lba {
        return Route::Answer(Status::LBA_OUT_OF_RANGE);
    }
    if let Some(status) = info.zoned.as_ref().and_then(|zoned| zoned.refuses(io)) {
        return Route::Answer(status);
    }
    match io.op {
        Op::Read | Op::Write => transfer(info, io),
        Op::Unmap | Op::WriteZeroes => range(info, io),
        Op::Compare => whole(info, io, 1),
        Op::ZoneAppend if fits(info, io) => whole(info, io, 1),
        Op::ZoneAppend => Route::Answer(Status::INVALID_FIELD),
        Op::CompareAndWrite if !in_units(info, io) => Route::Answer(Status::INVALID_FIELD),
        Op::CompareAndWrite => whole(info, io, 2),
        Op::Copy => copy(info, io),
        Op::ZcopyStart | Op::ZcopyEnd => lend(info, io),
        _ => Route::Plain,
    }
}

/// Whether the layer knows how to do this by reads and writes.
pub(crate) fn can_emulate(info: &Info, op: Op) -> bool {
    let (reads, writes) = (info.supported.has(Op::Read), info.supported.has(Op::Write));
    // What is composed moves data alone.
    let plain = info.zoned.is_none() && info.metadata_bytes == 0;
    match op {
        Op::Compare => reads,
        // Both halves by the same side, or what one lends the other would be asked to take back.
        Op::ZcopyStart | Op::ZcopyEnd => reads && writes && !info.supported.has(Op::ZcopyStart) && plain,
        Op::CompareAndWrite | Op::Copy => reads && writes && plain,
        _ => false,
    }
}

fn copy(info: &Info, io: &Io) -> Route {
    if io.source_lba >= info.num_blocks || io.blocks > info.num_blocks - io.source_lba {
        return Route::Answer(Status::LBA_OUT_OF_RANGE);
    }
    if !in_units(info, io) {
        return Route::Answer(Status::INVALID_FIELD);
    }
    if info.supported.has(Op::Copy) { Route::Plain } else { Route::Emulate }
}

/// Memory is lent for a range: none of the front end's when it is asked for, all of the range's when it is given back.
fn lend(info: &Info, io: &Io) -> Route {
    let bytes = io.blocks << info.block_size.trailing_zeros();
    let expected = if io.op == Op::ZcopyStart { 0 } else { bytes };
    if io.list_bytes() != expected || bytes > LENT_BYTES_MAX || !in_units(info, io) {
        return Route::Answer(Status::INVALID_FIELD);
    }
    if info.supported.has(Op::ZcopyStart) { Route::Plain } else { Route::Emulate }
}

fn transfer(info: &Info, io: &Io) -> Route {
    let metadata_fits = info.metadata_bytes == 0 || metadata_fits(info, io);
    if io.list_bytes() != io.blocks << info.block_size.trailing_zeros() || !metadata_fits || (io.op == Op::Write && !in_units(info, io)) {
        return Route::Answer(Status::INVALID_FIELD);
    }
    if fits(info, io) {
        return Route::Plain;
    }
    if spans_too_much(info, io) { Route::Answer(Status::INVALID_SGL_COUNT) } else { Route::Split }
}

fn range(info: &Info, io: &Io) -> Route {
    let limit = u64::from(info.max_unmap_blocks);
    if info.supported.has(io.op) {
        return if limit != 0 && io.blocks > limit { Route::Split } else { Route::Plain };
    }
    if in_units(info, io) { Route::Split } else { Route::Answer(Status::INVALID_FIELD) }
}

/// What has data, `times` the range's bytes, and means something as a whole only: what the device does not take so, is emulated.
fn whole(info: &Info, io: &Io, times: u64) -> Route {
    let bytes = (io.blocks << info.block_size.trailing_zeros()).checked_mul(times);
    if Some(io.list_bytes()) != bytes {
        return Route::Answer(Status::INVALID_FIELD);
    }
    match info.supported.has(io.op) && fits(info, io) {
        true => Route::Plain,
        false if can_emulate(info, io.op) => Route::Emulate,
        false => Route::Answer(Status::INVALID_FIELD),
    }
}

fn in_units(info: &Info, io: &Io) -> bool {
    let unit = u64::from(info.write_unit_blocks);
    io.lba.is_multiple_of(unit) && io.blocks.is_multiple_of(unit)
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
