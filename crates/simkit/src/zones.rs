//! The client on a zoned bdev: each cell is a zone, which it appends to, writes, reads, manages and asks for, and whose write pointer it knows.
//!
//! What failed may have moved the pointer or not: the next thing asked of that zone is a report. A zone that was never asked for, or whose bdev may be
//! another one by now, is asked for first.

use qpair_bdev::{IoId, Layer, Op, Status, ZONE_DESCRIPTOR_BYTES, ZoneAction, ZoneDescriptor, ZoneState, Zoned};
use qpair_memory::Sge;

use crate::client::{Client, Pending};
use crate::model::lock;

impl Client {
    fn geometry(&self) -> Zoned {
        self.load.info.zoned.expect("a zoned bdev")
    }

    fn zone_start(&self, pending: &Pending) -> u64 {
        pending.cell as u64 * self.cell_blocks
    }

    /// Makes of what was chosen something that a zone can do, or something that it must refuse.
    pub(crate) fn choose_in_zone(&mut self, pending: &mut Pending) {
        let (start, capacity) = (self.zone_start(pending), self.geometry().capacity_blocks);
        if matches!(pending.op, Op::Flush | Op::Reset) {
            return;
        }
        let Some(written) = self.cells[pending.cell].written else { return self.whole_zone(pending, ZoneAction::Report) };
        let blocks = self.rng.between(1, 4.min(capacity));
        match self.rng.below(16) {
            0 => return self.whole_zone(pending, ZoneAction::Report),
            1 => {
                let action = *self.rng.pick(&[ZoneAction::Open, ZoneAction::Close, ZoneAction::Finish]);
                return self.whole_zone(pending, action);
            }
            2 | 3 => return self.whole_zone(pending, ZoneAction::Reset),
            4..8 => {
                pending.op = *self.rng.pick(&[Op::Read, Op::Read, Op::Compare]);
                let first = self.rng.below(capacity);
                (pending.first, pending.blocks) = (start + first, blocks.min(capacity - first));
            }
            8..12 => (pending.op, pending.first, pending.blocks) = (Op::ZoneAppend, start, blocks),
            12 => {
                // Mostly not where it may be written.
                let at = self.rng.below(capacity - blocks + 1);
                (pending.op, pending.first, pending.blocks) = (Op::Write, start + at, blocks);
                if at != written {
                    pending.refusal = Some(Status::ZONE_INVALID_WRITE);
                }
            }
            _ if written == capacity => (pending.op, pending.first, pending.blocks) = (Op::ZoneAppend, start, blocks),
            _ => (pending.op, pending.first, pending.blocks) = (Op::Write, start + written, blocks.min(capacity - written)),
        }
        if matches!(pending.op, Op::Write | Op::ZoneAppend) {
            if written == capacity {
                pending.refusal = Some(Status::ZONE_IS_FULL);
            } else if pending.refusal.is_none() && written + blocks.max(pending.blocks) > capacity && pending.op == Op::ZoneAppend {
                pending.refusal = Some(Status::ZONE_BOUNDARY_ERROR);
            } else if pending.op == Op::ZoneAppend {
                // Where it will be, for the model; it is submitted at the zone's start.
                pending.landing = start + written;
            }
        }
    }

    fn whole_zone(&mut self, pending: &mut Pending, action: ZoneAction) {
        (pending.op, pending.action) = (Op::ZoneManagement, Some(action));
        (pending.first, pending.blocks) = (self.zone_start(pending), self.cell_blocks);
    }

    pub(crate) fn manage(&mut self, layer: &mut Layer, id: IoId, pending: &Pending) {
        let place = self.place(pending);
        let io = layer.io_mut(id);
        io.command[0] = pending.action.map_or(u8::MAX, |action| action as u8);
        if pending.action == Some(ZoneAction::Report) {
            io.list.push(Sge { region: self.region(), offset: place, length: ZONE_DESCRIPTOR_BYTES as u32 });
        }
    }

    /// What a zone is known to be after an I/O that came back.
    pub(crate) fn book_zone(&mut self, pending: &Pending, status: Status, result: u64) {
        let (start, capacity) = (self.zone_start(pending), self.geometry().capacity_blocks);
        let changes = matches!(pending.op, Op::Write | Op::ZoneAppend | Op::ZoneManagement);
        let refused = pending.refusal == Some(status) || self.is_of_zones(pending, status);
        if !changes || refused {
            return;
        }
        let before = self.cells[pending.cell].written.take();
        let report = pending.action == Some(ZoneAction::Report);
        let after = match (pending.op, pending.action) {
            _ if status != Status::SUCCESS => None,
            (Op::ZoneAppend, _) => {
                let landed = result - lock(&self.model).first;
                assert_eq!(landed, pending.landing, "an append landed elsewhere than at the write pointer");
                before.map(|before| before + pending.blocks)
            }
            (Op::Write, _) => before.map(|before| before + pending.blocks),
            (_, Some(ZoneAction::Reset)) => Some(0),
            (_, Some(ZoneAction::Finish)) => Some(capacity),
            (_, Some(ZoneAction::Report)) => {
                assert_eq!(result, 1, "one zone was asked for");
                Some(self.reported(pending))
            }
            _ => before,
        };
        if report && let (Some(before), Some(after)) = (before, after) {
            assert_eq!(after, before, "the write pointer of the zone at {start} moved by itself");
        }
        self.cells[pending.cell].written = after;
    }

    /// Blocks written, by a report; its figures must belong together.
    fn reported(&self, pending: &Pending) -> u64 {
        let mut bytes = [0; ZONE_DESCRIPTOR_BYTES as usize];
        self.region().read(self.place(pending), &mut bytes).expect("own memory");
        let found = ZoneDescriptor::decode(&bytes).expect("a descriptor");
        let capacity = self.geometry().capacity_blocks;
        let start = lock(&self.model).first + self.zone_start(pending);
        assert_eq!((found.start, found.capacity_blocks), (start, capacity), "a descriptor of another zone");
        let written = found.write_pointer - found.start;
        let fits = match found.state {
            ZoneState::Empty => written == 0,
            ZoneState::Full => written == capacity,
            ZoneState::ImplicitlyOpen => written > 0 && written < capacity,
            _ => written < capacity,
        };
        assert!(fits, "{found:?}");
        written
    }

    /// Whether a refusal is one that zones know, and cannot be foretold.
    pub(crate) fn is_of_zones(&self, pending: &Pending, status: Status) -> bool {
        status == Status::ZONE_INVALID_STATE_TRANSITION && matches!(pending.action, Some(ZoneAction::Open | ZoneAction::Close))
    }
}
