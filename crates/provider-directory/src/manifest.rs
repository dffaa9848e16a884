//! What is kept of a point beside its data.

use crate::{
    envelope,
    error::{damaged, from_image},
    layout,
};
use serde::{Deserialize, Serialize};
use stillpoint_image::{Directory, Format};
use stillpoint_model::{DiskName, Length, PointId, VmName};
use stillpoint_provider::{ConfigRole, PointRecord, Result};

/// The image below an overlay. Its sums are named by their own sum, so that another point under the same name is
/// found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Base {
    pub(crate) point: PointId,
    pub(crate) image: String,
    pub(crate) sums_blake3: String,
}

/// One disk, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredDisk {
    pub(crate) name: DiskName,
    pub(crate) image: String,
    pub(crate) format: Format,
    /// Of the disk; an overlay's own virtual size is this, rounded up to a sector.
    pub(crate) size: Length,
    /// Of the image file.
    pub(crate) image_length: Length,
    /// Over what in the image file is not a disk's data (qcow2's tables); `None` for raw, which has nothing else.
    pub(crate) tables_blake3: Option<String>,
    pub(crate) sums: String,
    pub(crate) sums_length: Length,
    pub(crate) sums_blake3: String,
    /// Bytes that this point adds to the target for the disk.
    pub(crate) stored: Length,
    pub(crate) base: Option<Base>,
}

/// One configuration file, as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredConfig {
    pub(crate) name: DiskName,
    pub(crate) role: ConfigRole,
    pub(crate) length: Length,
    pub(crate) blake3: String,
}

/// The record in `point.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    /// Position among the VM's points, from 1.
    pub(crate) sequence: u64,
    pub(crate) point: PointRecord,
    pub(crate) disks: Vec<StoredDisk>,
    pub(crate) config: Vec<StoredConfig>,
}

impl Manifest {
    /// Reads the manifest of `point`, and makes sure that it is that point's.
    pub(crate) fn read(directory: &Directory, vm: &VmName, point: &PointId) -> Result<Self> {
        let manifest: Self = envelope::read(directory, layout::MANIFEST)?;
        let path = directory.path().join(layout::MANIFEST);
        if manifest.point.vm != *vm || manifest.point.id != *point {
            let (vm, id) = (&manifest.point.vm, &manifest.point.id);
            return Err(damaged(format!("{} is that of {vm}/{id}", path.display())));
        }
        for disk in &manifest.disks {
            // The names are in the manifest for whoever reads it without us; ours are made anew, never taken from it.
            if disk.image != layout::image(&disk.name, disk.format) || disk.sums != layout::sums(&disk.name) {
                return Err(damaged(format!(
                    "{} has other file names than disk {} has",
                    path.display(),
                    disk.name
                )));
            }
        }
        Ok(manifest)
    }

    /// Writes it into the directory of a point that is not whole yet.
    pub(crate) fn write(&self, directory: &Directory) -> Result<()> {
        directory.write_file(layout::MANIFEST, &envelope::seal(self)?).map_err(from_image)
    }

    pub(crate) fn disk(&self, name: &DiskName) -> Option<&StoredDisk> {
        self.disks.iter().find(|disk| disk.name == *name)
    }

    /// Bytes that the point alone takes.
    pub(crate) fn stored(&self) -> Length {
        let disks = self.disks.iter().map(|disk| disk.stored);
        disks.chain(self.config.iter().map(|config| config.length)).sum()
    }
}

impl StoredDisk {
    /// Looks, without reading any data, whether the disk's own files are there with the length they should have.
    pub(crate) fn check_lengths(&self, directory: &Directory) -> Result<()> {
        check_length(directory, &self.image, self.image_length)?;
        check_length(directory, &self.sums, self.sums_length)
    }
}

fn check_length(directory: &Directory, name: &str, wanted: Length) -> Result<()> {
    let found = directory.file_length(name).map_err(crate::error::stored)?;
    if found == wanted {
        return Ok(());
    }
    let path = directory.path().join(name);
    Err(damaged(format!("{} has {found} bytes and should have {wanted}", path.display())))
}
