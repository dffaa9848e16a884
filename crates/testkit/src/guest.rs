//! A real guest: Linux in QEMU, with disks that it writes without pause.

use crate::{
    kernel::{Boot, boot, run},
    monitor::Monitor,
    qemu::{Mount, Qemu},
};
use anyhow::{Context as _, Result, bail, ensure};
use guest_writer::Layout;
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A kernel boots in some seconds under TCG; a loaded machine takes longer.
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(60);

/// Format of a disk's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// Raw.
    Raw,
    /// qcow2.
    Qcow2,
}

impl ImageFormat {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What the guest sees of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// `virtio-blk-pci`.
    VirtioBlk,
    /// `scsi-hd` on a `virtio-scsi-pci` of its own.
    ScsiHd,
    /// `nvme`.
    Nvme,
    /// `ide-hd`.
    IdeHd,
}

/// A disk to give to a guest.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    id: String,
    size: u64,
    format: ImageFormat,
    front_end: FrontEnd,
    legacy: bool,
    iothread: bool,
}

impl DiskSpec {
    /// A qcow2 disk on virtio-blk of `size` bytes; sizes tell disks apart in the guest, so they differ.
    pub fn new(id: &str, size: u64) -> Self {
        Self {
            id: id.to_owned(),
            size,
            format: ImageFormat::Qcow2,
            front_end: FrontEnd::VirtioBlk,
            legacy: false,
            iothread: false,
        }
    }

    /// With a raw image.
    #[must_use]
    pub fn raw(mut self) -> Self {
        self.format = ImageFormat::Raw;
        self
    }

    /// Behind this front end.
    #[must_use]
    pub fn front_end(mut self, front_end: FrontEnd) -> Self {
        self.front_end = front_end;
        self
    }

    /// By `-drive` instead of `-blockdev`.
    #[must_use]
    pub fn legacy(mut self) -> Self {
        self.legacy = true;
        self
    }

    /// With an iothread of its own.
    #[must_use]
    pub fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }
}

/// A guest to boot.
#[derive(Debug)]
pub struct GuestBuilder {
    qemu: Qemu,
    disks: Vec<DiskSpec>,
    extra: Vec<String>,
}

impl GuestBuilder {
    /// A guest without disks.
    pub fn new(qemu: Qemu) -> Self {
        Self { qemu, disks: Vec::new(), extra: Vec::new() }
    }

    /// With one more disk.
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// With more arguments to QEMU.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Boots, and waits until its writer is ready.
    ///
    /// # Errors
    /// If it does not come up; the error has the end of its console.
    pub fn boot(self) -> Result<Guest> {
        let work = tempfile::Builder::new().prefix("stillpoint-guest-").tempdir()?;
        let Boot { kernel, initramfs } = boot()?;
        let (kernel_here, initramfs_here) = (work.path().join("kernel"), work.path().join("initramfs"));
        fs::copy(kernel, &kernel_here)?;
        fs::copy(initramfs, &initramfs_here)?;
        let (mut command, mount) = self.qemu.command("qemu-system-x86_64", work.path())?;
        let console = work.path().join("console");
        let path = |name: &str| work.path().join(name).display().to_string();
        command.args([
            "-name",
            "guest",
            "-machine",
            "pc",
            "-accel",
            "tcg,thread=multi",
            "-smp",
            "2",
            "-m",
            "256",
        ]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        command.arg("-kernel").arg(&kernel_here).arg("-initrd").arg(&initramfs_here);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
        command.args(["-serial", &format!("file:{}", console.display())]);
        for monitor in ["qmp", "own-qmp"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path(monitor))]);
        }
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-chardev", &format!("socket,id=writer,path={},server=on,wait=off", path("writer"))]);
        command.args(["-device", "virtserialport,chardev=writer,name=stillpoint.writer"]);
        let mut images = Vec::new();
        for disk in &self.disks {
            images.push(add_disk(&mut command, disk, work.path())?);
        }
        command.args(&self.extra);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(work.path().join("stderr"))?);
        let child = command.spawn().context("start QEMU")?;
        let mut guest = Guest {
            qemu: self.qemu,
            child: Some(child),
            disks: self.disks,
            images,
            control: None,
            own: None,
            work,
            _mount: mount,
        };
        guest.await_ready().with_context(|| guest.last_words())?;
        Ok(guest)
    }
}

fn add_disk(command: &mut Command, disk: &DiskSpec, work: &Path) -> Result<PathBuf> {
    let image = work.join(format!("{}.{}", disk.id, disk.format.name()));
    if disk.format == ImageFormat::Raw {
        fs::File::create(&image)?.set_len(disk.size)?;
    } else {
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg(disk.size.to_string()))?;
    }
    let (id, format) = (&disk.id, disk.format.name());
    let drive = if disk.legacy {
        let file = image.display();
        command
            .args(["-drive", &format!("if=none,id=legacy-{id},file={file},format={format},discard=unmap")]);
        format!("legacy-{id}")
    } else {
        let file = json!({"driver": "file", "filename": image, "node-name": format!("file-{id}"), "discard": "unmap"});
        command.args(["-blockdev", &file.to_string()]);
        let node = json!({"driver": format, "file": format!("file-{id}"), "node-name": format!("node-{id}"), "discard": "unmap"});
        command.args(["-blockdev", &node.to_string()]);
        format!("node-{id}")
    };
    let thread = if disk.iothread {
        command.args(["-object", &format!("iothread,id=thread-{id}")]);
        format!(",iothread=thread-{id}")
    } else {
        String::new()
    };
    let device = match disk.front_end {
        FrontEnd::VirtioBlk => format!("virtio-blk-pci,id={id},drive={drive}{thread}"),
        FrontEnd::ScsiHd => {
            command.args(["-device", &format!("virtio-scsi-pci,id=bus-{id}{thread}")]);
            format!("scsi-hd,id={id},drive={drive},bus=bus-{id}.0")
        }
        FrontEnd::Nvme => format!("nvme,id={id},drive={drive},serial={id}"),
        FrontEnd::IdeHd => format!("ide-hd,id={id},drive={drive}"),
    };
    command.args(["-device", &device]);
    Ok(image)
}

/// A write storm that was started.
#[derive(Debug, Clone)]
pub struct Storm {
    /// Its plan.
    pub layout: Layout,
    /// Its name.
    pub run: u64,
}

/// What the guest counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StormCounts {
    /// Operations done.
    pub writes: u64,
    /// I/O errors that the guest saw.
    pub errors: u64,
    /// The longest that one operation took.
    pub longest: Duration,
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    qemu: Qemu,
    child: Option<Child>,
    disks: Vec<DiskSpec>,
    images: Vec<PathBuf>,
    control: Option<(UnixStream, BufReader<UnixStream>)>,
    own: Option<Monitor>,
    work: TempDir,
    _mount: Option<Mount>,
}

impl Guest {
    /// The monitor's socket for the tool under test.
    pub fn qmp(&self) -> PathBuf {
        self.work.path().join("qmp")
    }

    /// A directory that goes away with the guest.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// The disks' images, as given to QEMU.
    pub fn images(&self) -> Vec<PathBuf> {
        self.images.clone()
    }

    /// Its QEMU.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// QEMU's process; with a `chroot`, QEMU replaced that program.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn last_words(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.work.path().join(name)).unwrap_or_default();
        let console = read("console");
        let tail: Vec<_> = console.lines().rev().take(15).collect();
        format!(
            "the guest did not come up\nQEMU: {}\nconsole: {}",
            read("stderr"),
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        )
    }

    fn await_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT;
        let stream = loop {
            match UnixStream::connect(self.work.path().join("writer")) {
                Ok(stream) => break stream,
                Err(error) => {
                    let ended = self.child.as_mut().map(Child::try_wait).transpose()?.flatten();
                    ensure!(ended.is_none(), "QEMU ended: {ended:?}");
                    ensure!(Instant::now() < deadline, "no control socket: {error}");
                    // QEMU makes its sockets as it starts, and tells nobody.
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        stream.set_read_timeout(Some(BOOT))?;
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        ensure!(line.trim() == "ready", "the writer says {line:?}");
        stream.set_read_timeout(Some(ANSWER))?;
        self.control = Some((stream, lines));
        self.own = Some(Monitor::connect(&self.work.path().join("own-qmp"))?);
        Ok(())
    }

    /// The test's own monitor.
    ///
    /// # Errors
    /// If QEMU answers with an error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.own.as_mut().context("QEMU has ended")?.execute(command, arguments)
    }

    fn ask(&mut self, request: &str) -> Result<String> {
        let (stream, lines) = self.control.as_mut().context("the guest has ended")?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut answer = String::new();
        lines.read_line(&mut answer)?;
        let answer = answer.trim().to_owned();
        if let Some(why) = answer.strip_prefix("failed ") {
            bail!("the guest: {request}: {why}");
        }
        Ok(answer)
    }

    /// Starts to write on all disks; `rate` operations a second and stream, 0 for full speed.
    ///
    /// # Errors
    /// If the guest has no such disks.
    pub fn start_storm(&mut self, seed: u64, rate: u64) -> Result<Storm> {
        self.start_storm_within(seed, rate, 1024)
    }

    /// The same, each stream within `span` blocks of each disk.
    ///
    /// # Errors
    /// If the guest has no such disks.
    pub fn start_storm_within(&mut self, seed: u64, rate: u64, span: u64) -> Result<Storm> {
        static RUN: AtomicU64 = AtomicU64::new(1);
        let run = RUN.fetch_add(1, Ordering::Relaxed) + u64::from(std::process::id()) * 1_000_000;
        let sizes: Vec<String> = self.disks.iter().map(|disk| disk.size.to_string()).collect();
        let layout = Layout {
            seed,
            per_disk: 2,
            disk_blocks: self.disks.iter().map(|disk| disk.size / guest_writer::BLOCK as u64).collect(),
            span,
        };
        self.ask(&format!("start {run} {seed} 2 {span} {rate} none {}", sizes.join(" ")))?;
        Ok(Storm { layout, run })
    }

    /// What the storm counted so far.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn counts(&mut self) -> Result<StormCounts> {
        let answer = self.ask("status")?;
        parse_counts(&answer, "status")
    }

    /// Waits until the storm has done `more` operations more: a guest that does not run on fails here.
    ///
    /// # Errors
    /// If it does not within 60 s.
    pub fn await_writes(&mut self, more: u64) -> Result<StormCounts> {
        let goal = self.counts()?.writes + more;
        let deadline = Instant::now() + ANSWER;
        loop {
            let counts = self.counts()?;
            if counts.writes >= goal || counts.errors > 0 {
                return Ok(counts);
            }
            ensure!(Instant::now() < deadline, "the guest writes no more: {counts:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the storm, with everything acknowledged.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn stop_storm(&mut self) -> Result<StormCounts> {
        let answer = self.ask("stop")?;
        parse_counts(&answer, "stopped")
    }

    /// Writes `length` bytes at `offset` of a disk, once.
    ///
    /// # Errors
    /// If the guest cannot.
    pub fn fill(&mut self, disk: usize, offset: u64, length: u64) -> Result<()> {
        let size = self.disks.get(disk).context("no such disk")?.size;
        self.ask(&format!("fill {size} {offset} {length}")).map(|_| ())
    }

    /// Ends QEMU as a host's power cut would.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn kill(&mut self) -> Result<()> {
        self.control = None;
        self.own = None;
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Ends QEMU in order, which stores persistent bitmaps.
    ///
    /// # Errors
    /// If it does not end within 60 s.
    pub fn quit(&mut self) -> Result<()> {
        self.execute("quit", json!({}))?;
        self.control = None;
        self.own = None;
        let mut child = self.child.take().context("QEMU has ended")?;
        let deadline = Instant::now() + ANSWER;
        while child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "QEMU does not quit");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Names of all nodes that were named, all exports, and per disk the bitmaps of its node: what must be the same after
    /// a run as before.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn block_graph(&mut self) -> Result<BlockGraph> {
        let text =
            |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let list = |value: Value| value.as_array().cloned().unwrap_or_default();
        let mut nodes: Vec<_> = list(self.execute("query-named-block-nodes", json!({"flat": true}))?)
            .iter()
            .map(|node| text(node, "node-name"))
            .collect();
        nodes.sort();
        let exports = list(self.execute("query-block-exports", json!({}))?).len();
        let fd_sets = list(self.execute("query-fdsets", json!({}))?).len();
        let mut drives = Vec::new();
        let mut bitmaps = Vec::new();
        for block in list(self.execute("query-block", json!({}))?) {
            let Some(inserted) = block.get("inserted") else { continue };
            drives.push((text(&block, "qdev"), text(inserted, "node-name")));
            for bitmap in list(inserted.get("dirty-bitmaps").cloned().unwrap_or_default()) {
                bitmaps.push((text(&block, "qdev"), text(&bitmap, "name")));
            }
        }
        Ok(BlockGraph { nodes, exports, fd_sets, drives, bitmaps })
    }
}

/// What is in a VM's block layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockGraph {
    /// Names of all nodes.
    pub nodes: Vec<String>,
    /// Number of exports.
    pub exports: usize,
    /// Number of descriptor sets.
    pub fd_sets: usize,
    /// Front ends and their nodes.
    pub drives: Vec<(String, String)>,
    /// Front ends and their bitmaps.
    pub bitmaps: Vec<(String, String)>,
}

impl BlockGraph {
    /// Without the bitmaps.
    #[must_use]
    pub fn without_bitmaps(mut self) -> Self {
        self.bitmaps.clear();
        self
    }
}

fn parse_counts(answer: &str, word: &str) -> Result<StormCounts> {
    let numbers: Vec<u64> = answer.split_whitespace().filter_map(|number| number.parse().ok()).collect();
    match (answer.starts_with(word), numbers.as_slice()) {
        (true, [writes, errors, longest]) => {
            Ok(StormCounts { writes: *writes, errors: *errors, longest: Duration::from_micros(*longest) })
        }
        _ => bail!("the guest answers {answer:?}"),
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
