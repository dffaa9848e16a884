//! The window in which the guest stands still.
//!
//! Everything that can be prepared is, so that inside it front ends are pointed at their filters and nothing else
//! happens. What makes that sound (I1, I2), for every disk:
//!
//! * the new bitmap began to record before the window, so it holds a superset of what changes after the instant;
//! * the old bitmap is copied after the window, so the copy holds a superset of what changed before the instant;
//! * the filter has no bitmap of its own and keeps aside whatever is overwritten, so every part can be read as it was.
//!
//! The commands travel in one write, `cont` among them: QEMU has them all before it begins the first.

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    inspect::{ask, qmp_error},
};
use std::{fs::File, path::PathBuf, time::Duration};
use stillpoint_qmp::{Command, Qmp};

/// Flushing before the window saves time within it; it is not worth more than this.
const FLUSH_DEADLINE: Duration = Duration::from_secs(20);

/// The instant of a point.
#[derive(Debug, Clone)]
pub struct Instant {
    /// When, by this host's clock.
    pub time: std::time::SystemTime,
    /// How long the guest, or its requests alone, stood still at the most: from sending `stop` until `cont` was
    /// answered, or as long as `blockdev-reopen` took. Zero if it did not run anyway.
    pub pause: Duration,
}

/// Writes out what the host has cached of the images: `stop` flushes them too, and would make the guest wait for it.
/// An image that is not to be had here (QEMU in a container, a network disk) is left to `stop`.
pub(crate) async fn flush_host_caches(images: impl Iterator<Item = PathBuf>) {
    let flushes: Vec<_> = images
        .map(|image| {
            tokio::task::spawn_blocking(move || File::open(&image).and_then(|file| file.sync_data()))
        })
        .collect();
    let all = async {
        for flush in flushes {
            if let Ok(Err(error)) = flush.await {
                tracing::debug!(%error, "an image's caches were not flushed before the pause");
            }
        }
    };
    if tokio::time::timeout(FLUSH_DEADLINE, all).await.is_err() {
        tracing::debug!("flushing the images' caches takes long; the pause may be longer for it");
    }
}

/// Points the front ends at their filters at one instant.
pub(crate) async fn switch(qmp: &Qmp, running: bool, switches: Vec<Command>) -> Result<Instant> {
    let mut commands = switches;
    if running {
        commands.insert(0, command::stop());
        commands.push(command::cont());
    }
    let time = std::time::SystemTime::now();
    let replies = qmp.pipeline(commands).await.map_err(|error| qmp_error("take the instant", error))?;
    let pause =
        replies.done.last().map_or(Duration::ZERO, |done| done.saturating_duration_since(replies.sent));
    let mut failure = None;
    let mut resumed = !running;
    let last = replies.replies.len().saturating_sub(1);
    for (index, reply) in replies.replies.into_iter().enumerate() {
        match reply {
            Ok(_) if running && index == last => resumed = true,
            Ok(_) => {}
            Err(error) => {
                failure.get_or_insert(error);
            }
        }
    }
    if !resumed {
        // What was late by then is done, `cont` too; resuming once more does no harm.
        qmp.answers_again().await;
        resume(qmp).await?;
    }
    match failure {
        Some(error) => Err(qmp_error("point the front ends at their filters", error)),
        None => Ok(Instant { time, pause: if running { pause } else { Duration::ZERO } }),
    }
}

/// Slides the filters in below the junctions at one instant, while the guest runs: it notices that its requests take
/// longer, and nothing else.
pub(crate) async fn drain_and_switch(qmp: &Qmp, command: Command) -> Result<Instant> {
    let time = std::time::SystemTime::now();
    let replies = qmp.pipeline(vec![command]).await.map_err(|error| qmp_error("take the instant", error))?;
    let pause =
        replies.done.last().map_or(Duration::ZERO, |done| done.saturating_duration_since(replies.sent));
    for reply in replies.replies {
        reply.map_err(|error| qmp_error("slide the filters in", error))?;
    }
    Ok(Instant { time, pause })
}

/// One more try, whatever the reason: a paused guest is the worst that we can leave. A guest that has powered itself
/// off in that very moment stands still by its own wish.
async fn resume(qmp: &Qmp) -> Result<()> {
    let Err(error) = qmp.execute(command::cont()).await else { return Ok(()) };
    let status = ask::<serde_json::Value>(qmp, command::query_status()).await.ok();
    let status = status.as_ref().and_then(|status| status.get("status")?.as_str()).unwrap_or("unknown");
    if qmp.is_silent() {
        return Err(qmp_error("resume the guest", error));
    }
    if status == "paused" || status == "unknown" {
        let context = "the guest could not be resumed; type `cont` on its monitor";
        return Err(Error::new(ErrorKind::LeftBehind, context).because(error));
    }
    Ok(())
}
