//! Ranges of a device that somebody has for himself for a while, on all reactors: what compare-and-write and rebuilding stand on.
//!
//! How it works. A lock is asked for by range; those that overlap follow one another in the order in which they were asked for. When it
//! is a lock's turn, a message goes to every reactor: from then on I/O of the kind that it keeps out waits there ([`Keep`]), and
//! the reactor answers when what was under way in the range before has ended. When all have answered, the lock is had. It is given up when the
//! [`RangeLock`] is dropped, on whatever thread: what waited goes on, judged anew.
//!
//! **Nothing waits in a circle.** A lock waits for I/O that is with the device, which ends without locks; and for earlier locks, in
//! one order for all of them. I/O that itself asks for a lock (compare-and-write) has not begun anything while it waits, so that no
//! lock waits for it. Its own I/O under the lock is not kept out by it.
//!
//! Every request is answered once: with None when the device goes first.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use qpair_reactor::{Fanout, Reactor};

use crate::{DeviceId, Io, Layer, Op, Registry};

/// What a lock keeps out of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Whatever changes it.
    Writers,
    /// Whatever touches it.
    Everything,
}

/// A range under lock, as every reactor knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) id: u64,
    lba: u64,
    blocks: u64,
    keep: Keep,
}

impl Range {
    fn meets(&self, lba: u64, blocks: u64) -> bool {
        lba < self.lba.saturating_add(self.blocks) && self.lba < lba.saturating_add(blocks)
    }

    /// Whether an I/O whose first block here is `lba` must stay out.
    pub(crate) fn excludes(&self, io: &Io, lba: u64) -> bool {
        let everything = self.keep == Keep::Everything;
        match io.op {
            Op::Flush | Op::Reset | Op::NvmeIo | Op::NvmeAdmin => false,
            Op::Copy => self.meets(lba, io.blocks) || (everything && self.meets(io.source_lba, io.blocks)),
            Op::Read | Op::Compare | Op::SeekData | Op::SeekHole | Op::Verify => everything && self.meets(lba, io.blocks),
            // An append names its zone's first block, and writes somewhere behind it.
            Op::ZoneAppend => lba < self.lba.saturating_add(self.blocks),
            _ => self.meets(lba, io.blocks),
        }
    }
}

type Reply = Box<dyn FnOnce(Option<RangeLock>) + Send>;

/// Who asked for a lock and has no answer yet; dropped, it says none.
struct Asker(Option<Reply>);

impl Asker {
    fn tell(mut self, lock: RangeLock) {
        if let Some(reply) = self.0.take() {
            reply(Some(lock));
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        if let Some(reply) = self.0.take() {
            reply(None);
        }
    }
}

/// The locks of one device, those had and those waited for.
#[derive(Default)]
pub(crate) struct Ranges {
    next: u64,
    held: Vec<Range>,
    queue: VecDeque<(Range, Asker)>,
}

impl Ranges {
    /// Takes those out of the queue whose turn it is.
    fn turn(&mut self) -> Vec<(Range, Asker)> {
        let mut ready = Vec::new();
        let mut ahead: Vec<Range> = self.held.clone();
        for (range, asker) in std::mem::take(&mut self.queue) {
            let free = !ahead.iter().any(|other| other.meets(range.lba, range.blocks));
            ahead.push(range);
            if free {
                self.held.push(range);
                ready.push((range, asker));
            } else {
                self.queue.push_back((range, asker));
            }
        }
        ready
    }
}

/// A range that is its owner's until this is dropped.
pub struct RangeLock {
    registry: Arc<Registry>,
    device: DeviceId,
    range: Range,
}

/// Asks for a range of a device; the answer comes on some reactor, None if the device went first.
pub fn lock(
    registry: &Arc<Registry>,
    device: DeviceId,
    lba: u64,
    blocks: u64,
    keep: Keep,
    reply: impl FnOnce(Option<RangeLock>) + Send + 'static,
) {
    let asker = Asker(Some(Box::new(reply)));
    let ready = registry.with_ranges(device, |ranges| {
        ranges.next += 1;
        ranges.queue.push_back((Range { id: ranges.next, lba, blocks, keep }, asker));
        ranges.turn()
    });
    begin(registry, device, ready);
}

fn begin(registry: &Arc<Registry>, device: DeviceId, ready: Option<Vec<(Range, Asker)>>) {
    for (range, asker) in ready.into_iter().flatten() {
        let Some(home) = registry.reactors().first() else { return };
        let lock = RangeLock { registry: registry.clone(), device, range };
        let had = Fanout::new(home.clone(), move |_| asker.tell(lock));
        had.on_each(registry.reactors(), move |reactor, part| {
            let layer = Layer::of(reactor);
            layer.borrow_mut().keep_out(device, range, &Rc::new(part));
        });
    }
}

impl Drop for RangeLock {
    fn drop(&mut self) {
        let (device, id) = (self.device, self.range.id);
        for handle in self.registry.reactors() {
            handle.call(move |reactor: &mut Reactor| {
                let layer = Layer::of(reactor);
                let mut layer = layer.borrow_mut();
                layer.let_in(device, id);
                layer.settle(reactor);
            });
        }
        let ready = self.registry.with_ranges(device, |ranges| {
            ranges.held.retain(|range| range.id != id);
            ranges.turn()
        });
        begin(&self.registry, device, ready);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(id: u64, lba: u64, blocks: u64) -> Range {
        Range { id, lba, blocks, keep: Keep::Writers }
    }

    fn ask(ranges: &mut Ranges, id: u64, lba: u64, blocks: u64) {
        ranges.queue.push_back((range(id, lba, blocks), Asker(None)));
    }

    fn ids(ready: &[(Range, Asker)]) -> Vec<u64> {
        ready.iter().map(|(range, _)| range.id).collect()
    }

    #[test]
    fn locks_that_overlap_follow_one_another_and_none_overtakes() {
        let mut ranges = Ranges::default();
        ask(&mut ranges, 1, 0, 10);
        ask(&mut ranges, 2, 5, 10);
        ask(&mut ranges, 3, 12, 5);
        ask(&mut ranges, 4, 20, 5);
        assert_eq!(ids(&ranges.turn()), [1, 4], "3 touches only what 2 waits for, and waits behind it");
        ranges.held.retain(|range| range.id != 1);
        assert_eq!(ids(&ranges.turn()), [2]);
        ranges.held.retain(|range| range.id != 2);
        assert_eq!(ids(&ranges.turn()), [3]);
    }

    #[test]
    fn ranges_at_the_end_of_all_numbers_do_not_wrap() {
        assert!(range(1, 10, u64::MAX).meets(u64::MAX - 1, 5));
        assert!(!range(1, 0, 1).meets(u64::MAX, 2));
    }
}
