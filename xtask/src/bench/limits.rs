//! What this machine could do at most, so that each result stands as a share of it.

use super::{MIB, report::Report, work::Bench};
use anyhow::{Context as _, Result};
use std::{path::Path, process::Command};
use stillpoint_testkit::workspace;

/// Name of the rate at which QEMU's export can be read.
pub(super) const READ: &str = "reading QEMU's export to nowhere (`nbdcopy`)";
/// Name of the rate at which files can be written.
pub(super) const WRITE: &str = "writing a file, past the page cache, durable (`dd`)";
/// Name of the rate of all cores at the work of a repository.
const CORES: &str = "hashing, compressing and encrypting on all cores, and nothing else";

/// Measures and notes all of them, in MiB of the disk's data a second.
pub(super) fn measure(bench: &mut Bench<'_>, report: &mut Report) -> Result<()> {
    println!("== limits");
    let data = (report.data.size - report.data.holes) as f64;
    let read = bench.read_to_nowhere()?;
    report.limits.push((READ.to_owned(), data / read, "MiB/s"));
    let write = bench.write_durably()?;
    report.limits.push((WRITE.to_owned(), data / write, "MiB/s"));
    for (name, value, unit) in cores(&bench.disk)? {
        report.limits.push((name, value, unit));
    }
    println!("   read {:.0}, write {:.0} MiB/s", data / read, data / write);
    Ok(())
}

/// Seconds in which all cores hash, compress and encrypt the disk's data in memory.
pub(super) fn cores_alone(disk: &Path) -> Result<f64> {
    value(&run(disk)?, "seconds")
}

fn run(disk: &Path) -> Result<String> {
    let program = workspace().join("target/release/examples/limit");
    Ok(String::from_utf8(Command::new(program).arg(disk).output()?.stdout)?)
}

fn value(text: &str, name: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("no {name} in {text:?}"))
}

fn cores(disk: &Path) -> Result<Vec<(String, f64, &'static str)>> {
    let text = run(disk)?;
    let mib = |name| Ok::<_, anyhow::Error>(value(&text, name)? / MIB as f64);
    Ok(vec![
        ("SHA-256, one core".into(), mib("hash")?, "MiB/s"),
        ("zstd level 1, one core".into(), mib("compress")?, "MiB/s"),
        ("AES-256-CTR and Poly1305, one core".into(), mib("encrypt")?, "MiB/s"),
        (CORES.to_owned(), mib("bytes")? / value(&text, "seconds")?, "MiB/s"),
    ])
}
