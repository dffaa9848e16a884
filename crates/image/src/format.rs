//! The formats, and a writer for either.

use crate::{Directory, Qcow2Writer, RawWriter, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use stillpoint_model::{Length, Offset, Range};

/// Format of an image file. It is always told, never guessed from the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes as they are, with holes for zeroes.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl Format {
    /// The name that QEMU's tools use, also as a file's extension.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What an overlay's header says of the image below it. It is written there for QEMU's tools, and not opened by us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Path, relative to the directory of the overlay.
    pub file: String,
    /// Its format, so that no tool has to guess (a guest could have written another format's header into a raw disk).
    pub format: Format,
}

/// Writes an image in either format; what a restore writes to.
#[must_use = "an image is only durable once it is finished"]
#[derive(Debug)]
pub enum ImageWriter {
    /// Sparse raw.
    Raw(RawWriter),
    /// qcow2 that stands alone.
    Qcow2(Box<Qcow2Writer>),
}

impl ImageWriter {
    /// Creates `name`, which must not be there, for a disk of `size` bytes that reads as zeroes.
    ///
    /// # Errors
    /// If it is there, or cannot be written.
    pub fn create(directory: &Directory, name: &str, format: Format, size: Length) -> Result<Self> {
        match format {
            Format::Raw => RawWriter::create(directory, name, size).map(Self::Raw),
            Format::Qcow2 => {
                Ok(Self::Qcow2(Box::new(Qcow2Writer::create(directory, name, size, None, None)?)))
            }
        }
    }

    /// Writes `bytes` at `at`; zeroes among them take no space.
    ///
    /// # Errors
    /// If they end past the disk, or cannot be written.
    pub fn write(&self, at: Offset, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Raw(writer) => writer.write(at, bytes),
            Self::Qcow2(writer) => writer.write(at, bytes),
        }
    }

    /// Makes `range` read as zeroes.
    ///
    /// # Errors
    /// If it ends past the disk, or cannot be written.
    pub fn zero(&self, range: Range) -> Result<()> {
        match self {
            Self::Raw(writer) => writer.zero(range),
            Self::Qcow2(writer) => writer.zero(range),
        }
    }

    /// Makes the file durable, not its name: that takes a [`Directory::sync`].
    ///
    /// # Errors
    /// If that fails; the image must then not be used.
    pub fn finish(self) -> Result<()> {
        match self {
            Self::Raw(writer) => writer.finish(),
            Self::Qcow2(writer) => writer.finish().map(|_length| ()),
        }
    }
}
