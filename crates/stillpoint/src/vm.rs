//! A VM as a command meets it: its monitor, and the words for what goes wrong there.

use crate::{
    failure::{Exit, Failure, Guest},
    runtime, text,
};
use std::path::Path;
use stillpoint_qmp::{Deadlines, ErrorKind as QmpErrorKind, Qmp};
use stillpoint_snapshot_access::LeftOvers;

/// Connects to the monitor.
///
/// # Errors
/// With what to do about it: no socket, nobody behind it, another client, not QEMU.
pub(crate) async fn connect(socket: &Path) -> Result<Qmp, Failure> {
    Qmp::connect(socket, Deadlines::default()).await.map_err(|error| {
        let next = match error.kind() {
            QmpErrorKind::NoSocket => {
                "start QEMU with -qmp unix:PATH,server=on,wait=off, and name that path".to_owned()
            }
            QmpErrorKind::Refused => "check that this VM runs; its socket is there but QEMU is not".to_owned(),
            QmpErrorKind::Permission => "run as root, or as the user that QEMU runs as".to_owned(),
            QmpErrorKind::Busy => {
                "QEMU serves one client a monitor: give it a second -qmp socket for Stillpoint, or end the other client".to_owned()
            }
            _ => format!("check that {} is a QMP monitor's socket", socket.display()),
        };
        Failure::because(Exit::Failed, format!("no monitor at {}", socket.display()), &error).guest(Guest::Untouched).next(next)
    })
}

/// Undoes what an earlier run left, if there is something, and says so.
///
/// # Errors
/// Exit status 3 if something is still there.
pub(crate) async fn recover(qmp: &Qmp, retry: &str) -> Result<Vec<String>, Failure> {
    let failed = |error: &stillpoint_snapshot_access::Error| {
        let kind = error.kind();
        if kind == stillpoint_snapshot_access::ErrorKind::Refused {
            return Failure::because(Exit::Failed, "this VM cannot be backed up as it is", error)
                .guest(Guest::Untouched);
        }
        if kind != stillpoint_snapshot_access::ErrorKind::LeftBehind {
            return Failure::because(
                Exit::Failed,
                "cannot tell whether an earlier run left something",
                error,
            )
            .guest(Guest::Untouched);
        }
        Failure::because(Exit::LeftBehind, "an earlier run left something in the VM", error)
            .guest(Guest::LeftBehind)
            .next(retry.to_owned())
    };
    let found = LeftOvers::find(qmp, &runtime::directory()).await.map_err(|error| failed(&error))?;
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let lines = found.describe();
    text::note(format!("an earlier run did not end; undoing {} things that it left:", lines.len()));
    for line in &lines {
        text::note(format!("  {line}"));
    }
    found.undo(qmp).await.map_err(|error| failed(&error))?;
    Ok(lines)
}
