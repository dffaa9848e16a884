//! One error shape: a stable kind, what was done with which file, and the cause.

use std::{error, fmt, io, path::Path};

/// What this crate's calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for code to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no space or quota left.
    Full,
    /// The file system takes no writes.
    ReadOnly,
    /// There is no such file or directory.
    Missing,
    /// There is such a file or directory already.
    Exists,
    /// Somebody else holds the lock.
    Locked,
    /// The file is not what it should be: a link, a directory, or no image of that format and size.
    Damaged,
    /// Anything else.
    Io,
}

/// An error with a file. `Display` is the context alone; the cause is in `source()`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error that no system call told.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// `source`, met while doing `what` with `path`.
    pub fn at(what: &str, path: &Path, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                ErrorKind::Full
            }
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            io::ErrorKind::NotFound => ErrorKind::Missing,
            io::ErrorKind::AlreadyExists => ErrorKind::Exists,
            io::ErrorKind::WouldBlock => ErrorKind::Locked,
            // O_NOFOLLOW tells a link by ELOOP; what should have been a directory is told by ENOTDIR.
            io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => ErrorKind::Damaged,
            _ if source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => ErrorKind::Damaged,
            _ => ErrorKind::Io,
        };
        Self { kind, context: format!("cannot {what} {}", path.display()), source: Some(source) }
    }

    /// The same with another kind.
    pub(crate) fn of_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The cause by itself, for whoever tells the context in an error of its own.
    pub fn into_source(self) -> Option<io::Error> {
        self.source
    }

    /// What to act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
    }
}
