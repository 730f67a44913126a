//! What is looked at from time to time instead of at every I/O: I/Os that take too long, and how many are with a device.
//!
//! **Time-outs.** An I/O belongs to the descriptor whose queue it will come back to ([`Layer::add_queue_for`]); the one that its front end gave it,
//! whatever bdevs it passed on the way. A timer walks the I/Os of the reactor, and tells those that are older than the descriptor's time-out: once, and
//! again for each further time-out that passes. They are still under way: whoever is told may abort them, reset the device, or wait. It counts from
//! [`Layer::submit`], waiting for limits included, as in SPDK. An I/O is told at most [`LOOK_MAX_NS`], or a quarter of the time-out, later.
//!
//! **Queue depth.** Once a period all channels are asked how many I/Os are with the device; SPDK's `io_time` grows by the time since the last look if there were any,
//! `weighted_io_time` by that times as many. The next look waits for the answers of the last.
//!
//! Costs: nothing an I/O; a look wakes its reactors.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qpair_reactor::{LocalWaker, Reactor, TimerId};

use super::{Layer, Owner, QueueId};
use crate::io::State;
use crate::lifecycle::{Stance, on_channels};
use crate::{ChannelId, Descriptor, DeviceId, IoId, Op, Registry};

/// Time between two looks at most.
pub const LOOK_MAX_NS: u64 = 1_000_000_000;
/// And at least.
pub(super) const LOOK_MIN_NS: u64 = 1_000_000;

/// An I/O that takes long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late {
    /// Its name on this reactor, for [`Layer::abort`].
    pub id: IoId,
    /// What its submitter put beside it.
    pub tag: u64,
    /// What it does.
    pub op: Op,
    /// First block, as it was submitted.
    pub lba: u64,
    /// How many blocks.
    pub blocks: u64,
    /// For how long it has been under way.
    pub age_ns: u64,
}

/// What is called for an I/O that takes long, on its reactor.
pub type OnLate = Arc<dyn Fn(&mut Layer, &mut Reactor, Late) + Send + Sync>;

/// One descriptor's time-out on one reactor.
pub(super) struct Watch {
    descriptor: u64,
    timeout_ns: u64,
    call: OnLate,
    timer: TimerId,
    /// Those told, and at which age next.
    told: Vec<(IoId, u64)>,
}

impl Layer {
    /// A completion queue for the I/Os of one descriptor; see [`Descriptor::set_timeout`].
    pub fn add_queue_for(&mut self, waker: LocalWaker, descriptor: &Descriptor) -> QueueId {
        let queue = self.new_queue(Owner::FrontEnd(waker));
        self.queues[queue.0 as usize].descriptor = descriptor.number();
        queue
    }

    /// Begins, changes or ends (None) a descriptor's time-out on this reactor.
    pub(crate) fn watch(&mut self, reactor: &mut Reactor, descriptor: u64, wanted: Option<(u64, OnLate)>) {
        if let Some(at) = self.watches.iter().position(|watch| watch.descriptor == descriptor) {
            reactor.cancel(self.watches.swap_remove(at).timer);
        }
        if let Some((timeout_ns, call)) = wanted {
            let timer = look_again(reactor, descriptor, timeout_ns);
            self.watches.push(Watch { descriptor, timeout_ns, call, timer, told: Vec::new() });
        }
    }

    fn look(&mut self, reactor: &mut Reactor, descriptor: u64) {
        self.now_ns = reactor.now_ns();
        let Some(at) = self.watches.iter().position(|watch| watch.descriptor == descriptor) else { return };
        let timeout_ns = self.watches[at].timeout_ns;
        let late = self.late_of(descriptor, timeout_ns);
        let watch = &mut self.watches[at];
        watch.timer = look_again(reactor, descriptor, timeout_ns);
        watch.told.retain(|(id, _)| late.iter().any(|late| late.id == *id));
        let call = watch.call.clone();
        for late in late {
            let Some(watch) = self.watches.iter_mut().find(|watch| watch.descriptor == descriptor) else { break };
            let next_ns = late.age_ns - late.age_ns % timeout_ns + timeout_ns;
            match watch.told.iter_mut().find(|(id, _)| *id == late.id) {
                Some((_, at_ns)) if *at_ns > late.age_ns => continue,
                Some((_, at_ns)) => *at_ns = next_ns,
                None => watch.told.push((late.id, next_ns)),
            }
            call(self, reactor, late);
        }
        self.settle(reactor);
    }

    /// Walks the slab.
    fn late_of(&self, descriptor: u64, timeout_ns: u64) -> Vec<Late> {
        let late = |id: IoId| {
            let io = self.ios.get(id);
            let frame = io.passed().first().filter(|_| matches!(io.state, State::Submitted | State::Waiting))?;
            let age_ns = self.now_ns.saturating_sub(frame.submitted_ns);
            let lba = io.passed().get(1).map_or(io.lba, |next| next.lba);
            let own = self.queues[frame.queue.0 as usize].descriptor == descriptor && age_ns >= timeout_ns;
            own.then_some(Late { id, tag: frame.tag, op: io.op, lba, blocks: io.blocks, age_ns })
        };
        self.ios.names().filter_map(late).collect()
    }

    /// I/Os with the device.
    fn depth_of(&self, channel: ChannelId) -> u64 {
        self.slot(channel).map_or(0, |slot| u64::from(slot.inflight))
    }
}

fn look_again(reactor: &mut Reactor, descriptor: u64, timeout_ns: u64) -> TimerId {
    reactor.after((timeout_ns / 4).clamp(LOOK_MIN_NS, LOOK_MAX_NS), move |reactor| {
        let layer = Layer::of(reactor);
        layer.borrow_mut().look(reactor, descriptor);
    })
}

/// What queue depth sampling tells. Times in microseconds, as SPDK has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sampled {
    /// Time between looks.
    pub period_us: u64,
    /// I/Os at the last look.
    pub depth: u64,
    /// Time with I/O under way.
    pub io_time_us: u64,
    /// The same, each I/O for itself.
    pub weighted_io_time_us: u64,
}

/// Looks at one device's queue depth.
pub(crate) struct Sampler {
    period_us: u64,
    stopped: AtomicBool,
    sampled: Mutex<Sampled>,
}

impl Sampler {
    pub(crate) fn new(period_us: u64, so_far: Sampled) -> Arc<Self> {
        let sampled = Mutex::new(Sampled { period_us, ..so_far });
        Arc::new(Self { period_us, stopped: AtomicBool::new(false), sampled })
    }

    pub(crate) fn sampled(&self) -> Sampled {
        *self.sampled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn start(self: &Arc<Self>, registry: &Arc<Registry>, device: DeviceId) {
        let (this, shared) = (self.clone(), registry.clone());
        if let Some(home) = registry.reactors().first() {
            home.call(move |reactor| this.wait(reactor, shared, device, reactor.now_ns()));
        }
    }

    fn wait(self: Arc<Self>, reactor: &mut Reactor, registry: Arc<Registry>, device: DeviceId, last_ns: u64) {
        reactor.after(self.period_us.saturating_mul(1000), move |_| self.sample(registry, device, last_ns));
    }

    fn sample(self: Arc<Self>, registry: Arc<Registry>, device: DeviceId, last_ns: u64) {
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let depth = Arc::new(AtomicU64::new(0));
        let (sum, shared) = (depth.clone(), registry.clone());
        let ask = move |layer: &mut Layer, _: &mut Reactor, channel: ChannelId, _part| {
            sum.fetch_add(layer.depth_of(channel), Ordering::Relaxed);
        };
        on_channels(&registry, device, Stance::Neither, ask, move |reactor| {
            let now_ns = reactor.now_ns();
            self.book(depth.load(Ordering::Relaxed), now_ns.saturating_sub(last_ns) / 1000);
            self.wait(reactor, shared, device, now_ns);
        });
    }

    fn book(&self, depth: u64, elapsed_us: u64) {
        let mut sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
        sampled.depth = depth;
        if depth > 0 {
            sampled.io_time_us += elapsed_us;
            sampled.weighted_io_time_us += elapsed_us.saturating_mul(depth);
        }
    }
}
