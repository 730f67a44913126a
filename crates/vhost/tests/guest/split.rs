//! A split ring's driver.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use qpair_memory::{Region, Shared, SharedIndex};
use qpair_vhost::Addresses;
use qpair_wire::virtio::{AvailFlags, Desc, DescFlags, RingLayout, RingSize, UsedFlags, need_event};
use zerocopy::IntoBytes;

use super::{Buffer, GUEST, USER};

pub struct SplitSide {
    pub avail_idx: u16,
    pub last_used: u16,
    size: RingSize,
    event_idx: bool,
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
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
}

fn describe((address, length, flags): Buffer, next: Option<u16>) -> Desc {
    let mut flags = DescFlags::from_bits_retain(flags);
    flags.set(DescFlags::NEXT, next.is_some());
    Desc::new(address, length, flags, next.unwrap_or(0))
}

impl SplitSide {
    pub fn new(region: &Region, at: u64, size: u16, event_idx: bool, base: u16) -> Self {
        let size = RingSize::new(size.into()).expect("a power of two");
        let layout = size.layout(at, 4).expect("a layout");
        let entries = usize::from(size.get());
        let index = |at| SharedIndex::new(region, at).unwrap();
        let (avail_index, used_index) = (index(layout.avail + 2), index(layout.used + 2));
        avail_index.store(base, Ordering::Relaxed);
        used_index.store(base, Ordering::Relaxed);
        Self {
            avail_flags: index(layout.avail),
            used_flags: index(layout.used),
            used_event: index(layout.avail + size.used_event_offset()),
            avail_event: index(layout.used + size.avail_event_offset()),
            desc: Shared::new(region, layout.desc, entries).unwrap(),
            avail: Shared::new(region, layout.avail + 4, entries).unwrap(),
            used: Shared::new(region, layout.used + 4, entries).unwrap(),
            avail_index,
            used_index,
            free: (0..size.get()).rev().collect(),
            chains: BTreeMap::new(),
            avail_idx: base,
            last_used: base,
            kicked: base,
            size,
            event_idx,
            layout,
        }
    }

    pub fn addresses(&self) -> Addresses {
        Addresses { desc: USER + self.layout.desc, avail: USER + self.layout.avail, used: USER + self.layout.used, log: None }
    }

    pub fn store_descriptor(&self, index: u16, desc: Desc) {
        self.desc.store(usize::from(index), zerocopy::transmute!(desc));
    }

    pub fn table(&self, pieces: &[Buffer]) -> Vec<u8> {
        let next = |position: usize| (position + 1 < pieces.len()).then_some(position as u16 + 1);
        pieces.iter().enumerate().flat_map(|(position, piece)| describe(*piece, next(position)).as_bytes().to_vec()).collect()
    }

    pub fn put(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let descriptors = self.free.split_off(self.free.len() - buffers.len());
        for (position, index) in descriptors.iter().enumerate() {
            self.store_descriptor(*index, describe(buffers[position], descriptors.get(position + 1).copied()));
        }
        let head = descriptors[0];
        self.chains.insert(head, descriptors);
        self.push(head);
        Some(head)
    }

    /// Puts any head into the avail ring.
    pub fn push(&mut self, head: u16) {
        self.avail.store(usize::from(self.size.slot(self.avail_idx)), head.to_le());
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

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

    pub fn base(&self) -> u32 {
        self.used_index().into()
    }

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

    pub fn lie(&mut self, choice: u64, noise: u64) {
        let head = (noise % u64::from(self.size.get())) as u16;
        match choice % 5 {
            0 => self.publish_index(self.avail_idx.wrapping_add(self.size.get() + 1 + noise as u16 % 1000)),
            1 => self.store_descriptor(head, Desc::new(GUEST, 16, DescFlags::NEXT, head)),
            2 => self.store_descriptor(head, Desc::new(noise, (noise >> 7) as u32, DescFlags::empty(), 0)),
            3 => self.store_descriptor(head, Desc::new(u64::MAX - 8, 64, DescFlags::NEXT, self.size.get())),
            _ => self.store_descriptor(head, Desc::new(GUEST + 8, 17, DescFlags::INDIRECT, 0)),
        }
        self.push(if noise & 1 == 0 { head } else { (noise >> 32) as u16 });
    }

    pub fn answered(&self) -> bool {
        self.used_index() != self.last_used
    }

    pub fn reap(&mut self) -> Option<(u16, u32)> {
        if !self.answered() {
            return None;
        }
        let [head, written] = self.used.load(usize::from(self.size.slot(self.last_used)));
        let (head, written) = (u32::from_le(head) as u16, u32::from_le(written));
        self.last_used = self.last_used.wrapping_add(1);
        let chain = self.chains.remove(&head).unwrap_or_else(|| panic!("used entry for head {head}, which is not in flight"));
        self.free.extend(chain);
        Some((head, written))
    }
}
