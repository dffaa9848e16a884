//! The requests of one connection ("Transmission phase").

use super::{
    Exports, HANDSHAKE, MOST_IN_FLIGHT, MOST_REQUESTS, Refusal,
    handshake::{self, Context, Negotiated},
};
use crate::protocol::{
    Errno, MAX_PAYLOAD, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, command,
};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use rustix::net::{
    SendAncillaryBuffer, SendFlags, sendmsg,
    sockopt::{set_socket_send_buffer_size, set_socket_send_buffer_size_force},
};
use std::{
    io::{self, IoSlice},
    sync::Arc,
};
use stillpoint_model::{Extent, ExtentKind, Length, Offset, Range};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, BufReader, Interest},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{Mutex, Semaphore},
    task::JoinSet,
};

/// `NBD_CMD_FLAG_REQ_ONE`
const FLAG_REQ_ONE: u16 = 1 << 3;
/// Flags that a client may set on what we do: FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO. They change nothing but the last
/// but one.
const KNOWN_FLAGS: u16 = 0b1_1111;
/// What of replies may be in the socket, in bytes.
const SEND_BUFFER: usize = 1 << 20;
/// Most descriptors in one answer about a map; a client asks on from where it ends.
const MOST_DESCRIPTORS: usize = 8192;

pub(super) async fn serve(stream: UnixStream, exports: &Exports) -> io::Result<()> {
    widen(&stream);
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let negotiating = handshake::negotiate(&mut reader, &mut writer, exports);
    match tokio::time::timeout(HANDSHAKE, negotiating).await {
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
        Ok(negotiated) => match negotiated? {
            Some(negotiated) => transmit(reader, writer, negotiated).await,
            None => Ok(()),
        },
    }
}

/// Room for some replies in the socket, so that sending one need not wait in the middle for its reader; as much as the
/// kernel allows. Without it, it is only slower.
pub(super) fn widen(stream: &UnixStream) {
    if set_socket_send_buffer_size_force(stream, SEND_BUFFER).is_err() {
        let _ = set_socket_send_buffer_size(stream, SEND_BUFFER);
    }
}

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

struct Connection {
    negotiated: Negotiated,
    writer: Mutex<OwnedWriteHalf>,
}

pub(super) async fn transmit(
    mut reader: impl AsyncRead + Unpin,
    writer: OwnedWriteHalf,
    negotiated: Negotiated,
) -> io::Result<()> {
    let connection = Arc::new(Connection { negotiated, writer: Mutex::new(writer) });
    let memory = Arc::new(Semaphore::new(MOST_IN_FLIGHT as usize));
    let mut requests: JoinSet<io::Result<()>> = JoinSet::new();
    loop {
        while requests.len() >= MOST_REQUESTS {
            finish(requests.join_next().await)?;
        }
        while let Some(done) = requests.try_join_next() {
            finish(Some(done))?;
        }
        let Some(request) = next(&mut reader).await? else { break };
        if request.command == command::DISC {
            break;
        }
        if request.command == command::WRITE {
            // Its payload has to be taken off the wire before the next request.
            if request.length > MAX_PAYLOAD {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a write of more than 32 MiB"));
            }
            discard(&mut reader, request.length).await?;
        }
        let held = if request.command == command::READ { request.length.min(MAX_PAYLOAD) } else { 0 };
        let Ok(permit) = Arc::clone(&memory).acquire_many_owned(held).await else { break };
        let connection = Arc::clone(&connection);
        requests.spawn(async move {
            let _permit = permit;
            connection.answer(&request).await
        });
    }
    while !requests.is_empty() {
        finish(requests.join_next().await)?;
    }
    Ok(())
}

fn finish(done: Option<Result<io::Result<()>, tokio::task::JoinError>>) -> io::Result<()> {
    match done {
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(io::Error::other(error)),
        None => Ok(()),
    }
}

/// `None` at the end of the connection between two requests.
async fn next(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Request>> {
    let magic = match reader.read_u32().await {
        Ok(magic) => magic,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    if magic != REQUEST_MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "request magic"));
    }
    Ok(Some(Request {
        flags: reader.read_u16().await?,
        command: reader.read_u16().await?,
        cookie: reader.read_u64().await?,
        offset: reader.read_u64().await?,
        length: reader.read_u32().await?,
    }))
}

async fn discard(reader: &mut (impl AsyncRead + Unpin), length: u32) -> io::Result<()> {
    let taken = tokio::io::copy(&mut reader.take(u64::from(length)), &mut tokio::io::sink()).await?;
    if taken < u64::from(length) { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn refuse(errno: Errno, why: &str) -> Refusal {
    Refusal::new(errno, why)
}

impl Connection {
    async fn answer(&self, request: &Request) -> io::Result<()> {
        match self.work(request).await {
            Ok(reply) => self.send(reply).await,
            Err(refusal) => self.send(vec![self.error(request.cookie, &refusal)]).await,
        }
    }

    async fn work(&self, request: &Request) -> Result<Vec<Bytes>, Refusal> {
        if request.flags & !KNOWN_FLAGS != 0 {
            return Err(refuse(Errno::EINVAL, "unknown flags"));
        }
        let export = &self.negotiated.export;
        match request.command {
            command::READ => {
                let range = self.range(request, Errno::EINVAL)?;
                if request.length > MAX_PAYLOAD {
                    return Err(refuse(Errno::EOVERFLOW, "a read of more than 32 MiB"));
                }
                let bytes = export.read(range).await?;
                Ok(vec![self.data(request, bytes.len()), bytes])
            }
            command::TRIM => {
                let range = self.range(request, Errno::EINVAL)?;
                export.trim(range).await?;
                Ok(vec![self.done(request.cookie)])
            }
            // There is nothing to flush, and clients that flush as a habit are not wrong.
            command::FLUSH => Ok(vec![self.done(request.cookie)]),
            command::BLOCK_STATUS => {
                if self.negotiated.contexts.is_empty() {
                    return Err(refuse(Errno::EINVAL, "no map was negotiated"));
                }
                let range = self.range(request, Errno::EINVAL)?;
                self.status(request, range).await
            }
            command::WRITE | command::WRITE_ZEROES => {
                Err(refuse(Errno::EPERM, "a point in time cannot be written to"))
            }
            _ => Err(refuse(Errno::EINVAL, "unknown command")),
        }
    }

    fn range(&self, request: &Request, outside: Errno) -> Result<Range, Refusal> {
        if request.length == 0 {
            return Err(refuse(Errno::EINVAL, "a request for nothing"));
        }
        let range = Range::new(Offset::new(request.offset), Length::new(u64::from(request.length)));
        match range {
            Ok(range) if range.end().get() <= self.negotiated.export.size().get() => Ok(range),
            _ => Err(refuse(outside, "beyond the end of the disk")),
        }
    }

    async fn status(&self, request: &Request, range: Range) -> Result<Vec<Bytes>, Refusal> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start();
        let one = request.flags & FLAG_REQ_ONE != 0;
        let most = if one { 1 } else { MOST_DESCRIPTORS };
        while at < range.end() && extents.len() < most {
            let more = self.negotiated.export.extents(at).await?;
            let Some(end) = more.last().map(|extent| extent.range.end()).filter(|end| *end > at) else {
                return Err(refuse(Errno::EIO, "the map does not go on"));
            };
            at = end;
            extents.extend(more.iter().filter_map(|extent| {
                let range = extent.range.intersect(range)?;
                Some(Extent { range, kind: extent.kind })
            }));
        }
        let last = self.negotiated.contexts.len().saturating_sub(1);
        let mut replies = Vec::new();
        for (index, context) in self.negotiated.contexts.iter().enumerate() {
            let mut descriptors: Vec<(u32, u32)> = Vec::new();
            for extent in &extents {
                let flags = flags(*context, extent.kind);
                let length = u32::try_from(extent.range.length().get()).unwrap_or(u32::MAX);
                match descriptors.last_mut() {
                    Some((so_far, same)) if *same == flags => *so_far = so_far.saturating_add(length),
                    _ => descriptors.push((length, flags)),
                }
            }
            descriptors.truncate(most);
            let payload = 4 + 8 * descriptors.len();
            let done = if index == last { chunk::FLAG_DONE } else { 0 };
            let mut reply = header(done, chunk::BLOCK_STATUS, request.cookie, payload);
            reply.put_u32(context.id());
            for (length, flags) in descriptors {
                reply.put_u32(length);
                reply.put_u32(flags);
            }
            replies.push(reply.freeze());
        }
        Ok(replies)
    }

    fn data(&self, request: &Request, length: usize) -> Bytes {
        if !self.negotiated.structured {
            return simple(request.cookie, 0);
        }
        let mut reply = header(chunk::FLAG_DONE, chunk::OFFSET_DATA, request.cookie, length + 8);
        reply.put_u64(request.offset);
        reply.freeze()
    }

    fn done(&self, cookie: u64) -> Bytes {
        if !self.negotiated.structured {
            return simple(cookie, 0);
        }
        header(chunk::FLAG_DONE, chunk::NONE, cookie, 0).freeze()
    }

    fn error(&self, cookie: u64, refusal: &Refusal) -> Bytes {
        if !self.negotiated.structured {
            return simple(cookie, refusal.errno.code());
        }
        let why: String = refusal.why.chars().filter(|c| !c.is_control()).take(1000).collect();
        let mut reply = header(chunk::FLAG_DONE, chunk::ERROR, cookie, 6 + why.len());
        reply.put_u32(refusal.errno.code());
        reply.put_u16(u16::try_from(why.len()).unwrap_or(0));
        reply.extend_from_slice(why.as_bytes());
        reply.freeze()
    }

    /// Sends all of a reply with as few calls as can be: a client that is woken by a header alone wakes for nothing.
    async fn send(&self, mut parts: Vec<Bytes>) -> io::Result<()> {
        let writer = self.writer.lock().await;
        let socket: &UnixStream = writer.as_ref();
        loop {
            parts.retain(|part| !part.is_empty());
            if parts.is_empty() {
                return Ok(());
            }
            let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
            // A vectored write would raise SIGPIPE if the client is gone.
            let sending = || {
                let sent = sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
                sent.map_err(io::Error::from)
            };
            let mut sent = socket.async_io(Interest::WRITABLE, sending).await?;
            for part in &mut parts {
                let taken = sent.min(part.len());
                part.advance(taken);
                sent -= taken;
            }
        }
    }
}

fn flags(context: Context, kind: ExtentKind) -> u32 {
    match (context, kind) {
        // NBD_STATE_HOLE and NBD_STATE_ZERO
        (Context::Allocation, ExtentKind::Zero) => 3,
        // What a clean part holds is not known here, and reading it is an error.
        (Context::Allocation, ExtentKind::Clean | ExtentKind::Data) => 0,
        (Context::Dirty, ExtentKind::Clean) => 0,
        (Context::Dirty, ExtentKind::Zero | ExtentKind::Data) => 1,
    }
}

fn simple(cookie: u64, errno: u32) -> Bytes {
    let mut reply = BytesMut::with_capacity(16);
    reply.put_u32(SIMPLE_REPLY_MAGIC);
    reply.put_u32(errno);
    reply.put_u64(cookie);
    reply.freeze()
}

fn header(flags: u16, kind: u16, cookie: u64, payload: usize) -> BytesMut {
    let mut reply = BytesMut::with_capacity(64);
    reply.put_u32(STRUCTURED_REPLY_MAGIC);
    reply.put_u16(flags);
    reply.put_u16(kind);
    reply.put_u64(cookie);
    reply.put_u32(u32::try_from(payload).unwrap_or(u32::MAX));
    reply
}
