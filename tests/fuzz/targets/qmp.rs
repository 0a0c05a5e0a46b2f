//! Any bytes as what QEMU and a guest agent send, in pieces, and as what a
//! guest says of its iSCSI.
#![no_main]

use imaged::hypervisor::{agent, iscsi, lines::Lines, qmp};
use libfuzzer_sys::fuzz_target;

/// Short, so that small inputs have lines that are too long.
const LIMIT: usize = 1 << 10;

fuzz_target!(|data: &[u8]| {
    let mut lines = Lines::new(LIMIT);
    for piece in data.chunks(100) {
        lines.push(piece);
        while let Some(line) = lines.next_line() {
            let Ok(line) = line else { continue };
            assert!(line.len() <= LIMIT);
            let _ = qmp::codec::decode(&line);
            let _ = agent::codec::decode(&line);
            let _ = agent::codec::is_synced(&line, 7);
        }
        assert!(lines.untaken() <= LIMIT);
    }
    let _ = iscsi::read(&String::from_utf8_lossy(data));
});
