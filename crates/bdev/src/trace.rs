//! Trace points: where each I/O was when, kept in memory for who asks.
//!
//! How it works. Each reactor has a ring of [`RECORDS`] records of a fixed size, made when trace points are first turned on. An I/O leaves a record at each
//! [`Point`] of every bdev that it comes through, by its name; a bdev below sees the same name, and what the layer or a module makes out of an I/O names it as
//! its parent. The oldest record gives way to the newest. Every record has a number, so whoever reads ([`read`]) knows how many it missed. Turning points on or
//! off ([`set`]) is a message to each reactor, which does as is wanted *then*; it leaves a [`Point::Set`], for what was under way before may be seen in part.
//!
//! Times are the reactor's clock, which is read once a turn: what begins and ends within a turn takes no time.
//!
//! Costs. Off: one look for each batch that is submitted, passed on or ended, none for each I/O; one more for each that has to wait. On: no allocation, no lock, no
//! system call.
//!
//! Errors: none.
//!
//! Limits: [`RECORDS`] a reactor, 3 MiB, which stay until the reactor ends; [`PAGE_MAX`] a page; the names of the [`NAMES_MAX`] bdevs seen last.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_reactor::{Reactor, ReactorId};

use crate::lifecycle::{Answer, Reply};
use crate::{Hold, Layer, Registry};

/// Records kept of each reactor.
pub const RECORDS: usize = 1 << 16;
/// The most that [`read`] gives of each reactor at once.
pub const PAGE_MAX: usize = 4096;
/// Bdevs whose names a reactor remembers.
pub const NAMES_MAX: usize = 4096;
/// No I/O, in [`Record::io`] and [`Record::parent`].
pub const NO_IO: u64 = crate::io::NO_IO;
/// No operation, in [`Record::op`].
pub const NO_OP: u8 = u8::MAX;

/// Where a record is left. Numbers are bit positions in masks of points; the first four are SPDK's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Point {
    /// An I/O enters a bdev.
    Start = 0,
    /// It is complete there.
    Done = 1,
    /// A reactor opens its channel to a bdev.
    ChannelCreate = 2,
    /// And closes it.
    ChannelDestroy = 3,
    /// An I/O has to wait; `detail` says for what ([`Why`]).
    Wait = 4,
    /// It is handed to the bdev's module.
    Issue = 5,
    /// From here on other points are on than before: those in `blocks`. Always on.
    Set = 63,
}

impl Point {
    /// Those that can be turned on and off.
    pub const ALL: [Self; 6] = [Self::Start, Self::Done, Self::ChannelCreate, Self::ChannelDestroy, Self::Wait, Self::Issue];

    /// Its bit in a mask.
    pub const fn bit(self) -> u8 {
        1 << (self as u8 & 7)
    }
}

/// All of them.
pub const ALL_POINTS: u8 = (1 << Point::ALL.len()) - 1;

/// What an I/O waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Why {
    /// A limit of the bdev or its group.
    Limit = 1,
    /// Room with the device.
    Full = 2,
    /// The end of a range lock.
    Range = 3,
    /// The end of a reset or a resize.
    Paused = 4,
}

/// What is kept of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// The turn's time.
    pub time_ns: u64,
    /// The I/O's name on this reactor ([`crate::IoId::pack`]); [`NO_IO`] where there is none. One of a channel's reserve keeps its name for ever.
    pub io: u64,
    /// At [`Point::Start`]: the I/O that it does a part of, or [`NO_IO`].
    pub parent: u64,
    /// Its first block, as this bdev counts.
    pub lba: u64,
    /// How many.
    pub blocks: u64,
    /// The bdev, by the number that [`Page::names`] has.
    pub device: u32,
    /// At [`Point::Done`] the status, at [`Point::Wait`] why.
    pub detail: u16,
    /// What it does, as a number of [`crate::Op`]; or [`NO_OP`].
    pub op: u8,
    /// Where.
    pub point: u8,
}

/// Size of a record.
pub const RECORD_BYTES: usize = 48;
const _: () = assert!(size_of::<Record>() == RECORD_BYTES);

impl Record {
    /// As bytes, little-endian, the fields in their order: what Python decodes.
    pub fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        for (place, value) in bytes.chunks_exact_mut(8).zip([self.time_ns, self.io, self.parent, self.lba, self.blocks]) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        bytes[40..44].copy_from_slice(&self.device.to_le_bytes());
        bytes[44..46].copy_from_slice(&self.detail.to_le_bytes());
        (bytes[46], bytes[47]) = (self.op, self.point);
        bytes
    }
}

/// What was read of one reactor.
#[derive(Clone, Debug)]
pub struct Page {
    /// Which.
    pub reactor: ReactorId,
    /// Oldest first.
    pub records: Vec<Record>,
    /// Where to go on reading.
    pub next: u64,
    /// Records that were overwritten before they were read.
    pub lost: u64,
    /// The names of the bdevs of these records, as far as they are remembered.
    pub names: Vec<(u32, String)>,
}

/// What all reactors are to do; each takes it when it gets the message.
#[derive(Default)]
pub(crate) struct Wanted {
    points: AtomicU8,
    /// Rings are under way to the reactors, or there.
    rings: AtomicBool,
}

impl Wanted {
    pub(crate) fn points(&self) -> u8 {
        self.points.load(Ordering::SeqCst)
    }
}

/// Has these points on, as a mask of bits, and no others; replies when all reactors do so.
pub fn set(registry: &Arc<Registry>, points: u8, reply: Reply<()>) {
    let wanted = registry.board().trace();
    wanted.points.store(points & ALL_POINTS, Ordering::SeqCst);
    let makes_rings = points & ALL_POINTS != 0 && !wanted.rings.swap(true, Ordering::SeqCst);
    let answer = Answer::new("trace", reply);
    let hold = Hold::until(move || answer.send(Ok(())));
    for handle in registry.reactors() {
        // Here, not on a reactor: touching this much memory takes longer than any I/O should.
        let ring = makes_rings.then(|| vec![Record::default(); RECORDS].into_boxed_slice());
        let (registry, hold) = (registry.clone(), hold.clone());
        handle.call(move |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            layer.set_trace(reactor.now_ns(), registry.board().trace().points(), ring);
            drop(hold);
        });
    }
}

/// Reads up to `most` records of each reactor from number `from` on, which is one for each reactor in their order; beyond the newest means
/// from now on. Nothing is taken away: who reads again from the same number gets the same, unless it was overwritten meanwhile.
pub fn read(registry: &Arc<Registry>, from: &[u64], most: usize, reply: Reply<Vec<Page>>) {
    let pages = Arc::new(Mutex::new(Vec::new()));
    let (answer, found) = (Answer::new("trace", reply), pages.clone());
    let hold = Hold::until(move || {
        let mut pages: Vec<(usize, Page)> = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
        pages.sort_by_key(|(place, _)| *place);
        answer.send(Ok(pages.into_iter().map(|(_, page)| page).collect()));
    });
    for (place, handle) in registry.reactors().iter().enumerate() {
        let (pages, hold) = (pages.clone(), hold.clone());
        let from = from.get(place).copied().unwrap_or_default();
        handle.call(move |reactor: &mut Reactor| {
            let layer = Layer::of(reactor);
            let page = layer.borrow().read_trace(reactor.id(), from, most.min(PAGE_MAX));
            pages.lock().unwrap_or_else(PoisonError::into_inner).push((place, page));
            drop(hold);
        });
    }
}
