//! Is everything in place? Touches nothing; each finding comes with what to type next.

mod target;

use crate::{
    cli,
    config::{Config, Vm},
    failure::{Exit, Failure},
    runtime,
    text::print,
    vm,
};
use std::path::Path;
use stillpoint_snapshot_access::{LeftOvers, Machine};

/// What was found out about one thing.
struct Report {
    bad: usize,
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
    let mut report = Report { bad: 0 };
    let mut vms: Vec<(String, Vm)> = Vec::new();
    if let Some(socket) = &arguments.qmp {
        vms.push((socket.display().to_string(), Vm::at(socket.clone(), None)));
    } else if arguments.vms.is_empty() {
        vms.extend(config.vm.iter().map(|(name, vm)| (name.to_string(), vm.clone())));
    } else {
        for name in &arguments.vms {
            vms.push((name.to_string(), config.vm(name, path)?.clone()));
        }
    }
    if vms.is_empty() {
        return Err(Failure::usage(format!("{} has no VM to look at", path.display()))
            .next("stillpoint doctor --qmp SOCKET, or add [vm.NAME] there"));
    }
    for (name, vm) in &vms {
        print(format!("VM {name}"));
        // One that is named by its socket has no section in the configuration file.
        let section =
            if arguments.qmp.is_some() { "a [vm.NAME] of its own" } else { &format!("[vm.{name}]") };
        look_at_vm(section, vm, &mut report).await;
    }
    if arguments.place.to.is_some() || arguments.place.target.is_some() || !config.target.is_empty() {
        target::look(&config, path, arguments, &mut report).await;
    }
    if report.bad == 0 {
        print("everything is in place");
        return Ok(Exit::Done);
    }
    Err(Failure::new(Exit::Failed, format!("{} findings", report.bad)))
}

async fn look_at_vm(section: &str, vm: &Vm, report: &mut Report) {
    match &vm.qmp {
        Some(socket) if socket.exists() || vm.disks.is_empty() => {
            look_at_qemu(section, socket, vm, report).await
        }
        None if vm.disks.is_empty() => report.bad("it has neither `qmp` nor `disks`", None),
        _ => look_at_images(vm, report),
    }
    look_at_fleecing(section, vm, report);
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

async fn look_at_qemu(section: &str, socket: &Path, vm: &Vm, report: &mut Report) {
    let qmp = match vm::connect(socket).await {
        Ok(qmp) => qmp,
        Err(failure) => return report.failure(&failure),
    };
    report.good(format!("monitor at {} answers, QEMU {}", socket.display(), qmp.version()));
    match LeftOvers::find(&qmp, &runtime::directory()).await {
        Ok(found) if found.is_empty() => report.good("no earlier run left anything in it"),
        Ok(found) => {
            let next = format!("stillpoint recover --qmp {}", socket.display());
            report.bad(format!("an earlier run left: {}", found.describe().join(", ")), Some(&next));
        }
        Err(error) => report.bad(crate::failure::chain(&error), None),
    }
    let machine = match Machine::inspect(&qmp).await {
        Ok(machine) => machine,
        Err(error) => return report.bad(crate::failure::chain(&error), None),
    };
    for disk in &machine.disks {
        let excluded = if vm.exclude.contains(&disk.name) { ", excluded" } else { "" };
        report.good(format!(
            "disk {} ({}, {}{excluded})",
            disk.name,
            crate::text::bytes(disk.size),
            disk.format
        ));
    }
    for (disk, why) in &machine.obstacles {
        if !vm.exclude.contains(disk) {
            let next = format!("exclude = [\"{disk}\"] under {section}, or change that");
            report.bad(format!("disk {disk}: {why}"), Some(&next));
        }
    }
}

fn look_at_fleecing(section: &str, vm: &Vm, report: &mut Report) {
    let fleecing = &vm.fleecing.directory;
    match rustix::fs::statvfs(fleecing) {
        Ok(system) => {
            let free = stillpoint_model::Length::new(system.f_bavail.saturating_mul(system.f_frsize));
            report.good(format!(
                "{} for fleecing images, {} free",
                fleecing.display(),
                crate::text::bytes(free)
            ));
        }
        Err(error) => {
            let next = format!(
                "mkdir -p {}, or name another under {section}: fleecing = {{ directory = ... }}",
                fleecing.display()
            );
            report.bad(
                format!("no directory {} for fleecing images: {error}", fleecing.display()),
                Some(&next),
            );
        }
    }
}
