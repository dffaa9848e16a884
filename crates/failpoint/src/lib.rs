//! Named places at which a test ends the program: between two commands to QEMU, between two phases, in the middle of a
//! write. A release build has none of them.
//!
//! Two environment variables of the program under test:
//!
//! * `STILLPOINT_FAILPOINT_LIST=FILE` appends the name of every place that is reached, so that a test learns all of
//!   them from one run instead of keeping a list that would age;
//! * `STILLPOINT_FAILPOINT=NAME=ACTION` acts when that place is reached. `ACTION` is `kill` (SIGKILL to ourselves, which
//!   nothing can clean up after), `term` (SIGTERM to ourselves, then on), or `stop` (SIGSTOP).
//!
//! A name is what the code calls the place and how often it was there: `qmp:blockdev-add#3`. `*#20` is the twentieth
//! place of all.

use rustix::process::{Signal, getpid, kill_process};
use std::{
    collections::HashMap,
    fs::File,
    io::Write as _,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

/// Longer than a signal to the process needs to reach all of its threads.
const TAKES_EFFECT: Duration = Duration::from_millis(50);

struct Plan {
    list: Option<Mutex<File>>,
    at: Option<(String, Signal)>,
    seen: Mutex<HashMap<String, u32>>,
}

fn plan() -> &'static Plan {
    static PLAN: OnceLock<Plan> = OnceLock::new();
    PLAN.get_or_init(|| {
        let list = std::env::var_os("STILLPOINT_FAILPOINT_LIST");
        let list = list.and_then(|path| File::options().create(true).append(true).open(path).ok());
        let at = std::env::var("STILLPOINT_FAILPOINT").ok();
        let at = at.as_deref().and_then(|text| text.rsplit_once('=')).and_then(|(name, action)| {
            let signal = match action {
                "kill" => Signal::KILL,
                "term" => Signal::TERM,
                "stop" => Signal::STOP,
                _ => return None,
            };
            Some((name.to_owned(), signal))
        });
        Plan { list: list.map(Mutex::new), at, seen: Mutex::default() }
    })
}

/// Whether this build has failpoints at all.
pub const ENABLED: bool = cfg!(debug_assertions);

/// Says that the place `name` is reached.
pub fn reached(name: &str) {
    if let Some(signal) = signal_at(name) {
        act(signal);
    }
}

/// Says that `length` bytes are about to be written in one piece at the place `name`; returns how many of them to write
/// before calling [`act`], if it is to end in the middle.
pub fn torn(name: &str, length: usize) -> Option<(usize, Signal)> {
    signal_at(name).map(|signal| (length / 2, signal))
}

/// Does what the plan says.
pub fn act(signal: Signal) {
    // It cannot fail: the process is our own.
    let _ = kill_process(getpid(), signal);
    // A signal to the process takes another thread first, and this one a moment later: it must not go on meanwhile.
    if signal == Signal::KILL || signal == Signal::STOP {
        std::thread::sleep(TAKES_EFFECT);
    }
}

fn signal_at(name: &str) -> Option<Signal> {
    if !ENABLED {
        return None;
    }
    let plan = plan();
    if plan.list.is_none() && plan.at.is_none() {
        return None;
    }
    let (count, place) = {
        let mut seen = plan.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = |name: &str| {
            let count = seen.entry(name.to_owned()).or_default();
            *count = count.saturating_add(1);
            *count
        };
        (count(name), count("*"))
    };
    let full = format!("{name}#{count}");
    if let Some(list) = &plan.list {
        let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(list, "{full}");
    }
    plan.at.as_ref().filter(|(at, _)| *at == full || *at == format!("*#{place}")).map(|(_, signal)| *signal)
}
