//! `cargo xtask bench`: where Stillpoint stands beside what a user would take instead, what a backup costs the guest, and
//! what limits both.
//!
//! ```text
//!   data.rs     a disk that resembles a real one        guest.rs    a guest that reads and writes
//!   place.rs    a QEMU with it, and a configuration     report.rs   JSON and Markdown
//!   measure.rs  time, CPU time, memory of a command     plot.rs     SVG
//!   work.rs     backup, restore, verify, beside others  limits.rs   what this machine could do at most
//! ```
//!
//! Contenders take turns (A B A B), so that what slows the machine down slows them all; each gets the same disk from the same
//! QEMU, writes to the same file system, and has to leave its output durable, which is checked, like the output itself.

mod data;
mod guest;
mod limits;
mod measure;
mod place;
mod plot;
mod report;
mod work;

use crate::{cargo, step};
use anyhow::{Context as _, Result};
use clap::Args;
use report::Report;
use std::{fs, path::PathBuf, time::Instant};
use stillpoint_testkit::{Qemu, requirements, trixie_root, workspace};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[derive(Args)]
pub(crate) struct Options {
    /// Less data and fewer rounds: some ten minutes
    #[arg(long)]
    quick: bool,
    /// Write all figures there, the ratios in `ratios`
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where plots and `report.md` go
    #[arg(long, value_name = "DIRECTORY", default_value = "target/bench")]
    output: PathBuf,
    /// Put figures and plots into docs/benchmarks.md
    #[arg(long)]
    docs: bool,
    /// Only these parts: limits, handover, full, repository, incremental, growth, restore, verify, guest
    #[arg(long, value_delimiter = ',', value_name = "PART")]
    only: Vec<String>,
    /// With the QEMU 10 that `cargo xtask qemu10` installs, instead of this machine's
    #[arg(long)]
    qemu10: bool,
    /// A directory on the storage to measure; there are some six times the disk's size in it for a while
    #[arg(long, value_name = "DIRECTORY", default_value = "/var/tmp")]
    directory: PathBuf,
}

/// How much is done.
pub(crate) struct Scale {
    /// Bytes of the disk.
    disk: u64,
    /// Turns of each contender.
    rounds: usize,
    /// Sizes of sparse disks, GiB.
    sizes: &'static [u64],
    /// Numbers of disks.
    counts: &'static [usize],
    /// Backups of which the pause is taken.
    pauses: usize,
    /// Seconds of each phase of the guest's side.
    phase: u64,
}

const FULL: Scale = Scale {
    disk: 4 * GIB,
    rounds: 5,
    sizes: &[16, 64, 256, 1024, 4096],
    counts: &[1, 2, 4, 8],
    pauses: 100,
    phase: 15,
};
const QUICK: Scale =
    Scale { disk: GIB, rounds: 3, sizes: &[16, 256, 4096], counts: &[1, 8], pauses: 30, phase: 6 };

pub(crate) fn run(options: &Options) -> Result<()> {
    requirements::ensure()?;
    build()?;
    let scale = if options.quick { QUICK } else { FULL };
    let qemu = if options.qemu10 {
        requirements::ensure_trixie(&trixie_root())?;
        Qemu::trixie().context("QEMU 10 was installed, and is not there")?
    } else {
        Qemu::installed()?
    };
    let began = Instant::now();
    let work = tempfile::Builder::new().prefix("stillpoint-bench-").tempdir_in(&options.directory)?;
    let mut report = Report::begin(&qemu, options.quick)?;
    let wanted = |part: &str| options.only.is_empty() || options.only.iter().any(|only| only == part);
    {
        let disk = work.path().join("disk.raw");
        println!("== a disk of {} MiB", scale.disk / MIB);
        report.data = data::make(&disk, scale.disk, &data::Mix::default())?;
        let mut bench = work::Bench::start(&qemu, work.path(), &disk, &scale)?;
        if wanted("limits") {
            limits::measure(&mut bench, &mut report)?;
        }
        if wanted("handover") {
            bench.handover(&mut report)?;
        }
        if wanted("full") {
            bench.full_into_directory(&mut report)?;
        }
        if wanted("repository") {
            bench.full_into_repository(&mut report)?;
        }
        if wanted("restore") || wanted("verify") {
            bench.restore_and_verify(&mut report)?;
        }
        // Last, since it changes the disk.
        if wanted("incremental") {
            bench.incremental(&mut report)?;
        }
        bench.end()?;
    }
    if wanted("handover") {
        work::handover_of_a_hole(&qemu, work.path(), &scale, &mut report)?;
    }
    if wanted("growth") {
        work::growth_with_size(&qemu, work.path(), &scale, &mut report)?;
        work::growth_with_disks(&qemu, work.path(), &scale, &mut report)?;
    }
    if wanted("guest") {
        guest::measure(&qemu, work.path(), &scale, &mut report)?;
    }
    report.took_seconds = began.elapsed().as_secs_f64();
    write(options, &report)
}

/// The release build, as users have it.
fn build() -> Result<()> {
    let build = ["build", "--release", "--locked", "--package", "stillpoint"];
    step("build the release", &mut cargo(&build))?;
    let limit =
        ["build", "--release", "--locked", "--package", "stillpoint-provider-restic", "--example", "limit"];
    step("build what measures the cores' limit", &mut cargo(&limit))
}

fn write(options: &Options, report: &Report) -> Result<()> {
    let output = workspace().join(&options.output);
    fs::create_dir_all(&output)?;
    let markdown = report.markdown();
    let write = |path: PathBuf, text: &str| {
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    let plots = plot::all(report);
    for (name, svg) in &plots {
        write(output.join(name), svg)?;
    }
    write(output.join("report.md"), &markdown)?;
    if let Some(path) = &options.json {
        write(path.clone(), &serde_json::to_string_pretty(report)?)?;
    }
    if options.docs {
        let docs = workspace().join("docs");
        fs::create_dir_all(docs.join("benchmarks"))?;
        for (name, svg) in &plots {
            write(docs.join("benchmarks").join(name), svg)?;
        }
        let page = docs.join("benchmarks.md");
        let text = fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))?;
        write(page, &report::put_between_marks(&text, &markdown)?)?;
    }
    println!("\n{markdown}\nplots and report: {}", output.display());
    Ok(())
}
