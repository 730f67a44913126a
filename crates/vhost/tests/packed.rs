//! Packed rings over real memory: each broken rule has its name, each legal layout its meaning. The driver is the plain model of `guest/packed.rs`.

mod guest;

use std::sync::Arc;

use guest::packed::{At, PackedSide};
use guest::{Ask, Buffer, Driver, GUEST, INDIRECT, Kind, USER, WRITE};
use proptest::prelude::*;
use qpair_memory::{GuestMemory, GuestRegion, Mapping, Pages, Region, SgList};
use qpair_vhost::request::{self, Request, SEGMENTS_MAX};
use qpair_vhost::ring::{Chain, Ring, Taken};
use qpair_vhost::{Addresses, Broken, PackedRing, VhostError};
use qpair_wire::virtio_blk::RequestType;
use qpair_wire::virtio_packed::{PackedBase, PackedSize};

const BYTES: u64 = 1 << 20;
const START: u32 = 0x8000_8000;
const NEXT: u16 = 1;

fn table(mapping: &Arc<Mapping>) -> GuestMemory {
    let region = Region::new(mapping.clone());
    let row = GuestRegion { guest_address: GUEST, user_address: USER, length: mapping.len() as u64, offset: 0, region };
    GuestMemory::new(vec![row]).unwrap()
}

struct Bench {
    memory: GuestMemory,
    driver: Driver,
    ring: PackedRing,
}

impl Bench {
    fn new(size: u16, event_idx: bool, base: u32) -> Self {
        let mapping = Mapping::anonymous((Driver::bytes(size, 8) + BYTES) as usize, Pages::Normal).unwrap();
        let memory = table(&mapping);
        let driver = Driver::new(Kind::Packed, &mapping, 0, size, 8, event_idx, base);
        let entries = PackedSize::new(size.into()).unwrap();
        let ring = PackedRing::new(&memory, entries, driver.addresses(), PackedBase::from_bits(base), event_idx).unwrap();
        Self { memory, driver, ring }
    }

    fn side(&mut self) -> &mut PackedSide {
        self.driver.packed()
    }

    fn parse(&self) -> Result<(Request, SgList, Taken), Broken> {
        guest::parse(self.ring.chain(), &self.memory)
    }

    /// The next chain made of these buffers, under this id.
    fn chain(&mut self, buffers: &[Buffer], id: u16) -> Result<(Request, SgList, Taken), Broken> {
        self.side().put_raw(buffers, id);
        self.driver.publish();
        assert_eq!(self.ring.ready(), Ok(true));
        self.parse()
    }

    /// The same in an indirect table of `length` bytes.
    fn indirect(&mut self, buffers: &[Buffer], length: u32) -> Result<(Request, SgList, Taken), Broken> {
        let at = self.driver.data_at(0);
        let table = self.side().table(buffers);
        self.driver.region.write(at, &table).unwrap();
        self.chain(&[(GUEST + at, length, INDIRECT)], 0)
    }

    fn at(&self) -> u64 {
        GUEST + self.driver.data_at(1)
    }

    /// Takes what is next as a queue does.
    fn take(&mut self) -> Taken {
        assert_eq!(self.ring.ready(), Ok(true));
        let (_, _, taken) = self.parse().unwrap();
        self.ring.took(taken);
        taken
    }
}

fn bench() -> Bench {
    Bench::new(16, false, START)
}

fn bad_indirect(reason: &'static str) -> Broken {
    Broken::BadIndirect { head: 0, reason }
}

#[test]
fn a_chain_that_goes_on_where_nothing_is_available_is_refused() {
    for lie in [0, 0x8080, 0x8000] {
        let mut bench = bench();
        let at = bench.at();
        bench.side().put_raw(&[(at, 16, NEXT)], 0);
        bench.side().set_flags(1, lie);
        bench.driver.publish();
        assert_eq!(bench.parse().unwrap_err(), Broken::NotAvailable { head: 0, index: 1 }, "wrap bits {lie:#x}");
    }
}

#[test]
fn a_chain_around_the_ring_and_over_what_is_in_flight_is_refused() {
    let mut bench = bench();
    let at = bench.at();
    for index in 0..16 {
        bench.side().set_descriptor(index, at, 16, 0);
        bench.side().set_flags(index, NEXT | 0x80);
    }
    assert_eq!(bench.parse().unwrap_err(), Broken::TooLong { head: 0, limit: 16 });
    // With 14 in flight there is room for a chain of two.
    bench.ring.took(Taken { id: 0, count: 14 });
    for index in 0..14 {
        bench.side().set_flags(index, NEXT | 0x8000);
    }
    assert_eq!(bench.parse().unwrap_err(), Broken::TooLong { head: 14, limit: 2 });
}

#[test]
fn more_than_the_ring_has_is_refused() {
    let mut bench = Bench::new(5, false, START);
    bench.ring.took(Taken { id: 0, count: 5 });
    assert_eq!((bench.ring.ready(), bench.ring.waiting()), (Ok(false), Ok(0)));
    bench.side().set_flags(0, 0x8000);
    assert_eq!(bench.ring.ready(), Err(Broken::Overrun { index: 0, size: 5 }));
    assert_eq!(bench.ring.waiting(), Err(Broken::Overrun { index: 0, size: 5 }));
}

#[test]
fn ids_outside_the_ring_and_ids_in_flight_have_their_names() {
    let mut bench = bench();
    let at = bench.at();
    let (_, _, taken) = bench.chain(&[(at, 16, 0), (at, 1, WRITE)], 16).unwrap();
    assert_eq!(taken, Taken { id: 16, count: 2 });
    assert_eq!(bench.ring.chain().refused(taken, 16), Broken::BadId { head: 0, id: 16, size: 16 });
    assert_eq!(bench.ring.chain().refused(Taken { id: 3, count: 1 }, 16), Broken::IdInFlight { head: 0, id: 3 });
}

#[test]
fn an_indirect_table_keeps_the_rules() {
    let bench = bench;
    let at = bench().at();
    let (header, status) = ((at, 16, 0), (at + 512, 1, WRITE));
    assert!(bench().indirect(&[header, status], 32).is_ok());
    for length in [0, 8, 17, 33, 32769 * 16, u32::MAX] {
        let reason = "an indirect table is empty, larger than 32768 entries, or cut off within one";
        assert_eq!(bench().indirect(&[header, status], length).unwrap_err(), bad_indirect(reason));
    }
    let reason = "an indirect table inside an indirect table";
    assert_eq!(bench().indirect(&[header, (at, 32, INDIRECT)], 32).unwrap_err(), bad_indirect(reason));
    let chain = |buffers: &[Buffer]| bench().chain(buffers, 0).unwrap_err();
    assert_eq!(chain(&[(at, 32, INDIRECT), (at, 1, WRITE)]), bad_indirect("an indirect descriptor has a next one"));
    assert_eq!(chain(&[(at, 16, 0), (at, 32, INDIRECT)]), bad_indirect("an indirect descriptor follows another"));
    let far = Broken::Unmapped { head: 0, index: 0, address: u64::MAX - 15, length: 32 };
    assert_eq!(chain(&[(u64::MAX - 15, 32, INDIRECT)]), far);
    let mut refused = bench();
    refused.indirect(&[header, status], 32).unwrap();
    let outcome = request::parse(&mut refused.ring.chain(), &refused.memory, false, &mut SgList::new());
    assert_eq!(outcome.unwrap_err(), bad_indirect("an indirect descriptor, but INDIRECT_DESC was not negotiated"));
}

/// 2.8.7: "Others are reserved and are ignored by the device". The rows of a table follow each other whatever they say.
#[test]
fn flags_of_a_table_but_write_are_ignored() {
    let mut bench = bench();
    let at = bench.at();
    let (request, data, taken) =
        bench.indirect(&[(at, 16, 0x8080), (at + 512, 512, WRITE | 0x80), (at + 1024, 1, WRITE | NEXT)], 48).unwrap();
    assert_eq!((request.readable, request.writable, data.len(), taken.count), (0, 512, 1, 1));
}

#[test]
fn lengths_and_directions_are_checked() {
    let at = bench().at();
    let refusal = |buffers: &[Buffer]| bench().chain(buffers, 0).unwrap_err();
    assert_eq!(refusal(&[(at, 0, 0)]), Broken::Empty { head: 0, index: 0 });
    assert_eq!(refusal(&[(at, 16, 0), (at, 512, WRITE), (at, 512, 0)]), Broken::WrongOrder { head: 0, index: 2 });
    let short = |what, bytes, least| Broken::TooShort { head: 0, what, bytes, least };
    assert_eq!(refusal(&[(at, 8, 0), (at, 7, 0), (at, 1, WRITE)]), short("the header", 15, 16));
    assert_eq!(refusal(&[(at, 16, 0)]), short("the writable part", 0, 1));
    assert_eq!(refusal(&[(at, 16, 0), (0, 16, 0)]), Broken::Unmapped { head: 0, index: 1, address: 0, length: 16 });
}

#[test]
fn rings_are_refused_that_overlap_lie_askew_or_outside_memory() {
    let mapping = Mapping::anonymous(BYTES as usize, Pages::Normal).unwrap();
    let memory = table(&mapping);
    let text = |size: u32, desc: u64, driver: u64, device: u64, base: u32| {
        let addresses = Addresses { desc: USER + desc, avail: USER + driver, used: USER + device, log: None };
        let ring = PackedRing::new(&memory, PackedSize::new(size).unwrap(), addresses, PackedBase::from_bits(base), true);
        ring.err().map(|error: VhostError| error.to_string())
    };
    assert_eq!(text(7, 0, 112, 116, START), None);
    assert_eq!(text(7, 8, 256, 260, START), Some(format!("address {:#x} is not a multiple of 16", USER + 8)));
    assert_eq!(text(7, 0, 114, 120, START), Some(format!("address {:#x} is not a multiple of 4", USER + 114)));
    assert_eq!(text(7, 0, 108, 116, START), Some("memory region 0: areas of the ring overlap".to_owned()));
    assert_eq!(text(7, 0, 112, 112, START), Some("memory region 1: areas of the ring overlap".to_owned()));
    assert_eq!(text(7, 0, BYTES, 116, START), Some(format!("address {:#x}+0x4 is in no memory region", USER + BYTES)));
    let refused = |base: u32| Some(format!("Invalid argument: vring base {base:#x}: two positions on a ring of 7, at most a lap apart"));
    for base in [0x8000_8007, 0x8007_8000, 0x8003_0004, 0x8000_7fff] {
        assert_eq!(text(7, 0, 112, 116, base), refused(base));
    }
    assert_eq!(text(7, 0, 112, 116, 0x8003_0003), None, "all of a lap is in flight");
}

/// A device that polls, arms itself now and then, and a driver that kicks when asked. No request waits unnoticed, and a device that polls is
/// never kicked.
#[test]
fn no_kick_is_lost_and_none_is_sent_to_a_ring_that_is_polled() {
    for (size, event_idx) in [(1, true), (5, true), (64, true), (5, false)] {
        let mut bench = Bench::new(size, event_idx, START);
        let at = bench.at();
        bench.ring.disarm();
        for round in 0..5_000u32 {
            let armed = round % 7 == 3;
            if armed {
                assert!(bench.ring.arm());
            }
            bench.side().put_raw(&[(at, 17, WRITE)], 0);
            assert_eq!(bench.driver.publish(), armed, "request {round} of a ring of {size}");
            assert!(!armed || !bench.ring.arm(), "one more look finds it");
            assert_eq!((bench.ring.waiting(), bench.ring.ready()), (Ok(1), Ok(true)));
            bench.ring.took(Taken { id: 0, count: 1 });
            bench.ring.disarm();
            bench.ring.push_used(Taken { id: 0, count: 1 }, 1);
            bench.ring.publish();
            bench.side().counts.insert(0, 1);
            assert_eq!(bench.side().reap(), Some((0, 1)));
        }
    }
}

#[test]
fn interrupts_come_once_for_what_the_driver_waits_for() {
    for event_idx in [true, false] {
        let mut bench = Bench::new(8, event_idx, START);
        assert!(!bench.ring.wants_interrupt(), "nothing was answered");
        for round in 0..20 {
            let mut taken = Vec::new();
            for _ in 0..3 {
                bench.driver.add(&Ask::new(RequestType::IN, 0, 512).indirect()).unwrap();
            }
            bench.driver.publish();
            (0..3).for_each(|_| taken.push(bench.take()));
            assert!(bench.driver.want_interrupts(true));
            taken[..2].iter().for_each(|taken| bench.ring.push_used(*taken, 1));
            bench.ring.publish();
            assert!(bench.ring.wants_interrupt(), "round {round}: the first of two was waited for");
            assert!(!bench.ring.wants_interrupt(), "no news, no interrupt");
            bench.ring.push_used(taken[2], 1);
            bench.ring.publish();
            assert_eq!(bench.ring.wants_interrupt(), !event_idx, "round {round}: the driver did not ask again");
            while bench.driver.reap().is_some() {}
            bench.driver.want_interrupts(false);
            bench.driver.add(&Ask::new(RequestType::IN, 0, 512).indirect()).unwrap();
            bench.driver.publish();
            let last = bench.take();
            bench.ring.push_used(last, 1);
            bench.ring.publish();
            assert!(!bench.ring.wants_interrupt(), "round {round}: it wants none");
            assert!(bench.driver.reap().is_some());
        }
    }
}

#[test]
fn a_batch_of_answers_is_seen_whole_or_not_at_all() {
    let mut bench = bench();
    for _ in 0..3 {
        bench.driver.add(&Ask::new(RequestType::IN, 0, 512)).unwrap();
    }
    bench.driver.publish();
    let taken: Vec<Taken> = (0..3).map(|_| bench.take()).collect();
    for done in [taken[1], taken[0], taken[2]] {
        bench.ring.push_used(done, 7);
        assert!(!bench.driver.answered());
    }
    bench.ring.publish();
    let ids: Vec<u16> = std::iter::from_fn(|| bench.driver.reap()).map(|done| done.head).collect();
    assert_eq!(ids, [taken[1].id, taken[0].id, taken[2].id]);
    assert_eq!(bench.ring.base(), bench.driver.base());
}

fn asks() -> impl Strategy<Value = Ask> {
    let cuts = || prop::collection::vec(0u32..5000, 0..5);
    (0..3u8, any::<u64>(), 0..5000u32, cuts(), cuts(), any::<bool>()).prop_map(|(kind, sector, bytes, mut reads, mut writes, table)| {
        reads.sort_unstable();
        writes.sort_unstable();
        let kind = [RequestType::IN, RequestType::OUT, RequestType(0x77)][usize::from(kind)];
        Ask { read_cuts: reads, write_cuts: writes, direct: table.then_some(0), ..Ask::new(kind, sector, bytes) }
    })
}

proptest! {
    #[test]
    fn any_cut_of_a_request_means_the_same_anywhere_on_the_ring(ask in asks(), size in 12..40u16, index in any::<u16>(), wrap in any::<bool>()) {
        let base = u32::from(index % size) | if wrap { 0x8000 } else { 0 };
        let mut bench = Bench::new(size, true, base | base << 16);
        let (id, slot) = bench.driver.add(&ask).unwrap();
        bench.driver.publish();
        prop_assert_eq!(bench.ring.ready(), Ok(true));
        let (request, data, taken) = bench.parse().unwrap();
        prop_assert_eq!((taken.id, taken.count), (id, bench.side().counts[&id]));
        prop_assert_eq!((request.header.kind(), request.header.sector.get()), (ask.kind, ask.sector));
        let (readable, writable) = if ask.out { (ask.bytes, 0) } else { (0, ask.bytes) };
        prop_assert_eq!((request.readable, request.writable), (readable.into(), writable.into()));
        let mut at = bench.driver.data_at(slot);
        for entry in &data {
            prop_assert_eq!(entry.offset, at);
            at += u64::from(entry.length);
        }
        prop_assert_eq!(at, bench.driver.data_at(slot) + u64::from(ask.bytes));
        prop_assert_eq!(bench.memory.at(request.status).1, at);
    }

    /// Requests of any number of descriptors, taken and answered in any order for many laps: each answer is one that was asked, and both sides
    /// stand in the same place at the end.
    #[test]
    fn both_sides_agree_for_many_laps(
        size in 1..20u16, steps in prop::collection::vec((any::<u8>(), any::<u8>()), 1..200), event_idx in any::<bool>()
    ) {
        let mut bench = Bench::new(size, event_idx, START);
        let mut taken: Vec<Taken> = Vec::new();
        for (what, which) in steps {
            if what & 1 == 0 {
                let mut ask = Ask::new(RequestType::IN, 0, 512);
                ask.write_cuts.truncate(usize::from(which & 1));
                if which & 2 == 0 || size < 3 {
                    ask = ask.indirect();
                }
                if bench.driver.add(&ask).is_some() && which & 4 == 0 {
                    bench.driver.publish();
                }
            } else {
                while bench.ring.ready() == Ok(true) {
                    let next = bench.take();
                    taken.push(next);
                }
                for _ in 0..which % 3 {
                    if !taken.is_empty() {
                        let done = taken.remove(usize::from(which) % taken.len());
                        bench.ring.push_used(done, 513);
                    }
                }
                bench.ring.publish();
                while let Some(done) = bench.driver.reap() {
                    prop_assert_eq!(done.written, 513);
                }
            }
        }
        bench.driver.publish();
        while bench.ring.ready() == Ok(true) {
            let next = bench.take();
            taken.push(next);
        }
        taken.drain(..).for_each(|done| bench.ring.push_used(done, 1));
        bench.ring.publish();
        while bench.driver.reap().is_some() {}
        prop_assert_eq!((bench.driver.outstanding(), bench.ring.base()), (0, bench.driver.base()));
    }

    #[test]
    fn any_descriptors_are_parsed_or_refused(
        words in prop::collection::vec(any::<(u64, u32, u16, u16)>(), 32), near in any::<u32>(), start in 0..16u16
    ) {
        let base = u32::from(start) | 0x8000;
        let mut bench = Bench::new(16, false, base | base << 16);
        for (index, (address, length, id, flags)) in words.iter().enumerate() {
            // Mostly near memory and nearly legal, else all fails at the first.
            let address = if near & (1 << index) != 0 { *address } else { GUEST + address % (BYTES + 4096) };
            let (length, flags) = if near & 2 != 0 { (length % 9000, flags & 7) } else { (*length, *flags) };
            if index < 16 {
                let at = At { index: index as u16, wrap: index as u16 >= start };
                let turn = if near & 4 != 0 { PackedSide::available(at) } else { flags & 0x8080 };
                bench.side().set_descriptor(at.index, address, length, *id);
                bench.side().set_flags(at.index, flags & !0x8080 | turn);
            } else {
                let row = bench.side().table(&[(address, length, flags)]);
                bench.driver.region.write(bench.driver.data_at(0) + 16 * index as u64, &row).unwrap();
            }
        }
        if let Ok((request, data, taken)) = bench.parse() {
            prop_assert!((1..=16).contains(&taken.count) && data.len() <= SEGMENTS_MAX + 1);
            let total: u64 = data.iter().map(|entry| u64::from(entry.length)).sum();
            prop_assert_eq!(total, request.readable + request.writable);
            for entry in &data {
                prop_assert!(entry.offset + u64::from(entry.length) <= entry.region.len());
            }
        }
    }
}
