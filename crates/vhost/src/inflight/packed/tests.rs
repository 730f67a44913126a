//! Regions that are fresh, honest, torn or lying, beside a ring that goes along.

use proptest::prelude::*;
use qpair_memory::{GuestMemory, GuestRegion, Mapping};
use qpair_wire::vhost_user::inflight_packed_queue_bytes;
use qpair_wire::virtio_packed::{PackedBase, PackedSize};

use super::*;
use crate::Addresses;
use crate::inflight::Inflight;
use crate::ring::Ring;

const SIZE: u16 = 8;

/// A chain: its id and its buffers.
type Left = (u16, Vec<(u64, u32)>);

/// A ring whose driver is the test, and the region of whoever serves it.
struct Bench {
    memory: Region,
    ring: PackedRing,
    region: Region,
    mapping: std::sync::Arc<Mapping>,
}

fn bytes() -> usize {
    inflight_packed_queue_bytes(SIZE) as usize
}

impl Bench {
    fn new(content: &[u8]) -> Self {
        let (guest, mapping) = (Mapping::memfd("guest", 4096).unwrap(), Mapping::memfd("inflight", content.len()).unwrap());
        let (memory, region) = (Region::new(guest), Region::new(mapping.clone()));
        region.write(0, content).unwrap();
        Self { ring: Self::ring(&memory), memory, region, mapping }
    }

    fn ring(memory: &Region) -> PackedRing {
        let row = GuestRegion { guest_address: 0, user_address: 0, length: 4096, offset: 0, region: memory.clone() };
        let addresses = Addresses { desc: 0, avail: 1024, used: 1028, log: None };
        let table = GuestMemory::new(vec![row]).unwrap();
        PackedRing::new(&table, PackedSize::new(SIZE.into()).unwrap(), addresses, PackedBase::START, false).unwrap()
    }

    fn inflight(&self) -> Inflight {
        Inflight { mapping: self.mapping.clone(), offset: 0, num_queues: 1, queue_size: SIZE }
    }

    /// Makes a chain of `count` descriptors available, and takes it. Its entry.
    fn take(&mut self, tracker: &mut PackedTracker, id: u16, count: u16) -> u16 {
        for ahead in 0..count {
            let at = PackedSize::new(SIZE.into()).unwrap().advance(self.at(), ahead);
            let flags = at.available() | u16::from(ahead + 1 < count);
            let place = 16 * u64::from(at.index());
            self.memory.write(place, &(0x1000 * u64::from(id + 1) + u64::from(ahead)).to_le_bytes()).unwrap();
            self.memory.write(place + 8, &(u64::from(512 + ahead) | u64::from(id) << 32 | u64::from(flags) << 48).to_le_bytes()).unwrap();
        }
        let taken = Taken { id, count };
        let entry = tracker.mark(&self.ring, taken);
        self.ring.took(taken);
        entry
    }

    fn at(&self) -> Position {
        PackedBase::from_bits(self.ring.base()).avail
    }

    fn answer(&mut self, tracker: &mut PackedTracker, entry: u16, taken: Taken) {
        self.ring.push_used(taken, 1);
        tracker.add_done(&self.ring, entry);
        self.ring.publish();
        tracker.end_batch(&self.ring);
    }

    /// What a successor finds: where the ring stands, and each chain's id and buffers.
    fn found(&self) -> (Position, Vec<Left>) {
        let mut tracker = self.inflight().packed_queue(0, SIZE).unwrap();
        let found = tracker.recover(&Self::ring(&self.memory)).unwrap();
        let walk = |entry: &u16| {
            let mut chain = tracker.chain(*entry);
            let mut buffer = chain.first().unwrap();
            let mut buffers = vec![(buffer.address, buffer.length)];
            while buffer.flags.contains(DescFlags::NEXT) {
                buffer = chain.next(&buffer).unwrap();
                buffers.push((buffer.address, buffer.length));
            }
            (chain.taken().id, buffers)
        };
        let (at, outstanding) = found.at.unwrap();
        let chains: Vec<_> = found.entries.iter().map(walk).collect();
        assert_eq!(usize::from(outstanding), chains.iter().map(|(_, buffers)| buffers.len()).sum::<usize>());
        (at, chains)
    }

    fn ids(&self) -> Vec<u16> {
        self.found().1.into_iter().map(|(id, _)| id).collect()
    }

    fn refusal(&self) -> String {
        self.inflight().packed_queue(0, SIZE).unwrap().recover(&Self::ring(&self.memory)).unwrap_err().to_string()
    }

    fn lie(&self, at: u64, value: u16) {
        self.region.write(at, &value.to_le_bytes()).unwrap();
    }
}

fn fresh() -> (Bench, PackedTracker) {
    let bench = Bench::new(&vec![0; bytes()]);
    let mut tracker = bench.inflight().packed_queue(0, SIZE).unwrap();
    assert_eq!(tracker.recover(&bench.ring), Ok(Found { at: None, entries: vec![] }));
    (bench, tracker)
}

fn at(index: u16, wrap: bool) -> Position {
    Position::new(index, wrap)
}

#[test]
fn chains_come_back_oldest_first_as_the_driver_wrote_them() {
    let (mut bench, mut tracker) = fresh();
    bench.take(&mut tracker, 5, 1);
    let second = bench.take(&mut tracker, 1, 3);
    bench.take(&mut tracker, 7, 2);
    // The second is answered, over the first one's descriptor.
    bench.answer(&mut tracker, second, Taken { id: 1, count: 3 });
    bench.take(&mut tracker, 3, 2);
    let chain = |id: u16, count: u16| (id, (0..count).map(|n| (0x1000 * u64::from(id + 1) + u64::from(n), u32::from(512 + n))).collect());
    assert_eq!(bench.found(), (at(3, true), vec![chain(5, 1), chain(7, 2), chain(3, 2)]));
    assert_eq!(bench.ids(), [5, 7, 3], "looking changes nothing");
}

#[test]
fn a_whole_lap_in_one_chain_is_told_from_none() {
    let (mut bench, mut tracker) = fresh();
    let entry = bench.take(&mut tracker, 2, SIZE);
    bench.ring.push_used(Taken { id: 2, count: SIZE }, 1);
    tracker.add_done(&bench.ring, entry);
    assert_eq!(bench.found().0, at(0, true), "not shown to the driver");
    let (mut bench, mut tracker) = fresh();
    let entry = bench.take(&mut tracker, 2, SIZE);
    bench.ring.push_used(Taken { id: 2, count: SIZE }, 1);
    tracker.add_done(&bench.ring, entry);
    bench.ring.publish();
    assert_eq!(bench.found(), (at(0, false), vec![]), "shown, though the index is the same");
}

#[test]
fn a_request_is_answered_from_the_moment_its_descriptor_shows_it() {
    let setup = || {
        let (mut bench, mut tracker) = fresh();
        let entries = [bench.take(&mut tracker, 5, 2), bench.take(&mut tracker, 1, 1)];
        bench.ring.push_used(Taken { id: 1, count: 1 }, 1);
        (bench, tracker, entries)
    };
    let (bench, _, _) = setup();
    assert_eq!(bench.ids(), [5, 1], "nothing is written yet");
    let (bench, mut tracker, entries) = setup();
    tracker.add_done(&bench.ring, entries[1]);
    assert_eq!(bench.found().0, at(0, true));
    assert_eq!(bench.ids(), [5, 1], "not shown to the driver");
    let (mut bench, mut tracker, entries) = setup();
    tracker.add_done(&bench.ring, entries[1]);
    bench.ring.publish();
    assert_eq!((bench.found().0, bench.ids()), (at(1, true), vec![5]), "shown, and the mark still on");
    let (mut bench, mut tracker, entries) = setup();
    tracker.add_done(&bench.ring, entries[1]);
    bench.ring.publish();
    tracker.end_batch(&bench.ring);
    assert_eq!((bench.found().0, bench.ids()), (at(1, true), vec![5]));
}

#[test]
fn a_region_that_contradicts_itself_is_refused_by_name() {
    let broken = |lies: &[(u64, u16)]| {
        let (mut bench, mut tracker) = fresh();
        bench.take(&mut tracker, 5, 2);
        bench.take(&mut tracker, 1, 1);
        lies.iter().for_each(|(at, value)| bench.lie(*at, *value));
        bench.refusal()
    };
    let entry = |number: u64, field: u64| INFLIGHT_PACKED_ENTRIES_OFFSET + 32 * number + field;
    let (free, old_free, used, old_used, wraps) = (12, 14, 16, 18, 20);
    assert_eq!(broken(&[(INFLIGHT_PACKED_VERSION_OFFSET, 2)]), "inflight region: version 2, only 1 is known");
    assert_eq!(broken(&[(INFLIGHT_PACKED_DESC_NUM_OFFSET, 16)]), "inflight region: desc_num 16, the ring has 8");
    assert_eq!(broken(&[(used, 8)]), "inflight region: used index 8 with wrap counter 1 on a ring of 8");
    assert_eq!(broken(&[(wraps, 0x0201)]), "inflight region: used index 0 with wrap counter 2 on a ring of 8");
    assert_eq!(broken(&[(old_used, 3)]), "inflight region: its used position is 13 ahead of the old one, on a ring of 8");
    assert_eq!(broken(&[(free, 9), (old_free, 9)]), "inflight region: its free list names entry 9 of 8");
    assert_eq!(broken(&[(entry(5, 2), 3)]), "inflight region: its free list comes twice to entry 3");
    assert_eq!(broken(&[(entry(7, 2), 0)]), "inflight region: its free list comes twice to entry 3");
    assert_eq!(broken(&[(entry(0, 2), 5)]), "inflight region: the chain of entry 0 goes on at 5, which is not its own");
    assert_eq!(broken(&[(entry(0, 2), 77)]), "inflight region: the chain of entry 0 goes on at 77, which is not its own");
    assert_eq!(broken(&[(entry(0, 6), 1)]), "inflight region: the chain of entry 0 has not 1 entries that end at 1");
    assert_eq!(broken(&[(entry(2, 6), 0)]), "inflight region: the chain of entry 2 has not 0 entries that end at 2");
    assert_eq!(broken(&[(entry(2, 0), 0)]), "inflight region: 1 of its 8 entries are neither free nor in flight");
    assert_eq!(broken(&[(free, 8), (old_free, 8)]), "inflight region: 5 of its 8 entries are neither free nor in flight");
}

#[test]
fn a_region_is_adopted_only_if_it_holds_what_it_says() {
    let mapping = Mapping::memfd("inflight", 8192).unwrap();
    let fd = mapping.fd().unwrap().try_clone_to_owned().unwrap();
    let text =
        |size, offset, queues, entries| Inflight::adopt(&fd, size, offset, queues, entries, true).err().map(|error| error.to_string());
    assert_eq!(text(8192, 0, 2, 100), None, "no power of two is needed");
    let small = 2 * inflight_packed_queue_bytes(100) - 1;
    assert_eq!(
        text(small, 0, 2, 100),
        Some(format!("Invalid argument: inflight mmap_size {small}: at least {} for 2 queues of 100", small + 1))
    );
    assert_eq!(text(8192, 0, 1, 0), Some("Invalid argument: inflight queue_size 0: 1 to 32768".to_owned()));
    let odd = Inflight::adopt(&fd, 4096, 4, 1, 64, true).unwrap();
    assert!(matches!(odd.packed_queue(0, 64), Err(Broken::Inflight(_))), "an offset at which no number of 8 bytes lies");
    let beyond = Inflight::adopt(&fd, 4096, 0, 1, 64, false).unwrap();
    assert!(beyond.packed_queue(0, 64).is_ok());
    let beyond = Inflight::adopt(&fd, 8192, 0, 3, 128, false).unwrap();
    assert!(matches!(beyond.packed_queue(2, 128), Err(Broken::Inflight(_))), "made for split rings, and too small");
}

proptest! {
    #[test]
    fn whatever_the_region_holds_recovery_ends_and_names_each_entry_once(
        mut content in prop::collection::vec(any::<u8>(), bytes()), honest in any::<bool>(), links in prop::collection::vec(0..9u8, 32)
    ) {
        if honest {
            // Else nearly all of it is refused for its version.
            content[8..20].copy_from_slice(&[1, 0, SIZE as u8, 0, links[0], 0, links[0], 0, links[1] % 8, 0, links[1] % 8, 0]);
            content[20..22].copy_from_slice(&[1, 1]);
            for (number, entry) in content[32..].chunks_exact_mut(32).take(SIZE.into()).enumerate() {
                entry[..8].copy_from_slice(&[links[2] & 1, 0, links[8 + number], 0, links[16 + number] % 8, 0, links[24 + number] % 4, 0]);
            }
        }
        let bench = Bench::new(&content);
        let mut tracker = bench.inflight().packed_queue(0, SIZE).unwrap();
        match tracker.recover(&bench.ring) {
            Ok(Found { at: Some((position, outstanding)), entries }) => {
                prop_assert!(position.index() < SIZE && outstanding <= SIZE);
                let unique: std::collections::BTreeSet<_> = entries.iter().copied().collect();
                prop_assert!(unique.len() == entries.len() && unique.iter().all(|entry| *entry < SIZE));
                for entry in entries {
                    let mut chain = tracker.chain(entry);
                    let mut buffer = chain.first();
                    while let Ok(found) = &buffer && found.flags.contains(DescFlags::NEXT) {
                        let found = *found;
                        buffer = chain.next(&found);
                    }
                    prop_assert!(chain.taken().count <= outstanding);
                }
            }
            Ok(Found { at: None, .. }) => prop_assert!(content[8..10] == [0, 0]),
            Err(Broken::Inflight(_)) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
