//! The bond between a device and its target, connection after connection.
//!
//! **What is done about requests that a target had when it went.** They are sent again, by us, over new rings: all that have no used entry, in the order in
//! which they were submitted, before anything newer of the same channel. The other way would be the inflight region (INFLIGHT_SHMFD), as QEMU has it: rings and
//! region stay, and the successor finds out itself what was not answered. QEMU has no choice, since its rings are the guest's, who is not to
//! notice. We are the driver: we know every request, its data and its place in the order, and the used ring says which of them were answered.
//! Compare what each gives:
//!
//! * *No acknowledged write is lost or done again.* A request is acknowledged for us when its used entry is shown, and for nobody else before. Whoever has a
//!   channel takes every shown entry before it turns from the rings (`leave`), so what was acknowledged ends and is not sent again. With the
//!   region, what is done again is what its marks say, which are to agree with the used ring, if the target wrote both in the right
//!   order. Then both ways do the same requests again. Ours needs no such order, no region, and no target that has the feature (few do it right for packed rings).
//! * *A request that was done but not acknowledged is done twice*, in both ways. That is harmless: reads, writes of the same data, zeroes, discards and flushes
//!   can be repeated, and until it is acknowledged nobody may count on what its blocks hold, or on its order against others that overlap.
//! * *A durable write* (FUA) is a write and a flush. If the write was answered and the flush was not, both go again: a cache may have died with the target.
//! * *No late write of the old target* hits a block that was written anew since. A connection's end means that nothing of it is under way: a process that is killed
//!   ends its system calls, asynchronous I/O included, before its sockets close; one that closes the connection itself has to have drained. Where we close it (broken rules,
//!   no answer), the target has to drain before it serves the next connection, as ours does. One that does neither can do harm, with a region no less.
//!
//! What no driver can mend: a target whose *cache* dies with it loses acknowledged writes that were not flushed, as a disk does at a power cut.
//!
//! **The order of things.** An epoch counts: odd while there is a connection, even between two. Whoever wants it changed stores it and then has every channel polled on its
//! reactor; a channel compares it with its own at each poll, and follows. [`Link::leave`] answers when all have: no reactor touches the rings then. They are
//! wiped ([`Link::wipe`]) once the next target has begun to talk, so that the old one does not see it, and only then shown; only after that does [`Link::rejoin`] make the epoch odd again. A channel that is opened meanwhile reads the epoch on
//! its own reactor: before that reactor's message, which then finds the channel, or after it, which finds the epoch changed. A channel that meets a broken rule makes the epoch even itself
//! and wakes the others; `leave` comes all the same before anything is shown anew.
//!
//! Between two connections a channel keeps what the target had and what it is given in a list, as much as goes into the ring, and what is more waits in the layer. An abort ends such an I/O
//! at once, so a reset does, and a removal at its deadline: nobody has it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_bdev::lifecycle::{self, Reply};
use qpair_bdev::{DeviceId, Registry};

use crate::BdevError;
use crate::chain::Chains;
use crate::config::agree;
use crate::device::Shared;

/// An epoch that never ends.
const FAILED: u32 = u32::MAX;

/// What an epoch means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Connected,
    Away,
    Failed,
}

type Broken = Box<dyn FnOnce(String) + Send>;

/// Whether there is a target. See the module's doc.
pub(crate) struct Bond {
    epoch: AtomicU32,
    recovers: AtomicBool,
    /// No reactor uses the rings.
    left: AtomicBool,
    on_broken: Mutex<Option<Broken>>,
}

impl Default for Bond {
    fn default() -> Self {
        Self { epoch: AtomicU32::new(1), recovers: AtomicBool::new(false), left: AtomicBool::new(false), on_broken: Mutex::new(None) }
    }
}

impl Bond {
    /// Acquire: who sees a new connection sees its new rings.
    #[inline]
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn phase(epoch: u32) -> Phase {
        match epoch {
            FAILED => Phase::Failed,
            _ if epoch.is_multiple_of(2) => Phase::Away,
            _ => Phase::Connected,
        }
    }

    pub(crate) fn recover(&self) {
        self.recovers.store(true, Ordering::Relaxed);
    }

    /// What becomes of I/O when a rule is broken.
    pub(crate) fn consequence(&self) -> &'static str {
        if self.recovers.load(Ordering::Relaxed) { "its I/O waits for another connection" } else { "the device fails all I/O from now on" }
    }

    /// Ends a connection; false: it was not the present one any more.
    pub(crate) fn sever(&self, epoch: u32, reason: &str) -> bool {
        let recovers = self.recovers.load(Ordering::Relaxed);
        let next = if recovers { epoch + 1 } else { FAILED };
        let severed = self.epoch.compare_exchange(epoch, next, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if severed && let Some(tell) = self.broken().take() {
            tell(reason.to_owned());
        }
        severed
    }

    fn broken(&self) -> std::sync::MutexGuard<'_, Option<Broken>> {
        self.on_broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves from one phase to the next, unless it is past that.
    fn advance(&self, from: Phase) {
        let epoch = self.epoch();
        if Self::phase(epoch) == from {
            // Lost against a broken rule: then it is where it should be.
            let _ = self.epoch.compare_exchange(epoch, epoch + 1, Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}

/// By this a device is told that its target went, and that there is another.
pub struct Link {
    shared: Arc<Shared>,
}

impl Link {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// `tell` is called once with the reason if the target breaks a rule of the rings; then the connection is to be closed and [`leave`](Self::leave) called.
    /// It replaces what was to be called before, and is to be given before a connection begins.
    pub fn when_broken(&self, tell: impl FnOnce(String) + Send + 'static) {
        let before = self.shared.bond.broken().replace(Box::new(tell));
        drop(before);
    }

    /// The connection is over. Answers when no reactor uses its rings.
    pub fn leave(&self, registry: &Arc<Registry>, device: DeviceId, reply: Reply<()>) {
        self.shared.bond.advance(Phase::Connected);
        let shared = self.shared.clone();
        let left = move |outcome: Result<(), BdevError>| {
            shared.bond.left.store(outcome.is_ok(), Ordering::Release);
            reply(outcome);
        };
        lifecycle::poke(registry, device, Box::new(left));
    }

    /// Makes the rings as new, to be shown to another target: after [`leave`](Self::leave) was answered.
    pub fn wipe(&self) -> Result<(), BdevError> {
        self.check_left()?;
        self.shared.layout.wipe_rings()
    }

    /// Another target, or the same, has the rings, which were [wiped](Self::wipe): what waits goes to it, and so does all else from now on. Its features are those
    /// that were agreed on first. Refused, by name: a configuration that the I/O under way cannot live with.
    pub fn rejoin(&self, registry: &Arc<Registry>, device: DeviceId, features: u64, config: &[u8], reply: Reply<()>) {
        if let Err(error) = self.check_left().and_then(|()| self.accept(features, config)) {
            return reply(Err(error));
        }
        self.shared.bond.left.store(false, Ordering::Relaxed);
        self.shared.bond.advance(Phase::Away);
        lifecycle::poke(registry, device, reply);
    }

    fn check_left(&self) -> Result<(), BdevError> {
        if self.shared.bond.left.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(BdevError::Unsupported(format!("{} with new rings: its reactors have not left the old ones", self.shared.agreed.info.name)))
    }

    /// The target says that its configuration changed. Replies with its size in blocks, which the bdev has then.
    pub fn configure(&self, registry: &Arc<Registry>, features: u64, config: &[u8], reply: Reply<u64>) {
        match self.accept(features, config) {
            Ok(()) => lifecycle::rescan(registry, &self.shared.agreed.info.name, reply),
            Err(error) => reply(Err(error)),
        }
    }

    fn accept(&self, features: u64, config: &[u8]) -> Result<(), BdevError> {
        let (layout, agreed) = (&self.shared.layout, &self.shared.agreed);
        let (name, size) = (&agreed.info.name, layout.size());
        let offered = agree(name, features, config, layout.max_io_bytes(), |indirect, packed| Chains::slots_of(size, indirect, packed))?;
        agreed.admit(&offered)?;
        self.shared.blocks.store(offered.info.num_blocks, Ordering::Relaxed);
        Ok(())
    }
}
