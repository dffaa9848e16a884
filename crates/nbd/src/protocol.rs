//! NBD on the wire: numbers, flags and fixed-size headers, for a client or a server. Section names are those of the
//! NBD specification, `doc/proto.md`. All integers are big-endian.

use std::fmt;

/// "Newstyle negotiation": the first eight bytes, `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "Newstyle negotiation": the second eight bytes and the head of each option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// "Oldstyle negotiation": what stands there instead.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// "Fixed newstyle negotiation": the head of each option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// "Compact request message".
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// "Extended request message".
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// "Simple reply message".
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// "Structured reply chunk message".
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// "Extended reply chunk message".
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// "Values": the longest string either side may send, in bytes.
pub const MAX_STRING: usize = 4096;
/// "Block size constraints": the longest payload that every peer takes, in bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// "Handshake flags", server's and client's: `NBD_FLAG_FIXED_NEWSTYLE`.
pub const FIXED_NEWSTYLE: u16 = 1;
/// "Handshake flags", server's and client's: `NBD_FLAG_NO_ZEROES`.
pub const NO_ZEROES: u16 = 1 << 1;

/// "Option types"
pub mod option {
    /// `NBD_OPT_EXPORT_NAME`
    pub const EXPORT_NAME: u32 = 1;
    /// `NBD_OPT_ABORT`
    pub const ABORT: u32 = 2;
    /// `NBD_OPT_LIST`
    pub const LIST: u32 = 3;
    /// `NBD_OPT_STARTTLS`
    pub const STARTTLS: u32 = 5;
    /// `NBD_OPT_INFO`
    pub const INFO: u32 = 6;
    /// `NBD_OPT_GO`
    pub const GO: u32 = 7;
    /// `NBD_OPT_STRUCTURED_REPLY`
    pub const STRUCTURED_REPLY: u32 = 8;
    /// `NBD_OPT_LIST_META_CONTEXT`
    pub const LIST_META_CONTEXT: u32 = 9;
    /// `NBD_OPT_SET_META_CONTEXT`
    pub const SET_META_CONTEXT: u32 = 10;
    /// `NBD_OPT_EXTENDED_HEADERS`
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// "Option reply types"
pub mod option_reply {
    /// `NBD_REP_ACK`
    pub const ACK: u32 = 1;
    /// `NBD_REP_SERVER`
    pub const SERVER: u32 = 2;
    /// `NBD_REP_INFO`
    pub const INFO: u32 = 3;
    /// `NBD_REP_META_CONTEXT`
    pub const META_CONTEXT: u32 = 4;
    /// The bit that makes a reply an error.
    pub const ERROR: u32 = 1 << 31;
    /// `NBD_REP_ERR_UNSUP`
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// `NBD_REP_ERR_POLICY`
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// `NBD_REP_ERR_INVALID`
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// `NBD_REP_ERR_PLATFORM`
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    /// `NBD_REP_ERR_TLS_REQD`
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// `NBD_REP_ERR_UNKNOWN`
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// `NBD_REP_ERR_SHUTDOWN`
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    /// `NBD_REP_ERR_TOO_BIG`
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// `NBD_REP_ERR_EXT_HEADER_REQD`
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// "Option reply types", `NBD_REP_INFO`
pub mod info {
    /// `NBD_INFO_EXPORT`
    pub const EXPORT: u16 = 0;
    /// `NBD_INFO_BLOCK_SIZE`
    pub const BLOCK_SIZE: u16 = 3;
}

/// "Request types"
pub mod command {
    /// `NBD_CMD_READ`
    pub const READ: u16 = 0;
    /// `NBD_CMD_WRITE`
    pub const WRITE: u16 = 1;
    /// `NBD_CMD_DISC`
    pub const DISC: u16 = 2;
    /// `NBD_CMD_FLUSH`
    pub const FLUSH: u16 = 3;
    /// `NBD_CMD_TRIM`
    pub const TRIM: u16 = 4;
    /// `NBD_CMD_CACHE`
    pub const CACHE: u16 = 5;
    /// `NBD_CMD_WRITE_ZEROES`
    pub const WRITE_ZEROES: u16 = 6;
    /// `NBD_CMD_BLOCK_STATUS`
    pub const BLOCK_STATUS: u16 = 7;
    /// "Command flags": `NBD_CMD_FLAG_PAYLOAD_LEN`, with extended headers only: the length is that of the payload.
    pub const FLAG_PAYLOAD_LEN: u16 = 1 << 5;
}

/// "Structured reply flags" and "Structured reply types"
pub mod chunk {
    /// `NBD_REPLY_FLAG_DONE`
    pub const FLAG_DONE: u16 = 1;
    /// `NBD_REPLY_TYPE_NONE`
    pub const NONE: u16 = 0;
    /// `NBD_REPLY_TYPE_OFFSET_DATA`
    pub const OFFSET_DATA: u16 = 1;
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`
    pub const OFFSET_HOLE: u16 = 2;
    /// `NBD_REPLY_TYPE_BLOCK_STATUS`
    pub const BLOCK_STATUS: u16 = 5;
    /// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The bit that makes a chunk an error, known or not.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// `NBD_REPLY_TYPE_ERROR`
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// `NBD_REPLY_TYPE_ERROR_OFFSET`
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// "Error values"
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(u32);

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Self = Self(1);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// Cannot allocate memory.
    pub const ENOMEM: Self = Self(12);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// No space left on device.
    pub const ENOSPC: Self = Self(28);
    /// Value too large.
    pub const EOVERFLOW: Self = Self(75);
    /// Operation not supported.
    pub const ENOTSUP: Self = Self(95);
    /// The server is being shut down.
    pub const ESHUTDOWN: Self = Self(108);

    /// An error by its number on the wire.
    pub const fn new(code: u32) -> Self {
        Self(code)
    }

    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::EPERM => "EPERM",
            Self::EIO => "EIO",
            Self::ENOMEM => "ENOMEM",
            Self::EINVAL => "EINVAL",
            Self::ENOSPC => "ENOSPC",
            Self::EOVERFLOW => "EOVERFLOW",
            Self::ENOTSUP => "ENOTSUP",
            Self::ESHUTDOWN => "ESHUTDOWN",
            Self(code) => return write!(f, "error {code}"),
        };
        f.write_str(name)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// "Transmission flags": what an export can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransmissionFlags(u16);

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        impl TransmissionFlags {
            $($(#[$doc])*
            pub const fn $name(self) -> bool {
                self.0 & (1 << 0 | 1 << $bit) == (1 << 0 | 1 << $bit)
            })*
        }
    };
}

flags! {
    /// `NBD_FLAG_READ_ONLY`: writes, trims and zeroing are errors.
    read_only = 1;
    /// `NBD_FLAG_SEND_FLUSH`
    can_flush = 2;
    /// `NBD_FLAG_SEND_FUA`
    can_fua = 3;
    /// `NBD_FLAG_ROTATIONAL`
    rotational = 4;
    /// `NBD_FLAG_SEND_TRIM`
    can_trim = 5;
    /// `NBD_FLAG_SEND_WRITE_ZEROES`
    can_write_zeroes = 6;
    /// `NBD_FLAG_SEND_DF`
    can_df = 7;
    /// `NBD_FLAG_CAN_MULTI_CONN`: what one connection flushed, another sees.
    can_multi_conn = 8;
    /// `NBD_FLAG_SEND_CACHE`
    can_cache = 10;
    /// `NBD_FLAG_SEND_FAST_ZERO`
    can_fast_zero = 11;
}

impl TransmissionFlags {
    /// The flags as sent. Without `NBD_FLAG_HAS_FLAGS` (bit 0) none counts.
    pub const fn new(bits: u16) -> Self {
        Self(bits)
    }

    /// The flags as sent.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

/// "Block size constraints", in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// What every request must be aligned to: a power of two up to 64 KiB.
    pub minimum: u32,
    /// What requests had better be aligned to.
    pub preferred: u32,
    /// The longest payload of one request.
    pub maximum: u32,
}

impl BlockSizes {
    /// What holds when the server, asked for them, says nothing: any alignment, 4 KiB preferred, 32 MiB at most.
    pub const UNSAID: Self = Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD };
}

/// How replies are framed, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Simple replies only: no map, and a read that fails half-way cannot say so.
    Simple,
    /// `NBD_OPT_STRUCTURED_REPLY`: replies in chunks, lengths of 32 bits.
    Structured,
    /// `NBD_OPT_EXTENDED_HEADERS`: chunks and requests with lengths of 64 bits.
    Extended,
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// "Command flags"
    pub flags: u16,
    /// One of [`command`].
    pub command: u16,
    /// What the reply will carry.
    pub cookie: u64,
    /// Bytes from the start of the export.
    pub offset: u64,
    /// Bytes; below 4 GiB unless the framing is extended.
    pub length: u64,
}

impl Request {
    /// Appends the header as it goes on the wire: 28 bytes, or 32 with extended headers.
    pub fn encode(&self, framing: Framing, out: &mut impl bytes::BufMut) {
        let extended = framing == Framing::Extended;
        out.put_u32(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC });
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        if extended {
            out.put_u64(self.length);
        } else {
            out.put_u32(u32::try_from(self.length).unwrap_or(u32::MAX));
        }
    }
}
