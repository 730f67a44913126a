//! A reactor stepped by the test, our device on it, and rust-vmm's `virtio-queue` as the target's side of the ring.

// Each test binary uses its part.
#![allow(dead_code)]

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use qpair_bdev::{BdevError, ChannelId, Descriptor, DeviceId, IoFlags, IoId, Layer, Op, QueueId, Registry, Status};
use qpair_memory::{Mapping, Pages, Region, Sge};
use qpair_reactor::driver::{self, Choice};
use qpair_reactor::event::Event;
use qpair_reactor::{Clock, Config as ReactorConfig, Poller, Reactor, ReactorId};
use qpair_virtio::{Link, QueueSetup, VirtioBlk, VirtioLayout};
use qpair_wire::virtio::Features;
use qpair_wire::virtio_blk::{BlkFeatures, Config};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromZeros, IntoBytes};

pub const BLOCKS: u64 = 2048;
pub const MAX_IO: u32 = 65536;

/// What the tests agree on with the target unless they say otherwise.
pub fn features() -> u64 {
    let ring = Features::VERSION_1 | Features::INDIRECT_DESC | Features::RING_EVENT_IDX;
    ring.bits() | (BlkFeatures::FLUSH | BlkFeatures::DISCARD | BlkFeatures::WRITE_ZEROES | BlkFeatures::SEG_MAX).bits()
}

pub fn config() -> Config {
    let mut config = Config::new_zeroed();
    config.capacity.set(BLOCKS);
    config.seg_max.set(2);
    config.blk_size.set(512);
    config.max_discard_sectors.set(256);
    config.max_write_zeroes_sectors.set(256);
    config
}

struct Idle;
impl Poller for Idle {
    fn poll(&mut self, _: &mut Reactor) -> usize {
        0
    }
}

pub struct Driver {
    pub reactor: Reactor,
    pub layer: Rc<RefCell<Layer>>,
    pub registry: Arc<Registry>,
    pub layout: Arc<VirtioLayout>,
    pub descriptor: Descriptor,
    pub channel: ChannelId,
    pub queue: QueueId,
    pub kick: Event,
    pub call: Event,
    pub plain: Region,
    pub target: Target,
    pub features: u64,
    pub device: DeviceId,
    /// Of one that waits for another target.
    pub link: Option<Link>,
}

impl Driver {
    /// That never falls asleep.
    pub fn new(size: u32, features: u64) -> Self {
        Self::with_spin(size, features, u64::MAX)
    }

    pub fn with_spin(size: u32, features: u64, spin_ns: u64) -> Self {
        Self::with_link(size, features, spin_ns, false)
    }

    /// That waits for another target when this one breaks the rules.
    pub fn recovering(size: u32, features: u64) -> Self {
        Self::with_link(size, features, u64::MAX, true)
    }

    fn with_link(size: u32, features: u64, spin_ns: u64, recovers: bool) -> Self {
        let reactor_config = ReactorConfig { spin_ns, busy_poll: false };
        let mut reactor = Reactor::new(ReactorId(0), reactor_config, Clock::Monotonic, driver::open(Choice::Epoll).unwrap());
        let registry = Registry::new(vec![reactor.handle()]);
        let layout = VirtioLayout::new(1, size, MAX_IO).unwrap();
        let (kick, call) = (Event::new().unwrap(), Event::new().unwrap());
        let setup = QueueSetup { size: size as u16, kick: kick.twin().unwrap(), call: call.twin().unwrap() };
        let device = VirtioBlk::new("v0", layout.clone(), features, config().as_bytes(), vec![setup]).unwrap();
        let link = recovers.then(|| device.link());
        let device = registry.register(Arc::new(device)).unwrap();
        let descriptor = registry.open("v0", true, |_| {}).unwrap();
        let layer = Layer::of(&mut reactor);
        let poller = reactor.add_poller("test", Box::new(Idle));
        let waker = reactor.waker(poller).unwrap();
        let channel = descriptor.channel(&mut reactor, &mut layer.borrow_mut()).unwrap();
        let queue = layer.borrow_mut().add_queue(waker);
        let target = Target::new(&layout, size as u16, features);
        let plain = Region::new(Mapping::anonymous(1 << 20, Pages::Normal).unwrap());
        assert_eq!(kick.take(), 1, "the first kick starts the ring");
        Self { reactor, layer, registry, layout, descriptor, channel, queue, kick, call, plain, target, features, device, link }
    }

    /// The target is gone, and that is known.
    pub fn leave(&mut self) {
        let link = self.link.as_ref().unwrap();
        link.leave(&self.registry, self.device, Box::new(|outcome| outcome.unwrap()));
        self.reactor.turn();
        self.reactor.turn();
    }

    /// Another is there; what became of it.
    pub fn rejoin(&mut self, config: &Config) -> String {
        let link = self.link.as_ref().unwrap();
        link.wipe().unwrap();
        self.target = Target::new(&self.layout, self.layout.queue_size(), self.features);
        let told = Arc::new(Mutex::new(String::new()));
        let heard = told.clone();
        let reply =
            move |outcome: Result<(), BdevError>| *heard.lock().unwrap() = format!("{:?}", outcome.map_err(|error| error.to_string()));
        link.rejoin(&self.registry, self.device, self.features, config.as_bytes(), Box::new(reply));
        self.reactor.turn();
        self.reactor.turn();
        told.lock().unwrap().clone()
    }

    /// Submits one batch; (op, lba, blocks, flags), data from byte 0 of `plain` on for the first, then one after the other.
    pub fn submit(&mut self, batch: &[(Op, u64, u64, IoFlags)]) -> Vec<IoId> {
        let mut layer = self.layer.borrow_mut();
        let mut offset = 0;
        let mut ids = Vec::new();
        for (op, lba, blocks, flags) in batch {
            let id = layer.take().unwrap();
            let io = layer.io_mut(id);
            (io.op, io.lba, io.blocks, io.flags) = (*op, *lba, *blocks, *flags);
            if matches!(op, Op::Read | Op::Write) {
                let length = (*blocks * 512) as u32;
                io.list.push(Sge { region: self.plain.clone(), offset, length });
                offset += u64::from(length);
            }
            io.push(self.queue, 0);
            ids.push(id);
        }
        layer.submit(&mut self.reactor, self.channel, &ids);
        layer.unplug(&mut self.reactor);
        ids
    }

    /// Closes the channel and opens another.
    pub fn reopen(&mut self) {
        let mut layer = self.layer.borrow_mut();
        layer.close_channel(&mut self.reactor, self.channel);
        self.channel = self.descriptor.channel(&mut self.reactor, &mut layer).unwrap();
    }

    pub fn read(&mut self, lba: u64) -> IoId {
        self.submit(&[(Op::Read, lba, 8, IoFlags::empty())])[0]
    }

    /// Turns a few times; what came back, given back.
    pub fn reap(&mut self) -> Vec<(IoId, Status)> {
        for _ in 0..4 {
            self.reactor.turn();
        }
        let mut out = Vec::new();
        let mut layer = self.layer.borrow_mut();
        layer.reap(&mut self.reactor, self.queue, &mut out);
        let status = |id: IoId, layer: &mut Layer| {
            layer.retrieve(id);
            let status = layer.io(id).status;
            layer.give_back(id);
            (id, status)
        };
        out.into_iter().map(|id| status(id, &mut layer)).collect()
    }
}

/// A request as rust-vmm's queue decodes it.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    pub kind: u32,
    pub sector: u64,
    /// (address, length, device writes)
    pub data: Vec<(u64, u32, bool)>,
    pub status: u64,
}

impl Request {
    pub fn bytes(&self) -> u32 {
        self.data.iter().map(|piece| piece.1).sum()
    }
}

pub struct Target {
    pub memory: GuestMemoryMmap,
    pub queue: Queue,
    used: u64,
    size: u16,
}

impl Target {
    fn new(layout: &VirtioLayout, size: u16, features: u64) -> Self {
        let fd = layout.mapping().fd().unwrap().try_clone_to_owned().unwrap();
        let length = layout.mapping().len();
        let range = (GuestAddress(0), length, Some(FileOffset::new(File::from(fd), 0)));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
        let addresses = layout.queue_addresses(0).unwrap();
        let base = layout.mapping().address() as u64;
        let mut queue = Queue::new(size).unwrap();
        queue.try_set_size(size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(addresses.desc - base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(addresses.avail - base)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(addresses.used - base)).unwrap();
        queue.set_event_idx(features & Features::RING_EVENT_IDX.bits() != 0);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory), "the oracle finds the rings valid");
        Self { memory, queue, used: addresses.used - base, size }
    }

    /// All requests that wait, in order.
    pub fn requests(&mut self) -> Vec<Request> {
        let memory = &self.memory;
        let decode = |chain: virtio_queue::DescriptorChain<&GuestMemoryMmap>| {
            let head = chain.head_index();
            let all: Vec<_> = chain.map(|desc| (desc.addr().0, desc.len(), desc.is_write_only())).collect();
            let (header, status) = (all[0], all[all.len() - 1]);
            assert_eq!((header.1, header.2), (16, false), "a header of 16 bytes that the device reads");
            assert_eq!((status.1, status.2), (1, true), "a status byte that the device writes");
            let kind: u32 = memory.read_obj(GuestAddress(header.0)).unwrap();
            let sector: u64 = memory.read_obj(GuestAddress(header.0 + 8)).unwrap();
            Request { head, kind, sector, data: all[1..all.len() - 1].to_vec(), status: status.0 }
        };
        self.queue.iter(memory).unwrap().map(decode).collect()
    }

    /// Answers as a good device does; whether the driver wants an interrupt.
    pub fn answer(&mut self, request: &Request, status: u8) -> bool {
        self.memory.write_obj(status, GuestAddress(request.status)).unwrap();
        let written = 1 + request.data.iter().filter(|piece| piece.2).map(|piece| piece.1).sum::<u32>();
        self.queue.add_used(&self.memory, request.head, written).unwrap();
        self.queue.needs_notification(&self.memory).unwrap()
    }

    /// Puts a used entry at free-running `at` and the used index behind it, whatever they say.
    pub fn lie(&mut self, at: u16, id: u32, length: u32, index: u16) {
        let entry = self.used + 4 + 8 * u64::from(at % self.size);
        self.memory.write_obj(id, GuestAddress(entry)).unwrap();
        self.memory.write_obj(length, GuestAddress(entry + 4)).unwrap();
        self.memory.write_obj(index, GuestAddress(self.used + 2)).unwrap();
    }

    /// Says how many entries there are.
    pub fn set_used_index(&mut self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.used + 2)).unwrap();
    }

    pub fn read(&self, address: u64, length: u32) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }
}
