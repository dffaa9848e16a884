//! The program under test, run as a user runs it.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The `stillpoint` program, with a runtime directory and a memory of its own.
#[derive(Debug, Clone)]
pub struct Tool {
    program: PathBuf,
    runtime: PathBuf,
    state: PathBuf,
    environment: Vec<(String, String)>,
}

/// What came of running it.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The exit status.
    pub status: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
}

impl Outcome {
    /// The JSON that it printed.
    ///
    /// # Errors
    /// If it did not succeed, or printed something else.
    pub fn json(&self) -> Result<Value> {
        ensure!(self.status == 0, "status {}: {}", self.status, self.stderr);
        serde_json::from_str(&self.stdout).with_context(|| format!("not JSON: {}", self.stdout))
    }
}

impl Tool {
    /// `program`, keeping its sockets, its locks and what it remembers below `runtime`.
    pub fn new(program: impl Into<PathBuf>, runtime: &Path) -> Self {
        let (run, state) = (runtime.join("run"), runtime.join("state"));
        Self { program: program.into(), runtime: run, state, environment: Vec::new() }
    }

    /// Adds a variable to its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A command to add to, with nothing of the caller's terminal.
    pub fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).stdin(Stdio::null());
        command.env("STILLPOINT_RUNTIME_DIRECTORY", &self.runtime);
        command.env("STILLPOINT_STATE_DIRECTORY", &self.state);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// If it cannot be started; not if it fails.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Outcome> {
        let output =
            self.command(arguments).output().with_context(|| format!("run {}", self.program.display()))?;
        Ok(Outcome {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Backs up the guest behind `qmp` as `vm` into `target` and returns the summary.
    ///
    /// # Errors
    /// If it fails.
    pub fn backup(&self, vm: &str, qmp: &Path, target: &Path, more: &[&str]) -> Result<Value> {
        let mut arguments = vec![OsStr::new("backup"), OsStr::new(vm), OsStr::new("--qmp"), qmp.as_os_str()];
        arguments.extend([OsStr::new("--to"), target.as_os_str(), OsStr::new("--json")]);
        arguments.extend(more.iter().map(OsStr::new));
        self.run(arguments)?.json()
    }

    /// Restores a point into `output`.
    ///
    /// # Errors
    /// If it fails.
    pub fn restore(&self, point: &str, target: &Path, output: &Path) -> Result<()> {
        let outcome = self.run([
            OsStr::new("restore"),
            OsStr::new(point),
            OsStr::new("--to"),
            target.as_os_str(),
            OsStr::new("--output"),
            output.as_os_str(),
        ])?;
        ensure!(outcome.status == 0, "restore {point}: {}", outcome.stderr);
        Ok(())
    }
}
