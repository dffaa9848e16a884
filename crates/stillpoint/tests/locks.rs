//! Who may do what at the same time, and who may look: locks, signals, and the eyes of other users.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, backup_arguments};
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, Qemu, Tool, skip};

struct Setting {
    machine: BareMachine,
    tool: Tool,
    target: PathBuf,
}

impl Setting {
    fn new() -> Self {
        let machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 8 << 20)]).unwrap();
        let (tool, target) = (common::tool(machine.work()), machine.work().join("target"));
        Self { machine, tool, target }
    }

    fn hold_at(&self, place: &str) -> Held {
        Held::at(&self.tool, place, backup_arguments(&self.machine.qmp(), &self.target, &[]))
    }

    fn is_as_before(&mut self) {
        assert_eq!(self.machine.status().unwrap(), "running");
        let nodes =
            self.machine.execute("query-named-block-nodes", serde_json::json!({"flat": true})).unwrap();
        assert!(!nodes.to_string().contains("\"stillpoint-"), "{nodes}");
        let run = std::fs::read_dir(self.machine.work().join("run")).unwrap();
        let left: Vec<_> =
            run.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_none()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn a_second_run_is_told_who_the_first_is_by_whatever_monitor_it_comes() {
    let mut setting = Setting::new();
    let held = setting.hold_at("taken#1");
    setting.machine.release_own();
    for qmp in [setting.machine.qmp(), setting.machine.own_qmp()] {
        for command in
            [backup_arguments(&qmp, &setting.target, &[]), vec!["recover".into(), "--qmp".into(), qmp.into()]]
        {
            let second = setting.tool.run(command).unwrap();
            assert_eq!(second.status, 4, "{second:?}");
            assert!(second.stderr.contains(&format!("process {}", held.pid())), "{}", second.stderr);
            assert!(second.stderr.contains("was not touched"), "{}", second.stderr);
        }
    }
    held.go_on().json().unwrap();
    let again = setting.tool.run(backup_arguments(&setting.machine.own_qmp(), &setting.target, &[])).unwrap();
    assert_eq!(again.json().unwrap()["disks"][0]["bitmap_mode"], "reuse");
}

#[test]
fn the_lock_of_a_dead_run_is_no_obstacle() {
    let setting = Setting::new();
    let held = setting.hold_at("taken#1");
    held.signal("KILL");
    held.go_on();
    let next = setting.tool.run(backup_arguments(&setting.machine.qmp(), &setting.target, &[])).unwrap();
    next.json().unwrap();
}

#[test]
fn each_signal_ends_a_run_cleanly_within_seconds_also_twice() {
    let mut setting = Setting::new();
    for signal in ["INT", "TERM", "HUP", "QUIT", "PIPE"] {
        let held = setting.hold_at("taken#1");
        held.signal(signal);
        held.signal("CONT");
        held.signal(signal);
        let signalled = Instant::now();
        let outcome = held.go_on();
        assert_eq!(outcome.status, 130, "{signal}: {}", outcome.stderr);
        assert!(signalled.elapsed() < Duration::from_secs(5), "{signal}: {:?}", signalled.elapsed());
        assert!(outcome.stderr.contains("nothing of this run is left"), "{signal}: {}", outcome.stderr);
        setting.is_as_before();
    }
    let points = setting.tool.run(["points", "--to", setting.target.to_str().unwrap(), "--json"]).unwrap();
    assert_eq!(points.stdout.trim(), "[]");
}

/// Whether the user `nobody` can do this to a path.
fn nobody_can(program: &str, path: &Path) -> bool {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]).arg(path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

fn everything_below(path: &Path) -> Vec<PathBuf> {
    let mut all = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).unwrap();
        all.extend(entries.flat_map(|entry| everything_below(&entry.unwrap().path())));
    }
    all
}

#[test]
fn other_users_can_read_nothing_of_a_run_or_a_point() {
    if !rustix::process::geteuid().is_root() {
        return skip("what other users can read", "only root can be another user");
    }
    let setting = Setting::new();
    // What is outside must not be what keeps them out.
    std::fs::set_permissions(setting.machine.work(), PermissionsExt::from_mode(0o755)).unwrap();
    let open = setting.machine.work().join("open");
    std::fs::write(&open, "").unwrap();
    std::fs::set_permissions(&open, PermissionsExt::from_mode(0o644)).unwrap();
    assert!(nobody_can("cat", &open), "the negative control");

    let mut looked_at = 0;
    let mut look = || {
        let below = |path: &str| everything_below(&setting.machine.work().join(path));
        for path in below("run").into_iter().chain(below("target")) {
            let program = if path.is_dir() { "ls" } else { "cat" };
            assert!(!nobody_can(program, &path), "{}", path.display());
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
            looked_at += 1;
        }
    };
    setting.tool.run(backup_arguments(&setting.machine.qmp(), &setting.target, &[])).unwrap().json().unwrap();
    let held = setting.hold_at("taken#1");
    look();
    let sockets = everything_below(&setting.machine.work().join("run"));
    assert!(sockets.iter().any(|path| path.ends_with("socket")), "{sockets:?}");
    assert!(sockets.iter().any(|path| path.extension().is_some_and(|kind| kind == "journal")), "{sockets:?}");
    held.go_on().json().unwrap();
    look();
    assert!(looked_at > 10);
}
