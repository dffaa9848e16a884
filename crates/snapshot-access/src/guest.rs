//! What the guest does: asked at the end of a run, and watched while its disks are held.

use crate::{command, error::Result, inspect::ask, process, steps::has_ended, volume::Stop, watch::end};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use stillpoint_model::DiskName;
use stillpoint_qmp::{Command, ErrorKind as QmpErrorKind, EventStream, Qmp};
use tokio::{sync::watch, task::JoinHandle};

/// How often QEMU is asked whether it answers, so that it is found out soon whatever a run waits for.
const PULSE: Duration = Duration::from_secs(1);
/// How soon a guest that was let go on stops again, if it does: its write is tried at once.
const STOPS_AGAIN: Duration = Duration::from_secs(1);

const RUNNING: &str = "running";
const IO_ERROR: &str = "io-error";

/// What the guest does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestState {
    /// QEMU's word for it: `running`, `paused`, `io-error`, `shutdown` and others.
    Reported(String),
    /// No QEMU runs it: its images were opened by themselves.
    Off,
    /// Its QEMU has ended.
    Ended,
    /// QEMU does not tell.
    Unknown {
        /// Its process, if that is stopped (SIGSTOP), which is the reason then.
        stopped: Option<u32>,
    },
}

impl GuestState {
    /// Asks QEMU; at the end of a run, so nothing fails for it any more.
    pub async fn ask(qmp: &Qmp) -> Self {
        match qmp.execute(command::query_status()).await {
            Ok(status) => status
                .get("status")
                .and_then(Value::as_str)
                .map_or(Self::Unknown { stopped: None }, Self::reported),
            Err(error) if error.kind() == QmpErrorKind::Disconnected && has_ended(qmp).await => Self::Ended,
            Err(_) if qmp.peer_pid().is_some_and(|pid| process::started(pid).is_none()) => Self::Ended,
            Err(_) => Self::Unknown { stopped: qmp.peer_pid().filter(|_| qmp.peer_is_stopped()) },
        }
    }

    /// What answers on a monitor's socket may be anything.
    fn reported(word: &str) -> Self {
        let is_a_word = !word.is_empty()
            && word.len() <= 32
            && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
        if is_a_word { Self::Reported(word.to_owned()) } else { Self::Unknown { stopped: None } }
    }

    /// One word for it: QEMU's, or `off`, `ended` or `unknown`.
    pub fn word(&self) -> &str {
        match self {
            Self::Reported(word) => word,
            Self::Off => "off",
            Self::Ended => "ended",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// Whether its processors run.
    pub fn is_running(&self) -> bool {
        self.word() == RUNNING
    }

    /// Whether it stands still because the host failed its I/O.
    pub fn is_io_error(&self) -> bool {
        self.word() == IO_ERROR
    }
}

/// I/O of the guest that the host's storage failed (event `BLOCK_IO_ERROR`), or a guest that stopped for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IoError {
    /// Which disk, if QEMU tells.
    disk: Option<DiskName>,
    write: bool,
    /// For want of space.
    pub(crate) no_space: bool,
    /// Whether the guest was stopped for it (`werror=stop`, and the default `enospc` for want of space).
    pub(crate) stops: bool,
}

impl IoError {
    fn of(data: &Value, disks: &[WatchedDisk]) -> Self {
        let text = |key: &str| data.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let is = |disk: &&WatchedDisk| {
            let node = text("node-name").is_some_and(|node| disk.nodes.iter().any(|known| known == node));
            // Since QEMU 9.2; the path of the device that the front end is part of.
            let device = text("qom-path").is_some_and(|path| {
                disk.front_end.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            });
            node || device
        };
        Self {
            disk: disks.iter().find(is).map(|disk| disk.name.clone()),
            write: text("operation") != Some("read"),
            no_space: data.get("nospace").and_then(Value::as_bool) == Some(true),
            stops: text("action") == Some("stop"),
        }
    }

    /// Whether the run ends for it: the guest stands still, or it runs out of a space that our old data takes part of. A bad
    /// sector, which the guest is told of, was there before us and will be there after us.
    fn ends_the_run(&self) -> bool {
        self.stops || (self.write && self.no_space)
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the host's storage failed a {} of the guest", if self.write { "write" } else { "read" })?;
        if let Some(disk) = &self.disk {
            write!(f, " on disk {disk}")?;
        }
        f.write_str(if self.no_space { " (no space left on device)" } else { " (I/O error)" })
    }
}

/// A disk as events name it.
#[derive(Debug)]
pub(crate) struct WatchedDisk {
    pub(crate) name: DiskName,
    pub(crate) front_end: String,
    /// The nodes that its front end can be on in a run.
    pub(crate) nodes: Vec<String>,
}

/// What the guest's I/O met that did not end the run, and how often.
#[derive(Debug, Clone, Default)]
pub(crate) struct IoErrors(Arc<Mutex<BTreeMap<String, u64>>>);

impl IoErrors {
    fn add(&self, error: &IoError) {
        let mut errors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = errors.entry(error.to_string()).or_default();
        *count = count.saturating_add(1);
    }

    /// A line for each kind.
    pub(crate) fn lines(&self) -> Vec<String> {
        let errors = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        errors.iter().map(|(what, count)| format!("{what}, {count} times during the backup")).collect()
    }
}

/// Ends the run when the guest cannot go on, or when QEMU does not answer. `events` are those since before the instant;
/// `runs` says whether the guest ran then.
pub(crate) fn watch_guest(
    qmp: Qmp,
    mut events: EventStream,
    disks: Vec<WatchedDisk>,
    runs: bool,
    errors: IoErrors,
    stop: watch::Sender<Option<Stop>>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                () = qmp.silence() => return end(&stop, Stop::Silent),
                event = events.next() => event,
            };
            match event {
                None => return,
                Some(Ok(event)) if event.name == "BLOCK_IO_ERROR" => {
                    let error = IoError::of(&event.data, &disks);
                    if error.ends_the_run() {
                        return end(&stop, Stop::IoError(error));
                    }
                    errors.add(&error);
                }
                // Some event may be missing, this one is our own pause, or the one that says why came before the watch.
                Some(Err(_)) => {}
                Some(Ok(event)) if event.name == "STOP" => {}
                Some(Ok(_)) => continue,
            }
            if runs && stands_in_io_error(&qmp).await.unwrap_or(false) {
                // What it stopped for was told before this answer.
                let told = std::iter::from_fn(|| events.try_next()).flatten();
                let mut errors = told.filter(|event| event.name == "BLOCK_IO_ERROR");
                let named =
                    errors.find_map(|event| Some(IoError::of(&event.data, &disks)).filter(|it| it.stops));
                let unnamed = IoError { disk: None, write: true, no_space: false, stops: true };
                return end(&stop, Stop::IoError(named.unwrap_or(unnamed)));
            }
        }
    })
}

async fn stands_in_io_error(qmp: &Qmp) -> Result<bool> {
    let status: Value = ask(qmp, command::query_status()).await?;
    Ok(status.get("status").and_then(Value::as_str) == Some(IO_ERROR))
}

/// Lets a guest go on that stopped in this run for want of space, once the old data is gone that took part of it: its
/// write is tried again, and if there is still no room the guest stops again. Tells whether it goes on.
pub(crate) async fn go_on_after_want_of_space(qmp: &Qmp) -> Result<bool> {
    if !stands_in_io_error(qmp).await? {
        return Ok(false);
    }
    let mut events = qmp.events();
    if let Err(error) = qmp.execute(command::cont()).await {
        tracing::warn!(%error, "the guest could not be let go on");
        return Ok(false);
    }
    let stops = async {
        while let Some(event) = events.next().await {
            if event.is_ok_and(|event| event.name == "STOP") {
                break;
            }
        }
    };
    Ok(tokio::time::timeout(STOPS_AGAIN, stops).await.is_err())
}

/// Asks QEMU each second whether it answers, as long as this is held.
pub(crate) struct Pulse(JoinHandle<()>);

impl Pulse {
    pub(crate) fn start(qmp: Qmp) -> Self {
        Self(tokio::spawn(async move {
            loop {
                tokio::time::sleep(PULSE).await;
                // Which command does not matter, nor what is answered.
                match qmp.execute(Command::new("query-version")).await.map_err(|error| error.kind()) {
                    Ok(_) | Err(QmpErrorKind::Command) => {}
                    Err(QmpErrorKind::Timeout(_) | QmpErrorKind::Silent) if qmp.answers_again().await => {}
                    Err(_) => return,
                }
            }
        }))
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    fn disks() -> Vec<WatchedDisk> {
        let disk = |name: &str, filter: &str| WatchedDisk {
            name: name.parse().unwrap(),
            front_end: format!("/machine/peripheral/{name}/virtio-backend"),
            nodes: vec![format!("node-{name}"), filter.to_owned()],
        };
        vec![disk("vda", "stillpoint-filter-0"), disk("vdb", "stillpoint-filter-1")]
    }

    #[test]
    fn an_event_tells_which_disk_and_what_follows() {
        let of = |data: Value| IoError::of(&data, &disks());
        // QEMU 7.2 with -blockdev: the device has no name.
        let error = of(json!({"device": "", "node-name": "stillpoint-filter-1", "operation": "write",
            "action": "stop", "nospace": true, "reason": "No space left on device"}));
        assert_eq!(error.disk, "vdb".parse().ok());
        assert!(error.ends_the_run() && error.no_space && error.stops);
        assert_eq!(
            error.to_string(),
            "the host's storage failed a write of the guest on disk vdb (no space left on device)"
        );
        // QEMU 10.
        let error = of(json!({"qom-path": "/machine/peripheral/vda/virtio-backend", "device": "vda",
            "operation": "write", "action": "report", "nospace": true, "reason": ""}));
        assert_eq!(error.disk, "vda".parse().ok());
        assert!(error.ends_the_run() && !error.stops, "the guest runs out of space with werror=report, too");
        let bad_sector =
            json!({"node-name": "node-vda", "operation": "read", "action": "report", "nospace": false});
        assert!(!of(bad_sector).ends_the_run());
        let stopped =
            json!({"node-name": "node-vda", "operation": "read", "action": "stop", "nospace": false});
        assert!(of(stopped).ends_the_run());
        assert_eq!(of(json!({"node-name": "another", "operation": "write"})).disk, None);
    }

    #[test]
    fn what_does_not_end_a_run_is_counted() {
        let errors = IoErrors::default();
        let data =
            json!({"node-name": "node-vda", "operation": "read", "action": "report", "nospace": false});
        for _ in 0..3 {
            errors.add(&IoError::of(&data, &disks()));
        }
        assert_eq!(
            errors.lines(),
            [
                "the host's storage failed a read of the guest on disk vda (I/O error), 3 times during the backup"
            ]
        );
    }

    #[test]
    fn only_words_are_told() {
        assert_eq!(GuestState::reported("io-error").word(), "io-error");
        assert!(GuestState::reported("running").is_running());
        for bad in ["", "\u{1b}[2J", "Running", &"x".repeat(33)] {
            assert_eq!(GuestState::reported(bad).word(), "unknown");
        }
    }
}
