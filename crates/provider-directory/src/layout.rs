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

/// Where the identity is written before it gets its name.
pub(crate) fn aside(random: u32) -> String {
    format!(".{IDENTITY}-{random:08x}")
}

/// A file that is made and removed at once, to see whether files can be made.
pub(crate) fn probe() -> String {
    format!("{PROBE}{}", std::process::id())
}

const PROBE: &str = ".stillpoint-";

/// Whether a name may be in a target's directory before there is a target: what a new file system has of its own, and what a run
/// that died while it made a target left.
pub(crate) fn is_nothing(name: &str) -> bool {
    let digits = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    let aside = name.strip_prefix('.').and_then(|name| name.strip_prefix(IDENTITY)?.strip_prefix('-'));
    name == "lost+found" || name.strip_prefix(PROBE).is_some_and(digits) || aside.is_some_and(digits)
}
