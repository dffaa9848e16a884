//! Providers outside the process: the examples on a guest that writes at full speed, and programs that do wrong in every
//! way that a program can.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::tool;
use serde_json::Value;
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Outcome, Qemu, Storm, Tool, oracle, workspace};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

fn guest() -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB + 512).raw())
        .disk(DiskSpec::new("vdc", 80 * MIB))
        .boot()
        .unwrap()
}

fn example(name: &str) -> PathBuf {
    workspace().join("examples/providers").join(name)
}

/// The program under test with a target that is a provider program.
struct Place {
    tool: Tool,
    config: PathBuf,
    work: PathBuf,
}

impl Place {
    /// `target` is what stands under `[target.main]`; `@` in it stands for `work`.
    fn new(work: &Path, qmp: &Path, target: &str) -> Self {
        let config = work.join("program.toml");
        let target = target.replace('@', work.to_str().unwrap());
        fs::write(&config, format!("[vm.vm]\nqmp = {qmp:?}\n[target.main]\n{target}\n")).unwrap();
        Self { tool: tool(work), config, work: work.to_owned() }
    }

    fn arguments(&self, line: &[&str]) -> Vec<OsString> {
        let config = ["--config".into(), self.config.clone().into()];
        config.into_iter().chain(line.iter().map(OsString::from)).collect()
    }

    fn run(&self, line: &[&str]) -> Outcome {
        self.tool.run(self.arguments(line)).unwrap()
    }

    fn backup(&self) -> Value {
        let outcome = self.run(&["backup", "vm", "--json"]);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        outcome.json().unwrap()
    }

    fn judge(&self, summary: &Value, storm: &Storm) -> u64 {
        let output = tempfile::tempdir_in(&self.work).unwrap();
        let restored = output.path().join("restored");
        let point = common::point_name(summary);
        let outcome = self.run(&["restore", &point, "--output", restored.to_str().unwrap()]);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        let images: Vec<_> = DISKS.iter().map(|disk| restored.join(format!("{disk}.raw"))).collect();
        let verdict = oracle::check(&images, &storm.layout, storm.run).unwrap();
        assert!(verdict.is_valid(), "{point}: {:?}", verdict.violations);
        verdict.operations()
    }
}

/// A full point and three increments of a guest that writes at full speed, each restored and put before the oracle.
fn points(place: &Place, guest: &mut Guest, seed: u64) {
    let before = guest.block_graph().unwrap();
    let storm = guest.start_storm(seed, 0).unwrap();
    let mut points = Vec::new();
    for index in 0..4 {
        guest.await_writes(300).unwrap();
        let summary = place.backup();
        let mode = if index == 0 { "new" } else { "reuse" };
        for disk in summary["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], mode, "{summary}");
        }
        points.push(summary);
    }
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
    let operations: Vec<_> = points.iter().map(|point| place.judge(point, &storm)).collect();
    println!("operations in each point, 0 violations: {operations:?}");
    assert_eq!(guest.block_graph().unwrap().without_bitmaps(), before);
    let verified = place.run(&["verify"]);
    assert_eq!(verified.status, 0, "{verified:?}");
    nothing_is_left(place);
}

/// No process, mount or socket of a provider.
fn nothing_is_left(place: &Place) {
    common::no_process_is_left(&place.work, "after a provider");
    let runtime = place.work.join("run");
    let left: Vec<_> = fs::read_dir(&runtime).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().starts_with("provider-")), "{left:?}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(place.work.to_str().unwrap()), "{mounts}");
}

fn raw_images(mechanism: &str, seed: u64) {
    let mut guest = guest();
    let program = example("raw-images");
    let target = format!(
        "provider = {{ program = {program:?}, arguments = [\"@/images\"], options = {{ mechanism = {mechanism:?} }} }}"
    );
    let place = Place::new(guest.work(), &guest.qmp(), &target);
    points(&place, &mut guest, seed);
}

#[test]
fn raw_images_through_nbd() {
    raw_images("nbd", 71);
}

#[test]
fn raw_images_through_files() {
    raw_images("file-handle", 72);
}

#[test]
fn raw_images_through_block_devices() {
    raw_images("block-device", 73);
}
