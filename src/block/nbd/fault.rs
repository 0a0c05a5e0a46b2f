//! What can go wrong between a client and its server.

use std::{io, time::Duration};

/// Why a request to an NBD server failed: the cause under the
/// [`Error`](crate::error::Error) that names export and request.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The server is there and says no. The connection goes on.
    #[error("the server answers {code}{}", told(.message))]
    Refused {
        /// With which error.
        code: Code,
        /// The server's own words, made printable; often empty.
        message: String,
    },
    /// The server declined an option of the handshake.
    #[error("the server declines it: {why}{}", told(.message))]
    Declined {
        /// In words.
        why: &'static str,
        /// The server's own words, made printable; often empty.
        message: String,
    },
    /// The server lacks what is needed.
    #[error("the server does not offer {0}")]
    Lacking(&'static str),
    /// The server does not follow the protocol.
    #[error("the server does not follow the NBD protocol")]
    Violation(#[from] Violation),
    /// The server is silent.
    #[error("the server sent nothing for {} seconds", .0.as_secs_f32())]
    Silent(Duration),
    /// The connection failed.
    #[error(transparent)]
    Transport(#[from] io::Error),
    /// It failed before and is not used again: another server may be at the
    /// socket now, which knows nothing of what this one had promised.
    #[error("the connection failed before")]
    Dead,
}

impl Fault {
    /// A refusal with the server's words in `message`.
    pub(super) fn refused(code: u32, message: &[u8]) -> Self {
        Self::Refused { code: Code(code), message: printable(message) }
    }
}

/// An error number of the protocol, which are Linux's of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.0 {
            1 => "EPERM",
            5 => "EIO",
            12 => "ENOMEM",
            22 => "EINVAL",
            28 => "ENOSPC",
            75 => "EOVERFLOW",
            95 => "ENOTSUP",
            108 => "ESHUTDOWN",
            other => return write!(f, "error {other}"),
        };
        f.write_str(name)
    }
}

/// How many characters of a server's message are kept: a sentence.
const MESSAGE_LIMIT: usize = 200;

/// A server's text as one printable line.
pub(super) fn printable(message: &[u8]) -> String {
    let text = String::from_utf8_lossy(message);
    let shown = text.chars().take(MESSAGE_LIMIT);
    shown.map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

fn told(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": \"{message}\"") }
}

/// What a server did that the protocol forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// No NBD server, or one of before 2007.
    #[error("it does not greet as an NBD server")]
    NotNbd,
    /// No fixed newstyle.
    #[error("it negotiates in the old style")]
    OldStyle,
    /// A message begins wrongly.
    #[error("a message begins with unknown bytes")]
    Magic,
    /// An answer to another option.
    #[error("it answered an option that was not asked for")]
    OtherOption,
    /// A reply to an option that does not fit.
    #[error("reply {0} does not fit the option")]
    OptionReply(u32),
    /// More replies to one option than any server has reason to send.
    #[error("there is no end of replies to an option")]
    Endless,
    /// More bytes than the message may have.
    #[error("a message of {0} bytes is too long")]
    TooLong(u32),
    /// Fewer bytes than the message must have.
    #[error("a message is cut off")]
    Short,
    /// An export larger than anything.
    #[error("the export's size of {0} bytes is impossible")]
    Size(u64),
    /// The export's size is missing.
    #[error("it does not tell the export's size")]
    NoSize,
    /// Block sizes that contradict each other or the document.
    #[error("its block sizes are impossible")]
    BlockSize,
    /// An unknown kind of chunk.
    #[error("a chunk of kind {0} is unknown")]
    Chunk(u16),
    /// A kind of reply that does not fit the request or was not negotiated.
    #[error("a reply does not fit its request")]
    Unexpected,
    /// An answer to nothing.
    #[error("it answered a request that was not made")]
    Cookie,
    /// Bytes from outside the request.
    #[error("it sent bytes that were not asked for")]
    Outside,
    /// The same bytes twice.
    #[error("it sent the same bytes twice")]
    Overlap,
    /// An answer in too many pieces.
    #[error("an answer comes in too many pieces")]
    Pieces,
    /// Success without all bytes.
    #[error("an answer ended before it was complete")]
    Incomplete,
    /// An extent of no length.
    #[error("an extent has no length")]
    EmptyExtent,
    /// Descriptors of a context that was not chosen.
    #[error("a map is of a context that was not chosen")]
    Context,
    /// An error without a number.
    #[error("an error has no number")]
    NoError,
}
