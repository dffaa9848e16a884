//! The reader task: takes replies off the socket, checks them and puts their bytes where they belong.

use crate::{
    assembly::{Assembly, Place},
    context::{Descriptor, MetaContext, Status, StatusFlags},
    error::{Error, ErrorKind, Result, quote},
    protocol::{
        EXTENDED_REPLY_MAGIC, Errno, Framing, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, command,
    },
    shared::{Answer, Pending, Shared},
};
use bytes::{Buf, BufMut};
use std::sync::Arc;
use stillpoint_model::{Length, Range};
use tokio::{
    io::{AsyncReadExt, BufReader},
    net::unix::OwnedReadHalf,
};

/// The longest error chunk we read: a message of at most 4096 bytes and, in kinds yet unknown, something more.
const MAX_ERROR: u64 = 64 << 10;
/// How many error chunks one answer may have.
const MAX_ERRORS: usize = 64;
/// How many descriptors one chunk may have; nbdkit stops at this number, QEMU earlier.
const MAX_DESCRIPTORS: u64 = 1 << 20;
/// How many bytes of descriptors, or of an answer nobody waits for, are taken at a time.
const SCRATCH: usize = 16 << 10;

#[derive(Debug, Clone, Copy)]
struct Chunk {
    done: bool,
    kind: u16,
    length: u64,
}

pub(crate) struct Reader {
    pub(crate) socket: BufReader<OwnedReadHalf>,
    pub(crate) framing: Framing,
    pub(crate) contexts: Arc<[(u32, MetaContext)]>,
    pub(crate) shared: Arc<Shared>,
}

impl Reader {
    /// Reads until the connection ends, one way or the other.
    pub(crate) async fn run(mut self) {
        loop {
            if let Err(error) = self.reply().await {
                tracing::debug!(%error, "NBD connection ended");
                return self.shared.fail(error);
            }
        }
    }

    async fn reply(&mut self) -> Result<()> {
        let magic = self.socket.read_u32().await.map_err(lost)?;
        match (magic, self.framing) {
            (SIMPLE_REPLY_MAGIC, Framing::Simple | Framing::Structured) => self.simple().await,
            (STRUCTURED_REPLY_MAGIC, Framing::Structured) => {
                let mut header = [0; 16];
                self.socket.read_exact(&mut header).await.map_err(lost)?;
                let mut rest = header.as_slice();
                let (flags, kind, cookie) = (rest.get_u16(), rest.get_u16(), rest.get_u64());
                let chunk =
                    Chunk { done: flags & chunk::FLAG_DONE != 0, kind, length: rest.get_u32().into() };
                let pending = self.expected(cookie)?;
                self.chunk(cookie, pending, chunk).await
            }
            (EXTENDED_REPLY_MAGIC, Framing::Extended) => {
                let mut header = [0; 28];
                self.socket.read_exact(&mut header).await.map_err(lost)?;
                let mut rest = header.as_slice();
                let (flags, kind, cookie, offset) =
                    (rest.get_u16(), rest.get_u16(), rest.get_u64(), rest.get_u64());
                let chunk = Chunk { done: flags & chunk::FLAG_DONE != 0, kind, length: rest.get_u64() };
                let pending = self.expected(cookie)?;
                if offset != pending.range.start().get() {
                    return self.reject(pending, Error::protocol("NBD server's reply is for another offset"));
                }
                self.chunk(cookie, pending, chunk).await
            }
            _ => Err(Error::protocol(format!("NBD server's reply has a wrong magic number, {magic:#010x}"))),
        }
    }

    fn expected(&self, cookie: u64) -> Result<Pending> {
        self.shared.take(cookie).ok_or_else(|| {
            Error::protocol(format!("NBD server replied to a request that is not open, cookie {cookie}"))
        })
    }

    /// Ends the connection over an answer that was already taken out of the table.
    fn reject(&self, pending: Pending, error: Error) -> Result<()> {
        pending.finish(Err(error.again()));
        Err(error)
    }

    async fn simple(&mut self) -> Result<()> {
        let code = self.socket.read_u32().await.map_err(lost)?;
        let cookie = self.socket.read_u64().await.map_err(lost)?;
        let mut pending = self.expected(cookie)?;
        if code != 0 {
            let error = server_error(&pending, code, &[]);
            pending.finish(Err(error));
            return Ok(());
        }
        // "Structured replies": once negotiated, what carries data comes in chunks.
        if self.framing != Framing::Simple && !matches!(pending.assembly, Assembly::Nothing) {
            let error = Error::protocol("NBD server sent a simple reply where chunks were agreed on");
            return self.reject(pending, error);
        }
        let (start, length) = (pending.range.start().get(), pending.range.length().get());
        if matches!(pending.assembly, Assembly::Read(_))
            && let Err(error) = self.data(&mut pending, start, length).await
        {
            return self.reject(pending, error);
        }
        self.complete(pending)
    }

    async fn chunk(&mut self, cookie: u64, mut pending: Pending, chunk: Chunk) -> Result<()> {
        if let Err(error) = self.payload(&mut pending, chunk).await {
            return self.reject(pending, error);
        }
        if chunk.done {
            return self.complete(pending);
        }
        self.shared.put_back(cookie, pending);
        Ok(())
    }

    async fn payload(&mut self, pending: &mut Pending, chunk: Chunk) -> Result<()> {
        let Chunk { done, kind, length } = chunk;
        match kind {
            chunk::NONE if done && length == 0 => Ok(()),
            chunk::NONE => Err(Error::protocol("NBD server's empty chunk is not empty or not the last")),
            chunk::OFFSET_DATA => {
                let Some(length) = length.checked_sub(8) else { return Err(wrong_length("data", length)) };
                let offset = self.socket.read_u64().await.map_err(lost)?;
                self.data(pending, offset, length).await
            }
            chunk::OFFSET_HOLE => {
                if length != 12 {
                    return Err(wrong_length("hole", length));
                }
                let offset = self.socket.read_u64().await.map_err(lost)?;
                let hole = self.socket.read_u32().await.map_err(lost)?;
                let abandoned = pending.is_abandoned();
                let which = pending.command;
                let Assembly::Read(read) = &mut pending.assembly else { return Err(unfit("a hole", which)) };
                let (start, end) = read.claim(offset, hole.into())?;
                if abandoned {
                    read.forget();
                } else {
                    read.zero(start, end);
                }
                Ok(())
            }
            chunk::BLOCK_STATUS if self.framing == Framing::Structured => {
                self.status(pending, length, 8).await
            }
            chunk::BLOCK_STATUS_EXT if self.framing == Framing::Extended => {
                self.status(pending, length, 16).await
            }
            kind if kind & chunk::ERROR_BIT != 0 => self.error(pending, kind, length).await,
            kind => Err(Error::protocol(format!("NBD server sent a chunk of unknown type {kind}"))),
        }
    }

    /// Takes the bytes of a piece of a read.
    async fn data(&mut self, pending: &mut Pending, offset: u64, length: u64) -> Result<()> {
        let abandoned = pending.is_abandoned();
        let which = pending.command;
        let Assembly::Read(read) = &mut pending.assembly else { return Err(unfit("data", which)) };
        let (start, end) = read.claim(offset, length)?;
        if abandoned {
            read.forget();
            return self.skip(end - start).await;
        }
        match read.place(start, end) {
            Place::Append(bytes, mut left) => {
                while left > 0 {
                    let got = self.socket.read_buf(&mut (&mut *bytes).limit(left)).await.map_err(lost)?;
                    if got == 0 {
                        return Err(lost(std::io::ErrorKind::UnexpectedEof.into()));
                    }
                    left = left.saturating_sub(got);
                }
            }
            Place::Fill(zeroes) => {
                self.socket.read_exact(zeroes).await.map_err(lost)?;
            }
        }
        Ok(())
    }

    async fn skip(&mut self, mut left: usize) -> Result<()> {
        let mut scratch = vec![0; left.min(SCRATCH)];
        while left > 0 {
            let Some(part) = scratch.get_mut(..left.min(SCRATCH)) else { break };
            left -= self.socket.read_exact(part).await.map_err(lost)?;
        }
        Ok(())
    }

    /// "Block status": `width` is the size of a descriptor, 8 bytes or, extended, 16 (with a count ahead of them).
    async fn status(&mut self, pending: &mut Pending, length: u64, width: u64) -> Result<()> {
        let (range, which) = (pending.range, pending.command);
        let Assembly::Status(maps) = &mut pending.assembly else { return Err(unfit("block status", which)) };
        let head = if width == 16 { 8 } else { 4 };
        let count = length.checked_sub(head).filter(|rest| rest % width == 0).map(|rest| rest / width);
        let Some(count) = count.filter(|count| (1..=MAX_DESCRIPTORS).contains(count)) else {
            return Err(wrong_length("block status", length));
        };
        let id = self.socket.read_u32().await.map_err(lost)?;
        if width == 16 && u64::from(self.socket.read_u32().await.map_err(lost)?) != count {
            return Err(Error::protocol(
                "NBD server's block status has another number of extents than it says",
            ));
        }
        let index = self.contexts.iter().position(|(known, _)| *known == id);
        let Some(map) = index.and_then(|index| maps.get_mut(index)) else {
            return Err(Error::protocol(format!(
                "NBD server's block status is for a map not agreed on, id {id}"
            )));
        };
        if map.is_some() {
            return Err(Error::protocol(format!("NBD server sent the block status of map {id} twice")));
        }
        *map = Some(self.descriptors(range, count, width).await?);
        Ok(())
    }

    async fn descriptors(&mut self, range: Range, count: u64, width: u64) -> Result<Vec<Descriptor>> {
        let mut found = Vec::new();
        let mut room = range.length();
        let mut left = usize::try_from(count * width).unwrap_or(usize::MAX);
        let mut scratch = vec![0; left.min(SCRATCH)];
        while left > 0 {
            let Some(part) = scratch.get_mut(..left.min(SCRATCH)) else { break };
            left -= self.socket.read_exact(part).await.map_err(lost)?;
            let mut part = &*part;
            while part.has_remaining() {
                let (length, flags) = if width == 16 {
                    (part.get_u64(), part.get_u64())
                } else {
                    (part.get_u32().into(), part.get_u32().into())
                };
                if length == 0 {
                    return Err(Error::protocol("NBD server's block status has an empty extent"));
                }
                if room.is_zero() {
                    return Err(Error::protocol(format!(
                        "NBD server's block status goes on after the end of {range}"
                    )));
                }
                // "NBD_CMD_BLOCK_STATUS": the last extent may reach past what was asked for.
                let length = Length::new(length).min(room);
                room = room.saturating_sub(length);
                found.push(Descriptor { length, flags: StatusFlags::new(flags) });
            }
        }
        Ok(found)
    }

    async fn error(&mut self, pending: &mut Pending, kind: u16, length: u64) -> Result<()> {
        let length = match usize::try_from(length) {
            Ok(fits) if (6..=MAX_ERROR).contains(&length) => fits,
            _ => return Err(wrong_length("error", length)),
        };
        pending.errors += 1;
        if pending.errors > MAX_ERRORS {
            return Err(Error::protocol("NBD server does not end its list of errors"));
        }
        let mut payload = vec![0; length];
        self.socket.read_exact(&mut payload).await.map_err(lost)?;
        let mut rest = payload.as_slice();
        let (code, text) = (rest.get_u32(), usize::from(rest.get_u16()));
        let tail = match kind {
            chunk::ERROR => Some(0),
            chunk::ERROR_OFFSET => Some(8),
            _ => None,
        };
        let fits = tail.map_or(text <= rest.len(), |tail| rest.len() == text + tail);
        let Some(message) = rest.get(..text).filter(|_| fits) else {
            return Err(Error::protocol("NBD server's error has a message of another length than it says"));
        };
        if code == 0 {
            return Err(Error::protocol("NBD server's error says success"));
        }
        let error = server_error(pending, code, message);
        pending.failure.get_or_insert(error);
        Ok(())
    }

    /// The answer's last chunk is here: is it whole?
    fn complete(&self, mut pending: Pending) -> Result<()> {
        if let Some(failure) = pending.failure.take() {
            pending.finish(Err(failure));
            return Ok(());
        }
        let abandoned = pending.is_abandoned();
        let answer = match std::mem::replace(&mut pending.assembly, Assembly::Nothing) {
            Assembly::Nothing => Ok(Answer::Done),
            Assembly::Read(_) if abandoned => Ok(Answer::Done),
            Assembly::Read(read) => read.finish().map(Answer::Bytes),
            Assembly::Status(maps) => {
                let name = |(_, context): &(u32, MetaContext)| context.clone();
                let named =
                    self.contexts.iter().zip(maps).map(|(known, map)| map.map(|map| (name(known), map)));
                named.collect::<Option<Vec<_>>>().map(|maps| Answer::Status(Status::new(maps))).ok_or_else(
                    || {
                        Error::protocol(format!(
                            "NBD server left out a map from its block status of {}",
                            pending.range
                        ))
                    },
                )
            }
        };
        match answer {
            Ok(answer) => {
                pending.finish(Ok(answer));
                Ok(())
            }
            Err(error) => self.reject(pending, error),
        }
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::socket(error, "while it was replying")
}

fn wrong_length(what: &str, length: u64) -> Error {
    Error::protocol(format!("NBD server's {what} chunk has a wrong length of {length} bytes"))
}

fn unfit(what: &str, which: u16) -> Error {
    Error::protocol(format!("NBD server answered a {} with {what}", command_name(which)))
}

fn server_error(pending: &Pending, code: u32, message: &[u8]) -> Error {
    let errno = Errno::new(code);
    let says = if message.is_empty() { String::new() } else { format!("; it says {}", quote(message)) };
    let what = command_name(pending.command);
    Error::new(
        ErrorKind::Server { errno },
        format!("NBD server failed the {what} of {}: {errno}{says}", pending.range),
    )
}

/// A command as a person would name it.
pub(crate) fn command_name(which: u16) -> &'static str {
    match which {
        command::READ => "read",
        command::WRITE => "write",
        command::DISC => "disconnect",
        command::FLUSH => "flush",
        command::TRIM => "trim",
        command::WRITE_ZEROES => "zeroing",
        command::BLOCK_STATUS => "block status",
        _ => "request",
    }
}
