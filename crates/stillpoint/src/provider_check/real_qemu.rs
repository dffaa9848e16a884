//! A provider program with a QEMU that has no guest: a full point, an increment, and both given back.

use crate::{backup::Job, config::Vm, interrupt::Interrupt, summary::Summary};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_model::{DiskName, ExtentKind, Offset, PointId, Range, VmName};
use stillpoint_provider::{BitmapMode, Provider};
use stillpoint_provider_program::{ProgramProvider, Settings};
use stillpoint_qmp::{Deadlines, Qmp};

const QEMU: &str = "qemu-system-x86_64";
/// Its monitor is made at once.
const START: Duration = Duration::from_secs(20);
/// Name, format and size of each disk.
const DISKS: [(&str, &str, &str); 2] = [("vda", "qcow2", "8M"), ("vdb", "raw", "4194816")];

/// Whether all that is needed is there.
pub(super) fn is_there() -> bool {
    let runs = |program: &str| {
        let version =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    runs(QEMU) && runs("qemu-img") && runs("qemu-io")
}

/// Puts the program through it.
///
/// # Errors
/// What is wrong with it, or with this host.
pub(super) async fn check(settings: &Settings) -> Result<(), String> {
    let work = tempfile::Builder::new().prefix("check-").tempdir_in(&settings.runtime_directory);
    let work = work.map_err(|error| error.to_string())?;
    let images: Vec<PathBuf> = DISKS.iter().map(|(name, ..)| work.path().join(name)).collect();
    for ((_, format, size), image) in DISKS.iter().zip(&images) {
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(image).arg(size))?;
        write(image, format, "write -P 17 300k 700k")?;
    }
    let mut random = [0u8; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(|e| e.to_string())?;
    let name: VmName = format!("check-qemu-{:08x}", u32::from_ne_bytes(random)).parse().map_err(text)?;
    let provider = ProgramProvider::new(settings.clone());
    let mut points = Vec::new();
    for (round, mode) in [("full", BitmapMode::New), ("increment", BitmapMode::Reuse)] {
        let summary = Machine::start(work.path(), &images)?.point(&name, &provider).await;
        let summary = summary.map_err(|why| format!("{round}: {why}"))?;
        let taken = summary.disks.first().map(|disk| disk.bitmap_mode);
        // A program that takes no increments is as right.
        if taken != Some(mode)
            && !summary.disks.iter().all(|disk| disk.reason.contains("takes no increments"))
        {
            return Err(format!("{round}: disk vda was read otherwise: {taken:?}"));
        }
        let contents: Result<Vec<_>, _> =
            DISKS.iter().zip(&images).map(|((_, format, _), image)| raw(image, format)).collect();
        points.push((summary.record.id, contents?));
        for ((_, format, _), image) in DISKS.iter().zip(&images) {
            // Through QEMU's own tools, which mark it in the persistent bitmap.
            write(image, format, "write -P 34 1M 70k")?;
            write(image, format, "write -z 300k 64k")?;
        }
    }
    for (point, contents) in &points {
        let same = compare(&provider, &name, point, contents).await;
        if !matches!(&same, Err(why) if why.contains("cannot give points back")) {
            same?;
        }
    }
    provider.close().await;
    Ok(())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(text)?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{:?}: {}", command.get_program(), String::from_utf8_lossy(&output.stderr).trim()))
}

fn write(image: &Path, format: &str, command: &str) -> Result<(), String> {
    run(Command::new("qemu-io").args(["-f", format, "-c", command]).arg(image))
}

fn raw(image: &Path, format: &str) -> Result<Vec<u8>, String> {
    let copy = image.with_extension("copy");
    run(Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(image).arg(&copy))?;
    std::fs::read(copy).map_err(text)
}

/// A QEMU whose CPUs do not run; killed when dropped.
struct Machine {
    child: Child,
    monitor: PathBuf,
}

impl Machine {
    fn start(work: &Path, images: &[PathBuf]) -> Result<Self, String> {
        let monitor = work.join("qmp");
        let _ = std::fs::remove_file(&monitor);
        let mut command = Command::new(QEMU);
        command.args([
            "-S",
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "32",
            "-nodefaults",
            "-display",
            "none",
        ]);
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        for ((name, format, _), image) in DISKS.iter().zip(images) {
            let drive = format!("if=none,id=drive-{name},format={format},file={}", image.display());
            command.args([
                "-drive",
                &drive,
                "-device",
                &format!("virtio-blk-pci,id={name},drive=drive-{name}"),
            ]);
        }
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(text)?;
        Ok(Self { child, monitor })
    }

    /// One point; QEMU has ended in order after it.
    async fn point(mut self, name: &VmName, provider: &ProgramProvider) -> Result<Summary, String> {
        let deadline = Instant::now() + START;
        while !self.monitor.exists() {
            if Instant::now() > deadline || self.child.try_wait().map_err(text)?.is_some() {
                return Err("QEMU does not start".into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let vm = Vm::at(self.monitor.clone(), None);
        let name = Some(name.clone());
        let job =
            Job { name, vm: &vm, provider, directory: None, places: None, full: false, progress: false };
        let interrupt = Interrupt::listen().map_err(text)?;
        let summary = job.run(&interrupt).await.map_err(|failure| failure.what().to_owned())?;
        let qmp = Qmp::connect(&self.monitor, Deadlines::default()).await.map_err(text)?;
        let _ = qmp.execute(stillpoint_qmp::Command::new("quit")).await;
        let deadline = Instant::now() + START;
        while self.child.try_wait().map_err(text)?.is_none() {
            if Instant::now() > deadline {
                return Err("QEMU does not end".into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(summary)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn compare(
    provider: &ProgramProvider,
    name: &VmName,
    point: &PointId,
    contents: &[Vec<u8>],
) -> Result<(), String> {
    let told = |error: stillpoint_provider::Error| crate::failure::chain(&error);
    let restore = provider.restore_vm_init(name, point).await.map_err(told)?;
    for ((disk, ..), wanted) in DISKS.iter().zip(contents) {
        let disk: DiskName = disk.parse().map_err(text)?;
        let volume = restore.volume(&disk).await.map_err(told)?;
        let mut at = Offset::ZERO;
        while at.get() < volume.size().get() {
            let extents = volume.regions(at).await.map_err(told)?;
            let extent = extents.first().ok_or("the map ends")?;
            for piece in extent.range.chunks(stillpoint_model::Length::new(1 << 20)) {
                let same = if extent.kind == ExtentKind::Data {
                    volume.read(piece).await.map_err(told)? == part(wanted, piece)
                } else {
                    part(wanted, piece).iter().all(|byte| *byte == 0)
                };
                if !same {
                    return Err(format!("disk {disk} of {point} is not what it was, in {piece}"));
                }
            }
            at = extent.range.end();
        }
        drop(volume);
        restore.volume_cleanup(&disk).await;
    }
    restore.cleanup().await;
    Ok(())
}

fn part(content: &[u8], range: Range) -> &[u8] {
    let at = |offset: Offset| usize::try_from(offset.get()).unwrap_or(usize::MAX);
    content.get(at(range.start())..at(range.end())).unwrap_or_default()
}
