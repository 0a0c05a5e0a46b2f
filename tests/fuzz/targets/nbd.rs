//! Any bytes as what an NBD server sends: every answer is an error, or lies in
//! what was asked for, and every wait ends with the bytes.
#![no_main]

use std::{
    io::{self, Read, Write},
    time::{Duration, Instant},
};

use imaged::block::nbd::{Client, Context, Endpoint, Role, Stream};
use libfuzzer_sys::fuzz_target;

/// Hangs up after its bytes, and takes whatever it is told.
struct Server<'a>(&'a [u8]);

impl Read for Server<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Server<'_> {
    fn set_deadline(&mut self, _: Instant) {}

    fn ready(&mut self, _: Duration) -> io::Result<bool> {
        Ok(true)
    }
}

/// Bytes that are read.
const LEN: usize = 64 << 10;

fuzz_target!(|data: &[u8]| {
    for (role, context) in [(Role::Snapshot, Context::Content), (Role::Scratch, Context::Depth)] {
        let endpoint = Endpoint { socket: "/s".into(), export: "disk".into(), role };
        let over = Client::<Vec<u8>, _>::over(Server(data), &endpoint, context, Duration::from_secs(1));
        let Ok(mut client) = over else { continue };
        let size = client.size().get();
        if size >= LEN as u64 && client.read(vec![0; LEN], 0, 0..LEN).is_ok() {
            if let Ok(Some(finished)) = client.finished(Duration::ZERO) {
                assert_eq!((finished.offset, finished.range), (0, 0..LEN));
            }
        }
        let asked = 0..size.min(1 << 30);
        if context == Context::Depth {
            let Ok(extents) = client.allocation(asked.clone()) else { continue };
            let mut end = 0;
            for extent in extents.map_while(Result::ok) {
                assert!(extent.0.start == end && extent.0.end <= asked.end);
                end = extent.0.end;
            }
        } else {
            let Ok(extents) = client.contents(asked.clone()) else { continue };
            let mut end = 0;
            for extent in extents.map_while(Result::ok) {
                assert!(extent.0.start == end && extent.0.end <= asked.end);
                end = extent.0.end;
            }
        }
    }
});
