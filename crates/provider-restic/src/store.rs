//! Where a repository's files are: a directory, an object store, another host, behind a REST server.
//!
//! rustic's own back ends are not used for this, since they know nothing of lock files and write local files under
//! their final name; see ADR 0015. [`Files`] lets rustic use ours.

mod local;
mod network;
mod object;
mod rclone;
mod rest;
mod rustic;
mod s3;
mod sftp;

pub(crate) use rustic::Files;

use bytes::{Bytes, BytesMut};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Tries of each request to another host after the first, with pauses that grow to [`LONGEST_PAUSE`]: some half a minute in
/// all.
const TRIES: usize = 5;
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A request without an answer for so long is tried again. A pack of 16 MiB takes this at 1.5 Mbit/s.
const TIMEOUT: Duration = Duration::from_secs(90);

/// What the host of a store may take for its first answer. A person, or a VM's lock, waits for it, and a name that is
/// wrong does not get right by waiting. Later on a store is patient, so that a run outlives a server that is started anew.
const FIRST_ANSWER: Duration = Duration::from_secs(12);

/// Tries after the first until the store has answered once, with pauses of up to [`LONGEST_FIRST_PAUSE`].
const FIRST_TRIES: usize = 2;
const LONGEST_FIRST_PAUSE: Duration = Duration::from_secs(2);

/// The time until a store's host has answered once.
struct Opening {
    until: Instant,
    answered: AtomicBool,
}

impl Opening {
    fn new() -> Self {
        Self { until: Instant::now() + FIRST_ANSWER, answered: AtomicBool::new(false) }
    }

    /// What is left for the first answer; `None` once there was one.
    fn left(&self) -> Option<Duration> {
        let waits = !self.answered.load(Ordering::Relaxed);
        waits.then(|| self.until.saturating_duration_since(Instant::now()))
    }

    fn answered(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }
}

/// A kind of file, which is a folder of the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Folder {
    /// The one file `config`.
    Config,
    Keys,
    Locks,
    Snapshots,
    Index,
    /// Packs, in 256 folders by the first byte of their names.
    Data,
}

impl Folder {
    /// All but the configuration, which is a file.
    pub(crate) const ALL: [Self; 5] = [Self::Keys, Self::Locks, Self::Snapshots, Self::Index, Self::Data];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Keys => "keys",
            Self::Locks => "locks",
            Self::Snapshots => "snapshots",
            Self::Index => "index",
            Self::Data => "data",
        }
    }

    /// Most bytes of a file of this kind that are read at once: far more than restic or anybody else writes, and less than
    /// would end a host.
    pub(crate) fn most(self) -> u64 {
        match self {
            Self::Config | Self::Keys | Self::Locks => 1 << 20,
            Self::Snapshots | Self::Index => 256 << 20,
            // A pack's size is a number of 32 bits.
            Self::Data => u32::MAX.into(),
        }
    }

    /// The path of the file `name` below the repository, with slashes.
    pub(crate) fn path(self, name: &str) -> String {
        match self {
            Self::Config => "config".to_owned(),
            Self::Data => format!("data/{}/{name}", name.get(..2).unwrap_or("00")),
            _ => format!("{}/{name}", self.name()),
        }
    }
}

/// A place for files. All calls block, and may come from any thread.
pub(crate) trait Store: Send + Sync {
    /// What to call it in messages; without credentials.
    fn location(&self) -> String;

    /// What to say where there is no configuration, so no repository.
    fn absent(&self) -> Error {
        Error::new(ErrorKind::TargetMissing, format!("there is no repository at {}", self.location()))
    }

    /// Makes the folders of a new repository.
    fn create(&self) -> io::Result<()>;

    /// Names and sizes of the files of a folder whose names are 64 hex digits (all others are not restic's), or of
    /// the configuration if it is there. A folder that is not there is empty.
    fn list(&self, folder: Folder) -> io::Result<Vec<(String, u64)>>;

    /// A whole file.
    fn read(&self, folder: Folder, name: &str) -> io::Result<Bytes> {
        let mut content = Vec::new();
        self.read_into(folder, name, &mut content)?;
        Ok(content.into())
    }

    /// A whole file, in memory that is used again; what was in it is gone.
    fn read_into(&self, folder: Folder, name: &str, content: &mut Vec<u8>) -> io::Result<()>;

    /// Part of a file; all of it or an error.
    fn read_part(&self, folder: Folder, name: &str, offset: u64, length: u64) -> io::Result<BytesMut>;

    /// Writes a file, whole or not at all. One of the same name that is there already holds the same.
    fn write(&self, folder: Folder, name: &str, content: &[Bytes]) -> io::Result<()>;

    /// Removes a file. One that is not there is no error.
    fn remove(&self, folder: Folder, name: &str) -> io::Result<()>;

    /// Returns when all that was written by this process survives a loss of power.
    fn sync(&self) -> io::Result<()>;
}

/// Opens the store at a location as restic writes it: a path, `s3:https://host/bucket/path`, `sftp:user@host:/path`,
/// `rest:https://host/path`, `rclone:remote:path`.
pub(crate) fn open(location: &str) -> Result<Arc<dyn Store>> {
    match location.split_once(':') {
        Some(("s3", rest)) => Ok(Arc::new(s3::open(rest)?)),
        Some(("sftp", rest)) => Ok(Arc::new(sftp::open(rest)?)),
        Some(("rest", rest)) => Ok(Arc::new(rest::RestStore::rest(rest)?)),
        Some(("rclone", remote)) => Ok(Arc::new(rclone::open(remote)?)),
        Some(("local", path)) => Ok(Arc::new(local::LocalStore::new(path.into()))),
        Some((scheme, _)) if !scheme.contains('/') => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("repository {:?} begins with {scheme:?}, which is no kind of place known here", shown(location)),
        )
        .next(
            "write a path, s3:https://HOST/BUCKET[/PATH], sftp:[USER@]HOST:/PATH, rest:https://HOST[:PORT]/[PATH] or rclone:REMOTE:PATH",
        )),
        _ => Ok(Arc::new(local::LocalStore::new(location.into()))),
    }
}

/// A location for messages, without credentials that it should not have.
pub(crate) fn shown(location: &str) -> String {
    match location.split_once(':') {
        Some(("rclone", remote)) => format!("rclone:{}", rclone::shown(remote)),
        Some(("local", path)) => path.to_owned(),
        Some((scheme, _)) if !scheme.contains('/') => without_credentials(location),
        _ => location.to_owned(),
    }
}

/// A location to show: what stands in front of an `@` might be a password.
fn without_credentials(location: &str) -> String {
    match location.rsplit_once('@') {
        Some((before, host)) => {
            let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
            if scheme.is_empty() { format!("...@{host}") } else { format!("{scheme}://...@{host}") }
        }
        None => location.to_owned(),
    }
}

fn is_file_name(name: &str) -> bool {
    crate::blob::Id::parse(name).is_some()
}

fn not_found(path: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{path} is not there"))
}
