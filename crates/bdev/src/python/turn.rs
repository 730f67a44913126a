//! Whose turn it is: the consumer is called once until it has found nothing, and no call is lost.
//!
//! A producer pushes, then asks [`Turn::must_call`]. The consumer that found nothing asks [`Turn::may_rest`]: it says that it rests, fences, and looks once
//! more. Suppose something lies in the queue and nobody was called. Its push came after that look, hence after the swap to false (the fences on both sides
//! order the four accesses), so the swap that follows the push read false, or another pusher's did: and that one calls.
//!
//! The model check is in this crate's `tests/loom.rs`.

use super::sync::atomic::{AtomicBool, Ordering, fence};

/// See the module's doc.
#[derive(Debug)]
pub struct Turn {
    /// The consumer has been called and has not rested since.
    called: AtomicBool,
}

impl Default for Turn {
    fn default() -> Self {
        Self { called: AtomicBool::new(false) }
    }
}

impl Turn {
    /// A producer's, after its push. True: call the consumer.
    #[inline]
    pub fn must_call(&self) -> bool {
        fence(Ordering::SeqCst);
        // A plain load first: a busy consumer's line is then not taken from it by every push.
        !self.called.load(Ordering::SeqCst) && !self.called.swap(true, Ordering::SeqCst)
    }

    /// The consumer's, when it found nothing. True: it may rest, a call follows whatever comes. False: it is still its turn.
    #[inline]
    pub fn may_rest(&self, empty: impl FnOnce() -> bool) -> bool {
        // A swap, which costs what a store of this strength does: producers' swaps then read it or come before it, also for loom, which lets a swap
        // read past a store that the fences order before it.
        self.called.swap(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // Who has pushed may be about to swap: one of the two goes on.
        empty() || self.called.swap(true, Ordering::SeqCst)
    }
}
