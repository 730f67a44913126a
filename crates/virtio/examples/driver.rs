//! The initiator and a target that only answers on one reactor, for counting instructions: a fixed number of reads, nothing that depends on time.
//!
//! `valgrind --tool=callgrind target/release/examples/driver DEPTH BATCHES`: the difference of two runs, by the reads between them.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use qpair_bdev::{IoFlags, Layer, Op, Registry};
use qpair_memory::{Mapping, Region, Sge, Shared, SharedIndex};
use qpair_reactor::driver::{self, Choice};
use qpair_reactor::event::Event;
use qpair_reactor::{Clock, Config, Poller, Reactor, ReactorId};
use qpair_virtio::{QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::{DescFlags, Features, RingSize};

const SIZE: u32 = 512;

struct Idle;
impl Poller for Idle {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let depth: u32 = arguments.next().map_or(Ok(128), |text| text.parse())?;
    let batches: u64 = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let polling = Config { busy_poll: true, ..Config::default() };
    let mut reactor = Reactor::new(ReactorId(0), polling, Clock::Monotonic, driver::open(Choice::Epoll)?);
    let layout = VirtioLayout::new(1, SIZE, 65536)?;
    let (mapping, addresses) = (layout.mapping().clone(), layout.queue_addresses(0).ok_or("no queue 0")?);
    let base = mapping.address() as u64;
    let size = RingSize::new(SIZE).ok_or("no such size")?;
    let target = Target::new(mapping, size, [addresses.desc - base, addresses.avail - base, addresses.used - base])?;
    reactor.add_poller("target", Box::new(target));
    let queue = QueueSetup { size: SIZE as u16, kick: Event::new()?, call: Event::new()? };
    let mut config = vec![0u8; 60];
    config[..8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    let features = (Features::VERSION_1 | Features::INDIRECT_DESC).bits();
    let registry = Registry::new(vec![reactor.handle()]);
    registry.register(Arc::new(VirtioBlk::new("driver", layout, features, &config, vec![queue])?))?;
    let descriptor = registry.open("driver", true, |_| {})?;
    let layer = Layer::of(&mut reactor);
    let poller = reactor.add_poller("load", Box::new(Idle));
    let waker = reactor.waker(poller).ok_or("no poller")?;
    let channel = descriptor.channel(&mut reactor, &mut layer.borrow_mut())?;
    let queue = layer.borrow_mut().add_queue(waker);
    let buffer = descriptor.buffer(u64::from(depth) * 4096)?;
    let region = Region::new(buffer.mapping().clone());
    let (mut done, mut out) = (0, Vec::new());
    for _ in 0..batches {
        let mut ids = Vec::with_capacity(depth as usize);
        for number in 0..depth {
            let mut layer = layer.borrow_mut();
            let id = layer.take().ok_or("no I/O is free")?;
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks, io.flags) = (Op::Read, u64::from(number) * 8, 8, IoFlags::empty());
            io.list.push(Sge { region: region.clone(), offset: buffer.offset() + u64::from(number) * 4096, length: 4096 });
            io.push(queue, 0);
            ids.push(id);
        }
        layer.borrow_mut().submit(&mut reactor, channel, &ids);
        layer.borrow_mut().unplug(&mut reactor);
        let mut waiting = depth;
        while waiting > 0 {
            reactor.turn();
            layer.borrow_mut().reap(&mut reactor, queue, &mut out);
            for id in out.drain(..) {
                layer.borrow_mut().retrieve(id);
                layer.borrow_mut().give_back(id);
                (waiting, done) = (waiting - 1, done + 1);
            }
        }
    }
    println!("{done} reads");
    Ok(())
}

struct Target {
    size: RingSize,
    table: Shared<[u64; 2]>,
    bytes: Region,
    avail_idx: SharedIndex,
    avail: Shared<u16>,
    used_idx: SharedIndex,
    used: Shared<[u32; 2]>,
    at: u16,
}

impl Target {
    fn new(mapping: Arc<Mapping>, size: RingSize, [desc, avail, used]: [u64; 3]) -> Result<Self, Box<dyn Error>> {
        let (bytes, count) = (Region::new(mapping), usize::from(size.get()));
        let flags = SharedIndex::new(&bytes, used)?;
        flags.store(1, Ordering::Relaxed);
        Ok(Self {
            size,
            table: Shared::new(&bytes, desc, count)?,
            avail_idx: SharedIndex::new(&bytes, avail + 2)?,
            avail: Shared::new(&bytes, avail + size.avail_entry_offset(0), count)?,
            used_idx: SharedIndex::new(&bytes, used + 2)?,
            used: Shared::new(&bytes, used + size.used_entry_offset(0), count)?,
            at: 0,
            bytes,
        })
    }

    fn descriptor(&self, table: Option<u64>, index: u16) -> Option<(u64, u32, DescFlags, u16)> {
        let [address, rest] = match table {
            None => self.table.load(usize::from(index)),
            Some(at) => Shared::<[u64; 2]>::new(&self.bytes, at + 16 * u64::from(index), 1).ok()?.load(0),
        };
        Some((address, rest as u32, DescFlags::from_bits_retain((rest >> 32) as u16), (rest >> 48) as u16))
    }

    /// Walks a chain to its status byte; how much a good device would have written.
    fn answer(&self, head: u16) -> Option<u32> {
        let (mut table, mut index, mut written) = (None, head, 0);
        loop {
            let (address, length, flags, next) = self.descriptor(table, index)?;
            if flags.contains(DescFlags::INDIRECT) {
                (table, index) = (Some(address), 0);
                continue;
            }
            written += if flags.contains(DescFlags::WRITE) { length } else { 0 };
            if !flags.contains(DescFlags::NEXT) {
                self.bytes.write(address, &[0]).ok()?;
                return Some(written);
            }
            index = next;
        }
    }
}

impl Poller for Target {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        let end = self.avail_idx.load(Ordering::Acquire);
        let mut count = 0;
        while self.at != end {
            let slot = usize::from(self.size.slot(self.at));
            let head = self.avail.load(slot);
            let Some(written) = self.answer(head) else { return count };
            self.used.store(slot, [u32::from(head), written]);
            self.at = self.at.wrapping_add(1);
            count += 1;
        }
        if count > 0 {
            self.used_idx.store(self.at, Ordering::Release);
        }
        count
    }
}
