//! How a leg leaves a mirror: dropped on every reactor, then recorded out on stable media, then writes that miss it are acknowledged.
//!
//! The argument stands in `mirror.rs`. Here is its order: [`Array::leave`] publishes a view without the leg (nobody reads from it or writes to it any
//! more), has all that serve write the next superblock, and publishes that the leg is recorded. A leg that cannot write its superblock
//! leaves too, in the same way, unless it is the last. If the last cannot write it, after a few attempts what waits for the record fails; the
//! leg stays dropped, and the next write asks for the record again.

use std::sync::{Arc, Weak};

use qpair_bdev::{Descriptor, Hold};
use qpair_reactor::log::{self, Level as Severity};
use qpair_wire::raid_superblock::{Base, BaseState};
use zerocopy::little_endian::U32;

use crate::array::{Array, lock};
use crate::mask::Mask;
use crate::worker::Worker;

/// How often the last leg's superblock is tried.
const ATTEMPTS: usize = 3;
/// Between those.
const PAUSE_NS: u64 = 50_000_000;

impl Array {
    /// Drops what was reported, until nothing more is. Another one that has taken the place meanwhile is not to blame.
    pub(crate) async fn reconcile(self: Arc<Self>, worker: &Worker) {
        loop {
            let reported = {
                let mut state = lock(&self.state);
                state.reconciling = !state.reported.is_empty();
                std::mem::take(&mut state.reported)
            };
            if reported.is_empty() {
                return;
            }
            let _turn = self.turn.take(worker).await;
            let view = self.view();
            let is_there =
                |slot: usize, member: &Weak<Descriptor>| view.members[slot].as_ref().is_none_or(|now| member.ptr_eq(&Arc::downgrade(now)));
            let out =
                reported.iter().filter(|(slot, member)| is_there(*slot, member)).fold(Mask::EMPTY, |out, (slot, _)| out | Mask::of(*slot));
            self.leave_now(worker, out, BaseState::FAILED, None).await;
        }
    }

    /// Has members leave; which of them cannot. `hold` is dropped when no channel uses them any more.
    pub(crate) async fn leave(self: &Arc<Self>, worker: &Worker, out: Mask, why: BaseState, hold: Option<Arc<Hold>>) -> Mask {
        let _turn = self.turn.take(worker).await;
        self.leave_now(worker, out, why, hold).await
    }

    /// As [`leave`](Self::leave), for who has the turn.
    pub(crate) async fn leave_now(self: &Arc<Self>, worker: &Worker, out: Mask, why: BaseState, hold: Option<Arc<Hold>>) -> Mask {
        let view = self.view();
        let (mut stay, mut go, mut refused) = (view.serving, Mask::EMPTY, Mask::EMPTY);
        for slot in out.slots() {
            let this = Mask::of(slot);
            if !view.serving.has(slot) {
                // The target of a rebuild, or one that could not be recorded.
                go = go | this;
            } else if stay.minus(this).is_empty() {
                refused = refused | this;
            } else {
                (stay, go) = (stay.minus(this), go | this);
            }
        }
        if !(go & view.writing).is_empty() {
            self.drop_members(worker, go & view.writing, why, hold.is_some()).await;
        }
        drop(hold);
        let unrecorded = go.minus(view.recorded);
        if !unrecorded.is_empty() {
            refused = refused | self.record(worker, unrecorded, why).await;
        }
        if !refused.is_empty() {
            refused.slots().for_each(|slot| lock(&self.state).slots[slot].blame = None);
            self.publish(worker, |view| view.refused = (view.refused.0 + 1, refused)).await;
        }
        refused
    }

    /// `gone`: their bdevs are being removed.
    async fn drop_members(self: &Arc<Self>, worker: &Worker, go: Mask, why: BaseState, gone: bool) {
        let drop_them = |view: &mut crate::view::View| {
            (view.serving, view.writing) = (view.serving.minus(go), view.writing.minus(go));
            go.slots().for_each(|slot| view.members[slot] = None);
        };
        self.publish(worker, drop_them).await;
        let left = self.view().serving.count();
        let mut told = Vec::new();
        {
            let mut state = lock(&self.state);
            for slot in go.slots() {
                let name = state.slots[slot].name.as_deref().unwrap_or("").to_owned();
                let how = if why == BaseState::FAILED { "failed" } else { "was removed" };
                log::say(Severity::Warning, "raid", format_args!("{}: base bdev {name} in slot {slot} {how}", self.name));
                let blame = state.slots[slot].blame.take().unwrap_or_else(|| "it failed".to_owned());
                if gone || why == BaseState::FAILED {
                    let how = if gone { "is gone".to_owned() } else { format!("was dropped: {blame}") };
                    told.push(format!("base bdev {name} in slot {slot} {how}; {left} of {} members serve", self.slots));
                }
                state.slots[slot].clear();
            }
        }
        told.into_iter().for_each(|reason| self.tell_failure(reason));
        self.tell_bases();
    }

    /// Has all that serve say that these are out; which could not be recorded.
    async fn record(self: &Arc<Self>, worker: &Worker, out: Mask, why: BaseState) -> Mask {
        let out = if self.superblock {
            match self.say_on_media(worker, out, why).await {
                Ok(out) => out,
                Err(refused) => return refused,
            }
        } else {
            out
        };
        self.publish(worker, |view| view.recorded = view.recorded | out).await;
        Mask::EMPTY
    }

    /// All that are out when it is said by all that stay; the error: it could not be said.
    async fn say_on_media(self: &Arc<Self>, worker: &Worker, mut out: Mask, why: BaseState) -> Result<Mask, Mask> {
        let mut attempts = 0;
        loop {
            self.mark(out, why);
            let serving = self.view().serving;
            let failed = self.write_superblocks(worker, serving).await;
            if failed.is_empty() {
                return Ok(out);
            }
            if serving.minus(failed).is_empty() {
                attempts += 1;
                if attempts == ATTEMPTS {
                    return Err(out);
                }
                worker.sleep(PAUSE_NS).await;
            } else {
                self.drop_members(worker, failed, BaseState::FAILED, false).await;
                out = out | failed;
            }
        }
    }

    fn mark(&self, out: Mask, why: BaseState) {
        let mut state = lock(&self.state);
        for slot in out.slots() {
            if let Some(entry) = &mut state.slots[slot].entry
                && entry.state() == BaseState::CONFIGURED
            {
                *entry = Base { state: U32::new(why.0), ..*entry };
            }
        }
    }

    /// Something else that superblocks tell has changed.
    pub(crate) async fn write_anew(self: Arc<Self>, worker: &Worker) {
        let _turn = self.turn.take(worker).await;
        let serving = self.view().serving;
        let failed = self.write_superblocks(worker, serving).await;
        if !failed.is_empty() && self.level == qpair_wire::raid_superblock::Level::RAID1 {
            self.leave_now(worker, failed, BaseState::FAILED, None).await;
        }
    }
}
