//! The job: one point of one VM, from lock to summary.

use crate::{
    config::Vm,
    config_files::ConfigFiles,
    failure::{Exit, Failure, Guest, StateAtTheEnd},
    interrupt::Interrupt,
    places::Places,
    progress::BackupProgress,
    provider_failure::provider_failure,
    reach::ReachedVm,
    runtime,
    selection::Selection,
    summary::{DiskSummary, Summary},
};
use std::path::Path;
use std::time::{Duration, Instant};
use stillpoint_model::{Granularity, Length, PointId, TargetId, VmName};
use stillpoint_provider::{
    Backup, BitmapMode, ConfigFile, Consistency, DiskOffer, DiskRecord, ErrorKind as ProviderErrorKind,
    Incremental, OfferedBitmap, PointRecord, Provider, Skipped, VolumeReport,
};
use stillpoint_provider_directory::DirectoryProvider;
use stillpoint_snapshot_access::{
    Chain, Disk, DiskPlan, ErrorKind as AccessErrorKind, GuestState, Machine, ReadMode, Settings,
    SnapshotAccess,
};

/// How often a run is begun when somebody else changes the VM's block graph in the moments before the instant.
const TRIES: u32 = 4;

/// One backup to make.
pub(crate) struct Job<'a> {
    /// The VM's name in the target; `None` takes the name that QEMU was given.
    pub name: Option<VmName>,
    /// How to reach it.
    pub vm: &'a Vm,
    /// Where the point is kept.
    pub provider: &'a dyn Provider,
    /// The same, if it is a directory.
    pub directory: Option<&'a DirectoryProvider>,
    /// Where it is remembered that the target was seen there.
    pub places: Option<Places>,
    /// Whether bitmaps are to be ignored.
    pub full: bool,
    /// Whether a person watches.
    pub progress: bool,
}

impl Job<'_> {
    /// Makes the point.
    ///
    /// # Errors
    /// Whatever failed, after everything was undone (unless the exit status says otherwise).
    pub(crate) async fn run(&self, interrupt: &Interrupt) -> Result<Summary, Failure> {
        let mut vm = ReachedVm::reach(self.name.as_ref(), self.vm, Some(self.provider)).await?;
        let made = self.of(&mut vm, interrupt).await;
        let off = vm.machine.off;
        let guest = vm.guest().await;
        vm.release().await;
        match made {
            Ok(mut summary) => {
                summary.warnings.extend(guest.warning());
                summary.guest = guest;
                Ok(summary)
            }
            Err(failure) if off => Err(failure.of_a_vm_that_is_off()),
            Err(failure) => Err(failure.state(guest)),
        }
    }

    async fn of(&self, vm: &mut ReachedVm, interrupt: &Interrupt) -> Result<Summary, Failure> {
        let name = self.vm_name(&vm.machine)?;
        self.selection(&name, &vm.machine)?;
        let config = ConfigFiles::read(self.vm)?;
        let target = self.provider.job_init().await;
        let target = target.map_err(|error| provider_failure(&error, Guest::Untouched))?;
        let seen = |places| {
            let disks: Vec<_> = self.selection(&name, &vm.machine)?.disks.into_iter().cloned().collect();
            Ok::<_, Failure>(crate::target::seen(places, self.provider, self.directory, &target, &disks))
        };
        let notes = self.places.as_ref().map(seen).transpose()?.unwrap_or_default();
        let mut tries = 1;
        let result = loop {
            match self.attempt(&name, vm, &target, config.clone(), interrupt).await {
                Err(failure) if failure.vm_changed && tries < TRIES => {
                    tracing::info!(why = failure.what(), "the run begins again");
                    tries += 1;
                }
                ended => break ended,
            }
            if let Err(failure) = vm.look_again().await {
                break Err(failure);
            }
        };
        let result = result.map(|mut summary| {
            summary.warnings.splice(0..0, notes);
            summary
        });
        if let Err(error) = self.provider.job_cleanup().await {
            tracing::warn!(error = crate::failure::chain(&error), "the provider's clean-up failed");
        }
        result.map_err(|failure| failure.of_vm(&name))
    }

    /// What of the VM goes into the point.
    fn selection<'m>(&self, name: &VmName, machine: &'m Machine) -> Result<Selection<'m>, Failure> {
        let selection = Selection::of(self.vm, machine);
        match selection.obstacles.first() {
            Some((disk, why)) => Err(Selection::obstacle(disk, why, name)),
            None => Ok(selection),
        }
    }

    async fn attempt(
        &self,
        name: &VmName,
        vm: &ReachedVm,
        target: &TargetId,
        config: ConfigFiles,
        interrupt: &Interrupt,
    ) -> Result<Summary, Failure> {
        let selection = self.selection(name, &vm.machine)?;
        let disks: Vec<Disk> = selection.disks.iter().map(|disk| (*disk).clone()).collect();
        let Selection { skipped, warnings, .. } = selection;
        let run = Run { job: self, name: name.clone(), vm, target: target.clone(), skipped, warnings };
        run.refuse_foreign(&disks)?;
        run.backup(disks, config, interrupt).await
    }

    fn vm_name(&self, machine: &Machine) -> Result<VmName, Failure> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        // Only a VM that was named by its socket has no name of its own.
        let socket = self.vm.qmp.as_deref().unwrap_or(Path::new("SOCKET"));
        let hint = format!("stillpoint backup NAME --qmp {} ...", socket.display());
        let Some(name) = &machine.name else {
            return Err(Failure::usage("QEMU has no name for this VM (-name)")
                .guest(Guest::Untouched)
                .next(hint));
        };
        name.parse().map_err(|error| {
            Failure::because(Exit::Usage, "QEMU's name for this VM cannot name its points", &error)
                .guest(Guest::Untouched)
                .next(hint)
        })
    }
}

/// What became of the VM once its point was durable.
enum Settled {
    AsBefore,
    /// The guest had powered itself off meanwhile, which was granted.
    PoweredOff,
    /// Something is left for `recover`, and why.
    LeftBehind(String),
}

/// One disk with its fate decided.
struct Decided {
    plan: DiskPlan,
    reason: String,
}

struct Run<'a> {
    job: &'a Job<'a>,
    name: VmName,
    vm: &'a ReachedVm,
    target: TargetId,
    /// Block devices that are not in the point.
    skipped: Vec<Skipped>,
    /// What the user has to know of the VM, whatever comes of the point.
    warnings: Vec<String>,
}

impl Run<'_> {
    /// Images that only the target tells of are read only if they say themselves that they belong to it: whoever can
    /// write there could have named any file of this host.
    fn refuse_foreign(&self, disks: &[Disk]) -> Result<(), Failure> {
        let foreign = disks.iter().find(|disk| self.vm.recorded && !disk.has_bitmap(&self.target));
        let Some(disk) = foreign else { return Ok(()) };
        let image = disk.image.as_deref().unwrap_or(Path::new("?")).display().to_string();
        let what = format!(
            "the VM is off, and its last point says that {image} is its disk {}; but that image has no bitmap of this target",
            disk.name
        );
        Err(Failure::new(Exit::Failed, what).guest(Guest::Untouched).next(format!(
            "if it is, name it: disks.{} = {{ image = \"...\", format = \"...\" }} under [vm.{}]",
            disk.name, self.name
        )))
    }

    async fn backup(
        &self,
        disks: Vec<Disk>,
        config: ConfigFiles,
        interrupt: &Interrupt,
    ) -> Result<Summary, Failure> {
        let started = Instant::now();
        let point = new_point().map_err(|error| {
            Failure::because(Exit::Failed, "the kernel gives no random number", &error)
                .guest(Guest::Untouched)
        })?;
        let backup = self.job.provider.backup_init(&self.name, &point).await;
        let mut backup = backup.map_err(|error| provider_failure(&error, Guest::Untouched))?;
        let made = self.make(backup.as_mut(), &point, disks, config, interrupt).await;
        if let Err(error) = backup.backup_cleanup().await {
            tracing::warn!(error = crate::failure::chain(&error), "the target was not cleaned up");
        }
        made.map(|mut summary| {
            summary.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            summary
        })
    }

    async fn make(
        &self,
        backup: &mut dyn Backup,
        point: &PointId,
        disks: Vec<Disk>,
        mut config: ConfigFiles,
        interrupt: &Interrupt,
    ) -> Result<Summary, Failure> {
        let decided = self.decide(backup, disks).await?;
        if decided.is_empty() {
            return self.configuration_only(backup, point, &config.files).await;
        }
        if interrupt.is_set() {
            return Err(interrupted(Guest::Untouched));
        }
        let settings = Settings {
            target: self.target.clone(),
            point: point.clone(),
            fleecing_directory: self.job.vm.fleecing.directory.clone(),
            fleecing_budget: self.job.vm.fleecing.budget,
            fleecing_reserve: self.job.vm.fleecing.reserve,
            watcher: vec!["/proc/self/exe".into(), crate::WATCHER.into()],
            fleecing_discard: self.job.vm.fleecing.discard,
            runtime_directory: runtime::directory(),
            cbw_timeout_seconds: self.job.vm.fleecing.timeout,
            agent: self.job.vm.agent.clone(),
            freeze_timeout: Duration::from_secs(self.job.vm.freeze_timeout),
            guard: vec!["/proc/self/exe".into(), crate::GUARD.into()],
            interrupted: interrupt.receiver(),
        };
        let plan = decided.iter().map(|disk| disk.plan.clone()).collect();
        stillpoint_failpoint::reached("decided");
        let taken = SnapshotAccess::take(self.vm.qmp.clone(), &self.vm.machine, plan, settings).await;
        let mut access = taken.map_err(|error| self.access_failure(&error))?;
        stillpoint_failpoint::reached("taken");
        let mut warnings = self.warnings.clone();
        warnings.extend(config.read_again());

        let read = self.read(backup, &mut access, &config.files, interrupt).await;
        let record = self.record(point, &decided, Some(&access));
        warnings.extend(self.freeze_warning(&record));
        let states = access.disks();
        let freeze = access.freeze();
        let freeze_time = freeze.duration;
        let still_frozen = freeze.still_frozen.clone();
        let io_errors = access.io_errors();
        stillpoint_failpoint::reached("read");
        let (chain, torn_down) = access.tear_down(read.is_err()).await;
        stillpoint_failpoint::reached("torn-down");
        let reports = match read {
            Ok(reports) => reports,
            Err(failure) => {
                let rolled_back = chain.roll_back().await;
                return Err(self.cleaned(failure, torn_down.err(), rolled_back));
            }
        };
        warnings.extend(io_errors);
        let mut exit = Exit::Done;
        match self.commit(backup, &record, chain).await? {
            Settled::AsBefore => {}
            Settled::PoweredOff => warnings
                .push("the guest powered itself off during the backup; its QEMU was ended after it".into()),
            Settled::LeftBehind(why) => {
                exit = Exit::LeftBehind;
                warnings.push(format!("the point is good, but {why}; type: {}", self.vm.recover));
            }
        }
        stillpoint_failpoint::reached("committed");
        let peak = torn_down.unwrap_or_else(|error| {
            if error.kind() == AccessErrorKind::Ended {
                warnings.push("the VM's QEMU ended while the point was made; the point is whole".into());
                return Length::ZERO;
            }
            exit = Exit::LeftBehind;
            warnings.push(format!(
                "the point is good, but {}; type: {}",
                crate::failure::chain(&error),
                self.vm.recover
            ));
            Length::ZERO
        });
        if let Some(frozen) = still_frozen {
            exit = Exit::LeftBehind;
            warnings.push(format!(
                "{frozen}; log in to the guest and type: fsfreeze --unfreeze / (for each file system)"
            ));
        }
        let disks = decided.iter().zip(&states).zip(&reports).zip(&record.disks);
        let disks = disks.map(|(((_, state), report), record)| DiskSummary {
            name: record.name.clone(),
            size: record.size,
            bitmap_mode: record.bitmap_mode,
            reason: record.reason.clone(),
            dirty_bytes: state.dirty,
            read_bytes: state.read,
            stored_bytes: report.stored,
        });
        Ok(Summary {
            exit,
            warnings,
            freeze_ms: crate::text::milliseconds(freeze_time),
            fleecing_peak_bytes: peak,
            disks: disks.collect(),
            provider: self.job.provider.name(),
            off: self.vm.machine.off,
            guest: StateAtTheEnd { now: GuestState::Unknown { stopped: None }, ran: self.vm.machine.running },
            record,
            duration_ms: 0,
        })
    }

    /// Asks the provider, and turns its answers into a plan.
    async fn decide(&self, backup: &mut dyn Backup, disks: Vec<Disk>) -> Result<Vec<Decided>, Failure> {
        let offer = |disk: &Disk| {
            let usable = disk.usable_bitmaps(&self.target);
            let bitmaps = usable.map(|(generation, granularity)| OfferedBitmap {
                generation: generation.clone(),
                granularity,
            });
            DiskOffer {
                name: disk.name.clone(),
                size: disk.size,
                bitmaps: if self.job.full { Vec::new() } else { bitmaps.collect() },
            }
        };
        let offers: Vec<_> = disks.iter().map(offer).collect();
        let answers = backup.backup_vm_query_incremental(&offers).await;
        let answers = answers.map_err(|error| provider_failure(&error, Guest::Untouched))?;
        if answers.len() != disks.len() {
            let what = format!(
                "{} answered for {} of {} disks",
                self.job.provider.name(),
                answers.len(),
                disks.len()
            );
            return Err(Failure::new(Exit::Failed, what).guest(Guest::Untouched));
        }
        let decide = |((disk, offer), answer): ((Disk, DiskOffer), Incremental)| {
            let (mode, reason) = match answer {
                // An answer that was not offered would make an incremental on nothing (I4).
                Incremental::Since(generation)
                    if offer.bitmaps.iter().any(|bitmap| bitmap.generation == generation) =>
                {
                    let reason = format!("changes since {generation}");
                    (ReadMode::Since(generation), reason)
                }
                Incremental::Since(generation) => {
                    (full(None), format!("the provider holds {generation}, which the disk has no bitmap for"))
                }
                Incremental::Full { granularity, reason } => {
                    let reason = if self.job.full {
                        "asked for with --full".into()
                    } else if disk.read_only {
                        "it is read-only, so it has no bitmap".into()
                    } else {
                        disk.bitmap_fault(&self.target).map_or(reason, str::to_owned)
                    };
                    (full(granularity), reason)
                }
            };
            Decided { plan: DiskPlan { disk, mode }, reason }
        };
        Ok(disks.into_iter().zip(offers).zip(answers).map(decide).collect())
    }

    async fn read(
        &self,
        backup: &mut dyn Backup,
        access: &mut SnapshotAccess,
        config: &[ConfigFile],
        interrupt: &Interrupt,
    ) -> Result<Vec<VolumeReport>, Failure> {
        let surveyed = access.survey().await;
        surveyed.map_err(|error| self.access_failure(&error))?;
        let canceller = access.canceller();
        let mut signal = interrupt.clone();
        let watcher = tokio::spawn(async move {
            signal.wait().await;
            canceller.cancel();
        });
        let volumes = access.volumes();
        let result = {
            let progress = BackupProgress::start(self.job.progress, &self.name, access);
            let work = backup.backup_vm(config, volumes);
            progress.watch(access, work).await
        };
        watcher.abort();
        match result {
            Ok(reports) if reports.len() == access.disks().len() => Ok(reports),
            Ok(_) => Err(Failure::new(Exit::Failed, "the provider did not report on every disk")
                .guest(Guest::Unharmed)),
            Err(_) if interrupt.is_set() => Err(interrupted(Guest::Unharmed)),
            Err(error) => {
                let failure = provider_failure(&error, Guest::Unharmed);
                if access.space_given_up().is_none() {
                    return Err(failure);
                }
                let disks: Vec<_> = access.disks().iter().map(|disk| disk.name.to_string()).collect();
                let what = format!("{} (old data of {} was kept there)", failure.what(), disks.join(", "));
                Err(Failure::new(failure.exit, what).guest(Guest::Unharmed).next(self.more_space()))
            }
        }
    }

    /// I3: the old bitmap goes only after the provider has said that the point is durable.
    async fn commit(
        &self,
        backup: &mut dyn Backup,
        record: &PointRecord,
        chain: Chain,
    ) -> Result<Settled, Failure> {
        match backup.commit(record).await {
            Ok(()) => {
                stillpoint_failpoint::reached("durable");
                Ok(match chain.commit().await {
                    Ok(false) => Settled::AsBefore,
                    Ok(true) => Settled::PoweredOff,
                    Err(error) if error.kind() == AccessErrorKind::LeftBehind => {
                        Settled::LeftBehind(crate::failure::chain(&error))
                    }
                    Err(error) => {
                        let error = crate::failure::chain(&error);
                        tracing::warn!(error, "old bitmaps stay until the next run");
                        Settled::AsBefore
                    }
                })
            }
            Err(error) if error.kind() == ProviderErrorKind::CommitUnknown => {
                let kept = chain.keep_both().await;
                Err(self.cleaned(provider_failure(&error, Guest::Unharmed), None, kept))
            }
            Err(error) => {
                let rolled_back = chain.roll_back().await;
                Err(self.cleaned(provider_failure(&error, Guest::Unharmed), None, rolled_back))
            }
        }
    }

    /// A VM without disks still has a configuration worth a point.
    async fn configuration_only(
        &self,
        backup: &mut dyn Backup,
        point: &PointId,
        config: &[ConfigFile],
    ) -> Result<Summary, Failure> {
        let stored = backup.backup_vm(config, Vec::new()).await;
        stored.map_err(|error| provider_failure(&error, Guest::Untouched))?;
        let record = self.record(point, &[], None);
        let committed = backup.commit(&record).await;
        committed.map_err(|error| provider_failure(&error, Guest::Untouched))?;
        Ok(Summary {
            exit: Exit::Done,
            warnings: self.warnings.clone(),
            freeze_ms: 0.0,
            fleecing_peak_bytes: Length::ZERO,
            disks: Vec::new(),
            provider: self.job.provider.name(),
            off: self.vm.machine.off,
            guest: StateAtTheEnd { now: GuestState::Unknown { stopped: None }, ran: self.vm.machine.running },
            record,
            duration_ms: 0,
        })
    }

    fn record(&self, point: &PointId, decided: &[Decided], access: Option<&SnapshotAccess>) -> PointRecord {
        let (consistency, consistency_reason) = access.map_or_else(
            || (Consistency::CrashConsistent, "the VM has no disk".to_owned()),
            SnapshotAccess::consistency,
        );
        let time = access.map_or_else(std::time::SystemTime::now, |access| access.instant().time);
        let time = jiff::Timestamp::try_from(time).unwrap_or_default();
        let disk = |decided: &Decided| {
            let disk = &decided.plan.disk;
            let bitmap_mode = decided.plan.bitmap_mode();
            let granularity = match &decided.plan.mode {
                ReadMode::Full { granularity } => *granularity,
                ReadMode::Since(generation) => {
                    let usable = disk.usable_bitmaps(&self.target).find(|(found, _)| *found == generation);
                    usable.map_or(Granularity::DEFAULT, |(_, granularity)| granularity)
                }
            };
            DiskRecord {
                name: disk.name.clone(),
                size: disk.size,
                format: disk.format.clone(),
                bitmap_mode,
                base: decided.plan.base().cloned(),
                reason: decided.reason.clone(),
                granularity: (bitmap_mode != BitmapMode::None).then_some(granularity),
                image: disk.image.clone(),
            }
        };
        PointRecord {
            vm: self.name.clone(),
            id: point.clone(),
            time: time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
            consistency,
            consistency_reason,
            pause_ms: access.map_or(0.0, |access| crate::text::milliseconds(access.instant().pause)),
            qemu_version: self.vm.machine.qemu.to_string(),
            stillpoint_version: env!("CARGO_PKG_VERSION").to_owned(),
            skipped: self.skipped.clone(),
            disks: decided.iter().map(disk).collect(),
        }
    }

    /// A freeze that was wanted and did not come about.
    fn freeze_warning(&self, record: &PointRecord) -> Option<String> {
        let wanted = self.job.vm.agent.is_some() && self.vm.machine.running;
        let frozen = record.consistency == Consistency::FileSystemConsistent;
        (wanted && !frozen).then(|| {
            format!(
                "the guest's file systems were not frozen, so the point is crash-consistent: {}",
                record.consistency_reason
            )
        })
    }

    fn access_failure(&self, error: &stillpoint_snapshot_access::Error) -> Failure {
        if error.kind() == AccessErrorKind::LeftBehind {
            return Failure::because(Exit::LeftBehind, "no point was made", error)
                .guest(Guest::LeftBehind)
                .next(self.vm.recover.clone());
        }
        let what = format!("no point of VM {} was made", self.name);
        match error.kind() {
            AccessErrorKind::Cancelled => interrupted(Guest::Unharmed),
            AccessErrorKind::Ended => Failure::because(Exit::Failed, what, error).guest(Guest::Ended),
            AccessErrorKind::NoSpace => {
                Failure::because(Exit::Failed, what, error).guest(Guest::Untouched).next(self.more_space())
            }
            AccessErrorKind::Refused => Failure::because(Exit::Failed, what, error).guest(Guest::Untouched),
            AccessErrorKind::Changed => {
                let mut failure = Failure::because(Exit::Failed, what, error).guest(Guest::Unharmed);
                failure.vm_changed = true;
                failure.next("run the backup again when nobody else takes or commits snapshots of this VM")
            }
            _ => Failure::because(Exit::Failed, what, error).guest(Guest::Unharmed),
        }
    }

    /// What to do when the host has too little space for old data.
    fn more_space(&self) -> String {
        format!(
            "make room there; or keep old data on a file system without images of VMs, under [vm.{}]: fleecing = {{ directory = \
             \"/PATH\" }}; `reserve = \"SIZE\"` there says how much is left alone",
            self.name
        )
    }

    /// The failure itself, unless cleaning up after it failed too; with the guest's fate, if that powered itself off.
    fn cleaned(
        &self,
        failure: Failure,
        torn_down: Option<stillpoint_snapshot_access::Error>,
        ended: Result<bool, stillpoint_snapshot_access::Error>,
    ) -> Failure {
        match (torn_down, ended) {
            (Some(error), _) if error.kind() == AccessErrorKind::Ended => failure.guest(Guest::Ended),
            (None, Ok(false)) => failure,
            (None, Ok(true)) => failure.guest(Guest::Ended),
            (Some(error), _) | (None, Err(error)) => {
                let what = format!("{}; and {}", failure.what(), crate::failure::chain(&error));
                Failure::new(Exit::LeftBehind, what).guest(Guest::LeftBehind).next(self.vm.recover.clone())
            }
        }
    }
}

fn full(granularity: Option<Granularity>) -> ReadMode {
    ReadMode::Full { granularity: granularity.unwrap_or(Granularity::DEFAULT) }
}

fn interrupted(guest: Guest) -> Failure {
    Failure::new(Exit::Interrupted, "interrupted by a signal; no point was made").guest(guest)
}

fn new_point() -> Result<PointId, rustix::io::Errno> {
    let mut random = [0u8; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    Ok(PointId::new(jiff::Timestamp::now(), u32::from_ne_bytes(random)))
}
