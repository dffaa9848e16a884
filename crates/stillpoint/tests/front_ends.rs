//! Front ends: each that is backed up is proven to write through its node, and each that QEMU offers is in the table of
//! `docs/front-ends.md`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, backup_arguments, point_name, tool};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};
use stillpoint_snapshot_access::FrontEnd;
use stillpoint_testkit::{BareMachine, Firmware, Qemu, firmware::written, skip, workspace};

/// Disks by name, each with the device that it is on. All but the flash that are proven are here.
const DISKS: &[(&str, &str)] = &[
    ("vda", "virtio-blk-pci,bootindex=1"),
    ("sda", "scsi-hd,bus=scsi.0"),
    ("sdb", "scsi-hd,removable=on,bus=scsi.0"),
    ("sdc", "scsi-hd,bus=lsi.0"),
    ("sdd", "scsi-hd,bus=bot.0"),
    ("sde", "scsi-hd,bus=uas.0"),
    ("hda", "ide-hd,bus=ide.1,unit=0"),
    ("sata", "ide-hd,bus=ahci.1"),
    ("nvme0", "nvme,serial=one"),
    ("nvme1", "nvme-ns,bus=controller"),
    ("usb0", "usb-storage,bus=uhci.0"),
    ("usb1", "usb-storage,removable=on,bus=ehci.0"),
    ("sd", "sd-card"),
    ("fd", "floppy"),
];
/// What newer QEMUs have besides.
const NEWER: (&str, &str) = ("cf", "ide-cf,bus=ide.0,unit=0");
const CONTROLLERS: &[&str] = &[
    "virtio-scsi-pci,id=scsi",
    "lsi53c895a,id=lsi",
    "piix3-usb-uhci,id=uhci",
    "usb-ehci,id=ehci",
    "usb-bot,id=bot,bus=uhci.0",
    "usb-uas,id=uas,bus=ehci.0",
    "ich9-ahci,id=ahci",
    "nvme,id=controller,serial=two",
    "sdhci-pci",
];

fn is_newer(qemu: &Qemu) -> bool {
    qemu.version.split('.').next().and_then(|major| major.parse().ok()).is_some_and(|major: u32| major >= 10)
}

/// Qcow2 and raw in turn; the floppy is raw, since its size tells what it is.
fn format(index: usize, name: &str) -> &'static str {
    if index.is_multiple_of(2) || name == "fd" || name == "vda" { "raw" } else { "qcow2" }
}

fn machine(qemu: &Qemu, disks: &[(&str, &str)]) -> BareMachine {
    BareMachine::start(qemu, |work| {
        let mut arguments: Vec<String> = vec!["-machine".into(), "pc".into()];
        arguments.extend(Firmware::arguments(work));
        for controller in CONTROLLERS {
            arguments.extend(["-device".into(), (*controller).into()]);
        }
        for (index, (name, device)) in disks.iter().enumerate() {
            let image = work.join(name);
            let size = if *name == "fd" { 1440 << 10 } else { 4 << 20 };
            fs::write(&image, if *name == "vda" { Firmware::boot_sector() } else { Vec::new() })?;
            let format = format(index, name);
            if format == "raw" {
                fs::File::options().write(true).open(&image)?.set_len(size)?;
            } else {
                let size = size.to_string();
                stillpoint_testkit::run(
                    std::process::Command::new("qemu-img")
                        .args(["create", "-qf", format])
                        .arg(&image)
                        .arg(size),
                )?;
            }
            let node = json!({"driver": format, "node-name": format!("node-{name}"),
                "file": {"driver": "file", "filename": image}});
            arguments.extend(["-blockdev".into(), node.to_string(), "-device".into()]);
            arguments.push(format!("{device},id={name},drive=node-{name}"));
        }
        Ok(arguments)
    })
    .unwrap()
}

/// Each disk of the point has this byte where the firmware writes.
fn holds(machine: &BareMachine, summary: &Value, disks: &[(&str, &str)], byte: u8) {
    let output = tempfile::tempdir_in(machine.work()).unwrap();
    let to = output.path().join("restored");
    tool(machine.work()).restore(&point_name(summary), &machine.work().join("target"), &to).unwrap();
    for (name, device) in disks {
        let image = fs::read(to.join(format!("{name}.raw"))).unwrap();
        assert_eq!(written(&image, *name == "fd"), [byte; 512], "{name} ({device})");
    }
}

fn modes<'a>(summary: &'a Value, mode: &str) -> BTreeMap<&'a str, &'a Value> {
    let disks = summary["disks"].as_array().unwrap();
    assert!(disks.iter().all(|disk| disk["bitmap_mode"] == mode), "{summary}");
    disks.iter().map(|disk| (disk["name"].as_str().unwrap(), &disk["dirty_bytes"])).collect()
}

/// Writes before, between and during backups through every device, and looks for each of them in the points.
fn proven(qemu: &Qemu) {
    let mut disks = DISKS.to_vec();
    if is_newer(qemu) {
        disks.push(NEWER);
    }
    let mut machine = machine(qemu, &disks);
    let (tool, target) = (tool(machine.work()), machine.work().join("target"));
    let mut firmware = Firmware::await_boot(machine.work()).unwrap();
    let state = |machine: &mut BareMachine| {
        let blocks = machine.execute("query-block", json!({})).unwrap();
        let state = |block: &Value| {
            json!([block["qdev"], block["inserted"]["node-name"], block["tray_open"], block["locked"]])
        };
        blocks.as_array().unwrap().iter().map(state).collect::<Vec<_>>()
    };
    let before = state(&mut machine);
    let backup = |machine: &BareMachine| tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();

    assert_eq!(firmware.write(0x11).unwrap(), disks.len(), "the firmware does not see all disks");
    let full = backup(&machine);
    assert_eq!(modes(&full, "new").len(), disks.len(), "{full}");
    holds(&machine, &full, &disks, 0x11);

    // Between backups: the bitmap has it.
    firmware.write(0x22).unwrap();
    // During one: the filter keeps the old data, and the disk answers as ever, no medium changed.
    let held = Held::at(&tool, "taken#1", backup_arguments(&machine.qmp(), &target, &[]));
    assert_eq!(firmware.write(0x33).unwrap(), disks.len());
    let outcome = held.go_on();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let increment = outcome.json().unwrap();
    for (disk, dirty) in modes(&increment, "reuse") {
        assert!(dirty.as_u64().is_some_and(|dirty| dirty > 0), "{disk}: {dirty}");
    }
    holds(&machine, &increment, &disks, 0x22);

    let last = backup(&machine);
    for (disk, dirty) in modes(&last, "reuse") {
        assert!(dirty.as_u64().is_some_and(|dirty| dirty > 0), "{disk}: {dirty}");
    }
    holds(&machine, &last, &disks, 0x33);
    assert_eq!(state(&mut machine), before);
    assert_eq!(firmware.write(0x44).unwrap(), disks.len());

    // Nothing is called proven that is not tried here, but the flash: `whole_machine.rs` has that.
    let mut tried = BTreeSet::from(["cfi.pflash01".to_owned()]);
    for block in machine.execute("query-block", json!({})).unwrap().as_array().unwrap() {
        let qdev = block["qdev"].as_str().unwrap();
        let path =
            if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") };
        let kind = machine.execute("qom-get", json!({"path": path, "property": "type"})).unwrap();
        tried.insert(kind.as_str().unwrap().to_owned());
    }
    let known = offered(&mut machine, qemu).into_iter().filter(|kind| FrontEnd::of(kind) == FrontEnd::Proven);
    assert_eq!(tried, known.collect());
}

#[test]
fn what_is_written_through_each_proven_front_end_is_in_the_points() {
    proven(&Qemu::installed().unwrap());
}

#[test]
fn the_same_on_qemu_10() {
    let Some(qemu) = Qemu::trixie() else {
        return skip("the_same_on_qemu_10", "no QEMU 10; `cargo xtask qemu10` installs it");
    };
    proven(&qemu);
}

/// Every device that QEMU calls storage, and every one that takes a drive.
fn offered(machine: &mut BareMachine, qemu: &Qemu) -> BTreeSet<String> {
    let help = qemu.prints("qemu-system-x86_64", &["-machine", "pc", "-device", "help"]).unwrap();
    let storage = help.split("Storage devices:").nth(1).unwrap().split("\n\n").next().unwrap();
    let mut found: BTreeSet<String> =
        storage.lines().filter_map(|line| Some(line.split('"').nth(1)?.to_owned())).collect();
    assert!(found.len() > 40, "{help}");
    let types =
        machine.execute("qom-list-types", json!({"implements": "device", "abstract": false})).unwrap();
    let kinds = types.as_array().unwrap().iter().map(|kind| kind["name"].as_str().unwrap().to_owned());
    // QEMU 7.2 crashes when it is asked about a display without OpenGL.
    for kind in kinds.filter(|kind| !kind.ends_with("-cpu") && !kind.contains("-gl")) {
        let properties = machine.execute("device-list-properties", json!({"typename": kind}));
        let Ok(properties) = properties else { continue };
        if properties.as_array().unwrap().iter().any(|property| property["name"] == "drive") {
            found.insert(kind);
        }
    }
    found
}

/// The table in the documentation: what happens with each device.
fn table() -> BTreeMap<String, String> {
    let text = fs::read_to_string(workspace().join("docs/front-ends.md")).unwrap();
    let mut table = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let (devices, happens) = (cells.next().unwrap(), cells.next().unwrap());
        for device in devices.split(", ") {
            let before = table.insert(device.trim_matches('`').to_owned(), happens.to_owned());
            assert_eq!(before, None, "{device} is there twice");
        }
    }
    table
}

/// What the code makes of a device: that of its front end, where the device has one of another type inside.
fn verdict(device: &str) -> FrontEnd {
    let inner = match device {
        "usb-storage" => "scsi-hd",
        _ if device.starts_with("virtio-blk-pci") => "virtio-blk-device",
        _ => device,
    };
    FrontEnd::of(inner)
}

fn table_is_complete(qemu: &Qemu) {
    let table = table();
    let mut machine =
        BareMachine::start(qemu, |_| Ok(vec!["-machine".into(), "pc".into(), "-S".into()])).unwrap();
    let offered = offered(&mut machine, qemu);
    let missing: Vec<_> = offered.iter().filter(|device| !table.contains_key(*device)).collect();
    assert!(missing.is_empty(), "not in docs/front-ends.md: {missing:?}");
    for (device, happens) in &table {
        let verdict = verdict(device);
        let words = match verdict {
            FrontEnd::Proven => "backed up",
            FrontEnd::ReadOnly => "the medium is backed up",
            FrontEnd::PassThrough | FrontEnd::WithoutNode => "refused",
            _ => {
                let nothing = happens.starts_with("nothing: ") || happens.starts_with("refused");
                assert!(nothing, "{device} is not known, and the table says: {happens}");
                continue;
            }
        };
        assert!(happens.starts_with(words), "{device} is {verdict:?}, and the table says: {happens}");
    }
}

#[test]
fn the_table_in_the_documentation_has_every_device_that_qemu_offers() {
    table_is_complete(&Qemu::installed().unwrap());
}

#[test]
fn the_table_in_the_documentation_has_every_device_that_qemu_10_offers() {
    let Some(qemu) = Qemu::trixie() else {
        return skip(
            "the_table_in_the_documentation_has_every_device_that_qemu_10_offers",
            "no QEMU 10; `cargo xtask qemu10` installs it",
        );
    };
    table_is_complete(&qemu);
}
