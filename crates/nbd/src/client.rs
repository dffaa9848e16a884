//! The client's face: one connection to one export.

use crate::{
    assembly::{Assembly, ReadAssembly},
    context::{MetaContext, Status, missing},
    error::{Error, ErrorKind, Result},
    handshake::{Negotiated, negotiate},
    options::{Deadlines, Options},
    protocol::{BlockSizes, Framing, TransmissionFlags, command},
    reply::{Reader, command_name},
    shared::{Answer, Parts, Pending, Shared, Waiter, write},
};
use bytes::Bytes;
use std::{io, path::Path, sync::Arc, time::Duration};
use stillpoint_buffer as buffer;
use stillpoint_model::{Length, Offset, Range};
use tokio::{
    io::BufReader,
    net::UnixStream,
    sync::{Semaphore, mpsc, oneshot, watch},
    task::AbortHandle,
    time::timeout,
};

/// Trims and zeroing are sent in parts that end on multiples of this: well below the 4 GiB a compact request can say
/// and the 2 GiB that QEMU takes at once, and no part is unaligned unless the caller's range is.
const MAX_EFFECT: Length = Length::new(1 << 30);
/// The most a block status may ask for without extended headers; a multiple of every block size.
const MAX_COMPACT_STATUS: Length = Length::new((1 << 32) - (1 << 16));
/// What the reader takes from the socket at a time when it looks for a header. Small, because whatever of a large
/// payload comes with it is copied once more.
const HEADER_BUFFER: usize = 4096;

/// One connection to one export. Clones share the connection and its slots; it ends when the last is dropped.
///
/// # Deadlines
/// Every call ends by [`Deadlines::request`] (a long trim, write or map: each of the requests it makes). After
/// [`ErrorKind::Timeout`] the request may still be executed; its late answer is read and thrown away, and its slot
/// is taken until then.
///
/// # Cancellation
/// Dropping the future of a request is safe at any point: a request that was already queued is sent and may be
/// executed, and its answer is read and thrown away. Dropping that of a connecting call closes the socket. Dropping
/// that of [`Client::disconnect`] leaves the connection to the other clones, perhaps with the farewell sent.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    negotiated: Negotiated,
    deadlines: Deadlines,
    slots: Arc<Semaphore>,
    slot_count: u32,
    shared: Arc<Shared>,
    /// Ends with the reader task.
    reading: watch::Receiver<()>,
    tasks: [AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Client {
    /// Connects to the unix socket at `path` and opens the export.
    ///
    /// A map that the server does not have is no error here; see [`Client::has_context`].
    ///
    /// # Errors
    /// [`ErrorKind::NoSocket`], [`ErrorKind::Refused`], and those of [`Client::from_stream`].
    pub async fn connect_unix(path: &Path, options: Options) -> Result<Self> {
        let limit = options.deadlines.connect;
        let connecting = async {
            let stream = UnixStream::connect(path).await.map_err(|error| unreachable(path, error))?;
            Self::open(stream, options).await
        };
        within(limit, connecting, || format!("opening the NBD export at {}", path.display())).await
    }

    /// Opens the export over a connected socket of which nothing was read.
    ///
    /// # Errors
    /// [`ErrorKind::NotNbd`], [`ErrorKind::NoSuchExport`], [`ErrorKind::Refused`], [`ErrorKind::Protocol`],
    /// [`ErrorKind::Timeout`], [`ErrorKind::Disconnected`], [`ErrorKind::Limits`] for names over 4096 bytes.
    pub async fn from_stream(stream: UnixStream, options: Options) -> Result<Self> {
        let limit = options.deadlines.connect;
        within(limit, Self::open(stream, options), || "opening the NBD export".to_owned()).await
    }

    async fn open(mut stream: UnixStream, options: Options) -> Result<Self> {
        let negotiated = negotiate(&mut stream, &options).await?;
        let slot_count = options.in_flight.clamp(1, 1 << 16);
        let (sender, queue) = mpsc::unbounded_channel();
        let (alive, reading) = watch::channel(());
        let shared = Arc::new(Shared::new(sender));
        let (receiving, sending) = stream.into_split();
        let reader = Reader {
            socket: BufReader::with_capacity(HEADER_BUFFER, receiving),
            framing: negotiated.framing,
            contexts: negotiated.contexts.clone().into(),
            shared: shared.clone(),
        };
        let reader = tokio::spawn(async move {
            reader.run().await;
            drop(alive);
        });
        let writer = tokio::spawn(write(sending, queue, negotiated.framing, shared.clone()));
        let inner = Inner {
            negotiated,
            deadlines: options.deadlines,
            slots: Arc::new(Semaphore::new(slot_count)),
            slot_count: u32::try_from(slot_count).unwrap_or(1),
            shared,
            reading,
            tasks: [reader.abort_handle(), writer.abort_handle()],
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The export's size, at most `i64::MAX` bytes.
    pub fn size(&self) -> Length {
        self.inner.negotiated.size
    }

    /// What the export can do.
    pub fn flags(&self) -> TransmissionFlags {
        self.inner.negotiated.flags
    }

    /// What requests must be aligned to and how long they may be. The maximum is 32 MiB if the server says more.
    pub fn block_sizes(&self) -> BlockSizes {
        self.inner.negotiated.block_sizes
    }

    /// How the server frames its replies.
    pub fn framing(&self) -> Framing {
        self.inner.negotiated.framing
    }

    /// Whether the server has the map, among those asked for.
    pub fn has_context(&self, context: &MetaContext) -> bool {
        self.inner.negotiated.contexts.iter().any(|(_, known)| known == context)
    }

    /// Reads a range of at most [`BlockSizes::maximum`] bytes with one request: all of it, or an error.
    ///
    /// # Errors
    /// [`ErrorKind::Limits`] for a range that is unaligned, too long or not in the export, [`ErrorKind::Server`] if
    /// the server fails it, and those of a broken connection.
    pub async fn read(&self, range: Range) -> Result<Bytes> {
        self.check(range, command::READ)?;
        if range.length().get() > self.block_sizes().maximum.into() {
            let most = self.block_sizes().maximum;
            return Err(Error::limits(format!(
                "a read of {range} is longer than the export's {most} bytes at a time"
            )));
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        match self
            .request(command::READ, range, Bytes::new(), Assembly::Read(ReadAssembly::new(range)))
            .await?
        {
            Answer::Bytes(bytes) => Ok(buffer::freeze(bytes)),
            _ => Err(mismatch()),
        }
    }

    /// Reads a range with requests of at most `most` bytes, which end on multiples of `most`: all of it, or an error.
    /// Costs little more than one request: the parts land in one buffer, and the caller is woken once.
    ///
    /// # Errors
    /// As for [`Client::read`], but a range may be longer than [`BlockSizes::maximum`].
    pub async fn read_in_parts(&self, range: Range, most: Length) -> Result<Bytes> {
        self.check(range, command::READ)?;
        let most = most.min(Length::new(self.block_sizes().maximum.into()));
        let parts: Vec<Range> = range.chunks(most).collect();
        if parts.len() <= 1 {
            return self.read(range).await;
        }
        let inner = &self.inner;
        let answering = async {
            let (whole, answer) = Parts::new(parts.len());
            let mut room = buffer::take(usize::try_from(range.length().get()).unwrap_or(0));
            let mut index = 0..parts.len();
            for batch in parts.chunks(usize::try_from(inner.slot_count).unwrap_or(1)) {
                let wanted = u32::try_from(batch.len()).unwrap_or(1);
                let slots = inner.slots.clone().acquire_many_owned(wanted).await;
                let mut slots = slots.map_err(|_| inner.shared.error())?;
                inner.shared.submit_all(batch.iter().zip(&mut index).filter_map(|(part, index)| {
                    let length = usize::try_from(part.length().get()).unwrap_or(usize::MAX);
                    let rest = room.split_off(length.min(room.capacity()));
                    let into = ReadAssembly::into(*part, std::mem::replace(&mut room, rest));
                    let waiter = Waiter::Part(Arc::clone(&whole), index);
                    Some(Pending::new(command::READ, *part, Assembly::Read(into), waiter, slots.split(1)?))
                }))?;
            }
            drop(whole);
            answer.await.unwrap_or_else(|_| Err(inner.shared.error()))
        };
        let doing = || format!("the read of {range}");
        match within(inner.deadlines.request, answering, doing).await? {
            Answer::Bytes(bytes) if bytes.len() as u64 == range.length().get() => Ok(buffer::freeze(bytes)),
            _ => Err(mismatch()),
        }
    }

    /// Writes `data` at `offset`, in requests of at most [`BlockSizes::maximum`] bytes, one after the other. After
    /// an error some of them may be written.
    ///
    /// # Errors
    /// As for [`Client::read`]; [`ErrorKind::Limits`] also for an export that is read-only.
    pub async fn write(&self, offset: Offset, mut data: Bytes) -> Result<()> {
        let whole = Range::new(offset, Length::new(u64::try_from(data.len()).unwrap_or(u64::MAX)))
            .map_err(|error| Error::limits("a write that no disk can hold").because(error))?;
        self.check(whole, command::WRITE)?;
        let most = self.block_sizes();
        let most = u64::from(most.maximum - most.maximum % most.minimum);
        for part in whole.chunks(Length::new(most)) {
            let length = usize::try_from(part.length().get()).unwrap_or(usize::MAX).min(data.len());
            let payload = data.split_to(length);
            self.request(command::WRITE, part, payload, Assembly::Nothing).await?;
        }
        Ok(())
    }

    /// Tells the server that the range is not needed any more. Ranges over 1 GiB are split at multiples of 1 GiB.
    /// What it reads as afterwards is the server's choice.
    ///
    /// # Errors
    /// As for [`Client::write`]; [`ErrorKind::Limits`] also if the export does not take trims.
    pub async fn trim(&self, range: Range) -> Result<()> {
        self.effect(command::TRIM, range, self.flags().can_trim()).await
    }

    /// Makes the range read as zeroes. Ranges over 1 GiB are split at multiples of 1 GiB.
    ///
    /// # Errors
    /// As for [`Client::write`]; [`ErrorKind::Limits`] also if the export does not take zeroing.
    pub async fn write_zeroes(&self, range: Range) -> Result<()> {
        self.effect(command::WRITE_ZEROES, range, self.flags().can_write_zeroes()).await
    }

    async fn effect(&self, which: u16, range: Range, can: bool) -> Result<()> {
        self.check(range, which)?;
        if !can {
            return Err(Error::limits(format!(
                "the NBD export does not take {} requests",
                command_name(which)
            )));
        }
        for part in range.chunks(MAX_EFFECT) {
            self.request(which, part, Bytes::new(), Assembly::Nothing).await?;
        }
        Ok(())
    }

    /// Makes durable what was written and acknowledged before. An export that cannot flush has nothing to flush.
    ///
    /// # Errors
    /// [`ErrorKind::Server`] and those of a broken connection.
    pub async fn flush(&self) -> Result<()> {
        if self.flags().can_flush() {
            let nothing = Range::new(Offset::ZERO, Length::ZERO).map_err(|_| mismatch())?;
            self.request(command::FLUSH, nothing, Bytes::new(), Assembly::Nothing).await?;
        }
        Ok(())
    }

    /// Asks once what all negotiated maps say of a range. The answer may cover less than the range, never more, and
    /// covers at least its first extent.
    ///
    /// # Errors
    /// [`ErrorKind::MissingContext`] if no map was negotiated, [`ErrorKind::Limits`] for an empty range, otherwise
    /// as for [`Client::read`].
    pub async fn block_status(&self, range: Range) -> Result<Status> {
        let contexts = self.inner.negotiated.contexts.len();
        if contexts == 0 {
            return Err(Error::new(ErrorKind::MissingContext, "no map was negotiated with the NBD server"));
        }
        self.check(range, command::BLOCK_STATUS)?;
        if range.is_empty() {
            return Err(Error::limits("the block status of an empty range"));
        }
        let range = match self.framing() {
            Framing::Extended => range,
            _ => {
                let most = range.length().get().min(MAX_COMPACT_STATUS.get());
                Range::new(range.start(), Length::new(most)).map_err(|_| mismatch())?
            }
        };
        let empty = (0..contexts).map(|_| None).collect();
        match self.request(command::BLOCK_STATUS, range, Bytes::new(), Assembly::Status(empty)).await? {
            Answer::Status(status) => Ok(status),
            _ => Err(mismatch()),
        }
    }

    pub(crate) fn require(&self, context: &MetaContext) -> Result<()> {
        if self.has_context(context) { Ok(()) } else { Err(missing(context)) }
    }

    /// Waits until all requests in flight are answered, says farewell (`NBD_CMD_DISC`) and closes. Requests that
    /// other clones make meanwhile fail with [`ErrorKind::Disconnected`].
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if what is in flight is not answered in time, and those of a connection that broke
    /// before. The connection is closed all the same.
    pub async fn disconnect(self) -> Result<()> {
        let inner = &self.inner;
        let closing = async {
            let drained = inner.slots.acquire_many(inner.slot_count).await;
            drained.map_err(|_| inner.shared.error())?.forget();
            inner.slots.close();
            inner.shared.submit_last(command::DISC)?;
            // The server closes its end in answer; then the reader sees the end and stops.
            while inner.reading.clone().changed().await.is_ok() {}
            Ok(())
        };
        let result =
            within(inner.deadlines.request, closing, || "closing the NBD connection".to_owned()).await;
        self.abandon();
        result
    }

    /// Closes at once, whatever is in flight: for a server that is known not to answer. All requests, of other clones too,
    /// fail with [`ErrorKind::Disconnected`].
    pub fn abandon(&self) {
        let inner = &self.inner;
        inner.slots.close();
        for task in &inner.tasks {
            task.abort();
        }
        inner.shared.fail(Error::new(ErrorKind::Disconnected, "the NBD connection was closed by us"));
    }

    fn check(&self, range: Range, which: u16) -> Result<()> {
        let what = command_name(which);
        let size = self.size().get();
        if range.end().get() > size {
            return Err(Error::limits(format!("a {what} of {range} in an NBD export of {size} bytes")));
        }
        let minimum = u64::from(self.block_sizes().minimum);
        let aligned = |at: Offset| at.get().is_multiple_of(minimum) || at.get() == size;
        if !aligned(range.start()) || !aligned(range.end()) {
            return Err(Error::limits(format!(
                "a {what} of {range} is not aligned to the NBD export's {minimum} bytes"
            )));
        }
        let changes = matches!(which, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if changes && self.flags().read_only() {
            return Err(Error::limits(format!("a {what} of {range} in a read-only NBD export")));
        }
        Ok(())
    }

    async fn request(&self, which: u16, range: Range, payload: Bytes, assembly: Assembly) -> Result<Answer> {
        let inner = &self.inner;
        let answering = async {
            let slot = inner.slots.clone().acquire_owned().await.map_err(|_| inner.shared.error())?;
            let (waiter, answer) = oneshot::channel();
            let pending = Pending::new(which, range, assembly, Waiter::Alone(waiter), slot);
            inner.shared.submit(pending, payload)?;
            answer.await.unwrap_or_else(|_| Err(inner.shared.error()))
        };
        let doing = || format!("the {} of {range}", command_name(which));
        within(inner.deadlines.request, answering, doing).await
    }
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T>>,
    doing: impl FnOnce() -> String,
) -> Result<T> {
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => {
            let seconds = limit.as_secs_f64();
            Err(Error::new(
                ErrorKind::Timeout,
                format!("NBD server took more than {seconds} s for {}", doing()),
            ))
        }
    }
}

fn unreachable(path: &Path, error: io::Error) -> Error {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => {
            Error::new(ErrorKind::NoSocket, format!("there is no NBD socket at {path}"))
        }
        io::ErrorKind::ConnectionRefused => {
            Error::new(ErrorKind::Refused, format!("no NBD server listens at {path}"))
        }
        _ => Error::new(ErrorKind::Io, format!("connecting to the NBD socket at {path}")).because(error),
    }
}

/// The table pairs each request with an assembly of its own kind, so this says that we, not the server, are wrong.
fn mismatch() -> Error {
    Error::protocol("an NBD answer of another kind than its request")
}
