//! The machine's power while a backup runs: the guest switches itself off, reboots, its QEMU ends or is killed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::Cuts;
use serde_json::json;
use std::time::{Duration, Instant};
use stillpoint_testkit::{DiskSpec, Durable, Guest, GuestBuilder, ImageFormat, Qemu, StormSpec, oracle};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];

fn guest(more: &[&str]) -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB).raw())
        .arguments(more)
        .boot()
        .unwrap()
}

fn status(guest: &mut Guest) -> String {
    guest.execute("query-status", json!({})).unwrap()["status"].as_str().unwrap().to_owned()
}

#[test]
fn the_guest_powers_itself_off_and_the_point_is_made() {
    let mut guest = guest(&[]);
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 41);
    let first = cuts.cut(&[]);
    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.power_off().unwrap();
    cuts.guest.wait_for("SHUTDOWN").unwrap();
    assert_eq!(status(cuts.guest), "shutdown");
    let outcome = held.go_on();
    let second = outcome.json().unwrap();
    assert!(outcome.stderr.contains("powered itself off"), "{}", outcome.stderr);
    cuts.guest.await_end().unwrap();
    cuts.judge_all(&[first, second]);
    // The machine starts again, and the chain goes on where it can.
    cuts.guest.start().unwrap();
    let third = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(third["disks"][0]["bitmap_mode"], "reuse", "{third}");
    assert_eq!(third["disks"][1]["bitmap_mode"], "new", "a raw disk's bitmap ends with its QEMU: {third}");
}

#[test]
fn the_guest_powers_itself_off_and_the_run_fails_or_dies() {
    let mut guest = guest(&[]);
    let cuts = Cuts::start(&mut guest, DISKS.to_vec(), 42);
    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.power_off().unwrap();
    cuts.guest.wait_for("SHUTDOWN").unwrap();
    held.signal("TERM");
    let outcome = held.go_on();
    assert_eq!(outcome.status, 130, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("has ended"), "{}", outcome.stderr);
    cuts.guest.await_end().unwrap();

    cuts.guest.start().unwrap();
    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.power_off().unwrap();
    cuts.guest.wait_for("SHUTDOWN").unwrap();
    held.signal("KILL");
    held.go_on();
    assert_eq!(status(cuts.guest), "shutdown");
    let qmp = cuts.guest.qmp().display().to_string();
    let doctor = cuts.tool.run(["doctor", "--qmp", &qmp]).unwrap();
    assert!(doctor.status == 1 && doctor.stdout.contains("held up"), "{doctor:?}");
    assert_eq!(status(cuts.guest), "shutdown", "doctor touches nothing");
    let recovered = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert!(recovered.status == 0 && recovered.stdout.contains("off, as its guest wished"), "{recovered:?}");
    cuts.guest.await_end().unwrap();
}

#[test]
fn a_qemu_that_was_told_to_stay_stays() {
    let mut guest = guest(&["-no-shutdown"]);
    let cuts = Cuts::start(&mut guest, DISKS.to_vec(), 43);
    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.power_off().unwrap();
    cuts.guest.wait_for("SHUTDOWN").unwrap();
    let point = held.go_on().json().unwrap();
    assert_eq!(status(cuts.guest), "shutdown");
    assert!(cuts.guest.block_graph().unwrap().nodes.iter().all(|node| !node.starts_with("stillpoint")));
    cuts.judge_all(&[point]);
}

#[test]
fn the_guest_reboots_itself_and_runs_on() {
    let mut guest = guest(&["-action", "reboot=reset"]);
    let before = guest.block_graph().unwrap();
    let cuts = Cuts::start(&mut guest, DISKS.to_vec(), 44);
    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.reboot().unwrap();
    cuts.guest.wait_for("RESET").unwrap();
    let point = held.go_on().json().unwrap();
    assert_eq!(status(cuts.guest), "running");
    assert_eq!(cuts.guest.block_graph().unwrap().without_bitmaps(), before);
    cuts.judge_all(&[point]);
}

#[test]
fn a_paused_vm_stays_paused() {
    let mut guest = guest(&[]);
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 45);
    let first = cuts.cut(&[]);
    cuts.guest.execute("stop", json!({})).unwrap();
    let second = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(second["pause_ms"].as_f64(), Some(0.0), "{second}");
    assert_eq!(status(cuts.guest), "paused");
    cuts.guest.execute("cont", json!({})).unwrap();
    cuts.guest.await_writes(200).unwrap();
    let third = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(third["disks"][1]["bitmap_mode"], "reuse", "{third}");
    cuts.judge_all(&[first, second, third]);
    cuts.end();
}

#[test]
fn qemu_ends_in_order_in_the_middle_of_a_run() {
    let mut guest = guest(&[]);
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 46);
    let first = cuts.cut(&[]);
    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.quit().unwrap();
    let outcome = held.go_on();
    assert_eq!(outcome.status, 1, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("has ended"), "{}", outcome.stderr);
    cuts.guest.start().unwrap();
    let both = cuts.guest.block_graph().unwrap().bitmaps;
    assert_eq!(both.len(), 2, "the bitmap of the point and that of the run, carried on: {both:?}");
    let second = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(second["disks"][0]["bitmap_mode"], "reuse", "{second}");
    assert_eq!(second["disks"][1]["bitmap_mode"], "new", "{second}");
    cuts.judge_all(&[first, second]);
}

/// Starts QEMU again, and goes on writing from what is in the images.
fn start_again(cuts: &mut Cuts<'_>) {
    let copies = tempfile::tempdir_in(cuts.guest.work()).unwrap();
    let copy = |image: &std::path::PathBuf| {
        let raw = image.extension().unwrap() == "raw";
        let copy = copies.path().join(image.file_name().unwrap());
        stillpoint_testkit::raw_copy(image, if raw { ImageFormat::Raw } else { ImageFormat::Qcow2 }, &copy)
            .unwrap();
        copy
    };
    let images: Vec<_> = cuts.guest.images().iter().map(copy).collect();
    let rest = oracle::check(&images, &cuts.storm.layout, cuts.storm.run).unwrap();
    assert!(rest.is_valid(), "{:?}", rest.violations);
    cuts.guest.start().unwrap();
    cuts.guest.resume_storm(&cuts.storm, &rest.cut).unwrap();
    cuts.guest.await_writes(100).unwrap();
}

#[test]
fn qemu_is_killed_at_random_moments_of_a_run() {
    let kills: u32 = std::env::var("STILLPOINT_QEMU_KILLS").map_or(3, |kills| kills.parse().unwrap());
    let mut guest = guest(&[]);
    // What was not flushed may go with QEMU, and no backup is to blame for it.
    let durable = StormSpec::new(47).durable(Durable::All);
    let mut cuts = Cuts::start_with(&mut guest, DISKS.to_vec(), durable);
    let started = Instant::now();
    cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &["--full"]).unwrap();
    let whole = started.elapsed();
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut caught = 0;
    for kill in 0..kills {
        // QEMU stores a bitmap when it ends in order, and finds it in use after it did not.
        cuts.guest.stop_storm().unwrap();
        cuts.guest.quit().unwrap();
        start_again(&mut cuts);
        let target = cuts.target.clone();
        let arguments = common::backup_arguments(&cuts.guest.qmp(), &target, &["--full"]);
        let mut command = cuts.tool.command(arguments);
        let run = command
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // The moment is the point of it: no event tells it. One at random in each part of a run.
        let part = f64::from(kill) + (random >> 40) as f64 / f64::from(1 << 24);
        std::thread::sleep(whole.mul_f64(part / f64::from(kills)));
        cuts.guest.kill().unwrap();
        let killed = Instant::now();
        let output = run.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(killed.elapsed() < Duration::from_secs(30), "{said}");
        // A point that was made has a bitmap that QEMU never stored; the one before may be in the image or not.
        let stored = match output.status.code() {
            Some(0) => false,
            Some(1) => true,
            other => panic!("kill {kill}: status {other:?}: {said}"),
        };
        caught += u32::from(stored);
        start_again(&mut cuts);
        let next = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
        // An unclean end of QEMU leaves no bitmap that could be relied on.
        for disk in next["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], "new", "{next}");
        }
        let reason = next["disks"][0]["reason"].as_str().unwrap();
        assert!(reason.contains("inconsistent") || !stored, "{next}");
        let after = cuts.cut(&[]);
        assert_eq!(after["disks"][0]["bitmap_mode"], "reuse", "{after}");
        cuts.judge_all(&[after]);
    }
    println!("QEMU killed {kills} times, {caught} runs caught in the middle");
    assert!(caught > 0);
    let listed = cuts.tool.run(["verify", "--to", cuts.target.to_str().unwrap()]).unwrap();
    assert_eq!(listed.status, 0, "{listed:?}");
}
