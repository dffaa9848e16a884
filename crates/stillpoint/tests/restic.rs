//! Points in a restic repository: what we write restic reads, whatever dies or is damaged.
//!
//! `STILLPOINT_POINTS=10`, `STILLPOINT_KILLS=100` and `STILLPOINT_PRUNE_KILLS=30` make more of what each run makes few of.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, Place, point_name};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{
    BareMachine, DiskSpec, Guest, GuestBuilder, Qemu,
    object_store::{self, Fault, ObjectStore},
};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
const PASSWORD: &str = "canary-of-the-repository";

fn guest() -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB + 512).raw())
        .disk(DiskSpec::new("vdc", 80 * MIB + 37 * 512))
        .boot()
        .unwrap()
}

fn number(variable: &str, unless: usize) -> usize {
    std::env::var(variable).ok().and_then(|number| number.parse().ok()).unwrap_or(unless)
}

/// A place with a new repository.
fn place(work: &Path, qmp: &Path) -> Place {
    let place = configured(work, qmp, "@/repository");
    let made = place.run(&["target", "init", "main"]);
    assert_eq!(made.status, 0, "{made:?}");
    place
}

/// A place with a repository that is not there yet.
fn configured(work: &Path, qmp: &Path, repository: &str) -> Place {
    Place::with_repository(work, qmp, repository, PASSWORD)
}

fn repository(place: &Place) -> PathBuf {
    place.work.join("repository")
}

/// The real restic on the same repository.
fn restic(place: &Place, arguments: &[&str]) -> Output {
    let mut command = Command::new("restic");
    command.args(["--no-cache", "--quiet"]).args(arguments);
    command.env("RESTIC_REPOSITORY", repository(place)).env("RESTIC_PASSWORD", PASSWORD);
    command.output().unwrap()
}

fn restic_agrees(place: &Place) {
    let checked = restic(place, &["check", "--read-data"]);
    assert!(checked.status.success(), "{checked:?}");
    let errors = String::from_utf8_lossy(&checked.stderr);
    assert!(!errors.contains("error"), "{errors}");
}

#[test]
fn restic_reads_every_point_of_a_guest_that_writes() {
    let mut guest = guest();
    let before = guest.block_graph().unwrap();
    let place = place(guest.work(), &guest.qmp());
    let storm = guest.start_storm(501, 0).unwrap();
    let mut points = Vec::new();
    for index in 0..number("STILLPOINT_POINTS", 5) {
        guest.await_writes(300).unwrap();
        let summary = place.backup();
        for disk in summary["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], if index == 0 { "new" } else { "reuse" }, "{summary}");
        }
        points.push(summary);
    }
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
    assert_eq!(guest.block_graph().unwrap().without_bitmaps(), before);
    let operations: Vec<_> = points.iter().map(|point| place.judge(point, &DISKS, &storm)).collect();
    assert!(operations.is_sorted_by(|earlier, later| earlier < later), "{operations:?}");
    println!("operations in each point, 0 violations: {operations:?}");
    restic_agrees(&place);
    for point in &points {
        let output = place.work.join("ours");
        let name = point_name(point);
        assert_eq!(place.run(&["restore", &name, "--output", output.to_str().unwrap()]).status, 0);
        let tag = format!("point={}", common::point_id(point));
        for disk in DISKS {
            let theirs = place.work.join("theirs");
            let mut dump = Command::new("restic");
            dump.args(["--no-cache", "dump", "--tag", &tag, "latest", &format!("/disks/{disk}.raw")]);
            dump.env("RESTIC_REPOSITORY", repository(&place)).env("RESTIC_PASSWORD", PASSWORD);
            assert!(dump.stdout(fs::File::create(&theirs).unwrap()).status().unwrap().success());
            assert!(
                stillpoint_testkit::same(&output.join(format!("{disk}.raw")), &theirs).unwrap(),
                "{name} {disk}"
            );
        }
        fs::remove_dir_all(output).unwrap();
    }
    let restored = place.work.join("restored");
    let done = restic(&place, &["restore", "latest", "--target", restored.to_str().unwrap()]);
    assert!(done.status.success() && restored.join("disks/vda.raw").is_file(), "{done:?}");
    let verified = place.run(&["verify"]);
    assert_eq!(verified.status, 0, "{verified:?}");
    assert_eq!(place.run(&["verify", "--structure"]).status, 0);
    assert_eq!(place.run(&["verify", "--sample", "10"]).status, 0);
}

#[test]
fn killed_at_any_moment_the_repository_is_whole_and_the_next_run_goes_on() {
    let mut guest = guest();
    let place = place(guest.work(), &guest.qmp());
    let storm = guest.start_storm(502, 0).unwrap();
    guest.await_writes(200).unwrap();
    let mut points = vec![place.backup()];
    let took = points[0]["duration_ms"].as_u64().unwrap() + 600;
    let kills = number("STILLPOINT_KILLS", 8) as u64;
    let mut died = 0;
    for kill in 0..kills {
        guest.await_writes(50).unwrap();
        let full = if kill % 3 == 0 { &["--full"][..] } else { &[] };
        let line = [&["backup", "vm"][..], full].concat();
        let mut command = place.tool.command(place.arguments(&line));
        let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // A moment is what this is about: no event is awaited.
        std::thread::sleep(Duration::from_millis(took * kill / kills));
        run.kill().unwrap();
        died += u32::from(!run.wait().unwrap().success());
        let point = place.backup();
        assert!(
            point["disks"].as_array().unwrap().iter().all(|disk| disk["bitmap_mode"] == "reuse"),
            "{kill}: {point}"
        );
        points.push(point);
        if kill % 10 == 0 {
            restic_agrees(&place);
        }
    }
    println!("{died} of {kills} runs were killed before their end");
    assert!(died > 0);
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
    points.iter().for_each(|point| assert!(place.judge(point, &DISKS, &storm) > 0));
    restic_agrees(&place);
    // What was left by the dead is only what prune removes.
    assert_eq!(place.run(&["prune"]).status, 0);
    restic_agrees(&place);
    points.iter().for_each(|point| assert!(place.judge(point, &DISKS, &storm) > 0));
    assert_eq!(fs::read_dir(repository(&place).join("locks")).unwrap().count(), 0);
}

#[test]
fn killed_in_pruning_nothing_is_lost() {
    let mut guest = guest();
    let place = place(guest.work(), &guest.qmp());
    let storm = guest.start_storm(503, 0).unwrap();
    let kills = number("STILLPOINT_PRUNE_KILLS", 4) as u64;
    let mut died = 0;
    for kill in 0..kills {
        let mut points = Vec::new();
        for _ in 0..4 {
            guest.await_writes(100).unwrap();
            points.push(place.backup());
        }
        let forgotten = place.run(&["forget", "--keep-last", "2"]);
        assert_eq!(forgotten.status, 0, "{forgotten:?}");
        let mut command = place.tool.command(place.arguments(&["prune"]));
        let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(300 + 500 * kill / kills));
        run.kill().unwrap();
        died += u32::from(!run.wait().unwrap().success());
        // The lock of the dead is in nobody's way.
        let pruned = place.run(&["prune", "--json"]);
        assert_eq!(pruned.status, 0, "{pruned:?}");
        restic_agrees(&place);
        for point in &points[2..] {
            assert!(place.judge(point, &DISKS, &storm) > 0, "{kill}");
        }
        let listed: Value = place.run(&["points", "--json"]).json().unwrap();
        assert_eq!(listed.as_array().unwrap().len(), 2);
    }
    println!("{died} of {kills} runs were killed before their end");
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
}

fn machine() -> BareMachine {
    let qemu = Qemu::installed().unwrap();
    let mut machine = BareMachine::with_disks(&qemu, &[("vda", 8 * MIB), ("vdb", 3 * MIB + 512)]).unwrap();
    machine.disk_io("vda", "write -P 1 0 3M").unwrap();
    machine.disk_io("vdb", "write -P 2 1M 1M").unwrap();
    machine
}

#[test]
fn damage_to_any_file_is_found_and_never_restored() {
    let mut machine = machine();
    let place = place(machine.work(), &machine.qmp());
    let points: Vec<_> = (3..6)
        .map(|pattern| {
            machine.disk_io("vda", &format!("write -P {pattern} 5M 1M")).unwrap();
            place.backup()
        })
        .collect();
    let restore =
        |name: &str, output: &Path| place.run(&["restore", name, "--output", output.to_str().unwrap()]);
    let good: Vec<_> = points
        .iter()
        .enumerate()
        .map(|(index, point)| {
            let output = place.work.join(format!("good-{index}"));
            assert_eq!(restore(&point_name(point), &output).status, 0);
            output
        })
        .collect();
    let all = common::files(&repository(&place));
    assert!(all.len() > 10, "{all:?}");
    let mut damages = 0;
    for (index, file) in all.iter().enumerate() {
        let content = fs::read(file).unwrap();
        let other = fs::read(&all[(index + 1) % all.len()]).unwrap();
        let snapshot = file.parent().unwrap().ends_with("snapshots");
        let mut flipped = content.clone();
        // At the start, in the middle, at the end: another place in each file.
        flipped[index % 5 * (content.len() - 1) / 4] ^= 0x10;
        let cases = [
            ("flipped", Some(flipped)),
            ("cut short", Some(content[..content.len() - 1].to_vec())),
            ("empty", Some(Vec::new())),
            ("swapped", Some(other)),
            ("removed", None),
        ];
        for (what, damaged) in cases {
            match &damaged {
                Some(damaged) => fs::write(file, damaged).unwrap(),
                None => fs::remove_file(file).unwrap(),
            }
            let verified = place.run(&["verify"]);
            // A snapshot that is gone is one that was forgotten, as far as a repository can tell.
            if damaged.is_some() || !snapshot {
                assert_eq!(verified.status, 1, "{} {what}: {verified:?}", file.display());
                damages += 1;
            }
            let all = if what == "flipped" { 0 } else { points.len() - 1 };
            for (point, good) in points.iter().zip(&good).skip(all) {
                let output = place.work.join("damaged");
                let restored = restore(&point_name(point), &output);
                if restored.status == 0 {
                    for disk in ["vda", "vdb"] {
                        let image = format!("{disk}.raw");
                        let same =
                            stillpoint_testkit::same(&good.join(&image), &output.join(&image)).unwrap();
                        assert!(same, "{} {what}: {disk} came back wrong", file.display());
                    }
                }
                let _ = fs::remove_dir_all(output);
            }
            let _ = fs::remove_file(file);
            fs::write(file, &content).unwrap();
        }
    }
    println!("{damages} damages to {} files, all found", all.len());
    let verified = place.run(&["verify"]);
    assert_eq!(verified.status, 0, "{verified:?}");
}

#[test]
fn nobody_prunes_beneath_a_backup_and_nobody_backs_up_beneath_a_prune() {
    let machine = machine();
    let place = place(machine.work(), &machine.qmp());
    place.backup();
    let held = Held::at(&place.tool, "restic-snapshot#1", place.arguments(&["backup", "vm", "--full"]));
    let pruned = restic(&place, &["prune"]);
    assert!(!pruned.status.success(), "{pruned:?}");
    assert!(String::from_utf8_lossy(&pruned.stderr).contains("already locked"), "{pruned:?}");
    let ours = place.run(&["prune"]);
    assert_eq!(ours.status, 4, "{ours:?}");
    assert!(ours.stderr.contains(&format!("process {}", held.pid())), "{}", ours.stderr);
    assert_eq!(held.go_on().status, 0);
    assert!(restic(&place, &["prune"]).status.success());

    let held = Held::at(&place.tool, "restic-alone#1", place.arguments(&["prune"]));
    let backup = place.run(&["backup", "vm"]);
    assert_eq!(backup.status, 4, "{backup:?}");
    assert!(backup.stderr.contains("exclusively locked"), "{}", backup.stderr);
    assert!(!restic(&place, &["backup", "/etc/hostname"]).status.success());
    // Killed, its lock is in nobody's way.
    held.signal("KILL");
    held.end();
    place.backup();
    assert!(restic(&place, &["unlock"]).status.success());
    restic_agrees(&place);
}

#[test]
fn a_second_vm_of_one_template_costs_nothing_and_two_at_once_are_safe() {
    let qemu = Qemu::installed().unwrap();
    let mut machines: Vec<_> =
        (0..2).map(|_| BareMachine::with_disks(&qemu, &[("vda", 64 * MIB)]).unwrap()).collect();
    for machine in &mut machines {
        for mib in 0..40 {
            machine.disk_io("vda", &format!("write -P {} {mib}M 1M", mib + 1)).unwrap();
        }
    }
    let first = place(machines[0].work(), &machines[0].qmp());
    let config = fs::read_to_string(&first.config).unwrap();
    let second = format!("{config}\n[vm.other]\nqmp = {:?}\n", machines[1].qmp());
    fs::write(&first.config, second).unwrap();
    let stored = |summary: &Value| summary["disks"][0]["stored_bytes"].as_u64().unwrap();
    assert!(stored(&first.backup()) > 0);
    let other = first.run(&["backup", "other", "--json"]);
    assert_eq!(other.status, 0, "{other:?}");
    assert_eq!(stored(&other.json().unwrap()), 0, "{}", other.stdout);
    for (round, machine) in [(0, 1), (1, 0), (2, 1)] {
        machines[machine].disk_io("vda", &format!("write -P {} 0 20M", 100 + round)).unwrap();
        let run = |vm: &str| {
            let mut command = first.tool.command(first.arguments(&["backup", vm, "--full"]));
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let runs = [run("vm"), run("other")];
        for run in runs {
            let output = run.wait_with_output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
    }
    restic_agrees(&first);
    assert_eq!(first.run(&["verify"]).status, 0);
}

#[test]
fn a_lost_bitmap_costs_a_read_and_nothing_to_store() {
    let mut machine = machine();
    let place = place(machine.work(), &machine.qmp());
    place.backup();
    machine.disk_io("vda", "write -P 9 6M 1M").unwrap();
    let point = place.run(&["backup", "vm", "--full", "--json"]).json().unwrap();
    let (vda, vdb) = (&point["disks"][0], &point["disks"][1]);
    assert_eq!((&vda["bitmap_mode"], &vdb["bitmap_mode"]), (&"new".into(), &"new".into()));
    assert!(vda["stored_bytes"].as_u64().unwrap() < 4096, "one chunk of one byte: {vda}");
    assert_eq!(vdb["stored_bytes"], 0, "{vdb}");
}

#[test]
fn a_repository_is_made_on_purpose_only_and_a_password_is_kept() {
    let machine = machine();
    let place = place(machine.work(), &machine.qmp());
    let again = place.run(&["target", "init", "main"]);
    assert_eq!(again.status, 1, "{again:?}");
    assert!(again.stderr.contains("there is a repository"), "{}", again.stderr);
    let config = fs::read_to_string(&place.config).unwrap();
    let with = |from: &str, to: &str| fs::write(&place.config, config.replace(from, to)).unwrap();
    let fails = |words: &str| {
        let outcome = place.run(&["backup", "vm"]);
        assert!(outcome.status == 1 || outcome.status == 2, "{outcome:?}");
        assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
    };
    with("/repository\"", "/repositroy\"");
    fails("there is no repository at");
    assert!(!place.work.join("repositroy").exists());
    with("password-file", "password-environment = \"NONE\"\npassword-file");
    fails("one way to its password");
    with("/password\"", "/elsewhere\"");
    fails("cannot read password file");
    with("password-file = \"", "password-command = [\"echo\", \"wrong\"]\n#");
    fails("has this password");
    with("", "");
    let password = place.work.join("password");
    fs::set_permissions(&password, fs::Permissions::from_mode(0o644)).unwrap();
    fails("chmod 600");
    fs::set_permissions(&password, fs::Permissions::from_mode(0o600)).unwrap();
    place.backup();

    // Another key, and the first one gone.
    let new = place.work.join("new-password");
    fs::write(&new, "canary-of-another-key").unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(place.run(&["key", "add", "--new-password-file", new.to_str().unwrap()]).status, 0);
    let keys: Value = place.run(&["key", "list", "--json"]).json().unwrap();
    let old = keys.as_array().unwrap().iter().find(|key| key["current"] == true).unwrap()["id"].clone();
    let kept = place.run(&["key", "remove", old.as_str().unwrap()]);
    assert_eq!(kept.status, 2, "{kept:?}");
    with("/password\"", "/new-password\"");
    let removed = place.run(&["key", "remove", old.as_str().unwrap()]);
    assert_eq!(removed.status, 0, "{removed:?}");
    place.backup();
    let listed = Command::new("restic")
        .args(["--no-cache", "snapshots"])
        .env("RESTIC_REPOSITORY", repository(&place))
        .env("RESTIC_PASSWORD_FILE", &new)
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    with("", "");
    fails("has this password");

    // One that asks for two terabytes.
    let keys = repository(&place).join("keys");
    let [key] = &common::files(&keys)[..] else { panic!("one key") };
    let text = fs::read_to_string(key).unwrap();
    fs::write(key, text.replace("\"N\":32768", "\"N\":2147483648")).unwrap();
    fails("a key asks for scrypt with N 2147483648");
}

#[test]
fn rules_decide_which_points_are_kept() {
    let machine = machine();
    let place = place(machine.work(), &machine.qmp());
    let points: Vec<_> = (0..4).map(|_| common::point_id(&place.backup()).to_owned()).collect();
    let listed = || -> Vec<String> {
        let listed: Value = place.run(&["points", "--json"]).json().unwrap();
        listed.as_array().unwrap().iter().map(|point| point["id"].as_str().unwrap().to_owned()).collect()
    };
    for bad in [&["forget"][..], &["forget", "--keep-last", "0"], &["forget", "--keep-within", "soon"]] {
        assert_eq!(place.run(bad).status, 2, "{bad:?}");
    }
    let dry = place.run(&["forget", "--keep-last", "1", "--dry-run"]);
    assert!(dry.stdout.contains("3 points would be forgotten"), "{dry:?}");
    assert_eq!(place.run(&["prune", "--dry-run"]).status, 0);
    assert_eq!(listed(), points);
    assert_eq!(place.run(&["forget", "other", "--keep-last", "1"]).status, 0);
    assert_eq!(listed(), points);
    let done = place.run(&["forget", "vm", "--keep-last", "2", "--prune"]);
    assert_eq!(done.status, 0, "{done:?}");
    assert_eq!(listed(), points[2..]);
    assert_eq!(place.run(&["verify"]).status, 0);
    restic_agrees(&place);
    // The chain goes on.
    assert_eq!(place.backup()["disks"][0]["bitmap_mode"], "reuse");
}

/// A place with a repository in `store`, and how it is run there: whatever it says, it tells no secret.
fn in_store(work: &Path, qmp: &Path, store: &ObjectStore) -> Place {
    let url = format!("s3:{}/{}/some/path", store.url(), object_store::BUCKET);
    let mut place = configured(work, qmp, &url);
    place.tool = place
        .tool
        .env("AWS_ACCESS_KEY_ID", object_store::ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", object_store::SECRET_KEY);
    place
}

#[test]
fn points_in_an_object_store_come_back_whatever_it_does() {
    let mut guest = guest();
    let files = guest.work().join("store");
    let store = ObjectStore::start(&files).unwrap();
    let place = in_store(guest.work(), &guest.qmp(), &store);
    let run = |line: &[&str]| place.run(line);
    let made = run(&["target", "init", "main"]);
    assert_eq!(made.status, 0, "{made:?}");
    assert_eq!(run(&["target", "init", "main"]).status, 1);
    let storm = guest.start_storm(504, 0).unwrap();
    let mut points = Vec::new();
    for fault in [
        Fault::None,
        Fault::ErrorEvery(3),
        Fault::CutEvery(2),
        Fault::Slow(Duration::from_millis(100)),
        Fault::AppendOnly,
    ] {
        guest.await_writes(200).unwrap();
        store.fail(fault);
        let before = store.faults();
        for full in [false, true] {
            let line = [&["backup", "vm", "--json"][..], if full { &["--full"] } else { &[] }].concat();
            let outcome = run(&line);
            assert_eq!(outcome.status, 0, "{fault:?}: {outcome:?}");
            points.push(outcome.json().unwrap());
        }
        let happens = !matches!(fault, Fault::None | Fault::Slow(_));
        assert!(!happens || store.faults() > before, "{fault:?} did not happen");
    }
    store.fail(Fault::None);
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
    points.iter().for_each(|point| assert!(place.judge(point, &DISKS, &storm) > 0));
    for line in [&["verify"][..], &["points"], &["forget", "--keep-last", "3", "--prune"], &["key", "list"]] {
        let outcome = run(line);
        assert_eq!(outcome.status, 0, "{outcome:?}");
    }
    // What lies there is a repository like any other.
    let mut check = Command::new("restic");
    check.args(["--no-cache", "check", "--read-data"]);
    check.env("RESTIC_REPOSITORY", files.join("bucket/some/path")).env("RESTIC_PASSWORD", PASSWORD);
    let checked = check.output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    for file in common::files(&files) {
        let content = fs::read(&file).unwrap();
        let secret = object_store::SECRET_KEY.as_bytes();
        assert!(!content.windows(secret.len()).any(|bytes| bytes == secret), "{}", file.display());
    }
}

#[test]
fn an_object_store_that_is_down_costs_the_guest_nothing() {
    let mut machine = machine();
    let store = ObjectStore::start(&machine.work().join("store")).unwrap();
    let place = in_store(machine.work(), &machine.qmp(), &store);
    assert_eq!(place.run(&["target", "init", "main"]).status, 0);
    place.backup();
    machine.disk_io("vda", "write -P 9 6M 1M").unwrap();
    store.fail(Fault::ErrorAlways);
    let outcome = place.run(&["backup", "vm"]);
    assert_eq!(outcome.status, 1, "{outcome:?}");
    assert!(outcome.stderr.contains("was not touched"), "{}", outcome.stderr);
    store.fail(Fault::None);
    let point = place.backup();
    assert_eq!(point["disks"][0]["bitmap_mode"], "reuse", "{point}");
    // Wrong credentials are no reason to wait.
    let mut wrong = in_store(machine.work(), &machine.qmp(), &store);
    wrong.tool = wrong.tool.env("AWS_SECRET_ACCESS_KEY", "wrong");
    let outcome = wrong.run(&["points"]);
    assert_eq!(outcome.status, 1, "{outcome:?}");
}

#[test]
fn an_object_store_that_hangs_does_not_keep_a_run_that_is_interrupted() {
    let mut machine = machine();
    common::write_noise(&mut machine);
    let store = ObjectStore::start(&machine.work().join("store")).unwrap();
    let place = in_store(machine.work(), &machine.qmp(), &store);
    assert_eq!(place.run(&["target", "init", "main"]).status, 0);
    let held = Held::at(&place.tool, "restic-pack#1", place.arguments(&["backup", "vm"]));
    store.fail(Fault::Slow(Duration::from_secs(3600)));
    held.signal("CONT");
    held.signal("INT");
    let interrupted = Instant::now();
    let outcome = held.end();
    assert_eq!(outcome.status, 130, "{}", outcome.stderr);
    assert!(interrupted.elapsed() < Duration::from_secs(15), "{:?}", interrupted.elapsed());
    assert_eq!(machine.status().unwrap(), "running");
    store.fail(Fault::None);
    place.backup();
    assert_eq!(place.run(&["verify"]).status, 0);
}
