//! The driver's packed ring against a device in plain steps, honest and lying (Virtio 1.2, 2.8).

mod support;

use std::sync::atomic::Ordering;

use qpair_bdev::{IoFlags, IoId, Op, Status};
use qpair_memory::{Region, Shared};
use qpair_wire::virtio::Features;
use support::{Driver, features};

const NONE: IoFlags = IoFlags::empty();
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

fn packed() -> u64 {
    features() | Features::RING_PACKED.bits()
}

/// With and without tables, with and without event index.
fn ways() -> [u64; 4] {
    let (table, event) = (Features::INDIRECT_DESC.bits(), Features::RING_EVENT_IDX.bits());
    [packed(), packed() & !table, packed() & !event, packed() & !table & !event]
}

#[derive(Clone, Debug)]
struct Request {
    id: u16,
    count: u16,
    kind: u32,
    sector: u64,
    /// Address, length, whether the device writes it.
    data: Vec<(u64, u32, bool)>,
    status: u64,
}

/// The device's side: an index and a wrap counter for what it takes, and the same for what it uses.
struct Device {
    region: Region,
    desc: u64,
    flags: Shared<u16>,
    driver: Shared<u16>,
    wish: Shared<u16>,
    size: u16,
    next: (u16, bool),
    used: (u16, bool),
}

fn step(size: u16, at: &mut (u16, bool)) {
    at.0 += 1;
    if at.0 == size {
        *at = (0, !at.1);
    }
}

impl Device {
    fn new(driver: &Driver) -> Self {
        let region = Region::new(driver.layout.mapping().clone());
        let (base, at) = (driver.layout.mapping().address() as u64, driver.layout.queue_addresses(0).unwrap());
        let size = driver.layout.queue_size();
        Self {
            desc: at.desc - base,
            flags: Shared::new(&region, at.desc - base, 8 * usize::from(size)).unwrap(),
            driver: Shared::new(&region, at.avail - base, 2).unwrap(),
            wish: Shared::new(&region, at.used - base, 2).unwrap(),
            region,
            size,
            next: (0, true),
            used: (0, true),
        }
    }

    fn flags(&self, index: u16) -> u16 {
        self.flags.load_atomic(8 * usize::from(index) + 7, Ordering::Acquire)
    }

    fn row(&self, at: u64) -> (u64, u32, u16, u16) {
        let mut bytes = [0; 16];
        self.region.read(at, &mut bytes).unwrap();
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        (u64::from_le_bytes(bytes[..8].try_into().unwrap()), length, half(12), half(14))
    }

    /// Descriptors as the driver wrote them: each available by its wrap bits.
    fn take(&mut self) -> Option<Request> {
        let mut rows = Vec::new();
        let mut count = 0;
        let id = loop {
            let flags = self.flags(self.next.0);
            let available = (flags & AVAIL != 0) == self.next.1 && (flags & USED != 0) != self.next.1;
            if !available {
                assert_eq!(count, 0, "a chain is shown whole");
                return None;
            }
            let (address, length, name, flags) = self.row(self.desc + 16 * u64::from(self.next.0));
            count += 1;
            step(self.size, &mut self.next);
            if flags & INDIRECT != 0 {
                assert_eq!((flags & NEXT, count, length % 16), (0, 1, 0));
                rows.extend((0..u64::from(length) / 16).map(|row| self.row(address + 16 * row)));
            } else {
                rows.push((address, length, name, flags));
            }
            if flags & NEXT == 0 {
                break name;
            }
        };
        let mut header = [0; 16];
        assert_eq!((rows[0].1, rows[0].3 & WRITE), (16, 0));
        self.region.read(rows[0].0, &mut header).unwrap();
        let last = rows[rows.len() - 1];
        assert_eq!((last.1, last.3 & WRITE), (1, WRITE));
        let data = rows[1..rows.len() - 1].iter().map(|row| (row.0, row.1, row.3 & WRITE != 0)).collect();
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        Some(Request { id, count, kind, sector, data, status: last.0 })
    }

    fn take_all(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.take()).collect()
    }

    fn answer(&mut self, request: &Request, status: u8) {
        self.region.write(request.status, &[status]).unwrap();
        let written = 1 + request.data.iter().filter(|piece| piece.2).map(|piece| piece.1).sum::<u32>();
        self.use_up(request.id, written, request.count);
    }

    /// Writes any used descriptor and passes `count` by.
    fn use_up(&mut self, id: u16, written: u32, count: u16) {
        let at = self.desc + 16 * u64::from(self.used.0);
        self.region.write(at + 8, &written.to_le_bytes()).unwrap();
        self.region.write(at + 12, &id.to_le_bytes()).unwrap();
        let flags = WRITE | if self.used.1 { AVAIL | USED } else { 0 };
        self.flags.store_atomic(8 * usize::from(self.used.0) + 7, flags, Ordering::Release);
        (0..count).for_each(|_| step(self.size, &mut self.used));
    }

    /// 0: kick always, 1: never, 2: when what is next to take has come.
    fn want_kicks(&self, how: u16) {
        self.wish.store_atomic(0, self.next.0 | if self.next.1 { 0x8000 } else { 0 }, Ordering::Relaxed);
        self.wish.store_atomic(1, how, Ordering::Release);
    }

    /// What the driver wants.
    fn driver_wish(&self) -> u16 {
        self.driver.load_atomic(1, Ordering::Acquire) & 3
    }
}

#[test]
fn requests_arrive_and_their_answers_come_back_in_any_order_for_many_laps() {
    for features in ways() {
        let mut driver = Driver::new(16, features);
        let mut device = Device::new(&driver);
        let depth = if features & Features::INDIRECT_DESC.bits() != 0 { 16 } else { 4 };
        for round in 0..200u64 {
            let batch: Vec<_> =
                (0..depth).map(|n| (if n % 3 == 0 { Op::Write } else { Op::Read }, round + n * 8, 1 + n % 3, NONE)).collect();
            let ids = driver.submit(&batch);
            let mut requests = device.take_all();
            assert_eq!(requests.len() as u64, depth, "round {round}");
            for (n, request) in requests.iter().enumerate() {
                let bytes: u32 = request.data.iter().map(|piece| piece.1).sum();
                let kind = if n % 3 == 0 { 1 } else { 0 };
                assert_eq!((request.kind, request.sector, bytes), (kind, round + n as u64 * 8, 512 * (1 + n as u32 % 3)));
            }
            let turn = round as usize % requests.len();
            requests.rotate_left(turn);
            requests.swap(0, 1);
            requests.iter().enumerate().for_each(|(n, request)| device.answer(request, (n % 3) as u8));
            let mut back = Vec::new();
            while back.len() < ids.len() {
                back.extend(driver.reap());
            }
            back.sort_by_key(|(id, _)| *id);
            let mut unique: Vec<IoId> = back.iter().map(|(id, _)| *id).collect();
            unique.dedup();
            assert_eq!(unique.len(), ids.len());
            let good = back.iter().filter(|(_, status)| *status == Status::SUCCESS).count();
            assert_eq!(good, requests.len().div_ceil(3), "each its own status");
            if round % 50 == 49 {
                driver.reopen();
            }
        }
    }
}

#[test]
fn kicks_go_to_who_wants_them() {
    for (features, how, kicks) in
        [(ways()[0], 1, 0), (ways()[0], 0, 1), (ways()[0], 2, 1), (ways()[2], 1, 0), (ways()[2], 0, 1), (ways()[1], 2, 1)]
    {
        let mut driver = Driver::new(16, features);
        let mut device = Device::new(&driver);
        for round in 0..40 {
            device.want_kicks(how);
            driver.submit(&[(Op::Read, 0, 1, NONE), (Op::Read, 1, 1, NONE)]);
            assert_eq!(driver.kick.take(), kicks, "round {round} of {features:#x}, wish {how}");
            let again = driver.read(2);
            assert_eq!(driver.kick.take(), u64::from(how == 0), "what was waited for has come already");
            let requests = device.take_all();
            requests.iter().for_each(|request| device.answer(request, 0));
            let back = driver.reap();
            assert!(back.len() == 3 && back.contains(&(again, Status::SUCCESS)));
        }
    }
}

#[test]
fn an_armed_driver_asks_for_an_interrupt_and_wakes_by_it() {
    for (features, wish) in [(ways()[0], 2), (ways()[2], 0)] {
        let mut driver = Driver::with_spin(64, features, 0);
        let mut device = Device::new(&driver);
        let id = driver.read(0);
        assert_eq!(driver.reap(), [], "turns without work arm the poller (spin time 0)");
        assert_eq!(device.driver_wish(), wish);
        let request = device.take().unwrap();
        device.answer(&request, 0);
        driver.call.notify();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(driver.reap(), [(id, Status::SUCCESS)]);
    }
}

/// After `lie` everything in flight ends once with an error, and so does all that comes later.
fn fails(features: u64, lie: impl Fn(&mut Device, &[Request])) {
    let mut driver = Driver::new(16, features);
    let mut device = Device::new(&driver);
    let ids = driver.submit(&[(Op::Read, 0, 8, NONE), (Op::Read, 8, 8, NONE)]);
    let requests = device.take_all();
    lie(&mut device, &requests);
    let mut back: Vec<_> = (0..3).flat_map(|_| driver.reap()).collect();
    back.sort_by_key(|(id, _)| *id);
    assert_eq!(back, [(ids[0], Status::INTERNAL_DEVICE_ERROR), (ids[1], Status::INTERNAL_DEVICE_ERROR)]);
    let later = driver.read(16);
    assert_eq!(driver.reap(), [(later, Status::INTERNAL_DEVICE_ERROR)]);
    assert!(device.take().is_none(), "nothing more goes to it");
}

#[test]
fn ids_and_lengths_that_cannot_be_fail_the_device() {
    for features in [ways()[0], ways()[1]] {
        fails(features, |device, _| device.use_up(16, 1, 1));
        fails(features, |device, _| device.use_up(u16::MAX, 1, 1));
        fails(features, |device, _| device.use_up(3, 1, 1));
        fails(features, |device, requests| device.use_up(requests[0].id, 4098, 1));
        fails(features, |device, requests| device.use_up(requests[0].id, u32::MAX, 1));
    }
}

#[test]
fn a_request_used_twice_ends_once() {
    let mut driver = Driver::new(16, packed());
    let mut device = Device::new(&driver);
    let ids = driver.submit(&[(Op::Read, 0, 8, NONE), (Op::Read, 8, 8, NONE)]);
    let requests = device.take_all();
    device.answer(&requests[0], 0);
    device.answer(&requests[0], 0);
    let mut back = driver.reap();
    back.sort_by_key(|(id, _)| *id);
    assert_eq!(back, [(ids[0], Status::SUCCESS), (ids[1], Status::INTERNAL_DEVICE_ERROR)]);
}

#[test]
fn an_answer_when_nothing_was_asked_fails_the_device() {
    let mut driver = Driver::new(16, packed());
    let mut device = Device::new(&driver);
    device.use_up(0, 1, 1);
    driver.reap();
    let later = driver.read(16);
    assert_eq!(driver.reap(), [(later, Status::INTERNAL_DEVICE_ERROR)]);
}
