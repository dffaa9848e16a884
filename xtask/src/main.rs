//! The project's own commands.
//!
//! | command               | what it does                                                                    |
//! |-----------------------|---------------------------------------------------------------------------------|
//! | `cargo xtask demo`    | backs up a real guest while it writes, restores every point and proves each      |
//! | `cargo xtask test`    | installs what the tests need, runs them all, and counts what had to be skipped   |
//! | `cargo xtask check`   | format, lints, documentation, licences and sources of dependencies               |
//! | `cargo xtask bench`   | measures Stillpoint beside others, what it costs a guest, and what limits it     |
//! | `cargo xtask ci`      | `check`, QEMU 10 where it can be had, `test`                                     |
//! | `cargo xtask qemu10`  | puts a Debian 13 with QEMU 10 into `/opt/trixie`, for the tests that want it      |

mod bench;
mod check;
mod demo;
mod deny;
mod suite;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use std::process::Command;
use stillpoint_testkit::{requirements, trixie_root};

#[derive(Parser)]
#[command(name = "xtask", about = "Stillpoint's own commands")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Back up a real guest while it writes without pause, restore every point, and prove each
    Demo,
    /// Install what the tests need, run them all, count what had to be skipped
    Test(suite::Options),
    /// Measure Stillpoint beside what a user would take instead, and what a backup costs the guest
    Bench(bench::Options),
    /// Format, lints, documentation, licences and sources of dependencies
    Check,
    /// What decides whether a change is good: check, then all tests
    Ci,
    /// Put a Debian 13 with QEMU 10 where the tests look for it
    Qemu10,
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Demo => demo::run(),
        Task::Test(options) => suite::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Check => check::run(),
        Task::Ci => {
            check::run()?;
            // Its tests are skipped, and counted, where it cannot be had.
            if let Err(error) = requirements::ensure_trixie(&trixie_root()) {
                println!("no QEMU 10: {error:#}");
            }
            suite::run(&suite::Options::default())
        }
        Task::Qemu10 => requirements::ensure_trixie(&trixie_root()),
    }
}

/// Cargo, in the workspace.
fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(stillpoint_testkit::workspace());
    command
}

/// Runs a step to its end, and says which it is.
fn step(name: &str, command: &mut Command) -> Result<()> {
    println!("== {name}");
    let status = command.status().with_context(|| format!("{name}: run {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{name} failed: {command:?}");
    }
    Ok(())
}
