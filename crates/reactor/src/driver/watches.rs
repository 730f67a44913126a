//! The watches of one driver, by id. An id names its place and the generation of that place, so that a stale one
//! names nothing.

use super::{PollerId, WatchId};
use crate::event::Event;

const INDEX_BITS: u32 = 20;
const INDEX_MASK: u32 = (1 << INDEX_BITS) - 1;

/// One watched event.
pub(super) struct Watch {
    /// The driver's own handle.
    pub event: Event,
    pub poller: PollerId,
    /// Unwatched; the place is kept until the kernel has said its last word on it.
    pub ending: bool,
}

#[derive(Default)]
struct Place {
    generation: u32,
    watch: Option<Watch>,
}

#[derive(Default)]
pub(super) struct Watches {
    places: Vec<Place>,
    free: Vec<u32>,
}

impl Watches {
    pub fn is_empty(&self) -> bool {
        self.places.len() == self.free.len()
    }

    /// None: 2^20 are there already.
    pub fn insert(&mut self, event: Event, poller: PollerId) -> Option<WatchId> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.places.len() as u32 > INDEX_MASK => return None,
            None => {
                self.places.push(Place::default());
                (self.places.len() - 1) as u32
            }
        };
        let place = &mut self.places[index as usize];
        place.watch = Some(Watch { event, poller, ending: false });
        Some(WatchId(place.generation << INDEX_BITS | index))
    }

    #[inline]
    pub fn get_mut(&mut self, id: WatchId) -> Option<&mut Watch> {
        let place = self.places.get_mut((id.0 & INDEX_MASK) as usize)?;
        if place.generation != id.0 >> INDEX_BITS { None } else { place.watch.as_mut() }
    }

    /// Gives the place free.
    pub fn remove(&mut self, id: WatchId) -> Option<Watch> {
        self.get_mut(id)?;
        let place = &mut self.places[(id.0 & INDEX_MASK) as usize];
        place.generation = (place.generation + 1) & (u32::MAX >> INDEX_BITS);
        self.free.push(id.0 & INDEX_MASK);
        place.watch.take()
    }
}
