//! How a disk gets to a program: by an NBD export, as a file, or as a block device.

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
            Mechanism::FileHandle | Mechanism::BlockDevice => {
                Err(stillpoint_provider::Error::new(stillpoint_provider::ErrorKind::Io, "not yet"))
            }
        }
    }

    /// Where the disk is to be read.
    pub(crate) fn handle(&self, volume: &ServedVolume) -> Handle {
        match self {
            Self::Nbd(nbd) => nbd.handle(volume),
        }
    }

    /// Takes everything back; nothing of it is left.
    pub(crate) async fn end(self) {
        match self {
            Self::Nbd(nbd) => nbd.end().await,
        }
    }
}

/// Lets go of devices that are made of files below `directory`, of a run that has died.
pub(crate) fn detach_all(_directory: &Path) {}
