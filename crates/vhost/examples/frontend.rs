//! rust-vmm's vhost-user front end as an independent master of any vhost-user-blk target.
//!
//! `cargo run -p qpair-vhost --example frontend SOCKET` sets two rings up, writes and reads back through both, stops and restarts one, and
//! says `ok REQUESTS BYTES` or what is wrong. The disk is overwritten. The rings are driven by the guest of our tests.

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::error::Error;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use guest::{Ask, Driver, GUEST, USER};
use qpair_memory::Mapping;
use qpair_wire::virtio::RingSize;
use qpair_wire::virtio_blk::RequestType;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

const QUEUES: usize = 2;
const SLOTS: usize = 16;
const ENTRIES: u16 = 64;
const PATIENCE: Duration = Duration::from_secs(10);
const EVENT_IDX: u64 = 1 << 29;
const WANTED: u64 = 1 << 32 | EVENT_IDX | 1 << 28 | 1 << 30;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let socket = std::env::args().nth(1).ok_or("usage: frontend SOCKET")?;
    let mut master = Frontend::connect(&socket, QUEUES as u64)?;
    master.set_owner()?;
    let features = master.get_features()? & WANTED;
    master.set_features(features)?;
    let offered = master.get_protocol_features()?;
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
    master.set_protocol_features(offered & wanted)?;
    let queues = (master.get_queue_num()? as usize).min(QUEUES);
    let (_, config) = master.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60])?;
    let sectors = u64::from_le_bytes(config[..8].try_into()?);

    let size = RingSize::new(ENTRIES.into()).ok_or("ring size")?;
    let each = Driver::bytes(size, SLOTS).next_multiple_of(4096);
    let bytes = each * queues as u64;
    let memory = Mapping::memfd("frontend", bytes as usize)?;
    let fd = memory.fd().ok_or("no memfd")?.as_raw_fd();
    master.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST,
        memory_size: bytes,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: fd,
    }])?;
    let mut rings = Vec::new();
    for index in 0..queues {
        let driver = Driver::new(&memory, index as u64 * each, size, SLOTS, features & EVENT_IDX != 0, 0);
        let ring = Ring { index, driver, kick: EventFd::new(0)?, call: EventFd::new(0)? };
        ring.start(&mut master, 0)?;
        rings.push(ring);
    }
    let mut requests = 0;
    for round in 0..32 {
        for ring in &mut rings {
            requests += ring.round(round, sectors / queues as u64)?;
        }
        if round == 16 {
            let base = master.get_vring_base(0)?;
            if base != u32::from(rings[0].driver.avail_idx) {
                return Err(format!("GET_VRING_BASE says {base}, all {} were answered", rings[0].driver.avail_idx).into());
            }
            rings[0].start(&mut master, base as u16)?;
        }
    }
    for ring in &rings {
        master.get_vring_base(ring.index)?;
    }
    println!("ok {requests} {}", requests * 4096);
    Ok(())
}

struct Ring {
    index: usize,
    driver: Driver,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    fn start(&self, master: &mut Frontend, base: u16) -> Outcome<()> {
        let at = self.driver.addresses();
        master.set_vring_num(self.index, ENTRIES)?;
        let (desc_table_addr, used_ring_addr, avail_ring_addr) = (at.desc, at.used, at.avail);
        let config = VringConfigData {
            queue_max_size: ENTRIES,
            queue_size: ENTRIES,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        master.set_vring_addr(self.index, &config)?;
        master.set_vring_base(self.index, base)?;
        master.set_vring_call(self.index, &self.call)?;
        master.set_vring_kick(self.index, &self.kick)?;
        Ok(master.set_vring_enable(self.index, true)?)
    }

    /// Writes blocks and reads them back.
    fn round(&mut self, round: u64, sectors: u64) -> Outcome<u64> {
        let first = self.index as u64 * (sectors / 8 * 8);
        for kind in [RequestType::OUT, RequestType::IN] {
            for number in 0..8 {
                let slot = self.driver.next_slot().ok_or("no slot")?;
                self.driver.fill(slot, 4096, if kind == RequestType::OUT { value(round, number) } else { 0 });
                let ask = Ask::new(kind, first + (round * 8 + number) * 8 % (sectors / 8 * 8 - 64), 4096);
                self.driver.add(&if number % 2 == 0 { ask } else { ask.indirect() }).ok_or("no room")?;
            }
            self.driver.want_interrupts(true);
            if self.driver.publish() {
                self.kick.write(1)?;
            }
            let mut seen = self.collect()?;
            seen.sort_unstable();
            let mut expected: Vec<u8> = (0..8).map(|number| value(round, number)).collect();
            expected.sort_unstable();
            if kind == RequestType::IN && seen != expected {
                return Err(format!("ring {} round {round}: wrote {expected:?}, read {seen:?}", self.index).into());
            }
        }
        Ok(16)
    }

    fn collect(&mut self) -> Outcome<Vec<u8>> {
        let begun = Instant::now();
        let mut seen = Vec::new();
        while seen.len() < 8 {
            match self.driver.reap() {
                Some(done) if done.status == 0 => seen.push(self.driver.read(done.slot, 4096)[4095]),
                Some(done) => return Err(format!("ring {}: status {}", self.index, done.status).into()),
                None if begun.elapsed() > PATIENCE => return Err(format!("ring {}: no answer", self.index).into()),
                None => std::thread::yield_now(),
            }
        }
        Ok(seen)
    }
}

fn value(round: u64, number: u64) -> u8 {
    (round * 8 + number + 1) as u8
}
