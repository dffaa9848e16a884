//! Reading one image file of a chain.

use crate::{Directory, Error, ErrorKind, Format, Result, block_on::block_on};
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping, file::File as ImagoFile,
    qcow2::Qcow2,
};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf};
use stillpoint_model::{Length, Offset, Range};

/// What one image file itself says of a part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Data, which lies in the file from this position on.
    Data(Offset),
    /// Zeroes that hide whatever is below.
    Zero,
    /// Nothing: a hole, or a cluster that reads from the backing image.
    Absent,
}

/// One image file, open for reading. What its header names as backing or data file is never opened (a damaged or
/// hostile image would make us read any file there is), and its format is told, never guessed.
#[derive(Debug)]
pub struct Layer {
    file: File,
    path: PathBuf,
    size: Length,
    image: Option<FormatAccess<ImagoFile>>,
}

impl Layer {
    /// Opens `name` as an image of a disk of `size` bytes.
    ///
    /// # Errors
    /// If it is missing, a link, not of that format, or not of that size.
    pub fn open(directory: &Directory, name: &str, format: Format, size: Length) -> Result<Self> {
        let path = directory.path().join(name);
        let file = directory.open_file(name)?;
        let cannot = |source| Error::at("open", &path, source);
        let image = match format {
            Format::Raw => {
                let length = file.metadata().map_err(cannot)?.len();
                check_size(&path, length, size.get())?;
                None
            }
            Format::Qcow2 => {
                let storage = file.try_clone().and_then(ImagoFile::try_from).map_err(cannot)?;
                let opening =
                    Qcow2::<ImagoFile>::builder(storage).backing(None).open(DenyImplicitOpenGate::default());
                let image = block_on(opening).map_err(|source| {
                    Error::at("read as a qcow2 image without a data file of its own", &path, source)
                        .of_kind(ErrorKind::Damaged)
                })?;
                let image = FormatAccess::new(image);
                check_size(&path, image.size(), size.get().next_multiple_of(512))?;
                Some(image)
            }
        };
        Ok(Self { file, path, size, image })
    }

    /// Where it is, for messages.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The file's length.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn file_length(&self) -> Result<Length> {
        let metadata = self.file.metadata().map_err(|source| Error::at("examine", &self.path, source))?;
        Ok(Length::new(metadata.len()))
    }

    /// Reads the disk's bytes as this layer alone has them; what is absent reads as zeroes.
    ///
    /// # Errors
    /// If they end past the disk, or cannot be read.
    pub fn read(&self, at: Offset, bytes: &mut [u8]) -> Result<()> {
        let cannot = |source| Error::at("read", &self.path, source);
        let end = at.get().saturating_add(bytes.len() as u64);
        if end > self.size.get() {
            return Err(cannot(io::ErrorKind::UnexpectedEof.into()));
        }
        match &self.image {
            None => self.file.read_exact_at(bytes, at.get()).map_err(cannot),
            Some(image) => block_on(image.read(bytes, at.get())).map_err(cannot),
        }
    }

    /// Reads the file's own bytes, whatever they mean.
    ///
    /// # Errors
    /// If the file ends before, or cannot be read.
    pub fn read_file(&self, at: Offset, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, at.get()).map_err(|source| Error::at("read", &self.path, source))
    }

    /// What this layer has from `at` on, and for which part; `None` at the end of the disk.
    ///
    /// # Errors
    /// If the image's tables cannot be read or make no sense.
    pub fn mapping(&self, at: Offset) -> Result<Option<(Range, Mapping)>> {
        let left = self.size.get().saturating_sub(at.get());
        if left == 0 {
            return Ok(None);
        }
        let (mapping, length) = match &self.image {
            None => self.hole_or_data(at)?,
            Some(image) => {
                let (mapping, length) = block_on(image.get_shallow_mapping(at.get(), left))
                    .map_err(|source| Error::at("read the cluster tables of", &self.path, source))?;
                let mapping = match mapping {
                    ShallowMapping::Raw { offset, .. } => Mapping::Data(Offset::new(offset)),
                    ShallowMapping::Zero { explicit: true, .. } => Mapping::Zero,
                    ShallowMapping::Zero { .. } => Mapping::Absent,
                    _ => return Err(self.senseless(at, "has a cluster that we never write")),
                };
                (mapping, length)
            }
        };
        let range = Range::new(at, Length::new(length.min(left)))
            .ok()
            .filter(|range| !range.is_empty())
            .ok_or_else(|| self.senseless(at, "has a mapping of no length"))?;
        Ok(Some((range, mapping)))
    }

    fn senseless(&self, at: Offset, what: &str) -> Error {
        Error::new(ErrorKind::Damaged, format!("{} {what} at {at}", self.path.display()))
    }

    fn hole_or_data(&self, at: Offset) -> Result<(Mapping, u64)> {
        let cannot = |source| Error::at("find the holes of", &self.path, source);
        match seek(&self.file, SeekFrom::Data(at.get())) {
            Ok(data) if data > at.get() => Ok((Mapping::Absent, data - at.get())),
            Ok(_) => {
                let hole = seek(&self.file, SeekFrom::Hole(at.get())).map_err(cannot)?;
                Ok((Mapping::Data(at), hole.saturating_sub(at.get())))
            }
            Err(Errno::NXIO) => Ok((Mapping::Absent, u64::MAX)),
            // A file system without holes has data everywhere.
            Err(Errno::INVAL) => Ok((Mapping::Data(at), u64::MAX)),
            Err(source) => Err(cannot(source)),
        }
    }
}

fn check_size(path: &std::path::Path, found: u64, wanted: u64) -> Result<()> {
    if found == wanted {
        return Ok(());
    }
    let what = format!("{} has a size of {found} bytes and should have {wanted}", path.display());
    Err(Error::new(ErrorKind::Damaged, what))
}
