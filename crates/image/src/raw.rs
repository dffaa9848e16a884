//! Sparse raw images.

use crate::{
    Directory, Error, ErrorKind, Result, direct::DirectFile, writeback::Writeback, zero::data_parts,
};
use rustix::fs::{FallocateFlags, fallocate};
use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};
use stillpoint_model::{Length, Offset, Range};

/// Zeroes are left out in blocks of this size. Smaller holes would save little and cost a write call each.
const HOLE: u64 = 64 << 10;

/// Writes a raw image. All calls may run at the same time; parts may come in any order, each normally once.
#[must_use = "an image is only durable once it is finished"]
#[derive(Debug)]
pub struct RawWriter {
    file: File,
    /// Past the page cache, where its file system can do that.
    direct: Option<DirectFile>,
    path: PathBuf,
    size: Length,
    writeback: Writeback,
}

impl RawWriter {
    /// Creates `name`, which must not be there: `size` bytes, all hole.
    ///
    /// # Errors
    /// If it is there, or cannot be made.
    pub fn create(directory: &Directory, name: &str, size: Length) -> Result<Self> {
        let path = directory.path().join(name);
        let file = directory.create_file(name)?;
        file.set_len(size.get()).map_err(|source| Error::at("set the length of", &path, source))?;
        let direct = DirectFile::open(directory, name);
        Ok(Self { file, direct, path, size, writeback: Writeback::default() })
    }

    fn check(&self, at: Offset, length: Length) -> Result<()> {
        match Range::new(at, length) {
            Ok(range) if range.end().get() <= self.size.get() => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Io,
                format!(
                    "{length} bytes at {at} are not within {} of {} bytes",
                    self.path.display(),
                    self.size
                ),
            )),
        }
    }

    /// Writes `bytes` at `at`. Blocks of zeroes are skipped: what was not written before is a hole and stays one, so
    /// use [`zero`](Self::zero) to overwrite with zeroes.
    ///
    /// # Errors
    /// If they end past the disk, or cannot be written.
    pub fn write(&self, at: Offset, bytes: &[u8]) -> Result<()> {
        self.check(at, Length::new(bytes.len() as u64))?;
        for part in data_parts(at.get(), bytes, HOLE) {
            let position = at.get() + part.start as u64;
            let data = bytes.get(part).unwrap_or_default();
            let failed = |source| Error::at("write", &self.path, source);
            let written =
                self.direct.as_ref().map_or(Ok(0), |file| file.write(data, position)).map_err(failed)?;
            let rest = data.get(written..).unwrap_or_default();
            if !rest.is_empty() {
                self.file.write_all_at(rest, position + written as u64).map_err(failed)?;
                self.writeback.wrote(&self.file, rest.len());
            }
        }
        Ok(())
    }

    /// Makes `range` read as zeroes, whatever was written there before.
    ///
    /// # Errors
    /// If it ends past the disk, or cannot be written.
    pub fn zero(&self, range: Range) -> Result<()> {
        self.check(range.start(), range.length())?;
        if range.is_empty() {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, range.start().get(), range.length().get()) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.zero_by_writing(range),
            Err(source) => Err(Error::at("punch a hole in", &self.path, source)),
        }
    }

    fn zero_by_writing(&self, range: Range) -> Result<()> {
        let zeroes = vec![0; 64 << 10];
        for part in range.chunks(Length::new(zeroes.len() as u64)) {
            let length = usize::try_from(part.length().get()).unwrap_or(usize::MAX);
            let bytes = zeroes.get(..length).unwrap_or(&zeroes);
            self.file
                .write_all_at(bytes, part.start().get())
                .map_err(|source| Error::at("write", &self.path, source))?;
        }
        Ok(())
    }

    /// Makes the file durable, not its name: that takes a [`Directory::sync`].
    ///
    /// # Errors
    /// If that fails; the image must then not be used.
    pub fn finish(self) -> Result<()> {
        self.sync()
    }

    /// The same for a writer that is shared; nothing may be written any more.
    ///
    /// # Errors
    /// If that fails; the image must then not be used.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|source| Error::at("make durable", &self.path, source))
    }
}
