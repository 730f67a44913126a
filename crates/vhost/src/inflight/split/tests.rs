//! Regions that are fresh, honest, torn or lying.

use proptest::prelude::*;

use super::*;
use crate::inflight::Inflight;
use qpair_memory::Mapping;
use qpair_wire::vhost_user::inflight_region_bytes;

const SIZE: u16 = 8;

fn region(bytes: &[u8]) -> (Inflight, Region) {
    let mapping = Mapping::memfd("inflight", bytes.len()).unwrap();
    let region = Region::new(mapping.clone());
    region.write(0, bytes).unwrap();
    (Inflight { mapping, offset: 0, num_queues: 1, queue_size: SIZE }, region)
}

fn bytes() -> usize {
    inflight_region_bytes(1, SIZE) as usize
}

fn fresh() -> (Inflight, SplitTracker) {
    let (inflight, _) = region(&vec![0; bytes()]);
    let mut queue = inflight.queue(0, SIZE).unwrap();
    assert_eq!(queue.recover(40), Ok(Recovered { used_before: false, heads: vec![] }));
    (inflight, queue)
}

fn recovered(inflight: &Inflight, ring_used: u16) -> Vec<u16> {
    let recovered = inflight.queue(0, SIZE).unwrap().recover(ring_used).unwrap();
    assert!(recovered.used_before);
    recovered.heads
}

fn refusal(inflight: &Inflight, ring_used: u16) -> String {
    inflight.queue(0, SIZE).unwrap().recover(ring_used).unwrap_err().to_string()
}

#[test]
fn marked_requests_come_back_oldest_first() {
    let (inflight, mut queue) = fresh();
    [5, 1, 7, 0].iter().for_each(|head| queue.note(*head));
    assert_eq!(recovered(&inflight, 40), [5, 1, 7, 0]);
    let mut successor = inflight.queue(0, SIZE).unwrap();
    assert_eq!(successor.recover(40).unwrap().heads, [5, 1, 7, 0], "looking changes nothing");
    successor.note(3);
    assert_eq!(recovered(&inflight, 40), [5, 1, 7, 0, 3], "the counter goes on");
}

#[test]
fn a_batch_is_answered_from_the_moment_the_used_index_shows_it() {
    let (inflight, mut queue) = fresh();
    [5, 1, 7].iter().for_each(|head| queue.note(*head));
    queue.link(1);
    queue.link(7);
    let before = inflight_copy(&inflight);
    assert_eq!(recovered(&before, 40), [5, 1, 7], "not shown to the driver");
    let between = inflight_copy(&inflight);
    assert_eq!(recovered(&between, 42), [5], "shown, and the marks still on");
    queue.forget_batch(42);
    assert_eq!(recovered(&inflight, 42), [5]);
}

fn inflight_copy(inflight: &Inflight) -> Inflight {
    let mut content = vec![0; bytes()];
    Region::new(inflight.mapping.clone()).read(0, &mut content).unwrap();
    region(&content).0
}

#[test]
fn a_region_that_contradicts_itself_is_refused_by_name() {
    let (inflight, mut queue) = fresh();
    queue.note(2);
    queue.link(2);
    let region = Region::new(inflight.mapping.clone());
    let lie = |at: u64, value: u16| region.write(at, &value.to_le_bytes()).unwrap();
    assert_eq!(refusal(&inflight, 49), "inflight region: its used index is 9 behind a ring of 8");
    assert_eq!(refusal(&inflight, 39), "inflight region: its used index is 65535 behind a ring of 8");
    lie(INFLIGHT_LAST_BATCH_HEAD_OFFSET, 8);
    assert_eq!(refusal(&inflight, 41), "inflight region: the last batch names descriptor 8 of 8");
    lie(INFLIGHT_DESC_NUM_OFFSET, 16);
    assert_eq!(refusal(&inflight, 41), "inflight region: desc_num 16, the ring has 8");
    lie(INFLIGHT_VERSION_OFFSET, 2);
    assert_eq!(refusal(&inflight, 41), "inflight region: version 2, only 1 is known");
    let fits = |index, size| inflight.queue(index, size).unwrap_err().to_string();
    assert_eq!(fits(1, 8), "inflight region: queue 1 of 8 entries does not fit a region of 1 queues of 8");
    assert_eq!(fits(0, 16), "inflight region: queue 0 of 16 entries does not fit a region of 1 queues of 8");
}

#[test]
fn a_batch_linked_in_a_circle_ends() {
    let (inflight, mut queue) = fresh();
    queue.note(2);
    let region = Region::new(inflight.mapping.clone());
    let entry = inflight_desc_offset(0, SIZE, 2);
    region.write(entry, &(MARK | 2 << LINK_SHIFT).to_le_bytes()).unwrap();
    region.write(INFLIGHT_LAST_BATCH_HEAD_OFFSET, &2u16.to_le_bytes()).unwrap();
    assert_eq!(recovered(&inflight, 48), [] as [u16; 0]);
}

#[test]
fn a_region_is_adopted_only_if_it_holds_what_it_says() {
    let mapping = Mapping::memfd("inflight", 8192).unwrap();
    let fd = mapping.fd().unwrap().try_clone_to_owned().unwrap();
    let text =
        |size, offset, queues, entries| Inflight::adopt(&fd, size, offset, queues, entries, false).err().map(|error| error.to_string());
    assert_eq!(text(8192, 0, 1, 64), None);
    let small = inflight_region_bytes(1, 64) - 1;
    assert_eq!(
        text(small, 0, 1, 64),
        Some(format!("Invalid argument: inflight mmap_size {small}: at least {} for 1 queues of 64", small + 1))
    );
    assert_eq!(text(8192, u64::MAX, 1, 64), Some(format!("Invalid argument: inflight mmap_offset {}: offset + size below 2^64", u64::MAX)));
    assert_eq!(text(1 << 32, 0, 1, 64), Some("range 0x0+0x100000000 leaves its region of 0x2000 bytes".to_owned()));
    assert_eq!(text(8192, 4096, 1, 64), Some("range 0x0+0x3000 leaves its region of 0x2000 bytes".to_owned()));
    assert_eq!(text(8192, 0, 0, 64), Some("Invalid argument: inflight num_queues 0: 1 to 256".to_owned()));
    assert_eq!(text(8192, 0, 1, 63), None, "a machine may ask for rings that firmware will not have");
    assert_eq!(text(8192, 0, 1, 0), Some("Invalid argument: inflight queue_size 0: 1 to 32768".to_owned()));
    let odd = Inflight::adopt(&fd, 4096, 3, 1, 64, false).unwrap();
    assert!(matches!(odd.queue(0, 64), Err(Broken::Inflight(_))), "an odd offset");
}

proptest! {
    #[test]
    fn whatever_the_region_holds_recovery_ends_and_names_each_head_once(
        mut content in prop::collection::vec(any::<u8>(), bytes()), used in any::<u16>(), near in 0..12u16, honest in any::<bool>()
    ) {
        if honest {
            // Else nearly all of it is refused for its version.
            let at = |offset: u64| offset as usize..offset as usize + 2;
            content[at(INFLIGHT_VERSION_OFFSET)].copy_from_slice(&INFLIGHT_VERSION.to_le_bytes());
            content[at(INFLIGHT_DESC_NUM_OFFSET)].copy_from_slice(&SIZE.to_le_bytes());
            content[at(INFLIGHT_USED_IDX_OFFSET)].copy_from_slice(&used.wrapping_sub(near).to_le_bytes());
            content[INFLIGHT_LAST_BATCH_HEAD_OFFSET as usize + 1] = 0;
        }
        let (inflight, _) = region(&content);
        match inflight.queue(0, SIZE).unwrap().recover(used) {
            Ok(found) => {
                let unique: std::collections::BTreeSet<_> = found.heads.iter().copied().collect();
                prop_assert!(unique.len() == found.heads.len() && unique.iter().all(|head| *head < SIZE));
            }
            Err(Broken::Inflight(_)) => {}
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
