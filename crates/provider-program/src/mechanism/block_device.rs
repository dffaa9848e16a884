//! As block devices: `/dev/nbdN` where the kernel has NBD, a loop device over a FUSE file elsewhere.

mod kernel_nbd;

use super::file_handle::FileHandover;
use crate::{protocol::Handle, volume::ServedVolume};
use kernel_nbd::KernelNbd;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use stillpoint_model::DiskName;
use stillpoint_provider::{Error, ErrorKind, Result};

/// Devices that are handed over.
pub(crate) enum DeviceHandover {
    Nbd { devices: BTreeMap<DiskName, KernelNbd> },
    Loop { files: FileHandover, devices: BTreeMap<DiskName, LoopDevice> },
}

impl DeviceHandover {
    pub(crate) async fn start(directory: &Path, volumes: &[Arc<ServedVolume>]) -> Result<Self> {
        if !kernel_nbd::is_there() {
            return Self::start_loops(directory, volumes).await;
        }
        let mut devices = BTreeMap::new();
        for volume in volumes {
            match KernelNbd::connect(directory, volume).await {
                Ok(device) => {
                    devices.insert(volume.name.clone(), device);
                }
                Err(error) => {
                    Self::Nbd { devices }.end().await;
                    let what = format!("make a block device of disk {}", volume.name);
                    return Err(Error::new(ErrorKind::Io, what).because(error));
                }
            }
        }
        Ok(Self::Nbd { devices })
    }

    async fn start_loops(directory: &Path, volumes: &[Arc<ServedVolume>]) -> Result<Self> {
        let files = FileHandover::start(directory, volumes)?;
        let mut devices = BTreeMap::new();
        for volume in volumes {
            match attach(files.path(volume), volume.has_map()).await {
                Ok(device) => {
                    devices.insert(volume.name.clone(), device);
                }
                Err(error) => {
                    Self::Loop { files, devices }.end().await;
                    let what = format!("make a loop device of disk {}", volume.name);
                    return Err(Error::new(ErrorKind::Io, what).because(error));
                }
            }
        }
        Ok(Self::Loop { files, devices })
    }

    pub(crate) fn handle(&self, volume: &ServedVolume) -> Handle {
        let path = match self {
            Self::Nbd { devices } => devices.get(&volume.name).map(KernelNbd::path),
            Self::Loop { devices, .. } => devices.get(&volume.name).map(|device| device.0.as_path()),
        };
        Handle::BlockDevice { path: path.unwrap_or(Path::new("/dev/null")).to_owned() }
    }

    pub(crate) async fn end(self) {
        match self {
            Self::Nbd { devices } => {
                for device in devices.into_values() {
                    device.disconnect().await;
                }
            }
            Self::Loop { files, devices } => {
                // The files go first: whatever reads a device then gets an error and lets go of it.
                let detached = tokio::task::spawn_blocking(move || drop(devices));
                let mount = files.end();
                let _ = tokio::join!(detached, mount);
            }
        }
    }
}

/// Only what is asked for is to be read of a device that may not be read everywhere, and no partitions are looked for.
async fn attach(file: PathBuf, incremental: bool) -> io::Result<LoopDevice> {
    let attached = tokio::task::spawn_blocking(move || {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--nooverlap", "--direct-io=on"])
            .arg(&file)
            .output()?;
        if !output.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let device = LoopDevice(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
        let name = device.0.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ahead = if incremental { "0" } else { "4096" };
        let _ = fs::write(format!("/sys/block/{name}/queue/read_ahead_kb"), ahead);
        Ok(device)
    });
    attached.await.map_err(io::Error::other)?
}

/// A loop device of ours, let go of when this is dropped: a run that fails drops all that it has, and once the file
/// below is unmounted nothing tells any more whose device it was.
pub(crate) struct LoopDevice(PathBuf);

impl Drop for LoopDevice {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

fn detach(device: &Path) {
    let done = Command::new("losetup").arg("--detach").arg(device).output();
    if !done.as_ref().is_ok_and(|output| output.status.success()) {
        tracing::warn!(device = %device.display(), "a loop device was not detached");
    }
}

/// Lets go of loop devices over files below `directory`, and of NBD devices whose identifier is of that directory.
pub(super) fn detach_all(directory: &Path) {
    let Ok(devices) = fs::read_dir("/sys/block") else { return };
    for entry in devices.flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(file.trim()).starts_with(directory) {
            detach(&Path::new("/dev").join(entry.file_name()));
        }
    }
    kernel_nbd::disconnect_all(directory);
}
