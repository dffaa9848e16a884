//! Random lives of a VM against a model: writes, zeroing, discards, resizes, backups that go well, fail, are ended or
//! killed at any place, QEMU ended or killed and started again, backups of the VM while it is off, two targets. Every
//! point that is ever listed has to be what the disks were at its instant.
//!
//! `STILLPOINT_MODEL_SEED=n STILLPOINT_MODEL_OPERATIONS=m` replays one life; `STILLPOINT_MODEL_SEEDS=k` makes it k lives.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, tool};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    rc::Rc,
};
use stillpoint_testkit::{BareMachine, Outcome, Qemu, Tool};

const KIB: u64 = 1 << 10;
const DISKS: [(&str, &str, u64); 3] = [
    ("vda", "qcow2", 6 * 1024 * KIB),
    ("vdb", "raw", 4 * 1024 * KIB + 512),
    // Not a whole number of clusters.
    ("vdc", "qcow2", 3 * 1024 * KIB + 4096 + 512),
];
/// Most that a disk grows to.
const LARGEST: u64 = 12 * 1024 * KIB;

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

/// All disks' contents; shared between points that are the same.
type Contents = Vec<Rc<Vec<u8>>>;

struct Life {
    random: Random,
    machine: BareMachine,
    runs: bool,
    now: Contents,
    tool: Tool,
    config: PathBuf,
    /// By target and point.
    points: BTreeMap<(usize, String), Contents>,
    log: Vec<String>,
    incrementals: usize,
    operations: usize,
}

impl Life {
    fn begin(seed: u64) -> Self {
        let machine = BareMachine::start(&Qemu::installed().unwrap(), |work| {
            let mut arguments = Vec::new();
            for (name, format, size) in DISKS {
                let image = work.join(name);
                let mut make = Command::new("qemu-img");
                make.args(["create", "-q", "-f", format]).arg(&image).arg(size.to_string());
                assert!(make.status()?.success());
                let file = json!({"driver": "file", "filename": image, "discard": "unmap"});
                let node = json!({"driver": format, "node-name": format!("node-{name}"), "discard": "unmap", "file": file});
                arguments.extend(["-blockdev".into(), node.to_string(), "-device".into()]);
                arguments.push(format!("virtio-blk-pci,id={name},drive=node-{name}"));
            }
            Ok(arguments)
        });
        let machine = machine.unwrap();
        let config = machine.work().join("stillpoint.toml");
        let mut text = format!("[vm.vm]\nqmp = {:?}\n", machine.qmp());
        for (name, format, _) in DISKS {
            let image = machine.work().join(name);
            text.push_str(&format!("disks.{name} = {{ image = {image:?}, format = {format:?} }}\n"));
        }
        fs::write(&config, text).unwrap();
        let zeroes = |(_, _, size): &(&str, &str, u64)| Rc::new(vec![0; usize::try_from(*size).unwrap()]);
        Self {
            random: Random(seed),
            runs: true,
            now: DISKS.iter().map(zeroes).collect(),
            tool: tool(machine.work()),
            config,
            points: BTreeMap::new(),
            log: Vec::new(),
            incrementals: 0,
            operations: 0,
            machine,
        }
    }

    fn step(&mut self) {
        self.operations += 1;
        match self.random.below(100) {
            _ if !self.runs => match self.random.below(3) {
                0 => self.backup(),
                1 => self.look_at_one(),
                _ => {
                    self.say("start".into());
                    self.machine.start_again().unwrap();
                    self.runs = true;
                }
            },
            0..52 => self.write(),
            52..74 => self.backup(),
            74..82 => self.backup_and_write(),
            82..88 => self.backup_that_is_killed(),
            88..91 => self.quit(),
            91..94 => self.kill(),
            94..97 => self.resize(),
            _ => self.look_at_one(),
        }
    }

    fn say(&mut self, what: String) {
        self.log.push(what);
    }

    fn write(&mut self) {
        let index = usize::try_from(self.random.below(DISKS.len() as u64)).unwrap();
        let (name, size) = (DISKS[index].0, self.now[index].len() as u64);
        let sectors = size / 512;
        let kind = self.random.below(10);
        let (start, length) = if kind == 9 {
            // Whole clusters, since a part of one may stay what it was.
            let clusters = size / (64 * KIB);
            let start = self.random.below(clusters);
            (start * 64 * KIB, (1 + self.random.below((clusters - start).min(8))) * 64 * KIB)
        } else {
            let start = self.random.below(sectors);
            let most = if self.random.below(6) == 0 { 2048 } else { 40 };
            (start * 512, (1 + self.random.below((sectors - start).min(most))) * 512)
        };
        let (command, byte) = match kind {
            0 | 1 => (format!("write -z {start} {length}"), 0),
            2 => (format!("write -zu {start} {length}"), 0),
            9 => (format!("discard {start} {length}"), 0),
            _ => {
                let byte = 1 + u8::try_from(self.random.below(255)).unwrap();
                (format!("write -P {byte} {start} {length}"), byte)
            }
        };
        self.say(format!("{name}: {command}"));
        self.machine.disk_io(name, &command).unwrap();
        let range = usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap();
        Rc::make_mut(&mut self.now[index])[range].fill(byte);
    }

    fn target(&mut self) -> (usize, PathBuf) {
        let target = usize::from(self.random.below(4) == 0);
        (target, self.directory(target))
    }

    fn directory(&self, target: usize) -> PathBuf {
        self.machine.work().join(["one", "two"][target])
    }

    fn arguments(&mut self, target: usize) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--config".into(), self.config.clone().into()];
        arguments.extend(["backup", "vm", "--json", "--to"].map(OsString::from));
        arguments.push(self.directory(target).into());
        if self.random.below(12) == 0 {
            arguments.push("--full".into());
        }
        arguments
    }

    fn backup(&mut self) {
        let (target, _) = self.target();
        let arguments = self.arguments(target);
        self.say(format!("backup to {target}{}", if self.runs { "" } else { " while off" }));
        let outcome = self.tool.run(&arguments).unwrap();
        let made = self.now.clone();
        self.made(target, &outcome, made);
        self.nothing_is_left();
    }

    /// What is written while the backup stands still belongs to the point before the instant, and not after it.
    fn backup_and_write(&mut self) {
        let (target, _) = self.target();
        let arguments = self.arguments(target);
        let place = *self.random.pick(&["decided", "taken", "read", "torn-down", "durable"]);
        self.say(format!("backup to {target}, held at {place}"));
        let held = Held::at(&self.tool, &format!("{place}#1"), arguments);
        let before = self.now.clone();
        for _ in 0..=self.random.below(6) {
            self.write();
        }
        let made = if place == "decided" { self.now.clone() } else { before };
        match self.random.below(6) {
            0 => {
                self.say("  killed".into());
                held.signal("KILL");
                held.go_on();
                self.listed(target, &made);
            }
            1 => {
                self.say("  terminated".into());
                held.signal("TERM");
                let outcome = held.go_on();
                assert!([0, 130].contains(&outcome.status), "{}", outcome.stderr);
                self.listed(target, &made);
                self.nothing_is_left();
            }
            2 => {
                self.say("  QEMU killed".into());
                self.kill();
                let outcome = held.go_on();
                assert!([0, 1].contains(&outcome.status), "{}", outcome.stderr);
                self.listed(target, &made);
            }
            _ => {
                let outcome = held.go_on();
                self.made(target, &outcome, made);
                self.nothing_is_left();
            }
        }
    }

    /// At any place that has a name.
    fn backup_that_is_killed(&mut self) {
        let (target, _) = self.target();
        let arguments = self.arguments(target);
        let place = format!("*#{}", 1 + self.random.below(110));
        self.say(format!("backup to {target}, killed at {place}"));
        let mut command = self.tool.command(&arguments);
        command.env("STILLPOINT_FAILPOINT", format!("{place}=kill"));
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        let made = self.now.clone();
        self.listed(target, &made);
    }

    fn quit(&mut self) {
        self.say("quit".into());
        self.machine.quit().unwrap();
        self.runs = false;
    }

    fn kill(&mut self) {
        self.say("kill QEMU".into());
        for (name, ..) in DISKS {
            self.machine.disk_io(name, "flush").unwrap();
        }
        self.machine.kill().unwrap();
        self.runs = false;
    }

    fn resize(&mut self) {
        let index = usize::try_from(self.random.below(DISKS.len() as u64)).unwrap();
        let size = self.now[index].len() as u64 + 512 * (1 + self.random.below(1024));
        if size > LARGEST {
            return;
        }
        let name = DISKS[index].0;
        self.say(format!("{name}: resize to {size}"));
        // After a run that was killed its filters are in the way of a resize, as of any other user of the node.
        let qmp = self.machine.qmp().display().to_string();
        let recovered = self.tool.run(["recover", "--qmp", &qmp]).unwrap();
        assert_eq!(recovered.status, 0, "{}", recovered.stderr);
        let node = format!("node-{name}");
        self.machine.execute("block_resize", json!({"node-name": node, "size": size})).unwrap();
        Rc::make_mut(&mut self.now[index]).resize(usize::try_from(size).unwrap(), 0);
    }

    fn made(&mut self, target: usize, outcome: &Outcome, contents: Contents) {
        assert_eq!(outcome.status, 0, "{}", outcome.stderr);
        let summary = outcome.json().unwrap();
        let reused = |disk: &&Value| disk["bitmap_mode"] == "reuse";
        self.incrementals += summary["disks"].as_array().unwrap().iter().filter(reused).count();
        self.points.insert((target, common::point_id(&summary).to_owned()), contents);
    }

    /// A point that nobody told of may have been made, or not.
    fn listed(&mut self, target: usize, contents: &Contents) {
        for point in self.list(target) {
            self.points.entry((target, point)).or_insert_with(|| contents.clone());
        }
    }

    fn list(&self, target: usize) -> Vec<String> {
        let directory = self.directory(target);
        if !directory.exists() {
            return Vec::new();
        }
        let listing = self.tool.run(["points", "--json", "--to", directory.to_str().unwrap()]).unwrap();
        let points: Vec<Value> = serde_json::from_str(&listing.stdout).unwrap();
        points.iter().map(|point| point["id"].as_str().unwrap().to_owned()).collect()
    }

    fn nothing_is_left(&mut self) {
        if !self.runs {
            return;
        }
        let nodes = self.machine.execute("query-named-block-nodes", json!({})).unwrap();
        for node in nodes.as_array().unwrap() {
            assert!(!node["node-name"].as_str().unwrap().starts_with("stillpoint"), "{node}");
            let bitmaps = node["dirty-bitmaps"].as_array().map_or(0, Vec::len);
            assert!(bitmaps <= 4, "two targets, and two bitmaps of each at the most: {node}");
        }
    }

    fn look_at_one(&mut self) {
        let keys: Vec<_> = self.points.keys().cloned().collect();
        if keys.is_empty() {
            return;
        }
        let (target, point) = self.random.pick(&keys).clone();
        self.say(format!("restore {point} from {target}"));
        self.compare(target, &point).unwrap();
    }

    fn compare(&self, target: usize, point: &str) -> Result<(), String> {
        let output = tempfile::tempdir_in(self.machine.work()).unwrap();
        let restored = output.path().join("restored");
        self.tool
            .restore(&format!("vm/{point}"), &self.directory(target), &restored)
            .map_err(|e| e.to_string())?;
        for ((name, ..), wanted) in DISKS.iter().zip(&self.points[&(target, point.to_owned())]) {
            let found = fs::read(restored.join(format!("{name}.raw"))).unwrap();
            if found.len() != wanted.len() {
                return Err(format!("{point}: disk {name} has {} bytes, not {}", found.len(), wanted.len()));
            }
            if let Some(at) = found.iter().zip(wanted.iter()).position(|(found, wanted)| found != wanted) {
                return Err(format!(
                    "{point}: disk {name} is wrong at {at}: {} for {}",
                    found[at], wanted[at]
                ));
            }
        }
        Ok(())
    }

    /// All points of both targets, and none is missing.
    fn end(&self) -> Result<(), String> {
        for target in 0..2 {
            let mut listed = self.list(target);
            listed.sort();
            let known = self.points.keys().filter(|(of, _)| *of == target).map(|(_, point)| point.clone());
            let mut known: Vec<_> = known.collect();
            known.sort();
            if listed != known {
                return Err(format!("target {target} lists {listed:?}, not {known:?}"));
            }
        }
        self.points.keys().try_for_each(|(target, point)| self.compare(*target, point))
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn every_point_is_what_the_disks_were() {
    let operations = number("STILLPOINT_MODEL_OPERATIONS").unwrap_or(60);
    let first = number("STILLPOINT_MODEL_SEED");
    let seeds = number("STILLPOINT_MODEL_SEEDS").unwrap_or(if first.is_some() { 1 } else { 3 });
    let first = first.unwrap_or(20_260_101);
    let (mut done, mut points, mut incrementals) = (0, 0, 0);
    for seed in first..first + seeds {
        println!("STILLPOINT_MODEL_SEED={seed} STILLPOINT_MODEL_OPERATIONS={operations}");
        let mut life = Life::begin(seed);
        let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..operations {
                life.step();
            }
            life.end().unwrap();
        }));
        if lived.is_err() {
            println!("{}", life.log.join("\n"));
            panic!(
                "STILLPOINT_MODEL_SEED={seed} STILLPOINT_MODEL_OPERATIONS={operations} goes wrong as above"
            );
        }
        done += life.operations;
        points += life.points.len();
        incrementals += life.incrementals;
    }
    println!("{done} operations, {points} points, {incrementals} disks of them incremental, 0 violations");
    assert!(incrementals > 0, "there was nothing to go wrong");
}

/// The negative control: a bitmap that forgets one write makes a point that is found to be wrong.
#[test]
fn a_bitmap_that_forgets_is_found_out() {
    let mut life = Life::begin(7);
    let arguments = life.arguments(0);
    let full = life.tool.run(&arguments).unwrap();
    life.made(0, &full, life.now.clone());
    while life.log.iter().filter(|line| line.starts_with("vda: write -P")).count() == 0 {
        life.write();
    }
    let nodes = life.machine.execute("query-named-block-nodes", json!({})).unwrap();
    let node = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "node-vda").unwrap();
    let bitmap = &node["dirty-bitmaps"][0]["name"];
    life.machine.execute("block-dirty-bitmap-clear", json!({"node": "node-vda", "name": bitmap})).unwrap();
    let arguments: Vec<_> = life.arguments(0).into_iter().filter(|argument| argument != "--full").collect();
    let incremental = life.tool.run(&arguments).unwrap();
    life.made(0, &incremental, life.now.clone());
    let found = life.end().unwrap_err();
    assert!(found.contains("disk vda is wrong"), "{found}");
}
