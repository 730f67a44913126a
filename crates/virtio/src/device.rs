//! The device: what all its channels share, and which queue is whose.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qpair_bdev::{Buffer, Channel, ChannelId, Device, Info, Layer};
use qpair_reactor::event::Event;
use qpair_reactor::log::{self, Level};
use qpair_reactor::{Handle, PollerId, Reactor};

use crate::chain::Chains;
use crate::channel::VirtioChannel;
use crate::config::{Agreed, agree};
use crate::packed::PackedRing;
use crate::ring::Place;
use crate::split::SplitRing;
use crate::{BdevError, VirtioLayout};

/// One queue as the target knows it.
pub struct QueueSetup {
    /// Entries, as told to the target.
    pub size: u16,
    /// Notified to kick the target.
    pub kick: Event,
    /// Notified by the target when asked for.
    pub call: Event,
}

/// A vhost-user-blk target as a bdev. Its rings are set up at the target before it is registered.
pub struct VirtioBlk {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) layout: Arc<VirtioLayout>,
    pub(crate) agreed: Agreed,
    pub(crate) queues: Vec<QueueSetup>,
    states: Mutex<Vec<State>>,
    failed: AtomicBool,
}

/// Where a queue stands between channels.
#[derive(Default)]
struct State {
    /// None: it was never used.
    place: Option<Place>,
    holder: Option<(Handle, PollerId)>,
    /// Requests were given up on it: the target may still answer them.
    dead: bool,
}

impl VirtioBlk {
    /// `features` and `config` as agreed on; `queues` in the target's order, the first of those that `layout` has.
    pub fn new(name: &str, layout: Arc<VirtioLayout>, features: u64, config: &[u8], queues: Vec<QueueSetup>) -> Result<Self, BdevError> {
        if queues.is_empty() || queues.len() > layout.num_queues() {
            return Err(BdevError::invalid("queues", queues.len(), format!("1 to the layout's {}", layout.num_queues())));
        }
        if let Some(queue) = queues.iter().find(|queue| queue.size != layout.queue_size()) {
            return Err(BdevError::invalid("queue_size", queue.size, format!("the layout's {}", layout.queue_size())));
        }
        let size = layout.size();
        let agreed = agree(name, features, config, layout.max_io_bytes(), |indirect, packed| Chains::slots_of(size, indirect, packed))?;
        let states = queues.iter().map(|_| State::default()).collect();
        Ok(Self { shared: Arc::new(Shared { layout, agreed, queues, states: Mutex::new(states), failed: AtomicBool::new(false) }) })
    }
}

impl Device for VirtioBlk {
    fn info(&self) -> Info {
        self.shared.agreed.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let poller = layer.poller(id).ok_or_else(|| BdevError::Removing(self.info().name))?;
        let (queue, place) = self.shared.take_queue(reactor.handle(), poller)?;
        let shared = self.shared.clone();
        let opened: Result<Box<dyn Channel>, BdevError> = if shared.agreed.packed {
            VirtioChannel::<PackedRing>::open(shared, reactor, layer, id, poller, queue, place).map(|channel| Box::new(channel) as _)
        } else {
            VirtioChannel::<SplitRing>::open(shared, reactor, layer, id, poller, queue, place).map(|channel| Box::new(channel) as _)
        };
        opened.inspect_err(|_| self.shared.return_queue(queue, place, false))
    }

    fn polled(&self) -> bool {
        true
    }

    fn buffer(&self, bytes: u64) -> Option<Buffer> {
        self.shared.layout.lend(bytes)
    }
}

impl Shared {
    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_queue(&self, handle: Handle, poller: PollerId) -> Result<(usize, Option<Place>), BdevError> {
        let mut states = self.states();
        let count = states.len();
        let free = states.iter_mut().enumerate().find(|(_, state)| state.holder.is_none() && !state.dead);
        let Some((index, state)) = free else {
            return Err(BdevError::Unsupported(format!("{} on one more reactor: its {count} queues are taken", self.agreed.info.name)));
        };
        state.holder = Some((handle, poller));
        Ok((index, state.place))
    }

    pub(crate) fn return_queue(&self, queue: usize, place: Option<Place>, dead: bool) {
        let state = &mut self.states()[queue];
        *state = State { place, holder: None, dead };
    }

    #[inline]
    pub(crate) fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// The target broke the rules: no queue of it is used any more. The other reactors hear of it by a wake-up.
    #[cold]
    pub(crate) fn fail(&self, queue: usize, reason: &str) {
        if self.failed.swap(true, Ordering::Relaxed) {
            return;
        }
        log::say(
            Level::Error,
            "virtio",
            format_args!("{}: queue {queue}: {reason}; the device fails all I/O from now on", self.agreed.info.name),
        );
        for (handle, poller) in self.states().iter().filter_map(|state| state.holder.clone()) {
            handle.call(move |reactor| {
                if let Some(waker) = reactor.waker(poller) {
                    waker.wake();
                }
            });
        }
    }
}
