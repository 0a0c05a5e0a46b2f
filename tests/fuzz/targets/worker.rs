//! Any bytes as what a worker sends: messages, nonsense, or a wait for a
//! bounded number of bytes; and what is no text is sent as it was received.
#![no_main]

use imaged::worker::frame::{FromWorker, HEADER, MAX_READ, MAX_TEXT};
use libfuzzer_sys::fuzz_target;

/// Kinds of messages that are texts, which are made fit to be shown.
const TEXTS: std::ops::RangeInclusive<u8> = 1..=4;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    loop {
        match FromWorker::decode(rest) {
            Ok(Some((message, used))) => {
                if let FromWorker::Read { len, .. } = message {
                    assert!((1..=MAX_READ).contains(&len));
                }
                let mut bytes = Vec::new();
                message.encode(&mut bytes);
                assert!(TEXTS.contains(&rest[0]) || bytes == rest[..used]);
                rest = &rest[used..];
            }
            Ok(None) => {
                assert!(rest.len() < HEADER + MAX_TEXT);
                return;
            }
            Err(_) => return,
        }
    }
});
