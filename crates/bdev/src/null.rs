//! A bdev that does nothing: writes vanish, reads leave the buffer as it is. For measuring everything else.

use qpair_reactor::Reactor;
use qpair_wire::nvme::Status;
use uuid::Uuid;

use crate::{BdevError, Channel, ChannelId, Device, Info, IoId, Layer, Op, OpSet};

/// See the module's doc.
pub struct Null {
    info: Info,
}

impl Null {
    /// Of a geometry; refused by the registry if it makes no sense.
    pub fn new(name: &str, block_size: u32, num_blocks: u64, uuid: Option<Uuid>, physical_block_size: u32) -> Self {
        let mut info = Info::new(name, "null", block_size, num_blocks);
        info.uuid = uuid.unwrap_or(info.uuid);
        info.physical_block_size = block_size.max(physical_block_size);
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::WriteZeroes, Op::Unmap, Op::Reset]);
        Self { info }
    }

    /// With so many bytes of metadata for each block, which vanish like the data.
    pub fn with_metadata(mut self, bytes: u32) -> Self {
        self.info.metadata_bytes = bytes;
        self
    }
}

impl Device for Null {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        Ok(Box::new(NullChannel(id)))
    }

    fn resize(&self, _: u64) -> Result<(), BdevError> {
        Ok(())
    }
}

struct NullChannel(ChannelId);

impl Channel for NullChannel {
    fn submit(&mut self, layer: &mut Layer, _: &mut Reactor, batch: &[IoId]) {
        layer.complete_all(self.0, batch, Status::SUCCESS);
    }
}
