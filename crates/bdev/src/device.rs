//! What a bdev module implements.

use std::fmt;

use qpair_reactor::Reactor;
use uuid::Uuid;

use crate::layer::ZEROS;
use crate::{BdevError, Buffer, ChannelId, FRAMES_MAX, Hold, IoId, Layer, Op, Zoned};

/// A set of operations.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct OpSet(u32);

impl OpSet {
    /// Of these operations.
    pub const fn of(ops: &[Op]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < ops.len() {
            bits |= 1 << ops[i] as u32;
            i += 1;
        }
        Self(bits)
    }

    /// This set and `op`.
    pub const fn with(self, op: Op) -> Self {
        Self(self.0 | 1 << op as u32)
    }

    /// Whether `op` is in it.
    #[inline]
    pub const fn has(self, op: Op) -> bool {
        self.0 & (1 << op as u32) != 0
    }
}

impl fmt::Debug for OpSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OpSet({:#x})", self.0)
    }
}

/// A device's geometry, limits and capabilities: an immutable snapshot. A change is a new one with a higher version.
#[derive(Clone, Debug)]
pub struct Info {
    /// Unique in the registry.
    pub name: String,
    /// "malloc", "null", "uring" ...
    pub module: &'static str,
    /// Unique in the registry.
    pub uuid: Uuid,
    /// Bytes in a logical block: a power of two from 512 to 65536.
    pub block_size: u32,
    /// Bytes in a physical block.
    pub physical_block_size: u32,
    /// Size in logical blocks.
    pub num_blocks: u64,
    /// Writes come in multiples of so many blocks.
    pub write_unit_blocks: u32,
    /// An I/O should not cross a multiple of so many blocks; 0: no such boundary.
    pub optimal_io_boundary: u32,
    /// Whether the layer splits at that boundary.
    pub split_on_boundary: bool,
    /// Larger reads and writes are split; 0: no limit.
    pub max_io_blocks: u32,
    /// Larger unmaps and write-zeroes are split; 0: no limit.
    pub max_unmap_blocks: u32,
    /// Lists with more entries are split; 0: no limit.
    pub max_segments: u32,
    /// I/Os with the device at once, each channel; the rest wait in the layer. 0: no limit.
    pub queue_depth: u32,
    /// Bytes of metadata a block.
    pub metadata_bytes: u32,
    /// Refuses whatever changes it.
    pub readonly: bool,
    /// Has a volatile write cache: a flush means something.
    pub write_cache: bool,
    /// What the device does itself.
    pub supported: OpSet,
    /// The zones it is written in, if it is a zoned one.
    pub zoned: Option<Zoned>,
    /// The file behind it, if any.
    pub path: Option<String>,
    /// How many bdevs lie below it, one upon the other.
    pub depth: u8,
    /// The bdevs right below it, by name.
    pub bases: Vec<String>,
    /// Counts changes.
    pub version: u64,
}

impl Info {
    /// A plain readable and writable device, to be adjusted.
    pub fn new(name: &str, module: &'static str, block_size: u32, num_blocks: u64) -> Self {
        Self {
            name: name.to_owned(),
            module,
            uuid: Uuid::new_v4(),
            block_size,
            physical_block_size: block_size,
            num_blocks,
            write_unit_blocks: 1,
            optimal_io_boundary: 0,
            split_on_boundary: false,
            max_io_blocks: 0,
            max_unmap_blocks: 0,
            max_segments: 0,
            queue_depth: 0,
            metadata_bytes: 0,
            readonly: false,
            write_cache: false,
            supported: OpSet::of(&[Op::Read, Op::Write, Op::Reset]),
            zoned: None,
            path: None,
            depth: 0,
            bases: Vec::new(),
            version: 1,
        }
    }

    /// A device that looks like the one it stands on. Limits are left out: the layer splits for whom they concern.
    pub fn over(base: &Info, name: &str, module: &'static str) -> Self {
        Self {
            physical_block_size: base.physical_block_size,
            write_unit_blocks: base.write_unit_blocks,
            optimal_io_boundary: base.optimal_io_boundary,
            metadata_bytes: base.metadata_bytes,
            readonly: base.readonly,
            write_cache: base.write_cache,
            supported: base.supported,
            zoned: base.zoned,
            depth: base.depth.saturating_add(1),
            bases: vec![base.name.clone()],
            ..Self::new(name, module, base.block_size, base.num_blocks)
        }
    }

    /// Refuses a geometry that no layer could work with.
    pub fn check(&self) -> Result<(), BdevError> {
        if !self.block_size.is_power_of_two() || !(512..=65536).contains(&self.block_size) {
            return Err(BdevError::invalid("block_size", self.block_size, "a power of two from 512 to 65536"));
        }
        let limit = (i64::MAX as u64) / u64::from(self.block_size);
        if self.num_blocks == 0 || self.num_blocks > limit {
            return Err(BdevError::invalid("num_blocks", self.num_blocks, format!("1 to {limit}")));
        }
        if self.name.is_empty() || self.name.len() > 255 {
            return Err(BdevError::invalid("name", &self.name, "1 to 255 bytes"));
        }
        if self.physical_block_size < self.block_size || !self.physical_block_size.is_multiple_of(self.block_size) {
            return Err(BdevError::invalid("physical_block_size", self.physical_block_size, "a multiple of block_size"));
        }
        if usize::from(self.depth) >= FRAMES_MAX {
            return Err(BdevError::invalid("base_bdev", self.bases.join(", "), format!("at most {} bdevs below a bdev", FRAMES_MAX - 1)));
        }
        let unit = self.write_unit_blocks;
        let limit = ZEROS as u32 / self.block_size;
        if unit == 0 || unit > limit {
            return Err(BdevError::invalid("write_unit_blocks", unit, format!("1 to {limit}")));
        }
        let boundary = if self.split_on_boundary { self.optimal_io_boundary } else { 0 };
        if !self.max_io_blocks.is_multiple_of(unit) || boundary % unit != 0 {
            let value = format!("{unit} with max_io_blocks {} and boundary {boundary}", self.max_io_blocks);
            return Err(BdevError::invalid("write_unit_blocks", value, "a divisor of both"));
        }
        self.zoned.map_or(Ok(()), |zoned| self.check_zones(&zoned))
    }

    fn check_zones(&self, zoned: &Zoned) -> Result<(), BdevError> {
        if zoned.capacity_blocks == 0 || zoned.capacity_blocks > zoned.zone_blocks {
            let limit = format!("1 to {}, the zone's size", zoned.zone_blocks);
            return Err(BdevError::invalid("zone_capacity", zoned.capacity_blocks, limit));
        }
        if !self.num_blocks.is_multiple_of(zoned.zone_blocks) {
            return Err(BdevError::invalid("num_blocks", self.num_blocks, format!("a multiple of the zone's {}", zoned.zone_blocks)));
        }
        Ok(())
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.num_blocks * u64::from(self.block_size)
    }
}

/// What becomes of a device whose base is going away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes first.
    Goes,
    /// It does without.
    Stays,
}

/// A storage device, shared by all reactors. Dropped when removed and the last channel is gone.
pub trait Device: Send + Sync {
    /// Its snapshot when registered. Later ones live in the registry.
    fn info(&self) -> Info;

    /// Opens this reactor's way to it. `id` is what the layer will call it.
    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError>;

    /// Whether channels want to be polled (they wait for something other than the reactor's driver).
    fn polled(&self) -> bool {
        false
    }

    /// Memory that the device reaches without a copy, if it has such and `bytes` of it are free. Ask by [`crate::Descriptor::buffer`].
    fn buffer(&self, _bytes: u64) -> Option<Buffer> {
        None
    }

    /// Looks again how large it is, in blocks, where somebody else may change that.
    fn rescan(&self) -> Result<u64, BdevError> {
        Err(BdevError::Unsupported(format!("{} cannot be rescanned", self.info().name)))
    }

    /// A bdev that it stands on is going away. Either it goes too, which is what most do: the layer sees to that; or it does without,
    /// and drops `hold` when it has closed its channels there.
    fn base_removing(&self, _base: &str, _hold: Hold) -> Fate {
        Fate::Goes
    }

    /// A bdev that it stands on has another size. How many blocks it has itself from now on; None: as many as before.
    fn base_resized(&self, _base: &Info) -> Option<u64> {
        None
    }

    /// Whether a reset of it goes on to the bdevs that it stands on, once its own channels are quiet and reset: for who has them to itself.
    fn resets_bases(&self) -> bool {
        false
    }

    /// Changes the size where the module can; called when all channels are quiet if it shrinks.
    fn resize(&self, _num_blocks: u64) -> Result<(), BdevError> {
        Err(BdevError::Unsupported(format!("{} cannot be resized", self.info().name)))
    }
}

/// One reactor's way to a device. All calls come from that reactor.
///
/// Every I/O passed to `submit` is in range, supported and within the limits of [`Info`]; its list has exactly the bytes
/// that its blocks need. Each must be completed once by [`Layer::complete`], in `submit` or later.
pub trait Channel {
    /// Starts a batch. What can be finished at once is; the rest is pending.
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]);

    /// The batch is over: ring doorbells. Called once after one or more `submit`s that left something in flight.
    fn unplug(&mut self, _layer: &mut Layer, _reactor: &mut Reactor) {}

    /// Looks for completions; returns how many things were done. Only for [`Device::polled`] ones.
    fn poll(&mut self, _layer: &mut Layer, _reactor: &mut Reactor) -> usize {
        0
    }

    /// See [`qpair_reactor::Poller::arm`].
    fn arm(&mut self, _reactor: &mut Reactor) -> bool {
        true
    }

    /// See [`qpair_reactor::Poller::disarm`].
    fn disarm(&mut self, _reactor: &mut Reactor) {}

    /// A driver operation of this channel is done.
    fn done(&mut self, _layer: &mut Layer, _reactor: &mut Reactor, _value: u64, _result: i32) {}

    /// I/Os that this channel passed on to the channels below are back.
    fn completed(&mut self, _layer: &mut Layer, _reactor: &mut Reactor, _batch: &[IoId]) {}

    /// Please finish this I/O soon. A hint.
    fn abort(&mut self, _layer: &mut Layer, _reactor: &mut Reactor, _id: IoId) {}

    /// All channels are quiet and a reset was asked for.
    fn reset(&mut self, _layer: &mut Layer, _reactor: &mut Reactor) {}

    /// The channel is about to be dropped; nothing is in flight. Queues of its own are given up here.
    fn close(&mut self, _layer: &mut Layer, _reactor: &mut Reactor) {}
}
