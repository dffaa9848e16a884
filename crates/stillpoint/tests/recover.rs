//! A run that is killed leaves the guest running, and `recover` or the next run takes out what it left.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::Cuts;
use std::process::Stdio;
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Qemu};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];

fn guest() -> Guest {
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 1024 * MIB))
        .disk(DiskSpec::new("vdb", 768 * MIB).raw())
        .boot()
        .unwrap();
    // Enough to read that a run is caught in the middle; between the regions that the storm writes to.
    guest.fill(0, 32 * MIB, 256 * MIB).unwrap();
    guest.fill(1, 32 * MIB, 192 * MIB).unwrap();
    guest
}

/// Starts a backup and kills it when its exports are there.
fn kill_a_run(cuts: &mut Cuts<'_>) {
    let arguments = ["backup", "vm", "--full", "--qmp"].map(std::ffi::OsString::from);
    let rest = [cuts.guest.qmp().into(), "--to".into(), cuts.target.clone().into()];
    let mut run = cuts
        .tool
        .command(arguments.into_iter().chain(rest))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while cuts.guest.block_graph().unwrap().exports < DISKS.len() {
        assert!(run.try_wait().unwrap().is_none(), "the run ended before it could be killed");
    }
    run.kill().unwrap();
    run.wait().unwrap();
    let left = cuts.guest.block_graph().unwrap();
    assert!(left.nodes.iter().any(|node| node.starts_with("stillpoint-filter")), "{left:?}");
    // The guest writes on through the filters.
    assert_eq!(cuts.guest.await_writes(200).unwrap().errors, 0);
}

#[test]
fn recover_takes_out_what_a_killed_run_left() {
    let mut guest = guest();
    let before = guest.block_graph().unwrap();
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 21);
    let first = cuts.cut(&[]);
    kill_a_run(&mut cuts);
    let qmp = cuts.guest.qmp().display().to_string();
    let recovered = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert_eq!(recovered.status, 0, "{}", recovered.stderr);
    assert!(recovered.stderr.contains("stillpoint-filter-0"), "{}", recovered.stderr);
    assert_eq!(cuts.guest.block_graph().unwrap().without_bitmaps(), before.without_bitmaps());
    let again = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert!(again.status == 0 && again.stdout.contains("nothing to undo"), "{again:?}");
    // The first point's bitmap recorded all the while: the next is an incremental, and lacks nothing.
    let second = cuts.cut(&[]);
    assert_eq!(second["disks"][0]["bitmap_mode"], "reuse", "{second}");
    cuts.judge_all(&[first, second]);
    cuts.end();
}

#[test]
fn the_next_run_does_it_by_itself() {
    let mut guest = guest();
    let before = guest.block_graph().unwrap();
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 22);
    let first = cuts.cut(&[]);
    kill_a_run(&mut cuts);
    let summary = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(summary["disks"][1]["bitmap_mode"], "reuse", "{summary}");
    let after = cuts.guest.block_graph().unwrap();
    assert_eq!(after.bitmaps.len(), DISKS.len(), "{after:?}");
    assert_eq!(after.without_bitmaps(), before.without_bitmaps());
    cuts.judge_all(&[first, summary]);
    cuts.end();
}
