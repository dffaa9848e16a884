//! Fleecing images: where QEMU copies old data before the guest overwrites it.
//!
//! # Crash
//! The file has no name (`O_TMPFILE`); QEMU gets its descriptor. Whoever dies, the space is free as soon as the last
//! descriptor is closed, and no path or permission ever mattered.

use crate::error::{Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags, SeekFrom, fstat, fstatvfs, ftruncate, open, seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use stillpoint_model::{Length, Offset, Range};

/// The fleecing image of one disk.
#[derive(Debug)]
pub(crate) struct FleecingImage {
    file: OwnedFd,
    directory: PathBuf,
}

impl FleecingImage {
    /// A sparse image for a disk of `size` bytes in `directory`.
    pub(crate) fn create(directory: &Path, size: Length) -> Result<Self> {
        let failed = |doing: &str, error: rustix::io::Errno| {
            Error::new(ErrorKind::Host, format!("{doing} a fleecing image in {}", directory.display()))
                .because(error)
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file =
            open(directory, flags, Mode::RUSR | Mode::WUSR).map_err(|error| failed("create", error))?;
        // QEMU counts in sectors of 512 bytes and wants the target to be no smaller than the disk.
        let sectors = size.get().checked_next_multiple_of(512).unwrap_or(size.get());
        ftruncate(&file, sectors).map_err(|error| failed("give its size to", error))?;
        Ok(Self { file, directory: directory.to_owned() })
    }

    /// The descriptor to hand to QEMU.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes that it takes of the file system now.
    pub(crate) fn used(&self) -> Length {
        // `st_blocks` counts 512 bytes whatever the file system's block is (POSIX leaves it open, Linux does not).
        let blocks = fstat(&self.file).map_or(0, |stat| stat.st_blocks);
        Length::new(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
    }

    /// The first part of `range` that holds data; `None` if it holds none.
    pub(crate) fn first_data(&self, range: Range) -> Option<Range> {
        // On a descriptor that QEMU shares, this moves an offset that nobody uses: QEMU reads and writes by position.
        let start = seek(&self.file, SeekFrom::Data(range.start().get())).ok()?;
        let end = seek(&self.file, SeekFrom::Hole(start)).ok()?;
        Range::between(Offset::new(start), Offset::new(end)).ok()?.intersect(range)
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
        let image = FleecingImage::create(directory.path(), Length::new(1_000_001)).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(image.used(), Length::ZERO);
        rustix::io::pwrite(image.descriptor(), &[1u8; 65_536], 0).unwrap();
        rustix::fs::fdatasync(image.descriptor()).unwrap();
        assert!(image.used().get() >= 65_536);
        let whole = Range::whole(Length::new(1_000_001)).unwrap();
        assert_eq!(image.first_data(whole), Range::new(Offset::ZERO, Length::new(65_536)).ok());
        assert_eq!(image.first_data(whole.split(Offset::new(65_536)).1), None);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = FleecingImage::create(Path::new("/nonexistent/fleecing"), Length::new(1)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/fleecing"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Host);
    }
}
