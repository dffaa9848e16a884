//! The bitmap chain when disks and bitmaps are not what the last run left: what is not proven to be the same is read in
//! full, the others go on, and what is somebody else's stays.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, tool};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use stillpoint_testkit::{BareMachine, Qemu, Tool};

const MIB: u64 = 1 << 20;

/// A machine with qcow2 disks; an image that is not there is made.
fn machine(images: &Path, disks: &[(&str, &str)]) -> BareMachine {
    BareMachine::start(&Qemu::installed().unwrap(), |_| {
        let mut arguments = Vec::new();
        for (name, image) in disks {
            let image = images.join(image);
            if !image.exists() {
                let size = (8 * MIB).to_string();
                let mut make = Command::new("qemu-img");
                assert!(make.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg(size).status()?.success());
            }
            let file = json!({"driver": "file", "filename": image});
            let node = json!({"driver": "qcow2", "node-name": format!("node-{name}"), "file": file});
            arguments.extend(["-blockdev".into(), node.to_string(), "-device".into()]);
            arguments.push(format!("virtio-blk-pci,id={name},drive=node-{name}"));
        }
        Ok(arguments)
    })
    .unwrap()
}

struct Place {
    directory: tempfile::TempDir,
    tool: Tool,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let tool = tool(directory.path());
        Self { directory, tool }
    }

    fn images(&self) -> &Path {
        self.directory.path()
    }

    fn target(&self) -> PathBuf {
        self.directory.path().join("target")
    }

    fn backup(&self, machine: &BareMachine) -> Value {
        self.tool.backup("vm", &machine.qmp(), &self.target(), &[]).unwrap()
    }

    /// Restores the disk and returns the byte at each of these offsets.
    fn bytes(&self, summary: &Value, disk: &str, offsets: &[u64]) -> Vec<u8> {
        let output = tempfile::tempdir_in(self.images()).unwrap();
        let restored = output.path().join("restored");
        self.tool.restore(&common::point_name(summary), &self.target(), &restored).unwrap();
        let image = fs::read(restored.join(format!("{disk}.raw"))).unwrap();
        offsets.iter().map(|offset| image[usize::try_from(*offset).unwrap()]).collect()
    }
}

fn mode(summary: &Value, disk: &str) -> (String, String) {
    let found = summary["disks"].as_array().unwrap().iter().find(|found| found["name"] == disk).unwrap();
    let text = |key: &str| found[key].as_str().unwrap().to_owned();
    (text("bitmap_mode"), text("reason"))
}

fn demoted(summary: &Value, disk: &str, why: &str) {
    let (mode, reason) = mode(summary, disk);
    assert!(mode == "new" && reason.contains(why), "{disk}: {mode}, {reason}");
}

fn reused(summary: &Value, disk: &str) {
    let (mode, reason) = mode(summary, disk);
    assert_eq!(mode, "reuse", "{disk}: {reason}");
}

/// The bitmaps on a disk's node.
fn bitmaps(machine: &mut BareMachine, disk: &str) -> Vec<String> {
    let nodes = machine.execute("query-named-block-nodes", json!({})).unwrap();
    let name = format!("node-{disk}");
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == name.as_str()).unwrap();
    let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
}

fn on_bitmap(machine: &mut BareMachine, command: &str, disk: &str, name: &str, more: &Value) {
    let mut arguments = json!({"node": format!("node-{disk}"), "name": name});
    arguments.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    machine.execute(command, arguments).unwrap();
}

#[test]
fn a_disk_that_is_resized_or_new_is_read_in_full_and_one_that_is_gone_is_left_out() {
    let place = Place::new();
    let mut machine = machine(place.images(), &[("vda", "a"), ("vdb", "b")]);
    for disk in ["vda", "vdb"] {
        machine.disk_io(disk, "write -P 1 0 64k").unwrap();
    }
    let first = place.backup(&machine);
    machine.execute("block_resize", json!({"node-name": "node-vda", "size": 9 * MIB})).unwrap();
    machine.disk_io("vda", "write -P 2 8m 64k").unwrap();
    machine.disk_io("vdb", "write -P 2 64k 64k").unwrap();
    let second = place.backup(&machine);
    demoted(&second, "vda", "size changed");
    reused(&second, "vdb");
    assert_eq!(place.bytes(&second, "vda", &[0, 8 * MIB]), [1, 2]);
    machine.quit().unwrap();

    let mut machine = self::machine(place.images(), &[("vda", "a"), ("vdc", "c")]);
    machine.disk_io("vda", "write -P 3 0 512").unwrap();
    let third = place.backup(&machine);
    reused(&third, "vda");
    demoted(&third, "vdc", "does not have this disk");
    assert_eq!(third["disks"].as_array().unwrap().len(), 2);
    machine.quit().unwrap();

    // It comes back, and its bitmap tells what it missed.
    let mut machine = self::machine(place.images(), &[("vda", "a"), ("vdb", "b"), ("vdc", "c")]);
    machine.disk_io("vdb", "write -P 4 128k 512").unwrap();
    let fourth = place.backup(&machine);
    for disk in ["vda", "vdb", "vdc"] {
        reused(&fourth, disk);
    }
    assert_eq!(place.bytes(&fourth, "vdb", &[0, 64 << 10, 128 << 10]), [1, 2, 4]);
    assert_eq!(place.bytes(&first, "vda", &[0]), [1]);
}

#[test]
fn a_disk_that_is_another_one_by_the_same_name_is_read_in_full() {
    let place = Place::new();
    let mut machine = machine(place.images(), &[("vda", "a"), ("vdb", "b")]);
    machine.disk_io("vda", "write -P 1 0 64k").unwrap();
    machine.disk_io("vdb", "write -P 2 0 64k").unwrap();
    place.backup(&machine);
    machine.quit().unwrap();

    // Both have a bitmap of the same point and the same size, and each is the other now.
    let mut machine = self::machine(place.images(), &[("vda", "b"), ("vdb", "a")]);
    let swapped = place.backup(&machine);
    demoted(&swapped, "vda", "another disk's");
    demoted(&swapped, "vdb", "another disk's");
    assert_eq!(place.bytes(&swapped, "vda", &[0]), [2]);
    assert_eq!(place.bytes(&swapped, "vdb", &[0]), [1]);
    assert_eq!(bitmaps(&mut machine, "vda").len(), 1);
    machine.quit().unwrap();

    let mut machine = self::machine(place.images(), &[("vda", "new"), ("vdb", "a")]);
    machine.disk_io("vda", "write -P 5 0 512").unwrap();
    let replaced = place.backup(&machine);
    demoted(&replaced, "vda", "no bitmap");
    reused(&replaced, "vdb");
    assert_eq!(place.bytes(&replaced, "vda", &[0, 512]), [5, 0]);
}

/// Its bitmap is that of an older point and would tell what is different from that one; but on a copy nothing proves that it is no empty one
/// of the same name.
#[test]
fn an_image_that_is_an_older_copy_is_read_in_full() {
    let place = Place::new();
    let mut machine = machine(place.images(), &[("vda", "a")]);
    machine.disk_io("vda", "write -P 1 0 64k").unwrap();
    place.backup(&machine);
    machine.quit().unwrap();
    fs::copy(place.images().join("a"), place.images().join("copy")).unwrap();
    machine.start_again().unwrap();
    machine.disk_io("vda", "write -P 2 0 64k").unwrap();
    place.backup(&machine);
    machine.disk_io("vda", "write -P 3 64k 64k").unwrap();
    machine.quit().unwrap();
    fs::rename(place.images().join("copy"), place.images().join("a")).unwrap();
    machine.start_again().unwrap();
    machine.disk_io("vda", "write -P 4 128k 64k").unwrap();
    let third = place.backup(&machine);
    demoted(&third, "vda", "another image");
    assert_eq!(place.bytes(&third, "vda", &[0, 64 << 10, 128 << 10]), [1, 0, 4]);
}

#[test]
fn a_bitmap_that_someone_deleted_disabled_or_made_is_not_relied_on() {
    let place = Place::new();
    let mut machine = machine(place.images(), &[("vda", "a"), ("vdb", "b"), ("vdc", "c"), ("vdd", "d")]);
    on_bitmap(&mut machine, "block-dirty-bitmap-add", "vda", "somebody-else", &json!({"persistent": true}));
    let first = place.backup(&machine);
    let ours = |machine: &mut BareMachine, disk: &str| {
        bitmaps(machine, disk).into_iter().find(|name| name.starts_with("stillpoint.")).unwrap()
    };
    let names: Vec<_> = ["vda", "vdb", "vdc", "vdd"].iter().map(|disk| ours(&mut machine, disk)).collect();

    on_bitmap(&mut machine, "block-dirty-bitmap-remove", "vda", &names[0], &json!({}));
    on_bitmap(&mut machine, "block-dirty-bitmap-disable", "vdb", &names[1], &json!({}));
    // Ours is gone, and another one has its name: it has seen nothing.
    for (disk, name, more) in [
        ("vdc", &names[2], json!({"persistent": false})),
        ("vdd", &names[3], json!({"persistent": true, "granularity": 4096})),
    ] {
        machine.disk_io(disk, "write -P 1 1m 64k").unwrap();
        on_bitmap(&mut machine, "block-dirty-bitmap-remove", disk, name, &json!({}));
        on_bitmap(&mut machine, "block-dirty-bitmap-add", disk, name, &more);
    }
    let second = place.backup(&machine);
    demoted(&second, "vda", "no bitmap");
    demoted(&second, "vdb", "disabled by someone else");
    demoted(&second, "vdc", "made by someone else");
    demoted(&second, "vdd", "not the one that was made for point");
    for disk in ["vdc", "vdd"] {
        assert_eq!(place.bytes(&second, disk, &[MIB]), [1]);
        assert_eq!(place.bytes(&first, disk, &[MIB]), [0]);
    }
    assert!(bitmaps(&mut machine, "vda").contains(&"somebody-else".to_owned()));
    assert!(bitmaps(&mut machine, "vdc").contains(&names[2]), "it is not ours to remove");
    assert_eq!(bitmaps(&mut machine, "vdb").len(), 1);

    let third = place.backup(&machine);
    for disk in ["vda", "vdb", "vdd"] {
        reused(&third, disk);
    }
}

#[test]
fn what_was_written_during_and_after_a_failed_run_is_in_the_next_increment() {
    let place = Place::new();
    let mut machine = machine(place.images(), &[("vda", "a")]);
    let full = place.backup(&machine);
    let old = bitmaps(&mut machine, "vda");
    for (place_in_run, byte) in [("decided", 1u64), ("taken", 2)] {
        let arguments = common::backup_arguments(&machine.qmp(), &place.target(), &[]);
        let held = Held::at(&place.tool, &format!("{place_in_run}#1"), arguments);
        machine.disk_io("vda", &format!("write -P {byte} {} 512", byte * MIB)).unwrap();
        held.signal("TERM");
        assert_eq!(held.go_on().status, 130, "{place_in_run}");
        machine.disk_io("vda", &format!("write -P {byte} {} 512", byte * MIB + 4096)).unwrap();
        assert_eq!(
            bitmaps(&mut machine, "vda"),
            old,
            "the failed run's own bitmap is gone, the old one is not"
        );
    }
    let next = place.backup(&machine);
    reused(&next, "vda");
    let offsets = [MIB, MIB + 4096, 2 * MIB, 2 * MIB + 4096];
    assert_eq!(place.bytes(&next, "vda", &offsets), [1, 1, 2, 2]);
    assert_eq!(place.bytes(&full, "vda", &offsets), [0; 4]);
    let read = next["disks"][0]["read_bytes"].as_u64().unwrap();
    assert!(read <= 2 * (64 << 10), "{next}");
}

/// A snapshot that was gone back to would be a change that no bitmap saw; QEMU does not do that while there is one.
#[test]
fn an_internal_snapshot_cannot_be_gone_back_to_underneath_the_chain() {
    let place = Place::new();
    let mut machine = machine(place.images(), &[("vda", "a")]);
    machine.disk_io("vda", "write -P 1 0 64k").unwrap();
    machine.quit().unwrap();
    let image = place.images().join("a");
    let snapshot = |action: &str| {
        Command::new("qemu-img").args(["snapshot", action, "before"]).arg(&image).output().unwrap()
    };
    assert!(snapshot("-c").status.success());
    machine.start_again().unwrap();
    machine.disk_io("vda", "write -P 2 0 64k").unwrap();
    let first = place.backup(&machine);
    assert_eq!(place.bytes(&first, "vda", &[0]), [2]);
    machine.quit().unwrap();
    let gone_back = snapshot("-a").status.success();
    machine.start_again().unwrap();
    let second = place.backup(&machine);
    assert_eq!(place.bytes(&second, "vda", &[0]), [if gone_back { 1 } else { 2 }]);
}
