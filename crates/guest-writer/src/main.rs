//! The program in the guest: takes commands on a virtio-serial port, one a line, and answers each with one line.
//!
//! | command | answer |
//! |---|---|
//! | `start RUN SEED PER_DISK SPAN RATE SYNC FROM SIZE...` | `started` |
//! | `status` | `status WRITES ERRORS LONGEST_US` |
//! | `stop` | `stopped WRITES ERRORS LONGEST_US`, with nothing in flight |
//! | `mark` | `marked N...`: the last operation acknowledged, by stream |
//! | `read RATE` | `reading`: a thread a disk reads 4 KiB anywhere in it, RATE times a second, until `stop` |
//! | `latency` | `latency HISTOGRAM`: of the writes since last asked |
//! | `read-latency` | `read-latency HISTOGRAM` |
//! | `rate RATE` | `rate RATE` |
//! | `error` | `error` and the first I/O error, if there was one |
//! | `sync` | `synced`, when all disks have flushed |
//! | `fill SIZE OFFSET LENGTH` | `filled` |
//! | `poweroff` | none |
//!
//! What cannot be done is answered with `failed WHY`. A disk is named by its size in bytes: how a front end shows a serial
//! number differs, sizes do not. `RATE` is operations a second and stream, 0 for as fast as they go. `SYNC` says which
//! streams wait for stable storage: `none`, `ordering` or `all`. `FROM` is `-`, or the last operation that each stream did in
//! an earlier life of the VM, with commas between. Counts stay after `stop`, until the next `start`.

#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "a test's own program: its numbers are the test's, and a panic in it is a failed test"
)]

mod disk;
mod storm;

use std::{
    fs::OpenOptions,
    io::{BufRead as _, BufReader, Write as _},
    time::Duration,
};
use storm::Storm;

fn main() {
    let path = std::env::args().nth(1).unwrap_or_default();
    let port = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(port) => port,
        Err(error) => {
            eprintln!("guest-writer: {path}: {error}");
            return;
        }
    };
    let Ok(mut answers) = port.try_clone() else { return };
    let mut answer = |text: &str| {
        if let Err(error) = answers.write_all(format!("{text}\n").as_bytes()) {
            eprintln!("guest-writer: answer: {error}");
        }
    };
    answer("ready");
    let mut storm = None;
    let mut lines = BufReader::new(port);
    loop {
        let mut line = String::new();
        match lines.read_line(&mut line) {
            // Nobody is at the other end: a port without a client reads as ended.
            Ok(0) => std::thread::sleep(Duration::from_millis(20)),
            Ok(_) => {
                let words: Vec<&str> = line.split_whitespace().collect();
                match carry_out(&mut storm, &words) {
                    Ok(text) => answer(&text),
                    Err(why) => answer(&format!("failed {why}")),
                }
            }
            Err(error) => {
                eprintln!("guest-writer: {error}");
                return;
            }
        }
    }
}

fn carry_out(storm: &mut Option<Storm>, words: &[&str]) -> Result<String, String> {
    let started = |storm: &mut Option<Storm>| storm.take().ok_or_else(|| "no storm was started".to_owned());
    match words {
        ["start", plan @ ..] => {
            if storm.as_ref().is_some_and(Storm::is_running) {
                return Err("a storm is running".into());
            }
            *storm = Some(Storm::start(plan)?);
            Ok("started".into())
        }
        ["status"] => Ok(format!("status {}", storm.as_ref().map_or_else(|| "0 0 0".into(), Storm::counts))),
        ["stop"] => {
            let mut running = started(storm)?;
            running.stop();
            let counts = running.counts();
            *storm = Some(running);
            Ok(format!("stopped {counts}"))
        }
        ["poweroff"] => {
            if let Some(running) = storm {
                running.stop();
            }
            rustix::system::reboot(rustix::system::RebootCommand::PowerOff)
                .map_err(|error| error.to_string())?;
            Ok(String::new())
        }
        ["reboot"] => {
            rustix::system::reboot(rustix::system::RebootCommand::Restart)
                .map_err(|error| error.to_string())?;
            Ok(String::new())
        }
        ["fill", size, offset, length] => {
            disk::fill(number(size)?, number(offset)?, number(length)?)?;
            Ok("filled".into())
        }
        _ => {
            let storm = storm.as_mut().ok_or("no storm was started, or no such command")?;
            match words {
                ["mark"] => Ok(format!("marked {}", storm.mark())),
                ["read", rate] => {
                    storm.read(number(rate)?);
                    Ok("reading".into())
                }
                ["latency"] => Ok(format!("latency {}", storm.latency())),
                ["read-latency"] => Ok(format!("read-latency {}", storm.read_latency())),
                ["error"] => Ok(format!("error {}", storm.error())),
                ["sync"] => storm.sync().map(|()| "synced".into()),
                ["rate", rate] => {
                    storm.set_rate(number(rate)?);
                    Ok(format!("rate {rate}"))
                }
                _ => Err("no such command".into()),
            }
        }
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|error| format!("{text}: {error}"))
}
