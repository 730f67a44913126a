//! A packed ring's driver: the specification's rules in plain steps, sharing nothing with the device's side but the memory.
//!
//! Virtio 1.2, 2.8. Indices and wrap counters are kept apart, descriptors are bytes, and what the other side may do next is walked, not calculated.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use qpair_memory::{Region, Shared};
use qpair_vhost::Addresses;

use super::{Buffer, GUEST, USER};

const NEXT: u16 = 1;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// An index and its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub index: u16,
    pub wrap: bool,
}

impl At {
    fn step(&mut self, size: u16) {
        self.index += 1;
        if self.index == size {
            (self.index, self.wrap) = (0, !self.wrap);
        }
    }

    fn stepped(mut self, size: u16, count: u16) -> Self {
        (0..count).for_each(|_| self.step(size));
        self
    }

    fn bits(self) -> u32 {
        u32::from(self.index) | if self.wrap { 0x8000 } else { 0 }
    }
}

pub struct PackedSide {
    region: Region,
    at: u64,
    size: u16,
    event_idx: bool,
    flags: Shared<u16>,
    events: Shared<u16>,
    pub next: At,
    pub last_used: At,
    /// Descriptors that are the device's.
    pub out: u16,
    /// What the first descriptor's flags will be when the batch is shown, and where.
    first: Option<(At, u16)>,
    /// How many descriptors were made available since the last kick was thought of.
    fresh: u32,
    free_ids: Vec<u16>,
    /// Descriptors of each chain.
    pub counts: BTreeMap<u16, u16>,
}

impl PackedSide {
    pub fn new(region: &Region, at: u64, size: u16, event_idx: bool, base: u32) -> Self {
        let start = At { index: base as u16 & 0x7fff, wrap: base & 0x8000 != 0 };
        let events_at = at + 16 * u64::from(size);
        let mut side = Self {
            flags: Shared::new(region, at, 8 * usize::from(size)).unwrap(),
            events: Shared::new(region, events_at, 4).unwrap(),
            region: region.clone(),
            at,
            size,
            event_idx,
            next: start,
            last_used: start,
            out: 0,
            first: None,
            fresh: 0,
            free_ids: (0..size).rev().collect(),
            counts: BTreeMap::new(),
        };
        side.age(start);
        side
    }

    /// A ring that came to a later position: what is behind it was used in this lap, what is before it in the one before.
    fn age(&mut self, start: At) {
        for index in 0..self.size {
            let lap = if index < start.index { start.wrap } else { !start.wrap };
            self.set_flags(index, if lap { AVAIL | USED } else { 0 });
        }
    }

    pub fn addresses(&self) -> Addresses {
        let events_at = USER + self.at + 16 * u64::from(self.size);
        Addresses { desc: USER + self.at, avail: events_at, used: events_at + 4, log: None }
    }

    pub fn flags(&self, index: u16) -> u16 {
        self.flags.load_atomic(usize::from(index) * 8 + 7, Ordering::Acquire)
    }

    pub fn set_flags(&self, index: u16, flags: u16) {
        self.flags.store_atomic(usize::from(index) * 8 + 7, flags, Ordering::Release);
    }

    /// All of a descriptor but its flags.
    pub fn set_descriptor(&self, index: u16, address: u64, length: u32, id: u16) {
        let place = self.at + 16 * u64::from(index);
        self.region.write(place, &address.to_le_bytes()).unwrap();
        self.region.write(place + 8, &length.to_le_bytes()).unwrap();
        self.region.write(place + 12, &id.to_le_bytes()).unwrap();
    }

    pub fn table(&self, pieces: &[Buffer]) -> Vec<u8> {
        let row = |(address, length, flags): &Buffer| {
            let mut row = address.to_le_bytes().to_vec();
            row.extend(length.to_le_bytes());
            row.extend([0xee, 0xee]);
            row.extend(flags.to_le_bytes());
            row
        };
        pieces.iter().flat_map(row).collect()
    }

    /// The bits that make a descriptor here available.
    pub fn available(at: At) -> u16 {
        if at.wrap { AVAIL } else { USED }
    }

    pub fn put(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let count = buffers.len() as u16;
        if self.size - self.out < count {
            return None;
        }
        let id = self.free_ids.pop()?;
        self.put_raw(buffers, id);
        self.counts.insert(id, count);
        Some(id)
    }

    /// Any chain under any id; only the last descriptor has it.
    pub fn put_raw(&mut self, buffers: &[Buffer], id: u16) {
        for (position, (address, length, flags)) in buffers.iter().enumerate() {
            let last = position + 1 == buffers.len();
            self.set_descriptor(self.next.index, *address, *length, if last { id } else { 0xdead });
            let flags = flags | if last { 0 } else { NEXT } | Self::available(self.next);
            match self.first {
                None => self.first = Some((self.next, flags)),
                Some(_) => self.set_flags(self.next.index, flags),
            }
            self.next.step(self.size);
            self.out += 1;
            self.fresh += 1;
        }
    }

    pub fn publish(&mut self) -> bool {
        if let Some((at, flags)) = self.first.take() {
            self.set_flags(at.index, flags);
        }
        fence(Ordering::SeqCst);
        let fresh = std::mem::take(&mut self.fresh);
        let (position, flags) = (self.events.load_atomic(2, Ordering::Relaxed), self.events.load_atomic(3, Ordering::Relaxed));
        match flags & 3 {
            1 => false,
            2 if self.event_idx => self.passed(position, fresh),
            _ => fresh > 0,
        }
    }

    /// Whether the position is among the last `fresh` that were made available.
    fn passed(&self, position: u16, fresh: u32) -> bool {
        let mut at = At { index: position & 0x7fff, wrap: position & 0x8000 != 0 };
        assert!(at.index < self.size, "the device wants a kick at {}, which is not on the ring", at.index);
        for _ in 0..fresh {
            at.step(self.size);
            if at == self.next {
                return true;
            }
        }
        false
    }

    fn is_used(&self, at: At) -> bool {
        let flags = self.flags(at.index);
        (flags & AVAIL != 0) == at.wrap && (flags & USED != 0) == at.wrap
    }

    fn used(&self, at: At) -> (u16, u32) {
        let mut bytes = [0; 8];
        self.region.read(self.at + 16 * u64::from(at.index) + 8, &mut bytes).unwrap();
        let length = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        (u16::from_le_bytes(bytes[4..6].try_into().unwrap()), length)
    }

    pub fn base(&self) -> u32 {
        let mut at = self.last_used;
        let mut left = self.out;
        while left > 0 && self.is_used(at) {
            let count = self.counts.get(&self.used(at).0).copied().unwrap_or(1);
            at = at.stepped(self.size, count);
            left = left.saturating_sub(count);
        }
        at.bits() | at.bits() << 16
    }

    pub fn want_interrupts(&self, wanted: bool) -> bool {
        let flags = match (wanted, self.event_idx) {
            (false, _) => 1,
            (true, false) => 0,
            (true, true) => 2,
        };
        self.events.store_atomic(0, self.last_used.bits() as u16, Ordering::Relaxed);
        self.events.store_atomic(1, flags, Ordering::Release);
        fence(Ordering::SeqCst);
        !self.is_used(self.last_used)
    }

    /// The device's wish: position and flags.
    pub fn device_wish(&self) -> (u16, u16) {
        (self.events.load_atomic(2, Ordering::Relaxed), self.events.load_atomic(3, Ordering::Relaxed))
    }

    pub fn lie(&mut self, choice: u64, noise: u64) {
        let length = (noise >> 40) as u32 | 1;
        match choice % 6 {
            // An id that no ring of this size has.
            0 => self.put_raw(&[(GUEST, 16, 0), (GUEST, 1, 2)], self.size + noise as u16 % 1000),
            // A chain that goes on where nothing is available.
            1 => {
                self.put_raw(&[(GUEST, 16, 0)], 0);
                if let Some((_, flags)) = &mut self.first {
                    *flags |= NEXT;
                }
            }
            // A chain all around the ring, and on.
            2 => (0..self.size).for_each(|index| {
                let lap = if index < self.next.index { !self.next.wrap } else { self.next.wrap };
                self.set_descriptor(index, GUEST, 16, 0);
                self.set_flags(index, NEXT | Self::available(At { index, wrap: lap }));
            }),
            3 => self.put_raw(&[(noise | 1 << 63, length, 0)], 0),
            4 => self.put_raw(&[(GUEST + 8, 17, 4)], 0),
            _ => self.put_raw(&[(GUEST, 16, 0), (GUEST, 32, 4)], 0),
        }
    }

    /// Takes back what the device did not take: nothing is available from here on.
    pub fn take_back(&mut self, at: At) {
        self.next = at;
        self.age_from(at);
    }

    fn age_from(&mut self, at: At) {
        self.set_flags(at.index, if at.wrap { 0 } else { AVAIL | USED });
        self.first = None;
    }

    pub fn answered(&self) -> bool {
        self.out > 0 && self.is_used(self.last_used)
    }

    pub fn reap(&mut self) -> Option<(u16, u32)> {
        if !self.answered() {
            return None;
        }
        let (id, written) = self.used(self.last_used);
        let count = self.counts.remove(&id).unwrap_or_else(|| panic!("used descriptor with id {id}, which is not in flight"));
        self.last_used = self.last_used.stepped(self.size, count);
        self.out -= count;
        self.free_ids.push(id);
        Some((id, written))
    }
}
