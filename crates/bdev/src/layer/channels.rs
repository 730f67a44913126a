//! Channels of one reactor: opening, pausing, closing, and the poller that drives each.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Weak;
use std::sync::Arc;

use qpair_reactor::log::{self, Level};
use qpair_reactor::{Poller, Reactor};

use super::{ChannelState, Layer, Owner, Slot};
use crate::measures::Counting;
use crate::stats::Reset;
use crate::trace::Point;
use crate::{BdevError, Channel, ChannelId, Device, DeviceId, Info, Registry, Stats};

/// Children reserved for splitting, for each channel whose device has limits.
const CHILDREN: usize = 32;

impl ChannelId {
    /// No channel.
    pub(crate) const NOWHERE: Self = Self(u32::MAX);
}

impl Layer {
    /// This reactor's channel to a device, opened on first use and counted.
    pub(crate) fn open_channel(
        &mut self,
        reactor: &mut Reactor,
        registry: &Arc<Registry>,
        device_id: DeviceId,
        device: &Arc<dyn Device>,
        info: &Arc<Info>,
    ) -> Result<ChannelId, BdevError> {
        if let Some(id) = self.by_device.get(&device_id)
            && let Some(slot) = &mut self.slots[id.0 as usize]
        {
            slot.users += 1;
            return Ok(*id);
        }
        let state = if self.held.contains(&device_id) { ChannelState::Paused } else { ChannelState::Open };
        let id = self.add_slot(reactor, registry, device_id, info, state)?;
        if let Some(slot) = &mut self.slots[id.0 as usize] {
            slot.device = Some(device.clone());
        }
        let opened = catch_unwind(AssertUnwindSafe(|| device.open(reactor, self, id))).unwrap_or_else(|_| {
            log::say(Level::Error, "bdev", format_args!("{}: its module panicked while a channel was opened", info.name));
            self.report_failure(id, "panic", |_| "its module panicked while a channel was opened".to_owned());
            let source = std::io::Error::other("the module panicked");
            Err(BdevError::Os { what: format!("opening a channel of bdev {}", info.name), source })
        });
        match opened {
            Ok(channel) => {
                if let Some(slot) = &mut self.slots[id.0 as usize] {
                    slot.channel = Some(channel);
                }
                self.by_device.insert(device_id, id);
                self.adopt(id);
                self.trace_channel(id, Point::ChannelCreate);
                if let Some(poller) = self.poller(id) {
                    reactor.install_poller(poller, Box::new(ChannelPoller { layer: self.me.clone(), channel: id }));
                }
                Ok(id)
            }
            Err(error) => {
                self.free_slot(reactor, id);
                Err(error)
            }
        }
    }

    /// A channel to a device that is gone: it refuses all I/O, as one does that was open when its device went.
    pub(crate) fn open_gone(
        &mut self,
        reactor: &mut Reactor,
        registry: &Arc<Registry>,
        device_id: DeviceId,
        info: &Arc<Info>,
    ) -> Result<ChannelId, BdevError> {
        let id = self.add_slot(reactor, registry, device_id, info, ChannelState::Closed)?;
        if let Some(slot) = &mut self.slots[id.0 as usize] {
            slot.gone = true;
        }
        self.trace_channel(id, Point::ChannelCreate);
        Ok(id)
    }

    fn add_slot(
        &mut self,
        reactor: &mut Reactor,
        registry: &Arc<Registry>,
        device_id: DeviceId,
        info: &Arc<Info>,
        state: ChannelState,
    ) -> Result<ChannelId, BdevError> {
        let id = self.vacant_slot();
        let children = self.reserve_children(info)?;
        let helpers = self.reserve_helpers(info)?;
        let poller = reactor.reserve_poller(format!("bdev_{}", info.name));
        let split_queue = self.new_queue(Owner::Split(id));
        self.slots[id.0 as usize] = Some(Slot {
            device_id,
            info: info.clone(),
            registry: registry.clone(),
            device: None,
            channel: None,
            state,
            users: 1,
            inflight: 0,
            parents: 0,
            resets: 0,
            closing: false,
            gone: false,
            waiting: VecDeque::new(),
            splitting: VecDeque::new(),
            children,
            jobs: Vec::new(),
            helpers,
            gate: self.gate_of(device_id),
            bases: Vec::new(),
            reserve: Vec::new(),
            split_queue,
            limits: None,
            stats: Stats::default(),
            observer: None,
            failing: None,
            when_quiet: Vec::new(),
            poller,
            plugged: false,
            attention: false,
        });
        Ok(id)
    }

    fn vacant_slot(&mut self) -> ChannelId {
        let index = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        ChannelId(index as u32)
    }

    fn reserve_children(&mut self, info: &Info) -> Result<Vec<crate::IoId>, BdevError> {
        use crate::Op;
        let limited = info.max_io_blocks != 0 || info.max_segments != 0 || info.max_unmap_blocks != 0 || info.split_on_boundary;
        let emulates = !info.supported.has(Op::WriteZeroes) && !info.readonly;
        let count = if limited || emulates { CHILDREN } else { 0 };
        if emulates && self.zeros.is_none() {
            self.zeros = Some(super::split::zeros()?);
        }
        Ok(self.ios.reserve(count))
    }

    /// One user less; the last one closes the channel when nothing is in flight any more.
    pub fn close_channel(&mut self, reactor: &mut Reactor, id: ChannelId) {
        self.leave_channel(id);
        self.settle(reactor);
    }

    /// As [`close_channel`](Self::close_channel), and what follows is done at the next settle.
    pub(super) fn leave_channel(&mut self, id: ChannelId) {
        let Some(slot) = self.slots.get_mut(id.0 as usize).and_then(Option::as_mut) else { return };
        slot.users -= 1;
        if slot.users > 0 {
            return;
        }
        slot.closing = true;
        self.by_device.remove(&slot.device_id);
        self.call_attention(id);
    }

    /// Lets the module go; the slot stays for its users, and refuses.
    pub(crate) fn drop_module(&mut self, reactor: &mut Reactor, id: ChannelId) {
        let Some(slot) = &mut self.slots[id.0 as usize] else { return };
        slot.gone = true;
        let device = slot.device.take();
        if let Some(mut module) = slot.channel.take() {
            let close = AssertUnwindSafe(|| {
                module.close(self, reactor);
                drop(module);
                drop(device);
            });
            if catch_unwind(close).is_err() {
                log::say(Level::Error, "bdev", format_args!("a module panicked while its channel was closed"));
            }
        }
        self.leave_bases(id);
    }

    pub(super) fn free_slot(&mut self, reactor: &mut Reactor, id: ChannelId) {
        self.leave_bases(id);
        self.trace_channel(id, Point::ChannelDestroy);
        if let Some(slot) = self.slots[id.0 as usize].take() {
            slot.children.into_iter().chain(slot.helpers).chain(slot.reserve).for_each(|child| self.ios.give_back(child));
            slot.registry.book(slot.device_id, &slot.stats);
            let counting = slot.observer.iter().filter_map(|observer| observer.counting.as_ref());
            counting.for_each(|gone| slot.registry.board().keep(slot.device_id, gone));
            self.remove_queue(slot.split_queue);
            // Those of a module that could not do it itself: the channel's name may be given again.
            let own = |queue: &super::Queue| matches!(queue.owner, Owner::Channel(owner) if owner == id);
            for index in 0..self.queues.len() {
                if own(&self.queues[index]) {
                    self.remove_queue(super::QueueId(index as u32));
                }
            }
            reactor.remove_poller(slot.poller);
        }
    }

    /// The channels of a device on this reactor: one in use at most, and those that still close.
    pub(crate) fn channels_of(&self, device: DeviceId) -> Vec<ChannelId> {
        let of_it = |slot: &Option<Slot>| slot.as_ref().is_some_and(|slot| slot.device_id == device);
        self.slots.iter().enumerate().filter(|(_, slot)| of_it(slot)).map(|(index, _)| ChannelId(index as u32)).collect()
    }

    /// A job stops a device: a channel opened from now on starts paused.
    pub(crate) fn hold(&mut self, device: DeviceId) {
        if !self.held.contains(&device) {
            self.held.push(device);
        }
    }

    /// The job is over.
    pub(crate) fn let_go(&mut self, device: DeviceId) {
        self.held.retain(|other| *other != device);
    }

    /// The snapshot that I/O is checked against now.
    pub fn info(&self, id: ChannelId) -> Option<&Arc<Info>> {
        self.slots.get(id.0 as usize)?.as_ref().map(|slot| &slot.info)
    }

    /// The poller that a driver operation of this channel is submitted for.
    pub fn poller(&self, id: ChannelId) -> Option<qpair_reactor::PollerId> {
        self.slots.get(id.0 as usize)?.as_ref().map(|slot| slot.poller)
    }

    /// Whether the channel takes no more I/O, because its device is going.
    pub fn is_closed(&self, id: ChannelId) -> bool {
        self.slots.get(id.0 as usize).and_then(Option::as_ref).is_none_or(|slot| slot.state == ChannelState::Closed)
    }

    /// The channel's counters.
    pub(crate) fn stats_of(&mut self, id: ChannelId, reset: Reset) -> Stats {
        self.slots[id.0 as usize].as_mut().map_or_else(Stats::default, |slot| slot.stats.tell(reset))
    }

    /// The channel's histogram, if it has one.
    pub(crate) fn counting(&self, id: ChannelId) -> Option<&Counting> {
        self.slot(id)?.observer.as_ref()?.counting.as_ref()
    }

    /// New I/O waits from now on.
    pub(crate) fn pause(&mut self, id: ChannelId) {
        self.set_state(id, ChannelState::Paused);
    }

    /// Takes I/O again, by a new snapshot if there is one.
    pub(crate) fn resume(&mut self, reactor: &mut Reactor, id: ChannelId, info: Option<Arc<Info>>) {
        if let (Some(slot), Some(info)) = (&mut self.slots[id.0 as usize], info) {
            slot.info = info;
        }
        self.set_state(id, ChannelState::Open);
        self.settle(reactor);
    }

    /// New I/O fails from now on, and what waits too.
    pub(crate) fn shut(&mut self, reactor: &mut Reactor, id: ChannelId) {
        self.set_state(id, ChannelState::Closed);
        self.settle(reactor);
    }

    fn set_state(&mut self, id: ChannelId, state: ChannelState) {
        if let Some(slot) = &mut self.slots[id.0 as usize]
            && slot.state != ChannelState::Closed
        {
            slot.state = state;
        }
        self.call_attention(id);
    }

    /// Gives the module a hint for each I/O it has.
    pub(crate) fn abort_all(&mut self, reactor: &mut Reactor, id: ChannelId) {
        for io in self.under(id) {
            self.abort(reactor, io);
        }
        self.settle(reactor);
    }
}

/// Drives a module that polls or uses the reactor's driver.
struct ChannelPoller {
    layer: Weak<RefCell<Layer>>,
    channel: ChannelId,
}

impl ChannelPoller {
    fn call<R: Default>(&self, reactor: &mut Reactor, call: impl FnOnce(&mut dyn Channel, &mut Layer, &mut Reactor) -> R) -> R {
        let Some(layer) = self.layer.upgrade() else { return R::default() };
        let mut layer = layer.borrow_mut();
        layer.now_ns = reactor.now_ns();
        let result = layer.with_channel(reactor, self.channel, call);
        layer.settle(reactor);
        // What a channel passed down outside of `submit`: nobody else ends that batch.
        layer.unplug(reactor);
        result.unwrap_or_default()
    }
}

impl Poller for ChannelPoller {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        self.call(reactor, |module, layer, reactor| module.poll(layer, reactor))
    }

    fn arm(&mut self, reactor: &mut Reactor) -> bool {
        // A channel that is gone has nothing to wait for.
        let Some(layer) = self.layer.upgrade() else { return true };
        let mut layer = layer.borrow_mut();
        layer.with_channel(reactor, self.channel, |module, _, reactor| module.arm(reactor)).unwrap_or(true)
    }

    fn disarm(&mut self, reactor: &mut Reactor) {
        self.call(reactor, |module, _, reactor| module.disarm(reactor));
    }

    fn done(&mut self, reactor: &mut Reactor, value: u64, result: i32) {
        self.call(reactor, |module, layer, reactor| module.done(layer, reactor, value, result));
    }
}
