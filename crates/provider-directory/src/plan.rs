//! From what a disk's map says to the parts in which it is read and written.
//!
//! A disk is cut on a grid of 1 MiB. What is contiguous within a cell and has to be stored is one part: one hash, one
//! record. So the records stay in proportion to the disk however finely its map is cut, a part fits a buffer, and
//! neighbouring points cut at the same places.
//!
//! ```text
//!  cells    |-------------------|-------------------|----
//!  map       data  zero  data     clean  data clean  zero ..
//!  full      [read zero  read ]                                (zero around it stays a hole)
//!  overlay   [read zero  read ]          [read base]  [zero ..  (whole clusters; what is clean in one comes from
//!                                                               the base, since a cluster hides all that is below)
//! ```

use stillpoint_model::{Extent, ExtentKind, Granularity, Length, Offset, Range};

/// The grid on which a disk is cut.
pub(crate) const CELL: Length = Length::new(1 << 20);

/// Where a piece of a part comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// It is read from the disk.
    Read,
    /// It is known to be zero.
    Zero,
    /// It is as in the base, but shares a cluster with something that is not.
    Base,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Job {
    /// Nothing is stored for this range.
    Skip(Range),
    /// The range becomes zero clusters.
    Zero(Range),
    /// A part is put together from pieces (contiguous, in order) and stored.
    Part {
        /// What the part covers.
        part: Range,
        /// Where its bytes come from.
        pieces: Vec<(Range, Fill)>,
        /// What is done with once the part has been read: the part, and what is around it.
        done: Range,
    },
}

/// Makes jobs from extents, which come in order and without gaps.
#[derive(Debug)]
pub(crate) struct Planner {
    size: Length,
    /// Cluster of the overlay; `None` for a full image.
    cluster: Option<Granularity>,
    /// Extents of the cell that is not complete yet.
    cell: Vec<Extent>,
    /// Skip or zero that may still grow.
    held: Option<Job>,
    jobs: std::collections::VecDeque<Job>,
}

fn between(start: Offset, end: Offset) -> Range {
    // Both are within a disk whose size was checked, and `end` is never before `start`.
    Range::between(start, end.max(start)).unwrap_or_else(|_| empty(start))
}

fn empty(at: Offset) -> Range {
    Range::new(at.min(Offset::new(i64::MAX as u64)), Length::ZERO)
        .expect("an empty range below the largest offset")
}

impl Planner {
    pub(crate) fn new(size: Length, cluster: Option<Granularity>) -> Self {
        Self { size, cluster, cell: Vec::new(), held: None, jobs: std::collections::VecDeque::new() }
    }

    /// Takes the next extent. `false` if it is clean and the image is a full one, which has nothing for it to be
    /// clean against.
    pub(crate) fn push(&mut self, extent: Extent) -> bool {
        if self.cluster.is_none() && extent.kind == ExtentKind::Clean {
            return false;
        }
        let mut rest = extent.range;
        while !rest.is_empty() {
            let at_boundary = self.cell.is_empty();
            let whole = if rest.end().get() == self.size.get() {
                rest.end()
            } else {
                Offset::new(rest.end().get() / CELL.get() * CELL.get())
            };
            let (part, after) = if at_boundary && extent.kind != ExtentKind::Data && whole > rest.start() {
                let (bulk, after) = rest.split(whole);
                self.push_bulk(bulk, extent.kind);
                rest = after;
                continue;
            } else {
                rest.split(Offset::new((rest.start().get() / CELL.get() + 1).saturating_mul(CELL.get())))
            };
            self.push_piece(Extent { range: part, kind: extent.kind });
            if part.end().get().is_multiple_of(CELL.get()) || part.end().get() == self.size.get() {
                self.finish_cell();
            }
            rest = after;
        }
        true
    }

    /// What is left once the last extent has come.
    pub(crate) fn finish(&mut self) {
        if !self.cell.is_empty() {
            self.finish_cell();
        }
        self.jobs.extend(self.held.take());
    }

    /// The next job that is ready.
    pub(crate) fn next(&mut self) -> Option<Job> {
        self.jobs.pop_front()
    }

    fn push_bulk(&mut self, range: Range, kind: ExtentKind) {
        match kind {
            ExtentKind::Zero if self.cluster.is_some() => self.hold(Job::Zero(range)),
            _ => self.hold(Job::Skip(range)),
        }
    }

    fn push_piece(&mut self, extent: Extent) {
        match self.cell.last_mut() {
            Some(last) if last.kind == extent.kind => {
                last.range = between(last.range.start(), extent.range.end())
            }
            _ => self.cell.push(extent),
        }
    }

    /// Keeps a skip or a zero back, so that it grows as long as the like follows.
    fn hold(&mut self, job: Job) {
        match (&mut self.held, job) {
            (Some(Job::Skip(held)), Job::Skip(range)) | (Some(Job::Zero(held)), Job::Zero(range)) => {
                *held = between(held.start(), range.end());
            }
            (_, job) => {
                let before = self.held.replace(job);
                self.jobs.extend(before);
            }
        }
    }

    fn emit(&mut self, job: Job) {
        match job {
            Job::Part { .. } => {
                self.jobs.extend(self.held.take());
                self.jobs.push_back(job);
            }
            Job::Skip(range) | Job::Zero(range) if range.is_empty() => {}
            other => self.hold(other),
        }
    }

    fn finish_cell(&mut self) {
        let cell = std::mem::take(&mut self.cell);
        let (Some(first), Some(last)) = (cell.first(), cell.last()) else { return };
        let whole = between(first.range.start(), last.range.end());
        let runs = match self.cluster {
            None => data_span(&cell).into_iter().collect(),
            Some(cluster) => dirty_runs(&cell, cluster, whole, self.size),
        };
        let mut at = whole.start();
        let count = runs.len();
        for (index, run) in runs.into_iter().enumerate() {
            let done_end = if index + 1 == count { whole.end() } else { run.end() };
            let pieces: Vec<(Range, Fill)> = cell
                .iter()
                .filter_map(|extent| {
                    let fill = match extent.kind {
                        ExtentKind::Data => Fill::Read,
                        ExtentKind::Zero => Fill::Zero,
                        ExtentKind::Clean => Fill::Base,
                    };
                    extent.range.intersect(run).map(|range| (range, fill))
                })
                .collect();
            if pieces.iter().all(|(_, fill)| *fill == Fill::Zero) {
                self.emit(Job::Skip(between(at, run.start())));
                self.emit(Job::Zero(run));
                self.emit(Job::Skip(between(run.end(), done_end)));
            } else {
                self.emit(Job::Part { part: run, pieces, done: between(at, done_end) });
            }
            at = done_end;
        }
        self.emit(Job::Skip(between(at, whole.end())));
    }
}

/// From the first to the last data of a cell: zeroes around it stay holes.
fn data_span(cell: &[Extent]) -> Option<Range> {
    let mut data = cell.iter().filter(|extent| extent.kind == ExtentKind::Data).map(|extent| extent.range);
    let first = data.next()?;
    let last = data.next_back().unwrap_or(first);
    Some(between(first.start(), last.end()))
}

/// The runs of clusters that are not clean throughout.
fn dirty_runs(cell: &[Extent], cluster: Granularity, whole: Range, size: Length) -> Vec<Range> {
    let mut runs: Vec<Range> = Vec::new();
    for extent in cell.iter().filter(|extent| extent.kind != ExtentKind::Clean) {
        let Some(run) = extent.range.align_outward(cluster, size).intersect(whole) else { continue };
        match runs.last_mut() {
            Some(last) if last.end() >= run.start() => {
                *last = between(last.start(), run.end().max(last.end()))
            }
            _ => runs.push(run),
        }
    }
    runs
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> impl Strategy<Value = Vec<(u64, ExtentKind)>> {
        let kind = prop_oneof![Just(ExtentKind::Clean), Just(ExtentKind::Zero), Just(ExtentKind::Data)];
        let length = prop_oneof![1u64..5000, 1u64..200_000, 1u64..5 << 20];
        proptest::collection::vec((length, kind), 0..40)
    }

    fn plan(extents: &[(u64, ExtentKind)], cluster: Option<Granularity>) -> (Length, Vec<Job>) {
        let size = Length::new(extents.iter().map(|(length, _)| length).sum());
        let mut planner = Planner::new(size, cluster);
        let mut at = 0;
        for (length, kind) in extents {
            let kind = if cluster.is_none() && *kind == ExtentKind::Clean { ExtentKind::Zero } else { *kind };
            let range = Range::new(Offset::new(at), Length::new(*length)).unwrap();
            assert!(planner.push(Extent { range, kind }));
            at += length;
        }
        planner.finish();
        (size, std::iter::from_fn(|| planner.next()).collect())
    }

    proptest! {
        #[test]
        fn jobs_cover_the_disk_in_order_and_parts_are_sound(extents in kinds(), shift in 9u32..17, full: bool) {
            let cluster = (!full).then(|| Granularity::try_from(1u64 << shift).unwrap());
            let (size, jobs) = plan(&extents, cluster);
            let mut at = Offset::ZERO;
            let mut read = 0;
            for job in &jobs {
                let done = match job {
                    Job::Skip(range) | Job::Zero(range) => *range,
                    Job::Part { part, pieces, done } => {
                        prop_assert!(done.contains(*part) && !part.is_empty());
                        let cell = |offset: u64| offset / CELL.get();
                        prop_assert_eq!(cell(part.start().get()), cell(part.end().get() - 1));
                        let mut at = part.start();
                        for (range, fill) in pieces {
                            prop_assert_eq!(range.start(), at);
                            at = range.end();
                            prop_assert!(!full || *fill != Fill::Base);
                            if *fill == Fill::Read {
                                read += range.length().get();
                            }
                        }
                        prop_assert_eq!(at, part.end());
                        *done
                    }
                };
                prop_assert_eq!(done.start(), at);
                prop_assert!(!done.is_empty());
                at = done.end();
                if let (Job::Zero(range) | Job::Part { part: range, .. }, Some(cluster)) = (job, cluster) {
                    prop_assert_eq!(range.align_outward(cluster, size), *range);
                }
                prop_assert!(!full || !matches!(job, Job::Zero(_)));
            }
            prop_assert_eq!(at.get(), size.get());
            let data: u64 = extents.iter().filter(|(_, kind)| *kind == ExtentKind::Data).map(|(length, _)| length).sum();
            prop_assert_eq!(read, data);
        }
    }

    #[test]
    fn a_huge_clean_or_zero_extent_is_one_job() {
        let tera = 1 << 40;
        let (_, jobs) =
            plan(&[(tera, ExtentKind::Clean), (tera, ExtentKind::Zero)], Some(Granularity::DEFAULT));
        assert_eq!(jobs.len(), 2);
        let (_, jobs) = plan(&[(tera + 7, ExtentKind::Zero)], None);
        assert_eq!(jobs.len(), 1);
    }
}
