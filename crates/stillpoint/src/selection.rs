//! What of a VM goes into a point, and what does not and why: the same for `backup` and for `doctor`, so that the one
//! promises what the other keeps.

use crate::{
    bitmaps,
    config::Vm,
    failure::{Exit, Failure, Guest},
};
use stillpoint_model::{DiskName, VmName};
use stillpoint_provider::Skipped;
use stillpoint_snapshot_access::{Disk, Machine};

/// Every block device of a VM is in one of these.
pub(crate) struct Selection<'a> {
    /// Those to back up.
    pub disks: Vec<&'a Disk>,
    /// Those that are left out, by the user's word or since nothing is lost by it.
    pub skipped: Vec<Skipped>,
    /// Those that cannot be backed up and that nobody has excluded, and why.
    pub obstacles: Vec<(&'a DiskName, &'a str)>,
    /// What the user has to know.
    pub warnings: Vec<String>,
}

impl<'a> Selection<'a> {
    /// Sorts the block devices of `machine` by what the user says in `vm`.
    pub(crate) fn of(vm: &Vm, machine: &'a Machine) -> Self {
        let mut selection =
            Self { disks: Vec::new(), skipped: Vec::new(), obstacles: Vec::new(), warnings: Vec::new() };
        let said = |disk: &DiskName| vm.excluded(disk);
        for disk in &machine.disks {
            if said(&disk.name).is_none() {
                selection.disks.push(disk);
            }
        }
        for (disk, why) in &machine.obstacles {
            if said(disk).is_none() {
                selection.obstacles.push((disk, why));
            }
        }
        for (disk, what) in &machine.warnings {
            if said(disk).is_none() {
                selection.warnings.push(format!("disk {disk}: {what}"));
            }
        }
        for disk in vm.all_excluded() {
            let known = machine.disks.iter().any(|found| found.name == *disk)
                || machine.obstacles.iter().any(|(found, _)| found == disk)
                || vm.disks.contains_key(disk);
            if let Some(reason) = said(disk).filter(|_| known) {
                selection.skipped.push(Skipped { name: disk.to_string(), reason: reason.to_owned() });
            } else if !machine.skipped.iter().any(|skipped| skipped.name == disk.as_str()) {
                selection
                    .warnings
                    .push(format!("disk {disk} is to be excluded, and the VM has no such disk"));
            }
        }
        let crowded =
            machine.disks.iter().filter_map(|disk| bitmaps::too_many(disk.name.as_str(), disk.targets()));
        selection.warnings.extend(crowded);
        selection.skipped.extend(machine.skipped.iter().cloned());
        if selection.disks.is_empty() && selection.obstacles.is_empty() {
            selection.warnings.push(match selection.skipped.len() {
                0 => "the VM has no disk; the point holds its configuration only".into(),
                1 => "the VM's only block device is left out; the point holds its configuration only".into(),
                all => format!(
                    "all {all} block devices of the VM are left out; the point holds its configuration only"
                ),
            });
        }
        selection
    }

    /// The words for a disk in the way: it has to be excluded by name, since leaving one out unsaid would be found out at
    /// the restore.
    pub(crate) fn obstacle(disk: &DiskName, why: &str, vm: &VmName) -> Failure {
        Failure::new(Exit::Failed, format!("disk {disk} of VM {vm} cannot be backed up: {why}"))
            .guest(Guest::Untouched)
            .next(leave_out(disk, Some(vm)))
    }
}

/// What to do about a disk in the way.
pub(crate) fn leave_out(disk: &DiskName, vm: Option<&VmName>) -> String {
    let for_good = vm.map(|vm| format!(", or exclude = [\"{disk}\"] under [vm.{vm}]")).unwrap_or_default();
    format!("change that, or leave the disk out: --exclude {disk}{for_good}")
}
