//! Reading an image itself, past QEMU, while the guest writes to it (ADR 0018).
//!
//! What is read of the image is what the disk held at the instant wherever the filter has kept nothing aside, and that can
//! be told *afterwards*:
//!
//! ```text
//!   QEMU, for a write of the guest          we, for a read
//!
//!   1  old data into the fleecing image     a  read the image
//!   2  the guest's data into the image      b  ask the fleecing image what it has of that range
//! ```
//!
//! QEMU begins 2 when 1 is complete. If `a` saw anything of 2, then 1 was complete before `b`, and `b` sees it: that cluster is
//! read through QEMU instead. If `b` finds nothing, nothing of 2 had begun when `a` ended. `b` asks for *allocated* parts, not
//! for data: old data that was zero is kept aside as allocated space without any data (`fallocate`), which `SEEK_DATA` does not
//! show. A snapshot that broke keeps nothing aside any more, so QEMU is asked after `a` whether it holds. Both questions are
//! asked for all reads at once that wait for an answer: see [`Proof`].

mod qcow2;

use crate::{fleecing::FleecingImage, inspect::Descriptor, taking::FILTER_CLUSTER};
use bytes::BytesMut;
use qcow2::{Place, Tables};
use rustix::{
    fs::{Mode, OFlags, open},
    io::{Errno, ReadWriteFlags, pread, preadv2},
};
use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, IoSliceMut},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use stillpoint_buffer as buffer;
use stillpoint_model::{Length, Offset, Range};
use stillpoint_nbd::Client;
use tokio::sync::oneshot;

/// How long reading an image may take before QEMU is asked instead, which has a deadline of its own.
const READ_DEADLINE: Duration = Duration::from_secs(30);
/// The same for what the fleecing image has, which the kernel knows without reading anything.
const KEPT_DEADLINE: Duration = Duration::from_secs(2);
/// The same for finding and opening an image: any of the files that QEMU has open may be on storage that hangs.
const OPEN_DEADLINE: Duration = Duration::from_secs(5);

/// The file or block device that holds a disk, and that QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageFile {
    qemu: u32,
    format: ImageFormat,
    identity: Identity,
}

/// How an image holds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageFormat {
    /// Byte for byte.
    Raw,
    /// In clusters; QEMU has to flush its tables after the instant.
    Qcow2,
}

impl ImageFormat {
    /// By QEMU's name for it; `None` for those that are QEMU's alone to read.
    pub(crate) fn of(driver: &str) -> Option<Self> {
        match driver {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

/// Which file or device, whatever path leads to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    Regular { device: u64, inode: u64 },
    Block { device: u64 },
}

impl Identity {
    fn of(metadata: &fs::Metadata) -> Option<Self> {
        let kind = metadata.file_type();
        if kind.is_file() {
            Some(Self::Regular { device: metadata.dev(), inode: metadata.ino() })
        } else if kind.is_block_device() {
            Some(Self::Block { device: metadata.rdev() })
        } else {
            None
        }
    }
}

impl ImageFile {
    /// What `path` means to the process `qemu`; `None` if it cannot be seen from here, or not in time.
    pub(crate) async fn find(qemu: u32, path: &Path, format: ImageFormat) -> Option<Self> {
        // An absolute link is followed from our root, not from that process's; then no descriptor of it fits.
        let path = PathBuf::from(format!("/proc/{qemu}/root")).join(path.strip_prefix("/").ok()?);
        let metadata = in_time(OPEN_DEADLINE, move || fs::metadata(path)).await.ok()?;
        Some(Self { qemu, format, identity: Identity::of(&metadata)? })
    }

    /// Whether [`open`](Self::open) is right only after QEMU has flushed the image.
    pub(crate) fn needs_flush(&self) -> bool {
        self.format == ImageFormat::Qcow2
    }

    /// Opens it by QEMU's own descriptor, so that nothing is ever read that QEMU has not open for this disk's `size`, and
    /// past the page cache if QEMU goes past it. `None` if QEMU has it open no more, if anything does not fit, or not in time.
    pub(crate) async fn open(&self, size: Length) -> Option<DirectImage> {
        let file = self.clone();
        in_time(OPEN_DEADLINE, move || Ok(file.open_now(size))).await.ok()?
    }

    fn open_now(&self, size: Length) -> Option<DirectImage> {
        let directory = format!("/proc/{}/fd", self.qemu);
        let mut found: Option<(PathBuf, bool)> = None;
        for entry in fs::read_dir(directory).ok()? {
            let path = entry.ok()?.path();
            if !fs::metadata(&path).is_ok_and(|metadata| Identity::of(&metadata) == Some(self.identity)) {
                continue;
            }
            let flags = self.descriptor(&path)?.flags;
            if flags.contains(OFlags::PATH) || flags.contains(OFlags::WRONLY) {
                continue;
            }
            let past_cache = flags.contains(OFlags::DIRECT);
            match &found {
                Some((_, other)) if *other != past_cache => return None,
                Some(_) => {}
                None => found = Some((path, past_cache)),
            }
        }
        let (path, past_cache) = found?;
        let mut flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        if past_cache {
            flags |= OFlags::DIRECT;
        }
        let file = File::from(open(&path, flags, Mode::empty()).ok()?);
        // By now the number may stand for another file.
        if Identity::of(&file.metadata().ok()?) != Some(self.identity) {
            return None;
        }
        if self.format == ImageFormat::Qcow2 {
            let tables = Tables::open(&file, size)?;
            return Some(DirectImage { file, past_cache, tables: Some(tables) });
        }
        let has = Length::new(rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).ok()?);
        // QEMU counts in sectors. A `raw` node with an offset or a size of its own shows less than the file has.
        let whole = has.get().checked_next_multiple_of(512) == Some(size.get());
        whole.then_some(DirectImage { file, past_cache, tables: None })
    }

    fn descriptor(&self, path: &Path) -> Option<Descriptor> {
        Descriptor::of(self.qemu, path.file_name()?.to_str()?)
    }

    /// Where the kernel says that QEMU has it open for writing, and whether with QEMU's lock; `None` if it has not, or that
    /// cannot be seen.
    pub(crate) async fn held_for_writing(&self) -> Option<(PathBuf, bool)> {
        let file = self.clone();
        in_time(OPEN_DEADLINE, move || Ok(file.held_now())).await.ok()?
    }

    fn held_now(&self) -> Option<(PathBuf, bool)> {
        let mut held: Option<(PathBuf, bool)> = None;
        for entry in fs::read_dir(format!("/proc/{}/fd", self.qemu)).ok()? {
            let path = entry.ok()?.path();
            if !fs::metadata(&path).is_ok_and(|metadata| Identity::of(&metadata) == Some(self.identity)) {
                continue;
            }
            let Some(descriptor) = self.descriptor(&path).filter(|open| open.writes()) else { continue };
            let locked = descriptor.locked || held.as_ref().is_some_and(|(_, locked)| *locked);
            held = Some((fs::read_link(&path).ok()?, locked));
        }
        held
    }
}

/// An image, open for reading.
#[derive(Debug)]
pub(crate) struct DirectImage {
    file: File,
    /// Whether reading it goes past the page cache.
    past_cache: bool,
    /// Where it has what, if it is not the disk byte for byte.
    tables: Option<Tables>,
}

impl DirectImage {
    /// What the image holds of `range` now, in memory that begins on a page, as `O_DIRECT` wants it; and the parts, in order, that
    /// it does not hold as they are, of which the memory has anything.
    ///
    /// # Errors
    /// If the kernel fails it, the image ends within, or it takes too long.
    pub(crate) async fn read(self: &Arc<Self>, range: Range) -> io::Result<(BytesMut, Vec<Range>)> {
        let places = match &self.tables {
            None => vec![Place { range, at: range.start().get() }],
            Some(tables) => match tables.places(None, range) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let image = Arc::clone(self);
                    let look = move || match &image.tables {
                        Some(tables) => tables.places(Some(&image.file), range),
                        None => Ok(Vec::new()),
                    };
                    in_time(READ_DEADLINE, look).await?
                }
                places => places?,
            },
        };
        let elsewhere = qcow2::elsewhere(range, &places);
        let mut reading = Reading::of(range, places)?;
        // What is in the page cache costs less than a thread to wait for it. Past the page cache the kernel would wait for the
        // storage all the same.
        let at_hand = |rest: &mut [u8], at| {
            preadv2(&self.file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::NOWAIT)
        };
        if !self.past_cache && reading.go_on(at_hand)? {
            return Ok((reading.bytes, elsewhere));
        }
        let image = Arc::clone(self);
        let wait = move || {
            let whole = reading.go_on(|rest, at| pread(&image.file, rest, at))?;
            // A buffer that is not full holds what an earlier read left there.
            if whole { Ok(reading.bytes) } else { Err(io::ErrorKind::WouldBlock.into()) }
        };
        Ok((in_time(READ_DEADLINE, wait).await?, elsewhere))
    }
}

/// Waits for `work` in a thread that is given up if storage hangs.
pub(crate) async fn in_time<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await?.map_err(io::Error::other)?
}

/// A read on its way.
struct Reading {
    range: Range,
    bytes: BytesMut,
    /// Where the rest is.
    places: VecDeque<Place>,
}

impl Reading {
    fn of(range: Range, places: Vec<Place>) -> io::Result<Self> {
        let length = usize::try_from(range.length().get()).map_err(io::Error::other)?;
        Ok(Self { range, bytes: buffer::initialized(length), places: places.into() })
    }

    /// Reads the rest with `read`, which gets what is to be filled and its place in the image. `false` if it would have to wait,
    /// so that something is still missing.
    fn go_on(&mut self, read: impl Fn(&mut [u8], u64) -> rustix::io::Result<usize>) -> io::Result<bool> {
        while let Some(place) = self.places.front_mut() {
            let from = place.range.start().get().saturating_sub(self.range.start().get());
            let until = from.saturating_add(place.range.length().get());
            let part = usize::try_from(from).ok().zip(usize::try_from(until).ok());
            let part = part.and_then(|(from, until)| self.bytes.get_mut(from..until));
            match read(part.ok_or(io::ErrorKind::InvalidInput)?, place.at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    let done = place.range.start().get().saturating_add(count as u64);
                    place.at = place.at.saturating_add(count as u64);
                    place.range = place.range.split(Offset::new(done)).1;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::OPNOTSUPP) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            if place.range.is_empty() {
                self.places.pop_front();
            }
        }
        Ok(true)
    }
}

/// What became of a read.
#[derive(Debug)]
pub(crate) enum Proven {
    /// It is right but for these parts, whole clusters in order, which were kept aside.
    But(Vec<Range>),
    /// QEMU does not answer for the snapshot any more.
    Broken(stillpoint_nbd::Error),
    /// It could not be found out.
    Unknown,
}

/// Proves what was read, for all that wait at once: it takes a message to QEMU and back and a thread that may be given up, and
/// dozens of reads are on their way at the same time.
pub(crate) struct Proof {
    client: Client,
    fleecing: Arc<FleecingImage>,
    size: Length,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    reads: Vec<(Range, oneshot::Sender<Proven>)>,
    /// Somebody works on those before.
    busy: bool,
}

impl Proof {
    pub(crate) fn new(client: Client, fleecing: Arc<FleecingImage>, size: Length) -> Self {
        Self { client, fleecing, size, waiting: Mutex::default() }
    }

    /// Proves that what was read of `range`, before this was called, is what the disk held at the instant.
    pub(crate) async fn of(self: &Arc<Self>, range: Range) -> Proven {
        let (answer, answered) = oneshot::channel();
        let first = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.reads.push((range, answer));
            !std::mem::replace(&mut waiting.busy, true)
        };
        if first {
            tokio::spawn(Arc::clone(self).work());
        }
        match tokio::time::timeout(KEPT_DEADLINE, answered).await {
            Ok(Ok(proven)) => proven,
            _ => Proven::Unknown,
        }
    }

    async fn work(self: Arc<Self>) {
        loop {
            let mut reads = {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if waiting.reads.is_empty() {
                    waiting.busy = false;
                    return;
                }
                std::mem::take(&mut waiting.reads)
            };
            reads.sort_by_key(|(range, _)| range.start());
            let runs = join(reads.iter().map(|(range, _)| *range));
            let asked: Vec<_> = runs.iter().map(|run| run.align_outward(FILTER_CLUSTER, self.size)).collect();
            let fleecing = Arc::clone(&self.fleecing);
            let kept = tokio::task::spawn_blocking(move || {
                let kept: io::Result<Vec<_>> = asked.into_iter().map(|run| fleecing.kept(run)).collect();
                Ok::<_, io::Error>(kept?.concat())
            });
            let holds = self.holds(&runs).await;
            let kept = match kept.await {
                Ok(Ok(kept)) => Some(kept),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a fleecing image does not tell what it has");
                    None
                }
                Err(_) => None,
            };
            for (range, answer) in reads {
                let proven = match (&kept, holds) {
                    // One of them may be the only one that is wrong.
                    (_, false) => match self.client.block_status(range).await {
                        Err(error) => Proven::Broken(error),
                        Ok(_) => Proven::Unknown,
                    },
                    (None, _) => Proven::Unknown,
                    (Some(kept), true) => Proven::But(clusters(kept, range, self.size)),
                };
                // Whoever asked may have been stopped.
                let _ = answer.send(proven);
            }
        }
    }

    /// QEMU answers for a range if the snapshot holds and no part of it was given back.
    async fn holds(&self, runs: &[Range]) -> bool {
        for run in runs {
            if self.client.block_status(*run).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// Ranges in order, those that touch as one.
pub(crate) fn join(ranges: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut joined: Vec<Range> = Vec::new();
    for range in ranges.filter(|range| !range.is_empty()) {
        let before = joined.last_mut().filter(|before| before.end() >= range.start());
        let both = before
            .as_ref()
            .and_then(|before| Range::between(before.start(), before.end().max(range.end())).ok());
        match (before, both) {
            (Some(before), Some(both)) => *before = both,
            _ => joined.push(range),
        }
    }
    joined
}

/// The clusters of `range` of which anything is in `kept`, which is in order.
fn clusters(kept: &[Range], range: Range, size: Length) -> Vec<Range> {
    let first = kept.partition_point(|part| part.align_outward(FILTER_CLUSTER, size).end() <= range.start());
    let parts = kept.iter().skip(first).map(|part| part.align_outward(FILTER_CLUSTER, size));
    let parts = parts.take_while(|part| part.start() < range.end());
    join(parts.filter_map(|part| part.intersect(range)))
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    async fn image(length: u64) -> (tempfile::NamedTempFile, ImageFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(length).unwrap();
        let found =
            ImageFile::find(std::process::id(), &fs::canonicalize(file.path()).unwrap(), ImageFormat::Raw)
                .await
                .unwrap();
        (file, found)
    }

    #[tokio::test]
    async fn only_what_the_process_has_open_and_what_is_the_whole_disk_is_read() {
        let (file, found) = image(1 << 20).await;
        rustix::io::pwrite(&file, b"here", 4096).unwrap();
        let opened = found.open(Length::new(1 << 20)).await.unwrap();
        let opened = Arc::new(opened);
        let bytes = opened.read(Range::new(Offset::new(4096), Length::new(4)).unwrap()).await.unwrap();
        assert_eq!((&bytes.0[..], bytes.1), (&b"here"[..], Vec::new()));
        assert!(
            found.open(Length::new((1 << 20) - 512)).await.is_none(),
            "a part of the file is not the disk"
        );
        let past_the_end = Range::new(Offset::new((1 << 20) - 1), Length::new(2)).unwrap();
        assert_eq!(opened.read(past_the_end).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        drop(opened);
        let path = file.into_temp_path();
        assert!(found.open(Length::new(1 << 20)).await.is_none(), "it is closed");
        drop(path);
    }

    #[tokio::test]
    async fn a_size_that_is_no_multiple_of_a_sector_is_rounded_as_qemu_does() {
        let (_file, found) = image(1000).await;
        assert!(found.open(Length::new(1024)).await.is_some());
        assert!(found.open(Length::new(1000)).await.is_none());
    }

    #[tokio::test]
    async fn what_is_open_past_the_page_cache_and_through_it_is_left_to_qemu() {
        let (file, found) = image(1 << 20).await;
        let past = open(file.path(), OFlags::RDWR | OFlags::DIRECT, Mode::empty());
        let Ok(past) = past else { return };
        assert!(found.open(Length::new(1 << 20)).await.is_none());
        drop(past);
        assert!(found.open(Length::new(1 << 20)).await.is_some());
    }

    #[tokio::test]
    async fn neither_directories_nor_what_is_not_there_are_images() {
        let own = std::process::id();
        assert_eq!(ImageFile::find(own, Path::new("/tmp"), ImageFormat::Raw).await, None);
        assert_eq!(ImageFile::find(own, Path::new("/dev/null"), ImageFormat::Raw).await, None);
        assert_eq!(ImageFile::find(own, Path::new("/nonexistent/image"), ImageFormat::Raw).await, None);
        assert_eq!(ImageFile::find(own, Path::new("json:{}"), ImageFormat::Raw).await, None);
    }

    #[test]
    fn a_read_that_would_have_to_wait_is_not_taken_for_whole() {
        let range = Range::new(Offset::new(512), Length::new(8)).unwrap();
        let mut reading = Reading::of(range, vec![Place { range, at: 4096 }]).unwrap();
        let asked = std::cell::Cell::new(0);
        let half = |rest: &mut [u8], at: u64| {
            asked.set(asked.get() + 1);
            assert_eq!(
                (rest.len(), at),
                (if asked.get() == 1 { 8 } else { 3 }, if asked.get() == 1 { 4096 } else { 4101 })
            );
            if asked.get() == 1 { Ok(5) } else { Err(Errno::AGAIN) }
        };
        assert!(!reading.go_on(half).unwrap());
        assert!(reading.go_on(|rest, at| Ok(if at == 4101 { rest.len() } else { 0 })).unwrap());
        assert!(reading.go_on(|_, _| panic!("it is whole")).unwrap());
    }

    proptest! {
        /// Whatever was kept aside, of whatever range: each cluster that holds any of it is read again, and no other.
        #[test]
        fn exactly_the_clusters_that_were_kept_aside_are_read_through_qemu(
            start in 0u64..4000, length in 1u64..2000, mut kept in prop::collection::vec((0u64..5000, 1u64..300), 0..20),
        ) {
            let unit = 512;
            let range = |start: u64, length: u64| Range::new(Offset::new(start * unit), Length::new(length * unit)).unwrap();
            let size = Length::new(6001 * unit);
            let read = range(start, length);
            kept.sort_unstable();
            let kept = join(kept.into_iter().map(|(start, length)| range(start, length)));
            let parts = clusters(&kept, read, size);
            prop_assert!(parts.is_sorted_by(|a, b| a.end() < b.start()));
            let cluster = u64::from(FILTER_CLUSTER.get());
            for sector in start..start + length {
                let at = sector * unit;
                let (first, last) = (at / cluster * cluster, at / cluster * cluster + cluster);
                let aside = kept.iter().any(|part| part.start().get() < last && part.end().get() > first);
                let again = parts.iter().any(|part| (part.start().get()..part.end().get()).contains(&at));
                prop_assert_eq!(aside, again, "sector {}", sector);
            }
            prop_assert!(parts.iter().all(|part| part.intersect(read) == Some(*part)));
        }
    }
}
