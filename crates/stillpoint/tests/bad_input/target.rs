//! Targets that take nothing, and points in them that are damaged or not there.

use super::*;

#[test]
fn the_target_is_missing() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let before = vm.graph();
    let outcome = place.run(&["backup", "box", "--qmp", "@qmp", "--to", "@not/mounted"]);
    backup_failed(&outcome, 1, &[&place.text("not/mounted"), "is it mounted?", UNTOUCHED]);
    assert_eq!(vm.graph(), before);
    assert!(!place.path("not").exists());
    for line in [&["points"][..], &["verify"], &["restore", "box/latest", "--output", "@out"]] {
        let outcome = place.run(&[line, &["--to", "@not/mounted"]].concat());
        says(&outcome, 1, &[&place.text("not/mounted"), "next:"]);
    }
    assert!(!place.path("out").exists());
}

#[test]
fn the_target_is_a_file() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let before = vm.graph();
    fs::write(place.path("target"), "mine").unwrap();
    backup_failed(&place.backup(), 1, &[&place.text("target"), "not a directory", UNTOUCHED]);
    assert_eq!(vm.graph(), before);
    assert_eq!(fs::read(place.path("target")).unwrap(), b"mine");
}

#[test]
fn the_target_is_read_only() {
    let place = Place::new();
    let Some(_mount) = Mount::tmpfs("read-only target", &place.path("target"), "ro,size=1m") else { return };
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let before = vm.graph();
    backup_failed(&place.backup(), 1, &[&place.text("target"), "mount the target for writing", UNTOUCHED]);
    assert_eq!(vm.graph(), before);
    says(&place.run(&["points", "--to", "@target"]), 1, &["there is no target in", "the directory is empty"]);
}

#[test]
fn the_target_is_full() {
    let place = Place::new();
    let Some(_mount) = Mount::tmpfs("full target", &place.path("target"), "size=1m") else { return };
    place.image("vda.img", 16 * MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let mut before = vm.graph();
    let outcome = place.backup();
    backup_failed(&outcome, 1, &["make room in the target", "nothing of this run is left in it"]);
    let mut after = vm.graph();
    // QEMU keeps a removed descriptor until the guest runs, which this one does not.
    for graph in [&mut before, &mut after] {
        graph["descriptors"].take();
    }
    assert_eq!(after, before);
    says(&place.run(&["recover", "--qmp", "@qmp"]), 0, &["nothing to undo"]);
    place.lists_nothing("@target");
    // What the failed run wrote does not stay to fill the target.
    let left = fs::read_dir(place.path("target/box")).into_iter().flatten();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).filter(|name| name != "lock").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn there_is_no_such_point() {
    let place = Place::new();
    let point = format!("box/{NO_POINT}");
    says(&place.run(&["target", "init", "--to", "@target"]), 0, &["is target"]);
    for name in [point.as_str(), "box/latest"] {
        let words = [if name == "box/latest" { "box" } else { NO_POINT }, "there is no point", "next:"];
        let restored = place.run(&["restore", name, "--to", "@target", "--output", "@out"]);
        says(&restored, 1, &words);
        says(&place.run(&["verify", name, "--to", "@target"]), 1, &words);
    }
    assert!(!place.path("out").exists());
    // The same where the VM has another point.
    place.point();
    says(&place.run(&["restore", &point, "--to", "@target", "--output", "@out"]), 1, &[NO_POINT]);
    says(&place.run(&["restore", "other/latest", "--to", "@target", "--output", "@out"]), 1, &["other"]);
    assert!(!place.path("out").exists());
}

#[test]
fn a_manifest_is_damaged() {
    let place = Place::new();
    let id = place.point();
    let manifest = place.path(&format!("target/box/{id}/point.json"));
    let mut bytes = fs::read(&manifest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&manifest, bytes).unwrap();
    says(&place.run(&["points", "--to", "@target"]), 0, &[&id, "DAMAGED"]);
    let restored = place.run(&["restore", "box/latest", "--to", "@target", "--output", "@out"]);
    says(&restored, 1, &["point.json", "next:"]);
    assert!(!place.path("out/vda.raw").exists());
    says(&place.run(&["verify", "--to", "@target"]), 1, &["DAMAGED", "point.json"]);
}

#[test]
fn an_image_is_truncated() {
    let place = Place::new();
    let id = place.point();
    says(&place.run(&["verify", "--to", "@target"]), 0, &["1 good, 0 damaged"]);
    let directory = fs::read_dir(place.path(&format!("target/box/{id}"))).unwrap();
    let mut images = directory.map(|entry| entry.unwrap().path());
    let image =
        images.find(|path| path.extension().is_some_and(|end| end == "raw" || end == "qcow2")).unwrap();
    let file = fs::File::options().write(true).open(&image).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let name = image.to_str().unwrap();
    says(&place.run(&["verify", "--to", "@target"]), 1, &["DAMAGED", name, "next:"]);
    says(&place.run(&["points", "--to", "@target"]), 0, &["DAMAGED", name]);
    for format in ["raw", "qcow2"] {
        let output = format!("@out-{format}");
        let line = ["restore", "box/latest", "--to", "@target", "--output", &output, "--format", format];
        says(&place.run(&line), 1, &[name]);
        let left = fs::read_dir(place.path(&output[1..])).into_iter().flatten();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn a_byte_of_an_image_is_changed() {
    let place = Place::new();
    let id = place.point();
    let directory = fs::read_dir(place.path(&format!("target/box/{id}"))).unwrap();
    let mut images = directory.map(|entry| entry.unwrap().path());
    let image =
        images.find(|path| path.extension().is_some_and(|end| end == "raw" || end == "qcow2")).unwrap();
    let mut bytes = fs::read(&image).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&image, bytes).unwrap();
    says(&place.run(&["verify", "--to", "@target"]), 1, &["DAMAGED", image.to_str().unwrap()]);
    says(&place.run(&["restore", "box/latest", "--to", "@target", "--output", "@out"]), 1, &["vda"]);
    assert!(!place.path("out/vda.raw").exists());
}

#[test]
fn nothing_is_overwritten_by_a_restore() {
    let place = Place::new();
    place.point();
    for mine in ["vda.raw", "config"] {
        let output = place.path(&format!("out-{mine}"));
        fs::create_dir(&output).unwrap();
        fs::write(output.join(mine), "mine").unwrap();
        let line = ["restore", "box/latest", "--to", "@target", "--output", output.to_str().unwrap()];
        says(&place.run(&line), 1, &["nothing is overwritten", mine, "next:"]);
        assert_eq!(fs::read(output.join(mine)).unwrap(), b"mine");
        assert_eq!(fs::read_dir(&output).unwrap().count(), 1);
    }
}

#[test]
fn a_disk_is_asked_for_that_the_point_has_not() {
    let place = Place::new();
    place.point();
    let line = ["restore", "box/latest", "--to", "@target", "--output", "@out", "--disk", "vdx"];
    says(&place.run(&line), 2, &["no disk vdx", "it has vda"]);
    assert!(!place.path("out").exists());
}
