//! What can be set and asked of any bdev while it works: limits and groups that share one, histograms, counters, queue depth, a time-out.
//!
//! How it works. What a device is to do stands on a board, an immutable snapshot each; whoever changes it sends a message to every reactor, which takes the snapshot
//! that the board has *then*. So the order of messages does not matter, and a channel that is opened meanwhile needs none. A change of limits is a new
//! limiter: debts of the old one are forgotten, and so is what it had left.
//!
//! A group is a limiter that several bdevs pay into beside their own. A bdev is in one group at most.
//!
//! Errors: [`BdevError`] by name and limit. Replies come when every reactor does as asked.
//!
//! Limits: [`GROUPS_MAX`] groups.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qpair_reactor::{Reactor, ReactorId};

use crate::histogram::{Histogram, Shape};
use crate::layer::overdue::Overdue;
use crate::layer::watch::{Sampled, Sampler};
use crate::lifecycle::{Answer, Reply, Stance, on_channels};
use crate::limit::{Limiter, Rates};
use crate::stats::Reset;
use crate::{BdevError, ChannelId, DeviceId, Hold, Layer, Op, Registry, Stats, trace};

/// More than anybody sorts bdevs into, so that a slip is refused.
pub const GROUPS_MAX: usize = 65536;

/// What a device is to do, as of now.
#[derive(Clone, Default)]
pub(crate) struct Measures {
    own: Option<Arc<Limiter>>,
    group: Option<(String, Arc<Limiter>)>,
    histogram: Option<Arc<Shape>>,
    sampler: Option<Arc<Sampler>>,
    overdue: Option<Arc<Overdue>>,
}

impl Measures {
    /// Whom a channel pays.
    pub(crate) fn limiters(&self) -> impl Iterator<Item = Arc<Limiter>> {
        self.own.clone().into_iter().chain(self.group.as_ref().map(|(_, limiter)| limiter.clone()))
    }

    /// A channel's histogram, begun anew unless it is the one of before.
    pub(crate) fn histogram_for(&self, before: Option<Counting>) -> Option<Counting> {
        let begun = self.histogram.as_ref()?;
        let same = before.filter(|before| Arc::ptr_eq(&before.begun, begun));
        same.or_else(|| Some(Counting { begun: begun.clone(), histogram: Histogram::new(**begun) }))
    }
}

/// A channel's histogram, and of which beginning it is.
pub(crate) struct Counting {
    begun: Arc<Shape>,
    pub(crate) histogram: Histogram,
}

/// What looks at each I/O of a channel that ends. A channel has none where nothing does, so that all of them together cost one look.
pub(crate) struct Observer {
    pub(crate) counting: Option<Counting>,
    /// Trace points are on.
    pub(crate) traced: bool,
}

impl Observer {
    #[inline(always)]
    pub(crate) fn book(&mut self, op: Op, elapsed_ns: u64) {
        if let Some(counting) = &mut self.counting {
            counting.histogram.book(op, elapsed_ns);
        }
    }
}

#[derive(Default)]
struct Kept {
    measures: Measures,
    /// Of channels that are gone.
    gone: Option<Histogram>,
}

struct Group {
    rates: Rates,
    limiter: Arc<Limiter>,
    members: BTreeSet<DeviceId>,
}

#[derive(Default)]
struct Inner {
    devices: BTreeMap<DeviceId, Kept>,
    groups: BTreeMap<String, Group>,
}

/// See the module's doc.
#[derive(Default)]
pub(crate) struct Board(Mutex<Inner>, trace::Wanted);

impl Board {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which trace points are to be on.
    pub(crate) fn trace(&self) -> &trace::Wanted {
        &self.1
    }

    /// What a device is to do.
    pub(crate) fn of(&self, device: DeviceId) -> Measures {
        self.lock().devices.get(&device).map(|kept| kept.measures.clone()).unwrap_or_default()
    }

    /// A channel is gone, and its histogram with it.
    pub(crate) fn keep(&self, device: DeviceId, gone: &Counting) {
        let mut inner = self.lock();
        let Some(kept) = inner.devices.get_mut(&device) else { return };
        if kept.measures.histogram.as_ref().is_some_and(|now| Arc::ptr_eq(now, &gone.begun)) {
            kept.gone.get_or_insert_with(|| Histogram::new(*gone.begun)).add(&gone.histogram);
        }
    }

    /// A device is gone.
    pub(crate) fn forget(&self, device: DeviceId) {
        let mut inner = self.lock();
        inner.groups.values_mut().for_each(|group| {
            group.members.remove(&device);
        });
        let kept = inner.devices.remove(&device);
        drop(inner);
        let Some(Measures { sampler, overdue, .. }) = kept.map(|kept| kept.measures) else { return };
        sampler.iter().for_each(|sampler| sampler.stop());
        overdue.iter().for_each(|overdue| overdue.stop());
    }
}

/// Has all channels of these devices do as the board says; then `done`.
fn apply(registry: &Arc<Registry>, devices: impl IntoIterator<Item = DeviceId>, done: impl FnOnce() + Send + 'static) {
    let hold = Hold::until(done);
    for device in devices {
        let holds = hold.clone();
        let adopt = |layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, _part| {
            layer.adopt(channel);
            layer.settle(reactor);
        };
        on_channels(registry, device, Stance::Neither, adopt, move |_| drop(holds));
    }
}

/// Changes one device's measures, and tells its reactors.
fn change(registry: &Arc<Registry>, name: &str, reply: Reply<()>, change: impl FnOnce(&mut Inner, DeviceId) -> Result<(), BdevError>) {
    let changed = registry.live(name).and_then(|device| {
        let mut inner = registry.board().lock();
        change(&mut inner, device).map(|()| device)
    });
    match changed {
        Err(error) => reply(Err(error)),
        Ok(device) => {
            let answer = Answer::new(name, reply);
            apply(registry, [device], move || answer.send(Ok(())));
        }
    }
}

/// A bdev's own limits, and the group that it is in.
pub fn limits(registry: &Registry, device: DeviceId) -> (Rates, Option<String>) {
    let measures = registry.board().of(device);
    (measures.own.map(|limiter| limiter.rates).unwrap_or_default(), measures.group.map(|(name, _)| name))
}

/// Changes a bdev's own limits: those given; 0 takes one away.
pub fn set_limits(registry: &Arc<Registry>, name: &str, rates: [Option<u64>; 4], reply: Reply<()>) {
    change(registry, name, reply, |inner, device| {
        let measures = &mut inner.devices.entry(device).or_default().measures;
        let before = measures.own.as_ref().map(|limiter| limiter.rates).unwrap_or_default();
        let wanted = merge(before, rates);
        measures.own = (!wanted.is_none()).then(|| Arc::new(Limiter::new(wanted)));
        Ok(())
    });
}

fn merge(before: Rates, [rw_ios, rw_bytes, r_bytes, w_bytes]: [Option<u64>; 4]) -> Rates {
    Rates {
        rw_ios: rw_ios.unwrap_or(before.rw_ios),
        rw_bytes: rw_bytes.unwrap_or(before.rw_bytes),
        r_bytes: r_bytes.unwrap_or(before.r_bytes),
        w_bytes: w_bytes.unwrap_or(before.w_bytes),
    }
}

/// A group, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupInfo {
    /// Its name.
    pub name: String,
    /// What its bdevs share.
    pub rates: Rates,
    /// Their names.
    pub bdevs: Vec<String>,
}

/// All groups by name.
pub fn groups(registry: &Registry) -> Vec<GroupInfo> {
    let listed = |(name, group): (&String, &Group)| (name.clone(), group.rates, group.members.clone());
    let groups: Vec<_> = registry.board().lock().groups.iter().map(listed).collect();
    let name_of = |device| registry.get(device).map(|(_, info)| info.name.clone());
    let info = |(name, rates, members): (String, Rates, BTreeSet<DeviceId>)| {
        let bdevs = members.into_iter().filter_map(name_of).collect();
        GroupInfo { name, rates, bdevs }
    };
    groups.into_iter().map(info).collect()
}

/// Makes a group without bdevs.
pub fn create_group(registry: &Registry, name: &str, rates: Rates) -> Result<(), BdevError> {
    let mut inner = registry.board().lock();
    if name.is_empty() || name.len() > 255 {
        return Err(BdevError::invalid("group", name, "1 to 255 bytes"));
    }
    if inner.groups.contains_key(name) {
        return Err(BdevError::GroupExists(name.to_owned()));
    }
    if inner.groups.len() == GROUPS_MAX {
        return Err(BdevError::invalid("group", name, format!("at most {GROUPS_MAX} groups")));
    }
    inner.groups.insert(name.to_owned(), Group { rates, limiter: Arc::new(Limiter::new(rates)), members: BTreeSet::new() });
    Ok(())
}

/// Changes a group's rates: those given; 0 takes one away.
pub fn set_group(registry: &Arc<Registry>, name: &str, rates: [Option<u64>; 4], reply: Reply<()>) {
    let mut inner = registry.board().lock();
    let Inner { devices, groups } = &mut *inner;
    let Some(group) = groups.get_mut(name) else {
        drop(inner);
        return reply(Err(BdevError::NoSuchGroup(name.to_owned())));
    };
    group.rates = merge(group.rates, rates);
    group.limiter = Arc::new(Limiter::new(group.rates));
    for member in &group.members {
        devices.entry(*member).or_default().measures.group = Some((name.to_owned(), group.limiter.clone()));
    }
    let members = group.members.clone();
    drop(inner);
    apply(registry, members, move || reply(Ok(())));
}

/// Takes a group away; its bdevs stay, without that limit.
pub fn delete_group(registry: &Arc<Registry>, name: &str, reply: Reply<()>) {
    let mut inner = registry.board().lock();
    let Some(group) = inner.groups.remove(name) else {
        drop(inner);
        return reply(Err(BdevError::NoSuchGroup(name.to_owned())));
    };
    for member in &group.members {
        inner.devices.entry(*member).or_default().measures.group = None;
    }
    drop(inner);
    apply(registry, group.members, move || reply(Ok(())));
}

/// Puts a bdev into a group.
pub fn join_group(registry: &Arc<Registry>, group: &str, name: &str, reply: Reply<()>) {
    change(registry, name, reply, |inner, device| {
        let Some(found) = inner.groups.get_mut(group) else { return Err(BdevError::NoSuchGroup(group.to_owned())) };
        let measures = &mut inner.devices.entry(device).or_default().measures;
        if let Some((other, _)) = &measures.group {
            return Err(BdevError::Claimed { name: name.to_owned(), owner: format!("QoS group {other}") });
        }
        measures.group = Some((group.to_owned(), found.limiter.clone()));
        found.members.insert(device);
        Ok(())
    });
}

/// Takes a bdev out of a group.
pub fn leave_group(registry: &Arc<Registry>, group: &str, name: &str, reply: Reply<()>) {
    change(registry, name, reply, |inner, device| {
        let Some(found) = inner.groups.get_mut(group) else { return Err(BdevError::NoSuchGroup(group.to_owned())) };
        if !found.members.remove(&device) {
            return Err(BdevError::invalid("name", name, format!("a bdev of QoS group {group}")));
        }
        inner.devices.entry(device).or_default().measures.group = None;
        Ok(())
    });
}

/// Begins a histogram of a bdev anew, or ends it.
pub fn enable_histogram(registry: &Arc<Registry>, name: &str, shape: Option<Shape>, reply: Reply<()>) {
    change(registry, name, reply, |inner, device| {
        let kept = inner.devices.entry(device).or_default();
        (kept.measures.histogram, kept.gone) = (shape.map(Arc::new), None);
        Ok(())
    });
}

/// A bdev's histogram, summed over its channels, also those that are gone.
pub fn histogram(registry: &Arc<Registry>, name: &str, reply: Reply<Histogram>) {
    let found = registry.live(name).and_then(|device| {
        let inner = registry.board().lock();
        let kept = inner.devices.get(&device);
        let begun = kept.and_then(|kept| kept.measures.histogram.clone()).ok_or_else(|| BdevError::NoHistogram(name.to_owned()))?;
        let sum = kept.and_then(|kept| kept.gone.clone()).unwrap_or_else(|| Histogram::new(*begun));
        Ok((device, begun, sum))
    });
    let (device, begun, sum) = match found {
        Ok(found) => found,
        Err(error) => return reply(Err(error)),
    };
    let (answer, sum) = (Answer::new(name, reply), Arc::new(Mutex::new(sum)));
    let total = sum.clone();
    let collect = move |layer: &mut Layer, _: &mut Reactor, channel: ChannelId, _part| {
        if let Some(counting) = layer.counting(channel)
            && Arc::ptr_eq(&counting.begun, &begun)
        {
            sum.lock().unwrap_or_else(PoisonError::into_inner).add(&counting.histogram);
        }
    };
    on_channels(registry, device, Stance::Neither, collect, move |_| {
        let sum = total.lock().unwrap_or_else(PoisonError::into_inner).clone();
        answer.send(Ok(sum));
    });
}

/// Looks at a bdev's queue depth once in `period_us`; 0: not any more.
pub fn set_sampling(registry: &Arc<Registry>, name: &str, period_us: u64) -> Result<(), BdevError> {
    let device = registry.live(name)?;
    let mut inner = registry.board().lock();
    let sampler = &mut inner.devices.entry(device).or_default().measures.sampler;
    // SPDK's figures go on counting when the period changes.
    let (before, so_far) = (sampler.take(), sampler.as_ref().map(|before| before.sampled()).unwrap_or_default());
    *sampler = (period_us > 0).then(|| Sampler::new(period_us, so_far));
    let begun = sampler.clone();
    drop(inner);
    before.iter().for_each(|before| before.stop());
    if let Some(sampler) = begun {
        sampler.start(registry, device);
    }
    Ok(())
}

/// Has it told ([`crate::Notice::Failed`]) when an I/O of a bdev takes longer; 0: not any more.
pub fn set_timeout(registry: &Arc<Registry>, name: &str, timeout_ns: u64) -> Result<(), BdevError> {
    let device = registry.live(name)?;
    let begun = (timeout_ns > 0).then(|| Overdue::new(timeout_ns));
    let mut inner = registry.board().lock();
    let before = std::mem::replace(&mut inner.devices.entry(device).or_default().measures.overdue, begun.clone());
    drop(inner);
    before.iter().for_each(|before| before.stop());
    if let Some(overdue) = begun {
        overdue.start(registry, device);
    }
    Ok(())
}

/// A bdev's counters.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The sum, also over channels that are gone.
    pub total: Stats,
    /// Of each reactor's channel, in the order of the reactors.
    pub channels: Vec<(ReactorId, Stats)>,
    /// Queue depth, where it is looked at.
    pub sampled: Option<Sampled>,
}

/// Tells a bdev's counters, and then resets them.
pub fn statistics(registry: &Arc<Registry>, name: &str, reset: Reset, reply: Reply<Report>) {
    let device = match registry.live(name) {
        Ok(device) => device,
        Err(error) => return reply(Err(error)),
    };
    let answer = Answer::new(name, reply);
    let sampled = registry.board().of(device).sampler.map(|sampler| sampler.sampled());
    let report = Report { total: registry.gone_stats(device, reset), channels: Vec::new(), sampled };
    let report = Arc::new(Mutex::new(report));
    let whole = report.clone();
    let collect = move |layer: &mut Layer, reactor: &mut Reactor, channel: ChannelId, _part| {
        let stats = layer.stats_of(channel, reset);
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        report.total.add(&stats);
        match report.channels.iter_mut().find(|(reactor_id, _)| *reactor_id == reactor.id()) {
            Some((_, sum)) => sum.add(&stats),
            None => report.channels.push((reactor.id(), stats)),
        }
    };
    let places: Vec<ReactorId> = registry.reactors().iter().map(qpair_reactor::Handle::id).collect();
    on_channels(registry, device, Stance::Neither, collect, move |_| {
        let mut report = std::mem::take(&mut *whole.lock().unwrap_or_else(PoisonError::into_inner));
        report.channels.sort_by_key(|(id, _)| places.iter().position(|place| place == id));
        answer.send(Ok(report));
    });
}
