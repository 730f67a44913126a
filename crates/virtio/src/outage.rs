//! What a channel does as targets come and go: see [`crate::link`].

use qpair_bdev::{Channel, IoId, Layer, Status};
use qpair_reactor::Reactor;

use crate::chain::Chains;
use crate::channel::{Mode, Stage, VirtioChannel};
use crate::link::{Bond, Phase};
use crate::ring::Ring;

impl<R: Ring> VirtioChannel<R> {
    /// The epoch is another: goes where it says. How many I/Os that concerns.
    #[cold]
    pub(crate) fn follow(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let concerned = usize::from(self.inflight) + self.kept.len();
        match self.settle(layer) {
            Phase::Away if self.mode == Mode::Running => self.leave(layer),
            Phase::Connected if self.mode == Mode::Away => self.rejoin(layer, reactor),
            _ => {}
        }
        concerned
    }

    /// Notes the epoch, and ends everything if none is to come.
    pub(crate) fn settle(&mut self, layer: &mut Layer) -> Phase {
        self.epoch = self.shared.bond.epoch();
        let phase = Bond::phase(self.epoch);
        if phase == Phase::Failed {
            self.give_up(layer, Status::INTERNAL_DEVICE_ERROR);
        }
        phase
    }

    /// Takes what the target has answered, as far as that can be believed, and turns from the ring.
    fn leave(&mut self, layer: &mut Layer) {
        loop {
            let count = self.ring.waiting();
            if count == 0 || self.take(layer, count).is_err() {
                break;
            }
        }
        self.turn_away();
    }

    /// Uses the ring no more, and keeps what it had, in the order of submission: also what was not shown yet, and what only a flush was still to follow.
    #[cold]
    pub(crate) fn turn_away(&mut self) {
        self.ring.forget();
        self.mode = Mode::Away;
        let mut had = Vec::with_capacity(usize::from(self.inflight));
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if slot.stage != Stage::Free {
                had.push((self.sequence.wrapping_sub(slot.sequence), slot.io));
                self.release(index as u16);
            }
        }
        // The oldest is farthest from what was submitted last.
        had.sort_unstable_by_key(|(age, _)| std::cmp::Reverse(*age));
        self.kept.extend(had.into_iter().map(|(_, id)| id));
    }

    /// Submits all that was kept to the new target, by new rings.
    fn rejoin(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let (layout, agreed, size) = (self.shared.layout.queue(self.queue), &self.shared.agreed, self.shared.layout.size());
        let ring = R::new(&self.region, &layout, size, agreed, None);
        let (Ok(ring), Ok(chains)) = (ring, Chains::new(&self.region, &layout, size, agreed)) else {
            return self.give_up(layer, Status::INTERNAL_DEVICE_ERROR);
        };
        (self.ring, self.chains, self.mode) = (ring, chains, Mode::Running);
        self.slots.iter_mut().for_each(|slot| slot.forget_shape());
        let kept = std::mem::take(&mut self.kept);
        self.submit(layer, reactor, &kept);
        self.ring.publish();
        self.kick.notify();
        // It may be asleep, and has not yet asked this ring for interrupts.
        self.waker.wake();
    }

    /// Takes I/Os while there is no target.
    #[cold]
    pub(crate) fn put_off(&mut self, layer: &mut Layer, batch: &[IoId]) {
        if self.mode == Mode::Away {
            return self.kept.extend_from_slice(batch);
        }
        batch.iter().for_each(|id| layer.complete(*id, Status::INTERNAL_DEVICE_ERROR));
    }

    /// Ends an I/O that no target has.
    #[cold]
    pub(crate) fn call_back(&mut self, layer: &mut Layer, id: IoId) {
        if let Some(index) = self.kept.iter().position(|other| *other == id) {
            self.kept.remove(index);
            layer.complete(id, Status::ABORT_REQUESTED);
        }
    }
}
