//! The handshake: from a fresh connection to transmission.

use super::{
    endpoint::Context,
    fault::{Fault, Violation, printable},
    protocol::{self, Info, MAX_STRING, OptionKind, OptionReply},
    socket::Stream,
};

/// How many replies an option may have: an export has a size, block sizes, a
/// name, a description, and few things more.
const MAX_REPLIES: usize = 32;

/// Largest request of a server that does not tell: the document's.
const DEFAULT_MAXIMUM: u32 = 32 << 20;

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Session {
    /// Bytes in the export.
    pub(super) size: u64,
    /// Offsets and lengths are multiples of it.
    pub(super) unit: u32,
    /// Longest read.
    pub(super) maximum: u32,
    /// How replies look.
    pub(super) replies: Replies,
}

/// How a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Replies {
    /// With an error number and all bytes; it has no maps.
    Simple,
    /// In chunks, and with maps in the context of this id, where it has it.
    Structured(Option<u32>),
}

/// Agrees on everything with a server that has just been connected to.
pub(super) fn negotiate(
    stream: &mut impl Stream,
    export: &str,
    context: Context,
) -> Result<Session, Fault> {
    if export.len() > MAX_STRING {
        return Err(Fault::Lacking("exports with so long a name"));
    }
    let mut greeting = [0; protocol::GREETING];
    stream.read_exact(&mut greeting)?;
    stream.write_all(&protocol::answer_greeting(&greeting)?)?;

    stream.write_all(&protocol::structured_reply())?;
    let replies =
        match ask(stream, OptionKind::StructuredReply, |_, _| Err(Violation::OptionReply(3))) {
            Ok(()) => Replies::Structured(choose(stream, export, context)?),
            Err(Fault::Declined { .. }) => Replies::Simple,
            Err(fault) => return Err(fault),
        };

    stream.write_all(&protocol::go(export))?;
    let (mut size, mut unit, mut maximum) = (None, 1, DEFAULT_MAXIMUM);
    ask(stream, OptionKind::Go, |reply, data| {
        if reply != OptionReply::Info {
            return Err(Violation::OptionReply(4));
        }
        match Info::parse(data)? {
            Info::Export { size: told } => size = Some(told),
            Info::BlockSize { minimum, maximum: told } => (unit, maximum) = (minimum, told),
            Info::Other => {}
        }
        Ok(())
    })?;
    let size = size.ok_or(Violation::NoSize)?;
    Ok(Session { size, unit, maximum, replies })
}

/// Chooses the context, and returns its id where the server has it.
fn choose(stream: &mut impl Stream, export: &str, context: Context) -> Result<Option<u32>, Fault> {
    stream.write_all(&protocol::set_meta_context(export, context.name()))?;
    let mut chosen = None;
    let answer = ask(stream, OptionKind::SetMetaContext, |reply, data| {
        let (id, name) = protocol::meta_context(data)?;
        if reply != OptionReply::MetaContext || name != context.name().as_bytes() {
            return Err(Violation::Context);
        }
        chosen = Some(id);
        Ok(())
    });
    match answer {
        Ok(()) => Ok(chosen),
        // An export that does not exist is said so again by the next option;
        // whoever cannot do without a map asks whether there is one.
        Err(Fault::Declined { .. }) => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Reads the replies to an option up to the last, and gives those that tell
/// something to `each`.
fn ask(
    stream: &mut impl Stream,
    option: OptionKind,
    mut each: impl FnMut(OptionReply, &[u8]) -> Result<(), Violation>,
) -> Result<(), Fault> {
    for _ in 0..MAX_REPLIES {
        let mut header = [0; protocol::OPTION_HEADER];
        stream.read_exact(&mut header)?;
        let (reply, len) = OptionReply::parse(&header, option)?;
        let mut data = vec![0; len];
        stream.read_exact(&mut data)?;
        match reply {
            OptionReply::Ack => return Ok(()),
            OptionReply::Declined(code) => {
                let why = protocol::declined(code);
                return Err(Fault::Declined { why, message: printable(&data) });
            }
            reply => each(reply, &data)?,
        }
    }
    Err(Violation::Endless.into())
}
