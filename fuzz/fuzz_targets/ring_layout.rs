//! Split rings of any size at any address: a layout that is given out is aligned, in order and inside 2^64, every entry lies in its
//! own area, and the event rule agrees with its definition spelled out.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use qpair_wire::virtio::{Desc, RingSize, UsedElem, need_event};

#[derive(Arbitrary, Debug)]
struct Input {
    entries: u32,
    base: u64,
    align: u64,
    index: u16,
    event: u16,
    advance: u16,
}

fuzz_target!(|input: Input| {
    event_rule(input.event, input.index, input.advance);
    let Some(size) = RingSize::new(input.entries) else {
        assert!(!input.entries.is_power_of_two() || input.entries > 32768);
        return;
    };
    let entries = u64::from(size.get());
    assert_eq!(entries, u64::from(input.entries));
    assert_eq!(u64::from(size.slot(input.index)), u64::from(input.index) % entries);

    let avail = size.avail_entry_offset(input.index);
    assert!(avail >= 4 && avail + 2 <= size.used_event_offset());
    assert!(size.used_event_offset() + 2 <= size.avail_bytes(true));
    let used = size.used_entry_offset(input.index);
    assert!(used >= 4 && used + size_of::<UsedElem>() as u64 <= size.avail_event_offset());
    assert!(size.avail_event_offset() + 2 <= size.used_bytes(true));
    let desc = size.desc_offset(size.slot(input.index));
    assert!(desc + size_of::<Desc>() as u64 <= size.desc_bytes());

    if let Some(layout) = size.layout(input.base, input.align) {
        assert_eq!(layout.desc, input.base);
        assert!(layout.desc % 16 == 0 && layout.avail % 2 == 0 && layout.used % input.align == 0 && input.align >= 4);
        assert_eq!(layout.avail - layout.desc, size.desc_bytes());
        assert!(layout.used - layout.avail >= size.avail_bytes(true));
        assert_eq!(layout.end - layout.used, size.used_bytes(true));
    }
});

/// Virtio 1.2, 2.7.7.1 by walking every index that was passed.
fn event_rule(event: u16, old: u16, advance: u16) {
    let new = old.wrapping_add(advance);
    let passed = (0..advance).any(|step| old.wrapping_add(step) == event);
    assert_eq!(need_event(event, new, old), passed, "event {event}, {old} -> {new}");
}
