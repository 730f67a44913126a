//! Where a block of the whole lies, for arrays without redundancy.

use qpair_wire::raid_superblock::Level;

/// Which member holds a block, and where in its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Strips of `1 << shift` blocks on `members` in turn.
    Strips {
        /// Blocks a strip, as a power of two.
        shift: u32,
        /// How many members.
        members: u64,
        /// Members as a power of two, if it is one: a division less for each I/O.
        power: Option<u32>,
    },
    /// Where each member begins, and the end of the last.
    Concat(Vec<u64>),
}

impl Layout {
    /// For members of so many blocks of data each, cut down to whole strips before.
    pub(crate) fn new(level: Level, strip_blocks: u32, sizes: &[u64]) -> Self {
        if level == Level::CONCAT {
            let mut starts = vec![0];
            sizes.iter().for_each(|size| starts.push(starts.last().copied().unwrap_or(0) + size));
            return Self::Concat(starts);
        }
        let members = sizes.len() as u64;
        let power = members.is_power_of_two().then(|| members.trailing_zeros());
        Self::Strips { shift: strip_blocks.trailing_zeros(), members, power }
    }

    /// Member and block there.
    #[cfg(test)]
    fn place(&self, lba: u64) -> (usize, u64) {
        match self {
            Self::Strips { shift, members, power: Some(power) } => in_turn(lba, *shift, |strip| (strip >> power, strip & (members - 1))),
            Self::Strips { shift, members, power: None } => in_turn(lba, *shift, |strip| (strip / members, strip % members)),
            Self::Concat(starts) => after_another(lba, starts),
        }
    }

    /// The part of a range that lies on a member: its first block there, and how many. One piece on each, in either layout.
    pub(crate) fn part(&self, member: usize, lba: u64, blocks: u64) -> Option<(u64, u64)> {
        let end = lba + blocks;
        let (from, to) = match self {
            Self::Strips { shift, members, .. } => {
                // Blocks of the whole below `at` that lie on this member.
                let below = |at: u64| {
                    let (row, strip) = ((at >> shift) / members, (at >> shift) % members);
                    let rest = match strip.cmp(&(member as u64)) {
                        std::cmp::Ordering::Less => 0,
                        std::cmp::Ordering::Equal => at & ((1 << shift) - 1),
                        std::cmp::Ordering::Greater => 1 << shift,
                    };
                    (row << shift) + rest
                };
                (below(lba), below(end))
            }
            Self::Concat(starts) => {
                let within = |at: u64| at.clamp(starts[member], starts[member + 1]) - starts[member];
                (within(lba), within(end))
            }
        };
        (from < to).then_some((from, to - from))
    }
}

/// Member and block there, with strips on the members in turn; `turn` tells the row and the member of a strip.
#[inline(always)]
pub(crate) fn in_turn(lba: u64, shift: u32, turn: impl Fn(u64) -> (u64, u64)) -> (usize, u64) {
    let (row, member) = turn(lba >> shift);
    (member as usize, row << shift | lba & ((1 << shift) - 1))
}

/// Member and block there, with one member after the other.
#[inline(always)]
pub(crate) fn after_another(lba: u64, starts: &[u64]) -> (usize, u64) {
    let member = starts.partition_point(|start| *start <= lba).saturating_sub(1).min(starts.len().saturating_sub(2));
    (member, lba - starts[member])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layouts() -> Vec<(Layout, u64)> {
        let strips = [1, 2, 3, 4, 5].map(|members| (Layout::new(Level::RAID0, 4, &vec![12; members]), 12 * members as u64));
        let concat = (Layout::new(Level::CONCAT, 4, &[8, 16, 4]), 28);
        strips.into_iter().chain([concat]).collect()
    }

    #[test]
    fn each_block_has_a_place_of_its_own() {
        for (layout, blocks) in layouts() {
            let mut places: Vec<_> = (0..blocks).map(|lba| layout.place(lba)).collect();
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len() as u64, blocks, "{layout:?}");
        }
    }

    #[test]
    fn strips_go_round_the_members() {
        let layout = Layout::new(Level::RAID0, 4, &[8, 8, 8]);
        let places: Vec<_> = [0, 3, 4, 8, 11, 12, 23].map(|lba| layout.place(lba)).to_vec();
        assert_eq!(places, [(0, 0), (0, 3), (1, 0), (2, 0), (2, 3), (0, 4), (2, 7)]);
    }

    #[test]
    fn concat_fills_one_member_after_the_other() {
        let layout = Layout::new(Level::CONCAT, 4, &[8, 16, 4]);
        let places: Vec<_> = [0, 7, 8, 23, 24, 27].map(|lba| layout.place(lba)).to_vec();
        assert_eq!(places, [(0, 0), (0, 7), (1, 0), (1, 15), (2, 0), (2, 3)]);
    }

    #[test]
    fn the_parts_of_every_range_are_its_blocks_and_no_others() {
        for (layout, total) in layouts() {
            for lba in 0..total {
                for blocks in 1..=total - lba {
                    let mut expected: Vec<_> = (lba..lba + blocks).map(|block| layout.place(block)).collect();
                    expected.sort_unstable();
                    let parts = (0..5).filter(|member| match &layout {
                        Layout::Strips { members, .. } => member < members,
                        Layout::Concat(starts) => *member + 1 < starts.len() as u64,
                    });
                    let found: Vec<_> = parts
                        .filter_map(|member| layout.part(member as usize, lba, blocks).map(|part| (member as usize, part)))
                        .flat_map(|(member, (first, count))| (first..first + count).map(move |block| (member, block)))
                        .collect();
                    assert_eq!(found, expected, "{layout:?} {lba}+{blocks}");
                }
            }
        }
    }
}
