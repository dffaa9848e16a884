//! From the errors of files, object stores and rustic to the provider's kinds.

use std::io;
use stillpoint_provider::{Error, ErrorKind, Result};

/// What is stored is not what was written.
pub(crate) fn damaged(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, context)
}

/// An error of a store, while `doing`.
pub(crate) fn stored(doing: impl Into<String>, error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::TargetFull,
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => ErrorKind::TargetReadOnly,
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
            ErrorKind::Damaged
        }
        _ => ErrorKind::Io,
    };
    Error::new(kind, doing).because(error)
}

/// An error of rustic, while `doing`. Its own text is a page for a terminal; its causes are what tells.
pub(crate) fn rustic(doing: &str, error: &rustic_core::RusticError) -> Error {
    Error::new(ErrorKind::Io, doing).because(in_one_line(error))
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
