//! Freezing through the guest agent, as part of a whole backup: whatever the agent does, the run is bounded, the guest is
//! thawed, and the point says what its file systems can expect and why.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::Held;
use serde_json::Value;
use std::{
    ffi::OsString,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, DiskSpec, GuestBuilder, Outcome, Qemu, Tool, run};

/// What an agent does.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Good,
    /// Takes connections and says nothing.
    Silent,
    /// Answers with nonsense without end.
    Babbles,
    /// Freezes, and answers that only after the next command came.
    HangsInFreeze,
    /// Was frozen by somebody else.
    Frozen,
    /// Its file systems thaw by themselves, as those of Windows do.
    ThawsByItself,
    /// Answers a thaw only when `patient` is cleared.
    NeverThaws,
}

/// A guest agent, scripted.
struct Agent {
    path: PathBuf,
    frozen: Arc<AtomicBool>,
    deaf: Arc<AtomicBool>,
    end: Arc<AtomicBool>,
    thaws: mpsc::Receiver<Instant>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Agent {
    fn listen(directory: &Path, manner: Manner) -> Self {
        let path = directory.join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let frozen = Arc::new(AtomicBool::new(manner == Manner::Frozen));
        let deaf = Arc::new(AtomicBool::new(manner == Manner::NeverThaws));
        let end = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (told, thaws) = mpsc::channel();
        let agent = Self {
            path,
            frozen: frozen.clone(),
            deaf: deaf.clone(),
            end: end.clone(),
            thaws,
            asked: asked.clone(),
        };
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (frozen, deaf, asked, told) = (frozen.clone(), deaf.clone(), asked.clone(), told.clone());
                let (stream, end) = (stream.unwrap(), end.clone());
                stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                thread::spawn(move || serve(&stream, manner, &frozen, &deaf, &end, &asked, &told));
            }
        });
        agent
    }

    fn asked(&self, command: &str) -> bool {
        self.asked.lock().unwrap().iter().any(|asked| asked == command)
    }
}

fn serve(
    mut stream: &UnixStream,
    manner: Manner,
    frozen: &AtomicBool,
    deaf: &AtomicBool,
    end: &AtomicBool,
    asked: &Mutex<Vec<String>>,
    told: &mpsc::Sender<Instant>,
) {
    let mut lines = BufReader::new(stream);
    let mut late = None;
    loop {
        let mut line = Vec::new();
        match lines.read_until(b'\n', &mut line) {
            Ok(1..) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && !end.load(Ordering::SeqCst) => {
                continue;
            }
            _ => return,
        }
        let text: String = String::from_utf8_lossy(&line).chars().filter(char::is_ascii).collect();
        let Ok(request) = serde_json::from_str::<Value>(text.trim()) else { continue };
        let command = request["execute"].as_str().unwrap_or_default().to_owned();
        asked.lock().unwrap().push(command.clone());
        if manner == Manner::Silent {
            continue;
        }
        if manner == Manner::Babbles {
            let noise = "no JSON at all ".repeat(1000);
            while stream.write_all(noise.as_bytes()).is_ok() {}
            return;
        }
        if let Some(late) = late.take() {
            let _ = writeln!(stream, "{late}");
        }
        let count = |value: u32| format!("{{\"return\": {value}}}");
        let answer = match command.as_str() {
            "guest-sync-delimited" => {
                let _ = stream.write_all(&[0xff]);
                format!("{{\"return\": {}}}", request["arguments"]["id"])
            }
            "guest-fsfreeze-status" => {
                let status = if frozen.load(Ordering::SeqCst) { "frozen" } else { "thawed" };
                format!("{{\"return\": \"{status}\"}}")
            }
            "guest-fsfreeze-freeze" => {
                frozen.store(true, Ordering::SeqCst);
                if manner == Manner::HangsInFreeze {
                    late = Some(count(2));
                    continue;
                }
                count(2)
            }
            "guest-fsfreeze-thaw" => {
                if deaf.load(Ordering::SeqCst) {
                    continue;
                }
                frozen.store(false, Ordering::SeqCst);
                let _ = told.send(Instant::now());
                count(if manner == Manner::ThawsByItself { 0 } else { 2 })
            }
            _ => "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}".to_owned(),
        };
        if writeln!(stream, "{answer}").is_err() {
            return;
        }
    }
}

/// A VM, its agent, and the program.
struct Setting {
    machine: BareMachine,
    agent: Agent,
    tool: Tool,
    target: PathBuf,
}

impl Setting {
    fn new(manner: Manner) -> Self {
        let machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 8 << 20)]).unwrap();
        let agent = Agent::listen(machine.work(), manner);
        let tool = common::tool(machine.work());
        let target = machine.work().join("target");
        Self { machine, agent, tool, target }
    }

    fn arguments(&self, timeout: u64) -> Vec<OsString> {
        let config = self.machine.work().join("freeze.toml");
        let (qmp, agent) = (self.machine.qmp(), &self.agent.path);
        let text = format!("[vm.vm]\nqmp = {qmp:?}\nagent = {agent:?}\nfreeze-timeout = {timeout}\n");
        std::fs::write(&config, text).unwrap();
        let mut arguments = vec!["--config".into(), config.into()];
        arguments.extend(common::backup_arguments(&qmp, &self.target, &[]));
        arguments
    }

    fn run(&self, timeout: u64) -> Outcome {
        self.tool.run(self.arguments(timeout)).unwrap()
    }

    /// What the only point says of its consistency.
    fn point(&self) -> (String, String) {
        let place = self.target.to_str().unwrap();
        let points = self.tool.run(["points", "--to", place, "--json"]).unwrap().json().unwrap();
        let point = &points[0]["record"];
        let text = |key: &str| point[key].as_str().unwrap_or_else(|| panic!("{key}: {points}")).to_owned();
        (text("consistency"), text("consistency_reason"))
    }

    fn is_thawed_and_running(&mut self) {
        assert!(!self.agent.frozen.load(Ordering::SeqCst));
        assert_eq!(self.machine.status().unwrap(), "running");
    }
}

#[test]
fn a_good_agent_makes_the_point_consistent() {
    let mut setting = Setting::new(Manner::Good);
    let summary = setting.run(60).json().unwrap();
    assert_eq!(summary["consistency"], "file-system-consistent");
    assert!(summary["freeze_ms"].as_f64().unwrap() > 0.0, "{summary}");
    assert_eq!(setting.point().1, "2 file systems were frozen");
    setting.is_thawed_and_running();
}

#[test]
fn an_agent_that_fails_makes_it_crash_consistent_and_the_point_says_why() {
    for (manner, why) in [
        (Manner::Silent, "does not answer"),
        (Manner::Babbles, "agent"),
        (Manner::HangsInFreeze, "the freeze failed"),
        (Manner::ThawsByItself, "only 0 were still frozen"),
    ] {
        let mut setting = Setting::new(manner);
        let started = Instant::now();
        let summary = setting.run(1).json().unwrap();
        assert!(started.elapsed() < Duration::from_secs(30), "{why}");
        assert_eq!(summary["consistency"], "crash-consistent", "{why}");
        let (_, reason) = setting.point();
        assert!(reason.contains(why), "{reason}");
        setting.is_thawed_and_running();
    }
}

#[test]
fn an_agent_that_is_not_there_is_no_obstacle() {
    let mut setting = Setting::new(Manner::Good);
    std::fs::remove_file(&setting.agent.path).unwrap();
    setting.run(1).json().unwrap();
    let (consistency, reason) = setting.point();
    assert!(consistency == "crash-consistent" && reason.contains("no socket"), "{reason}");
    setting.is_thawed_and_running();
}

#[test]
fn somebody_elses_freeze_is_left_alone() {
    let mut setting = Setting::new(Manner::Frozen);
    setting.run(1).json().unwrap();
    assert!(setting.point().1.contains("already frozen"));
    assert!(!setting.agent.asked("guest-fsfreeze-thaw") && setting.agent.frozen.load(Ordering::SeqCst));
    assert_eq!(setting.machine.status().unwrap(), "running");
}

#[test]
fn a_run_that_dies_in_the_freeze_is_thawed_by_the_guard() {
    let mut setting = Setting::new(Manner::Good);
    let mut command = setting.tool.command(setting.arguments(60));
    let status = command.env("STILLPOINT_FAILPOINT", "frozen#1=kill").status().unwrap();
    let died = Instant::now();
    assert!(status.code().is_none());
    let thawed = setting.agent.thaws.recv_timeout(Duration::from_secs(10)).unwrap();
    println!("thawed {:?} after the death", thawed.saturating_duration_since(died));
    assert!(thawed.saturating_duration_since(died) < Duration::from_secs(1));
    setting.is_thawed_and_running();
    let next = setting.run(60).json().unwrap();
    assert_eq!(next["consistency"], "file-system-consistent");
}

#[test]
fn a_signal_in_the_freeze_ends_it() {
    let mut setting = Setting::new(Manner::HangsInFreeze);
    let arguments = setting.arguments(60);
    let mut command = setting.tool.command(arguments);
    let mut run =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !setting.agent.asked("guest-fsfreeze-freeze") {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
    let signalled = Instant::now();
    let pid = run.id().to_string();
    assert!(std::process::Command::new("kill").args(["-s", "INT", &pid]).status().unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert!(signalled.elapsed() < Duration::from_secs(5), "{:?}", signalled.elapsed());
    setting.is_thawed_and_running();
}

/// QEMU stops while the guest is frozen: the run gives up, and the guard thaws when QEMU answers again.
#[test]
fn a_guest_that_is_frozen_when_its_qemu_stops_is_thawed_by_the_guard() {
    let mut setting = Setting::new(Manner::Good);
    setting.tool = setting.tool.clone().env("STILLPOINT_QMP_DEADLINES", "5000,1000,500");
    let pid = setting.machine.pid().unwrap();
    let held = Held::at(&setting.tool, "frozen#1", setting.arguments(60));
    common::signal(pid, "STOP");
    let stopped = Instant::now();
    let outcome = held.go_on();
    assert!(stopped.elapsed() < Duration::from_secs(15), "{:?}", stopped.elapsed());
    assert_eq!(outcome.status, 3, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("is stopped (SIGSTOP)"), "{}", outcome.stderr);
    assert!(setting.agent.frozen.load(Ordering::SeqCst), "nothing can have reached a real agent by now");
    common::signal(pid, "CONT");
    setting.agent.thaws.recv_timeout(Duration::from_secs(20)).unwrap();
    let qmp = setting.machine.qmp().display().to_string();
    let recovered = setting.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert_eq!(recovered.status, 0, "{recovered:?}");
    setting.is_thawed_and_running();
    common::no_process_is_left(setting.machine.work(), "the guard has done its work");
}

#[test]
fn a_thaw_that_is_not_answered_is_told_and_recovered() {
    let mut setting = Setting::new(Manner::NeverThaws);
    let outcome = setting.run(1);
    assert_eq!(outcome.status, 3, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("does not answer to a thaw"), "{}", outcome.stderr);
    assert_eq!(setting.machine.status().unwrap(), "running");
    // The agent comes to its senses; whoever asks first thaws: the guard, or recovery.
    setting.agent.deaf.store(false, Ordering::SeqCst);
    let qmp = setting.machine.qmp().display().to_string();
    let recovered = setting.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert_eq!(recovered.status, 0, "{recovered:?}");
    setting.is_thawed_and_running();
    // The guard waits for an answer for a while, and ends at once with the agent.
    let Setting { machine, agent, .. } = setting;
    agent.end.store(true, Ordering::SeqCst);
    common::no_process_is_left(machine.work(), "after the agent");
}

#[test]
fn a_run_that_is_killed_between_its_freeze_and_the_guard_is_recovered() {
    let mut setting = Setting::new(Manner::Good);
    let held = Held::at(&setting.tool, "frozen#1", setting.arguments(60));
    // Without the guard nothing thaws: the negative control of the test above.
    let guard = common::guards(held.pid())[0];
    assert!(
        std::process::Command::new("kill")
            .args(["-s", "KILL", &guard.to_string()])
            .status()
            .unwrap()
            .success()
    );
    held.signal("KILL");
    held.go_on();
    assert!(setting.agent.thaws.recv_timeout(Duration::from_millis(500)).is_err());
    assert!(setting.agent.frozen.load(Ordering::SeqCst));
    let qmp = setting.machine.qmp().display().to_string();
    let recovered = setting.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert!(recovered.status == 0 && recovered.stderr.contains("may be frozen"), "{recovered:?}");
    setting.is_thawed_and_running();
}

/// What ext4 says of itself in a restored image: its journal has to be replayed, or not; and how many files were written.
fn file_system(image: &Path) -> (bool, u64) {
    let program = |name: &str| std::process::Command::new(format!("/sbin/{name}"));
    let features = run(program("dumpe2fs").arg("-h").arg(image)).unwrap();
    let dirty = features.contains("needs_recovery");
    if !dirty {
        run(program("e2fsck").arg("-fn").arg(image)).unwrap();
    }
    let count = run(program("debugfs").args(["-R", "cat count"]).arg(image)).unwrap();
    (dirty, count.trim().parse().unwrap_or(0))
}

#[test]
fn a_real_agent_freezes_a_real_file_system_and_a_point_without_it_has_a_journal_to_replay() {
    let guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 64 << 20))
        .disk(DiskSpec::new("vdb", 128 << 20).ext4())
        .agent()
        .boot()
        .unwrap();
    guest.await_agent().unwrap();
    let place =
        common::Place::new(guest.work(), &guest.qmp(), "provider = \"directory\"\ndirectory = \"@/points\"");
    std::fs::create_dir(guest.work().join("points")).unwrap();
    let without = place.backup();
    assert_eq!(without["consistency"], "crash-consistent", "{without}");
    // The same VM, now with its agent.
    let text = std::fs::read_to_string(&place.config).unwrap();
    let agent = format!("[vm.vm]\nagent = {:?}\n", guest.agent());
    std::fs::write(&place.config, text.replace("[vm.vm]\n", &agent)).unwrap();
    // In the middle of them one is killed while the guest is frozen.
    for round in 0..5 {
        if round == 2 {
            let mut command = place.tool.command(place.arguments(&["backup", "vm"]));
            let status = command.env("STILLPOINT_FAILPOINT", "frozen#1=kill").status().unwrap();
            assert!(status.code().is_none());
        }
        let summary = place.backup();
        assert_eq!(summary["consistency"], "file-system-consistent", "{round}: {summary}");
        println!("frozen for {} ms", summary["freeze_ms"]);
    }
    let points = place.run(&["points", "--json"]).json().unwrap();
    let mut counts = Vec::new();
    for (index, point) in points.as_array().unwrap().iter().enumerate() {
        let id = point["record"]["id"].as_str().unwrap();
        let output = guest.work().join(format!("restored-{index}"));
        let restored = place.run(&["restore", &format!("vm/{id}"), "--output", output.to_str().unwrap()]);
        assert_eq!(restored.status, 0, "{restored:?}");
        let (dirty, count) = file_system(&output.join("vdb.raw"));
        assert_eq!(dirty, index == 0, "point {index}");
        counts.push(count);
    }
    assert_eq!(counts.len(), 6);
    // The guest wrote on after each thaw.
    assert!(counts.windows(2).all(|pair| pair[0] < pair[1]), "{counts:?}");
}
