//! A QEMU with disks, and a configuration by which Stillpoint keeps points of it.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};
use stillpoint_testkit::{BareMachine, Qemu, Tool, workspace};

/// What the peers call the export.
const EXPORT: &str = "disk";
/// How a program can get a disk.
pub(super) const MECHANISMS: [&str; 3] = ["nbd", "file-handle", "block-device"];
const PASSWORD: &str = "benchmark";

/// A machine without a guest, and where its points go.
pub(super) struct Place {
    pub(super) machine: BareMachine,
    tool: Tool,
    config: PathBuf,
    pub(super) work: PathBuf,
}

impl Place {
    /// One disk with the content of `image`, as virtio disk `vda`.
    pub(super) fn with_image(qemu: &Qemu, work: &Path, image: &Path) -> Result<Self> {
        let machine = BareMachine::start(qemu, |directory| {
            let own = directory.join("vda.raw");
            // The same file where that is possible.
            if fs::hard_link(image, &own).is_err() {
                fs::copy(image, &own)?;
            }
            Ok(disk("vda", &own))
        })?;
        Self::around(machine, work)
    }

    /// Empty disks `vda`, `vdb`, ...
    pub(super) fn with_sizes(qemu: &Qemu, work: &Path, sizes: &[u64]) -> Result<Self> {
        let machine = BareMachine::start(qemu, |directory| {
            let mut arguments = Vec::new();
            for (name, size) in names().zip(sizes) {
                let own = directory.join(format!("{name}.raw"));
                fs::File::create(&own)?.set_len(*size)?;
                arguments.extend(disk(&name, &own));
            }
            Ok(arguments)
        })?;
        Self::around(machine, work)
    }

    fn around(machine: BareMachine, work: &Path) -> Result<Self> {
        let work = work.to_owned();
        let tool = Tool::new(workspace().join("target/release/stillpoint"), machine.work());
        let config = work.join("config.toml");
        let password = work.join("password");
        fs::write(&password, PASSWORD)?;
        fs::set_permissions(&password, PermissionsExt::from_mode(0o600))?;
        let place = |name: &str| work.join(name).display().to_string();
        let text = format!(
            "[vm.vm]\nqmp = {:?}\nfleecing.directory = {:?}\n\n\
             [target.directory]\nprovider = \"directory\"\ndirectory = {:?}\n\n\
             [target.repository]\nprovider = \"restic\"\nrepository = {:?}\npassword-file = {password:?}\n\n{}",
            machine.qmp(),
            work,
            place("directory"),
            place("repository"),
            MECHANISMS.map(|mechanism| nowhere(mechanism, &work)).concat(),
        );
        fs::write(&config, text)?;
        Ok(Self { machine, tool, config, work })
    }

    /// `stillpoint LINE` with this place's configuration.
    pub(super) fn stillpoint(&self, line: &[&str]) -> Command {
        let config = ["--config".as_ref(), self.config.as_os_str()];
        self.tool.command(config.into_iter().chain(line.iter().map(AsRef::as_ref)))
    }

    /// Runs it, and takes its JSON apart.
    pub(super) fn json(&self, line: &[&str]) -> Result<Value> {
        let output = self.stillpoint(line).output()?;
        let error = || format!("{line:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).ok().filter(|_| output.status.success()).with_context(error)
    }

    /// Empties a target and makes it anew.
    pub(super) fn renew(&self, target: &str) -> Result<()> {
        let path = self.work.join(target);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        // Where a target was before, none is made in passing.
        if target == "directory" || target == "repository" {
            let status = self.stillpoint(&["target", "init", target]).output()?.status;
            anyhow::ensure!(status.success(), "target init {target}");
        }
        Ok(())
    }

    /// QEMU's own export of the disk for a while, at this address.
    pub(super) fn serve(&mut self) -> Result<String> {
        let socket = self.machine.work().join("peers");
        let address = json!({"type": "unix", "data": {"path": socket}});
        self.machine.execute("nbd-server-start", json!({"addr": address}))?;
        let export = json!({"type": "nbd", "id": EXPORT, "name": EXPORT, "node-name": "node-vda"});
        self.machine.execute("block-export-add", export)?;
        Ok(format!("nbd+unix:///{EXPORT}?socket={}", socket.display()))
    }

    /// The end of it: QEMU has one server only.
    pub(super) fn stop_serving(&mut self) -> Result<()> {
        self.machine.execute("nbd-server-stop", json!({})).map(drop)
    }

    /// The environment in which restic opens `repository` of this place.
    pub(super) fn restic(&self, repository: &str) -> Vec<(&'static str, String)> {
        let path = self.work.join(repository).display().to_string();
        vec![("RESTIC_REPOSITORY", path), ("RESTIC_PASSWORD", PASSWORD.to_owned())]
    }
}

pub(super) fn names() -> impl Iterator<Item = String> {
    ('a'..='z').map(|letter| format!("vd{letter}"))
}

fn disk(name: &str, image: &Path) -> Vec<String> {
    let node = format!(
        "driver=raw,node-name=node-{name},discard=unmap,file.driver=file,file.discard=unmap,file.filename={}",
        image.display()
    );
    let device = format!("virtio-blk-pci,id={name},drive=node-{name}");
    vec!["-blockdev".into(), node, "-device".into(), device]
}

/// A provider that reads everything to nowhere, through one mechanism.
fn nowhere(mechanism: &str, work: &Path) -> String {
    let program = workspace().join("xtask/src/bench/nowhere.py");
    let providers = workspace().join("examples/providers");
    let seconds = work.join("seconds");
    format!(
        "[target.{mechanism}]\nprovider = {{ program = {program:?}, options = {{ mechanism = {mechanism:?}, seconds = {seconds:?} }}, \
         environment = {{ PROVIDERS = {providers:?} }}, quiet-timeout = 600 }}\n\n"
    )
}
