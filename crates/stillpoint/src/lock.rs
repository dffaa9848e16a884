//! One run at a time on a VM.
//!
//! # Crash
//! The lock is the kernel's (`flock` on an open file), so it ends with its holder however that dies; what is written
//! in the file only tells who it is.

use crate::failure::{Exit, Failure, Guest};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

/// Who holds a lock.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    started: String,
    command: String,
}

/// The right to work on a VM; ends when dropped.
#[derive(Debug)]
pub(crate) struct VmLock {
    _file: File,
}

impl VmLock {
    /// Takes the lock of the VM behind this monitor socket, known by the socket's inode so that two paths to one
    /// socket are one VM.
    ///
    /// # Errors
    /// Exit status 4 if another run holds it.
    pub(crate) fn take(runtime: &Path, qmp: &Path) -> Result<Self, Failure> {
        let failed = |doing: &str, error: &dyn std::error::Error| {
            Failure::because(Exit::Failed, format!("cannot {doing} the lock in {}", runtime.display()), error)
                .guest(Guest::Untouched)
        };
        stillpoint_snapshot_access::private_directory(runtime).map_err(|error| failed("make", &error))?;
        // Where there is no socket, connecting will say so in better words.
        let name = std::fs::metadata(qmp)
            .map_or_else(|_| "none".into(), |found| format!("{:x}-{:x}", found.dev(), found.ino()));
        let path = runtime.join(format!("vm-{name}.lock"));
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed("open", &error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                let holder = serde_json::from_str::<Holder>(&text);
                let who = holder.map_or_else(
                    |_| "another run".to_owned(),
                    |holder| {
                        format!(
                            "process {} ({}, since {})",
                            holder.pid,
                            holder.command.escape_debug(),
                            holder.started.escape_debug()
                        )
                    },
                );
                return Err(Failure::new(
                    Exit::Locked,
                    format!("the VM at {} is locked by {who}", qmp.display()),
                )
                .guest(Guest::Untouched)
                .next("wait for that run to end, then try again"));
            }
            Err(error) => return Err(failed("take", &error)),
        }
        let holder = Holder {
            pid: std::process::id(),
            started: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            command: std::env::args().take(2).collect::<Vec<_>>().join(" "),
        };
        let text = serde_json::to_vec(&holder).map_err(|error| failed("write", &error))?;
        let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&text));
        written.map_err(|error| failed("write", &error))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_second_run_is_told_who_the_first_is_and_gets_in_when_that_ends() {
        let directory = tempfile::tempdir().unwrap();
        let (runtime, socket) = (directory.path().join("run"), directory.path().join("qmp"));
        std::fs::write(&socket, "").unwrap();
        let first = VmLock::take(&runtime, &socket).unwrap();
        let refused = VmLock::take(&runtime, &socket).unwrap_err();
        assert_eq!(refused.exit, Exit::Locked);
        assert!(refused.what().contains(&std::process::id().to_string()), "{refused}");
        drop(first);
        VmLock::take(&runtime, &socket).unwrap();
    }
}
