//! rust-vmm's `virtio-queue` as a second opinion: chains that its mock driver builds mean the same to it and to us.

use proptest::prelude::*;
use qpair_memory::{GuestMemory, GuestRegion, Mapping, Pages, Region, SgList};
use qpair_vhost::request;
use qpair_vhost::ring::Ring;
use qpair_vhost::{Addresses, Broken, SplitRing};
use qpair_wire::virtio::RingSize;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

const BYTES: usize = 256 << 10;
const DATA: u64 = 128 << 10;
const TABLE: u64 = DATA - 4096;
/// The mock leaves too little room for the avail ring; the used ring is not what is looked at here.
const USED: u64 = 0x8000;
const ENTRIES: u16 = 16;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A buffer: address, length, whether the device writes it.
type Buffer = (u64, u32, bool);

fn buffers() -> impl Strategy<Value = Vec<Buffer>> {
    let buffer = || (DATA..BYTES as u64 - 8192, prop_oneof![1..20u32, 1..8000u32]);
    (prop::collection::vec(buffer(), 0..7), prop::collection::vec(buffer(), 0..7)).prop_map(|(reads, writes)| {
        reads.into_iter().map(|(at, length)| (at, length, false)).chain(writes.into_iter().map(|(at, length)| (at, length, true))).collect()
    })
}

/// Single bytes, so that the cut does not matter; few enough to compare.
fn flat(buffers: impl IntoIterator<Item = (u64, u32)>) -> Vec<u64> {
    buffers.into_iter().flat_map(|(at, length)| at..at + u64::from(length)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn both_see_the_same_buffers_in_any_chain(buffers in buffers(), direct in 0..16usize, noise in any::<u64>()) {
        prop_assume!(!buffers.is_empty());
        let guest: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), BYTES)]).unwrap();
        for at in (DATA..BYTES as u64).step_by(8) {
            guest.write_obj(noise.wrapping_mul(at | 1), GuestAddress(at)).unwrap();
        }
        let queue = MockSplitQueue::new(&guest, ENTRIES);
        let raw = |(at, length, write): &Buffer| Descriptor::new(*at, *length, if *write { WRITE } else { 0 }, 0);
        let (ring, table) = buffers.split_at(direct.min(buffers.len()));
        let mut chain: Vec<RawDescriptor> = ring.iter().map(|buffer| raw(buffer).into()).collect();
        for (index, buffer) in table.iter().enumerate() {
            let last = index + 1 == table.len();
            let desc = raw(buffer);
            let desc = Descriptor::new(desc.addr().0, desc.len(), desc.flags() | u16::from(!last), if last { 0 } else { index as u16 + 1 });
            guest.write_obj(desc, GuestAddress(TABLE + 16 * index as u64)).unwrap();
        }
        if !table.is_empty() {
            chain.push(Descriptor::new(TABLE, 16 * table.len() as u32, INDIRECT, 0).into());
        }
        let theirs: Vec<Buffer> = queue.build_desc_chain(&chain).unwrap().map(|desc| (desc.addr().0, desc.len(), desc.is_write_only())).collect();
        prop_assert_eq!(&theirs, &buffers, "the oracle itself");

        let mapping = Mapping::anonymous(BYTES, Pages::Normal).unwrap();
        let mut content = vec![0; BYTES];
        guest.read_slice(&mut content, GuestAddress(0)).unwrap();
        let region = Region::new(mapping);
        region.write(0, &content).unwrap();
        let row = GuestRegion { guest_address: 0, user_address: 0, length: BYTES as u64, offset: 0, region };
        let memory = GuestMemory::new(vec![row]).unwrap();
        let addresses = Addresses { desc: queue.desc_table_addr().0, avail: queue.avail_addr().0, used: USED, log: None };
        let ours = SplitRing::new(&memory, RingSize::new(ENTRIES.into()).unwrap(), addresses, 0, false).unwrap();
        prop_assert_eq!(ours.waiting(), Ok(1));

        let reads = flat(theirs.iter().filter(|buffer| !buffer.2).map(|buffer| (buffer.0, buffer.1)));
        let writes = flat(theirs.iter().filter(|buffer| buffer.2).map(|buffer| (buffer.0, buffer.1)));
        let mut data = SgList::new();
        match request::parse(&mut ours.chain(), &memory, true, &mut data) {
            Ok(request) => {
                let header: Vec<u8> = reads[..16].iter().map(|at| content[*at as usize]).collect();
                prop_assert_eq!(request.header.as_bytes(), header);
                let (status, room) = writes.split_last().unwrap();
                prop_assert_eq!(memory.at(request.status).1, *status);
                prop_assert_eq!((request.readable, request.writable), (reads.len() as u64 - 16, room.len() as u64));
                let seen = flat(data.iter().map(|entry| (entry.offset, entry.length)));
                prop_assert_eq!(seen, [&reads[16..], room].concat());
            }
            Err(Broken::TooShort { what: "the header", bytes, .. }) => prop_assert_eq!(bytes, reads.len() as u64),
            Err(Broken::TooShort { .. }) => prop_assert!(reads.len() >= 16 && writes.is_empty()),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
