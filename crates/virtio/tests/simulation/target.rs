//! A target under a seed: one queue's device side, on a thread or a reactor of its own. It delays, reorders, batches, sleeps, and, if told
//! so, fails, stays silent, dies and lies.
//!
//! While it is faithful it holds the driver to the ring's rules: chains as the standard has them, within the shared memory, no head twice,
//! never more entries than the ring has.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use qpair_memory::{Mapping, Region, Shared, SharedIndex};
use qpair_reactor::event::Event;
use qpair_reactor::sim::{Act, Actor, Rng};
use qpair_reactor::{LocalWaker, Poller, Reactor};
use qpair_virtio::VirtioLayout;
use qpair_wire::virtio::{AvailFlags, DescFlags, Features, RingSize, UsedFlags, need_event};
use qpair_wire::virtio_blk::RequestType;

pub const SECTOR: usize = 512;

/// How badly it behaves: per mille of requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    /// Answered by an error status.
    pub fails: u64,
    /// Answered by success, and a length that says data or status are missing.
    pub shorts: u64,
    /// Never answered.
    pub mutes: u64,
    /// The last thing it does, before it never does anything again.
    pub deaths: u64,
    /// As a death, but its last words are a lie that cannot be overlooked.
    pub blatant: u64,
    /// Lies that may be overlooked; it goes on.
    pub sly: u64,
}

/// What all queues of a target share: its disk, and what it did.
#[derive(Default)]
pub struct Disk {
    pub bytes: Vec<u8>,
    /// Sectors answered but not flushed, and when they were answered.
    pub dirty: BTreeMap<u64, u64>,
    pub sequence: u64,
    pub requests: u64,
    /// Lies told. From the first on nothing is as it should be.
    pub lies: u64,
    /// Queues that are dead or requests that stay unanswered.
    pub silent: u64,
    /// Counts connections: targets of former ones do nothing any more.
    pub connection: u64,
}

impl Disk {
    /// The process that serves it is killed, in the midst of what it does. What it had in its cache can be made durable by nobody, unless it is written again.
    pub fn kill(&mut self, cache_dies: bool) {
        self.connection += 1;
        self.lies = 0;
        if cache_dies {
            self.dirty.values_mut().for_each(|answered| *answered = u64::MAX);
        }
    }
}

struct Request {
    head: u16,
    kind: RequestType,
    sector: u64,
    /// Where, how much.
    data: Vec<(u64, u32)>,
    status_at: u64,
    /// What a good device says it wrote.
    written: u32,
    due_ns: Option<u64>,
    /// Data were moved already; a read must not see what is written after that.
    moved: bool,
    /// The disk's history when a flush was taken.
    sequence: u64,
}

impl Request {
    fn bytes(&self) -> u64 {
        self.data.iter().map(|piece| u64::from(piece.1)).sum()
    }
}

pub struct Target {
    disk: Rc<RefCell<Disk>>,
    manners: Manners,
    region: Region,
    size: RingSize,
    event_idx: bool,
    desc: Shared<[u64; 2]>,
    avail: Shared<u16>,
    used: Shared<[u32; 2]>,
    avail_flags: SharedIndex,
    avail_idx: SharedIndex,
    used_event: SharedIndex,
    used_flags: SharedIndex,
    used_idx: SharedIndex,
    avail_event: SharedIndex,
    avail_at: u16,
    used_at: u16,
    /// The used index at the last look at what the driver wants.
    told_at: u16,
    pending: Vec<Request>,
    kick: Event,
    call: Event,
    dead: bool,
    connection: u64,
}

impl Target {
    pub fn new(
        layout: &VirtioLayout,
        queue: usize,
        features: u64,
        disk: &Rc<RefCell<Disk>>,
        manners: Manners,
        (kick, call): (&Event, &Event),
    ) -> Self {
        let mapping = layout.mapping();
        // A mapping of its own: it outlives the driver's.
        let region = Region::new(Mapping::shared(mapping.fd().unwrap(), mapping.len() as u64).unwrap());
        let (base, addresses) = (mapping.address() as u64, layout.queue_addresses(queue).unwrap());
        let (desc, avail, used) = (addresses.desc - base, addresses.avail - base, addresses.used - base);
        let size = RingSize::new(u32::from(layout.queue_size())).unwrap();
        let index = |at| SharedIndex::new(&region, at).unwrap();
        let count = usize::from(size.get());
        Self {
            disk: disk.clone(),
            manners,
            size,
            event_idx: features & Features::RING_EVENT_IDX.bits() != 0,
            desc: Shared::new(&region, desc, count).unwrap(),
            avail: Shared::new(&region, avail + size.avail_entry_offset(0), count).unwrap(),
            used: Shared::new(&region, used + size.used_entry_offset(0), count).unwrap(),
            avail_flags: index(avail),
            avail_idx: index(avail + 2),
            used_event: index(avail + size.used_event_offset()),
            used_flags: index(used),
            used_idx: index(used + 2),
            avail_event: index(used + size.avail_event_offset()),
            avail_at: 0,
            used_at: 0,
            told_at: 0,
            pending: Vec::new(),
            kick: kick.twin().unwrap(),
            call: call.twin().unwrap(),
            dead: false,
            connection: disk.borrow().connection,
            region,
        }
    }

    pub fn kick(&self) -> Event {
        self.kick.twin().unwrap()
    }

    fn is_gone(&self) -> bool {
        self.connection != self.disk.borrow().connection
    }

    /// When the next request is due.
    pub fn due_ns(&self) -> Option<u64> {
        self.pending.iter().filter_map(|request| request.due_ns).min().filter(|_| !self.dead)
    }

    /// Takes some, moves some, answers some; how many.
    pub fn run(&mut self, now_ns: u64, rng: &mut Rng) -> usize {
        if self.dead || self.is_gone() {
            return 0;
        }
        let taken = if rng.chance(7, 8) { self.take(now_ns, rng) } else { 0 };
        for index in 0..self.pending.len() {
            if !self.pending[index].moved && rng.chance(1, 3) {
                self.transfer(index);
            }
        }
        taken + self.answer(now_ns, rng)
    }

    /// Asks for a kick; false: there is something to do already.
    pub fn listen(&mut self) -> bool {
        if self.event_idx {
            self.avail_event.store(self.avail_at, Ordering::Relaxed);
        } else {
            self.used_flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.dead || self.avail_idx.load(Ordering::Acquire) == self.avail_at
    }

    /// Asks for no kicks. With the event index the wish that stands is used up by itself.
    pub fn silence(&mut self) {
        if !self.event_idx {
            self.used_flags.store(UsedFlags::NO_NOTIFY.bits(), Ordering::Relaxed);
        }
    }

    fn take(&mut self, now_ns: u64, rng: &mut Rng) -> usize {
        let waiting = self.avail_idx.load(Ordering::Acquire).wrapping_sub(self.avail_at);
        let lied = self.disk.borrow().lies > 0;
        if waiting > self.size.get() && lied {
            self.die();
            return 0;
        }
        assert!(waiting <= self.size.get(), "{waiting} entries in a ring of {}", self.size.get());
        let most = if rng.chance(1, 4) { rng.between(1, 3) as u16 } else { waiting };
        for _ in 0..waiting.min(most) {
            let head = u16::from_le(self.avail.load(usize::from(self.size.slot(self.avail_at))));
            self.avail_at = self.avail_at.wrapping_add(1);
            let Some(mut request) = self.decode(head) else {
                assert!(lied, "head {head} starts no request");
                continue;
            };
            let again = self.pending.iter().any(|other| other.head == head);
            assert!(lied || !again, "head {head} was given twice");
            request.sequence = self.disk.borrow().sequence;
            let longest_ns = if rng.chance(1, 8) { 400_000 } else { 20_000 };
            request.due_ns = (!rng.chance(self.manners.mutes, 1000)).then(|| now_ns + rng.below(longest_ns));
            let mut disk = self.disk.borrow_mut();
            disk.requests += 1;
            disk.silent += u64::from(request.due_ns.is_none());
            self.pending.push(request);
        }
        usize::from(waiting)
    }

    /// None: not as the standard says.
    fn decode(&self, head: u16) -> Option<Request> {
        let (mut table, mut index, mut pieces): (Option<u64>, u16, _) = (None, head, Vec::new());
        loop {
            let [address, rest] = match table {
                None => (index < self.size.get()).then(|| self.desc.load(usize::from(index)))?,
                Some(at) => Shared::<[u64; 2]>::new(&self.region, at + 16 * u64::from(index), 1).ok()?.load(0),
            };
            let (length, flags) = (rest as u32, DescFlags::from_bits((rest >> 32) as u16)?);
            if flags.contains(DescFlags::INDIRECT) {
                if table.is_some() || flags != DescFlags::INDIRECT || !pieces.is_empty() {
                    return None;
                }
                (table, index) = (Some(address), 0);
                continue;
            }
            self.region.pointer(address, u64::from(length)).ok()?;
            pieces.push((address, length, flags.contains(DescFlags::WRITE)));
            if !flags.contains(DescFlags::NEXT) {
                break;
            }
            index = (rest >> 48) as u16;
            if pieces.len() > 4 {
                return None;
            }
        }
        let (first, last) = (*pieces.first()?, *pieces.last()?);
        if pieces.len() < 2 || (first.1, first.2) != (16, false) || (last.1, last.2) != (1, true) {
            return None;
        }
        let [kind, sector] = Shared::<[u64; 2]>::new(&self.region, first.0, 1).ok()?.load(0);
        let (kind, data) = (RequestType(kind as u32), &pieces[1..pieces.len() - 1]);
        let incoming = kind == RequestType::IN;
        if data.iter().any(|piece| piece.2 != incoming) {
            return None;
        }
        let bytes = data.iter().try_fold(0u32, |sum, piece| sum.checked_add(piece.1))?;
        let known = match kind {
            RequestType::IN | RequestType::OUT => bytes > 0 && (bytes as usize).is_multiple_of(SECTOR),
            RequestType::FLUSH => bytes == 0,
            RequestType::DISCARD | RequestType::WRITE_ZEROES => bytes == 16,
            _ => false,
        };
        let data: Vec<_> = data.iter().map(|piece| (piece.0, piece.1)).collect();
        let written = 1 + if incoming { bytes } else { 0 };
        known.then_some(Request { head, kind, sector, data, status_at: last.0, written, due_ns: None, moved: false, sequence: 0 })
    }

    /// The sectors that a request changes, or reads.
    fn sectors(&self, request: &Request) -> Range<u64> {
        let (first, count) = match request.kind {
            RequestType::IN | RequestType::OUT => (request.sector, request.bytes() / SECTOR as u64),
            RequestType::DISCARD | RequestType::WRITE_ZEROES => {
                let segment = Shared::<[u64; 2]>::new(&self.region, request.data[0].0, 1).map_or([0, 0], |segment| segment.load(0));
                (segment[0], segment[1] & 0xffff_ffff)
            }
            _ => (0, 0),
        };
        let (end, disk) = (first.saturating_add(count), self.disk.borrow());
        if end > (disk.bytes.len() / SECTOR) as u64 {
            assert!(disk.lies > 0, "{:?} of {count} sectors at {first}, beyond the end", request.kind);
            return 0..0;
        }
        first..end
    }

    fn transfer(&mut self, index: usize) {
        self.pending[index].moved = true;
        let request = &self.pending[index];
        let sectors = self.sectors(request);
        let mut disk = self.disk.borrow_mut();
        let (mut at, end) = (sectors.start as usize * SECTOR, sectors.end as usize * SECTOR);
        match request.kind {
            RequestType::IN | RequestType::OUT if !sectors.is_empty() => {
                for (address, length) in &request.data {
                    let place = &mut disk.bytes[at..at + *length as usize];
                    if request.kind == RequestType::IN {
                        self.region.write(*address, place).unwrap();
                    } else {
                        self.region.read(*address, place).unwrap();
                    }
                    at += *length as usize;
                }
            }
            // What a discarded sector reads as is up to the device.
            RequestType::DISCARD => disk.bytes[at..end].fill(0xd5),
            RequestType::WRITE_ZEROES => disk.bytes[at..end].fill(0),
            _ => {}
        }
    }

    fn answer(&mut self, now_ns: u64, rng: &mut Rng) -> usize {
        let mut due: Vec<usize> =
            (0..self.pending.len()).filter(|index| self.pending[*index].due_ns.is_some_and(|due| due <= now_ns)).collect();
        rng.shuffle(&mut due);
        due.truncate(rng.between(1, 8) as usize);
        let heads: Vec<u16> = due.iter().map(|index| self.pending[*index].head).collect();
        let one_by_one = rng.chance(1, 4);
        for head in &heads {
            let Some(index) = self.pending.iter().position(|request| request.head == *head) else { continue };
            if rng.chance(self.manners.deaths, 1000) {
                self.die();
            } else if rng.chance(self.manners.blatant, 1000) {
                self.lie_blatantly(*head, rng);
                self.die();
            } else if rng.chance(self.manners.sly, 1000) {
                self.lie_slyly(*head, rng);
            }
            if self.dead {
                return 1;
            }
            self.finish(index, rng);
            if one_by_one {
                self.publish(rng);
            }
        }
        if !heads.is_empty() {
            self.publish(rng);
        }
        heads.len()
    }

    fn finish(&mut self, index: usize, rng: &mut Rng) {
        let (fails, short) = (rng.chance(self.manners.fails, 1000), rng.chance(self.manners.shorts, 1000));
        // What a short answer leaves out of a read may never have come.
        let missing = short && self.pending[index].kind == RequestType::IN;
        if !self.pending[index].moved && !missing && (!fails || rng.chance(1, 2)) {
            self.transfer(index);
        }
        let request = self.pending.swap_remove(index);
        let sectors = self.sectors(&request);
        let status = if fails { *rng.pick(&[1, 2, 99]) } else { 0 };
        // Of a short one the status is none's business: it may not be written.
        self.region.write(request.status_at, &[status]).unwrap();
        let mut disk = self.disk.borrow_mut();
        disk.sequence += 1;
        let now = disk.sequence;
        match request.kind {
            RequestType::FLUSH if !fails && !short => disk.dirty.retain(|_, answered| *answered > request.sequence),
            RequestType::OUT | RequestType::DISCARD | RequestType::WRITE_ZEROES => disk.dirty.extend(sectors.map(|sector| (sector, now))),
            _ => {}
        }
        drop(disk);
        let written = if short { rng.below(u64::from(request.written)) as u32 } else { request.written };
        self.push(u32::from(request.head), written);
    }

    fn push(&mut self, id: u32, written: u32) {
        self.used.store(usize::from(self.size.slot(self.used_at)), [id.to_le(), written.to_le()]);
        self.used_at = self.used_at.wrapping_add(1);
    }

    fn publish(&mut self, rng: &mut Rng) {
        self.used_idx.store(self.used_at, Ordering::Release);
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.told_at, self.used_at);
        let wanted = if self.event_idx {
            need_event(self.used_event.load(Ordering::Relaxed), self.used_at, old)
        } else {
            self.avail_flags.load(Ordering::Relaxed) & AvailFlags::NO_INTERRUPT.bits() == 0
        };
        // One for nothing, now and then.
        if wanted || rng.chance(1, 50) {
            self.call.notify();
        }
    }

    fn die(&mut self) {
        self.dead = true;
        self.disk.borrow_mut().silent += 1;
        // A process that dies closes its descriptors, and who waits for the other end hears nothing of that.
        self.pending.clear();
    }

    /// Something that no driver may overlook.
    fn lie_blatantly(&mut self, head: u16, rng: &mut Rng) {
        self.disk.borrow_mut().lies += 1;
        let size = u32::from(self.size.get());
        match rng.below(4) {
            0 => self.push(*rng.pick(&[size, size + 1, 1 << 16 | u32::from(head), u32::MAX]), 1),
            1 => self.push(u32::from(head), *rng.pick(&[1 << 24, u32::MAX])),
            // By more than the ring has: less may take back what the driver has not seen yet, or show what was not published yet.
            2 => self.used_at = self.told_at.wrapping_add(self.size.get() + 1 + rng.below(1000) as u16),
            _ => self.used_at = self.told_at.wrapping_sub(self.size.get() + 1 + rng.below(1000) as u16),
        }
        self.used_idx.store(self.used_at, Ordering::Release);
        self.call.notify();
    }

    /// Something that may pass for the truth.
    fn lie_slyly(&mut self, head: u16, rng: &mut Rng) {
        self.disk.borrow_mut().lies += 1;
        match rng.below(5) {
            // Twice: once here, once as it should be.
            0 => self.push(u32::from(head), 1),
            // Somebody else's.
            1 => self.push(rng.below(u64::from(self.size.get())) as u32, 1 + rng.below(5000) as u32),
            // More than there is, within the ring.
            2 => self.used_at = self.used_at.wrapping_add(rng.between(1, u64::from(self.size.get())) as u16),
            // Not its own to write: descriptors, avail ring, wishes.
            3 => {
                let index = rng.below(u64::from(self.size.get())) as usize;
                self.desc.store(index, [rng.next(), rng.next()]);
                self.avail.store(index, rng.next() as u16);
                self.avail_flags.store(rng.next() as u16, Ordering::Relaxed);
                self.used_event.store(rng.next() as u16, Ordering::Relaxed);
            }
            _ => self.avail_event.store(rng.next() as u16, Ordering::Relaxed),
        }
        self.publish(rng);
        self.call.notify();
    }
}

/// Runs as a thread of its own, that polls for a while and sleeps for a while.
impl Actor for Target {
    fn act(&mut self, now_ns: u64, rng: &mut Rng) -> Act {
        if self.is_gone() {
            return Act::Done;
        }
        self.silence();
        let work = self.run(now_ns, rng);
        if !self.dead && (work > 0 || rng.chance(1, 4)) && rng.chance(7, 8) {
            return Act::Again;
        }
        if !self.listen() {
            return Act::Again;
        }
        Act::On(self.kick(), self.due_ns())
    }
}

/// Runs on a reactor: the driver's, or another.
pub struct OnReactor {
    pub target: Target,
    pub waker: LocalWaker,
    pub rng: Rng,
    /// The next timer that is set.
    pub timer_ns: Option<u64>,
}

impl Poller for OnReactor {
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        let now_ns = reactor.now_ns();
        self.timer_ns = self.timer_ns.filter(|at| *at > now_ns);
        let work = self.target.run(now_ns, &mut self.rng);
        if let Some(due_ns) = self.target.due_ns()
            && self.timer_ns.is_none_or(|at| at > due_ns)
        {
            self.timer_ns = Some(due_ns);
            let waker = self.waker.clone();
            reactor.after(due_ns.saturating_sub(now_ns), move |_| waker.wake());
        }
        work
    }

    fn arm(&mut self, _: &mut Reactor) -> bool {
        self.target.listen()
    }

    fn disarm(&mut self, _: &mut Reactor) {
        self.target.silence();
    }
}
