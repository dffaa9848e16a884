//! `cargo xtask demo`: a real guest, backed up while it writes without pause, and the proof of every point.

#![allow(clippy::indexing_slicing, reason = "JSON by key: a missing key is null, never a panic")]

use crate::{cargo, step};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::{path::PathBuf, time::Instant};
use stillpoint_testkit::{DiskSpec, GuestBuilder, Qemu, Tool, oracle, requirements, workspace};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
const POINTS: usize = 4;

/// Runs the demonstration.
pub(crate) fn run() -> Result<()> {
    requirements::ensure()?;
    let tool = build()?;
    let started = Instant::now();
    let qemu = Qemu::installed()?;
    println!("\n1. A Linux guest on QEMU {} boots, with three disks (qcow2, raw, qcow2).", qemu.version);
    let mut guest = GuestBuilder::new(qemu)
        .disk(DiskSpec::new("vda", 1024 * MIB))
        .disk(DiskSpec::new("vdb", 768 * MIB + 4096).raw())
        .disk(DiskSpec::new("vdc", 512 * MIB + 512))
        .boot()?;
    // Between the regions that the storm writes to.
    guest.fill(0, 32 * MIB, 192 * MIB)?;
    guest.fill(1, 32 * MIB, 128 * MIB)?;
    let storm = guest.start_storm_within(started.elapsed().subsec_nanos().into(), 0, 2048)?;
    guest.await_writes(500)?;
    println!(
        "   It writes to all of them as fast as it can, in a known order, and does not stop until the end.\n"
    );

    let target = guest.work().join("target");
    let tool = Tool::new(tool, guest.work());
    println!("2. Four points, one full and three incremental:\n");
    println!("   {:34} {:>9} {:>10} {:>10} {:>12}", "point", "pause", "read", "stored", "kept aside");
    let mut points = Vec::new();
    for _ in 0..POINTS {
        guest.await_writes(400)?;
        let summary = tool.backup("demo", &guest.qmp(), &target, &[])?;
        let name = summary["point"].as_str().context("a point has a name")?.to_owned();
        let sum = |key: &str| {
            let disks = summary["disks"].as_array().map(Vec::as_slice).unwrap_or_default();
            disks.iter().filter_map(|disk| disk[key].as_u64()).sum::<u64>()
        };
        println!(
            "   {name:34} {:>6.1} ms {:>10} {:>10} {:>12}",
            summary["pause_ms"].as_f64().unwrap_or_default(),
            mib(sum("read_bytes")),
            mib(sum("stored_bytes")),
            mib(summary["fleecing_peak_bytes"].as_u64().unwrap_or_default())
        );
        points.push((name, summary));
    }
    let graph = guest.block_graph()?;
    let counts = guest.await_writes(100)?;
    println!("\n3. Every point is restored and put before the oracle (the guest still writes):\n");
    let mut sound = true;
    for (name, _) in &points {
        let output = tempfile::tempdir_in(guest.work())?;
        let images = restore(&tool, name, &target, &output.path().join("restored"))?;
        let verdict = oracle::check(&images, &storm.layout, storm.run)?;
        sound &= verdict.is_valid();
        println!(
            "   {name:34} {:>6} writes proven to be in it, {} violations",
            verdict.operations(),
            verdict.violations.len()
        );
        for violation in verdict.violations.iter().take(3) {
            println!("      {violation}");
        }
    }
    let negative = negative_control(&tool, &points, &target, &guest, &storm)?;
    println!(
        "\n4. Can the oracle fail? One disk of the last point, with the others of the one before: {negative} violations."
    );
    let end = guest.stop_storm()?;
    println!(
        "\n   The guest wrote {} times, saw {} I/O errors, and its longest write took {} ms.",
        end.writes,
        end.errors,
        end.longest.as_millis()
    );
    let ours = graph.nodes.iter().filter(|node| node.starts_with("stillpoint")).count();
    println!(
        "   Of Stillpoint, {ours} nodes and {} exports are left in the VM, and {} bitmaps, one a disk.",
        graph.exports,
        graph.bitmaps.len()
    );
    ensure!(counts.writes < end.writes, "the guest did not write on");
    let clean = ours == 0 && graph.exports == 0 && graph.bitmaps.len() == DISKS.len();
    ensure!(sound && negative > 0 && end.errors == 0 && clean, "FAILED: see above");
    println!(
        "\nPASSED: {POINTS} points, each all disks at one instant, no write lost. {:.0} s.",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn build() -> Result<PathBuf> {
    step("build", &mut cargo(&["build", "--quiet", "--release", "--package", "stillpoint"]))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    Ok(target.join("release/stillpoint"))
}

fn restore(
    tool: &Tool,
    point: &str,
    target: &std::path::Path,
    output: &std::path::Path,
) -> Result<Vec<PathBuf>> {
    tool.restore(point, target, output)?;
    Ok(DISKS.iter().map(|disk| output.join(format!("{disk}.raw"))).collect())
}

fn negative_control(
    tool: &Tool,
    points: &[(String, Value)],
    target: &std::path::Path,
    guest: &stillpoint_testkit::Guest,
    storm: &stillpoint_testkit::Storm,
) -> Result<usize> {
    let output = tempfile::tempdir_in(guest.work())?;
    let [.., (before, _), (last, _)] = points else { return Ok(0) };
    let mut mixed = restore(tool, before, target, &output.path().join("before"))?;
    let later = restore(tool, last, target, &output.path().join("last"))?;
    for (slot, image) in mixed.iter_mut().zip(later).take(1) {
        *slot = image;
    }
    Ok(oracle::check(&mixed, &storm.layout, storm.run)?.violations.len())
}

fn mib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "one digit is shown")]
    let mib = bytes as f64 / MIB as f64;
    format!("{mib:.1} MiB")
}
