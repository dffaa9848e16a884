//! Image files: writing sparse raw and qcow2, reading one layer of a chain, and making writes durable.
//!
//! It is not an image tool: no format is ever guessed, no chain is followed, and nothing that an image's header names
//! is ever opened. Whoever reads a chain knows it from a better place than the images themselves, and opens each
//! [`Layer`] by name.
//!
//! ```text
//!   Directory  (crashsafe)   files and directories relative to an open directory, no links followed
//!     |-- ImageWriter        RawWriter: holes for zeroes     Qcow2Writer: zero clusters, backing named, not opened
//!     `-- Layer              reads and maps one image file, and nothing behind it
//! ```
//!
//! All of it blocks: call it from a blocking thread.
//!
//! ```
//! use stillpoint_image::{Directory, Format, Layer, RawWriter};
//! use stillpoint_model::{Length, Offset, Range};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let scratch = tempfile::tempdir()?;
//! let directory = Directory::open(scratch.path())?;
//! let writer = RawWriter::create(&directory, "vda.raw", Length::new(1_000_001))?;
//! writer.write(Offset::new(65_536), b"boot")?;
//! writer.finish()?;
//!
//! let layer = Layer::open(&directory, "vda.raw", Format::Raw, Length::new(1_000_001))?;
//! let mut bytes = vec![0; 4];
//! layer.read(Offset::new(65_536), &mut bytes)?;
//! assert_eq!(bytes, b"boot");
//! # Ok(()) }
//! ```

mod block_on;
pub mod crashsafe;
mod direct;
mod error;
mod format;
mod layer;
mod qcow2;
mod raw;
mod writeback;
mod zero;

pub use crashsafe::{Directory, Space};
pub use error::{Error, ErrorKind, Result};
pub use format::{Backing, Format, ImageWriter};
pub use layer::{Layer, Mapping};
pub use qcow2::Qcow2Writer;
pub use raw::RawWriter;
pub use zero::{data_parts, is_zero};
