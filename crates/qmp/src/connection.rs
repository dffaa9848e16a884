//! A monitor, as its user sees it.

use crate::{
    command::{Command, Pipelined},
    driver::{self, Outgoing},
    error::{Error, ErrorKind, Result, shown},
    event::EventStream,
    line::LineDecoder,
    process::{is_stopped, stopped_listener},
    shared::{Shared, Slot, Wait},
    socket,
    version::{self, Version},
};
use serde_json::Value;
use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

/// The most bytes a message may have. `query-named-block-nodes` of a VM with many disks and long backing chains has
/// some, but a peer must not fill our memory.
pub(crate) const MESSAGE: usize = 16 << 20;
/// The same for the greeting, which has a few hundred.
const GREETING: usize = 64 << 10;

/// How long QEMU may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// For connecting, the greeting and `qmp_capabilities` together; 5 s by default.
    pub connect: Duration,
    /// For one command, or for all commands of a pipeline; 40 s by default. What waits for a guest's writes on slow storage
    /// (`stop`, whatever drains a disk) can take that long in earnest.
    pub command: Duration,
    /// How much longer [`Qmp::answers_again`] waits for what was not answered within that; 20 s by default.
    pub grace: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            command: Duration::from_secs(40),
            grace: Duration::from_secs(20),
        }
    }
}

/// A connection to the QMP monitor of a QEMU.
///
/// A clone is another handle of the same connection. A task in the background reads and writes; it ends, and the
/// connection closes, when the last handle is dropped or when the peer goes away or breaks the protocol. After such an
/// end every pending and every later call fails with the reason, and event streams end.
///
/// # Silence
/// QEMU runs the commands of a monitor one after the other. Once one was not answered within [`Deadlines::command`], it is
/// *silent*: whatever is pending fails, and every later call fails at once with [`ErrorKind::Silent`] and sends nothing,
/// which QEMU would only run when nobody expects it any more. It ends when QEMU has answered all that was sent.
///
/// # Cancellation
/// A command that was begun (its future was polled once) is sent as a whole, also if its future is dropped then or if
/// its deadline passes; its reply is discarded when it comes, and the connection remains usable. Once the last handle
/// is gone, QEMU has 5 s to take what is still unsent. Whether a command
/// without a reply took effect must be found out by asking.
#[derive(Clone)]
pub struct Qmp {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    stream: Arc<UnixStream>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    /// Dropped with the last handle, which the driver sees.
    _held: oneshot::Sender<()>,
    /// Closed once the driver has ended.
    driving: watch::Receiver<()>,
    /// QEMU keeps only the descriptors that it received last, so a second one must not arrive before the first was
    /// taken.
    descriptors: tokio::sync::Mutex<()>,
    deadlines: Deadlines,
    version: Version,
    peer_pid: Option<u32>,
    path: PathBuf,
}

impl Qmp {
    /// Connects to the monitor whose socket is at `path` and makes it ready for commands. Out-of-band execution is not
    /// enabled, so commands run one by one in the order in which they were sent.
    ///
    /// Needs a tokio runtime with its I/O and time drivers.
    ///
    /// # Errors
    /// [`ErrorKind::NoSocket`], [`ErrorKind::Refused`] and [`ErrorKind::Permission`] as the socket says;
    /// [`ErrorKind::Busy`] if no greeting comes within the deadline, which is what QEMU does to a second client;
    /// [`ErrorKind::Stopped`] if none comes because the process behind the socket is stopped;
    /// [`ErrorKind::NotQmp`] if something else comes; [`ErrorKind::Disconnected`] if the peer closes.
    ///
    /// # Cancellation
    /// Dropping the future closes the connection.
    pub async fn connect(path: &Path, deadlines: Deadlines) -> Result<Self> {
        let deadline = socket::deadline(deadlines.connect);
        let stream = socket::open(path, deadline).await.map_err(|error| {
            // A stopped QEMU lets nobody in, and those that gave up still stand in the socket's queue.
            let stopped_process = (error.kind() == ErrorKind::Busy).then(|| stopped_listener(path)).flatten();
            stopped_process.map_or(error, |pid| stopped(path, pid))
        })?;
        let peer_pid = socket::peer_pid(&stream);
        let mut decoder = LineDecoder::messages(GREETING);
        let greeting = timeout_at(deadline, receive_greeting(&stream, &mut decoder)).await;
        let version = greeting.unwrap_or_else(|_| Err(no_greeting(path, peer_pid, decoder.rest())))?;
        decoder.set_cap(MESSAGE);

        let shared = Arc::new(Shared::default());
        let stream = Arc::new(stream);
        let (outgoing, queued) = mpsc::unbounded_channel();
        let (held, released) = oneshot::channel();
        let (running, driving) = watch::channel(());
        let driver =
            driver::drive(Arc::clone(&stream), Arc::clone(&shared), decoder, queued, released, running);
        tokio::spawn(driver);
        let descriptors = tokio::sync::Mutex::default();
        let inner = Inner {
            shared,
            stream,
            outgoing,
            _held: held,
            driving,
            descriptors,
            deadlines,
            version,
            peer_pid,
            path: path.to_owned(),
        };
        let qmp = Self { inner: Arc::new(inner) };
        let ready = Command::new("qmp_capabilities");
        let ready = qmp.transact(ready, None, deadline, Wait::AsTheCallerLikes).await;
        ready.map_err(|error| match (error.kind(), peer_pid.filter(|pid| is_stopped(*pid))) {
            (ErrorKind::Timeout(_), Some(pid)) => stopped(path, pid),
            _ => error,
        })?;
        tracing::debug!(version = %qmp.inner.version, pid = peer_pid, "connected to QEMU");
        Ok(qmp)
    }

    /// Which QEMU it is.
    pub fn version(&self) -> Version {
        self.inner.version.clone()
    }

    /// The process that made the monitor's socket (`SO_PEERCRED`): QEMU, or who passed QEMU the socket at its start,
    /// as libvirt does. `None` if that is not in our pid namespace.
    pub fn peer_pid(&self) -> Option<u32> {
        self.inner.peer_pid
    }

    /// Whether that process is stopped, by a signal or by a debugger.
    pub fn peer_is_stopped(&self) -> bool {
        self.inner.peer_pid.is_some_and(is_stopped)
    }

    /// The path that the monitor was reached by.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Runs a command and gives what it returned.
    ///
    /// # Errors
    /// [`ErrorKind::Command`] if QEMU refused it; [`ErrorKind::Timeout`] if it was not answered in time;
    /// [`ErrorKind::Silent`] if it was not sent, since another one was not; [`ErrorKind::Disconnected`] or [`ErrorKind::Protocol`] if the connection ended.
    ///
    /// # Cancellation
    /// See [`Qmp`].
    pub async fn execute(&self, command: Command) -> Result<Value> {
        let deadline = socket::deadline(self.inner.deadlines.command);
        self.transact(command, None, deadline, Wait::AsThePeerIsGiven).await
    }

    /// [`Qmp::execute`] with a deadline of its own, which says nothing of QEMU when it has passed.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    ///
    /// # Cancellation
    /// See [`Qmp`].
    pub async fn execute_within(&self, command: Command, deadline: Duration) -> Result<Value> {
        self.transact(command, None, socket::deadline(deadline), Wait::AsTheCallerLikes).await
    }

    /// [`Qmp::execute`], with a descriptor passed along with the command's first byte (`SCM_RIGHTS`): for `getfd` and
    /// `add-fd`. QEMU gets a duplicate, so `fd` may be closed as soon as this returns. Such commands wait for one
    /// another, within the deadline.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`ErrorKind::Io`] if the descriptor cannot be duplicated.
    ///
    /// # Cancellation
    /// See [`Qmp`].
    pub async fn execute_with_fd(&self, command: Command, fd: BorrowedFd<'_>) -> Result<Value> {
        let name = command.name();
        let fd = fd.try_clone_to_owned().map_err(|error| {
            Error::new(ErrorKind::Io, format!("{name}: no descriptor is free")).because(error)
        })?;
        let deadline = socket::deadline(self.inner.deadlines.command);
        let turn = timeout_at(deadline, self.inner.descriptors.lock()).await;
        let _turn = turn.map_err(|_| timed_out(name))?;
        self.transact(command, Some(fd), deadline, Wait::AsThePeerIsGiven).await
    }

    /// Sends all `commands` in one buffer before any reply is awaited, and gives all replies. QEMU runs them in order,
    /// also those after one that failed. One deadline holds for all of them.
    ///
    /// # Errors
    /// Only if nothing was sent; otherwise each command has its own result.
    ///
    /// # Cancellation
    /// See [`Qmp`]: a pipeline that was begun is sent as a whole.
    pub async fn pipeline(&self, commands: Vec<Command>) -> Result<Pipelined> {
        let deadline = socket::deadline(self.inner.deadlines.command);
        let (began, mut begun) = oneshot::channel();
        let slots = self.submit(commands, None, Some(began))?;
        let (mut replies, mut done) = (Vec::new(), Vec::new());
        for slot in slots {
            let (reply, at) = slot.wait(deadline, Wait::AsThePeerIsGiven).await;
            replies.push(reply);
            done.push(at);
        }
        match begun.try_recv() {
            Ok(sent) => Ok(Pipelined { replies, sent, done }),
            Err(_) => match replies.into_iter().find_map(Result::err) {
                Some(error) => Err(error),
                // No command at all: there was nothing to send.
                None => Ok(Pipelined { replies: Vec::new(), sent: std::time::Instant::now(), done }),
            },
        }
    }

    /// Subscribes to events: every one that arrives from now on.
    pub fn events(&self) -> EventStream {
        self.inner.shared.subscribe()
    }

    /// A duplicate of the monitor's socket, for a process that is to act if this one dies. It shares the stream and
    /// its flags (it is non-blocking, and closed on exec), so no two may use it at a time.
    ///
    /// # Errors
    /// If no descriptor is free.
    pub fn try_clone_socket(&self) -> io::Result<OwnedFd> {
        self.inner.stream.as_fd().try_clone_to_owned()
    }

    /// Whether QEMU owes an answer that is overdue: see [`Qmp`].
    pub fn is_silent(&self) -> bool {
        self.inner.shared.is_silent()
    }

    /// Waits until it does, for however long.
    pub async fn silence(&self) {
        self.inner.shared.silence().await;
    }

    /// Whether QEMU answers. If it is silent, waits for it until [`Deadlines::grace`] after the silence began; but one that
    /// falls silent for a second time is given up at once, so that the waiting has an end.
    pub async fn answers_again(&self) -> bool {
        self.inner.shared.answers_again(self.inner.deadlines.grace).await
    }

    /// Leaves the monitor to whoever has a [duplicate of its socket](Qmp::try_clone_socket): when this returns, nothing is
    /// read from it or written to it from here any more, and all calls fail.
    pub async fn hand_over(&self) {
        self.inner.shared.hand_over();
        while self.inner.driving.clone().changed().await.is_ok() {}
    }

    async fn transact(
        &self,
        command: Command,
        fd: Option<OwnedFd>,
        deadline: Instant,
        wait: Wait,
    ) -> Result<Value> {
        let mut slots = self.submit(vec![command], fd, None)?;
        match slots.pop() {
            Some(slot) => slot.wait(deadline, wait).await.0,
            None => Ok(Value::Null),
        }
    }

    /// Queues commands to be written in one piece. From here on they will be sent, whatever becomes of the slots.
    fn submit(
        &self,
        commands: Vec<Command>,
        fd: Option<OwnedFd>,
        began: Option<oneshot::Sender<std::time::Instant>>,
    ) -> Result<Vec<Slot>> {
        let mut bytes = Vec::new();
        let mut slots = Vec::with_capacity(commands.len());
        if let Some(first) = commands.first() {
            stillpoint_failpoint::reached(&format!("qmp:{}", first.name()));
        }
        for command in commands {
            let slot = self.inner.shared.slot(command.name())?;
            tracing::debug!(command = command.name(), id = slot.id(), "to QEMU");
            tracing::trace!(id = slot.id(), arguments = %command.arguments());
            command.encode(slot.id(), &mut bytes);
            slots.push(slot);
        }
        // If the driver has ended, the slots already know why.
        let _ = self.inner.outgoing.send(Outgoing { bytes, fd, began });
        Ok(slots)
    }
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { version, peer_pid, deadlines, .. } = &*self.inner;
        let mut out = f.debug_struct("Qmp");
        out.field("version", version).field("peer_pid", peer_pid).field("deadlines", deadlines);
        out.finish_non_exhaustive()
    }
}

pub(crate) fn timed_out(command: &'static str) -> Error {
    Error::new(ErrorKind::Timeout(command), format!("{command} was not answered within its deadline"))
}

async fn receive_greeting(stream: &UnixStream, decoder: &mut LineDecoder) -> Result<Version> {
    let mut chunk = vec![0; 4096];
    loop {
        match decoder.next_message() {
            Ok(Some(line)) => return version::greeting(line),
            Ok(None) => {}
            Err(_) => return Err(not_qmp(decoder.rest())),
        }
        // Binary protocols greet without ever ending a line.
        if decoder.rest().trim_ascii_start().first().is_some_and(|byte| *byte != b'{') {
            return Err(not_qmp(decoder.rest()));
        }
        let read = driver::read(stream, &mut chunk).await.map_err(|error| Error::lost("QEMU", error))?;
        match chunk.get(..read) {
            Some(bytes) if !bytes.is_empty() => decoder.push(bytes),
            _ if decoder.rest().is_empty() => {
                return Err(Error::new(
                    ErrorKind::Disconnected,
                    "the monitor was closed before its greeting",
                ));
            }
            _ => return Err(not_qmp(decoder.rest())),
        }
    }
}

fn stopped(path: &Path, pid: u32) -> Error {
    let context = format!("process {pid} does not answer on {}: it is stopped (SIGSTOP)", path.display());
    Error::new(ErrorKind::Stopped(pid), context)
}

fn not_qmp(said: &[u8]) -> Error {
    Error::new(ErrorKind::NotQmp, format!("what answers is not a QMP monitor; it says {}", shown(said)))
}

fn no_greeting(path: &Path, pid: Option<u32>, said: &[u8]) -> Error {
    if !said.is_empty() {
        return not_qmp(said);
    }
    if let Some(pid) = pid.filter(|pid| is_stopped(*pid)) {
        return stopped(path, pid);
    }
    let peer = pid.map_or_else(|| "QEMU".to_owned(), |pid| format!("process {pid}"));
    let path = path.display();
    let context = format!(
        "{peer} did not greet us on {path}: a monitor serves one client at a time, so another client most likely holds it"
    );
    Error::new(ErrorKind::Busy, context)
}
