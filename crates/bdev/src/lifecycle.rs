//! What concerns a device on all its reactors at once: removal, resizing, reset.
//!
//! Each is a job that holds the device exclusively, sends one message to every reactor, and goes on when the last has
//! answered ([`qpair_reactor::Fanout`]). A reactor answers when its channels are quiet, also those that are about to
//! close: nothing in flight, no child under way. While a job stops a device, a channel opened meanwhile starts paused.
//! So what follows (dropping the module, shrinking, restarting) can touch no I/O.
//!
//! Every job is answered, once: what a job captures answers when it is dropped. A job that never ran, because the
//! device went before its turn, says so; a reactor that is gone answers by dropping its part; so jobs end also while
//! the process stops.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use qpair_reactor::fanout::Part;
use qpair_reactor::{Fanout, Handle, Reactor};
use qpair_wire::nvme::Status;

use crate::registry::JobGuard;
use crate::{BdevError, ChannelId, DeviceId, Fate, Info, IoId, Layer, Notice, Registry};

/// Where the outcome of a control operation goes, from whatever thread it ends on.
pub type Reply<T> = Box<dyn FnOnce(Result<T, BdevError>) + Send>;

/// A reply that is sent in any case.
pub(crate) struct Answer<T> {
    name: String,
    reply: Option<Reply<T>>,
}

impl<T> Answer<T> {
    pub(crate) fn new(name: &str, reply: Reply<T>) -> Self {
        Self { name: name.to_owned(), reply: Some(reply) }
    }

    pub(crate) fn send(mut self, outcome: Result<T, BdevError>) {
        if let Some(reply) = self.reply.take() {
            reply(outcome);
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply(Err(BdevError::Removing(std::mem::take(&mut self.name))));
        }
    }
}

/// What a message does to a reactor beside looking after the channels there are.
#[derive(Clone, Copy)]
pub(crate) enum Stance {
    /// Channels opened from now on start paused.
    Hold,
    /// And from now on not any more.
    LetGo,
    Neither,
}

/// Runs `each` for the device's channels on every reactor; then, when all parts are dropped, `then` at home.
pub(crate) fn on_channels(
    registry: &Arc<Registry>,
    device: DeviceId,
    stance: Stance,
    each: impl Fn(&mut Layer, &mut Reactor, ChannelId, Rc<Part>) + Clone + Send + 'static,
    then: impl FnOnce(&mut Reactor) + Send + 'static,
) {
    let Some(home) = registry.reactors().first() else { return };
    Fanout::new(home.clone(), then).on_each(registry.reactors(), move |reactor, part| {
        let part = Rc::new(part);
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        match stance {
            Stance::Hold => layer.hold(device),
            Stance::LetGo => layer.let_go(device),
            Stance::Neither => {}
        }
        for channel in layer.channels_of(device) {
            each(&mut layer, reactor, channel, part.clone());
        }
    });
}

/// A removal under way; it ends when this is dropped, which is after the last part.
struct Removal {
    registry: Arc<Registry>,
    device: DeviceId,
    guard: Option<JobGuard>,
    reply: Option<Reply<()>>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.registry.forget(self.device);
        drop(self.guard.take());
        if let Some(reply) = self.reply.take() {
            reply(Ok(()));
        }
    }
}

/// What waits for several others goes on when the last of its holds is dropped, on whatever thread that happens.
#[derive(Clone)]
pub struct Hold(#[allow(dead_code, reason = "only ever dropped")] Arc<Next>);

struct Next(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Hold {
    pub(crate) fn until(next: impl FnOnce() + Send + 'static) -> Self {
        Self(Arc::new(Next(Mutex::new(Some(Box::new(next))))))
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        if let Some(next) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            next();
        }
    }
}

/// Removes a bdev. What stands on it goes first, or lets go of it; then: no new I/O; what is in flight ends, or is asked to end
/// after `deadline_ns`; then it is gone.
pub fn unregister(registry: &Arc<Registry>, name: &str, deadline_ns: u64, reply: Reply<()>) {
    let device = match registry.mark_removing(name) {
        Ok(device) => device,
        Err(error) => return reply(Err(error)),
    };
    let removal = Removal { registry: registry.clone(), device, guard: None, reply: Some(reply) };
    let hold = Hold::until(move || remove_alone(removal, deadline_ns));
    let above = registry.above(device);
    if !above.is_empty() {
        hurry(registry, device, deadline_ns);
    }
    for (above, module) in above {
        let (holds, lets_go) = (hold.clone(), hold.clone());
        let base = registry.get(device).map_or_else(|| name.to_owned(), |(_, info)| info.name.clone());
        let asked = catch_unwind(AssertUnwindSafe(|| module.base_removing(&base, lets_go)));
        if asked.unwrap_or(Fate::Goes) == Fate::Goes {
            // One that is on its way out already is not waited for: its I/O ends below with an error.
            unregister(registry, &above, deadline_ns, Box::new(move |_| drop(holds)));
        }
    }
}

fn remove_alone(mut removal: Removal, deadline_ns: u64) {
    let (registry, device) = (removal.registry.clone(), removal.device);
    let shared = registry.clone();
    let at_once = shared.exclusive(
        device,
        Box::new(move |guard| {
            removal.guard = Some(guard);
            let registry = removal.registry.clone();
            let close = move |layer: &mut Layer, reactor: &mut Reactor, channel, part| close(layer, reactor, channel, deadline_ns, part);
            on_channels(&registry, device, Stance::Neither, close, move |_| drop(removal));
        }),
    );
    if !at_once {
        hurry(&shared, device, deadline_ns);
    }
}

/// A removal has to wait for a job that may itself wait for ever: a reset or a shrinking, until a device is quiet that says
/// nothing any more, and ends its I/O only where it is going. So from the deadline on it is going. What a reset waits for below stays, and is
/// asked to end what it has.
fn hurry(registry: &Arc<Registry>, device: DeviceId, deadline_ns: u64) {
    for handle in registry.reactors() {
        let registry = registry.clone();
        handle.call(move |reactor| {
            reactor.after(deadline_ns, move |reactor| {
                let layer = Layer::of(reactor);
                let mut layer = layer.borrow_mut();
                for channel in layer.channels_of(device) {
                    layer.shut(reactor, channel);
                    layer.abort_all(reactor, channel);
                }
                let mut below = registry.reset_with(device);
                while let Some(base) = below.pop() {
                    layer.channels_of(base).into_iter().for_each(|channel| layer.abort_all(reactor, channel));
                    below.extend(registry.reset_with(base));
                }
            });
        });
    }
}

fn close(layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, deadline_ns: u64, part: Rc<Part>) {
    let timer = reactor.after(deadline_ns, move |reactor| {
        let layer = Layer::of(reactor);
        layer.borrow_mut().abort_all(reactor, channel);
    });
    layer.when_quiet(
        channel,
        Box::new(move |layer, reactor| {
            reactor.cancel(timer);
            layer.drop_module(reactor, channel);
            drop(part);
        }),
    );
    layer.shut(reactor, channel);
}

/// Changes the size. Growing is seen at once; shrinking waits until nothing is in flight.
pub fn resize(registry: &Arc<Registry>, name: &str, num_blocks: u64, reply: Reply<()>) {
    let found =
        registry.live(name).and_then(|id| registry.get(id).map(|found| (id, found)).ok_or_else(|| BdevError::NoSuchBdev(name.to_owned())));
    let (device, (_, info)) = match found {
        Ok(found) => found,
        Err(error) => return reply(Err(error)),
    };
    let changed = Info { num_blocks, ..Info::clone(&info) };
    if let Err(error) = changed.check() {
        return reply(Err(error));
    }
    let (shared, answer) = (registry.clone(), Answer::new(name, reply));
    registry.exclusive(device, Box::new(move |guard| resize_alone(shared, device, num_blocks, guard, answer)));
}

/// Looks how large the device is by now, and resizes to that; replies with the size in blocks.
pub fn rescan(registry: &Arc<Registry>, name: &str, reply: Reply<u64>) {
    let found = registry.live(name).and_then(|id| registry.get(id).ok_or_else(|| BdevError::NoSuchBdev(name.to_owned())));
    match found.and_then(|(device, info)| Ok((device.rescan()?, info))) {
        Err(error) => reply(Err(error)),
        Ok((num_blocks, info)) if num_blocks == info.num_blocks => reply(Ok(num_blocks)),
        Ok((num_blocks, _)) => resize(registry, name, num_blocks, Box::new(move |outcome| reply(outcome.map(|()| num_blocks)))),
    }
}

fn resize_alone(registry: Arc<Registry>, device: DeviceId, num_blocks: u64, guard: JobGuard, answer: Answer<()>) {
    let Some((module, info)) = registry.get(device) else { return };
    let shared = registry.clone();
    let apply = move |_: &mut Reactor| {
        let outcome = catch_unwind(AssertUnwindSafe(|| module.resize(num_blocks)))
            .unwrap_or_else(|_| Err(BdevError::Unsupported("the module panicked while it was resized".to_owned())));
        let changed = outcome.is_ok().then(|| shared.resized(device, num_blocks)).flatten();
        let (registry, snapshot) = (shared.clone(), changed.clone());
        let announce = move |_: &mut Reactor| {
            drop(guard);
            let hold = Hold::until(move || answer.send(outcome));
            if let Some(info) = changed {
                shared.tell(Some(device), &Notice::Resized(info.name.clone()));
                resize_above(&shared, device, &info, &hold);
            }
        };
        let resume = move |layer: &mut Layer, reactor: &mut Reactor, channel, _part| layer.resume(reactor, channel, snapshot.clone());
        on_channels(&registry, device, Stance::LetGo, resume, announce);
    };
    if num_blocks >= info.num_blocks {
        on_channels(&registry, device, Stance::Neither, |_, _, _, _| {}, apply);
    } else {
        on_channels(&registry, device, Stance::Hold, |layer, reactor, channel, part| quiesce(layer, reactor, channel, false, part), apply);
    }
}

/// Those that stand on a device learn its new size.
fn resize_above(registry: &Arc<Registry>, device: DeviceId, base: &Info, hold: &Hold) {
    for (name, module) in registry.above(device) {
        let wanted = catch_unwind(AssertUnwindSafe(|| module.base_resized(base))).unwrap_or(None);
        if let Some(num_blocks) = wanted {
            let holds = hold.clone();
            resize(registry, &name, num_blocks, Box::new(move |_| drop(holds)));
        }
    }
}

/// Stops new I/O and answers when nothing is in flight.
fn quiesce(layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, abort: bool, part: Rc<Part>) {
    layer.pause(channel);
    if abort {
        layer.abort_all(reactor, channel);
    }
    layer.when_quiet(channel, Box::new(move |_, _| drop(part)));
    layer.settle(reactor);
}

/// A reset under way; who waits for it is told when this is dropped.
struct Resetting {
    registry: Arc<Registry>,
    device: DeviceId,
    /// Those above that are reset with it.
    above: Vec<DeviceId>,
    /// I/O in flight is asked to end; else it ends by itself.
    abort: bool,
    guard: Option<JobGuard>,
    /// Said unless it comes to the end: the device went first.
    status: Status,
    tell: Option<Box<dyn FnOnce(Status) + Send>>,
}

impl Drop for Resetting {
    fn drop(&mut self) {
        drop(self.guard.take());
        if let Some(tell) = self.tell.take() {
            tell(self.status);
        }
    }
}

impl Resetting {
    fn new(
        registry: &Arc<Registry>,
        device: DeviceId,
        abort: bool,
        above: Vec<DeviceId>,
        tell: impl FnOnce(Status) + Send + 'static,
    ) -> Self {
        let (registry, status) = (registry.clone(), Status::INVALID_NAMESPACE);
        Self { registry, device, above, abort, guard: None, status, tell: Some(Box::new(tell)) }
    }

    fn begin(mut self) {
        let (registry, device) = (self.registry.clone(), self.device);
        let job = move |guard| {
            self.guard = Some(guard);
            let registry = self.registry.clone();
            // What goes up there has set a deadline, which may be over.
            let abort = self.abort || self.above.iter().any(|above| registry.is_going(*above));
            let stop = move |layer: &mut Layer, reactor: &mut Reactor, channel, part| quiesce(layer, reactor, channel, abort, part);
            on_channels(&registry, device, Stance::Hold, stop, move |_| self.restart());
        };
        registry.exclusive(device, Box::new(job));
    }

    /// None goes on before all were reset: a module may count on quiet everywhere.
    fn restart(self) {
        let (registry, device) = (self.registry.clone(), self.device);
        let each = |layer: &mut Layer, reactor: &mut Reactor, channel, _part| {
            layer.with_channel(reactor, channel, |module, layer, reactor| module.reset(layer, reactor));
        };
        on_channels(&registry, device, Stance::Neither, each, move |_| self.descend());
    }

    /// The bdevs below that are reset with this one, all at once. One that goes meanwhile has nothing left to be reset. Jobs wait for each other
    /// downwards alone: none of a base waits for one of what stands on it.
    fn descend(self) {
        let (registry, abort) = (self.registry.clone(), self.abort);
        let bases = registry.reset_with(self.device);
        let above: Vec<DeviceId> = self.above.iter().copied().chain([self.device]).collect();
        let hold = Hold::until(move || self.go_on());
        for base in bases {
            let hold = hold.clone();
            Self::new(&registry, base, abort, above.clone(), move |_| drop(hold)).begin();
        }
    }

    fn go_on(self) {
        let (registry, device) = (self.registry.clone(), self.device);
        let resume = |layer: &mut Layer, reactor: &mut Reactor, channel, _part| layer.resume(reactor, channel, None);
        on_channels(&registry, device, Stance::LetGo, resume, move |_| self.succeed());
    }

    fn succeed(mut self) {
        self.status = Status::SUCCESS;
    }
}

/// Resets a device for the I/O `io` of reactor `origin`: all channels quiet, then reset, then those below that are reset with it, then on.
pub(crate) fn reset(registry: &Arc<Registry>, device: DeviceId, origin: Handle, io: IoId, abort: bool) {
    let tell = move |status| {
        origin.call(move |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            layer.complete(io, status);
            layer.settle(reactor);
        });
    };
    Resetting::new(registry, device, abort, Vec::new(), tell).begin();
}

/// Has the device's channels polled on their reactors, now; replies when all were. For a module that was told something by Python.
pub fn poke(registry: &Arc<Registry>, device: DeviceId, reply: Reply<()>) {
    let name = registry.get(device).map_or_else(String::new, |(_, info)| info.name.clone());
    let answer = Answer::new(&name, reply);
    let poll = |layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, _part| {
        layer.with_channel(reactor, channel, |module, layer, reactor| module.poll(layer, reactor));
        layer.settle(reactor);
    };
    on_channels(registry, device, Stance::Neither, poll, move |_| answer.send(Ok(())));
}
