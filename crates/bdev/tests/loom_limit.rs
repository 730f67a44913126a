//! Model check of the shared rate: in every interleaving no unit is given out twice, and none is lost.
//!
//! `limit.rs` is compiled here once more, over loom's atomics.

#[path = "../src/limit.rs"]
#[allow(dead_code)]
mod limit;
mod sync {
    pub(crate) use loom::sync::atomic;
}

use limit::{Grant, Pace};
use loom::sync::Arc;
use loom::thread;

const NOW: u64 = 1_000_000_000;

/// One unit a millisecond; the places that threads got, as milliseconds from now.
fn places(grants: impl IntoIterator<Item = Grant>) -> Vec<u64> {
    let mut places: Vec<u64> = grants.into_iter().map(|grant| (grant.from_ns - NOW) / 1_000_000).collect();
    places.sort_unstable();
    places
}

#[test]
fn each_place_in_line_is_given_once() {
    loom::model(|| {
        // One unit of the millisecond before is left, and that of now.
        let pace = Arc::new(Pace::new(1000).unwrap());
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let pace = pace.clone();
                thread::spawn(move || pace.take(1, NOW, NOW))
            })
            .collect();
        let own = pace.take(1, NOW, NOW);
        let others = threads.into_iter().map(|thread| thread.join().unwrap());
        assert_eq!(places(others.chain([own])), [0, 0, 1]);
    });
}

#[test]
fn what_is_given_back_is_given_again() {
    loom::model(|| {
        let pace = Arc::new(Pace::new(1000).unwrap());
        // One unit of before is left.
        let there = pace.clone();
        let other = thread::spawn(move || {
            let got = there.take_now(1, NOW, NOW);
            got.into_iter().for_each(|grant| there.give_back(grant.units));
            got.is_some()
        });
        let own = pace.take_now(1, NOW, NOW).is_some();
        let theirs = other.join().unwrap();
        assert!(own || theirs, "neither got the unit that was there");
        assert_eq!(pace.take_now(1, NOW, NOW).is_some(), !own, "the unit is there unless this thread kept it");
        assert!(pace.take_now(1, NOW, NOW).is_none());
    });
}
