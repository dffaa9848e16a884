//! A QEMU without a guest in it: up in a moment, for tests of everything but what a guest writes.

use crate::{
    guest::ANSWER,
    monitor::Monitor,
    qemu::{Mount, Qemu},
};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A running QEMU that sits in its firmware; killed when dropped.
#[derive(Debug)]
pub struct BareMachine {
    line: Vec<OsString>,
    child: Option<Child>,
    own: Option<Monitor>,
    _mount: Option<Mount>,
    work: TempDir,
}

impl BareMachine {
    /// Starts one with what `arguments` returns for its directory.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(qemu: &Qemu, arguments: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<Self> {
        let work = tempfile::Builder::new().prefix("stillpoint-bare-").tempdir()?;
        let arguments = arguments(work.path())?;
        let (mut command, mount) = qemu.command("qemu-system-x86_64", work.path())?;
        command.args(["-name", "bare", "-accel", "tcg", "-m", "128", "-nodefaults", "-display", "none"]);
        for monitor in ["qmp", "own-qmp"] {
            let path = work.path().join(monitor);
            command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
        }
        command.args(arguments);
        let line = [command.get_program()].into_iter().chain(command.get_args()).map(Into::into).collect();
        let mut machine = Self { line, child: None, own: None, _mount: mount, work };
        machine.start_again()?;
        Ok(machine)
    }

    /// One with raw disks on virtio-blk, by their names and sizes.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn with_disks(qemu: &Qemu, disks: &[(&str, u64)]) -> Result<Self> {
        Self::start(qemu, |work| {
            let mut arguments = Vec::new();
            for (name, size) in disks {
                let image = work.join(format!("{name}.raw"));
                fs::File::create(&image)?.set_len(*size)?;
                let drive = format!("if=none,id=drive-{name},format=raw,file={}", image.display());
                let device = format!("virtio-blk-pci,id={name},drive=drive-{name}");
                arguments.extend(["-drive".into(), drive, "-device".into(), device]);
            }
            Ok(arguments)
        })
    }

    /// Starts QEMU again after [`BareMachine::quit`], with the same arguments.
    ///
    /// # Errors
    /// If it runs, or does not come up.
    pub fn start_again(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "QEMU runs");
        let (program, arguments) = self.line.split_first().context("a program")?;
        let stderr = fs::File::create(self.work.path().join("stderr"))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let child = self.child.insert(command.spawn().context("start QEMU")?);
        let deadline = Instant::now() + ANSWER;
        loop {
            match Monitor::connect(&self.work.path().join("own-qmp")) {
                Ok(own) => {
                    self.own = Some(own);
                    return Ok(());
                }
                Err(error) => {
                    let said = || fs::read_to_string(self.work.path().join("stderr")).unwrap_or_default();
                    ensure!(child.try_wait()?.is_none(), "QEMU ended: {}", said());
                    ensure!(Instant::now() < deadline, "no monitor: {error:#}");
                    // QEMU makes its sockets as it starts, and tells nobody.
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// The monitor's socket for the tool under test.
    pub fn qmp(&self) -> PathBuf {
        self.work.path().join("qmp")
    }

    /// The socket of its other monitor, which the test itself holds.
    pub fn own_qmp(&self) -> PathBuf {
        self.work.path().join("own-qmp")
    }

    /// Lets go of the other monitor.
    pub fn release_own(&mut self) {
        self.own = None;
    }

    /// A directory that goes away with it.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// QEMU's process.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The test's own monitor.
    ///
    /// # Errors
    /// If QEMU answers with an error.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.own.as_mut().context("nobody holds the other monitor")?.execute(command, arguments)
    }

    /// Its state, such as `running`.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Ends QEMU as a host's power cut would, but that what it wrote to files stays.
    ///
    /// # Errors
    /// If it cannot be killed.
    pub fn kill(&mut self) -> Result<()> {
        self.own = None;
        let mut child = self.child.take().context("QEMU has ended")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Does what a guest's driver would on virtio disk `disk`: a command of `qemu-io`, such as `write -P 7 0 64k`.
    ///
    /// # Errors
    /// If the disk answers with an error.
    pub fn disk_io(&mut self, disk: &str, command: &str) -> Result<()> {
        let line = format!("qemu-io -d /machine/peripheral/{disk}/virtio-backend \"{command}\"");
        let said = self.execute("human-monitor-command", json!({"command-line": line}))?;
        let said = said.as_str().unwrap_or_default();
        let failed = ["failed", "rror", "nvalid", "not "].iter().any(|sign| said.contains(sign));
        ensure!(!failed, "{command} on {disk}: {said}");
        Ok(())
    }

    /// Ends QEMU in order.
    ///
    /// # Errors
    /// If it does not end within 60 s.
    pub fn quit(&mut self) -> Result<()> {
        self.execute("quit", json!({}))?;
        self.own = None;
        let mut child = self.child.take().context("QEMU has ended")?;
        let deadline = Instant::now() + ANSWER;
        while child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "QEMU does not quit");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for BareMachine {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
