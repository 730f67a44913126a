//! What a channel does as targets come and go: see [`crate::link`].

use qpair_bdev::{IoId, Layer, Status};

use crate::chain::Chains;
use crate::channel::{Mode, Stage, VirtioChannel};
use crate::link::{Bond, Phase};
use crate::ring::Ring;

impl<R: Ring> VirtioChannel<R> {
    /// The epoch is another: goes where it says. How many I/Os that moved.
    #[cold]
    pub(crate) fn follow(&mut self, layer: &mut Layer) -> usize {
        self.epoch = self.shared.bond.epoch();
        let moved = usize::from(self.inflight);
        match (Bond::phase(self.epoch), self.mode) {
            (Phase::Failed, _) => self.give_up(layer, Status::INTERNAL_DEVICE_ERROR),
            (Phase::Away, Mode::Running) => self.leave(layer),
            (Phase::Connected, Mode::Away) => self.rejoin(layer),
            _ => {}
        }
        moved
    }

    /// Takes what the target has answered, as far as that can be believed, and turns from the ring. A flush that would follow now is not shown: its write goes
    /// again, too.
    fn leave(&mut self, layer: &mut Layer) {
        loop {
            let count = self.ring.waiting();
            if count == 0 || count > self.inflight || (0..count).any(|_| self.finish(layer).is_err()) {
                break;
            }
        }
        self.turn_away();
    }

    /// Uses the ring no more; what was not shown yet is forgotten there, not here.
    pub(crate) fn turn_away(&mut self) {
        self.ring.forget();
        self.mode = Mode::Away;
    }

    /// Sends all that slots name to the new target, by new rings, in the order in which it was submitted.
    fn rejoin(&mut self, layer: &mut Layer) {
        let (layout, agreed, size) = (self.shared.layout.queue(self.queue), &self.shared.agreed, self.shared.layout.size());
        let ring = R::new(&self.region, &layout, size, agreed, None);
        let (Ok(ring), Ok(chains)) = (ring, Chains::new(&self.region, &layout, size, agreed)) else {
            return self.give_up(layer, Status::INTERNAL_DEVICE_ERROR);
        };
        (self.ring, self.chains, self.mode) = (ring, chains, Mode::Running);
        let mut waiting: Vec<(u32, u16, IoId)> = Vec::with_capacity(usize::from(self.inflight));
        for (index, slot) in self.slots.iter_mut().enumerate() {
            slot.forget_shape();
            if slot.stage != Stage::Free {
                waiting.push((self.sequence.wrapping_sub(slot.sequence), index as u16, slot.io));
            }
        }
        waiting.sort_unstable_by(|one, other| other.cmp(one));
        for (_, index, id) in waiting {
            self.start(layer, index, id);
        }
        self.ring.publish();
        self.kick.notify();
        // It may be asleep, and has not yet asked this ring for interrupts.
        self.waker.wake();
    }

    /// Takes I/Os while the ring is not to be used.
    #[cold]
    pub(crate) fn put_off(&mut self, layer: &mut Layer, batch: &[IoId]) {
        for id in batch {
            if self.mode == Mode::Lost {
                layer.complete(*id, Status::INTERNAL_DEVICE_ERROR);
            } else {
                self.hold(layer, *id);
            }
        }
    }

    /// Ends an I/O that no target has.
    #[cold]
    pub(crate) fn call_back(&mut self, layer: &mut Layer, id: IoId) {
        let found = self.slots.iter().position(|slot| slot.stage != Stage::Free && slot.io == id);
        if let Some(index) = found {
            self.release(index as u16);
            layer.complete(id, Status::ABORT_REQUESTED);
        }
    }
}
