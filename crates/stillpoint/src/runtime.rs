//! Where sockets, locks and journals of runs go.

use std::path::PathBuf;

/// `/run/stillpoint` for root, otherwise below the user's own runtime directory. It is on tmpfs: what it describes
/// does not outlive the host either.
pub(crate) fn directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("STILLPOINT_RUNTIME_DIRECTORY") {
        return directory.into();
    }
    let user = rustix::process::geteuid();
    if user.is_root() {
        return "/run/stillpoint".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) => PathBuf::from(directory).join("stillpoint"),
        None => format!("/tmp/stillpoint-{}", user.as_raw()).into(),
    }
}
