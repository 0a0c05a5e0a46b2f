//! Servers as scripts: what a client makes of their bytes.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{Allocated, Client, Content, Context, Endpoint, Fault, Role, Stream, Violation, fault};
use crate::error::{Error, Reason, Result};

const PATIENCE: Duration = Duration::from_millis(50);

/// A server that says what it was told to say.
#[derive(Debug, Default)]
struct Script {
    says: VecDeque<u8>,
    heard: Vec<u8>,
    then: Then,
}

/// What follows a script's end.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Then {
    #[default]
    End,
    Silence,
}

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.says.is_empty() && self.then == Then::Silence {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.says.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.heard.extend(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Script {
    fn set_deadline(&mut self, _: Instant) {}

    fn ready(&mut self, at_most: Duration) -> io::Result<bool> {
        let ready = !self.says.is_empty() || self.then == Then::End;
        if !ready {
            std::thread::sleep(at_most);
        }
        Ok(ready)
    }
}

fn endpoint(role: Role) -> Endpoint {
    Endpoint { socket: "/run/vm/nbd.sock".into(), export: "disk".into(), role }
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for number in [option, kind, u32::try_from(data.len()).unwrap()] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

fn export(size: u64) -> Vec<u8> {
    reply(7, 3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat())
}

/// A handshake with structured replies and context 7, for `size` bytes.
fn greeted(context: Context, size: u64) -> Vec<u8> {
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        reply(8, 1, &[]),
        reply(10, 4, &[&[0, 0, 0, 7], context.name().as_bytes()].concat()),
        reply(10, 1, &[]),
        export(size),
        reply(7, 3, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]),
        reply(7, 1, &[]),
    ]
    .concat()
}

fn chunk(cookie: u64, flags: u8, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x66, 0x8e, 0x33, 0xef, 0, flags];
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn data(cookie: u64, flags: u8, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(cookie, flags, 1, &[&offset.to_be_bytes()[..], bytes].concat())
}

fn status(cookie: u64, extents: &[[u32; 2]]) -> Vec<u8> {
    let numbers = [7].into_iter().chain(extents.iter().flatten().copied());
    chunk(cookie, 1, 5, &numbers.flat_map(u32::to_be_bytes).collect::<Vec<_>>())
}

type Scripted = Client<Vec<u8>, Script>;

fn over(says: &[Vec<u8>], then: Then, context: Context, role: Role) -> Result<Scripted> {
    let script = Script { says: says.concat().into(), then, heard: Vec::new() };
    Client::over(script, &endpoint(role), context, PATIENCE)
}

/// A client after the handshake with an export of 8 KiB, whose server then
/// `says` this.
fn client(says: &[Vec<u8>]) -> Scripted {
    let says = [&[greeted(Context::Content, 8192)], says].concat();
    over(&says, Then::End, Context::Content, Role::Snapshot).unwrap()
}

fn shown(error: &Error) -> String {
    format!("{error:?}")
}

#[test]
fn a_client_asks_for_what_it_needs_and_no_more() {
    let client = client(&[]);
    assert_eq!((client.size().get(), client.unit(), client.has_map()), (8192, 512, true));
    let heard = String::from_utf8_lossy(&client.stream.get_ref().heard).replace('\0', ".");
    insta::assert_snapshot!(heard.escape_default(), @r"...\u{3}IHAVEOPT...\u{8}....IHAVEOPT...\n...\u{1f}...\u{4}disk...\u{1}...\u{f}base:allocationIHAVEOPT...\u{7}...\u{c}...\u{4}disk.\u{1}.\u{3}");
}

#[test]
fn an_export_that_cannot_be_opened_is_named() {
    let refused = |says: &[Vec<u8>], then| {
        shown(&over(says, then, Context::Content, Role::Volume).unwrap_err())
    };
    let hello = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let none = [
        hello.clone(),
        reply(8, 1, &[]),
        reply(10, 0x8000_0006, b""),
        reply(7, 0x8000_0006, b"export 'disk' not present"),
    ];
    insta::assert_snapshot!(refused(&none, Then::End), @r#"
    VOLUME_UNAVAILABLE: cannot open the NBD export "disk" at /run/vm/nbd.sock
      0: the server declines it: it has no such export: "export 'disk' not present"
    "#);
    insta::assert_snapshot!(refused(std::slice::from_ref(&hello), Then::Silence), @r#"
    VOLUME_UNAVAILABLE: cannot open the NBD export "disk" at /run/vm/nbd.sock
      0: the server sent nothing for 0.05 seconds
    "#);
    insta::assert_snapshot!(refused(std::slice::from_ref(&hello), Then::End), @r#"
    VOLUME_UNAVAILABLE: cannot open the NBD export "disk" at /run/vm/nbd.sock
      0: the server closed the connection
    "#);
    insta::assert_snapshot!(refused(&[b"SSH-2.0-OpenSSH_9.2 more".to_vec()], Then::End), @r#"
    VOLUME_UNAVAILABLE: cannot open the NBD export "disk" at /run/vm/nbd.sock
      0: the server does not follow the NBD protocol
      1: it does not greet as an NBD server
    "#);
    let endless = [hello.clone(), reply(8, 1, &[]), reply(10, 1, &[]), export(1).repeat(40)];
    assert!(refused(&endless, Then::End).contains("no end of replies"));
    let sizeless = [hello, reply(8, 1, &[]), reply(10, 1, &[]), reply(7, 1, &[])];
    assert!(refused(&sizeless, Then::End).contains("does not tell the export's size"));
}

#[test]
fn reads_end_in_any_order_and_piece_by_piece() {
    let hole = [&512_u64.to_be_bytes()[..], &512_u32.to_be_bytes()].concat();
    let mut client = client(&[
        data(2, 0, 4096 + 256, &[3; 256]),
        chunk(1, 0, 2, &hole),
        data(2, 0, 4096, &[2; 256]),
        chunk(2, 1, 0, &[]),
        data(1, 1, 0, &[1; 512]),
    ]);
    client.read(vec![9; 2048], 0, 512..1536).unwrap();
    client.read(vec![9; 512], 4096, 0..512).unwrap();
    assert_eq!(client.in_flight(), 2);
    let second = client.finished(PATIENCE).unwrap().unwrap();
    assert_eq!((second.offset, second.range), (4096, 0..512));
    assert_eq!(second.buffer, [[2; 256], [3; 256]].concat());
    let first = client.finished(PATIENCE).unwrap().unwrap();
    assert_eq!((first.offset, first.range), (0, 512..1536));
    assert_eq!(first.buffer, [[9; 512], [1; 512], [0; 512], [9; 512]].concat());
    assert_eq!(client.in_flight(), 0);
    assert!(client.finished(PATIENCE).unwrap().is_none());
}

#[test]
fn a_server_without_chunks_is_read_too() {
    let simple = |error: u8, cookie: u8, bytes: &[u8]| {
        let head = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, error, 0, 0, 0, 0, 0, 0, 0, cookie];
        [&head, bytes].concat()
    };
    let says = [
        b"NBDMAGICIHAVEOPT\0\x01".to_vec(),
        reply(8, 0x8000_0001, b""),
        export(8192),
        reply(7, 1, &[]),
        simple(0, 2, &[5; 1000]),
        simple(5, 1, &[]),
    ];
    let mut client = over(&says, Then::End, Context::Content, Role::Volume).unwrap();
    assert!(!client.has_map());
    let map: Vec<_> = client.contents(0..8192).unwrap().map(|extent| extent.unwrap()).collect();
    assert_eq!(map, [(0..8192, Content::Data)]);
    client.read(vec![0; 512], 0, 0..512).unwrap();
    client.read(vec![0; 1000], 7, 0..1000).unwrap();
    assert_eq!(client.finished(PATIENCE).unwrap().unwrap().buffer, [5; 1000]);
    insta::assert_snapshot!(shown(&client.finished(PATIENCE).unwrap_err()), @r#"
    READ_FAILED: cannot read 512 B at offset 0 of the NBD export "disk" at /run/vm/nbd.sock
      0: the server answers EIO
      help: look into the log of the instance's QEMU
    "#);
    let says = [&says[..4], &[status(1, &[[512, 0]])]].concat();
    let mut client = over(&says, Then::End, Context::Depth, Role::Scratch).unwrap();
    let error = client.allocation(0..512).unwrap().next().unwrap().unwrap_err();
    assert!(shown(&error).contains("the server does not offer qemu:allocation-depth"), "{error:?}");
}

#[test]
fn a_refusal_is_told_from_a_broken_connection() {
    let einval = [&[0, 0, 0, 22, 0, 6][..], b"sorry!"].concat();
    let mut client = client(&[chunk(1, 1, 0x8001, &einval), data(2, 1, 0, &[1; 512])]);
    client.read(vec![0; 512], 0, 0..512).unwrap();
    client.read(vec![0; 512], 0, 0..512).unwrap();
    client.read(vec![0; 512], 1024, 0..512).unwrap();
    let error = client.finished(PATIENCE).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Refused { code, .. }) if code.0 == 22));
    insta::assert_snapshot!(shown(&error), @r#"
    SNAPSHOT_BROKEN: cannot read 512 B at offset 0 of the NBD export "disk" at /run/vm/nbd.sock
      0: the server answers EINVAL: "sorry!"
      help: the guest wrote faster than the scratch area could save what was there: give it more room or a faster disk, then ask again
    "#);
    assert!(client.finished(PATIENCE).unwrap().is_some(), "the others go on");
    let error = client.finished(PATIENCE).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Transport(_))));
    insta::assert_snapshot!(shown(&error), @r#"
    SNAPSHOT_BROKEN: cannot read 512 B at offset 1024 of the NBD export "disk" at /run/vm/nbd.sock
      0: the server closed the connection
      help: the scratch area was full or too slow, or the instance's QEMU has ended: look into its log, give the scratch area more room or a faster disk, then ask again
    "#);
    assert_eq!(client.in_flight(), 0);
    let error = client.read(vec![0; 512], 0, 0..512).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Dead)), "{error:?}");
}

#[test]
fn a_silent_server_is_waited_for_only_so_long() {
    let says = [greeted(Context::Content, 8192)];
    let mut client = over(&says, Then::Silence, Context::Content, Role::Volume).unwrap();
    client.read(vec![0; 512], 0, 0..512).unwrap();
    assert!(client.finished(PATIENCE / 2).unwrap().is_none());
    let error = client.finished(PATIENCE).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Silent(_))), "{error:?}");
    let says = [greeted(Context::Content, 8192), data(1, 1, 0, &[1; 512])[..100].to_vec()];
    let mut client = over(&says, Then::Silence, Context::Content, Role::Volume).unwrap();
    client.read(vec![0; 512], 0, 0..512).unwrap();
    let error = client.finished(PATIENCE).unwrap_err();
    assert!(matches!(fault(&error), Some(Fault::Silent(_))), "{error:?}");
}

#[test]
fn what_the_protocol_forbids_ends_the_connection() {
    let wrong = |says: &[Vec<u8>]| {
        let mut client = client(says);
        client.read(vec![0; 512], 512, 0..512).unwrap();
        let error = client.finished(PATIENCE).unwrap_err();
        assert_eq!(error.reason(), Reason::ReadFailed);
        match fault(&error) {
            Some(Fault::Violation(violation)) => *violation,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(wrong(&[data(9, 1, 512, &[0; 512])]), Violation::Cookie);
    assert_eq!(wrong(&[data(1, 1, 0, &[0; 512])]), Violation::Outside);
    assert_eq!(wrong(&[data(1, 1, 513, &[0; 512])]), Violation::Outside);
    assert_eq!(wrong(&[data(1, 1, 512, &[0; 511])]), Violation::Incomplete);
    assert_eq!(wrong(&[chunk(1, 1, 0, &[])]), Violation::Incomplete);
    assert_eq!(wrong(&[status(1, &[[512, 0]])]), Violation::Unexpected);
    assert_eq!(wrong(&[chunk(1, 1, 9, &[])]), Violation::Chunk(9));
    assert_eq!(wrong(&[vec![0; 16]]), Violation::Magic);
    let simple = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &1_u64.to_be_bytes(), &[0; 512]];
    assert_eq!(wrong(&[simple.concat()]), Violation::Unexpected);
}

#[test]
fn requests_that_do_not_fit_are_never_sent() {
    let mut client = client(&[]);
    let sent = client.stream.get_ref().heard.len();
    for (offset, range) in [(0, 0..0), (0, 0..513), (8192 - 511, 0..512), (u64::MAX, 0..512)] {
        let error = client.read(vec![0; 512], offset, range).unwrap_err();
        assert_eq!(error.reason(), Reason::Internal);
    }
    assert_eq!(client.stream.get_ref().heard.len(), sent);
    for _ in 0..16 {
        client.read(vec![0; 512], 0, 0..512).unwrap();
    }
    assert_eq!(client.read(vec![0; 512], 0, 0..512).unwrap_err().reason(), Reason::Internal);
    assert!(client.allocation(0..512).is_err(), "connected for another map");
}

#[test]
fn a_map_is_asked_for_until_it_is_complete_and_equal_neighbours_are_one() {
    let mut client = client(&[
        status(1, &[[1024, 0], [512, 0]]),
        status(2, &[[512, 0], [512, 3], [512, 2], [512, 1]]),
        status(3, &[[1 << 20, 3]]),
    ]);
    let map: Vec<_> = client.contents(512..8000).unwrap().map(|extent| extent.unwrap()).collect();
    assert_eq!(
        map,
        [
            (512..2560, Content::Data),
            (2560..3072, Content::Hole),
            (3072..3584, Content::Zero),
            (3584..4096, Content::Data),
            (4096..8000, Content::Hole),
        ]
    );
    let says = [greeted(Context::Depth, 8192), status(1, &[[4096, 0], [1024, 2], [3072, 1]])];
    let mut client = over(&says, Then::End, Context::Depth, Role::Scratch).unwrap();
    let map: Vec<_> = client.allocation(0..8192).unwrap().map(|extent| extent.unwrap()).collect();
    assert_eq!(map, [(0..4096, Allocated::No), (4096..8192, Allocated::Yes)]);
    assert!(client.contents(0..512).is_err(), "connected for another map");
}

#[test]
fn a_map_ends_with_its_first_error() {
    for bad in [status(2, &[[0, 0]]), status(2, &[]), chunk(2, 1, 0, &[])] {
        let mut client = client(&[status(1, &[[512, 0]]), bad]);
        let mut map = client.contents(0..8192).unwrap();
        let error = map.next().unwrap().unwrap_err();
        assert!(matches!(fault(&error), Some(Fault::Violation(_))), "{error:?}");
        assert!(map.next().is_none());
    }
}

proptest! {
    /// Whatever a server says, a client ends, with no byte outside of the
    /// place for it.
    #[test]
    fn hostile_servers_get_nowhere(
        says in prop::collection::vec(
            prop_oneof![
                any::<[u8; 4]>().prop_map(|bytes| bytes.to_vec()),
                (1..4_u64, 0..2_u8, prop_oneof![0..6_u16, 0x8000..0x8004_u16], prop::collection::vec(any::<u8>(), 0..40))
                    .prop_map(|(cookie, flags, kind, payload)| chunk(cookie, flags, kind, &payload)),
                (1..4_u64, 0..2_u8, 0..3_u64, 0..600_usize)
                    .prop_map(|(cookie, flags, at, len)| data(cookie, flags, at * 256, &vec![1; len])),
                (1..4_u64, prop::collection::vec([0..9000_u32, 0..4_u32], 0..4))
                    .prop_map(|(cookie, extents)| status(cookie, &extents)),
            ],
            0..12,
        ),
    ) {
        let mut client = client(&says);
        client.read(vec![9; 1024], 256, 256..768).unwrap();
        client.read(vec![9; 512], 0, 0..512).unwrap();
        for _ in 0..20 {
            match client.finished(PATIENCE) {
                Ok(None) => break,
                Ok(Some(finished)) => {
                    let outside = finished.buffer.iter().enumerate().filter(|(at, _)| !finished.range.contains(at));
                    prop_assert!(outside.into_iter().all(|(_, &byte)| byte == 9));
                }
                Err(_) => {}
            }
        }
        if let Ok(extents) = client.contents(0..8192) {
            let mut next = 0;
            for extent in extents.map_while(|extent| extent.ok()) {
                prop_assert_eq!(extent.0.start, next);
                prop_assert!(extent.0.end > next && extent.0.end <= 8192);
                next = extent.0.end;
            }
        }
    }
}
