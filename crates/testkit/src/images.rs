//! Comparing images without our own code: the independent reference.

use crate::{ImageFormat, kernel::run};
use anyhow::{Context as _, Result, bail};
use std::{path::Path, process::Command};

/// Copies an image to a raw file. A raw image may be in use, by a VM that is paused if the copy is to be of one instant.
///
/// # Errors
/// If `qemu-img` cannot make it.
pub fn raw_copy(image: &Path, format: ImageFormat, copy: &Path) -> Result<()> {
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-U", "-f", format.name(), "-O", "raw"]).arg(image).arg(copy);
    run(&mut convert).map(|_| ())
}

/// Whether two raw files hold the same bytes, as `qemu-img compare` sees it; files of different sizes do not.
///
/// # Errors
/// If they cannot be read.
pub fn same(one: &Path, other: &Path) -> Result<bool> {
    if std::fs::metadata(one)?.len() != std::fs::metadata(other)?.len() {
        return Ok(false);
    }
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-U", "-q", "-f", "raw", "-F", "raw"]).arg(one).arg(other);
    let status = compare.status().context("run qemu-img compare")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("{compare:?}: {status}"),
    }
}
