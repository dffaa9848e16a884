//! Fleecing storage that is full, over its budget, slow or stuck, or cannot hold a file without a name: the guest's
//! writes go on, the run fails clean and says what it needs.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Cuts, Held};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use stillpoint_testkit::{DiskSpec, Guest, GuestBuilder, Outcome, Qemu, skip};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];

fn guest() -> Guest {
    GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB).raw())
        .boot()
        .unwrap()
}

/// A file system mounted for a test.
struct Mounted {
    path: PathBuf,
    server: Option<Child>,
}

impl Mounted {
    fn tmpfs(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status();
        if !mounted.unwrap().success() {
            skip("a full fleecing directory", "no file system can be mounted here");
            return None;
        }
        Some(Self { path: path.to_owned(), server: None })
    }

    /// A directory behind a server of its own, which can be made slow or be stopped.
    fn fuse(work: &Path, more: &[&str]) -> Option<Self> {
        let (below, path) = (work.join("below"), work.join("fuse"));
        std::fs::create_dir_all(&below).unwrap();
        std::fs::create_dir_all(&path).unwrap();
        let mut command = Command::new("bindfs");
        command.args(["-f", "--no-allow-other", "-o", "attr_timeout=0,direct_io"]).args(more);
        let server = command.arg(&below).arg(&path).stderr(Stdio::null()).spawn();
        let mut mounted = Self { path, server: Some(server.unwrap()) };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !std::fs::read_to_string("/proc/self/mounts").unwrap().contains(mounted.path.to_str().unwrap())
        {
            let ended = mounted.server.as_mut().unwrap().try_wait().unwrap();
            if ended.is_some() {
                skip("stuck fleecing storage", "there is no FUSE here");
                return None;
            }
            assert!(Instant::now() < deadline, "bindfs does not mount");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(mounted)
    }

    fn signal(&self, name: &str) {
        let pid = self.server.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn names(&self) -> Vec<OsString> {
        let entries = std::fs::read_dir(&self.path).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name());
        // FUSE itself keeps a removed file by such a name until it is closed.
        names.filter(|name| !name.to_str().unwrap().starts_with(".fuse_hidden")).collect()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = Command::new("kill").args(["-s", "CONT", &server.id().to_string()]).status();
        }
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// The arguments of a backup that keeps old data in `fleecing`.
fn backup(cuts: &Cuts<'_>, fleecing: &str) -> Vec<OsString> {
    let config = cuts.guest.work().join("fleecing.toml");
    let qmp = cuts.guest.qmp();
    std::fs::write(&config, format!("[vm.vm]\nqmp = {qmp:?}\nfleecing = {{ {fleecing} }}\n")).unwrap();
    let mut arguments = vec!["--config".into(), config.into()];
    arguments.extend(common::backup_arguments(&qmp, &cuts.target, &[]));
    arguments
}

fn failed_clean(cuts: &mut Cuts<'_>, outcome: &Outcome, words: &[&str]) {
    assert_eq!(outcome.status, 1, "{}", outcome.stderr);
    for word in words {
        assert!(outcome.stderr.contains(word), "{word:?} is not in: {}", outcome.stderr);
    }
    assert!(outcome.stderr.contains("nothing of this run is left"), "{}", outcome.stderr);
    let graph = cuts.guest.block_graph().unwrap();
    assert!(graph.nodes.iter().all(|node| !node.starts_with("stillpoint")), "{graph:?}");
    assert_eq!(graph.bitmaps.len(), DISKS.len(), "{graph:?}");
}

/// A run in whose middle the guest writes so much that `fleecing` overflows.
fn overflow(cuts: &mut Cuts<'_>, fleecing: &str) -> Outcome {
    let arguments = backup(cuts, fleecing);
    let held = Held::at(&cuts.tool, "taken#1", arguments);
    let counts = cuts.guest.await_writes(4000).unwrap();
    assert_eq!(counts.errors, 0);
    println!("the longest guest write took {:?}", counts.longest);
    held.go_on()
}

#[test]
fn the_fleecing_storage_is_full() {
    let mut guest = guest();
    let Some(full) = Mounted::tmpfs(&guest.work().join("fleecing"), "16m") else { return };
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 51);
    let first = cuts.cut(&[]);
    let outcome = overflow(&mut cuts, &format!("directory = {:?}, reserve = \"0\"", full.path));
    failed_clean(
        &mut cuts,
        &outcome,
        &["disk vd", "is full", "could need up to", full.path.to_str().unwrap()],
    );
    let next = cuts.cut(&[]);
    assert_eq!(next["disks"][0]["bitmap_mode"], "reuse", "{next}");
    cuts.judge_all(&[first, next]);
    cuts.end();
}

#[test]
fn the_fleecing_images_exceed_their_budget() {
    let mut guest = guest();
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 52);
    let first = cuts.cut(&[]);
    let outcome = overflow(&mut cuts, "budget = \"4MiB\"");
    failed_clean(&mut cuts, &outcome, &["over the budget of 4194304", "disk vd", "could need up to"]);
    let next = cuts.cut(&[]);
    cuts.judge_all(&[first, next]);
    cuts.end();
}

#[test]
fn the_fleecing_storage_is_slow() {
    let mut guest = guest();
    let Some(slow) = Mounted::fuse(guest.work(), &["--write-rate=100k"]) else { return };
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 53);
    let first = cuts.cut(&[]);
    let timeout = Duration::from_secs(3);
    let outcome =
        overflow(&mut cuts, &format!("directory = {:?}, timeout = {}", slow.path, timeout.as_secs()));
    failed_clean(&mut cuts, &outcome, &["too slow", "disk vd"]);
    let counts = cuts.guest.counts().unwrap();
    assert!(counts.errors == 0 && counts.longest < 3 * timeout, "{counts:?}");
    let next = cuts.cut(&[]);
    cuts.judge_all(&[first, next]);
    cuts.end();
}

#[test]
fn the_fleecing_storage_hangs() {
    let mut guest = guest();
    let before = guest.block_graph().unwrap();
    let Some(stuck) = Mounted::fuse(guest.work(), &[]) else { return };
    let mut cuts = Cuts::start(&mut guest, DISKS.to_vec(), 54);
    let first = cuts.cut(&[]);
    let timeout = Duration::from_secs(3);
    let arguments = backup(&cuts, &format!("directory = {:?}, timeout = {}", stuck.path, timeout.as_secs()));
    let held = Held::at(&cuts.tool, "taken#1", arguments);
    stuck.signal("STOP");
    let counts = cuts.guest.await_writes(2000).unwrap();
    println!("the longest guest write took {:?} of a timeout of {timeout:?}", counts.longest);
    // An operation that goes round the disks meets the timeout once on each.
    assert!(counts.errors == 0 && counts.longest > timeout && counts.longest < 3 * timeout, "{counts:?}");
    let outcome = held.go_on();
    assert_eq!(outcome.status, 3, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("does not answer"), "{}", outcome.stderr);
    assert_eq!(cuts.guest.await_writes(500).unwrap().errors, 0);
    // Nor does recovery make the guest wait for it.
    let qmp = cuts.guest.qmp().display().to_string();
    let recovered = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert!(recovered.status == 3 && recovered.stderr.contains("does not answer"), "{recovered:?}");
    assert_eq!(cuts.guest.await_writes(500).unwrap().errors, 0);
    assert!(cuts.guest.counts().unwrap().longest < 3 * timeout);

    stuck.signal("CONT");
    let recovered = cuts.tool.run(["recover", "--qmp", &qmp]).unwrap();
    assert_eq!(recovered.status, 0, "{recovered:?}");
    assert_eq!(cuts.guest.block_graph().unwrap().without_bitmaps(), before);
    let next = cuts.cut(&[]);
    assert_eq!(next["disks"][0]["bitmap_mode"], "reuse", "{next}");
    cuts.judge_all(&[first, next]);
    cuts.end();
}

#[test]
fn the_file_system_has_no_files_without_a_name() {
    let mut guest = guest();
    let Some(fuse) = Mounted::fuse(guest.work(), &[]) else { return };
    let cuts = Cuts::start(&mut guest, DISKS.to_vec(), 55);
    let arguments = backup(&cuts, &format!("directory = {:?}", fuse.path));
    let first = cuts.tool.run(&arguments).unwrap().json().unwrap();
    assert!(fuse.names().is_empty(), "{:?}", fuse.names());
    let mut command = cuts.tool.command(&arguments);
    command.env("STILLPOINT_FAILPOINT", "fleecing:named#2=kill").stdout(Stdio::null()).stderr(Stdio::null());
    assert!(command.status().unwrap().code().is_none());
    let left = fuse.names();
    assert!(left.len() == 1 && left[0].to_str().unwrap().starts_with(".stillpoint-fleece-"), "{left:?}");
    std::fs::write(fuse.path.join(".stillpoint-fleece-not-in-the-journal"), "").unwrap();
    let second = cuts.tool.run(&arguments).unwrap().json().unwrap();
    assert_eq!(fuse.names(), [".stillpoint-fleece-not-in-the-journal"]);
    cuts.judge_all(&[first, second]);
    cuts.end();
}
