//! The host's storage fails the guest while a point is made: the run gives up at once, so that the guest can go on, says
//! which disk it was and how the guest stands.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Cuts, Held, backup_arguments};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Outcome, Qemu};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];
const ENOSPC: u32 = 28;
const EIO: u32 = 5;

/// Puts a node below a disk that fails the guest's writes from now on, or its next one only.
fn fail_writes(guest: &mut Guest, number: u32, errno: u32, once: bool) {
    let node = format!("failing-{number}");
    // Above the file and below qcow2, whose events these are.
    let rule = json!({"event": "write_aio", "iotype": "write", "errno": errno, "once": once});
    let node_below =
        json!({"driver": "blkdebug", "node-name": node, "image": "file-vda", "inject-error": [rule]});
    guest.execute("blockdev-add", node_below).unwrap();
    put_on(guest, &node);
}

fn put_on(guest: &mut Guest, file: &str) {
    let cache = json!({"direct": false, "no-flush": false});
    let node =
        json!({"driver": "qcow2", "node-name": "node-vda", "file": file, "discard": "unmap", "cache": cache});
    guest.execute("blockdev-reopen", json!({"options": [node]})).unwrap();
}

fn status(guest: &mut Guest) -> Value {
    guest.execute("query-status", json!({})).unwrap()["status"].take()
}

/// A run in whose middle the host's storage begins to fail the guest's writes.
fn failing(cuts: &mut Cuts<'_>, number: u32, errno: u32, once: bool) -> (Outcome, Duration) {
    let held =
        Held::at(&cuts.tool, "taken#1", backup_arguments(&cuts.guest.qmp(), &cuts.target, &["--full"]));
    fail_writes(cuts.guest, number, errno, once);
    cuts.guest.wait_for("BLOCK_IO_ERROR").unwrap();
    let began = Instant::now();
    let outcome = held.go_on();
    (outcome, began.elapsed())
}

fn gave_up(cuts: &mut Cuts<'_>, outcome: &Outcome, took: Duration, guest: &str) {
    assert_eq!(outcome.status, 1, "{outcome:?}");
    let printed: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(printed["guest"], guest, "{outcome:?}");
    let why = "the host's storage failed a write of the guest on disk vda (no space left on device)";
    assert!(printed["error"].as_str().unwrap().contains(why), "{outcome:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(status(cuts.guest), guest);
    let graph = cuts.guest.block_graph().unwrap();
    assert!(graph.nodes.iter().all(|node| !node.starts_with("stillpoint")), "{graph:?}");
}

#[test]
fn a_run_ends_when_the_hosts_storage_fails_the_guest() {
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB).raw())
        .boot()
        .unwrap();
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 71);
    let first = cuts.cut(&[]);

    // No room once: the guest stops, as QEMU's default has it, and goes on when the old data is gone.
    let (outcome, took) = failing(&mut cuts, 0, ENOSPC, true);
    gave_up(&mut cuts, &outcome, took, "running");
    assert!(outcome.stderr.contains("stopped the guest (io-error)"), "{outcome:?}");
    assert_eq!(cuts.guest.await_writes(200).unwrap().errors, 0, "its write was tried again");

    // No room at all: it stands still, and that is said.
    let (outcome, took) = failing(&mut cuts, 1, ENOSPC, false);
    gave_up(&mut cuts, &outcome, took, "io-error");
    for word in ["guest:  stands still", "(io-error)", "nothing of this run is left", "make room", "`cont`"] {
        assert!(outcome.stderr.contains(word), "no {word:?} in {outcome:?}");
    }
    // A point of a guest that stands still so is a point, with a warning.
    let still = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(still["guest"], "io-error", "{still}");
    let warnings = still["warnings"].to_string();
    assert!(warnings.contains("make room") && warnings.contains("io-error"), "{still}");
    put_on(cuts.guest, "file-vda");
    cuts.guest.execute("cont", json!({})).unwrap();
    assert_eq!(cuts.guest.await_writes(200).unwrap().errors, 0);
    assert_eq!(status(cuts.guest), "running");
    let last = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    assert_eq!(last["disks"][0]["bitmap_mode"], "reuse", "{last}");
    cuts.judge_all(&[first, still, last]);

    // A bad sector: the guest is told by its disk, and the run goes on and says so.
    let (outcome, _) = failing(&mut cuts, 2, EIO, true);
    let printed = outcome.json().unwrap();
    assert_eq!(printed["guest"], "running");
    let warnings = printed["warnings"].to_string();
    assert!(warnings.contains("a write of the guest on disk vda (I/O error), 1 times"), "{printed}");
}
