//! One error shape: a stable kind to act on, what was being done, and the cause.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{error, fmt};

/// What a provider's calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for code to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The target is not there: nothing at its path, nothing mounted, never made.
    TargetMissing,
    /// Something is there that is not a target of this provider, or not the one that was there before.
    TargetForeign,
    /// The target refuses writes.
    TargetReadOnly,
    /// The target is full.
    TargetFull,
    /// The target, or what leads to it, does not accept who we say we are: a password, key, token or user.
    Unauthorized,
    /// The target's host does not answer, or its name leads nowhere.
    Unreachable,
    /// What the configuration or the caller says makes no sense to the provider: a malformed location, an option of the
    /// wrong form.
    InvalidInput,
    /// The provider, or this target, cannot do what was asked for.
    Unsupported,
    /// Another run works on this VM in this target.
    Locked,
    /// There is no such point, disk or VM.
    NotFound,
    /// What is stored is not what was written, or is not readable as what it claims to be.
    Damaged,
    /// Reading the disk at its point failed.
    Source,
    /// The run was cancelled.
    Cancelled,
    /// The commit's fate is unknown: the point may be durable or not. Both bitmaps are then kept.
    CommitUnknown,
    /// Anything else that the target did.
    Io,
}

/// An error of a provider. `Display` is the kind's context alone; the cause is in `source()`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    next: Option<String>,
    source: Option<Box<dyn error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` says what was being done with what, as a person would read it.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), next: None, source: None }
    }

    /// The same with its cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same with what a person should check or type next, where the kind alone does not say it well enough.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// What a person should check or type next; of the outermost cause that knows.
    pub fn what_next(&self) -> Option<&str> {
        let cause = || self.source.as_ref()?.downcast_ref::<Self>()?.what_next();
        self.next.as_deref().or_else(cause)
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
