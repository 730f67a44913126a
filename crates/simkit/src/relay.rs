//! A module for the simulator that stands on a base some blocks further on, and panics as planned.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, QueueId, Registry};
use qpair_reactor::Reactor;
use qpair_reactor::sim::{self, Rng};

/// See the module's doc.
pub struct Relay {
    /// Can be changed until it is registered.
    pub info: Info,
    base: Descriptor,
    shift: u64,
    panics: Arc<AtomicU64>,
}

impl Relay {
    /// All of `base` but its first `shift` blocks; `panic`: per mille of calls.
    pub fn register(registry: &Arc<Registry>, name: &str, base: &str, shift: u64, panic: u64) -> Result<(), BdevError> {
        let relay = Self::new(registry, name, base, shift, &Arc::new(AtomicU64::new(panic)))?;
        registry.register(Arc::new(relay)).map(drop)
    }

    /// The same, to be registered; how many of its calls panic can be changed at any time.
    pub fn new(registry: &Arc<Registry>, name: &str, base: &str, shift: u64, panics: &Arc<AtomicU64>) -> Result<Self, BdevError> {
        let base = registry.open_base(base, "relay")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        let mut info = Info::over(&below, name, "relay");
        info.num_blocks = info.num_blocks.saturating_sub(shift);
        Ok(Self { info, base, shift, panics: panics.clone() })
    }
}

impl Device for Relay {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        let mut rng = sim::draw(reactor, Rng::fork);
        if rng.chance(self.panics.load(Ordering::SeqCst), 1000) {
            panic!("planned");
        }
        let (queue, panics) = (layer.add_inner_queue(id), self.panics.clone());
        Ok(Box::new(RelayChannel { id, below, queue, shift: self.shift, panics, rng }))
    }

    fn base_resized(&self, base: &Info) -> Option<u64> {
        Some(base.num_blocks.saturating_sub(self.shift))
    }

    fn resize(&self, _: u64) -> Result<(), BdevError> {
        Ok(())
    }
}

struct RelayChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
    shift: u64,
    panics: Arc<AtomicU64>,
    rng: Rng,
}

impl RelayChannel {
    fn panic_as_planned(&mut self) {
        if self.rng.chance(self.panics.load(Ordering::SeqCst), 1000) {
            panic!("planned");
        }
    }
}

impl Channel for RelayChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        let passed = self.rng.below(batch.len() as u64 + 1) as usize;
        layer.pass_down(reactor, self.below, self.queue, 0, self.shift, &batch[..passed]);
        self.panic_as_planned();
        layer.pass_down(reactor, self.below, self.queue, 0, self.shift, &batch[passed..]);
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        let passed = self.rng.below(batch.len() as u64 + 1) as usize;
        layer.pass_up(self.id, self.shift, &batch[..passed]);
        self.panic_as_planned();
        layer.pass_up(self.id, self.shift, &batch[passed..]);
    }

    fn close(&mut self, _: &mut Layer, _: &mut Reactor) {
        self.panic_as_planned();
    }
}
