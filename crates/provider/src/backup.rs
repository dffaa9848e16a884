//! Making points.

use crate::{
    BitmapMode, Depth, PointRecord, PointSummary, Progress, Restore, Result, VerifyReport, VolumeSource,
};
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use stillpoint_model::{DiskName, Generation, Granularity, Length, PointId, TargetId, VmName};

/// A bitmap that a disk has for this target and that is fit for use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OfferedBitmap {
    /// The point that it is relative to.
    pub generation: Generation,
    /// Bytes a bit.
    pub granularity: Granularity,
}

/// What is known of a disk when the provider is asked about increments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskOffer {
    /// The disk.
    pub name: DiskName,
    /// Its size in bytes.
    pub size: Length,
    /// Usable bitmaps; normally none or one, two after a run whose end is unknown.
    pub bitmaps: Vec<OfferedBitmap>,
}

/// The provider's answer for one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Incremental {
    /// It holds this generation of the disk, at this size, and can take what changed since.
    Since(Generation),
    /// It wants all of the disk, and a bitmap of this granularity for the next point.
    Full {
        /// Granularity that suits the target; `None` for QEMU's own choice.
        granularity: Option<Granularity>,
        /// Why, as a person reads it: `no earlier point`, `size changed from 10 GiB to 20 GiB`, ...
        reason: String,
    },
}

/// What a configuration file is, so that a restore knows where it belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ConfigRole {
    /// Configuration of the guest.
    Guest,
    /// Firewall rules of the guest.
    Firewall,
    /// State of the guest's TPM.
    Tpm,
}

/// A file of the VM's configuration, stored as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFile {
    /// Last component of its path; checked like a disk's name, unique within the point.
    pub name: DiskName,
    /// What it is.
    pub role: ConfigRole,
    /// Its bytes.
    pub content: Vec<u8>,
}

/// One disk, handed over.
pub struct Volume {
    /// The disk.
    pub name: DiskName,
    /// How its bitmap is used; with [`BitmapMode::Reuse`] clean regions are those of `base`.
    pub bitmap_mode: BitmapMode,
    /// The point that the clean regions are the same as.
    pub base: Option<Generation>,
    /// Where to read.
    pub source: Arc<dyn VolumeSource>,
}

/// What became of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeReport {
    /// The disk.
    pub name: DiskName,
    /// Bytes that this point adds to the target for it.
    pub stored: Length,
}

/// Where points are kept.
#[async_trait]
pub trait Provider: Send + Sync {
    /// What to call it in messages: its kind and where it is, such as `directory /srv/backups`.
    fn name(&self) -> String;

    /// Begins a job that makes points: connects, checks that the target takes writes, and tells its identity (drawn
    /// and made durable now if the target is new and its provider needs no explicit creation).
    ///
    /// # Errors
    /// If the target is missing, read-only, or not one of this provider's.
    async fn job_init(&self) -> Result<TargetId>;

    /// Ends a job, whatever came of it.
    ///
    /// # Errors
    /// If something was left behind.
    async fn job_cleanup(&self) -> Result<()>;

    /// Begins the backup of one VM; takes the target's lock on it.
    ///
    /// # Errors
    /// If the VM is locked in this target, or nothing can be written.
    async fn backup_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Backup>>;

    /// The points of one VM or of all, in the order in which they were made.
    ///
    /// # Errors
    /// If the target cannot be read. A single damaged point is listed as such, and is not an error.
    async fn points(&self, vm: Option<&VmName>) -> Result<Vec<PointSummary>>;

    /// Opens a point for restore.
    ///
    /// # Errors
    /// If there is no such point or it is damaged beyond reading.
    async fn restore_vm_init(&self, vm: &VmName, point: &PointId) -> Result<Box<dyn Restore>>;

    /// Reads all data of a point again and compares it with what was recorded when it was made.
    ///
    /// # Errors
    /// If the point cannot be examined at all. Damage is a [`Finding`](crate::Finding), not an error.
    async fn verify(&self, vm: &VmName, point: &PointId, progress: Arc<dyn Progress>)
    -> Result<VerifyReport>;

    /// Verifies what is shared by all points: their index, their store, keys. `None` if points share nothing, so that
    /// verifying each is all there is.
    ///
    /// # Errors
    /// If the target cannot be examined at all.
    async fn verify_target(
        &self,
        _depth: Depth,
        _progress: Arc<dyn Progress>,
    ) -> Result<Option<VerifyReport>> {
        Ok(None)
    }

    /// Lets go of what is held open between calls, such as a program that runs. The last call outside of a job.
    async fn close(&self) {}
}

/// The backup of one VM. Calls come in the order in which they stand here.
#[async_trait]
pub trait Backup: Send {
    /// Asks, for each disk in turn, for increments; the answers are in the order of `disks`.
    ///
    /// # Errors
    /// If the target cannot be read; then nothing has happened to the VM.
    async fn backup_vm_query_incremental(&mut self, disks: &[DiskOffer]) -> Result<Vec<Incremental>>;

    /// Takes all disks and configuration files. Everything is stored, nothing is listed when it returns.
    ///
    /// # Errors
    /// If a disk cannot be read or the target written. `backup_cleanup` follows.
    async fn backup_vm(&mut self, config: &[ConfigFile], volumes: Vec<Volume>) -> Result<Vec<VolumeReport>>;

    /// Makes the point durable, then listed. Only after this does the VM's bitmap forget (I3).
    ///
    /// # Errors
    /// With [`CommitUnknown`](crate::ErrorKind::CommitUnknown) if the point may or may not be listed now; any other
    /// kind says that it is not, and never will be.
    async fn commit(&mut self, record: &PointRecord) -> Result<()>;

    /// Ends it: after a commit nothing of the point is touched any more; without one all that was stored for it is
    /// removed. Always called, as the last call.
    ///
    /// # Errors
    /// If something was left behind, which says what.
    async fn backup_cleanup(&mut self) -> Result<()>;
}
