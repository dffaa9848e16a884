//! Provider that keeps points as plain images in a directory.
//!
//! A full is a sparse raw file, an increment a qcow2 overlay that names the image below it, so that any QEMU tool can
//! read every point with nothing else at hand: `qemu-img convert TARGET/web01/ID/vda.qcow2 vda.raw`. It is not a
//! repository: nothing is compressed, encrypted or shared between VMs, and no point is ever removed but one that is damaged, on demand.
//!
//! ```text
//! TARGET/stillpoint-target.json        who this target is, drawn when it is made
//! TARGET/web01/lock                    locked while web01 is backed up; says by whom
//! TARGET/web01/ID/point.json           the point, its disks, and sums over all that follows
//! TARGET/web01/ID/vda.raw              a full image          (or)
//! TARGET/web01/ID/vda.qcow2            what changed since    (backing file ../BASE/vda.raw or .qcow2)
//! TARGET/web01/ID/vda.sums             what each byte of the image should be
//! TARGET/web01/ID/config/web01.conf    configuration, as it was
//! TARGET/web01/.partial-ID/            a point that is not whole
//! ```
//!
//! Files are for their owner alone (0600, directories 0700), and below TARGET no link is followed.
//!
//! # Consistency
//! A point's directory is written under a name that no listing takes, made durable file by file, and renamed; so a
//! point is listed only when it is whole (I8), and a commit returns only when the rename is durable too (I3). What
//! follows from a crash at each step stands in the module `backup`. The identity is written aside and renamed
//! likewise: a crash leaves none, and the next backup draws another. What is taken for a target, and where one is made, stands in the
//! module `state`; how damaged points are dropped, in `damage`.
//!
//! | who | takes | writes | may meet |
//! |---|---|---|---|
//! | backup | the VM's lock | its own partial, then one rename | points appear only by its own rename |
//! | clean-up in `backup_init` | the VM's lock | removes partials | no living owner: they would hold the lock |
//! | dropping damaged points | the VM's lock, once all is read | one rename a point, then removes it | points appear only by renames under the lock |
//! | points, restore, verify | nothing | nothing | a new point, whole, or none: no listed file ever changes. A point that is dropped meanwhile was of no use |
//!
//! # Damage
//! Every byte that a restore gives back was compared with a sum whose file is summed in the manifest, which is summed
//! in itself. An overlay names the sums of its base by their sum, so that a chain cannot be put together from other
//! points. A check reads everything else too, down to the padding of qcow2's tables.
//!
//! ```
//! use stillpoint_provider::Provider;
//! use stillpoint_provider_directory::DirectoryProvider;
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> stillpoint_provider::Result<()> {
//! # let scratch = tempfile::tempdir().expect("a temporary directory");
//! let provider = DirectoryProvider::new(scratch.path().join("backups"));
//! let target = provider.job_init().await?;
//! assert_eq!(provider.job_init().await?, target);
//! assert!(provider.points(None).await?.is_empty());
//! # Ok(()) }
//! ```

mod backup;
mod chain;
mod cover;
mod damage;
mod disk;
mod envelope;
mod error;
mod identity;
mod layout;
mod listing;
mod lock;
mod manifest;
mod plan;
mod provider;
mod restore;
mod state;
mod sums;
mod target;
mod verify;

#[cfg(test)]
mod crash;

pub use damage::{Dropping, Judged};
pub use provider::{DirectoryProvider, Examined};
pub use state::{Before, TargetState};
