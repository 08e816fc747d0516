//! Lines from a stream that is not trusted: each is cut at a limit, so that memory stays bounded whatever
//! the other side sends.

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// One line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// At most the reader's limit.
    pub bytes: Vec<u8>,
    /// The line was longer; the rest is skipped.
    pub cut: bool,
}

/// Reads lines of at most `limit` bytes.
#[derive(Debug)]
pub(crate) struct LineReader<R> {
    stream: R,
    limit: usize,
    /// Read, not yet handed out: `buffer[start..end]`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    line: Vec<u8>,
    cut: bool,
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    const BUFFER: usize = 4096;

    pub(crate) fn new(stream: R, limit: usize) -> Self {
        let buffer = vec![0; Self::BUFFER].into_boxed_slice();
        Self { stream, limit, buffer, start: 0, end: 0, line: vec![], cut: false }
    }

    /// The next line; `None` at the end. A last line without an end counts. Cancel safe: what was read stays
    /// for the next call.
    pub(crate) async fn next(&mut self) -> std::io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.take_buffered() {
                return Ok(Some(line));
            }
            self.start = 0;
            self.end = 0;
            self.end = self.stream.read(&mut self.buffer).await?;
            if self.end == 0 {
                return Ok((!self.line.is_empty()).then(|| self.finish()));
            }
        }
    }

    /// The stream, for writing to the other side.
    pub(crate) fn stream_mut(&mut self) -> &mut R {
        &mut self.stream
    }

    /// Moves the buffer into the line; a line when its end was there.
    fn take_buffered(&mut self) -> Option<Line> {
        let bytes = &self.buffer[self.start..self.end];
        let length = bytes.iter().position(|byte| *byte == b'\n');
        let part = &bytes[..length.unwrap_or(bytes.len())];
        let room = self.limit - self.line.len();
        self.line.extend_from_slice(&part[..part.len().min(room)]);
        self.cut |= part.len() > room;
        self.start = length.map_or(self.end, |length| self.start + length + 1);
        length.map(|_| self.finish())
    }

    fn finish(&mut self) -> Line {
        if !self.cut && self.line.last() == Some(&b'\r') {
            self.line.pop();
        }
        Line { bytes: std::mem::take(&mut self.line), cut: std::mem::take(&mut self.cut) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(input: &[u8], limit: usize) -> Vec<Line> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut reader = LineReader::new(input, limit);
            let mut lines = vec![];
            while let Some(line) = reader.next().await.unwrap() {
                lines.push(line);
            }
            lines
        })
    }

    #[test]
    fn lines_end_at_newlines_and_at_the_streams_end() {
        let lines = read_all(b"one\r\n\ntwo\nthree", 100);
        let texts: Vec<&[u8]> = lines.iter().map(|line| line.bytes.as_slice()).collect();
        assert_eq!(texts, [&b"one"[..], b"", b"two", b"three"]);
        assert!(lines.iter().all(|line| !line.cut));
    }

    #[test]
    fn a_long_line_is_cut_and_the_next_one_is_whole() {
        let mut input = vec![b'x'; 100_000];
        input.extend_from_slice(b"\nnext\n");
        let lines = read_all(&input, 10);
        assert_eq!(lines[0], Line { bytes: vec![b'x'; 10], cut: true });
        assert_eq!(lines[1], Line { bytes: b"next".to_vec(), cut: false });
    }

    proptest! {
        #[test]
        fn cutting_is_the_only_loss(texts in prop::collection::vec("[a-z]{0,9000}", 0..8), limit in 1usize..5000) {
            let input: String = texts.iter().map(|text| format!("{text}\n")).collect();
            let lines = read_all(input.as_bytes(), limit);
            prop_assert_eq!(lines.len(), texts.len());
            for (line, text) in lines.iter().zip(&texts) {
                prop_assert_eq!(&line.bytes, &text.as_bytes()[..text.len().min(limit)]);
                prop_assert_eq!(line.cut, text.len() > limit);
            }
        }
    }
}
