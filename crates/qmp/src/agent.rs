//! The guest agent: a program inside the guest, so nothing that it says can be trusted.

use crate::{
    command::Command,
    connection::timed_out,
    driver,
    error::{Error, ErrorKind, Result, shown},
    line::LineDecoder,
    message::{Malformed, Message, parse},
    socket,
};
use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Value, json};
use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout_at},
};

/// The most bytes that are read for one answer: a line, or all that is discarded before it.
const ANSWER: usize = 64 << 10;
/// Never part of UTF-8, so it ends whatever was begun: sent, it resets the agent's parser; received, the answer to
/// `guest-sync-delimited` follows.
const SENTINEL: u8 = 0xff;
/// What messages call the peer.
const PEER: &str = "the guest agent";

/// Whether the guest's file systems are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FreezeStatus {
    /// They take writes.
    Thawed,
    /// They do not.
    Frozen,
}

/// A connection to the agent of a guest, through the unix socket of its virtio-serial port.
///
/// The agent's protocol has no ids, and the serial port no connections: what an earlier client left unread, or an
/// answer that came too late, stays in the stream. So the stream is brought to a known place with
/// `guest-sync-delimited` when connecting and before any command that follows an unfinished one.
///
/// # Cancellation
/// Dropping the future of a command leaves it unfinished: it may take effect at any later time. The next command
/// synchronises first.
pub struct Agent {
    stream: UnixStream,
    decoder: LineDecoder,
    /// Nothing is under way in either direction.
    in_step: bool,
}

impl Agent {
    /// Connects to the socket at `path` and synchronises with the agent, all within `deadline`.
    ///
    /// # Errors
    /// [`ErrorKind::NoSocket`], [`ErrorKind::Refused`], [`ErrorKind::Permission`] and [`ErrorKind::Busy`] as the
    /// socket says; [`ErrorKind::AgentSilent`] if no agent answers, or if the port has another client;
    /// [`ErrorKind::Protocol`] if more than 64 KiB come before the answer.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self> {
        let deadline = socket::deadline(deadline);
        let stream = socket::open(path, deadline).await?;
        let mut agent = Self { stream, decoder: LineDecoder::lines(ANSWER), in_step: false };
        agent.synchronise(deadline).await?;
        Ok(agent)
    }

    /// Whether file systems are frozen.
    ///
    /// # Errors
    /// [`ErrorKind::Command`] if the agent refused; [`ErrorKind::Timeout`] or [`ErrorKind::AgentSilent`] if it did not
    /// answer within `deadline`; [`ErrorKind::Disconnected`]; [`ErrorKind::Protocol`] if it answered nonsense.
    ///
    /// # Cancellation
    /// See [`Agent`].
    pub async fn fsfreeze_status(&mut self, deadline: Duration) -> Result<FreezeStatus> {
        let name = "guest-fsfreeze-status";
        let answer = self.execute(Command::new(name), deadline).await?;
        match answer.as_str() {
            Some("thawed") => Ok(FreezeStatus::Thawed),
            Some("frozen") => Ok(FreezeStatus::Frozen),
            _ => Err(unexpected(name, &answer)),
        }
    }

    /// Freezes all file systems and says how many.
    ///
    /// # Errors
    /// As [`Agent::fsfreeze_status`]. After any of them the guest may be frozen, now or later: thaw.
    ///
    /// # Cancellation
    /// See [`Agent`].
    pub async fn fsfreeze_freeze(&mut self, deadline: Duration) -> Result<u64> {
        self.count("guest-fsfreeze-freeze", deadline).await
    }

    /// Thaws all file systems and says how many; 0 if none was frozen.
    ///
    /// # Errors
    /// As [`Agent::fsfreeze_status`].
    ///
    /// # Cancellation
    /// See [`Agent`].
    pub async fn fsfreeze_thaw(&mut self, deadline: Duration) -> Result<u64> {
        self.count("guest-fsfreeze-thaw", deadline).await
    }

    /// A duplicate of the agent's socket, for a process that is to act if this one dies. It shares the stream and its
    /// flags (it is non-blocking, and closed on exec), so no two may use it at a time.
    ///
    /// # Errors
    /// If no descriptor is free.
    pub fn try_clone_socket(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    async fn count(&mut self, name: &'static str, deadline: Duration) -> Result<u64> {
        let answer = self.execute(Command::new(name), deadline).await?;
        answer.as_u64().ok_or_else(|| unexpected(name, &answer))
    }

    async fn execute(&mut self, command: Command, deadline: Duration) -> Result<Value> {
        let deadline = socket::deadline(deadline);
        let name = command.name();
        if !self.in_step {
            self.synchronise(deadline).await?;
        }
        tracing::debug!(command = name, "to the guest agent");
        self.in_step = false;
        let exchange = async {
            self.send(&line(&command)).await?;
            let mut budget = ANSWER;
            self.receive(&mut budget).await
        };
        let answer = timeout_at(deadline, exchange).await.unwrap_or_else(|_| Err(timed_out(name)))?;
        match parse(&answer) {
            Ok(Message::Reply { result, .. }) => {
                self.in_step = true;
                result.map_err(|error| Error::refused(PEER, name, error))
            }
            other => {
                let context = format!("{PEER} answered {name} with {}", shown(&answer));
                let error = Error::new(ErrorKind::Protocol, context);
                Err(match other {
                    Err(Malformed::Json(cause)) => error.because(cause),
                    _ => error,
                })
            }
        }
    }

    /// Brings the stream to where nothing is under way: `guest-sync-delimited`, whose answer no one else can have
    /// asked for.
    async fn synchronise(&mut self, deadline: Instant) -> Result<()> {
        self.in_step = false;
        self.decoder.clear();
        let id = random_id()?;
        let mut request = vec![SENTINEL];
        request.extend(line(&Command::with("guest-sync-delimited", json!({"id": id}))));
        let exchange = async {
            self.send(&request).await?;
            let mut budget = ANSWER;
            loop {
                let line = self.receive(&mut budget).await?;
                if answers(&line, id) {
                    return Ok(());
                }
                tracing::debug!(bytes = line.len(), "discarded what the guest agent's port still held");
            }
        };
        let silent = |_| {
            let context = format!(
                "{PEER} does not answer: it is not running, or hangs, or another client holds its port"
            );
            Err(Error::new(ErrorKind::AgentSilent, context))
        };
        timeout_at(deadline, exchange).await.unwrap_or_else(silent)?;
        self.in_step = true;
        Ok(())
    }

    async fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = socket::send(&self.stream, bytes, None).await;
        sent.map(|_| ()).map_err(|error| Error::lost(PEER, error))
    }

    /// The next line, if it takes no more than `budget` bytes, which it uses up.
    async fn receive(&mut self, budget: &mut usize) -> Result<Vec<u8>> {
        let mut chunk = vec![0; 4096];
        let endless =
            || Error::new(ErrorKind::Protocol, format!("{PEER} sent more than 64 KiB for an answer"));
        loop {
            if let Some(line) = self.decoder.next_message().map_err(|_| endless())? {
                return Ok(line.to_vec());
            }
            let read =
                driver::read(&self.stream, &mut chunk).await.map_err(|error| Error::lost(PEER, error))?;
            let bytes = chunk.get(..read).unwrap_or_default();
            if bytes.is_empty() {
                return Err(Error::new(
                    ErrorKind::Disconnected,
                    "QEMU closed the guest agent's connection, or is gone",
                ));
            }
            *budget = budget.checked_sub(read).ok_or_else(endless)?;
            self.decoder.push(bytes);
        }
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("in_step", &self.in_step).finish_non_exhaustive()
    }
}

/// Without an id: old agents refuse one.
fn line(command: &Command) -> Vec<u8> {
    let mut object = json!({"execute": command.name()});
    if let (Some(object), false) = (object.as_object_mut(), command.arguments().is_null()) {
        object.insert("arguments".into(), command.arguments().clone());
    }
    let mut line = object.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Whether a line is the answer to the synchronisation with this id. The sentinel must be there: without it, the line
/// may be the end of something older.
fn answers(line: &[u8], id: u64) -> bool {
    let Some(sentinel) = line.iter().rposition(|byte| *byte == SENTINEL) else { return false };
    let answer = line.get(sentinel + 1..).unwrap_or_default();
    matches!(parse(answer), Ok(Message::Reply { result: Ok(value), .. }) if value.as_u64() == Some(id))
}

/// Fits in the agent's signed 64 bits. Random, so that an answer to another client's synchronisation is not ours.
fn random_id() -> Result<u64> {
    let mut bytes = [0; 8];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(8) => Ok(u64::from_le_bytes(bytes) >> 1),
        Ok(_) => Err(Error::new(ErrorKind::Io, "the kernel gave too few random bytes")),
        Err(error) => {
            Err(Error::new(ErrorKind::Io, "the kernel gave no random bytes").because(io::Error::from(error)))
        }
    }
}

fn unexpected(name: &str, answer: &Value) -> Error {
    Error::new(
        ErrorKind::Protocol,
        format!("{PEER} answered {name} with {}", shown(answer.to_string().as_bytes())),
    )
}
