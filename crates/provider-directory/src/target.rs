//! Finding points in a target's directory.

use crate::{
    error::{from_image, in_one_line},
    layout,
    manifest::Manifest,
};
use stillpoint_image::{self as image, Directory};
use stillpoint_model::{PointId, VmName};
use stillpoint_provider::{Error, ErrorKind, Result};

/// The VMs that have a directory in the target. Names that no VM can have are somebody else's.
pub(crate) fn vms(target: &Directory) -> Result<Vec<VmName>> {
    let names = target.names().map_err(from_image)?;
    Ok(names.into_iter().filter_map(|name| name.parse().ok()).collect())
}

/// The directory of a VM, or `None` if it has none here.
pub(crate) fn vm(target: &Directory, vm: &VmName) -> Result<Option<Directory>> {
    match target.directory(vm.as_str()) {
        Ok(directory) => Ok(Some(directory)),
        Err(error) if error.kind() == image::ErrorKind::Missing => Ok(None),
        Err(error) => Err(from_image(error)),
    }
}

/// A point's directory with what could be read of it.
pub(crate) struct Found {
    pub(crate) id: PointId,
    pub(crate) manifest: Result<Manifest>,
}

impl Found {
    /// Position, or 0 if it is not known any more: points that cannot be read come first, and take no number away.
    pub(crate) fn sequence(&self) -> u64 {
        self.manifest.as_ref().map_or(0, |manifest| manifest.sequence)
    }

    pub(crate) fn damage(&self) -> Option<String> {
        self.manifest.as_ref().err().map(in_one_line)
    }
}

/// All points of a VM, in the order in which they were made. One that cannot be read does not hide the others.
pub(crate) fn points(vm_directory: &Directory, vm: &VmName) -> Result<Vec<Found>> {
    let names = vm_directory.names().map_err(from_image)?;
    let mut found: Vec<Found> = names
        .into_iter()
        .filter_map(|name| name.parse::<PointId>().ok())
        .map(|id| {
            let directory = vm_directory.directory(id.as_str()).map_err(crate::error::stored);
            let manifest = directory.and_then(|directory| Manifest::read(&directory, vm, &id));
            Found { id, manifest }
        })
        .collect();
    found.sort_by(|a, b| (a.sequence(), &a.id).cmp(&(b.sequence(), &b.id)));
    Ok(found)
}

/// Makes sure, before the VM is touched, that the target takes writes: a directory's mode says little (root, read-only
/// mounts, network file systems), so a file is made and removed.
pub(crate) fn check_writable(target: &Directory) -> Result<()> {
    let name = layout::probe();
    target.remove_tree(&name).and_then(|()| target.create_file(&name)).map_err(|error| {
        let kind = match error.kind() {
            image::ErrorKind::Io => ErrorKind::TargetReadOnly,
            _ => crate::error::kind_of(&error),
        };
        Error::new(kind, format!("target {} takes no files", target.path().display())).because(error)
    })?;
    target.remove_tree(&name).map_err(from_image)
}
