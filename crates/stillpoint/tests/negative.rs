//! The oracle can fail: what other tools do, done by hand on the same guest, is caught.
//!
//! The images are read by `nbdcopy` in pieces of one cluster, since QEMU 7.2 mixes up larger ones (ADR 0006).

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

use serde_json::{Value, json};
use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Qemu, Storm, oracle, run};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
/// Writes that the guest does where the right way leaves it no time for any. On an idle host the gap would be a
/// millisecond or two, and only some runs would show it.
const GAP: u64 = 20;

fn guest() -> Guest {
    let qemu = Qemu::installed().unwrap();
    DISKS
        .iter()
        .zip([48, 40, 56])
        .fold(GuestBuilder::new(qemu), |builder, (disk, size)| {
            builder.disk(DiskSpec::new(disk, size * MIB).raw())
        })
        .boot()
        .unwrap()
}

fn ask(guest: &mut Guest, command: &str, arguments: Value) {
    guest.execute(command, arguments).unwrap();
}

fn front_end(disk: &str) -> String {
    format!("/machine/peripheral/{disk}/virtio-backend")
}

fn set_drive(guest: &mut Guest, disk: &str, node: &str) {
    ask(guest, "qom-set", json!({"path": front_end(disk), "property": "drive", "value": node}));
}

fn add_filter(guest: &mut Guest, disk: &str, size: u64) {
    let fleecing = guest.work().join(format!("{disk}.fleece"));
    File::create(&fleecing).unwrap().set_len(size).unwrap();
    let file = json!({"driver": "file", "filename": fleecing});
    ask(guest, "blockdev-add", json!({"driver": "raw", "node-name": format!("fleece-{disk}"), "file": file}));
    ask(
        guest,
        "blockdev-add",
        json!({"driver": "copy-before-write", "node-name": format!("filter-{disk}"), "file": format!("node-{disk}"),
               "target": format!("fleece-{disk}"), "on-cbw-error": "break-snapshot"}),
    );
}

fn add_bitmap(guest: &mut Guest, disk: &str) {
    ask(guest, "block-dirty-bitmap-add", json!({"node": format!("node-{disk}"), "name": "changed"}));
}

/// The images as they were at the instant, then everything taken down again.
fn read_and_remove(guest: &mut Guest, round: &str) -> Vec<PathBuf> {
    let socket = guest.work().join("control.nbd");
    let _ = std::fs::remove_file(&socket);
    ask(guest, "nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    let mut images = Vec::new();
    for disk in DISKS {
        ask(
            guest,
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": format!("access-{disk}"), "file": format!("filter-{disk}")}),
        );
        ask(
            guest,
            "block-export-add",
            json!({"type": "nbd", "id": disk, "name": disk, "node-name": format!("access-{disk}")}),
        );
        let image = guest.work().join(format!("{disk}-{round}.raw"));
        copy(&socket, disk, &image);
        images.push(image);
    }
    ask(guest, "nbd-server-stop", json!({}));
    for disk in DISKS {
        ask(guest, "blockdev-del", json!({"node-name": format!("access-{disk}")}));
        set_drive(guest, disk, &format!("node-{disk}"));
        for node in ["filter", "fleece"] {
            ask(guest, "blockdev-del", json!({"node-name": format!("{node}-{disk}")}));
        }
    }
    images
}

fn copy(socket: &Path, export: &str, image: &Path) {
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    run(Command::new("nbdcopy")
        .args(["--no-extents", "--request-size=65536", "--connections=1", &uri])
        .arg(image))
    .unwrap();
}

fn sizes() -> [u64; 3] {
    [48 * MIB, 40 * MIB, 56 * MIB]
}

/// One instant, with the pause or without it.
fn instant(guest: &mut Guest, paused: bool) {
    for (disk, size) in DISKS.iter().zip(sizes()) {
        add_filter(guest, disk, size);
    }
    if paused {
        ask(guest, "stop", json!({}));
    }
    for disk in DISKS {
        set_drive(guest, disk, &format!("filter-{disk}"));
        if !paused {
            guest.await_writes(GAP).unwrap();
        }
    }
    if paused {
        ask(guest, "cont", json!({}));
    }
}

fn violations(images: &[PathBuf], storm: &Storm) -> usize {
    let verdict = oracle::check(images, &storm.layout, storm.run).unwrap();
    assert!(verdict.stamps > 0);
    verdict.violations.len()
}

#[test]
fn without_the_pause_the_disks_are_from_different_instants() {
    let mut guest = guest();
    let storm = guest.start_storm(11, 0).unwrap();
    guest.await_writes(150).unwrap();
    instant(&mut guest, true);
    let images = read_and_remove(&mut guest, "paused");
    assert_eq!(violations(&images, &storm), 0, "with the pause it is right");
    instant(&mut guest, false);
    let images = read_and_remove(&mut guest, "running");
    assert!(violations(&images, &storm) > 0, "without the pause, and the oracle saw nothing");
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
}

/// What reading past QEMU would be without looking at what was kept aside (ADR 0018).
#[test]
fn images_read_while_the_guest_writes_are_from_no_instant() {
    let mut guest = guest();
    let storm = guest.start_storm(13, 0).unwrap();
    guest.await_writes(150).unwrap();
    instant(&mut guest, true);
    let mut images = Vec::new();
    for (disk, image) in DISKS.iter().zip(guest.images()) {
        let copy = guest.work().join(format!("{disk}-past.raw"));
        std::fs::copy(image, &copy).unwrap();
        images.push(copy);
        guest.await_writes(GAP).unwrap();
    }
    assert!(
        violations(&images, &storm) > 0,
        "nobody looked at what was kept aside, and the oracle saw nothing"
    );
    let images = read_and_remove(&mut guest, "export");
    assert_eq!(violations(&images, &storm), 0, "the same instant through QEMU is right");
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
}

/// The clusters that a bitmap calls changed.
fn changed(guest: &mut Guest, disk: &str) -> Vec<(u64, u64)> {
    let socket = guest.work().join("bitmap.nbd");
    let _ = std::fs::remove_file(&socket);
    // It has to rest to be exported read-only; what comes after the instant is not needed.
    ask(guest, "block-dirty-bitmap-disable", json!({"node": format!("node-{disk}"), "name": "changed"}));
    ask(guest, "nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    ask(
        guest,
        "block-export-add",
        json!({"type": "nbd", "id": "bitmap", "name": "bitmap", "node-name": format!("node-{disk}"),
               "bitmaps": ["changed"]}),
    );
    let uri = format!("nbd+unix:///bitmap?socket={}", socket.display());
    let map = run(Command::new("nbdinfo").args(["--map=qemu:dirty-bitmap:changed", "--json", &uri])).unwrap();
    ask(guest, "nbd-server-stop", json!({}));
    let map: Value = serde_json::from_str(&map).unwrap();
    let dirty = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 1);
    dirty.map(|extent| (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap())).collect()
}

/// A full and an incremental whose bitmap begins before the filter, or, as the direct peer has it, after it.
fn chain(guest: &mut Guest, storm: &Storm, bitmap_first: bool) -> usize {
    for (disk, size) in DISKS.iter().zip(sizes()) {
        if bitmap_first {
            add_bitmap(guest, disk);
        }
        add_filter(guest, disk, size);
    }
    ask(guest, "stop", json!({}));
    for disk in DISKS {
        set_drive(guest, disk, &format!("filter-{disk}"));
    }
    ask(guest, "cont", json!({}));
    if !bitmap_first {
        guest.await_writes(GAP).unwrap();
        for disk in DISKS {
            add_bitmap(guest, disk);
        }
    }
    let full = read_and_remove(guest, "full");
    guest.await_writes(100).unwrap();
    // The incremental: with a pause, and all that the bitmap knows after it.
    instant(guest, true);
    let mut dirty = Vec::new();
    for disk in DISKS {
        dirty.push(changed(guest, disk));
    }
    let now = read_and_remove(guest, "now");
    for ((full, now), dirty) in full.iter().zip(&now).zip(dirty) {
        let (base, later) = (File::options().write(true).open(full).unwrap(), File::open(now).unwrap());
        for (offset, length) in dirty {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            later.read_exact_at(&mut bytes, offset).unwrap();
            base.write_all_at(&bytes, offset).unwrap();
        }
    }
    for disk in DISKS {
        ask(guest, "block-dirty-bitmap-remove", json!({"node": format!("node-{disk}"), "name": "changed"}));
    }
    violations(&full, storm)
}

#[test]
fn a_bitmap_that_begins_after_the_filter_loses_writes() {
    let mut guest = guest();
    let storm = guest.start_storm(12, 0).unwrap();
    guest.await_writes(150).unwrap();
    assert_eq!(chain(&mut guest, &storm, true), 0, "bitmap first is right");
    assert!(chain(&mut guest, &storm, false) > 0, "the wrong order, and the oracle saw nothing");
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
}
