//! A disk that takes its time: I/Os end in any order, some fail, some end only when they are aborted.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qpair_bdev::{BdevError, Channel, ChannelId, Device, Info, IoFlags, IoId, Layer, Op, OpSet};
use qpair_memory::{Mapping, Pages, Region, copy_list};
use qpair_reactor::Reactor;
use qpair_reactor::sim;
use qpair_wire::nvme::Status;

/// How badly it behaves: per mille of I/Os.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    pub fails: u64,
    pub stalls: u64,
}

pub struct Slow {
    info: Info,
    memory: Arc<Mapping>,
    manners: Manners,
    /// I/Os it has.
    pub held: Arc<AtomicU64>,
    /// Writes and write-zeroes that were to be durable (FUA).
    pub durable: Arc<AtomicU64>,
    pub channels: Arc<AtomicU64>,
}

impl Slow {
    pub fn new(name: &str, blocks: u64, manners: Manners, memory: Option<Arc<Mapping>>) -> Self {
        let mut info = Info::new(name, "slow", 512, blocks);
        info.supported = OpSet::of(&[Op::Read, Op::Write, Op::Unmap, Op::WriteZeroes, Op::Flush, Op::Reset]);
        info.write_cache = true;
        let memory = memory.unwrap_or_else(|| Mapping::anonymous((blocks * 512) as usize, Pages::Normal).unwrap());
        Self { info, memory, manners, held: Arc::default(), durable: Arc::default(), channels: Arc::default() }
    }
}

impl Device for Slow {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn open(&self, _: &mut Reactor, _: &mut Layer, _: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        self.channels.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(SlowChannel {
            memory: Region::new(self.memory.clone()),
            manners: self.manners,
            stalled: Rc::default(),
            held: self.held.clone(),
            durable: self.durable.clone(),
            channels: self.channels.clone(),
        }))
    }

    fn resize(&self, _: u64) -> Result<(), BdevError> {
        Ok(())
    }
}

struct SlowChannel {
    memory: Region,
    manners: Manners,
    stalled: Rc<RefCell<Vec<IoId>>>,
    held: Arc<AtomicU64>,
    durable: Arc<AtomicU64>,
    channels: Arc<AtomicU64>,
}

fn perform(memory: &Region, layer: &Layer, id: IoId) -> Status {
    let io = layer.io(id);
    let (offset, length) = (io.lba * 512, io.blocks * 512);
    let outcome = match io.op {
        Op::Read => copy_list(&io.list, memory, offset, length, true).map(drop),
        Op::Write => copy_list(&io.list, memory, offset, length, false).map(drop),
        Op::Unmap | Op::WriteZeroes => memory.fill(offset, length, 0),
        _ => Ok(()),
    };
    if outcome.is_ok() { Status::SUCCESS } else { Status::DATA_TRANSFER_ERROR }
}

impl Channel for SlowChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        for &id in batch {
            let manners = self.manners;
            let (fails, stalls, delay, at_once) = sim::draw(reactor, |rng| {
                (rng.chance(manners.fails, 1000), rng.chance(manners.stalls, 1000), rng.below(300_000), rng.chance(1, 4))
            });
            self.held.fetch_add(1, Ordering::Relaxed);
            self.durable.fetch_add(u64::from(layer.io(id).flags.contains(IoFlags::FUA)), Ordering::Relaxed);
            if stalls {
                self.stalled.borrow_mut().push(id);
                continue;
            }
            if at_once && !fails {
                let status = perform(&self.memory, layer, id);
                self.held.fetch_sub(1, Ordering::Relaxed);
                layer.complete(id, status);
                continue;
            }
            let (memory, held) = (self.memory.clone(), self.held.clone());
            reactor.after(delay, move |reactor| {
                let layer = Layer::of(reactor);
                let mut layer = layer.borrow_mut();
                // A device may move the bytes and fail all the same.
                let status = perform(&memory, &layer, id);
                held.fetch_sub(1, Ordering::Relaxed);
                layer.complete(id, if fails { Status::DATA_TRANSFER_ERROR } else { status });
            });
        }
    }

    fn abort(&mut self, layer: &mut Layer, _: &mut Reactor, id: IoId) {
        let found = self.stalled.borrow().iter().position(|stalled| *stalled == id);
        if let Some(position) = found {
            self.stalled.borrow_mut().remove(position);
            self.held.fetch_sub(1, Ordering::Relaxed);
            layer.complete(id, Status::ABORT_REQUESTED);
        }
    }

    fn close(&mut self, _: &mut Layer, _: &mut Reactor) {
        self.channels.fetch_sub(1, Ordering::Relaxed);
    }
}
