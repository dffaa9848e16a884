//! The provider that keeps points in a restic repository: deduplicated, compressed, encrypted, in a directory or an
//! object store, and readable by `restic` itself.
//!
//! ```text
//!   disk --> chunks --> hash --> known? --> compress, encrypt --> packs --> index --> snapshot
//!   (map)    (clean: the parent's ids; zero: one known id)        data/     index/    snapshots/
//! ```
//!
//! A point is an ordinary snapshot of `/disks/NAME.raw`, `/config/NAME` and `/point.json`, with the VM's name for a host.
//! Disks are cut into chunks of one size, which is also the granularity of their bitmaps, so that an incremental reads
//! what changed and takes the other chunks' ids from its parent. A snapshot is written when everything that it is made
//! of is durable; what an interrupted run leaves is found again by the next one, or removed by `prune`.
//!
//! The write path is ours. Keys, forgetting and pruning are `rustic_core`'s; see ADR 0015.

mod backup;
mod blob;
mod care;
mod child;
mod chunk;
mod crypto;
mod disk;
mod error;
mod index;
mod key_file;
mod lock;
mod pack;
mod password;
mod provider;
mod repository;
mod restore;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]
mod scale;
mod snapshot;
mod steps;
mod store;
mod tree;
mod verify;

pub use care::{Kept, Key, Pruned, Retention};
pub use password::PasswordSource;
pub use provider::{ResticProvider, Settings};
pub use steps::Steps;
