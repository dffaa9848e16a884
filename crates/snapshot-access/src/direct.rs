//! Reading a raw image itself, past QEMU, while the guest writes to it (ADR 0018).
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
//! show. A snapshot that broke keeps nothing aside any more, so QEMU is asked after `a` whether it holds.

use bytes::BytesMut;
use rustix::{
    fs::{Mode, OFlags, open},
    io::pread,
};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};
use stillpoint_model::{Length, Range};
use stillpoint_nbd::buffer;

/// The file or block device that is a raw disk, byte for byte, and that QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageFile {
    qemu: u32,
    identity: Identity,
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
    /// What `path` means to the process `qemu`; `None` if it cannot be seen from here.
    pub(crate) fn find(qemu: u32, path: &Path) -> Option<Self> {
        // An absolute link is followed from our root, not from that process's; then no descriptor of it fits.
        let below = path.strip_prefix("/").ok()?;
        let metadata = fs::metadata(PathBuf::from(format!("/proc/{qemu}/root")).join(below)).ok()?;
        Some(Self { qemu, identity: Identity::of(&metadata)? })
    }

    /// Opens it by QEMU's own descriptor, so that nothing is ever read that QEMU has not open for this disk's `size`, and
    /// past the page cache if QEMU goes past it. `None` if QEMU has it open no more, or if anything does not fit.
    pub(crate) fn open(&self, size: Length) -> Option<DirectImage> {
        let directory = format!("/proc/{}/fd", self.qemu);
        let mut found: Option<(PathBuf, bool)> = None;
        for entry in fs::read_dir(directory).ok()? {
            let path = entry.ok()?.path();
            if !fs::metadata(&path).is_ok_and(|metadata| Identity::of(&metadata) == Some(self.identity)) {
                continue;
            }
            let flags = self.flags(&path)?;
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
        let has = Length::new(rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).ok()?);
        // QEMU counts in sectors. A `raw` node with an offset or a size of its own shows less than the file has.
        (has.get().checked_next_multiple_of(512) == Some(size.get())).then_some(DirectImage { file })
    }

    fn flags(&self, path: &Path) -> Option<OFlags> {
        let number = path.file_name()?.to_str()?;
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.qemu)).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        Some(OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).ok()?))
    }
}

/// A raw image, open for reading.
#[derive(Debug)]
pub(crate) struct DirectImage {
    file: File,
}

impl DirectImage {
    /// What the image holds of `range` now; in memory that begins on a page, as `O_DIRECT` wants it. Blocks.
    ///
    /// # Errors
    /// If the kernel fails it, or the image ends within.
    pub(crate) fn read(&self, range: Range) -> io::Result<BytesMut> {
        let length = usize::try_from(range.length().get()).map_err(io::Error::other)?;
        let mut bytes = buffer::initialized(length);
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = range.start().get().saturating_add(u64::try_from(done).map_err(io::Error::other)?);
            match pread(&self.file, rest, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done = done.saturating_add(count),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use stillpoint_model::Offset;

    fn image(length: u64) -> (tempfile::NamedTempFile, ImageFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(length).unwrap();
        let found = ImageFile::find(std::process::id(), &fs::canonicalize(file.path()).unwrap()).unwrap();
        (file, found)
    }

    #[test]
    fn only_what_the_process_has_open_and_what_is_the_whole_disk_is_read() {
        let (file, found) = image(1 << 20);
        rustix::io::pwrite(&file, b"here", 4096).unwrap();
        let opened = found.open(Length::new(1 << 20)).unwrap();
        let bytes = opened.read(Range::new(Offset::new(4096), Length::new(4)).unwrap()).unwrap();
        assert_eq!(&bytes[..], b"here");
        assert!(found.open(Length::new((1 << 20) - 512)).is_none(), "a part of the file is not the disk");
        let past_the_end = Range::new(Offset::new((1 << 20) - 1), Length::new(2)).unwrap();
        assert_eq!(opened.read(past_the_end).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        drop(opened);
        let path = file.into_temp_path();
        assert!(found.open(Length::new(1 << 20)).is_none(), "it is closed");
        drop(path);
    }

    #[test]
    fn a_size_that_is_no_multiple_of_a_sector_is_rounded_as_qemu_does() {
        let (_file, found) = image(1000);
        assert!(found.open(Length::new(1024)).is_some());
        assert!(found.open(Length::new(1000)).is_none());
    }

    #[test]
    fn what_is_open_past_the_page_cache_and_through_it_is_left_to_qemu() {
        let (file, found) = image(1 << 20);
        let past = open(file.path(), OFlags::RDWR | OFlags::DIRECT, Mode::empty());
        let Ok(past) = past else { return };
        assert!(found.open(Length::new(1 << 20)).is_none());
        drop(past);
        assert!(found.open(Length::new(1 << 20)).is_some());
    }

    #[test]
    fn neither_directories_nor_what_is_not_there_are_images() {
        let own = std::process::id();
        assert_eq!(ImageFile::find(own, Path::new("/tmp")), None);
        assert_eq!(ImageFile::find(own, Path::new("/dev/null")), None);
        assert_eq!(ImageFile::find(own, Path::new("/nonexistent/image")), None);
        assert_eq!(ImageFile::find(own, Path::new("json:{}")), None);
    }
}
