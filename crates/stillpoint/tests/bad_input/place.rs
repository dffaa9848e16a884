//! Places without a target: what each command says of them, and that none is made where one was.

use super::*;

/// Every command that wants a target, with the one at `target`.
fn lines(target: &str) -> Vec<Vec<&str>> {
    let commands = [
        &["backup", "box", "--qmp", "@qmp"][..],
        &["points"],
        &["points", "box"],
        &["verify"],
        &["verify", "box/latest"],
        &["restore", "box/latest", "--output", "@out"],
        &["restore", NO_POINT, "--output", "@out"],
        &["forget", "--damaged"],
        &["forget", "--damaged", "--dry-run"],
        &["doctor", "--qmp", "@qmp"],
    ];
    commands.iter().map(|line| [line, &["--to", target][..]].concat()).collect()
}

impl Place {
    /// No command succeeds with this target, each has these words and a next step; and nothing is made or changed.
    #[track_caller]
    fn refuses(&self, target: &str, words: &[&str]) {
        let listing = || {
            let entries = fs::read_dir(self.path(&target[1..])).ok()?;
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            Some(names)
        };
        let before = listing();
        for line in lines(target) {
            let outcome = self.run(&line);
            says(&outcome, 1, &[words, &["next:"]].concat());
            match line[0] {
                "backup" => backup_failed(&outcome, 1, &[UNTOUCHED]),
                "doctor" => assert!(outcome.stdout.contains("WRONG"), "{outcome:?}"),
                _ => assert_eq!(outcome.stdout, "", "{line:?}"),
            }
        }
        assert_eq!(listing(), before);
        assert!(!self.path("out").exists());
    }

    fn target_id(&self, target: &str) -> String {
        let text = fs::read_to_string(self.path(target).join("stillpoint-target.json")).unwrap();
        let identity: Value = serde_json::from_str(&text).unwrap();
        identity["record"]["id"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_target_is_made_once_and_then_remembered() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let _vm = place.machine(&["vda.img"], &[]);
    fs::create_dir(place.path("target")).unwrap();
    // Nothing that only reads makes one, nor takes an empty directory for one without points.
    for line in
        [&["points"][..], &["verify"], &["forget", "--damaged"], &["restore", NO_POINT, "--output", "@out"]]
    {
        let words =
            ["there is no target in", "the directory is empty", "is it mounted?", "stillpoint target init"];
        says(&place.run(&[line, &["--to", "@target"]].concat()), 1, &words);
    }
    let words = [
        "there is no target yet: the first backup makes one here",
        "mount it first",
        "everything is in place",
    ];
    says(&place.run(&["doctor", "--qmp", "@qmp", "--to", "@target"]), 0, &words);
    says(&place.backup(), 0, &["box/"]);
    let id = place.target_id("target");
    says(
        &place.run(&["doctor", "--qmp", "@qmp", "--to", "@target"]),
        0,
        &[&format!("it is target {id}"), "1 points"],
    );

    // Now it is not mounted.
    fs::rename(place.path("target"), place.path("aside")).unwrap();
    let was = format!("target {id} was here before");
    place.refuses("@target", &[&was, "is it mounted?", "stillpoint target init"]);
    fs::create_dir(place.path("target")).unwrap();
    place.refuses("@target", &[&was, "is it mounted?", "the directory is empty"]);
    // By whatever name.
    std::os::unix::fs::symlink(place.path("target"), place.path("link")).unwrap();
    place.refuses("@link/.", &[&was]);
    fs::write(place.path("target/NOT-MOUNTED"), "").unwrap();
    place.refuses("@target", &[&was, "other things", "NOT-MOUNTED"]);
    fs::remove_file(place.path("target/NOT-MOUNTED")).unwrap();

    // On purpose another is made there, and the VM is told of.
    says(&place.run(&["target", "init", "--to", "@target"]), 0, &["is target", "now"]);
    says(&place.run(&["target", "init", "--to", "@target"]), 0, &["already; nothing was changed"]);
    let other = place.target_id("target");
    assert!(other != id);
    says(&place.run(&["points", "--to", "@target"]), 0, &["no point in directory"]);
    says(&place.run(&["points", "box", "--to", "@target"]), 0, &["no point of VM box in directory"]);
    says(&place.run(&["verify", "--to", "@target"]), 1, &["nothing was verified", "next:"]);
    let verified = place.run(&["verify", "--to", "@target", "--json"]);
    says(&verified, 1, &["\"points\":[]"]);
    assert!(!place.backup().stderr.contains("warning"));
    // Both are known here now, as of disks that are changed each week.
    fs::rename(place.path("target"), place.path("second")).unwrap();
    fs::rename(place.path("aside"), place.path("target")).unwrap();
    let outcome = place.backup();
    assert!(outcome.status == 0 && !outcome.stdout.contains("warning"), "{outcome:?}");
    fs::rename(place.path("target"), place.path("aside")).unwrap();
    place.refuses("@target", &["one of the targets", &id, &other, "was here before"]);
}

#[test]
fn what_is_no_target_is_refused() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let before = vm.graph();
    fs::create_dir(place.path("photos")).unwrap();
    fs::write(place.path("photos/cat.jpg"), "").unwrap();
    place
        .refuses("@photos", &["there is no target here", "other things", "cat.jpg", "name the right target"]);
    says(&place.run(&["target", "init", "--to", "@photos"]), 1, &["other things", "next:"]);
    fs::create_dir(place.path("garbage")).unwrap();
    fs::write(place.path("garbage/stillpoint-target.json"), "not JSON").unwrap();
    fs::write(place.path("garbage/more"), "").unwrap();
    place.refuses("@garbage", &["does not say which target it is", "stillpoint-target.json"]);
    fs::write(place.path("file"), "mine").unwrap();
    place.refuses("@file", &["is not a directory", "name the right target"]);
    place.refuses("@not/mounted", &[&place.text("not/mounted"), "is it mounted?"]);
    assert_eq!(vm.graph(), before);
}

#[test]
fn a_target_that_the_system_does_not_let_us_read_is_told() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let _vm = place.machine(&["vda.img"], &[]);
    fs::create_dir(place.path("target")).unwrap();
    says(&place.backup(), 0, &["box/"]);
    // A file system whose server has gone. FUSE keeps it mounted.
    let Some(mounted) = Fuse::mount(&place.path("target"), &place.path("mnt")) else { return };
    says(&place.run(&["points", "--to", "@mnt"]), 0, &["box/"]);
    mounted.kill();
    place.refuses("@mnt", &[&place.text("mnt"), "does not answer", "mount the target"]);
    says(&place.run(&["target", "init", "--to", "@mnt"]), 1, &["does not answer"]);
}

/// bindfs, in a process of its own.
struct Fuse {
    child: std::cell::RefCell<Running>,
    at: PathBuf,
}

impl Fuse {
    fn mount(source: &Path, at: &Path) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let child = Command::new("bindfs").arg("-f").args([source, at]).stderr(Stdio::null()).spawn();
        let Ok(child) = child else {
            skip("a_target_that_the_system_does_not_let_us_read_is_told", "no bindfs");
            return None;
        };
        let mounted = Self { child: std::cell::RefCell::new(Running(child)), at: at.to_owned() };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !at.join("stillpoint-target.json").exists() {
            let ended = mounted.child.borrow_mut().0.try_wait().unwrap();
            if ended.is_some() {
                skip("a_target_that_the_system_does_not_let_us_read_is_told", "bindfs cannot mount");
                return None;
            }
            assert!(Instant::now() < deadline, "bindfs does not mount");
            thread::sleep(Duration::from_millis(10));
        }
        Some(mounted)
    }

    fn kill(&self) {
        let child = &mut self.child.borrow_mut().0;
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

#[test]
fn a_target_of_the_configuration_file_is_made_and_remembered_alike() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let _vm = place.machine(&["vda.img"], &[]);
    place.configure(
        "[vm.box]\nqmp = \"@/qmp\"\n[target.main]\nprovider = \"directory\"\ndirectory = \"@/target\"\n",
    );
    says(&place.configured(&["points"]), 1, &["there is no directory", "is it mounted?"]);
    says(&place.configured(&["target", "init", "main"]), 0, &["is target"]);
    let summary = place.configured(&["backup", "box", "--json"]).json().unwrap();
    assert_eq!(summary["warnings"], json!([]));
    fs::remove_dir_all(place.path("target")).unwrap();
    for line in
        [&["backup", "box"][..], &["backup", "--all", "--json"], &["points"], &["verify"], &["doctor"]]
    {
        says(&place.configured(line), 1, &["was here before", "is it mounted?"]);
    }
    assert!(!place.path("target").exists());
    says(&place.configured(&["target", "init", "other"]), 2, &["there is no target other"]);
    says(&place.configured(&["target", "init", "main"]), 0, &["now"]);
}

#[test]
fn another_target_than_before_is_used_and_told() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let mut disk = Command::new("qemu-img");
    disk.args(["create", "-q", "-f", "qcow2", "-o", "size=1M"]).arg(place.path("disk.qcow2"));
    assert!(disk.status().unwrap().success());
    let drive = format!("if=none,id=drive,file={},format=qcow2", place.text("disk.qcow2"));
    let _vm = place.qemu(&["-drive", &drive, "-device", "virtio-blk-pci,id=vda,drive=drive"]);
    says(&place.backup(), 0, &["box/"]);
    let first = place.target_id("target");
    // A target of another host, mounted here instead.
    fs::rename(place.path("target"), place.path("aside")).unwrap();
    says(&place.run(&["target", "init", "--to", "@foreign"]), 0, &["is target"]);
    fs::rename(place.path("foreign"), place.path("target")).unwrap();
    let summary = place.run(&["backup", "box", "--qmp", "@qmp", "--to", "@target", "--json"]).json().unwrap();
    let warnings = summary["warnings"].as_array().unwrap();
    let told = warnings[0].as_str().unwrap();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(told.contains(&format!("was target {first} before")), "{told}");
    assert!(told.contains(&format!("disk vda has a bitmap of target {first}")), "{told}");
    // Once.
    let summary = place.run(&["backup", "box", "--qmp", "@qmp", "--to", "@target", "--json"]).json().unwrap();
    assert_eq!(summary["warnings"], json!([]));

    // A host that remembers nothing has the bitmaps as its only hint.
    fs::remove_dir_all(place.path("state")).unwrap();
    let summary = place.run(&["backup", "box", "--qmp", "@qmp", "--to", "@new", "--json"]).json().unwrap();
    let told = summary["warnings"][0].as_str().unwrap();
    assert!(told.contains("disk vda has a bitmap of target") && told.contains("has not seen"), "{told}");
}

#[test]
fn a_memory_that_cannot_be_used_is_told_and_takes_no_point_away() {
    let place = Place::new();
    place.image("vda.img", MIB);
    let _vm = place.machine(&["vda.img"], &[]);
    fs::write(place.path("state"), "").unwrap();
    let outcome = place.backup();
    backup_failed(&outcome, 1, &["cannot be told", &place.text("state"), UNTOUCHED]);
    fs::remove_file(place.path("state")).unwrap();
    says(&place.backup(), 0, &["box/"]);
    fs::remove_dir_all(place.path("state")).unwrap();
    fs::write(place.path("state"), "").unwrap();
    says(&place.backup(), 0, &["warning: this host cannot remember"]);
    says(&place.run(&["points", "--to", "@target"]), 0, &["box/"]);
    says(
        &place.run(&["restore", "box/latest", "--to", "@target", "--output", "@out"]),
        0,
        &["restored box/"],
    );
}
