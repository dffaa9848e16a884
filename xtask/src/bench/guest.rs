//! What a backup costs the guest: a real one, that reads and writes.

use super::{
    MIB, Scale,
    measure::median,
    report::{Report, Timeline},
};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Histogram, Qemu, StormSpec, Tool, workspace};

/// How often the guest is asked.
const WINDOW: Duration = Duration::from_millis(250);
/// Writes a second of each of seven streams, and reads a second of each of three disks, under the steady load: a third
/// of what the guest can do.
const STEADY: u64 = 20;
/// Data on each disk besides what the storm writes, so that a full backup takes a while.
const FILLED: u64 = 384 * MIB;

struct Load<'a> {
    guest: &'a mut Guest,
    tool: Tool,
    began: Instant,
    timeline: Timeline,
}

/// What the guest felt in one phase.
#[derive(Default)]
struct Felt {
    seconds: f64,
    writes: Histogram,
    reads: Histogram,
}

impl Felt {
    fn add(&mut self, more: &Self) {
        self.seconds += more.seconds;
        self.writes.add(&more.writes);
        self.reads.add(&more.reads);
    }
}

/// A process for each core that computes and does nothing else: what any load of the host costs the guest.
struct Spinners(Vec<Child>);

impl Spinners {
    fn start() -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut spinners = Self(Vec::new());
        for _ in 0..cores {
            spinners.0.push(Command::new("sh").args(["-c", "while :; do :; done"]).spawn()?);
        }
        Ok(spinners)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(super) fn measure(qemu: &Qemu, work: &Path, scale: &Scale, report: &mut Report) -> Result<()> {
    println!("== what the guest feels");
    let mut guest = GuestBuilder::new(qemu.clone())
        .disk(DiskSpec::new("vda", 1024 * MIB))
        .disk(DiskSpec::new("vdb", 768 * MIB).raw())
        .disk(DiskSpec::new("vdc", 640 * MIB))
        .boot()?;
    for disk in 0..3 {
        // Between the regions that the storm writes to.
        guest.fill(disk, 16 * MIB, FILLED / 3)?;
        guest.fill(disk, 16 * MIB + FILLED, FILLED / 3)?;
    }
    let tool = Tool::new(workspace().join("target/release/stillpoint"), guest.work());
    let target = work.join("guests-points");
    std::fs::create_dir(&target)?;
    let target = target.display().to_string();
    let mut lines = Vec::new();
    for (load, rate) in [("steady", STEADY), ("full speed", 0)] {
        guest.start_storm_with(StormSpec::new(77).rate(rate))?;
        guest.start_reading(rate)?;
        guest.await_writes(200)?;
        let (tool, timeline) = (tool.clone(), Timeline::default());
        let mut measured = Load { guest: &mut guest, tool, began: Instant::now(), timeline };
        let idle = measured.watch(Some(scale.phase), None, "")?;
        let (mut full, mut between, mut incremental) = (Felt::default(), Felt::default(), Felt::default());
        // A backup takes a second, in which there are not enough writes for a percentile.
        for _ in 0..scale.rounds {
            full.add(&measured.backup(&target, &["--full"], "full")?);
            between.add(&measured.watch(Some(scale.phase / 5), None, "")?);
            incremental.add(&measured.backup(&target, &[], "incremental")?);
            between.add(&measured.watch(Some(scale.phase / 5), None, "")?);
        }
        let timeline = std::mem::take(&mut measured.timeline);
        let busy = {
            let _spinners = Spinners::start()?;
            measured.watch(Some(scale.phase / 3), None, "")?
        };
        for (phase, felt) in [
            ("no backup", &idle),
            ("full backups", &full),
            ("between them", &between),
            ("incrementals", &incremental),
            ("no backup, cores busy", &busy),
        ] {
            lines.push(line(load, phase, felt));
        }
        let ratio =
            |felt: &Felt| felt.writes.quantile(990).as_secs_f64() / idle.writes.quantile(990).as_secs_f64();
        report.ratios.insert(format!("guest's write p99, {load}: full backup / none"), ratio(&full));
        report.ratios.insert(format!("guest's write p99, {load}: incremental / none"), ratio(&incremental));
        report.ratios.insert(format!("guest's write p99, {load}: cores busy / none"), ratio(&busy));
        if rate > 0 {
            report.timeline = Some(timeline);
        }
        let counts = guest.stop_storm()?;
        ensure!(counts.errors == 0, "the guest saw an I/O error");
    }
    report.table(
        "What the guest feels",
        format!(
            "Three disks (qcow2, raw, qcow2), {} MiB of data. Steady: seven streams of {STEADY} writes of 4 to 128 KiB a second, and {STEADY} reads of 4 KiB a second from each disk. Full and incremental backups take turns, {} of each. Cores busy: a process for each core that only computes, and no backup. Milliseconds; a figure is up to a quarter too high.",
            FILLED * 2 / MIB,
            scale.rounds,
        ),
        &["load", "while", "s", "writes/s", "write p50", "p99", "p99.9", "longest", "read p50", "p99", "longest"],
        lines,
    );
    pauses(&mut guest, &tool, &target, scale, report)?;
    let lines = with_and_without_discards(&mut guest, &tool, &target, scale, report)?;
    report.table(
        "With and without fleecing discards",
        "Full backups of the same guest at full speed, in turns: old data is given back as soon as it is stored (`fleecing.discard`, which is so unless configured), or stays until the end. Milliseconds; medians of all backups.".into(),
        &["discards", "backups", "s", "writes/s", "write p50", "p99", "longest", "fleecing peak, MiB", "most"],
        lines,
    );
    guest.kill()?;
    freezes(qemu, work, scale, report)
}

fn line(load: &str, phase: &str, felt: &Felt) -> Vec<String> {
    let ms = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
    let Felt { seconds, writes, reads } = felt;
    vec![
        load.to_owned(),
        phase.to_owned(),
        format!("{seconds:.1}"),
        format!("{:.0}", writes.operations() as f64 / seconds),
        ms(writes.quantile(500)),
        ms(writes.quantile(990)),
        ms(writes.quantile(999)),
        ms(writes.longest()),
        ms(reads.quantile(500)),
        ms(reads.quantile(990)),
        ms(reads.longest()),
    ]
}

impl Load<'_> {
    fn backup(&mut self, target: &str, more: &[&str], name: &str) -> Result<Felt> {
        let qmp = self.guest.qmp().display().to_string();
        let line = ["backup", "vm", "--qmp", &qmp, "--to", target];
        let mut command = self.tool.command(line.iter().chain(more));
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        self.watch(None, Some(child), name)
    }

    /// Asks the guest for so many seconds, or until a backup has ended.
    fn watch(&mut self, seconds: Option<u64>, mut backup: Option<Child>, name: &str) -> Result<Felt> {
        // What was before does not count.
        self.guest.latency()?;
        self.guest.read_latency()?;
        let began = Instant::now();
        let mut felt = Felt::default();
        loop {
            // Latency over time is what is asked for: windows of a fixed length.
            std::thread::sleep(WINDOW);
            let (writes, reads) = (self.guest.latency()?, self.guest.read_latency()?);
            let ms = |time: Duration| time.as_secs_f64() * 1000.0;
            self.timeline.points.push((
                self.began.elapsed().as_secs_f64(),
                ms(writes.quantile(500)),
                ms(writes.quantile(990)),
                ms(writes.longest()),
            ));
            felt.writes.add(&writes);
            felt.reads.add(&reads);
            felt.seconds = began.elapsed().as_secs_f64();
            match &mut backup {
                Some(child) => {
                    if let Some(status) = child.try_wait()? {
                        ensure!(status.success(), "{name} backup: {status}");
                        let begin = began.duration_since(self.began).as_secs_f64();
                        self.timeline.backups.push((name.to_owned(), begin, begin + felt.seconds));
                        println!("   {name} backup of {:.1} s", felt.seconds);
                        return Ok(felt);
                    }
                }
                None if seconds.is_some_and(|seconds| felt.seconds >= seconds as f64) => return Ok(felt),
                None => {}
            }
        }
    }
}

/// What it is worth to give old data back early.
fn with_and_without_discards(
    guest: &mut Guest,
    tool: &Tool,
    target: &str,
    scale: &Scale,
    report: &mut Report,
) -> Result<Vec<Vec<String>>> {
    println!("== with and without fleecing discards");
    guest.start_storm_with(StormSpec::new(79))?;
    guest.await_writes(200)?;
    let mut all: [(Felt, Vec<f64>, Vec<f64>); 2] = Default::default();
    let config = guest.work().join("discards.toml");
    for round in 0..=scale.rounds {
        for (discard, (felt, seconds, peaks)) in [true, false].into_iter().zip(&mut all) {
            let text = format!("[vm.vm]\nqmp = {:?}\nfleecing.discard = {discard}\n", guest.qmp());
            std::fs::write(&config, text)?;
            let line = ["--config", &config.display().to_string(), "backup", "vm", "--to", target];
            guest.latency()?;
            let began = Instant::now();
            let summary = tool.run(line.iter().chain(&["--full", "--json"]))?.json()?;
            let took = began.elapsed().as_secs_f64();
            let writes = guest.latency()?;
            // The first of each warms up.
            if round > 0 {
                felt.writes.add(&writes);
                felt.seconds += took;
                seconds.push(took);
                peaks.push(fleecing_peak(&summary)?);
            }
        }
    }
    let counts = guest.stop_storm()?;
    ensure!(counts.errors == 0, "the guest saw an I/O error");
    let [with, without] = &all;
    let ratio = median(&without.2) / median(&with.2).max(0.1);
    report.ratios.insert("fleecing peak, full speed: without discards / with".into(), ratio);
    let line = |name: &str, (felt, seconds, peaks): &(Felt, Vec<f64>, Vec<f64>)| {
        let ms = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
        vec![
            name.to_owned(),
            seconds.len().to_string(),
            format!("{:.2}", median(seconds)),
            format!("{:.0}", felt.writes.operations() as f64 / felt.seconds),
            ms(felt.writes.quantile(500)),
            ms(felt.writes.quantile(990)),
            ms(felt.writes.longest()),
            format!("{:.1}", median(peaks)),
            format!("{:.1}", most(peaks)),
        ]
    };
    Ok(vec![line("yes", with), line("no", without)])
}

/// How long the file systems of a guest are frozen.
fn freezes(qemu: &Qemu, work: &Path, scale: &Scale, report: &mut Report) -> Result<()> {
    println!("== freezing");
    let guest = GuestBuilder::new(qemu.clone())
        .disk(DiskSpec::new("vda", 256 * MIB))
        .disk(DiskSpec::new("vdb", 512 * MIB).ext4())
        .disk(DiskSpec::new("vdc", 128 * MIB))
        .agent()
        .boot()?;
    guest.await_agent()?;
    let tool = Tool::new(workspace().join("target/release/stillpoint"), guest.work());
    let (config, target) = (guest.work().join("freeze.toml"), work.join("frozen-points"));
    std::fs::create_dir(&target)?;
    std::fs::write(&config, format!("[vm.vm]\nqmp = {:?}\nagent = {:?}\n", guest.qmp(), guest.agent()))?;
    let (mut freezes, mut pauses) = (Vec::new(), Vec::new());
    for _ in 0..scale.pauses {
        let summary = tool
            .run([
                "--config",
                &config.display().to_string(),
                "backup",
                "vm",
                "--to",
                &target.display().to_string(),
                "--json",
            ])?
            .json()?;
        let consistency = summary.get("consistency").and_then(Value::as_str);
        ensure!(consistency == Some("file-system-consistent"), "{summary}");
        let ms = |name: &str| summary.get(name).and_then(Value::as_f64).with_context(|| format!("no {name}"));
        freezes.push(ms("freeze_ms")?);
        pauses.push(ms("pause_ms")?);
    }
    println!("   median {:.0} ms", median(&freezes));
    report.ratios.insert("freeze, ms, median".into(), median(&freezes));
    report.table(
        "The freeze",
        "Incremental backups of a guest with QEMU's guest agent and an ext4 file system to which it writes files without pause. The time is from asking for the freeze until the thaw is answered; most of it is the guest writing out what it has cached, before it is frozen.".into(),
        &["backups", "freeze to thaw ms, median", "most", "of it the pause, median", "most"],
        vec![vec![
            freezes.len().to_string(),
            format!("{:.1}", median(&freezes)),
            format!("{:.1}", most(&freezes)),
            format!("{:.1}", median(&pauses)),
            format!("{:.1}", most(&pauses)),
        ]],
    );
    Ok(())
}

fn most(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// MiB that were kept aside at the most.
fn fleecing_peak(summary: &Value) -> Result<f64> {
    let peak = summary.get("fleecing_peak_bytes").and_then(Value::as_f64).context("no peak")?;
    Ok(peak / MIB as f64)
}

/// How long the guest stands still, and how much old data is kept aside.
fn pauses(guest: &mut Guest, tool: &Tool, target: &str, scale: &Scale, report: &mut Report) -> Result<()> {
    println!("== pauses");
    let mut lines = Vec::new();
    let qmp = guest.qmp();
    for (load, rate) in [("steady", STEADY), ("full speed", 0)] {
        guest.start_storm_with(StormSpec::new(78).rate(rate))?;
        let (mut pauses, mut fleecing, mut written) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..scale.pauses {
            let before = guest.counts()?.writes;
            let summary = tool.backup("vm", &qmp, Path::new(target), &[])?;
            written.push((guest.counts()?.writes - before) as f64);
            pauses.push(summary.get("pause_ms").and_then(Value::as_f64).context("no pause_ms")?);
            fleecing.push(fleecing_peak(&summary)?);
        }
        guest.stop_storm()?;
        println!("   {load}: median {:.1} ms", median(&pauses));
        report.ratios.insert(format!("pause with 3 disks, {load}, ms, median"), median(&pauses));
        lines.push(vec![
            load.to_owned(),
            scale.pauses.to_string(),
            format!("{:.1}", median(&pauses)),
            format!("{:.1}", most(&pauses)),
            format!("{:.1}", median(&fleecing)),
            format!("{:.1}", most(&fleecing)),
            format!("{:.0}", median(&written)),
        ]);
    }
    report.table(
        "The pause, and what is kept aside",
        "Incremental backups of the same guest, one after the other. Writes are of 18 KiB in the mean."
            .into(),
        &[
            "load",
            "backups",
            "pause ms, median",
            "most",
            "fleecing MiB, median",
            "most",
            "writes during a backup, median",
        ],
        lines,
    );
    Ok(())
}
