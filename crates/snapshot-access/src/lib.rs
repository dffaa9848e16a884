//! Holds one instant of all disks of a running VM, and makes it readable, while the guest writes on.
//!
//! It knows QEMU and its block graph; it knows nothing of providers' targets or of the command line.
//!
//! ```text
//!   before                          held                                     after
//!
//!   front end                       front end        reader (NBD)            front end
//!       |                               |                |                       |
//!       v                               v                v                       v
//!     disk node                      filter <--- snapshot access               disk node
//!                                    |    |  copy before write
//!                                    v    v
//!                             disk node   fleecing image (no name)
//! ```
//!
//! A run: [`Machine::inspect`] looks at the VM and refuses what is known to hurt it; [`SnapshotAccess::take`] takes the
//! instant; [`SnapshotAccess::volumes`] are read; [`SnapshotAccess::tear_down`] takes the graph back to what it was and
//! returns the [`Chain`] of bitmaps, whose fate is the run's outcome. After a death [`LeftOvers`] finds and undoes
//! what is still there. The steps and what undoes each are listed in the `step` module, the argument that no write is
//! lost is in the `pause` and `bitmap` modules.
//!
//! ```no_run
//! use stillpoint_snapshot_access::{DiskPlan, Machine, ReadMode, Settings, SnapshotAccess};
//! # async fn example(qmp: stillpoint_qmp::Qmp, settings: Settings) -> Result<(), Box<dyn std::error::Error>> {
//! let machine = Machine::inspect(&qmp).await?;
//! let full = ReadMode::Full { granularity: stillpoint_model::Granularity::DEFAULT };
//! let plan = machine.disks.iter().map(|disk| DiskPlan { disk: disk.clone(), mode: full.clone() }).collect();
//! let access = SnapshotAccess::take(qmp, &machine, plan, settings).await?;
//! println!("the guest stood still for {:?}", access.instant().pause);
//! let volumes = access.volumes();
//! // ... read them, make the point durable ...
//! # drop(volumes);
//! let (chain, torn_down) = access.tear_down(false).await;
//! chain.commit().await?;
//! torn_down?;
//! # Ok(()) }
//! ```

mod access;
mod bitmap;
mod bitmaps;
mod command;
mod direct;
mod discard;
mod error;
mod fleecing;
mod freeze;
mod graph;
mod guard;
mod guest;
mod image_id;
mod inspect;
mod journal;
mod layers;
mod listener;
mod lock;
mod names;
mod offline;
mod pause;
mod power;
mod process;
mod recover;
mod reserve;
mod step;
mod steps;
mod taking;
mod volume;
mod watch;

pub use access::{Canceller, DiskPlan, DiskState, ReadMode, Settings, SnapshotAccess};
pub use bitmap::Chain;
pub use bitmaps::PointBitmap;
pub use discard::DiscardPlanner;
pub use error::{Error, ErrorKind, Result};
pub use freeze::Freeze;
pub use guard::run_guard;
pub use guest::GuestState;
pub use inspect::{Disk, FrontEnd, Machine};
pub use journal::sweep;
pub use listener::private_directory;
pub use lock::RunLock;
pub use offline::{OfflineDisk, OfflineImages, run_with_parent};
pub use pause::Instant;
pub use recover::LeftOvers;
pub use reserve::{Reserve, SpaceState, run_watcher};
