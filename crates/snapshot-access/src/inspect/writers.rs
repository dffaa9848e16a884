//! Programs of this host that write an image past QEMU.
//!
//! QEMU's own locks keep other QEMUs away, unless both were told not to use them (`locking=off`), and nobody else. What is
//! written so passes neither filter nor bitmap. It is looked for in `/proc`, which tells of this host's programs only, and
//! only to root: what is found is true, and that nothing is found proves nothing.

use super::Machine;
use crate::direct::in_time;
use rustix::fs::OFlags;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use stillpoint_qmp::Qmp;

/// For a look at every descriptor of the host; a busy one has some ten thousand.
const LOOK: Duration = Duration::from_secs(5);

/// How a process has a file open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) flags: OFlags,
    /// Whether there is a lock of QEMU's kind on it.
    pub(crate) locked: bool,
}

impl Descriptor {
    /// By `/proc/PID/fdinfo/NUMBER`.
    pub(crate) fn of(process: u32, number: &str) -> Option<Self> {
        let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).ok()?);
        let locked = info.lines().any(|line| line.starts_with("lock:") && line.contains("OFDLCK"));
        Some(Self { flags, locked })
    }

    pub(crate) fn writes(self) -> bool {
        let mode = self.flags & OFlags::ACCMODE;
        !self.flags.contains(OFlags::PATH) && (mode == OFlags::RDWR || mode == OFlags::WRONLY)
    }
}

impl Machine {
    /// Looks whether somebody on this host writes an image besides QEMU, or could unnoticed.
    pub(super) async fn find_other_writers(&mut self, qmp: &Qmp) {
        let Some(qemu) = qmp.peer_pid() else { return };
        let mut images = BTreeMap::new();
        for disk in self.disks.iter().filter(|disk| !disk.read_only) {
            let Some(file) = &disk.image_file else { continue };
            let Some((path, locked)) = file.held_for_writing().await else { continue };
            if !locked {
                let why = "QEMU has its image open without a lock (locking=off): nothing keeps another program from writing it, \
                           and what such a one writes is in no point";
                self.warnings.push((disk.name.clone(), why.into()));
            }
            images.insert(path, disk.name.clone());
        }
        let paths: Vec<PathBuf> = images.keys().cloned().collect();
        let found = in_time(LOOK, move || writers(Path::new("/proc"), qemu, &paths)).await;
        for (path, who) in found.unwrap_or_default() {
            if let Some(disk) = images.get(&path) {
                let why = format!(
                    "{who} has its image open for writing too, and what it writes cannot be held still"
                );
                self.obstacles.push((disk.clone(), why));
            }
        }
    }
}

/// Which of `paths` other processes than `qemu` and this one can write to, and who. A link is read, and not followed: what
/// it leads to may be on storage that hangs.
fn writers(proc: &Path, qemu: u32, paths: &[PathBuf]) -> io::Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let own = std::process::id();
    for entry in fs::read_dir(proc)? {
        let Ok(entry) = entry else { continue };
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if process == qemu || process == own {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(entry.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(path) = fs::read_link(descriptor.path()) else { continue };
            if !paths.contains(&path) {
                continue;
            }
            let number = descriptor.file_name().to_string_lossy().into_owned();
            // One with a lock is QEMU's own, passed on to it, or that of a QEMU that lets ours have the image.
            if Descriptor::of(process, &number).is_some_and(|open| open.writes() && !open.locked) {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                found.push((path, format!("process {process} ({})", name.trim().escape_debug())));
            }
        }
    }
    Ok(found)
}
