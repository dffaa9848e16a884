//! What was found in the images, by stream.

use super::{
    Known, Verdict, Violation,
    stream::{Bounds, judge_stream},
};
use guest_writer::{Layout, Stamp, is_zero};

/// What a block holds, or should hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Zero,
    /// What this operation of the stream that owns the block wrote.
    Write(u64),
    /// Anything else: a torn block, another's, or what nobody wrote.
    Foreign,
}

/// The blocks of one disk that one stream owns.
#[derive(Debug, Clone)]
pub(super) struct Region {
    pub(super) stream: u32,
    pub(super) disk: usize,
    pub(super) first: u64,
    pub(super) blocks: Vec<Held>,
}

/// Everything that the images hold where streams write.
#[derive(Debug, Clone)]
pub(super) struct Contents<'a> {
    layout: &'a Layout,
    run: u64,
    regions: Vec<Region>,
    /// For each stream the operations that some visible stamp proves to have been acknowledged before the instant.
    proven: Vec<u64>,
    stamps: u64,
    foreign: Vec<Violation>,
}

impl<'a> Contents<'a> {
    /// Images that are all zero.
    pub(super) fn new(layout: &'a Layout, run: u64) -> Self {
        let mut regions = Vec::new();
        for stream in 0..layout.streams() {
            for disk in 0..layout.disk_blocks.len() {
                if let Some((first, count)) = layout.region(stream, disk) {
                    regions.push(Region { stream, disk, first, blocks: vec![Held::Zero; count as usize] });
                }
            }
        }
        let proven = vec![0; layout.streams() as usize];
        Self { layout, run, regions, proven, stamps: 0, foreign: Vec::new() }
    }

    /// Takes note of a block of an image.
    pub(super) fn put(&mut self, disk: usize, block: u64, bytes: &[u8]) {
        let streams = self.proven.len();
        let owner = self.regions.iter_mut().find(|region| {
            region.disk == disk
                && block.checked_sub(region.first).is_some_and(|at| at < region.blocks.len() as u64)
        });
        let Some(owner) = owner else { return };
        let slot = &mut owner.blocks[(block - owner.first) as usize];
        *slot = Held::Foreign;
        let foreign = |what: String| Violation { disk, block, what };
        match Stamp::read(bytes) {
            Some(stamp) => {
                self.stamps += 1;
                let place = (stamp.run, stamp.disk as usize, stamp.block, stamp.stream);
                if place != (self.run, disk, block, owner.stream) || stamp.acked.len() != streams {
                    let what = format!(
                        "holds operation {} of stream {} for block {} of disk {} in run {}",
                        stamp.sequence, stamp.stream, stamp.block, stamp.disk, stamp.run
                    );
                    self.foreign.push(foreign(what));
                    return;
                }
                *slot = Held::Write(stamp.sequence);
                for (proven, acked) in self.proven.iter_mut().zip(&stamp.acked) {
                    *proven = (*proven).max(*acked);
                }
                let own = &mut self.proven[owner.stream as usize];
                *own = (*own).max(stamp.sequence.saturating_sub(1));
            }
            None if is_zero(bytes) => *slot = Held::Zero,
            None => self.foreign.push(foreign("is torn, or holds what nobody wrote".into())),
        }
    }

    /// The cut of each stream within what is proven and known, and what no cut explains.
    pub(super) fn judge(self, known: Known<'_>) -> Verdict {
        let mut verdict = Verdict { violations: self.foreign, cut: Vec::new(), stamps: self.stamps };
        for stream in 0..self.layout.streams() {
            let index = stream as usize;
            let of = |mark: Option<&[u64]>| mark.and_then(|mark| mark.get(index)).copied();
            let bounds = Bounds {
                least: self.proven[index].max(of(known.earlier).unwrap_or(0)),
                most: of(known.later),
                at_rest: known.at_rest,
            };
            let regions: Vec<_> = self.regions.iter().filter(|region| region.stream == stream).collect();
            verdict.cut.push(judge_stream(self.layout, &regions, bounds, &mut verdict.violations));
        }
        verdict
    }
}
