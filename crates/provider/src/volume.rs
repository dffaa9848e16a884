//! How a disk's bytes travel: the same small trait for a disk at its point and for a disk in the target.

use crate::{Error, Result};
use async_trait::async_trait;
use bytes::Bytes;
use stillpoint_model::{Extent, Length, Offset, Range};

/// A disk to read: of a VM at its point (then reading is bounded by the bitmap, and each part is given back with
/// [`release`](Self::release)), or of a stored point.
///
/// All calls may run at the same time from several tasks; some eight reads of 1 MiB in flight are what the NBD
/// transport takes.
#[async_trait]
pub trait VolumeSource: Send + Sync {
    /// Size of the disk in bytes; any number, not only multiples of a sector or granule.
    fn size(&self) -> Length;

    /// The regions from `from` on: contiguous, in order, the first starts at `from`, none is empty, and at least one
    /// is returned unless `from` is the end of the disk. At most some thousands at once: go on from the end of the
    /// last. What comes back is complete or an error (I7).
    ///
    /// # Errors
    /// If the map cannot be had or does not add up.
    async fn regions(&self, from: Offset) -> Result<Vec<Extent>>;

    /// The bytes of `range` (at most 32 MiB), all of it.
    ///
    /// # Errors
    /// If it cannot be read, if it is outside what the bitmap allows, or if the run was cancelled.
    async fn read(&self, range: Range) -> Result<Bytes>;

    /// Says that `range` will not be read again, so that old data kept for it can go. Any range is fine: what has to
    /// be aligned is aligned here, and partial granules are kept in mind until they are whole. Give back clean and
    /// zero regions too.
    ///
    /// # Errors
    /// If the other side refuses; the data already read stays good.
    async fn release(&self, range: Range) -> Result<()>;

    /// Waits until this disk can only fail to be read, and says why: the run was cancelled, the snapshot broke. For
    /// those who wait for something else meanwhile. Many disks never end so.
    async fn ended(&self) -> Error {
        std::future::pending().await
    }
}
