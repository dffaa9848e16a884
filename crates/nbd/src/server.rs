//! An NBD server for clients that are not trusted: what they send is checked before anything is asked of an [`Export`].
//!
//! Fixed newstyle, structured replies, `base:allocation` and one dirty bitmap, trim, any number of connections up to a
//! limit. Nothing can be written. A request that is wrong gets an error and the connection goes on; a connection that
//! breaks the protocol is closed. No client can make the server hold more memory than [`MOST_IN_FLIGHT`] a connection,
//! or wait for it when it is to end.
//!
//! ```text
//!   UnixListener --> connection: handshake --> requests --> (up to 64 at once) --> Export
//!                                                 replies <-- one writer <------------+
//! ```

mod connection;
mod handshake;

use crate::protocol::Errno;
use async_trait::async_trait;
use bytes::Bytes;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use stillpoint_model::{Extent, Length, Offset, Range};
use tokio::{
    net::UnixListener,
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
};

/// Most bytes of replies that one connection can make the server hold.
pub const MOST_IN_FLIGHT: u32 = 64 << 20;
/// Most connections at once; one more waits until another ends.
const MOST_CONNECTIONS: usize = 32;
/// Most requests of one connection at once.
const MOST_REQUESTS: usize = 64;
/// A client that does not negotiate within this time is not one.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Why a request failed: what the client is told.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// The number.
    pub errno: Errno,
    /// The words, for clients that show them.
    pub why: String,
}

impl Refusal {
    /// With words.
    pub fn new(errno: Errno, why: impl Into<String>) -> Self {
        Self { errno, why: why.into() }
    }
}

/// A disk to serve. Ranges that it is asked for are within its size and never empty.
#[async_trait]
pub trait Export: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> Length;

    /// Name of the map that tells dirty from clean, such as `qemu:dirty-bitmap:stillpoint`; `None` if all is to be read.
    fn dirty_context(&self) -> Option<&str>;

    /// All bytes of the range, at most 32 MiB.
    ///
    /// # Errors
    /// What the client is told.
    async fn read(&self, range: Range) -> Result<Bytes, Refusal>;

    /// The parts from `from` on, contiguous; at least one.
    ///
    /// # Errors
    /// What the client is told.
    async fn extents(&self, from: Offset) -> Result<Vec<Extent>, Refusal>;

    /// The client does not read the range again. Any alignment.
    ///
    /// # Errors
    /// What the client is told.
    async fn trim(&self, range: Range) -> Result<(), Refusal>;
}

/// What a server serves, by name.
pub type Exports = BTreeMap<String, Arc<dyn Export>>;

/// A server that runs until it is ended or dropped.
#[derive(Debug)]
pub struct Server(JoinHandle<()>);

impl Server {
    /// Serves `exports` to whoever connects.
    pub fn start(listener: UnixListener, exports: Exports) -> Self {
        Self(tokio::spawn(serve(listener, Arc::new(exports))))
    }

    /// Ends it, and every connection with it, whatever they are at; returns when nothing of it runs any more.
    pub async fn end(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn serve(listener: UnixListener, exports: Arc<Exports>) {
    let free = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    // Dropped with this future, and all connections with it.
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // No descriptor is free: one may be in a moment.
                tracing::debug!(%error, "an NBD client was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let exports = Arc::clone(&exports);
        connections.spawn(async move {
            let _permit = permit;
            if let Err(error) = connection::serve(stream, &exports).await {
                tracing::debug!(%error, "an NBD client's connection ended");
            }
        });
    }
}

/// Serves one client that is already connected, such as the kernel's end of a socket pair.
///
/// # Errors
/// If the client breaks the protocol, or the connection breaks.
pub async fn serve_one(stream: tokio::net::UnixStream, exports: &Exports) -> std::io::Result<()> {
    connection::serve(stream, exports).await
}

/// Serves requests on a connection whose handshake somebody else has done: simple replies, as the kernel wants them.
///
/// # Errors
/// As [`serve_one`].
pub async fn serve_transmission(
    stream: tokio::net::UnixStream,
    export: Arc<dyn Export>,
) -> std::io::Result<()> {
    connection::widen(&stream);
    let (reader, writer) = stream.into_split();
    let negotiated = handshake::Negotiated { export, structured: false, contexts: Vec::new() };
    connection::transmit(tokio::io::BufReader::new(reader), writer, negotiated).await
}
