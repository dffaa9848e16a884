//! Which QEMU a test runs.

use crate::kernel::run;
use anyhow::{Context as _, Result};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Where `cargo xtask qemu10` puts a Debian 13 with QEMU 10.
const TRIXIE: &str = "/opt/trixie";

/// A QEMU to run guests with.
#[derive(Debug, Clone)]
pub struct Qemu {
    root: Option<PathBuf>,
    /// Its version, as it prints it.
    pub version: String,
}

impl Qemu {
    /// The machine's own.
    ///
    /// # Errors
    /// If there is none.
    pub fn installed() -> Result<Self> {
        let text = run(Command::new("qemu-system-x86_64").arg("--version"));
        let text = text.context("there is no QEMU; type: apt-get install qemu-system-x86")?;
        Ok(Self { root: None, version: version(&text) })
    }

    /// QEMU 10 of Debian 13, in a directory, run by `chroot`; `None` if it is not there.
    pub fn trixie() -> Option<Self> {
        let root = trixie_root();
        if !root.join("usr/bin/qemu-system-x86_64").exists() || !rustix::process::geteuid().is_root() {
            return None;
        }
        let text = run(Command::new("chroot").arg(&root).args(["qemu-system-x86_64", "--version"])).ok()?;
        Some(Self { root: Some(root), version: version(&text) })
    }

    /// What one of its programs prints.
    ///
    /// # Errors
    /// If it fails.
    pub fn prints(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = match &self.root {
            None => Command::new(program),
            Some(root) => {
                let mut command = Command::new("chroot");
                command.arg(root).arg(program);
                command
            }
        };
        run(command.args(arguments))
    }

    /// Whether it sees another file system than we do.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.root.is_some()
    }

    /// A command for `program` of this QEMU's package that sees `work` at its own path.
    pub(crate) fn command(&self, program: &str, work: &Path) -> Result<(Command, Option<Mount>)> {
        let Some(root) = &self.root else { return Ok((Command::new(program), None)) };
        let mount = Mount::bind(work, &root.join(work.strip_prefix("/").unwrap_or(work)))?;
        let mut command = Command::new("chroot");
        command.arg(root).arg(program);
        Ok((command, Some(mount)))
    }
}

/// Where QEMU 10 is looked for: `/opt/trixie`, or what `STILLPOINT_TRIXIE` says.
pub fn trixie_root() -> PathBuf {
    std::env::var_os("STILLPOINT_TRIXIE").unwrap_or_else(|| TRIXIE.into()).into()
}

fn version(text: &str) -> String {
    text.split_whitespace().nth(3).unwrap_or("?").trim_end_matches(',').to_owned()
}

/// A bind mount; ends when dropped.
#[derive(Debug)]
pub(crate) struct Mount(PathBuf);

impl Mount {
    fn bind(from: &Path, to: &Path) -> Result<Self> {
        fs::create_dir_all(to)?;
        run(Command::new("mount").arg("--bind").arg(from).arg(to))?;
        Ok(Self(to.to_owned()))
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("-l").arg(&self.0)) {
            eprintln!("{error:#}");
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// Says that a test cannot be done here, and why. The line is what `cargo xtask test` counts.
pub fn skip(test: &str, reason: &str) {
    println!("skipped {test}: {reason}");
}
