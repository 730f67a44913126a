//! Regions, lists, guest tables and shared windows: what is refused, and by which words.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use qpair_memory::{GuestMemory, GuestRegion, Mapping, MemoryError, Pages, Region, SgList, Sge, Shared, SharedIndex, copy_list};

fn region(length: usize) -> Region {
    Region::new(Mapping::anonymous(length, Pages::Normal).unwrap())
}

fn bytes<const N: usize>(region: &Region, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    region.read(offset, &mut bytes).unwrap();
    bytes
}

fn error<T>(result: Result<T, MemoryError>) -> String {
    result.err().expect("it is refused").to_string()
}

/// A memfd that may shrink.
fn memfd(length: u64) -> File {
    // SAFETY: the name is a C string, and nobody else owns the new descriptor.
    let file = unsafe { File::from(OwnedFd::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC))) };
    file.set_len(length).unwrap();
    file
}

#[test]
fn access_outside_a_region_is_refused_by_numbers() {
    let region = region(4096);
    assert_eq!(error(region.read(4090, &mut [0; 7])), "range 0xffa+0x7 leaves its region of 0x1000 bytes");
    assert_eq!(error(region.write(4097, &[])), "range 0x1001+0x0 leaves its region of 0x1000 bytes");
    assert_eq!(error(region.fill(u64::MAX, 2, 0)), "range 0xffffffffffffffff+0x2 leaves its region of 0x1000 bytes");
    assert_eq!(error(region.pointer(0, u64::MAX)), "range 0x0+0xffffffffffffffff leaves its region of 0x1000 bytes");
    assert_eq!(error(region.copy_from(0, &region, 1, 4096)), "range 0x1+0x1000 leaves its region of 0x1000 bytes");
    assert_eq!(error(region.release(4096, 1)), "range 0x1000+0x1 leaves its region of 0x1000 bytes");
    region.prefetch(4096, 1);
    region.write(4096, &[]).unwrap();
    region.write(4093, &[1, 2, 3]).unwrap();
    assert_eq!(bytes::<4>(&region, 4092), [0, 1, 2, 3]);
}

#[test]
fn a_mapping_lives_as_long_as_its_last_hold() {
    let mapping = Mapping::anonymous(4096, Pages::Normal).unwrap();
    let (weak, region) = (Arc::downgrade(&mapping), Region::new(mapping));
    let list: SgList = (0..3).map(|at| Sge { region: region.clone(), offset: at, length: 1 }).collect();
    assert_eq!(region.holds(), 4);
    drop(region);
    assert!(weak.upgrade().is_some(), "the list holds it");
    drop(list);
    assert!(weak.upgrade().is_none());
}

#[test]
fn transparent_hugepages_change_nothing_but_the_alignment() {
    for length in [4096, (2 << 20) - 1, 2 << 20, (2 << 20) + 5, 5 << 20] {
        let mapping = Mapping::anonymous(length, Pages::Transparent).unwrap();
        assert_eq!(mapping.len(), length);
        assert!(length < 2 << 20 || mapping.address().is_multiple_of(2 << 20));
        let region = Region::new(mapping);
        region.fill(0, length as u64, 0xee).unwrap();
        assert_eq!(bytes::<1>(&region, length as u64 - 1), [0xee]);
    }
}

#[test]
fn released_pages_read_as_zeros_and_their_neighbours_do_not() {
    let private = region(5 * 4096);
    let file = memfd(5 * 4096);
    let shared = Region::new(Mapping::shared(file.as_fd(), 5 * 4096).unwrap());
    let own = Region::new(Mapping::memfd("own", 5 * 4096).unwrap());
    for (name, region) in [("private", private), ("shared", shared), ("memfd", own)] {
        for (offset, length) in [(100, 3 * 4096), (4096, 4096), (4000, 200), (10, 5), (0, 5 * 4096), (7, 0)] {
            region.fill(0, 5 * 4096, 0xff).unwrap();
            region.release(offset, length).unwrap();
            let all = bytes::<{ 5 * 4096 }>(&region, 0);
            let right = |(at, byte): (usize, &u8)| *byte == if (offset..offset + length).contains(&(at as u64)) { 0 } else { 0xff };
            assert!(all.iter().enumerate().all(right), "{name}: {offset}+{length}");
        }
    }
    let mut seen = [1; 4096];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen[8..].iter().all(|byte| *byte == 0xff), "the last round released nothing, and the peer sees that");
}

#[test]
fn lists_copy_as_long_as_both_sides_last() {
    let (flat, other) = (region(4096), region(4096));
    flat.write(0, b"abcdefghij").unwrap();
    let piece = |offset, length| Sge { region: other.clone(), offset, length };
    let list = [piece(10, 3), piece(0, 4), piece(20, 0)];
    assert_eq!(copy_list(&list, &flat, 1, 100, true).unwrap(), 7);
    assert_eq!((&bytes::<3>(&other, 10), &bytes::<5>(&other, 0)), (b"bcd", b"efgh\0"));
    assert_eq!(copy_list(&list, &flat, 100, 5, false).unwrap(), 5);
    assert_eq!(&bytes::<6>(&flat, 100), b"bcdef\0");
    assert_eq!(error(copy_list(&[piece(4095, 2)], &flat, 0, 2, true)), "range 0xfff+0x2 leaves its region of 0x1000 bytes");
    region_overlap();
}

fn region_overlap() {
    let region = region(4096);
    region.write(0, b"12345").unwrap();
    region.copy_from(2, &region, 0, 5).unwrap();
    assert_eq!(&bytes::<7>(&region, 0), b"1212345");
}

fn row(guest_address: u64, user_address: u64, length: u64, offset: u64, region: &Region) -> GuestRegion {
    GuestRegion { guest_address, user_address, length, offset, region: region.clone() }
}

#[test]
fn a_table_that_makes_no_sense_is_refused() {
    let region = region(8192);
    let table = |rows: &[(u64, u64, u64, u64)]| {
        error(GuestMemory::new(rows.iter().map(|(guest, user, length, offset)| row(*guest, *user, *length, *offset, &region)).collect()))
    };
    assert_eq!(table(&[(0, 0, 4096, 0), (4096, 0, 0, 0)]), "memory region 1: its size is 0");
    assert_eq!(table(&[(u64::MAX - 4095, 0, 4097, 0)]), "memory region 0: its guest addresses wrap");
    assert_eq!(table(&[(0, u64::MAX - 4095, 4097, 0)]), "memory region 0: its user addresses wrap");
    assert_eq!(table(&[(0, 0, 4097, 4096)]), "range 0x1000+0x1001 leaves its region of 0x2000 bytes");
    assert_eq!(table(&[(0, 0, 1, u64::MAX)]), "range 0xffffffffffffffff+0x1 leaves its region of 0x2000 bytes");
    assert_eq!(table(&[(4096, 0, 4096, 0), (0, 0, 4097, 0)]), "memory region 1: it overlaps the one before it");
}

#[test]
fn guest_ranges_resolve_across_adjoining_rows_and_nowhere_else() {
    let (low, high) = (region(8192), region(4096));
    let rows =
        vec![row(0x3000, 0x9000, 0x1000, 0, &high), row(0x1000, 0x70_0000, 0x2000, 0, &low), row(0x8000, 0x80_0000, 0x800, 0x800, &low)];
    let memory = GuestMemory::new(rows).unwrap();
    let mut list = SgList::new();
    memory.resolve(0x2ff0, 0x20, &mut list).unwrap();
    let pieces: Vec<_> = list.iter().map(|entry| (entry.region.len(), entry.offset, entry.length)).collect();
    assert_eq!(pieces, [(8192, 0x1ff0, 0x10), (4096, 0, 0x10)]);
    for (address, length) in [(0x3ff0, 0x11), (0xfff, 1), (0x0, 0x2000), (0x8800, 1), (u64::MAX, 2), (0x1000, u32::MAX)] {
        let said = error(memory.resolve(address, length, &mut list));
        assert_eq!(said, format!("address {address:#x}+{length:#x} is in no memory region"));
        assert_eq!(list.len(), 2, "a refused range leaves the list as it was");
    }
    let (region, offset) = memory.find(0x8010, 0x7f0).unwrap();
    assert_eq!((region.len(), offset), (8192, 0x810));
    assert_eq!(error(memory.find(0x2ff0, 0x20).map(|_| ())), "address 0x2ff0+0x20 is in no memory region");
    assert_eq!(memory.find_user(0x9ff0, 0x10).unwrap().1, 0xff0);
    assert_eq!(error(memory.find_user(0x9ff0, 0x11).map(|_| ())), "address 0x9ff0+0x11 is in no memory region");
    assert_eq!(error(memory.find_user(0x70_0000, u64::MAX).map(|_| ())), "address 0x700000+0xffffffffffffffff is in no memory region");
}

#[test]
fn a_table_may_reach_the_last_address() {
    let last = region(4096);
    let memory = GuestMemory::new(vec![row(u64::MAX - 4096, u64::MAX - 4096, 4096, 0, &last)]).unwrap();
    let mut list = SgList::new();
    memory.resolve(u64::MAX - 1, 1, &mut list).unwrap();
    assert_eq!(list[0].offset, 4095);
    assert_eq!(error(memory.resolve(u64::MAX - 1, 2, &mut list)), "address 0xfffffffffffffffe+0x2 is in no memory region");
}

#[test]
fn windows_are_checked_when_made() {
    let region = region(4096);
    let window = Shared::<u64>::new(&region, 8, 511).unwrap();
    window.store(510, 0x0123_4567_89ab_cdef);
    assert_eq!((window.load(510), window.load(0), window.count()), (0x0123_4567_89ab_cdef, 0, 511));
    assert_eq!(bytes::<8>(&region, 4088), 0x0123_4567_89ab_cdef_u64.to_ne_bytes());
    window.prefetch(511);
    assert_eq!(error(Shared::<u64>::new(&region, 8, 512)), "range 0x8+0x1000 leaves its region of 0x1000 bytes");
    assert_eq!(error(Shared::<u64>::new(&region, 0, usize::MAX)), "range 0x0+0xffffffffffffffff leaves its region of 0x1000 bytes");
    assert_eq!(error(Shared::<u64>::new(&region, 4, 1)), "address 0x4 is not a multiple of 8");
    assert_eq!(error(SharedIndex::new(&region, 1)), "address 0x1 is not a multiple of 2");
    assert_eq!(error(SharedIndex::new(&region, 4095)), "range 0xfff+0x2 leaves its region of 0x1000 bytes");
    let index = SharedIndex::new(&region, 2).unwrap();
    index.store(0x1234, Ordering::Release);
    assert_eq!((index.load(Ordering::Acquire), bytes::<2>(&region, 2)), (0x1234, 0x1234_u16.to_le_bytes()));
}

#[test]
fn a_window_of_numbers_is_also_one_of_atomics() {
    let region = region(4096);
    let words = Shared::<u64>::new(&region, 8, 4).unwrap();
    words.store_atomic(3, 0x0123_4567_89ab_cdef, Ordering::Release);
    assert_eq!((words.load_atomic(3, Ordering::Acquire), words.load_atomic(2, Ordering::Relaxed)), (0x0123_4567_89ab_cdef, 0));
    assert_eq!(bytes::<8>(&region, 32), 0x0123_4567_89ab_cdef_u64.to_le_bytes());
    let halves = Shared::<u16>::new(&region, 32, 4).unwrap();
    assert_eq!(halves.load_atomic(0, Ordering::Acquire), 0xcdef);
    Shared::<u32>::new(&region, 32, 2).unwrap().store_atomic(1, 7, Ordering::Release);
    assert_eq!(words.load_atomic(3, Ordering::Acquire), 0x7_89ab_cdef);
}

#[test]
#[should_panic(expected = "index 4 of a window of 4")]
fn an_atomic_outside_its_window_panics() {
    Shared::<u64>::new(&region(4096), 0, 4).unwrap().store_atomic(4, 0, Ordering::Release);
}

#[test]
#[should_panic(expected = "index 4 of a window of 4")]
fn an_index_outside_its_window_panics() {
    Shared::<u32>::new(&region(4096), 0, 4).unwrap().load(4);
}

#[test]
fn somebody_elses_memory_is_mapped_as_far_as_it_goes() {
    let file = memfd(10_000);
    assert_eq!(error(Mapping::shared(file.as_fd(), 0)), "range 0x0+0x0 leaves its region of 0x7fffffffffffefff bytes");
    assert_eq!(
        error(Mapping::shared(file.as_fd(), u64::MAX)),
        "range 0x0+0xffffffffffffffff leaves its region of 0x7fffffffffffefff bytes"
    );
    assert_eq!(error(Mapping::shared(file.as_fd(), 12_289)), "range 0x0+0x3001 leaves its region of 0x2710 bytes");
    let region = Region::new(Mapping::shared(file.as_fd(), 10_000).unwrap());
    file.write_all_at(b"hello", 9_000).unwrap();
    assert_eq!(&bytes::<5>(&region, 9_000), b"hello");
    region.write(0, b"back").unwrap();
    let mut seen = [0; 4];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"back");
}

#[test]
fn a_memfd_of_ours_cannot_be_shrunk() {
    let mapping = Mapping::memfd("a\0b", 8192).unwrap();
    let file = File::from(mapping.fd().unwrap().try_clone_to_owned().unwrap());
    assert_eq!(file.set_len(4096).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert!(!mapping.is_dead());
}

#[test]
fn memory_that_shrinks_under_us_reads_as_zeros_and_is_dead() {
    let (file, other) = (memfd(64 << 10), memfd(8192));
    let region = Region::new(Mapping::shared(file.as_fd(), 64 << 10).unwrap());
    let innocent = Region::new(Mapping::shared(other.as_fd(), 8192).unwrap());
    region.fill(0, 64 << 10, 0x55).unwrap();
    innocent.fill(0, 8192, 0x66).unwrap();
    let memory = GuestMemory::new(vec![row(0, 0, 64 << 10, 0, &region)]).unwrap();
    let index = SharedIndex::new(&region, 40 << 10).unwrap();
    file.set_len(4096).unwrap();
    assert!(!region.is_dead() && !memory.is_dead(), "nobody has noticed yet");
    assert_eq!(index.load(Ordering::Acquire), 0);
    assert!(region.is_dead() && memory.is_dead());
    assert_eq!(bytes::<4>(&region, 0), [0; 4], "all of it is replaced");
    region.fill(0, 64 << 10, 0x77).unwrap();
    assert_eq!(bytes::<4>(&region, 60 << 10), [0x77; 4], "and may be touched without harm");
    assert_eq!((innocent.is_dead(), bytes::<4>(&innocent, 4096)), (false, [0x66; 4]));
    let mut seen = [0; 4];
    file.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [0x55; 4], "the file is out of our hands");
}

#[test]
fn threads_that_fault_together_all_go_on() {
    let file = memfd(1 << 20);
    let mapping = Mapping::shared(file.as_fd(), 1 << 20).unwrap();
    file.set_len(0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mapping = mapping.clone();
            scope.spawn(move || {
                let region = Region::new(mapping);
                for page in 0..64 {
                    assert_eq!(bytes::<1>(&region, ((page * 4 + thread) * 4096) as u64), [0]);
                }
            });
        }
    });
    assert!(mapping.is_dead());
}
