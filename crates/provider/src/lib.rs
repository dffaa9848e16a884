//! The contract between Stillpoint and whatever keeps the points.
//!
//! A [`Provider`] stores points of VMs in a target. It knows nothing of QEMU: it is asked which generation it holds of
//! each disk, is then handed each disk as a [`VolumeSource`] that tells what changed and reads it as it was at the
//! point, and is told to [commit](Backup::commit). The names of the calls follow Proxmox VE's
//! `PVE::BackupProvider::Plugin`; generation ids and the explicit commit are what that contract lacks.
//!
//! ```text
//!  job                                 provider                      target
//!   | job_init ------------------------> who is this target?  <------- id
//!   | backup_init ---------------------> Backup
//!   |   backup_vm_query_incremental ---> per disk: a generation, or full and why
//!   |   (the VM's one instant)
//!   |   backup_vm(volumes) ------------> regions, read, release  ----> data, unlisted
//!   |   commit ------------------------> durable, then listed   -----> point
//!   |   backup_cleanup  (always)
//!   | job_cleanup       (always)
//! ```
//!
//! # Invariants a provider keeps
//! * I3, I8: [`Backup::commit`] returns success only when the point is durable, and a point is listed only then.
//! * I4: it answers [`Incremental::Since`] only with the generation of a point that it holds whole.
//! * Earlier points are never modified by a later backup.
//!
//! # Cancellation
//! A run is cancelled by its volumes: from then on every [`VolumeSource::read`] fails with
//! [`ErrorKind::Cancelled`], the provider returns that error, and `backup_cleanup` follows.

mod backup;
mod error;
mod record;
mod restore;
mod volume;
mod work;

pub use backup::{
    Backup, ConfigFile, ConfigRole, DiskOffer, Incremental, OfferedBitmap, Provider, Volume, VolumeReport,
};
pub use error::{Error, ErrorKind, Result};
pub use record::{BitmapMode, Consistency, DiskRecord, PointRecord, PointSummary, Skipped};
pub use restore::{Depth, Finding, Progress, Restore, VerifyReport};
pub use volume::VolumeSource;
pub use work::blocking;
