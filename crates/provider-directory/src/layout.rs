//! The names in a target. Every one is made here from checked names, none is ever taken from a file's content.

use stillpoint_image::Format;
use stillpoint_model::{DiskName, PointId};

/// Who the target is.
pub(crate) const IDENTITY: &str = "stillpoint-target.json";
/// Held while a VM is backed up.
pub(crate) const LOCK: &str = "lock";
/// What is known of a point.
pub(crate) const MANIFEST: &str = "point.json";
/// The directory of configuration files in a point.
pub(crate) const CONFIG: &str = "config";
/// What comes before the name of something that is not whole yet. No VM's name and no point starts with a dot.
const PARTIAL: &str = ".partial-";

/// Where a point is written before it is whole.
pub(crate) fn partial(point: &PointId) -> String {
    format!("{PARTIAL}{point}")
}

/// Whether a name is that of a point that is not whole.
pub(crate) fn is_partial(name: &str) -> bool {
    name.strip_prefix(PARTIAL).is_some_and(|rest| rest.parse::<PointId>().is_ok())
}

/// Image of a disk. The extension tells the format apart, so no two disks of a point can meet in one name.
pub(crate) fn image(disk: &DiskName, format: Format) -> String {
    format!("{disk}.{format}")
}

/// Sums of a disk.
pub(crate) fn sums(disk: &DiskName) -> String {
    format!("{disk}.sums")
}

/// An image as seen from the directory of a later point of the same VM. It holds while the later point is partial as
/// well as afterwards, since both are in the VM's directory.
pub(crate) fn from_sibling(point: &PointId, file: &str) -> String {
    format!("../{point}/{file}")
}
