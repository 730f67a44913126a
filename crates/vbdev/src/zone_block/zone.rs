//! One zone: its state, its write pointer and how many writes are under way, as one atomic word.
//!
//! Reactors share zones without an owner. Every change is a step from one whole word to the next, made by compare-and-exchange: so of two
//! writes at the same write pointer one gets it and the other is refused, appends never overlap, and nobody sees a state without its pointer. A step
//! is a pure function of the word ([`Word`]).
//!
//! A reset has two steps, because the base forgets the data in between: `Resetting` refuses whatever would write, with a status that says "try again".
//! It does not begin while writes are under way: one that lands after the reset would lie under data that were written since.

use std::sync::atomic::{AtomicU64, Ordering};

use qpair_bdev::{Status, ZoneState};

const WRITTEN_BITS: u32 = 40;
const WRITES_BITS: u32 = 20;
/// Blocks of the largest zone.
pub(super) const CAPACITY_MAX: u64 = (1 << WRITTEN_BITS) - 1;
const WRITES_MAX: u64 = (1 << WRITES_BITS) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    Empty,
    Implicit,
    Explicit,
    Closed,
    Full,
    Resetting,
}

/// A zone at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) state: State,
    /// Blocks before the write pointer.
    pub(super) written: u64,
    /// Writes with the base.
    pub(super) writes: u64,
}

impl Word {
    fn pack(self) -> u64 {
        (self.state as u64) << (WRITTEN_BITS + WRITES_BITS) | self.writes << WRITTEN_BITS | self.written
    }

    fn unpack(packed: u64) -> Self {
        let state = match packed >> (WRITTEN_BITS + WRITES_BITS) {
            0 => State::Empty,
            1 => State::Implicit,
            2 => State::Explicit,
            3 => State::Closed,
            4 => State::Full,
            _ => State::Resetting,
        };
        Self { state, written: packed & CAPACITY_MAX, writes: packed >> WRITTEN_BITS & WRITES_MAX }
    }

    fn is_resetting(self) -> Result<Self, Status> {
        if self.state == State::Resetting { Err(Status::COMMAND_INTERRUPTED) } else { Ok(self) }
    }

    /// A write of `blocks` where the write pointer is, which must be `at` if that is said.
    pub(super) fn write(self, at: Option<u64>, blocks: u64, capacity: u64) -> Result<Self, Status> {
        let zone = self.is_resetting()?;
        if zone.state == State::Full {
            return Err(Status::ZONE_IS_FULL);
        }
        if at.is_some_and(|at| at != zone.written) {
            return Err(Status::ZONE_INVALID_WRITE);
        }
        if blocks > capacity - zone.written {
            return Err(Status::ZONE_BOUNDARY_ERROR);
        }
        if zone.writes == WRITES_MAX {
            return Err(Status::COMMAND_INTERRUPTED);
        }
        let written = zone.written + blocks;
        let state = match zone.state {
            _ if written == capacity => State::Full,
            State::Explicit => State::Explicit,
            _ => State::Implicit,
        };
        Ok(Self { state, written, writes: zone.writes + 1 })
    }

    fn end_write(self) -> Self {
        Self { writes: self.writes - 1, ..self }
    }

    pub(super) fn open(self) -> Result<Self, Status> {
        match self.is_resetting()?.state {
            State::Full => Err(Status::ZONE_INVALID_STATE_TRANSITION),
            _ => Ok(Self { state: State::Explicit, ..self }),
        }
    }

    pub(super) fn close(self) -> Result<Self, Status> {
        match self.is_resetting()?.state {
            State::Implicit | State::Explicit | State::Closed => Ok(Self { state: State::Closed, ..self }),
            _ => Err(Status::ZONE_INVALID_STATE_TRANSITION),
        }
    }

    pub(super) fn finish(self, capacity: u64) -> Result<Self, Status> {
        Ok(Self { state: State::Full, written: capacity, ..self.is_resetting()? })
    }

    /// An empty zone stays as it is; of any other the data go.
    pub(super) fn begin_reset(self) -> Result<Self, Status> {
        let zone = self.is_resetting()?;
        match zone.state {
            State::Empty => Ok(zone),
            _ if zone.writes > 0 => Err(Status::COMMAND_INTERRUPTED),
            _ => Ok(Self { state: State::Resetting, ..zone }),
        }
    }

    /// As a report says it. One that is being reset is still what it was, as far as can be told.
    pub(super) fn shown(self, capacity: u64) -> ZoneState {
        match self.state {
            State::Empty => ZoneState::Empty,
            State::Implicit => ZoneState::ImplicitlyOpen,
            State::Explicit => ZoneState::ExplicitlyOpen,
            State::Resetting if self.written < capacity => ZoneState::Closed,
            State::Closed => ZoneState::Closed,
            State::Full | State::Resetting => ZoneState::Full,
        }
    }
}

/// See the module's doc.
pub(super) struct Zone(AtomicU64);

impl Zone {
    /// Full: whatever the base holds can be read, and is gone only when somebody resets the zone.
    pub(super) fn full(capacity: u64) -> Self {
        Self(AtomicU64::new(Word { state: State::Full, written: capacity, writes: 0 }.pack()))
    }

    pub(super) fn now(&self) -> Word {
        Word::unpack(self.0.load(Ordering::Acquire))
    }

    /// Makes one step; the word before it, or why there is none.
    pub(super) fn step(&self, step: impl Fn(Word) -> Result<Word, Status>) -> Result<Word, Status> {
        let mut now = self.0.load(Ordering::Acquire);
        loop {
            let before = Word::unpack(now);
            let next = step(before)?.pack();
            match self.0.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(before),
                Err(other) => now = other,
            }
        }
    }

    /// A write that got its place by `step` is back.
    pub(super) fn end_write(&self) {
        let _ = self.step(|word| Ok(word.end_write()));
    }

    /// The base has forgotten the data.
    pub(super) fn end_reset(&self) {
        self.0.store(Word { state: State::Empty, written: 0, writes: 0 }.pack(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const EMPTY: Word = Word { state: State::Empty, written: 0, writes: 0 };

    #[test]
    fn a_word_is_what_was_packed() {
        for state in [State::Empty, State::Implicit, State::Explicit, State::Closed, State::Full, State::Resetting] {
            let word = Word { state, written: CAPACITY_MAX - 5, writes: WRITES_MAX - 7 };
            assert_eq!(Word::unpack(word.pack()), word);
        }
    }

    #[test]
    fn writes_go_where_the_write_pointer_is_and_fill_the_zone() {
        let first = EMPTY.write(Some(0), 3, 6).unwrap();
        assert_eq!(first, Word { state: State::Implicit, written: 3, writes: 1 });
        assert_eq!(first.write(Some(2), 1, 6), Err(Status::ZONE_INVALID_WRITE));
        assert_eq!(first.write(None, 4, 6), Err(Status::ZONE_BOUNDARY_ERROR));
        let full = first.write(None, 3, 6).unwrap();
        assert_eq!((full.state, full.written), (State::Full, 6));
        assert_eq!(full.write(None, 1, 6), Err(Status::ZONE_IS_FULL));
    }

    #[test]
    fn states_follow_what_is_asked_for() {
        let open = EMPTY.open().unwrap();
        assert_eq!(open.write(None, 1, 6).unwrap().state, State::Explicit);
        assert_eq!(open.close().unwrap().state, State::Closed);
        assert_eq!(open.close().unwrap().write(None, 1, 6).unwrap().state, State::Implicit);
        assert_eq!(EMPTY.close(), Err(Status::ZONE_INVALID_STATE_TRANSITION));
        let full = open.finish(6).unwrap();
        assert_eq!((full.state, full.written), (State::Full, 6));
        assert_eq!(full.open(), Err(Status::ZONE_INVALID_STATE_TRANSITION));
        assert_eq!(EMPTY.begin_reset(), Ok(EMPTY));
    }

    #[test]
    fn a_reset_waits_for_writes_and_lets_none_begin() {
        let writing = EMPTY.write(None, 2, 6).unwrap();
        assert_eq!(writing.begin_reset(), Err(Status::COMMAND_INTERRUPTED));
        let resetting = writing.end_write().begin_reset().unwrap();
        for refused in [resetting.write(None, 1, 6), resetting.open(), resetting.close(), resetting.finish(6), resetting.begin_reset()] {
            assert_eq!(refused, Err(Status::COMMAND_INTERRUPTED));
        }
        assert_eq!(resetting.shown(6), ZoneState::Closed);
    }

    #[test]
    fn appends_of_many_threads_never_overlap() {
        let zone = Arc::new(Zone::full(4000));
        zone.end_reset();
        let append = |zone: Arc<Zone>| move || (0..1000).map(|_| zone.step(|word| word.write(None, 1, 4000)).unwrap().written).collect();
        let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(append(zone.clone()))).collect();
        let mut places: Vec<u64> =
            threads.into_iter().flat_map(|thread: std::thread::JoinHandle<Vec<u64>>| thread.join().unwrap()).collect();
        places.sort_unstable();
        assert_eq!(places, (0..4000).collect::<Vec<_>>());
        assert_eq!(zone.now(), Word { state: State::Full, written: 4000, writes: 4000 });
        assert_eq!(zone.step(Word::begin_reset), Err(Status::COMMAND_INTERRUPTED));
        (0..4000).for_each(|_| zone.end_write());
        assert_eq!(zone.step(Word::begin_reset).map(|word| word.state), Ok(State::Full));
    }
}
