//! What is said where a repository cannot be opened: what is wrong, and what to check. Each against what is really there:
//! no file, no host, a server that says no, one of another kind.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

#[path = "../common/mod.rs"]
mod common;
mod network;
mod password;
mod ssh;

use common::Place;
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use stillpoint_testkit::Outcome;
use tempfile::TempDir;

const PASSWORD: &str = "canary-of-the-repository";

/// A directory and a target in a configuration file; no VM is needed for any of this.
struct Target {
    work: TempDir,
    place: Place,
}

impl Target {
    /// `%` in the location stands for the directory.
    fn new(repository: &str) -> Self {
        let work = tempfile::Builder::new().prefix("stillpoint-no-repository-").tempdir().unwrap();
        let place = Place::with_repository(work.path(), &work.path().join("no.qmp"), "none", PASSWORD);
        let target = Self { work, place };
        target.set("repository", &format!("repository = \"{repository}\""));
        target
    }

    fn path(&self) -> &Path {
        self.work.path()
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.place.tool = self.place.tool.env(name, value);
        self
    }

    /// Without what the place tells besides, which is much.
    fn quiet(self) -> Self {
        self.env("STILLPOINT_LOG", "error")
    }

    /// Another line of the configuration.
    fn set(&self, key: &str, line: &str) {
        let config = fs::read_to_string(&self.place.config).unwrap();
        let lines = config.lines().map(|old| if old.starts_with(key) { line } else { old });
        fs::write(
            &self.place.config,
            lines.collect::<Vec<_>>().join("\n").replace('%', self.path().to_str().unwrap()),
        )
        .unwrap();
    }

    /// `points` fails in time, with this status, these words in what is wrong and these in what to do.
    #[track_caller]
    fn says(&self, status: i32, wrong: &str, next: &str) -> Outcome {
        self.says_to(&["points", "--target", "main"], status, wrong, next)
    }

    #[track_caller]
    fn says_to(&self, line: &[&str], status: i32, wrong: &str, next: &str) -> Outcome {
        let started = Instant::now();
        let outcome = self.place.run(line);
        assert!(started.elapsed() < Duration::from_secs(15), "{:?}: {outcome:?}", started.elapsed());
        assert_eq!(outcome.status, status, "{outcome:?}");
        let said = |start: &str, words: &str| {
            let line = outcome.stderr.lines().find(|line| line.trim_start().starts_with(start));
            assert!(
                line.is_some_and(|line| line.contains(words)),
                "{words:?} is not said: {}",
                outcome.stderr
            );
        };
        said("error:", wrong);
        said("next:", next);
        println!("[{status}, {:.1} s] {}", started.elapsed().as_secs_f64(), outcome.stderr.trim_end());
        outcome
    }
}
