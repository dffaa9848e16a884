//! One error shape: a stable kind to act on, what was being done, and the cause.

use crate::protocol::Errno;
use std::{error, fmt};

/// What this crate's calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for code to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no socket at the path.
    NoSocket,
    /// Nobody listens there, or the server does not want us (TLS required, a policy, shutting down).
    Refused,
    /// What answers is not an NBD server of the fixed newstyle kind.
    NotNbd,
    /// The server has no export of that name.
    NoSuchExport,
    /// The map that was asked for was not negotiated: the server does not have it.
    MissingContext,
    /// The server broke the protocol. Nothing more can be done with this connection.
    Protocol,
    /// The server refused or failed one request; the connection goes on.
    Server {
        /// NBD's code for the reason.
        errno: Errno,
    },
    /// No answer within the deadline. The connection goes on, and the late answer is thrown away.
    Timeout,
    /// The connection is gone, or was closed by us.
    Disconnected,
    /// The caller asked for what the export cannot have: past its end, too long, unaligned, a write to a read-only
    /// export. Nothing was sent.
    Limits,
    /// The operating system failed the socket in another way.
    Io,
}

/// An error of the NBD client. `Display` is the context alone; the cause is in `source()`.
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

    pub(crate) fn protocol(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Protocol, context)
    }

    pub(crate) fn limits(context: impl Into<String>) -> Self {
        Self::new(ErrorKind::Limits, context)
    }

    #[must_use]
    pub(crate) fn because(mut self, source: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// A failed read or write of the socket while `doing` something.
    pub(crate) fn socket(error: std::io::Error, doing: &str) -> Self {
        use std::io::ErrorKind as Kind;
        match error.kind() {
            Kind::UnexpectedEof
            | Kind::ConnectionReset
            | Kind::BrokenPipe
            | Kind::WriteZero
            | Kind::ConnectionAborted => {
                Self::new(ErrorKind::Disconnected, format!("NBD server closed the connection {doing}"))
            }
            _ => Self::new(ErrorKind::Io, format!("NBD socket failed {doing}")).because(error),
        }
    }

    /// The same for one more of those who wait on a connection that failed once; the cause stays with the first.
    pub(crate) fn again(&self) -> Self {
        let cause = self.source.as_ref().map(|source| format!(": {source}")).unwrap_or_default();
        Self::new(self.kind, format!("{}{cause}", self.context))
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

/// What a server wrote, fit for a message: escaped, at most 120 characters of it.
pub(crate) fn quote(bytes: &[u8]) -> String {
    const MOST: usize = 120;
    let text = String::from_utf8_lossy(bytes);
    let escaped: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    let more = if text.chars().nth(MOST).is_some() { "..." } else { "" };
    format!("\"{escaped}{more}\"")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_servers_text_is_escaped_and_shortened() {
        let quoted = quote(b"\x1b[31m\n\xff");
        assert!(quoted.chars().all(|c| !c.is_control()), "{quoted:?}");
        let long = quote("\u{7}".repeat(5000).as_bytes());
        assert!(long.len() < 1000 && long.ends_with("...\""), "{long}");
    }
}
