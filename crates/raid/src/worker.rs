//! Control work as plain sequences: async functions on the home reactor, which read and write superblocks, copy windows and wait for all reactors.
//!
//! How it works. A poller owns the tasks and a completion queue. A task never touches the layer: it leaves a command (open, close, do this I/O,
//! wake me later), which the poller does between two looks at its tasks. Whatever ends (an I/O, a timer, an answer of all reactors) wakes
//! the poller, and the poller looks at every task again: there are few, one a bdev that is being examined, changed or rebuilt.
//!
//! Errors. A task that panics is dropped alone; what it owned answers for it by being dropped.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use qpair_bdev::{BdevError, ChannelId, Descriptor, IoId, Layer, Op, QueueId, Status};
use qpair_memory::{Region, Sge};
use qpair_reactor::log::{self, Level};
use qpair_reactor::{Handle, LocalWaker, Poller, Reactor};

/// How often the tasks are looked at in one poll.
const ROUNDS: usize = 8;
/// How often an I/O is done that resets have end.
const ATTEMPTS: u32 = 8;
/// When no I/O is free in the slab, it is tried again after so long.
const RETRY_NS: u64 = 100_000;

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Answer<T> = Rc<Cell<Option<T>>>;

/// One I/O of a task.
struct Transfer {
    channel: ChannelId,
    op: Op,
    lba: u64,
    blocks: u64,
    data: Option<(Region, u64)>,
    answer: Answer<Status>,
}

enum Command {
    Open(Arc<Descriptor>, Answer<Result<ChannelId, BdevError>>),
    Close(ChannelId),
    Io(Transfer),
    Sleep(u64, Answer<()>),
}

#[derive(Default)]
struct Inner {
    waker: RefCell<Option<LocalWaker>>,
    tasks: RefCell<Vec<Task>>,
    commands: RefCell<VecDeque<Command>>,
    running: RefCell<HashMap<u64, Answer<Status>>>,
    again: Cell<bool>,
    now_ns: Cell<u64>,
    next: Cell<u64>,
}

/// What a task works with.
#[derive(Clone)]
pub struct Worker(Rc<Inner>);

/// A base's channel on the home reactor, held by a task.
pub struct Line {
    worker: Worker,
    channel: ChannelId,
    block_size: u32,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.worker.command(Command::Close(self.channel));
    }
}

/// Starts a task on reactor `home`, from whatever thread.
pub fn start<T: Future<Output = ()> + 'static>(home: &Handle, make: impl FnOnce(Worker) -> T + Send + 'static) {
    home.call(move |reactor| {
        let worker = Worker::of(reactor);
        let task = make(worker.clone());
        worker.spawn(task);
    });
}

impl Worker {
    /// The reactor's, made on first use.
    fn of(reactor: &mut Reactor) -> Self {
        let worker = Self(reactor.local::<Inner>());
        if worker.0.waker.borrow().is_none() {
            let id = reactor.reserve_poller("raid");
            if let Some(waker) = reactor.waker(id) {
                let layer = Layer::of(reactor);
                let queue = layer.borrow_mut().add_queue(waker.clone());
                worker.0.waker.replace(Some(waker));
                reactor.install_poller(id, Box::new(Runner { inner: worker.0.clone(), queue, reaped: Vec::new() }));
            }
        }
        worker
    }

    /// One more task.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.tasks.borrow_mut().push(Box::pin(task));
        self.look_again();
    }

    /// Something that a task may wait for has changed.
    pub fn look_again(&self) {
        self.0.again.set(true);
        if let Some(waker) = &*self.0.waker.borrow() {
            waker.wake();
        }
    }

    /// As [`look_again`](Self::look_again), by message.
    pub fn wake(reactor: &mut Reactor) {
        Self::of(reactor).look_again();
    }

    /// The turn's time.
    pub fn now_ns(&self) -> u64 {
        self.0.now_ns.get()
    }

    fn command(&self, command: Command) {
        self.0.commands.borrow_mut().push_back(command);
        self.look_again();
    }

    /// Waits until `ready` says something.
    pub async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        poll_fn(|_| ready().map_or(Poll::Pending, Poll::Ready)).await
    }

    /// Waits so long.
    pub async fn sleep(&self, ns: u64) {
        let answer = Answer::default();
        self.command(Command::Sleep(ns, answer.clone()));
        self.until(|| answer.take()).await;
    }

    /// This reactor's channel to a base, until the line is dropped.
    pub async fn line(&self, base: &Arc<Descriptor>) -> Result<Line, BdevError> {
        let info = base.info().ok_or_else(|| BdevError::Removing(base.name().to_owned()))?;
        let answer = Answer::default();
        self.command(Command::Open(base.clone(), answer.clone()));
        let channel = self.until(|| answer.take()).await?;
        Ok(Line { worker: self.clone(), channel, block_size: info.block_size })
    }
}

impl Line {
    /// What is asked to end was not asked for by a task: the array is reset, and its bases with it. No leg is to blame for that, so it is done anew.
    async fn transfer(&self, op: Op, lba: u64, blocks: u64, data: Option<(Region, u64)>) -> Status {
        let mut attempts = 0;
        loop {
            let (answer, data) = (Answer::default(), data.clone());
            let transfer = Transfer { channel: self.channel, op, lba, blocks, data, answer: answer.clone() };
            self.worker.command(Command::Io(transfer));
            let status = self.worker.until(|| answer.take()).await;
            attempts += 1;
            if status != Status::ABORT_REQUESTED || attempts == ATTEMPTS {
                return status;
            }
        }
    }

    fn bytes(&self, blocks: u64) -> u64 {
        blocks * u64::from(self.block_size)
    }

    /// Reads into the start of `into`.
    pub async fn read(&self, lba: u64, blocks: u64, into: &Region) -> Status {
        self.transfer(Op::Read, lba, blocks, Some((into.clone(), self.bytes(blocks)))).await
    }

    /// Writes from the start of `from`.
    pub async fn write(&self, lba: u64, blocks: u64, from: &Region) -> Status {
        self.transfer(Op::Write, lba, blocks, Some((from.clone(), self.bytes(blocks)))).await
    }

    /// All that was written before is on stable media.
    pub async fn flush(&self) -> Status {
        self.transfer(Op::Flush, 0, 0, None).await
    }
}

/// The poller.
struct Runner {
    inner: Rc<Inner>,
    queue: QueueId,
    reaped: Vec<IoId>,
}

impl Runner {
    fn reap(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        layer.reap(reactor, self.queue, &mut self.reaped);
        for id in &self.reaped {
            let (tag, status) = layer.finish(*id);
            if let Some(answer) = self.inner.running.borrow_mut().remove(&tag) {
                answer.set(Some(status));
            }
        }
        let count = self.reaped.len();
        self.reaped.clear();
        count
    }

    fn run_tasks(&self) {
        let mut tasks = std::mem::take(&mut *self.inner.tasks.borrow_mut());
        let mut context = Context::from_waker(Waker::noop());
        tasks.retain_mut(|task| match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut context))) {
            Ok(poll) => poll.is_pending(),
            Err(_) => {
                log::say(Level::Error, "raid", format_args!("a control task panicked, and is given up"));
                false
            }
        });
        let mut all = self.inner.tasks.borrow_mut();
        tasks.append(&mut all);
        *all = tasks;
    }

    /// Does what the tasks left; returns how many things.
    fn perform(&mut self, layer: &mut Layer, reactor: &mut Reactor) -> usize {
        let mut count = 0;
        loop {
            let Some(command) = self.inner.commands.borrow_mut().pop_front() else { return count };
            match command {
                Command::Open(base, answer) => answer.set(Some(base.channel(reactor, layer))),
                Command::Close(channel) => layer.close_channel(reactor, channel),
                Command::Sleep(ns, answer) => {
                    reactor.after(ns, move |reactor| {
                        answer.set(Some(()));
                        Worker::wake(reactor);
                    });
                }
                Command::Io(transfer) => {
                    let Some(id) = layer.take() else {
                        self.inner.commands.borrow_mut().push_front(Command::Io(transfer));
                        reactor.after(RETRY_NS, Worker::wake);
                        return count;
                    };
                    self.submit(layer, reactor, id, transfer);
                }
            }
            count += 1;
        }
    }

    fn submit(&mut self, layer: &mut Layer, reactor: &mut Reactor, id: IoId, transfer: Transfer) {
        let Transfer { channel, op, lba, blocks, data, answer } = transfer;
        let tag = self.inner.next.get();
        self.inner.next.set(tag + 1);
        let io = layer.io_mut(id);
        (io.op, io.lba, io.blocks) = (op, lba, blocks);
        if let Some((region, bytes)) = data {
            io.list.push(Sge { region, offset: 0, length: bytes as u32 });
        }
        io.push(self.queue, tag);
        self.inner.running.borrow_mut().insert(tag, answer);
        layer.submit(reactor, channel, &[id]);
        layer.unplug(reactor);
    }
}

impl Poller for Runner {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let layer = Layer::of(reactor);
        self.inner.now_ns.set(reactor.now_ns());
        let mut work = self.reap(&mut layer.borrow_mut(), reactor);
        for _ in 0..ROUNDS {
            self.inner.again.set(false);
            self.run_tasks();
            let mut layer = layer.borrow_mut();
            let done = self.perform(&mut layer, reactor) + self.reap(&mut layer, reactor);
            work += done;
            if done == 0 && !self.inner.again.get() {
                return work;
            }
        }
        work.max(1)
    }
}

/// Something that one task at a time may do.
#[derive(Default)]
pub struct Turn(std::sync::atomic::AtomicBool);

/// It is this task's turn until this is dropped.
pub struct TurnGuard<'a>(&'a Turn, Worker);

impl Turn {
    /// Waits for it.
    pub async fn take<'a>(&'a self, worker: &Worker) -> TurnGuard<'a> {
        use std::sync::atomic::Ordering;
        worker.until(|| self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok()).await;
        TurnGuard(self, worker.clone())
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, std::sync::atomic::Ordering::Release);
        self.1.look_again();
    }
}
