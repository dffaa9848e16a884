//! What the handles and the two tasks of a connection share: who waits for which cookie.

use crate::{
    assembly::Assembly,
    context::Status,
    error::{Error, ErrorKind, Result},
    protocol::{Framing, Request},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use stillpoint_model::Range;
use tokio::{
    io::AsyncWriteExt,
    net::unix::OwnedWriteHalf,
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
};

/// A whole answer.
#[derive(Debug)]
pub(crate) enum Answer {
    Done,
    Bytes(BytesMut),
    Status(Status),
}

/// Who waits for an answer.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// A call of one request.
    Alone(oneshot::Sender<Result<Answer>>),
    /// A read of several, of which this is one.
    Part(Arc<Parts>, usize),
}

impl Waiter {
    fn is_gone(&self) -> bool {
        match self {
            Self::Alone(answer) => answer.is_closed(),
            Self::Part(parts, _) => parts.state().answer.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    fn tell(self, result: Result<Answer>) {
        match self {
            Self::Alone(answer) => {
                let _ = answer.send(result);
            }
            Self::Part(parts, index) => parts.put(index, result),
        }
    }
}

/// A read that is made of several requests. Each fills its part of one buffer; whoever waits is woken once.
#[derive(Debug)]
pub(crate) struct Parts(Mutex<PartsState>);

#[derive(Debug)]
struct PartsState {
    filled: Vec<Option<BytesMut>>,
    missing: usize,
    /// Gone with the first error.
    answer: Option<oneshot::Sender<Result<Answer>>>,
}

impl Parts {
    pub(crate) fn new(count: usize) -> (Arc<Self>, oneshot::Receiver<Result<Answer>>) {
        let (answer, receiver) = oneshot::channel();
        let filled = (0..count).map(|_| None).collect();
        (Arc::new(Self(Mutex::new(PartsState { filled, missing: count, answer: Some(answer) }))), receiver)
    }

    fn state(&self) -> MutexGuard<'_, PartsState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, index: usize, result: Result<Answer>) {
        let mut state = self.state();
        let whole = match (result, state.filled.get_mut(index)) {
            (Ok(Answer::Bytes(bytes)), Some(place @ None)) => {
                *place = Some(bytes);
                state.missing = state.missing.saturating_sub(1);
                if state.missing > 0 {
                    return;
                }
                let mut parts = state.filled.drain(..).flatten();
                let mut whole = parts.next().unwrap_or_default();
                // They are neighbours in one buffer, so that this moves no bytes.
                parts.for_each(|part| whole.unsplit(part));
                Ok(Answer::Bytes(whole))
            }
            // Nobody waits any more for an answer of which a part came as nothing.
            (Ok(_), _) => Err(Error::new(ErrorKind::Disconnected, "nobody waits for this read any more")),
            (Err(error), _) => Err(error),
        };
        if let Some(answer) = state.answer.take() {
            let _ = answer.send(whole);
        }
    }
}

/// A request that the server has not finished answering. It outlives its caller: what it expects must be known to
/// read past a late answer, and its slot is free only when the server is done with it.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) command: u16,
    pub(crate) range: Range,
    pub(crate) assembly: Assembly,
    /// The first error the server sent for it.
    pub(crate) failure: Option<Error>,
    pub(crate) errors: usize,
    waiter: Waiter,
    slot: OwnedSemaphorePermit,
}

impl Pending {
    pub(crate) fn new(
        command: u16,
        range: Range,
        assembly: Assembly,
        waiter: Waiter,
        slot: OwnedSemaphorePermit,
    ) -> Self {
        Self { command, range, assembly, failure: None, errors: 0, waiter, slot }
    }

    /// Whether nobody waits for it any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.waiter.is_gone()
    }

    pub(crate) fn finish(self, result: Result<Answer>) {
        // The slot first: whoever saw the answer may count on it.
        drop(self.slot);
        self.waiter.tell(result);
    }
}

/// A request on its way to the writer.
#[derive(Debug)]
pub(crate) struct Message {
    request: Request,
    payload: Bytes,
}

#[derive(Debug)]
struct Table {
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    /// Gone when the connection is.
    writer: Option<mpsc::UnboundedSender<Message>>,
    /// Why the connection is gone.
    broken: Option<Error>,
}

impl Table {
    fn submit(&mut self, pending: Pending, payload: Bytes) -> Result<()> {
        let Some(writer) = &self.writer else { return Err(broken(self.broken.as_ref())) };
        let cookie = self.next_cookie;
        self.next_cookie = cookie.wrapping_add(1);
        let (offset, length) = (pending.range.start().get(), pending.range.length().get());
        let request = Request { flags: 0, command: pending.command, cookie, offset, length };
        if writer.send(Message { request, payload }).is_err() {
            return Err(broken(self.broken.as_ref()));
        }
        // The reader cannot look for it before the table is unlocked.
        self.pending.insert(cookie, pending);
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    table: Mutex<Table>,
}

impl Shared {
    /// The channel is unbounded because the slots bound what is in it.
    pub(crate) fn new(writer: mpsc::UnboundedSender<Message>) -> Self {
        let table = Table { pending: HashMap::new(), next_cookie: 1, writer: Some(writer), broken: None };
        Self { table: Mutex::new(table) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request, and `payload` with it. There is no await between its entry in the table and its place in the
    /// queue, so a dropped caller leaves both or neither.
    pub(crate) fn submit(&self, pending: Pending, payload: Bytes) -> Result<()> {
        self.table().submit(pending, payload)
    }

    /// Sends several requests at once; after an error the connection is gone, and those that were sent are told.
    pub(crate) fn submit_all(&self, mut pending: impl Iterator<Item = Pending>) -> Result<()> {
        let mut table = self.table();
        pending.try_for_each(|pending| table.submit(pending, Bytes::new()))
    }

    /// Sends the last request and closes the queue behind it.
    pub(crate) fn submit_last(&self, command: u16) -> Result<()> {
        let mut table = self.table();
        let request = Request { flags: 0, command, cookie: 0, offset: 0, length: 0 };
        let message = Message { request, payload: Bytes::new() };
        let sent = table.writer.take().is_some_and(|writer| writer.send(message).is_ok());
        if sent { Ok(()) } else { Err(broken(table.broken.as_ref())) }
    }

    /// Takes out who waits for a cookie.
    pub(crate) fn take(&self, cookie: u64) -> Option<Pending> {
        self.table().pending.remove(&cookie)
    }

    /// Puts it back, since more chunks follow.
    pub(crate) fn put_back(&self, cookie: u64, pending: Pending) {
        let mut table = self.table();
        match &table.broken {
            Some(error) => {
                let error = error.again();
                drop(table);
                pending.finish(Err(error));
            }
            None => {
                table.pending.insert(cookie, pending);
            }
        }
    }

    /// Ends the connection: whoever waits, and whoever comes, gets this error.
    pub(crate) fn fail(&self, error: Error) {
        let mut table = self.table();
        table.writer = None;
        let waiting: Vec<Pending> = table.pending.drain().map(|(_, pending)| pending).collect();
        let first = &*table.broken.get_or_insert(error);
        let errors: Vec<Error> = waiting.iter().map(|_| first.again()).collect();
        drop(table);
        for (pending, error) in waiting.into_iter().zip(errors) {
            pending.finish(Err(error));
        }
    }

    /// Why nothing can be sent.
    pub(crate) fn error(&self) -> Error {
        broken(self.table().broken.as_ref())
    }
}

fn broken(error: Option<&Error>) -> Error {
    error.map_or_else(
        || Error::new(ErrorKind::Disconnected, "the NBD connection was closed by us"),
        Error::again,
    )
}

/// The writer task: sends what is queued, many headers in one write, until the queue is closed and empty.
pub(crate) async fn write(
    mut socket: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Message>,
    framing: Framing,
    shared: Arc<Shared>,
) {
    const BATCH: usize = 32;
    let mut messages = Vec::with_capacity(BATCH);
    let mut headers = BytesMut::with_capacity(BATCH * 32);
    while queue.recv_many(&mut messages, BATCH).await > 0 {
        for message in messages.drain(..) {
            message.request.encode(framing, &mut headers);
            if !message.payload.is_empty() {
                let mut both = bytes::Buf::chain(&mut headers, message.payload);
                if let Err(error) = socket.write_all_buf(&mut both).await {
                    return shared.fail(Error::socket(error, "while it was sent a request"));
                }
            }
        }
        if let Err(error) = socket.write_all_buf(&mut headers).await {
            return shared.fail(Error::socket(error, "while it was sent a request"));
        }
        headers.reserve(BATCH * 32);
    }
    let _ = socket.shutdown().await;
}
