//! The process's bdevs by name: register, look up, open, claim. Control plane: one lock, never taken per I/O.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qpair_reactor::{Handle, Reactor};

use crate::layer::health::Health;
use crate::layer::watch::{Late, OnLate};
use crate::measures::Board;
use crate::ranges::Ranges;
use crate::stats::Reset;
use crate::{BdevError, Buffer, ChannelId, Device, Info, Layer, Stats};

/// Names a device for the life of the registry; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub(crate) u64);

/// What happened to a bdev.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Registered.
    Added(String),
    /// Being removed: close it.
    Removing(String),
    /// Gone.
    Removed(String),
    /// Its size changed; the new snapshot is in force on every reactor.
    Resized(String),
    /// It cannot do what it should: its medium, what it stands on or its module failed.
    Failed {
        /// The bdev's name.
        name: String,
        /// One sentence.
        reason: String,
    },
    /// A limit began to hold I/O back.
    Throttled {
        /// The bdev's name.
        name: String,
        /// SPDK's name of the limit.
        limit: &'static str,
        /// Its figure: I/Os or bytes a second.
        value: u64,
    },
}

type Listener = Arc<dyn Fn(&Notice) + Send + Sync>;
pub(crate) type Job = Box<dyn FnOnce(JobGuard) + Send>;

struct Entry {
    id: DeviceId,
    device: Arc<dyn Device>,
    info: Arc<Info>,
    claimed_by: Option<String>,
    removing: bool,
    descriptors: BTreeMap<u64, Listener>,
    gone_stats: Stats,
    health: Arc<Health>,
    busy: bool,
    jobs: VecDeque<Job>,
    ranges: Ranges,
}

#[derive(Default)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    next: u64,
    listener: Option<Listener>,
}

/// See the module's doc.
pub struct Registry {
    inner: Mutex<Inner>,
    board: Board,
    reactors: Vec<Handle>,
}

/// What a look-up tells beside the snapshot.
#[derive(Clone, Debug)]
pub struct Listing {
    /// Which device.
    pub id: DeviceId,
    /// The snapshot in force.
    pub info: Arc<Info>,
    /// Who claimed it.
    pub claimed_by: Option<String>,
    /// On its way out.
    pub removing: bool,
    /// Descriptors open.
    pub open_count: usize,
}

impl Registry {
    /// For these reactors; the first is home to what needs one.
    pub fn new(reactors: Vec<Handle>) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::default(), board: Board::default(), reactors })
    }

    /// What devices are to do beside serving I/O.
    pub(crate) fn board(&self) -> &Board {
        &self.board
    }

    /// The reactors that bdevs are used on.
    pub fn reactors(&self) -> &[Handle] {
        &self.reactors
    }

    /// Tells `listener` of everything that happens to any bdev, on whatever thread it happens.
    pub fn listen(&self, listener: impl Fn(&Notice) + Send + Sync + 'static) {
        self.lock().listener = Some(Arc::new(listener));
    }

    /// Adds a device under its name.
    pub fn register(&self, device: Arc<dyn Device>) -> Result<DeviceId, BdevError> {
        let info = device.info();
        info.check()?;
        let mut inner = self.lock();
        if inner.entries.contains_key(&info.name) {
            return Err(BdevError::Exists(info.name));
        }
        if let Some(other) = inner.entries.values().find(|entry| entry.info.uuid == info.uuid) {
            return Err(BdevError::Exists(format!("{} has uuid {}", other.info.name, info.uuid)));
        }
        // One whose base began to go while it was made would never hear of it.
        if let Some(base) = info.bases.iter().find(|base| inner.entries.get(*base).is_none_or(|entry| entry.removing)) {
            return Err(BdevError::Removing(base.clone()));
        }
        inner.next += 1;
        let (id, name) = (DeviceId(inner.next), info.name.clone());
        let entry = Entry {
            id,
            device,
            info: Arc::new(info),
            claimed_by: None,
            removing: false,
            descriptors: BTreeMap::new(),
            gone_stats: Stats::default(),
            health: Arc::default(),
            busy: false,
            jobs: VecDeque::new(),
            ranges: Ranges::default(),
        };
        inner.entries.insert(name.clone(), entry);
        drop(inner);
        self.tell(None, &Notice::Added(name));
        Ok(id)
    }

    /// All bdevs, or the one of a name or UUID.
    pub fn list(&self, name: Option<&str>) -> Result<Vec<Listing>, BdevError> {
        let inner = self.lock();
        let listing = |entry: &Entry| Listing {
            id: entry.id,
            info: entry.info.clone(),
            claimed_by: entry.claimed_by.clone(),
            removing: entry.removing,
            open_count: entry.descriptors.len(),
        };
        match name {
            None => {
                // In the order in which they were registered, as SPDK shows them.
                let mut entries: Vec<&Entry> = inner.entries.values().collect();
                entries.sort_by_key(|entry| entry.id);
                Ok(entries.into_iter().map(listing).collect())
            }
            Some(name) => Ok(vec![listing(inner.find(name)?)]),
        }
    }

    /// Opens by name or UUID. `listener` hears what happens to this bdev, on whatever thread it happens.
    pub fn open(
        self: &Arc<Self>,
        name: &str,
        write: bool,
        listener: impl Fn(&Notice) + Send + Sync + 'static,
    ) -> Result<Descriptor, BdevError> {
        self.open_as(name, write, None, Arc::new(listener))
    }

    /// Opens for a bdev that is to stand on this one, and claims it for that bdev's module in the same step: nobody else writes
    /// to it until the descriptor is dropped. The bdev above names it in [`Info::bases`], and is told by [`Device::base_removing`].
    pub fn open_base(self: &Arc<Self>, name: &str, owner: &str) -> Result<Descriptor, BdevError> {
        self.open_as(name, true, Some(owner), Arc::new(|_: &Notice| {}))
    }

    fn open_as(self: &Arc<Self>, name: &str, write: bool, claim: Option<&str>, listener: Listener) -> Result<Descriptor, BdevError> {
        let mut inner = self.lock();
        inner.next += 1;
        let number = inner.next;
        let entry = inner.find_mut(name)?;
        let name = entry.info.name.clone();
        if entry.removing {
            return Err(BdevError::Removing(name));
        }
        if write && let Some(owner) = &entry.claimed_by {
            return Err(BdevError::Claimed { name, owner: owner.clone() });
        }
        if claim.is_some() {
            entry.claimed_by = claim.map(str::to_owned);
        }
        entry.descriptors.insert(number, listener);
        Ok(Descriptor {
            registry: self.clone(),
            device: entry.id,
            number,
            name,
            write,
            claims: claim.is_some(),
            watched: AtomicBool::new(false),
        })
    }

    /// Claims a bdev for a module: nobody else opens it for writing until it is released.
    pub fn claim(&self, name: &str, owner: &str) -> Result<(), BdevError> {
        let mut inner = self.lock();
        let entry = inner.find_mut(name)?;
        match &entry.claimed_by {
            Some(holder) => Err(BdevError::Claimed { name: name.to_owned(), owner: holder.clone() }),
            None if entry.removing => Err(BdevError::Removing(name.to_owned())),
            None => {
                entry.claimed_by = Some(owner.to_owned());
                Ok(())
            }
        }
    }

    /// Gives a claim up; a claim of somebody else's is refused.
    pub fn release(&self, name: &str, owner: &str) -> Result<(), BdevError> {
        let mut inner = self.lock();
        let entry = inner.find_mut(name)?;
        if entry.claimed_by.as_deref() != Some(owner) {
            let holder = entry.claimed_by.clone().unwrap_or_else(|| "nobody".to_owned());
            return Err(BdevError::Claimed { name: name.to_owned(), owner: holder });
        }
        entry.claimed_by = None;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Device, snapshot and name by id, unless it is gone.
    pub(crate) fn get(&self, id: DeviceId) -> Option<(Arc<dyn Device>, Arc<Info>)> {
        self.lock().by_id(id).map(|entry| (entry.device.clone(), entry.info.clone()))
    }

    /// Starts a removal: from now on it cannot be opened.
    pub(crate) fn mark_removing(&self, name: &str) -> Result<DeviceId, BdevError> {
        let mut inner = self.lock();
        let entry = inner.find_mut(name)?;
        if entry.removing {
            return Err(BdevError::Removing(entry.info.name.clone()));
        }
        entry.removing = true;
        let (id, name) = (entry.id, entry.info.name.clone());
        drop(inner);
        self.tell(Some(id), &Notice::Removing(name));
        Ok(id)
    }

    /// The devices that stand right on this one.
    pub(crate) fn above(&self, id: DeviceId) -> Vec<(String, Arc<dyn Device>)> {
        let mut inner = self.lock();
        let Some(base) = inner.by_id(id).map(|entry| entry.info.name.clone()) else { return Vec::new() };
        let stands_on_it = inner.entries.values().filter(|entry| entry.info.bases.contains(&base));
        stands_on_it.map(|entry| (entry.info.name.clone(), entry.device.clone())).collect()
    }

    /// Whether a device is being removed, or was.
    pub(crate) fn is_going(&self, id: DeviceId) -> bool {
        self.lock().by_id(id).is_none_or(|entry| entry.removing)
    }

    /// The devices right below this one that are reset with it.
    pub(crate) fn reset_with(&self, id: DeviceId) -> Vec<DeviceId> {
        let Some((_, info)) = self.get(id).filter(|(device, _)| device.resets_bases()) else { return Vec::new() };
        info.bases.iter().filter_map(|base| self.live(base).ok()).collect()
    }

    /// A device stands on other bdevs than before.
    pub fn set_bases(&self, id: DeviceId, bases: Vec<String>) {
        if let Some(entry) = self.lock().by_id(id) {
            let info = Info::clone(&entry.info);
            entry.info = Arc::new(Info { bases, version: info.version + 1, ..info });
        }
    }

    /// Ends a removal.
    pub(crate) fn forget(&self, id: DeviceId) {
        let mut inner = self.lock();
        let Some(name) = inner.by_id(id).map(|entry| entry.info.name.clone()) else { return };
        let entry = inner.entries.remove(&name);
        drop(inner);
        let listeners: Vec<Listener> = entry.iter().flat_map(|entry| entry.descriptors.values().cloned()).collect();
        // Dropped without the lock: a device may take its time, or call back, and so may jobs that waited.
        drop(entry);
        self.board.forget(id);
        let notice = Notice::Removed(name);
        listeners.iter().for_each(|listener| listener(&notice));
        self.tell(None, &notice);
    }

    /// The id of a bdev that is not on its way out.
    pub(crate) fn live(&self, name: &str) -> Result<DeviceId, BdevError> {
        let inner = self.lock();
        let entry = inner.find(name)?;
        if entry.removing { Err(BdevError::Removing(name.to_owned())) } else { Ok(entry.id) }
    }

    /// Puts a new size in force here; reactors follow by message.
    pub(crate) fn resized(&self, id: DeviceId, num_blocks: u64) -> Option<Arc<Info>> {
        let mut inner = self.lock();
        let entry = inner.by_id(id)?;
        let mut info = Info::clone(&entry.info);
        (info.num_blocks, info.version) = (num_blocks, info.version + 1);
        entry.info = Arc::new(info);
        Some(entry.info.clone())
    }

    /// Runs `job` when no other job on this device is under way: resets, resizes and removal come one after the other.
    /// One whose device is gone, or goes before its turn, is dropped; what it captured answers for it. False: it has to wait.
    pub(crate) fn exclusive(self: &Arc<Self>, id: DeviceId, job: Job) -> bool {
        let mut inner = self.lock();
        match inner.by_id(id) {
            // The job is an argument: it is dropped after the lock.
            None => return true,
            Some(entry) if entry.busy => {
                entry.jobs.push_back(job);
                return false;
            }
            Some(entry) => entry.busy = true,
        }
        drop(inner);
        job(JobGuard { registry: self.clone(), device: id });
        true
    }

    /// A device's range locks, unless it is gone.
    pub(crate) fn with_ranges<R>(&self, id: DeviceId, ask: impl FnOnce(&mut Ranges) -> R) -> Option<R> {
        let mut inner = self.lock();
        match inner.by_id(id) {
            Some(entry) => Some(ask(&mut entry.ranges)),
            // What it captured is an argument's: dropped after the lock.
            None => None,
        }
    }

    /// Keeps the counters of a channel that closed.
    pub(crate) fn book(&self, id: DeviceId, stats: &Stats) {
        if let Some(entry) = self.lock().by_id(id) {
            entry.gone_stats.add(stats);
        }
    }

    /// Counters of the channels that are gone; taken if `reset`.
    pub(crate) fn gone_stats(&self, id: DeviceId, reset: Reset) -> Stats {
        let mut inner = self.lock();
        let Some(entry) = inner.by_id(id) else { return Stats::default() };
        entry.gone_stats.tell(reset)
    }

    /// What was told of a device's failures.
    pub(crate) fn health(&self, id: DeviceId) -> Option<Arc<Health>> {
        self.lock().by_id(id).map(|entry| entry.health.clone())
    }

    /// Tells that a device cannot do what it should, and why: one sentence with fields and values. Each call is told, so it is for what happens
    /// once; for what fails with I/O there is [`Layer::report_failure`]. Nobody is called before this returns, unless there is no reactor.
    pub fn report_failure(self: &Arc<Self>, id: DeviceId, reason: String) {
        let Some(name) = self.lock().by_id(id).map(|entry| entry.info.name.clone()) else { return };
        let (registry, notice) = (self.clone(), Notice::Failed { name, reason });
        match self.reactors.first() {
            Some(home) => home.call(move |_| registry.tell(Some(id), &notice)),
            None => self.tell(Some(id), &notice),
        }
    }

    /// Tells the process's listener, and those who have device `id` open.
    pub(crate) fn tell(&self, id: Option<DeviceId>, notice: &Notice) {
        let mut inner = self.lock();
        let mut listeners: Vec<Listener> = inner.listener.iter().cloned().collect();
        if let Some(entry) = id.and_then(|id| inner.by_id(id)) {
            listeners.extend(entry.descriptors.values().cloned());
        }
        drop(inner);
        listeners.iter().for_each(|listener| listener(notice));
    }
}

impl Inner {
    fn find(&self, name: &str) -> Result<&Entry, BdevError> {
        let by_uuid = || self.entries.values().find(|entry| entry.info.uuid.to_string() == name);
        self.entries.get(name).or_else(by_uuid).ok_or_else(|| BdevError::NoSuchBdev(name.to_owned()))
    }

    fn find_mut(&mut self, name: &str) -> Result<&mut Entry, BdevError> {
        let name = self.find(name)?.info.name.clone();
        self.entries.get_mut(&name).ok_or(BdevError::NoSuchBdev(name))
    }

    fn by_id(&mut self, id: DeviceId) -> Option<&mut Entry> {
        self.entries.values_mut().find(|entry| entry.id == id)
    }
}

/// Held while a job on a device is under way. Dropping it starts the next.
pub(crate) struct JobGuard {
    registry: Arc<Registry>,
    device: DeviceId,
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        let Some(entry) = inner.by_id(self.device) else { return };
        let next = entry.jobs.pop_front();
        entry.busy = next.is_some();
        drop(inner);
        if let Some(job) = next {
            job(JobGuard { registry: self.registry.clone(), device: self.device });
        }
    }
}

/// A bdev that somebody has open. Closed when dropped; channels opened through it are closed by their openers.
pub struct Descriptor {
    registry: Arc<Registry>,
    device: DeviceId,
    number: u64,
    name: String,
    write: bool,
    claims: bool,
    watched: AtomicBool,
}

impl Descriptor {
    /// The bdev's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which device.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Its number, by which completion queues name it.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Has `late` called for each I/O of this descriptor that takes longer than `timeout_ns`, on the I/O's reactor; 0: not any more. Which I/Os are its
    /// own, and when and how often it is called: see [`crate::layer::watch`].
    pub fn set_timeout(&self, timeout_ns: u64, late: impl Fn(&mut Layer, &mut Reactor, Late) + Send + Sync + 'static) {
        self.watched.store(timeout_ns > 0, Ordering::Relaxed);
        self.watch((timeout_ns > 0).then(|| (timeout_ns, Arc::new(late) as OnLate)));
    }

    fn watch(&self, wanted: Option<(u64, OnLate)>) {
        for handle in self.registry.reactors() {
            let (number, wanted) = (self.number, wanted.clone());
            handle.call(move |reactor| {
                let layer = Layer::of(reactor);
                layer.borrow_mut().watch(reactor, number, wanted);
            });
        }
    }

    /// Whether it was opened for writing.
    pub fn can_write(&self) -> bool {
        self.write
    }

    /// The snapshot in force, unless the device is gone.
    pub fn info(&self) -> Option<Arc<Info>> {
        self.registry.get(self.device).map(|(_, info)| info)
    }

    /// Memory for I/O on this bdev: the device's own where it has some left, else plain.
    pub fn buffer(&self, bytes: u64) -> Result<Buffer, BdevError> {
        let lent = self.registry.get(self.device).and_then(|(device, _)| device.buffer(bytes));
        lent.map_or_else(|| Buffer::plain(bytes), Ok)
    }

    /// The calling reactor's channel. Each open is closed by [`Layer::close_channel`].
    pub fn channel(&self, reactor: &mut Reactor, layer: &mut Layer) -> Result<ChannelId, BdevError> {
        let (device, info) = match self.registry.live(&self.name) {
            Ok(id) if id == self.device => self.registry.get(id),
            _ => None,
        }
        .ok_or_else(|| BdevError::Removing(self.name.clone()))?;
        layer.open_channel(reactor, &self.registry, self.device, &device, &info)
    }

    /// As [`channel`](Self::channel); once the device is going or gone, one that refuses all I/O. `info`: the snapshot that was in force last.
    pub fn channel_or_gone(&self, reactor: &mut Reactor, layer: &mut Layer, info: &Arc<Info>) -> Result<ChannelId, BdevError> {
        match self.channel(reactor, layer) {
            Err(BdevError::Removing(_)) => layer.open_gone(reactor, &self.registry, self.device, info),
            opened => opened,
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if self.watched.load(Ordering::Relaxed) {
            self.watch(None);
        }
        let listener = self.registry.lock().by_id(self.device).and_then(|entry| {
            if self.claims {
                entry.claimed_by = None;
            }
            entry.descriptors.remove(&self.number)
        });
        // Dropped without the lock: what it captured may call back.
        drop(listener);
    }
}
