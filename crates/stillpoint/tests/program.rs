//! Providers outside the process: the examples on a guest that writes at full speed, and programs that do wrong in every
//! way that a program can.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Place, tool};
use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, DiskSpec, Guest, GuestBuilder, Outcome, Qemu, skip, workspace};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

fn guest() -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB + 512).raw())
        .disk(DiskSpec::new("vdc", 80 * MIB))
        .boot()
        .unwrap()
}

fn example(name: &str) -> PathBuf {
    workspace().join("examples/providers").join(name)
}

/// A full point and three increments of a guest that writes at full speed, each restored and put before the oracle.
fn points(place: &Place, guest: &mut Guest, seed: u64) {
    let before = guest.block_graph().unwrap();
    let storm = guest.start_storm(seed, 0).unwrap();
    let mut points = Vec::new();
    for index in 0..4 {
        guest.await_writes(300).unwrap();
        let summary = place.backup();
        let mode = if index == 0 { "new" } else { "reuse" };
        for disk in summary["disks"].as_array().unwrap() {
            assert_eq!(disk["bitmap_mode"], mode, "{summary}");
        }
        points.push(summary);
    }
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
    let operations: Vec<_> = points.iter().map(|point| place.judge(point, &DISKS, &storm)).collect();
    println!("operations in each point, 0 violations: {operations:?}");
    assert_eq!(guest.block_graph().unwrap().without_bitmaps(), before);
    let verified = place.run(&["verify"]);
    assert_eq!(verified.status, 0, "{verified:?}");
    nothing_is_left(place);
}

/// No process, mount or socket of a provider.
fn nothing_is_left(place: &Place) {
    common::no_process_is_left(&place.work, "after a provider");
    let runtime = place.work.join("run");
    let left: Vec<_> = fs::read_dir(&runtime).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().starts_with("provider-")), "{left:?}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(runtime.to_str().unwrap()), "{mounts}");
}

fn raw_images(mechanism: &str, seed: u64) {
    let mut guest = guest();
    let program = example("raw-images");
    let target = format!(
        "provider = {{ program = {program:?}, arguments = [\"@/images\"], options = {{ mechanism = {mechanism:?} }} }}"
    );
    let place = Place::new(guest.work(), &guest.qmp(), &target);
    points(&place, &mut guest, seed);
}

#[test]
fn raw_images_through_nbd() {
    raw_images("nbd", 71);
}

#[test]
fn raw_images_through_files() {
    raw_images("file-handle", 72);
}

#[test]
fn raw_images_through_block_devices() {
    raw_images("block-device", 73);
}

fn borg(mechanism: &str, seed: u64) {
    let mut guest = guest();
    let repository = guest.work().join("borg");
    let mut init = Command::new("borg");
    init.args(["init", "--encryption", "repokey"]).arg(&repository);
    init.env("BORG_PASSPHRASE", "canary").env("BORG_BASE_DIR", guest.work().join("borg-base"));
    assert!(init.status().unwrap().success());
    let program = example("borg");
    let target = format!(
        "provider = {{ program = {program:?}, arguments = [\"@/borg\", \"@\"], options = {{ mechanism = {mechanism:?} }}, \
         environment = {{ BORG_PASSPHRASE = \"canary\", BORG_BASE_DIR = \"@/borg-base\" }} }}"
    );
    let place = Place::new(guest.work(), &guest.qmp(), &target);
    points(&place, &mut guest, seed);
}

#[test]
fn borg_through_block_devices() {
    borg("block-device", 74);
}

#[test]
fn borg_through_files() {
    borg("file-handle", 75);
}

/// What a run with a provider that does this wrong says.
fn wrong(machine: &BareMachine, what: &str) -> Outcome {
    let script = workspace().join("crates/stillpoint/tests/wrong_provider.py");
    let examples = example("");
    let target = format!(
        "provider = {{ program = \"/usr/bin/python3\", arguments = [{script:?}, {what:?}, \"@/images\"], \
         environment = {{ EXAMPLES = {examples:?} }}, answer-timeout = 3, commit-timeout = 3, quiet-timeout = 3 }}"
    );
    let place = Place::new(machine.work(), &machine.qmp(), &target);
    let started = Instant::now();
    let outcome = place.run(&["backup", "vm", "--json"]);
    let took = started.elapsed();
    assert!(took < Duration::from_secs(25), "{what}: {took:?}");
    nothing_is_left(&place);
    outcome
}

/// Each fails clean, within its deadline, and the next increment has everything.
#[test]
fn whatever_a_provider_does_wrong_the_guest_and_the_chain_are_unharmed() {
    let cases = [
        ("crashes", 1, "has closed its standard output"),
        ("hangs", 1, "neither read nor said anything for 3 s"),
        ("speaks-nonsense", 1, "no message: \\\"Traceback"),
        ("never-ends-a-line", 1, "more than 33554432 bytes"),
        ("closes-its-input", 1, "neither read nor said"),
        ("leaves-a-child", 1, "has closed its standard output|neither read nor said"),
        ("reads-nothing", 1, "has not read what is at"),
        ("is-full", 1, "No space left on device"),
        ("forgets-a-disk", 1, "does not report on disk"),
        ("reads-elsewhere", 1, "outside"),
        ("never-greets", 1, "does not answer hello within 3 s"),
        ("another-protocol", 1, "speaks protocol 2"),
        ("another-form", 1, "no answer to it"),
        ("a-name-as-trap", 1, "no answer to it"),
        ("lies-about-a-commit", 1, "does not list it"),
        ("dies-in-a-commit", 1, "not known"),
        ("dies-after-a-commit", 1, "not known"),
        ("hangs-in-a-commit", 1, "does not answer commit"),
        ("fails-in-a-commit", 1, "No space left on device"),
        // These two are no failures.
        ("a-generation-of-its-own", 0, ""),
        ("keeps-its-connections", 0, ""),
    ];
    let qemu = Qemu::installed().unwrap();
    let mut machine = BareMachine::with_disks(&qemu, &[("vda", 8 * MIB), ("vdb", 4 * MIB)]).unwrap();
    let program = example("raw-images");
    let good = format!("provider = {{ program = {program:?}, arguments = [\"@/images\"] }}");
    let good_backup = |machine: &BareMachine| Place::new(machine.work(), &machine.qmp(), &good).backup();
    good_backup(&machine);
    for (number, (what, status, words)) in (1_u64..).zip(cases) {
        // The first disk has something to read, and something that is not to be read.
        machine.disk_io("vda", &format!("write -P {number} {} 64k", number * 65536)).unwrap();
        let outcome = wrong(&machine, what);
        assert_eq!(outcome.status, status, "{what}: {}", outcome.stderr);
        let said = words.split('|').any(|words| outcome.stderr.contains(words));
        assert!(said, "{what}: {words:?} is not in: {}", outcome.stderr);
        if status == 1 && !outcome.stderr.contains("was not touched") {
            assert!(outcome.stderr.contains("nothing of this run is left"), "{what}: {}", outcome.stderr);
        }
        let nodes = machine.execute("query-named-block-nodes", serde_json::json!({})).unwrap();
        assert!(!nodes.to_string().contains("stillpoint-filter"), "{what}: {nodes}");
        assert_eq!(machine.status().unwrap(), "running");
        machine.disk_io("vdb", &format!("write -P {number} 0 4k")).unwrap();
        let summary = good_backup(&machine);
        let images = machine.work().join("images/vm").join(common::point_id(&summary));
        let (vda, vdb) =
            (fs::read(images.join("vda.raw")).unwrap(), fs::read(images.join("vdb.raw")).unwrap());
        for earlier in 1..=number {
            assert_eq!(
                u64::from(vda[usize::try_from(earlier * 65536).unwrap()]),
                earlier,
                "{what}: {summary}"
            );
        }
        assert_eq!(u64::from(vdb[0]), number, "{what}");
        if what != "a-generation-of-its-own" {
            assert_eq!(summary["disks"][0]["bitmap_mode"], "reuse", "{what}: {summary}");
        }
    }
}

/// A place whose provider hangs when it has the disks, and is not taken for hung for long.
fn hanging(machine: &BareMachine, mechanism: &str) -> Place {
    let script = workspace().join("crates/stillpoint/tests/wrong_provider.py");
    let examples = example("");
    let target = format!(
        "provider = {{ program = \"/usr/bin/python3\", arguments = [{script:?}, \"hangs\", \"@/images\"], \
         environment = {{ EXAMPLES = {examples:?} }}, options = {{ mechanism = {mechanism:?} }} }}"
    );
    Place::new(machine.work(), &machine.qmp(), &target)
}

/// Waits until the provider has its disks, which `sign` in the mounts or the sockets shows.
fn await_handover(place: &Place, sign: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let runtime = place.work.join("run");
    let there = || {
        let runs = fs::read_dir(&runtime).into_iter().flatten().flatten();
        runs.into_iter().any(|run| run.path().join(sign).exists())
    };
    while !there() {
        assert!(Instant::now() < deadline, "no {sign} below {}", runtime.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_signal_ends_a_run_whose_provider_hangs() {
    let machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", MIB)]).unwrap();
    let place = hanging(&machine, "nbd");
    let mut run = place.tool.command(place.arguments(&["backup", "vm"]));
    let run = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    await_handover(&place, "nbd");
    let started = Instant::now();
    assert!(Command::new("kill").args(["-s", "TERM", &run.id().to_string()]).status().unwrap().success());
    let output = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    assert!(said.contains("nothing of this run is left"), "{said}");
    nothing_is_left(&place);
}

/// Mounts and loop devices of a run that was killed are cleared away by `recover`, and so is the program.
#[test]
fn nothing_is_left_of_a_program_whose_run_was_killed() {
    let machine =
        BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", MIB), ("vdb", MIB)]).unwrap();
    for mechanism in ["file-handle", "block-device"] {
        let place = hanging(&machine, mechanism);
        let mut run = place.tool.command(place.arguments(&["backup", "vm"]));
        let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        await_handover(&place, "disks/vdb");
        if mechanism == "block-device" {
            await_loops(&place, 2);
        }
        run.kill().unwrap();
        run.wait().unwrap();
        let recovered = place.run(&["recover", "vm"]);
        assert_eq!(recovered.status, 0, "{recovered:?}");
        nothing_is_left(&place);
        await_loops(&place, 0);
        let line = fs::read_dir("/proc").unwrap().flatten().any(|process| {
            let line = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            line.contains("wrong_provider.py") && line.contains(place.work.to_str().unwrap())
        });
        assert!(!line, "the program is left");
    }
}

fn await_loops(place: &Place, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let loops = || {
        let devices = fs::read_dir("/sys/block").unwrap().flatten();
        let files =
            devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
        files.filter(|file| file.contains(place.work.to_str().unwrap())).count()
    };
    while loops() != count {
        assert!(Instant::now() < deadline, "{} loop devices, not {count}", loops());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Full and incremental; what reaches QEMU is checked before, so an older one survives it too.
fn wrong_requests(qemu: &Qemu) {
    let mut machine = BareMachine::with_disks(qemu, &[("vda", 4 * MIB + 512), ("vdb", MIB)]).unwrap();
    for round in 1..3 {
        machine.disk_io("vda", &format!("write -P {round} {} 100k", round * MIB)).unwrap();
        let outcome = wrong(&machine, "sends-wrong-requests");
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        let summary = outcome.json().unwrap();
        let image = machine.work().join("images/vm").join(common::point_id(&summary)).join("vda.raw");
        let image = fs::read(image).unwrap();
        for earlier in 1..=round {
            assert_eq!(u64::from(image[usize::try_from(earlier * MIB).unwrap()]), earlier);
        }
        assert_eq!(machine.status().unwrap(), "running");
    }
}

#[test]
fn no_wrong_request_reaches_qemu() {
    wrong_requests(&Qemu::installed().unwrap());
}

#[test]
fn no_wrong_request_reaches_qemu_10() {
    let Some(qemu) = Qemu::trixie() else {
        return skip("no_wrong_request_reaches_qemu_10", "no QEMU 10; `cargo xtask qemu10` installs it");
    };
    wrong_requests(&qemu);
}

/// The conformance suite on a program; what it prints.
fn check(work: &Path, line: &[&str]) -> Outcome {
    let line = ["provider", "check"].iter().chain(line).map(OsString::from);
    tool(work).run(line.collect::<Vec<_>>()).unwrap()
}

#[test]
fn the_examples_pass_the_conformance_suite() {
    let work = tempfile::tempdir().unwrap();
    let images = work.path().join("images").display().to_string();
    let raw_images = example("raw-images").display().to_string();
    for mechanism in ["nbd", "file-handle", "block-device"] {
        let outcome = check(work.path(), &["--mechanism", mechanism, &raw_images, &images]);
        assert_eq!(outcome.status, 0, "{mechanism}: {}", outcome.stdout);
        assert!(outcome.stdout.contains("23 passed, 0 failed, 0 not claimed"), "{}", outcome.stdout);
    }
    let (repository, base) = (work.path().join("borg"), work.path().join("base").display().to_string());
    let mut init = Command::new("borg");
    init.args(["init", "--encryption", "none"]).arg(&repository).env("BORG_BASE_DIR", &base);
    assert!(init.status().unwrap().success());
    let base = format!("BORG_BASE_DIR={base}");
    let consent = "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes";
    let (borg, repository) = (example("borg").display().to_string(), repository.display().to_string());
    let outcome = check(work.path(), &["--env", &base, "--env", consent, &borg, &repository]);
    assert_eq!(outcome.status, 0, "{}", outcome.stdout);
}

#[test]
fn the_conformance_suite_finds_what_is_wrong() {
    let work = tempfile::tempdir().unwrap();
    let images = work.path().join("images").display().to_string();
    let script = workspace().join("crates/stillpoint/tests/wrong_provider.py").display().to_string();
    let examples = format!("EXAMPLES={}", example("").display());
    for (wrong, words) in [
        ("another-form", "FAILED       greets in the right form"),
        ("reads-nothing", "FAILED       makes a full point"),
        ("lies-about-a-commit", "FAILED       makes a full point"),
        ("a-generation-of-its-own", "FAILED       makes an increment"),
        ("crashes", "FAILED       makes a full point"),
    ] {
        let outcome = check(work.path(), &["--env", &examples, "/usr/bin/python3", &script, wrong, &images]);
        assert_eq!(outcome.status, 1, "{wrong}: {}", outcome.stdout);
        assert!(outcome.stdout.contains(words), "{wrong}: {}", outcome.stdout);
    }
}
