//! rust-vmm's vhost-user front end as an independent master of any vhost-user-blk target.
//!
//! `cargo run -p qpair-vhost --example frontend -- SOCKET [filled] [plain] [packed]` connects once for each row of [`SESSIONS`]: ring sizes, event index or
//! none, memory in one region or in many, with an inflight region. In each it does reads, writes, flushes, discards, write-zeroes and get-ids in
//! random cuts over two rings at once, compares every byte with what it knows the disk to hold, sees requests that make no sense refused, and
//! stops and restarts its rings halfway. The first 4 MiB of the disk are overwritten; at the end each 8-byte word there is its sector's number plus
//! one. A read-only disk is only read, and must refuse everything else.
//!
//! `filled`: the disk holds that pattern already (left by an earlier run, say), which is verified before anything is written; a read-only
//! disk must. `plain`: without what QEMU's storage daemon does not answer as the standard has it: configuration space at an offset or
//! longer than its own, an inflight region, direct descriptors before an indirect table, the used length of GET_ID and zeros behind
//! the name. `packed`: all rings are packed.
//!
//! Output: `key=value` lines of what was met, then `ok REQUESTS BYTES`; or an error that says which request, and what was wrong. The rings
//! are driven by the guest of our tests.

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::{Ask, DATA_MAX, Done, Driver, GUEST, Kind, USER};
use qpair_memory::Mapping;
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::{BlkFeatures, BlkStatus, Config, ID_BYTES, RequestType, Segment, SegmentFlags};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::{FromBytes, IntoBytes};

const QUEUES: usize = 2;
/// Requests in flight on a ring.
const SLOTS: usize = 32;
/// Sectors that are written and compared.
const AREA: u64 = 8192;
/// Parts of the area, of which each request of a round has one for itself: their order does not matter then.
const LANES: u64 = 16;
const ROUNDS: u64 = 24;
const PATIENCE: Duration = Duration::from_secs(10);
const SECTOR: usize = 512;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How one connection is made.
struct Plan {
    entries: u16,
    event_idx: bool,
    /// A region of memory for each ring, announced one by one where the target can.
    many_regions: bool,
    /// Entries for which an inflight region is made; 0 for none. Firmware's rings are larger than that sometimes.
    inflight: u16,
}

const SESSIONS: [Plan; 6] = [
    Plan { entries: 64, event_idx: true, many_regions: false, inflight: 0 },
    Plan { entries: 1, event_idx: false, many_regions: true, inflight: 1 },
    Plan { entries: 2, event_idx: true, many_regions: true, inflight: 0 },
    Plan { entries: 16, event_idx: false, many_regions: false, inflight: 16 },
    Plan { entries: 256, event_idx: true, many_regions: true, inflight: 128 },
    Plan { entries: 32768, event_idx: true, many_regions: false, inflight: 0 },
];

fn main() -> Outcome<()> {
    let mut words = std::env::args().skip(1);
    let socket = words.next().ok_or("usage: frontend SOCKET [filled] [plain] [packed]")?;
    let words: Vec<String> = words.collect();
    if let Some(unknown) = words.iter().find(|word| !["filled", "plain", "packed"].contains(&word.as_str())) {
        return Err(format!("unknown word {unknown}: filled, plain or packed").into());
    }
    let [filled, plain, packed] = ["filled", "plain", "packed"].map(|word| words.iter().any(|given| given == word));
    let kind = if packed { Kind::Packed } else { Kind::Split };
    let mut disk = Disk::default();
    for (number, plan) in SESSIONS.iter().enumerate() {
        let mut session = Session::open(&socket, plan, plain, kind)?;
        if number == 0 {
            session.say(filled)?;
            disk.bytes = pattern();
            disk.loose = vec![false; AREA as usize];
            if !filled {
                session.run(&mut disk, fill())?;
            }
        }
        let before = disk.requests;
        session.run(&mut disk, read_all())?;
        for round in 0..ROUNDS {
            let jobs = session.jobs(&mut disk);
            session.run(&mut disk, jobs)?;
            if round == ROUNDS / 2 {
                session.restart()?;
            }
        }
        session.nonsense(&mut disk)?;
        if number + 1 == SESSIONS.len() && session.writable() {
            session.run(&mut disk, fill())?;
            session.run(&mut disk, vec![Job::new(RequestType::FLUSH, 0, Vec::new())])?;
        }
        session.run(&mut disk, read_all())?;
        session.stop()?;
        println!("ring={} event_idx={} requests={}", plan.entries, plan.event_idx, disk.requests - before);
    }
    println!("id={}", String::from_utf8_lossy(disk.id.as_deref().unwrap_or_default()).trim_end_matches('\0'));
    println!("ok {} {}", disk.requests, disk.moved);
    Ok(())
}

/// What the disk must hold, and what was done with it. Outlives the connections.
#[derive(Default)]
struct Disk {
    bytes: Vec<u8>,
    /// Sectors that were discarded: they may read as they were, or as zeros.
    loose: Vec<bool>,
    id: Option<Vec<u8>>,
    random: Random,
    requests: u64,
    moved: u64,
}

impl Disk {
    /// Takes an answer in: compares what was read, remembers what was written.
    fn answered(&mut self, job: &Job, done: Done, read: &[u8], plain: bool) -> Result<(), String> {
        self.requests += 1;
        if done.status != job.expected.0 {
            return Err(format!("status {}, expected {}", done.status, job.expected.0));
        }
        if job.expected != BlkStatus::OK {
            return Ok(());
        }
        self.moved += (job.out.len() + read.len()) as u64;
        if done.written as usize != read.len() + 1 && !(plain && job.kind == RequestType::GET_ID) {
            return Err(format!("used length {}, expected {}", done.written, read.len() + 1));
        }
        match job.kind {
            RequestType::IN => self.compare(job.sector, read)?,
            RequestType::OUT => self.store(job.sector, &job.out),
            RequestType::GET_ID => {
                let name = if plain { read.split(|byte| *byte == 0).next().unwrap_or_default() } else { read };
                if self.id.get_or_insert_with(|| name.to_vec()) != name {
                    return Err(format!("the disk is called {name:?}, and was {:?}", self.id));
                }
            }
            RequestType::DISCARD | RequestType::WRITE_ZEROES => {
                for segment in job.out.chunks_exact(16).map(|bytes| Segment::read_from_bytes(bytes).unwrap_or_default()) {
                    let (first, count) = (segment.sector.get() as usize, segment.num_sectors.get() as usize);
                    if job.kind == RequestType::DISCARD {
                        self.loose[first..first + count].fill(true);
                    } else {
                        self.store(first as u64, &vec![0; count * SECTOR]);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn store(&mut self, sector: u64, bytes: &[u8]) {
        let (first, at) = (sector as usize, sector as usize * SECTOR);
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.loose[first..first + bytes.len() / SECTOR].fill(false);
    }

    fn compare(&self, first: u64, read: &[u8]) -> Result<(), String> {
        for (sector, found) in (first as usize..).zip(read.chunks_exact(SECTOR)) {
            let expected = &self.bytes[sector * SECTOR..][..SECTOR];
            let zeros = self.loose[sector] && found.iter().all(|byte| *byte == 0);
            if found != expected && !zeros {
                let at = found.iter().zip(expected).position(|(found, expected)| found != expected).unwrap_or(0);
                return Err(format!("sector {sector}, byte {at}: read {:#04x}, expected {:#04x}", found[at], expected[at]));
            }
        }
        Ok(())
    }
}

/// One request, and how it is to end.
struct Job {
    kind: RequestType,
    sector: u64,
    out: Vec<u8>,
    read_bytes: u32,
    expected: BlkStatus,
    /// Cuts of the readable and of the writable run, and descriptors outside the indirect table.
    shape: (Vec<u32>, Vec<u32>, Option<usize>),
}

impl Job {
    fn new(kind: RequestType, sector: u64, out: Vec<u8>) -> Self {
        Self { kind, sector, out, read_bytes: 0, expected: BlkStatus::OK, shape: (vec![16], vec![], None) }
    }

    fn reading(kind: RequestType, sector: u64, bytes: u32) -> Self {
        Self { read_bytes: bytes, shape: (vec![], vec![bytes], None), ..Self::new(kind, sector, Vec::new()) }
    }

    fn refused(self, expected: BlkStatus) -> Self {
        Self { expected, ..self }
    }

    /// Cuts it anywhere; half of them go into an indirect table.
    fn cut(mut self, random: &mut Random, plain: bool) -> Self {
        let ask = self.ask();
        let (readable, writable) = ask.runs();
        let mut cuts = |bytes: u32| {
            let mut cuts: Vec<u32> = (0..random.below(4)).map(|_| 1 + random.below(u64::from(bytes)) as u32).collect();
            cuts.sort_unstable();
            cuts
        };
        self.shape.0 = cuts(readable);
        self.shape.1 = cuts(writable);
        self.shape.2 = match random.below(4) {
            0 | 1 => None,
            2 => Some(0),
            _ => Some(usize::from(!plain)),
        };
        self
    }

    fn ask(&self) -> Ask {
        let mut ask = Ask::new(self.kind, self.sector, self.read_bytes.max(self.out.len() as u32));
        (ask.read_cuts, ask.write_cuts, ask.direct) = self.shape.clone();
        ask
    }
}

struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count.div_ceil(8)).flat_map(|_| self.below(u64::MAX).to_le_bytes()).take(count).collect()
    }
}

/// What the disk holds at the end of each run.
fn pattern() -> Vec<u8> {
    (0..AREA).flat_map(|sector| (sector + 1).to_le_bytes().repeat(SECTOR / 8)).collect()
}

/// Requests for the whole area, of the largest size.
fn whole(make: impl Fn(u64) -> Job) -> Vec<Job> {
    (0..AREA).step_by(DATA_MAX as usize / SECTOR).map(make).collect()
}

fn fill() -> Vec<Job> {
    let bytes = pattern();
    whole(|sector| Job::new(RequestType::OUT, sector, bytes[sector as usize * SECTOR..][..DATA_MAX as usize].to_vec()))
}

fn read_all() -> Vec<Job> {
    whole(|sector| Job::reading(RequestType::IN, sector, DATA_MAX))
}

/// A connection whose rings run.
struct Session {
    master: Frontend,
    features: u64,
    config: Config,
    rings: Vec<Ring>,
    plain: bool,
    /// Kept as a master keeps it: for the next target, if this one dies.
    _inflight: Option<File>,
}

impl Session {
    fn open(socket: &str, plan: &Plan, plain: bool, kind: Kind) -> Outcome<Self> {
        let mut master = Frontend::connect(socket, QUEUES as u64)?;
        master.set_owner()?;
        let mut wanted = Features::VERSION_1 | Features::INDIRECT_DESC | Features::PROTOCOL_FEATURES;
        wanted.set(Features::RING_EVENT_IDX, plan.event_idx);
        wanted.set(Features::RING_PACKED, kind == Kind::Packed);
        let features = master.get_features()? & (wanted.bits() | BlkFeatures::all().bits());
        let offered = master.get_protocol_features()?;
        let mut protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
        protocol |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        master.set_protocol_features(offered & protocol)?;
        // From here on each message is acknowledged, and a refusal is an error.
        master.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        master.set_features(features)?;
        let config = read_config(&mut master, plain)?;
        let queues = (master.get_queue_num()? as usize).min(QUEUES);
        let inflight = plan.inflight > 0 && (!plain || offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
        let inflight = if inflight { Some(share_inflight(&mut master, queues, plan.inflight)?) } else { None };

        if features & kind.feature() != kind.feature() {
            return Err("the target offers no packed ring".into());
        }
        let each = Driver::bytes(plan.entries, SLOTS).next_multiple_of(4096);
        let memory = Mapping::memfd("frontend", each as usize * queues)?;
        show_memory(&mut master, &memory, if plan.many_regions { each } else { each * queues as u64 }, offered)?;
        let event_idx = features & Features::RING_EVENT_IDX.bits() != 0;
        if event_idx != plan.event_idx {
            return Err("the target offers no event index".into());
        }
        let mut rings = Vec::new();
        for index in 0..queues {
            let driver = Driver::new(kind, &memory, index as u64 * each, plan.entries, SLOTS, event_idx, kind.start());
            rings.push(Ring::new(index, driver)?);
        }
        for ring in &rings {
            ring.start(&mut master)?;
        }
        Ok(Self { master, features, config, rings, plain, _inflight: inflight })
    }

    fn has(&self, feature: BlkFeatures) -> bool {
        self.features & feature.bits() != 0
    }

    fn writable(&self) -> bool {
        !self.has(BlkFeatures::RO)
    }

    /// Says what was met, and refuses a disk that this cannot verify.
    fn say(&self, filled: bool) -> Outcome<()> {
        let (config, writable) = (&self.config, self.writable());
        println!("sectors={} block={} queues={} writable={writable}", config.capacity, config.blk_size, self.rings.len());
        let block = config.blk_size.get();
        if !block.is_power_of_two() || !(SECTOR as u32..=DATA_MAX).contains(&block) {
            return Err(format!("blocks of {block} bytes: a power of two from {SECTOR} to {DATA_MAX}").into());
        }
        if config.capacity.get() < AREA {
            return Err(format!("a disk of {} sectors: at least {AREA}", config.capacity).into());
        }
        if !writable && !filled {
            return Err("a read-only disk cannot be filled: `filled` says that it is".into());
        }
        Ok(())
    }

    /// One request in each lane.
    fn jobs(&self, disk: &mut Disk) -> Vec<Job> {
        (0..LANES).map(|lane| self.job(&mut disk.random, lane * (AREA / LANES)).cut(&mut disk.random, self.plain)).collect()
    }

    fn job(&self, random: &mut Random, lane: u64) -> Job {
        let block = u64::from(self.config.blk_size) / SECTOR as u64;
        let sectors = block * (1 + random.below(u64::from(DATA_MAX) / SECTOR as u64 / block));
        let sector = lane + block * random.below((AREA / LANES - sectors) / block + 1);
        match random.below(16) {
            0 => Job::reading(RequestType::GET_ID, 0, ID_BYTES as u32),
            1 if self.has(BlkFeatures::FLUSH) => Job::new(RequestType::FLUSH, 0, Vec::new()),
            2 | 3 if self.writable() && self.has(BlkFeatures::DISCARD) => {
                Job::new(RequestType::DISCARD, 0, segments(random, lane, block, self.config.max_discard_seg.get(), SegmentFlags::empty()))
            }
            4 | 5 if self.writable() && self.has(BlkFeatures::WRITE_ZEROES) => {
                let flags = if random.below(2) == 0 { SegmentFlags::UNMAP } else { SegmentFlags::empty() };
                Job::new(RequestType::WRITE_ZEROES, 0, segments(random, lane, block, self.config.max_write_zeroes_seg.get(), flags))
            }
            6..=10 if self.writable() => Job::new(RequestType::OUT, sector, random.bytes(sectors as usize * SECTOR)),
            _ => Job::reading(RequestType::IN, sector, sectors as u32 * SECTOR as u32),
        }
    }

    /// Requests that are well formed and make no sense; none of them changes a byte.
    fn nonsense(&mut self, disk: &mut Disk) -> Outcome<()> {
        let (block, end) = (self.config.blk_size.get(), self.config.capacity.get());
        let segment =
            |sector, flags| Segment::new(sector, block / SECTOR as u32, SegmentFlags::from_bits_retain(flags)).as_bytes().to_vec();
        let mut jobs = vec![
            Job::reading(RequestType::IN, end - u64::from(block) / SECTOR as u64, 2 * block).refused(BlkStatus::IOERR),
            Job::reading(RequestType::IN, u64::MAX, block).refused(BlkStatus::IOERR),
            Job::reading(RequestType::IN, 0, block / 2 + 1).refused(BlkStatus::IOERR),
            Job::reading(RequestType::IN, end, block).refused(BlkStatus::IOERR),
            Job::new(RequestType(99), 0, vec![0; block as usize]).refused(BlkStatus::UNSUPP),
        ];
        if self.writable() {
            jobs.push(Job::new(RequestType::OUT, end, vec![0xee; block as usize]).refused(BlkStatus::IOERR));
            if self.has(BlkFeatures::DISCARD) {
                jobs.push(Job::new(RequestType::DISCARD, 0, segment(end, 0)).refused(BlkStatus::IOERR));
                jobs.push(Job::new(RequestType::DISCARD, 0, segment(0, 2)).refused(BlkStatus::UNSUPP));
            }
        } else {
            jobs.push(Job::new(RequestType::OUT, 0, vec![0xee; block as usize]).refused(BlkStatus::IOERR));
            jobs.push(Job::new(RequestType::DISCARD, 0, segment(0, 0)).refused(BlkStatus::IOERR));
            jobs.push(Job::new(RequestType::WRITE_ZEROES, 0, segment(0, 0)).refused(BlkStatus::IOERR));
        }
        self.run(disk, jobs)
    }

    /// Does requests whose order does not matter, on all rings at once, each as full as it goes.
    fn run(&mut self, disk: &mut Disk, jobs: Vec<Job>) -> Outcome<()> {
        let mut todo: Vec<VecDeque<Job>> = self.rings.iter().map(|_| VecDeque::new()).collect();
        for (number, job) in jobs.into_iter().enumerate() {
            todo[number % self.rings.len()].push_back(job);
        }
        loop {
            for (ring, todo) in self.rings.iter_mut().zip(&mut todo) {
                ring.submit(todo)?;
            }
            if self.rings.iter().all(|ring| ring.asked.is_empty()) {
                return Ok(());
            }
            for ring in &mut self.rings {
                ring.collect(disk, self.plain)?;
            }
        }
    }

    /// Stops the rings and checks that all was answered.
    fn stop(&mut self) -> Outcome<()> {
        for ring in &self.rings {
            let (base, answered) = (self.master.get_vring_base(ring.index)?, ring.driver.base());
            if base != answered {
                return Err(
                    format!("ring {}: GET_VRING_BASE says {base:#x}, and {answered:#x} is where all is answered", ring.index).into()
                );
            }
        }
        Ok(())
    }

    fn restart(&mut self) -> Outcome<()> {
        self.stop()?;
        self.rings.iter().try_for_each(|ring| ring.start(&mut self.master))
    }
}

/// Reads the configuration space whole and in parts, which must agree.
fn read_config(master: &mut Frontend, plain: bool) -> Outcome<Config> {
    let mut read = |offset: usize, bytes: usize| -> Outcome<Vec<u8>> {
        let (_, found) = master.get_config(offset as u32, bytes as u32, VhostUserConfigFlags::empty(), &vec![0; bytes])?;
        Ok(found)
    };
    let whole = read(0, size_of::<Config>())?;
    for (offset, bytes) in [(0, 8), (0, 24), (20, 4), (34, 2), (56, 4), (0, 256), (250, 6)] {
        if plain && (offset > 0 || bytes > whole.len()) {
            continue;
        }
        let found = read(offset, bytes)?;
        let mut expected: Vec<u8> = whole.iter().skip(offset).take(bytes).copied().collect();
        expected.resize(bytes, 0);
        if found != expected {
            return Err(format!("configuration space, {bytes} bytes at {offset}: {found:?}, whole it was {whole:?}").into());
        }
    }
    Config::read_from_bytes(&whole).map_err(|error| format!("{error}").into())
}

/// Has the target make an inflight region, and gives it back to it.
fn share_inflight(master: &mut Frontend, queues: usize, entries: u16) -> Outcome<File> {
    let asked = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: queues as u16, queue_size: entries };
    let (made, file) = master.get_inflight_fd(&asked)?;
    master.set_inflight_fd(&made, file.as_raw_fd())?;
    Ok(file)
}

/// Announces the memory in regions of so many bytes: one by one where the target can, else in a table.
fn show_memory(master: &mut Frontend, memory: &Arc<Mapping>, region: u64, offered: VhostUserProtocolFeatures) -> Outcome<()> {
    let fd = memory.fd().ok_or("no memfd")?.as_raw_fd();
    let rows: Vec<_> = (0..memory.len() as u64)
        .step_by(region as usize)
        .map(|at| VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST + at,
            memory_size: region,
            userspace_addr: USER + at,
            mmap_offset: at,
            mmap_handle: fd,
        })
        .collect();
    if rows.len() > 1 && offered.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        let slots = master.get_max_mem_slots()?;
        if slots < rows.len() as u64 {
            return Err(format!("{slots} memory slots: {} are needed", rows.len()).into());
        }
        for row in &rows {
            master.add_mem_region(row)?;
        }
    } else {
        master.set_mem_table(&rows)?;
    }
    Ok(())
}

/// Ranges of a discard or write-zeroes request, each in its own part of the lane.
fn segments(random: &mut Random, lane: u64, block: u64, most: u32, flags: SegmentFlags) -> Vec<u8> {
    let count = 1 + random.below(u64::from(most.min(4)));
    let part = AREA / LANES / 4;
    (0..count)
        .flat_map(|number| {
            let sectors = block * (1 + random.below(part / 2 / block));
            let sector = lane + number * part + block * random.below((part - sectors) / block);
            Segment::new(sector, sectors as u32, flags).as_bytes().to_vec()
        })
        .collect()
}

struct Ring {
    index: usize,
    driver: Driver,
    kick: EventFd,
    call: EventFd,
    /// By head.
    asked: BTreeMap<u16, Job>,
    /// Waits for an interrupt the next time, instead of looking.
    sleepy: bool,
}

impl Ring {
    fn new(index: usize, driver: Driver) -> Outcome<Self> {
        Ok(Self { index, driver, kick: EventFd::new(0)?, call: EventFd::new(EFD_NONBLOCK)?, asked: BTreeMap::new(), sleepy: false })
    }

    fn start(&self, master: &mut Frontend) -> Outcome<()> {
        let (at, entries) = (self.driver.addresses(), self.driver.size());
        master.set_vring_num(self.index, entries)?;
        let (desc_table_addr, used_ring_addr, avail_ring_addr) = (at.desc, at.used, at.avail);
        let config = VringConfigData {
            queue_max_size: entries,
            queue_size: entries,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        master.set_vring_addr(self.index, &config)?;
        // This front end sends 16 bits, of a packed ring the lower half.
        master.set_vring_base(self.index, self.driver.base() as u16)?;
        master.set_vring_call(self.index, &self.call)?;
        master.set_vring_kick(self.index, &self.kick)?;
        Ok(master.set_vring_enable(self.index, true)?)
    }

    /// As many as there is room for.
    fn submit(&mut self, todo: &mut VecDeque<Job>) -> Outcome<()> {
        while let Some(job) = todo.front() {
            let mut ask = job.ask();
            if self.driver.size() < 10 {
                ask.direct = Some(0);
            }
            if let (false, Some(slot)) = (job.out.is_empty(), self.driver.next_slot()) {
                self.driver.write(slot, &job.out);
            }
            let Some((head, _)) = self.driver.add(&ask) else { break };
            self.asked.extend(todo.pop_front().map(|job| (head, job)));
        }
        if self.driver.publish() {
            self.kick.write(1)?;
        }
        Ok(())
    }

    /// Waits for answers if there are to be some, and takes those that are there.
    fn collect(&mut self, disk: &mut Disk, plain: bool) -> Outcome<()> {
        if self.asked.is_empty() {
            return Ok(());
        }
        self.sleepy = !self.sleepy;
        let (begun, waits) = (Instant::now(), self.driver.want_interrupts(self.sleepy) && self.sleepy);
        // An interrupt may be an old one: what counts is that there is one when there are answers.
        while (waits && self.call.read().is_err()) || !self.driver.answered() {
            if begun.elapsed() > PATIENCE {
                let lacks = if !self.driver.answered() { "answer" } else { "interrupt" };
                return Err(format!("ring {}: no {lacks} within {PATIENCE:?}", self.index).into());
            }
            std::thread::yield_now();
        }
        while let Some(done) = self.driver.reap() {
            let job = self.asked.remove(&done.head).ok_or("an answer to nothing")?;
            let read = self.driver.read(done.slot, job.read_bytes);
            disk.answered(&job, done, &read, plain).map_err(|error| {
                let (kind, bytes) = (job.kind.0, job.read_bytes.max(job.out.len() as u32));
                format!("ring {} of {}: type {kind}, sector {}, {bytes} bytes: {error}", self.index, self.driver.size(), job.sector)
            })?;
        }
        Ok(())
    }
}
