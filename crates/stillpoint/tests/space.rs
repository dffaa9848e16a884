//! Old data on the file system of the images: the guest's own writes find room all the same (ADR 0020).

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, backup_arguments, tool};
use serde_json::json;
use std::{
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Outcome, Qemu, StormSpec, Tool, skip, workspace};

const MIB: u64 = 1 << 20;
const NAMES: [&str; 4] = ["vda", "vdb", "vdc", "vdd"];
/// What all disks together can grow to: it fits into the file system, with old data besides it does not.
const ALL: u64 = 340 * MIB;

/// An ext4 of 420 MiB, at two places; goes away when dropped.
struct SmallFileSystem {
    work: tempfile::TempDir,
}

impl SmallFileSystem {
    fn mount() -> Option<Self> {
        let made = Self { work: tempfile::tempdir().unwrap() };
        let file = made.work.path().join("file");
        fs::File::create(&file).unwrap().set_len(420 * MIB).unwrap();
        let run = |program: &str, arguments: &[&str], paths: &[&Path]| {
            let status = Command::new(program).args(arguments).args(paths).stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        };
        fs::create_dir(made.path()).unwrap();
        fs::create_dir(made.elsewhere()).unwrap();
        assert!(run("/sbin/mkfs.ext4", &["-q", "-F", "-m", "0"], &[&file]));
        if !run("mount", &["-o", "loop"], &[&file, &made.path()]) {
            skip("old data on the images' file system", "no file system can be mounted here");
            return None;
        }
        assert!(run("mount", &["--bind"], &[&made.path(), &made.elsewhere()]));
        Some(made)
    }

    fn path(&self) -> PathBuf {
        self.work.path().join("one")
    }

    /// The same file system under another name.
    fn elsewhere(&self) -> PathBuf {
        self.work.path().join("other")
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        for path in [self.elsewhere(), self.path()] {
            let _ = Command::new("umount").arg("-l").arg(path).stderr(Stdio::null()).status();
        }
    }
}

/// A guest with thin disks there, and a run of the tool against it.
struct Scene {
    tool: Tool,
    config: PathBuf,
    disks: usize,
    guest: Guest,
    system: SmallFileSystem,
}

impl Scene {
    fn new(disks: usize, fleecing: impl FnOnce(&SmallFileSystem) -> String, target: &str) -> Option<Self> {
        let system = SmallFileSystem::mount()?;
        let mut builder = GuestBuilder::new(Qemu::installed().unwrap()).images_in(&system.path());
        for (index, name) in NAMES.iter().take(disks).enumerate() {
            // Sizes tell disks apart.
            let size = ALL / disks as u64 / MIB * MIB + index as u64 * MIB;
            builder = builder.disk(DiskSpec::new(name, size));
        }
        let guest = builder.boot().unwrap();
        let config = guest.work().join("stillpoint.toml");
        let (qmp, fleecing) = (guest.qmp(), fleecing(&system));
        let text = format!("[vm.vm]\nqmp = {qmp:?}\nfleecing = {{ {fleecing} }}\n{target}");
        fs::write(&config, text.replace('@', guest.work().to_str().unwrap())).unwrap();
        Some(Self { tool: tool(guest.work()), config, disks, guest, system })
    }

    fn arguments(&self) -> Vec<OsString> {
        let config = ["--config".into(), self.config.clone().into()];
        let target = self.guest.work().join("target");
        config.into_iter().chain(backup_arguments(&self.guest.qmp(), &target, &[])).collect()
    }

    /// What the images take of the file system.
    fn grown(&self) -> u64 {
        self.guest.images().iter().map(|image| fs::metadata(image).unwrap().blocks() * 512).sum()
    }

    fn status(&mut self) -> String {
        self.guest.execute("query-status", json!({})).unwrap()["status"].as_str().unwrap().to_owned()
    }

    /// The guest writes at full speed until its disks have grown to nearly all that they can be, or it is stopped.
    fn grow(&mut self) -> String {
        self.guest.start_storm_with(StormSpec::new(81).span(u64::MAX)).unwrap();
        let started = Instant::now();
        loop {
            let status = self.status();
            if status != "running" || self.grown() > ALL / 100 * 95 {
                println!("{status}: {} MiB in {:?}", self.grown() / MIB, started.elapsed());
                return status;
            }
            assert!(started.elapsed() < Duration::from_secs(120), "{} MiB only", self.grown() / MIB);
            // Nothing tells when a file grows.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The run gave up, said why, and left nothing; the guest noticed nothing, and the next run does as well as it can.
    fn gave_up(&mut self, outcome: &Outcome, fleecing: &Path) {
        let said = &outcome.stderr;
        assert_eq!(outcome.status, 1, "{said}");
        let fleecing = fleecing.to_str().unwrap();
        for word in [
            fleecing,
            "are left to the guest's own writes",
            "reserve =",
            "[vm.vm]",
            "nothing of this run is left",
        ] {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
        assert!(NAMES.iter().take(self.disks).all(|name| said.contains(name)), "{said}");
        assert_eq!(self.status(), "running");
        let counts = self.guest.counts().unwrap();
        println!("{counts:?}");
        assert!(counts.errors == 0 && counts.longest < Duration::from_secs(10), "{counts:?}");
        let graph = self.guest.block_graph().unwrap();
        assert!(graph.nodes.iter().all(|node| !node.starts_with("stillpoint")), "{graph:?}");
        assert!(graph.bitmaps.is_empty() && graph.fd_sets == 0, "{graph:?}");
        assert_eq!(watchers(&self.system), [0u32; 0]);
        // By now there is too little from the start, and the VM is left alone.
        let refused = self.tool.run(self.arguments()).unwrap();
        assert!(refused.status == 1 && refused.stderr.contains("was not touched"), "{}", refused.stderr);
        assert!(
            refused.stderr.contains("bytes free") && refused.stderr.contains("reserve ="),
            "{}",
            refused.stderr
        );
    }
}

/// Processes that watch over a file system here.
fn watchers(system: &SmallFileSystem) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap();
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse::<u32>().ok());
    let watches = |pid: &u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        line.contains("--watch-the-space")
            && open
                .filter_map(|entry| fs::read_link(entry.path()).ok())
                .any(|path| path.starts_with(system.work.path()))
    };
    pids.filter(watches).collect()
}

fn here(system: &SmallFileSystem) -> String {
    format!("directory = {:?}", system.path())
}

#[test]
fn two_growing_disks_beside_old_data_of_a_run_that_is_stopped() {
    let Some(mut scene) = Scene::new(2, here, "") else { return };
    let held = Held::at(&scene.tool, "taken#1", scene.arguments());
    assert_eq!(scene.grow(), "running");
    let outcome = held.go_on();
    let fleecing = scene.system.path();
    scene.gave_up(&outcome, &fleecing);
}

#[test]
fn one_growing_disk_beside_old_data_under_another_mount() {
    let other = |system: &SmallFileSystem| format!("directory = {:?}", system.elsewhere());
    let Some(mut scene) = Scene::new(1, other, "") else { return };
    let held = Held::at(&scene.tool, "taken#1", scene.arguments());
    assert_eq!(scene.grow(), "running");
    let outcome = held.go_on();
    let fleecing = scene.system.elsewhere();
    scene.gave_up(&outcome, &fleecing);
}

#[test]
fn a_growing_disk_beside_old_data_of_a_run_that_died() {
    let Some(mut scene) = Scene::new(1, here, "") else { return };
    let before = scene.guest.block_graph().unwrap();
    let held = Held::at(&scene.tool, "taken#1", scene.arguments());
    held.signal("KILL");
    assert_eq!(held.end().status, -1);
    assert_eq!(watchers(&scene.system).len(), 1);
    assert_eq!(scene.grow(), "running");
    let qmp = scene.guest.qmp();
    let recovered = scene.tool.run(["recover", "--qmp", qmp.to_str().unwrap()]).unwrap();
    assert_eq!(recovered.status, 0, "{recovered:?}");
    assert_eq!(scene.guest.block_graph().unwrap().without_bitmaps(), before);
    let counts = scene.guest.counts().unwrap();
    assert!(counts.errors == 0 && counts.longest < Duration::from_secs(10), "{counts:?}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !watchers(&scene.system).is_empty() {
        assert!(Instant::now() < deadline, "the watcher stays");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn without_a_reserve_the_guest_is_stopped() {
    let bare = |system: &SmallFileSystem| format!("directory = {:?}, reserve = \"0\"", system.path());
    let Some(mut scene) = Scene::new(2, bare, "") else { return };
    let held = Held::at(&scene.tool, "taken#1", scene.arguments());
    assert_eq!(scene.grow(), "io-error");
    held.go_on();
}

#[test]
fn four_growing_disks_beside_old_data_for_a_slow_target() {
    let program = workspace().join("examples/providers/raw-images");
    let target = format!(
        "[target.main]\nbandwidth-limit = \"1MiB\"\nprovider = {{ program = {program:?}, arguments = [\"@/images\"], options = {{ mechanism = \"nbd\" }} }}\n"
    );
    let Some(mut scene) = Scene::new(4, here, &target) else { return };
    // So that there is much to read.
    for disk in 0..4 {
        scene.guest.fill(disk, 0, 16 * MIB).unwrap();
    }
    let list = scene.guest.work().join("places");
    let mut command = scene.tool.command(["--config", scene.config.to_str().unwrap(), "backup", "vm"]);
    command.env("STILLPOINT_FAILPOINT_LIST", &list).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !fs::read_to_string(&list).unwrap_or_default().contains("taken#1") {
        assert!(Instant::now() < deadline, "the instant was not taken");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(scene.grow(), "running");
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let outcome = Outcome { status: output.status.code().unwrap(), stdout: String::new(), stderr };
    let fleecing = scene.system.path();
    scene.gave_up(&outcome, &fleecing);
}
