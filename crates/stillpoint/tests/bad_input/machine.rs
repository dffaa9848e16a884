//! VMs that cannot be backed up, or not as they are.

use super::*;

#[test]
fn qemu_is_too_old() {
    let place = Place::new();
    let peer = Scripted::listen(&place.path("qmp"), [6, 2, 0], &[]);
    backup_failed(&place.backup(), 1, &["6.2.0", "too old", UNTOUCHED]);
    peer.was_only_looked_at();
    assert!(!place.path("target").exists());
}

#[test]
fn qemu_is_so_old_that_it_lacks_what_left_overs_are_found_with() {
    let place = Place::new();
    let peer = Scripted::listen(&place.path("qmp"), [4, 2, 0], &["query-block-exports"]);
    backup_failed(&place.backup(), 1, &["4.2.0", "too old", UNTOUCHED]);
    peer.was_only_looked_at();
}

#[test]
fn a_disk_has_an_iothread_that_this_qemu_would_abort_on() {
    let version = Qemu::installed().unwrap().version;
    let number: Vec<u32> = version.split('.').filter_map(|part| part.parse().ok()).collect();
    if number >= vec![8, 2, 1] {
        skip("iothread", &format!("QEMU {version} can export such a disk"));
        return;
    }
    let place = Place::new();
    place.image("vda.img", MIB);
    place.image("vdb.img", MIB);
    let drive = format!("if=none,id=d0,file={},format=raw", place.text("vda.img"));
    let other = format!("if=none,id=d1,file={},format=raw", place.text("vdb.img"));
    let mut vm = place.qemu(&[
        "-M",
        "q35",
        "-S",
        "-object",
        "iothread,id=t0",
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,id=vda,drive=d0,iothread=t0",
        "-drive",
        &other,
        "-device",
        "virtio-blk-pci,id=vdb,drive=d1",
    ]);
    let before = vm.graph();
    backup_failed(&place.backup(), 1, &["disk vda", "iothread", "exclude = [\"vda\"]", UNTOUCHED]);
    assert_eq!(vm.graph(), before);
    place.configure(
        "[vm.box]\nqmp = \"@/qmp\"\nexclude = [\"vda\"]\n[target.main]\nprovider = \"directory\"\ndirectory = \"@/target\"\n",
    );
    let summary = place.configured(&["backup", "box", "--json"]).json().unwrap();
    let disks: Vec<_> = summary["disks"].as_array().unwrap().iter().map(|disk| &disk["name"]).collect();
    assert_eq!(disks, ["vdb"]);
    let restored = place.run(&["restore", "box/latest", "--to", "@target", "--output", "@out"]);
    says(&restored, 0, &["restored box/"]);
    assert_eq!(fs::read(place.path("out/vdb.raw")).unwrap(), fs::read(place.path("vdb.img")).unwrap());
    assert!(!place.path("out/vda.raw").exists());
}

#[test]
fn what_is_excluded_is_not_there() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let _vm = place.machine(&["vda.img"], &[]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexclude = [\"vdz\"]\n");
    let outcome = place.configured(&["backup", "box", "--to", "@target", "--exclude", "vdy"]);
    says(&outcome, 0, &["warning: disk vdy is to be excluded", "warning: disk vdz is to be excluded", "vda"]);
    says(&place.configured(&["doctor", "box"]), 0, &["disk vdz is to be excluded", "everything is in place"]);
}

#[test]
fn a_front_end_has_no_drive() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    // What an I/O error policy or an administrator may do: the drive is taken from under its device.
    let taken =
        vm.own.execute("human-monitor-command", json!({"command-line": "drive_del drive-a"})).unwrap();
    assert_eq!(taken, "");
    let before = vm.graph();
    assert_eq!(before["blocks"][0]["node"], Value::Null, "{before}");
    backup_failed(&place.backup(), 1, &["disk vda", "no drive", "exclude = [\"vda\"]", UNTOUCHED]);
    assert_eq!(vm.graph(), before);
}

#[test]
fn a_configuration_that_is_named_and_not_there_is_an_error() {
    let place = Place::new();
    let outcome = place.run(&["--config", "@another.toml", "points", "--to", "@target"]);
    says(&outcome, 2, &["cannot read configuration", "another.toml"]);
}

#[test]
fn a_vm_without_disks_has_a_configuration() {
    let place = Place::new();
    let _vm = place.machine(&[], &[]);
    let content = b"memory: 128\n\xff\x00 not text".as_slice();
    fs::write(place.path("box.conf"), content).unwrap();
    fs::write(place.path("box.fw"), "DROP\n").unwrap();
    place.configure(
        "[vm.box]\nqmp = \"@/qmp\"\nconfig = [\"@/box.conf\"]\nfirewall = \"@/box.fw\"\n[target.main]\nprovider = \"directory\"\ndirectory = \"@/target\"\n",
    );
    let summary = place.configured(&["backup", "box", "--json"]).json().unwrap();
    assert_eq!((&summary["disks"], &summary["skipped"]), (&json!([]), &json!([])), "{summary}");
    assert!(summary["warnings"][0].as_str().unwrap().contains("the VM has no disk"), "{summary}");
    says(&place.configured(&["points"]), 0, &[summary["point"].as_str().unwrap(), "configuration"]);
    says(&place.configured(&["restore", "box/latest", "--output", "@out"]), 0, &["restored box/"]);
    assert_eq!(fs::read(place.path("out/config/box.conf")).unwrap(), content);
    assert_eq!(fs::read(place.path("out/config/box.fw")).unwrap(), b"DROP\n");
    says(&place.configured(&["verify"]), 0, &["1 good, 0 damaged"]);
}

#[test]
fn a_configuration_file_is_missing() {
    let place = Place::new();
    let _vm = place.machine(&[], &[]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nconfig = [\"@/gone.conf\"]\n");
    let outcome = place.configured(&["backup", "box", "--to", "@target"]);
    backup_failed(&outcome, 1, &["gone.conf", UNTOUCHED]);
    assert!(!place.path("target").exists());
}

#[test]
fn the_nbd_server_is_somebody_elses() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let address = json!({"type": "unix", "data": {"path": place.text("nbd")}});
    vm.own.execute("nbd-server-start", json!({"addr": address})).unwrap();
    let before = vm.graph();
    backup_failed(&place.backup(), 1, &["NBD server", UNTOUCHED]);
    says(&place.run(&["doctor", "--qmp", "@qmp"]), 1, &["WRONG", "NBD server"]);
    assert_eq!(vm.graph(), before);
    assert!(!place.path("target").exists());
    says(&place.run(&["recover", "--qmp", "@qmp"]), 0, &["nothing to undo"]);
    // Theirs still serves: neither the failed run nor the recovery stopped it.
    let mut client = UnixStream::connect(place.path("nbd")).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut magic = [0; 8];
    client.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"NBDMAGIC");
    drop(client);
    vm.own.execute("nbd-server-stop", json!({})).unwrap();
    says(&place.backup(), 0, &[]);
}

#[test]
fn qemus_name_for_the_vm_is_a_trap() {
    for name in ["../evil", "a/b", "\u{1b}[2Jred"] {
        let place = Place::new();
        let _vm = place.qemu(&["-M", "none", "-name", name]);
        let outcome = place.run(&["backup", "--qmp", "@qmp", "--to", "@target"]);
        backup_failed(&outcome, 2, &["stillpoint backup NAME --qmp", UNTOUCHED]);
        assert!(!place.path("evil").exists());
    }
}

#[test]
fn nothing_was_left_to_recover() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let before = vm.graph();
    says(&place.run(&["recover", "--qmp", "@qmp"]), 0, &["nothing to undo"]);
    assert_eq!(vm.graph(), before);
}

#[test]
fn a_vm_that_stands_still_is_backed_up_as_often_as_one_likes() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let before = vm.graph();
    says(&place.backup(), 0, &["box/"]);
    says(&place.run(&["recover", "--qmp", "@qmp"]), 0, &["nothing to undo"]);
    says(&place.backup(), 0, &["box/"]);
    let after = vm.graph();
    assert_eq!((&after["nodes"], &after["exports"]), (&before["nodes"], &before["exports"]));
    assert_eq!(after["status"], before["status"]);
    // Once it runs, a further run leaves no descriptor either, those of earlier runs included.
    vm.own.execute("cont", json!({})).unwrap();
    let outcome = place.backup();
    says(&outcome, 0, &["box/"]);
    assert_eq!(vm.graph()["descriptors"], json!([]));
    assert!(!outcome.stderr.contains("did not end"), "every run before ended: {}", outcome.stderr);
}

#[test]
fn another_run_holds_the_lock() {
    let place = Place::new();
    // A monitor that says nothing: the first run waits for its greeting, and holds the lock meanwhile.
    let listener = UnixListener::bind(place.path("qmp")).unwrap();
    let line = place.arguments(&["backup", "box", "--qmp", "@qmp", "--to", "@target"]);
    let mut first = place.tool.command(line);
    let mut first = Running(first.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let (_held, _) = listener.accept().unwrap();
    let process = format!("process {}", first.0.id());
    backup_failed(&place.backup(), 4, &["locked", &process, UNTOUCHED]);
    says(&place.run(&["recover", "--qmp", "@qmp"]), 4, &["locked", &process]);
    says(&place.run(&["doctor", "--qmp", "@qmp"]), 4, &["busy", "a run is under way", &process]);
    assert!(first.0.try_wait().unwrap().is_none(), "the first run ended before the others were told of it");
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    drop(listener);
    backup_failed(&place.backup(), 1, &["QEMU is not"]);
}
