//! The NBD listener: bound by us, in a private directory, and passed to QEMU as a descriptor, so that neither QEMU's
//! user nor its umask decides who can reach the disks (S01).

use crate::error::{Error, ErrorKind, Result};
use std::fs::Permissions;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::{
    fs::{DirBuilderExt as _, PermissionsExt as _},
    net::UnixListener,
};
use std::path::{Path, PathBuf};

/// A listening socket in a directory of its own; both go away with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    directory: PathBuf,
}

impl Listener {
    /// Binds a fresh socket under `runtime` (which is created, 0700, if it is not there).
    pub(crate) fn bind(runtime: &Path) -> Result<Self> {
        private_directory(runtime)?;
        let directory = tempfile::Builder::new()
            .prefix("nbd-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(runtime)
            .map_err(|error| {
                Error::new(
                    ErrorKind::Host,
                    format!("create a directory for the NBD socket in {}", runtime.display()),
                )
                .because(error)
            })?;
        let path = directory.path().join("socket");
        let socket = UnixListener::bind(&path).map_err(|error| {
            Error::new(ErrorKind::Host, format!("listen on {}", path.display())).because(error)
        })?;
        Ok(Self { socket, directory: directory.keep() })
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("socket")
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            tracing::warn!(directory = %self.directory.display(), %error, "could not remove the NBD socket's directory");
        }
    }
}

/// Creates `path` for this user alone, or checks that no other user can write to it.
///
/// # Errors
/// If it cannot be made, is a link, or belongs to or is writable for somebody else.
pub fn private_directory(path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let failed = |doing: &str| Error::new(ErrorKind::Host, format!("{doing} {}", path.display()));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| failed("create directory").because(error))?;
    let found =
        std::fs::symlink_metadata(path).map_err(|error| failed("look at directory").because(error))?;
    let ours =
        found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0;
    if ours { Ok(()) } else { Err(failed("another user could write to")) }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn only_its_owner_reaches_the_socket_and_nothing_stays() {
        let runtime = tempfile::tempdir().unwrap();
        let listener = Listener::bind(runtime.path()).unwrap();
        let mode = std::fs::metadata(listener.path().parent().unwrap()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(listener.path().exists());
        drop(listener);
        assert_eq!(std::fs::read_dir(runtime.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let runtime = tempfile::tempdir().unwrap();
        std::fs::set_permissions(runtime.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(Listener::bind(runtime.path()).is_err());
    }
}
