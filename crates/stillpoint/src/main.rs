//! The program: reads the command line, runs the command, tells what came of it.

use clap::Parser as _;
use std::io::IsTerminal as _;
use std::process::ExitCode;
use stillpoint::{Cli, Exit, run};
use tracing_subscriber::{EnvFilter, fmt};

fn main() -> ExitCode {
    // Before anything else: the guard of a guest needs no command line, no log and no runtime.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == stillpoint::GUARD) {
        return match stillpoint::run_guard() {
            Some(()) => Exit::Done.into(),
            None => {
                eprintln!("error: {} is for Stillpoint itself to start", stillpoint::GUARD);
                Exit::Usage.into()
            }
        };
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == stillpoint::WATCHER) {
        return match stillpoint::run_watcher() {
            Some(()) => Exit::Done.into(),
            None => {
                eprintln!("error: {} is for Stillpoint itself to start", stillpoint::WATCHER);
                Exit::Usage.into()
            }
        };
    }
    if std::env::args_os().nth(1).is_some_and(|argument| argument == stillpoint::WITH_PARENT) {
        let arguments: Vec<_> = std::env::args_os().skip(2).collect();
        match stillpoint::run_with_parent(&arguments) {
            Some(error) => eprintln!("{error}"),
            None => eprintln!("error: {} is for Stillpoint itself to start", stillpoint::WITH_PARENT),
        }
        return Exit::Usage.into();
    }
    // A core dump would hold passwords and what the guests' disks hold.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    // The parser quotes what it refuses as it came, and a terminal would take it for commands.
    if let Some(argument) =
        std::env::args_os().find(|argument| argument.to_string_lossy().chars().any(char::is_control))
    {
        eprintln!("error: an argument has a control character: {:?}", argument.to_string_lossy());
        return Exit::Usage.into();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; a wrong command line is status 2, as everywhere.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage.into() } else { Exit::Done.into() };
        }
    };
    let level = match cli.verbose {
        0 => "warn",
        1 => "stillpoint=info,warn",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("STILLPOINT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).without_time();
    log.with_ansi(std::io::stderr().is_terminal()).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return Exit::Failed.into();
        }
    };
    let exit = runtime.block_on(run(cli));
    // A thread that asks storage which hangs does not end, and need not. It must not find the runtime's clock stopped under
    // it either: that is a panic, on the screen of whoever interrupted the run. So the runtime ends with the process.
    std::mem::forget(runtime);
    exit.into()
}
