//! The dirty log: which pages of guest memory the device wrote to, for a front end that migrates (vhost-user, "Migration").
//!
//! The front end gives a bitmap (SET_LOG_BASE), sets LOG_ALL, and reads and clears bits while the guest goes on. A ring that runs under a log is a
//! [`Logged`] one: a queue compiled for itself, so that without a log nothing is asked.
//!
//! Orders. What a request let the device write is marked when its last I/O is back and its status is written, before its used entry is; the entry when it was
//! pushed; what [`publish`](Ring::publish) wrote, right after it. So whatever the guest can see of an answer on the source is marked, or about to be by a poll
//! that a drain waits for: the front end reads the log the last time after it has stopped the rings. A ring that starts marks all that it may write of
//! itself: a predecessor may have died between a store and its mark.
//!
//! Errors. A log that does not cover a ring is refused when the ring starts; one that does not cover a buffer ends the queue, before anything is
//! written there ([`Broken::Unlogged`]); one that is truncated ends the session ([`Broken::LogVanished`]). Each means that the guest could not be migrated whole.
//!
//! Limits: the log's last page; a front end may give any.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use qpair_memory::{GuestMemory, Mapping, PageBitmap, Region, SgList};
use qpair_reactor::event::Event;
use qpair_wire::virtio_blk::RequestType;

use crate::inflight::Inflight;
use crate::request::Request;
use crate::ring::{Kind, Ring, Taken, Tracker};
use crate::session::Setup;
use crate::{Broken, VhostError};

/// The log of a session, shared by its rings.
#[derive(Clone, Debug)]
pub(crate) struct DirtyLog {
    mapping: Arc<Mapping>,
    offset: u64,
    bytes: u64,
}

impl DirtyLog {
    /// What SET_LOG_BASE brought.
    pub(crate) fn adopt(fd: &OwnedFd, bytes: u64, offset: u64) -> Result<Self, VhostError> {
        if bytes == 0 {
            return Err(VhostError::invalid("log mmap_size", bytes, "more than 0"));
        }
        let end = offset.checked_add(bytes).ok_or_else(|| VhostError::invalid("log mmap_offset", offset, "offset + size below 2^64"))?;
        Ok(Self { mapping: Mapping::shared(fd.as_fd(), end)?, offset, bytes })
    }

    fn bitmap(&self) -> Result<PageBitmap, VhostError> {
        Ok(PageBitmap::new(&Region::new(self.mapping.clone()), self.offset, self.bytes)?)
    }
}

/// What a ring needs to run under a log.
pub(crate) struct LogSetup {
    pub(crate) log: DirtyLog,
    /// Told after each batch (SET_LOG_FD).
    pub(crate) told: Option<Event>,
}

/// A piece of a ring that the device writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    /// In the descriptor table, where a packed ring has its answers; else in the used area.
    pub(crate) in_table: bool,
    /// From the start of the area.
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// What a ring writes of itself, and where.
pub(crate) trait Writes: Kind {
    /// All that it may write.
    fn all(&self) -> [Option<Written>; 2];

    /// What the next [`push_used`](Ring::push_used) writes.
    fn entry(&self) -> Written;

    /// What the next [`publish`](Ring::publish) writes.
    fn shown(&self) -> Option<Written>;

    /// What [`arm`](Ring::arm), [`disarm`](Ring::disarm) and [`rest`](Ring::rest) write.
    fn wish(&self) -> Written;
}

/// A ring whose writes, and those of its requests, are marked.
pub(crate) struct Logged<R> {
    ring: R,
    marks: PageBitmap,
    told: Option<Event>,
    /// Where the used area is marked from, if the front end wants that (VHOST_VRING_F_LOG).
    used_at: Option<u64>,
    /// The same of the table.
    table_at: Option<u64>,
    /// Guest addresses and lengths that each request in flight lets the device write; by name.
    writes: Vec<Vec<(u64, u64)>>,
}

impl<R: Writes> Logged<R> {
    fn address(&self, written: Written) -> Option<u64> {
        let base = if written.in_table { self.table_at } else { self.used_at };
        base.map(|base| base.wrapping_add(written.offset))
    }

    /// Within what was looked at when the ring was opened.
    fn mark_own(&self, written: Written) {
        if let Some(address) = self.address(written) {
            self.marks.mark(address, written.length);
        }
    }

    fn covered(&self, head: u16, address: u64, length: u64) -> Result<(u64, u64), Broken> {
        match self.marks.covers(address, length) {
            true => Ok((address, length)),
            false => Err(Broken::Unlogged { head, address, length, end: self.marks.end() }),
        }
    }
}

impl<R: Writes> Ring for Logged<R> {
    type Chain<'a> = R::Chain<'a>;

    fn size(&self) -> u16 {
        self.ring.size()
    }

    fn base(&self) -> u32 {
        self.ring.base()
    }

    fn positions(&self) -> (u16, u16) {
        self.ring.positions()
    }

    fn waiting(&self) -> Result<u16, Broken> {
        self.ring.waiting()
    }

    fn ready(&self) -> Result<bool, Broken> {
        self.ring.ready()
    }

    fn chain(&self) -> Self::Chain<'_> {
        self.ring.chain()
    }

    fn prefetch(&self, ahead: u16) {
        self.ring.prefetch(ahead);
    }

    fn took(&mut self, taken: Taken) {
        self.ring.took(taken);
    }

    fn rest(&mut self) {
        self.ring.rest();
        self.mark_own(self.ring.wish());
    }

    fn prefetch_used(&self) {
        self.ring.prefetch_used();
    }

    fn prefetch_publish(&self) {
        self.ring.prefetch_publish();
    }

    fn push_used(&mut self, taken: Taken, written: u32) {
        let entry = self.ring.entry();
        self.ring.push_used(taken, written);
        self.mark_own(entry);
    }

    fn publish(&mut self) {
        let shown = self.ring.shown();
        self.ring.publish();
        if let Some(shown) = shown {
            self.mark_own(shown);
        }
        if let Some(told) = &self.told {
            told.notify();
        }
    }

    fn wants_interrupt(&mut self) -> bool {
        self.ring.wants_interrupt()
    }

    fn arm(&mut self) -> bool {
        let quiet = self.ring.arm();
        self.mark_own(self.ring.wish());
        quiet
    }

    fn disarm(&mut self) {
        self.ring.disarm();
        self.mark_own(self.ring.wish());
    }
}

impl<R: Writes> Kind for Logged<R> {
    type Tracker = Through<R::Tracker>;
    type Left<'a> = R::Left<'a>;

    fn open(memory: &GuestMemory, setup: &Setup) -> Result<Self, VhostError> {
        let log = setup.log.as_ref().ok_or_else(|| VhostError::State("no dirty log".into()))?;
        let told = log.told.as_ref().map(Event::twin).transpose().map_err(|error| VhostError::Os("dup", error))?;
        let ring = R::open(memory, setup)?;
        let used_at = setup.addresses.log;
        let table_at = used_at.and_then(|_| memory.guest_address_of_user(setup.addresses.desc));
        let writes = vec![Vec::new(); usize::from(ring.size())];
        let logged = Self { ring, marks: log.log.bitmap()?, told, used_at, table_at, writes };
        for written in logged.ring.all().into_iter().flatten() {
            let Some(address) = logged.address(written) else { continue };
            if !logged.marks.mark(address, written.length) {
                let place = if written.in_table { "the descriptor table's address" } else { "log address" };
                let end = logged.marks.end();
                return Err(VhostError::invalid(place, format!("{address:#x}"), format!("within the dirty log, which ends at {end:#x}")));
            }
        }
        Ok(logged)
    }

    fn track(&mut self, region: &Inflight, index: u16) -> Result<(Self::Tracker, Vec<u16>), Broken> {
        self.ring.track(region, index).map(|(tracker, entries)| (Through(tracker), entries))
    }

    fn left<'a>(&'a self, tracker: &'a Self::Tracker, entry: u16) -> Self::Left<'a> {
        self.ring.left(&tracker.0, entry)
    }

    fn note(&mut self, head: u16, name: u16, memory: &GuestMemory, request: &Request, data: &SgList) -> Result<(), Broken> {
        let mut writes = std::mem::take(&mut self.writes[usize::from(name)]);
        writes.clear();
        writes.push(self.covered(head, memory.guest_address_at(request.status), 1)?);
        if request.readable == 0 && matches!(request.header.kind(), RequestType::IN | RequestType::GET_ID) {
            for piece in data {
                let address = memory.guest_address(piece).ok_or(Broken::Internal("a buffer of another table".to_owned()))?;
                writes.push(self.covered(head, address, piece.length.into())?);
            }
        }
        self.writes[usize::from(name)] = writes;
        Ok(())
    }

    fn mark(&self, name: u16) {
        for (address, length) in &self.writes[usize::from(name)] {
            self.marks.mark(*address, *length);
        }
    }

    fn log_is_dead(&self) -> bool {
        self.marks.is_dead()
    }
}

/// A ring's tracker, for the ring under a log.
pub(crate) struct Through<T>(T);

impl<R: Kind, T: Tracker<R>> Tracker<Logged<R>> for Through<T> {
    const ONE_BY_ONE: bool = T::ONE_BY_ONE;

    fn mark(&mut self, ring: &Logged<R>, taken: Taken) -> u16 {
        self.0.mark(&ring.ring, taken)
    }

    fn add_done(&mut self, ring: &Logged<R>, entry: u16) {
        self.0.add_done(&ring.ring, entry);
    }

    fn end_batch(&mut self, ring: &Logged<R>) {
        self.0.end_batch(&ring.ring);
    }
}
