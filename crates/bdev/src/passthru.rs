//! A bdev that is another one by another name: the smallest that stands on a base, and the one to read before writing such a module.

use std::sync::Arc;

use qpair_reactor::Reactor;
use uuid::Uuid;

use crate::{BdevError, Channel, ChannelId, Descriptor, Device, Info, IoId, Layer, QueueId, Registry};

/// See the module's doc.
pub struct Passthru {
    info: Info,
    base: Descriptor,
}

impl Passthru {
    /// On the bdev `base`, which is claimed.
    pub fn new(registry: &Arc<Registry>, name: &str, base: &str, uuid: Option<Uuid>) -> Result<Self, BdevError> {
        let base = registry.open_base(base, "passthru")?;
        let below = base.info().ok_or_else(|| BdevError::NoSuchBdev(base.name().to_owned()))?;
        let mut info = Info::over(&below, name, "passthru");
        info.uuid = uuid.unwrap_or(info.uuid);
        Ok(Self { info, base })
    }
}

impl Device for Passthru {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let below = layer.open_base(reactor, id, &self.base)?;
        Ok(Box::new(PassthruChannel { id, below, queue: layer.add_straight_queue(id) }))
    }

    fn base_resized(&self, base: &Info) -> Option<u64> {
        Some(base.num_blocks)
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let below = self.base.info().map_or(0, |info| info.num_blocks);
        if num_blocks == below { Ok(()) } else { Err(BdevError::invalid("num_blocks", num_blocks, format!("its base's {below}"))) }
    }
}

struct PassthruChannel {
    id: ChannelId,
    below: ChannelId,
    queue: QueueId,
}

impl Channel for PassthruChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        layer.pass_down(reactor, self.below, self.queue, 0, 0, batch);
    }

    fn completed(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        layer.pass_up(self.id, 0, batch);
    }
}
