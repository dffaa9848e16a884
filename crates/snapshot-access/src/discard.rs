//! Which discards may be sent to QEMU.
//!
//! QEMU below 9.1 aborts, and the VM with it, when a discard on a snapshot-access export does not start and end on a
//! cluster of the copy-before-write filter (`hbitmap_reset: Assertion`, seen on 7.2 with plain allocation extents of a
//! raw file). Only the end of the disk is exempt. So what a reader gives back is collected here, and comes out as
//! whole clusters.

use std::collections::BTreeMap;
use stillpoint_model::{Granularity, Length, Offset, Range};

/// Turns ranges that were given back, at any offset and in any order, into discards of whole clusters.
#[derive(Debug)]
pub struct DiscardPlanner {
    cluster: Granularity,
    size: Length,
    /// Given back, not yet part of a discard: start to end, disjoint, no two of them touching.
    pending: BTreeMap<u64, u64>,
}

impl DiscardPlanner {
    /// A planner for a disk of `size` bytes under a filter with this cluster.
    pub fn new(cluster: Granularity, size: Length) -> Self {
        Self { cluster, size, pending: BTreeMap::new() }
    }

    /// Takes `range` as given back. Returns what may now be discarded: nothing, or one range of whole clusters, each
    /// of which was given back completely. What lies past the end of the disk is ignored.
    pub fn release(&mut self, range: Range) -> Option<Range> {
        let whole = Range::whole(self.size).ok()?;
        let range = whole.intersect(range)?;
        let (mut start, mut end) = (range.start().get(), range.end().get());
        // Everything pending that touches the range becomes one with it.
        while let Some((&before, &until)) = self.pending.range(..=end).next_back() {
            if until < start {
                break;
            }
            self.pending.remove(&before);
            start = start.min(before);
            end = end.max(until);
        }
        let joined = Range::between(Offset::new(start), Offset::new(end)).ok()?;
        let discard = joined.align_inward(self.cluster, self.size);
        if discard.is_empty() {
            self.keep(joined);
            return None;
        }
        self.keep(joined.split(discard.start()).0);
        self.keep(joined.split(discard.end()).1);
        Some(discard)
    }

    fn keep(&mut self, range: Range) {
        if !range.is_empty() {
            self.pending.insert(range.start().get(), range.end().get());
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the model's numbers are small")]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn range(start: u64, end: u64) -> Range {
        Range::between(Offset::new(start), Offset::new(end)).unwrap()
    }

    #[test]
    fn two_halves_of_a_cluster_become_one_discard() {
        let mut planner = DiscardPlanner::new(Granularity::DEFAULT, Length::new(1 << 20));
        assert_eq!(planner.release(range(0, 512)), None);
        assert_eq!(planner.release(range(512, 65_536)), Some(range(0, 65_536)));
        assert_eq!(planner.release(range(65_536, 65_537)), None);
    }

    #[test]
    fn the_end_of_the_disk_completes_a_cluster() {
        let mut planner = DiscardPlanner::new(Granularity::DEFAULT, Length::new(65_536 + 512));
        assert_eq!(planner.release(range(65_536, 65_536 + 512)), Some(range(65_536, 65_536 + 512)));
    }

    proptest! {
        /// The promise that keeps a VM on QEMU 7.2 alive: whatever is given back, each discard starts and ends on a
        /// cluster (or at the end of the disk), covers only what was given back, and nothing whole is forgotten.
        #[test]
        fn every_discard_is_aligned_and_covers_only_what_was_given_back(
            size in 1u64..600,
            cluster in 0u32..4,
            parts in prop::collection::vec((0u64..600, 0u64..200), 1..60),
        ) {
            // Units of 512 bytes keep the model small.
            let unit = 512;
            let cluster = Granularity::try_from(u64::from(512u32 << cluster)).unwrap();
            let size = Length::new(size * unit);
            let mut planner = DiscardPlanner::new(cluster, size);
            let mut given = vec![false; usize::try_from(size.get() / unit).unwrap()];
            let mut gone = given.clone();
            for (offset, length) in parts {
                let part = range(offset * unit, (offset + length) * unit);
                let slots = |range: Range| {
                    (range.start().get() / unit) as usize..((range.end().get() / unit) as usize).min(given_len(size))
                };
                for i in slots(part) {
                    given[i] = true;
                }
                if let Some(discard) = planner.release(part) {
                    let aligned = |at: Offset| at.get().is_multiple_of(u64::from(cluster.get())) || at.get() == size.get();
                    prop_assert!(aligned(discard.start()) && aligned(discard.end()), "{discard}");
                    prop_assert!(!discard.is_empty());
                    for i in slots(discard) {
                        prop_assert!(given[i], "slot {i} was not given back");
                        gone[i] = true;
                    }
                }
            }
            let per_cluster = (u64::from(cluster.get()) / unit) as usize;
            for (index, cluster) in given.chunks(per_cluster).enumerate() {
                if cluster.iter().all(|&slot| slot) {
                    prop_assert!(gone[index * per_cluster], "cluster {index} was given back and never discarded");
                }
            }
        }
    }

    fn given_len(size: Length) -> usize {
        usize::try_from(size.get() / 512).unwrap()
    }
}
