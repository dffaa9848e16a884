//! VMs that are off: their images are read without them, in the same chain of points.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Cuts, Held, judge, point_name, tool};
use serde_json::Value;
use std::{
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Qemu, Storm, Tool, oracle};

const MIB: u64 = 1 << 20;

fn guest() -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB))
        .boot()
        .unwrap()
}

/// The bitmaps that an image of a VM that is off has.
fn bitmaps(image: &Path) -> Vec<String> {
    let output = Command::new("qemu-img").args(["info", "--output=json"]).arg(image).output().unwrap();
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
}

fn at_rest(tool: &Tool, target: &Path, summary: &Value, storm: &Storm, acked: &[u64]) {
    let output = tempfile::tempdir_in(target.parent().unwrap()).unwrap();
    let images =
        common::restore(tool, target, &point_name(summary), &["vda", "vdb"], &output.path().join("restored"));
    let verdict = oracle::check_at_rest(&images, &storm.layout, storm.run, acked).unwrap();
    assert!(verdict.is_valid(), "{:?}", verdict.violations);
}

fn modes(summary: &Value) -> Vec<&str> {
    summary["disks"].as_array().unwrap().iter().map(|disk| disk["bitmap_mode"].as_str().unwrap()).collect()
}

#[test]
fn off_then_on_then_off_again_is_one_chain() {
    let mut guest = guest();
    guest.quit().unwrap();
    let (tool, target, images) = (tool(guest.work()), guest.work().join("target"), guest.images());
    let config = guest.work().join("offline.toml");
    let disk = |index: usize| format!("{{ image = {:?}, format = \"qcow2\" }}", images[index]);
    let text =
        format!("[vm.vm]\nqmp = {:?}\ndisks = {{ vda = {}, vdb = {} }}\n", guest.qmp(), disk(0), disk(1));
    fs::write(&config, text).unwrap();
    let mut arguments: Vec<OsString> = vec!["--config".into(), config.into(), "backup".into(), "vm".into()];
    arguments.extend(["--json".into(), "--to".into(), target.clone().into()]);
    let backup = || tool.run(&arguments).unwrap().json().unwrap();

    let first = backup();
    assert_eq!(modes(&first), ["new", "new"], "{first}");
    assert!(images.iter().all(|image| bitmaps(image).len() == 1));

    guest.start().unwrap();
    let storm = guest.start_storm_within(61, 0, 64).unwrap();
    guest.await_writes(400).unwrap();
    let running = backup();
    assert_eq!(modes(&running), ["reuse", "reuse"], "{running}");
    guest.await_writes(400).unwrap();
    guest.stop_storm().unwrap();
    let acked = guest.mark().unwrap();
    guest.power_off().unwrap();
    guest.await_end().unwrap();

    let off = backup();
    assert_eq!(modes(&off), ["reuse", "reuse"], "{off}");
    for disk in off["disks"].as_array().unwrap() {
        // Three streams of 64 blocks, each block in a cluster of its own at the worst.
        let (read, size) = (disk["read_bytes"].as_u64().unwrap(), disk["size"].as_u64().unwrap());
        assert!(read > 0 && read <= 3 * 64 * (64 << 10) && read < size / 2, "{disk}");
    }
    at_rest(&tool, &target, &off, &storm, &acked);
    assert!(judge(&tool, &target, &point_name(&running), &["vda", "vdb"], &storm).is_valid());

    let unchanged = backup();
    assert!(unchanged["disks"].as_array().unwrap().iter().all(|disk| disk["read_bytes"] == 0), "{unchanged}");
    at_rest(&tool, &target, &unchanged, &storm, &acked);
    assert!(images.iter().all(|image| bitmaps(image).len() == 1));

    // Without a configuration the last point tells where the images are.
    guest.start().unwrap();
    guest.resume_storm(&storm, &acked).unwrap();
    guest.await_writes(100).unwrap();
    guest.stop_storm().unwrap();
    let acked = guest.mark().unwrap();
    guest.quit().unwrap();
    let summary = tool.backup("vm", &guest.qmp(), &target, &[]).unwrap();
    assert_eq!(modes(&summary), ["reuse", "reuse"], "{summary}");
    at_rest(&tool, &target, &summary, &storm, &acked);
}

#[test]
fn a_killed_run_frees_the_images_and_the_next_has_all() {
    let mut guest = guest();
    let (tool, target, images) = (tool(guest.work()), guest.work().join("target"), guest.images());
    let storm = guest.start_storm_within(62, 0, 64).unwrap();
    guest.await_writes(300).unwrap();
    let first = tool.backup("vm", &guest.qmp(), &target, &[]).unwrap();
    guest.await_writes(300).unwrap();
    guest.stop_storm().unwrap();
    let acked = guest.mark().unwrap();
    guest.quit().unwrap();

    let arguments = common::backup_arguments(&guest.qmp(), &target, &[]);
    for place in ["taken#1", "durable#1"] {
        let held = Held::at(&tool, place, arguments.clone());
        // Nobody gets in underneath: neither the VM nor another run.
        let opened = Command::new("qemu-io").args(["-c", "quit"]).arg(&images[0]).output().unwrap();
        assert!(!opened.status.success(), "the image is not locked");
        let second = tool.run(&arguments).unwrap();
        assert_eq!(second.status, 4, "{second:?}");
        assert!(second.stderr.contains(&format!("process {}", held.pid())), "{}", second.stderr);
        held.signal("KILL");
        held.go_on();
        await_free(&images);
        assert!(images.iter().all(|image| bitmaps(image).len() > 1), "{:?}", bitmaps(&images[0]));
    }
    let last = tool.run(&arguments).unwrap().json().unwrap();
    assert_eq!(modes(&last), ["reuse", "reuse"], "{last}");
    assert!(images.iter().all(|image| bitmaps(image).len() == 1));
    at_rest(&tool, &target, &last, &storm, &acked);
    assert!(judge(&tool, &target, &point_name(&first), &["vda", "vdb"], &storm).is_valid());

    let term = Held::at(&tool, "taken#1", arguments);
    term.signal("TERM");
    let outcome = term.go_on();
    assert_eq!(outcome.status, 130, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("is off"), "{}", outcome.stderr);
    assert!(images.iter().all(|image| bitmaps(image).len() == 1));
    common::no_process_is_left(guest.work(), "after the last");
    guest.start().unwrap();
}

fn await_free(images: &[PathBuf]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let free = |image: &PathBuf| {
        Command::new("qemu-io").args(["-c", "quit"]).arg(image).output().unwrap().status.success()
    };
    while !images.iter().all(free) {
        assert!(Instant::now() < deadline, "the images stay locked");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_running_vm_behind_another_socket_is_not_taken_for_off() {
    let mut guest = guest();
    let mut cuts = Cuts::start(&mut guest, vec!["vda", "vdb"], 63);
    let first = cuts.cut(&[]);
    let elsewhere = cuts.guest.work().join("another-socket");
    let outcome = cuts.tool.run(common::backup_arguments(&elsewhere, &cuts.target, &[])).unwrap();
    assert_eq!(outcome.status, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("in use") && outcome.stderr.contains("qmp"), "{}", outcome.stderr);
    let next = cuts.cut(&[]);
    cuts.judge_all(&[first, next]);
    cuts.end();
}

/// A target that somebody else can write to must not make us read any file of the host.
#[test]
fn what_only_the_target_says_is_not_believed() {
    let mut guest = guest();
    let (tool, target, images) = (tool(guest.work()), guest.work().join("target"), guest.images());
    tool.backup("vm", &guest.qmp(), &target, &[]).unwrap();
    guest.quit().unwrap();
    for image in &images {
        for bitmap in bitmaps(image) {
            let status =
                Command::new("qemu-img").args(["bitmap", "--remove"]).arg(image).arg(bitmap).status();
            assert!(status.unwrap().success());
        }
    }
    let outcome = tool.run(common::backup_arguments(&guest.qmp(), &target, &[])).unwrap();
    assert_eq!(outcome.status, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("has no bitmap of this target"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("disks.vda"), "{}", outcome.stderr);
    await_free(&images);
}

#[test]
fn a_template_that_can_only_be_read_is_read() {
    let mut guest = guest();
    let storm = guest.start_storm_within(64, 0, 64).unwrap();
    guest.await_writes(200).unwrap();
    guest.stop_storm().unwrap();
    let acked = guest.mark().unwrap();
    guest.quit().unwrap();
    let (tool, target, images) = (tool(guest.work()), guest.work().join("target"), guest.images());
    for image in &images {
        fs::set_permissions(image, fs::Permissions::from_mode(0o444)).unwrap();
    }
    let before: Vec<_> = images.iter().map(|image| fs::read(image).unwrap()).collect();
    let disk = |index: usize| format!("{{ image = {:?}, format = \"qcow2\" }}", images[index]);
    let config = guest.work().join("template.toml");
    fs::write(&config, format!("[vm.vm]\ndisks = {{ vda = {}, vdb = {} }}\n", disk(0), disk(1))).unwrap();
    for _ in 0..2 {
        let mut arguments: Vec<OsString> = vec!["--config".into(), config.clone().into(), "backup".into()];
        arguments.extend(["vm".into(), "--json".into(), "--to".into(), target.clone().into()]);
        let summary = tool.run(&arguments).unwrap().json().unwrap();
        assert_eq!(modes(&summary), ["none", "none"], "{summary}");
        at_rest(&tool, &target, &summary, &storm, &acked);
    }
    let after: Vec<_> = images.iter().map(|image| fs::read(image).unwrap()).collect();
    assert!(before == after, "a template was written to");
}
