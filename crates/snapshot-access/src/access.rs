//! Taking and holding one instant.

use crate::{
    bitmap::Chain,
    error::{Error, ErrorKind, Result},
    freeze::Freeze,
    guest::{IoErrors, Pulse, go_on_after_want_of_space},
    inspect::{Disk, Machine},
    journal::Journal,
    listener::Listener,
    pause::Instant,
    reserve::{Reserve, SpaceState, Watcher},
    step::current_node,
    steps::Steps,
    taking::Taking,
    volume::{AccessVolume, Stop},
    watch::{self, FleecingWatch},
};
use std::{ffi::OsString, path::PathBuf, sync::Arc, time::Duration};
use stillpoint_model::{DiskName, Generation, Granularity, Length, PointId, TargetId};
use stillpoint_provider::{BitmapMode, Consistency, Volume, VolumeSource};
use stillpoint_qmp::Qmp;
use tokio::task::{JoinHandle, JoinSet};

/// How one disk is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadMode {
    /// All of it.
    Full {
        /// Granularity of the bitmap for the next point.
        granularity: Granularity,
    },
    /// What changed since the point that this bitmap is relative to.
    Since(Generation),
}

/// One disk of a run.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// The disk.
    pub disk: Disk,
    /// How.
    pub mode: ReadMode,
}

impl DiskPlan {
    /// How its bitmap is used.
    pub fn bitmap_mode(&self) -> BitmapMode {
        match self.mode {
            ReadMode::Since(_) => BitmapMode::Reuse,
            ReadMode::Full { .. } if self.disk.takes_bitmaps => BitmapMode::New,
            ReadMode::Full { .. } => BitmapMode::None,
        }
    }

    /// The point that its data is relative to.
    pub fn base(&self) -> Option<&Generation> {
        match &self.mode {
            ReadMode::Since(generation) => Some(generation),
            ReadMode::Full { .. } => None,
        }
    }
}

/// What a run needs to know besides its disks.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the point will be kept.
    pub target: TargetId,
    /// The point to make.
    pub point: PointId,
    /// Directory of the fleecing images; its file system needs room for what the guest overwrites meanwhile.
    pub fleecing_directory: PathBuf,
    /// Most bytes that all fleecing images together may take; the run ends when they take more.
    pub fleecing_budget: Option<Length>,
    /// Bytes that old data leaves free on its file system, and those below it; computed if not set. Zero leaves none.
    pub fleecing_reserve: Option<Length>,
    /// The command that calls [`run_watcher`](crate::run_watcher) in a process of its own.
    pub watcher: Vec<OsString>,
    /// Whether old data is given back as soon as it was read or is known to be of no use. Without it the fleecing images
    /// keep all that the guest overwrites until the run ends, which is only of use to compare with.
    pub fleecing_discard: bool,
    /// Where sockets and the journal go; private to this user.
    pub runtime_directory: PathBuf,
    /// Seconds that a guest's write waits at the most for its old data to be kept aside; then the snapshot is given
    /// up, not the write.
    pub cbw_timeout_seconds: u32,
    /// Socket of the guest agent, if its file systems are to be frozen.
    pub agent: Option<PathBuf>,
    /// How long the agent may take to freeze them.
    pub freeze_timeout: Duration,
    /// The command that calls [`run_guard`](crate::run_guard) in a process of its own.
    pub guard: Vec<OsString>,
    /// Set when the run is to end; looked at as long as there is nothing to read yet.
    pub interrupted: tokio::sync::watch::Receiver<bool>,
}

/// One instant of all disks of a VM, held while the guest writes on.
///
/// # Cancellation
/// Dropping it leaves the VM with the filters in place, for `recover` to remove. Call
/// [`tear_down`](Self::tear_down) on every way out.
pub struct SnapshotAccess {
    pub(crate) qmp: Qmp,
    pub(crate) steps: Steps,
    pub(crate) volumes: Vec<Arc<AccessVolume>>,
    pub(crate) modes: Vec<(BitmapMode, Option<Generation>)>,
    pub(crate) dirty: Vec<Length>,
    pub(crate) tasks: Vec<JoinHandle<()>>,
    pub(crate) listener: Option<Listener>,
    pub(crate) watch: FleecingWatch,
    pub(crate) watcher: Option<Watcher>,
    pub(crate) stop: tokio::sync::watch::Sender<Option<Stop>>,
    pub(crate) chain: Vec<crate::bitmap::ChainDisk>,
    pub(crate) held_power: bool,
    pub(crate) instant: Instant,
    pub(crate) freeze: Freeze,
    pub(crate) pulse: Option<Pulse>,
    pub(crate) errors: IoErrors,
}

pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

/// `error`, unless somebody else changed the graph since the plan was made, which explains it.
async fn changed_or(qmp: &Qmp, plan: &[DiskPlan], error: Error) -> Error {
    for DiskPlan { disk, .. } in plan {
        let now = current_node(qmp, &disk.front_end).await;
        if now.is_ok_and(|now| now.is_none_or(|now| now != disk.node.as_str())) {
            let context = format!("someone changed what disk {} stands on meanwhile", disk.name);
            return Error::new(ErrorKind::Changed, context).because(error);
        }
    }
    error
}

impl SnapshotAccess {
    /// Takes the instant and makes its disks readable. The VM is as it was if this fails.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] before anything was done; [`ErrorKind::LeftBehind`] if undoing failed too, so that
    /// `recover` is needed; [`ErrorKind::Changed`] if it is worth another look and another try; else what failed, and everything is undone.
    pub async fn take(qmp: Qmp, machine: &Machine, plan: Vec<DiskPlan>, settings: Settings) -> Result<Self> {
        // No guest writes to a VM that is off, so there will be no old data.
        let reserve = match machine.off {
            true => Reserve::nothing(),
            false => Reserve::of(&settings.fleecing_directory, settings.fleecing_reserve)?,
        };
        if let Some(low) = reserve.low() {
            return Err(low.refusal());
        }
        let journal = Journal::create(&settings.runtime_directory, &qmp)?;
        let steps = Steps::new(journal, settings.runtime_directory.clone());
        let mut taking = Taking::new(qmp.clone(), steps, machine.off, reserve);
        let taken = match taking.run(machine, &plan, &settings).await {
            Ok(instant) => taking.open(&plan).await.map(|opened| (instant, opened)),
            Err(error) => Err(error),
        };
        match taken {
            Ok((instant, opened)) => Ok(taking.hold(plan, &settings, opened, instant, machine.running)),
            Err(error) => {
                let error = taking.give_up(error).await;
                let refused = error.kind() == ErrorKind::Qmp && !machine.off;
                Err(if refused { changed_or(&qmp, &plan, error).await } else { error })
            }
        }
    }

    /// The disks, in the order of the plan, to hand to a provider.
    pub fn volumes(&self) -> Vec<Volume> {
        let modes = self.modes.iter();
        let volume =
            |(volume, (mode, base)): (&Arc<AccessVolume>, &(BitmapMode, Option<Generation>))| Volume {
                name: volume.name.clone(),
                bitmap_mode: *mode,
                base: base.clone(),
                source: Arc::clone(volume) as Arc<dyn VolumeSource>,
            };
        self.volumes.iter().zip(modes).map(volume).collect()
    }

    /// How it stands, disk by disk, for progress and summary.
    pub fn disks(&self) -> Vec<DiskState> {
        let states = self.volumes.iter().zip(&self.dirty);
        let state = |(volume, dirty): (&Arc<AccessVolume>, &Length)| DiskState {
            name: volume.name.clone(),
            size: volume.size,
            dirty: *dirty,
            read: volume.read_bytes(),
            passed: volume.passed_bytes(),
        };
        states.map(state).collect()
    }

    /// The instant: when, and how long the guest stood still for it.
    pub fn instant(&self) -> &Instant {
        &self.instant
    }

    /// What came of freezing the guest's file systems.
    pub fn freeze(&self) -> &Freeze {
        &self.freeze
    }

    /// What the guest's file systems can expect, and why.
    pub fn consistency(&self) -> (Consistency, String) {
        self.freeze.consistency()
    }

    /// Bytes that the fleecing images take now, and the most that they took.
    pub fn fleecing(&self) -> (Length, Length) {
        self.watch.now_and_peak()
    }

    /// Whether the old data was given up because the host ran low on space, with what was left where. What each disk's old
    /// data took by then is told besides.
    pub fn space_given_up(&self) -> Option<Option<SpaceState>> {
        match &*self.stop.borrow() {
            Some(Stop::LowSpace { space, .. }) => Some(space.clone()),
            _ => None,
        }
    }

    /// What the guest's own I/O met meanwhile that is no reason to end the run, a line for each.
    pub fn io_errors(&self) -> Vec<String> {
        self.errors.lines()
    }

    /// A handle that ends all reading: every call on a volume fails from then on.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.stop.clone())
    }

    /// Each may have to wait for its last request, which a QEMU that does not answer never answers either.
    async fn close_volumes(&mut self) {
        let mut closing = JoinSet::new();
        for volume in &self.volumes {
            let volume = Arc::clone(volume);
            closing.spawn(async move { volume.close().await });
        }
        tokio::select! {
            () = async { while closing.join_next().await.is_some() {} } => {}
            () = self.qmp.silence() => self.volumes.iter().for_each(|volume| volume.abandon()),
        }
    }

    /// Takes the VM's block graph back to what it was. The bitmaps stay, both of them, until the outcome of the run
    /// is known: that is what the returned [`Chain`] is for. `failed` says that the disks could not be read to the end.
    ///
    /// # Errors
    /// [`ErrorKind::LeftBehind`] if something of ours is still there; every step was tried, unless the fleecing images'
    /// storage hangs, since then the guest would hang with it. [`ErrorKind::Ended`] if QEMU has ended, and all with it.
    pub async fn tear_down(mut self, failed: bool) -> (Chain, Result<Length>) {
        self.canceller().cancel();
        for task in self.tasks.drain(..) {
            task.abort();
            // Awaited, so that nobody holds a connection any more when the server stops (CVE-2024-7409).
            let _ = task.await;
        }
        let mut hangs = None;
        if self.qmp.answers_again().await {
            hangs = self.steps.storage_hangs(self.watch.images(), failed).await;
            if hangs.is_none() {
                self.close_volumes().await;
                self.watch.count();
            }
        } else {
            self.volumes.iter().for_each(|volume| volume.abandon());
        }
        drop(self.pulse.take());
        let (_, peak) = self.watch.now_and_peak();
        let first = match hangs {
            Some(error) => Some(error),
            None => self.steps.undo(&self.qmp).await.into_iter().next(),
        };
        if first.is_none() {
            self.watch.empty();
            let want_of_space =
                matches!(&*self.stop.borrow(), Some(Stop::IoError(error)) if error.stops && error.no_space);
            if want_of_space {
                match go_on_after_want_of_space(&self.qmp).await {
                    Ok(runs) => tracing::warn!(runs, "the guest, which had run out of space, was let go on"),
                    Err(error) => tracing::warn!(error = error_chain(&error), "the guest was not let go on"),
                }
            }
            if let Some(watcher) = self.watcher.take() {
                watcher.end();
            }
        } else {
            // What is left in the VM copies on, so the watcher goes on too, as after a death.
            drop(self.watcher.take());
        }
        drop(self.listener.take());
        self.steps.incomplete |= self.freeze.still_frozen.is_some();
        let chain = Chain::new(self.qmp, self.chain, self.steps, self.held_power);
        let result = match first {
            None => Ok(peak),
            Some(ended) if ended.kind() == ErrorKind::Ended => Err(ended),
            Some(first) => {
                let context = if first.kind() == ErrorKind::Silent {
                    "QEMU does not answer, so parts of this run are still in the VM"
                } else {
                    "something is left in the VM"
                };
                Err(Error::new(ErrorKind::LeftBehind, context).because(first))
            }
        };
        (chain, result)
    }
}

/// Cancels a [`SnapshotAccess`] from another task.
#[derive(Clone)]
pub struct Canceller(tokio::sync::watch::Sender<Option<Stop>>);

impl Canceller {
    /// Ends all reading.
    pub fn cancel(&self) {
        watch::end(&self.0, Stop::Cancelled);
    }
}

/// How far the reading of one disk is.
#[derive(Debug, Clone)]
pub struct DiskState {
    /// The disk.
    pub name: DiskName,
    /// Its size.
    pub size: Length,
    /// What the bitmap calls changed; the size without one.
    pub dirty: Length,
    /// What was read.
    pub read: Length,
    /// What the provider is done with, read or not.
    pub passed: Length,
}

impl SnapshotAccess {
    /// Reads all maps once, which proves that they are complete (I7) and tells how much there is to read, and starts
    /// to give back what is clean.
    ///
    /// # Errors
    /// [`ErrorKind::Read`] if a map cannot be had.
    pub async fn survey(&mut self) -> Result<()> {
        let mut dirty = Vec::new();
        for volume in &self.volumes {
            let bytes = volume.dirty_bytes().await;
            let failed =
                |error| Error::new(ErrorKind::Read, format!("map disk {}", volume.name)).because(error);
            dirty.push(bytes.map_err(failed)?);
            if volume.dirty.is_some() && volume.fleecing.is_some() {
                let volume = Arc::clone(volume);
                self.tasks.push(tokio::spawn(async move {
                    if let Err(error) = volume.discard_clean().await {
                        tracing::debug!(disk = %volume.name, error = error_chain(&error), "clean parts were not discarded");
                    }
                }));
            }
        }
        self.dirty = dirty;
        Ok(())
    }
}
