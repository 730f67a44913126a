//! What a module has to say when its device cannot do what it should: one notice for each change of state, however much I/O fails.
//!
//! How it works. A module that meets a failure calls [`Layer::report_failure`] with a cause, a word of its own for this kind of failure. The first of a cause is news
//! ([`crate::Notice::Failed`]). Further ones belong to the same episode, until I/O of the device was done again and [`QUIET_NS`] passed without that cause: then the
//! next is news. So a device tells each cause once in [`QUIET_NS`] at most, one that is dead for good tells it once, and one bad block among good ones, too.
//! Whoever knows that it is a change of state, because it happens once, says so by [`crate::Registry::report_failure`], which tells always.
//!
//! Whether I/O was done meanwhile is seen by the channel's counters, so that nothing is kept, looked at or locked for that as long as nothing fails. (A channel that was
//! opened since, and a reset of the counters, may pass for success; the time holds for them, too.)
//!
//! Listeners are called by a message on the first reactor, not while the layer is at work.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Layer, Slot};
use crate::{ChannelId, Info};

/// For so long a cause must not have been reported to be news again.
pub const QUIET_NS: u64 = 10_000_000_000;

/// A cause that was told.
struct Episode {
    cause: &'static str,
    last_ns: u64,
}

/// What was told of one device, by all its channels. Causes are a module's words, so there are few.
#[derive(Default)]
pub(crate) struct Health(Mutex<Vec<Episode>>);

impl Health {
    /// Whether this failure is news. `served`: I/O was done since the last one.
    pub(super) fn is_news(&self, cause: &'static str, served: bool, now_ns: u64) -> bool {
        let mut episodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(episode) = episodes.iter_mut().find(|episode| episode.cause == cause) else {
            episodes.push(Episode { cause, last_ns: now_ns });
            return true;
        };
        let quiet_ns = now_ns.saturating_sub(episode.last_ns);
        // Reactors do not look at the clock at the same time.
        episode.last_ns = episode.last_ns.max(now_ns);
        served && quiet_ns >= QUIET_NS
    }
}

/// What a channel keeps once something failed there.
pub(super) struct Failing {
    health: Arc<Health>,
    /// I/Os done by then.
    done: u64,
}

impl Slot {
    #[cold]
    fn fails(&mut self, cause: &'static str, now_ns: u64) -> bool {
        let done = self.stats.done();
        let failing = match &mut self.failing {
            Some(failing) => failing,
            place => {
                let Some(health) = self.registry.health(self.device_id) else { return false };
                place.insert(Box::new(Failing { health, done: 0 }))
            }
        };
        let served = std::mem::replace(&mut failing.done, done) != done;
        failing.health.is_news(cause, served, now_ns)
    }
}

impl Layer {
    /// A channel says that its device failed: `cause` is the module's word for this kind of failure, `reason` one sentence with fields and values, asked for only if
    /// it is told. To be called for each I/O that fails, if need be; see the module's doc.
    #[cold]
    pub fn report_failure(&mut self, channel: ChannelId, cause: &'static str, reason: impl FnOnce(&Info) -> String) {
        let now_ns = self.now_ns;
        let Some(slot) = self.slots.get_mut(channel.0 as usize).and_then(Option::as_mut) else { return };
        if slot.fails(cause, now_ns) {
            let reason = reason(&slot.info);
            slot.registry.report_failure(slot.device_id, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_news_again_when_it_was_quiet_and_io_was_done() {
        let health = Health::default();
        assert!(health.is_news("io", false, 5));
        assert!(!health.is_news("io", true, 5 + QUIET_NS - 1), "too soon");
        assert!(!health.is_news("io", true, 5 + QUIET_NS), "quiet since the last one, not since the one that was told");
        assert!(!health.is_news("io", false, 5 + 3 * QUIET_NS), "nothing was done meanwhile");
        assert!(health.is_news("io", true, 5 + 4 * QUIET_NS));
        assert!(health.is_news("gone", false, 5 + 4 * QUIET_NS), "another cause");
        assert!(!health.is_news("io", true, 0), "a reactor whose clock is behind");
        assert!(!health.is_news("io", true, 5 + 5 * QUIET_NS - 1));
    }
}
