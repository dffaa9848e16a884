//! What belongs to a machine beside its disks: UEFI variables, the state of its TPM, its configuration.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, point_name, tool};
use serde_json::json;
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, Qemu, Tool, skip};

const FIRMWARE: &str = "/usr/share/OVMF";

/// A machine with UEFI firmware, whose CPUs stand still; by `-machine pflash1=` or by the legacy `-drive if=pflash`.
fn machine(qemu: &Qemu, legacy: bool) -> BareMachine {
    BareMachine::start(qemu, |work| {
        for name in ["CODE", "VARS"] {
            fs::copy(format!("{FIRMWARE}/OVMF_{name}_4M.fd"), work.join(name))?;
        }
        fs::File::create(work.join("vda.raw"))?.set_len(16 << 20)?;
        let path = |name: &str| work.join(name).display().to_string();
        let mut arguments: Vec<String> = vec!["-S".into(), "-m".into(), "256".into()];
        let mut add = |more: &[String]| arguments.extend(more.iter().cloned());
        if legacy {
            let drive = |name: &str, unit: u8, more: &str| {
                ["-drive".into(), format!("if=pflash,unit={unit},format=raw{more},file={}", path(name))]
            };
            add(&["-machine".into(), "q35".into()]);
            add(&drive("CODE", 0, ",readonly=on"));
            add(&drive("VARS", 1, ""));
        } else {
            let node = |name: &str, read_only: bool| {
                let file = json!({"driver": "file", "filename": path(name)});
                let node = json!({"driver": "raw", "node-name": name, "read-only": read_only, "file": file});
                ["-blockdev".into(), node.to_string()]
            };
            add(&["-machine".into(), "q35,pflash0=CODE,pflash1=VARS".into()]);
            add(&node("CODE", true));
            add(&node("VARS", false));
        }
        add(&["-drive".into(), format!("if=none,id=drive-vda,format=raw,file={}", path("vda.raw"))]);
        add(&["-device".into(), "virtio-blk-pci,id=vda,drive=drive-vda".into()]);
        Ok(arguments)
    })
    .unwrap()
}

fn restored(tool: &Tool, target: &Path, summary: &serde_json::Value, to: &Path) -> PathBuf {
    tool.restore(&point_name(summary), target, to).unwrap();
    to.to_owned()
}

#[test]
fn uefi_variables_are_of_the_same_instant() {
    for legacy in [false, true] {
        variables(&Qemu::installed().unwrap(), legacy);
    }
}

#[test]
fn uefi_variables_on_qemu_10() {
    let Some(qemu) = Qemu::trixie() else {
        return skip("uefi_variables_on_qemu_10", "no QEMU 10; `cargo xtask qemu10` installs it");
    };
    variables(&qemu, false);
}

fn variables(qemu: &Qemu, legacy: bool) {
    let mut machine = machine(qemu, legacy);
    let (tool, target) = (tool(machine.work()), machine.work().join("target"));
    let file = machine.work().join("VARS");
    let new = fs::read(&file).unwrap();
    let held = Held::at(&tool, "taken#1", common::backup_arguments(&machine.qmp(), &target, &[]));
    // The firmware starts, and writes its variables for the first time.
    machine.execute("cont", json!({})).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::read(&file).unwrap() == new {
        assert!(Instant::now() < deadline, "the firmware writes nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    let first = held.go_on().json().unwrap();
    let names: Vec<_> = first["disks"].as_array().unwrap().iter().map(|disk| disk["name"].clone()).collect();
    assert!(names.len() == 2 && names.contains(&json!("pflash1")), "the code is not the VM's: {names:?}");
    let output = restored(&tool, &target, &first, &machine.work().join("first"));
    assert!(fs::read(output.join("pflash1.raw")).unwrap() == new, "not of the instant");

    machine.execute("stop", json!({})).unwrap();
    let second = tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    assert!(
        second["disks"].as_array().unwrap().iter().all(|disk| disk["bitmap_mode"] == "reuse"),
        "{second}"
    );
    let output = restored(&tool, &target, &second, &machine.work().join("second"));
    let now = fs::read(&file).unwrap();
    assert!(now != new && fs::read(output.join("pflash1.raw")).unwrap() == now);
    assert_eq!(machine.status().unwrap(), "paused");
}

#[test]
fn configuration_firewall_and_tpm_come_back() {
    let machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 8 << 20)]).unwrap();
    let (tool, target) = (tool(machine.work()), machine.work().join("target"));
    let files = [("vm.conf", "cores: 2\n"), ("vm.fw", "[RULES]\n"), ("tpm2-00.permall", "\u{1}\0state")];
    for (name, content) in files {
        fs::write(machine.work().join(name), content).unwrap();
    }
    let path = |name: &str| machine.work().join(name);
    let config = path("stillpoint.toml");
    let text = format!(
        "[vm.vm]\nqmp = {:?}\nconfig = [{:?}]\nfirewall = {:?}\ntpm = {:?}\n",
        machine.qmp(),
        path("vm.conf"),
        path("vm.fw"),
        path("tpm2-00.permall")
    );
    fs::write(&config, text).unwrap();
    let mut arguments: Vec<OsString> = vec!["--config".into(), config.into()];
    arguments.extend(["backup", "vm", "--json", "--to"].map(OsString::from));
    arguments.push(target.clone().into());
    let quiet = tool.run(&arguments).unwrap();
    assert!(quiet.stderr.is_empty(), "{}", quiet.stderr);
    let output = restored(&tool, &target, &quiet.json().unwrap(), &path("restored"));
    for (name, content) in files {
        assert_eq!(fs::read(output.join("config").join(name)).unwrap(), content.as_bytes());
    }

    let held = Held::at(&tool, "decided#1", arguments.clone());
    fs::write(path("tpm2-00.permall"), "of the instant").unwrap();
    let changed = held.go_on();
    assert!(changed.stderr.contains("tpm2-00.permall changed around the instant"), "{}", changed.stderr);
    let output = restored(&tool, &target, &changed.json().unwrap(), &path("again"));
    assert_eq!(fs::read(output.join("config/tpm2-00.permall")).unwrap(), b"of the instant");
}
