//! Freezing the guest's file systems through its agent, bounded at every step and always thawed.

use std::{path::Path, time::Duration};
use stillpoint_provider::Consistency;
use stillpoint_qmp::{Agent, FreezeStatus};
use tokio::time::Instant;

const CONNECT: Duration = Duration::from_secs(5);
/// The guest flushes its file systems; Windows gives up after 10 s by itself.
const FREEZE: Duration = Duration::from_secs(60);
const THAW: Duration = Duration::from_secs(30);
const THAW_TRIES: u32 = 3;

/// What came of it.
pub struct Freeze {
    agent: Option<Agent>,
    since: Option<Instant>,
    /// How long the file systems were frozen.
    pub duration: Duration,
    consistency: Consistency,
    reason: String,
    /// Set if the guest may still be frozen.
    pub still_frozen: Option<String>,
}

impl Freeze {
    fn without(reason: impl Into<String>) -> Self {
        Self {
            agent: None,
            since: None,
            duration: Duration::ZERO,
            consistency: Consistency::CrashConsistent,
            reason: reason.into(),
            still_frozen: None,
        }
    }

    /// What the file systems can expect of the point, and why.
    pub fn consistency(&self) -> (Consistency, String) {
        (self.consistency, self.reason.clone())
    }

    /// Thaws if a freeze was asked for, whatever was answered.
    pub(crate) async fn thaw(&mut self) {
        let Some(mut agent) = self.agent.take() else { return };
        let mut last = None;
        for _ in 0..THAW_TRIES {
            match agent.fsfreeze_thaw(THAW).await {
                Ok(_) => {
                    self.duration = self.since.map_or(Duration::ZERO, |since| since.elapsed());
                    return;
                }
                Err(error) => last = Some(error),
            }
        }
        let why = last.map_or_else(String::new, |error| crate::access::error_chain(&error));
        self.still_frozen = Some(format!("the guest's agent does not answer to a thaw: {why}"));
    }
}

/// Asks the agent to freeze. Never an error: a point without it is crash-consistent, and says why.
pub(crate) async fn freeze(agent: Option<&Path>, running: bool) -> Freeze {
    let Some(path) = agent else { return Freeze::without("no guest agent is configured") };
    if !running {
        return Freeze::without("the guest does not run");
    }
    let mut agent = match Agent::connect(path, CONNECT).await {
        Ok(agent) => agent,
        Err(error) => {
            return Freeze::without(format!("the guest's agent: {}", crate::access::error_chain(&error)));
        }
    };
    match agent.fsfreeze_status(CONNECT).await {
        Ok(FreezeStatus::Thawed) => {}
        // Someone else's freeze: neither ours to rely on nor ours to end.
        Ok(FreezeStatus::Frozen) => {
            return Freeze::without("the file systems were already frozen by someone else");
        }
        Err(error) => {
            return Freeze::without(format!("the guest's agent: {}", crate::access::error_chain(&error)));
        }
    }
    let since = Instant::now();
    let frozen = agent.fsfreeze_freeze(FREEZE).await;
    let (consistency, reason) = match frozen {
        Ok(0) => (Consistency::CrashConsistent, "the agent froze no file system".into()),
        Ok(count) => (Consistency::FileSystemConsistent, format!("{count} file systems were frozen")),
        Err(error) => (
            Consistency::CrashConsistent,
            format!("the freeze failed: {}", crate::access::error_chain(&error)),
        ),
    };
    Freeze {
        agent: Some(agent),
        since: Some(since),
        duration: Duration::ZERO,
        consistency,
        reason,
        still_frozen: None,
    }
}
