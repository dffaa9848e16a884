//! What a client and the server agree on ("Newstyle negotiation").

use super::{Export, Exports};
use crate::protocol::{
    FIXED_NEWSTYLE, INIT_MAGIC, MAX_PAYLOAD, MAX_STRING, NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC, info,
    option, option_reply,
};
use bytes::{Buf as _, BufMut as _};
use std::{io, sync::Arc};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// `NBD_FLAG_HAS_FLAGS`, `NBD_FLAG_SEND_FLUSH`, `NBD_FLAG_SEND_TRIM`, `NBD_FLAG_SEND_DF`, `NBD_FLAG_CAN_MULTI_CONN`. Not
/// read-only, since then no client would trim; writes are refused one by one.
pub(super) const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 7 | 1 << 8;
/// An option with more data than this is no option.
const MOST_DATA: u32 = 64 << 10;
/// Options before the client has to begin; nobody needs so many.
const MOST_OPTIONS: u32 = 256;
/// What requests had better be aligned to: the granularity that QEMU's bitmaps have as a rule.
const PREFERRED: u32 = 64 << 10;
const BASE_ALLOCATION: &str = "base:allocation";
/// `NBD_INFO_EXPORT` and `NBD_INFO_BLOCK_SIZE` are sent whatever was asked for.
const ID_BASE: u32 = 1;
const ID_DIRTY: u32 = 2;

/// A map that was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    Allocation,
    Dirty,
}

impl Context {
    pub(super) fn id(self) -> u32 {
        match self {
            Self::Allocation => ID_BASE,
            Self::Dirty => ID_DIRTY,
        }
    }
}

/// What came of it.
pub(super) struct Negotiated {
    pub(super) export: Arc<dyn Export>,
    pub(super) structured: bool,
    pub(super) contexts: Vec<Context>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// `None` if the client went away in order.
pub(super) async fn negotiate(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    exports: &Exports,
) -> io::Result<Option<Negotiated>> {
    let mut greeting = Vec::new();
    greeting.put_u64(INIT_MAGIC);
    greeting.put_u64(OPTION_MAGIC);
    greeting.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
    writer.write_all(&greeting).await?;
    let flags = reader.read_u32().await?;
    if flags & u32::from(FIXED_NEWSTYLE) == 0 || flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(invalid("client flags"));
    }
    let no_zeroes = flags & u32::from(NO_ZEROES) != 0;
    let mut structured = false;
    // The maps agreed on, and for which export: they count only if that is the one gone into.
    let mut agreed: Option<(String, Vec<Context>)> = None;
    for _ in 0..MOST_OPTIONS {
        if reader.read_u64().await? != OPTION_MAGIC {
            return Err(invalid("option magic"));
        }
        let option = reader.read_u32().await?;
        let length = reader.read_u32().await?;
        if length > MOST_DATA {
            return Err(invalid("option length"));
        }
        let mut data = vec![0; length as usize];
        reader.read_exact(&mut data).await?;
        let mut replies = Replies { option, bytes: Vec::new() };
        match option {
            option::EXPORT_NAME => {
                let name = String::from_utf8(data).map_err(|_| invalid("export name"))?;
                // There is no way to say that there is no such export.
                let export = exports.get(&name).ok_or_else(|| invalid("no such export"))?;
                let mut reply = Vec::new();
                reply.put_u64(export.size().get());
                reply.put_u16(TRANSMISSION_FLAGS);
                if !no_zeroes {
                    reply.put_bytes(0, 124);
                }
                writer.write_all(&reply).await?;
                return Ok(Some(begin(export, &name, structured, agreed)));
            }
            option::ABORT => {
                replies.ack();
                writer.write_all(&replies.bytes).await?;
                return Ok(None);
            }
            option::LIST if !data.is_empty() => replies.error(option_reply::ERR_INVALID, "data"),
            option::LIST => {
                for name in exports.keys() {
                    let mut reply = Vec::new();
                    put_string(&mut reply, name);
                    replies.put(option_reply::SERVER, &reply);
                }
                replies.ack();
            }
            option::STRUCTURED_REPLY if !data.is_empty() => {
                replies.error(option_reply::ERR_INVALID, "data");
            }
            option::STRUCTURED_REPLY => {
                structured = true;
                replies.ack();
            }
            option::INFO | option::GO => match name_of(&data).and_then(|name| exports.get_key_value(name)) {
                None => replies.error(option_reply::ERR_UNKNOWN, "there is no such export"),
                Some((name, export)) => {
                    let mut reply = Vec::new();
                    reply.put_u16(info::EXPORT);
                    reply.put_u64(export.size().get());
                    reply.put_u16(TRANSMISSION_FLAGS);
                    replies.put(option_reply::INFO, &reply);
                    reply.clear();
                    reply.put_u16(info::BLOCK_SIZE);
                    reply.put_u32(1);
                    reply.put_u32(PREFERRED);
                    reply.put_u32(MAX_PAYLOAD);
                    replies.put(option_reply::INFO, &reply);
                    replies.ack();
                    if option == option::GO {
                        writer.write_all(&replies.bytes).await?;
                        return Ok(Some(begin(export, name, structured, agreed)));
                    }
                }
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                if structured {
                    agreed = contexts(option, &data, exports, &mut replies).or(agreed);
                } else {
                    replies.error(option_reply::ERR_INVALID, "structured replies first");
                }
            }
            _ => replies.error(option_reply::ERR_UNSUP, "not supported"),
        }
        writer.write_all(&replies.bytes).await?;
    }
    Err(invalid("too many options"))
}

fn begin(
    export: &Arc<dyn Export>,
    name: &str,
    structured: bool,
    agreed: Option<(String, Vec<Context>)>,
) -> Negotiated {
    let contexts = agreed.filter(|(of, _)| of == name).map(|(_, contexts)| contexts).unwrap_or_default();
    Negotiated { export: Arc::clone(export), structured, contexts }
}

/// Answers a list or a choice of maps; what was chosen, if it was a valid choice.
fn contexts(
    option: u32,
    mut data: &[u8],
    exports: &Exports,
    replies: &mut Replies,
) -> Option<(String, Vec<Context>)> {
    let parsed = (|| {
        let name = take_string(&mut data)?.to_owned();
        let count = take_u32(&mut data)?;
        let mut queries = Vec::new();
        for _ in 0..count.min(MOST_DATA) {
            queries.push(take_string(&mut data)?.to_owned());
        }
        data.is_empty().then_some((name, queries))
    })();
    let Some((name, queries)) = parsed else {
        replies.error(option_reply::ERR_INVALID, "malformed");
        return None;
    };
    let Some(export) = exports.get(&name) else {
        replies.error(option_reply::ERR_UNKNOWN, "there is no such export");
        return None;
    };
    let list = option == option::LIST_META_CONTEXT;
    let matches = |full: &str| {
        let namespace = full.split_inclusive(':').next().unwrap_or(full);
        let queried = |query: &String| query == full || list && query == namespace;
        list && queries.is_empty() || queries.iter().any(queried)
    };
    let dirty = export.dirty_context();
    let all = [(Context::Allocation, Some(BASE_ALLOCATION)), (Context::Dirty, dirty)];
    let mut chosen = Vec::new();
    for (context, full) in all {
        let Some(full) = full.filter(|full| matches(full)) else { continue };
        let mut reply = Vec::new();
        reply.put_u32(if list { 0 } else { context.id() });
        reply.extend_from_slice(full.as_bytes());
        replies.put(option_reply::META_CONTEXT, &reply);
        chosen.push(context);
    }
    replies.ack();
    (!list).then_some((name, chosen))
}

struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn put(&mut self, kind: u32, data: &[u8]) {
        self.bytes.put_u64(OPTION_REPLY_MAGIC);
        self.bytes.put_u32(self.option);
        self.bytes.put_u32(kind);
        self.bytes.put_u32(u32::try_from(data.len()).unwrap_or(0));
        self.bytes.extend_from_slice(data);
    }

    fn ack(&mut self) {
        self.put(option_reply::ACK, &[]);
    }

    fn error(&mut self, kind: u32, why: &str) {
        self.put(kind, why.as_bytes());
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.put_u32(u32::try_from(text.len()).unwrap_or(0));
    out.extend_from_slice(text.as_bytes());
}

fn take_u32(data: &mut &[u8]) -> Option<u32> {
    (data.len() >= 4).then(|| data.get_u32())
}

fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a str> {
    let length = take_u32(data)? as usize;
    if length > MAX_STRING {
        return None;
    }
    let (text, rest) = data.split_at_checked(length)?;
    *data = rest;
    std::str::from_utf8(text).ok()
}

/// Of `NBD_OPT_INFO` and `NBD_OPT_GO`: the name, and then what the client would like to be told.
fn name_of(mut data: &[u8]) -> Option<&str> {
    let name = take_string(&mut data)?;
    let (count, rest) = data.split_first_chunk::<2>()?;
    (rest.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}
