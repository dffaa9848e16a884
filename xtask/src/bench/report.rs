//! What was measured, as JSON and as Markdown.

use super::{data::Made, measure::Row};
use anyhow::{Context as _, Result};
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write as _, process::Command};
use stillpoint_testkit::Qemu;

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) quick: bool,
    pub(crate) machine: String,
    pub(crate) versions: BTreeMap<String, String>,
    /// The disk that is read.
    pub(crate) data: Made,
    /// What this machine can do at most: name, value, unit.
    pub(crate) limits: Vec<(String, f64, &'static str)>,
    /// How many times as fast as the other, or the share of a limit; by name.
    pub(crate) ratios: BTreeMap<String, f64>,
    pub(crate) tables: Vec<Table>,
    pub(crate) curves: Vec<Curve>,
    pub(crate) timeline: Option<Timeline>,
    pub(crate) took_seconds: f64,
}

/// Contenders at one piece of work, or anything else with columns.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    pub(crate) title: String,
    pub(crate) note: String,
    /// Of contenders; empty if this is another table.
    pub(crate) rows: Vec<Row>,
    pub(crate) columns: Vec<String>,
    pub(crate) lines: Vec<Vec<String>>,
}

/// Seconds against something.
#[derive(Debug, Serialize)]
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) axis: &'static str,
    pub(crate) points: Vec<(f64, f64)>,
}

/// What the guest felt.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Timeline {
    /// Second, median, 99th percentile and longest of the writes of a quarter of a second, ms.
    pub(crate) points: Vec<(f64, f64, f64, f64)>,
    /// Name, first and last second.
    pub(crate) backups: Vec<(String, f64, f64)>,
}

impl Report {
    pub(crate) fn begin(qemu: &Qemu, quick: bool) -> Result<Self> {
        let first_line = |program: &str, argument: &str| {
            let output = Command::new(program).arg(argument).output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().next().map(str::to_owned)
        };
        let mut versions = BTreeMap::new();
        for (program, argument) in [
            ("nbdcopy", "--version"),
            ("qemu-img", "--version"),
            ("restic", "version"),
            ("borg", "--version"),
        ] {
            versions.insert(program.to_owned(), first_line(program, argument).unwrap_or_default());
        }
        versions.insert("qemu".into(), format!("QEMU {}", qemu.version));
        let cpu = std::fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("?");
        let memory = std::fs::read_to_string("/proc/meminfo")?;
        let memory: u64 =
            memory.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).context("/proc/meminfo")?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let kernel = first_line("uname", "-sr").unwrap_or_default();
        let machine = format!(
            "{} cores of {}, {} GiB, {kernel}",
            cores,
            model.trim_start_matches([' ', '\t', ':']),
            memory >> 20
        );
        Ok(Self {
            quick,
            machine,
            versions,
            data: Made::default(),
            limits: Vec::new(),
            ratios: BTreeMap::new(),
            tables: Vec::new(),
            curves: Vec::new(),
            timeline: None,
            took_seconds: 0.0,
        })
    }

    /// How many times as fast the first is as each other of a table of contenders.
    pub(crate) fn compare(&mut self, title: &str, note: String, rows: Vec<Row>) {
        if let Some((ours, others)) = rows.split_first() {
            for other in others {
                self.ratios
                    .insert(format!("{title}: {} / {}", ours.name, other.name), other.median / ours.median);
            }
        }
        self.tables.push(Table {
            title: title.to_owned(),
            note,
            rows,
            columns: Vec::new(),
            lines: Vec::new(),
        });
    }

    pub(crate) fn table(&mut self, title: &str, note: String, columns: &[&str], lines: Vec<Vec<String>>) {
        let columns = columns.iter().map(|&column| column.to_owned()).collect();
        self.tables.push(Table { title: title.to_owned(), note, rows: Vec::new(), columns, lines });
    }

    pub(crate) fn limit(&self, name: &str) -> Option<f64> {
        self.limits.iter().find(|(found, ..)| found == name).map(|(_, value, _)| *value)
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let data = &self.data;
        writeln!(
            text,
            "{}. {}.\n",
            self.machine,
            self.versions.values().cloned().collect::<Vec<_>>().join("; ")
        )?;
        writeln!(
            text,
            "The disk: {} MiB, of them {} holes, {} like text, {} incompressible, {} repeated.{} Measured in {:.0} minutes.\n",
            data.size,
            data.holes,
            data.text,
            data.incompressible,
            data.duplicates,
            if self.quick { " A quick run (`--quick`)." } else { "" },
            (self.took_seconds / 60.0).ceil(),
        )?;
        if !self.limits.is_empty() {
            writeln!(text, "### Limits of this machine\n\n| | |\n|---|---|")?;
            for (name, value, unit) in &self.limits {
                writeln!(text, "| {name} | {value:.0} {unit} |")?;
            }
            writeln!(text)?;
        }
        for table in &self.tables {
            writeln!(text, "### {}\n\n{}\n", table.title, table.note)?;
            if table.rows.is_empty() {
                writeln!(text, "| {} |\n|{}", table.columns.join(" | "), "---|".repeat(table.columns.len()))?;
                for line in &table.lines {
                    writeln!(text, "| {} |", line.join(" | "))?;
                }
            } else {
                contenders(text, &table.rows)?;
            }
            writeln!(text)?;
        }
        if !self.ratios.is_empty() {
            writeln!(text, "### All ratios\n\n| | |\n|---|---|")?;
            for (name, ratio) in &self.ratios {
                writeln!(text, "| {name} | {ratio:.2} |")?;
            }
        }
        Ok(())
    }
}

fn contenders(text: &mut String, rows: &[Row]) -> std::fmt::Result {
    writeln!(
        text,
        "| | s, median | s, all | times our time | CPU s | memory MiB | command |\n|---|---|---|---|---|---|---|"
    )?;
    let ours = rows.first().map_or(1.0, |row| row.median);
    for row in rows {
        let all = row.seconds.iter().map(|seconds| format!("{seconds:.2}")).collect::<Vec<_>>().join(" ");
        writeln!(
            text,
            "| {} | {:.2} | {all} | {:.2} | {:.1} | {:.0} | `{}` |",
            row.name,
            row.median,
            row.median / ours,
            row.cpu_seconds,
            row.peak_mib,
            row.line.replace('|', "\\|")
        )?;
    }
    Ok(())
}

const BEGIN: &str = "<!-- figures: begin -->";
const END: &str = "<!-- figures: end -->";

/// A page with its figures replaced.
pub(crate) fn put_between_marks(page: &str, figures: &str) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).context("the page has no place for figures")?;
    let (_, after) = rest.split_once(END).context("the page has no end of figures")?;
    Ok(format!("{before}{BEGIN}\n\n{figures}\n{END}{after}"))
}
