//! Finds the cut of one stream.

use super::{
    Violation,
    contents::{Held, Region},
};
use guest_writer::{Layout, Operation};
use std::collections::BTreeSet;

/// How far past what is proven a cut is sought. Only zeroing, and writes that such zeroing hid, can be there without a
/// proof; 1 operation in 37 zeroes.
const BEYOND: u64 = 64;

/// Between which cuts to look.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) least: u64,
    pub(super) most: Option<u64>,
    /// Nothing was on its way.
    pub(super) at_rest: bool,
}

/// The least cut within `bounds` that explains all blocks. If there is none, the one that explains most, and what it
/// leaves unexplained becomes a violation.
pub(super) fn judge_stream(
    layout: &Layout,
    regions: &[&Region],
    bounds: Bounds,
    violations: &mut Vec<Violation>,
) -> u64 {
    let Some(first) = regions.first() else { return 0 };
    let (stream, Bounds { least, most, at_rest }) = (first.stream, bounds);
    let mut replay = Replay::new(regions);
    for sequence in 1..=least {
        replay.apply(sequence, layout.operation(stream, sequence));
    }
    if let Some(most) = most.filter(|most| *most < least) {
        let what = format!(
            "stream {stream}: operation {least} is proven, but only {most} had been acknowledged later on"
        );
        violations.push(Violation { disk: first.disk, block: first.first, what });
    }
    replay.compare();
    let end = most.unwrap_or(u64::MAX).min(least.saturating_add(BEYOND)).max(least);
    let mut best: Option<(u64, Vec<Violation>)> = None;
    for cut in least..=end {
        let next = layout.operation(stream, cut + 1);
        let unexplained = replay.unexplained(cut, (!at_rest).then_some(next));
        if unexplained.is_empty() {
            return cut;
        }
        if best.as_ref().is_none_or(|(_, fewest)| unexplained.len() < fewest.len()) {
            best = Some((cut, unexplained));
        }
        replay.apply(cut + 1, next);
    }
    let (cut, unexplained) = best.unwrap_or_default();
    violations.extend(unexplained);
    cut
}

/// The blocks of a stream as its operations leave them, next to what is in the images.
struct Replay<'a> {
    regions: &'a [&'a Region],
    expected: Vec<Vec<Held>>,
    /// Region and index of each block that is not as expected; kept once [`Replay::compare`] has looked at all.
    wrong: Option<BTreeSet<(usize, usize)>>,
}

impl<'a> Replay<'a> {
    fn new(regions: &'a [&'a Region]) -> Self {
        let expected = regions.iter().map(|region| vec![Held::Zero; region.blocks.len()]).collect();
        Self { regions, expected, wrong: None }
    }

    fn apply(&mut self, sequence: u64, operation: Operation) {
        for (region, index) in blocks(self.regions, operation) {
            let held = result(sequence, operation);
            self.expected[region][index] = held;
            if let Some(wrong) = &mut self.wrong {
                if self.regions[region].blocks[index] == held {
                    wrong.remove(&(region, index));
                } else {
                    wrong.insert((region, index));
                }
            }
        }
    }

    fn compare(&mut self) {
        let mut wrong = BTreeSet::new();
        for (at, (region, expected)) in self.regions.iter().zip(&self.expected).enumerate() {
            let pairs = region.blocks.iter().zip(expected).enumerate();
            // What is foreign was reported when it was found, and is nothing that a cut could explain.
            wrong.extend(
                pairs
                    .filter(|(_, (held, expected))| held != expected && **held != Held::Foreign)
                    .map(|(index, _)| (at, index)),
            );
        }
        self.wrong = Some(wrong);
    }

    /// What is not as it should be after `cut` operations with `next`, if anything, on its way.
    fn unexplained(&self, cut: u64, next: Option<Operation>) -> Vec<Violation> {
        let on_its_way: BTreeSet<_> = next.into_iter().flat_map(|next| blocks(self.regions, next)).collect();
        let arrived = next.map(|next| result(cut + 1, next));
        let wrong = self.wrong.iter().flatten().filter(|&&(region, index)| {
            let held = self.regions[region].blocks[index];
            held != Held::Foreign && !(on_its_way.contains(&(region, index)) && Some(held) == arrived)
        });
        let violation = |&(at, index): &(usize, usize)| {
            let region = self.regions[at];
            let say = |held| match held {
                Held::Zero => "zeroes".to_owned(),
                Held::Write(sequence) => format!("operation {sequence}"),
                Held::Foreign => "foreign data".to_owned(),
            };
            let (held, expected) = (say(region.blocks[index]), say(self.expected[at][index]));
            let what = format!("stream {}: holds {held}, should hold {expected} (cut {cut})", region.stream);
            Violation { disk: region.disk, block: region.first + index as u64, what }
        };
        wrong.map(violation).collect()
    }
}

fn result(sequence: u64, operation: Operation) -> Held {
    if operation.zero { Held::Zero } else { Held::Write(sequence) }
}

/// Region and index of each block of an operation.
fn blocks(regions: &[&Region], operation: Operation) -> impl Iterator<Item = (usize, usize)> + use<> {
    let region = regions.iter().position(|region| region.disk == operation.disk);
    let first = region.map_or(0, |region| operation.block.saturating_sub(regions[region].first) as usize);
    region
        .into_iter()
        .flat_map(move |region| (first..first + operation.count as usize).map(move |index| (region, index)))
}
