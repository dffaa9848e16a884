//! Getting points back.

use crate::{ConfigFile, PointRecord, Result, VolumeSource};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use stillpoint_model::{DiskName, Length, Offset};

/// A stored point, opened for reading.
#[async_trait]
pub trait Restore: Send + Sync {
    /// What is known of the point.
    fn record(&self) -> &PointRecord;

    /// The configuration files (`archive_get_guest_config` and `archive_get_firewall_config` in one).
    ///
    /// # Errors
    /// If they cannot be read or are damaged.
    async fn config(&self) -> Result<Vec<ConfigFile>>;

    /// Opens one disk (`restore_vm_volume_init`). Reads are checked against what was recorded when the point was
    /// made: a source returns the very bytes or an error that names the offset. It has no clean regions.
    ///
    /// # Errors
    /// If the point has no such disk, or it cannot be opened.
    async fn volume(&self, disk: &DiskName) -> Result<Arc<dyn VolumeSource>>;

    /// The disk is not read any more (`restore_vm_volume_cleanup`).
    async fn volume_cleanup(&self, _disk: &DiskName) {}

    /// The point is not read any more (`restore_vm_cleanup`). The last call, whatever came of the restore.
    async fn cleanup(&self) {}
}

/// Hears of progress in long work.
pub trait Progress: Send + Sync {
    /// How much there is to do, as far as is known.
    fn total(&self, bytes: Length);
    /// So much more is done.
    fn advanced(&self, bytes: Length);
}

/// One thing wrong with a stored point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Finding {
    /// The disk, where it is about one.
    pub disk: Option<DiskName>,
    /// Where on the disk, where that is known.
    pub offset: Option<Offset>,
    /// What is wrong, with the file's path.
    pub what: String,
}

/// What became of verifying a point.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct VerifyReport {
    /// Bytes that were read and compared.
    pub checked: Length,
    /// What is wrong; empty if nothing is.
    pub findings: Vec<Finding>,
    /// If something is wrong: the disks that a restore gives back all the same, as far as the provider can tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restorable: Vec<DiskName>,
}

/// How much of a target is read to verify it as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// That everything is there that is referred to, and what describes it can be read.
    Structure,
    /// That, and so many percent of the data, drawn anew each time.
    Sample(u8),
    /// All of it.
    Full,
}
