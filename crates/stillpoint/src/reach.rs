//! Getting hold of a VM for a backup, whether it runs or is off.

use crate::{
    config::Vm,
    failure::{Exit, Failure, Guest, StateAtTheEnd},
    runtime, text,
    vm::{self, Found, LockedVm},
};
use std::{ffi::OsString, path::Path};
use stillpoint_model::VmName;
use stillpoint_provider::{BitmapMode, DiskRecord, PointRecord, Provider, Skipped};
use stillpoint_qmp::Qmp;
use stillpoint_snapshot_access::{
    ErrorKind as AccessErrorKind, GuestState, Machine, OfflineDisk, OfflineImages, RunLock,
};

/// A VM in our hands; to be [released](Self::release) on every way out.
pub(crate) struct ReachedVm {
    /// The monitor of its QEMU, or of the daemon that holds its images.
    pub qmp: Qmp,
    /// What there is.
    pub machine: Machine,
    /// What to type if something is left in it.
    pub recover: String,
    /// Whether its images are those that the last point recorded, which only their bitmaps prove to be its own.
    pub recorded: bool,
    images: Option<OfflineImages>,
    _running: Option<LockedVm>,
    _off: Vec<RunLock>,
}

impl ReachedVm {
    /// Locks it, undoes what an earlier run left, and looks at it. A VM that is off is known by its configuration or by
    /// its last point in `provider`, if there is one to ask.
    ///
    /// # Errors
    /// Exit status 4 if another run works on it; with what to do if it can be reached neither way.
    pub(crate) async fn reach(
        name: Option<&VmName>,
        vm: &Vm,
        provider: Option<&dyn Provider>,
    ) -> Result<Self, Failure> {
        let absent = match &vm.qmp {
            Some(socket) => match vm::lock(socket).await? {
                Found::Running(locked) => return Self::running(locked, socket).await,
                Found::Absent(failure) => failure,
            },
            None => Failure::usage("nothing tells where this VM is").next("give it `qmp` or `disks`"),
        };
        let record = match (name, provider) {
            (Some(name), Some(provider)) => last_point(provider, name).await,
            _ => None,
        };
        if !vm.disks.is_empty() {
            let skipped = record.map(|record| unnamed_disks(&record, vm)).unwrap_or_default();
            return Self::off(name, vm, &vm.offline_disks(), skipped, false).await;
        }
        let Some(record) = record else { return Err(absent) };
        match recorded_disks(&record, vm) {
            Ok((disks, skipped)) => Self::off(name, vm, &disks, skipped, true).await,
            Err(why) => Err(absent.next(why)),
        }
    }

    async fn running(locked: LockedVm, socket: &Path) -> Result<Self, Failure> {
        let qmp = locked.qmp.clone();
        let recover = format!("stillpoint recover --qmp {}", socket.display());
        if vm::recover(&qmp, &recover).await?.ended {
            return Err(Failure::new(Exit::Failed, "the guest had powered itself off in an earlier run")
                .guest(Guest::Ended)
                .next("start the VM, then run the backup again"));
        }
        let machine = inspect(&qmp).await?;
        let (images, recorded) = (None, false);
        Ok(Self { qmp, machine, recover, recorded, images, _running: Some(locked), _off: Vec::new() })
    }

    /// Looks at a VM that runs once more; whoever changed it may have copied what was ours to where it has to be undone.
    ///
    /// # Errors
    /// As the first look.
    pub(crate) async fn look_again(&mut self) -> Result<(), Failure> {
        vm::recover(&self.qmp, &self.recover).await?;
        self.machine = inspect(&self.qmp).await?;
        Ok(())
    }

    async fn off(
        name: Option<&VmName>,
        vm: &Vm,
        disks: &[OfflineDisk],
        skipped: Vec<Skipped>,
        recorded: bool,
    ) -> Result<Self, Failure> {
        let runtime = runtime::directory();
        let excluded = |disk: &&OfflineDisk| vm.excluded(&disk.name).is_none();
        let disks: Vec<_> = disks.iter().filter(excluded).cloned().collect();
        let mut locks = Vec::new();
        for disk in &disks {
            let lock = RunLock::of_image(&runtime, &disk.image);
            locks.push(lock.map_err(|error| vm::lock_failure(&error))?);
        }
        stillpoint_snapshot_access::sweep(&runtime);
        let launcher: [OsString; 2] = ["/proc/self/exe".into(), crate::WITH_PARENT.into()];
        let opened = OfflineImages::open(&runtime, &launcher, &disks).await;
        let (images, mut machine) = opened.map_err(|error| {
            let what = "no QEMU answers for this VM, and its images cannot be read without one";
            Failure::because(Exit::Failed, what, &error)
                .guest(Guest::Untouched)
                .next("if the VM runs, check its `qmp` socket; if it is off, check the images under `disks`")
        })?;
        machine.skipped.extend(skipped);
        let name = name.map_or("the VM", VmName::as_str);
        text::note(format!("{name} is off; its images are read by themselves"));
        let recover = "stillpoint backup, again".to_owned();
        let qmp = images.qmp.clone();
        Ok(Self { qmp, machine, recover, recorded, images: Some(images), _running: None, _off: locks })
    }

    /// What the guest does now, and whether it ran when the VM was looked at.
    pub(crate) async fn guest(&self) -> StateAtTheEnd {
        let now = if self.machine.off { GuestState::Off } else { GuestState::ask(&self.qmp).await };
        StateAtTheEnd { now, ran: self.machine.running }
    }

    /// Lets go of it.
    pub(crate) async fn release(self) {
        if let Some(images) = self.images {
            images.close().await;
        }
    }
}

async fn inspect(qmp: &Qmp) -> Result<Machine, Failure> {
    match Machine::inspect(qmp).await {
        Ok(machine) => Ok(machine),
        Err(error) => {
            let exit =
                if error.kind() == AccessErrorKind::LeftBehind { Exit::LeftBehind } else { Exit::Failed };
            let what = match error.kind() {
                AccessErrorKind::Silent => vm::SILENT,
                _ => "this VM cannot be backed up as it is",
            };
            let failure = Failure::because(exit, what, &error).guest(Guest::Untouched);
            Err(vm::with_state(failure, qmp).await)
        }
    }
}

async fn last_point(provider: &dyn Provider, name: &VmName) -> Option<PointRecord> {
    let points = provider.points(Some(name)).await.ok()?;
    let readable = points.into_iter().filter(|point| point.record.is_some());
    readable.max_by_key(|point| point.sequence)?.record
}

/// The disks of a VM that is off as its last point tells of them, and those that it is not enough to tell of.
fn recorded_disks(record: &PointRecord, vm: &Vm) -> Result<(Vec<OfflineDisk>, Vec<Skipped>), String> {
    let (mut disks, mut skipped) = (Vec::new(), Vec::new());
    let mut skip = |name: &str, reason: &str| {
        skipped.push(Skipped { name: name.to_owned(), reason: reason.to_owned() });
    };
    for disk in &record.disks {
        let why = |what: &str| {
            format!(
                "if this VM is off: its last point does not tell {what} of disk {}; name it under `disks`",
                disk.name
            )
        };
        if let Some(reason) = vm.excluded(&disk.name) {
            skip(disk.name.as_str(), reason);
            continue;
        }
        if disk.bitmap_mode == BitmapMode::None {
            skip(
                disk.name.as_str(),
                "it was read-only at the last point, which alone tells of its image; name it under `disks`",
            );
            continue;
        }
        let image = disk.image.clone().ok_or_else(|| why("the image"))?;
        // What the target says is believed only where the image itself bears it out, by a bitmap of ours.
        if disk.format != "qcow2" {
            return Err(why(&format!("for certain the image (a {} one)", disk.format.escape_debug())));
        }
        disks.push(OfflineDisk {
            name: disk.name.clone(),
            image,
            format: disk.format.clone(),
            key_file: None,
        });
    }
    for device in &record.skipped {
        skip(&device.name, "it is not in the last point, which alone tells of this VM's disks");
    }
    if disks.is_empty() {
        return Err("if this VM is off: name its images under `disks`".into());
    }
    Ok((disks, skipped))
}

/// Disks that the last point has and the configuration does not name for a VM that is off.
fn unnamed_disks(record: &PointRecord, vm: &Vm) -> Vec<Skipped> {
    let unnamed = |disk: &&DiskRecord| !vm.disks.contains_key(&disk.name);
    let skipped = |disk: &DiskRecord| Skipped {
        name: disk.name.to_string(),
        reason: match vm.excluded(&disk.name) {
            Some(reason) => reason.to_owned(),
            None => "it is in the last point, but not named under `disks` for when the VM is off".into(),
        },
    };
    record.disks.iter().filter(unnamed).map(skipped).collect()
}
