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
pub(super) const CORES: &str = "hashing, compressing and encrypting on all cores, and nothing else";

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

fn cores(disk: &Path) -> Result<Vec<(String, f64, &'static str)>> {
    let program = workspace().join("target/release/examples/limit");
    let output = Command::new(program).arg(disk).output()?;
    let text = String::from_utf8(output.stdout)?;
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse::<f64>().ok())
            .with_context(|| format!("no {name} in {text:?}"))
    };
    let all = value("bytes")? / MIB as f64 / value("seconds")?;
    Ok(vec![
        ("SHA-256, one core".into(), value("hash")? / MIB as f64, "MiB/s"),
        ("zstd level 1, one core".into(), value("compress")? / MIB as f64, "MiB/s"),
        ("AES-256-CTR and Poly1305, one core".into(), value("encrypt")? / MIB as f64, "MiB/s"),
        (CORES.to_owned(), all, "MiB/s"),
    ])
}
