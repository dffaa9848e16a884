//! VMs that do not run: nothing stays in them, however many runs there are.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::tool;
use serde_json::{Value, json};
use std::{fs, path::PathBuf};
use stillpoint_testkit::{BareMachine, Qemu, skip};

const RUNS: usize = 50;

/// What QEMU has: its open files but those of its monitors, whose connections come and go; descriptor sets; nodes.
fn holdings(machine: &mut BareMachine) -> (Vec<PathBuf>, Value, Vec<String>) {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", machine.pid().unwrap())).unwrap();
    let files = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let mut files: Vec<_> = files.filter(|file| file.is_absolute()).collect();
    files.sort();
    let sets = machine.execute("query-fdsets", json!({})).unwrap();
    let nodes = machine.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    let mut nodes: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect();
    nodes.sort();
    (files, sets, nodes)
}

fn nothing_stays(qemu: &Qemu, paused: &str) {
    let mut machine = BareMachine::start(qemu, |work| {
        let mut arguments = vec!["-S".to_owned()];
        for name in ["vda", "vdb"] {
            let image = work.join(format!("{name}.raw"));
            fs::File::create(&image)?.set_len(1 << 20)?;
            let drive = format!("if=none,id=drive-{name},format=raw,file={}", image.display());
            arguments.extend(["-drive".into(), drive]);
            arguments.extend(["-device".into(), format!("virtio-blk-pci,id={name},drive=drive-{name}")]);
        }
        Ok(arguments)
    })
    .unwrap();
    if paused == "paused" {
        machine.execute("cont", json!({})).unwrap();
        machine.execute("stop", json!({})).unwrap();
    }
    assert_eq!(machine.status().unwrap(), paused);
    let before = holdings(&mut machine);
    let tool = tool(machine.work());
    let target = machine.work().join("target");
    for _ in 0..RUNS {
        tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    }
    assert_eq!(holdings(&mut machine), before);
    assert_eq!(machine.status().unwrap(), paused);
}

#[test]
fn fifty_runs_leave_nothing_in_a_vm_that_never_ran() {
    nothing_stays(&Qemu::installed().unwrap(), "prelaunch");
}

#[test]
fn fifty_runs_leave_nothing_in_a_vm_that_is_paused() {
    let Some(qemu) = Qemu::trixie() else {
        return skip("paused VMs on QEMU 10", "no QEMU 10; `cargo xtask qemu10` installs it");
    };
    nothing_stays(&qemu, "paused");
}

#[test]
fn a_run_in_which_the_vm_is_paused_leaves_nothing() {
    let mut machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 1 << 20)]).unwrap();
    let before = holdings(&mut machine);
    let tool = tool(machine.work());
    let arguments = common::backup_arguments(&machine.qmp(), &machine.work().join("target"), &[]);
    let held = common::Held::at(&tool, "taken#1", arguments);
    machine.execute("stop", json!({})).unwrap();
    assert_eq!(held.go_on().status, 0);
    assert_eq!(holdings(&mut machine), before);
}
