//! A real guest: Linux in QEMU, with disks that it writes without pause.

use crate::{
    accelerator::accelerator,
    disk::{DiskSpec, add_disk},
    kernel::{boot, boot_with_agent},
    monitor::Monitor,
    qemu::{Mount, Qemu},
    watch::Watch,
};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A kernel boots in some seconds under TCG; a loaded machine takes longer. Rarely, one in hundreds, it hangs before its
/// `init`, with nothing but QEMU there yet: it is then booted once more, and that is told.
const BOOTS: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(120)];
/// What QEMU or the guest's writer may take to answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(240);

/// A guest to boot.
#[derive(Debug)]
pub struct GuestBuilder {
    qemu: Qemu,
    disks: Vec<DiskSpec>,
    extra: Vec<String>,
    agent: bool,
    images: Option<PathBuf>,
}

impl GuestBuilder {
    /// A guest without disks.
    pub fn new(qemu: Qemu) -> Self {
        Self { qemu, disks: Vec::new(), extra: Vec::new(), agent: false, images: None }
    }

    /// With one more disk.
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// With its images in a directory of the test's, instead of one that goes away with the guest.
    #[must_use]
    pub fn images_in(mut self, directory: &Path) -> Self {
        self.images = Some(directory.to_owned());
        self
    }

    /// With more arguments to QEMU.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// With QEMU's guest agent, and files that it writes without pause to the disk that has a
    /// [file system](DiskSpec::ext4).
    #[must_use]
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// Boots, and waits until its writer is ready.
    ///
    /// # Errors
    /// If it does not come up; the error has the end of its console.
    pub fn boot(self) -> Result<Guest> {
        // The writer in the guest knows its disks by their sizes.
        let sizes: BTreeSet<_> = self.disks.iter().map(|disk| disk.size / 512).collect();
        ensure!(sizes.len() == self.disks.len(), "two disks have the same size");
        let work = tempfile::Builder::new().prefix("stillpoint-guest-").tempdir()?;
        let boot = if self.agent { boot_with_agent()? } else { boot()? };
        let accelerator = accelerator(&self.qemu, &boot)?;
        let (kernel, initramfs) = (work.path().join("kernel"), work.path().join("initramfs"));
        // Another process may replace the cached ones while this guest boots.
        fs::copy(boot.kernel, &kernel)?;
        fs::copy(boot.initramfs, &initramfs)?;
        let (mut command, mount) = self.qemu.command("qemu-system-x86_64", work.path())?;
        let watch = Watch::over(work.path(), mount.as_ref().map(Mount::path))?;
        let path = |name: &str| work.path().join(name).display().to_string();
        command.args([
            "-name",
            "guest,debug-threads=on",
            "-machine",
            "pc",
            "-accel",
            accelerator,
            "-smp",
            "2",
            "-m",
            "256",
        ]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        command.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initramfs);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
        command.args(["-serial", &format!("file:{}", path("console"))]);
        for monitor in ["qmp", "own-qmp"] {
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path(monitor))]);
        }
        command.args(["-device", "virtio-serial-pci"]);
        command.args(["-chardev", &format!("socket,id=writer,path={},server=on,wait=off", path("writer"))]);
        command.args(["-device", "virtserialport,chardev=writer,name=stillpoint.writer"]);
        if self.agent {
            command.args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", path("agent"))]);
            command.args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        }
        let directory = self.images.as_deref().unwrap_or(work.path());
        let images = self.disks.iter().map(|disk| add_disk(&mut command, disk, directory));
        let images = images.collect::<Result<_>>()?;
        command.args(&self.extra);
        let line = [command.get_program()].into_iter().chain(command.get_args()).map(Into::into).collect();
        let mut guest = Guest {
            qemu: self.qemu,
            line,
            child: None,
            disks: self.disks,
            images,
            control: None,
            own: None,
            overlays: 0,
            _watch: watch,
            _mount: mount,
            work,
        };
        guest.start()?;
        Ok(guest)
    }
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    qemu: Qemu,
    /// QEMU's program and arguments.
    line: Vec<OsString>,
    child: Option<Child>,
    pub(crate) disks: Vec<DiskSpec>,
    images: Vec<PathBuf>,
    control: Option<(UnixStream, BufReader<UnixStream>)>,
    own: Option<Monitor>,
    /// How many overlays were put on its disks.
    pub(crate) overlays: usize,
    _watch: Watch,
    _mount: Option<Mount>,
    work: TempDir,
}

impl Guest {
    /// The monitor's socket for the tool under test.
    pub fn qmp(&self) -> PathBuf {
        self.work.path().join("qmp")
    }

    /// Socket of its [agent](GuestBuilder::agent).
    pub fn agent(&self) -> PathBuf {
        self.work.path().join("agent")
    }

    /// Waits until its agent answers: the file system is mounted then.
    ///
    /// # Errors
    /// If it does not.
    pub fn await_agent(&self) -> Result<()> {
        let mut stream = UnixStream::connect(self.agent())?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(b"{\"execute\":\"guest-sync\",\"arguments\":{\"id\":7}}\n")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).context("the agent does not answer")?;
        ensure!(answer.contains('7'), "the agent answers {answer:?}");
        Ok(())
    }

    /// Those that the storm writes to.
    pub(crate) fn stamped_disks(&self) -> impl Iterator<Item = &DiskSpec> {
        self.disks.iter().filter(|disk| !disk.ext4)
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

    /// What the guest's kernel and its writer said on the console.
    pub fn console(&self) -> String {
        fs::read_to_string(self.work.path().join("console")).unwrap_or_default()
    }

    /// Lines of the console in which the kernel speaks of I/O errors, timeouts or hung tasks: what its drivers may have
    /// retried, so that no write failed, is a harmed guest all the same.
    pub fn complaints(&self) -> Vec<String> {
        let signs = ["I/O error", "timed out", "timeout", "blocked for more than", "resetting", "critical"];
        let console = self.console();
        let lines = console.lines().filter(|line| signs.iter().any(|sign| line.contains(sign)));
        lines.map(str::to_owned).collect()
    }

    /// Starts QEMU again after [`Guest::quit`] or [`Guest::kill`], with the same disks.
    ///
    /// # Errors
    /// If it runs, or does not come up.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "QEMU runs");
        let [first, second] = BOOTS;
        match self.boot(first) {
            Err(error) if error.downcast_ref::<io::Error>().is_some_and(timed_out) => {
                eprintln!("the guest did not boot within {} s, and is booted once more", first.as_secs());
                self.kill()?;
                self.boot(second)
            }
            booted => booted,
        }
        .with_context(|| self.last_words())
    }

    fn boot(&mut self, within: Duration) -> Result<()> {
        let (program, arguments) = self.line.split_first().context("a program")?;
        let mut command = Command::new(program);
        let stderr = fs::File::options().create(true).append(true).open(self.work.path().join("stderr"))?;
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        self.child = Some(command.spawn().context("start QEMU")?);
        self.await_ready(within)
    }

    fn last_words(&self) -> String {
        let console = self.console();
        let stderr = fs::read_to_string(self.work.path().join("stderr")).unwrap_or_default();
        let tail: Vec<_> = console.lines().rev().take(15).collect();
        format!(
            "the guest did not come up\nQEMU: {}\nconsole: {}",
            stderr,
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        )
    }

    fn await_ready(&mut self, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
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
        stream.set_read_timeout(Some(within))?;
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

    /// Tells the writer in the guest, and returns what it answers.
    pub(crate) fn ask(&mut self, request: &str) -> Result<String> {
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

    /// Lets the guest power itself off. What comes of it is QEMU's business.
    ///
    /// # Errors
    /// If the guest has ended.
    pub fn power_off(&mut self) -> Result<()> {
        self.tell("poweroff")
    }

    /// Lets the guest reboot itself.
    ///
    /// # Errors
    /// If the guest has ended.
    pub fn reboot(&mut self) -> Result<()> {
        self.tell("reboot")
    }

    fn tell(&mut self, request: &str) -> Result<()> {
        let (stream, _) = self.control.as_mut().context("the guest has ended")?;
        Ok(stream.write_all(format!("{request}\n").as_bytes())?)
    }

    /// Waits for an event of QEMU.
    ///
    /// # Errors
    /// If QEMU ends, or is silent for 20 s.
    pub fn wait_for(&mut self, event: &str) -> Result<Value> {
        self.own.as_mut().context("QEMU has ended")?.wait_for(event)
    }

    /// Waits until QEMU has ended by itself.
    ///
    /// # Errors
    /// If it does not within 60 s.
    pub fn await_end(&mut self) -> Result<()> {
        self.control = None;
        self.own = None;
        let child = self.child.as_mut().context("QEMU has ended")?;
        let deadline = Instant::now() + ANSWER;
        while child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "QEMU does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.child = None;
        Ok(())
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
        self.await_end()
    }
}

/// What a socket says when its time is up (socket(7), `SO_RCVTIMEO`).
fn timed_out(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
