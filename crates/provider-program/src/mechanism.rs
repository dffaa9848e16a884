//! How a disk gets to a program: by an NBD export, as a file, or as a block device.

mod ahead;
mod block_device;
mod file_handle;
mod nbd;

use crate::{
    protocol::{Handle, Mechanism},
    volume::ServedVolume,
};
use std::{path::Path, sync::Arc};
use stillpoint_provider::Result;

/// Disks handed over, until this is ended.
pub(crate) enum Handover {
    Nbd(nbd::NbdHandover),
    Files(file_handle::FileHandover),
    Devices(block_device::DeviceHandover),
}

impl Handover {
    /// Makes the disks readable in `directory`.
    ///
    /// # Errors
    /// If that cannot be done on this host.
    pub(crate) async fn start(
        mechanism: Mechanism,
        directory: &Path,
        volumes: &[Arc<ServedVolume>],
    ) -> Result<Self> {
        match mechanism {
            Mechanism::Nbd => nbd::NbdHandover::start(directory, volumes).map(Self::Nbd),
            Mechanism::FileHandle => file_handle::FileHandover::start(directory, volumes).map(Self::Files),
            Mechanism::BlockDevice => {
                block_device::DeviceHandover::start(directory, volumes).await.map(Self::Devices)
            }
        }
    }

    /// Where the disk is to be read.
    pub(crate) fn handle(&self, volume: &ServedVolume) -> Handle {
        match self {
            Self::Nbd(nbd) => nbd.handle(volume),
            Self::Files(files) => files.handle(volume),
            Self::Devices(devices) => devices.handle(volume),
        }
    }

    /// Takes everything back; nothing of it is left.
    pub(crate) async fn end(self) {
        match self {
            Self::Nbd(nbd) => nbd.end().await,
            Self::Files(files) => files.end().await,
            Self::Devices(devices) => devices.end().await,
        }
    }
}

/// Lets go of devices that are made of files below `directory`, of a run that has died.
pub(crate) fn detach_all(directory: &Path) {
    block_device::detach_all(directory);
}

/// Disks as block devices, without a program that they are for.
pub struct BlockDevices {
    devices: block_device::DeviceHandover,
    paths: Vec<std::path::PathBuf>,
}

impl BlockDevices {
    /// Makes a device of each disk; whatever that needs besides is put into `directory`, and found there by
    /// [`sweep`](crate::sweep).
    ///
    /// # Errors
    /// If this host has neither NBD nor FUSE and loop devices, or does not let us.
    pub async fn start(directory: &Path, volumes: &[stillpoint_provider::Volume]) -> Result<Self> {
        let mut served = Vec::new();
        for volume in volumes {
            served.push(Arc::new(ServedVolume::new(volume, None, crate::rpc::Activity::new()).await?));
        }
        let devices = block_device::DeviceHandover::start(directory, &served).await?;
        let path = |volume: &Arc<ServedVolume>| match devices.handle(volume) {
            Handle::BlockDevice { path } | Handle::FileHandle { path } => path,
            Handle::Nbd { socket, .. } => socket,
        };
        let paths = served.iter().map(path).collect();
        Ok(Self { devices, paths })
    }

    /// The devices, in the order of the disks.
    pub fn paths(&self) -> &[std::path::PathBuf] {
        &self.paths
    }

    /// Takes them back, and returns when they are gone.
    pub async fn end(self) {
        self.devices.end().await;
    }
}
