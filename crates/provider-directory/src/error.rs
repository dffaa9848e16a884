//! From the errors of image files to the provider's kinds.

use rustix::io::Errno;
use stillpoint_image as image;
use stillpoint_provider::{Error, ErrorKind, Result};

/// The kind that an image's error has for a job.
pub(crate) fn kind_of(error: &image::Error) -> ErrorKind {
    match error.kind() {
        image::ErrorKind::Full => ErrorKind::TargetFull,
        image::ErrorKind::ReadOnly => ErrorKind::TargetReadOnly,
        image::ErrorKind::Damaged => ErrorKind::Damaged,
        image::ErrorKind::Locked => ErrorKind::Locked,
        _ => ErrorKind::Io,
    }
}

/// Turns an image's error into ours. Both contexts would say the same, so the image's becomes ours and its cause ours.
pub(crate) fn from_image(error: image::Error) -> Error {
    let kind = kind_of(&error);
    with_cause(kind, error)
}

/// The same while reading what must be there: whatever is missing is damage.
pub(crate) fn stored(error: image::Error) -> Error {
    let kind = match error.kind() {
        image::ErrorKind::Missing | image::ErrorKind::Io => ErrorKind::Damaged,
        _ => kind_of(&error),
    };
    with_cause(kind, error)
}

fn with_cause(kind: ErrorKind, error: image::Error) -> Error {
    let context = error.to_string();
    match error.into_source() {
        Some(source) => Error::new(kind, context).because(source),
        None => Error::new(kind, context),
    }
}

/// Nobody waits for the outcome any more.
pub(crate) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the examination was cancelled")
}

pub(crate) fn damaged(context: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, context)
}

/// An error with its causes on one line, for a listing or a finding, which have no place for a chain.
pub(crate) fn in_one_line(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

/// What the system said, if it is at the bottom of `error`.
pub(crate) fn system_error(error: &Error) -> Option<i32> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let number = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        if number.is_some() {
            return number;
        }
        cause = error.source();
    }
    None
}

/// Whether the system could not tell what a file holds, so that it may be good all the same: no right to read it, a medium that gives
/// errors, a file system that has gone. Only damage of which this is not so is reason to remove something.
pub(crate) fn may_pass(error: &Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::ISDIR, Errno::LOOP];
    system_error(error).is_some_and(|number| gone.iter().all(|errno| errno.raw_os_error() != number))
}

/// Runs blocking work on a thread made for it. A panic there is a fault of ours or of a library that met damage; either way it
/// ends this call and not the process.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    stillpoint_provider::blocking(work, "an image made its reader fail").await
}
