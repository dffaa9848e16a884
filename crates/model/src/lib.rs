//! The words every crate of Stillpoint shares: names, units, ranges and extents of a disk.
//!
//! It is vocabulary only: no I/O, no protocol. A number that crosses a crate's border is an [`Offset`] or a
//! [`Length`], a name is one that was checked when it was made, and a [`Range`] never runs past what QEMU can address.
//!
//! ```text
//!   Range = Offset + Length          Extent = Range + ExtentKind (Clean, Zero, Data)
//!   Granularity: power of two        DiskName, VmName: safe as a file's name
//!   NodeName: 31 bytes (QEMU)        BitmapName: 1023 bytes (qcow2)
//!   PointId: names one point         Generation: the point that a dirty bitmap is relative to
//! ```
//!
//! ```
//! use stillpoint_model::{Granularity, Length, Offset, Range};
//! # fn main() -> Result<(), stillpoint_model::RangeError> {
//! let disk = Length::new(1_000_000);
//! let read = Range::new(Offset::new(70_000), Length::new(500))?;
//! let granule = read.align_outward(Granularity::DEFAULT, disk);
//! assert_eq!(granule.start(), Offset::new(65_536));
//! assert_eq!(granule.length(), Length::new(65_536));
//! # Ok(()) }
//! ```

mod extent;
mod name;
mod point;
mod range;

pub use extent::{Extent, ExtentKind};
pub use name::{BitmapName, DiskName, NameError, NodeName, VmName};
pub use point::{Generation, PointId, TargetId};
pub use range::{Granularity, GranularityError, Length, Offset, Range, RangeError};
