//! A module for the simulator that stands on a base some blocks further on, and panics as planned.

use std::sync::Arc;

use qpair_bdev::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, QueueId, Registry};
use qpair_reactor::Reactor;
use qpair_reactor::sim::{self, Rng};

/// See the module's doc.
pub struct Relay {
    info: Info,
    base: Descriptor,
    shift: u64,
    panic: u64,
}

impl Relay {
    /// All of `base` but its first `shift` blocks; `panic`: per mille of calls.
    pub fn register(registry: &Arc<Registry>, name: &str, base: &str, shift: u64, panic: u64) -> Result<(), BdevError> {
        let base = registry.open_base(base, "relay")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        let mut info = Info::over(&below, name, "relay");
        info.num_blocks -= shift;
        registry.register(Arc::new(Self { info, base, shift, panic })).map(drop)
    }
}

impl Device for Relay {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        let mut rng = sim::draw(reactor, Rng::fork);
        if rng.chance(self.panic, 1000) {
            panic!("planned");
        }
        Ok(Box::new(RelayChannel { id, below, queue: layer.add_inner_queue(id), shift: self.shift, panic: self.panic, rng }))
    }

    fn base_resized(&self, base: &Info) -> Option<u64> {
        Some(base.num_blocks - self.shift)
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
    panic: u64,
    rng: Rng,
}

impl RelayChannel {
    fn panic_as_planned(&mut self) {
        if self.rng.chance(self.panic, 1000) {
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
