//! A VM as a command meets it: its monitor, and the words for what goes wrong there.

use crate::{
    failure::{Exit, Failure, Guest, StateAtTheEnd},
    runtime, text,
};
use std::{path::Path, time::Duration};
use stillpoint_qmp::{Deadlines, ErrorKind as QmpErrorKind, Qmp};
use stillpoint_snapshot_access::{ErrorKind as AccessErrorKind, GuestState, LeftOvers, RunLock};

/// The right to work on a VM, and its monitor.
pub(crate) struct LockedVm {
    pub qmp: Qmp,
    _by_socket: Option<RunLock>,
    _by_qemu: RunLock,
}

/// What is behind a monitor's socket.
pub(crate) enum Found {
    /// A QEMU, locked.
    Running(LockedVm),
    /// Nothing, and the words for that.
    Absent(Failure),
}

/// Takes the locks of a VM, connects to its monitor, and clears away what runs that are over left on this host.
///
/// # Errors
/// Exit status 4 if another run holds a lock; with what to do about it if there is no monitor (another client, not QEMU).
pub(crate) async fn lock(socket: &Path) -> Result<Found, Failure> {
    let found = look(socket).await?;
    if let Found::Running(_) = found {
        let runtime = runtime::directory();
        stillpoint_snapshot_access::sweep(&runtime);
        stillpoint_provider_program::sweep(&runtime);
    }
    Ok(found)
}

/// The same for one who only looks: nothing is cleared away.
///
/// # Errors
/// As [`lock`].
pub(crate) async fn look(socket: &Path) -> Result<Found, Failure> {
    let runtime = runtime::directory();
    let by_socket = if socket.exists() {
        Some(RunLock::of_socket(&runtime, socket).map_err(|error| lock_failure(&error))?)
    } else {
        // Nothing to lock; connecting says so.
        None
    };
    let qmp = match Qmp::connect(socket, deadlines()).await {
        Ok(qmp) => qmp,
        Err(error) => {
            let failure = monitor_failure(socket, &error);
            let absent = matches!(error.kind(), QmpErrorKind::NoSocket | QmpErrorKind::Refused);
            return if absent { Ok(Found::Absent(failure)) } else { Err(failure) };
        }
    };
    let by_qemu = RunLock::of_qemu(&runtime, &qmp).map_err(|error| lock_failure(&error))?;
    Ok(Found::Running(LockedVm { qmp, _by_socket: by_socket, _by_qemu: by_qemu }))
}

/// The words for a lock that cannot be had.
pub(crate) fn lock_failure(error: &stillpoint_snapshot_access::Error) -> Failure {
    if error.kind() == AccessErrorKind::Locked {
        return Failure::new(Exit::Locked, error.to_string())
            .guest(Guest::Untouched)
            .next("wait for that run to end, then try again");
    }
    Failure::because(Exit::Failed, "cannot lock the VM", error).guest(Guest::Untouched)
}

fn monitor_failure(socket: &Path, error: &stillpoint_qmp::Error) -> Failure {
    let next = match error.kind() {
        QmpErrorKind::NoSocket => {
            "start QEMU with -qmp unix:PATH,server=on,wait=off, and name that path".to_owned()
        }
        QmpErrorKind::Refused => "check that this VM runs; its socket is there but QEMU is not".to_owned(),
        QmpErrorKind::Permission => "run as root, or as the user that QEMU runs as".to_owned(),
        QmpErrorKind::Stopped(_) => "try again".to_owned(),
        QmpErrorKind::Busy => {
            "QEMU serves one client a monitor: give it a second -qmp socket for Stillpoint, or end the other client".to_owned()
        }
        _ => format!("check that {} is a QMP monitor's socket", socket.display()),
    };
    let what = match error.kind() {
        QmpErrorKind::Stopped(_) => SILENT.to_owned(),
        _ => format!("no monitor at {}", socket.display()),
    };
    let failure = Failure::because(Exit::Failed, what, error).guest(Guest::Untouched).next(next);
    match error.kind() {
        QmpErrorKind::Stopped(pid) => {
            failure.state(StateAtTheEnd { now: GuestState::Unknown { stopped: Some(pid) }, ran: false })
        }
        _ => failure,
    }
}

/// How long QEMU may take. A test that waits for the end of it says less, in milliseconds: for connecting, for a command,
/// and the grace.
fn deadlines() -> Deadlines {
    let default = Deadlines::default();
    let Ok(text) = std::env::var("STILLPOINT_QMP_DEADLINES") else { return default };
    let mut times = text.split(',').map(|time| time.parse().map(Duration::from_millis));
    match (times.next(), times.next(), times.next()) {
        (Some(Ok(connect)), Some(Ok(command)), Some(Ok(grace))) if stillpoint_failpoint::ENABLED => {
            Deadlines { connect, command, grace }
        }
        _ => default,
    }
}

/// The words for a QEMU that stopped answering before anything was done to its VM.
pub(crate) const SILENT: &str = "QEMU does not answer";

/// Adds what the guest does, for a failure before it was known whether it ran.
pub(crate) async fn with_state(failure: Failure, qmp: &Qmp) -> Failure {
    failure.state(StateAtTheEnd { now: GuestState::ask(qmp).await, ran: false })
}

/// What there was to undo.
pub(crate) struct Recovered {
    /// A line for each thing.
    pub undone: Vec<String>,
    /// Whether the guest had powered itself off, which was granted now.
    pub ended: bool,
}

/// Undoes what an earlier run left, if there is something, and says so.
///
/// # Errors
/// Exit status 3 if something is still there.
pub(crate) async fn recover(qmp: &Qmp, retry: &str) -> Result<Recovered, Failure> {
    let failed = |error: &stillpoint_snapshot_access::Error| {
        let kind = error.kind();
        if kind == AccessErrorKind::Refused {
            return Failure::because(Exit::Failed, "this VM cannot be backed up as it is", error)
                .guest(Guest::Untouched);
        }
        if kind == AccessErrorKind::Silent {
            return Failure::because(Exit::Failed, SILENT, error)
                .guest(Guest::Untouched)
                .next(retry.to_owned());
        }
        if kind != AccessErrorKind::LeftBehind {
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
    let found = match LeftOvers::find(qmp, &runtime::directory()).await {
        Ok(found) => found,
        Err(error) => return Err(with_state(failed(&error), qmp).await),
    };
    if found.is_empty() {
        return Ok(Recovered { undone: Vec::new(), ended: false });
    }
    let undone = found.describe();
    text::note(format!("an earlier run did not end; undoing {} things that it left:", undone.len()));
    for line in &undone {
        text::note(format!("  {line}"));
    }
    let ended = match found.undo(qmp).await {
        Ok(ended) => ended,
        Err(error) => {
            // Some of it is undone, whatever kept the rest from it.
            let failure =
                Failure::because(Exit::LeftBehind, "an earlier run left something in the VM", &error);
            let failure = failure.guest(Guest::LeftBehind).next(retry.to_owned());
            return Err(with_state(failure, qmp).await);
        }
    };
    if ended {
        text::note("the guest had powered itself off during that run; its QEMU has ended now");
    }
    Ok(Recovered { undone, ended })
}
