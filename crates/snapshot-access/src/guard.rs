//! The dead-man's guard: a small process of its own that lets the guest go on if this one dies while the guest is
//! paused or frozen.
//!
//! It holds duplicates of the monitor's and the agent's sockets. That alone does half of its work: QEMU drops what a
//! client has queued when that client is gone, and goes on with it while the socket is open. The other half is done
//! when the guard sees our end of its control socket close: it sends `cont` and `guest-fsfreeze-thaw`, and waits for
//! the answers.
//!
//! ```text
//!   run                          guard
//!    |--- freezing, pausing ------>|  remembers
//!    |--- resumed ---------------->|  forgets
//!    |--- done (thawed, too) ----->|  ends
//!    x  (dies)  end of stream ---->|  undoes what it remembers, ends
//! ```
//!
//! A run that gives up because QEMU does not answer leaves its end to the guard in the same way (ADR 0023): the guard stays
//! with the monitor's socket as long as QEMU lives, and sees to it that the guest runs as soon as QEMU answers.
//!
//! A run that is stopped (SIGSTOP, Ctrl-Z) is no dead one, but a guest that stays frozen for it is harmed all the same,
//! so the guard also thaws when a freeze lasts too long.
//!
//! It lives from just before the freeze until just after the thaw, in a session of its own, so that no signal to the
//! run's process group reaches it. What it cannot survive is a SIGKILL to all processes at once; then `recover` does
//! its work, from the journal.

mod child;

pub use child::run as run_guard;

use crate::error::{Error, ErrorKind, Result};
use std::{ffi::OsString, os::fd::OwnedFd, process::Stdio, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    process::{Child, Command},
};

/// A process starts in some milliseconds; one that takes this long never will.
const START: Duration = Duration::from_secs(20);
/// The guard has nothing to do when all went well.
const END: Duration = Duration::from_secs(5);

/// What the guard is told, a byte each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mark {
    Ready = b'r',
    Freezing = b'F',
    Pausing = b'P',
    Resumed = b'R',
    /// The run goes on, and only the file systems are left to the guard: the monitor's socket is the run's.
    GoesOn = b'G',
    Done = b'D',
}

/// The guard of a run, on duty.
pub(crate) struct Guard {
    control: UnixStream,
    child: Child,
}

impl Guard {
    /// Starts it: `program` is the command that calls [`run_guard`].
    pub(crate) async fn start(
        program: &[OsString],
        monitor: OwnedFd,
        agent: Option<OwnedFd>,
    ) -> Result<Self> {
        let failed = |error| Error::new(ErrorKind::Host, "start the guard of the guest").because(error);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let (first, rest) =
            program.split_first().ok_or_else(|| Error::new(ErrorKind::Inconsistent, "no guard is given"))?;
        let child = Command::new(first)
            .args(rest)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(monitor))
            .stderr(agent.map_or_else(Stdio::null, Stdio::from))
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let mut guard = Self { control: UnixStream::from_std(ours).map_err(failed)?, child };
        let mut ready = [0u8];
        match tokio::time::timeout(START, guard.control.read_exact(&mut ready)).await {
            Ok(Ok(_)) if ready == [Mark::Ready as u8] => Ok(guard),
            _ => {
                guard.end().await;
                Err(Error::new(ErrorKind::Host, "the guard of the guest does not start"))
            }
        }
    }

    /// Tells it what is about to be done, or was done.
    ///
    /// # Errors
    /// If it is gone: then nothing may be paused or frozen.
    pub(crate) async fn mark(&mut self, mark: Mark) -> Result<()> {
        let told = self.control.write_all(&[mark as u8]).await;
        told.map_err(|error| Error::new(ErrorKind::Host, "the guard of the guest is gone").because(error))
    }

    /// Ends it, and waits until it is gone.
    pub(crate) async fn end(mut self) {
        // If it is gone already, so much the better.
        let _ = self.mark(Mark::Done).await;
        if tokio::time::timeout(END, self.child.wait()).await.is_err() {
            tracing::warn!("the guard of the guest does not end; it is killed");
            let _ = self.child.kill().await;
        }
    }
}
