//! The bytes of the NBD protocol, client's side.
//!
//! Fixed newstyle handshake, then transmission with structured replies, or
//! simple ones where the server has no others. Every number is from
//! `doc/proto.md` of github.com/NetworkBlockDevice/nbd. Pure: bytes in,
//! values out; lengths are checked before anything is allocated.

use super::fault::Violation;

/// The first eight bytes of a server: "NBDMAGIC".
const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// What follows them, and begins each option: "IHAVEOPT".
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins each reply to an option.
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins each request.
const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins each simple reply.
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins each chunk of a structured reply.
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, server's and client's: fixed newstyle, no padding.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 1 << 1;

/// Information in the answer to [`OptionKind::Go`].
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// Longest string of the protocol.
pub(super) const MAX_STRING: usize = 4096;

/// Longest reply to an option: a string and a few numbers, or an error's
/// text, which servers keep to a string.
const MAX_OPTION_REPLY: u32 = 8192;

/// Bytes of the server's greeting.
pub(super) const GREETING: usize = 18;
/// Bytes before an option reply's data.
pub(super) const OPTION_HEADER: usize = 20;
/// Bytes of a request.
pub(super) const REQUEST: usize = 28;
/// Bytes of a simple reply, before data; a chunk's header has four more.
pub(super) const REPLY_HEAD: usize = 16;
/// Bytes of the rest of a chunk's header.
pub(super) const CHUNK_REST: usize = 4;

/// Reads big-endian numbers off the front of bytes.
#[derive(Debug)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Violation> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(Violation::Short)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Violation> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Violation::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Violation> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Violation> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Violation> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Checks the server's greeting and answers with the client's flags, four
/// bytes to send.
pub(super) fn answer_greeting(bytes: &[u8; GREETING]) -> Result<[u8; 4], Violation> {
    let mut fields = Fields::new(bytes);
    if fields.u64()? != SERVER_MAGIC || fields.u64()? != OPTION_MAGIC {
        return Err(Violation::NotNbd);
    }
    let flags = fields.u16()?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(Violation::OldStyle);
    }
    // No padding matters only to an option that is not used here.
    Ok(u32::from(FIXED_NEWSTYLE | flags & NO_ZEROES).to_be_bytes())
}

/// What a client asks for before transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OptionKind {
    /// Begin transmission.
    Go = 7,
    /// Replies in chunks.
    StructuredReply = 8,
    /// Choose what block status tells.
    SetMetaContext = 10,
}

/// One option with its data.
fn option(kind: OptionKind, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend((kind as u32).to_be_bytes());
    bytes.extend(length(data).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Length of something shorter than 4 GiB.
#[allow(clippy::cast_possible_truncation, reason = "strings are limited to MAX_STRING")]
fn length(bytes: &[u8]) -> u32 {
    bytes.len() as u32
}

fn string(text: &str) -> Vec<u8> {
    [&length(text.as_bytes()).to_be_bytes(), text.as_bytes()].concat()
}

/// Asks for structured replies.
pub(super) fn structured_reply() -> Vec<u8> {
    option(OptionKind::StructuredReply, &[])
}

/// Asks for one metadata context of `export`. Neither string may be longer
/// than [`MAX_STRING`].
pub(super) fn set_meta_context(export: &str, context: &str) -> Vec<u8> {
    let data = [string(export), 1_u32.to_be_bytes().to_vec(), string(context)].concat();
    option(OptionKind::SetMetaContext, &data)
}

/// Asks to begin transmission with `export`, and for its block sizes.
pub(super) fn go(export: &str) -> Vec<u8> {
    let wanted = [1_u16.to_be_bytes(), INFO_BLOCK_SIZE.to_be_bytes()].concat();
    option(OptionKind::Go, &[string(export), wanted].concat())
}

/// What a reply to an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OptionReply {
    /// Accepted, and the end of the answer.
    Ack,
    /// A piece of information.
    Info,
    /// A metadata context that was chosen.
    MetaContext,
    /// Declined, with this code (without its highest bit).
    Declined(u32),
}

impl OptionReply {
    /// Reads the header of a reply to `asked`; also how many bytes of data
    /// follow, at most [`MAX_OPTION_REPLY`].
    pub(super) fn parse(
        bytes: &[u8; OPTION_HEADER],
        asked: OptionKind,
    ) -> Result<(Self, usize), Violation> {
        let mut fields = Fields::new(bytes);
        if fields.u64()? != OPTION_REPLY_MAGIC {
            return Err(Violation::Magic);
        }
        if fields.u32()? != asked as u32 {
            return Err(Violation::OtherOption);
        }
        let reply = match fields.u32()? {
            1 => Self::Ack,
            3 => Self::Info,
            4 => Self::MetaContext,
            code if code >> 31 == 1 => Self::Declined(code & !(1 << 31)),
            code => return Err(Violation::OptionReply(code)),
        };
        match fields.u32()? {
            len if len > MAX_OPTION_REPLY => Err(Violation::TooLong(len)),
            len => Ok((reply, len as usize)),
        }
    }
}

/// Why an option was declined, in words.
pub(super) fn declined(code: u32) -> &'static str {
    match code {
        1 => "it does not know the option",
        2 => "its policy forbids it",
        3 => "it finds the option malformed",
        4 => "its platform cannot do it",
        5 => "it insists on TLS",
        6 => "it has no such export",
        7 => "it is shutting down",
        8 => "it insists on block sizes",
        _ => "for an unknown reason",
    }
}

/// The metadata context in a reply: its id, and its name's bytes.
pub(super) fn meta_context(data: &[u8]) -> Result<(u32, &[u8]), Violation> {
    let mut fields = Fields::new(data);
    Ok((fields.u32()?, fields.rest()))
}

/// What a server tells of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Info {
    /// Its size in bytes. The flags tell what writers may do.
    Export { size: u64 },
    /// The smallest unit of requests, a power of two; the preferred; the
    /// largest request.
    BlockSize { minimum: u32, maximum: u32 },
    /// Something else.
    Other,
}

impl Info {
    pub(super) fn parse(data: &[u8]) -> Result<Self, Violation> {
        let mut fields = Fields::new(data);
        Ok(match fields.u16()? {
            INFO_EXPORT => {
                let size = fields.u64()?;
                let _flags = fields.u16()?;
                // Offsets are signed in every system call.
                i64::try_from(size).map_err(|_| Violation::Size(size))?;
                Self::Export { size }
            }
            INFO_BLOCK_SIZE => {
                let (minimum, preferred, maximum) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let ordered = minimum <= preferred && preferred <= maximum;
                // The document allows a minimum of at most 64 KiB.
                if !minimum.is_power_of_two() || minimum > 1 << 16 || !ordered {
                    return Err(Violation::BlockSize);
                }
                Self::BlockSize { minimum, maximum }
            }
            _ => Self::Other,
        })
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read = 0,
    Disconnect = 2,
    BlockStatus = 7,
}

/// One request. No flags are ever set: `NBD_CMD_FLAG_REQ_ONE` would limit
/// block status to one extent, `NBD_CMD_FLAG_DF` would send holes as zeroes.
pub(super) fn request(command: Command, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..28].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// How a message of the server begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyHead {
    /// A whole answer; data follow where it is to a read and no error.
    Simple { cookie: u64, error: u32 },
    /// A chunk of an answer; [`CHUNK_REST`] bytes with its length follow.
    Chunk { cookie: u64, last: Last, kind: ChunkKind },
}

impl ReplyHead {
    pub(super) fn parse(bytes: &[u8; REPLY_HEAD]) -> Result<Self, Violation> {
        let mut fields = Fields::new(bytes);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => {
                let error = fields.u32()?;
                Ok(Self::Simple { cookie: fields.u64()?, error })
            }
            STRUCTURED_REPLY_MAGIC => {
                let flags = fields.u16()?;
                let kind = ChunkKind::parse(fields.u16()?)?;
                let last = if flags & 1 == 1 { Last::Yes } else { Last::No };
                Ok(Self::Chunk { cookie: fields.u64()?, last, kind })
            }
            _ => Err(Violation::Magic),
        }
    }
}

/// Whether a chunk ends its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Yes,
    No,
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkKind {
    /// Nothing.
    None,
    /// An offset and bytes.
    Data,
    /// An offset and how many zeroes.
    Hole,
    /// A context and descriptors.
    BlockStatus,
    /// An error of the whole request, or one of a kind that is not known.
    Error,
    /// An error at an offset.
    ErrorAt,
}

impl ChunkKind {
    fn parse(kind: u16) -> Result<Self, Violation> {
        Ok(match kind {
            0 => Self::None,
            1 => Self::Data,
            2 => Self::Hole,
            5 => Self::BlockStatus,
            0x8002 => Self::ErrorAt,
            _ if kind >> 15 == 1 => Self::Error,
            _ => return Err(Violation::Chunk(kind)),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_laid_out_as_the_document_says() {
        assert_eq!(
            request(Command::BlockStatus, 0x0102_0304_0506_0708, 0x10_0000_0000, 0xffff_0000),
            [
                0x25, 0x60, 0x95, 0x13, 0, 0, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0x10, 0, 0, 0,
                0, 0xff, 0xff, 0, 0
            ]
        );
        let wanted =
            b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
        assert_eq!(set_meta_context("disk", "base:allocation"), wanted);
        assert_eq!(go("d"), b"IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x01d\0\x01\0\x03");
        assert_eq!(structured_reply(), b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    }

    #[test]
    fn only_fixed_newstyle_servers_are_greeted() {
        let greet = |bytes: &[u8; 18]| answer_greeting(bytes);
        assert_eq!(greet(b"NBDMAGICIHAVEOPT\0\x03"), Ok([0, 0, 0, 3]));
        assert_eq!(greet(b"NBDMAGICIHAVEOPT\0\x01"), Ok([0, 0, 0, 1]));
        assert_eq!(greet(b"NBDMAGICIHAVEOPT\0\x02"), Err(Violation::OldStyle));
        assert_eq!(
            greet(b"SSH-2.0-OpenSSH_9.\0"[..18].try_into().unwrap()),
            Err(Violation::NotNbd)
        );
        assert_eq!(greet(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"), Err(Violation::NotNbd));
    }

    #[test]
    fn option_replies_are_limited_and_belong_to_the_option() {
        let header = |kind: u32, option: u32, len: u32| {
            let parts = [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &option.to_be_bytes()];
            let parts = [&parts.concat()[..], &kind.to_be_bytes(), &len.to_be_bytes()].concat();
            OptionReply::parse(parts[..].try_into().unwrap(), OptionKind::Go)
        };
        assert_eq!(header(1, 7, 0), Ok((OptionReply::Ack, 0)));
        assert_eq!(header(3, 7, 8192), Ok((OptionReply::Info, 8192)));
        assert_eq!(header(3, 7, 8193), Err(Violation::TooLong(8193)));
        assert_eq!(header(1, 8, 0), Err(Violation::OtherOption));
        assert_eq!(header(2, 7, 0), Err(Violation::OptionReply(2)));
        assert_eq!(header(0x8000_0006, 7, 3), Ok((OptionReply::Declined(6), 3)));
    }

    #[test]
    fn information_is_checked() {
        let export = |size: u64| Info::parse(&[&[0, 0][..], &size.to_be_bytes(), &[0, 1]].concat());
        assert_eq!(export(1 << 40), Ok(Info::Export { size: 1 << 40 }));
        assert_eq!(export(1 << 63), Err(Violation::Size(1 << 63)));
        let sizes = |sizes: [u32; 3]| {
            let numbers: Vec<_> = sizes.into_iter().flat_map(u32::to_be_bytes).collect();
            Info::parse(&[&[0, 3][..], &numbers].concat())
        };
        let good = Info::BlockSize { minimum: 512, maximum: 1 << 25 };
        assert_eq!(sizes([512, 4096, 1 << 25]), Ok(good));
        for bad in [[0, 1, 1], [3, 4, 5], [1 << 17, 1 << 17, 1 << 17], [512, 256, 1024], [1, 9, 8]]
        {
            assert_eq!(sizes(bad), Err(Violation::BlockSize), "{bad:?}");
        }
        assert_eq!(Info::parse(&[0, 2, b'x']), Ok(Info::Other));
        assert_eq!(Info::parse(&[0]), Err(Violation::Short));
    }

    proptest! {
        #[test]
        fn nothing_that_a_server_sends_is_out_of_bounds(bytes: Vec<u8>, padded: [u8; 20]) {
            let _ = Info::parse(&bytes);
            let _ = meta_context(&bytes);
            if let Ok((_, len)) = OptionReply::parse(&padded, OptionKind::Go) {
                prop_assert!(len <= 8192);
            }
        }
    }
}
