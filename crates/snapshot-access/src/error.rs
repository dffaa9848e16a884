//! One error shape: a stable kind to act on, what was being done, and the cause.

use std::{error, fmt};

/// What this crate's calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for code to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// This VM is refused, because going on is known to harm its guest or to give a wrong point.
    Refused,
    /// The host has too little space left for old data; nothing was done to the VM.
    NoSpace,
    /// QEMU answered a command with an error.
    Qmp,
    /// QEMU does not answer. What was sent to it may still take effect.
    Silent,
    /// The disk could not be read at its point.
    Read,
    /// Somebody else changed the block graph meanwhile; begun again, the run sees what there is now.
    Changed,
    /// What QEMU says does not add up.
    Inconsistent,
    /// The host refused something: a directory, a socket, a file.
    Host,
    /// Something of ours is still in the VM.
    LeftBehind,
    /// Another run works on this VM.
    Locked,
    /// The run was to be cancelled.
    Cancelled,
    /// The VM's QEMU has ended.
    Ended,
}

/// An error of this crate. `Display` is the context alone; the cause is in `source()`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
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
        self.source.as_deref().map(|source| source as _)
    }
}
