//! The steps of a run on disk, written before they are taken, for a recovery that finds more than QEMU can tell.
//!
//! One line of JSON a step, in the runtime directory, named by the QEMU that it is about. A line that was cut off is
//! the last one.

use crate::{
    error::{Error, ErrorKind, Result},
    listener::private_directory,
    lock, process,
    step::Step,
};
use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};
use stillpoint_qmp::Qmp;

/// The journal of a run.
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// The journal of a run on this QEMU. What an earlier run left in it is undone by now.
    pub(crate) fn create(runtime: &Path, qmp: &Qmp) -> Result<Self> {
        private_directory(runtime)?;
        let path = path(runtime, qmp);
        let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&path);
        let file = file.map_err(|error| {
            Error::new(ErrorKind::Host, format!("open journal {}", path.display())).because(error)
        })?;
        let mut journal = Self { file, path };
        journal.record(&Step::Begin { monitor: process::socket_key(qmp.path()) })?;
        Ok(journal)
    }

    pub(crate) fn record(&mut self, step: &Step) -> Result<()> {
        let failed = || Error::new(ErrorKind::Host, format!("write journal {}", self.path.display()));
        let mut line = serde_json::to_vec(step).map_err(|error| failed().because(error))?;
        line.push(b'\n');
        // The page cache outlives this process, and what is described does not outlive the host.
        self.file.write_all(&line).map_err(|error| failed().because(error))?;
        stillpoint_failpoint::reached(&format!("journal:{}", step.name()));
        Ok(())
    }

    /// Everything is undone.
    pub(crate) fn clear(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "journal not removed");
        }
    }

    /// The steps that an earlier run on this QEMU recorded and did not clear.
    pub(crate) fn read(runtime: &Path, qmp: &Qmp) -> Vec<Step> {
        steps(&path(runtime, qmp))
    }

    /// Forgets what an earlier run recorded.
    pub(crate) fn forget(runtime: &Path, qmp: &Qmp) {
        let _ = std::fs::remove_file(path(runtime, qmp));
    }
}

fn path(runtime: &Path, qmp: &Qmp) -> PathBuf {
    runtime.join(format!("{}.journal", process::qemu_key(qmp)))
}

fn steps(path: &Path) -> Vec<Step> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
}

/// Clears away what runs that are over left on this host: directories and files named in their journals, journals of
/// QEMUs that are gone, lock files that nobody holds. What a run that goes on has is not touched, nor is any VM.
pub fn sweep(runtime: &Path) {
    let Ok(entries) = std::fs::read_dir(runtime) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some((key, kind)) = name.to_str().and_then(|name| name.rsplit_once('.')) else { continue };
        match kind {
            "journal" => {
                let path = entry.path();
                lock::if_free(runtime, key, || {
                    for step in steps(&path) {
                        step.undo_on_host(runtime);
                    }
                    if process::qemu_is_gone(key) {
                        let _ = std::fs::remove_file(&path);
                    }
                });
            }
            "lock" if !runtime.join(format!("{key}.journal")).exists() => lock::if_free(runtime, key, || {}),
            _ => {}
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_a_dead_run_left_on_the_host_goes_and_a_living_ones_stays() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = directory.path();
        let nbd = |name: &str| runtime.join(name);
        for name in ["nbd-dead", "nbd-living"] {
            std::fs::create_dir(nbd(name)).unwrap();
            std::fs::write(nbd(name).join("socket"), "").unwrap();
        }
        let line =
            |name: &str| format!("{{\"step\":\"listener\",\"directory\":\"{name}\"}}\n{{\"step\":\"cut of");
        std::fs::write(runtime.join("qemu-4194304-1.journal"), line("nbd-dead")).unwrap();
        let own = std::process::id();
        let living = format!("qemu-{own}-{}", process::started(own).unwrap());
        std::fs::write(runtime.join(format!("{living}.journal")), line("nbd-living")).unwrap();
        let held = File::create(runtime.join(format!("{living}.lock"))).unwrap();
        rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
        sweep(runtime);
        assert!(!nbd("nbd-dead").exists() && !runtime.join("qemu-4194304-1.journal").exists());
        assert!(nbd("nbd-living").exists() && runtime.join(format!("{living}.journal")).exists());
    }
}
