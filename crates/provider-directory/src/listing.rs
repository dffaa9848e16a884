//! The list of points, with what a look at names and lengths finds wrong.

use crate::{
    chain,
    error::{in_one_line, stored},
    manifest::Manifest,
    target,
};
use std::collections::HashMap;
use stillpoint_image::Directory;
use stillpoint_model::{DiskName, Length, PointId, VmName};
use stillpoint_provider::{ErrorKind, PointSummary, Result};

/// The points of one VM in `target`, or of all.
pub(crate) fn points(target: &Directory, vm: Option<&VmName>) -> Result<Vec<PointSummary>> {
    let all = vm.is_none();
    let vms = match vm {
        Some(vm) => vec![vm.clone()],
        None => target::vms(target)?,
    };
    let mut summaries = Vec::new();
    for vm in &vms {
        match target::vm(target, vm) {
            Ok(Some(directory)) => summaries.extend(of_vm(&directory, vm)?),
            Ok(None) => {}
            // A file or link that has a name as a VM could have it.
            Err(error) if all && error.kind() == ErrorKind::Damaged => {
                tracing::debug!(%vm, error = in_one_line(&error), "left out of the listing");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(summaries)
}

/// Manifests by point, and whether each disk of theirs can be used. Points come by sequence, so that a base has been
/// looked at before whatever is an increment to it: the whole listing takes one look at each file.
#[derive(Default)]
struct Seen {
    manifests: HashMap<PointId, Manifest>,
    damage: HashMap<(PointId, DiskName), String>,
}

fn of_vm(directory: &Directory, vm: &VmName) -> Result<Vec<PointSummary>> {
    let mut seen = Seen::default();
    let mut summaries = Vec::new();
    for found in target::points(directory, vm)? {
        let sequence = found.sequence();
        let unreadable = found.damage();
        let summary = match found.manifest {
            Err(_) => PointSummary {
                record: None,
                vm: vm.clone(),
                id: found.id,
                sequence,
                stored: Length::ZERO,
                damage: unreadable,
            },
            Ok(manifest) => {
                let damage = seen.look_at(directory, &manifest);
                let summary = PointSummary {
                    record: Some(manifest.point.clone()),
                    vm: vm.clone(),
                    id: found.id.clone(),
                    sequence,
                    stored: manifest.stored(),
                    damage,
                };
                seen.manifests.insert(found.id, manifest);
                summary
            }
        };
        summaries.push(summary);
    }
    Ok(summaries)
}

impl Seen {
    fn look_at(&mut self, vm_directory: &Directory, manifest: &Manifest) -> Option<String> {
        let own = vm_directory.directory(manifest.point.id.as_str()).map_err(stored);
        let mut damage = None;
        for disk in &manifest.disks {
            let lengths = own
                .as_ref()
                .map_err(in_one_line)
                .and_then(|directory| disk.check_lengths(directory).map_err(|error| in_one_line(&error)));
            let base = disk.base.as_ref().map_or(Ok(()), |base| {
                let key = (base.point.clone(), disk.name.clone());
                match (self.manifests.get(&base.point), self.damage.get(&key)) {
                    (_, Some(damage)) => Err(damage.clone()),
                    (None, _) => {
                        Err(format!("point {} below disk {} is missing or damaged", base.point, disk.name))
                    }
                    (Some(below), None) => {
                        chain::is_base(manifest, disk, base, below).map_err(|error| in_one_line(&error))
                    }
                }
            });
            if let Err(what) = lengths.and(base) {
                self.damage.insert((manifest.point.id.clone(), disk.name.clone()), what.clone());
                damage.get_or_insert(what);
            }
        }
        damage
    }
}
