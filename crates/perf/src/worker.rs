//! One reactor's part of a run: a poller that keeps `depth` I/Os in flight.
//!
//! What came back is sent out again first and booked afterwards, so that the device does not wait for our book-keeping. The clock is read
//! once a batch, when the new one is out: an I/O's latency is the time between two such readings, hence never less than it was. Where
//! content is verified it is read before, so that the verification is not counted.

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
    /// When each I/O of the lease went out, by its position there.
    sent_ns: Vec<u64>,
    /// Positions of those that came back well, to be booked.
    returned: Vec<u32>,
    good: Good,
}

/// Successes of a batch.
#[derive(Default)]
struct Good {
    reads: u64,
    writes: u64,
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
            sent_ns: vec![0; plan.depth as usize],
            returned: Vec::with_capacity(plan.depth as usize),
            good: Good::default(),
            plan,
        }
    }

    fn first_batch(&mut self, layer: &mut Layer, now_ns: u64) {
        self.began = true;
        (self.start_ns, self.last_ns) = (now_ns, now_ns);
        if self.plan.duration_ns > 0 {
            self.end_ns = now_ns.saturating_add(self.plan.duration_ns);
        }
        self.sent_ns.fill(now_ns);
        let ids = std::mem::take(&mut self.lease.ids);
        for (position, id) in ids.iter().enumerate() {
            self.renew(layer, *id, position as u64);
        }
        self.lease.ids = ids;
    }

    /// Looks at what came back and fills in what goes out instead. `turn_ns`: the turn's time, which is enough to see the end by.
    #[inline]
    fn turn_over(&mut self, layer: &mut Layer, turn_ns: u64) {
        self.inflight -= self.reaped.len();
        if self.signals.stopped() || turn_ns >= self.end_ns {
            self.left = 0;
        }
        let reaped = std::mem::take(&mut self.reaped);
        for id in &reaped {
            let position = layer.retrieve(*id).tag;
            let io = layer.io(*id);
            if io.status.is_error() {
                self.failed(layer, *id, position);
                continue;
            }
            self.returned.push(position as u32);
            self.good.reads += u64::from(io.op == Op::Read);
            self.good.writes += u64::from(io.op == Op::Write);
            if self.content.is_none() || self.looked_at(layer, *id, position) {
                self.renew(layer, *id, position);
            }
        }
        self.reaped = reaped;
        self.reaped.clear();
    }

    /// Adds the batch that came back to the figures, and publishes them.
    #[inline]
    fn book(&mut self, now_ns: u64) {
        self.tally.max_gap_ns = self.tally.max_gap_ns.max(now_ns.saturating_sub(self.last_ns));
        self.last_ns = now_ns;
        let good = self.returned.len() as u64;
        // Most of a batch went out together.
        let (mut sent_ns, mut count) = (now_ns, 0);
        for position in self.returned.drain(..) {
            let sent = std::mem::replace(&mut self.sent_ns[position as usize], now_ns);
            if sent != sent_ns {
                self.tally.record(now_ns.saturating_sub(sent_ns), count);
                (sent_ns, count) = (sent, 0);
            }
            count += 1;
        }
        self.tally.record(now_ns.saturating_sub(sent_ns), count);
        let Good { reads, writes } = std::mem::take(&mut self.good);
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
    fn renew(&mut self, layer: &mut Layer, id: IoId, position: u64) {
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
        io.push(self.lease.queue, position);
        self.batch.push(id);
    }

    /// Verifies an I/O that succeeded. False: it is on its way again, to read back what it wrote.
    #[cold]
    fn looked_at(&mut self, layer: &mut Layer, id: IoId, position: u64) -> bool {
        let Some(content) = &mut self.content else { return true };
        let io = layer.io_mut(id);
        match content.finished(&self.lease.region, io) {
            Verdict::Good => true,
            Verdict::Wrong(what) => {
                self.tally.wrong(what);
                true
            }
            Verdict::ReadBack => {
                io.push(self.lease.queue, position);
                self.batch.push(id);
                false
            }
        }
    }

    #[cold]
    fn failed(&mut self, layer: &mut Layer, id: IoId, position: u64) {
        self.sent_ns[position as usize] = self.last_ns;
        if let Some(content) = &mut self.content {
            content.failed(layer.io(id));
        }
        // What a removal refuses is no fault of the device.
        if !self.signals.removed.load(Ordering::Relaxed) {
            self.tally.errors += 1;
            self.renew(layer, id, position);
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
        let done = self.reaped.len();
        let early_ns = (!self.began || self.content.is_some()).then(|| reactor.read_clock_ns());
        match early_ns {
            Some(now_ns) if !self.began => self.first_batch(&mut layer, now_ns),
            _ => self.turn_over(&mut layer, reactor.now_ns()),
        }
        if !self.batch.is_empty() {
            self.inflight += self.batch.len();
            layer.submit(reactor, self.lease.channel, &self.batch);
            self.batch.clear();
            layer.unplug(reactor);
        }
        self.book(early_ns.unwrap_or_else(|| reactor.read_clock_ns()));
        drop(layer);
        if self.inflight == 0 {
            self.finish(reactor);
        }
        done.max(1)
    }
}
