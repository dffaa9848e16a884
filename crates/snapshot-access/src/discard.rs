//! Which discards may be sent to QEMU.
//!
//! QEMU below 9.1 aborts, and the VM with it, when a discard on a snapshot-access export does not start and end on a
//! cluster of the copy-before-write filter (`hbitmap_reset: Assertion`, seen on 7.2 with plain allocation extents of a
//! raw file). Only the end of the disk is exempt. So what a reader gives back is collected here, and comes out as
//! whole clusters, and many at a time: each discard costs QEMU's thread, which serves the guest, as much as a read.

use std::collections::BTreeMap;
use stillpoint_model::{Granularity, Length, Offset, Range};

/// A discard of at least so many bytes is worth it.
const WORTH: u64 = 8 << 20;
/// Most bytes that wait to be part of a larger discard. What the guest overwrites of them is kept aside in vain.
const WAITING: u64 = 32 << 20;

/// Turns ranges that were given back, at any offset and in any order, into few discards of whole clusters.
#[derive(Debug)]
pub struct DiscardPlanner {
    cluster: Granularity,
    size: Length,
    worth: u64,
    waiting: u64,
    /// Given back, not yet part of a discard: start to end, disjoint, no two of them touching.
    pending: BTreeMap<u64, u64>,
    /// Bytes of `pending`.
    bytes: u64,
    /// At how many of them all is looked at again: parts of clusters may wait for the rest of theirs for ever.
    flush_at: u64,
}

impl DiscardPlanner {
    /// A planner for a disk of `size` bytes under a filter with this cluster.
    pub fn new(cluster: Granularity, size: Length) -> Self {
        Self {
            cluster,
            size,
            worth: WORTH,
            waiting: WAITING,
            pending: BTreeMap::new(),
            bytes: 0,
            flush_at: WAITING,
        }
    }

    /// Takes `range` as given back. Returns what may now be discarded, often nothing: ranges of whole clusters, each of
    /// which was given back completely. What lies past the end of the disk is ignored.
    pub fn release(&mut self, range: Range) -> Vec<Range> {
        let whole = Range::whole(self.size).ok();
        let Some(range) = whole.and_then(|whole| whole.intersect(range)) else { return Vec::new() };
        let (mut start, mut end) = (range.start().get(), range.end().get());
        // Everything pending that touches the range becomes one with it.
        while let Some((&before, &until)) = self.pending.range(..=end).next_back() {
            if until < start {
                break;
            }
            self.take(before, until);
            start = start.min(before);
            end = end.max(until);
        }
        self.keep(start, end);
        if end.saturating_sub(start) >= self.worth {
            self.discard(start, end).into_iter().collect()
        } else if self.bytes > self.flush_at {
            self.flush()
        } else {
            Vec::new()
        }
    }

    /// All that may be discarded, however little.
    pub fn flush(&mut self) -> Vec<Range> {
        let pending: Vec<_> = self.pending.iter().map(|(start, end)| (*start, *end)).collect();
        let discards = pending.into_iter().filter_map(|(start, end)| self.discard(start, end)).collect();
        self.flush_at = self.bytes.saturating_add(self.waiting);
        discards
    }

    /// The whole clusters of what is pending from `start` to `end`; what is left over stays.
    fn discard(&mut self, start: u64, end: u64) -> Option<Range> {
        let pending = Range::between(Offset::new(start), Offset::new(end)).ok()?;
        let discard = pending.align_inward(self.cluster, self.size);
        if discard.is_empty() {
            return None;
        }
        self.take(start, end);
        self.keep(start, discard.start().get());
        self.keep(discard.end().get(), end);
        Some(discard)
    }

    fn take(&mut self, start: u64, end: u64) {
        self.pending.remove(&start);
        self.bytes = self.bytes.saturating_sub(end.saturating_sub(start));
    }

    fn keep(&mut self, start: u64, end: u64) {
        if start < end {
            self.pending.insert(start, end);
            self.bytes = self.bytes.saturating_add(end.saturating_sub(start));
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
        assert_eq!(planner.release(range(0, 512)), []);
        assert_eq!(planner.flush(), []);
        assert_eq!(planner.release(range(512, 65_537)), []);
        assert_eq!(planner.flush(), [range(0, 65_536)]);
        assert_eq!(planner.flush(), []);
    }

    #[test]
    fn discards_are_few_and_what_waits_is_little() {
        let size = Length::new(1 << 30);
        let mut planner = DiscardPlanner::new(Granularity::DEFAULT, size);
        let mib = |at: u64, length: u64| range(at << 20, (at + length) << 20);
        let in_order: Vec<_> = (0..64).flat_map(|at| planner.release(mib(at, 1))).collect();
        assert_eq!(in_order, (0..8).map(|at| mib(at * 8, 8)).collect::<Vec<_>>());
        // With gaps between them none of them becomes large.
        let mut discarded = 0;
        for at in (100..500).step_by(2) {
            discarded += planner.release(mib(at, 1)).len();
            assert!(planner.bytes <= WAITING);
        }
        assert!(discarded > 150, "{discarded}");
        assert_eq!(discarded + planner.flush().len(), 200);
        assert_eq!((planner.bytes, planner.pending.len()), (0, 0));
    }

    #[test]
    fn the_end_of_the_disk_completes_a_cluster() {
        let mut planner = DiscardPlanner::new(Granularity::DEFAULT, Length::new(65_536 + 512));
        assert_eq!(planner.release(range(65_536, 65_536 + 512)), []);
        assert_eq!(planner.flush(), [range(65_536, 65_536 + 512)]);
    }

    proptest! {
        /// The promise that keeps a VM on QEMU 7.2 alive: whatever is given back, each discard starts and ends on a
        /// cluster (or at the end of the disk), covers only what was given back, and nothing whole is forgotten.
        #[test]
        fn every_discard_is_aligned_and_covers_only_what_was_given_back(
            size in 1u64..600,
            cluster in 0u32..4,
            parts in prop::collection::vec((0u64..600, 0u64..200), 1..60),
            worth in 1u64..300,
            waiting in 1u64..600,
        ) {
            // Units of 512 bytes keep the model small.
            let unit = 512;
            let cluster = Granularity::try_from(u64::from(512u32 << cluster)).unwrap();
            let size = Length::new(size * unit);
            let mut planner = DiscardPlanner::new(cluster, size);
            (planner.worth, planner.waiting, planner.flush_at) = (worth * unit, waiting * unit, waiting * unit);
            let mut given = vec![false; usize::try_from(size.get() / unit).unwrap()];
            let mut gone = given.clone();
            let slots = |range: Range| {
                (range.start().get() / unit) as usize..((range.end().get() / unit) as usize).min(given_len(size))
            };
            // At the end all of it.
            for part in parts.into_iter().map(Some).chain([None]) {
                let discards = match part.map(|(offset, length)| range(offset * unit, (offset + length) * unit)) {
                    Some(part) => {
                        slots(part).for_each(|slot| given[slot] = true);
                        planner.release(part)
                    }
                    None => planner.flush(),
                };
                for discard in discards {
                    let aligned = |at: Offset| at.get().is_multiple_of(u64::from(cluster.get())) || at.get() == size.get();
                    prop_assert!(aligned(discard.start()) && aligned(discard.end()), "{discard}");
                    prop_assert!(!discard.is_empty());
                    for slot in slots(discard) {
                        prop_assert!(given[slot], "slot {slot} was not given back");
                        gone[slot] = true;
                    }
                }
                prop_assert_eq!(planner.bytes, planner.pending.iter().map(|(start, end)| end - start).sum::<u64>());
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
