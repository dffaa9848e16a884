//! The way to an instant: everything that is prepared while the guest runs, the instant itself, and the exports after
//! it.

use crate::{
    access::{DiskPlan, ReadMode, Settings, SnapshotAccess, error_chain},
    bitmap::{Chain, ChainDisk},
    command,
    direct::{DirectImage, ImageFile, Proof},
    discard::DiscardPlanner,
    error::{Error, ErrorKind, Result},
    fleecing::FleecingImage,
    freeze::Freeze,
    graph::children,
    guard::{Guard, Mark},
    guest::{IoErrors, Pulse, WatchedDisk, watch_guest},
    inspect::{Machine, SERVER_IN_USE, qmp_error, refused},
    layers::{Allocated, ChainBitmap, FOREIGN},
    listener::Listener,
    names::{self, Names},
    pause::{self, Instant},
    power,
    reserve::{Reserve, Watcher},
    step::Step,
    steps::Steps,
    volume::{AccessVolume, Stop, reads_within},
    watch::{FleecingWatch, watch_migration},
};
use std::{
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::Duration,
};
use stillpoint_model::{Granularity, NodeName};
use stillpoint_nbd::{Client, MetaContext, Options};
use stillpoint_qmp::{EventStream, Qmp};
use tokio::sync::watch;

/// The filter's cluster when the fleecing image is raw: what discards are aligned to, and what is kept aside at once.
pub(crate) const FILTER_CLUSTER: Granularity = Granularity::DEFAULT;

/// Requests on their way at once: enough for eight reads of 1 MiB where QEMU wants them cluster by cluster.
const IN_FLIGHT: usize = 128;

/// How long QEMU may take to flush an image; then the disk is read through QEMU.
const FLUSH_DEADLINE: Duration = Duration::from_secs(10);

/// A run on its way to the instant.
pub(crate) struct Taking {
    qmp: Qmp,
    steps: Steps,
    disks: Vec<TakingDisk>,
    listener: Option<Listener>,
    freeze: Freeze,
    held_power: bool,
    /// The front ends are on junctions, so that no pause is needed.
    joined: bool,
    /// No guest runs on these disks, so what is read is the disk itself.
    off: bool,
    reserve: Reserve,
    watcher: Option<Watcher>,
    /// The guest may stand still by our doing, and whether it goes on is left to its guard or to `recover`.
    unresumed: bool,
    /// All since before anything was done to the VM.
    events: EventStream,
    pulse: Pulse,
}

struct TakingDisk {
    names: Names,
    image: Option<Arc<FleecingImage>>,
    chain: ChainDisk,
    /// Images above the one whose bitmap the run reads by.
    above: u64,
    /// What those have.
    allocated: Option<Arc<Allocated>>,
}

impl TakingDisk {
    /// Whether a guest could write it, so that its old data has to be kept aside. What is not written is read as it is.
    fn is_written(&self) -> bool {
        self.image.is_some()
    }
}

pub(crate) struct Opened {
    connections: Vec<(Client, Option<(Client, MetaContext)>)>,
    images: Vec<Option<Arc<DirectImage>>>,
}

impl Taking {
    pub(crate) fn new(qmp: Qmp, steps: Steps, off: bool, reserve: Reserve) -> Self {
        Self {
            events: qmp.events(),
            pulse: Pulse::start(qmp.clone()),
            qmp,
            steps,
            disks: Vec::new(),
            listener: None,
            freeze: Freeze::without("the VM is off"),
            held_power: false,
            joined: false,
            off,
            reserve,
            watcher: None,
            unresumed: false,
        }
    }

    /// Everything up to the guest running again.
    pub(crate) async fn run(
        &mut self,
        machine: &Machine,
        plan: &[DiskPlan],
        settings: &Settings,
    ) -> Result<Instant> {
        self.start_server(plan, settings).await?;
        for (index, disk) in plan.iter().enumerate() {
            self.add_disk(index, disk, settings).await?;
        }
        self.add_bitmaps(plan).await?;
        self.ask_what_is_above(plan).await?;
        if !self.disks.iter().any(TakingDisk::is_written) {
            if !self.off {
                self.freeze = Freeze::without("the guest writes to none of its disks");
            }
            self.freeze_read_bitmaps(plan).await?;
            return Ok(Instant { time: std::time::SystemTime::now(), pause: Duration::ZERO });
        }
        let images: Vec<_> = self.disks.iter().filter_map(|disk| disk.image.clone()).collect();
        self.watcher = Watcher::start(&settings.watcher, &self.reserve, &images, self.qmp.peer_pid())?;
        for (disk, taking) in plan.iter().zip(&self.disks).filter(|(_, taking)| taking.is_written()) {
            self.steps.record(Step::Node { name: taking.names.filter.clone() })?;
            let filter = command::add_filter(
                &taking.names.filter,
                &disk.disk.node,
                &taking.names.fleecing,
                settings.cbw_timeout_seconds,
            );
            self.execute(&format!("add the filter of disk {}", disk.disk.name), filter).await?;
        }
        if machine.running && machine.stop_is_unsafe {
            self.add_junctions(plan).await?;
        }
        if machine.running && power::ends_qemu(&self.qmp) == Some(true) {
            self.steps.note(&Step::ShutdownAction)?;
            self.held_power = true;
            power::hold(&self.qmp).await?;
        }
        pause::flush_host_caches(plan.iter().filter_map(|disk| disk.disk.image.clone())).await;
        let instant = self.stand_still(machine, plan, settings).await?;
        if self.joined {
            self.remove_junctions(plan).await?;
        }
        self.refuse_changed_graph(plan).await?;
        self.freeze_read_bitmaps(plan).await?;
        Ok(instant)
    }

    /// The time in which the guest is frozen or paused: everything in it is bounded, and undone whatever happens.
    async fn stand_still(
        &mut self,
        machine: &Machine,
        plan: &[DiskPlan],
        settings: &Settings,
    ) -> Result<Instant> {
        let mut interrupted = settings.interrupted.clone();
        self.freeze = Freeze::prepare(settings.agent.as_deref(), machine.running).await;
        if *interrupted.borrow_and_update() {
            return Err(Error::new(ErrorKind::Cancelled, "the run was interrupted before the instant"));
        }
        if !machine.running {
            return self.switch(plan, None).await;
        }
        let host = |error| Error::new(ErrorKind::Host, "no descriptor is free").because(error);
        let monitor = self.qmp.try_clone_socket().map_err(host)?;
        let agent = self.freeze.socket().map_err(host)?;
        let mut guard = Guard::start(&settings.guard, monitor, agent).await?;
        let instant = self.freeze_and_switch(plan, settings, &mut guard, &mut interrupted).await;
        if !self.qmp.answers_again().await {
            // As if we were dead: the guest is the guard's from here on, which alone may use the sockets then, and which has
            // the time to wait until QEMU answers.
            self.freeze.leave_to_the_guard();
            self.qmp.hand_over().await;
            drop(guard);
            return match instant {
                Err(error) => Err(error),
                Ok(_) => Err(Error::new(ErrorKind::Silent, "QEMU does not answer after the instant")),
            };
        }
        self.freeze.thaw().await;
        let thawed = if self.freeze.still_frozen.is_none() {
            let thawed = self.steps.note(&Step::Thawed);
            guard.end().await;
            thawed
        } else {
            // As if we were dead: the guard goes on trying.
            if let Err(error) = guard.mark(Mark::GoesOn).await {
                tracing::debug!(error = error_chain(&error), "the guard of the guest is gone");
            }
            drop(guard);
            Ok(())
        };
        match (instant, &self.freeze.still_frozen) {
            (Err(error), Some(frozen)) => {
                Err(Error::new(ErrorKind::LeftBehind, frozen.clone()).because(error))
            }
            (Err(error), None) => Err(error),
            (Ok(instant), _) => thawed.map(|()| instant),
        }
    }

    async fn freeze_and_switch(
        &mut self,
        plan: &[DiskPlan],
        settings: &Settings,
        guard: &mut Guard,
        interrupted: &mut watch::Receiver<bool>,
    ) -> Result<Instant> {
        if let Some(agent) = self.freeze.agent() {
            self.steps.note(&Step::Freeze { agent: agent.to_owned() })?;
            guard.mark(Mark::Freezing).await?;
            let cancelled = async {
                // A sender that is gone will not interrupt any more.
                if interrupted.wait_for(|interrupted| *interrupted).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let qmp = self.qmp.clone();
            let ends = async move {
                tokio::select! {
                    () = cancelled => {}
                    // Nor does its agent answer then.
                    () = qmp.silence() => {}
                }
            };
            self.freeze.freeze(settings.freeze_timeout, ends).await;
            stillpoint_failpoint::reached("frozen");
            if self.qmp.is_silent() {
                return Err(Error::new(ErrorKind::Silent, "QEMU does not answer while the guest is frozen"));
            }
        }
        if *interrupted.borrow() {
            return Err(Error::new(ErrorKind::Cancelled, "the run was interrupted before the instant"));
        }
        if self.joined {
            return self.switch_junctions().await;
        }
        self.switch(plan, Some(guard)).await
    }

    /// Puts every front end on a junction above its disk, one by one and while the guest runs.
    async fn add_junctions(&mut self, plan: &[DiskPlan]) -> Result<()> {
        self.joined = true;
        for index in 0..plan.len() {
            let (Some(plan), Some(taking)) = (plan.get(index), self.disks.get(index)) else { break };
            if !taking.is_written() {
                continue;
            }
            let (front_end, node) = (plan.disk.front_end.clone(), plan.disk.node.clone());
            let Names { filter, junction, .. } = taking.names.clone();
            let add = command::add_junction(&junction, &node);
            let join = command::set_drive(&front_end, &junction);
            self.record_drive(plan, &filter)?;
            self.steps.record(Step::Node { name: junction.clone() })?;
            self.execute(&format!("add the junction of disk {}", plan.disk.name), add).await?;
            self.steps.record(Step::Junction { front_end, junction, filter })?;
            self.execute(&format!("point disk {} at its junction", plan.disk.name), join).await?;
        }
        Ok(())
    }

    /// The instant of a guest that is not paused for it: QEMU drains all disks, so that nothing is on its way to any of
    /// them, slides the filters in, and lets requests in again.
    async fn switch_junctions(&self) -> Result<Instant> {
        let written = self.disks.iter().filter(|disk| disk.is_written());
        let junctions = written.map(|disk| (&disk.names.junction, &disk.names.filter));
        pause::drain_and_switch(&self.qmp, command::switch_junctions(junctions)).await
    }

    /// Takes the junctions out, which have served, so that the front ends are on their filters.
    async fn remove_junctions(&self, plan: &[DiskPlan]) -> Result<()> {
        for (plan, disk) in plan.iter().zip(&self.disks).filter(|(_, disk)| disk.is_written()) {
            let leave = command::set_drive(&plan.disk.front_end, &disk.names.filter);
            self.execute(&format!("point disk {} at its filter", plan.disk.name), leave).await?;
            let remove = command::delete_node(disk.names.junction.as_str());
            self.execute(&format!("remove the junction of disk {}", plan.disk.name), remove).await?;
        }
        Ok(())
    }

    fn record_drive(&mut self, plan: &DiskPlan, filter: &NodeName) -> Result<()> {
        self.steps.record(Step::Drive {
            front_end: plan.disk.front_end.clone(),
            filter: filter.clone(),
            original: plan.disk.node.clone(),
        })
    }

    async fn execute(&self, doing: &str, command: stillpoint_qmp::Command) -> Result<serde_json::Value> {
        self.qmp.execute(command).await.map_err(|error| qmp_error(doing, error))
    }

    /// First of all, since it is what most likely cannot be had.
    async fn start_server(&mut self, plan: &[DiskPlan], settings: &Settings) -> Result<()> {
        let mut record = |step| self.steps.record(step);
        let listener = if self.off {
            Listener::for_another(&settings.runtime_directory, &mut record)?
        } else {
            Listener::bind(&settings.runtime_directory, &mut record)?
        };
        if let Some(descriptor) = listener.descriptor() {
            let passed = self.qmp.execute_with_fd(command::get_listener(), descriptor).await;
            passed.map_err(|error| qmp_error("hand the NBD listener to QEMU", error))?;
        }
        self.steps.record(Step::Server)?;
        let path = self.off.then(|| listener.path());
        match self.qmp.execute(command::start_server(plan.len(), path.as_deref())).await {
            Ok(_) => {}
            Err(error) if error.desc().is_some_and(|desc| desc.contains("already running")) => {
                return Err(refused(SERVER_IN_USE).because(error));
            }
            Err(error) => return Err(qmp_error("start QEMU's NBD server", error)),
        }
        self.listener = Some(listener);
        Ok(())
    }

    async fn add_disk(&mut self, index: usize, plan: &DiskPlan, settings: &Settings) -> Result<()> {
        let named =
            |error| Error::new(ErrorKind::Inconsistent, "cannot name what belongs to a disk").because(error);
        let names = Names::new(index).map_err(named)?;
        let written = !self.off && !plan.disk.read_only;
        let image = if written { Some(self.add_fleecing(&names, plan, settings).await?) } else { None };
        let (old, granularity) = match &plan.mode {
            ReadMode::Full { granularity } => (None, *granularity),
            ReadMode::Since(generation) => {
                let bitmap = plan.disk.usable_bitmap(&settings.target, generation);
                let bitmap = bitmap.ok_or_else(|| {
                    Error::new(
                        ErrorKind::Inconsistent,
                        format!("disk {} has no bitmap since {generation}", plan.disk.name),
                    )
                })?;
                (Some(bitmap), bitmap.granularity)
            }
        };
        let image_id = plan.disk.image_id.as_ref();
        let new = names::chain_bitmap(&settings.target, &settings.point, image_id, &plan.disk.name);
        let new = plan.disk.takes_bitmaps.then_some(new.map_err(named)?);
        // What cannot take a new bitmap, cannot drop an old one either: a template keeps the one that it has. Those on images below stay: QEMU
        // has these for reading only, and when what is above is committed into them, they tell what changed since their points.
        let ours = |bitmap: &&ChainBitmap| {
            plan.disk.takes_bitmaps
                && bitmap.above == 0
                && bitmap.target == settings.target
                && bitmap.fault != Some(FOREIGN)
        };
        let ours = plan.disk.bitmaps.iter().filter(ours);
        let above = old.map_or(0, |bitmap| bitmap.above);
        let mut read_by: Vec<_> = old.iter().map(|old| (old.node.clone(), old.name.clone())).collect();
        if above > 0 {
            read_by.extend(new.iter().map(|new| (plan.disk.node.clone(), new.clone())));
        }
        let chain = ChainDisk {
            disk: plan.disk.name.clone(),
            node: plan.disk.node.clone(),
            new,
            earlier: ours.map(|bitmap| bitmap.name.clone()).collect(),
            read_by,
            granularity,
            persistent: plan.disk.keeps_bitmaps,
        };
        self.disks.push(TakingDisk { names, image, chain, above, allocated: None });
        Ok(())
    }

    async fn add_fleecing(
        &mut self,
        names: &Names,
        plan: &DiskPlan,
        settings: &Settings,
    ) -> Result<Arc<FleecingImage>> {
        let directory = &settings.fleecing_directory;
        let image = FleecingImage::create(directory, plan.disk.size, &mut |step| self.steps.record(step))?;
        let image = Arc::new(image);
        if self.open_by_descriptor(names, &image).await? {
            return Ok(image);
        }
        self.steps.record(Step::FdSet { opaque: names.fd_set.clone(), directory: directory.clone() })?;
        let reply = self.qmp.execute_with_fd(command::add_fd(&names.fd_set), image.descriptor()).await;
        let reply = reply.map_err(|error| qmp_error("hand a fleecing image to QEMU", error))?;
        let set = reply.get("fdset-id").and_then(serde_json::Value::as_u64);
        let set =
            set.ok_or_else(|| Error::new(ErrorKind::Inconsistent, "QEMU tells no id of a descriptor set"))?;
        self.steps.record(Step::Node { name: names.fleecing.clone() })?;
        self.execute(
            "open a fleecing image in QEMU",
            command::add_fleecing(&names.fleecing, &command::of_fd_set(set)),
        )
        .await?;
        Ok(image)
    }

    /// Has QEMU open the image by a descriptor that it has for that moment only. Below 9.1 QEMU keeps a descriptor of a set
    /// that was removed until the guest runs, so in a VM that is paused each run would leave one (seen on 7.2). `false` if
    /// QEMU's descriptors are not to be seen, or it cannot open one of them again: without `/proc`, or held by rules.
    async fn open_by_descriptor(&mut self, names: &Names, image: &Arc<FleecingImage>) -> Result<bool> {
        let Some(pid) = self.qmp.peer_pid() else { return Ok(false) };
        let (name, directory) = (names.fd_set.clone(), image.directory().to_owned());
        self.steps.record(Step::Descriptor { name: name.clone(), directory })?;
        let passed = self.qmp.execute_with_fd(command::get_descriptor(&name), image.descriptor()).await;
        passed.map_err(|error| qmp_error("hand a fleecing image to QEMU", error))?;
        let opened = match image.number_in(pid).await {
            Some(number) => {
                self.steps.record(Step::Node { name: names.fleecing.clone() })?;
                let place = command::own_descriptor(number);
                match self.qmp.execute(command::add_fleecing(&names.fleecing, &place)).await {
                    Ok(_) => true,
                    Err(error) if error.class().is_some() => {
                        tracing::debug!(desc = error.desc(), "QEMU does not open its own descriptor again");
                        false
                    }
                    Err(error) => return Err(qmp_error("open a fleecing image in QEMU", error)),
                }
            }
            None => false,
        };
        self.execute("let go of a descriptor", command::close_descriptor(&name)).await?;
        Ok(opened)
    }

    /// All new bitmaps start to record here, before the instant: what they hold is then a superset of what changes
    /// after it (I2). The old ones go on recording.
    async fn add_bitmaps(&mut self, plan: &[DiskPlan]) -> Result<()> {
        let mut actions = Vec::new();
        for (plan, disk) in plan.iter().zip(&self.disks) {
            let chain = &disk.chain;
            if let Some(new) = &chain.new {
                let step = Step::NewBitmap { node: chain.node.clone(), name: new.as_str().to_owned() };
                self.steps.record(step)?;
                actions.push(command::add_bitmap(&chain.node, new, chain.granularity, chain.persistent));
            }
            if matches!(plan.mode, ReadMode::Since(_)) {
                self.steps.record(Step::ReadBitmap { node: chain.node.clone() })?;
                actions.push(command::add_read_bitmap(&chain.node, chain.granularity));
            }
        }
        if actions.is_empty() {
            return Ok(());
        }
        self.execute("add the bitmaps", command::transaction(&actions)).await?;
        Ok(())
    }

    /// What the images have that are above those whose bitmaps the run reads by. The new bitmaps record meanwhile.
    async fn ask_what_is_above(&mut self, plan: &[DiskPlan]) -> Result<()> {
        let server = self.server()?;
        for (plan, disk) in plan.iter().zip(&mut self.disks).filter(|(_, disk)| disk.above > 0) {
            let id = disk.names.flush.clone();
            self.steps.record(Step::Export { id: id.clone() })?;
            let of = (&plan.disk.node, plan.disk.size);
            let asked = Allocated::ask(&self.qmp, &server, &id, of, disk.above, disk.chain.granularity).await;
            disk.allocated = Some(Arc::new(asked?));
            Step::Export { id }.undo(&self.qmp).await?;
        }
        Ok(())
    }

    fn server(&self) -> Result<std::path::PathBuf> {
        let path = self.listener.as_ref().map(Listener::path);
        path.ok_or_else(|| Error::new(ErrorKind::Inconsistent, "there is no NBD listener"))
    }

    /// That nobody put anything between a filter and its disk before the instant: what was written there would be in no bitmap that this
    /// run reads by. Whatever is put there from here on is above of what is read.
    async fn refuse_changed_graph(&self, plan: &[DiskPlan]) -> Result<()> {
        let below = children(&self.qmp).await;
        for (plan, disk) in plan.iter().zip(&self.disks) {
            let child = below.get(disk.names.filter.as_str());
            if child.is_some_and(|child| child != plan.disk.node.as_str()) {
                let context =
                    format!("someone put another image on disk {} while the point was taken", plan.disk.name);
                return Err(Error::new(ErrorKind::Changed, context));
            }
        }
        Ok(())
    }

    /// The instant. Without a guard the guest does not run.
    async fn switch(&mut self, plan: &[DiskPlan], guard: Option<&mut Guard>) -> Result<Instant> {
        let (mut switches, mut recorded) = (Vec::new(), Vec::new());
        for (plan, disk) in plan.iter().zip(&self.disks).filter(|(_, disk)| disk.is_written()) {
            let filter = disk.names.filter.clone();
            switches.push(command::set_drive(&plan.disk.front_end, &filter));
            recorded.push((plan, filter));
        }
        for (plan, filter) in recorded {
            self.record_drive(plan, &filter)?;
        }
        let Some(guard) = guard else { return pause::switch(&self.qmp, false, switches).await };
        self.steps.note(&Step::Pause)?;
        guard.mark(Mark::Pausing).await?;
        let instant = pause::switch(&self.qmp, true, switches).await;
        let refused = instant.as_ref().is_err_and(|error| error.kind() == ErrorKind::LeftBehind);
        if refused || self.qmp.is_silent() {
            self.unresumed = true;
        } else {
            self.steps.note(&Step::Resumed)?;
            guard.mark(Mark::Resumed).await?;
        }
        instant
    }

    /// Freezes a copy of each old bitmap, after the instant: it holds at least what changed before it.
    async fn freeze_read_bitmaps(&self, plan: &[DiskPlan]) -> Result<()> {
        let disks = plan.iter().zip(&self.disks);
        let merge = |(_, disk): (&DiskPlan, &TakingDisk)| {
            let sources = Some(disk.chain.read_by.as_slice()).filter(|sources| !sources.is_empty())?;
            Some(command::merge_into_read_bitmap(&disk.chain.node, sources))
        };
        let actions: Vec<_> = disks.filter_map(merge).collect();
        if !actions.is_empty() {
            self.execute("freeze a copy of the bitmaps", command::transaction(&actions)).await?;
        }
        Ok(())
    }

    /// Makes the instant readable.
    pub(crate) async fn open(&mut self, plan: &[DiskPlan]) -> Result<Opened> {
        let path = self.server()?;
        let mut connections = Vec::new();
        for (plan, disk) in plan.iter().zip(&self.disks) {
            let names = &disk.names;
            let mut exported: &NodeName = &plan.disk.node;
            if disk.is_written() {
                self.steps.record(Step::Node { name: names.access.clone() })?;
                let access = command::add_access(&names.access, &names.filter);
                self.execute("add the snapshot access", access).await?;
                exported = &names.access;
            }
            self.steps.record(Step::Export { id: names.export.clone() })?;
            let bitmap = (!disk.chain.read_by.is_empty()).then_some((&disk.chain.node, names::READ_BITMAP));
            let export = command::add_export(&names.export, exported, bitmap, disk.is_written());
            self.execute(&format!("export disk {}", plan.disk.name), export).await?;

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
        let images = self.open_images(plan, &path).await;
        Ok(Opened { connections, images })
    }

    /// Opens the images that can be read past QEMU. After the instant, so that no job of somebody else's can have put
    /// another image in the place of the one that was seen.
    async fn open_images(&mut self, plan: &[DiskPlan], server: &Path) -> Vec<Option<Arc<DirectImage>>> {
        let mut images = Vec::new();
        for (index, plan) in plan.iter().enumerate() {
            let fleecing = self.disks.get(index).and_then(|disk| disk.image.as_ref());
            let tells = fleecing.is_none_or(|fleecing| fleecing.tells_what_is_kept());
            let mut file = plan.disk.image_file.as_ref().filter(|_| tells && !self.qmp.is_silent());
            if fleecing.is_some() && file.is_some_and(ImageFile::needs_flush) {
                let flushing = tokio::time::timeout(FLUSH_DEADLINE, self.flush(index, plan, server)).await;
                let flushed =
                    flushing.unwrap_or_else(|late| Err(Error::new(ErrorKind::Qmp, "flush").because(late)));
                if let Err(error) = flushed {
                    let error = error_chain(&error);
                    tracing::debug!(disk = %plan.disk.name, error, "QEMU did not flush an image");
                    file = None;
                }
            }
            let image = match file {
                Some(file) => file.open(plan.disk.size).await,
                None => None,
            };
            tracing::debug!(disk = %plan.disk.name, directly = image.is_some(), "how its image is read");
            images.push(image.map(Arc::new));
        }
        images
    }

    /// Has QEMU write to the image what it knows of it, and say so. Only NBD's flush both tells of a failure and leaves the
    /// guest's requests alone meanwhile.
    async fn flush(&mut self, index: usize, plan: &DiskPlan, server: &Path) -> Result<()> {
        let names = self.disks.get(index).map(|disk| disk.names.clone());
        let id = names
            .map(|names| names.flush)
            .ok_or_else(|| Error::new(ErrorKind::Inconsistent, "no such disk"))?;
        self.steps.record(Step::Export { id: id.clone() })?;
        self.execute("export an image", command::add_export(&id, &plan.disk.node, None, false)).await?;
        let failed = |error| Error::new(ErrorKind::Read, "flush an image").because(error);
        let client = Client::connect_unix(server, Options::new(&id)).await.map_err(failed)?;
        if !client.flags().can_flush() {
            return Err(Error::new(ErrorKind::Read, "the export takes no flush"));
        }
        client.flush().await.map_err(failed)?;
        client.disconnect().await.map_err(failed)?;
        Step::Export { id }.undo(&self.qmp).await
    }

    pub(crate) fn hold(
        self,
        plan: Vec<DiskPlan>,
        settings: &Settings,
        opened: Opened,
        instant: Instant,
        running: bool,
    ) -> SnapshotAccess {
        let (stop, stopped) = watch::channel::<Option<Stop>>(None);
        let images = self.disks.iter().filter_map(|disk| disk.image.clone()).collect();
        let watch = FleecingWatch::start(images, settings.fleecing_budget, self.reserve, stop.clone());
        let mut volumes = Vec::new();
        let mut modes = Vec::new();
        let mut chain = Vec::new();
        let mut watched = Vec::new();
        let opened = opened.connections.into_iter().zip(opened.images);
        for ((plan, disk), ((data, dirty), image)) in plan.into_iter().zip(self.disks).zip(opened) {
            modes.push((plan.bitmap_mode(), plan.base().cloned()));
            let nodes = [&plan.disk.node, &disk.names.filter, &disk.names.junction];
            watched.push(WatchedDisk {
                name: plan.disk.name.clone(),
                front_end: plan.disk.front_end.clone(),
                nodes: nodes.map(|node| node.as_str().to_owned()).to_vec(),
            });
            let proof = disk.image.as_ref().filter(|_| image.is_some());
            let proof = proof
                .map(|fleecing| Arc::new(Proof::new(data.clone(), Arc::clone(fleecing), plan.disk.size)));
            let piece = reads_within(self.qmp.version().number(), FILTER_CLUSTER, !disk.is_written());
            volumes.push(Arc::new(AccessVolume {
                name: plan.disk.name,
                size: plan.disk.size,
                data,
                dirty,
                allocated: disk.allocated,
                discards: settings
                    .fleecing_discard
                    .then(|| Mutex::new(DiscardPlanner::new(FILTER_CLUSTER, plan.disk.size))),
                fleecing: disk.image,
                image,
                proof,
                piece,
                stop: stopped.clone(),
                read: AtomicU64::new(0),
                past_qemu: AtomicU64::new(0),
                passed: AtomicU64::new(0),
            }));
            chain.push(disk.chain);
        }
        let errors = IoErrors::default();
        let qmp = self.qmp.clone();
        let mut tasks =
            vec![watch_guest(qmp, self.events, watched, running && !self.off, errors.clone(), stop.clone())];
        if !self.off {
            tasks.push(watch_migration(self.qmp.clone(), stop.clone()));
        }
        SnapshotAccess {
            qmp: self.qmp,
            steps: self.steps,
            dirty: volumes.iter().map(|volume| volume.size).collect(),
            volumes,
            modes,
            tasks,
            listener: self.listener,
            watch,
            watcher: self.watcher,
            stop,
            chain,
            held_power: self.held_power,
            instant,
            freeze: self.freeze,
            pulse: Some(self.pulse),
            errors,
        }
    }

    /// Undoes all, the new bitmaps included: there was no point yet.
    pub(crate) async fn give_up(mut self, error: Error) -> Error {
        let images: Vec<_> = self.disks.iter().filter_map(|disk| disk.image.clone()).collect();
        drop(self.pulse);
        let mut failures = Vec::new();
        if self.qmp.answers_again().await {
            failures.extend(self.steps.storage_hangs(&images, true).await);
        }
        if failures.is_empty() {
            failures = self.steps.undo(&self.qmp).await;
        }
        if failures.is_empty() {
            for image in &images {
                image.empty();
            }
            if let Some(watcher) = self.watcher.take() {
                watcher.end();
            }
        }
        if self.unresumed && !self.qmp.is_silent() {
            // Once more, now that nothing of ours can be in the way of it.
            match Step::Pause.undo(&self.qmp).await {
                Ok(()) => failures.extend(self.steps.note(&Step::Resumed).err()),
                Err(error) => failures.push(error),
            }
        }
        self.steps.incomplete |= !failures.is_empty() || self.freeze.still_frozen.is_some();
        let disks = self.disks.drain(..).map(|disk| disk.chain).collect();
        let chain = Chain::new(self.qmp, disks, self.steps, self.held_power);
        failures.extend(chain.roll_back().await.err());
        match failures.into_iter().next() {
            None => error,
            Some(ended) if ended.kind() == ErrorKind::Ended => ended,
            Some(failure) => {
                tracing::warn!(error = error_chain(&failure), "could not undo everything");
                let context = format!("{}, and something is left in the VM", error_chain(&error));
                let left_behind = Error::new(ErrorKind::LeftBehind, context);
                // One that does not answer says the same of every step.
                if error.kind() == ErrorKind::Silent && failure.kind() == ErrorKind::Silent {
                    left_behind
                } else {
                    left_behind.because(failure)
                }
            }
        }
    }
}
