//! The steps of one run, and how they are undone.

use crate::{
    access::error_chain,
    error::{Error, ErrorKind, Result},
    fleecing::FleecingImage,
    journal::Journal,
    power, process,
    step::Step,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{path::PathBuf, sync::Arc};
use stillpoint_qmp::{ErrorKind as QmpErrorKind, Qmp};

/// How long a QEMU that has closed its monitor may take to end.
const END_SECONDS: i64 = 20;

/// The steps done so far, each journaled before it is taken.
pub(crate) struct Steps {
    done: Vec<Step>,
    journal: Journal,
    runtime: PathBuf,
    /// Whether something could not be undone: then the journal is kept for `recover`.
    pub(crate) incomplete: bool,
}

impl Steps {
    pub(crate) fn new(journal: Journal, runtime: PathBuf) -> Self {
        Self { done: Vec::new(), journal, runtime, incomplete: false }
    }

    /// Records a step, to be undone with all others.
    pub(crate) fn record(&mut self, step: Step) -> Result<()> {
        self.journal.record(&step)?;
        self.done.push(step);
        Ok(())
    }

    /// Records a step that is undone elsewhere, or the undoing of one.
    pub(crate) fn note(&mut self, step: &Step) -> Result<()> {
        self.journal.record(step)
    }

    /// Undoes everything, the last step first, going on whatever fails. What could not be undone is returned; nothing
    /// is left behind in a QEMU that has ended, which is told by [`ErrorKind::Ended`] alone. One that does not answer is
    /// waited for once, not once a step.
    pub(crate) async fn undo(&mut self, qmp: &Qmp) -> Vec<Error> {
        let mut failures = Vec::new();
        let (mut ended, mut silent) = (false, false);
        while let Some(step) = self.done.pop() {
            step.undo_on_host(&self.runtime);
            if ended || silent {
                continue;
            }
            let mut undone = step.undo(qmp).await;
            // It looks before it touches, so what took effect late is no harm.
            if is_silent(&undone) && qmp.answers_again().await {
                undone = step.undo(qmp).await;
            }
            if let Err(error) = undone {
                silent = error.kind() == ErrorKind::Silent;
                if has_ended(qmp).await {
                    ended = true;
                    failures = vec![Error::new(ErrorKind::Ended, "the VM's QEMU has ended").because(error)];
                    continue;
                }
                tracing::warn!(step = step.describe(), error = error_chain(&error), "could not undo a step");
                failures.push(error);
            }
            stillpoint_failpoint::reached(&format!("undone:{}", step.name()));
        }
        self.incomplete |= !failures.is_empty() && !ended;
        failures
    }

    /// Whether the fleecing images' storage answers; if not, taking the filters out would make the guest wait for it, so
    /// nothing is undone, and all of it is left to `recover`.
    pub(crate) async fn storage_hangs(
        &mut self,
        images: &[Arc<FleecingImage>],
        failed: bool,
    ) -> Option<Error> {
        for image in images {
            if !image.answers(failed).await {
                self.incomplete = true;
                let context = format!(
                    "the storage of the fleecing images in {} does not answer, and taking them out would make the guest wait \
                     for it; the guest runs on",
                    image.directory().display()
                );
                return Some(Error::new(ErrorKind::LeftBehind, context));
            }
        }
        None
    }

    /// The very end of a run: grants the guest's power-off if it was held up (which is told), and forgets the journal
    /// if nothing is left.
    pub(crate) async fn end(mut self, qmp: &Qmp, held_power: bool) -> Result<bool> {
        let mut settled = if held_power && !self.incomplete { power::settle(qmp).await } else { Ok(false) };
        if is_silent(&settled) && qmp.answers_again().await {
            settled = power::settle(qmp).await;
        }
        match settled {
            Err(error) if !has_ended(qmp).await => {
                let context = "the guest's own power-off is still held up";
                Err(Error::new(ErrorKind::LeftBehind, context).because(error))
            }
            settled => {
                if !self.incomplete {
                    self.journal.clear();
                }
                Ok(settled.unwrap_or(false))
            }
        }
    }
}

fn is_silent<T>(result: &Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Silent)
}

/// Whether the VM's QEMU is proven to have ended, or ends within a while of closing its monitor.
pub(crate) async fn has_ended(qmp: &Qmp) -> bool {
    // A connection that stands is proof of the contrary, and one that is lost may have been lost alone.
    let asked = qmp.execute(crate::command::query_status()).await;
    if !asked.is_err_and(|error| error.kind() == QmpErrorKind::Disconnected) {
        return false;
    }
    let Some(pid) =
        qmp.peer_pid().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
    else {
        return false;
    };
    if process::started(pid.as_raw_nonzero().get().unsigned_abs()).is_none() {
        return true;
    }
    let Ok(handle) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK) else {
        return true;
    };
    // Bounded, so the thread ends by itself.
    let ended = tokio::task::spawn_blocking(move || {
        let wait = Timespec { tv_sec: END_SECONDS, tv_nsec: 0 };
        poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&wait)).is_ok_and(|ready| ready > 0)
    });
    ended.await.unwrap_or(false)
}
