//! The NBD listener: bound by us, in a private directory, and passed to QEMU as a descriptor, so that neither QEMU's
//! user nor its umask decides who can reach the disks (S01).

use crate::{
    error::{Error, ErrorKind, Result},
    step::Step,
};
use std::{
    fs::Permissions,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{DirBuilderExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

/// Begins the name of a listener's directory.
const DIRECTORY_PREFIX: &str = "nbd-";

/// Whether a name in a journal is that of a listener's directory, and nothing else's.
pub(crate) fn is_a_directory_of_ours(name: &str) -> bool {
    name.strip_prefix(DIRECTORY_PREFIX)
        .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// A listening socket in a directory of its own; both go away with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Option<UnixListener>,
    directory: PathBuf,
}

impl Listener {
    /// Binds a fresh socket in a directory of its own under `runtime` (which is created, 0700, if it is not there). The
    /// directory's name is told to `record` before there is one.
    pub(crate) fn bind(runtime: &Path, record: &mut dyn FnMut(Step) -> Result<()>) -> Result<Self> {
        let mut listener = Self::for_another(runtime, record)?;
        let path = listener.path();
        let bound = UnixListener::bind(&path).and_then(|socket| {
            std::fs::set_permissions(&path, Permissions::from_mode(0o600)).map(|()| socket)
        });
        let failed =
            |error| Error::new(ErrorKind::Host, format!("listen on {}", path.display())).because(error);
        listener.socket = Some(bound.map_err(failed)?);
        Ok(listener)
    }

    /// The directory alone, for a program of our own that binds its socket itself.
    pub(crate) fn for_another(runtime: &Path, record: &mut dyn FnMut(Step) -> Result<()>) -> Result<Self> {
        private_directory(runtime)?;
        let host = |doing: String| move |error: io::Error| Error::new(ErrorKind::Host, doing).because(error);
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| host("name the NBD socket".into())(error.into()))?;
        let name = format!("{DIRECTORY_PREFIX}{:016x}", u64::from_ne_bytes(random));
        record(Step::Listener { directory: name.clone() })?;
        let directory = runtime.join(name);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(host(format!("create directory {}", directory.display())))?;
        Ok(Self { socket: None, directory })
    }

    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("socket")
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Usually the step was undone, and the directory is gone.
        if let Err(error) = std::fs::remove_dir_all(&self.directory)
            && error.kind() != io::ErrorKind::NotFound
        {
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
        let listener = Listener::bind(runtime.path(), &mut |_| Ok(())).unwrap();
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
        assert!(Listener::bind(runtime.path(), &mut |_| Ok(())).is_err());
    }
}
