//! What the program says and how it exits when what it is given is wrong: monitors that are none, VMs that cannot be
//! backed up, targets that take nothing, points that are damaged, names that are traps.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests: a panic is a failed test"
)]

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
        outcome.json().unwrap()["point"].as_str().unwrap().to_owned()
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

const UNTOUCHED: &str = "guest:  was not touched";

// Monitors.

#[test]
fn there_is_no_socket() {
    let place = Place::new();
    let words = [place.text("qmp"), "-qmp unix:".into(), UNTOUCHED.into()];
    backup_failed(&place.backup(), 1, &words.each_ref().map(String::as_str));
    let json = place.run(&["backup", "box", "--qmp", "@qmp", "--to", "@target", "--json"]);
    let printed: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&printed["result"], &printed["exit_status"]), (&json!("failed"), &json!(1)), "{printed}");
    assert!(printed["error"].as_str().unwrap().contains(&words[0]), "{printed}");
    assert!(!place.path("target").exists());
    says(&place.run(&["recover", "--qmp", "@qmp"]), 1, &[&words[0]]);
    says(&place.run(&["doctor", "--qmp", "@qmp"]), 1, &["WRONG", &words[0]]);
}

#[test]
fn nobody_listens_on_the_socket() {
    let place = Place::new();
    drop(UnixListener::bind(place.path("qmp")).unwrap());
    backup_failed(&place.backup(), 1, &[&place.text("qmp"), "QEMU is not", UNTOUCHED]);
}

/// Serves one client with these bytes, then closes.
fn serve(path: &Path, bytes: &'static [u8]) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.write_all(bytes).unwrap();
    })
}

#[test]
fn what_answers_is_not_qmp() {
    let garbage: [&[u8]; 4] = [
        b"SSH-2.0-OpenSSH_9.2\x1b[2J\r\n",
        b"\x00\x01\x02\xff\xfe binary",
        b"{\"QMP\": 7}\r\n",
        b"{\"hello\": \"\x1b[31m\"}\r\n",
    ];
    for bytes in garbage {
        let place = Place::new();
        let peer = serve(&place.path("qmp"), bytes);
        let outcome = place.backup();
        peer.join().unwrap();
        backup_failed(&outcome, 1, &[&place.text("qmp"), "QMP", UNTOUCHED]);
    }
}

#[test]
fn what_answers_closes_at_once() {
    let place = Place::new();
    let peer = serve(&place.path("qmp"), b"");
    let outcome = place.backup();
    peer.join().unwrap();
    backup_failed(&outcome, 1, &[&place.text("qmp"), "closed before its greeting", UNTOUCHED]);
}

#[test]
fn the_monitor_has_another_client() {
    let place = Place::new();
    let _vm = place.qemu(&["-M", "none"]);
    let first = Monitor::connect(&place.path("qmp")).unwrap();
    backup_failed(&place.backup(), 1, &["another client", "a second -qmp socket", UNTOUCHED]);
    drop(first);
    // The same monitor, now free: it was the client that was in the way.
    says(&place.run(&["recover", "--qmp", "@qmp"]), 0, &["nothing to undo"]);
}

// Virtual machines.

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
    let _vm = place.machine(&[], &[]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexclude = [\"vdz\"]\n");
    let outcome = place.configured(&["backup", "box", "--to", "@target"]);
    backup_failed(&outcome, 2, &["no disk vdz to exclude", UNTOUCHED]);
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
    assert_eq!(summary["disks"], json!([]), "{summary}");
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
    backup_failed(&place.backup(), 1, &["NBD server", "guest:"]);
    assert_eq!(vm.graph(), before);
    place.lists_nothing("@target");
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
    assert!(first.0.try_wait().unwrap().is_none(), "the first run ended before the others were told of it");
    first.0.kill().unwrap();
    first.0.wait().unwrap();
    drop(listener);
    backup_failed(&place.backup(), 1, &["QEMU is not"]);
}

// Targets.

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
    place.lists_nothing("@target");
}

#[test]
fn the_target_is_full() {
    let place = Place::new();
    let Some(_mount) = Mount::tmpfs("full target", &place.path("target"), "size=1m") else { return };
    place.image("vda.img", 16 * MIB);
    let mut vm = place.machine(&["vda.img"], &[]);
    let mut before = vm.graph();
    let outcome = place.backup();
    backup_failed(&outcome, 1, &["make room in the target", "guest:  runs on as before"]);
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

// Points.

#[test]
fn there_is_no_such_point() {
    let place = Place::new();
    let point = format!("box/{NO_POINT}");
    fs::create_dir(place.path("target")).unwrap();
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

// Names and configuration.

#[test]
fn a_name_on_the_command_line_is_a_trap() {
    let place = Place::new();
    fs::create_dir(place.path("target")).unwrap();
    let long = "x".repeat(300);
    let long = long.as_str();
    for name in ["/", "..", ".", "a/b", "../x", "", "a\nb", "a\rb", "\u{1b}[2J\u{7}", "\u{9b}31m", "ä", long]
    {
        for line in [
            vec!["backup", name, "--qmp", "@qmp", "--to", "@target"],
            vec!["points", name, "--to", "@target"],
            vec!["recover", name],
            vec!["doctor", name],
            vec!["restore", "box/latest", "--to", "@target", "--output", "@out", "--disk", name],
        ] {
            let outcome = place.run(&line);
            says(&outcome, 2, &["error:"]);
            assert!(!outcome.stderr.contains("a\nb"), "{}", outcome.stderr);
        }
        for point in [format!("{name}/latest"), format!("box/{name}"), format!("{name}/{NO_POINT}")] {
            let line = ["restore", point.as_str(), "--to", "@target", "--output", "@out"];
            says(&place.run(&line), 2, &["error:"]);
            says(&place.run(&["verify", &point, "--to", "@target"]), 2, &["error:"]);
        }
    }
    assert_eq!(fs::read_dir(place.path("target")).unwrap().count(), 0);
    assert!(!place.path("out").exists());
}

#[test]
fn a_name_in_the_configuration_is_a_trap() {
    let place = Place::new();
    for name in ["../x", "a/b", "..", "\\u001b[2J", "\u{1b}[2J"] {
        place.configure(&format!("[vm.\"{name}\"]\nqmp = \"@/qmp\"\n"));
        let outcome = place.configured(&["backup", "--all", "--to", "@target"]);
        says(&outcome, 2, &["box.toml", "line 1"]);
    }
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexclude = [\"../x\"]\n");
    says(&place.configured(&["backup", "box", "--to", "@target"]), 2, &["box.toml", "line 3"]);
    assert!(!place.path("target").exists());
}

#[test]
fn a_key_of_the_configuration_is_unknown() {
    let place = Place::new();
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexlcude = [\"vda\"]\n");
    for line in [&["backup", "box", "--to", "@target"][..], &["points", "--to", "@target"], &["doctor"]] {
        says(&place.configured(line), 2, &[&place.text("box.toml"), "line 3", "exlcude"]);
    }
}

#[test]
fn nothing_says_where_points_are_kept() {
    let place = Place::new();
    for line in [&["backup", "box", "--qmp", "@qmp"][..], &["points"], &["verify"]] {
        says(&place.run(line), 2, &["next:", "--to DIRECTORY", "[target.NAME]"]);
    }
    place.configure("[target.main]\nprovider = \"directory\"\ndirectory = \"@/target\"\n");
    says(&place.configured(&["points", "--target", "other"]), 2, &["no target other", "main"]);
    place.configure("[target.main]\nprovider = \"carrier-pigeon\"\n");
    says(&place.configured(&["points"]), 2, &["carrier-pigeon"]);
}

#[test]
fn a_limit_that_would_hold_nothing_back_is_refused() {
    let place = Place::new();
    for kept in ["\"directory\"\ndirectory = \"@/target\"", "\"restic\"\nrepository = \"@/target\""] {
        place.configure(&format!("[target.main]\nprovider = {kept}\nbandwidth-limit = \"1MiB\"\n"));
        says(&place.configured(&["points"]), 2, &["target main", "bandwidth-limit", "programs", "next:"]);
    }
}

#[test]
fn the_vm_is_not_configured() {
    let place = Place::new();
    place.configure("[vm.box]\nqmp = \"@/qmp\"\n");
    let outcome = place.configured(&["backup", "other", "--to", "@target"]);
    says(&outcome, 2, &["no VM other", "box.toml", "[vm.other]", "--qmp SOCKET"]);
    says(&place.configured(&["recover", "other"]), 2, &["no VM other"]);
}

#[test]
fn a_backup_that_could_not_begin_tells_the_guests_fate_too() {
    let place = Place::new();
    backup_failed(&place.run(&["backup", "box", "--qmp", "@qmp"]), 2, &[UNTOUCHED]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexlcude = []\n");
    backup_failed(&place.configured(&["backup", "box", "--to", "@target"]), 2, &[UNTOUCHED]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\n");
    backup_failed(&place.configured(&["backup", "other", "--to", "@target"]), 2, &[UNTOUCHED]);
}
