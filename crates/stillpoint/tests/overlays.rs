//! Overlays that others put on a VM's disks, with bitmaps of our names that have seen nothing, and commit back: no point lacks a
//! write, and increments stay increments wherever that is proven (ADR 0019).
//!
//! `STILLPOINT_MOMENTS=60` puts overlays on at that many places of a run instead of a few.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Cuts, Held, backup_arguments};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use stillpoint_testkit::{BareMachine, DiskSpec, FrontEnd, Guest, GuestBuilder, Qemu, run, skip};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];

fn guest(qemu: Qemu) -> Guest {
    let disks = GuestBuilder::new(qemu).disk(DiskSpec::new("vda", 96 * MIB));
    disks.disk(DiskSpec::new("vdb", 64 * MIB + 4096).raw()).boot().unwrap()
}

fn qemu10(what: &str) -> Option<Qemu> {
    let qemu = Qemu::trixie();
    if qemu.is_none() {
        skip(what, "no QEMU 10; `cargo xtask qemu10` installs it");
    }
    qemu
}

/// A point; nothing of ours is in the graph after it.
fn point(cuts: &mut Cuts<'_>) -> Value {
    cuts.guest.await_writes(200).unwrap();
    let summary = cuts.tool.backup("vm", &cuts.guest.qmp(), &cuts.target, &[]).unwrap();
    nothing_is_left(cuts.guest);
    summary
}

fn nothing_is_left(guest: &mut Guest) {
    let graph = guest.block_graph().unwrap();
    assert!(!graph.nodes.iter().any(|node| node.starts_with("stillpoint-")), "{graph:?}");
    assert_eq!((graph.exports, graph.fd_sets), (0, 0));
}

fn modes(summary: &Value) -> Vec<(&str, &str)> {
    let disks = summary["disks"].as_array().unwrap().iter();
    disks.map(|disk| (disk["bitmap_mode"].as_str().unwrap(), disk["reason"].as_str().unwrap())).collect()
}

fn reused(summary: &Value) {
    assert!(modes(summary).iter().all(|(mode, _)| *mode == "reuse"), "{summary}");
}

/// Overlays once, twice, in the middle of a run, and committed back.
fn lives_with_overlays(mut guest: Guest, seed: u64) {
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), seed);
    let mut made = vec![point(&mut cuts), point(&mut cuts)];
    reused(&made[1]);

    cuts.guest.put_overlays(&DISKS, true).unwrap();
    made.push(point(&mut cuts));
    reused(&made[2]);

    for _ in 0..2 {
        cuts.guest.await_writes(200).unwrap();
        cuts.guest.put_overlays(&DISKS, false).unwrap();
    }
    made.extend([point(&mut cuts), point(&mut cuts)]);
    reused(&made[3]);
    reused(&made[4]);

    let held = cuts.hold_at("taken#1", &[]);
    cuts.guest.await_writes(100).unwrap();
    cuts.guest.put_overlays(&DISKS, true).unwrap();
    cuts.guest.await_writes(100).unwrap();
    let outcome = held.go_on();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    made.push(outcome.json().unwrap());
    nothing_is_left(cuts.guest);
    let graph = cuts.guest.block_graph().unwrap();
    assert!(graph.drives.iter().all(|(_, node)| node.starts_with("overlay-")), "{graph:?}");
    made.push(point(&mut cuts));
    reused(&made[6]);

    for disk in DISKS {
        cuts.guest.commit_overlays(disk).unwrap();
    }
    // The first images have the bitmaps of points that were made on them, which recorded what was committed.
    made.extend([point(&mut cuts), point(&mut cuts)]);
    reused(&made[7]);
    reused(&made[8]);
    cuts.judge_all(&made);
    cuts.end();
}

#[test]
fn overlays_with_empty_bitmaps_of_our_names_lose_no_write() {
    lives_with_overlays(guest(Qemu::installed().unwrap()), 71);
}

#[test]
fn overlays_lose_no_write_on_qemu_10_with_iothreads_either() {
    let Some(qemu) = qemu10("overlays with iothreads") else { return };
    let disks = GuestBuilder::new(qemu).disk(DiskSpec::new("vda", 96 * MIB).iothread());
    let vdb = DiskSpec::new("vdb", 64 * MIB + 4096).front_end(FrontEnd::ScsiHd).raw().iothread();
    lives_with_overlays(disks.disk(vdb).boot().unwrap(), 72);
}

/// At places all over a run, those before its instant among them: the point is right, the run succeeds, and the front ends are
/// where the other side put them.
#[test]
fn an_overlay_at_any_moment_of_a_run_does_no_harm() {
    let wanted =
        std::env::var("STILLPOINT_MOMENTS").ok().and_then(|moments| moments.parse().ok()).unwrap_or(12);
    let mut guest = guest(Qemu::installed().unwrap());
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 73);
    let list = cuts.guest.work().join("places");
    let mut made = vec![point(&mut cuts)];
    let tool = cuts.tool.clone();
    cuts.tool = tool.clone().env("STILLPOINT_FAILPOINT_LIST", list.to_str().unwrap());
    made.push(point(&mut cuts));
    cuts.tool = tool;
    let mut seen = BTreeSet::new();
    let text = std::fs::read_to_string(list).unwrap();
    let places: Vec<_> = text.lines().filter(|place| seen.insert(*place)).map(str::to_owned).collect();
    // In the pause nobody else's command is served before the guest runs again.
    let between = places.iter().position(|place| place.starts_with("pipeline:")).unwrap();
    let step = places.len().div_ceil(wanted).max(1);
    let mut moments: Vec<_> = places.iter().step_by(step).collect();
    moments.push(&places[between - 1]);
    for place in moments.into_iter().filter(|place| !place.contains("pipeline:")) {
        let arguments = backup_arguments(&cuts.guest.qmp(), &cuts.target, &[]);
        let held = Held::at(&cuts.tool, place, arguments);
        cuts.guest.put_overlays(&DISKS, true).unwrap();
        let outcome = held.go_on();
        assert_eq!(outcome.status, 0, "{place}: {}", outcome.stderr);
        made.push(outcome.json().unwrap());
        nothing_is_left(cuts.guest);
        let graph = cuts.guest.block_graph().unwrap();
        assert!(graph.drives.iter().all(|(_, node)| node.starts_with("overlay-")), "{place}: {graph:?}");
        cuts.guest.await_writes(20).unwrap();
    }
    made.push(point(&mut cuts));
    cuts.judge_all(&made);
    cuts.end();
}

/// A machine whose disk `vda` is on an overlay that was flattened and took the name of the first image: its empty bitmap
/// has everything that ours had but the history.
#[test]
fn a_bitmap_on_an_image_that_took_the_others_place_is_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let (image, overlay) = (directory.path().join("a"), directory.path().join("b"));
    for path in [&image, &overlay] {
        run(std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg("8M"))
            .unwrap();
    }
    let mut machine = BareMachine::start(&Qemu::installed().unwrap(), |_| {
        let node = json!({"driver": "qcow2", "node-name": "node-vda", "file": {"driver": "file", "filename": image}});
        let device = "virtio-blk-pci,id=vda,drive=node-vda".to_owned();
        Ok(vec!["-blockdev".into(), node.to_string(), "-device".into(), device])
    })
    .unwrap();
    let (tool, target) = (common::tool(directory.path()), directory.path().join("target"));
    machine.disk_io("vda", "write -P 1 0 64k").unwrap();
    let first = tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    machine.disk_io("vda", "write -P 2 0 64k").unwrap();

    let bitmaps = machine.execute("query-block", json!({})).unwrap();
    let bitmap = bitmaps[0]["inserted"]["dirty-bitmaps"][0]["name"].clone();
    let node = json!({"driver": "qcow2", "node-name": "over", "file": {"driver": "file", "filename": overlay}, "backing": null});
    machine.execute("blockdev-add", node).unwrap();
    let actions = json!([
        {"type": "blockdev-snapshot", "data": {"node": "node-vda", "overlay": "over"}},
        {"type": "block-dirty-bitmap-add", "data": {"node": "over", "name": bitmap, "persistent": true}},
    ]);
    machine.execute("transaction", json!({"actions": actions})).unwrap();
    machine.execute("block-stream", json!({"job-id": "flatten", "device": "over"})).unwrap();
    while !machine.execute("query-jobs", json!({})).unwrap().as_array().unwrap().is_empty() {
        std::thread::yield_now();
    }
    let again = tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    let (mode, reason) = modes(&again)[0];
    assert!(mode == "new" && reason.contains("another image"), "{again}");
    // The copy of the bitmap went with the point that took its place.
    let left = machine.execute("query-block", json!({})).unwrap();
    assert_eq!(left[0]["inserted"]["dirty-bitmaps"].as_array().unwrap().len(), 1);
    machine.disk_io("vda", "write -P 3 64k 64k").unwrap();
    reused(&tool.backup("vm", &machine.qmp(), &target, &[]).unwrap());
    machine.quit().unwrap();

    // Under the first image's name, too.
    std::fs::rename(&image, directory.path().join("old")).unwrap();
    std::fs::copy(&overlay, &image).unwrap();
    machine.start_again().unwrap();
    machine.disk_io("vda", "write -P 4 128k 64k").unwrap();
    let renamed = tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    assert!(modes(&renamed)[0].1.contains("another image"), "{renamed}");
    let restored = common::restore(&tool, &target, "vm/latest", &["vda"], &directory.path().join("restored"));
    let bytes = std::fs::read(&restored[0]).unwrap();
    assert_eq!([bytes[0], bytes[64 << 10], bytes[128 << 10]], [2, 3, 4]);
    assert_eq!(first["disks"][0]["bitmap_mode"], "new");
}
