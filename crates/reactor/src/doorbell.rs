//! Waking a sleeping reactor, and why no wake-up is lost.
//!
//! The owner, before it sleeps: (1) stores `asleep = true`; (2) full fence; (3) looks at its inbox once more; if
//! there is something it takes `asleep` back and does not sleep. A sender: (a) pushes into the inbox; (b) full
//! fence; (c) swaps `asleep` to false, and rings if it was true.
//!
//! Suppose the owner sleeps and a message lies unseen. The owner's look (3) came before the push (a) in the single
//! order of the SeqCst fences, so (1) came before (c), and (c) read true (or another sender's (c) did, who rings). So
//! somebody rings after the owner decided to sleep; the bell (an eventfd in the driver's wait set) is level until
//! read, so the wait returns. Ringing without need costs one spurious turn and nothing else.
//!
//! The same argument holds for a poller and its peer (a guest's kick): `arm` publishes "kick me", fences, looks at
//! the ring once more; the peer publishes its request, fences, looks at "kick me".
//!
//! The model check is in this crate's `tests/loom.rs`.

use crate::sync::atomic::{AtomicBool, Ordering, fence};

/// The flag of the protocol above. What rings is the caller's.
#[derive(Debug)]
pub struct Doorbell {
    asleep: AtomicBool,
}

impl Default for Doorbell {
    fn default() -> Self {
        Self { asleep: AtomicBool::new(false) }
    }
}

impl Doorbell {
    /// Steps 1 to 3 of the owner. True: sleep, then call [`awake`](Self::awake). False: there is work.
    pub fn may_sleep(&self, empty: impl FnOnce() -> bool) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if empty() {
            return true;
        }
        self.asleep.store(false, Ordering::SeqCst);
        false
    }

    /// The owner is up again.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Steps b and c of a sender, after its push. True: ring.
    pub fn must_ring(&self) -> bool {
        fence(Ordering::SeqCst);
        // A plain load first: a busy owner's line is then not taken from it by every sender.
        self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst)
    }
}
