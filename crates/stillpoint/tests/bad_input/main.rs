//! What the program says and how it exits when what it is given is wrong: monitors that are none, VMs that cannot be
//! backed up, targets that take nothing, points that are damaged, names that are traps.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests: a panic is a failed test"
)]

mod damaged;
mod front_end;
mod machine;
mod monitor;
mod names;
mod place;
mod target;

use serde_json::{Value, json};
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
use stillpoint_testkit::{
    Monitor, Outcome, Qemu, Tool,
    qmp_peer::{QmpPeer, greeting},
    skip,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

const MIB: usize = 1 << 20;
/// A point's id that no run will draw.
const NO_POINT: &str = "20010203T040506Z-0badcafe";

/// A directory, and the program with it as its runtime directory and without a configuration file.
struct Place {
    work: TempDir,
    tool: Tool,
}

impl Place {
    fn new() -> Self {
        let work = tempfile::Builder::new().prefix("stillpoint-bad-").tempdir().unwrap();
        let tool = Tool::new(env!("CARGO_BIN_EXE_stillpoint"), work.path());
        fs::write(work.path().join("none.toml"), "").unwrap();
        Self { work, tool }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Runs the program; `@` at the start of an argument stands for this directory.
    fn run(&self, line: &[&str]) -> Outcome {
        self.tool.run(self.arguments(line)).unwrap()
    }

    fn arguments(&self, line: &[&str]) -> Vec<String> {
        let mut arguments = Vec::new();
        if !line.contains(&"--config") {
            arguments.extend(["--config".to_owned(), self.text("none.toml")]);
        }
        arguments.extend(line.iter().map(|argument| match argument.strip_prefix('@') {
            Some(name) => self.text(name),
            None => (*argument).to_owned(),
        }));
        arguments
    }

    fn backup(&self) -> Outcome {
        self.run(&["backup", "box", "--qmp", "@qmp", "--to", "@target"])
    }

    /// Writes a configuration file; `@` in it stands for this directory.
    fn configure(&self, text: &str) {
        fs::write(self.path("box.toml"), text.replace('@', self.work.path().to_str().unwrap())).unwrap();
    }

    fn configured(&self, line: &[&str]) -> Outcome {
        self.run(&[&["--config", "@box.toml"], line].concat())
    }

    /// An image of `size` bytes without a zero.
    fn image(&self, name: &str, size: usize) {
        let bytes: Vec<u8> = (0..size).map(|at| u8::try_from(at / 512 % 255).unwrap() + 1).collect();
        fs::write(self.path(name), bytes).unwrap();
    }

    /// QEMU on this directory, with `machine` and `more`; its monitor for the program is at `qmp`.
    fn qemu(&self, more: &[&str]) -> Vm {
        let monitor = |name: &str| format!("unix:{},server=on,wait=off", self.text(name));
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-display", "none", "-nodefaults"]).args(more);
        command.args(["-qmp", &monitor("qmp"), "-qmp", &monitor("own")]);
        let stderr = fs::File::create(self.path("stderr")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let mut child = Running(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(own) = Monitor::connect(&self.path("own")) {
                return Vm { own, _child: child };
            }
            let said = || fs::read_to_string(self.path("stderr")).unwrap_or_default();
            assert!(child.0.try_wait().unwrap().is_none(), "QEMU ended: {}", said());
            assert!(Instant::now() < deadline, "no monitor: {}", said());
            // QEMU makes its sockets as it starts, and tells nobody.
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A machine that stands still, with disks `vda`, `vdb`, ... of these images.
    fn machine(&self, images: &[&str], more: &[&str]) -> Vm {
        let mut arguments: Vec<String> = ["-M", "q35", "-S"].map(Into::into).into();
        arguments.extend(more.iter().map(|&argument| argument.into()));
        for (image, letter) in images.iter().zip('a'..) {
            let drive = format!("if=none,id=drive-{letter},file={},format=raw", self.text(image));
            let device = format!("virtio-blk-pci,id=vd{letter},drive=drive-{letter}");
            arguments.extend(["-drive".into(), drive, "-device".into(), device]);
        }
        self.qemu(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Makes a point of a machine with one disk of 2 MiB, and returns its id.
    fn point(&self) -> String {
        self.image("vda.img", 2 * MIB);
        let _vm = self.machine(&["vda.img"], &[]);
        let outcome = self.run(&["backup", "box", "--qmp", "@qmp", "--to", "@target", "--json"]);
        let summary = outcome.json().unwrap();
        summary["point"].as_str().unwrap().strip_prefix("box/").unwrap().to_owned()
    }

    /// The program lists no point in the target.
    fn lists_nothing(&self, target: &str) {
        let listed = self.run(&["points", "--to", target, "--json"]);
        assert_eq!(listed.json().unwrap(), json!([]), "{listed:?}");
    }
}

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU, and the test's own monitor on it.
struct Vm {
    own: Monitor,
    _child: Running,
}

impl Vm {
    /// All nodes, what each front end is on and with which bitmaps, exports and descriptor sets.
    fn graph(&mut self) -> Value {
        let mut ask = |command: &str, arguments: Value| self.own.execute(command, arguments).unwrap();
        let nodes = ask("query-named-block-nodes", json!({"flat": true}));
        let mut nodes: Vec<_> =
            nodes.as_array().unwrap().iter().map(|node| node["node-name"].clone()).collect();
        nodes.sort_by_key(Value::to_string);
        let blocks = ask("query-block", json!({}));
        let blocks = blocks.as_array().unwrap().iter().map(|block| {
            let inserted = &block["inserted"];
            json!({"qdev": block["qdev"], "node": inserted["node-name"], "bitmaps": inserted["dirty-bitmaps"]})
        });
        json!({
            "nodes": nodes,
            "blocks": blocks.collect::<Vec<_>>(),
            "exports": ask("query-block-exports", json!({})),
            "descriptors": ask("query-fdsets", json!({})),
            "status": ask("query-status", json!({}))["status"],
        })
    }
}

/// A monitor by script: greets with this version, refuses some commands, answers every query with what is empty. What
/// it was asked is kept.
struct Scripted {
    asked: Arc<Mutex<Vec<String>>>,
    _runtime: Runtime,
}

impl Scripted {
    fn listen(path: &Path, version: [u32; 3], refuses: &'static [&'static str]) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let peer = runtime.block_on(async { QmpPeer::listen(path).unwrap() });
        let mut hello = greeting();
        let [major, minor, micro] = version;
        hello["QMP"]["version"]["qemu"] = json!({"major": major, "minor": minor, "micro": micro});
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let seen = Arc::clone(&asked);
        runtime.spawn(async move {
            let mut client = peer.accept().await;
            client.say(&hello).await;
            while let Some(command) = client.command().await {
                seen.lock().unwrap().push(command.name.clone());
                match command.name.as_str() {
                    name if refuses.contains(&name) => {
                        client.refuses(&command, "CommandNotFound", "The command has not been found").await;
                    }
                    "query-status" => {
                        client.returns(&command, json!({"running": true, "status": "running"})).await;
                    }
                    "qmp_capabilities" | "query-name" | "query-migrate" => {
                        client.returns(&command, json!({})).await;
                    }
                    _ => client.returns(&command, json!([])).await,
                }
            }
        });
        Self { asked, _runtime: runtime }
    }

    /// Nothing was asked for that changes anything.
    fn was_only_looked_at(&self) {
        let asked = self.asked.lock().unwrap();
        assert!(!asked.is_empty());
        let harmless = |name: &String| name == "qmp_capabilities" || name.starts_with("query-");
        assert!(asked.iter().all(harmless), "{asked:?}");
    }
}

/// A tmpfs; unmounted when dropped.
struct Mount(PathBuf);

impl Mount {
    /// `None` where this user may not mount; the test then counts as skipped.
    fn tmpfs(test: &str, path: &Path, options: &str) -> Option<Self> {
        fs::create_dir(path).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(path.to_owned())),
            Ok(output) => {
                skip(test, &format!("cannot mount: {}", String::from_utf8_lossy(&output.stderr).trim()));
                None
            }
            Err(error) => {
                skip(test, &format!("cannot mount: {error}"));
                None
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Exit status and words; and nothing in them that a terminal would act on.
#[track_caller]
fn says(outcome: &Outcome, status: i32, words: &[&str]) {
    assert_eq!(outcome.status, status, "{outcome:?}");
    let said = format!("{}{}", outcome.stdout, outcome.stderr);
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in:\n{said}");
    }
    assert!(said.chars().all(|c| c == '\n' || !c.is_control()), "a raw control character: {said:?}");
}

/// A failed backup: besides, the guest's fate and that of earlier points, each on a line of its own.
#[track_caller]
fn backup_failed(outcome: &Outcome, status: i32, words: &[&str]) {
    says(outcome, status, words);
    let line = |start: &str| outcome.stderr.lines().any(|line| line.trim_start().starts_with(start));
    assert!(line("error:"), "{}", outcome.stderr);
    assert!(line("guest:"), "{}", outcome.stderr);
    assert!(line("points:"), "{}", outcome.stderr);
}

const UNTOUCHED: &str = "was not touched";
