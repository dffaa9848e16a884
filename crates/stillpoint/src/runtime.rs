//! Where sockets, locks and journals of runs go, and what this host remembers between them.

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

/// `/var/lib/stillpoint` for root, otherwise below the user's own state directory. What is in it outlives the host's boots.
pub(crate) fn state_directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("STILLPOINT_STATE_DIRECTORY") {
        return directory.into();
    }
    let user = rustix::process::geteuid();
    if user.is_root() {
        return "/var/lib/stillpoint".into();
    }
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    let state =
        state.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
    match state.filter(|state| state.is_absolute()) {
        Some(state) => state.join("stillpoint"),
        None => format!("/var/tmp/stillpoint-state-{}", user.as_raw()).into(),
    }
}
