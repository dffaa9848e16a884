//! The steps of a run on disk, written before they are taken, for a recovery that finds more than QEMU can tell.

use crate::{
    error::{Error, ErrorKind, Result},
    listener::private_directory,
    step::Step,
};
use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};
use stillpoint_qmp::Qmp;

/// One line of JSON a step, in the runtime directory: named by QEMU's process, since what it describes ends with it.
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// The journal of a run on this QEMU.
    pub(crate) fn create(runtime: &Path, qmp: &Qmp) -> Result<Self> {
        private_directory(runtime)?;
        let path = path(runtime, qmp);
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|error| {
            Error::new(ErrorKind::Host, format!("open journal {}", path.display())).because(error)
        })?;
        Ok(Self { file, path })
    }

    pub(crate) fn record(&mut self, step: &Step) -> Result<()> {
        let failed = || Error::new(ErrorKind::Host, format!("write journal {}", self.path.display()));
        let mut line = serde_json::to_vec(step).map_err(|error| failed().because(error))?;
        line.push(b'\n');
        // The page cache outlives this process, and what is described does not outlive the host.
        self.file.write_all(&line).map_err(|error| failed().because(error))
    }

    /// Everything is undone.
    pub(crate) fn clear(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "journal not removed");
        }
    }

    /// The steps that earlier runs on this QEMU recorded and did not clear. A line that was cut off is the last.
    pub(crate) fn read(runtime: &Path, qmp: &Qmp) -> Vec<Step> {
        let text = std::fs::read_to_string(path(runtime, qmp)).unwrap_or_default();
        text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Forgets what earlier runs recorded.
    pub(crate) fn forget(runtime: &Path, qmp: &Qmp) {
        let _ = std::fs::remove_file(path(runtime, qmp));
    }
}

fn path(runtime: &Path, qmp: &Qmp) -> PathBuf {
    runtime.join(format!("qemu-{}.journal", qmp.peer_pid().unwrap_or(0)))
}
