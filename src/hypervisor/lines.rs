//! A stream of bytes as lines of bounded length.

/// Cuts what is received into lines.
///
/// Holds at most one line and one [`push`](Self::push). A line that is too
/// long is reported once and skipped to its end.
#[derive(Debug)]
pub struct Lines {
    buffer: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to where no end of line is.
    searched: usize,
    limit: usize,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Reading,
    Skipping,
}

/// A line has more bytes than its reader allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of more than {limit} bytes")]
pub struct TooLong {
    /// Bytes that a line may have.
    pub limit: usize,
}

impl Lines {
    /// Takes lines of up to `limit` bytes, the end of line not counted.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, searched: 0, limit, state: State::Reading }
    }

    /// Adds what was received. Take all lines before more is added.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line, without its end; `None` until more is received.
    pub fn next_line(&mut self) -> Option<Result<Vec<u8>, TooLong>> {
        loop {
            let end = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n');
            let Some(end) = end.map(|at| at + self.searched) else {
                self.searched = self.buffer.len();
                let long = self.searched - self.start > self.limit;
                if long || self.state == State::Skipping {
                    self.start = self.searched;
                }
                if long && self.state == State::Reading {
                    self.state = State::Skipping;
                    return Some(Err(TooLong { limit: self.limit }));
                }
                return None;
            };
            let line = self.start..end;
            self.start = end + 1;
            self.searched = self.start;
            if std::mem::replace(&mut self.state, State::Reading) == State::Skipping {
                continue;
            }
            if line.len() > self.limit {
                return Some(Err(TooLong { limit: self.limit }));
            }
            return Some(Ok(self.buffer[line].to_vec()));
        }
    }

    /// Bytes that were received and not taken.
    #[must_use]
    pub fn untaken(&self) -> usize {
        self.buffer.len() - self.start
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that comes out when `input` goes in by pieces.
    fn cut(input: &[u8], limit: usize, piece: usize) -> Vec<Option<Vec<u8>>> {
        let mut lines = Lines::new(limit);
        let mut out = Vec::new();
        for piece in input.chunks(piece) {
            lines.push(piece);
            while let Some(line) = lines.next_line() {
                out.push(line.ok());
            }
            assert!(lines.untaken() <= limit);
        }
        out
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            input in proptest::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n')], 0..200),
            limit in 1_usize..40,
            piece in 1_usize..50,
        ) {
            let expected: Vec<_> = input
                .split_inclusive(|&byte| byte == b'\n')
                .filter_map(|line| match line.strip_suffix(b"\n") {
                    Some(line) => Some((line.len() <= limit).then(|| line.to_vec())),
                    // Not ended: only its excess shows.
                    None => (line.len() > limit).then_some(None),
                })
                .collect();
            prop_assert_eq!(cut(&input, limit, piece), expected);
        }
    }
}
