//! What came of a backup: for a person, and as the JSON that scripts depend on.

use crate::{
    failure::{Exit, StateAtTheEnd},
    text,
};
use serde_json::{Value, json};
use std::{fmt, time::Duration};
use stillpoint_model::{DiskName, Length};
use stillpoint_provider::{BitmapMode, Consistency, PointRecord};

/// What came of one disk.
#[derive(Debug, Clone)]
pub(crate) struct DiskSummary {
    /// The disk.
    pub name: DiskName,
    /// Its size.
    pub size: Length,
    /// How its bitmap was used.
    pub bitmap_mode: BitmapMode,
    /// Why.
    pub reason: String,
    /// What the bitmap called changed; the size of the disk without one.
    pub dirty_bytes: Length,
    /// What was read.
    pub read_bytes: Length,
    /// What the point adds to the target.
    pub stored_bytes: Length,
}

/// What came of a backup.
#[derive(Debug, Clone)]
pub(crate) struct Summary {
    /// Done, or something was left behind although the point is good.
    pub exit: Exit,
    /// What the reader has to know besides.
    pub warnings: Vec<String>,
    /// The point.
    pub record: PointRecord,
    /// Whether the VM was off.
    pub off: bool,
    /// What the guest did at the end.
    pub guest: StateAtTheEnd,
    /// Where it is.
    pub provider: String,
    /// How long the guest's file systems were frozen.
    pub freeze_ms: f64,
    /// The most that the fleecing images took.
    pub fleecing_peak_bytes: Length,
    /// From the first look at the VM to the durable point.
    pub duration_ms: u64,
    /// The disks.
    pub disks: Vec<DiskSummary>,
}

impl Summary {
    /// The object that `--json` prints.
    pub(crate) fn json(&self) -> Value {
        let disk = |disk: &DiskSummary| {
            json!({
                "name": disk.name,
                "size": disk.size,
                "bitmap_mode": disk.bitmap_mode,
                "reason": disk.reason,
                "dirty_bytes": disk.dirty_bytes,
                "read_bytes": disk.read_bytes,
                "stored_bytes": disk.stored_bytes,
            })
        };
        json!({
            "vm": self.record.vm,
            "point": format!("{}/{}", self.record.vm, self.record.id),
            "result": if self.exit == Exit::Done { "done" } else { "left-behind" },
            "guest": self.guest.now.word(),
            "consistency": self.record.consistency,
            "consistency_reason": self.record.consistency_reason,
            "pause_ms": self.record.pause_ms,
            "freeze_ms": self.freeze_ms,
            "fleecing_peak_bytes": self.fleecing_peak_bytes,
            "duration_ms": self.duration_ms,
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "skipped": self.record.skipped,
            "warnings": self.warnings,
        })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let record = &self.record;
        writeln!(f, "{}/{}  in {}", record.vm, record.id, self.provider)?;
        let width = self.disks.iter().map(|disk| disk.name.as_str().len()).max().unwrap_or(0).max(4);
        if !self.disks.is_empty() {
            writeln!(
                f,
                "  {:width$}  {:>9}  {:11}  {:>9}  {:>9}  {:>9}",
                "disk", "size", "read", "changed", "read", "stored"
            )?;
        }
        for disk in &self.disks {
            let mode = if disk.bitmap_mode == BitmapMode::Reuse { "incremental" } else { "full" };
            let changed = if disk.bitmap_mode == BitmapMode::Reuse {
                text::bytes(disk.dirty_bytes)
            } else {
                "-".into()
            };
            writeln!(
                f,
                "  {:width$}  {:>9}  {mode:11}  {changed:>9}  {:>9}  {:>9}",
                disk.name,
                text::bytes(disk.size),
                text::bytes(disk.read_bytes),
                text::bytes(disk.stored_bytes)
            )?;
            if disk.bitmap_mode != BitmapMode::Reuse {
                writeln!(f, "  {:width$}  full because: {}", "", disk.reason)?;
            }
        }
        let duration = Duration::from_millis(self.duration_ms);
        let read: Length = self.disks.iter().map(|disk| disk.read_bytes).sum();
        let consistency = match record.consistency {
            Consistency::CrashConsistent => "crash-consistent",
            Consistency::FileSystemConsistent => "file-system-consistent",
        };
        for skipped in &record.skipped {
            writeln!(f, "  not in the point: {} ({})", skipped.name.escape_debug(), skipped.reason)?;
        }
        if self.disks.is_empty() {
            writeln!(f, "  the point holds the configuration of the VM, and no disk")?;
        } else if self.off {
            writeln!(f, "  the VM is off; its images were read by themselves")?;
        } else {
            writeln!(
                f,
                "  guest paused {:.1} ms, {consistency} ({}); old data kept aside: {} at most",
                record.pause_ms,
                record.consistency_reason,
                text::bytes(self.fleecing_peak_bytes)
            )?;
        }
        if let Some(line) = self.guest.line() {
            writeln!(f, "  guest: {line}")?;
        }
        write!(f, "  read {}", text::throughput(read, duration))?;
        for warning in &self.warnings {
            write!(f, "\n  warning: {warning}")?;
        }
        Ok(())
    }
}
