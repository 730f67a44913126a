//! The device: what all its channels share, and which queue is whose.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qpair_bdev::{Buffer, Channel, ChannelId, Device, Info, Layer};
use qpair_reactor::event::Event;
use qpair_reactor::log::{self, Level};
use qpair_reactor::{Handle, PollerId, Reactor};

use crate::chain::Chains;
use crate::channel::{Seat, VirtioChannel};
use crate::config::{Agreed, agree};
use crate::link::{Bond, Link};
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
    pub(crate) bond: Bond,
    /// Size in blocks, as the target said last.
    pub(crate) blocks: AtomicU64,
}

/// Where a queue stands between channels. All but its holder is true of one connection only: the next has new rings.
#[derive(Default)]
struct State {
    epoch: u32,
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
        let states = Mutex::new(queues.iter().map(|_| State::default()).collect());
        let blocks = AtomicU64::new(agreed.info.num_blocks);
        Ok(Self { shared: Arc::new(Shared { layout, agreed, queues, states, bond: Bond::default(), blocks }) })
    }

    /// For whoever can connect again. A device without one fails all I/O once its target broke the rules; one with a link waits.
    pub fn link(&self) -> Link {
        self.shared.bond.recover();
        Link::new(self.shared.clone())
    }
}

impl Device for VirtioBlk {
    fn info(&self) -> Info {
        self.shared.agreed.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let poller = layer.poller(id).ok_or_else(|| BdevError::Removing(self.info().name))?;
        // A connection that comes between finds the channel, or is found by it: both on this reactor.
        let epoch = self.shared.bond.epoch();
        let (queue, place) = self.shared.take_queue(reactor.handle(), poller, epoch)?;
        let shared = self.shared.clone();
        let opened: Result<Box<dyn Channel>, BdevError> = if shared.agreed.packed {
            VirtioChannel::<PackedRing>::open(shared, reactor, layer, id, Seat { poller, queue, place, epoch })
                .map(|channel| Box::new(channel) as _)
        } else {
            VirtioChannel::<SplitRing>::open(shared, reactor, layer, id, Seat { poller, queue, place, epoch })
                .map(|channel| Box::new(channel) as _)
        };
        opened.inspect_err(|_| self.shared.return_queue(queue, epoch, place, false))
    }

    fn polled(&self) -> bool {
        true
    }

    fn buffer(&self, bytes: u64) -> Option<Buffer> {
        self.shared.layout.lend(bytes)
    }

    fn rescan(&self) -> Result<u64, BdevError> {
        Ok(self.shared.blocks.load(Ordering::Relaxed))
    }

    /// The size is the target's affair.
    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        if num_blocks == self.shared.blocks.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(BdevError::Unsupported(format!("{} cannot be resized", self.info().name)))
    }
}

impl Shared {
    fn states(&self) -> MutexGuard<'_, Vec<State>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_queue(&self, handle: Handle, poller: PollerId, epoch: u32) -> Result<(usize, Option<Place>), BdevError> {
        let mut states = self.states();
        let count = states.len();
        let usable = |state: &State| state.holder.is_none() && !(state.dead && state.epoch == epoch);
        let Some((index, state)) = states.iter_mut().enumerate().find(|(_, state)| usable(state)) else {
            return Err(BdevError::Unsupported(format!("{} on one more reactor: its {count} queues are taken", self.agreed.info.name)));
        };
        state.holder = Some((handle, poller));
        Ok((index, state.place.filter(|_| state.epoch == epoch)))
    }

    pub(crate) fn return_queue(&self, queue: usize, epoch: u32, place: Option<Place>, dead: bool) {
        self.states()[queue] = State { epoch, place, holder: None, dead };
    }

    /// The target broke the rules on a connection: no queue of it is used any more. The other reactors hear of it by a wake-up.
    #[cold]
    pub(crate) fn fail(&self, epoch: u32, queue: usize, reason: &str) {
        let name = &self.agreed.info.name;
        if !self.bond.sever(epoch, &format!("queue {queue}: {reason}")) {
            return;
        }
        let outcome = self.bond.consequence();
        log::say(Level::Error, "virtio", format_args!("{name}: queue {queue}: {reason}; {outcome}"));
        for (handle, poller) in self.states().iter().filter_map(|state| state.holder.clone()) {
            handle.call(move |reactor| {
                if let Some(waker) = reactor.waker(poller) {
                    waker.wake();
                }
            });
        }
    }
}
