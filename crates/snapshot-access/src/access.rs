//! Taking and holding one instant.

use crate::{
    bitmap::{Chain, ChainDisk},
    command,
    discard::DiscardPlanner,
    error::{Error, ErrorKind, Result},
    fleecing::FleecingImage,
    freeze::{self, Freeze},
    inspect::{Disk, Machine, qmp_error, refused},
    journal::Journal,
    listener::Listener,
    names::{self, Names},
    pause::{self, Instant},
    step::Step,
    volume::{AccessVolume, Stop, reads_within},
    watch::FleecingWatch,
};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicU64},
};
use stillpoint_model::{DiskName, Generation, Granularity, Length, PointId, TargetId};
use stillpoint_nbd::{Client, MetaContext, Options};
use stillpoint_provider::{BitmapMode, Consistency, Volume, VolumeSource};
use stillpoint_qmp::Qmp;
use tokio::{sync::watch, task::JoinHandle};

/// The filter's cluster when the fleecing image is raw: what discards are aligned to.
const FILTER_CLUSTER: Granularity = Granularity::DEFAULT;

/// Requests on their way at once: enough for eight reads of 1 MiB where QEMU wants them cluster by cluster.
const IN_FLIGHT: usize = 128;

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
    /// Where sockets and the journal go; private to this user.
    pub runtime_directory: PathBuf,
    /// Seconds that a guest's write waits at the most for its old data to be kept aside; then the snapshot is given
    /// up, not the write.
    pub cbw_timeout_seconds: u32,
    /// Socket of the guest agent, if its file systems are to be frozen.
    pub agent: Option<PathBuf>,
}

/// One instant of all disks of a VM, held while the guest writes on.
///
/// # Cancellation
/// Dropping it leaves the VM with the filters in place, for `recover` to remove. Call
/// [`tear_down`](Self::tear_down) on every way out.
pub struct SnapshotAccess {
    qmp: Qmp,
    steps: Steps,
    volumes: Vec<Arc<AccessVolume>>,
    modes: Vec<(BitmapMode, Option<Generation>)>,
    dirty: Vec<Length>,
    discards: Vec<JoinHandle<()>>,
    listener: Option<Listener>,
    watch: FleecingWatch,
    stop: watch::Sender<Option<Stop>>,
    chain: Chain,
    instant: Instant,
    freeze: Freeze,
}

/// The steps done so far, each journaled before it is taken; the NBD server alone after, since one that is there is not ours.
pub(crate) struct Steps {
    done: Vec<Step>,
    journal: Journal,
}

impl Steps {
    pub(crate) fn new(journal: Journal) -> Self {
        Self { done: Vec::new(), journal }
    }

    pub(crate) fn record(&mut self, step: Step) -> Result<()> {
        self.journal.record(&step)?;
        self.done.push(step);
        Ok(())
    }

    /// Undoes everything, the last step first, going on whatever fails. What could not be undone is returned.
    async fn undo(&mut self, qmp: &Qmp) -> Vec<Error> {
        let mut failures = Vec::new();
        while let Some(step) = self.done.pop() {
            if let Err(error) = step.undo(qmp).await {
                tracing::warn!(step = step.describe(), error = error_chain(&error), "could not undo a step");
                failures.push(error);
            }
        }
        if failures.is_empty() {
            self.journal.clear();
        }
        failures
    }
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

impl SnapshotAccess {
    /// Takes the instant and makes its disks readable. The VM is as it was if this fails.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] before anything was done; [`ErrorKind::LeftBehind`] if undoing failed too, so that
    /// `recover` is needed; else what failed, and everything is undone.
    pub async fn take(qmp: Qmp, machine: &Machine, plan: Vec<DiskPlan>, settings: Settings) -> Result<Self> {
        let journal = Journal::create(&settings.runtime_directory, &qmp)?;
        let mut taking = Taking { qmp, steps: Steps::new(journal), disks: Vec::new(), listener: None };
        match taking.run(machine, &plan, &settings).await {
            Ok((instant, freeze)) => match taking.open(&plan).await {
                Ok(opened) => Ok(taking.hold(plan, &settings, opened, instant, freeze)),
                Err(error) => Err(taking.give_up(error).await),
            },
            Err(error) => Err(taking.give_up(error).await),
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

    /// A handle that ends all reading: every call on a volume fails from then on.
    pub fn canceller(&self) -> Canceller {
        Canceller(self.stop.clone())
    }

    /// Takes the VM's block graph back to what it was. The bitmaps stay, both of them, until the outcome of the run
    /// is known: that is what the returned [`Chain`] is for.
    ///
    /// # Errors
    /// [`ErrorKind::LeftBehind`] if something of ours is still there; every step was tried.
    pub async fn tear_down(mut self) -> (Chain, Result<Length>) {
        self.canceller().cancel();
        for discard in self.discards.drain(..) {
            discard.abort();
            // Awaited, so that nobody holds a connection any more when the server stops (CVE-2024-7409).
            let _ = discard.await;
        }
        for volume in self.volumes.drain(..) {
            volume.close().await;
        }
        let (_, peak) = self.watch.now_and_peak();
        let failures = self.steps.undo(&self.qmp).await;
        if failures.is_empty() {
            self.watch.empty();
        }
        drop(self.listener.take());
        let result = match failures.into_iter().next() {
            None => Ok(peak),
            Some(first) => {
                Err(Error::new(ErrorKind::LeftBehind, "something is left in the VM").because(first))
            }
        };
        (self.chain, result)
    }
}

/// Cancels a [`SnapshotAccess`] from another task.
#[derive(Clone)]
pub struct Canceller(watch::Sender<Option<Stop>>);

impl Canceller {
    /// Ends all reading.
    pub fn cancel(&self) {
        self.0.send_if_modified(|stop| {
            let first = stop.is_none();
            stop.get_or_insert(Stop::Cancelled);
            first
        });
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

/// A run on its way to the instant.
struct Taking {
    qmp: Qmp,
    steps: Steps,
    disks: Vec<TakingDisk>,
    listener: Option<Listener>,
}

struct TakingDisk {
    names: Names,
    image: Arc<FleecingImage>,
    chain: ChainDisk,
}

struct Opened {
    connections: Vec<(Client, Option<(Client, MetaContext)>)>,
}

impl Taking {
    /// Everything up to the guest running again.
    async fn run(
        &mut self,
        machine: &Machine,
        plan: &[DiskPlan],
        settings: &Settings,
    ) -> Result<(Instant, Freeze)> {
        self.start_server(plan, settings).await?;
        for (index, disk) in plan.iter().enumerate() {
            self.add_fleecing(index, disk, settings).await?;
        }
        self.add_bitmaps(plan).await?;
        for (disk, taking) in plan.iter().zip(&self.disks) {
            self.steps.record(Step::Node { name: taking.names.filter.clone() })?;
            let filter = command::add_filter(
                &taking.names.filter,
                &disk.disk.node,
                &taking.names.fleecing,
                settings.cbw_timeout_seconds,
            );
            self.execute(&format!("add the filter of disk {}", disk.disk.name), filter).await?;
        }
        pause::flush_host_caches(plan.iter().filter_map(|disk| disk.disk.image.clone())).await;
        let mut freeze = freeze::freeze(settings.agent.as_deref(), machine.running).await;
        let switched = self.switch(machine, plan).await;
        freeze.thaw().await;
        let instant = switched?;
        self.freeze_read_bitmaps(plan).await?;
        Ok((instant, freeze))
    }

    async fn execute(&self, doing: &str, command: stillpoint_qmp::Command) -> Result<serde_json::Value> {
        self.qmp.execute(command).await.map_err(|error| qmp_error(doing, error))
    }

    /// First of all, since it is what most likely cannot be had.
    async fn start_server(&mut self, plan: &[DiskPlan], settings: &Settings) -> Result<()> {
        let listener = Listener::bind(&settings.runtime_directory)?;
        self.steps.record(Step::Listener)?;
        let passed = self.qmp.execute_with_fd(command::get_listener(), listener.descriptor()).await;
        passed.map_err(|error| qmp_error("hand the NBD listener to QEMU", error))?;
        // Recorded after the fact, alone of all steps: a server that is already there is somebody else's.
        match self.qmp.execute(command::start_server(plan.len())).await {
            Ok(_) => self.steps.record(Step::Server)?,
            Err(error) if error.desc().is_some_and(|desc| desc.contains("already running")) => {
                return Err(refused(
                    "QEMU's one NBD server is already in use, by a storage migration or another backup tool; try again when it has ended",
                )
                .because(error));
            }
            Err(error) => return Err(qmp_error("start QEMU's NBD server", error)),
        }
        self.listener = Some(listener);
        Ok(())
    }

    async fn add_fleecing(&mut self, index: usize, plan: &DiskPlan, settings: &Settings) -> Result<()> {
        let named =
            |error| Error::new(ErrorKind::Inconsistent, "cannot name what belongs to a disk").because(error);
        let names = Names::new(index).map_err(named)?;
        let image = Arc::new(FleecingImage::create(&settings.fleecing_directory, plan.disk.size)?);
        self.steps.record(Step::FdSet { opaque: names.fd_set.clone() })?;
        let reply = self.qmp.execute_with_fd(command::add_fd(&names.fd_set), image.descriptor()).await;
        let reply = reply.map_err(|error| qmp_error("hand a fleecing image to QEMU", error))?;
        let set = reply.get("fdset-id").and_then(serde_json::Value::as_u64);
        let set =
            set.ok_or_else(|| Error::new(ErrorKind::Inconsistent, "QEMU tells no id of a descriptor set"))?;
        self.steps.record(Step::Node { name: names.fleecing.clone() })?;
        self.execute("open a fleecing image in QEMU", command::add_fleecing(&names.fleecing, set)).await?;
        let (old, granularity) = match &plan.mode {
            ReadMode::Full { granularity } => (None, *granularity),
            ReadMode::Since(generation) => {
                let bitmap = plan.disk.bitmaps.iter().find(|bitmap| {
                    bitmap.target == settings.target
                        && bitmap.generation == *generation
                        && bitmap.fault.is_none()
                });
                let bitmap = bitmap.ok_or_else(|| {
                    Error::new(
                        ErrorKind::Inconsistent,
                        format!("disk {} has no bitmap since {generation}", plan.disk.name),
                    )
                })?;
                (Some(bitmap.name.clone()), bitmap.granularity)
            }
        };
        let new = names::chain_bitmap(&settings.target, &settings.point).map_err(named)?;
        let ours = plan.disk.bitmaps.iter().filter(|bitmap| bitmap.target == settings.target);
        let chain = ChainDisk {
            disk: plan.disk.name.clone(),
            node: plan.disk.node.clone(),
            new,
            earlier: ours.map(|bitmap| bitmap.name.clone()).collect(),
            read_by: old,
            granularity,
            persistent: plan.disk.keeps_bitmaps,
        };
        self.disks.push(TakingDisk { names, image, chain });
        Ok(())
    }

    /// All new bitmaps start to record here, before the instant: what they hold is then a superset of what changes
    /// after it (I2). The old ones go on recording.
    async fn add_bitmaps(&mut self, plan: &[DiskPlan]) -> Result<()> {
        let mut actions = Vec::new();
        for (plan, disk) in plan.iter().zip(&self.disks) {
            let chain = &disk.chain;
            self.steps
                .record(Step::NewBitmap { node: chain.node.clone(), name: chain.new.as_str().to_owned() })?;
            actions.push(command::add_bitmap(&chain.node, &chain.new, chain.granularity, chain.persistent));
            if matches!(plan.mode, ReadMode::Since(_)) {
                self.steps.record(Step::ReadBitmap { node: chain.node.clone() })?;
                actions.push(command::add_read_bitmap(&chain.node, chain.granularity));
            }
        }
        self.execute("add the bitmaps", command::transaction(&actions)).await?;
        Ok(())
    }

    async fn switch(&mut self, machine: &Machine, plan: &[DiskPlan]) -> Result<Instant> {
        let mut switches = Vec::new();
        for (plan, disk) in plan.iter().zip(&self.disks) {
            let disk_filter = &disk.names.filter;
            self.steps.record(Step::Drive {
                front_end: plan.disk.front_end.clone(),
                filter: disk_filter.clone(),
                original: plan.disk.node.clone(),
            })?;
            switches.push(command::set_drive(&plan.disk.front_end, disk_filter));
        }
        pause::switch(&self.qmp, machine.running, switches).await
    }

    /// Freezes a copy of each old bitmap, after the instant: it holds at least what changed before it.
    async fn freeze_read_bitmaps(&self, plan: &[DiskPlan]) -> Result<()> {
        let disks = plan.iter().zip(&self.disks);
        let merge = |(_, disk): (&DiskPlan, &TakingDisk)| {
            let source = disk.chain.read_by.as_ref()?;
            Some(command::merge_into_read_bitmap(&disk.chain.node, source))
        };
        let actions: Vec<_> = disks.filter_map(merge).collect();
        if !actions.is_empty() {
            self.execute("freeze a copy of the bitmaps", command::transaction(&actions)).await?;
        }
        Ok(())
    }

    /// Makes the instant readable.
    async fn open(&mut self, plan: &[DiskPlan]) -> Result<Opened> {
        let path = self.listener.as_ref().map(Listener::path);
        let path = path.ok_or_else(|| Error::new(ErrorKind::Inconsistent, "there is no NBD listener"))?;
        let mut connections = Vec::new();
        for (plan, disk) in plan.iter().zip(&self.disks) {
            let names = &disk.names;
            self.steps.record(Step::Node { name: names.access.clone() })?;
            self.execute("add the snapshot access", command::add_access(&names.access, &names.filter))
                .await?;
            self.steps.record(Step::Export { id: names.export.clone() })?;
            let bitmap = disk.chain.read_by.as_ref().map(|_| (&disk.chain.node, names::READ_BITMAP));
            self.execute(
                "export the snapshot access",
                command::add_export(&names.export, &names.access, bitmap),
            )
            .await?;

            let failed = |error: stillpoint_nbd::Error| {
                Error::new(ErrorKind::Read, format!("connect to the export of disk {}", plan.disk.name))
                    .because(error)
            };
            let options =
                Options::new(&names.export).context(MetaContext::base_allocation()).in_flight(IN_FLIGHT);
            let data = Client::connect_unix(&path, options).await.map_err(failed)?;
            let dirty = match bitmap {
                None => None,
                Some(_) => {
                    let context = MetaContext::other(&format!("qemu:dirty-bitmap:{}", names::READ_BITMAP));
                    let options = Options::new(&names.export).context(context.clone());
                    Some((Client::connect_unix(&path, options).await.map_err(failed)?, context))
                }
            };
            if data.size() != plan.disk.size {
                let context = format!(
                    "disk {} has {} bytes, its export {}",
                    plan.disk.name,
                    plan.disk.size,
                    data.size()
                );
                return Err(Error::new(ErrorKind::Inconsistent, context));
            }
            connections.push((data, dirty));
        }
        Ok(Opened { connections })
    }

    fn hold(
        self,
        plan: Vec<DiskPlan>,
        settings: &Settings,
        opened: Opened,
        instant: Instant,
        freeze: Freeze,
    ) -> SnapshotAccess {
        let (stop, stopped) = watch::channel(None);
        let images = self.disks.iter().map(|disk| Arc::clone(&disk.image)).collect();
        let watch = FleecingWatch::start(images, settings.fleecing_budget, stop.clone());
        let mut volumes = Vec::new();
        let mut modes = Vec::new();
        let mut chain = Vec::new();
        for ((plan, disk), (data, dirty)) in plan.into_iter().zip(self.disks).zip(opened.connections) {
            volumes.push(Arc::new(AccessVolume {
                name: plan.disk.name,
                size: plan.disk.size,
                data,
                dirty,
                discards: Mutex::new(DiscardPlanner::new(FILTER_CLUSTER, plan.disk.size)),
                fleecing: disk.image,
                piece: reads_within(self.qmp.version().number(), FILTER_CLUSTER),
                stop: stopped.clone(),
                read: AtomicU64::new(0),
                passed: AtomicU64::new(0),
            }));
            modes.push(match plan.mode {
                ReadMode::Full { .. } => (BitmapMode::New, None),
                ReadMode::Since(generation) => (BitmapMode::Reuse, Some(generation)),
            });
            chain.push(disk.chain);
        }
        SnapshotAccess {
            qmp: self.qmp.clone(),
            steps: self.steps,
            dirty: volumes.iter().map(|volume| volume.size).collect(),
            volumes,
            modes,
            discards: Vec::new(),
            listener: self.listener,
            watch,
            stop,
            chain: Chain::new(self.qmp, chain),
            instant,
            freeze,
        }
    }

    /// Undoes all, the new bitmaps included: there was no point yet.
    async fn give_up(mut self, error: Error) -> Error {
        let mut failures = self.steps.undo(&self.qmp).await;
        let disks = self.disks.drain(..).map(|disk| disk.chain).collect();
        failures.extend(Chain::new(self.qmp.clone(), disks).roll_back().await.err());
        if let Some(failure) = failures.into_iter().next() {
            tracing::warn!(error = error_chain(&failure), "could not undo everything");
            return Error::new(ErrorKind::LeftBehind, "the run failed, and something is left in the VM")
                .because(error);
        }
        error
    }
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
            if volume.dirty.is_some() {
                let volume = Arc::clone(volume);
                self.discards.push(tokio::spawn(async move {
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
