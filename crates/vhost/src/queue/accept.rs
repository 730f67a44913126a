//! The long way of accepting a request: of any cut, and those that a predecessor left. Each step may find that it cannot be served; what it took is given back then.

use qpair_bdev::{IoId, Layer};
use qpair_memory::SgList;
use qpair_wire::nvme::Status;
use qpair_wire::virtio_blk::BlkStatus;

use super::prepare::Refused;
use super::{Queue, Slot};
use crate::Broken;
use crate::request::{self, Request};
use crate::ring::{Chain, Kind, Taken, Tracker};

/// What became of a request that was looked at.
enum Accepted {
    Submitted,
    /// At once, by its name.
    Answered(u16, BlkStatus),
    NoRoom,
}

impl<R: Kind> Queue<R> {
    #[inline(never)]
    pub(super) fn accept_any(&mut self, layer: &mut Layer, id: IoId, left: Option<u16>) -> Result<bool, Broken> {
        let list = &mut layer.io_mut(id).list;
        let found = match (left, &self.tracker) {
            (Some(entry), Some(tracker)) => self.look(self.ring.left(tracker, entry), list),
            _ => self.look(self.ring.chain(), list),
        };
        let found = found.and_then(|(head, request, taken)| {
            self.ring.note(head, taken.id, &self.memory, &request, list)?;
            Ok((request, taken))
        });
        let accepted = found.map(|(request, taken)| self.accept_found(layer, id, &request, taken, left));
        if !matches!(accepted, Ok(Accepted::Submitted)) {
            layer.give_back(id);
        }
        match accepted? {
            Accepted::Submitted => self.inflight += 1,
            Accepted::Answered(name, status) => self.answer(name, status),
            Accepted::NoRoom => return Ok(false),
        }
        Ok(true)
    }

    /// What the chain asks for. A chain that is in flight, or could never be answered, is refused.
    fn look(&self, mut chain: impl Chain, list: &mut SgList) -> Result<(u16, Request, Taken), Broken> {
        let request = request::parse(&mut chain, &self.memory, self.setup.indirect, list)?;
        let taken = chain.taken();
        match self.slots.get(usize::from(taken.id)) {
            Some(slot) if slot.pending == 0 => Ok((chain.head(), request, taken)),
            _ => Err(chain.refused(taken, self.ring.size())),
        }
    }

    fn accept_found(&mut self, layer: &mut Layer, id: IoId, request: &Request, taken: Taken, left: Option<u16>) -> Accepted {
        let name = taken.id;
        self.slots[usize::from(name)] =
            Slot { status: request.status, written: 1, pending: 0, failed: Status::SUCCESS, count: taken.count, entry: left.unwrap_or(0) };
        let accepted = match self.prepare(layer, id, name, request) {
            Ok(()) => Accepted::Submitted,
            Err(Refused::Answer(status)) => Accepted::Answered(name, status),
            Err(Refused::NoRoom) => return Accepted::NoRoom,
        };
        if left.is_none() {
            if let Some(tracker) = &mut self.tracker {
                self.slots[usize::from(name)].entry = tracker.mark(&self.ring, taken);
            }
            self.ring.took(taken);
        }
        if let Some(order) = &mut self.order {
            order.took(name);
        }
        accepted
    }
}
