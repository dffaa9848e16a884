//! Decides whether images can all be from one instant, and whether nothing is missing in them.
//!
//! The guest's streams (see `guest_writer`) do one operation after the other, and what each does is known beforehand. So
//! if all images are from one instant, there is for each stream a number *n*, its **cut**:
//!
//! * every operation up to *n* is in the images, unless a later one wrote over it;
//! * operation *n* + 1, which was on its way, is in them in any part, or not at all;
//! * nothing after that is.
//!
//! No log is needed, for the images tell how large *n* is at least. A visible stamp of operation *m* proves that *m* - 1
//! of its stream was acknowledged before the instant, and its vector proves the same for every other stream, on other
//! disks too. That is what catches a disk that is later than the others: its stamps prove writes that the others lack.
//!
//! ```text
//!   stream 0 on disk A   1 --- 2 --- 3 --- 4 --- 5            image of A has 3
//!                                     \                       image of B has 8, whose vector says "stream 0 had 4"
//!   stream 1 on disk B   ... 6 --- 7 --- 8                    A lacks 4: not one instant
//! ```
//!
//! Zeroing leaves no stamp, and may hide the writes before it. So *n* is sought: from the least that is proven upwards,
//! the first that explains every block. If none does, what speaks against the best is a violation: a lost write, a stale or
//! torn block, or disks from different instants.
//!
//! What the very last operations before the instant wrote may be proven by nothing, so an image that lacks them passes: it
//! is the image of a slightly earlier instant. [`check_between`] and [`check_at_rest`] close that gap with what the guest
//! itself counted.

mod contents;
mod stream;

use anyhow::{Context as _, Result, ensure};
use contents::Contents;
use guest_writer::{BLOCK, Layout, is_zero};
use std::{fmt, path::Path};

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
    /// For each stream the last operation that is in the images.
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

/// What is known of the instant besides the images; each number is the last operation of a stream that was acknowledged.
#[derive(Debug, Clone, Copy, Default)]
struct Known<'a> {
    /// Before the instant: all of these have to be there.
    earlier: Option<&'a [u64]>,
    /// After it: what is beyond these can only have been on its way.
    later: Option<&'a [u64]>,
    /// Nothing was on its way.
    at_rest: bool,
}

/// Checks raw images, in the order of the layout's disks, of a storm called `run`.
///
/// # Errors
/// If an image cannot be read.
pub fn check(images: &[impl AsRef<Path>], layout: &Layout, run: u64) -> Result<Verdict> {
    check_with(images, layout, run, Known::default())
}

/// The same, for an instant between two marks.
///
/// # Errors
/// If an image cannot be read.
pub fn check_between(
    images: &[impl AsRef<Path>],
    layout: &Layout,
    run: u64,
    earlier: &[u64],
    later: &[u64],
) -> Result<Verdict> {
    check_with(images, layout, run, Known { earlier: Some(earlier), later: Some(later), at_rest: false })
}

/// The same, for a guest that had stopped writing: the images hold all of `acked` and nothing else.
///
/// # Errors
/// If an image cannot be read.
pub fn check_at_rest(
    images: &[impl AsRef<Path>],
    layout: &Layout,
    run: u64,
    acked: &[u64],
) -> Result<Verdict> {
    check_with(images, layout, run, Known { earlier: Some(acked), later: Some(acked), at_rest: true })
}

fn check_with(images: &[impl AsRef<Path>], layout: &Layout, run: u64, known: Known<'_>) -> Result<Verdict> {
    Ok(scan(images, layout, run)?.judge(known))
}

fn scan<'a>(images: &[impl AsRef<Path>], layout: &'a Layout, run: u64) -> Result<Contents<'a>> {
    ensure!(images.len() == layout.disk_blocks.len(), "the storm had {} disks", layout.disk_blocks.len());
    let mut contents = Contents::new(layout, run);
    for (disk, image) in images.iter().enumerate() {
        for_data(image.as_ref(), |block, bytes| contents.put(disk, block, bytes))?;
    }
    Ok(contents)
}

/// Data where no stream ever writes: bytes of another disk, or from another place of it. Only for disks that nothing else
/// wrote to.
///
/// # Errors
/// If an image cannot be read.
pub fn strays(images: &[impl AsRef<Path>], layout: &Layout) -> Result<Vec<Violation>> {
    let mut strays = Vec::new();
    for (disk, image) in images.iter().enumerate() {
        let regions: Vec<_> =
            (0..layout.streams()).filter_map(|stream| layout.region(stream, disk)).collect();
        for_data(image.as_ref(), |block, bytes| {
            let owned = regions.iter().any(|&(first, count)| (first..first + count).contains(&block));
            if !owned && !is_zero(bytes) {
                strays.push(Violation { disk, block, what: "holds data, but nobody writes there".into() });
            }
        })?;
    }
    Ok(strays)
}

/// Whole blocks of a file that are not in a hole.
fn for_data(path: &Path, mut each: impl FnMut(u64, &[u8])) -> Result<()> {
    use rustix::fs::{SeekFrom, seek};
    use std::os::unix::fs::FileExt as _;
    const AT_ONCE: u64 = 1 << 20;
    let block = BLOCK as u64;
    let read = || format!("read {}", path.display());
    let file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let size = file.metadata()?.len();
    let mut buffer = vec![0; usize::try_from(AT_ONCE)?];
    let mut at = 0;
    while at < size {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data / block * block,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error).with_context(read),
        };
        let hole = seek(&file, SeekFrom::Hole(data.max(at))).with_context(read)?;
        at = data.max(at);
        let end = hole.next_multiple_of(block).min(size);
        while at < end {
            let length = usize::try_from((end - at).min(AT_ONCE))?;
            let bytes = &mut buffer[..length];
            file.read_exact_at(bytes, at).with_context(read)?;
            for (index, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
                each(at / block + index as u64, bytes);
            }
            at += length as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod test;
