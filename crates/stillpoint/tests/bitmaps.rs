//! The bitmaps that stay in a VM's images: listed, and removed on purpose, so that internal snapshots can be gone back to.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::tool;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};
use stillpoint_testkit::{BareMachine, Outcome, Qemu, Tool};

struct Scene {
    directory: tempfile::TempDir,
    machine: BareMachine,
    tool: Tool,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("a.qcow2");
        let mut make = Command::new("qemu-img");
        assert!(make.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("8M").status().unwrap().success());
        let machine = BareMachine::start(&Qemu::installed().unwrap(), |_| {
            let file = json!({"driver": "file", "filename": image});
            let node = json!({"driver": "qcow2", "node-name": "node-vda", "file": file});
            let device = "virtio-blk-pci,id=vda,drive=node-vda".to_owned();
            Ok(vec!["-blockdev".into(), node.to_string(), "-device".into(), device])
        });
        let tool = tool(directory.path());
        Self { machine: machine.unwrap(), tool, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn backup(&self, target: &str) -> Value {
        self.tool.backup("vm", &self.machine.qmp(), &self.path(target), &[]).unwrap()
    }

    fn bitmaps(&self, line: &[&str]) -> Outcome {
        let mut arguments = vec!["bitmaps"];
        arguments.extend(line);
        let qmp = self.machine.qmp();
        arguments.extend(["--qmp", qmp.to_str().unwrap()]);
        self.tool.run(arguments).unwrap()
    }

    fn listed(&self) -> Vec<Value> {
        let outcome = self.bitmaps(&["list", "--json"]);
        outcome.json().unwrap().as_array().unwrap().clone()
    }

    fn monitor(&mut self, line: &str) -> String {
        let said = self.machine.execute("human-monitor-command", json!({"command-line": line})).unwrap();
        said.as_str().unwrap().to_owned()
    }

    fn names(&mut self) -> Vec<String> {
        let blocks = self.machine.execute("query-block", json!({})).unwrap();
        let bitmaps = blocks[0]["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
        bitmaps.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
    }
}

fn mode(summary: &Value) -> (&str, &str) {
    let disk = &summary["disks"][0];
    (disk["bitmap_mode"].as_str().unwrap(), disk["reason"].as_str().unwrap())
}

#[test]
fn a_vm_goes_back_to_an_internal_snapshot_once_its_bitmaps_are_removed() {
    let mut scene = Scene::new();
    scene.machine.disk_io("vda", "write -P 1 0 64k").unwrap();
    assert_eq!(scene.monitor("savevm before"), "");
    scene.machine.disk_io("vda", "write -P 2 0 64k").unwrap();
    scene.backup("target");
    let refused = scene.monitor("loadvm before");
    assert!(refused.contains("bitmap"), "without a bitmap in the way this shows nothing: {refused}");

    let foreign = json!({"node": "node-vda", "name": "somebody-else"});
    scene.machine.execute("block-dirty-bitmap-add", foreign).unwrap();
    let outcome = scene.bitmaps(&["remove", "--all"]);
    assert_eq!((outcome.status, outcome.stdout.trim()), (0, "1 bitmap removed"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("reads those disks in full"), "{}", outcome.stderr);
    assert_eq!(scene.names(), ["somebody-else"]);
    let foreign = json!({"node": "node-vda", "name": "somebody-else"});
    scene.machine.execute("block-dirty-bitmap-remove", foreign).unwrap();
    assert_eq!(scene.monitor("loadvm before"), "");
    scene.machine.execute("cont", json!({})).unwrap();

    let next = scene.backup("target");
    assert!(mode(&next).0 == "new" && mode(&next).1.contains("no bitmap"), "{next}");
    let restored =
        common::restore(&scene.tool, &scene.path("target"), "vm/latest", &["vda"], &scene.path("out"));
    assert_eq!(std::fs::read(&restored[0]).unwrap()[0], 1, "what was gone back to is in the point");

    // The same by qemu-img, while the VM is off.
    scene.machine.quit().unwrap();
    let image = scene.path("a.qcow2");
    let gone_back =
        || Command::new("qemu-img").args(["snapshot", "-a", "before"]).arg(&image).output().unwrap();
    assert!(!gone_back().status.success(), "without a bitmap in the way this shows nothing");
    let config = scene.path("stillpoint.toml");
    std::fs::write(&config, format!("[vm.vm]\ndisks.vda = {{ image = {image:?}, format = \"qcow2\" }}\n"))
        .unwrap();
    let outcome = |line: &[&str]| {
        let config = ["--config", config.to_str().unwrap()];
        scene.tool.run(config.iter().chain(line)).unwrap()
    };
    let listed = outcome(&["bitmaps", "list", "vm", "--json"]).json().unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    let removed = outcome(&["bitmaps", "remove", "vm", "--all"]);
    assert_eq!(removed.status, 0, "{}", removed.stderr);
    let output = gone_back();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn bitmaps_are_told_apart_by_their_targets_and_those_of_targets_that_are_gone_can_go() {
    let mut scene = Scene::new();
    for target in ["one", "two", "three"] {
        scene.backup(target);
    }
    scene.machine.disk_io("vda", "write -P 1 1m 128k").unwrap();
    std::fs::remove_dir_all(scene.path("two")).unwrap();
    let listed = scene.listed();
    assert_eq!(listed.len(), 3, "{listed:?}");
    let place = |bitmap: &Value| {
        let name = bitmap["target_name"].as_str().unwrap();
        Path::new(name).file_name().unwrap().to_str().unwrap().to_owned()
    };
    for bitmap in &listed {
        let (name, state) = (place(bitmap), bitmap["target_state"].as_str().unwrap());
        assert_eq!(state, if name == "two" { "gone" } else { "reachable" }, "{bitmap}");
        assert_eq!(bitmap["dirty_bytes"].as_u64(), Some(128 << 10), "{bitmap}");
        assert_eq!((&bitmap["disk"], &bitmap["persistent"]), (&json!("vda"), &json!(true)), "{bitmap}");
    }
    let shown = scene.bitmaps(&["list"]).stdout;
    assert!(shown.contains("gone; it was in") && shown.lines().count() == 4, "{shown}");

    assert_eq!(scene.bitmaps(&["remove", "--gone"]).stdout.trim(), "1 bitmap removed");
    let left: Vec<_> = scene.listed().iter().map(place).collect();
    assert!(left.len() == 2 && !left.contains(&"two".to_owned()), "{left:?}");
    let one = scene.path("one");
    let outcome = scene.bitmaps(&["remove", "--to", one.to_str().unwrap()]);
    assert_eq!(outcome.stdout.trim(), "1 bitmap removed", "{}", outcome.stderr);
    assert_eq!(mode(&scene.backup("three")).0, "reuse");
    assert_eq!(mode(&scene.backup("one")).0, "new");

    // A place where no target ever was is no word for all of them.
    let nowhere = scene.path("nowhere");
    let outcome = scene.bitmaps(&["remove", "--to", nowhere.to_str().unwrap()]);
    assert_eq!(outcome.status, 1, "{}", outcome.stderr);
    assert_eq!(scene.bitmaps(&["remove"]).status, 2);
    assert_eq!(scene.names().len(), 2);
}
