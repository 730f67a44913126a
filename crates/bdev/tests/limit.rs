//! The arithmetic of shared rates.

use qpair_bdev::limit::{Grant, Limiter, NEWS_NS, Pace, Rates, UNITS_MAX};

const SECOND_NS: u64 = 1_000_000_000;

fn pace(per_second: u64) -> Pace {
    Pace::new(per_second).unwrap()
}

#[test]
fn places_in_line_are_one_unit_of_time_apart() {
    let pace = pace(300);
    let now = 5 * SECOND_NS;
    let from: Vec<u64> = (0..5).map(|_| pace.take(1, now, now).from_ns - now).collect();
    assert_eq!(from, [0, 0, 3_333_334, 6_666_667, 10_000_000]);
}

#[test]
fn a_large_one_starts_at_its_place_and_those_behind_wait_until_it_is_paid() {
    let pace = pace(1024);
    let now = 5 * SECOND_NS;
    pace.take(2, now, now);
    assert_eq!(pace.take(1024, now, now), Grant { units: 1024, from_ns: now, place_ns: now });
    assert_eq!(pace.take(1, now, now), Grant { units: 1, from_ns: now + SECOND_NS, place_ns: now + SECOND_NS });
}

#[test]
fn what_is_not_used_is_lost_but_for_a_millisecond() {
    let pace = pace(1_000_000);
    let now = 15 * SECOND_NS;
    assert_eq!(pace.take_now(1001, now, now), None);
    assert_eq!(pace.take_now(1000, now, now).map(|grant| grant.units), Some(1000));
    assert_eq!(pace.take_now(1, now, now), None);
}

#[test]
fn one_who_waited_loses_nothing_for_being_late() {
    let late = pace(1_000_000);
    let since = 15 * SECOND_NS;
    late.take(1001, since, since);
    let now = since + 10_000_000;
    let grants = (0..11_000).filter(|_| late.take(1, now, since).from_ns == now).count();
    assert_eq!(grants, 10_000, "ten milliseconds");
    let never = pace(1_000_000);
    let grants = (0..150_000).filter(|_| never.take(1, now, 0).from_ns == now).count();
    assert_eq!(grants, 100_001, "as far as one may be late");
}

#[test]
fn plenty_is_lent_by_the_slice() {
    let pace = pace(10_000_000);
    let now = 15 * SECOND_NS;
    assert_eq!(pace.take_now(100, now, now).map(|grant| grant.units), Some(1100));
    assert_eq!(pace.take_now(8000, now, now).map(|grant| grant.units), Some(8000));
    assert_eq!(pace.take_now(901, now, now), None);
    pace.give_back(1);
    assert_eq!(pace.take_now(901, now, now).map(|grant| grant.units), Some(901));
}

#[test]
fn a_rate_beyond_all_measure_is_none() {
    assert!(Pace::new(0).is_none() && Pace::new(UNITS_MAX + 1).is_none());
    let pace = pace(UNITS_MAX);
    let years = 86_400 * 365 * 100 * SECOND_NS;
    assert_eq!(pace.take(1, years, years).from_ns, years);
}

#[test]
fn holding_back_is_news_once() {
    let limiter = Limiter::new(Rates { rw_ios: 1000, ..Rates::default() });
    let now = 5 * SECOND_NS;
    let news: Vec<bool> = [0, 1, NEWS_NS, 2 * NEWS_NS + 1].map(|after| limiter.holds_back(now + after)).to_vec();
    assert_eq!(news, [true, false, false, true]);
}
