//! Cuts a peer's byte stream into messages.

/// Collects bytes and gives out messages: a line each.
///
/// A monitor made with `pretty=on` spreads a message over many lines. QEMU indents all of them but the first, `{`,
/// and the last, `}`, and neither is a message by itself, so both forms can be told apart without being told.
pub(crate) struct LineDecoder {
    buffer: Vec<u8>,
    /// Start of the message that is being collected.
    start: usize,
    /// Start of its last, unfinished line.
    line: usize,
    /// Up to here there is no further line end, so that no byte is looked at twice.
    scanned: usize,
    /// Inside a message of several lines.
    open: bool,
    pretty: bool,
    cap: usize,
}

/// A message is longer than the decoder's cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong;

impl LineDecoder {
    /// For messages of one line; `cap` is the most bytes that one may have.
    pub(crate) fn lines(cap: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, line: 0, scanned: 0, open: false, pretty: false, cap }
    }

    /// For messages of one line or pretty-printed ones.
    pub(crate) fn messages(cap: usize) -> Self {
        Self { pretty: true, ..Self::lines(cap) }
    }

    /// Changes the cap, in bytes.
    pub(crate) fn set_cap(&mut self, cap: usize) {
        self.cap = cap;
    }

    /// Takes in what was read.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.line -= self.start;
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// What was taken in but not given out.
    pub(crate) fn rest(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// Forgets what was taken in but not given out.
    pub(crate) fn clear(&mut self) {
        self.buffer.clear();
        (self.start, self.line, self.scanned, self.open) = (0, 0, 0, false);
    }

    /// The next whole message, without its line end and never empty; `None` until there is one.
    pub(crate) fn next_message(&mut self) -> Result<Option<&[u8]>, TooLong> {
        loop {
            let unseen = self.buffer.get(self.scanned..).unwrap_or_default();
            let Some(length) = unseen.iter().position(|byte| *byte == b'\n') else {
                self.scanned = self.buffer.len();
                return if self.scanned - self.start > self.cap { Err(TooLong) } else { Ok(None) };
            };
            let end = self.scanned + length;
            let line = self.buffer.get(self.line..end).unwrap_or_default().trim_ascii_end();
            self.scanned = end + 1;
            self.line = end + 1;
            if end - self.start > self.cap {
                return Err(TooLong);
            }
            if self.open {
                self.open = line != b"}";
            } else if line.is_empty() {
                self.start = end + 1;
                continue;
            } else {
                self.open = self.pretty && line == b"{";
            }
            if !self.open {
                let message = self.start..end;
                self.start = end + 1;
                return Ok(Some(self.buffer.get(message).unwrap_or_default().trim_ascii_end()));
            }
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn all(decoder: &mut LineDecoder) -> Result<Vec<Vec<u8>>, TooLong> {
        let mut out = Vec::new();
        while let Some(message) = decoder.next_message()? {
            out.push(message.to_vec());
        }
        Ok(out)
    }

    #[test]
    fn lines_end_with_or_without_a_carriage_return() {
        let mut decoder = LineDecoder::messages(100);
        decoder.push(b"{\"a\": 1}\r\n\r\n\n{\"b\"");
        assert_eq!(all(&mut decoder).unwrap(), [b"{\"a\": 1}"]);
        assert_eq!(decoder.rest(), b"{\"b\"");
        decoder.push(b": 2}\n");
        assert_eq!(all(&mut decoder).unwrap(), [b"{\"b\": 2}"]);
        assert_eq!(decoder.rest(), b"");
    }

    #[test]
    fn a_pretty_printed_message_is_one_message() {
        let text = b"{\r\n    \"return\": {\r\n    }\r\n}\r\n{\"id\": 1}\r\n";
        let mut decoder = LineDecoder::messages(100);
        decoder.push(text);
        let messages = all(&mut decoder).unwrap();
        assert_eq!(
            messages,
            [&text[..text.len() - 13][..], b"{\"id\": 1}"].map(|m| m.trim_ascii_end().to_vec())
        );

        let mut decoder = LineDecoder::lines(100);
        decoder.push(text);
        assert_eq!(
            all(&mut decoder).unwrap().len(),
            5,
            "an agent's stray brace must not swallow what follows"
        );
    }

    #[test]
    fn the_cap_holds_with_and_without_a_line_end() {
        let mut decoder = LineDecoder::messages(4);
        decoder.push(b"1234\n1234");
        assert_eq!(all(&mut decoder).unwrap(), [b"1234"]);
        decoder.push(b"5");
        assert_eq!(decoder.next_message(), Err(TooLong));

        let mut decoder = LineDecoder::messages(4);
        decoder.push(b"12345\n");
        assert_eq!(decoder.next_message(), Err(TooLong));

        let mut decoder = LineDecoder::messages(4);
        decoder.push(b"{\n 1\n}\n");
        assert_eq!(decoder.next_message(), Err(TooLong), "the cap is the message's, not the line's");
    }

    proptest! {
        /// However the bytes are cut, the messages are the same; none is empty or longer than the cap.
        #[test]
        fn the_cut_of_the_stream_does_not_matter(
            bytes in prop::collection::vec(prop_oneof![
                4 => any::<u8>(), 2 => Just(b'\n'), 1 => Just(b'{'), 1 => Just(b'}'), 1 => Just(b'\r')], 0..400),
            cuts in prop::collection::vec(1usize..20, 1..50),
            cap in 1usize..40,
            pretty: bool,
        ) {
            let new = || if pretty { LineDecoder::messages(cap) } else { LineDecoder::lines(cap) };
            let mut whole = Vec::new();
            let mut decoder = new();
            decoder.push(&bytes);
            let end = loop {
                match decoder.next_message() {
                    Ok(Some(message)) => whole.push(message.to_vec()),
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };

            let mut pieces = Vec::new();
            let mut decoder = new();
            let (mut rest, mut cuts, mut cut_end) = (&bytes[..], cuts.iter().cycle(), Ok(()));
            'feed: while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                rest = later;
                decoder.push(now);
                loop {
                    match decoder.next_message() {
                        Ok(Some(message)) => pieces.push(message.to_vec()),
                        Ok(None) => break,
                        Err(error) => { cut_end = Err(error); break 'feed }
                    }
                }
                prop_assert!(decoder.rest().len() <= cap);
            }
            prop_assert_eq!(&pieces, &whole);
            prop_assert_eq!(cut_end, end);
            for message in whole {
                prop_assert!(message.len() <= cap);
                prop_assert!(!message.is_empty());
                prop_assert!(pretty || !message.contains(&b'\n'));
            }
        }
    }
}
