//! Providers outside the process, in any language: JSON-RPC over stdio for what is said, and an NBD export, a file or a
//! block device for the disks themselves.
//!
//! A program is not trusted with more than the disks that it is handed: it never gets the monitor, everything that it
//! sends is bounded and checked, and nothing that it does or leaves undone keeps a run from ending. What it has not read
//! it does not have, whatever it says.
//!
//! ```text
//!   Provider (the trait) --> Session --> rpc::Peer <== stdin, stdout ==> program
//!                               |                                          |
//!                               +--> mechanism::Handover <== NBD, FUSE, block device
//!                                         |
//!                                    ServedVolume: checked, counted, paced --> VolumeSource
//! ```

pub mod check;
mod mechanism;
mod process;
pub mod protocol;
mod provider;
mod restore;
mod rpc;
mod volume;

pub use mechanism::BlockDevices;
pub use process::sweep;
pub use protocol::Mechanism;
pub use provider::{Deadlines, ProgramProvider, Settings};
