//! The guard's own process. It does one thing at a time, so it needs no runtime; whatever fails, it goes on with the
//! next thing, since nobody is left to be told.

use super::Mark;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, fstat},
    io::{Errno, read, write},
    stdio::{dup2_stdout, stderr, stdin, stdout},
};
use std::{
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

/// The longest that a run keeps file systems frozen: what it gives a freeze, and then some for the instant.
const FROZEN_MOST: Duration = Duration::from_secs(90);
/// How long a socket may take no more before it is looked at again.
const FULL: Duration = Duration::from_secs(120);
/// How long an agent may take once QEMU answers: it may still be busy with the freeze.
const THAW: Duration = Duration::from_secs(600);
/// A thaw that was lost on the way is sent again.
const THAW_AGAIN: Duration = Duration::from_secs(30);

const CONT_COMMAND: &[u8] = b"\xff\n{\"execute\":\"cont\",\"id\":\"stillpoint-guard\"}\n";
/// Changes nothing.
const STATUS_COMMAND: &[u8] = b"\xff\n{\"execute\":\"query-status\",\"id\":\"stillpoint-guard\"}\n";
const ANSWER: &[u8] = b"\"stillpoint-guard\"";
/// A byte that is never part of UTF-8 makes QEMU and the agent forget half a command (QMP specification, "Forcing the
/// JSON parser into known-good state"); the agent's answer to the first command tells where the second's begins.
const THAW_COMMAND: &[u8] = b"\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":740921}}\n\
    {\"execute\":\"guest-fsfreeze-thaw\"}\n";
const SYNCHRONISED: &[u8] = b"740921";

/// What the run is in the middle of.
#[derive(Default)]
struct State {
    frozen: Option<Instant>,
    paused: bool,
    run_goes_on: bool,
}

/// Guards until the run is done or dead. Standard input is the control socket, standard output the monitor's socket,
/// standard error the agent's, if there is one. `None` if they are not that.
pub fn run() -> Option<()> {
    let socket =
        |fd: BorrowedFd<'_>| fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_socket());
    if !socket(stdin()) || !socket(stdout()) {
        return None;
    }
    // Fails only for the leader of a process group, which is as far from the run's signals as can be.
    let _ = rustix::process::setsid();
    let _ = write(stdin(), &[Mark::Ready as u8]);
    let mut state = State::default();
    loop {
        let wait = state.frozen.map(|since| FROZEN_MOST.saturating_sub(since.elapsed()));
        if !readable(stdin(), wait) {
            if state.frozen.take().is_some() {
                thaw();
            }
            continue;
        }
        let mut byte = [0u8];
        match read(stdin(), &mut byte) {
            Err(Errno::INTR) => {}
            Ok(1) => match byte {
                [b'F'] => state.frozen = Some(Instant::now()),
                [b'P'] => state.paused = true,
                [b'R'] => state.paused = false,
                [b'G'] => state.run_goes_on = true,
                _ => return Some(()),
            },
            _ => break,
        }
    }
    // QEMU answers within milliseconds, or it hangs (it may be stopped, which can be why the run gave up). Then it is waited
    // for as long as it lives: the commands of the run that it has not read yet include `stop`, and if the last holder of
    // this socket went away it would forget the `cont` behind it. A thaw reaches the agent only through it, too. While the run goes on, a
    // word of ours would come in between its own.
    if state.paused || state.frozen.is_some() && !state.run_goes_on {
        say(stdout(), if state.paused { CONT_COMMAND } else { STATUS_COMMAND });
        await_answer(stdout(), None, |heard| contains(heard, ANSWER));
    }
    // The monitor serves one client, and recovery may want to be it while the agent is still waited for.
    if let Ok(null) = std::fs::File::open("/dev/null") {
        let _ = dup2_stdout(null);
    }
    if state.frozen.is_some() {
        thaw();
    }
    Some(())
}

fn thaw() {
    let end = Instant::now() + THAW;
    while Instant::now() < end {
        say(stderr(), THAW_COMMAND);
        // One that has gone will not come back on this connection.
        if await_answer(stderr(), Some(end.min(Instant::now() + THAW_AGAIN)), thawed) != Answer::Silence {
            return;
        }
    }
}

/// Whether an answer follows the one that says that the agent listens.
fn thawed(heard: &[u8]) -> bool {
    let at = heard.windows(SYNCHRONISED.len()).rposition(|window| window == SYNCHRONISED);
    let after = at.and_then(|at| heard.get(at..)).unwrap_or_default();
    after
        .split(|byte| *byte == b'\n')
        .skip(1)
        .any(|line| contains(line, b"return") || contains(line, b"error"))
}

fn contains(heard: &[u8], wanted: &[u8]) -> bool {
    heard.windows(wanted.len()).any(|window| window == wanted)
}

fn say(to: BorrowedFd<'_>, mut bytes: &[u8]) {
    // The sockets are non-blocking, as the run made them.
    while !bytes.is_empty() {
        match write(to, bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut wait = [PollFd::new(&to, PollFlags::OUT)];
                let _ = poll(&mut wait, Some(&timespec(FULL)));
            }
            Err(_) => return,
        }
    }
}

/// What came of waiting for an answer.
#[derive(PartialEq)]
enum Answer {
    Heard,
    Silence,
    Gone,
}

/// Reads until `enough`, the end of the stream, or `end`, if there is one.
fn await_answer(from: BorrowedFd<'_>, end: Option<Instant>, enough: impl Fn(&[u8]) -> bool) -> Answer {
    let (mut heard, mut chunk) = (Vec::new(), [0u8; 4096]);
    while readable(from, end.map(|end| end.saturating_duration_since(Instant::now()))) {
        match read(from, &mut chunk) {
            Ok(0) => return Answer::Gone,
            Ok(more) => {
                heard.extend_from_slice(chunk.get(..more).unwrap_or_default());
                if enough(&heard) {
                    return Answer::Heard;
                }
                // The answer is the last thing said; a peer that talks on must not fill our memory.
                let excess = heard.len().saturating_sub(1 << 16);
                heard.drain(..excess);
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return Answer::Gone,
        }
    }
    Answer::Silence
}

fn readable(fd: BorrowedFd<'_>, wait: Option<Duration>) -> bool {
    let end = wait.map(|wait| Instant::now() + wait);
    loop {
        let rest = end.map(|end| timespec(end.saturating_duration_since(Instant::now())));
        let mut wait = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut wait, rest.as_ref()) {
            Err(Errno::INTR) => {}
            Ok(0) => return false,
            // Reading then tells what is wrong.
            Ok(_) | Err(_) => return true,
        }
    }
}

fn timespec(wait: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_answer_counts_only_after_the_agent_listens() {
        assert!(!thawed(b"{\"return\": 2}\n"), "that was the freeze");
        assert!(!thawed(b"{\"return\": 2}\n\xff{\"return\": 740921}\n"));
        assert!(thawed(b"{\"return\": 2}\n\xff{\"return\": 740921}\n{\"return\": 2}\n"));
        assert!(thawed(b"\xff{\"return\": 740921}\n{\"error\": {}}\n"));
    }
}
