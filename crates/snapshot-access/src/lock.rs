//! One run at a time on a VM.
//!
//! A run takes two locks: that of the monitor's socket before it connects (a monitor serves one client, and a second
//! would wait for its greeting), and that of the QEMU behind it, which may have more monitors than one.
//!
//! # Crash
//! A lock is the kernel's (`flock` on an open file), so it ends with its holder however that dies: there is no stale
//! lock to break. What is written in the file only tells who it is.

use crate::{
    error::{Error, ErrorKind, Result},
    listener::private_directory,
    process,
};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};
use stillpoint_qmp::Qmp;

/// Who holds a lock.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    /// Clock ticks since the boot.
    started: u64,
    boot: String,
    /// When the lock was taken.
    since: String,
    command: String,
}

impl Holder {
    fn this_process() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            started: process::started(pid).unwrap_or(0),
            boot: process::boot_id(),
            since: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            command: std::env::args().take(2).collect::<Vec<_>>().join(" "),
        }
    }

    fn describe(&self) -> String {
        format!("process {} ({}, since {})", self.pid, self.command.escape_debug(), self.since.escape_debug())
    }
}

/// The right to work on something; ends when dropped.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the lock of the monitor's socket at `path`, known by its inode so that two paths to one socket are one.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another run holds it, which is named; [`ErrorKind::Host`] if there can be no locks in
    /// `runtime`.
    pub fn of_socket(runtime: &Path, path: &Path) -> Result<Self> {
        Self::take(runtime, &process::socket_key(path), &format!("the VM at {}", path.display()))
    }

    /// Takes the lock of the QEMU behind a monitor.
    ///
    /// # Errors
    /// As [`RunLock::of_socket`].
    pub fn of_qemu(runtime: &Path, qmp: &Qmp) -> Result<Self> {
        let key = process::qemu_key(qmp);
        if key == process::socket_key(qmp.path()) {
            // Held already, by the same name.
            return Self::take(
                runtime,
                &format!("{key}-qemu"),
                &format!("the VM at {}", qmp.path().display()),
            );
        }
        Self::take(runtime, &key, &format!("the VM at {}", qmp.path().display()))
    }

    /// Takes the lock of a disk image that no QEMU has open.
    ///
    /// # Errors
    /// As [`RunLock::of_socket`].
    pub fn of_image(runtime: &Path, path: &Path) -> Result<Self> {
        let key = process::socket_key(path).replace("socket", "image");
        Self::take(runtime, &key, &format!("image {}", path.display()))
    }

    fn take(runtime: &Path, key: &str, what: &str) -> Result<Self> {
        private_directory(runtime)?;
        let path = path(runtime, key);
        let failed = |doing: &str, error: io::Error| {
            Error::new(ErrorKind::Host, format!("cannot {doing} lock {}", path.display())).because(error)
        };
        loop {
            let mut file = open(&path).map_err(|error| failed("open", error))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let mut text = String::new();
                    let _ = file.read_to_string(&mut text);
                    let holder = serde_json::from_str::<Holder>(&text);
                    let who = holder.map_or_else(|_| "another run".to_owned(), |holder| holder.describe());
                    return Err(Error::new(ErrorKind::Locked, format!("{what} is locked by {who}")));
                }
                Err(error) => return Err(failed("take", error.into())),
            }
            // Somebody may have cleared it away between our opening it and taking it.
            if !is_at(&file, &path) {
                continue;
            }
            let text =
                serde_json::to_vec(&Holder::this_process()).map_err(|error| failed("write", error.into()))?;
            let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text));
            written.map_err(|error| failed("write", error))?;
            return Ok(Self { _file: file });
        }
    }
}

/// Calls `work` while holding the lock `key`, and removes the lock's file after it; does nothing if the lock is held.
pub(crate) fn if_free(runtime: &Path, key: &str, work: impl FnOnce()) {
    let path = path(runtime, key);
    let Ok(file) = open(&path) else { return };
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() && is_at(&file, &path) {
        work();
        let _ = std::fs::remove_file(&path);
    }
}

fn path(runtime: &Path, key: &str) -> PathBuf {
    runtime.join(format!("{key}.lock"))
}

fn open(path: &Path) -> io::Result<File> {
    File::options().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)
}

fn is_at(file: &File, path: &Path) -> bool {
    let same =
        |(one, two): (std::fs::Metadata, std::fs::Metadata)| (one.dev(), one.ino()) == (two.dev(), two.ino());
    file.metadata().ok().zip(std::fs::metadata(path).ok()).is_some_and(same)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_second_run_is_told_who_the_first_is_and_gets_in_when_that_ends() {
        let directory = tempfile::tempdir().unwrap();
        let (runtime, socket) = (directory.path().join("run"), directory.path().join("qmp"));
        std::fs::write(&socket, "").unwrap();
        let first = RunLock::of_socket(&runtime, &socket).unwrap();
        let refused = RunLock::of_socket(&runtime, &socket).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Locked);
        assert!(refused.to_string().contains(&format!("process {}", std::process::id())), "{refused}");
        drop(first);
        RunLock::of_socket(&runtime, &socket).unwrap();
    }

    #[test]
    fn a_lock_is_cleared_away_only_when_free() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path().join("run");
        let held = RunLock::take(&runtime, "socket-1-2", "it").unwrap();
        if_free(&runtime, "socket-1-2", || panic!("it is held"));
        assert!(runtime.join("socket-1-2.lock").exists());
        drop(held);
        let mut worked = false;
        if_free(&runtime, "socket-1-2", || worked = true);
        assert!(worked && !runtime.join("socket-1-2.lock").exists());
    }
}
