//! Which process is meant, beyond its number: a number is given out again.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd as _},
    path::Path,
};
use stillpoint_qmp::Qmp;

/// When a process started, in clock ticks since the host's boot (field 22 of `/proc/PID/stat`); `None` if there is no
/// such process.
pub(crate) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, with anything inside.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    // A zombie waits for nothing but its parent.
    fields.next().filter(|state| !matches!(*state, "Z" | "X"))?;
    fields.nth(18)?.parse().ok()
}

/// The numbers under which a process has `file` open, as far as that can be seen. The links' texts are compared first, since
/// looking at what else it has open may wait for storage.
pub(crate) fn descriptors_of(pid: u32, file: impl AsFd) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt as _;
    let own = file.as_fd().as_raw_fd();
    let (Ok(text), Ok(is)) = (fs::read_link(format!("/proc/self/fd/{own}")), rustix::fs::fstat(&file)) else {
        return Vec::new();
    };
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let same = entries.filter(|entry| {
        let path = entry.path();
        fs::read_link(&path).is_ok_and(|found| found == text)
            && fs::metadata(&path).is_ok_and(|found| found.dev() == is.st_dev && found.ino() == is.st_ino)
    });
    same.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The user that a process acts as, and its group.
pub(crate) fn user_of(pid: u32) -> Option<(u32, u32)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let effective = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some((effective("Uid:")?, effective("Gid:")?))
}

/// This boot of the host; empty where the kernel does not tell.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// A name for the QEMU behind a monitor that no other QEMU has and that each of its monitors gives: by its process, or
/// where that is not to be seen (another pid namespace; a socket that somebody else made for it, as libvirt does) by
/// the monitor's socket.
pub(crate) fn qemu_key(qmp: &Qmp) -> String {
    let by_process = qmp.peer_pid().and_then(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        let qemu = name.starts_with("qemu") || name.starts_with("kvm");
        Some(format!("qemu-{pid}-{}", started(pid).filter(|_| qemu)?))
    });
    by_process.unwrap_or_else(|| socket_key(qmp.path()))
}

/// A name for the socket at `path`, the same by whatever path it is reached.
pub(crate) fn socket_key(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    // Where there is no socket, connecting says so in better words.
    fs::metadata(path)
        .map_or_else(|_| "socket-none".into(), |found| format!("socket-{:x}-{:x}", found.dev(), found.ino()))
}

/// Whether the QEMU that [`qemu_key`] named is proven to be gone.
pub(crate) fn qemu_is_gone(key: &str) -> bool {
    let Some((pid, start)) = key.strip_prefix("qemu-").and_then(|rest| rest.split_once('-')) else {
        return false;
    };
    let (Ok(pid), Ok(start)) = (pid.parse::<u32>(), start.parse::<u64>()) else { return false };
    started(pid) != Some(start)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_open_file_is_found_by_what_it_is() {
        let file = tempfile::tempfile().unwrap();
        let own = std::process::id();
        assert_eq!(descriptors_of(own, &file), [u32::try_from(file.as_raw_fd()).unwrap()]);
        let again = file.try_clone().unwrap();
        assert_eq!(descriptors_of(own, &again).len(), 2);
        assert!(descriptors_of(4_194_304, &file).is_empty(), "beyond the highest number that Linux gives");
        assert_eq!(user_of(own).unwrap().0, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        let own = std::process::id();
        let start = started(own).unwrap();
        assert!(!qemu_is_gone(&format!("qemu-{own}-{start}")));
        assert!(qemu_is_gone(&format!("qemu-{own}-{}", start + 1)), "the number was given out again");
        assert!(qemu_is_gone("qemu-4194304-1"), "beyond the highest number that Linux gives");
        assert!(!qemu_is_gone("socket-1-2"), "nothing proves it");
    }
}
