//! An incremental costs what changed, not what the disk has.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{restore, tool};
use std::process::Command;
use stillpoint_testkit::{DiskSpec, GuestBuilder, Qemu, run};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn an_incremental_reads_what_changed_and_nothing_if_nothing_did() {
    let mut guest =
        GuestBuilder::new(Qemu::installed().unwrap()).disk(DiskSpec::new("vda", 16 * GIB)).boot().unwrap();
    let (tool, target, qmp) = (tool(guest.work()), guest.work().join("target"), guest.qmp());
    guest.fill(0, 0, 64 * MIB).unwrap();
    let full = tool.backup("vm", &qmp, &target, &[]).unwrap();
    let disk = &full["disks"][0];
    assert_eq!(disk["bitmap_mode"], "new");
    // Holes are not read.
    assert_eq!(disk["read_bytes"].as_u64(), Some(64 * MIB), "{disk}");

    let one_percent = 16 * GIB / 100 / 4096 * 4096;
    guest.fill(0, 5 * GIB + 12_288, one_percent).unwrap();
    let summary = tool.backup("vm", &qmp, &target, &[]).unwrap();
    let disk = &summary["disks"][0];
    let read = disk["read_bytes"].as_u64().unwrap();
    assert_eq!(disk["bitmap_mode"], "reuse");
    assert!(
        read >= one_percent && read <= one_percent + 128 * 1024,
        "{read} bytes for {one_percent}: {disk}"
    );
    assert_eq!(disk["dirty_bytes"].as_u64(), Some(read));

    let nothing = tool.backup("vm", &qmp, &target, &[]).unwrap();
    assert_eq!(nothing["disks"][0]["read_bytes"].as_u64(), Some(0), "{nothing}");
    println!("1 % took {} ms, nothing {} ms", summary["duration_ms"], nothing["duration_ms"]);

    // Three points later the disk is what the guest has, bit by bit.
    let restored = restore(&tool, &target, "vm/latest", &["vda"], &guest.work().join("restored"));
    guest.quit().unwrap();
    let image = guest.images().remove(0);
    run(Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw"]).arg(image).arg(&restored[0]))
        .unwrap();
}

#[test]
fn two_targets_of_one_vm_keep_their_bitmaps_apart() {
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 32 * MIB))
        .disk(DiskSpec::new("vdb", 24 * MIB).raw())
        .boot()
        .unwrap();
    let (tool, target) = (tool(guest.work()), guest.work().join("target"));
    guest.fill(0, 0, MIB).unwrap();
    tool.backup("vm", &guest.qmp(), &target, &[]).unwrap();
    // Another target has bitmaps of its own, and neither takes the other's.
    let other = guest.work().join("other");
    tool.backup("vm", &guest.qmp(), &other, &[]).unwrap();
    assert_eq!(guest.block_graph().unwrap().bitmaps.len(), 4);
    guest.fill(0, 2 * MIB, MIB).unwrap();
    let first = tool.backup("vm", &guest.qmp(), &target, &[]).unwrap();
    let second = tool.backup("vm", &guest.qmp(), &other, &[]).unwrap();
    for summary in [&first, &second] {
        for disk in summary["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], "reuse", "{summary}");
        }
        assert_eq!(summary["disks"][0]["read_bytes"].as_u64(), Some(MIB), "{summary}");
    }
    let forced = tool.backup("vm", &guest.qmp(), &target, &["--full"]).unwrap();
    assert_eq!(forced["disks"][0]["bitmap_mode"], "new");
    assert_eq!(forced["disks"][0]["reason"], "asked for with --full");
    assert_eq!(guest.block_graph().unwrap().bitmaps.len(), 4);
}
