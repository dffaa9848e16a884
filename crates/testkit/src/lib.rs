//! What the project is tested with: real guests, the oracle that decides what is right, scripted and hostile peers.
//!
//! ```text
//!   Qemu  ->  GuestBuilder  ->  Guest --- writes without pause ---> images
//!                                 |                                   |
//!                           monitor for the tool               restored points -> oracle::check
//! ```
//!
//! It blocks, and panics nowhere: a test says what it expects. What a machine cannot do is skipped with a reason that is
//! counted ([`skip`]).
//!
//! ```no_run
//! use stillpoint_testkit::{DiskSpec, GuestBuilder, Qemu};
//! # fn main() -> anyhow::Result<()> {
//! let mut guest = GuestBuilder::new(Qemu::installed()?).disk(DiskSpec::new("vda", 64 << 20)).boot()?;
//! let storm = guest.start_storm(1, 0)?;
//! // ... back up, restore ...
//! # let restored = guest.images();
//! let verdict = stillpoint_testkit::oracle::check(&restored, &storm.layout, storm.run)?;
//! assert!(verdict.is_valid(), "{:?}", verdict.violations);
//! # Ok(()) }
//! ```
#![allow(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "test code: a panic in it is a failed test, and its numbers are its own"
)]

mod accelerator;
mod bare;
mod disk;
pub mod firmware;
mod graph;
mod guest;
mod images;
mod kernel;
mod monitor;
pub mod nbd_peer;
pub mod object_store;
pub mod oracle;
mod overlay;
mod qemu;
pub mod qmp_peer;
pub mod requirements;
mod storm;
mod tool;
mod watch;

pub use bare::BareMachine;
pub use disk::{Cache, DiskSpec, FrontEnd, ImageFormat};
pub use firmware::Firmware;
pub use graph::BlockGraph;
pub use guest::{Guest, GuestBuilder};
pub use guest_writer::Histogram;
pub use images::{raw_copy, same};
pub use kernel::{Boot, boot, boot_probe, cache, run, workspace};
pub use monitor::Monitor;
pub use qemu::{Qemu, skip, trixie_root};
pub use storm::{Durable, Storm, StormCounts, StormSpec};
pub use tool::{Outcome, Tool};
