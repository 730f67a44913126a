//! Rings and requests over real memory: each broken rule has its name, each legal layout its meaning.

mod guest;

use std::sync::Arc;

use guest::{Ask, Driver, GUEST, Kind, USER};
use proptest::prelude::*;
use qpair_memory::{GuestMemory, GuestRegion, Mapping, MemoryError, Pages, Region, SgList};
use qpair_vhost::request::{self, Request, SEGMENTS_MAX};
use qpair_vhost::ring::{Ring, Taken};
use qpair_vhost::{Addresses, Broken, SplitRing};
use qpair_wire::virtio::{Desc, DescFlags, RingSize};
use qpair_wire::virtio_blk::RequestType;
use zerocopy::IntoBytes;

const BYTES: u64 = 1 << 20;
const NEXT: DescFlags = DescFlags::NEXT;
const WRITE: DescFlags = DescFlags::WRITE;
const INDIRECT: DescFlags = DescFlags::INDIRECT;
const NONE: DescFlags = DescFlags::empty();

fn table(mapping: &Arc<Mapping>) -> GuestMemory {
    let region = Region::new(mapping.clone());
    let row = GuestRegion { guest_address: GUEST, user_address: USER, length: mapping.len() as u64, offset: 0, region };
    GuestMemory::new(vec![row]).unwrap()
}

struct Bench {
    memory: GuestMemory,
    driver: Driver,
    ring: SplitRing,
}

impl Bench {
    fn new(size: u32, event_idx: bool, base: u16) -> Self {
        let entries = size as u16;
        let size = RingSize::new(size).unwrap();
        let mapping = Mapping::anonymous((Driver::bytes(entries, 8) + BYTES) as usize, Pages::Normal).unwrap();
        let memory = table(&mapping);
        let driver = Driver::new(Kind::Split, &mapping, 0, entries, 8, event_idx, base.into());
        let ring = SplitRing::new(&memory, size, driver.addresses(), base, event_idx).unwrap();
        Self { memory, driver, ring }
    }

    fn parse(&self, head: u16) -> Result<(Request, SgList), Broken> {
        guest::parse(self.ring.chain_at(head), &self.memory).map(|(request, data, _)| (request, data))
    }

    /// The chain at 0 made of these descriptors, in order.
    fn chain(&self, chain: &[(u64, u32, DescFlags)]) -> Result<(Request, SgList), Broken> {
        for (index, (address, length, flags)) in chain.iter().enumerate() {
            let more = if index + 1 < chain.len() { NEXT } else { NONE };
            self.driver.as_split().store_descriptor(index as u16, Desc::new(*address, *length, *flags | more, index as u16 + 1));
        }
        self.parse(0)
    }

    /// The same in an indirect table of `length` bytes.
    fn indirect(&self, chain: &[Desc], length: u32) -> Result<(Request, SgList), Broken> {
        let at = self.driver.data_at(0);
        for (index, desc) in chain.iter().enumerate() {
            self.driver.region.write(at + 16 * index as u64, desc.as_bytes()).unwrap();
        }
        self.chain(&[(GUEST + at, length, INDIRECT)])
    }

    fn at(&self) -> u64 {
        GUEST + self.driver.data_at(1)
    }
}

fn bench() -> Bench {
    Bench::new(16, false, 0)
}

fn bad_indirect(reason: &'static str) -> Broken {
    Broken::BadIndirect { head: 0, reason }
}

#[test]
fn a_chain_that_runs_in_a_circle_is_refused() {
    let bench = bench();
    bench.driver.as_split().store_descriptor(0, Desc::new(bench.at(), 16, NEXT, 1));
    bench.driver.as_split().store_descriptor(1, Desc::new(bench.at(), 16, NEXT, 0));
    assert_eq!(bench.parse(0).unwrap_err(), Broken::TooLong { head: 0, limit: 16 });
    bench.driver.as_split().store_descriptor(3, Desc::new(bench.at(), 16, NEXT, 3));
    assert_eq!(bench.parse(3).unwrap_err(), Broken::TooLong { head: 3, limit: 16 });
    let circle = [Desc::new(bench.at(), 16, NEXT, 0), Desc::new(bench.at(), 16, NEXT, 0)];
    assert_eq!(bench.indirect(&circle, 32).unwrap_err(), Broken::TooLong { head: 0, limit: 2 });
    let big = Bench::new(32768, false, 0);
    big.driver.as_split().store_descriptor(0, Desc::new(big.at(), 16, NEXT, 0));
    assert_eq!(big.parse(0).unwrap_err(), Broken::TooLong { head: 0, limit: SEGMENTS_MAX as u32 });
}

#[test]
fn a_descriptor_outside_the_table_is_refused() {
    let bench = bench();
    assert_eq!(bench.parse(16).unwrap_err(), Broken::BadIndex { index: 16, size: 16 });
    bench.driver.as_split().store_descriptor(0, Desc::new(bench.at(), 16, NEXT, 65535));
    assert_eq!(bench.parse(0).unwrap_err(), Broken::BadIndex { index: 65535, size: 16 });
    let beyond = [Desc::new(bench.at(), 16, NEXT, 2), Desc::new(bench.at(), 1, WRITE, 0)];
    assert_eq!(bench.indirect(&beyond, 32).unwrap_err(), Broken::BadIndex { index: 2, size: 2 });
}

#[test]
fn a_buffer_outside_memory_is_refused_at_its_place_in_the_chain() {
    let bench = bench();
    let (at, end) = (bench.at(), GUEST + bench.driver.region.len());
    let unmapped = |index, address, length| Broken::Unmapped { head: 0, index, address, length };
    for (address, length) in [(0, 16), (end - 8, 16), (u64::MAX - 7, 16), (u64::MAX, 1), (GUEST - 1, 16)] {
        assert_eq!(bench.chain(&[(address, length, NONE)]).unwrap_err(), unmapped(0, address, length.into()));
        let data = [(at, 16, NONE), (address, length, NONE), (at, 1, WRITE)];
        assert_eq!(bench.chain(&data).unwrap_err(), unmapped(1, address, length.into()));
        let read = [(at, 16, NONE), (address, length, WRITE), (at, 1, WRITE)];
        assert_eq!(bench.chain(&read).unwrap_err(), unmapped(1, address, length.into()));
        let status = [(at, 16, NONE), (at, 512, WRITE), (address, length, WRITE)];
        assert_eq!(bench.chain(&status).unwrap_err(), unmapped(2, address, length.into()));
    }
    assert_eq!(
        bench.chain(&[(at, 16, NONE), (at, u32::MAX, WRITE)]).unwrap_err(),
        unmapped(1, at, u64::from(u32::MAX) - 1).with_length(u32::MAX)
    );
}

trait WithLength {
    fn with_length(self, length: u32) -> Self;
}

impl WithLength for Broken {
    fn with_length(mut self, bytes: u32) -> Self {
        if let Broken::Unmapped { length, .. } = &mut self {
            *length = bytes.into();
        }
        self
    }
}

#[test]
fn an_indirect_table_keeps_the_rules() {
    let bench = bench();
    let at = bench.at();
    let (header, status) = (Desc::new(at, 16, NEXT, 1), Desc::new(at + 512, 1, WRITE, 0));
    assert!(bench.indirect(&[header, status], 32).is_ok());
    for length in [0, 8, 17, 33, 32769 * 16, u32::MAX] {
        let reason = "an indirect table is empty, larger than 32768 entries, or cut off within one";
        assert_eq!(bench.indirect(&[header, status], length).unwrap_err(), bad_indirect(reason));
    }
    bench.driver.as_split().store_descriptor(0, Desc::new(at, 32, INDIRECT | NEXT, 1));
    assert_eq!(bench.parse(0).unwrap_err(), bad_indirect("an indirect descriptor has a next one"));
    let inner = [header, Desc::new(at, 32, INDIRECT, 0)];
    assert_eq!(bench.indirect(&inner, 32).unwrap_err(), bad_indirect("an indirect table inside an indirect table"));
    let far = bench.chain(&[(u64::MAX - 15, 32, INDIRECT)]).unwrap_err();
    assert_eq!(far, Broken::Unmapped { head: 0, index: 0, address: u64::MAX - 15, length: 32 });
    let refused = request::parse(&mut bench.ring.chain_at(0), &bench.memory, false, &mut SgList::new()).unwrap_err();
    assert_eq!(refused, bad_indirect("an indirect descriptor, but INDIRECT_DESC was not negotiated"));
}

#[test]
fn chained_descriptors_may_end_in_an_indirect_one() {
    let mut bench = bench();
    for direct in 0..4 {
        let mut ask = Ask::new(RequestType::IN, 7, 4096);
        (ask.write_cuts, ask.direct) = (vec![512, 1024, 4096], Some(direct));
        let (head, slot) = bench.driver.add(&ask).unwrap();
        let (request, data) = bench.parse(head).unwrap();
        assert_eq!((request.header.kind(), request.header.sector.get(), request.writable, request.readable), (RequestType::IN, 7, 4096, 0));
        let pieces: Vec<_> = data.iter().map(|entry| (entry.offset - bench.driver.data_at(slot), entry.length)).collect();
        assert_eq!(pieces, [(0, 512), (512, 512), (1024, 3072)], "{direct} descriptors in the ring");
    }
}

#[test]
fn lengths_and_directions_are_checked() {
    let bench = bench();
    let at = bench.at();
    assert_eq!(bench.chain(&[(at, 0, NONE)]).unwrap_err(), Broken::Empty { head: 0, index: 0 });
    assert_eq!(bench.chain(&[(at, 16, NONE), (at, 0, WRITE)]).unwrap_err(), Broken::Empty { head: 0, index: 1 });
    let backwards = [(at, 16, NONE), (at, 512, WRITE), (at, 512, NONE)];
    assert_eq!(bench.chain(&backwards).unwrap_err(), Broken::WrongOrder { head: 0, index: 2 });
    let short = |what, bytes, least| Broken::TooShort { head: 0, what, bytes, least };
    assert_eq!(bench.chain(&[(at, 1, WRITE)]).unwrap_err(), short("the header", 0, 16));
    assert_eq!(bench.chain(&[(at, 8, NONE), (at, 7, NONE), (at, 1, WRITE)]).unwrap_err(), short("the header", 15, 16));
    assert_eq!(bench.chain(&[(at, 16, NONE)]).unwrap_err(), short("the writable part", 0, 1));
}

#[test]
fn an_avail_index_that_jumps_is_refused_and_one_that_wraps_is_not() {
    for size in [1u16, 2, 64, 32768] {
        for next in [0, 1, 32768, 65535] {
            let mut bench = Bench::new(u32::from(size), false, next);
            for ahead in [0, 1, size] {
                bench.driver.split().publish_index(next.wrapping_add(ahead));
                assert_eq!(bench.ring.waiting(), Ok(ahead), "ring of {size} at {next}");
            }
            for ahead in [size + 1, 65535] {
                let index = next.wrapping_add(ahead);
                bench.driver.split().publish_index(index);
                assert_eq!(bench.ring.waiting(), Err(Broken::AvailJumped { index, next, ahead, size }));
            }
        }
    }
}

#[test]
fn rings_are_refused_that_overlap_lie_askew_or_outside_memory() {
    let mapping = Mapping::anonymous(BYTES as usize, Pages::Normal).unwrap();
    let memory = table(&mapping);
    let ring = |size, desc, avail, used, event_idx| {
        SplitRing::new(
            &memory,
            RingSize::new(size).unwrap(),
            Addresses { desc: USER + desc, avail: USER + avail, used: USER + used, log: None },
            0,
            event_idx,
        )
    };
    let text = |outcome: Result<SplitRing, MemoryError>| outcome.unwrap_err().to_string();
    for size in (0..=15).map(|power| 1u32 << power) {
        let layout = RingSize::new(size).unwrap().layout(0, 4).unwrap();
        assert!(ring(size, 0, layout.avail, layout.used, true).is_ok(), "size {size}");
        assert!(matches!(ring(size, 8, layout.avail, layout.used, true), Err(MemoryError::Misaligned { alignment: 16, .. })));
        assert!(matches!(ring(size, 0, layout.avail + 1, layout.used, true), Err(MemoryError::Misaligned { alignment: 2, .. })));
        assert!(matches!(ring(size, 0, layout.avail, layout.used + 2, true), Err(MemoryError::Misaligned { alignment: 4, .. })));
        assert!(matches!(ring(size, 0, 0, layout.used, true), Err(MemoryError::BadTable { .. })), "avail over descriptors");
        assert!(matches!(ring(size, 0, layout.avail, layout.used & !15, true), Ok(_) | Err(MemoryError::BadTable { .. })));
        assert!(matches!(ring(size, 0, layout.avail, layout.avail & !3, true), Err(MemoryError::BadTable { .. })), "used over avail");
        let (used, bytes) = (BYTES - 8, RingSize::new(size).unwrap().used_bytes(true));
        assert_eq!(text(ring(size, 0, layout.avail, used, true)), format!("address {:#x}+{bytes:#x} is in no memory region", USER + used));
    }
    let wrapped = Addresses { desc: u64::MAX - 15, avail: USER, used: USER + 4096, log: None };
    let refused = SplitRing::new(&memory, RingSize::new(16).unwrap(), wrapped, 0, false);
    assert!(matches!(refused, Err(MemoryError::Unmapped { length: 256, .. })));
}

/// A device that polls, arms itself now and then, and a driver that kicks when asked. No request waits unnoticed, and a
/// device that polls is never kicked, however long ago it last said so.
#[test]
fn event_indices_lose_no_kick_and_send_none_over_three_rounds_of_65536() {
    for (base, event_idx) in [(0, true), (65000, true), (0, false)] {
        let mut bench = Bench::new(64, event_idx, base);
        bench.ring.disarm();
        for round in 0..200_000u32 {
            let armed = round % 90_000 == 1000;
            if armed {
                assert!(bench.ring.arm());
            }
            bench.driver.split().push(0);
            let kick = bench.driver.publish();
            assert_eq!(kick, armed, "request {round}");
            assert_eq!(bench.ring.waiting(), Ok(1));
            bench.ring.took(Taken { id: 0, count: 1 });
            bench.ring.rest();
            if armed {
                bench.ring.disarm();
            }
        }
    }
}

#[test]
fn interrupts_come_once_for_what_the_driver_waits_for() {
    for base in [0, 65533] {
        let mut bench = Bench::new(8, true, base);
        assert!(!bench.ring.wants_interrupt(), "nothing was answered");
        assert!(bench.driver.want_interrupts(true));
        for _ in 0..3 {
            bench.ring.push_used(Taken { id: 0, count: 1 }, 1);
        }
        bench.ring.publish();
        assert!(bench.ring.wants_interrupt(), "the first of three was waited for");
        assert!(!bench.ring.wants_interrupt());
        bench.ring.push_used(Taken { id: 0, count: 1 }, 1);
        bench.ring.publish();
        assert!(!bench.ring.wants_interrupt(), "the driver did not ask again");
        let seen = bench.driver.as_split().used_index();
        bench.driver.split().last_used = seen;
        assert!(bench.driver.want_interrupts(true));
        bench.ring.push_used(Taken { id: 0, count: 1 }, 1);
        bench.ring.publish();
        assert!(bench.ring.wants_interrupt());
    }
    let mut bench = Bench::new(8, false, 0);
    bench.ring.push_used(Taken { id: 0, count: 1 }, 1);
    bench.ring.publish();
    assert!(bench.ring.wants_interrupt());
    assert!(!bench.ring.wants_interrupt(), "no news, no interrupt");
    bench.driver.want_interrupts(false);
    bench.ring.push_used(Taken { id: 0, count: 1 }, 1);
    bench.ring.publish();
    assert!(!bench.ring.wants_interrupt());
}

fn asks() -> impl Strategy<Value = Ask> {
    let cuts = || prop::collection::vec(0u32..5000, 0..5);
    (0..3u8, any::<u64>(), 0..5000u32, cuts(), cuts(), prop::option::of(0..6usize)).prop_map(
        |(kind, sector, bytes, mut reads, mut writes, direct)| {
            reads.sort_unstable();
            writes.sort_unstable();
            let kind = [RequestType::IN, RequestType::OUT, RequestType(0x77)][usize::from(kind)];
            Ask { read_cuts: reads, write_cuts: writes, direct, ..Ask::new(kind, sector, bytes) }
        },
    )
}

proptest! {
    #[test]
    fn any_cut_of_a_request_means_the_same(ask in asks()) {
        let mut bench = Bench::new(32, true, 0);
        let (head, slot) = bench.driver.add(&ask).unwrap();
        let (request, data) = bench.parse(head).unwrap();
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

    #[test]
    fn any_descriptors_are_parsed_or_refused(words in prop::collection::vec(any::<(u64, u32, u16, u16)>(), 32), near in any::<u32>(), head in 0..40u16) {
        let bench = Bench::new(16, false, 0);
        for (index, (address, length, flags, next)) in words.iter().enumerate() {
            // Mostly near memory and nearly legal, else all fails at the first.
            let address = if near & (1 << index) != 0 { *address } else { GUEST + address % (BYTES + 4096) };
            let (length, flags, next) = if near & 2 != 0 { (length % 9000, flags & 7, next % 18) } else { (*length, *flags, *next) };
            let desc = Desc::new(address, length, DescFlags::from_bits_retain(flags), next);
            if index < 16 {
                bench.driver.as_split().store_descriptor(index as u16, desc);
            } else {
                bench.driver.region.write(bench.driver.data_at(0) + 16 * index as u64, desc.as_bytes()).unwrap();
            }
        }
        if let Ok((request, data)) = bench.parse(head) {
            prop_assert!(head < 16 && data.len() <= SEGMENTS_MAX + 1);
            let total: u64 = data.iter().map(|entry| u64::from(entry.length)).sum();
            prop_assert_eq!(total, request.readable + request.writable);
            for entry in &data {
                prop_assert!(entry.offset + u64::from(entry.length) <= entry.region.len());
            }
        }
    }
}
