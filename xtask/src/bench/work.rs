//! Backup, restore and verification, beside others that do the same.

use super::{
    GIB, MIB, Scale,
    data::Changes,
    limits,
    measure::{Contender, Cost, Row, assert_durable, cost, median, take_turns},
    place::{MECHANISMS, Place, names},
    report::{Curve, Report},
};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::{
    cell::RefCell,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
};
use stillpoint_testkit::{Qemu, same};

/// Title of what tells how fast a program gets a disk.
const HANDOVER: &str = "Handing a disk to a program";

/// The disk, the machine that has it, and how much is done with it.
pub(super) struct Bench<'a> {
    place: RefCell<Place>,
    pub(super) disk: PathBuf,
    work: PathBuf,
    scale: &'a Scale,
}

impl<'a> Bench<'a> {
    pub(super) fn start(qemu: &Qemu, work: &Path, disk: &Path, scale: &'a Scale) -> Result<Self> {
        let place = RefCell::new(Place::with_image(qemu, work, disk)?);
        // Into the page cache: what is compared is not the storage that is read.
        std::io::copy(&mut fs::File::open(disk)?, &mut std::io::sink())?;
        Ok(Self { place, disk: disk.to_owned(), work: work.to_owned(), scale })
    }

    pub(super) fn end(self) -> Result<()> {
        self.place.into_inner().machine.kill()
    }

    /// Seconds in which the export is read to nowhere.
    pub(super) fn read_to_nowhere(&self) -> Result<f64> {
        let seconds = (0..self.scale.rounds)
            .map(|_| Ok(self.peer("nbdcopy --no-extents --connections=1 URI null:", None)?.seconds));
        Ok(median(&seconds.collect::<Result<Vec<_>>>()?))
    }

    /// Seconds in which the disk's content is written to a file.
    pub(super) fn write_durably(&self) -> Result<f64> {
        let written = self.work.join("written.raw");
        let line = format!(
            "dd if={} of={} bs=4M oflag=direct conv=fsync,sparse",
            self.disk.display(),
            written.display()
        );
        let seconds = (0..self.scale.rounds).map(|_| {
            remove(&written)?;
            Ok(cost(&mut shell(&line))?.0.seconds)
        });
        let seconds = seconds.collect::<Result<Vec<_>>>()?;
        remove(&written)?;
        Ok(median(&seconds))
    }

    /// What a peer takes that reads QEMU's own export; `URI` and `OUT` in its line are filled in.
    fn peer(&self, line: &str, output: Option<&Path>) -> Result<Cost> {
        let uri = self.place.borrow_mut().serve()?;
        let output = output.unwrap_or(Path::new(""));
        let line = line.replace("URI", &format!("'{uri}'")).replace("OUT", &output.display().to_string());
        let mut command = shell(&line);
        command.envs(self.place.borrow().restic("restic"));
        command.env("BORG_BASE_DIR", self.work.join("borg-base"));
        command.env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        let result = cost(&mut command);
        self.place.borrow_mut().stop_serving()?;
        Ok(result?.0)
    }

    fn ours(&self, line: &[&str]) -> Result<Cost> {
        Ok(cost(&mut self.place.borrow().stillpoint(line))?.0)
    }

    /// Reading the whole disk to nowhere, through each way in which a program can get it.
    pub(super) fn handover(&mut self, report: &mut Report) -> Result<()> {
        println!("== handing a disk over");
        let seconds_file = self.work.join("seconds");
        let mut contenders: Vec<Contender<'_>> = MECHANISMS
            .iter()
            .map(|&mechanism| {
                let (this, seconds_file) = (&*self, &seconds_file);
                Contender {
                    name: mechanism,
                    line: match mechanism {
                        "nbd" => "nbdcopy --no-extents --connections=1 nbd+unix://... null:".into(),
                        _ => "dd if=... of=/dev/null bs=4M".into(),
                    },
                    run: Box::new(move || {
                        let whole = this.ours(&["backup", "vm", "--target", mechanism, "--full"])?;
                        let seconds = fs::read_to_string(seconds_file)?.parse()?;
                        Ok(Cost { seconds, ..whole })
                    }),
                }
            })
            .collect();
        let line = "nbdcopy --no-extents --connections=1 URI null:";
        contenders.push(Contender {
            name: "nbdcopy, QEMU's export",
            line: line.into(),
            run: Box::new(|| self.peer(line, None)),
        });
        let rows = take_turns(self.scale.rounds, contenders)?;
        report.compare(
            HANDOVER,
            "The time of the reading program alone; CPU time is of the whole run.".into(),
            rows,
        );
        let table = report.tables.last().map(|table| table.rows.clone()).unwrap_or_default();
        if let Some((qemu, ours)) = table.split_last() {
            for row in ours {
                report.ratios.insert(format!("{} / {}", row.name, qemu.name), qemu.median / row.median);
            }
        }
        Ok(())
    }

    /// A full backup into plain images.
    pub(super) fn full_into_directory(&mut self, report: &mut Report) -> Result<()> {
        println!("== full backup into a directory");
        let copy = self.work.join("copy.raw");
        let peer = |name, line: &'static str| {
            let (this, copy) = (&*self, copy.clone());
            Contender {
                name,
                line: line.into(),
                run: Box::new(move || {
                    remove(&copy)?;
                    let cost = this.peer(line, Some(&copy))?;
                    assert_durable(&copy)?;
                    ensure!(same(&copy, &this.disk)?, "{} is not the disk", copy.display());
                    Ok(cost)
                }),
            }
        };
        let ours = Contender {
            name: "Stillpoint",
            line: "stillpoint backup vm --target directory --full".into(),
            run: Box::new(|| {
                self.place.borrow().renew("directory")?;
                let cost = self.ours(&["backup", "vm", "--target", "directory", "--full"])?;
                let points = self.work.join("directory");
                assert_durable(&points)?;
                let image = find(&points, "raw")?.context("no raw image in the directory")?;
                ensure!(same(&image, &self.disk)?, "{} is not the disk", image.display());
                Ok(cost)
            }),
        };
        let rows = take_turns(
            self.scale.rounds,
            vec![
                ours,
                peer("nbdcopy", "nbdcopy --flush URI OUT && sync OUT"),
                peer("qemu-img convert", "qemu-img convert -f raw -O raw -t writeback URI OUT && sync OUT"),
            ],
        )?;
        if let (Some(limit), Some(ours)) = (report.limit(limits::WRITE), rows.first()) {
            let data = (report.data.size - report.data.holes) as f64;
            report
                .ratios
                .insert("full into a directory / limit of writing".into(), data / ours.median / limit);
        }
        report.compare(
            "Full backup into a directory",
            "Start, instant and checksums included. Every output is compared with the disk, and has to be durable.".into(),
            rows,
        );
        remove(&copy)
    }

    /// A full backup into a new repository.
    pub(super) fn full_into_repository(&mut self, report: &mut Report) -> Result<()> {
        println!("== full backup into a repository");
        let restic = self.work.join("restic");
        let borg = self.work.join("borg");
        let contenders = vec![
            Contender {
                name: "Stillpoint",
                line: "stillpoint backup vm --target repository --full".into(),
                run: Box::new(|| {
                    self.place.borrow().renew("repository")?;
                    let cost = self.ours(&["backup", "vm", "--target", "repository", "--full"])?;
                    assert_durable(&self.work.join("repository"))?;
                    Ok(cost)
                }),
            },
            Contender {
                name: "restic",
                line: "nbdcopy URI - | restic backup --stdin".into(),
                run: Box::new(|| {
                    remove(&restic)?;
                    let mut init = Command::new("restic");
                    init.args(["init", "-q", "--no-cache"]).envs(self.place.borrow().restic("restic"));
                    cost(&mut init)?;
                    let cost = self.peer(
                        "nbdcopy URI - | restic --no-cache -q backup --stdin && sync -f $RESTIC_REPOSITORY",
                        None,
                    )?;
                    assert_durable(&restic)?;
                    Ok(cost)
                }),
            },
            Contender {
                name: "borg",
                line: "nbdcopy URI - | borg create --compression lz4 REPOSITORY::x - (not encrypted)".into(),
                run: Box::new(|| {
                    remove(&borg)?;
                    let mut init = Command::new("borg");
                    init.args(["init", "-e", "none"])
                        .arg(&borg)
                        .env("BORG_BASE_DIR", self.work.join("borg-base"));
                    cost(&mut init)?;
                    let cost = self.peer(
                        "nbdcopy URI - | borg create --compression lz4 OUT::x - && sync -f OUT",
                        Some(&borg),
                    )?;
                    assert_durable(&borg)?;
                    Ok(cost)
                }),
            },
            // Takes turns like the others, since what the cores can do changes from minute to minute.
            Contender {
                name: "limit of the cores",
                line: "hash, compress and encrypt the same data in memory, on all cores, nothing else".into(),
                run: Box::new(|| {
                    Ok(Cost { seconds: limits::cores_alone(&self.disk)?, cpu_seconds: 0.0, peak_mib: 0.0 })
                }),
            },
        ];
        let rows = take_turns(self.scale.rounds, contenders)?;
        let mib = |path: &Path| Ok::<_, anyhow::Error>(occupied(path)? / MIB);
        let note = format!(
            "A new repository each time, made before the clock starts; start, instant and key derivation included. Stored, MiB: Stillpoint {}, restic {}, borg {}.",
            mib(&self.work.join("repository"))?,
            mib(&restic)?,
            mib(&borg)?
        );
        report.compare("Full backup into a repository", note, rows);
        remove(&restic)?;
        remove(&borg)
    }

    /// What changed, and nothing else.
    pub(super) fn incremental(&mut self, report: &mut Report) -> Result<()> {
        println!("== incremental backups");
        let mut changes = Changes::new();
        let mut lines = Vec::new();
        for target in ["directory", "repository"] {
            self.place.borrow().renew(target)?;
            let backup = |full: bool| {
                let line = [
                    &["backup", "vm", "--target", target, "--json"][..],
                    if full { &["--full"] } else { &[] },
                ]
                .concat();
                let (cost, text) = cost(&mut self.place.borrow().stillpoint(&line))?;
                Ok::<_, anyhow::Error>((cost, serde_json::from_str::<Value>(&text)?))
            };
            backup(true)?;
            let one_percent = self.scale.disk / 100;
            for (name, bytes) in
                [("0", 0), ("64 KiB", 64 << 10), ("1 %", one_percent), ("10 %", 10 * one_percent)]
            {
                let (mut seconds, mut read) = (Vec::new(), 0);
                for _ in 0..self.scale.rounds {
                    change(&mut self.place.borrow_mut(), "vda", self.scale.disk, bytes, &mut changes)?;
                    rustix::fs::sync();
                    let (cost, summary) = backup(false)?;
                    let mode = summary.pointer("/disks/0/bitmap_mode").and_then(Value::as_str);
                    ensure!(mode == Some("reuse"), "not an incremental: {summary}");
                    read = summary.pointer("/disks/0/read_bytes").and_then(Value::as_u64).unwrap_or(0);
                    seconds.push(cost.seconds);
                }
                println!("   {target}, {name} changed: {:.3} s", median(&seconds));
                lines.push(vec![
                    target.to_owned(),
                    name.to_owned(),
                    format!("{:.1}", read as f64 / MIB as f64),
                    format!("{:.3}", median(&seconds)),
                ]);
            }
        }
        report.table(
            "Incremental backup",
            "Changes of 64 KiB and of 1 MiB at random places, text-like and incompressible in turns. The peers have nothing to set beside it: they read the whole disk each time.".into(),
            &["into", "changed", "read, MiB", "s, median"],
            lines,
        );
        Ok(())
    }

    /// Back out again, and looking whether all of it is right.
    pub(super) fn restore_and_verify(&mut self, report: &mut Report) -> Result<()> {
        println!("== restore");
        for target in ["directory", "repository"] {
            self.place.borrow().renew(target)?;
            self.ours(&["backup", "vm", "--target", target, "--full"])?;
        }
        let output = self.work.join("restored");
        let this = &*self;
        let image = find(&self.work.join("directory"), "raw")?.context("no raw image in the directory")?;
        let current = this.place.borrow().machine.work().join("vda.raw");
        let contender = |name: &'static str, line: String, restic: bool| {
            let (output, current) = (output.clone(), current.clone());
            Contender {
                name,
                line: line.replace(&*this.work.display().to_string(), "..."),
                run: Box::new(move || {
                    remove(&output)?;
                    let mut command = match line.strip_prefix("stillpoint ") {
                        Some(line) => this.place.borrow().stillpoint(&line.split(' ').collect::<Vec<_>>()),
                        None => {
                            fs::create_dir(&output)?;
                            shell(&line)
                        }
                    };
                    if restic {
                        command.envs(this.place.borrow().restic("repository"));
                    }
                    let (cost, _) = cost(&mut command)?;
                    assert_durable(&output)?;
                    let restored = find(&output, "raw")?.context("nothing was restored")?;
                    ensure!(same(&restored, &current)?, "{} is not the disk", restored.display());
                    let holes = fs::metadata(&restored)?.blocks() * 512;
                    // restic 0.14 cannot keep holes.
                    let keeps = holes <= fs::metadata(&current)?.blocks() * 512 + 8 * MIB;
                    ensure!(keeps || name == "restic restore", "{name} filled holes: {holes} bytes");
                    Ok(cost)
                }),
            }
        };
        let out = output.display();
        let ours = |target: &str| format!("stillpoint restore vm/latest --target {target} --output {out}");
        let rows = take_turns(
            this.scale.rounds,
            vec![
                contender("Stillpoint", ours("directory"), false),
                contender(
                    "nbdcopy",
                    format!("nbdcopy --flush {} {out}/vda.raw && sync {out}/vda.raw", image.display()),
                    false,
                ),
                contender(
                    "qemu-img convert",
                    format!(
                        "qemu-img convert -f raw -O raw -t writeback {} {out}/vda.raw && sync {out}/vda.raw",
                        image.display()
                    ),
                    false,
                ),
            ],
        )?;
        report.compare("Restore from a directory", "Stillpoint compares every byte with what was recorded when it was read; the others copy the image. Outputs are compared, durable, and sparse.".into(), rows);
        let rows = take_turns(
            this.scale.rounds,
            vec![
                contender("Stillpoint", ours("repository"), false),
                contender(
                    "restic restore",
                    format!(
                        "restic --no-cache -q restore latest --include /disks --target {out} && sync -f {out}"
                    ),
                    true,
                ),
            ],
        )?;
        report.compare(
            "Restore from a repository",
            "Both from the same repository. restic 0.14 fills the holes.".into(),
            rows,
        );
        remove(&output)?;

        println!("== verify");
        let verify = |name: &'static str, line: String, restic: bool| Contender {
            name,
            line: line.clone(),
            run: Box::new(move || {
                let mut command = match line.strip_prefix("stillpoint ") {
                    Some(line) => this.place.borrow().stillpoint(&line.split(' ').collect::<Vec<_>>()),
                    None => shell(&line),
                };
                if restic {
                    command.envs(this.place.borrow().restic("repository"));
                }
                Ok(cost(&mut command)?.0)
            }),
        };
        let rows = take_turns(
            this.scale.rounds,
            vec![
                verify("Stillpoint, repository", "stillpoint verify --target repository".into(), false),
                verify("Stillpoint, directory", "stillpoint verify --target directory".into(), false),
                verify("restic check --read-data", "restic --no-cache -q check --read-data".into(), true),
            ],
        )?;
        report.compare("Verification", "Every byte.".into(), rows);
        Ok(())
    }
}

/// Whether the time of an incremental follows the disk's size.
pub(super) fn growth_with_size(qemu: &Qemu, work: &Path, scale: &Scale, report: &mut Report) -> Result<()> {
    println!("== growth with the disk's size");
    const CHANGED: u64 = 256 * MIB;
    let mut lines = Vec::new();
    for target in ["directory", "repository"] {
        let mut points = Vec::new();
        for &size in scale.sizes {
            let mut place = Place::with_sizes(qemu, work, &[size * GIB])?;
            place.renew(target)?;
            let mut changes = Changes::new();
            change(&mut place, "vda", size * GIB, CHANGED, &mut changes)?;
            let full = cost(&mut place.stillpoint(&["backup", "vm", "--target", target, "--full"]))?.0;
            let mut costs = Vec::new();
            for _ in 0..scale.rounds {
                change(&mut place, "vda", size * GIB, CHANGED, &mut changes)?;
                rustix::fs::sync();
                costs.push(cost(&mut place.stillpoint(&["backup", "vm", "--target", target]))?.0);
            }
            place.machine.kill()?;
            let row = Row::of("", "", &costs);
            println!("   {target}, {size} GiB: {:.2} s", row.median);
            points.push((size as f64, row.median));
            lines.push(vec![
                target.to_owned(),
                size.to_string(),
                format!("{:.2}", full.seconds),
                format!("{:.3}", row.median),
                format!("{:.0}", row.peak_mib.max(full.peak_mib)),
            ]);
        }
        if let Some((first, larger)) = points.split_first() {
            for (size, median) in larger {
                let name = format!("incremental into a {target}: {size} GiB / {} GiB", first.0);
                report.ratios.insert(name, median / first.1);
            }
        }
        report.curves.push(Curve { name: target.to_owned(), axis: "size of the disk, GiB", points });
    }
    report.table(
        "Growth with the disk's size",
        "A sparse disk; 256 MiB in pieces of 1 MiB, text-like and incompressible in turns, are written before the full backup, and again at other places before each incremental.".into(),
        &["into", "GiB", "full, s", "incremental, s, median", "memory at most, MiB"],
        lines,
    );
    Ok(())
}

/// Handing over a disk that is one hole, so that nothing is read from QEMU.
pub(super) fn handover_of_a_hole(qemu: &Qemu, work: &Path, scale: &Scale, report: &mut Report) -> Result<()> {
    println!("== handing a hole over");
    let data = report.data.size - report.data.holes;
    let place = Place::with_sizes(qemu, work, &[data * MIB])?;
    let (place, seconds_file) = (&place, &work.join("seconds"));
    let contenders = MECHANISMS.map(|mechanism| Contender {
        name: mechanism,
        line: "as above".into(),
        run: Box::new(move || {
            let (whole, _) = cost(&mut place.stillpoint(&["backup", "vm", "--target", mechanism, "--full"]))?;
            Ok(Cost { seconds: fs::read_to_string(seconds_file)?.parse()?, ..whole })
        }),
    });
    let rows = take_turns(scale.rounds, contenders.into())?;
    let with_data = report.tables.iter().find(|table| table.title == HANDOVER);
    let with_data = with_data.map(|table| table.rows.clone()).unwrap_or_default();
    for row in &rows {
        if let Some(data) = with_data.iter().find(|data| data.name == row.name) {
            let name = format!("{}: share of its time that is left when nothing is read from QEMU", row.name);
            report.ratios.insert(name, row.median / data.median);
        }
    }
    let lines = rows.iter().map(|row| {
        let all = row.seconds.iter().map(|seconds| format!("{seconds:.2}")).collect::<Vec<_>>().join(" ");
        vec![row.name.clone(), format!("{:.2}", row.median), all]
    });
    report.table(
        "Handing over a hole",
        format!(
            "A disk of {data} MiB, as much as the other has data, that is one hole: zeroes that we make, on the same way. What is left is the part of the kernel (FUSE, the loop device, the sockets), of the reading program, and a little of ours."
        ),
        &["", "s, median", "s, all"],
        lines.collect(),
    );
    Ok(())
}

/// Whether it follows the number of disks.
pub(super) fn growth_with_disks(qemu: &Qemu, work: &Path, scale: &Scale, report: &mut Report) -> Result<()> {
    println!("== growth with the number of disks");
    let mut lines = Vec::new();
    for &count in scale.counts {
        let mut place = Place::with_sizes(qemu, work, &vec![16 * GIB; count])?;
        place.renew("directory")?;
        place.json(&["backup", "vm", "--target", "directory", "--full", "--json"])?;
        let mut changes = Changes::new();
        let (mut costs, mut pauses) = (Vec::new(), Vec::new());
        for _ in 0..scale.rounds {
            for name in names().take(count) {
                change(&mut place, &name, 16 * GIB, 8 * MIB, &mut changes)?;
            }
            rustix::fs::sync();
            let (cost, text) =
                cost(&mut place.stillpoint(&["backup", "vm", "--target", "directory", "--json"]))?;
            let summary: Value = serde_json::from_str(&text)?;
            pauses.push(summary.get("pause_ms").and_then(Value::as_f64).context("no pause_ms")?);
            costs.push(cost);
        }
        place.machine.kill()?;
        let row = Row::of("", "", &costs);
        println!("   {count} disks: {:.2} s", row.median);
        lines.push(vec![
            count.to_string(),
            format!("{:.3}", row.median),
            format!("{:.1}", median(&pauses)),
            format!("{:.0}", row.peak_mib),
        ]);
    }
    report.table(
        "Growth with the number of disks",
        "Disks of 16 GiB, 8 MiB changed on each; the machine has no guest that writes meanwhile.".into(),
        &["disks", "incremental, s, median", "pause, ms, median", "memory at most, MiB"],
        lines,
    );
    Ok(())
}

/// Writes `bytes` at random places, as a guest would.
fn change(place: &mut Place, disk: &str, size: u64, bytes: u64, changes: &mut Changes) -> Result<()> {
    let piece = bytes.min(MIB);
    let file = place.machine.work().join("change");
    for _ in 0..bytes.checked_div(piece).unwrap_or(0) {
        let at = changes.place(size / piece) * piece;
        fs::write(&file, changes.next(piece))?;
        place.machine.disk_io(disk, &format!("write -s {} {at} {piece}", file.display()))?;
    }
    Ok(())
}

fn shell(line: &str) -> Command {
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", line]);
    command
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(metadata) if metadata.is_dir() => Ok(fs::remove_dir_all(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
    }
}

/// The first file with this extension below a directory.
fn find(directory: &Path, extension: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            if let Some(found) = find(&path, extension)? {
                return Ok(Some(found));
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Bytes on storage.
fn occupied(path: &Path) -> Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.blocks() * 512);
    }
    let mut all = 0;
    for entry in fs::read_dir(path)? {
        all += occupied(&entry?.path())?;
    }
    Ok(all)
}
