//! One virtio-blk request out of a chain of descriptors of either kind (Virtio 1.2, 2.7.5, 2.8.5 to 2.8.7 and 5.2.6).
//!
//! A chain is what the device reads, then what it writes. The first 16 bytes read are the header, the last byte
//! written is the status; how the rest is cut into buffers is the driver's choice, and nothing is assumed about it.
//! The usual cut (a header alone, data, a status alone) takes the short way through.

use qpair_memory::{GuestMemory, Place, Region, SgList, Sge, Shared};
use qpair_wire::virtio::{Desc, DescFlags};
use qpair_wire::virtio_blk::RequestHeader;
use qpair_wire::virtio_packed::PackedDesc;
use zerocopy::FromBytes;

use crate::Broken;
use crate::ring::{Buffer, Chain};

/// Most data segments of a request; SEG_MAX in the configuration is less, so that an honest driver never meets it.
pub const SEGMENTS_MAX: usize = 1024;

/// What a chain asks for. Data goes to the list given to [`parse`].
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its first bytes, copied.
    pub header: RequestHeader,
    /// Where the status byte goes.
    pub status: Place,
    /// Bytes of data the device may write, without the status.
    pub writable: u64,
    /// Bytes of data the device may read, without the header.
    pub readable: u64,
    /// Where the header was, if it was in one piece: the driver's next one is likely there again.
    pub header_at: Option<Place>,
}

const MORE: DescFlags = DescFlags::NEXT;
const WRITE_MORE: DescFlags = DescFlags::NEXT.union(DescFlags::WRITE);
const SHAPE: DescFlags = WRITE_MORE.union(DescFlags::INDIRECT);

/// The usual request, by the short way: a header alone, data in one direction and in the likely region, a status alone; in the ring, or all of
/// it in a table. None: it is something else, or wrong; `data` is as it was, and [`parse`] finds out.
// Always: the queue is compiled for rings with and without a log, and what has two callers would be called (40 instructions a request).
#[inline(always)]
pub fn parse_usual<C: Chain>(chain: &mut C, memory: &GuestMemory, indirect: bool, data: &mut SgList) -> Option<Request> {
    let first = chain.first().ok()?;
    let mut rest = None;
    let first = match first.flags.intersection(SHAPE) {
        MORE => first,
        DescFlags::INDIRECT if indirect => {
            let [header, body, status] = three_rows::<C>(memory, &first)?;
            rest = Some((body, status));
            header
        }
        _ => return None,
    };
    if first.flags.intersection(SHAPE) != MORE || first.length != 16 {
        return None;
    }
    let (region, header_at) = memory.likely(first.address, 16)?;
    let header: [u64; 2] = Shared::<[u64; 2]>::read(region, header_at.offset)?;
    let (second, third) = match rest {
        Some(rest) => rest,
        None => {
            let second = chain.next(&first).ok()?;
            if !second.flags.contains(DescFlags::NEXT) {
                return None;
            }
            (second, chain.next(&second).ok()?)
        }
    };
    let length = second.length;
    let (region, place) = memory.likely(second.address, u64::from(length))?;
    let (readable, writable) = match second.flags.intersection(SHAPE) {
        MORE => (u64::from(length), 0),
        WRITE_MORE => (0, u64::from(length)),
        _ => return None,
    };
    let (_, status) = memory.likely(third.address, 1)?;
    if third.flags.intersection(SHAPE) != DescFlags::WRITE || third.length != 1 || length == 0 {
        return None;
    }
    data.push(Sge { region: region.clone(), offset: place.offset, length });
    Some(Request { header: zerocopy::transmute!(header), status, writable, readable, header_at: Some(header_at) })
}

/// A table of just three rows in the likely region, in order.
#[inline]
fn three_rows<C: Chain>(memory: &GuestMemory, first: &Buffer) -> Option<[Buffer; 3]> {
    if first.length != 48 {
        return None;
    }
    let (region, place) = memory.likely(first.address, 48)?;
    let row = |index: u64| -> Option<Buffer> {
        let words: [u64; 2] = Shared::<[u64; 2]>::read(region, place.offset + 16 * index)?;
        Some(if C::LINKED_TABLES { linked(zerocopy::transmute!(words)) } else { listed(zerocopy::transmute!(words), index < 2) })
    };
    let rows = [row(0)?, row(1)?, row(2)?];
    let in_order = !C::LINKED_TABLES || (rows[0].next == 1 && rows[1].next == 2);
    in_order.then_some(rows)
}

fn linked(desc: Desc) -> Buffer {
    Buffer { address: desc.addr.get(), length: desc.len.get(), flags: desc.flags(), next: desc.next.get() }
}

/// A row that others follow, or the last. All its flags but WRITE are ignored (2.8.7), except that a table in a table would be a lie.
fn listed(desc: PackedDesc, more: bool) -> Buffer {
    let mut flags = desc.flags().intersection(DescFlags::WRITE.union(DescFlags::INDIRECT));
    flags.set(DescFlags::NEXT, more);
    Buffer { address: desc.addr.get(), length: desc.len.get(), flags, next: 0 }
}

/// An indirect table that the walk is in.
struct Table<'a> {
    region: &'a Region,
    offset: u64,
    count: u32,
    /// Which is read next where tables are not linked.
    at: u32,
}

impl<'a> Table<'a> {
    /// The table that an indirect descriptor, the `index`th of its chain, points to (2.7.5.3, 2.8.7); its WRITE flag means nothing.
    fn enter(memory: &'a GuestMemory, head: u16, index: u32, first: &Buffer, indirect: bool) -> Result<Self, Broken> {
        let bad = |reason| Broken::BadIndirect { head, reason };
        if !indirect {
            return Err(bad("an indirect descriptor, but INDIRECT_DESC was not negotiated"));
        }
        if first.flags.contains(DescFlags::NEXT) {
            return Err(bad("an indirect descriptor has a next one"));
        }
        let length = first.length;
        if length == 0 || !length.is_multiple_of(16) || length / 16 > 32768 {
            return Err(bad("an indirect table is empty, larger than 32768 entries, or cut off within one"));
        }
        let unmapped = |_| Broken::Unmapped { head, index, address: first.address, length: u64::from(length) };
        let (region, offset) = memory.find(first.address, u64::from(length)).map_err(unmapped)?;
        Ok(Self { region, offset, count: length / 16, at: 0 })
    }

    #[inline]
    fn read(&self, index: u32) -> Result<[u8; 16], Broken> {
        let mut bytes = [0u8; 16];
        if index >= self.count || self.region.read(self.offset + 16 * u64::from(index), &mut bytes).is_err() {
            return Err(Broken::BadIndex { index, size: self.count });
        }
        Ok(bytes)
    }

    #[inline]
    fn linked(&self, index: u16) -> Result<Buffer, Broken> {
        Ok(linked(zerocopy::transmute!(self.read(u32::from(index))?)))
    }

    /// From first to last.
    #[inline]
    fn listed(&mut self) -> Result<Buffer, Broken> {
        let row = self.read(self.at)?;
        self.at += 1;
        Ok(listed(zerocopy::transmute!(row), self.at < self.count))
    }
}

/// Walks the chain and fills `data` with what is neither header nor status. `indirect`: was it negotiated?
#[inline]
pub fn parse<C: Chain>(chain: &mut C, memory: &GuestMemory, indirect: bool, data: &mut SgList) -> Result<Request, Broken> {
    let (head, mut limit) = (chain.head(), chain.limit());
    let mut parts = Parts { head, index: 0, writing: false, readable: 0, writable: 0, header: [0; 16], have: 0, last: None };
    let mut table: Option<Table<'_>> = None;
    let mut buffer = chain.first()?;
    loop {
        if table.is_none() && buffer.flags.contains(DescFlags::INDIRECT) {
            // The chain goes on, and ends, in the other table.
            let entered = table.insert(Table::enter(memory, head, parts.index, &buffer, indirect)?);
            limit = parts.index + entered.count;
            buffer = if C::LINKED_TABLES { entered.linked(0)? } else { entered.listed()? };
        }
        parts.add(memory, &buffer, data)?;
        if !buffer.flags.contains(DescFlags::NEXT) {
            return parts.finish(memory, data);
        }
        parts.index += 1;
        if parts.index >= limit || data.len() > SEGMENTS_MAX {
            return Err(Broken::TooLong { head, limit: limit.min(SEGMENTS_MAX as u32) });
        }
        buffer = match &mut table {
            None => chain.next(&buffer)?,
            Some(table) if C::LINKED_TABLES => table.linked(buffer.next)?,
            Some(table) => table.listed()?,
        };
    }
}

struct Parts {
    head: u16,
    index: u32,
    writing: bool,
    readable: u64,
    writable: u64,
    header: [u8; 16],
    have: usize,
    /// The last buffer to write: its address and length. Its last byte is the status.
    last: Option<(u64, u32)>,
}

impl Parts {
    #[inline]
    fn add(&mut self, memory: &GuestMemory, buffer: &Buffer, data: &mut SgList) -> Result<(), Broken> {
        let (mut address, mut length) = (buffer.address, buffer.length);
        let (head, index) = (self.head, self.index);
        if length == 0 {
            return Err(Broken::Empty { head, index });
        }
        if buffer.flags.contains(DescFlags::INDIRECT) {
            return Err(Broken::BadIndirect { head, reason: "an indirect table inside an indirect table" });
        }
        let unmapped = |address, length: u32| Broken::Unmapped { head, index, address, length: u64::from(length) };
        if buffer.flags.contains(DescFlags::WRITE) {
            // The previous writable buffer was data after all, whole.
            if let Some((address, length)) = self.last.replace((address, length)) {
                let unmapped = |_| Broken::Unmapped { head, index: index - 1, address, length: u64::from(length) };
                memory.resolve(address, length, data).map_err(unmapped)?;
                self.writable += u64::from(length);
            }
            self.writing = true;
            return Ok(());
        }
        if self.writing {
            return Err(Broken::WrongOrder { head, index });
        }
        if self.have < 16 {
            let step = (16 - self.have).min(length as usize);
            let (region, offset) = memory.find(address, step as u64).map_err(|_| unmapped(address, length))?;
            region.read(offset, &mut self.header[self.have..self.have + step]).map_err(|_| unmapped(address, length))?;
            self.have += step;
            (address, length) = (address.wrapping_add(step as u64), length - step as u32);
        }
        if length > 0 {
            memory.resolve(address, length, data).map_err(|_| unmapped(address, length))?;
            self.readable += u64::from(length);
        }
        Ok(())
    }

    #[inline]
    fn finish(mut self, memory: &GuestMemory, data: &mut SgList) -> Result<Request, Broken> {
        let (head, index) = (self.head, self.index);
        if self.have < 16 {
            return Err(Broken::TooShort { head, what: "the header", bytes: self.have as u64, least: 16 });
        }
        let Some((address, length)) = self.last else {
            return Err(Broken::TooShort { head, what: "the writable part", bytes: 0, least: 1 });
        };
        let unmapped = |_| Broken::Unmapped { head, index, address, length: u64::from(length) };
        if length > 1 {
            memory.resolve(address, length - 1, data).map_err(unmapped)?;
            self.writable += u64::from(length - 1);
        }
        let end = address.checked_add(u64::from(length - 1)).ok_or(Broken::Unmapped { head, index, address, length: u64::from(length) })?;
        let status = memory.place(end, 1).map_err(unmapped)?;
        let header = RequestHeader::read_from_bytes(&self.header).unwrap_or_default();
        Ok(Request { header, status, writable: self.writable, readable: self.readable, header_at: None })
    }
}
