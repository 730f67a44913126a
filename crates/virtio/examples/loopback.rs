//! What the initiator alone can do: the load generator on core 0, and on core 1 a target that does nothing but answer.
//!
//! `cargo run --release -p qpair-virtio --example loopback -- [depth] [queue size] [milliseconds]` prints one line of JSON. The
//! target reads each chain's descriptors, writes the status byte and the used entry, in batches, and never checks
//! anything: it is faster than any real one, so that the figure is the initiator's.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use qpair_bdev::Registry;
use qpair_memory::{Mapping, Region, Shared, SharedIndex};
use qpair_perf::{Spec, run};
use qpair_reactor::driver::Choice;
use qpair_reactor::event::Event;
use qpair_reactor::{Config, Poller, Reactor, ReactorId, thread};
use qpair_virtio::{QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::{DescFlags, Features, RingSize};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let depth: u32 = arguments.next().map_or(Ok(128), |text| text.parse())?;
    let size: u32 = arguments.next().map_or(Ok(512), |text| text.parse())?;
    let duration_ms: u64 = arguments.next().map_or(Ok(1000), |text| text.parse())?;

    // The target sends no interrupts, so neither side may fall asleep.
    let polling = Config { busy_poll: true, ..Config::default() };
    let client = thread::spawn(ReactorId(0), polling, Choice::Auto, true)?;
    let server = thread::spawn(ReactorId(1), polling, Choice::Auto, true)?;
    let layout = VirtioLayout::new(1, size, 65536)?;
    let (mapping, addresses) = (layout.mapping().clone(), layout.queue_addresses(0).ok_or("no queue 0")?);
    let base = mapping.address() as u64;
    let stop = Arc::new(AtomicBool::new(false));
    let halt = stop.clone();
    let places = [addresses.desc - base, addresses.avail - base, addresses.used - base];
    server.handle().call(move |reactor| {
        if let Some(target) = RingSize::new(size).and_then(|size| Target::new(mapping, size, places, halt).ok()) {
            reactor.add_poller("target", Box::new(target));
        }
    });

    let queue = QueueSetup { size: size as u16, kick: Event::new()?, call: Event::new()? };
    let mut config = vec![0u8; 60];
    config[..8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    let features = (Features::VERSION_1 | Features::INDIRECT_DESC).bits();
    let registry = Registry::new(vec![client.handle().clone()]);
    registry.register(Arc::new(VirtioBlk::new("loop", layout, features, &config, vec![queue])?))?;
    let report = run(&registry, Spec { depth, duration_ms, ..Spec::new("loop") })?;
    stop.store(true, Ordering::Relaxed);
    println!(
        r#"{{"depth":{depth},"queue_size":{size},"iops":{:.0},"mean_ns":{:.1},"p50_ns":{},"p99_ns":{},"errors":{}}}"#,
        report.iops(),
        report.mean_ns,
        report.percentile_ns(50.0),
        report.percentile_ns(99.0),
        report.errors
    );
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
    stop: Arc<AtomicBool>,
}

impl Target {
    fn new(mapping: Arc<Mapping>, size: RingSize, [desc, avail, used]: [u64; 3], stop: Arc<AtomicBool>) -> Result<Self, Box<dyn Error>> {
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
            stop,
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
    fn poll(&mut self, reactor: &mut Reactor) -> usize {
        if self.stop.load(Ordering::Relaxed) {
            reactor.handle().stop();
        }
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
