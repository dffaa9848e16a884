//! A scripted peer for QMP and guest-agent clients: it says exactly what a test tells it to, in any order and as any
//! bytes, and sees exactly what the client sent, with the descriptors that came along.
//!
//! A script is a plain async block over a [`Client`]: what it awaits, be it a command or a channel of the test's, is
//! its order. Anything that the client does against the script panics, which the test sees when it joins the task.
//!
//! It stands alone (std, tokio, serde_json, rustix), so that the crates that this one depends on can include it.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Map, Value, json};
use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
};

/// A listening socket where the client expects a monitor or an agent.
#[derive(Debug)]
pub struct QmpPeer {
    listener: UnixListener,
}

impl QmpPeer {
    /// Listens at `path`.
    ///
    /// # Errors
    /// As `bind` gives.
    pub fn listen(path: &Path) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(path)? })
    }

    /// Awaits a client, and says nothing to it.
    ///
    /// # Panics
    /// If none can be accepted.
    pub async fn accept(&self) -> Client {
        let (stream, _) = self.listener.accept().await.expect("a client can be accepted");
        Client { stream }
    }

    /// Awaits a client, greets it and answers its `qmp_capabilities`: it is then ready for the script.
    ///
    /// # Panics
    /// If the client does anything else.
    pub async fn serve(&self) -> Client {
        let mut client = self.accept().await;
        client.say(&greeting()).await;
        let ready = client.expect("qmp_capabilities").await;
        client.returns(&ready, json!({})).await;
        client
    }
}

/// The greeting of a QEMU 7.2.22.
pub fn greeting() -> Value {
    json!({"QMP": {
        "version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "scripted"},
        "capabilities": ["oob"],
    }})
}

/// A command as it was received.
#[derive(Debug)]
pub struct Received {
    /// Its name.
    pub name: String,
    /// Its arguments; `Null` if it had none.
    pub arguments: Value,
    /// Its id; `Null` if it had none.
    pub id: Value,
    /// What came with its first byte.
    pub fds: Vec<OwnedFd>,
}

/// One client, from the peer's side. Dropping it closes the connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// The next line, without its end, and the descriptors that came with its first byte; `None` if the client closed.
    ///
    /// # Panics
    /// If the client closed within a line, or if a descriptor came later in the line.
    pub async fn line(&mut self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        let (mut line, mut fds) = (Vec::new(), Vec::new());
        loop {
            // Byte by byte, as QEMU reads: the kernel then tells which byte a descriptor came with.
            let Some((byte, with)) = self.byte().await else {
                assert!(line.is_empty(), "the client closed after {} bytes of a line", line.len());
                return None;
            };
            assert!(
                line.is_empty() || with.is_empty(),
                "a descriptor came with byte {} of a line",
                line.len()
            );
            fds.extend(with);
            if byte == b'\n' {
                return Some((line, fds));
            }
            line.push(byte);
        }
    }

    /// The next command, whatever it is; `None` if the client closed. A sentinel before it is passed over.
    ///
    /// # Panics
    /// If what comes is no command.
    pub async fn command(&mut self) -> Option<Received> {
        let (line, fds) = self.line().await?;
        let text = line.strip_prefix(b"\xff").unwrap_or(&line);
        let mut command: Value = serde_json::from_slice(text).expect("a client's line is JSON");
        let mut take = |member: &str| command.get_mut(member).map(Value::take).unwrap_or_default();
        let name = take("execute").as_str().expect("a client's line is a command").to_owned();
        Some(Received { name, arguments: take("arguments"), id: take("id"), fds })
    }

    /// The next command, which is `name`.
    ///
    /// # Panics
    /// If it is another, or if the client closed.
    pub async fn expect(&mut self, name: &str) -> Received {
        let command =
            self.command().await.unwrap_or_else(|| panic!("the client closed instead of sending {name}"));
        assert_eq!(command.name, name, "what the script expects");
        command
    }

    /// Awaits the client's end of the connection.
    ///
    /// # Panics
    /// If it sends something instead.
    pub async fn expect_closed(&mut self) {
        let more = self.line().await;
        assert!(
            more.is_none(),
            "the client sent {:?}",
            more.map(|(line, _)| String::from_utf8_lossy(&line).into_owned())
        );
    }

    /// Answers a command.
    pub async fn returns(&mut self, command: &Received, value: Value) {
        self.answer(command, "return", value).await;
    }

    /// Refuses a command.
    pub async fn refuses(&mut self, command: &Received, class: &str, desc: &str) {
        self.answer(command, "error", json!({"class": class, "desc": desc})).await;
    }

    /// Tells of an event, at 1 700 000 000.000 250 seconds after the epoch.
    pub async fn event(&mut self, name: &str, data: Value) {
        let timestamp = json!({"seconds": 1_700_000_000, "microseconds": 250});
        self.say(&json!({"event": name, "data": data, "timestamp": timestamp})).await;
    }

    /// Sends a message of any form, as one line.
    pub async fn say(&mut self, message: &Value) {
        self.raw(format!("{message}\r\n").as_bytes()).await;
    }

    /// Sends these bytes and nothing else.
    ///
    /// # Panics
    /// If the client is gone.
    pub async fn raw(&mut self, bytes: &[u8]) {
        self.try_raw(bytes).await.expect("the client takes what it is sent");
    }

    /// Sends these bytes to a client that may hang up in between.
    ///
    /// # Errors
    /// If it did.
    pub async fn try_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    async fn answer(&mut self, command: &Received, member: &str, value: Value) {
        let mut answer = Map::from_iter([(member.to_owned(), value)]);
        // An agent's client sends none.
        if !command.id.is_null() {
            answer.insert("id".to_owned(), command.id.clone());
        }
        self.say(&Value::Object(answer)).await;
    }

    async fn byte(&mut self) -> Option<(u8, Vec<OwnedFd>)> {
        let stream = &self.stream;
        let received = stream.async_io(Interest::READABLE, || {
            let mut byte = [0];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
            let mut fds = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(passed) = message {
                    fds.extend(passed);
                }
            }
            Ok((got.bytes, byte, fds))
        });
        match received.await {
            Ok((0, ..)) => None,
            Ok((_, [byte], fds)) => Some((byte, fds)),
            // A client that closes without reading everything resets the connection.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("the client cannot be read from: {error}"),
        }
    }
}
