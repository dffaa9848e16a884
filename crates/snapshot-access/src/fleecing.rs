//! Fleecing images: where QEMU copies old data before the guest overwrites it.
//!
//! # Crash
//! The file has no name (`O_TMPFILE`); QEMU gets its descriptor. Whoever dies, the space is free as soon as the last
//! descriptor is closed, and no path or permission ever mattered. A file system that has no such files (NFS, many FUSE
//! ones) gets a name that is journaled before it is made and removed as soon as the file is open.

use crate::{
    error::{Error, ErrorKind, Result},
    process,
    step::Step,
};
use blkmap::Fiemap as _;
use rustix::{
    fs::{
        AtFlags, FallocateFlags, Mode, OFlags, SeekFrom, StatxFlags, fallocate, fchmod, fchown, fstat,
        fstatfs, fstatvfs, ftruncate, open, seek, statvfs, statx, unlink,
    },
    io::{Errno, ReadWriteFlags, pwrite, pwritev2},
    process::{Gid, Uid, geteuid},
};
use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use stillpoint_model::{Granularity, Length, Offset, Range};

/// Begins the name of an image that must have one for a moment.
const NAME_PREFIX: &str = ".stillpoint-fleece-";
/// Storage that does not answer for this long hangs, as far as a guest is concerned that would wait for it.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// Whether a name in a journal is that of a fleecing image, and nothing else's.
pub(crate) fn is_a_file_of_ours(path: &Path) -> bool {
    path.is_absolute()
        && path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(NAME_PREFIX))
}

/// Whether the file system of `directory` answers. What hangs must be found out before QEMU's nodes are touched: taking
/// them out waits for what is under way, and the guest with it.
pub(crate) async fn storage_answers(directory: PathBuf) -> bool {
    in_time(move || statvfs(&directory).map(|_| ())).await
}

/// Whether `ask` returns in time, whatever it returns. It may never do: then its thread is given up.
async fn in_time(ask: impl FnOnce() -> rustix::io::Result<()> + Send + 'static) -> bool {
    tokio::time::timeout(ANSWERS_WITHIN, tokio::task::spawn_blocking(ask)).await.is_ok()
}

/// File systems whose `FIEMAP` shows what is allocated at every moment, also while it is on its way to the disk: it is read from the
/// same state, under the same lock, as writing changes it. Magic numbers of ext2 to ext4 and XFS (statfs(2)).
const TELLING: [u64; 2] = [0xef53, 0x5846_5342];

/// File systems that answer at once whatever their storage does, and keep a file's permissions: btrfs and tmpfs besides.
const IN_THE_KERNEL: [u64; 4] = [TELLING[0], TELLING[1], 0x9123_683e, 0x0102_1994];

/// The permissions of an image whose old data was given up. The file has no name, so they let nobody in or out; they are a
/// mark that every process sees that has it open, and that QEMU cannot change by writing.
const GIVEN_UP: Mode = Mode::RUSR;

/// At the least so much is taken back in one go.
const TAKE_BACK: u64 = 64 << 20;

/// Marks an image as given up, for every process that has it open. To be done for all images of a run before
/// [`take_back`], which changes what is read of them.
pub(crate) fn mark_given_up(file: impl AsFd) -> rustix::io::Result<()> {
    fchmod(file, GIVEN_UP)
}

/// Gives all space of an image of `size` bytes back, at once, while QEMU has it open and writes to it. Truncating drops what
/// is on its way to the disk; punching holes would wait for it first. In parts, since QEMU's writes wait meanwhile. The size
/// is the old one in the end: QEMU goes on within it.
pub(crate) fn take_back(file: impl AsFd, size: u64) -> rustix::io::Result<()> {
    let part = TAKE_BACK.max(size / 64);
    let mut at = size;
    while at > 0 {
        at = at.saturating_sub(part);
        ftruncate(&file, at)?;
    }
    ftruncate(&file, size)
}

/// Bytes that a file takes of its file system now.
pub(crate) fn used(file: impl AsFd) -> Length {
    // `st_blocks` counts 512 bytes whatever the file system's block is (POSIX leaves it open, Linux does not).
    let blocks = fstat(file).map_or(0, |stat| stat.st_blocks);
    Length::new(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
}

/// Tries on a new, empty file whether both ways in which QEMU keeps a cluster aside, by writing it and by allocating it
/// without data, show at once in what the file system tells to be allocated. The file is empty again afterwards.
fn tells_what_is_allocated(file: &File, size: u64) -> io::Result<bool> {
    let part = size.min(u64::from(Granularity::DEFAULT.get()));
    let system = u64::try_from(fstatfs(file)?.f_type).unwrap_or(0);
    if part == 0 || !TELLING.contains(&system) {
        return Ok(false);
    }
    let shows = || Ok::<_, io::Error>(!file.fiemap_range(0, part)?.is_empty());
    let punch = || fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, part);
    let empty = !shows()?;
    // Zeroes, since a file system that leaves them out must not pass.
    pwrite(file, &[0], 0)?;
    let written = shows()?;
    punch()?;
    let gone = !shows()?;
    match fallocate(file, FallocateFlags::ZERO_RANGE, 0, part) {
        // As QEMU does then.
        Err(Errno::OPNOTSUPP | Errno::INVAL) => fallocate(file, FallocateFlags::empty(), 0, part)?,
        done => done?,
    }
    let allocated = shows()?;
    punch()?;
    Ok(empty && written && gone && allocated && !shows()?)
}

/// The fleecing image of one disk.
#[derive(Debug)]
pub(crate) struct FleecingImage {
    file: File,
    directory: PathBuf,
    /// What QEMU sees, and a little more.
    size: u64,
    /// See [`Self::tells_what_is_kept`].
    tells: bool,
    /// Whether another process may mark it as given up, which is seen without asking storage that may hang.
    shared: bool,
    given_up: AtomicBool,
}

impl FleecingImage {
    /// A sparse image for a disk of `size` bytes in `directory`; what it does to the host is told to `record` first.
    pub(crate) fn create(
        directory: &Path,
        size: Length,
        record: &mut dyn FnMut(Step) -> Result<()>,
    ) -> Result<Self> {
        let failed = |doing: &str, error: Errno| {
            Error::new(ErrorKind::Host, format!("{doing} a fleecing image in {}", directory.display()))
                .because(error)
        };
        // QEMU counts in sectors of 512 bytes and wants the target to be no smaller than the disk.
        let sectors = size.get().checked_next_multiple_of(512).unwrap_or(size.get());
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let owner = Mode::RUSR | Mode::WUSR;
        let file = match open(directory, flags | OFlags::TMPFILE, owner) {
            Ok(file) => {
                ftruncate(&file, sectors).map_err(|error| failed("give its size to", error))?;
                file
            }
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) if directory.is_dir() => {
                let mut random = [0u8; 8];
                rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                    .map_err(|error| failed("name", error))?;
                let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
                let path = directory.join(format!("{NAME_PREFIX}{:016x}", u64::from_ne_bytes(random)));
                record(Step::FleecingFile { path: path.clone() })?;
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                let file = open(&path, flags, owner).map_err(|error| failed("create", error))?;
                stillpoint_failpoint::reached("fleecing:named");
                // Some file systems know an open file by its name only.
                ftruncate(&file, sectors).map_err(|error| failed("give its size to", error))?;
                unlink(&path).map_err(|error| failed("take the name from", error))?;
                file
            }
            Err(error) => return Err(failed("create", error)),
        };
        let file = File::from(file);
        let tells = tells_what_is_allocated(&file, sectors).unwrap_or(false);
        let system = fstatfs(&file).ok().and_then(|system| u64::try_from(system.f_type).ok());
        let shared = system.is_some_and(|system| IN_THE_KERNEL.contains(&system));
        // A strange umask must not look like the mark.
        let shared = shared && fstat(&file).is_ok_and(|stat| Mode::from_raw_mode(stat.st_mode) != GIVEN_UP);
        let given_up = AtomicBool::new(false);
        Ok(Self { file, directory: directory.to_owned(), size: sectors, tells, shared, given_up })
    }

    /// The descriptor to hand to QEMU.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its number among the descriptors of QEMU, which has it by now; that QEMU can open it again is seen to.
    pub(crate) async fn number_in(self: &Arc<Self>, qemu: u32) -> Option<u32> {
        let image = Arc::clone(self);
        let find = move || {
            // Opening it again asks for the file's permissions. It has no name, so nobody else gets there.
            let (user, group) = process::user_of(qemu)?;
            if user != geteuid().as_raw() {
                fchown(&image.file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group))).ok()?;
            }
            process::descriptors_of(qemu, &image.file).first().copied()
        };
        tokio::time::timeout(ANSWERS_WITHIN, tokio::task::spawn_blocking(find)).await.ok()?.ok()?
    }

    /// Bytes that it takes of the file system now.
    pub(crate) fn used(&self) -> Length {
        used(&self.file)
    }

    /// Its size, and whether another process may take its space back.
    pub(crate) fn size_and_shared(&self) -> (u64, bool) {
        (self.size, self.shared)
    }

    /// Says that what it holds is going to be given up. To be done for all images of a run before [`Self::take_back`].
    pub(crate) fn mark_given_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }

    /// Gives its space back while QEMU writes to it; see [`take_back`].
    pub(crate) fn take_back(&self) {
        if let Err(error) = take_back(&self.file, self.size) {
            tracing::debug!(%error, "a fleecing image was not taken back");
        }
    }

    /// Whether all that was read through it *before* this was asked is what the disk held at the instant: giving up is marked
    /// before anything is taken back, by this process and by any other.
    pub(crate) fn is_whole(&self) -> bool {
        if self.given_up.load(Ordering::SeqCst) {
            return false;
        }
        let marked = |mode| Mode::from_raw_mode(mode) == GIVEN_UP;
        !self.shared || fstat(&self.file).is_ok_and(|stat| !marked(stat.st_mode))
    }

    /// The first part of `range` that holds data; `None` if it holds none.
    pub(crate) fn first_data(&self, range: Range) -> Option<Range> {
        // On a descriptor that QEMU shares, this moves an offset that nobody uses: QEMU reads and writes by position.
        let start = seek(&self.file, SeekFrom::Data(range.start().get())).ok()?;
        let end = seek(&self.file, SeekFrom::Hole(start)).ok()?;
        Range::between(Offset::new(start), Offset::new(end)).ok()?.intersect(range)
    }

    /// Whether [`Self::kept`] can be relied on: whether its file system tells all that is allocated, as soon as it is.
    pub(crate) fn tells_what_is_kept(&self) -> bool {
        self.tells
    }

    /// The parts of `range` for which anything is kept aside, zeroes too, in order. Blocks.
    ///
    /// # Errors
    /// If the file system does not tell.
    pub(crate) fn kept(&self, range: Range) -> io::Result<Vec<Range>> {
        let extents = self.file.fiemap_range(range.start().get(), range.length().get())?;
        let within = |extent: blkmap::FiemapExtent| {
            let extent = Range::new(Offset::new(extent.logical), Length::new(extent.length)).ok()?;
            extent.intersect(range).filter(|part| !part.is_empty())
        };
        Ok(extents.into_iter().filter_map(within).collect())
    }

    /// Bytes still free in the file system that holds it.
    pub(crate) fn free(&self) -> Option<Length> {
        let system = fstatvfs(&self.file).ok()?;
        Some(Length::new(system.f_bavail.saturating_mul(system.f_frsize)))
    }

    /// Gives its space back now: QEMU keeps a removed descriptor until the guest runs.
    pub(crate) fn empty(&self) {
        if let Err(error) = ftruncate(&self.file, 0) {
            tracing::debug!(%error, "a fleecing image was not emptied");
        }
    }

    /// Whether its storage answers to a question, and if `to_a_write` also to a write that has to reach the disk.
    pub(crate) async fn answers(self: &Arc<Self>, to_a_write: bool) -> bool {
        let image = Arc::clone(self);
        in_time(move || {
            let ask = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
            statx(&image.file, "", ask, StatxFlags::BASIC_STATS)?;
            if to_a_write {
                // Behind the image's end, where QEMU never looks.
                let end = u64::try_from(fstat(&image.file)?.st_size).unwrap_or(0);
                pwritev2(&image.file, &[IoSlice::new(&[0])], end, ReadWriteFlags::DSYNC)?;
            }
            Ok(())
        })
        .await
    }

    /// Where it is, for messages.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn it_leaves_no_name_and_tells_how_full_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let image = FleecingImage::create(directory.path(), Length::new(1_000_001), &mut |_| Ok(())).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(image.used(), Length::ZERO);
        pwrite(image.descriptor(), &[1u8; 65_536], 0).unwrap();
        rustix::fs::fdatasync(image.descriptor()).unwrap();
        assert!(image.used().get() >= 65_536);
        let whole = Range::whole(Length::new(1_000_001)).unwrap();
        assert_eq!(image.first_data(whole), Range::new(Offset::ZERO, Length::new(65_536)).ok());
        assert_eq!(image.first_data(whole.split(Offset::new(65_536)).1), None);
    }

    #[test]
    fn a_file_system_that_does_not_tell_what_is_allocated_is_not_relied_on() {
        // tmpfs has no FIEMAP.
        let directory = Path::new("/dev/shm");
        if statvfs(directory).is_ok() {
            let image = FleecingImage::create(directory, Length::new(1 << 20), &mut |_| Ok(())).unwrap();
            assert!(!image.tells_what_is_kept());
        }
        let image = FleecingImage::create(&std::env::temp_dir(), Length::ZERO, &mut |_| Ok(())).unwrap();
        assert!(!image.tells_what_is_kept(), "there is nothing to try it on");
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let directory = Path::new("/nonexistent/fleecing");
        let error = FleecingImage::create(directory, Length::new(1), &mut |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/fleecing"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Host);
    }
}
