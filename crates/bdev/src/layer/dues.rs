//! What a channel owes for its I/O: rates that it shares with others ([`crate::limit`]), and its credit of each.
//!
//! A channel pays out of *credit*: units that it took from a rate and has not used. Where there is plenty it takes a slice more than it needs, so that
//! most batches touch nothing shared; what it did not use within a millisecond it gives back. Where there is not, an I/O that cannot be paid takes
//! its place in line, for itself and for what waits behind it (a slice at most).
//!
//! Rates that one I/O has to be paid for at once are a [`Line`]: while it waits for one of them, its credit of the others is kept.
//!
//! **Late reactors.** A line that waited and comes late may take its part of what was missed meanwhile (`left`), and does so although it has no more
//! waiting than its front end has I/Os: when they are done and come again within [`RESUME_NS`], it goes on where it was. It never takes more than
//! the rate allowed since its last place.

use std::sync::Arc;

use crate::limit::{BURST_NS, Limiter, Pace, RESUME_NS, Rates};

/// What I/Os cost.
#[derive(Clone, Copy, Default)]
pub(super) struct Cost {
    pub(super) ios: u64,
    pub(super) units: u64,
}

/// Which limit holds an I/O back, and until when.
pub(super) struct Late {
    pub(super) due_ns: u64,
    pub(super) limiter: Arc<Limiter>,
    pub(super) kind: usize,
    /// Its number in the line.
    at: usize,
}

/// One rate, and a channel's credit of it.
pub(super) struct Due {
    pub(super) limiter: Arc<Limiter>,
    pub(super) kind: usize,
    pace: Arc<Pace>,
    units: u64,
    from_ns: u64,
    /// The time of the last place in line.
    place_ns: u64,
    /// What may be taken in this turn.
    left: u64,
}

impl Drop for Due {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Due {
    /// None: there is no such limit.
    pub(super) fn new(limiter: &Arc<Limiter>, kind: usize) -> Option<Self> {
        let pace = limiter.pace(kind)?.clone();
        Some(Self { limiter: limiter.clone(), kind, pace, units: 0, from_ns: 0, place_ns: 0, left: 0 })
    }

    #[inline]
    fn need(&self, cost: Cost) -> u64 {
        if Rates::counts_ios(self.kind) { cost.ios } else { cost.units }
    }

    fn give_back(&mut self) {
        if self.units > 0 {
            self.pace.give_back(std::mem::take(&mut self.units));
        }
    }

    /// Gives back what was not used in time.
    fn expire(&mut self, now_ns: u64) {
        if now_ns > self.from_ns.saturating_add(BURST_NS) {
            self.give_back();
        }
    }

    #[inline]
    fn covers(&self, need: u64, now_ns: u64) -> bool {
        self.units >= need && self.from_ns <= now_ns && now_ns - self.from_ns <= BURST_NS
    }

    /// From when on nothing is lost of what this one may take: `since_ns`, if it has wanted more since then.
    fn since(&self, since_ns: Option<u64>, now_ns: u64) -> u64 {
        let wanted = since_ns.is_some_and(|since_ns| self.place_ns >= since_ns);
        if wanted { self.place_ns } else { now_ns }
    }

    #[cold]
    fn refill(&mut self, need: u64, resumes: Option<u64>, now_ns: u64) -> bool {
        self.expire(now_ns);
        if self.units > 0 && self.from_ns > now_ns {
            return false;
        }
        let since_ns = self.since(resumes.filter(|_| self.left > 0), now_ns);
        let Some(grant) = self.pace.take_now(need.saturating_sub(self.units), now_ns, since_ns) else { return false };
        self.left = self.left.saturating_sub(grant.units);
        (self.units, self.from_ns, self.place_ns) = (self.units + grant.units, now_ns, grant.place_ns);
        true
    }

    /// Takes a place in line for what is wanting, and for `behind` more such I/Os.
    fn queue_up(&mut self, need: u64, behind: u64, waits: Option<u64>, resumes: Option<u64>, now_ns: u64) {
        let since_ns = self.since(waits.or(resumes.filter(|_| self.left > 0)), now_ns);
        let behind = behind.min(self.pace.slice() / need) * need;
        let grant = self.pace.take(need - self.units + behind, now_ns, since_ns);
        let later = waits.is_some() && self.left == 0;
        self.units += grant.units;
        self.left = self.left.saturating_sub(grant.units);
        (self.from_ns, self.place_ns) = (grant.from_ns.max(now_ns + u64::from(later)), grant.place_ns);
    }
}

/// See the module's doc.
#[derive(Default)]
pub(super) struct Line {
    dues: Vec<Due>,
    /// Since when something waits.
    waits: Option<u64>,
    /// Which of them it waits for, if not for another line.
    joined: Option<usize>,
    /// When it last began to wait, and until when it is as if it had not ended.
    since_ns: u64,
    resumes_until_ns: u64,
    /// When something was last taken while it waited.
    turn_ns: u64,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Line {
    pub(super) fn new(dues: Vec<Due>) -> Self {
        Self { dues, ..Self::default() }
    }

    /// Whether nothing is owed at all.
    pub(super) fn is_free(&self) -> bool {
        self.dues.is_empty()
    }

    /// What there is, for a line made anew.
    pub(super) fn take_dues(&mut self) -> Vec<Due> {
        self.leave();
        std::mem::take(&mut self.dues)
    }

    /// Whether that can be paid now, out of credit or abundance. Not to be asked while something waits.
    #[inline]
    pub(super) fn affords(&mut self, cost: Cost, now_ns: u64) -> bool {
        let resumes = self.resumes(now_ns);
        self.dues.iter_mut().all(|due| {
            let need = due.need(cost);
            due.covers(need, now_ns) || due.refill(need, resumes, now_ns)
        })
    }

    #[inline]
    fn resumes(&mut self, now_ns: u64) -> Option<u64> {
        if now_ns > self.resumes_until_ns {
            return None;
        }
        self.resumes_until_ns = now_ns + RESUME_NS;
        if self.waits.is_none() && self.turn_ns != now_ns {
            self.still_behind(now_ns);
        }
        Some(self.since_ns)
    }

    /// What is missed by one that has not made up for all of it yet: its front end is late, or wants less now. Hence no more of that than [`RESUME_NS`].
    #[cold]
    fn still_behind(&mut self, now_ns: u64) {
        for due in self.dues.iter_mut().filter(|due| due.left > 0) {
            let grown = due.left + due.pace.between(self.turn_ns, now_ns);
            due.left = due.left.max(grown.min(due.pace.between(0, RESUME_NS)));
        }
        self.turn_ns = now_ns;
    }

    #[inline]
    pub(super) fn charge(&mut self, cost: Cost) {
        self.dues.iter_mut().for_each(|due| due.units -= due.need(cost));
    }

    /// None: it can be paid now. Else it has a place in line, for `queued` such I/Os.
    pub(super) fn ask(&mut self, cost: Cost, queued: u64, now_ns: u64) -> Option<Late> {
        self.begin_turn(now_ns);
        let resumes = self.resumes(now_ns);
        let mut late: Option<Late> = None;
        for (at, due) in self.dues.iter_mut().enumerate() {
            let need = due.need(cost);
            if need == 0 {
                continue;
            }
            if self.waits.is_none() {
                due.expire(now_ns);
            }
            if due.units < need {
                due.queue_up(need, queued - 1, self.waits, resumes, now_ns);
            }
            if due.from_ns > late.as_ref().map_or(now_ns, |late| late.due_ns) {
                late = Some(Late { due_ns: due.from_ns, limiter: due.limiter.clone(), kind: due.kind, at });
            }
        }
        late
    }

    /// A turn of one that waits: who is late takes his part of what was missed, and the rest in the next turn: others may be late, too.
    fn begin_turn(&mut self, now_ns: u64) {
        let Some(since_ns) = self.waits.filter(|_| self.turn_ns != now_ns) else { return };
        for due in &mut self.dues {
            let missed = due.pace.between(self.turn_ns.max(since_ns), now_ns);
            due.left = due.pace.slice() + missed.div_ceil(due.pace.waiting().max(1));
        }
        self.turn_ns = now_ns;
    }

    #[inline]
    pub(super) fn waits(&self) -> bool {
        self.waits.is_some()
    }

    /// Something waits from now on, if it did not before: for the rate that is late, or for another line.
    pub(super) fn wait(&mut self, late: Option<&Late>, now_ns: u64) {
        let wanted = late.map(|late| late.at);
        if self.joined != wanted {
            self.joined.into_iter().for_each(|at| self.dues[at].pace.leaves());
            wanted.into_iter().for_each(|at| self.dues[at].pace.joins());
            self.joined = wanted;
        }
        if self.waits.is_none() {
            (self.waits, self.since_ns) = (Some(now_ns), now_ns);
        }
    }

    /// Nothing waits any more.
    pub(super) fn rest(&mut self, now_ns: u64) {
        if self.waits.is_some() {
            self.resumes_until_ns = now_ns + RESUME_NS;
            self.leave();
        }
    }

    fn leave(&mut self) {
        self.waits = None;
        self.joined.take().into_iter().for_each(|at| self.dues[at].pace.leaves());
    }

    /// What waited is gone unpaid: its place is for others.
    pub(super) fn give_up(&mut self) {
        self.leave();
        self.dues.iter_mut().for_each(Due::give_back);
    }
}
