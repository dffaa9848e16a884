//! Is everything in place? Touches nothing; each finding comes with what to type next.

mod target;

use crate::{
    bitmaps, cli,
    config::{Config, Vm},
    failure::{Exit, Failure},
    runtime,
    selection::{self, Selection},
    text::print,
    vm::{self, Found},
};
use std::path::Path;
use stillpoint_model::VmName;
use stillpoint_snapshot_access::{LeftOvers, Machine, PointBitmap, Reserve};

/// What was found out about one thing.
struct Report {
    bad: usize,
    /// VMs that a run works on, so that they could not be looked at.
    busy: usize,
}

impl Report {
    fn good(&self, what: impl std::fmt::Display) {
        print(format!("  ok    {what}"));
    }

    fn bad(&mut self, what: impl std::fmt::Display, next: Option<&str>) {
        self.bad = self.bad.saturating_add(1);
        print(format!("  WRONG {what}"));
        if let Some(next) = next {
            print(format!("        next: {next}"));
        }
    }

    fn warn(&self, what: impl std::fmt::Display) {
        print(format!("  note  {what}"));
    }

    fn busy(&mut self, what: impl std::fmt::Display) {
        self.busy = self.busy.saturating_add(1);
        print(format!("  busy  {what}"));
    }

    fn failure(&mut self, failure: &Failure) {
        self.bad = self.bad.saturating_add(1);
        let text = failure.to_string();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim_start_matches("error: ").trim_start();
            print(if index == 0 { format!("  WRONG {line}") } else { format!("        {line}") });
        }
    }
}

/// `doctor`.
pub(crate) async fn run(path: &Path, arguments: &cli::Doctor) -> Result<Exit, Failure> {
    let config = Config::read(path)?;
    let mut report = Report { bad: 0, busy: 0 };
    let mut vms: Vec<(Option<&VmName>, Vm)> = Vec::new();
    if let Some(socket) = &arguments.qmp {
        vms.push((None, Vm::at(socket.clone(), None)));
    } else if arguments.vms.is_empty() {
        vms.extend(config.vm.iter().map(|(name, vm)| (Some(name), vm.clone())));
    } else {
        for name in &arguments.vms {
            vms.push((Some(name), config.vm(name, path)?.clone()));
        }
    }
    if vms.is_empty() {
        return Err(Failure::usage(format!("{} has no VM to look at", path.display()))
            .next("stillpoint doctor --qmp SOCKET, or add [vm.NAME] there"));
    }
    for (name, vm) in &vms {
        match (name, &vm.qmp) {
            (Some(name), _) => print(format!("VM {name}")),
            (None, socket) => {
                print(format!("VM at {}", socket.as_deref().unwrap_or(Path::new("?")).display()))
            }
        }
        look_at_vm(*name, vm, &mut report).await;
    }
    if arguments.place.to.is_some() || arguments.place.target.is_some() || !config.target.is_empty() {
        target::look(&config, path, arguments, &mut report).await;
    }
    match (report.bad, report.busy) {
        (0, 0) => {
            print("everything is in place");
            Ok(Exit::Done)
        }
        (0, busy) => Err(Failure::new(
            Exit::Locked,
            format!("a run works on {busy} of the VMs, which were not looked at; nothing else is wrong"),
        )
        .next("stillpoint doctor, when that run has ended")),
        (bad, _) => Err(Failure::new(Exit::Failed, format!("{bad} findings"))),
    }
}

async fn look_at_vm(name: Option<&VmName>, vm: &Vm, report: &mut Report) {
    match &vm.qmp {
        Some(socket) if socket.exists() || vm.disks.is_empty() => {
            look_at_qemu(name, socket, vm, report).await
        }
        None if vm.disks.is_empty() => report.bad("it has neither `qmp` nor `disks`", None),
        _ => look_at_images(vm, report),
    }
    look_at_fleecing(name, vm, report);
    for file in vm.config.iter().chain(&vm.firewall).chain(&vm.tpm) {
        if let Err(error) = std::fs::metadata(file) {
            report.bad(format!("file {}: {error}", file.display()), None);
        }
    }
}

/// Of a VM that is off.
fn look_at_images(vm: &Vm, report: &mut Report) {
    for (disk, image) in &vm.disks {
        let path = image.image.display();
        match std::fs::metadata(&image.image) {
            Ok(_) => report.good(format!("the VM is off; disk {disk} is {path} ({})", image.format)),
            Err(error) => report.bad(format!("the VM is off; disk {disk}: {path}: {error}"), None),
        }
    }
}

async fn look_at_qemu(name: Option<&VmName>, socket: &Path, vm: &Vm, report: &mut Report) {
    // With the lock, since a monitor serves one client, and a run that began meanwhile would be disturbed.
    let locked = match vm::look(socket).await {
        Ok(Found::Running(locked)) => locked,
        Ok(Found::Absent(failure)) => return report.failure(&failure),
        Err(failure) if failure.exit == Exit::Locked => {
            return report.busy(format!("a run is under way: {}", failure.what()));
        }
        Err(failure) => return report.failure(&failure),
    };
    let qmp = &locked.qmp;
    report.good(format!("monitor at {} answers, QEMU {}", socket.display(), qmp.version()));
    match LeftOvers::find(qmp, &runtime::directory()).await {
        Ok(found) if found.is_empty() => report.good("no earlier run left anything in it"),
        Ok(found) => {
            let next = format!("stillpoint recover --qmp {}", socket.display());
            report.bad(format!("an earlier run left: {}", found.describe().join(", ")), Some(&next));
            // What there is, is seen when that is undone, which the next run does first.
            return;
        }
        Err(error) => report.bad(crate::failure::chain(&error), None),
    }
    let machine = match Machine::inspect(qmp).await {
        Ok(machine) => machine,
        Err(error) => return report.bad(crate::failure::chain(&error), None),
    };
    match PointBitmap::all(qmp).await {
        Ok(found) => found_bitmaps(&found, report),
        Err(error) => report.bad(crate::failure::chain(&error), None),
    }
    let selection = Selection::of(vm, &machine);
    for disk in &selection.disks {
        let read_only = if disk.read_only { ", read-only" } else { "" };
        let size = crate::text::bytes(disk.size);
        report.good(format!("disk {} ({size}, {}{read_only})", disk.name, disk.format));
    }
    for skipped in &selection.skipped {
        report.warn(format!("not backed up: {} ({})", skipped.name.escape_debug(), skipped.reason));
    }
    for warning in &selection.warnings {
        report.warn(warning);
    }
    for (disk, why) in &selection.obstacles {
        report.bad(format!("disk {disk}: {why}"), Some(&selection::leave_out(disk, name)));
    }
}

fn found_bitmaps(found: &[PointBitmap], report: &mut Report) {
    if let Some(line) = bitmaps::summary(found) {
        report.good(line);
    }
}

fn look_at_fleecing(name: Option<&VmName>, vm: &Vm, report: &mut Report) {
    let fleecing = &vm.fleecing.directory;
    match Reserve::of(fleecing, vm.fleecing.reserve) {
        Ok(reserve) => look_at_space(name, vm, &reserve, report),
        Err(error) => {
            let next = format!(
                "mkdir -p {}, or name another under [vm.{}]: fleecing = {{ directory = ... }}",
                fleecing.display(),
                name.map_or("NAME", VmName::as_str)
            );
            report.bad(
                format!(
                    "no directory {} for fleecing images: {}",
                    fleecing.display(),
                    crate::failure::chain(&error)
                ),
                Some(&next),
            );
        }
    }
}

fn look_at_space(name: Option<&VmName>, vm: &Vm, reserve: &Reserve, report: &mut Report) {
    let bytes = crate::text::bytes;
    let section = name.map_or("NAME", VmName::as_str);
    let directory = vm.fleecing.directory.display();
    for space in reserve.states() {
        let (free, least) = (space.free, space.reserve);
        let place = space.directory.display();
        let what = format!(
            "{place} has {} free for old data, and {} of it is left alone",
            bytes(free),
            bytes(least)
        );
        match free.get().checked_sub(least.get()) {
            Some(usable) if usable > 0 => {
                let usable = bytes(stillpoint_model::Length::new(usable));
                report.good(format!("{what}: a backup ends when its old data takes more than {usable}"));
            }
            _ => report.bad(
                format!("{what}: no backup can begin"),
                Some(&format!(
                    "make room in {place}, or name another directory under [vm.{section}]: fleecing = {{ directory = \"/PATH\" }}"
                )),
            ),
        }
        if least == stillpoint_model::Length::ZERO && shares_space(&space.directory, vm) {
            report.warn(format!(
                "{place} has images of this VM, and nothing is left alone there (reserve = \"0\" under [vm.{section}]): old data could \
                 stop the guest"
            ));
        }
    }
    for pool in reserve.unseen() {
        if vm.fleecing.budget.is_none() {
            report.warn(format!(
                "{directory} is on thin pool {}, whose free space is not seen from here: if images are in it too, set a budget under \
                 [vm.{section}]: fleecing = {{ budget = \"SIZE\" }}",
                pool.escape_debug()
            ));
        }
    }
}

/// Whether an image of the VM that the configuration names is on the file system of `directory`.
fn shares_space(directory: &Path, vm: &Vm) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| std::fs::metadata(path).map(|found| found.dev()).ok();
    let here = device(directory);
    here.is_some() && vm.disks.values().any(|disk| device(&disk.image) == here)
}
