//! Getting a point back.

use crate::{
    chain::Chain,
    envelope::hex,
    error::{blocking, damaged, stored},
    layout,
    manifest::Manifest,
    target,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Arc;
use stillpoint_image::Directory;
use stillpoint_model::{DiskName, Extent, Length, Offset, PointId, Range, VmName};
use stillpoint_provider::{ConfigFile, Error, ErrorKind, PointRecord, Restore, Result, VolumeSource};

/// Most that one read may ask for, as the contract says.
const MOST: Length = Length::new(32 << 20);

/// Most bytes of a configuration file, and of all files of a point. They are read into memory, and their lengths are told by the target.
const MOST_CONFIG: Length = Length::new(64 << 20);
const MOST_CONFIG_IN_ALL: Length = Length::new(256 << 20);

/// Refuses configuration that is too large to be read back.
pub(crate) fn check_config(lengths: impl Iterator<Item = Length>) -> Result<(), &'static str> {
    let mut all = Length::ZERO;
    for length in lengths {
        all = all.saturating_add(length);
        if length > MOST_CONFIG || all > MOST_CONFIG_IN_ALL {
            return Err("there is more configuration than 64 MiB a file and 256 MiB in all");
        }
    }
    Ok(())
}

/// A point, open.
pub(crate) struct DirectoryRestore {
    vm_directory: Arc<Directory>,
    manifest: Arc<Manifest>,
}

/// The directory of `vm` and the manifest of `point`.
pub(crate) fn find(target: &Directory, vm: &VmName, point: &PointId) -> Result<(Directory, Manifest)> {
    let missing = || {
        let path = target.path().display();
        Error::new(ErrorKind::NotFound, format!("there is no point {vm}/{point} in {path}"))
    };
    let vm_directory = target::vm(target, vm)?.ok_or_else(missing)?;
    let directory = match vm_directory.directory(point.as_str()) {
        Err(error) if error.kind() == stillpoint_image::ErrorKind::Missing => return Err(missing()),
        other => other.map_err(stored)?,
    };
    let manifest = Manifest::read(&directory, vm, point)?;
    Ok((vm_directory, manifest))
}

/// The configuration files of a point, checked.
pub(crate) fn read_config(vm_directory: &Directory, manifest: &Manifest) -> Vec<Result<ConfigFile>> {
    let directory = || -> Result<Directory> {
        vm_directory
            .directory(manifest.point.id.as_str())
            .and_then(|own| own.directory(layout::CONFIG))
            .map_err(stored)
    };
    if let Err(what) = check_config(manifest.config.iter().map(|file| file.length)) {
        return vec![Err(damaged(format!("{}/{}: {what}", manifest.point.vm, manifest.point.id)))];
    }
    let read = |file: &crate::manifest::StoredConfig| {
        let directory = directory()?;
        let content = directory.read_file(file.name.as_str(), file.length).map_err(stored)?;
        if content.len() as u64 != file.length.get() || hex(&content) != file.blake3 {
            let path = directory.path().join(file.name.as_str());
            return Err(damaged(format!("{} is not what was written", path.display())));
        }
        Ok(ConfigFile { name: file.name.clone(), role: file.role, content })
    };
    manifest.config.iter().map(read).collect()
}

impl DirectoryRestore {
    pub(crate) fn open(target: &Directory, vm: &VmName, point: &PointId) -> Result<Self> {
        let (vm_directory, manifest) = find(target, vm, point)?;
        Ok(Self { vm_directory: Arc::new(vm_directory), manifest: Arc::new(manifest) })
    }
}

#[async_trait]
impl Restore for DirectoryRestore {
    fn record(&self) -> &PointRecord {
        &self.manifest.point
    }

    async fn config(&self) -> Result<Vec<ConfigFile>> {
        let (directory, manifest) = (Arc::clone(&self.vm_directory), Arc::clone(&self.manifest));
        blocking(move || read_config(&directory, &manifest).into_iter().collect()).await
    }

    async fn volume(&self, disk: &DiskName) -> Result<Arc<dyn VolumeSource>> {
        let (directory, manifest, disk) =
            (Arc::clone(&self.vm_directory), Arc::clone(&self.manifest), disk.clone());
        let chain = blocking(move || Chain::open(&directory, &manifest, &disk)).await?;
        Ok(Arc::new(StoredVolume { chain: Arc::new(chain) }))
    }
}

/// A disk at a stored point. Dropping a call's future leaves nothing behind but a thread that ends with its read.
struct StoredVolume {
    chain: Arc<Chain>,
}

#[async_trait]
impl VolumeSource for StoredVolume {
    fn size(&self) -> Length {
        self.chain.size()
    }

    async fn regions(&self, from: Offset) -> Result<Vec<Extent>> {
        let chain = Arc::clone(&self.chain);
        blocking(move || chain.regions(from)).await
    }

    async fn read(&self, range: Range) -> Result<Bytes> {
        let most = usize::try_from(range.length().get()).ok().filter(|_| range.length() <= MOST);
        let length = most.ok_or_else(|| {
            Error::new(ErrorKind::Io, format!("a read of {} bytes is more than {MOST}", range.length()))
        })?;
        let chain = Arc::clone(&self.chain);
        blocking(move || {
            let mut bytes = vec![0; length];
            chain.read(range.start(), &mut bytes)?;
            Ok(bytes.into())
        })
        .await
    }

    async fn release(&self, _range: Range) -> Result<()> {
        Ok(())
    }
}
