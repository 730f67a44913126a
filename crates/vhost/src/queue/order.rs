//! Answers in the order of the requests, for a driver that chose IN_ORDER (Virtio 1.2, 2.7.9 and 2.8.10).
//!
//! A request that is done before one ahead of it waits: its status is written, and its id stays in flight, so that a driver cannot use it anew, and a successor
//! does it again. What waits is not counted as in flight of the disk: when that is nothing, nothing waits either. A queue without the feature asks once a request.

use std::collections::VecDeque;

use super::Queue;
use crate::ring::Kind;

/// See the module's doc.
pub(super) struct Order {
    /// Ids taken and not yet pushed, oldest first.
    taken: VecDeque<u16>,
    /// By id: how many bytes were written, once it is done.
    done: Vec<Option<u32>>,
}

impl Order {
    pub(super) fn new(size: usize) -> Self {
        Self { taken: VecDeque::with_capacity(size), done: vec![None; size] }
    }

    #[inline]
    pub(super) fn took(&mut self, id: u16) {
        self.taken.push_back(id);
    }

    /// The oldest, if it is done.
    fn next(&mut self) -> Option<(u16, u32)> {
        let id = *self.taken.front()?;
        let written = self.done[usize::from(id)].take()?;
        self.taken.pop_front();
        Some((id, written))
    }
}

impl<R: Kind> Queue<R> {
    /// Pushes all that may be pushed now that this one is done.
    #[inline(never)]
    pub(super) fn answer_in_order(&mut self, name: u16, written: u32) {
        // In flight until it is pushed.
        self.slots[usize::from(name)].pending = 1;
        if let Some(order) = &mut self.order {
            order.done[usize::from(name)] = Some(written);
        }
        while let Some((id, written)) = self.order.as_mut().and_then(Order::next) {
            self.slots[usize::from(id)].pending = 0;
            self.push(id, written);
        }
    }
}
