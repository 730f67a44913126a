//! The driver's side of a ring of either kind, as a guest has it: any layout of chains, event index or not, indirect or not.
//!
//! A request is two runs of bytes: what the device reads (header, data to write) and what it writes (data read, status). Each run
//! is cut wherever the test likes. Every request has a slot of memory of its own.

#![allow(dead_code)]

pub mod packed;
pub mod split;

use std::collections::BTreeMap;
use std::sync::Arc;

use packed::PackedSide;
use qpair_memory::{GuestMemory, Mapping, Region, SgList};
use qpair_vhost::request::{self, Request};
use qpair_vhost::ring::{Chain, Taken};
use qpair_vhost::{Addresses, Broken, MemoryRow, Source};
use qpair_wire::virtio_blk::{RequestHeader, RequestType};
use split::SplitSide;
use zerocopy::IntoBytes;

/// Guest-physical address of the first byte.
pub const GUEST: u64 = 0x4000_0000;
/// The same byte in the front end.
pub const USER: u64 = 0x7f12_0000_0000;
/// Most bytes of data in a request.
pub const DATA_MAX: u32 = 8192;
const HEADER_AT: u64 = 240;
const DATA_AT: u64 = 256;
const TABLE_AT: u64 = 256 + DATA_MAX as u64 + 256;
const SLOT_BYTES: u64 = TABLE_AT + 64 * 16;

/// The table that shows a whole mapping to the device.
pub fn row(source: Source, length: u64) -> MemoryRow {
    MemoryRow { guest_address: GUEST, length, user_address: USER, offset: 0, source }
}

/// A second mapping of the same memory, for the device alone to hold.
pub fn view(memory: &Mapping) -> Arc<Mapping> {
    Mapping::shared(memory.fd().expect("a memfd"), memory.len() as u64).expect("mapped")
}

/// Which ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Split,
    Packed,
}

impl Kind {
    pub const BOTH: [Self; 2] = [Self::Split, Self::Packed];

    /// What a front end says of a ring that was never used.
    pub fn start(self) -> u32 {
        if self == Self::Packed { 0x8000_8000 } else { 0 }
    }

    /// RING_PACKED, if it is.
    pub fn feature(self) -> u64 {
        if self == Self::Packed { 1 << 34 } else { 0 }
    }
}

/// What to ask for.
#[derive(Clone, Debug)]
pub struct Ask {
    pub kind: RequestType,
    pub sector: u64,
    pub bytes: u32,
    /// Data goes to the device.
    pub out: bool,
    /// Where the readable run is cut, rising, from its start.
    pub read_cuts: Vec<u32>,
    /// Where the writable run is cut.
    pub write_cuts: Vec<u32>,
    /// So many descriptors in the ring; the others in an indirect table.
    pub direct: Option<usize>,
}

impl Ask {
    /// The usual cut: header, data, status.
    pub fn new(kind: RequestType, sector: u64, bytes: u32) -> Self {
        let out = !matches!(kind, RequestType::IN | RequestType::GET_ID);
        let (read_cuts, write_cuts) = if out { (vec![16], vec![]) } else { (vec![], vec![bytes]) };
        Self { kind, sector, bytes, out, read_cuts, write_cuts, direct: None }
    }

    pub fn indirect(mut self) -> Self {
        self.direct = Some(0);
        self
    }

    /// Lengths of the readable and the writable run.
    pub fn runs(&self) -> (u32, u32) {
        if self.out { (16 + self.bytes, 1) } else { (16, self.bytes + 1) }
    }
}

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub head: u16,
    pub slot: usize,
    pub written: u32,
    pub status: u8,
}

struct Asked {
    slot: usize,
    status_at: u64,
}

/// A buffer: guest address, bytes, and flags WRITE or INDIRECT.
pub type Buffer = (u64, u32, u16);
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// What differs between the kinds.
pub enum RingSide {
    Split(SplitSide),
    Packed(PackedSide),
}

macro_rules! side {
    ($driver:expr, $side:ident => $what:expr) => {
        match $driver {
            RingSide::Split($side) => $what,
            RingSide::Packed($side) => $what,
        }
    };
}

/// One ring and its driver.
pub struct Driver {
    pub region: Region,
    pub event_idx: bool,
    pub side: RingSide,
    size: u16,
    slots_at: u64,
    free_slots: Vec<usize>,
    chains: BTreeMap<u16, Asked>,
}

impl Driver {
    /// Bytes that a ring of `size` with `slots` needs, of whatever kind.
    pub fn bytes(size: u16, slots: usize) -> u64 {
        Self::slots_offset(size) + slots as u64 * SLOT_BYTES
    }

    fn slots_offset(size: u16) -> u64 {
        (u64::from(size) * 26 + 64).next_multiple_of(4096)
    }

    /// A ring at `at` of the memory that was never used; or as one whose indices came to `base`, which a device is told.
    pub fn new(kind: Kind, memory: &Arc<Mapping>, at: u64, size: u16, slots: usize, event_idx: bool, base: u32) -> Self {
        let region = Region::new(memory.clone());
        let slots_at = at + Self::slots_offset(size);
        region.fill(at, Self::slots_offset(size), 0).unwrap();
        let side = match kind {
            Kind::Split => RingSide::Split(SplitSide::new(&region, at, size, event_idx, base as u16)),
            Kind::Packed => RingSide::Packed(PackedSide::new(&region, at, size, event_idx, base)),
        };
        Self { region, event_idx, side, size, slots_at, free_slots: (0..slots).rev().collect(), chains: BTreeMap::new() }
    }

    pub fn kind(&self) -> Kind {
        if matches!(self.side, RingSide::Split(_)) { Kind::Split } else { Kind::Packed }
    }

    /// The split ring's side. Panics if it is none.
    pub fn split(&mut self) -> &mut SplitSide {
        let RingSide::Split(side) = &mut self.side else { panic!("a packed ring") };
        side
    }

    /// As [`split`](Self::split), to look and to store.
    pub fn as_split(&self) -> &SplitSide {
        let RingSide::Split(side) = &self.side else { panic!("a packed ring") };
        side
    }

    /// The packed ring's side. Panics if it is none.
    pub fn packed(&mut self) -> &mut PackedSide {
        let RingSide::Packed(side) = &mut self.side else { panic!("a split ring") };
        side
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn addresses(&self) -> Addresses {
        side!(&self.side, side => side.addresses())
    }

    /// Guest address of a slot's data.
    pub fn data_at(&self, slot: usize) -> u64 {
        self.slot_at(slot) + DATA_AT
    }

    fn slot_at(&self, slot: usize) -> u64 {
        self.slots_at + slot as u64 * SLOT_BYTES
    }

    pub fn outstanding(&self) -> usize {
        self.chains.len()
    }

    /// The slot that the next request will use.
    pub fn next_slot(&self) -> Option<usize> {
        self.free_slots.last().copied()
    }

    pub fn fill(&self, slot: usize, bytes: u32, value: u8) {
        self.region.fill(self.data_at(slot), u64::from(bytes), value).unwrap();
    }

    pub fn read(&self, slot: usize, bytes: u32) -> Vec<u8> {
        let mut data = vec![0; bytes as usize];
        self.region.read(self.data_at(slot), &mut data).unwrap();
        data
    }

    pub fn write(&self, slot: usize, bytes: &[u8]) {
        self.region.write(self.data_at(slot), bytes).unwrap();
    }

    /// Puts a request into the ring: not seen by the device before [`publish`](Self::publish). None: no room.
    pub fn add(&mut self, ask: &Ask) -> Option<(u16, usize)> {
        let slot = *self.free_slots.last()?;
        let at = self.slot_at(slot);
        let (readable, writable) = ask.runs();
        let header = RequestHeader::new(ask.kind, ask.sector);
        self.region.write(at + HEADER_AT, header.as_bytes()).unwrap();
        let status_at = at + DATA_AT + u64::from(ask.bytes);
        self.region.fill(status_at, 1, 0xff).unwrap();
        let mut pieces = cut(at + HEADER_AT, readable, &ask.read_cuts, 0);
        pieces.extend(cut(at + DATA_AT + if ask.out { u64::from(ask.bytes) } else { 0 }, writable, &ask.write_cuts, WRITE));
        // A packed ring's chain is direct or a table, never both.
        let tabled = ask.direct.is_some_and(|direct| direct < pieces.len());
        let direct = match ask.direct {
            Some(direct) if tabled && self.kind() == Kind::Split => direct.min(pieces.len() - 1),
            Some(_) if tabled => 0,
            _ => pieces.len(),
        };
        let mut buffers = pieces[..direct].to_vec();
        if tabled {
            let table = side!(&self.side, side => side.table(&pieces[direct..]));
            self.region.write(at + TABLE_AT, &table).unwrap();
            buffers.push((GUEST + at + TABLE_AT, table.len() as u32, INDIRECT));
        }
        let id = side!(&mut self.side, side => side.put(&buffers))?;
        self.free_slots.pop();
        let before = self.chains.insert(id, Asked { slot, status_at });
        assert!(before.is_none(), "the test's driver gave id {id} twice");
        Some((id, slot))
    }

    /// Shows the requests to the device. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        side!(&mut self.side, side => side.publish())
    }

    /// Where the ring stands when all is answered that the device has shown: what a device that stopped must say.
    pub fn base(&self) -> u32 {
        side!(&self.side, side => side.base())
    }

    /// Asks for an interrupt at the next answer, or for none. False: there are answers already.
    pub fn want_interrupts(&self, wanted: bool) -> bool {
        side!(&self.side, side => side.want_interrupts(wanted))
    }

    /// Whether there is an answer to take.
    pub fn answered(&self) -> bool {
        side!(&self.side, side => side.answered())
    }

    /// Breaks a rule; the device must end the ring. Its number chooses how.
    pub fn lie(&mut self, choice: u64, noise: u64) {
        side!(&mut self.side, side => side.lie(choice, noise));
    }

    /// Takes an answer. Panics if it answers nothing that was asked: an entry too many, or one twice.
    pub fn reap(&mut self) -> Option<Done> {
        let (id, written) = side!(&mut self.side, side => side.reap())?;
        let chain = self.chains.remove(&id).unwrap_or_else(|| panic!("used entry for {id}, which is not in flight"));
        let mut status = [0];
        self.region.read(chain.status_at, &mut status).unwrap();
        self.free_slots.push(chain.slot);
        Some(Done { head: id, slot: chain.slot, written, status: status[0] })
    }
}

/// Parses the long way, and looks that the short way, where it goes, comes to the same.
pub fn parse<C: Chain>(mut chain: C, memory: &GuestMemory) -> Result<(Request, SgList, Taken), Broken> {
    let (mut quick, mut data) = (SgList::new(), SgList::new());
    let usual = request::parse_usual(&mut chain, memory, true, &mut quick).map(|request| (request, chain.taken()));
    let found = request::parse(&mut chain, memory, true, &mut data).map(|request| (request, data, chain.taken()));
    if let Some((usual, taken)) = usual {
        let (request, data, walked) = found.as_ref().expect("the long way refuses what the short way takes");
        let parts = |request: &Request| (request.header, memory.at(request.status).1, request.readable, request.writable);
        let places = |list: &SgList| list.iter().map(|entry| (entry.offset, entry.length)).collect::<Vec<_>>();
        assert_eq!((parts(&usual), places(&quick), taken), (parts(request), places(data), *walked));
    }
    found
}

fn cut(at: u64, bytes: u32, cuts: &[u32], flags: u16) -> Vec<Buffer> {
    let mut pieces = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().filter(|cut| *cut < bytes).chain([bytes]) {
        if to > from {
            pieces.push((GUEST + at + u64::from(from), to - from, flags));
            from = to;
        }
    }
    pieces
}
