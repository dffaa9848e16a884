//! What the tests with real guests share.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "what tests share; each uses a part, and a panic is a failed test"
)]

use guest_writer::Layout;
use serde_json::Value;
use std::{
    ffi::OsString,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, Guest, Outcome, Storm, StormSpec, Tool, oracle};

/// The program under test.
pub fn tool(runtime: &Path) -> Tool {
    Tool::new(env!("CARGO_BIN_EXE_stillpoint"), runtime)
}

/// The program under test with a target of a configuration file.
pub struct Place {
    pub tool: Tool,
    pub config: PathBuf,
    pub work: PathBuf,
}

impl Place {
    /// `target` is what stands under `[target.main]`; `@` in it stands for `work`.
    pub fn new(work: &Path, qmp: &Path, target: &str) -> Self {
        let config = work.join("stillpoint.toml");
        let target = target.replace('@', work.to_str().unwrap());
        std::fs::write(&config, format!("[vm.vm]\nqmp = {qmp:?}\n[target.main]\n{target}\n")).unwrap();
        Self { tool: tool(work), config, work: work.to_owned() }
    }

    /// A place with a restic repository that is not there yet. It tells all that it can.
    pub fn with_repository(work: &Path, qmp: &Path, repository: &str, password: &str) -> Self {
        let file = work.join("password");
        std::fs::write(&file, format!("{password}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let target =
            format!("provider = \"restic\"\nrepository = \"{repository}\"\npassword-file = \"@/password\"");
        let mut place = Self::new(work, qmp, &target);
        place.tool = place.tool.env("STILLPOINT_LOG", "trace");
        place
    }

    pub fn arguments(&self, line: &[&str]) -> Vec<OsString> {
        let config = ["--config".into(), self.config.clone().into()];
        config.into_iter().chain(line.iter().map(OsString::from)).collect()
    }

    /// Runs it, whatever comes of it. No password or key, all of which begin like this, is told.
    pub fn run(&self, line: &[&str]) -> Outcome {
        let outcome = self.tool.run(self.arguments(line)).unwrap();
        for told in [&outcome.stdout, &outcome.stderr] {
            assert!(!told.contains("canary-"), "{told}");
        }
        outcome
    }

    pub fn backup(&self) -> Value {
        let outcome = self.run(&["backup", "vm", "--json"]);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        outcome.json().unwrap()
    }

    /// Restores a point and asks the oracle; returns the operations in it.
    pub fn judge(&self, summary: &Value, disks: &[&str], storm: &Storm) -> u64 {
        let output = tempfile::tempdir_in(&self.work).unwrap();
        let restored = output.path().join("restored");
        let point = point_name(summary);
        let outcome = self.run(&["restore", &point, "--output", restored.to_str().unwrap()]);
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        let images: Vec<_> = disks.iter().map(|disk| restored.join(format!("{disk}.raw"))).collect();
        let verdict = oracle::check(&images, &storm.layout, storm.run).unwrap();
        assert!(verdict.is_valid(), "{point}: {:?}", verdict.violations);
        verdict.operations()
    }
}

/// All files below `path`.
pub fn files(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// Fills the first 6 MiB of `vda` with what cannot be compressed: enough for a pack while the disk is read.
pub fn write_noise(machine: &mut BareMachine) {
    let noise = machine.work().join("noise");
    let mut urandom = std::fs::File::open("/dev/urandom").unwrap().take(6 << 20);
    std::io::copy(&mut urandom, &mut std::fs::File::create(&noise).unwrap()).unwrap();
    machine.disk_io("vda", &format!("write -s {} 0 6M", noise.display())).unwrap();
}

/// The point's name as it is typed.
pub fn point_name(summary: &Value) -> String {
    summary["point"].as_str().unwrap().to_owned()
}

/// The point's id, without its VM.
pub fn point_id(summary: &Value) -> &str {
    let (vm, id) = summary["point"].as_str().unwrap().split_once('/').unwrap();
    assert_eq!(summary["vm"], vm);
    id
}

/// Restores `point` next to the target and asks the oracle; the images of `disks`, in the storm's order.
pub fn judge(tool: &Tool, target: &Path, point: &str, disks: &[&str], storm: &Storm) -> oracle::Verdict {
    let output = tempfile::tempdir_in(target.parent().unwrap()).unwrap();
    let images = restore(tool, target, point, disks, &output.path().join("restored"));
    oracle::check(&images, &storm.layout, storm.run).unwrap()
}

/// Restores `point` into `output` and returns its images.
pub fn restore(tool: &Tool, target: &Path, point: &str, disks: &[&str], output: &Path) -> Vec<PathBuf> {
    tool.restore(point, target, output).unwrap();
    disks.iter().map(|disk| output.join(format!("{disk}.raw"))).collect()
}

/// A run of the program that stands still (SIGSTOP) at one of its named places.
pub struct Held {
    child: Child,
}

impl Held {
    /// Starts `stillpoint ARGUMENTS` and waits until it stands still at `place`.
    pub fn at<A: Into<OsString>>(tool: &Tool, place: &str, arguments: impl IntoIterator<Item = A>) -> Self {
        let mut command = tool.command(arguments.into_iter().map(Into::into));
        command.env("STILLPOINT_FAILPOINT", format!("{place}=stop"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
            if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')) {
                return Self { child };
            }
            if let Some(status) = child.try_wait().unwrap() {
                let output = child.wait_with_output().unwrap();
                panic!("{place} was not reached: {status}: {}", String::from_utf8_lossy(&output.stderr));
            }
            assert!(Instant::now() < deadline, "{place} was not reached");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Lets it go on, and waits for its end.
    pub fn go_on(self) -> Outcome {
        self.signal("CONT");
        self.end()
    }

    /// Waits for its end.
    pub fn end(self) -> Outcome {
        let output = self.child.wait_with_output().unwrap();
        Outcome {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// The processes that a process has started.
pub fn children(parent: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).unwrap();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// The guards of the guest among them; a run has a watcher of the host's space, too.
pub fn guards(run: u32) -> Vec<u32> {
    let line = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    children(run).into_iter().filter(|pid| line(pid).contains("--guard-the-guest")).collect()
}

/// Sends a signal to a process, by the signal's name.
pub fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap().success());
}

/// The arguments of a backup of the VM behind `qmp`.
pub fn backup_arguments(qmp: &Path, target: &Path, more: &[&str]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["backup".into(), "vm".into(), "--json".into()];
    arguments.extend(["--qmp".into(), qmp.into(), "--to".into(), target.into()]);
    arguments.extend(more.iter().map(OsString::from));
    arguments
}

/// No run below `work` is left, and no guard whose run is dead.
pub fn no_process_is_left(work: &Path, place: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let is_ours = |pid: &u32| {
        let read = |what: &str| std::fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let line = read("cmdline").replace('\0', " ");
        let run = line.contains("stillpoint backup") && line.contains(work.to_str().unwrap());
        run || line.contains("--guard-the-guest") && read("status").lines().any(|line| line == "PPid:\t1")
    };
    loop {
        let processes = std::fs::read_dir("/proc").unwrap();
        let pids =
            processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse::<u32>().ok());
        let left: Vec<_> = pids.filter(is_ours).collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{place}: processes {left:?} are left");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes points while the guest writes, and checks each.
pub struct Cuts<'a> {
    pub guest: &'a mut Guest,
    pub tool: Tool,
    pub target: PathBuf,
    pub disks: Vec<&'static str>,
    pub storm: Storm,
    pub pauses: Vec<f64>,
}

impl<'a> Cuts<'a> {
    /// Starts the storm at full speed.
    pub fn start(guest: &'a mut Guest, disks: Vec<&'static str>, seed: u64) -> Self {
        Self::start_with(guest, disks, StormSpec::new(seed))
    }

    /// Starts a storm of this kind.
    pub fn start_with(guest: &'a mut Guest, disks: Vec<&'static str>, spec: StormSpec) -> Self {
        let storm = guest.start_storm_with(spec).unwrap();
        guest.await_writes(300).unwrap();
        let tool = tool(guest.work());
        let target = guest.work().join("target");
        Self { guest, tool, target, disks, storm, pauses: Vec::new() }
    }

    /// One point. Its block graph is as before, and each disk has exactly one bitmap.
    pub fn cut(&mut self, more: &[&str]) -> Value {
        self.guest.await_writes(200).unwrap();
        let before = self.guest.block_graph().unwrap();
        let summary = self.tool.backup("vm", &self.guest.qmp(), &self.target, more).unwrap();
        let after = self.guest.block_graph().unwrap();
        assert_eq!(before.without_bitmaps(), after.clone().without_bitmaps());
        assert_eq!(after.bitmaps.len(), self.disks.len(), "{:?}", after.bitmaps);
        let point = point_id(&summary);
        assert!(after.bitmaps.iter().all(|(_, name)| name.contains(point)), "{:?}", after.bitmaps);
        self.pauses.push(summary["pause_ms"].as_f64().unwrap());
        summary
    }

    /// A backup that stands still at `place`.
    pub fn hold_at(&self, place: &str, more: &[&str]) -> Held {
        Held::at(&self.tool, place, backup_arguments(&self.guest.qmp(), &self.target, more))
    }

    /// Restores every point made and asks the oracle; returns the operations in each.
    pub fn judge_all(&self, points: &[Value]) -> Vec<u64> {
        let judged = points.iter().map(|summary| {
            let name = point_name(summary);
            let verdict = judge(&self.tool, &self.target, &name, &self.disks, &self.storm);
            for violation in verdict.violations.iter().take(20) {
                println!("{name}: {violation}");
            }
            assert!(verdict.stamps > 0, "{name} is empty");
            (verdict.operations(), verdict.violations.len())
        });
        let judged: Vec<(u64, usize)> = judged.collect();
        println!("operations and violations of each point: {judged:?}");
        assert!(judged.iter().all(|(_, violations)| *violations == 0));
        judged.into_iter().map(|(operations, _)| operations).collect()
    }

    /// Ends the storm; the guest saw no I/O error.
    pub fn end(self) {
        let asked = Instant::now();
        let counts = self.guest.stop_storm().unwrap();
        println!("the storm ended {:?} after it was told to", asked.elapsed());
        assert_eq!(counts.errors, 0, "{counts:?}");
    }
}

/// An empty layout of these disks; for checks without a storm.
pub fn layout(blocks: &[u64]) -> Layout {
    Layout { seed: 0, per_disk: 2, disk_blocks: blocks.to_vec(), span: 64 }
}
