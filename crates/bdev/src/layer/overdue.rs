//! I/O of a bdev that takes too long: a failure of that bdev, and told as one.
//!
//! How it works. Once in a quarter of the time-out (within a millisecond and a second) all reactors are asked for the oldest I/O that is with the bdev, whoever
//! submitted it: by a walk through the reactor's I/Os, so that nothing is done for that when I/O begins or ends, and nothing at all where no time-out is set. If the oldest of all is older
//! than the time-out, [`crate::Notice::Failed`] names it: once, and again when [`QUIET_NS`](super::health::QUIET_NS) passed without such an I/O. It counts from when the
//! I/O came to this bdev, waiting for limits included. The next look waits for the answers of the last.
//!
//! The I/O is left alone. For who is to abort it or reset the device there is [`crate::Descriptor::set_timeout`].
//!
//! Limits: a reactor that stands still itself answers no look.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_reactor::Reactor;

use super::Layer;
use super::watch::{LOOK_MAX_NS, LOOK_MIN_NS, Late};
use crate::io::State;
use crate::lifecycle::{Stance, on_channels};
use crate::{ChannelId, DeviceId, IoId, Registry};

/// Looks after one device.
pub(crate) struct Overdue {
    timeout_ns: u64,
    stopped: AtomicBool,
}

impl Overdue {
    pub(crate) fn new(timeout_ns: u64) -> Arc<Self> {
        Arc::new(Self { timeout_ns, stopped: AtomicBool::new(false) })
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn start(self: &Arc<Self>, registry: &Arc<Registry>, device: DeviceId) {
        let (this, shared) = (self.clone(), registry.clone());
        if let Some(home) = registry.reactors().first() {
            home.call(move |reactor| this.wait(reactor, shared, device));
        }
    }

    fn wait(self: Arc<Self>, reactor: &mut Reactor, registry: Arc<Registry>, device: DeviceId) {
        reactor.after((self.timeout_ns / 4).clamp(LOOK_MIN_NS, LOOK_MAX_NS), move |_| self.look(registry, device));
    }

    fn look(self: Arc<Self>, registry: Arc<Registry>, device: DeviceId) {
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let oldest: Arc<Mutex<Option<Late>>> = Arc::default();
        let (found, shared) = (oldest.clone(), registry.clone());
        let ask = move |layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, _part| {
            let mine = layer.oldest_of(channel, reactor.now_ns());
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            *found = found.into_iter().chain(mine).max_by_key(|late| late.age_ns);
        };
        on_channels(&registry, device, Stance::Neither, ask, move |reactor| {
            let oldest = oldest.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(late) = oldest.filter(|late| late.age_ns >= self.timeout_ns && !self.stopped.load(Ordering::Relaxed)) {
                self.tell(&shared, device, &late, reactor.now_ns());
            }
            self.wait(reactor, shared, device);
        });
    }

    fn tell(&self, registry: &Arc<Registry>, device: DeviceId, late: &Late, now_ns: u64) {
        if registry.health(device).is_some_and(|health| health.is_news("timeout", true, now_ns)) {
            let seconds = |ns: u64| ns as f64 / 1e9;
            let (age, limit) = (seconds(late.age_ns), seconds(self.timeout_ns));
            let Late { op, lba, blocks, .. } = late;
            let reason =
                format!("an I/O ({op:?} of {blocks} blocks at block {lba}) has been under way for {age:.1} s, the time-out is {limit} s");
            registry.report_failure(device, reason);
        }
    }
}

impl Layer {
    /// Of the I/Os that came to this channel and have not left it, also to channels below, the one that came first.
    fn oldest_of(&self, channel: ChannelId, now_ns: u64) -> Option<Late> {
        let here = |id: IoId| {
            let io = self.ios.get(id);
            let at = io.passed().iter().position(|frame| frame.channel == channel)?;
            let frame = &io.passed()[at];
            let lba = io.passed().get(at + 1).map_or(io.lba, |next| next.lba);
            let late = Late { id, tag: frame.tag, op: io.op, lba, blocks: io.blocks, age_ns: now_ns.saturating_sub(frame.submitted_ns) };
            matches!(io.state, State::Submitted | State::Waiting).then_some(late)
        };
        self.ios.names().filter_map(here).max_by_key(|late| late.age_ns)
    }
}
