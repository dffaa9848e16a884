//! Why a peer is silent, as far as the kernel tells.

use std::{fs, path::Path};

/// Whether a process is stopped, by a signal (SIGSTOP) or by a debugger: state `T` or `t` of `/proc/PID/stat`.
pub fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is the program's name in parentheses, with anything inside.
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
}

/// The process that listens on the unix socket at `path`, if it is stopped: for a client that is not let in far enough to be
/// told who that is. `None` also where it cannot be seen.
pub(crate) fn stopped_listener(path: &Path) -> Option<u32> {
    // As it was bound; by which name depends on who started QEMU.
    let (given, canonical) = (path.to_owned(), fs::canonicalize(path).ok());
    let sockets = fs::read_to_string("/proc/net/unix").ok()?;
    let inode = sockets.lines().find_map(|line| {
        // Num RefCount Protocol Flags Type St Inode Path; the flag says that it listens (`__SO_ACCEPTCON`).
        let mut fields = line.split_ascii_whitespace();
        let flags = fields.nth(3)?;
        let inode = fields.nth(2)?;
        let bound = fields.next().map(Path::new)?;
        let is_it = flags == "00010000" && (bound == given || Some(bound) == canonical.as_deref());
        is_it.then(|| format!("socket:[{inode}]"))
    })?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let stopped = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| is_stopped(*pid));
    stopped.into_iter().find(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors
            .into_iter()
            .any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == inode.as_str()))
    })
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
