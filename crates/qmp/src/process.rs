//! Why a peer is silent, as far as the kernel tells.

use std::fs;

/// Whether a process is stopped, by a signal (SIGSTOP) or by a debugger: state `T` or `t` of `/proc/PID/stat`.
pub fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is the program's name in parentheses, with anything inside.
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
}

#[cfg(test)]
mod test {
    use super::*;
    use std::{
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    #[test]
    fn a_stopped_process_is_told_from_one_that_sleeps() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let signal = |name: &str| {
            let pid = child.id().to_string();
            assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
        };
        // The kernel tells nobody but a process's parent, and that only by waiting for it.
        let becomes = |stopped: bool| {
            let deadline = Instant::now() + Duration::from_secs(10);
            while is_stopped(child.id()) != stopped {
                assert!(Instant::now() < deadline, "it does not become {stopped}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        assert!(!is_stopped(child.id()));
        signal("STOP");
        becomes(true);
        signal("CONT");
        becomes(false);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_stopped(child.id()), "it is gone");
    }
}
