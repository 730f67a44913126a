//! One virtio-blk request out of a chain of descriptors (Virtio 1.2, 2.7.5 and 5.2.6).
//!
//! A chain is what the device reads, then what it writes. The first 16 bytes read are the header, the last byte
//! written is the status; how the rest is cut into buffers is the driver's choice, and nothing is assumed about it.
//! The usual cut (a header alone, data, a status alone) takes the short way through.

use qpair_memory::{GuestMemory, Place, SgList, Sge, Shared};
use qpair_wire::virtio::{Desc, DescFlags};
use qpair_wire::virtio_blk::RequestHeader;
use zerocopy::FromBytes;

use crate::{Broken, SplitRing};

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

/// The usual request, by the short way: a header alone, data in one direction and in the likely region, a status alone. None:
/// it is something else, or wrong; `data` is as it was, and [`parse`] finds out.
#[inline]
pub fn parse_usual(ring: &SplitRing, memory: &GuestMemory, head: u16, data: &mut SgList) -> Option<Request> {
    const READ_MORE: u16 = DescFlags::NEXT.bits();
    const WRITE_MORE: u16 = DescFlags::NEXT.bits() | DescFlags::WRITE.bits();
    let first = ring.at(head)?;
    if first.flags.get() != READ_MORE || first.len.get() != 16 {
        return None;
    }
    let (region, header_at) = memory.likely(first.addr.get(), 16)?;
    let header: [u64; 2] = Shared::<[u64; 2]>::read(region, header_at.offset)?;
    let second = ring.at(first.next.get())?;
    let length = second.len.get();
    let (region, place) = memory.likely(second.addr.get(), u64::from(length))?;
    let third = ring.at(second.next.get())?;
    let (_, status) = memory.likely(third.addr.get(), 1)?;
    if third.flags.get() != DescFlags::WRITE.bits() || third.len.get() != 1 || length == 0 {
        return None;
    }
    let (readable, writable) = match second.flags.get() {
        READ_MORE => (u64::from(length), 0),
        WRITE_MORE => (0, u64::from(length)),
        _ => return None,
    };
    data.push(Sge { region: region.clone(), offset: place.offset, length });
    Some(Request { header: zerocopy::transmute!(header), status, writable, readable, header_at: Some(header_at) })
}

/// Where descriptors come from: the ring's table, or an indirect one.
enum Table<'a> {
    Ring(&'a SplitRing),
    Indirect { region: &'a qpair_memory::Region, offset: u64, count: u32 },
}

impl Table<'_> {
    #[inline]
    fn get(&self, index: u16) -> Result<Desc, Broken> {
        match self {
            Self::Ring(ring) => ring.descriptor(index),
            Self::Indirect { region, offset, count } => {
                let mut bytes = [0u8; 16];
                if u32::from(index) >= *count || region.read(offset + 16 * u64::from(index), &mut bytes).is_err() {
                    return Err(Broken::BadIndex { index: u32::from(index), size: *count });
                }
                Ok(zerocopy::transmute!(bytes))
            }
        }
    }
}

/// Walks the chain at `head` and fills `data` with what is neither header nor status. `indirect`: was it negotiated?
#[inline]
pub fn parse(ring: &SplitRing, memory: &GuestMemory, head: u16, indirect: bool, data: &mut SgList) -> Result<Request, Broken> {
    let first = ring.descriptor(head)?;
    let walk = Walk { table: Table::Ring(ring), memory, head, limit: u32::from(ring.size()), indirect };
    walk.run(first, data)
}

/// The table that an indirect descriptor, the `index`th of its chain, points to (2.7.5.3); its WRITE flag means nothing.
fn enter<'a>(memory: &'a GuestMemory, head: u16, index: u32, first: &Desc, indirect: bool) -> Result<Table<'a>, Broken> {
    let bad = |reason| Broken::BadIndirect { head, reason };
    if !indirect {
        return Err(bad("an indirect descriptor, but INDIRECT_DESC was not negotiated"));
    }
    if first.flags().contains(DescFlags::NEXT) {
        return Err(bad("an indirect descriptor has a next one"));
    }
    let length = first.len.get();
    if length == 0 || !length.is_multiple_of(16) || length / 16 > 32768 {
        return Err(bad("an indirect table is empty, larger than 32768 entries, or cut off within one"));
    }
    let address = first.addr.get();
    let unmapped = |_| Broken::Unmapped { head, index, address, length: u64::from(length) };
    let (region, offset) = memory.find(address, u64::from(length)).map_err(unmapped)?;
    Ok(Table::Indirect { region, offset, count: length / 16 })
}

/// A walk along a chain; `limit` is the most descriptors it can have without running in a circle.
struct Walk<'a> {
    table: Table<'a>,
    memory: &'a GuestMemory,
    head: u16,
    limit: u32,
    indirect: bool,
}

impl Walk<'_> {
    #[inline]
    fn run(mut self, first: Desc, data: &mut SgList) -> Result<Request, Broken> {
        let (memory, head) = (self.memory, self.head);
        let mut chain = Chain { head, index: 0, writing: false, readable: 0, writable: 0, header: [0; 16], have: 0, last: None };
        let mut descriptor = first;
        loop {
            if descriptor.flags().contains(DescFlags::INDIRECT) && matches!(self.table, Table::Ring(_)) {
                // The chain goes on, and ends, in the other table.
                self.table = enter(memory, head, chain.index, &descriptor, self.indirect)?;
                self.limit = chain.index + descriptor.len.get() / 16;
                descriptor = self.table.get(0)?;
            }
            chain.add(memory, &descriptor, data)?;
            if !descriptor.flags().contains(DescFlags::NEXT) {
                return chain.finish(memory, data);
            }
            chain.index += 1;
            if chain.index >= self.limit || data.len() > SEGMENTS_MAX {
                return Err(Broken::TooLong { head, limit: self.limit.min(SEGMENTS_MAX as u32) });
            }
            descriptor = self.table.get(descriptor.next.get())?;
        }
    }
}

struct Chain {
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

impl Chain {
    #[inline]
    fn add(&mut self, memory: &GuestMemory, descriptor: &Desc, data: &mut SgList) -> Result<(), Broken> {
        let (mut address, mut length) = (descriptor.addr.get(), descriptor.len.get());
        let (head, index) = (self.head, self.index);
        if length == 0 {
            return Err(Broken::Empty { head, index });
        }
        if descriptor.flags().contains(DescFlags::INDIRECT) {
            return Err(Broken::BadIndirect { head, reason: "an indirect table inside an indirect table" });
        }
        let unmapped = |address, length: u32| Broken::Unmapped { head, index, address, length: u64::from(length) };
        if descriptor.flags().contains(DescFlags::WRITE) {
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
