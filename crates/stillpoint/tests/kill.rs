//! The program is ended at every named place, between every two commands to QEMU, and at random moments: the guest runs
//! on, the next run takes out what was left, and no point lacks a write.
//!
//! `STILLPOINT_KILLS=300` makes that many random kills instead of a few; `STILLPOINT_PLACES=all` ends it at every place
//! with iothreads too, not only at those that a guest that is paused does not have.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Cuts, no_process_is_left};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{BlockGraph, DiskSpec, FrontEnd, Guest, GuestBuilder, Qemu, skip};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];
/// After a death the guest runs within this time.
const RUNS_WITHIN: Duration = Duration::from_secs(1);

fn guest() -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB).raw())
        .boot()
        .unwrap()
}

/// Places that every run has.
const PLACES: [&str; 4] = ["pipeline:torn#1", "pipeline:written#1", "qmp:nbd-server-start#1", "durable#1"];

/// A guest that is not paused for the instant (ADR 0017).
fn guest_with_iothreads(what: &str) -> Option<Guest> {
    let Some(qemu) = Qemu::trixie() else {
        skip(what, "no QEMU 10; `cargo xtask qemu10` installs it");
        return None;
    };
    let guest = GuestBuilder::new(qemu)
        .disk(DiskSpec::new("vda", 96 * MIB).iothread())
        .disk(DiskSpec::new("vdb", 64 * MIB).front_end(FrontEnd::ScsiHd).raw().iothread());
    Some(guest.boot().unwrap())
}

/// A backup that is under way, with more of an environment.
fn start(cuts: &Cuts<'_>, environment: &[(&str, &str)]) -> Child {
    let arguments = ["backup", "vm", "--json", "--qmp"].map(std::ffi::OsString::from);
    let rest = [cuts.guest.qmp().into(), "--to".into(), cuts.target.clone().into()];
    let mut command = cuts.tool.command(arguments.into_iter().chain(rest));
    command.envs(environment.iter().copied());
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// All places that a run reaches, full and incremental.
fn places(cuts: &mut Cuts<'_>) -> Vec<String> {
    let list = cuts.guest.work().join("places");
    for _ in 0..2 {
        let environment = [("STILLPOINT_FAILPOINT_LIST", list.to_str().unwrap())];
        assert!(start(cuts, &environment).wait().unwrap().success());
    }
    let text = std::fs::read_to_string(list).unwrap();
    let places: BTreeSet<_> = text.lines().map(str::to_owned).collect();
    places.into_iter().collect()
}

/// The guest runs, and its writes go on without an error.
fn guest_is_unharmed(cuts: &mut Cuts<'_>, died: Instant, place: &str) {
    loop {
        let status = cuts.guest.execute("query-status", serde_json::json!({})).unwrap();
        if status["status"] == "running" {
            break;
        }
        assert!(died.elapsed() < RUNS_WITHIN, "{place}: the guest is {status}");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(cuts.guest.await_writes(20).unwrap().errors, 0, "{place}");
}

/// The next run succeeds, leaves the graph as it was, and nothing on the host.
fn next_run(cuts: &mut Cuts<'_>, before: &BlockGraph, place: &str) -> Value {
    let summary = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]);
    let summary = summary.unwrap_or_else(|error| panic!("{place}: {error:#}"));
    let after = cuts.guest.block_graph().unwrap();
    assert_eq!(after.bitmaps.len(), DISKS.len(), "{place}: {:?}", after.bitmaps);
    assert_eq!(after.without_bitmaps(), before.clone(), "{place}");
    let runtime = cuts.guest.work().join("run");
    let left: Vec<_> = std::fs::read_dir(runtime).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let left: Vec<_> =
        left.iter().filter_map(|name| name.to_str()).filter(|name| !name.ends_with(".lock")).collect();
    assert!(left.is_empty(), "{place}: {left:?}");
    summary
}

fn at_every_place(guest: &mut Guest, action: &str, seed: u64, musts: &[&str], only: fn(&str) -> bool) {
    let before = guest.block_graph().unwrap();
    let mut cuts = Cuts::start(guest, DISKS.to_vec(), seed);
    let mut places = places(&mut cuts);
    assert!(places.len() > 60, "{places:?}");
    for must in musts {
        assert!(places.iter().any(|place| place == must), "no {must} among {places:?}");
    }
    places.retain(|place| only(place));
    let mut points = Vec::new();
    let mut reached = 0;
    for place in &places {
        let plan = format!("{place}={action}");
        let mut run = start(&cuts, &[("STILLPOINT_FAILPOINT", &plan)]);
        let status = run.wait().unwrap();
        let died = Instant::now();
        guest_is_unharmed(&mut cuts, died, place);
        if action == "kill" {
            // Some places come only with a full or only with an incremental.
            reached += u32::from(status.code().is_none());
        } else {
            let code = status.code().unwrap_or_else(|| panic!("{place}: {status}"));
            assert!(code == 130 || code == 0, "{place}: {status}");
            reached += u32::from(code == 130);
            let after = cuts.guest.block_graph().unwrap();
            assert_eq!(after.clone().without_bitmaps(), before, "{place}");
            assert_eq!(after.bitmaps.len(), DISKS.len(), "{place}: {after:?}");
        }
        let point = next_run(&mut cuts, &before, place);
        for disk in point["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], "reuse", "{place}: {point}");
        }
        points.push(point);
        no_process_is_left(cuts.guest.work(), place);
    }
    println!("{action}: {} places, {reached} runs ended there", places.len());
    assert!(reached as usize * 3 > places.len());
    cuts.judge_all(&points);
    cuts.end();
}

#[test]
fn killed_at_every_place() {
    at_every_place(&mut guest(), "kill", 31, &PLACES, |_| true);
}

#[test]
fn terminated_at_every_place() {
    at_every_place(&mut guest(), "term", 32, &PLACES, |_| true);
}

fn of_a_switch_without_a_pause(place: &str) -> bool {
    let all = std::env::var("STILLPOINT_PLACES").is_ok_and(|places| places == "all");
    all || ["qmp:qom-set", "qmp:blockdev-del", "pipeline:"].iter().any(|begin| place.starts_with(begin))
}

#[test]
fn killed_at_every_place_of_a_switch_without_a_pause() {
    let Some(mut guest) = guest_with_iothreads("killed_at_every_place_of_a_switch_without_a_pause") else {
        return;
    };
    let musts = ["pipeline:torn#1", "qmp:qom-set#4", "qmp:blockdev-del#2"];
    at_every_place(&mut guest, "kill", 35, &musts, of_a_switch_without_a_pause);
}

#[test]
fn terminated_at_every_place_of_a_switch_without_a_pause() {
    let Some(mut guest) = guest_with_iothreads("terminated_at_every_place_of_a_switch_without_a_pause")
    else {
        return;
    };
    let musts = ["pipeline:torn#1", "qmp:qom-set#4", "qmp:blockdev-del#2"];
    at_every_place(&mut guest, "term", 36, &musts, of_a_switch_without_a_pause);
}

#[test]
fn killed_at_random_moments() {
    let kills: u64 = std::env::var("STILLPOINT_KILLS").map_or(8, |kills| kills.parse().unwrap());
    let mut guest = guest();
    let before = guest.block_graph().unwrap();
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 33);
    let started = Instant::now();
    let mut points = vec![cuts.cut(&[])];
    let whole = started.elapsed();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for kill in 0..kills {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(kill | 1);
        let after = whole.mul_f64((random >> 40) as f64 / f64::from(1 << 24));
        let mut run = start(&cuts, &[]);
        // The moment is the point of it: no event tells it.
        std::thread::sleep(after);
        run.kill().unwrap();
        run.wait().unwrap();
        let place = format!("kill {kill} after {after:?} of {whole:?}");
        guest_is_unharmed(&mut cuts, Instant::now(), &place);
        points.push(next_run(&mut cuts, &before, &place));
    }
    no_process_is_left(cuts.guest.work(), "at the end");
    cuts.judge_all(&points);
    cuts.end();
}

#[test]
fn recovery_that_is_killed_again_and_again_converges() {
    recovery_converges(&mut guest(), "taken#1", 34);
}

/// Of a run that died with its front ends on junctions, before the filters were slid in and after.
#[test]
fn recovery_of_a_switch_without_a_pause_converges() {
    let what = "recovery_of_a_switch_without_a_pause_converges";
    for (dies_at, seed) in [("pipeline:torn#1", 37), ("pipeline:written#1", 38)] {
        let Some(mut guest) = guest_with_iothreads(what) else { return };
        recovery_converges(&mut guest, dies_at, seed);
    }
}

fn recovery_converges(guest: &mut Guest, dies_at: &str, seed: u64) {
    let before = guest.block_graph().unwrap();
    let mut cuts = Cuts::start(guest, DISKS.to_vec(), seed);
    let mut points = vec![cuts.cut(&[])];
    let left_behind = |cuts: &Cuts<'_>| {
        let plan = format!("{dies_at}=kill");
        let status = start(cuts, &[("STILLPOINT_FAILPOINT", &plan)]).wait().unwrap();
        assert!(status.code().is_none(), "{status}");
    };
    let qmp = cuts.guest.qmp().display().to_string();
    let list = cuts.guest.work().join("places");
    left_behind(&cuts);
    let mut recover = cuts.tool.command(["recover", "--qmp", &qmp]);
    assert!(
        recover.env("STILLPOINT_FAILPOINT_LIST", &list).stdout(Stdio::null()).status().unwrap().success()
    );
    let places = std::fs::read_to_string(list).unwrap();
    assert!(places.lines().count() > 15, "{places}");
    // One left-over each, killed further and further along the way: each time the rest is found.
    left_behind(&cuts);
    for place in places.lines() {
        let mut recover = cuts.tool.command(["recover", "--qmp", &qmp]);
        recover
            .env("STILLPOINT_FAILPOINT", format!("{place}=kill"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = recover.status().unwrap();
        guest_is_unharmed(&mut cuts, Instant::now(), place);
        if status.code() == Some(0) {
            left_behind(&cuts);
        }
    }
    let recovered = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert_eq!(recovered.status, 0, "{recovered:?}");
    assert_eq!(cuts.guest.block_graph().unwrap().without_bitmaps(), before.clone().without_bitmaps());
    points.push(next_run(&mut cuts, &before.without_bitmaps(), "at the end"));
    cuts.judge_all(&points);
    cuts.end();
}

/// The negative control of the guard: when it dies together with its run, between `stop` and `cont`, the guest stays
/// paused, and only recovery resumes it.
#[test]
fn without_the_guard_the_guest_stays_paused() {
    let mut guest = guest();
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 5);
    let first = cuts.cut(&[]);
    let held = cuts.hold_at("pipeline:torn#1", &[]);
    let deadline = Instant::now() + Duration::from_secs(20);
    while status(cuts.guest) != "paused" {
        assert!(Instant::now() < deadline, "the guest is not paused");
        std::thread::sleep(Duration::from_millis(2));
    }
    let guards = common::guards(held.pid());
    assert_eq!(guards.len(), 1, "{guards:?}");
    for pid in guards.iter().chain([&held.pid()]) {
        assert!(Command::new("kill").args(["-s", "KILL", &pid.to_string()]).status().unwrap().success());
    }
    held.end();
    let status =
        |guest: &mut Guest| guest.execute("query-status", serde_json::json!({})).unwrap()["status"].clone();
    assert_eq!(status(cuts.guest), "paused", "something else resumes it, and the guard proves nothing");
    let qmp = cuts.guest.qmp().display().to_string();
    let recovered = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert!(recovered.status == 0 && recovered.stderr.contains("paused"), "{recovered:?}");
    assert_eq!(status(cuts.guest), "running");
    let next = cuts.cut(&[]);
    cuts.judge_all(&[first, next]);
    cuts.end();
}

fn status(guest: &mut Guest) -> String {
    let status = guest.execute("query-status", serde_json::json!({})).unwrap();
    status["status"].as_str().unwrap().to_owned()
}
