//! What is in a point and what is not: every block device of a VM is backed up, or named with its reason, or the VM is
//! refused; and `doctor` says beforehand what `backup` then does.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, backup_arguments, point_name, tool};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};
use stillpoint_testkit::{BareMachine, Firmware, Outcome, Qemu, Tool, run, skip};

/// A size that SD cards can have.
const SIZE: usize = 2 << 20;

/// Makes an image full of `byte`, with holes at odd places.
fn image(work: &Path, name: &str, size: usize, byte: u8) -> PathBuf {
    let bytes: Vec<u8> = (0..size).map(|at| if at / 512 % 7 == 3 { 0 } else { byte }).collect();
    let path = work.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn qcow2(work: &Path, name: &str, from: &Path) -> PathBuf {
    let path = work.join(name);
    let mut convert = Command::new("qemu-img");
    run(convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(from).arg(&path)).unwrap();
    path
}

fn node(name: &str, format: &str, image: &Path, read_only: bool) -> [String; 2] {
    let file = json!({"driver": "file", "filename": image});
    let node = json!({"driver": format, "node-name": name, "read-only": read_only, "file": file});
    ["-blockdev".into(), node.to_string()]
}

fn device(device: &str) -> [String; 2] {
    ["-device".into(), device.into()]
}

/// A process that ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves an image as a vhost-user-blk device at `work/vhost`.
fn vhost_user(work: &Path) -> Daemon {
    let path = image(work, "vhost.raw", SIZE, 99);
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon.arg("--blockdev").arg(format!("driver=file,node-name=v,filename={}", path.display()));
    let socket = work.join("vhost").display().to_string();
    daemon.args([
        "--export",
        &format!("vhost-user-blk,id=e,node-name=v,writable=on,addr.type=unix,addr.path={socket}"),
        // It is in the background when its socket is there.
        "--pidfile",
        work.join("vhost.pid").to_str().unwrap(),
    ]);
    let child = Daemon(daemon.spawn().unwrap());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !work.join("vhost.pid").exists() {
        assert!(std::time::Instant::now() < deadline, "no vhost-user-blk");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    child
}

fn configured(tool: &Tool, work: &Path, text: &str, line: &[&str]) -> Outcome {
    let file = work.join("stillpoint.toml");
    fs::write(&file, text.replace('@', work.to_str().unwrap())).unwrap();
    let config = ["--config".to_owned(), file.to_str().unwrap().to_owned()];
    let line = line.iter().map(|word| word.replace('@', work.to_str().unwrap()));
    tool.run(config.into_iter().chain(line)).unwrap()
}

fn restored(tool: &Tool, work: &Path, summary: &Value) -> (tempfile::TempDir, PathBuf) {
    let output = tempfile::tempdir_in(work).unwrap();
    let to = output.path().join("restored");
    tool.restore(&point_name(summary), &work.join("target"), &to).unwrap();
    (output, to)
}

fn by_name<'a>(list: &'a Value, key: &str) -> BTreeMap<&'a str, &'a str> {
    let list = list.as_array().unwrap().iter();
    list.map(|one| (one["name"].as_str().unwrap(), one[key].as_str().unwrap())).collect()
}

fn nodes(machine: &mut BareMachine) -> Vec<String> {
    let nodes = machine.execute("query-named-block-nodes", json!({"flat": true})).unwrap();
    let mut names: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// One device of every kind.
fn machine_with_everything(
    qemu: &Qemu,
    daemon: &mut Option<Daemon>,
) -> (BareMachine, BTreeMap<&'static str, Vec<u8>>) {
    let mut contents = BTreeMap::new();
    let machine = BareMachine::start(qemu, |work| {
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |more: [String; 2]| arguments.extend(more);
        let mut file = |name: &'static str, size: usize, byte: u8| {
            let path = image(work, &format!("{name}.raw"), size, byte);
            contents.insert(name, fs::read(&path).unwrap());
            path
        };
        // The CPUs stand still: what this firmware is does not matter.
        add(["-S".into(), "-usb".into()]);
        add(["-object".into(), "memory-backend-memfd,id=memory,size=128M,share=on".into()]);
        add(["-machine".into(), "pc,memory-backend=memory".into()]);
        for (unit, more) in [(0, ",readonly=on"), (1, "")] {
            let name = if unit == 0 { "pflash0" } else { "pflash1" };
            let path = file(name, 256 << 10, 100 + unit);
            add(["-drive".into(), format!("if=pflash,unit={unit},format=raw{more},file={}", path.display())]);
        }
        for controller in ["virtio-scsi-pci,id=scsi", "sdhci-pci"] {
            add(device(controller));
        }
        // Disks and media.
        let place = [
            ("by-node", "virtio-blk-pci", false),
            ("removable", "scsi-hd,bus=scsi.0,removable=on,id=removable", false),
            ("stick", "usb-storage,removable=on,id=stick", false),
            ("card", "sd-card,id=card", false),
            ("read-only", "virtio-blk-pci,id=read-only", true),
            ("cd", "ide-cd,bus=ide.0,unit=0,id=cd", true),
        ];
        for (index, (name, on, read_only)) in place.into_iter().enumerate() {
            let path = file(name, SIZE, u8::try_from(index).unwrap() + 1);
            add(node(name, "raw", &path, read_only));
            add(device(&format!("{on},drive={name}")));
        }
        let path = file("cow", SIZE, 51);
        add(node("cow", "qcow2", &qcow2(work, "cow.qcow2", &path), true));
        add(device("scsi-hd,bus=scsi.0,id=cow,drive=cow"));
        let path = file("floppy", 1440 << 10, 52);
        add(node("floppy", "raw", &path, false));
        add(device("floppy,id=floppy,unit=0,drive=floppy"));
        let path = file("by-drive", SIZE, 53);
        add(["-drive".into(), format!("if=none,id=by-drive,format=raw,file={}", path.display())]);
        add(device("virtio-blk-pci,drive=by-drive"));
        // What is not a disk of the point.
        add(device("ide-cd,bus=ide.0,unit=1,id=empty-cd"));
        add(device("scsi-cd,bus=scsi.0"));
        let unused = image(work, "unused.raw", SIZE, 98);
        add(["-drive".into(), format!("if=none,id=unused,format=raw,file={}", unused.display())]);
        add(node("shared", "raw", &image(work, "shared.raw", SIZE, 97), false));
        add(device("virtio-blk-pci,id=shared,drive=shared,share-rw=on"));
        *daemon = Some(vhost_user(work));
        let socket = work.join("vhost").display().to_string();
        add(["-chardev".into(), format!("socket,id=vhost,path={socket}")]);
        add(device("vhost-user-blk-pci,id=vhost,chardev=vhost"));
        Ok(arguments)
    })
    .unwrap();
    (machine, contents)
}

fn everything(qemu: &Qemu) {
    let mut daemon = None;
    let (mut machine, mut contents) = machine_with_everything(qemu, &mut daemon);
    // Hot-plugged, without an id.
    let path = image(machine.work(), "plugged.raw", SIZE, 54);
    contents.insert("plugged", fs::read(&path).unwrap());
    let file = json!({"driver": "file", "filename": path});
    machine.execute("blockdev-add", json!({"driver": "raw", "node-name": "plugged", "file": file})).unwrap();
    machine.execute("device_add", json!({"driver": "virtio-blk-pci", "drive": "plugged"})).unwrap();
    contents.remove("pflash0");
    let work = machine.work().to_owned();
    let (tool, before) = (tool(&work), nodes(&mut machine));
    let vm = |exclude: &str| format!("[vm.vm]\nqmp = \"@/qmp\"\nexclude = [{exclude}]\n");
    let backup = ["backup", "vm", "--to", "@/target", "--json"];

    // Two disks that cannot be backed up: neither `doctor` nor `backup` passes over them.
    let doctor = configured(&tool, &work, &vm(""), &["doctor", "vm"]);
    assert_eq!(doctor.status, 1, "{doctor:?}");
    for words in
        ["WRONG disk shared: it has share-rw=on", "WRONG disk vhost: its front end is vhost-user-blk"]
    {
        assert!(doctor.stdout.contains(words), "{}", doctor.stdout);
    }
    for (exclude, left) in [("\"vhost\"", "disk shared"), ("\"shared\"", "disk vhost")] {
        let refused = configured(&tool, &work, &vm(exclude), &backup);
        assert_eq!(refused.status, 1, "{refused:?}");
        assert!(refused.stderr.contains(left) && refused.stderr.contains("was not touched"), "{refused:?}");
    }
    assert!(!work.join("target").exists());
    assert_eq!(nodes(&mut machine), before);

    let line = [&backup[..], &["--exclude", "vhost"]].concat();
    let first = configured(&tool, &work, &vm("\"shared\""), &line).json().unwrap();
    let modes = by_name(&first["disks"], "bitmap_mode");
    let names: Vec<_> = modes.keys().copied().collect();
    assert_eq!(names, contents.keys().copied().collect::<Vec<_>>());
    let skipped = by_name(&first["skipped"], "reason");
    let cd = skipped.keys().find(|name| name.starts_with("device-")).copied().unwrap();
    let expected = BTreeMap::from([
        ("empty-cd", "the drive is empty"),
        (cd, "the drive is empty"),
        ("pflash0", "it is the firmware's code, which only the host's packages change"),
        ("shared", "excluded by the configuration"),
        ("unused", "no device of the guest uses this drive"),
        ("vhost", "excluded by --exclude"),
    ]);
    assert_eq!(skipped, expected);
    assert_eq!(first["warnings"], json!([]));
    assert_eq!(nodes(&mut machine), before);

    // Again, and for a person.
    let second = configured(&tool, &work, &vm("\"shared\""), &line).json().unwrap();
    for (name, mode) in by_name(&second["disks"], "bitmap_mode") {
        let read_only = ["cd", "cow", "read-only"].contains(&name);
        assert_eq!(mode, if read_only { "none" } else { "reuse" }, "{name}");
    }
    for summary in [&first, &second] {
        let (_output, to) = restored(&tool, &work, summary);
        for (name, content) in &contents {
            assert!(fs::read(to.join(format!("{name}.raw"))).unwrap() == *content, "{name} is another");
        }
    }
    let line = ["backup", "vm", "--to", "@/target", "--exclude", "vhost"];
    let told = configured(&tool, &work, &vm("\"shared\""), &line);
    let points = tool.run(["points", "--json", "--to", work.join("target").to_str().unwrap()]).unwrap();
    let points = points.json().unwrap();
    let doctor = configured(&tool, &work, &vm("\"shared\", \"vhost\""), &["doctor", "vm"]);
    assert_eq!(doctor.status, 0, "{doctor:?}");
    for (name, reason) in &expected {
        assert!(told.stdout.contains(&format!("not in the point: {name} ({reason})")), "{}", told.stdout);
        let of_point = by_name(&points[0]["record"]["skipped"], "reason");
        assert_eq!(of_point.get(name), Some(reason));
        let said = if *name == "vhost" { "excluded by the configuration" } else { reason };
        assert!(doctor.stdout.contains(&format!("not backed up: {name} ({said})")), "{}", doctor.stdout);
    }
    for name in contents.keys() {
        assert!(doctor.stdout.contains(&format!("ok    disk {name} (")), "{name}: {}", doctor.stdout);
    }
}

#[test]
fn each_block_device_is_in_the_point_or_named_with_its_reason() {
    everything(&Qemu::installed().unwrap());
}

#[test]
fn each_block_device_is_in_the_point_or_named_on_qemu_10() {
    let Some(qemu) = Qemu::trixie() else {
        return skip(
            "each_block_device_is_in_the_point_or_named_on_qemu_10",
            "no QEMU 10; `cargo xtask qemu10` installs it",
        );
    };
    everything(&qemu);
}

/// A medium goes while it is read: the point has it as it was, and what is left of the drive is let alone.
fn ejected(qemu: &Qemu) {
    let mut machine = BareMachine::start(qemu, |work| {
        let mut arguments = Firmware::arguments(work).to_vec();
        if qemu.version.starts_with("10.") {
            // Whatever uses it, the instant is then taken by way of junctions (ADR 0017), which the CD has none of.
            arguments.extend(["-object".into(), "iothread,id=thread".into()]);
        }
        let boot = work.join("vda");
        fs::write(&boot, Firmware::boot_sector())?;
        fs::File::options().write(true).open(&boot)?.set_len(1 << 20)?;
        arguments.extend(node("vda", "raw", &boot, false));
        arguments.extend(device("virtio-blk-pci,id=vda,drive=vda,bootindex=1"));
        arguments.extend(device("virtio-scsi-pci,id=scsi"));
        for (name, on, read_only) in [("hd", "scsi-hd,removable=on", false), ("cd", "scsi-cd", true)] {
            arguments.extend(node(name, "raw", &image(work, name, SIZE, 7), read_only));
            arguments.extend(device(&format!("{on},bus=scsi.0,id={name},drive={name}")));
        }
        Ok(arguments)
    })
    .unwrap();
    // It is done with its drives then, and moves no tray.
    Firmware::await_boot(machine.work()).unwrap();
    let (work, before) = (machine.work().to_owned(), nodes(&mut machine));
    let (tool, target) = (tool(&work), work.join("target"));
    let content = fs::read(work.join("hd")).unwrap();
    let held = Held::at(&tool, "taken#1", backup_arguments(&machine.qmp(), &target, &[]));
    for id in ["hd", "cd"] {
        machine.execute("blockdev-open-tray", json!({"id": id, "force": true})).unwrap();
        machine.execute("blockdev-remove-medium", json!({"id": id})).unwrap();
    }
    let outcome = held.go_on();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let (_output, to) = restored(&tool, &work, &outcome.json().unwrap());
    for name in ["hd.raw", "cd.raw"] {
        assert!(fs::read(to.join(name)).unwrap() == content, "{name}");
    }
    assert_eq!(nodes(&mut machine), before);

    let empty = tool.backup("vm", &machine.qmp(), &target, &["--exclude", "vda"]).unwrap();
    assert_eq!(empty["disks"], json!([]));
    assert_eq!(by_name(&empty["skipped"], "reason").len(), 3, "{empty}");
    assert!(empty["warnings"][0].as_str().unwrap().contains("all 3 block devices"), "{empty}");

    for id in ["hd", "cd"] {
        machine.execute("blockdev-insert-medium", json!({"id": id, "node-name": id})).unwrap();
        machine.execute("blockdev-close-tray", json!({"id": id})).unwrap();
    }
    let back = tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    let modes = by_name(&back["disks"], "bitmap_mode");
    assert_eq!(modes.get("cd"), Some(&"none"), "{back}");
    let (_output, to) = restored(&tool, &work, &back);
    assert!(fs::read(to.join("hd.raw")).unwrap() == content);
}

#[test]
fn a_medium_that_is_ejected_in_mid_run_is_in_the_point() {
    ejected(&Qemu::installed().unwrap());
}

#[test]
fn a_medium_that_is_ejected_in_mid_run_is_in_the_point_on_qemu_10() {
    let Some(qemu) = Qemu::trixie() else {
        return skip(
            "a_medium_that_is_ejected_in_mid_run_is_in_the_point_on_qemu_10",
            "no QEMU 10; `cargo xtask qemu10` installs it",
        );
    };
    ejected(&qemu);
}

#[test]
fn a_node_that_two_devices_write_is_refused_by_doctor_and_backup_alike() {
    // SD cards share their node without being told to.
    let mut machine = BareMachine::start(&Qemu::installed().unwrap(), |work| {
        let mut arguments = node("both", "raw", &image(work, "both", SIZE, 7), false).to_vec();
        for name in ["one", "two"] {
            arguments.extend(device(&format!("sdhci-pci,id=bus-{name}")));
            arguments.extend(device(&format!("sd-card,id={name},drive=both")));
        }
        Ok(arguments)
    })
    .unwrap();
    let (tool, before) = (tool(machine.work()), nodes(&mut machine));
    let doctor = tool.run(["doctor", "--qmp", machine.qmp().to_str().unwrap()]).unwrap();
    assert_eq!(doctor.status, 1, "{doctor:?}");
    assert!(doctor.stdout.contains("WRONG disk one: device two writes it too"), "{}", doctor.stdout);
    assert!(doctor.stdout.contains("--exclude one") && !doctor.stdout.contains("[vm."), "{}", doctor.stdout);
    let target = machine.work().join("target");
    for more in [&[][..], &["--exclude", "one"]] {
        let outcome = tool.run(backup_arguments(&machine.qmp(), &target, more)).unwrap();
        assert_eq!(outcome.status, 1, "{outcome:?}");
        assert!(outcome.stderr.contains("writes it too"), "{}", outcome.stderr);
    }
    assert_eq!(nodes(&mut machine), before);
}

#[test]
fn an_image_that_another_program_can_write_is_told_and_one_that_it_does_is_refused() {
    let mut machine = BareMachine::start(&Qemu::installed().unwrap(), |work| {
        let mut arguments = Vec::new();
        for (name, locking) in [("vda", "auto"), ("vdb", "off")] {
            let file = json!({"driver": "file", "filename": image(work, name, SIZE, 7), "locking": locking});
            let node = json!({"driver": "raw", "node-name": name, "file": file});
            arguments.extend(["-blockdev".into(), node.to_string()]);
            arguments.extend(device(&format!("virtio-blk-pci,id={name},drive={name}")));
        }
        Ok(arguments)
    })
    .unwrap();
    let (tool, before) = (tool(machine.work()), nodes(&mut machine));
    let target = machine.work().join("target");
    let backup = || tool.run(backup_arguments(&machine.qmp(), &target, &[])).unwrap();
    let warned = |summary: &Value| {
        let [Value::String(warning)] = &summary["warnings"].as_array().unwrap()[..] else {
            panic!("{summary}")
        };
        assert!(warning.starts_with("disk vdb: ") && warning.contains("locking=off"), "{warning}");
    };
    warned(&backup().json().unwrap());
    for disk in ["vda", "vdb"] {
        let path = machine.work().join(disk);
        let reader = fs::File::open(&path).unwrap();
        warned(&backup().json().unwrap());
        drop(reader);
        let writer = fs::File::options().write(true).open(&path).unwrap();
        let refused = backup();
        assert_eq!(refused.status, 1, "{refused:?}");
        let told = format!("disk {disk} of VM vm cannot be backed up: process {} (", std::process::id());
        assert!(refused.stderr.contains(&told), "{}", refused.stderr);
        drop(writer);
    }
    warned(&backup().json().unwrap());
    assert_eq!(nodes(&mut machine), before);
}

#[test]
fn a_freeze_that_was_wanted_and_not_had_is_told() {
    let machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 1 << 20)]).unwrap();
    let (tool, target) = (tool(machine.work()), machine.work().join("target"));
    let agent = machine.work().join("no-agent");
    let more = ["--agent", agent.to_str().unwrap()];
    let summary = tool.backup("vm", &machine.qmp(), &target, &more).unwrap();
    assert_eq!(summary["consistency"], "crash-consistent");
    let reason = summary["consistency_reason"].as_str().unwrap();
    assert!(reason.contains("agent"), "{reason}");
    let warning = summary["warnings"][0].as_str().unwrap();
    assert!(warning.contains("not frozen") && warning.contains(reason), "{warning}");
    let without = tool.backup("vm", &machine.qmp(), &target, &[]).unwrap();
    assert_eq!(without["warnings"], json!([]));
    assert_eq!(without["consistency_reason"], "no guest agent is configured");
}

#[test]
fn doctor_knows_a_run_that_is_under_way() {
    let machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 1 << 20)]).unwrap();
    let (tool, target) = (tool(machine.work()), machine.work().join("target"));
    let doctor = || tool.run(["doctor", "--qmp", machine.qmp().to_str().unwrap()]).unwrap();
    let held = Held::at(&tool, "taken#1", backup_arguments(&machine.qmp(), &target, &[]));
    let busy = doctor();
    assert_eq!(busy.status, 4, "{busy:?}");
    let told = format!(
        "a run is under way: the VM at {} is locked by process {}",
        machine.qmp().display(),
        held.pid()
    );
    assert!(busy.stdout.contains(&told) && !busy.stdout.contains("WRONG"), "{}", busy.stdout);
    assert_eq!(held.go_on().status, 0);
    let free = doctor();
    assert_eq!(free.status, 0, "{free:?}");
}

/// Encrypted images are the same disks whether the VM runs or is off, and without the key the reason is told.
#[test]
fn encrypted_images_of_a_vm_that_is_off_are_read_with_their_key() {
    let mut machine = BareMachine::start(&Qemu::installed().unwrap(), |work| {
        fs::write(work.join("key"), "a passphrase")?;
        let mut arguments =
            vec!["-object".into(), format!("secret,id=key,file={}", work.join("key").display())];
        for (name, format, option) in
            [("cow", "qcow2", "encrypt.key-secret=key"), ("whole", "luks", "key-secret=key")]
        {
            let path = work.join(name);
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", format, "--object"]);
            create.arg(format!("secret,id=key,file={}", work.join("key").display()));
            let more =
                if format == "qcow2" { "encrypt.format=luks,encrypt.iter-time=10," } else { "iter-time=10," };
            create.args(["-o", &format!("{more}{option}")]).arg(&path).arg("4M");
            // It measures the processor for the key, and says now and then that it could not.
            let mut made = run(&mut create);
            for _ in 0..9 {
                made = made.or_else(|_| run(&mut create));
            }
            made?;
            let mut node =
                json!({"driver": format, "node-name": name, "file": {"driver": "file", "filename": path}});
            if format == "luks" {
                node["key-secret"] = "key".into();
            } else {
                node["encrypt"] = json!({"format": "luks", "key-secret": "key"});
            }
            arguments.extend(["-blockdev".into(), node.to_string()]);
            arguments.extend(device(&format!("virtio-blk-pci,id={name},drive={name}")));
        }
        Ok(arguments)
    })
    .unwrap();
    let work = machine.work().to_owned();
    let tool = tool(&work);
    let disks = |key: &str| {
        let disk = |name: &str, format: &str| {
            format!("{name} = {{ image = \"@/{name}\", format = \"{format}\"{key} }}")
        };
        format!(
            "[vm.vm]\nqmp = \"@/qmp\"\n[vm.vm.disks]\n{}\n{}\n",
            disk("cow", "qcow2"),
            disk("whole", "luks")
        )
    };
    let with_key = disks(", key-file = \"@/key\"");
    let backup = ["backup", "vm", "--to", "@/target", "--json"];
    for disk in ["cow", "whole"] {
        machine.disk_io(disk, "write -P 5 0 1M").unwrap();
    }
    let running = configured(&tool, &work, &with_key, &backup).json().unwrap();
    for disk in ["cow", "whole"] {
        machine.disk_io(disk, "write -P 6 512k 1M").unwrap();
    }
    machine.quit().unwrap();

    let without = configured(&tool, &work, &disks(""), &backup);
    assert_eq!(without.status, 1, "{without:?}");
    for words in ["is encrypted", "disks.cow = { ..., key-file = "] {
        assert!(without.stderr.contains(words), "{}", without.stderr);
    }
    fs::write(work.join("wrong"), "a passphrase\n").unwrap();
    let wrong = configured(&tool, &work, &disks(", key-file = \"@/wrong\""), &backup);
    assert!(wrong.status == 1 && wrong.stderr.contains("Invalid password"), "{wrong:?}");

    let off = configured(&tool, &work, &with_key, &backup).json().unwrap();
    let modes = by_name(&off["disks"], "bitmap_mode");
    assert_eq!(modes, BTreeMap::from([("cow", "reuse"), ("whole", "none")]), "{off}");
    // What was never written to LUKS on a raw image is noise.
    for (summary, parts) in [(&running, &[5u8, 5][..]), (&off, &[5, 6, 6])] {
        let (_output, to) = restored(&tool, &work, summary);
        for disk in ["cow.raw", "whole.raw"] {
            let image = fs::read(to.join(disk)).unwrap();
            for (half, byte) in image.chunks(512 << 10).zip(parts) {
                assert!(half.iter().all(|found| found == byte), "{disk}: {byte}");
            }
        }
    }
}

/// A VM that is off is known by its last point or its configuration; what those do not tell of is named.
#[test]
fn what_is_not_known_of_a_vm_that_is_off_is_named() {
    let mut machine = BareMachine::start(&Qemu::installed().unwrap(), |work| {
        let mut arguments = Vec::new();
        for name in ["vda", "vdb"] {
            let path = qcow2(work, name, &image(work, "from", SIZE, 7));
            arguments.extend(node(name, "qcow2", &path, false));
            arguments.extend(device(&format!("virtio-blk-pci,id={name},drive={name}")));
        }
        arguments.extend(node("cd", "raw", &image(work, "cd", SIZE, 8), true));
        arguments.extend(device("ide-cd,id=cd,drive=cd"));
        arguments.extend(device("floppy,id=fd"));
        Ok(arguments)
    })
    .unwrap();
    let (work, tool) = (machine.work().to_owned(), tool(machine.work()));
    let recorded = "[vm.vm]\nqmp = \"@/qmp\"\n";
    let backup = ["backup", "vm", "--to", "@/target", "--json"];
    configured(&tool, &work, recorded, &backup).json().unwrap();
    machine.quit().unwrap();

    let line = [&backup[..], &["--exclude", "vdb"]].concat();
    let off = configured(&tool, &work, recorded, &line).json().unwrap();
    assert_eq!(by_name(&off["disks"], "bitmap_mode"), BTreeMap::from([("vda", "reuse")]), "{off}");
    let skipped = by_name(&off["skipped"], "reason");
    assert_eq!(skipped.get("vdb"), Some(&"excluded by --exclude"), "{off}");
    assert!(skipped["cd"].contains("read-only") && skipped["fd"].contains("last point"), "{off}");
    assert_eq!(off["warnings"], json!([]), "{off}");

    let only = format!("{recorded}disks = {{ vdb = {{ image = \"@/vdb\", format = \"qcow2\" }} }}\n");
    let off = configured(&tool, &work, &only, &backup).json().unwrap();
    assert_eq!(by_name(&off["disks"], "bitmap_mode").keys().collect::<Vec<_>>(), [&"vdb"], "{off}");
    let skipped = by_name(&off["skipped"], "reason");
    assert!(skipped["vda"].contains("not named under `disks`"), "{off}");
}
