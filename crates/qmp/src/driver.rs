//! The task behind a connection: the only one that reads and writes its socket, so that no caller who is dropped
//! halfway can leave half a command in the stream.

use crate::{
    error::{Error, ErrorKind, shown},
    line::LineDecoder,
    message::{Id, Malformed, Message, parse},
    shared::Shared,
    socket,
};
use std::{
    io,
    os::fd::OwnedFd,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

const CHUNK: usize = 64 << 10;
/// How long commands whose senders are gone are still written, and how long replies are still read from a peer that
/// takes no more commands.
const LINGER: Duration = Duration::from_secs(5);

/// Bytes to write in one piece.
pub(crate) struct Outgoing {
    pub(crate) bytes: Vec<u8>,
    /// Goes with the first byte.
    pub(crate) fd: Option<OwnedFd>,
    /// Told when the first byte was handed to the kernel.
    pub(crate) began: Option<oneshot::Sender<Instant>>,
}

/// Tells everybody that the connection ended, also if the runtime is shut down and drops the driver.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end(Error::new(ErrorKind::Disconnected, "the connection to QEMU was closed"));
    }
}

/// Runs a connection until its peer is gone or breaks the protocol, `released` says that nobody holds it, or it is
/// [handed over](Shared::hand_over). `running` is dropped then.
pub(crate) async fn drive(
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    decoder: LineDecoder,
    outgoing: mpsc::UnboundedReceiver<Outgoing>,
    released: oneshot::Receiver<()>,
    running: watch::Sender<()>,
) {
    // Last of all to be dropped: by then nothing here reads or writes.
    let _running = running;
    let _ending = Ending(Arc::clone(&shared));
    let mut reading = pin!(receive(&stream, &shared, decoder));
    let writing = pin!(transmit(&stream, outgoing, released));
    let end = tokio::select! {
        end = &mut reading => end,
        () = shared.handed_over() => return,
        written = writing => match written {
            Ok(()) => return,
            // A peer that goes away may have answered before: QEMU's last reply is to `quit`.
            Err(error) => timeout(LINGER, reading).await.unwrap_or_else(|_| Error::lost("QEMU", error)),
        },
    };
    tracing::debug!(%end, "the connection to QEMU ended");
    shared.end(end);
}

/// Writes until nobody can queue anything any more.
async fn transmit(
    stream: &UnixStream,
    mut outgoing: mpsc::UnboundedReceiver<Outgoing>,
    released: oneshot::Receiver<()>,
) -> io::Result<()> {
    let mut writing = pin!(async {
        while let Some(Outgoing { bytes, fd, began }) = outgoing.recv().await {
            let mut rest = bytes.as_slice();
            if began.is_some()
                && let Some((half, signal)) = stillpoint_failpoint::torn("pipeline:torn", rest.len())
            {
                let (first, second) = rest.split_at(half);
                socket::send(stream, first, None).await?;
                stillpoint_failpoint::act(signal);
                rest = second;
            }
            let at = socket::send(stream, rest, fd).await?;
            if let Some(began) = began {
                stillpoint_failpoint::reached("pipeline:written");
                // Nobody asks any more.
                let _ = began.send(at);
            }
        }
        Ok(())
    });
    tokio::select! {
        end = &mut writing => end,
        _ = released => timeout(LINGER, writing).await.unwrap_or(Ok(())),
    }
}

/// Reads until the end, and says what that was.
async fn receive(stream: &UnixStream, shared: &Shared, mut decoder: LineDecoder) -> Error {
    let mut chunk = vec![0; CHUNK];
    let mut at = Instant::now();
    loop {
        loop {
            match decoder.next_message() {
                Ok(Some(line)) => {
                    if let Err(error) = deliver(shared, line, at) {
                        return error;
                    }
                }
                Ok(None) => break,
                Err(_) => return Error::new(ErrorKind::Protocol, "QEMU sent a message of more than 16 MiB"),
            }
        }
        match read(stream, &mut chunk).await {
            Ok(0) => {
                return Error::new(
                    ErrorKind::Disconnected,
                    "QEMU closed the monitor's connection, or is gone",
                );
            }
            Ok(read) => {
                at = Instant::now();
                decoder.push(chunk.get(..read).unwrap_or_default());
            }
            Err(error) => return Error::lost("QEMU", error),
        }
    }
}

fn deliver(shared: &Shared, line: &[u8], at: Instant) -> Result<(), Error> {
    match parse(line) {
        Ok(Message::Event(event)) => {
            tracing::debug!(event = %event.name.escape_debug(), "from QEMU");
            shared.event(&event, line.len());
        }
        Ok(Message::Reply { id: Id::Known(id), result }) => {
            if !shared.reply(id, at, result) {
                tracing::debug!(id, "a reply that nobody waits for");
            }
        }
        // QEMU could not read what we sent. It may belong to any pending command, and all of them would else wait for
        // their deadlines, perhaps with the guest paused.
        Ok(Message::Reply { id: Id::Absent, result: Err(error) }) => {
            let context = format!("QEMU could not read a command: {}", shown(error.desc.as_bytes()));
            return Err(Error::new(ErrorKind::Protocol, context));
        }
        Ok(Message::Reply { .. }) => tracing::debug!("a reply to a command that was never sent"),
        Err(malformed) => {
            let context = format!("QEMU sent what is not a QMP message: {}", shown(line));
            let error = Error::new(ErrorKind::Protocol, context);
            return Err(match malformed {
                Malformed::Json(cause) => error.because(cause),
                Malformed::Form => error,
            });
        }
    }
    Ok(())
}

/// Reads what there is, at least a byte; 0 at the end of the stream.
///
/// # Cancellation
/// Dropping the future loses nothing.
pub(crate) async fn read(stream: &UnixStream, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(chunk) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::shared::Wait;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn a_last_reply_is_read_from_a_peer_that_takes_no_more_commands() {
        // Whether the write or the read is tried first is left to chance, hence the rounds.
        for _ in 0..50 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let shared = Arc::new(Shared::default());
            let (quit, late) = (shared.slot("quit").unwrap(), shared.slot("query-status").unwrap());
            theirs
                .write_all(format!("{{\"return\": {{}}, \"id\": {}}}\n", quit.id()).as_bytes())
                .await
                .unwrap();
            drop(theirs);
            let (outgoing, queued) = mpsc::unbounded_channel();
            let (_held, released) = oneshot::channel();
            assert!(outgoing.send(Outgoing { bytes: b"late\n".to_vec(), fd: None, began: None }).is_ok());
            let decoder = LineDecoder::messages(1000);
            let (running, _) = watch::channel(());
            drive(Arc::new(ours), Arc::clone(&shared), decoder, queued, released, running).await;
            let now = tokio::time::Instant::now();
            assert!(quit.wait(now, Wait::AsTheCallerLikes).await.0.is_ok());
            assert_eq!(
                late.wait(now, Wait::AsTheCallerLikes).await.0.unwrap_err().kind(),
                ErrorKind::Disconnected
            );
        }
    }
}
