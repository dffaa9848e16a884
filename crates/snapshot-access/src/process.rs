//! Which process is meant, beyond its number: a number is given out again.

use std::{fs, path::Path};
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
    fn a_process_is_known_by_its_number_and_its_start() {
        let own = std::process::id();
        let start = started(own).unwrap();
        assert!(!qemu_is_gone(&format!("qemu-{own}-{start}")));
        assert!(qemu_is_gone(&format!("qemu-{own}-{}", start + 1)), "the number was given out again");
        assert!(qemu_is_gone("qemu-4194304-1"), "beyond the highest number that Linux gives");
        assert!(!qemu_is_gone("socket-1-2"), "nothing proves it");
    }
}
