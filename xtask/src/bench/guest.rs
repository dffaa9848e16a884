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
        // The first of all is full by itself; in the second load it is asked for.
        let full = measured.backup(&target, &["--full"], "full")?;
        let between = measured.watch(Some(scale.phase / 3), None, "")?;
        let incremental = measured.backup(&target, &[], "incremental")?;
        measured.watch(Some(scale.phase / 3), None, "")?;
        let timeline = std::mem::take(&mut measured.timeline);
        let busy = {
            let _spinners = Spinners::start()?;
            measured.watch(Some(scale.phase / 3), None, "")?
        };
        for (phase, felt) in [
            ("no backup", &idle),
            ("full backup", &full),
            ("after it", &between),
            ("incremental", &incremental),
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
            "Three disks (qcow2, raw, qcow2), {} MiB of data. Steady: seven streams of {STEADY} writes of 4 to 128 KiB a second, and {STEADY} reads of 4 KiB a second from each disk. Cores busy: a process for each core that only computes, and no backup. Milliseconds; a figure is up to a quarter too high.",
            FILLED * 2 / MIB,
        ),
        &["load", "while", "s", "writes/s", "write p50", "p99", "p99.9", "longest", "read p50", "p99", "longest"],
        lines,
    );
    pauses(&mut guest, &tool, &target, scale, report)
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
            let peak = summary.get("fleecing_peak_bytes").and_then(Value::as_f64).context("no peak")?;
            fleecing.push(peak / MIB as f64);
        }
        guest.stop_storm()?;
        let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
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
