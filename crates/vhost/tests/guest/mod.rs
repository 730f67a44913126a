//! The driver's side of a split ring, as a guest has it: any layout of chains, event index or not, indirect or not.
//!
//! A request is two runs of bytes: what the device reads (header, data to write) and what it writes (data read, status). Each run
//! is cut wherever the test likes. Every request has a slot of memory of its own.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use qpair_memory::{Mapping, Region, Shared, SharedIndex};
use qpair_vhost::{Addresses, MemoryRow, Source};
use qpair_wire::virtio::{AvailFlags, Desc, DescFlags, RingLayout, RingSize, UsedFlags, need_event};
use qpair_wire::virtio_blk::{RequestHeader, RequestType};
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

struct Chain {
    slot: usize,
    descriptors: Vec<u16>,
    status_at: u64,
}

/// One ring and its driver.
pub struct Driver {
    pub region: Region,
    pub size: RingSize,
    pub event_idx: bool,
    pub avail_idx: u16,
    pub last_used: u16,
    kicked: u16,
    layout: RingLayout,
    desc: Shared<[u64; 2]>,
    avail: Shared<u16>,
    used: Shared<[u32; 2]>,
    avail_index: SharedIndex,
    used_index: SharedIndex,
    avail_flags: SharedIndex,
    used_flags: SharedIndex,
    used_event: SharedIndex,
    avail_event: SharedIndex,
    slots_at: u64,
    free_descriptors: Vec<u16>,
    free_slots: Vec<usize>,
    chains: BTreeMap<u16, Chain>,
}

impl Driver {
    /// Bytes that a ring of `size` with `slots` needs.
    pub fn bytes(size: RingSize, slots: usize) -> u64 {
        let end = size.layout(0, 4).expect("a layout").end;
        end.next_multiple_of(4096) + slots as u64 * SLOT_BYTES
    }

    /// A ring at `at` of the memory, its indices at `base`.
    pub fn new(memory: &Arc<Mapping>, at: u64, size: RingSize, slots: usize, event_idx: bool, base: u16) -> Self {
        let region = Region::new(memory.clone());
        let layout = size.layout(at, 4).expect("a layout");
        region.fill(at, layout.end - at, 0).unwrap();
        let entries = usize::from(size.get());
        let index = |at| SharedIndex::new(&region, at).unwrap();
        let (avail_index, used_index) = (index(layout.avail + 2), index(layout.used + 2));
        avail_index.store(base, Ordering::Relaxed);
        used_index.store(base, Ordering::Relaxed);
        Self {
            avail_flags: index(layout.avail),
            used_flags: index(layout.used),
            used_event: index(layout.avail + size.used_event_offset()),
            avail_event: index(layout.used + size.avail_event_offset()),
            desc: Shared::new(&region, layout.desc, entries).unwrap(),
            avail: Shared::new(&region, layout.avail + 4, entries).unwrap(),
            used: Shared::new(&region, layout.used + 4, entries).unwrap(),
            avail_index,
            used_index,
            slots_at: layout.end.next_multiple_of(4096),
            free_descriptors: (0..size.get()).rev().collect(),
            free_slots: (0..slots).rev().collect(),
            chains: BTreeMap::new(),
            avail_idx: base,
            last_used: base,
            kicked: base,
            region,
            size,
            event_idx,
            layout,
        }
    }

    pub fn addresses(&self) -> Addresses {
        Addresses { desc: USER + self.layout.desc, avail: USER + self.layout.avail, used: USER + self.layout.used }
    }

    /// Where the ring's areas and slots lie in the memory.
    pub fn layout(&self) -> RingLayout {
        self.layout
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

    pub fn store_descriptor(&self, index: u16, desc: Desc) {
        self.desc.store(usize::from(index), zerocopy::transmute!(desc));
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
        let mut pieces = cut(at + HEADER_AT, readable, &ask.read_cuts, false);
        pieces.extend(cut(at + DATA_AT + if ask.out { u64::from(ask.bytes) } else { 0 }, writable, &ask.write_cuts, true));
        let direct = ask.direct.map_or(pieces.len(), |direct| direct.min(pieces.len() - 1));
        let count = direct + usize::from(direct < pieces.len());
        if self.free_descriptors.len() < count {
            return None;
        }
        let descriptors = self.free_descriptors.split_off(self.free_descriptors.len() - count);
        for (position, index) in descriptors.iter().enumerate() {
            let next = descriptors.get(position + 1).copied();
            let desc = if position < direct { describe(pieces[position], next) } else { self.table(at, &pieces[direct..]) };
            self.store_descriptor(*index, desc);
        }
        self.free_slots.pop();
        let head = descriptors[0];
        self.chains.insert(head, Chain { slot, descriptors, status_at });
        self.push(head);
        Some((head, slot))
    }

    fn table(&self, slot_at: u64, pieces: &[Piece]) -> Desc {
        for (position, piece) in pieces.iter().enumerate() {
            let next = (position + 1 < pieces.len()).then_some(position as u16 + 1);
            self.region.write(slot_at + TABLE_AT + 16 * position as u64, describe(*piece, next).as_bytes()).unwrap();
        }
        Desc::new(GUEST + slot_at + TABLE_AT, 16 * pieces.len() as u32, DescFlags::INDIRECT, 0)
    }

    /// Puts any head into the avail ring.
    pub fn push(&mut self, head: u16) {
        self.avail.store(usize::from(self.size.slot(self.avail_idx)), head.to_le());
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Shows the requests to the device. True: it wants a kick.
    pub fn publish(&mut self) -> bool {
        self.avail_index.store(self.avail_idx, Ordering::Release);
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.avail_idx);
        if self.event_idx {
            need_event(self.avail_event.load(Ordering::Relaxed), self.avail_idx, old)
        } else {
            self.used_flags.load(Ordering::Relaxed) & UsedFlags::NO_NOTIFY.bits() == 0
        }
    }

    /// Shows the device any avail index.
    pub fn publish_index(&mut self, index: u16) {
        self.avail_index.store(index, Ordering::Release);
    }

    /// The device's used index.
    pub fn used_index(&self) -> u16 {
        self.used_index.load(Ordering::Acquire)
    }

    /// Asks for an interrupt at the next answer, or for none. False: there are answers already.
    pub fn want_interrupts(&self, wanted: bool) -> bool {
        if self.event_idx {
            self.used_event.store(if wanted { self.last_used } else { self.last_used.wrapping_sub(1) }, Ordering::Relaxed);
        } else {
            let flags = if wanted { AvailFlags::empty() } else { AvailFlags::NO_INTERRUPT };
            self.avail_flags.store(flags.bits(), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used_index() == self.last_used
    }

    /// Takes an answer. Panics if it answers nothing that was asked: an entry too many, or one twice.
    pub fn reap(&mut self) -> Option<Done> {
        if self.used_index() == self.last_used {
            return None;
        }
        let [head, written] = self.used.load(usize::from(self.size.slot(self.last_used)));
        let (head, written) = (u32::from_le(head) as u16, u32::from_le(written));
        self.last_used = self.last_used.wrapping_add(1);
        let chain = self.chains.remove(&head).unwrap_or_else(|| panic!("used entry for head {head}, which is not in flight"));
        let mut status = [0];
        self.region.read(chain.status_at, &mut status).unwrap();
        self.free_descriptors.extend(&chain.descriptors);
        self.free_slots.push(chain.slot);
        Some(Done { head, slot: chain.slot, written, status: status[0] })
    }
}

type Piece = (u64, u32, bool);

fn cut(at: u64, bytes: u32, cuts: &[u32], write: bool) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().filter(|cut| *cut < bytes).chain([bytes]) {
        if to > from {
            pieces.push((at + u64::from(from), to - from, write));
            from = to;
        }
    }
    pieces
}

fn describe((at, length, write): Piece, next: Option<u16>) -> Desc {
    let mut flags = DescFlags::empty();
    flags.set(DescFlags::WRITE, write);
    flags.set(DescFlags::NEXT, next.is_some());
    Desc::new(GUEST + at, length, flags, next.unwrap_or(0))
}
