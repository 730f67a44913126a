//! What concerns a device on all its reactors at once: removal, resizing, reset, statistics.
//!
//! Each is a job that holds the device exclusively, sends one message to every reactor, and goes on when the last has
//! answered ([`qpair_reactor::Fanout`]). A reactor answers when its channel is quiet: nothing in flight, no child under
//! way. So what follows (dropping the module, shrinking, restarting) can touch no I/O.
//!
//! A reactor that is gone answers by dropping its part; so jobs end also while the process stops.

use std::sync::{Arc, Mutex, PoisonError};

use qpair_reactor::{Fanout, Handle, Reactor};
use qpair_wire::nvme::Status;

use crate::registry::JobGuard;
use crate::{BdevError, ChannelId, DeviceId, Info, IoId, Layer, Notice, Registry, Stats};

/// Where the outcome of a control operation goes, from whatever thread it ends on.
pub type Reply<T> = Box<dyn FnOnce(Result<T, BdevError>) + Send>;

fn home(registry: &Registry) -> Option<&Handle> {
    registry.reactors().first()
}

/// Runs `each` for the device's channel on every reactor that has one; then `then` at home.
fn on_channels(
    registry: &Arc<Registry>,
    device: DeviceId,
    each: impl Fn(&mut Layer, &mut Reactor, ChannelId, qpair_reactor::fanout::Part) + Clone + Send + 'static,
    then: impl FnOnce(&mut Reactor) + Send + 'static,
) {
    let Some(home) = home(registry) else { return };
    Fanout::new(home.clone(), then).on_each(registry.reactors(), move |reactor, part| {
        let layer = Layer::of(reactor);
        let mut layer = layer.borrow_mut();
        if let Some(channel) = layer.channel_of(device) {
            each(&mut layer, reactor, channel, part);
        }
    });
}

/// Removes a bdev: no new I/O; what is in flight ends, or is asked to end after `deadline_ns`; then it is gone.
pub fn unregister(registry: &Arc<Registry>, name: &str, deadline_ns: u64, reply: Reply<()>) {
    let device = match registry.mark_removing(name) {
        Ok(device) => device,
        Err(error) => return reply(Err(error)),
    };
    let shared = registry.clone();
    registry.exclusive(
        device,
        Box::new(move |guard| {
            let registry = shared.clone();
            let finish = move |_: &mut Reactor| {
                shared.forget(device);
                drop(guard);
                reply(Ok(()));
            };
            let close = move |layer: &mut Layer, reactor: &mut Reactor, channel, part| close(layer, reactor, channel, deadline_ns, part);
            on_channels(&registry, device, close, finish);
        }),
    );
}

fn close(layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, deadline_ns: u64, part: qpair_reactor::fanout::Part) {
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
    let found = registry.live(name).and_then(|id| registry.get(id).map(|found| (id, found)).ok_or_else(|| BdevError::NoSuchBdev(name.to_owned())));
    let (device, (_, info)) = match found {
        Ok(found) => found,
        Err(error) => return reply(Err(error)),
    };
    let changed = Info { num_blocks, ..Info::clone(&info) };
    if let Err(error) = changed.check() {
        return reply(Err(error));
    }
    let shared = registry.clone();
    registry.exclusive(device, Box::new(move |guard| resize_alone(shared, device, num_blocks, guard, reply)));
}

fn resize_alone(registry: Arc<Registry>, device: DeviceId, num_blocks: u64, guard: JobGuard, reply: Reply<()>) {
    let Some((module, info)) = registry.get(device) else { return };
    let shared = registry.clone();
    let apply = move |_: &mut Reactor| {
        let outcome = module.resize(num_blocks);
        let changed = outcome.is_ok().then(|| shared.resized(device, num_blocks)).flatten();
        let (registry, snapshot) = (shared.clone(), changed.clone());
        let announce = move |_: &mut Reactor| {
            if let Some(info) = changed {
                shared.tell(Some(device), &Notice::Resized(info.name.clone()));
            }
            drop(guard);
            reply(outcome);
        };
        on_channels(&registry, device, move |layer, reactor, channel, _part| layer.resume(reactor, channel, snapshot.clone()), announce);
    };
    if num_blocks >= info.num_blocks {
        on_channels(&registry, device, |_, _, _, _| {}, apply);
    } else {
        on_channels(&registry, device, |layer, reactor, channel, part| quiesce(layer, reactor, channel, false, part), apply);
    }
}

/// Stops new I/O and answers when nothing is in flight.
fn quiesce(layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, abort: bool, part: qpair_reactor::fanout::Part) {
    layer.pause(channel);
    if abort {
        layer.abort_all(reactor, channel);
    }
    layer.when_quiet(channel, Box::new(move |_, _| drop(part)));
    layer.settle(reactor);
}

/// Resets a device for the I/O `io` of reactor `origin`: all channels quiet, then reset, then on.
pub(crate) fn reset(registry: &Arc<Registry>, device: DeviceId, origin: Handle, io: IoId) {
    let shared = registry.clone();
    let answer = move |status: Status| {
        origin.call(move |reactor| {
            let layer = Layer::of(reactor);
            let mut layer = layer.borrow_mut();
            layer.complete(io, status);
            layer.settle(reactor);
        });
    };
    let gone = answer.clone();
    let taken = registry.exclusive(
        device,
        Box::new(move |guard| {
            let registry = shared.clone();
            let restart = move |_: &mut Reactor| {
                let registry = shared.clone();
                let finish = move |_: &mut Reactor| {
                    drop(guard);
                    answer(Status::SUCCESS);
                };
                let each = |layer: &mut Layer, reactor: &mut Reactor, channel, _part| {
                    layer.with_channel(reactor, channel, |module, layer, reactor| module.reset(layer, reactor));
                    layer.resume(reactor, channel, None);
                };
                on_channels(&registry, device, each, finish);
            };
            on_channels(&registry, device, |layer, reactor, channel, part| quiesce(layer, reactor, channel, true, part), restart);
        }),
    );
    if !taken {
        gone(Status::INVALID_NAMESPACE);
    }
}

/// Sums a device's counters over its channels.
pub fn statistics(registry: &Arc<Registry>, name: &str, reset: bool, reply: Reply<Stats>) {
    let device = match registry.live(name) {
        Ok(device) => device,
        Err(error) => return reply(Err(error)),
    };
    let sum = Arc::new(Mutex::new(registry.gone_stats(device, reset)));
    let total = sum.clone();
    let collect = move |layer: &mut Layer, _: &mut Reactor, channel: ChannelId, _part| {
        let stats = layer.stats_of(channel, reset);
        sum.lock().unwrap_or_else(PoisonError::into_inner).add(&stats);
    };
    on_channels(registry, device, collect, move |_| {
        let stats = *total.lock().unwrap_or_else(PoisonError::into_inner);
        reply(Ok(stats));
    });
}
