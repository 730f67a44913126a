//! Single I/Os for Python: the front end behind `bdev_io`, on the engine's first reactor.
//!
//! How it works. A request carries bounce memory of its own ([`crate::pool`]), filled before it leaves the Python thread (write) or
//! read after it came back (read); the layer splits what the device cannot take at once. Each descriptor opens its
//! channel with its first request. A request without a free I/O waits here for one.
//!
//! Each request is answered once: by its completion, by the refusal of its channel, or, if the reactor goes first, by
//! the drop of its token. Removing the bdev completes what it has.
//!
//! Limits: [`IO_BYTES_MAX`] a request, because its bounce memory is as large; requests at once: the reactor's I/Os.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use qpair_bdev::{ChannelId, Descriptor, IoFlags, IoId, Layer, Op, QueueId, Status};
use qpair_memory::Sge;
use qpair_reactor::{LocalWaker, Poller, Reactor};

use crate::bounce::Bounce;
use crate::events::Token;
use crate::values::{Failure, ReadData, Value};

/// Bytes one request moves at most.
pub const IO_BYTES_MAX: u64 = 256 << 20;

/// One I/O on its way to the reactor.
pub struct Request {
    pub number: u64,
    pub descriptor: Arc<Descriptor>,
    pub op: Op,
    pub lba: u64,
    /// Of a copy.
    pub source_lba: u64,
    /// Of zone management.
    pub action: u8,
    pub blocks: u64,
    pub flags: IoFlags,
    /// For what has data.
    pub bounce: Option<Bounce>,
    pub token: Token,
}

struct Pending {
    descriptor: u64,
    op: Op,
    bounce: Option<Bounce>,
    token: Token,
}

/// What is to happen when a descriptor, or the whole front end, has nothing under way.
struct Closing {
    descriptor: u64,
    token: Option<Token>,
}

struct FrontEnd {
    waker: LocalWaker,
    /// By descriptor; each has a queue of its own, so that its time-out knows its I/O.
    channels: HashMap<u64, (ChannelId, QueueId)>,
    pending: HashMap<u64, Pending>,
    tags: u64,
    waiting: VecDeque<Request>,
    closing: Vec<Closing>,
    when_idle: Vec<Box<dyn FnOnce()>>,
    reaped: Vec<IoId>,
}

#[derive(Default)]
struct Holder(RefCell<Option<Rc<RefCell<FrontEnd>>>>);

struct FrontEndPoller(Rc<RefCell<FrontEnd>>);

/// The reactor's front end, made on first use.
fn front_end(reactor: &mut Reactor) -> Rc<RefCell<FrontEnd>> {
    let holder = reactor.local::<Holder>();
    if let Some(found) = &*holder.0.borrow() {
        return found.clone();
    }
    let poller = reactor.reserve_poller("bdev_io");
    let waker = reactor.waker(poller).unwrap_or_else(|| unreachable!("reserved above"));
    let front_end = Rc::new(RefCell::new(FrontEnd {
        waker,
        channels: HashMap::new(),
        pending: HashMap::new(),
        tags: 0,
        waiting: VecDeque::new(),
        closing: Vec::new(),
        when_idle: Vec::new(),
        reaped: Vec::new(),
    }));
    reactor.install_poller(poller, Box::new(FrontEndPoller(front_end.clone())));
    *holder.0.borrow_mut() = Some(front_end.clone());
    front_end
}

/// Starts a request.
pub fn start(reactor: &mut Reactor, request: Request) {
    let (this, layer) = (front_end(reactor), Layer::of(reactor));
    let (mut this, mut layer) = (this.borrow_mut(), layer.borrow_mut());
    if let Some(pool) = request.bounce.as_ref().and_then(|bounce| bounce.memory.pool()) {
        pool.wake(reactor);
    }
    this.waiting.push_back(request);
    this.start_waiting(&mut layer, reactor);
}

/// Closes a descriptor's channel when its last request is done; then answers.
pub fn close(reactor: &mut Reactor, descriptor: u64, token: Option<Token>) {
    let (this, layer) = (front_end(reactor), Layer::of(reactor));
    let (mut this, mut layer) = (this.borrow_mut(), layer.borrow_mut());
    this.closing.push(Closing { descriptor, token });
    this.close_idle(&mut layer, reactor);
}

/// Calls `then` when nothing is under way.
pub fn when_idle(reactor: &mut Reactor, then: Box<dyn FnOnce()>) {
    let this = front_end(reactor);
    let mut this = this.borrow_mut();
    this.when_idle.push(then);
    this.tell_idle();
}

impl FrontEnd {
    fn start_waiting(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        while let Some(request) = self.waiting.pop_front() {
            let place = match self.channel(layer, reactor, &request) {
                Ok(place) => place,
                Err(failure) => {
                    request.token.answer(Err(failure));
                    continue;
                }
            };
            let Some(id) = layer.take() else {
                self.waiting.push_front(request);
                break;
            };
            self.submit(layer, reactor, place, id, request);
        }
        layer.unplug(reactor);
    }

    fn channel(&mut self, layer: &mut Layer, reactor: &mut Reactor, request: &Request) -> Result<(ChannelId, QueueId), Failure> {
        if let Some(place) = self.channels.get(&request.number) {
            return Ok(*place);
        }
        let channel = request.descriptor.channel(reactor, layer)?;
        let place = (channel, layer.add_queue_for(self.waker.clone(), &request.descriptor));
        self.channels.insert(request.number, place);
        Ok(place)
    }

    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, (channel, queue): (ChannelId, QueueId), id: IoId, request: Request) {
        self.tags += 1;
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks, io.source_lba) = (request.op, request.lba, request.blocks, request.source_lba);
        if request.op == Op::ZoneManagement {
            io.command[0] = request.action;
        }
        io.flags |= request.flags;
        if let Some(Bounce { memory, data, metadata, .. }) = &request.bounce {
            let region = memory.region();
            if let Some(length) = *metadata {
                io.metadata.push(Sge { region: region.clone(), offset: u64::from(*data), length });
            }
            io.list.push(Sge { region, offset: 0, length: *data });
        }
        io.push(queue, self.tags);
        let Request { number, op, bounce, token, .. } = request;
        self.pending.insert(self.tags, Pending { descriptor: number, op, bounce, token });
        layer.submit(reactor, channel, &[id]);
    }

    fn finish(&mut self, tag: u64, status: Status, result: u64) {
        let Some(Pending { op, bounce, token, .. }) = self.pending.remove(&tag) else { return };
        if status.is_error() {
            return token.answer(Err(status));
        }
        let value = match bounce {
            _ if op == Op::ZoneAppend => Value::Integer(result),
            // A report is the only zone management with data.
            Some(Bounce { memory, data, metadata, view }) if op == Op::Read || op == Op::ZoneManagement => {
                Value::Read(ReadData { memory, data: data as usize, metadata: metadata.map(|length| length as usize), view })
            }
            _ => Value::Nothing,
        };
        token.answer(Ok::<_, Failure>(value));
    }

    fn close_idle(&mut self, layer: &mut Layer, reactor: &mut Reactor) {
        let busy = |this: &Self, descriptor: u64| {
            this.pending.values().any(|pending| pending.descriptor == descriptor)
                || this.waiting.iter().any(|request| request.number == descriptor)
        };
        for closing in std::mem::take(&mut self.closing) {
            if busy(self, closing.descriptor) {
                self.closing.push(closing);
                continue;
            }
            if let Some((channel, queue)) = self.channels.remove(&closing.descriptor) {
                layer.close_channel(reactor, channel);
                layer.remove_queue(queue);
            }
            if let Some(token) = closing.token {
                token.answer(Ok::<_, Failure>(Value::Nothing));
            }
        }
    }

    fn tell_idle(&mut self) {
        if self.pending.is_empty() && self.waiting.is_empty() {
            self.when_idle.drain(..).for_each(|then| then());
        }
    }
}

impl Poller for FrontEndPoller {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        let (mut this, mut layer) = (self.0.borrow_mut(), layer.borrow_mut());
        let mut reaped = std::mem::take(&mut this.reaped);
        layer.settle(reactor);
        for (_, queue) in this.channels.values().filter(|(_, queue)| layer.has_completions(*queue)).collect::<Vec<_>>() {
            layer.reap(reactor, *queue, &mut reaped);
        }
        let count = reaped.len();
        for id in reaped.drain(..) {
            let frame = layer.retrieve(id);
            let (status, result) = (layer.io(id).status, layer.io(id).result);
            layer.give_back(id);
            this.finish(frame.tag, status, result);
        }
        this.reaped = reaped;
        if !this.waiting.is_empty() {
            this.start_waiting(&mut layer, reactor);
        }
        if count > 0 {
            this.close_idle(&mut layer, reactor);
            this.tell_idle();
        }
        count
    }

    fn arm(&mut self, reactor: &mut Reactor) -> bool {
        let this = self.0.borrow();
        // Who gives an I/O back wakes nobody: while requests wait for one, look again.
        let layer = Layer::of(reactor);
        let layer = layer.borrow();
        this.waiting.is_empty() && !this.channels.values().any(|(_, queue)| layer.has_completions(*queue))
    }

    fn poisoned(&mut self, _: &mut Reactor, why: &str) {
        let mut this = self.0.borrow_mut();
        let failure = Failure::new(libc::EIO, format!("the engine failed at this: {why}"));
        this.pending.drain().for_each(|(_, pending)| pending.token.answer(Err(failure.clone())));
        this.waiting.drain(..).for_each(|request| request.token.answer(Err(failure.clone())));
        this.closing.clear();
        this.tell_idle();
    }
}
