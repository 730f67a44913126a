//! One reactor's part of a run: a poller that keeps `depth` I/Os in flight.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use qpair_bdev::{Buffer, ChannelId, IoId, Layer, Op, QueueId};
use qpair_memory::{Region, Sge};
use qpair_reactor::{Poller, PollerId, Reactor};

use crate::BdevError;
use crate::content::{Content, Verdict};
use crate::job::{Counters, Signals, Ticket};
use crate::pattern::{Chooser, Random};
use crate::report::Tally;
use crate::spec::Plan;

/// What the worker has at the layer.
struct Lease {
    channel: ChannelId,
    queue: QueueId,
    ids: Vec<IoId>,
    region: Region,
    _buffer: Buffer,
}

struct Worker {
    layer: Rc<RefCell<Layer>>,
    id: PollerId,
    ticket: Option<Ticket>,
    signals: Arc<Signals>,
    counters: Arc<[Counters]>,
    index: usize,
    lease: Lease,
    plan: Plan,
    chooser: Chooser,
    content: Option<Content>,
    tally: Tally,
    began: bool,
    start_ns: u64,
    last_ns: u64,
    end_ns: u64,
    left: u64,
    inflight: usize,
    reaped: Vec<IoId>,
    batch: Vec<IoId>,
}

/// Begins a worker on its reactor, or hands in why not.
pub(crate) fn begin(reactor: &mut Reactor, plan: Plan, ticket: Ticket, signals: Arc<Signals>, counters: Arc<[Counters]>) {
    let layer = Layer::of(reactor);
    let lease = ticket.descriptor().ok_or_else(|| BdevError::Removing("the bdev of a run that failed to start".to_owned()));
    let lease = lease.and_then(|descriptor| {
        let buffer = descriptor.buffer(u64::from(plan.depth) * u64::from(plan.io_bytes))?;
        let channel = descriptor.channel(reactor, &mut layer.borrow_mut())?;
        Ok((buffer, channel))
    });
    let (buffer, channel) = match lease {
        Ok(lease) => lease,
        Err(error) => return ticket.hand_in(Err(error)),
    };
    let taken = take(&mut layer.borrow_mut(), &plan);
    let ids = match taken {
        Ok(ids) => ids,
        Err(error) => {
            layer.borrow_mut().close_channel(reactor, channel);
            return ticket.hand_in(Err(error));
        }
    };
    let id = reactor.reserve_poller(format!("perf_{}", ticket.index()));
    let Some(waker) = reactor.waker(id) else { unreachable!("reserved a line above") };
    let queue = layer.borrow_mut().add_queue(waker);
    let region = Region::new(buffer.mapping().clone());
    fill_lists(&mut layer.borrow_mut(), &plan, &ids, &region, buffer.offset());
    let lease = Lease { channel, queue, ids, region, _buffer: buffer };
    let worker = Worker::new(reactor, layer, id, plan, ticket, signals, counters, lease);
    reactor.install_poller(id, Box::new(worker));
}

fn take(layer: &mut Layer, plan: &Plan) -> Result<Vec<IoId>, BdevError> {
    let mut ids = Vec::with_capacity(plan.depth as usize);
    while ids.len() < plan.depth as usize {
        match layer.take() {
            Some(id) => ids.push(id),
            None => {
                let (count, have) = (layer.ios().0, ids.len());
                ids.drain(..).for_each(|id| layer.give_back(id));
                return Err(BdevError::NoMemory(format!("depth {}: {have} of the reactor's {count} I/Os are free", plan.depth)));
            }
        }
    }
    Ok(ids)
}

fn fill_lists(layer: &mut Layer, plan: &Plan, ids: &[IoId], region: &Region, start: u64) {
    for (index, id) in ids.iter().enumerate() {
        let io = layer.io_mut(*id);
        (io.op, io.lba, io.blocks) = (plan.op, 0, if plan.op == Op::Flush { 0 } else { plan.io_blocks });
        if plan.data {
            let offset = start + index as u64 * u64::from(plan.io_bytes);
            io.list.push(Sge { region: region.clone(), offset, length: plan.io_bytes });
        }
    }
}

impl Worker {
    #[allow(clippy::too_many_arguments)]
    fn new(
        reactor: &Reactor,
        layer: Rc<RefCell<Layer>>,
        id: PollerId,
        plan: Plan,
        ticket: Ticket,
        signals: Arc<Signals>,
        counters: Arc<[Counters]>,
        lease: Lease,
    ) -> Self {
        let content = plan.verify.then(|| Content::new(&plan));
        Self {
            layer,
            id,
            index: ticket.index(),
            chooser: Chooser::new(Random::new(plan.seed, ticket.index() as u64), !plan.random, plan.slots, plan.read_percent),
            ticket: Some(ticket),
            signals,
            counters,
            lease,
            content,
            tally: Tally::new(reactor.id().0),
            began: false,
            start_ns: 0,
            last_ns: 0,
            end_ns: u64::MAX,
            left: plan.quota,
            inflight: 0,
            reaped: Vec::with_capacity(plan.depth as usize),
            batch: Vec::with_capacity(plan.depth as usize),
            plan,
        }
    }

    fn first_batch(&mut self, layer: &mut Layer, now_ns: u64) {
        self.began = true;
        (self.start_ns, self.last_ns) = (now_ns, now_ns);
        if self.plan.duration_ns > 0 {
            self.end_ns = now_ns.saturating_add(self.plan.duration_ns);
        }
        let ids = std::mem::take(&mut self.lease.ids);
        for id in &ids {
            self.renew(layer, *id, now_ns);
        }
        self.lease.ids = ids;
    }

    /// Books what came back and fills in what goes out instead.
    #[inline]
    fn turn_over(&mut self, layer: &mut Layer, now_ns: u64) {
        self.tally.max_gap_ns = self.tally.max_gap_ns.max(now_ns.saturating_sub(self.last_ns));
        self.last_ns = now_ns;
        self.inflight -= self.reaped.len();
        if self.signals.stopped() || now_ns >= self.end_ns {
            self.left = 0;
        }
        let reaped = std::mem::take(&mut self.reaped);
        let (mut submitted_ns, mut count) = (now_ns, 0);
        let (mut good, mut reads, mut writes) = (0, 0, 0);
        for id in &reaped {
            let frame = layer.retrieve(*id);
            let io = layer.io(*id);
            if io.status.is_error() {
                self.failed(layer, *id, now_ns);
                continue;
            }
            if frame.tag != submitted_ns {
                self.tally.record(now_ns.saturating_sub(submitted_ns), count);
                (submitted_ns, count) = (frame.tag, 0);
            }
            count += 1;
            good += 1;
            reads += u64::from(io.op == Op::Read);
            writes += u64::from(io.op == Op::Write);
            if self.content.is_none() || self.looked_at(layer, *id, now_ns) {
                self.renew(layer, *id, now_ns);
            }
        }
        self.tally.record(now_ns.saturating_sub(submitted_ns), count);
        self.reaped = reaped;
        self.reaped.clear();
        self.book(good, reads, writes, now_ns);
    }

    /// Adds a batch to the figures, and publishes them.
    #[inline]
    fn book(&mut self, good: u64, reads: u64, writes: u64, now_ns: u64) {
        self.tally.ios += good;
        self.tally.reads += reads;
        self.tally.writes += writes;
        if self.plan.op != Op::Flush {
            self.tally.bytes += good * u64::from(self.plan.io_bytes);
        }
        self.tally.elapsed_ns = now_ns.saturating_sub(self.start_ns);
        let counters = &self.counters[self.index];
        counters.ios.store(self.tally.ios, Ordering::Relaxed);
        counters.bytes.store(self.tally.bytes, Ordering::Relaxed);
        counters.errors.store(self.tally.errors, Ordering::Relaxed);
        counters.elapsed_ns.store(self.tally.elapsed_ns, Ordering::Relaxed);
    }

    /// Sends an I/O out to a new place, or leaves it with its holder when the run is over.
    #[inline]
    fn renew(&mut self, layer: &mut Layer, id: IoId, now_ns: u64) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        let (mut slot, read) = self.chooser.next();
        if let Some(content) = &mut self.content {
            slot = content.claim(slot);
        }
        let io = layer.io_mut(id);
        if self.plan.op != Op::Flush {
            io.lba = self.plan.base + slot * self.plan.io_blocks;
        }
        if self.plan.data {
            io.op = if read { Op::Read } else { self.plan.op };
        }
        if let Some(content) = &mut self.content
            && let Err(error) = content.prepare(&self.lease.region, io)
        {
            content.failed(io);
            return self.tally.wrong(error.to_string());
        }
        io.push(self.lease.queue, now_ns);
        self.batch.push(id);
    }

    /// Verifies an I/O that succeeded. False: it is on its way again, to read back what it wrote.
    #[cold]
    fn looked_at(&mut self, layer: &mut Layer, id: IoId, now_ns: u64) -> bool {
        let Some(content) = &mut self.content else { return true };
        let io = layer.io_mut(id);
        match content.finished(&self.lease.region, io) {
            Verdict::Good => true,
            Verdict::Wrong(what) => {
                self.tally.wrong(what);
                true
            }
            Verdict::ReadBack => {
                io.push(self.lease.queue, now_ns);
                self.batch.push(id);
                false
            }
        }
    }

    #[cold]
    fn failed(&mut self, layer: &mut Layer, id: IoId, now_ns: u64) {
        if let Some(content) = &mut self.content {
            content.failed(layer.io(id));
        }
        // What a removal refuses is no fault of the device.
        if !self.signals.removed.load(Ordering::Relaxed) {
            self.tally.errors += 1;
            self.renew(layer, id, now_ns);
        } else {
            self.left = 0;
        }
    }

    /// All is back: gives everything up and hands in the figures.
    fn finish(&mut self, reactor: &mut Reactor) {
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        self.lease.ids.drain(..).for_each(|id| layer.give_back(id));
        layer.remove_queue(self.lease.queue);
        layer.close_channel(reactor, self.lease.channel);
        drop(layer);
        reactor.remove_poller(self.id);
        let tally = std::mem::replace(&mut self.tally, Tally::new(reactor.id().0));
        if let Some(ticket) = self.ticket.take() {
            ticket.hand_in(Ok(tally));
        }
    }
}

impl Poller for Worker {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = self.layer.clone();
        let mut layer = layer.borrow_mut();
        if self.began {
            layer.reap(reactor, self.lease.queue, &mut self.reaped);
            if self.reaped.is_empty() {
                return 0;
            }
        }
        let (now_ns, done) = (reactor.read_clock_ns(), self.reaped.len());
        if self.began {
            self.turn_over(&mut layer, now_ns);
        } else {
            self.first_batch(&mut layer, now_ns);
        }
        if !self.batch.is_empty() {
            self.inflight += self.batch.len();
            layer.submit(reactor, self.lease.channel, &self.batch);
            self.batch.clear();
            layer.unplug(reactor);
        }
        drop(layer);
        if self.inflight == 0 {
            self.finish(reactor);
        }
        done.max(1)
    }
}
