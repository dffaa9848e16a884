//! What is ours inside QEMU, told by its name (I6).
//!
//! ```text
//!  stillpoint-fleece-0    node       fleecing image of disk 0
//!  stillpoint-filter-0    node       copy-before-write filter of disk 0
//!  stillpoint-junction-0  node       what the front end of disk 0 stands on while its filter is slid in below
//!  stillpoint-access-0    node       snapshot access of disk 0
//!  stillpoint-export-0    export     NBD export of the latter
//!  stillpoint-flush-0     export     NBD export of the disk itself for a moment, to have it flushed
//!  stillpoint-fd-0        descriptor of the fleecing image of disk 0 (named by `getfd`), or fd set (its `opaque`)
//!  stillpoint-listener    descriptor (named by `getfd`)
//!  stillpoint-read        bitmap     what this run reads of a disk, frozen; never stored
//!  stillpoint.TARGET.POINT.IMAGE.DISK  bitmap   what changed on DISK since POINT was kept in TARGET, made on IMAGE
//! ```

use crate::image_id::ImageId;
use stillpoint_model::{BitmapName, DiskName, Generation, NameError, NodeName, TargetId};

/// Every node, export and descriptor of ours begins so, and no bitmap that outlives a run does.
pub(crate) const PREFIX: &str = "stillpoint-";
/// The chain's bitmaps begin so.
pub(crate) const CHAIN_PREFIX: &str = "stillpoint.";
/// Name of the listener's descriptor in the monitor.
pub(crate) const LISTENER: &str = "stillpoint-listener";
/// Name of a descriptor that nobody ever passes.
pub(crate) const NO_LISTENER: &str = "stillpoint-no-listener";
/// The frozen copy of a bitmap that one run reads by.
pub(crate) const READ_BITMAP: &str = "stillpoint-read";

/// Roles of nodes, the part of a name between prefix and number.
const FILTER: &str = "filter";
const JUNCTION: &str = "junction";

/// The filter of the disk whose junction is called `name`, if that is one.
pub(crate) fn filter_of_junction(name: &str) -> Option<String> {
    let disk = name.strip_prefix(PREFIX)?.strip_prefix(JUNCTION)?;
    Some(format!("{PREFIX}{FILTER}{disk}"))
}

/// The nodes of one disk.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    pub(crate) fleecing: NodeName,
    pub(crate) filter: NodeName,
    pub(crate) junction: NodeName,
    pub(crate) access: NodeName,
    pub(crate) export: String,
    pub(crate) flush: String,
    pub(crate) fd_set: String,
}

impl Names {
    pub(crate) fn new(disk: usize) -> Result<Self, NameError> {
        let node = |role: &str| format!("{PREFIX}{role}-{disk}").parse();
        Ok(Self {
            fleecing: node("fleece")?,
            filter: node(FILTER)?,
            junction: node(JUNCTION)?,
            access: node("access")?,
            export: format!("{PREFIX}export-{disk}"),
            flush: format!("{PREFIX}flush-{disk}"),
            fd_set: format!("{PREFIX}fd-{disk}"),
        })
    }
}

/// Whether a node, export or fd set of this name is one of ours.
pub(crate) fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// The bitmap that records what changes on `disk` after `generation` was kept in `target`. The disk is named, since a
/// point's generation is that of all its disks, and their images may change places; the image, since others copy bitmaps by
/// name, empty, to images that they put in its place (ADR 0019).
pub(crate) fn chain_bitmap(
    target: &TargetId,
    generation: &Generation,
    image: Option<&ImageId>,
    disk: &DiskName,
) -> Result<BitmapName, NameError> {
    let image = image.map_or_else(|| ImageId::UNKNOWN.to_owned(), ToString::to_string);
    format!("{CHAIN_PREFIX}{target}.{generation}.{image}.{disk}").parse()
}

/// What the name of a bitmap of ours tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChainName {
    pub(crate) target: TargetId,
    pub(crate) generation: Generation,
    /// The image that it was made on.
    pub(crate) image: ImageId,
    pub(crate) disk: DiskName,
}

impl ChainName {
    /// `None` for the name of anybody else's bitmap.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(CHAIN_PREFIX)?.splitn(4, '.');
        Some(Self {
            target: parts.next()?.parse().ok()?,
            generation: parts.next()?.parse().ok()?,
            image: ImageId::parse(parts.next()?)?,
            disk: parts.next()?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_chain_bitmap_tells_its_target_generation_image_and_disk() {
        let (target, generation): (TargetId, Generation) =
            ("0badcafe".parse().unwrap(), "20261123T162855Z-00000001".parse().unwrap());
        let image = ImageId::parse("0123456789abcdef").unwrap();
        for disk in ["vda", "scsi0.1"] {
            let disk: DiskName = disk.parse().unwrap();
            let name = chain_bitmap(&target, &generation, Some(&image), &disk).unwrap();
            let (target, generation, image) = (target.clone(), generation.clone(), image.clone());
            assert_eq!(ChainName::parse(name.as_str()), Some(ChainName { target, generation, image, disk }));
        }
    }

    #[test]
    fn a_foreign_bitmap_is_never_taken_for_ours() {
        for foreign in [
            "",
            "bitmap0",
            "stillpoint",
            "stillpoint-read",
            "stillpoint.x.y",
            "stillpoint.0badcafe",
            "stillpoint.0badcafe.latest",
            "stillpoint.0badcafe.latest.vda",
            "stillpoint.0badcafe.20261123T162855Z-00000001",
            "stillpoint.0badcafe.20261123T162855Z-00000001.",
            "stillpoint.0badcafe.20261123T162855Z-00000001.vda",
            "stillpoint.0badcafe.20261123T162855Z-00000001.0123456789abcdef.",
        ] {
            assert_eq!(ChainName::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn the_thousandth_disk_still_has_names_that_qemu_takes() {
        assert!(Names::new(999).is_ok());
    }
}
