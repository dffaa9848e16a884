//! A QEMU that does not answer: the run ends soon, says so, tells no lie about the guest, and what it sent before does no
//! harm when QEMU goes on; the next VM gets its turn.
//!
//! `STILLPOINT_PLACES=all` stops QEMU at every named place of a run, not at the first of each kind only;
//! `STILLPOINT_DEADLINES=real` does it with the deadlines that users have; `STILLPOINT_WORKERS=20` is how many at a time.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, backup_arguments, no_process_is_left, signal, tool};
use serde_json::Value;
use std::{
    collections::{BTreeSet, VecDeque},
    ffi::OsString,
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, Outcome, Qemu, Tool};

const MIB: u64 = 1 << 20;

/// How long QEMU may take, for the tests that wait for the end of it: connecting, a command, and the grace.
const SHORT: &str = "5000,1000,500";

fn real_deadlines() -> bool {
    std::env::var("STILLPOINT_DEADLINES").is_ok_and(|deadlines| deadlines == "real")
}

/// What the whole run may take from the moment in which QEMU stops.
fn bound() -> Duration {
    Duration::from_secs(if real_deadlines() { 90 } else { 15 })
}

fn hasty(work: &Path) -> Tool {
    if real_deadlines() { tool(work) } else { tool(work).env("STILLPOINT_QMP_DEADLINES", SHORT) }
}

/// A VM with a qcow2 and a raw disk.
struct Vm {
    machine: BareMachine,
    tool: Tool,
}

impl Vm {
    fn start() -> Self {
        let machine = BareMachine::start(&Qemu::installed().unwrap(), |work| {
            let (first, second) = (work.join("vda.qcow2"), work.join("vdb.raw"));
            let size = (8 * MIB).to_string();
            let path = first.display().to_string();
            stillpoint_testkit::run(
                std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &path, &size]),
            )?;
            std::fs::File::create(&second)?.set_len(4 * MIB)?;
            let mut arguments = Vec::new();
            for (name, format, image) in [("vda", "qcow2", &first), ("vdb", "raw", &second)] {
                let drive = format!("if=none,id=drive-{name},format={format},file={}", image.display());
                let device = format!("virtio-blk-pci,id={name},drive=drive-{name}");
                arguments.extend(["-drive".into(), drive, "-device".into(), device]);
            }
            Ok(arguments)
        });
        let machine = machine.unwrap();
        let tool = hasty(machine.work());
        Self { machine, tool }
    }

    fn pid(&self) -> u32 {
        self.machine.pid().unwrap()
    }

    fn arguments(&self) -> Vec<OsString> {
        backup_arguments(&self.machine.qmp(), &self.machine.work().join("target"), &[])
    }

    fn backup(&self) -> Value {
        let target = self.machine.work().join("target");
        self.tool.backup("vm", &self.machine.qmp(), &target, &[]).unwrap()
    }

    fn recover(&self) -> Outcome {
        self.tool.run(["recover", "--qmp", self.machine.qmp().to_str().unwrap()]).unwrap()
    }

    /// All places that a full and an incremental backup reach.
    fn places(&self) -> [BTreeSet<String>; 2] {
        [0, 1].map(|round| {
            let list = self.machine.work().join(format!("places-{round}"));
            let mut command = self.tool.command(self.arguments());
            command.env("STILLPOINT_FAILPOINT_LIST", &list);
            assert!(command.output().unwrap().status.success());
            let text = std::fs::read_to_string(list).unwrap();
            text.lines().map(str::to_owned).collect()
        })
    }

    /// Stops QEMU when the run is at `place`, and lets it go on when the run has ended.
    fn stop_at(&mut self, place: &str) -> (Outcome, Duration) {
        let held = Held::at(&self.tool, place, self.arguments());
        signal(self.pid(), "STOP");
        let stopped = Instant::now();
        let outcome = held.go_on();
        let took = stopped.elapsed();
        signal(self.pid(), "CONT");
        (outcome, took)
    }
}

/// What a run says whose QEMU is stopped.
fn tells_the_truth(outcome: &Outcome, pid: u32, place: &str) {
    let context = format!("{place}: status {}\n{}\n{}", outcome.status, outcome.stdout, outcome.stderr);
    let printed: Value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|_| panic!("{context}"));
    assert_eq!((&printed["vm"], &printed["guest"]), (&"vm".into(), &"unknown".into()), "{context}");
    for word in ["does not answer", &format!("{pid} is stopped (SIGSTOP)"), &format!("kill -CONT {pid}")] {
        assert!(outcome.stderr.contains(word), "no {word:?} at {context}");
    }
    assert!(!outcome.stderr.contains("runs"), "a lie at {context}");
    assert!(!outcome.stderr.contains("panicked"), "{context}");
    let is_point = printed["point"].is_string();
    match outcome.status {
        0 => assert!(is_point && printed["result"] == "done", "{context}"),
        1 => assert!(!is_point, "{context}"),
        3 => assert!(outcome.stderr.contains("stillpoint recover --qmp"), "{context}"),
        _ => panic!("{context}"),
    }
}

/// The VM is as it was, and nothing is left on the host.
fn is_as_before(vm: &mut Vm, before: &stillpoint_testkit::BlockGraph, place: &str) {
    let recovered = vm.recover();
    assert_eq!(recovered.status, 0, "{place}: {recovered:?}");
    assert_eq!(vm.machine.status().unwrap(), "running", "{place}");
    assert_eq!(vm.machine.block_graph().unwrap().without_bitmaps(), before.clone(), "{place}");
    let left = std::fs::read_dir(vm.machine.work().join("run")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(left.iter().all(|name| name.ends_with(".lock")), "{place}: {left:?}");
    vm.backup();
    assert_eq!(vm.machine.block_graph().unwrap().bitmaps.len(), 2, "{place}");
}

#[test]
fn stopped_at_every_place_a_run_ends_soon_and_recovery_leaves_nothing() {
    let all = std::env::var("STILLPOINT_PLACES").is_ok_and(|places| places == "all");
    let workers = std::env::var("STILLPOINT_WORKERS").map_or(4, |workers| workers.parse().unwrap());
    let first = Vm::start();
    let [full, incremental] = first.places();
    drop(first);
    let mut kinds = BTreeSet::new();
    let mut places = VecDeque::new();
    // What only a full run reaches needs a machine without a point.
    for (place, is_full) in
        full.iter().map(|place| (place, true)).chain(incremental.iter().map(|place| (place, false)))
    {
        let kind = place.split('#').next().unwrap();
        let wanted =
            if is_full { all && !incremental.contains(place) } else { all || kinds.insert(kind.to_owned()) };
        if wanted {
            places.push_back((place.clone(), is_full));
        }
    }
    for must in
        ["pipeline:torn", "pipeline:written", "qmp:nbd-server-start", "taken", "undone:drive", "durable"]
    {
        assert!(places.iter().any(|(place, _)| place.starts_with(must)), "no {must} among {places:?}");
    }
    let count = places.len();
    let places = Mutex::new(places);
    let worst = Mutex::new((Duration::ZERO, String::new()));
    let statuses = Mutex::new([0u32; 4]);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let mut vm = Vm::start();
                let before = vm.machine.block_graph().unwrap();
                vm.backup();
                loop {
                    let Some((place, is_full)) = places.lock().unwrap().pop_front() else { break };
                    if is_full {
                        vm = Vm::start();
                    }
                    let pid = vm.pid();
                    let (outcome, took) = vm.stop_at(&place);
                    println!("{place}: status {} after {took:.1?}", outcome.status);
                    tells_the_truth(&outcome, pid, &place);
                    assert!(took < bound(), "{place}: {took:?}");
                    statuses.lock().unwrap()[usize::try_from(outcome.status).unwrap()] += 1;
                    let mut worst = worst.lock().unwrap();
                    if took > worst.0 {
                        *worst = (took, place.clone());
                    }
                    drop(worst);
                    is_as_before(&mut vm, &before, &place);
                }
                no_process_is_left(vm.machine.work(), "at the end");
            });
        }
    });
    println!("{count} places, statuses 0 to 3: {:?}, the longest: {:?}", statuses.lock(), worst.lock());
}

#[test]
fn a_qemu_that_is_stopped_before_the_run_is_told_as_such() {
    let mut vm = Vm::start();
    vm.backup();
    let pid = vm.pid();
    signal(pid, "STOP");
    vm.tool = vm.tool.clone().env("STILLPOINT_QMP_DEADLINES", "500,1000,500");
    let outcome = vm.tool.run(vm.arguments()).unwrap();
    assert_eq!(outcome.status, 1, "{outcome:?}");
    tells_the_truth(&outcome, pid, "before");
    assert!(outcome.stderr.contains("it was not touched"), "{}", outcome.stderr);
    for command in ["recover", "doctor"] {
        let outcome = vm.tool.run([command, "--qmp", vm.machine.qmp().to_str().unwrap()]).unwrap();
        let said = format!("{}{}", outcome.stdout, outcome.stderr);
        assert_eq!(outcome.status, 1, "{said}");
        assert!(
            said.contains("is stopped (SIGSTOP)") && said.contains(&format!("kill -CONT {pid}")),
            "{said}"
        );
        assert!(!said.contains("another client"), "{said}");
    }
    signal(pid, "CONT");
    let recovered = vm.recover();
    assert!(recovered.status == 0 && recovered.stdout.contains("nothing to undo"), "{recovered:?}");
    // The negative control: the same monitor, not stopped, and held by somebody else.
    vm.machine.release_own();
    let other = stillpoint_testkit::Monitor::connect(&vm.machine.qmp()).unwrap();
    let busy = vm.tool.run(vm.arguments()).unwrap();
    assert!(busy.stderr.contains("another client") && !busy.stderr.contains("SIGSTOP"), "{busy:?}");
    drop(other);
}

/// A QEMU that is slow once, but within the grace: the run fails, and cleans up all the same.
#[test]
fn a_qemu_that_answers_late_is_cleaned_up_by_the_run_itself() {
    let mut vm = Vm::start();
    let before = vm.machine.block_graph().unwrap();
    // Stopped in mid-run, in the pause, and while the run takes things apart.
    for place in ["taken#1", "pipeline:torn#1", "undone:export#1"] {
        vm.tool = vm.tool.clone().env("STILLPOINT_QMP_DEADLINES", "5000,1000,30000");
        let held = Held::at(&vm.tool, place, vm.arguments());
        signal(vm.pid(), "STOP");
        held.signal("CONT");
        // Longer than a command has, and shorter than the grace: the passing of time is what is tested.
        std::thread::sleep(Duration::from_secs(4));
        signal(vm.pid(), "CONT");
        let outcome = held.end();
        let printed: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(printed["guest"], "running", "{place}: {outcome:?}");
        let is_late_for_the_point = place.starts_with("undone");
        assert_eq!(outcome.status, i32::from(!is_late_for_the_point), "{place}: {outcome:?}");
        let after = vm.machine.block_graph().unwrap();
        assert_eq!(after.without_bitmaps(), before.clone(), "{place}");
        let recovered = vm.recover();
        assert!(recovered.stdout.contains("nothing to undo"), "{place}: {recovered:?}");
    }
    no_process_is_left(vm.machine.work(), "at the end");
}

/// QEMU stops in the pause: `stop` is done, and the `cont` behind it is not even sent.
fn stopped_in_the_pause(vm: &mut Vm, kill_the_guard: bool) {
    let held = Held::at(&vm.tool, "pipeline:torn#1", vm.arguments());
    let deadline = Instant::now() + Duration::from_secs(20);
    while vm.machine.status().unwrap() != "paused" {
        assert!(Instant::now() < deadline, "the guest is not paused");
        std::thread::sleep(Duration::from_millis(2));
    }
    let guards = common::guards(held.pid());
    assert_eq!(guards.len(), 1, "{guards:?}");
    signal(vm.pid(), "STOP");
    let outcome = held.go_on();
    assert_eq!(outcome.status, 3, "{outcome:?}");
    tells_the_truth(&outcome, vm.pid(), "in the pause");
    if kill_the_guard {
        signal(guards[0], "KILL");
    }
    signal(vm.pid(), "CONT");
}

#[test]
fn a_guest_whose_qemu_stops_in_the_pause_is_resumed_by_the_guard() {
    let mut vm = Vm::start();
    let before = vm.machine.block_graph().unwrap();
    stopped_in_the_pause(&mut vm, false);
    // Nobody recovers: it is the guard that resumes it.
    let deadline = Instant::now() + Duration::from_secs(20);
    while vm.machine.status().unwrap() != "running" {
        assert!(Instant::now() < deadline, "the guest stays paused");
        std::thread::sleep(Duration::from_millis(2));
    }
    no_process_is_left(vm.machine.work(), "the guard has done its work");
    is_as_before(&mut vm, &before, "with the guard");
    // The negative control: without it the guest stays paused, until recovery.
    stopped_in_the_pause(&mut vm, true);
    for _ in 0..20 {
        assert_eq!(vm.machine.status().unwrap(), "paused", "something else resumes it");
    }
    is_as_before(&mut vm, &before, "without the guard");
}

/// What the guest does stands in what a run prints, also when it is no alarm.
#[test]
fn the_state_of_the_guest_is_told_at_the_end() {
    let mut vm = Vm::start();
    assert_eq!(vm.backup()["guest"], "running");
    vm.machine.execute("stop", serde_json::json!({})).unwrap();
    let paused = vm.backup();
    assert_eq!((&paused["guest"], &paused["warnings"]), (&"paused".into(), &serde_json::json!([])));
    let target = vm.machine.work().join("target");
    let qmp = vm.machine.qmp();
    let arguments = ["backup", "vm", "--qmp", qmp.to_str().unwrap(), "--to", target.to_str().unwrap()];
    let told = vm.tool.run(arguments).unwrap();
    assert!(told.stdout.contains("guest: does not run (paused), as before"), "{told:?}");
    vm.machine.execute("cont", serde_json::json!({})).unwrap();
    let told = vm.tool.run(arguments).unwrap();
    assert!(told.stdout.contains("guest: running"), "{told:?}");
    // Somebody pauses it in the middle of a run that then fails.
    for (status, action) in [(0, "CONT"), (130, "INT")] {
        let held = Held::at(&vm.tool, "taken#1", vm.arguments());
        vm.machine.execute("stop", serde_json::json!({})).unwrap();
        if action == "INT" {
            held.signal("INT");
        }
        let outcome = held.go_on();
        assert_eq!(outcome.status, status, "{outcome:?}");
        let printed: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(printed["guest"], "paused", "{outcome:?}");
        for word in ["does not run (paused), though it ran before", "`cont` on its monitor"] {
            assert!(outcome.stderr.contains(word), "{outcome:?}");
        }
        vm.machine.execute("cont", serde_json::json!({})).unwrap();
    }
}

/// Ten VMs, three of them bad: one is stopped before its turn, one is not there, one is stopped in mid-run.
#[test]
fn of_ten_vms_three_bad_ones_are_named_and_seven_are_done() {
    let vms: Vec<Vm> = (0..9).map(|_| Vm::start()).collect();
    let work = tempfile::tempdir().unwrap();
    let config = work.path().join("stillpoint.toml");
    let mut text =
        format!("[target.main]\nprovider = \"directory\"\ndirectory = {:?}\n", work.path().join("points"));
    std::fs::create_dir(work.path().join("points")).unwrap();
    for number in 0..10 {
        let qmp = vms.get(number).map_or_else(|| work.path().join("none"), |vm| vm.machine.qmp());
        // The last is the one that is not there, and comes fifth.
        let name = match number {
            9 => 5,
            0..4 => number + 1,
            _ => number + 2,
        };
        text.push_str(&format!("[vm.vm{name:02}]\nqmp = {qmp:?}\n"));
    }
    std::fs::write(&config, text).unwrap();
    let tool = tool(work.path()).env("STILLPOINT_QMP_DEADLINES", "500,1000,500");
    // vm03 and vm07.
    let (mid_run, before) = (&vms[2], &vms[5]);
    signal(before.pid(), "STOP");
    let arguments = ["--config", config.to_str().unwrap(), "backup", "--all", "--json"];
    let held = Held::at(&tool, "taken#3", arguments);
    signal(mid_run.pid(), "STOP");
    let stopped = Instant::now();
    let outcome = held.go_on();
    assert!(stopped.elapsed() < Duration::from_secs(60), "{:?}", stopped.elapsed());
    for vm in [before, mid_run] {
        signal(vm.pid(), "CONT");
    }
    assert_eq!(outcome.status, 3, "the worst of them: {outcome:?}");
    let last = outcome.stderr.lines().last().unwrap();
    assert_eq!(last, "7 of 10 done; failed: vm03, vm05, vm07; needs recover: vm03", "{}", outcome.stderr);
    let printed: Vec<Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = printed.iter().map(|one| one["vm"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, (1..=10).map(|number| format!("vm{number:02}")).collect::<Vec<_>>());
    for one in &printed {
        let name = one["vm"].as_str().unwrap();
        let bad = ["vm03", "vm05", "vm07"].contains(&name);
        assert_eq!(one["guest"], if bad { "unknown" } else { "running" }, "{one}");
        assert_eq!(one["result"], if bad { "failed" } else { "done" }, "{one}");
        if bad {
            assert!(one["error"].as_str().unwrap().contains(&format!("VM {name}")), "{one}");
        }
    }
    let errors: Vec<_> = outcome.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 3, "{}", outcome.stderr);
    for (error, name) in errors.iter().zip(["vm03", "vm05", "vm07"]) {
        assert!(error.contains(&format!("VM {name}")), "{error}");
    }
    let again = tool.run(["--config", config.to_str().unwrap(), "backup", "--all"]).unwrap();
    assert_eq!(again.stderr.lines().last().unwrap(), "9 of 10 done; failed: vm05", "{}", again.stderr);
}
