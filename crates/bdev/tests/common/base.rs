//! A device for the simulator: it delays, reorders, fails, stalls until it is asked to abort, and panics, as planned. It
//! also checks what the layer promises to devices.
#![allow(dead_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};

use qpair_bdev::{BdevError, Channel, ChannelId, Device, Info, Io, IoId, Layer, Op, Status};
use qpair_reactor::sim::{self, Rng};
use qpair_reactor::{LocalWaker, Reactor};

/// How a device behaves; chances are per mille of I/Os.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    pub delay_ns: u64,
    pub error: u64,
    pub stall: u64,
    pub panic: u64,
}

pub struct Shared {
    pub bytes: Mutex<Vec<u8>>,
    pub blocks: AtomicU64,
    pub inflight: AtomicU64,
    pub channels: AtomicU64,
    pub plan: Plan,
    /// What is with it: operation, first block, blocks.
    pub present: Mutex<Vec<(IoId, Op, u64, u64)>>,
    /// Promises of the layer that were broken.
    pub broken: Mutex<Vec<String>>,
}

impl Shared {
    fn leave(&self, id: IoId, io: &Io) {
        let mut present = self.present.lock().unwrap();
        // Names are a reactor's own: two may be alike.
        let at = present.iter().position(|other| *other == (id, io.op, io.lba, io.blocks));
        present.swap_remove(at.expect("it is here"));
    }

    /// The I/Os in a range; reads only if asked for.
    pub fn inside(&self, lba: u64, blocks: u64, reads: bool) -> Vec<(Op, u64, u64)> {
        let present = self.present.lock().unwrap();
        let meets = |at: u64, count: u64| at < lba + blocks && lba < at + count;
        let those = present.iter().filter(|(_, op, at, count)| *op != Op::Flush && (reads || *op != Op::Read) && meets(*at, *count));
        those.map(|(_, op, at, count)| (*op, *at, *count)).collect()
    }

    fn demand(&self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.broken.lock().unwrap().push(what());
        }
    }
}

pub struct SimDevice {
    pub info: Info,
    pub shared: Arc<Shared>,
}

impl SimDevice {
    pub fn new(info: Info, plan: Plan) -> Arc<Self> {
        let shared = Shared {
            bytes: Mutex::new(vec![0; info.bytes() as usize]),
            blocks: AtomicU64::new(info.num_blocks),
            inflight: AtomicU64::new(0),
            channels: AtomicU64::new(0),
            plan,
            present: Mutex::default(),
            broken: Mutex::default(),
        };
        Arc::new(Self { info, shared: Arc::new(shared) })
    }
}

impl Device for SimDevice {
    fn info(&self) -> Info {
        Info { num_blocks: self.shared.blocks.load(Ordering::SeqCst), ..self.info.clone() }
    }

    fn open(&self, reactor: &mut Reactor, layer: &mut Layer, id: ChannelId) -> Result<Box<dyn Channel>, BdevError> {
        let waker = layer.poller(id).and_then(|poller| reactor.waker(poller)).unwrap();
        let rng = sim::draw(reactor, Rng::fork);
        self.shared.channels.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(SimChannel { shared: self.shared.clone(), info: self.info.clone(), pending: Vec::new(), waker, rng, healthy: true }))
    }

    fn polled(&self) -> bool {
        true
    }

    fn resize(&self, num_blocks: u64) -> Result<(), BdevError> {
        let before = self.shared.blocks.swap(num_blocks, Ordering::SeqCst);
        let inflight = self.shared.inflight.load(Ordering::SeqCst);
        self.shared.demand(num_blocks >= before || inflight == 0, || format!("shrunk with {inflight} I/Os in flight"));
        let limit = self.shared.bytes.lock().unwrap().len() as u64 / u64::from(self.info.block_size);
        if num_blocks > limit {
            self.shared.blocks.store(before, Ordering::SeqCst);
            return Err(BdevError::invalid("num_blocks", num_blocks, limit));
        }
        Ok(())
    }
}

struct Pending {
    id: IoId,
    due_ns: u64,
    aborted: bool,
}

struct SimChannel {
    shared: Arc<Shared>,
    info: Info,
    pending: Vec<Pending>,
    waker: LocalWaker,
    rng: Rng,
    healthy: bool,
}

impl SimChannel {
    fn check(&self, io: &Io) {
        let info = &self.info;
        let demand = |holds: bool, what: &str| {
            self.shared.demand(holds, || format!("{what}: {:?} {}+{}, {} segments", io.op, io.lba, io.blocks, io.list.len()))
        };
        demand(info.supported.has(io.op), "an operation that is not supported");
        if io.op == Op::Flush {
            return;
        }
        demand(io.blocks > 0 && io.lba + io.blocks <= self.shared.blocks.load(Ordering::SeqCst), "out of range");
        if !matches!(io.op, Op::Read | Op::Write) {
            return demand(info.max_unmap_blocks == 0 || io.blocks <= u64::from(info.max_unmap_blocks), "too large");
        }
        demand(io.list_bytes() == io.blocks * u64::from(info.block_size), "a list of another size");
        demand(info.max_io_blocks == 0 || io.blocks <= u64::from(info.max_io_blocks), "too large");
        demand(info.max_segments == 0 || io.list.len() <= info.max_segments as usize, "too many segments");
        let boundary = u64::from(info.optimal_io_boundary);
        demand(!info.split_on_boundary || boundary == 0 || io.lba / boundary == (io.lba + io.blocks - 1) / boundary, "across a boundary");
    }

    /// Does the first `blocks` of an I/O.
    fn perform(&self, io: &Io, blocks: u64) {
        let size = u64::from(self.info.block_size);
        let mut bytes = self.shared.bytes.lock().unwrap();
        let range = (io.lba * size) as usize..((io.lba + blocks) * size) as usize;
        if matches!(io.op, Op::WriteZeroes | Op::Unmap) {
            bytes[range].fill(0);
        } else if matches!(io.op, Op::Read | Op::Write) {
            let mut rest = &mut bytes[range];
            for entry in &io.list {
                let (now, later) = rest.split_at_mut(rest.len().min(entry.length as usize));
                if io.op == Op::Read { entry.region.write(entry.offset, now) } else { entry.region.read(entry.offset, now) }.unwrap();
                rest = later;
            }
        }
    }

    fn wake_at(&self, reactor: &mut Reactor, due_ns: u64) {
        let waker = self.waker.clone();
        reactor.after(due_ns.saturating_sub(reactor.now_ns()), move |_| waker.wake());
    }

    fn end(&mut self, layer: &mut Layer, pending: &Pending) {
        self.shared.inflight.fetch_sub(1, Ordering::SeqCst);
        let io = layer.io(pending.id);
        self.shared.leave(pending.id, io);
        let fails = self.rng.chance(self.shared.plan.error, 1000);
        if pending.aborted || fails {
            self.perform(io, self.rng.clone().below(io.blocks + 1) * u64::from(io.op != Op::Flush));
            layer.complete(pending.id, if fails { Status::UNRECOVERED_READ_ERROR } else { Status::ABORT_REQUESTED });
        } else {
            self.perform(io, io.blocks);
            layer.complete(pending.id, Status::SUCCESS);
        }
    }

    fn panic_as_planned(&mut self) {
        if self.rng.chance(self.shared.plan.panic, 1000) {
            self.healthy = false;
            self.shared.inflight.fetch_sub(self.pending.len() as u64, Ordering::SeqCst);
            self.pending.clear();
            panic!("planned");
        }
    }
}

impl Channel for SimChannel {
    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, batch: &[IoId]) {
        self.panic_as_planned();
        for &id in batch {
            self.check(layer.io(id));
            self.shared.inflight.fetch_add(1, Ordering::SeqCst);
            let io = layer.io(id);
            self.shared.present.lock().unwrap().push((id, io.op, io.lba, io.blocks));
            let plan = self.shared.plan;
            let stalls = self.rng.chance(plan.stall, 1000);
            let due_ns = if stalls { u64::MAX } else { reactor.now_ns() + self.rng.below(plan.delay_ns + 1) };
            let pending = Pending { id, due_ns, aborted: false };
            if !stalls && self.rng.chance(1, 4) {
                self.end(layer, &pending);
                continue;
            }
            self.pending.push(pending);
            if !stalls {
                self.wake_at(reactor, due_ns);
            }
        }
        let (count, depth) = (self.pending.len(), self.info.queue_depth as usize);
        self.shared.demand(depth == 0 || count <= depth, || format!("{count} I/Os in flight, {depth} allowed"));
    }

    fn poll(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        self.panic_as_planned();
        let now_ns = reactor.now_ns();
        let mut due: Vec<Pending> = Vec::new();
        let mut index = 0;
        while index < self.pending.len() {
            if self.pending[index].due_ns <= now_ns { due.push(self.pending.swap_remove(index)) } else { index += 1 }
        }
        self.rng.shuffle(&mut due);
        due.iter().for_each(|pending| self.end(layer, pending));
        due.len()
    }

    fn abort(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId) {
        let now_ns = reactor.now_ns();
        let Some(index) = self.pending.iter().position(|pending| pending.id == id) else { return };
        self.pending[index].aborted = true;
        if self.rng.chance(1, 3) {
            let pending = self.pending.swap_remove(index);
            self.end(layer, &pending);
        } else if self.pending[index].due_ns == u64::MAX {
            let due_ns = now_ns + self.rng.below(100_000);
            self.pending[index].due_ns = due_ns;
            self.wake_at(reactor, due_ns);
        }
    }

    fn reset(&mut self, _: &mut Layer, _: &mut Reactor) {
        let inflight = self.shared.inflight.load(Ordering::SeqCst);
        self.shared.demand(inflight == 0, || format!("reset with {inflight} I/Os in flight"));
    }
}

impl Drop for SimChannel {
    fn drop(&mut self) {
        self.shared.channels.fetch_sub(1, Ordering::SeqCst);
        let left = self.pending.len();
        self.shared.demand(left == 0, || format!("a channel was dropped with {left} I/Os"));
        self.shared.inflight.fetch_sub(left as u64, Ordering::SeqCst);
    }
}

/// Planned panics say nothing; others do.
pub fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.payload().downcast_ref::<&str>() != Some(&"planned") {
                usual(panic);
            }
        }));
    });
}
