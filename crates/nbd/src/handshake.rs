//! "Fixed newstyle negotiation", from the greeting to the export's size.

use crate::{
    context::MetaContext,
    error::{Error, ErrorKind, Result, quote},
    options::Options,
    protocol::{
        BlockSizes, FIXED_NEWSTYLE, Framing, INIT_MAGIC, MAX_PAYLOAD, MAX_STRING, NO_ZEROES, OLDSTYLE_MAGIC,
        OPTION_MAGIC, OPTION_REPLY_MAGIC, TransmissionFlags, info, option, option_reply,
    },
};
use bytes::{Buf, BufMut};
use stillpoint_model::{Length, Range};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest option reply we read. The longest legitimate one is a map's name with its id.
const MAX_OPTION_REPLY: usize = 64 << 10;
/// How many information replies an option may have before its end, over what we asked for.
const MAX_REPLIES: usize = 64;
const DOING: &str = "during the handshake";

/// What both sides agreed on.
#[derive(Debug)]
pub(crate) struct Negotiated {
    pub(crate) framing: Framing,
    pub(crate) size: Length,
    pub(crate) flags: TransmissionFlags,
    pub(crate) block_sizes: BlockSizes,
    /// The server's ids for the maps it has, in the order they were asked for.
    pub(crate) contexts: Vec<(u32, MetaContext)>,
}

/// Negotiates over `stream`, of which nothing was read yet. Sets no deadline.
pub(crate) async fn negotiate<S>(stream: &mut S, options: &Options) -> Result<Negotiated>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let names = options.contexts.iter().map(MetaContext::as_str);
    if names.chain([options.export.as_str()]).any(|name| name.len() > MAX_STRING || name.contains('\0')) {
        return Err(Error::limits("a name for the NBD server is longer than 4096 bytes or has a NUL"));
    }
    let mut handshake = Handshake { stream };
    handshake.greet().await?;
    let framing = if handshake.agree(option::EXTENDED_HEADERS).await? {
        Framing::Extended
    } else if handshake.agree(option::STRUCTURED_REPLY).await? {
        Framing::Structured
    } else {
        Framing::Simple
    };
    let contexts = if framing == Framing::Simple || options.contexts.is_empty() {
        Vec::new()
    } else {
        handshake.set_contexts(options).await?
    };
    let (size, flags, block_sizes) = handshake.go(&options.export).await?;
    Ok(Negotiated { framing, size, flags, block_sizes, contexts })
}

struct Handshake<'a, S> {
    stream: &'a mut S,
}

struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Handshake<'_, S> {
    async fn greet(&mut self) -> Result<()> {
        let init = self.u64().await?;
        if init != INIT_MAGIC {
            return Err(Error::new(ErrorKind::NotNbd, "what answers on the socket is not an NBD server"));
        }
        match self.u64().await? {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => {
                return Err(Error::new(
                    ErrorKind::NotNbd,
                    "the NBD server speaks the oldstyle protocol only",
                ));
            }
            _ => {
                return Err(Error::new(ErrorKind::NotNbd, "what answers on the socket is not an NBD server"));
            }
        }
        let flags = self.stream.read_u16().await.map_err(lost)?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(Error::new(
                ErrorKind::NotNbd,
                "the NBD server does not speak the fixed newstyle protocol",
            ));
        }
        let ours = u32::from(FIXED_NEWSTYLE | flags & NO_ZEROES);
        self.send(&ours.to_be_bytes()).await
    }

    /// Whether the server takes an option that has no data.
    async fn agree(&mut self, which: u32) -> Result<bool> {
        self.option(which, &[]).await?;
        let reply = self.reply(which).await?;
        match reply.kind {
            option_reply::ACK => Ok(true),
            kind if kind & option_reply::ERROR != 0 => Ok(false),
            kind => {
                Err(Error::protocol(format!("NBD server answered option {which} with reply type {kind}")))
            }
        }
    }

    async fn set_contexts(&mut self, options: &Options) -> Result<Vec<(u32, MetaContext)>> {
        let mut data = Vec::new();
        put_string(&mut data, &options.export);
        data.put_u32(count(options.contexts.len()));
        for context in &options.contexts {
            put_string(&mut data, context.as_str());
        }
        self.option(option::SET_META_CONTEXT, &data).await?;

        let mut found: Vec<(u32, MetaContext)> = Vec::new();
        for _ in 0..options.contexts.len().saturating_add(MAX_REPLIES) {
            let reply = self.reply(option::SET_META_CONTEXT).await?;
            match reply.kind {
                option_reply::ACK => {
                    let place = |of: &MetaContext| options.contexts.iter().position(|asked| asked == of);
                    found.sort_by_key(|(_, context)| place(context));
                    return Ok(found);
                }
                option_reply::META_CONTEXT => {
                    let mut rest = reply.data.as_slice();
                    let id = rest.try_get_u32().map_err(|_| short("a map's id"))?;
                    let asked = options.contexts.iter().find(|asked| asked.as_str().as_bytes() == rest);
                    let Some(context) = asked else {
                        let name = quote(rest);
                        return Err(Error::protocol(format!("NBD server offers the map {name} unasked")));
                    };
                    if found.iter().any(|(known, other)| *known == id || other == context) {
                        return Err(Error::protocol(format!("NBD server offers the map {context} twice")));
                    }
                    found.push((id, context.clone()));
                }
                // A server without maps answers like one that lacks ours; one without the export says so here first.
                option_reply::ERR_UNSUP | option_reply::ERR_POLICY | option_reply::ERR_EXT_HEADER_REQD => {
                    return Ok(Vec::new());
                }
                kind => return Err(refusal(kind, &reply.data, &options.export, "map negotiation")),
            }
        }
        Err(Error::protocol("NBD server does not end its list of maps"))
    }

    async fn go(&mut self, export: &str) -> Result<(Length, TransmissionFlags, BlockSizes)> {
        let mut data = Vec::new();
        put_string(&mut data, export);
        data.put_u16(1);
        data.put_u16(info::BLOCK_SIZE);
        self.option(option::GO, &data).await?;

        let mut size_and_flags = None;
        let mut block_sizes = BlockSizes::UNSAID;
        for _ in 0..MAX_REPLIES {
            let reply = self.reply(option::GO).await?;
            match reply.kind {
                option_reply::ACK => {
                    let (size, flags) = size_and_flags.ok_or_else(|| {
                        Error::protocol("NBD server opened the export without telling its size")
                    })?;
                    return Ok((size, flags, block_sizes));
                }
                option_reply::INFO => {
                    let mut rest = reply.data.as_slice();
                    match rest.try_get_u16().map_err(|_| short("an information's type"))? {
                        info::EXPORT => size_and_flags = Some(export_info(rest)?),
                        info::BLOCK_SIZE => block_sizes = block_size_info(rest)?,
                        _ => {}
                    }
                }
                kind => return Err(refusal(kind, &reply.data, export, "opening")),
            }
        }
        Err(Error::protocol("NBD server does not end its information on the export"))
    }

    async fn option(&mut self, which: u32, data: &[u8]) -> Result<()> {
        let mut message = Vec::with_capacity(16 + data.len());
        message.put_u64(OPTION_MAGIC);
        message.put_u32(which);
        message.put_u32(count(data.len()));
        message.put_slice(data);
        self.send(&message).await
    }

    async fn reply(&mut self, which: u32) -> Result<OptionReply> {
        if self.u64().await? != OPTION_REPLY_MAGIC {
            return Err(Error::protocol("NBD server's option reply has a wrong magic number"));
        }
        let of = self.stream.read_u32().await.map_err(lost)?;
        if of != which {
            return Err(Error::protocol(format!("NBD server answered option {of} instead of {which}")));
        }
        let kind = self.stream.read_u32().await.map_err(lost)?;
        let length = self.stream.read_u32().await.map_err(lost)?;
        match usize::try_from(length) {
            Ok(length) if length <= MAX_OPTION_REPLY => {
                let mut data = vec![0; length];
                self.stream.read_exact(&mut data).await.map_err(lost)?;
                Ok(OptionReply { kind, data })
            }
            _ => Err(Error::protocol(format!("NBD server's option reply of {length} bytes is too long"))),
        }
    }

    async fn u64(&mut self) -> Result<u64> {
        self.stream.read_u64().await.map_err(lost)
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.map_err(lost)
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::socket(error, DOING)
}

fn short(what: &str) -> Error {
    Error::protocol(format!("NBD server's option reply is too short for {what}"))
}

/// Lengths here are bounded by `MAX_STRING` times the number of maps.
fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32(count(text.len()));
    out.put_slice(text.as_bytes());
}

fn export_info(mut rest: &[u8]) -> Result<(Length, TransmissionFlags)> {
    if rest.len() != 10 {
        return Err(Error::protocol("NBD server's information on the export has a wrong length"));
    }
    let size = Length::new(rest.get_u64());
    if Range::whole(size).is_err() {
        return Err(Error::protocol(format!("NBD export claims {size} bytes, more than a disk can have")));
    }
    Ok((size, TransmissionFlags::new(rest.get_u16())))
}

fn block_size_info(mut rest: &[u8]) -> Result<BlockSizes> {
    if rest.len() != 12 {
        return Err(Error::protocol("NBD server's information on block sizes has a wrong length"));
    }
    let (minimum, preferred, maximum) = (rest.get_u32(), rest.get_u32(), rest.get_u32());
    if !minimum.is_power_of_two() || minimum > 1 << 16 || maximum < minimum || preferred < minimum {
        let sizes = format!("{minimum}, {preferred} and {maximum}");
        return Err(Error::protocol(format!("NBD export claims block sizes of {sizes}")));
    }
    Ok(BlockSizes { minimum, preferred, maximum: maximum.min(MAX_PAYLOAD) })
}

fn refusal(kind: u32, message: &[u8], export: &str, what: &str) -> Error {
    let export = quote(export.as_bytes());
    let says = if message.is_empty() { String::new() } else { format!("; it says {}", quote(message)) };
    match kind {
        option_reply::ERR_UNKNOWN => {
            Error::new(ErrorKind::NoSuchExport, format!("the NBD server has no export {export}{says}"))
        }
        option_reply::ERR_TLS_REQD => {
            Error::new(ErrorKind::Refused, format!("the NBD server wants TLS for export {export}{says}"))
        }
        kind if kind & option_reply::ERROR != 0 => {
            let code = kind & !option_reply::ERROR;
            Error::new(
                ErrorKind::Refused,
                format!("the NBD server refused {what} of {export}, reason {code}{says}"),
            )
        }
        kind => Error::protocol(format!("NBD server answered the {what} of {export} with reply type {kind}")),
    }
}
