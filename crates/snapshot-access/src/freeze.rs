//! Freezing the guest's file systems through its agent, bounded at every step and always thawed.

use crate::{
    access::error_chain,
    error::{Error, ErrorKind, Result},
};
use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};
use stillpoint_provider::Consistency;
use stillpoint_qmp::{Agent, FreezeStatus};
use tokio::time::Instant;

const CONNECT: Duration = Duration::from_secs(5);
/// An agent that is still busy with the freeze takes the thaw when that is done.
const THAW: Duration = Duration::from_secs(20);
const THAW_TRIES: u32 = 3;

/// What came of it.
pub struct Freeze {
    agent: Option<(Agent, PathBuf)>,
    frozen: Option<(Instant, u64)>,
    /// How long the file systems were frozen.
    pub duration: Duration,
    consistency: Consistency,
    reason: String,
    /// Set if the guest may still be frozen.
    pub still_frozen: Option<String>,
}

impl Freeze {
    pub(crate) fn without(reason: impl Into<String>) -> Self {
        Self {
            agent: None,
            frozen: None,
            duration: Duration::ZERO,
            consistency: Consistency::CrashConsistent,
            reason: reason.into(),
            still_frozen: None,
        }
    }

    /// Reaches the agent and learns whether a freeze is possible. Never an error: a point without one is
    /// crash-consistent, and says why.
    pub(crate) async fn prepare(agent: Option<&Path>, running: bool) -> Self {
        let Some(path) = agent else { return Self::without("no guest agent is configured") };
        if !running {
            return Self::without("the guest does not run");
        }
        let reached = async {
            let mut agent = Agent::connect(path, CONNECT).await?;
            let status = agent.fsfreeze_status(CONNECT).await?;
            Ok::<_, stillpoint_qmp::Error>((agent, status))
        };
        match reached.await {
            Ok((agent, FreezeStatus::Thawed)) => {
                Self { agent: Some((agent, path.to_owned())), ..Self::without("no freeze was tried") }
            }
            // Someone else's freeze: neither ours to rely on nor ours to end.
            Ok((_, FreezeStatus::Frozen)) => {
                Self::without("the file systems were already frozen by someone else")
            }
            Err(error) => Self::without(format!("the guest's agent: {}", error_chain(&error))),
        }
    }

    /// Where the agent is, if there will be a freeze.
    pub(crate) fn agent(&self) -> Option<&Path> {
        self.agent.as_ref().map(|(_, path)| path.as_path())
    }

    /// A duplicate of the agent's socket, if there will be a freeze.
    pub(crate) fn socket(&self) -> std::io::Result<Option<OwnedFd>> {
        self.agent.as_ref().map(|(agent, _)| agent.try_clone_socket()).transpose()
    }

    /// Asks the agent to freeze, and waits for it no longer than `within` and until `cancelled`.
    pub(crate) async fn freeze(&mut self, within: Duration, cancelled: impl Future<Output = ()>) {
        let Some((agent, _)) = &mut self.agent else { return };
        let since = Instant::now();
        let frozen = tokio::select! {
            frozen = agent.fsfreeze_freeze(within) => Some(frozen),
            () = cancelled => None,
        };
        let mut count = 0;
        (self.consistency, self.reason) = match frozen {
            Some(Ok(0)) => (Consistency::CrashConsistent, "the agent froze no file system".into()),
            Some(Ok(frozen)) => {
                count = frozen;
                (Consistency::FileSystemConsistent, format!("{frozen} file systems were frozen"))
            }
            Some(Err(error)) => {
                (Consistency::CrashConsistent, format!("the freeze failed: {}", error_chain(&error)))
            }
            None => (Consistency::CrashConsistent, "the freeze was interrupted".into()),
        };
        self.frozen = Some((since, count));
    }

    /// What the file systems can expect of the point, and why.
    pub fn consistency(&self) -> (Consistency, String) {
        (self.consistency, self.reason.clone())
    }

    /// Leaves the thaw to the guest's guard, since an agent cannot be reached through a QEMU that does not answer.
    pub(crate) fn leave_to_the_guard(&mut self) {
        if self.frozen.take().is_some() {
            self.agent = None;
            self.still_frozen = Some(
                "QEMU does not answer, so the guest's file systems may be frozen; its guard thaws them when QEMU answers"
                    .into(),
            );
        }
    }

    /// Thaws if a freeze was asked for, whatever was answered.
    pub(crate) async fn thaw(&mut self) {
        let Some((since, frozen)) = self.frozen.take() else { return };
        let Some((mut agent, _)) = self.agent.take() else { return };
        let mut last = None;
        for _ in 0..THAW_TRIES {
            match agent.fsfreeze_thaw(THAW).await {
                Ok(thawed) => {
                    self.duration = since.elapsed();
                    if thawed < frozen {
                        // Windows gives up after 10 s, an administrator may have thawed, or the guard did: how long
                        // before the instant nobody can tell.
                        self.consistency = Consistency::CrashConsistent;
                        self.reason = format!(
                            "of {frozen} frozen file systems only {thawed} were still frozen at the end"
                        );
                    }
                    return;
                }
                Err(error) => last = Some(error),
            }
        }
        let why = last.map_or_else(String::new, |error| error_chain(&error));
        self.still_frozen = Some(format!("the guest's agent does not answer to a thaw: {why}"));
    }
}

/// Thaws what a run that died may have frozen.
///
/// # Errors
/// [`ErrorKind::LeftBehind`] if the agent does not say that all is thawed.
pub(crate) async fn thaw_after_a_death(agent: &Path) -> Result<()> {
    let thawed = async {
        let mut agent = Agent::connect(agent, CONNECT).await?;
        if agent.fsfreeze_status(CONNECT).await? == FreezeStatus::Frozen {
            agent.fsfreeze_thaw(THAW).await?;
        }
        Ok::<_, stillpoint_qmp::Error>(())
    };
    thawed.await.map_err(|error| {
        Error::new(
            ErrorKind::LeftBehind,
            "the guest's file systems may be frozen, and its agent does not answer; log in to the guest and type \
             fsfreeze --unfreeze for each file system",
        )
        .because(error)
    })
}
