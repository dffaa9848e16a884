//! Decides whether images can all be from one instant, and whether nothing is missing in them.
//!
//! The guest's streams (see `guest_writer`) do one operation after the other. So if all images are from one instant,
//! there is for each stream a number *R* such that all operations up to R are in the images, none after R + 1 is, and R + 1,
//! which may have been on its way, is in part or not. The images themselves tell R:
//!
//! * a visible stamp of operation M proves that M - 1 was acknowledged before the instant;
//! * its vector proves the same of operations of all other streams, on other disks too.
//!
//! R is the largest that is proven. Then every block of every region must hold the last operation up to R that wrote it,
//! or R + 1 where that is the one on its way. Zeroing leaves no stamp, so zero operations right after R may show too.
//! Anything else is a violation: a lost write, a stale or torn block, or disks from different instants.

use anyhow::{Context as _, Result};
use guest_writer::{BLOCK, Layout, Stamp, is_zero};
use std::{collections::HashMap, fmt, fs::File, os::unix::fs::FileExt as _, path::Path};

/// Something in the images that cannot be if they are from one instant and whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Index of the disk.
    pub disk: usize,
    /// Block of 4 KiB.
    pub block: u64,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {} block {}: {}", self.disk, self.block, self.what)
    }
}

/// What the oracle says.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// All that is wrong.
    pub violations: Vec<Violation>,
    /// For each stream the operations that must be, and are, in the images.
    pub cut: Vec<u64>,
    /// Stamped blocks that were looked at.
    pub stamps: u64,
}

impl Verdict {
    /// Whether the images are right, and have anything in them to be right about.
    pub fn is_valid(&self) -> bool {
        self.violations.is_empty() && self.stamps > 0
    }

    /// Operations in the images, all streams together.
    pub fn operations(&self) -> u64 {
        self.cut.iter().sum()
    }
}

enum Content {
    Zero,
    Stamp(Stamp),
    Other,
}

/// Checks raw images, in the order of the layout's disks, of a storm called `run`.
///
/// # Errors
/// If an image cannot be read.
pub fn check(images: &[impl AsRef<Path>], layout: &Layout, run: u64) -> Result<Verdict> {
    let mut contents = HashMap::new();
    for (disk, image) in images.iter().enumerate() {
        let image = image.as_ref();
        let file = File::open(image).with_context(|| format!("open {}", image.display()))?;
        for stream in 0..layout.streams() {
            let Some((first, count)) = layout.region(stream, disk) else { continue };
            let mut bytes = vec![0; usize::try_from(count)? * BLOCK];
            file.read_exact_at(&mut bytes, first * BLOCK as u64)
                .with_context(|| format!("read {count} blocks at block {first} of {}", image.display()))?;
            for (block, bytes) in (first..).zip(bytes.chunks_exact(BLOCK)) {
                let content = match Stamp::read(bytes) {
                    Some(stamp) => Content::Stamp(stamp),
                    None if is_zero(bytes) => Content::Zero,
                    None => Content::Other,
                };
                contents.insert((disk, block), content);
            }
        }
    }
    Ok(judge(&contents, layout, run))
}

fn judge(contents: &HashMap<(usize, u64), Content>, layout: &Layout, run: u64) -> Verdict {
    let streams = layout.streams() as usize;
    let mut verdict = Verdict::default();
    let wrong = |disk, block, what: String| Violation { disk, block, what };
    // What the stamps prove to have been acknowledged.
    let mut proven = vec![0u64; streams];
    let mut seen = vec![0u64; streams];
    for (&(disk, block), content) in contents {
        let Content::Stamp(stamp) = content else { continue };
        verdict.stamps += 1;
        let stream = stamp.stream as usize;
        if stamp.run != run || stamp.disk as usize != disk || stamp.block != block || stream >= streams {
            verdict.violations.push(wrong(disk, block, format!("holds what belongs elsewhere: {stamp:?}")));
            continue;
        }
        seen[stream] = seen[stream].max(stamp.sequence);
        for (proven, acked) in proven.iter_mut().zip(&stamp.acked) {
            *proven = (*proven).max(*acked);
        }
    }
    for (proven, seen) in proven.iter_mut().zip(&seen) {
        *proven = (*proven).max(seen.saturating_sub(1));
    }
    for stream in 0..layout.streams() {
        judge_stream(contents, layout, stream, proven[stream as usize], seen[stream as usize], &mut verdict);
    }
    verdict.cut = proven;
    verdict
}

fn judge_stream(
    contents: &HashMap<(usize, u64), Content>,
    layout: &Layout,
    stream: u32,
    proven: u64,
    seen: u64,
    verdict: &mut Verdict,
) {
    // The last operation up to `proven` that wrote each block.
    let mut last: HashMap<(usize, u64), (u64, bool)> = HashMap::new();
    for sequence in 1..=proven {
        let operation = layout.operation(stream, sequence);
        for block in operation.block..operation.block + operation.count {
            last.insert((operation.disk, block), (sequence, operation.zero));
        }
    }
    // What may show besides: the one on its way, and zeroing that left no stamp to prove it. A stamp of `proven + 1`
    // says that no zeroing is between.
    let mut may_be_zero = std::collections::HashSet::new();
    let mut next = if seen > proven { seen } else { proven };
    let mut zeroing = layout.operation(stream, next + 1);
    let mut allowed = 0;
    while allowed < 64 {
        if zeroing.zero {
            may_be_zero.extend((zeroing.block..zeroing.block + zeroing.count).map(|block| (zeroing.disk, block)));
        } else {
            break;
        }
        next += 1;
        allowed += 1;
        zeroing = layout.operation(stream, next + 1);
    }
    for disk in 0..layout.disk_blocks.len() {
        let Some((first, count)) = layout.region(stream, disk) else { continue };
        for block in first..first + count {
            let expected = last.get(&(disk, block)).copied();
            let Some(content) = contents.get(&(disk, block)) else { continue };
            let what = match (content, expected) {
                (Content::Other, _) => Some("is torn, or holds what nobody wrote".to_owned()),
                (Content::Zero, None | Some((_, true))) => None,
                (Content::Zero, Some(_)) if may_be_zero.contains(&(disk, block)) => None,
                (Content::Zero, Some((sequence, false))) => {
                    Some(format!("stream {stream}: operation {sequence} is missing, the block is zero (proven up to {proven})"))
                }
                (Content::Stamp(stamp), _) if stamp.sequence == proven + 1 && stamp.stream == stream => None,
                (Content::Stamp(stamp), Some((sequence, false))) if stamp.stream == stream && stamp.sequence == sequence => None,
                (Content::Stamp(stamp), expected) => Some(format!(
                    "stream {stream}: holds operation {} of stream {}, should hold {expected:?} (proven up to {proven})",
                    stamp.sequence, stamp.stream
                )),
            };
            verdict.violations.extend(what.map(|what| Violation { disk, block, what }));
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    const RUN: u64 = 42;

    /// Disks in memory and a storm on them, one operation at a time, in an order that the seed decides.
    struct Simulation {
        layout: Layout,
        disks: Vec<Vec<u8>>,
        acked: Vec<u64>,
        random: u64,
    }

    impl Simulation {
        fn new(seed: u64) -> Self {
            let layout = Layout { seed, per_disk: 2, disk_blocks: vec![240, 300, 270], span: 60 };
            let disks = layout.disk_blocks.iter().map(|blocks| vec![0; *blocks as usize * BLOCK]).collect();
            let acked = vec![0; layout.streams() as usize];
            Self { layout, disks, acked, random: seed }
        }

        fn next_stream(&mut self) -> u32 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 33) as u32 % self.layout.streams()
        }

        fn apply(&mut self, stream: u32, sequence: u64, blocks: Option<u64>) {
            let operation = self.layout.operation(stream, sequence);
            for block in operation.block..operation.block + operation.count.min(blocks.unwrap_or(u64::MAX)) {
                let at = block as usize * BLOCK;
                let bytes = &mut self.disks[operation.disk][at..at + BLOCK];
                let stamp = Stamp {
                    run: RUN,
                    disk: operation.disk as u32,
                    stream,
                    sequence,
                    block,
                    acked: self.acked.clone(),
                };
                if operation.zero { bytes.fill(0) } else { stamp.write(bytes) }
            }
        }

        fn run(&mut self, operations: usize) {
            for _ in 0..operations {
                let stream = self.next_stream();
                let sequence = self.acked[stream as usize] + 1;
                self.apply(stream, sequence, None);
                self.acked[stream as usize] = sequence;
            }
        }

        fn verdict(&self) -> Verdict {
            let mut contents = HashMap::new();
            for (disk, bytes) in self.disks.iter().enumerate() {
                for (block, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
                    let content = match Stamp::read(bytes) {
                        Some(stamp) => Content::Stamp(stamp),
                        None if is_zero(bytes) => Content::Zero,
                        None => Content::Other,
                    };
                    contents.insert((disk, block as u64), content);
                }
            }
            judge(&contents, &self.layout, RUN)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn images_of_one_instant_are_valid(seed in any::<u64>(), operations in 30usize..1500, on_its_way in 0u64..5) {
            let mut simulation = Simulation::new(seed);
            simulation.run(operations);
            // One operation of one stream is on its way, and in the image in part.
            let stream = simulation.next_stream();
            let next = simulation.acked[stream as usize] + 1;
            simulation.apply(stream, next, Some(on_its_way));
            let verdict = simulation.verdict();
            prop_assert!(verdict.is_valid(), "{:?}", &verdict.violations[..verdict.violations.len().min(3)]);
        }

        /// The images of one disk are later than those of the others by some operations.
        #[test]
        fn a_disk_from_another_instant_is_caught(seed in any::<u64>(), operations in 300usize..1000, disk in 0usize..3) {
            let mut simulation = Simulation::new(seed);
            simulation.run(operations);
            let early: Vec<_> = simulation.disks.clone();
            simulation.run(60);
            for (other, bytes) in early.into_iter().enumerate() {
                if other != disk {
                    simulation.disks[other] = bytes;
                }
            }
            prop_assert!(!simulation.verdict().is_valid());
        }
    }

    #[test]
    fn a_lost_write_a_stale_block_and_a_torn_one_are_caught() {
        for seed in 0..20 {
            let mut simulation = Simulation::new(seed);
            simulation.run(400);
            let before = simulation.disks.clone();
            simulation.run(300);
            assert!(simulation.verdict().is_valid());
            // Each 64 KiB that changed is put back in turn, as if its granule had been missed.
            let (mut missed, mut caught) = (0, 0);
            for disk in 0..3 {
                for granule in 0..simulation.disks[disk].len() / 65_536 {
                    let range = granule * 65_536..(granule + 1) * 65_536;
                    let now = simulation.disks[disk][range.clone()].to_vec();
                    if now == before[disk][range.clone()] {
                        continue;
                    }
                    missed += 1;
                    simulation.disks[disk][range.clone()].copy_from_slice(&before[disk][range.clone()]);
                    caught += u32::from(!simulation.verdict().is_valid());
                    simulation.disks[disk][range].copy_from_slice(&now);
                }
            }
            // What the very last operations did is proven by nothing, so missing it may go unseen.
            assert!(missed > 20 && caught + 3 >= missed, "seed {seed}: {caught} of {missed}");
            let written = simulation.disks[0].chunks_exact(BLOCK).position(|block| !is_zero(block)).unwrap();
            simulation.disks[0][written * BLOCK + 600] ^= 0x40;
            assert!(!simulation.verdict().is_valid(), "seed {seed}: torn");
        }
    }

    #[test]
    fn an_empty_image_proves_nothing() {
        assert!(!Simulation::new(1).verdict().is_valid());
    }
}
