//! One error shape: a stable kind to act on, what was being done, and the cause.

use std::{error, fmt, io, sync::Arc};

/// What this crate's calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for code to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is nothing at the socket's path (`ENOENT`).
    NoSocket,
    /// The socket is there, but nobody listens on it (`ECONNREFUSED`): its QEMU is gone.
    Refused,
    /// We may not use the socket (`EACCES`, `EPERM`).
    Permission,
    /// Something answers that is not a QMP monitor.
    NotQmp,
    /// Connected, but not served: QEMU serves one client per monitor at a time, and most likely has another one.
    Busy,
    /// The peer closed the connection, or died.
    Disconnected,
    /// This command was not answered within its deadline. Whether it took effect is unknown.
    Timeout(&'static str),
    /// This command was not sent, or its answer is not awaited any more, because QEMU left another one unanswered.
    Silent,
    /// Connected, but QEMU's process, which this is the number of, is stopped (`SIGSTOP`, a debugger) and cannot answer.
    Stopped(u32),
    /// The peer broke the protocol: malformed, too long, not UTF-8, or not the answer that the command has.
    Protocol,
    /// The peer answered with an error; see [`Error::class`] and [`Error::desc`].
    Command,
    /// The guest agent did not answer within the deadline: not installed, not running, hung, or held by another client.
    AgentSilent,
    /// The operating system refused something on our side.
    Io,
}

/// An error of a monitor or an agent. `Display` is the context alone; the cause is in `source()`.
///
/// It can be cloned, because the end of a connection is the answer to every command that was pending.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<Arc<dyn error::Error + Send + Sync>>,
    peer: Option<Box<PeerError>>,
}

/// The `error` member of a reply, as the peer sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PeerError {
    pub(crate) class: String,
    pub(crate) desc: String,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None, peer: None }
    }

    #[must_use]
    pub(crate) fn because(mut self, source: impl error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    pub(crate) fn refused(peer: &str, command: &str, error: PeerError) -> Self {
        let context = format!("{peer} refused {command}: {}", shown(error.desc.as_bytes()));
        Self { kind: ErrorKind::Command, context, source: None, peer: Some(Box::new(error)) }
    }

    /// The same, told of one command that it hit.
    pub(crate) fn during(&self, command: &str) -> Self {
        Self { context: format!("{command} got no answer: {}", self.context), ..self.clone() }
    }

    /// What a command is told that was sent behind the one that this error is of.
    pub(crate) fn behind(&self, command: &str) -> Self {
        Self::new(ErrorKind::Silent, format!("{command} was not answered either: {}", self.context))
    }

    /// What a command is told that was not sent because of the one that this error is of.
    pub(crate) fn instead_of(&self, command: &str) -> Self {
        Self::new(ErrorKind::Silent, format!("{command} was not sent to QEMU: {}", self.context))
    }

    /// The end of a connection, as an error of `read` or `write` tells it.
    pub(crate) fn lost(peer: &str, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected => {
                ErrorKind::Disconnected
            }
            _ => ErrorKind::Io,
        };
        Self::new(kind, format!("the connection to {peer} broke")).because(error)
    }

    /// What to act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The class of an error that the peer answered with, such as `GenericError` or `DeviceNotFound`; `None` for any
    /// other kind than [`ErrorKind::Command`]. As the peer sent it: not for a terminal.
    pub fn class(&self) -> Option<&str> {
        self.peer.as_deref().map(|peer| peer.class.as_str())
    }

    /// The description of an error that the peer answered with; `None` for any other kind than
    /// [`ErrorKind::Command`]. As the peer sent it: not for a terminal, and of any length up to a message's.
    pub fn desc(&self) -> Option<&str> {
        self.peer.as_deref().map(|peer| peer.desc.as_str())
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

/// As much of a peer's text as fits in a message, with nothing in it that a terminal would act on.
pub(crate) fn shown(text: &[u8]) -> String {
    const CHARACTERS: usize = 160;
    // No character has more than 4 bytes, so this prefix always holds enough of them.
    let prefix = text.get(..4 * CHARACTERS).unwrap_or(text);
    let lossy = String::from_utf8_lossy(prefix);
    let mut out: String = lossy.chars().take(CHARACTERS).flat_map(char::escape_debug).collect();
    if prefix.len() < text.len() || lossy.chars().nth(CHARACTERS).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn untrusted_text_is_escaped_and_shortened() {
        assert_eq!(shown(b"plain"), "plain");
        assert_eq!(shown(b"\x1b[2Jred\n"), "\\u{1b}[2Jred\\n");
        assert_eq!(shown(b"\xff"), "\u{fffd}");
        assert_eq!(shown(&b"x".repeat(160)), "x".repeat(160));
        let long = shown(&b"x".repeat(10_000_000));
        assert_eq!(long, format!("{}…", "x".repeat(160)));
        assert_eq!(shown("é".repeat(161).as_bytes()), format!("{}…", "é".repeat(160)));
    }

    #[test]
    fn display_is_the_context_and_the_cause_is_the_source() {
        let error = Error::lost("QEMU", io::Error::from(io::ErrorKind::BrokenPipe)).during("stop");
        assert_eq!(error.kind(), ErrorKind::Disconnected);
        assert_eq!(error.to_string(), "stop got no answer: the connection to QEMU broke");
        assert!(error::Error::source(&error).is_some_and(|cause| cause.to_string().contains("broken pipe")));
        assert_eq!((error.class(), error.desc()), (None, None));
    }
}
