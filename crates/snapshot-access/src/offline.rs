//! VMs that are off: their images, opened by a `qemu-storage-daemon` of our own.
//!
//! It holds QEMU's locks on the images, so nobody starts the VM underneath unnoticed, and keeps the same chain of
//! persistent bitmaps as a running QEMU. No guest writes, so nothing is kept aside and nothing is paused.
//!
//! # Crash
//! The daemon gets a SIGTERM when its parent dies (`PR_SET_PDEATHSIG`), and then ends in order: bitmaps are stored, and
//! the images are free. The signal comes when the *thread* that started it ends, so that has to be one that lives as
//! long as the program: its main thread.

use crate::{
    access::error_chain,
    error::{Error, ErrorKind, Result},
    inspect::{Machine, refused},
    listener::private_directory,
};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use serde_json::json;
use std::{
    ffi::OsString,
    os::unix::{fs::FileTypeExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use stillpoint_model::DiskName;
use stillpoint_qmp::{Command, Deadlines, ErrorKind as QmpErrorKind, Qmp};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt as _, process::Child};

const DAEMON: &str = "qemu-storage-daemon";
/// The daemon makes its monitor at once.
const START: Duration = Duration::from_secs(20);
/// It may have gigabytes to flush.
const END: Duration = Duration::from_secs(300);
/// One that does not answer flushes nothing.
const SILENT_END: Duration = Duration::from_secs(20);
/// Opening an image on slow storage takes long, and nobody else waits for it.
const COMMAND: Duration = Duration::from_secs(60);
/// How often the monitor's socket is tried while the daemon starts: it tells nobody when it is there.
const RETRY: Duration = Duration::from_millis(10);

/// The image of a disk, for when no QEMU tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfflineDisk {
    /// The disk.
    pub name: DiskName,
    /// Its image.
    pub image: PathBuf,
    /// QEMU's driver for it (`qcow2`, `raw`, ...). It is never guessed: a guest decides what its disk looks like.
    pub format: String,
    /// File with the key of an encrypted image (LUKS): all its bytes are the passphrase, as for QEMU's own `secret` object.
    pub key_file: Option<PathBuf>,
}

impl OfflineDisk {
    /// QEMU's driver for what the image is in: `file` takes no block devices.
    fn protocol(&self) -> &'static str {
        let device = std::fs::metadata(&self.image).is_ok_and(|found| found.file_type().is_block_device());
        if device { "host_device" } else { "file" }
    }

    /// The option by which QEMU's driver of its format gets the key, if there is one.
    fn key_option(&self, secret: &str) -> Result<Option<(&'static str, serde_json::Value)>> {
        let Some(path) = &self.key_file else { return Ok(None) };
        match self.format.as_str() {
            "luks" => Ok(Some(("key-secret", json!(secret)))),
            "qcow2" => Ok(Some(("encrypt", json!({"format": "luks", "key-secret": secret})))),
            other => Err(refused(format!(
                "disk {} has the key file {}, but an image of format {} takes none; LUKS on a raw image is format \"luks\"",
                self.name,
                path.display(),
                other.escape_debug()
            ))),
        }
    }

    /// Whether the image can only be read, as that of a template.
    fn is_read_only(&self) -> bool {
        let no_bits = std::fs::metadata(&self.image).is_ok_and(|found| found.permissions().readonly());
        no_bits || rustix::fs::access(&self.image, rustix::fs::Access::WRITE_OK).is_err()
    }
}

/// The images of a VM that is off, held open.
pub struct OfflineImages {
    /// The daemon's monitor.
    pub qmp: Qmp,
    child: Child,
    _directory: TempDir,
}

impl OfflineImages {
    /// Opens the images. `launcher` is the command that calls [`run_with_parent`] with what follows it. To be called on
    /// the program's main thread.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if an image is in use, which says that the VM is not off, or cannot be opened;
    /// [`ErrorKind::Host`] if there is no `qemu-storage-daemon`.
    pub async fn open(
        runtime: &Path,
        launcher: &[OsString],
        disks: &[OfflineDisk],
    ) -> Result<(Self, Machine)> {
        private_directory(runtime)?;
        let directory = tempfile::Builder::new().prefix("offline-").tempdir_in(runtime);
        let directory =
            directory.map_err(|error| Error::new(ErrorKind::Host, "create a directory").because(error))?;
        let socket = directory.path().join("qmp");
        let mut child = start(launcher, &socket)?;
        let qmp = match reach(&mut child, &socket).await {
            Ok(qmp) => qmp,
            Err(error) => {
                let _ = child.kill().await;
                return Err(error);
            }
        };
        let images = Self { qmp, child, _directory: directory };
        match images.add(disks).await {
            Ok(machine) => Ok((images, machine)),
            Err(error) => {
                images.close().await;
                Err(error)
            }
        }
    }

    async fn add(&self, disks: &[OfflineDisk]) -> Result<Machine> {
        let mut nodes = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            let node = format!("disk-{index}");
            let read_only = disk.is_read_only();
            let file = json!({"driver": disk.protocol(), "filename": disk.image});
            let mut options =
                json!({"driver": disk.format, "node-name": node, "read-only": read_only, "file": file});
            let secret = format!("key-{index}");
            if let (Some(key), Some((name, value))) = (&disk.key_file, disk.key_option(&secret)?) {
                let object = json!({"qom-type": "secret", "id": secret, "file": key});
                let added = self.qmp.execute(Command::with("object-add", object)).await;
                let why = format!("the key of disk {} cannot be read from {}", disk.name, key.display());
                added.map_err(|error| refused(why).because(error))?;
                if let Some(options) = options.as_object_mut() {
                    options.insert(name.to_owned(), value);
                }
            }
            let added = self.qmp.execute(Command::with("blockdev-add", options)).await;
            added.map_err(|error| {
                let says = |word: &str| error.desc().is_some_and(|desc| desc.contains(word));
                let in_use = says("lock");
                let image = disk.image.display();
                let why = if in_use {
                    format!("image {image} is in use: the VM is not off, or another program works on it")
                } else if says("key-secret") {
                    format!(
                        "image {image} of disk {} is encrypted; name the file with its key: disks.{} = {{ ..., key-file = \"...\" }}",
                        disk.name, disk.name
                    )
                } else {
                    format!("image {image} of disk {} cannot be opened as {}", disk.name, disk.format)
                };
                refused(why).because(error)
            })?;
            nodes.push((disk.clone(), node));
        }
        Machine::inspect_offline(&self.qmp, &nodes).await
    }

    /// Closes the images, which stores their bitmaps, and waits until the daemon is gone.
    pub async fn close(mut self) {
        match self.qmp.execute(Command::new("quit")).await {
            Err(error) if error.kind() != QmpErrorKind::Disconnected => {
                tracing::warn!(
                    error = error_chain(&error),
                    "qemu-storage-daemon does not quit; it is terminated"
                );
                if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
                    let _ = rustix::process::kill_process(pid, Signal::TERM);
                }
            }
            _ => {}
        }
        let within = if self.qmp.is_silent() { SILENT_END } else { END };
        if tokio::time::timeout(within, self.child.wait()).await.is_err() {
            tracing::warn!(
                "qemu-storage-daemon does not end; it is killed, and the next backup is a full one"
            );
            let _ = self.child.kill().await;
        }
    }
}

fn start(launcher: &[OsString], socket: &Path) -> Result<Child> {
    let failed = |error| Error::new(ErrorKind::Host, format!("start {DAEMON}")).because(error);
    let (program, arguments) =
        launcher.split_first().ok_or_else(|| Error::new(ErrorKind::Inconsistent, "no launcher is given"))?;
    let mut chardev = OsString::from("socket,id=monitor,server=on,wait=off,path=");
    chardev.push(socket);
    tokio::process::Command::new(program)
        .args(arguments)
        .arg(std::process::id().to_string())
        .arg(DAEMON)
        .arg("--chardev")
        .arg(chardev)
        .args(["--monitor", "chardev=monitor"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Not in our process group: Ctrl-C is for us, and we end it in order.
        .process_group(0)
        .spawn()
        .map_err(failed)
}

async fn reach(child: &mut Child, socket: &Path) -> Result<Qmp> {
    let end = tokio::time::Instant::now() + START;
    loop {
        let ended = child.try_wait().map_err(|error| Error::new(ErrorKind::Host, DAEMON).because(error))?;
        if ended.is_some() {
            let mut said = String::new();
            if let Some(stderr) = &mut child.stderr {
                let _ = stderr.take(4096).read_to_string(&mut said).await;
            }
            let context = format!(
                "{DAEMON} does not start: {}; on Debian it is in package qemu-system-common",
                said.trim().escape_debug()
            );
            return Err(Error::new(ErrorKind::Host, context));
        }
        match Qmp::connect(socket, Deadlines { command: COMMAND, ..Deadlines::default() }).await {
            Ok(qmp) => return Ok(qmp),
            Err(error) if matches!(error.kind(), QmpErrorKind::NoSocket | QmpErrorKind::Refused) => {}
            Err(error) => return Err(Error::new(ErrorKind::Host, format!("reach {DAEMON}")).because(error)),
        }
        if tokio::time::Instant::now() > end {
            return Err(Error::new(ErrorKind::Host, format!("{DAEMON} does not make its monitor")));
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Becomes the program that follows the parent's process id in `arguments`, to be terminated when that parent dies.
/// Returns only if it cannot.
pub fn run_with_parent(arguments: &[OsString]) -> Option<std::io::Error> {
    let (parent, rest) = arguments.split_first()?;
    let (program, arguments) = rest.split_first()?;
    let parent: i32 = parent.to_str()?.parse().ok()?;
    if let Err(error) = set_parent_process_death_signal(Some(Signal::TERM)) {
        return Some(error.into());
    }
    // It may have died before it could be told of.
    if getppid().map(Pid::as_raw_pid) != Some(parent) {
        return Some(std::io::Error::other("the parent is gone"));
    }
    Some(std::process::Command::new(program).args(arguments).exec())
}
