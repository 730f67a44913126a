//! Time as reactors see it: nanoseconds since some start, real or virtual.

use std::cell::Cell;
use std::rc::Rc;

/// Where a reactor's time comes from.
#[derive(Clone, Debug)]
pub enum Clock {
    /// CLOCK_MONOTONIC.
    Monotonic,
    /// The simulator's hand, shared by all its reactors.
    Virtual(Rc<Cell<u64>>),
}

impl Clock {
    /// Nanoseconds. Reactors call this once a turn and keep the answer.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        match self {
            Self::Monotonic => monotonic_ns(),
            Self::Virtual(now) => now.get(),
        }
    }
}

fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place to write to; the call (vdso) has no other precondition.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
}
