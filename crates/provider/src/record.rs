//! What is known of a point, in the form in which every provider keeps it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use stillpoint_model::{DiskName, Granularity, Length, PointId, VmName};

/// How a disk's dirty bitmap was used for a point. The words are Proxmox VE's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BitmapMode {
    /// No bitmap: the disk was read in full, and the next point will read it in full too.
    None,
    /// A new bitmap: the disk was read in full, the next point can be an incremental.
    New,
    /// The bitmap of an earlier point: only what it says was read.
    Reuse,
}

/// What the file systems on the disks can expect of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// As after a power cut at that instant.
    CrashConsistent,
    /// The guest's agent had its file systems frozen.
    FileSystemConsistent,
}

/// One disk in a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskRecord {
    /// The disk.
    pub name: DiskName,
    /// Its size at the point, in bytes.
    pub size: Length,
    /// Format of the VM's own image, as QEMU names its driver (`qcow2`, `raw`, ...).
    pub format: String,
    /// How the bitmap was used.
    pub bitmap_mode: BitmapMode,
    /// The point that this disk's data is relative to; `None` for a full read.
    pub base: Option<PointId>,
    /// Why this mode and not an incremental (or why it could be one).
    pub reason: String,
    /// Granularity of the bitmap, where there is one.
    pub granularity: Option<Granularity>,
    /// The VM's own image on its host, for backing it up when the VM is off; `None` if QEMU did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
}

/// A block device of the VM that is not in a point, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Skipped {
    /// What QEMU calls it: the front end's id, its drive's or node's name, or its place in the machine.
    pub name: String,
    /// Why it is not in the point, as a person reads it.
    pub reason: String,
}

/// One point: all disks of a VM at one instant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PointRecord {
    /// The VM.
    pub vm: VmName,
    /// The point.
    pub id: PointId,
    /// The instant: UTC, RFC 3339, taken while the guest stood still.
    pub time: String,
    /// What the guest's file systems can expect.
    pub consistency: Consistency,
    /// Why the point is (only) that consistent.
    pub consistency_reason: String,
    /// How long the guest stood still, in milliseconds.
    pub pause_ms: f64,
    /// Version of QEMU that ran the VM.
    pub qemu_version: String,
    /// Version of Stillpoint that made the point.
    pub stillpoint_version: String,
    /// Its disks.
    pub disks: Vec<DiskRecord>,
    /// Block devices of the VM that are not in the point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<Skipped>,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PointSummary {
    /// The record, or `None` if it cannot be read any more (then `damage` says why).
    pub record: Option<PointRecord>,
    /// The VM.
    pub vm: VmName,
    /// The point.
    pub id: PointId,
    /// Position among the VM's points in this target; order is told by this, never by a clock.
    pub sequence: u64,
    /// Bytes that this point alone takes in the target.
    pub stored: Length,
    /// Why the point cannot be used, if so.
    pub damage: Option<String>,
}
