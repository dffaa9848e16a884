//! Points in a restic repository behind a REST server, and behind `rclone`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, Place};
use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use stillpoint_testkit::{BareMachine, DiskSpec, GuestBuilder, Qemu};

const MIB: u64 = 1 << 20;
const DISKS: [&str; 2] = ["vda", "vdb"];
const PASSWORD: &str = "canary-of-the-repository";
const SERVER_USER: &str = "canary-user";
const SERVER_PASSWORD: &str = "canary-of-the-server";

/// A REST server that is `rclone`.
struct Server {
    child: Child,
    /// Host and port.
    address: String,
}

impl Server {
    fn start(directory: &Path, address: &str, more: &[&str]) -> Self {
        let mut child = Command::new("rclone")
            .args(["serve", "restic", "--addr", address])
            .args(more)
            .arg(directory)
            .env("RCLONE_USER", SERVER_USER)
            .env("RCLONE_PASS", SERVER_PASSWORD)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| Some(line.split_once("http://")?.1.trim_end_matches([']', '/']).to_owned()))
            .unwrap();
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, address }
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn place(work: &Path, qmp: &Path, repository: &str) -> Place {
    let mut place = Place::with_repository(work, qmp, repository, PASSWORD);
    place.tool =
        place.tool.env("RESTIC_REST_USERNAME", SERVER_USER).env("RESTIC_REST_PASSWORD", SERVER_PASSWORD);
    place
}

fn succeeds(place: &Place, line: &[&str]) {
    let outcome = place.run(line);
    assert_eq!(outcome.status, 0, "{outcome:?}");
    // Basic authentication is base64: of "canary-user:canary-of-the-server".
    assert!(!outcome.stderr.contains("Y2FuYXJ5"), "{}", outcome.stderr);
}

fn restic_finds_nothing_wrong(repository: &Path) {
    let mut check = Command::new("restic");
    check.args(["--no-cache", "check", "--read-data"]);
    check.env("RESTIC_REPOSITORY", repository).env("RESTIC_PASSWORD", PASSWORD);
    let checked = check.output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn points_behind_a_rest_server_come_back() {
    let mut guest = GuestBuilder::new(Qemu::installed().unwrap())
        .disk(DiskSpec::new("vda", 96 * MIB))
        .disk(DiskSpec::new("vdb", 64 * MIB + 512).raw())
        .boot()
        .unwrap();
    let files = guest.work().join("files");
    let mut server = Server::start(&files, "127.0.0.1:0", &[]);
    let place = place(guest.work(), &guest.qmp(), &format!("rest:http://{}/vms/web", server.address));
    assert_eq!(place.run(&["points"]).status, 1, "there is no repository");
    succeeds(&place, &["target", "init", "main"]);
    let storm = guest.start_storm(611, 0).unwrap();
    let mut points = Vec::new();
    for more in [&[][..], &[], &["--full"]] {
        guest.await_writes(200).unwrap();
        let line = [&["backup", "vm", "--json"][..], more].concat();
        points.push(place.run(&line).json().unwrap());
    }
    // It is gone for a while: the run tells so, the guest and earlier points are as they were, the next run goes on.
    let address = server.address.clone();
    server.stop();
    let started = Instant::now();
    let failed = place.run(&["backup", "vm"]);
    assert_eq!(failed.status, 1, "{failed:?}");
    assert!(failed.stderr.contains("was not touched"), "{}", failed.stderr);
    println!("a server that is gone is told after {:?}", started.elapsed());
    // Nothing can be removed or written anew in one that only appends.
    let appending = Server::start(&files, &address, &["--append-only"]);
    let point = place.backup();
    assert_eq!(point["disks"][0]["bitmap_mode"], "reuse", "{point}");
    points.push(point);
    let refused = place.run(&["forget", "vm", "--keep-last", "1"]);
    assert_eq!(refused.status, 1, "{refused:?}");
    drop(appending);
    let _server = Server::start(&files, &address, &[]);
    assert_eq!(guest.stop_storm().unwrap().errors, 0);
    points.iter().for_each(|point| assert!(place.judge(point, &DISKS, &storm) > 0));
    succeeds(&place, &["verify"]);
    succeeds(&place, &["forget", "vm", "--keep-last", "2", "--prune"]);
    succeeds(&place, &["key", "list"]);
    assert!(place.judge(points.last().unwrap(), &DISKS, &storm) > 0);
    restic_finds_nothing_wrong(&files.join("vms/web"));
    // Who may not gets a hint, at once.
    let mut wrong = place;
    wrong.tool = wrong.tool.env("RESTIC_REST_PASSWORD", "wrong");
    let outcome = wrong.run(&["points"]);
    assert!(outcome.status == 1 && outcome.stderr.contains("RESTIC_REST_USERNAME"), "{outcome:?}");
}

#[test]
fn a_server_that_hangs_does_not_keep_a_run_that_is_interrupted() {
    let qemu = Qemu::installed().unwrap();
    let mut machine = BareMachine::with_disks(&qemu, &[("vda", 8 * MIB)]).unwrap();
    common::write_noise(&mut machine);
    let server = Server::start(&machine.work().join("files"), "127.0.0.1:0", &[]);
    let place = place(machine.work(), &machine.qmp(), &format!("rest:http://{}/vms", server.address));
    succeeds(&place, &["target", "init", "main"]);
    let held = Held::at(&place.tool, "restic-pack#1", place.arguments(&["backup", "vm"]));
    signal(server.child.id(), "STOP");
    held.signal("CONT");
    held.signal("INT");
    let interrupted = Instant::now();
    let outcome = held.end();
    assert_eq!(outcome.status, 130, "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    assert!(interrupted.elapsed() < Duration::from_secs(15), "{:?}", interrupted.elapsed());
    assert_eq!(machine.status().unwrap(), "running");
    signal(server.child.id(), "CONT");
    place.backup();
    succeeds(&place, &["verify"]);
}

fn signal(process: u32, name: &str) {
    let killed = Command::new("kill").args(["-s", name, &process.to_string()]).status().unwrap();
    assert!(killed.success());
}

/// The processes of `rclone` that have this in their arguments.
fn rclones(work: &Path) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let path = entry.ok()?.path();
        let line = fs::read_to_string(path.join("cmdline")).ok()?.replace('\0', " ");
        let ours = line.starts_with("rclone") && line.contains(work.to_str()?);
        path.file_name()?.to_str()?.parse().ok().filter(|_| ours)
    });
    processes.collect()
}

#[test]
fn rclone_is_started_for_a_run_and_ends_with_it_however_it_ends() {
    let qemu = Qemu::installed().unwrap();
    let mut machine = BareMachine::with_disks(&qemu, &[("vda", 8 * MIB)]).unwrap();
    machine.disk_io("vda", "write -P 1 0 3M").unwrap();
    let work = machine.work().to_owned();
    let place = place(&work, &machine.qmp(), "rclone:@/behind");
    succeeds(&place, &["target", "init", "main"]);
    place.backup();
    let held = Held::at(&place.tool, "taken#1", place.arguments(&["backup", "vm"]));
    assert_eq!(rclones(&work).len(), 1, "the negative control: it runs as long as the run does");
    held.signal("KILL");
    held.end();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !rclones(&work).is_empty() {
        assert!(Instant::now() < deadline, "rclone is left behind");
        thread::sleep(Duration::from_millis(20));
    }
    // It dies, not we: the run ends at once, since its port may be anybody's by then.
    let held = Held::at(&place.tool, "taken#1", place.arguments(&["backup", "vm"]));
    rclones(&work).into_iter().for_each(|rclone| signal(rclone, "KILL"));
    let started = Instant::now();
    let outcome = held.go_on();
    assert!(outcome.status == 1 && outcome.stderr.contains("rclone ended"), "{outcome:?}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(machine.status().unwrap(), "running");
    machine.disk_io("vda", "write -P 2 4M 1M").unwrap();
    let point = place.backup();
    assert_eq!(point["disks"][0]["bitmap_mode"], "reuse", "{point}");
    succeeds(&place, &["verify"]);
    succeeds(
        &place,
        &["restore", &common::point_name(&point), "--output", work.join("out").to_str().unwrap()],
    );
    machine.disk_io("vda", "flush").unwrap();
    assert!(fs::read(work.join("out/vda.raw")).unwrap()[4 << 20..5 << 20].iter().all(|byte| *byte == 2));
    assert_eq!(rclones(&work), [0; 0]);
    restic_finds_nothing_wrong(&work.join("behind"));
    // A place that is none is told with what rclone says of it.
    let nowhere = fs::read_to_string(&place.config).unwrap().replace("rclone:", "rclone:no-such-remote:");
    fs::write(&place.config, nowhere).unwrap();
    let outcome = place.run(&["points"]);
    assert!(outcome.status == 2 && outcome.stderr.contains("rclone ended"), "{outcome:?}");
}
