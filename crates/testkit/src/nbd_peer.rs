//! An NBD server in memory that can be told to misbehave.
//!
//! One connection, one export, one map. [`serve`] speaks the protocol correctly; each [`Misbehaviour`] breaks it in one
//! named way. It shares no code with the client it tests: a mistake made in both would go unseen.

use bytes::BufMut;
use std::io;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// How much of the protocol the server claims to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Simple replies, no maps.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers.
    Extended,
}

/// A way to break the protocol, or one of the odd ways to keep it (as said).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misbehaviour {
    // The handshake.
    /// Greets as something that is not NBD.
    WrongInitMagic,
    /// Greets as an oldstyle server.
    Oldstyle,
    /// Does not offer the fixed newstyle.
    NotFixed,
    /// Heads its option replies with another magic number.
    WrongOptionMagic,
    /// Answers another option than the one asked.
    WrongOption,
    /// Announces an option reply of 4 GiB less one byte.
    HugeOptionReply,
    /// Sends informations on the export without end.
    EndlessInfo,
    /// Sends maps without end.
    EndlessContexts,
    /// Offers a map that was not asked for.
    UnaskedContext,
    /// Acknowledges the export without its size.
    NoSize,
    /// Claims 2^64 - 1 bytes.
    HugeSize,
    /// Claims a smallest block of 3 bytes.
    OddBlockSize,
    /// Says that the export does not exist, with terminal escapes.
    NoSuchExport,
    /// Wants TLS.
    WantsTls,
    /// Never greets.
    Silent,

    // Replies of any kind.
    /// Heads its replies with another magic number.
    WrongReplyMagic,
    /// Replies to a request nobody made.
    UnaskedCookie,
    /// Replies twice to one request.
    DoneTwice,
    /// Sends chunks of unknown, harmless type.
    UnknownChunk,
    /// Fails with an error of unknown type: allowed, an error for that request.
    UnknownError,
    /// Fails with EINVAL and a message full of control characters: allowed.
    Fails,
    /// Fails with EINVAL in a simple reply: allowed.
    FailsSimply,
    /// Fails with an error at an offset: allowed.
    FailsAtOffset,
    /// Fails with the code for success.
    FailsWithSuccess,
    /// Fails with a message longer than the chunk.
    ErrorTooShort,
    /// Announces an error of 4 GiB less one byte.
    HugeError,
    /// Sends errors without end.
    EndlessErrors,
    /// Sends empty chunks without end.
    EndlessEmpty,
    /// Never replies.
    NeverReplies,
    /// Replies to another offset (extended headers only).
    WrongOffset,

    // Replies to reads.
    /// Sends data behind the request's range.
    DataOutside,
    /// Sends data ahead of the request's range.
    DataBefore,
    /// Sends one byte more than was asked for.
    DataTooLong,
    /// Sends the last byte twice.
    DataOverlaps,
    /// Leaves out the last byte.
    DataMissing,
    /// Ends a read without any data.
    NoData,
    /// Sends pieces of no byte without end.
    EndlessEmptyData,
    /// Makes a hole reach out of the range.
    HoleOutside,
    /// Announces 4 GiB less one byte of data.
    HugeData,
    /// Replies to a read with a simple reply though chunks were agreed on.
    SimpleRead,
    /// Replies to a read with a block status.
    StatusForRead,
    /// Sends the pieces of a read from last to first, with holes for zeroes: allowed.
    Backwards,

    // Replies to block status requests.
    /// Sends no extents.
    NoExtents,
    /// Sends an extent of no byte.
    EmptyExtent,
    /// Names a map that was not agreed on.
    WrongContextId,
    /// Sends the same map twice.
    ContextTwice,
    /// Ends without the map.
    ContextMissing,
    /// Goes on after the end of the range.
    ExtentsOutside,
    /// Announces 4 GiB less one byte of extents.
    HugeStatus,
    /// Announces half an extent.
    HalfExtent,
    /// Says another number of extents than it sends (extended headers only).
    WrongExtentCount,
    /// Uses the other framing's block status.
    WrongStatusType,
    /// Replies to a block status request with data.
    DataForStatus,
    /// Makes the last extent reach past the range: allowed.
    LastExtentLonger,
    /// Sends one extent at a time: allowed.
    OneExtent,
    /// Sends one byte at a time.
    OneByteExtents,
    /// Sets flags that nobody knows: allowed, and not to be taken for zeroes.
    UnknownFlags,
}

/// What the server has.
#[derive(Debug, Clone)]
pub struct Export {
    /// Its bytes; 4 KiB blocks of zeroes are holes.
    pub data: Vec<u8>,
    /// The one map it has.
    pub context: String,
    /// How much of the protocol it knows.
    pub level: Level,
    /// What it does wrong.
    pub misbehaviour: Option<Misbehaviour>,
    /// How many requests it takes before it replies to all of them, last one first; 1 is in order.
    pub batch: usize,
}

impl Export {
    /// A correct server of `data` with a `base:allocation` map.
    pub fn new(data: Vec<u8>, level: Level) -> Self {
        Self { data, context: "base:allocation".to_owned(), level, misbehaviour: None, batch: 1 }
    }

    /// The same with one misbehaviour.
    #[must_use]
    pub fn but(mut self, misbehaviour: Misbehaviour) -> Self {
        self.misbehaviour = Some(misbehaviour);
        self
    }
}

/// The block in which the server looks for holes.
pub const BLOCK: usize = 4096;
/// The id of its map.
pub const CONTEXT_ID: u32 = 77;

const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

struct Request {
    command: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

struct Server {
    stream: UnixStream,
    export: Export,
}

/// Serves one client until it says farewell, is refused or goes away.
///
/// # Errors
/// If the socket fails; a client that goes away in the middle is such a failure.
pub async fn serve(stream: UnixStream, export: Export) -> io::Result<()> {
    let mut server = Server { stream, export };
    if server.is(Misbehaviour::Silent) {
        let mut byte = [0];
        return server.stream.read(&mut byte).await.map(|_| ());
    }
    if server.handshake().await? { server.transmission().await } else { Ok(()) }
}

impl Server {
    fn is(&self, misbehaviour: Misbehaviour) -> bool {
        self.export.misbehaviour == Some(misbehaviour)
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    async fn handshake(&mut self) -> io::Result<bool> {
        use Misbehaviour as M;
        let mut greeting = Vec::new();
        greeting.put_slice(if self.is(M::WrongInitMagic) { b"HTTP/1.1" } else { b"NBDMAGIC" });
        if self.is(M::Oldstyle) {
            greeting.put_u64(0x0000_4202_8186_1253);
            greeting.put_bytes(0, 136);
        } else {
            greeting.put_slice(b"IHAVEOPT");
            greeting.put_u16(if self.is(M::NotFixed) { 2 } else { 3 });
        }
        self.send(&greeting).await?;
        self.stream.read_u32().await?;
        loop {
            self.stream.read_u64().await?;
            let option = self.stream.read_u32().await?;
            let length = self.stream.read_u32().await?;
            let mut data = Vec::new();
            (&mut self.stream).take(length.into()).read_to_end(&mut data).await?;
            match (option, self.export.level) {
                (11, Level::Extended) | (8, Level::Structured) => self.option_reply(option, 1, &[]).await?,
                (10, Level::Structured | Level::Extended) => self.contexts(option, &data).await?,
                (7, _) => return self.go(option).await,
                (2, _) => return Ok(false),
                _ => self.option_reply(option, 1 << 31 | 1, b"never heard of it").await?,
            }
        }
    }

    async fn option_reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        use Misbehaviour as M;
        let mut reply = Vec::new();
        reply.put_u64(if self.is(M::WrongOptionMagic) { 1 } else { OPTION_REPLY_MAGIC });
        reply.put_u32(if self.is(M::WrongOption) { option + 1 } else { option });
        reply.put_u32(kind);
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        reply.put_u32(if self.is(M::HugeOptionReply) { u32::MAX } else { length });
        reply.put_slice(data);
        self.send(&reply).await
    }

    async fn contexts(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        use Misbehaviour as M;
        let name = self.export.context.clone();
        let mut reply = Vec::new();
        reply.put_u32(CONTEXT_ID);
        if self.is(M::UnaskedContext) {
            reply.put_slice(b"qemu:dirty-bitmap:\x1b[31mother");
            self.option_reply(option, 4, &reply).await?;
        } else if data.windows(name.len()).any(|part| part == name.as_bytes()) {
            reply.put_slice(name.as_bytes());
            self.option_reply(option, 4, &reply).await?;
            while self.is(M::EndlessContexts) {
                self.option_reply(option, 4, &reply).await?;
            }
        }
        self.option_reply(option, 1, &[]).await
    }

    async fn go(&mut self, option: u32) -> io::Result<bool> {
        use Misbehaviour as M;
        if self.is(M::NoSuchExport) {
            let message = [b"no \x1b[31mexport\x07\n".as_slice(), &[b'x'; 4000]].concat();
            self.option_reply(option, 1 << 31 | 6, &message).await?;
            return Ok(false);
        }
        if self.is(M::WantsTls) {
            self.option_reply(option, 1 << 31 | 5, &[]).await?;
            return Ok(false);
        }
        let mut export = Vec::new();
        export.put_u16(0);
        let size = u64::try_from(self.export.data.len()).unwrap_or(u64::MAX);
        export.put_u64(if self.is(M::HugeSize) { u64::MAX } else { size });
        // Has flags, flush, FUA, trim, write zeroes.
        export.put_u16(0b110_1101);
        if !self.is(M::NoSize) {
            self.option_reply(option, 3, &export).await?;
        }
        let mut blocks = Vec::new();
        blocks.put_u16(3);
        blocks.put_u32(if self.is(M::OddBlockSize) { 3 } else { 1 });
        blocks.put_u32(4096);
        blocks.put_u32(32 << 20);
        self.option_reply(option, 3, &blocks).await?;
        while self.is(M::EndlessInfo) {
            self.option_reply(option, 3, &blocks).await?;
        }
        self.option_reply(option, 1, &[]).await?;
        Ok(true)
    }

    async fn transmission(&mut self) -> io::Result<()> {
        let mut batch = Vec::new();
        loop {
            let mut request = self.request().await?;
            if request.command == 2 {
                return Ok(());
            }
            if request.command == 1 {
                let start = usize::try_from(request.offset).unwrap_or(usize::MAX);
                let end = start.saturating_add(usize::try_from(request.length).unwrap_or(usize::MAX));
                match self.export.data.get_mut(start..end) {
                    Some(place) => self.stream.read_exact(place).await.map(|_| ())?,
                    None => return Err(io::ErrorKind::InvalidInput.into()),
                }
                request.length = 0;
            }
            batch.push(request);
            if batch.len() >= self.export.batch {
                while let Some(request) = batch.pop() {
                    self.answer(&request).await?;
                }
            }
        }
    }

    async fn request(&mut self) -> io::Result<Request> {
        let magic = self.stream.read_u32().await?;
        self.stream.read_u16().await?;
        let command = self.stream.read_u16().await?;
        let cookie = self.stream.read_u64().await?;
        let offset = self.stream.read_u64().await?;
        let (length, expected) = match self.export.level {
            Level::Extended => (self.stream.read_u64().await?, 0x21e4_1c71),
            _ => (self.stream.read_u32().await?.into(), 0x2560_9513),
        };
        if magic != expected {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the client's request has a wrong magic"));
        }
        Ok(Request { command, cookie, offset, length })
    }

    /// A chunk (or, announced longer than it is, the start of one).
    async fn chunk_of(
        &mut self,
        to: &Request,
        done: bool,
        kind: u16,
        length: u32,
        data: &[u8],
    ) -> io::Result<()> {
        use Misbehaviour as M;
        let mut chunk = Vec::new();
        let magic = if self.export.level == Level::Extended { 0x6e8a_278c } else { 0x668e_33ef };
        chunk.put_u32(if self.is(M::WrongReplyMagic) { 0x1234_5678 } else { magic });
        chunk.put_u16(done.into());
        chunk.put_u16(kind);
        chunk.put_u64(if self.is(M::UnaskedCookie) { to.cookie + 1000 } else { to.cookie });
        if self.export.level == Level::Extended {
            chunk.put_u64(if self.is(M::WrongOffset) { to.offset + 1 } else { to.offset });
            chunk.put_u64(length.into());
        } else {
            chunk.put_u32(length);
        }
        chunk.put_slice(data);
        self.send(&chunk).await
    }

    async fn chunk(&mut self, to: &Request, done: bool, kind: u16, data: &[u8]) -> io::Result<()> {
        self.chunk_of(to, done, kind, u32::try_from(data.len()).unwrap_or(u32::MAX), data).await
    }

    async fn simple(&mut self, to: &Request, code: u32) -> io::Result<()> {
        let mut reply = Vec::new();
        reply.put_u32(if self.is(Misbehaviour::WrongReplyMagic) { 0x1234_5678 } else { 0x6744_6698 });
        reply.put_u32(code);
        let cookie = if self.is(Misbehaviour::UnaskedCookie) { to.cookie + 1000 } else { to.cookie };
        reply.put_u64(cookie);
        self.send(&reply).await
    }

    async fn answer(&mut self, to: &Request) -> io::Result<()> {
        use Misbehaviour as M;
        let error = |code: u32, text: &[u8]| {
            let mut error = Vec::new();
            error.put_u32(code);
            error.put_u16(u16::try_from(text.len()).unwrap_or(u16::MAX));
            error.put_slice(text);
            error
        };
        let failure = error(22, b"bad \x1b[2J\n\x07 luck");
        let structured = self.export.level != Level::Simple;
        match self.export.misbehaviour {
            Some(M::NeverReplies) => return Ok(()),
            Some(M::Fails) if structured => return self.chunk(to, true, 1 << 15 | 1, &failure).await,
            Some(M::FailsSimply | M::Fails) => return self.simple(to, 22).await,
            Some(M::UnknownError) => return self.chunk(to, true, 1 << 15 | 99, &failure).await,
            Some(M::FailsAtOffset) => {
                let at = [failure.as_slice(), &to.offset.to_be_bytes()].concat();
                return self.chunk(to, true, 1 << 15 | 2, &at).await;
            }
            Some(M::FailsWithSuccess) => return self.chunk(to, true, 1 << 15 | 1, &error(0, b"")).await,
            Some(M::ErrorTooShort) => {
                let short = [0, 0, 0, 22, 0xff, 0xff, b'?'];
                return self.chunk(to, true, 1 << 15 | 1, &short).await;
            }
            Some(M::HugeError) => return self.chunk_of(to, true, 1 << 15 | 1, u32::MAX, &failure).await,
            Some(M::EndlessErrors) => loop {
                self.chunk(to, false, 1 << 15 | 1, &failure).await?;
            },
            Some(M::EndlessEmpty) => loop {
                self.chunk(to, false, 0, &[]).await?;
            },
            Some(M::UnknownChunk) => return self.chunk(to, true, 42, b"surprise").await,
            _ => {}
        }
        match to.command {
            0 => self.read(to).await?,
            7 => self.status(to).await?,
            _ if self.export.level == Level::Extended => self.chunk(to, true, 0, &[]).await?,
            _ => self.simple(to, 0).await?,
        }
        if self.is(M::DoneTwice) { self.chunk(to, true, 0, &[]).await } else { Ok(()) }
    }

    fn bytes(&self, to: &Request) -> io::Result<Vec<u8>> {
        let range = usize::try_from(to.offset).ok().zip(usize::try_from(to.length).ok());
        let range = range.and_then(|(start, length)| Some(start..start.checked_add(length)?));
        range.and_then(|range| self.export.data.get(range)).map(<[u8]>::to_vec).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the client asks for what the export does not have")
        })
    }

    async fn data(&mut self, to: &Request, done: bool, offset: u64, data: &[u8]) -> io::Result<()> {
        self.chunk(to, done, 1, &[offset.to_be_bytes().as_slice(), data].concat()).await
    }

    async fn hole(&mut self, to: &Request, done: bool, offset: u64, length: u32) -> io::Result<()> {
        self.chunk(to, done, 2, &[offset.to_be_bytes().as_slice(), &length.to_be_bytes()].concat()).await
    }

    async fn read(&mut self, to: &Request) -> io::Result<()> {
        use Misbehaviour as M;
        let bytes = self.bytes(to)?;
        if self.export.level == Level::Simple {
            self.simple(to, 0).await?;
            return self.send(&bytes).await;
        }
        let end = to.offset + to.length;
        let (last, most) = bytes.split_last().map_or((0, &[][..]), |(last, most)| (*last, most));
        match self.export.misbehaviour {
            Some(M::DataOutside) => self.data(to, true, end, &bytes).await,
            Some(M::DataBefore) => self.data(to, true, to.offset.wrapping_sub(1), &bytes).await,
            Some(M::DataTooLong) => self.data(to, true, to.offset, &[&bytes[..], b"+"].concat()).await,
            Some(M::DataOverlaps) => {
                self.data(to, false, to.offset, &bytes).await?;
                self.data(to, true, end - 1, &[last]).await
            }
            Some(M::DataMissing) => self.data(to, true, to.offset, most).await,
            Some(M::NoData) => self.chunk(to, true, 0, &[]).await,
            Some(M::EndlessEmptyData) => loop {
                self.data(to, false, to.offset, &[]).await?;
            },
            Some(M::HoleOutside) => self.hole(to, true, to.offset, u32::MAX).await,
            Some(M::HugeData) => self.chunk_of(to, true, 1, u32::MAX, &to.offset.to_be_bytes()).await,
            Some(M::SimpleRead) => {
                self.simple(to, 0).await?;
                self.send(&bytes).await
            }
            Some(M::StatusForRead) => self.send_status(to, true, CONTEXT_ID, &[(1, 0)]).await,
            Some(M::Backwards) => {
                let mut end = end;
                for piece in bytes.rchunks(1000) {
                    let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
                    end -= u64::from(length);
                    if piece.iter().all(|byte| *byte == 0) {
                        self.hole(to, false, end, length).await?;
                    } else {
                        self.data(to, false, end, piece).await?;
                    }
                }
                self.chunk(to, true, 0, &[]).await
            }
            _ => self.data(to, true, to.offset, &bytes).await,
        }
    }

    fn extents(&self, to: &Request) -> io::Result<Vec<(u64, u64)>> {
        let bytes = self.bytes(to)?;
        let mut extents: Vec<(u64, u64)> = Vec::new();
        let first = BLOCK - usize::try_from(to.offset).unwrap_or(0) % BLOCK;
        let (head, rest) = bytes.split_at(first.min(bytes.len()));
        for block in std::iter::once(head).chain(rest.chunks(BLOCK)).filter(|block| !block.is_empty()) {
            let flags = if block.iter().all(|byte| *byte == 0) { 3 } else { 0 };
            let length = u64::try_from(block.len()).unwrap_or(u64::MAX);
            match extents.last_mut() {
                Some(last) if last.1 == flags => last.0 += length,
                _ => extents.push((length, flags)),
            }
        }
        Ok(extents)
    }

    async fn send_status(
        &mut self,
        to: &Request,
        done: bool,
        id: u32,
        extents: &[(u64, u64)],
    ) -> io::Result<()> {
        let extended = (self.export.level == Level::Extended) != self.is(Misbehaviour::WrongStatusType);
        let mut data = Vec::new();
        data.put_u32(id);
        if extended {
            let count = u32::try_from(extents.len()).unwrap_or(u32::MAX);
            data.put_u32(count + u32::from(self.is(Misbehaviour::WrongExtentCount)));
        }
        for &(length, flags) in extents {
            if extended {
                data.put_u64(length);
                data.put_u64(flags);
            } else {
                data.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
                data.put_u32(u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0));
            }
        }
        let kind = if extended { 6 } else { 5 };
        match self.export.misbehaviour {
            Some(Misbehaviour::HugeStatus) => self.chunk_of(to, done, kind, u32::MAX, &data).await,
            Some(Misbehaviour::HalfExtent) => {
                data.truncate(data.len().saturating_sub(4));
                self.chunk(to, done, kind, &data).await
            }
            _ => self.chunk(to, done, kind, &data).await,
        }
    }

    async fn status(&mut self, to: &Request) -> io::Result<()> {
        use Misbehaviour as M;
        let mut extents = self.extents(to)?;
        match self.export.misbehaviour {
            Some(M::NoExtents) => extents.clear(),
            Some(M::EmptyExtent) => extents.insert(0, (0, 0)),
            Some(M::ExtentsOutside) => extents.push((4096, 0)),
            Some(M::LastExtentLonger) => {
                if let Some(last) = extents.last_mut() {
                    last.0 += 1 << 30;
                }
            }
            Some(M::OneExtent) => extents.truncate(1),
            Some(M::OneByteExtents) => extents = vec![(1, to.offset % 2)],
            Some(M::UnknownFlags) => extents.iter_mut().for_each(|extent| extent.1 |= 1 << 20 | 2),
            Some(M::WrongContextId) => return self.send_status(to, true, CONTEXT_ID + 1, &extents).await,
            Some(M::ContextTwice) => self.send_status(to, false, CONTEXT_ID, &extents).await?,
            Some(M::ContextMissing) => return self.chunk(to, true, 0, &[]).await,
            Some(M::DataForStatus) => return self.data(to, true, to.offset, b"x").await,
            _ => {}
        }
        self.send_status(to, true, CONTEXT_ID, &extents).await
    }
}
