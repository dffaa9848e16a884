//! restic's locks: files in `locks/` that say who works on the repository.
//!
//! Any number of programs may add to a repository at once, each with a lock of its own; one that removes something
//! needs to be alone, which an exclusive lock says (restic's design document, "Locks"). A lock is refreshed while its
//! holder lives; one that is half an hour old, or whose holder is a dead process of this host, is stale.

use crate::{
    blob::Id,
    crypto,
    error::{blocking, stored},
    repository::Repository,
    store::Folder,
};
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use stillpoint_provider::{Error, ErrorKind, Result};
use tokio::task::JoinHandle;

const REFRESH: Duration = Duration::from_secs(5 * 60);
/// restic's `staleLockTimeout`.
const STALE: SignedDuration = SignedDuration::from_mins(30);
/// A run whose lock could not be refreshed for so long gives up before others take it for dead.
const LOST: SignedDuration = SignedDuration::from_mins(25);
/// How long a lock that wants to be alone waits for others that were made at the same instant (restic's
/// `waitBeforeLockCheck`): there is nothing that would tell.
const SETTLE: Duration = Duration::from_millis(200);
/// Most bytes of a lock.
const LARGEST: u64 = 1 << 16;

/// A lock file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LockFile {
    time: Timestamp,
    exclusive: bool,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    pid: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    uid: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    gid: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

impl LockFile {
    fn mine(exclusive: bool) -> Self {
        Self {
            time: Timestamp::now(),
            exclusive,
            hostname: host(),
            username: "stillpoint".to_owned(),
            pid: std::process::id(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
        }
    }

    fn is_stale(&self, now: Timestamp) -> bool {
        now.duration_since(self.time) > STALE || (self.hostname == host() && !is_alive(self.pid))
    }
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| !matches!(rustix::process::test_kill_process(pid), Err(rustix::io::Errno::SRCH)))
}

/// Whether others are in the way. Locks of the dead are removed.
fn conflicts(repository: &Repository, exclusive: bool, own: Option<&str>) -> Result<()> {
    let place = repository.location();
    let failed = |error| stored(format!("cannot read the locks of {place}"), error);
    for (name, _) in repository.store.list(Folder::Locks).map_err(failed)? {
        if own == Some(name.as_str()) {
            continue;
        }
        let other = repository.read_file(Folder::Locks, &name, LARGEST).and_then(|json| {
            serde_json::from_slice::<LockFile>(&json)
                .map_err(|error| crate::error::damaged("is none").because(error))
        });
        let other = match other {
            Ok(other) => other,
            // Gone meanwhile.
            Err(error) if is_missing(&error) => continue,
            Err(error) => {
                return Err(Error::new(
                    ErrorKind::Locked,
                    format!(
                        "repository {place} has a lock that cannot be read ({name}); if nothing else works on it: restic unlock --remove-all"
                    ),
                )
                .because(crate::error::in_one_line(&error)));
            }
        };
        if other.is_stale(Timestamp::now()) {
            // It would stand in restic's way, which asks for `restic unlock`.
            remove(repository, &name);
            continue;
        }
        if exclusive || other.exclusive {
            let how = if other.exclusive { "exclusively " } else { "" };
            return Err(Error::new(
                ErrorKind::Locked,
                format!(
                    "repository {place} is {how}locked by {}@{}, process {}, since {}",
                    other.username.escape_debug(),
                    other.hostname.escape_debug(),
                    other.pid,
                    other.time
                ),
            ));
        }
    }
    Ok(())
}

fn is_missing(error: &Error) -> bool {
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::NotFound)
}

fn write(repository: &Repository, file: &LockFile) -> Result<String> {
    let json = serde_json::to_vec(file)
        .map_err(|error| Error::new(ErrorKind::Io, "a lock cannot be written").because(error))?;
    let sealed = crypto::seal_file(&repository.key, repository.compress, &json)?;
    let name = Id::of(&sealed).to_string();
    let written = repository.store.write(Folder::Locks, &name, &[Bytes::from(sealed)]);
    written.map_err(|error| stored(format!("cannot lock repository {}", repository.location()), error))?;
    Ok(name)
}

fn remove(repository: &Repository, name: &str) {
    // An append-only store keeps it; half an hour later it is stale.
    if let Err(error) = repository.store.remove(Folder::Locks, name) {
        tracing::info!(%error, "the repository's lock could not be removed; it ends by itself");
    }
}

/// The file that is there now.
struct Current {
    name: String,
    time: Timestamp,
}

/// A lock on a repository, kept fresh until it is released.
pub(crate) struct Lock {
    repository: Arc<Repository>,
    exclusive: bool,
    current: Arc<Mutex<Current>>,
    refresher: JoinHandle<()>,
}

impl Lock {
    /// Takes a lock; `exclusive` to be alone.
    ///
    /// # Errors
    /// With `Locked` if others are in the way, which names them.
    pub(crate) async fn take(repository: &Arc<Repository>, exclusive: bool) -> Result<Self> {
        let own = Arc::clone(repository);
        let (name, time) = blocking(move || {
            conflicts(&own, exclusive, None)?;
            let file = LockFile::mine(exclusive);
            let name = write(&own, &file)?;
            Ok((name, file.time))
        })
        .await?;
        let current = Arc::new(Mutex::new(Current { name: name.clone(), time }));
        let refresher = tokio::spawn(refresh(Arc::clone(repository), exclusive, Arc::clone(&current)));
        let lock = Self { repository: Arc::clone(repository), exclusive, current, refresher };
        if exclusive {
            tokio::time::sleep(SETTLE).await;
        }
        // Of two that came at once each sees the other now.
        match lock.check().await {
            Ok(()) => Ok(lock),
            Err(error) => {
                lock.release().await;
                Err(error)
            }
        }
    }

    /// Whether it still holds: it is fresh, and nobody came who would not have respected it.
    pub(crate) async fn check(&self) -> Result<()> {
        let lost = || Error::new(ErrorKind::Locked, "the lock on the repository could not be kept");
        let (name, time) = {
            let current = self.current.lock().map_err(|_| lost())?;
            (current.name.clone(), current.time)
        };
        if Timestamp::now().duration_since(time) > LOST {
            return Err(lost());
        }
        let (repository, exclusive) = (Arc::clone(&self.repository), self.exclusive);
        blocking(move || conflicts(&repository, exclusive, Some(&name))).await
    }

    /// Gives it up.
    pub(crate) async fn release(self) {
        self.refresher.abort();
        // A refresh that was under way may have left a second one.
        let _ = blocking({
            let (repository, current) = (Arc::clone(&self.repository), Arc::clone(&self.current));
            move || {
                if let Ok(current) = current.lock() {
                    remove(&repository, &current.name);
                }
                Ok(())
            }
        })
        .await;
    }
}

async fn refresh(repository: Arc<Repository>, exclusive: bool, current: Arc<Mutex<Current>>) {
    loop {
        tokio::time::sleep(REFRESH).await;
        let (repository, current) = (Arc::clone(&repository), Arc::clone(&current));
        let refreshed = blocking(move || {
            let file = LockFile::mine(exclusive);
            let name = write(&repository, &file)?;
            if let Ok(mut current) = current.lock() {
                let old = std::mem::replace(&mut *current, Current { name, time: file.time });
                remove(&repository, &old.name);
            }
            Ok(())
        })
        .await;
        if let Err(error) = refreshed {
            tracing::warn!(
                error = crate::error::in_one_line(&error),
                "the repository's lock was not refreshed"
            );
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_lock_is_stale_by_age_or_by_a_death_on_this_host() {
        let now = Timestamp::now();
        let mut lock = LockFile::mine(false);
        assert!(!lock.is_stale(now));
        lock.pid = u32::MAX;
        assert!(lock.is_stale(now));
        lock.hostname.push_str("-elsewhere");
        assert!(!lock.is_stale(now));
        lock.time = now - SignedDuration::from_mins(31);
        assert!(lock.is_stale(now));
        lock.time = now + SignedDuration::from_hours(5);
        assert!(!lock.is_stale(now));
    }
}
