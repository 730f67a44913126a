//! What each block of a client's may hold: the plain model that everything is compared with.
//!
//! A client fills whole blocks with one byte each. A write that was acknowledged leaves one legal byte, one that failed leaves the old ones and the new one, each
//! block (and each sector of a block) for itself; content that nobody can know leaves all. What survives when the power goes is kept beside it: a flush
//! makes what was there when it was *submitted* durable, no more. Models outlive worlds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A set of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fills([u64; 4]);

impl Fills {
    /// Anything, also different bytes in one block.
    pub const ANY: Self = Self([u64::MAX; 4]);

    /// This alone.
    pub fn only(byte: u8) -> Self {
        Self([0; 4]).with(byte)
    }

    /// And this.
    #[must_use]
    pub fn with(mut self, byte: u8) -> Self {
        self.0[usize::from(byte >> 6)] |= 1 << (byte & 63);
        self
    }

    /// Whether it may be this.
    pub fn has(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] & (1 << (byte & 63)) != 0
    }

    /// One of them.
    pub fn first(&self) -> u8 {
        (0..=255).find(|byte| self.has(*byte)).unwrap_or(0)
    }

    /// Whether there is just one.
    pub fn is_sure(&self) -> bool {
        self.0.iter().map(|word| word.count_ones()).sum::<u32>() == 1
    }

    fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    fn and(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }
}

/// What bdevs do to data that pass through them, or did when they were written.
#[derive(Clone, Copy, Debug)]
pub struct Spoils {
    /// A byte is exclusive-ored with this.
    pub value: u8,
    /// So many bytes of a sector at most: sectors of a block may be of several writes.
    pub most: usize,
}

/// See the module's doc. Blocks are counted from the model's first.
#[derive(Clone)]
pub struct Model {
    /// Its first block on the bdev.
    pub first: u64,
    /// Reads compared.
    pub reads: u64,
    /// Bytes that were spoilt on their way, as they may be.
    pub spoilt: u64,
    now: Vec<Fills>,
    durable: Vec<Fills>,
    /// From this block on nothing is known any more, whatever is written there.
    known: u64,
    /// What flushes under way will have made durable.
    flushes: BTreeMap<u64, Vec<Fills>>,
}

/// Several look at it: a client, and a test when worlds change.
pub type SharedModel = Arc<Mutex<Model>>;

/// A test that panicked has said what it has to say.
pub fn lock(model: &Mutex<Model>) -> MutexGuard<'_, Model> {
    model.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Model {
    /// So many blocks, from `first` on, that hold what is said.
    pub fn new(first: u64, blocks: u64, content: Fills) -> SharedModel {
        let now = vec![content; blocks as usize];
        Arc::new(Mutex::new(Self { first, reads: 0, spoilt: 0, durable: now.clone(), now, known: blocks, flushes: BTreeMap::new() }))
    }

    /// How many blocks.
    pub fn blocks(&self) -> u64 {
        self.now.len() as u64
    }

    /// What these blocks may hold.
    pub fn holds(&self, blocks: Range<u64>) -> &[Fills] {
        &self.now[blocks.start as usize..blocks.end as usize]
    }

    /// From now on these blocks and all after them may hold anything: the device has been, or will be, without them for a while. `first`: on the bdev.
    pub fn forget_from(&mut self, first: u64) {
        self.known = self.known.min(first.saturating_sub(self.first));
        self.widen(self.known..self.blocks(), |_| Fills::ANY);
    }

    /// From now on each of these blocks may hold `change` of what it held, too.
    fn widen(&mut self, blocks: Range<u64>, content: impl Fn(u64) -> Fills) {
        for block in blocks {
            let (at, more) = (block as usize, content(block));
            let others = self.flushes.values_mut().map(|flush| &mut flush[at]);
            for fills in [&mut self.now[at], &mut self.durable[at]].into_iter().chain(others) {
                *fills = fills.or(more);
            }
        }
    }

    /// Something that would leave `fill` in these blocks is under way.
    pub fn begin(&mut self, blocks: Range<u64>, fill: u8) {
        self.widen(blocks, |_| Fills::only(fill));
    }

    /// It was acknowledged; `durable`: and is on stable media.
    pub fn end(&mut self, blocks: Range<u64>, fill: u8, durable: bool) {
        for at in blocks.start as usize..blocks.end.min(self.known) as usize {
            self.now[at] = Fills::only(fill);
            if durable {
                self.durable[at] = Fills::only(fill);
            }
        }
    }

    /// A copy of as many blocks from `source` is under way; what they hold, for [`end_copy`](Self::end_copy).
    pub fn begin_copy(&mut self, blocks: Range<u64>, source: u64) -> Vec<Fills> {
        let content = self.holds(source..source + (blocks.end - blocks.start)).to_vec();
        let first = blocks.start;
        self.widen(blocks, |block| content[(block - first) as usize]);
        content
    }

    /// It was acknowledged.
    pub fn end_copy(&mut self, first: u64, content: &[Fills], durable: bool) {
        for (at, fills) in (first as usize..self.known as usize).zip(content) {
            self.now[at] = *fills;
            if durable {
                self.durable[at] = *fills;
            }
        }
    }

    /// A flush was submitted.
    pub fn begin_flush(&mut self, key: u64) {
        self.flushes.insert(key, self.now.clone());
    }

    /// It ended.
    pub fn end_flush(&mut self, key: u64, acknowledged: bool) {
        let Some(flushed) = self.flushes.remove(&key).filter(|_| acknowledged) else { return };
        self.durable.iter_mut().zip(flushed).for_each(|(durable, flushed)| *durable = durable.and(flushed));
    }

    /// The power went: what is there is what survived.
    pub fn crash(&mut self) {
        self.now.clone_from(&self.durable);
        self.flushes.clear();
    }

    /// Undoes what spoils may have done to a block: in each sector at most so many bytes differ by their value from all the others. More, or by another
    /// value, is not theirs.
    pub fn undo_spoils(&mut self, bytes: &mut [u8], spoils: Spoils) {
        for sector in bytes.chunks_mut(crate::disk::SECTOR as usize) {
            let mut left = spoils.most;
            let mut counts = [0u32; 256];
            sector.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
            let usual = (0..=255u8).max_by_key(|byte| counts[usize::from(*byte)]).unwrap_or(0);
            for byte in sector.iter_mut().filter(|byte| **byte == usual ^ spoils.value).take(left) {
                *byte = usual;
                (left, self.spoilt) = (left - 1, self.spoilt + 1);
            }
        }
    }

    /// What was read of one block is legal; `pinned`: and stays what it is, as there is one copy; `frays`: a failed write may have ended anywhere.
    pub fn check(&mut self, block: u64, bytes: &[u8], pinned: bool, frays: bool) {
        let legal = self.now[block as usize];
        if legal == Fills::ANY {
            return;
        }
        let whole = if frays { 1 } else { crate::disk::SECTOR as usize };
        for sector in bytes.chunks(whole) {
            let found = sector[0];
            assert!(sector.iter().all(|byte| *byte == found), "block {} is torn within a sector", self.first + block);
            assert!(legal.has(found), "block {} holds {found:#x}, which is none of {}", self.first + block, legal);
        }
        if pinned && bytes.iter().all(|byte| *byte == bytes[0]) {
            self.now[block as usize] = Fills::only(bytes[0]);
        }
    }
}

impl std::fmt::Display for Fills {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == Self::ANY {
            return f.write_str("anything");
        }
        f.debug_set().entries((0..=255u8).filter(|byte| self.has(*byte)).map(|byte| format!("{byte:#x}"))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(model: &Model, block: u64) -> Vec<u8> {
        (0..=255).filter(|byte| model.holds(block..block + 1)[0].has(*byte)).collect()
    }

    #[test]
    fn a_write_leaves_old_or_new_until_it_is_acknowledged() {
        let model = Model::new(0, 4, Fills::only(0));
        let mut model = lock(&model);
        model.begin(1..3, 7);
        assert_eq!((holds(&model, 0), holds(&model, 1)), (vec![0], vec![0, 7]));
        model.begin(2..3, 9);
        model.end(1..2, 7, false);
        assert_eq!((holds(&model, 1), holds(&model, 2)), (vec![7], vec![0, 7, 9]));
    }

    #[test]
    fn a_flush_covers_what_was_acknowledged_when_it_was_submitted_and_no_more() {
        let model = Model::new(0, 3, Fills::only(0));
        let mut model = lock(&model);
        model.begin(0..3, 1);
        model.end(0..2, 1, false);
        model.begin_flush(5);
        model.end(2..3, 1, false);
        model.begin(1..2, 2);
        model.end(1..2, 2, false);
        model.end_flush(5, true);
        model.crash();
        assert_eq!((0..3).map(|block| holds(&model, block)).collect::<Vec<_>>(), [vec![1], vec![1, 2], vec![0, 1]]);
    }

    #[test]
    fn a_flush_that_failed_makes_nothing_durable_and_a_durable_write_needs_none() {
        let model = Model::new(0, 2, Fills::only(0));
        let mut model = lock(&model);
        model.begin(0..2, 1);
        model.end(0..1, 1, false);
        model.end(1..2, 1, true);
        model.begin_flush(5);
        model.end_flush(5, false);
        model.crash();
        assert_eq!((holds(&model, 0), holds(&model, 1)), (vec![0, 1], vec![1]));
    }

    #[test]
    #[should_panic(expected = "block 11 holds 0x2, which is none of {\"0x0\"}")]
    fn what_was_never_written_is_a_difference() {
        lock(&Model::new(10, 2, Fills::only(0))).check(1, &[2; 512], true, false);
    }

    #[test]
    #[should_panic(expected = "block 0 is torn within a sector")]
    fn a_sector_is_never_torn() {
        let model = Model::new(0, 1, Fills::only(0));
        lock(&model).begin(0..1, 1);
        let mut bytes = [0; 1024];
        bytes[700..].fill(1);
        lock(&model).check(0, &bytes, true, false);
    }

    #[test]
    fn what_is_forgotten_stays_unknown_whatever_is_written_there() {
        let model = Model::new(10, 4, Fills::only(0));
        let mut model = lock(&model);
        model.forget_from(12);
        model.begin(0..4, 7);
        model.end(0..4, 7, true);
        assert_eq!((holds(&model, 1), model.holds(2..4)), (vec![7], &[Fills::ANY; 2][..]));
        model.crash();
        assert_eq!((holds(&model, 1), model.holds(2..4)), (vec![7], &[Fills::ANY; 2][..]));
    }

    #[test]
    fn what_is_spoilt_is_forgiven_as_often_as_it_may_be_and_no_other_way() {
        let model = Model::new(0, 1, Fills::only(7));
        let mut model = lock(&model);
        let spoils = Spoils { value: 0x5a, most: 2 };
        for (bytes, forgiven) in [(vec![7 ^ 0x5a; 2], 2), (vec![7 ^ 0x5a; 3], 2), (vec![7 ^ 0x5b], 0)] {
            let mut block = [7; 512];
            block[100..100 + bytes.len()].copy_from_slice(&bytes);
            model.undo_spoils(&mut block, spoils);
            assert_eq!(block.iter().filter(|byte| **byte != 7).count(), bytes.len() - forgiven, "{bytes:?}");
        }
        assert_eq!(model.spoilt, 4);
    }

    #[test]
    fn what_was_read_once_is_read_again() {
        let model = Model::new(0, 1, Fills::only(0));
        let mut model = lock(&model);
        model.begin(0..1, 1);
        model.check(0, &[1; 512], true, false);
        assert_eq!(holds(&model, 0), [1]);
    }
}
