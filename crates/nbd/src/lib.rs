//! Asynchronous client and server for the NBD protocol, over unix sockets. The server is in [`server`].
//!
//! The client speaks fixed newstyle with structured replies or extended headers where the server has them, keeps many
//! requests in flight on one connection, and reads maps (`base:allocation`, QEMU's dirty bitmaps) completely or not
//! at all. Nothing a server sends makes it panic, hang past a deadline, or allocate more than was asked for.
//!
//! It does no TLS and no TCP, never retries and never reconnects: what a broken connection means is
//! for the caller to say.
//!
//! ```text
//!   Client (clones) --request--> writer task --> socket --> server
//!        ^                                                     |
//!        +--- by cookie --- pending table <-- reader task <----+
//!             bytes land in the request's own buffer
//! ```
//!
//! ```no_run
//! use stillpoint_model::{Length, Offset, Range};
//! use stillpoint_nbd::{Client, MetaContext, Options};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let allocation = MetaContext::base_allocation();
//! let options = Options::new("disk0").context(allocation.clone());
//! let client = Client::connect_unix("/run/vm/nbd.sock".as_ref(), options).await?;
//!
//! for extent in client.map(&allocation, Offset::ZERO, client.size()).await? {
//!     if extent.is_zero(&allocation) {
//!         continue;
//!     }
//!     for part in extent.range.chunks(Length::new(1 << 20)) {
//!         let bytes = client.read(part).await?;
//!         assert_eq!(bytes.len() as u64, part.length().get());
//!     }
//! }
//! client.disconnect().await?;
//! # Ok(()) }
//! ```

mod assembly;
mod client;
mod context;
mod error;
mod handshake;
mod map;
mod options;
pub mod protocol;
mod reply;
pub mod server;
mod shared;

pub use client::Client;
pub use context::{Descriptor, MapExtent, MetaContext, Status, StatusFlags};
pub use error::{Error, ErrorKind, Result};
pub use options::{Deadlines, Options};
pub use protocol::{BlockSizes, Errno, Framing, TransmissionFlags};
