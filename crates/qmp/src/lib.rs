//! Asynchronous client for the QEMU Machine Protocol (QMP) and the guest agent.
//!
//! It carries commands, replies, descriptors and events, and gets each of them to whom it belongs, whatever the peer
//! does: no deadline, dropped future, unknown event or malformed line makes it lose count or hang. To a peer that has
//! fallen silent nothing more is sent, so that a caller waits for it once, not once a command. It knows no
//! command of QEMU's by its arguments or its reply; those are plain JSON, and belong to the caller. It does not start
//! QEMU, does not reconnect and does not use out-of-band execution.
//!
//! ```text
//!   Qmp (clones) ── execute, pipeline ──► queue ──► driver ──► QEMU's monitor, one client at a time
//!        ▲                                            │
//!        ├────────── a reply, by its id ◄─────────────┤
//!   EventStream ◄─── every event, in order ◄──────────┘
//!
//!   Agent ── one command after the other ──► QEMU's serial port ──► a program in the guest, not to be trusted
//! ```
//!
//! ```no_run
//! use serde_json::json;
//! use std::path::Path;
//! use stillpoint_qmp::{Command, Deadlines, Qmp};
//!
//! # async fn example() -> Result<(), stillpoint_qmp::Error> {
//! let qmp = Qmp::connect(Path::new("/run/vms/web01.qmp"), Deadlines::default()).await?;
//! println!("QEMU {}", qmp.version());
//! let mut events = qmp.events();
//! let paused = qmp.pipeline(vec![Command::new("stop"), Command::new("cont")]).await?;
//! for reply in paused.replies {
//!     reply?;
//! }
//! qmp.execute(Command::with("block-export-del", json!({"id": "export0"}))).await?;
//! while let Some(event) = events.next().await {
//!     println!("{event:?}");
//! }
//! # Ok(()) }
//! ```

mod agent;
mod command;
mod connection;
mod driver;
mod error;
mod event;
mod line;
mod message;
mod process;
mod shared;
mod socket;
mod version;

pub use agent::{Agent, FreezeStatus};
pub use command::{Command, Pipelined};
pub use connection::{Deadlines, Qmp};
pub use error::{Error, ErrorKind, Result};
pub use event::{Event, EventStream, Lagged};
pub use process::is_stopped;
pub use version::Version;
