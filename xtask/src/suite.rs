//! All tests, and one line that says how many passed, failed, or could not be done here.
//!
//! A test that cannot be done prints a line that begins with `skipped` or `SKIP`, and passes. Only the test harness's
//! `--show-output` tells what a passed test printed, so its report is read, not just counted.

use crate::cargo;
use anyhow::{Context as _, Result, bail};
use clap::Args;
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    process::Stdio,
};
use stillpoint_testkit::requirements;

#[derive(Args, Default)]
pub(crate) struct Options {
    /// Only tests whose name has this in it
    #[arg(long)]
    filter: Option<String>,
    /// Only tests of this crate; may be given more than once
    #[arg(long, short)]
    package: Vec<String>,
    /// Show what passed tests printed, too
    #[arg(long)]
    show_output: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    requirements::ensure()?;
    let mut command = cargo(&["test", "--locked", "--no-fail-fast"]);
    if options.package.is_empty() {
        command.arg("--workspace");
    }
    for package in &options.package {
        command.args(["--package", package]);
    }
    command.arg("--").arg("--show-output").args(&options.filter);
    if std::env::var_os("RUST_TEST_THREADS").is_none() {
        command.env("RUST_TEST_THREADS", threads().to_string());
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("run cargo test")?;
    let mut report = Report::default();
    let stdout = child.stdout.take().context("cargo's output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if report.read(&line) || options.show_output {
            println!("{line}");
        }
    }
    let status = child.wait()?;
    report.print();
    if !status.success() {
        bail!("cargo test: {status}");
    }
    if report.passed + report.failed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// A guest takes two cores, one to compute and one to write; more of them at once only wait for each other.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))
}

/// What the harness reported so far.
#[derive(Debug, Default)]
struct Report {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// Tests that said why they were not done. The number tells apart tests of one name in two crates.
    skipped: BTreeMap<(usize, String), String>,
    harness: usize,
    /// Inside the part that tells what passed tests printed, with the test's name.
    output_of: Option<String>,
}

impl Report {
    /// Takes a line; says whether it is worth showing.
    fn read(&mut self, line: &str) -> bool {
        if line == "successes:" {
            self.output_of.get_or_insert_default();
            return false;
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.output_of = None;
            self.harness += 1;
            self.count(counts);
            return true;
        }
        if line == "failures:" {
            self.output_of = None;
            return true;
        }
        let Some(test) = &mut self.output_of else { return true };
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            name.clone_into(test);
        } else if line.starts_with("skipped") || line.starts_with("SKIP") {
            self.skipped.insert((self.harness, test.clone()), line.to_owned());
        }
        false
    }

    fn count(&mut self, counts: &str) {
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(word)) = (words.next(), words.next()) else { continue };
            let Ok(number) = number.parse::<usize>() else { continue };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    fn print(&self) {
        println!();
        for ((_, test), why) in &self.skipped {
            println!("{test}: {why}");
        }
        println!("{}", self.summary());
    }

    fn summary(&self) -> String {
        let passed = self.passed.saturating_sub(self.skipped.len());
        format!("{passed} passed, {} failed, {} skipped", self.failed, self.skipped.len() + self.ignored)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const HARNESS: &str = "
running 3 tests
test a ... ok
test b ... ok
test c ... ok

successes:

---- a stdout ----
skipped a: no QEMU 10
skipped a: really

---- b stdout ----
nothing skipped here

successes:
    a
    b
    c

test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn a_skipped_test_is_counted_once_and_not_as_passed() {
        let mut report = Report::default();
        let shown: Vec<_> = HARNESS.lines().filter(|line| report.read(line)).collect();
        assert_eq!(report.summary(), "2 passed, 0 failed, 2 skipped");
        assert!(shown.iter().any(|line| line.starts_with("test result")));
        assert!(
            !shown.iter().any(|line| line.contains("no QEMU 10")),
            "what passed tests print is not shown"
        );
    }

    #[test]
    fn tests_of_one_name_in_two_crates_are_two() {
        let mut report = Report::default();
        HARNESS.lines().chain(HARNESS.lines()).for_each(|line| {
            report.read(line);
        });
        assert_eq!(report.summary(), "4 passed, 0 failed, 4 skipped");
    }

    #[test]
    fn what_a_failed_test_printed_is_shown() {
        let mut report = Report::default();
        let lines =
            ["successes:", "---- a stdout ----", "hidden", "failures:", "---- b stdout ----", "shown"];
        assert_eq!(lines.map(|line| report.read(line)), [false, false, false, true, true, true]);
    }
}
