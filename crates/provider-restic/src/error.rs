//! From the errors of files, object stores and rustic to the provider's kinds.

use std::{fmt, io};
use stillpoint_provider::{Error, ErrorKind, Result};

/// What is stored is not what was written.
pub(crate) fn damaged(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, context)
}

/// What a store knows about its failure that an [`io::ErrorKind`] cannot say. It travels inside an [`io::Error`], also
/// through rustic.
#[derive(Debug)]
pub(crate) struct Fault {
    pub kind: ErrorKind,
    text: String,
    next: Option<String>,
}

impl Fault {
    pub(crate) fn new(kind: ErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), next: None }
    }

    /// With what a person should check or type next.
    #[must_use]
    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// The same, told of the file at `path` where it may be about that file alone.
    #[must_use]
    pub(crate) fn at(mut self, path: &str) -> Self {
        if matches!(self.kind, ErrorKind::Io | ErrorKind::TargetFull | ErrorKind::TargetReadOnly) {
            self.text = format!("{path}: {}", self.text);
        }
        self
    }

    /// As an error of its own, of what was being done.
    pub(crate) fn while_doing(self, doing: impl Into<String>) -> Error {
        stored(doing, self.into())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        let kind = match fault.kind {
            ErrorKind::Unauthorized | ErrorKind::TargetReadOnly => io::ErrorKind::PermissionDenied,
            ErrorKind::TargetFull => io::ErrorKind::StorageFull,
            ErrorKind::Unreachable => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, fault)
    }
}

fn fault(error: &io::Error) -> Option<&Fault> {
    error.get_ref()?.downcast_ref()
}

fn kind_of(error: &io::Error) -> ErrorKind {
    if let Some(fault) = fault(error) {
        return fault.kind;
    }
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::TargetFull,
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => ErrorKind::TargetReadOnly,
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
            ErrorKind::Damaged
        }
        // A network file system whose server has gone.
        io::ErrorKind::StaleNetworkFileHandle
        | io::ErrorKind::NotConnected
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::NetworkDown
        | io::ErrorKind::TimedOut => ErrorKind::Unreachable,
        _ => ErrorKind::Io,
    }
}

/// An error of a store, while `doing`.
pub(crate) fn stored(doing: impl Into<String>, error: io::Error) -> Error {
    let told = Error::new(kind_of(&error), doing);
    let told = match fault(&error).and_then(|fault| fault.next.clone()) {
        Some(next) => told.next(next),
        None => told,
    };
    told.because(error)
}

/// An error of rustic, while `doing`. Its own text is a page for a terminal; its causes are what tells. Where the store
/// was the cause, its kind is the error's.
pub(crate) fn rustic(doing: &str, error: &rustic_core::RusticError) -> Error {
    rustic_or(ErrorKind::Io, doing, error)
}

/// The same, of `otherwise` where it is not the store's fault.
pub(crate) fn rustic_or(otherwise: ErrorKind, doing: &str, error: &rustic_core::RusticError) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    let mut store = None;
    while let Some(error) = cause {
        store = error.downcast_ref::<io::Error>();
        cause = if store.is_some() { None } else { error.source() };
    }
    let told = Error::new(store.map_or(otherwise, kind_of), doing);
    let told = match store.and_then(fault).and_then(|fault| fault.next.clone()) {
        Some(next) => told.next(next),
        None => told,
    };
    told.because(in_one_line(error))
}

/// An error with its causes on one line.
pub(crate) fn in_one_line(error: &dyn std::error::Error) -> String {
    let mut line = first_line(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = first_line(&error.to_string());
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

fn first_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    // rustic begins with an apology and a heading.
    let mut lines = lines.filter(|line| {
        !line.starts_with("Well, this is embarrassing") && !line.starts_with('`') && *line != "Message:"
    });
    lines.next().unwrap_or("unknown").chars().take(300).collect()
}

/// Runs blocking work on a thread made for it. A panic there is a fault of ours or of a library that met damage; either way it
/// ends this call and not the process.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    stillpoint_provider::blocking(work, "a library failed on what the repository holds").await
}

#[cfg(test)]
mod test {
    use super::*;
    use rustic_core::RusticError;

    #[test]
    fn the_kind_of_a_stores_failure_survives_rustic() {
        let fault = || Fault::new(ErrorKind::Unreachable, "host refuses the connection").next("start it");
        let direct = fault().while_doing("cannot list");
        assert_eq!((direct.kind(), direct.what_next()), (ErrorKind::Unreachable, Some("start it")));
        let wrapped = RusticError::with_source(
            rustic_core::ErrorKind::Backend,
            "access failed",
            io::Error::from(fault()),
        );
        let error = rustic("cannot prune", &wrapped);
        assert_eq!((error.kind(), error.what_next()), (ErrorKind::Unreachable, Some("start it")));
        assert!(in_one_line(&error).contains("refuses the connection"), "{}", in_one_line(&error));
        let own = RusticError::new(rustic_core::ErrorKind::Internal, "a fault of rustic's");
        assert_eq!(rustic_or(ErrorKind::Damaged, "cannot open", &own).kind(), ErrorKind::Damaged);
    }

    #[test]
    fn what_the_kernel_says_has_its_kind() {
        for (errno, kind) in [
            (rustix::io::Errno::NOSPC, ErrorKind::TargetFull),
            (rustix::io::Errno::DQUOT, ErrorKind::TargetFull),
            (rustix::io::Errno::ROFS, ErrorKind::TargetReadOnly),
            (rustix::io::Errno::ACCESS, ErrorKind::TargetReadOnly),
            (rustix::io::Errno::STALE, ErrorKind::Unreachable),
            (rustix::io::Errno::NOTCONN, ErrorKind::Unreachable),
            (rustix::io::Errno::TIMEDOUT, ErrorKind::Unreachable),
            (rustix::io::Errno::NOENT, ErrorKind::Damaged),
            (rustix::io::Errno::IO, ErrorKind::Io),
        ] {
            assert_eq!(stored("write", errno.into()).kind(), kind, "{errno:?}");
        }
    }
}
