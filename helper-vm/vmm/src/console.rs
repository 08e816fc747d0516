//! What the guest's serial console and QEMU's stderr say: forwarded to the log line by line, the last lines
//! kept for the reason of a failure.
//!
//! The guest writes what it likes as fast as it likes, so lines are cut, control characters replaced, and what
//! reaches the log is limited, per second and in all; the reader never stops, so QEMU never waits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::AsyncRead;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::Instrument as _;

use crate::lines::{Line, LineReader};
use crate::log_rate::LogRate;

/// Longer than any line of the kernel's log.
const LINE_LIMIT: usize = 1024;

/// Whose words they are, and so the log's target and level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// The guest's console: target `guest`, info.
    Guest,
    /// QEMU's and its jail's stderr: target `qemu`, warn.
    Qemu,
}

impl Speaker {
    fn log(self, line: &str) {
        match self {
            Self::Guest => tracing::info!(target: "guest", "{line}"),
            Self::Qemu => tracing::warn!(target: "qemu", "{line}"),
        }
    }
}

/// A stream that is being forwarded, until its end.
#[derive(Debug)]
pub(crate) struct Console {
    tail: Arc<Mutex<Tail>>,
    /// A line has come.
    news: Arc<Notify>,
    reader: JoinHandle<()>,
}

impl Console {
    /// Starts forwarding.
    pub(crate) fn forward(stream: impl AsyncRead + Unpin + Send + 'static, speaker: Speaker) -> Self {
        let (tail, news) = (Arc::new(Mutex::new(Tail::default())), Arc::new(Notify::new()));
        let reader = tokio::spawn(read(stream, speaker, tail.clone(), news.clone()).in_current_span());
        Self { tail, news, reader }
    }

    /// Waits until one of the last lines ends so.
    pub(crate) fn says(&self, ending: &str) -> impl Future<Output = ()> + use<> {
        let (tail, news, ending) = (self.tail.clone(), self.news.clone(), ending.to_owned());
        async move {
            while !lock(&tail).last.iter().any(|line| line.ends_with(&ending)) {
                news.notified().await;
            }
        }
    }

    /// Waits for the stream's end, for a writer that is gone already.
    pub(crate) async fn drain(&mut self) {
        /// Something else may have inherited the writing end.
        const LIMIT: Duration = Duration::from_millis(500);
        // Too late and ended badly mean the same: what was read so far must do.
        let _ = timeout(LIMIT, &mut self.reader).await;
    }

    /// The lines that tell most about an end: the kernel's own verdict, else the last ones.
    pub(crate) fn last_words(&self) -> Option<String> {
        lock(&self.tail).last_words()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn lock(tail: &Mutex<Tail>) -> MutexGuard<'_, Tail> {
    tail.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read(stream: impl AsyncRead + Unpin, speaker: Speaker, tail: Arc<Mutex<Tail>>, news: Arc<Notify>) {
    let mut lines = LineReader::new(stream, LINE_LIMIT);
    let mut rate = LogRate::new(Instant::now());
    // A broken stream ends like a closed one: the process at its other end is what is watched.
    while let Ok(Some(line)) = lines.next().await {
        let text = printable(&line);
        if text.is_empty() {
            continue;
        }
        rate.admit(Instant::now(), &text).for_each(|line| speaker.log(&line));
        lock(&tail).push(text);
        // Kept for one who is about to wait.
        news.notify_one();
    }
}

fn printable(line: &Line) -> String {
    let text = String::from_utf8_lossy(&line.bytes);
    let text = text.trim_end().replace(|c: char| c.is_control() && c != '\t', "\u{fffd}");
    if line.cut { text + " (cut)" } else { text }
}

/// The end of a stream. The kernel's verdict is kept although a long trace follows it.
#[derive(Debug, Default)]
struct Tail {
    verdict: Option<String>,
    last: VecDeque<String>,
}

impl Tail {
    const VERDICT: &str = "Kernel panic";
    const LINES: usize = 3;

    fn push(&mut self, line: String) {
        if line.contains(Self::VERDICT) {
            self.verdict = Some(line.clone());
        }
        if self.last.len() == Self::LINES {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    fn last_words(&self) -> Option<String> {
        let last = || self.last.iter().map(String::as_str).collect::<Vec<_>>().join(" / ");
        self.verdict.clone().or_else(|| (!self.last.is_empty()).then(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_log() {
        let line = Line { bytes: b"\x1b[2Jboot\xff\t7".to_vec(), cut: true };
        assert_eq!(printable(&line), "\u{fffd}[2Jboot\u{fffd}\t7 (cut)");
    }

    #[test]
    fn a_panic_is_worth_more_than_what_follows_it() {
        let mut tail = Tail::default();
        assert_eq!(tail.last_words(), None);
        for line in ["a", "b", "c", "d"] {
            tail.push(line.to_owned());
        }
        assert_eq!(tail.last_words().unwrap(), "b / c / d");
        tail.push("Kernel panic - not syncing: no init".to_owned());
        (0..100).for_each(|number| tail.push(format!("trace {number}")));
        assert_eq!(tail.last_words().unwrap(), "Kernel panic - not syncing: no init");
    }

    #[tokio::test]
    async fn a_stream_is_read_to_its_end() {
        let input: String = (0..1000).map(|number| format!("line {number}\n")).collect();
        let mut console = Console::forward(std::io::Cursor::new(input), Speaker::Guest);
        console.drain().await;
        assert_eq!(console.last_words().unwrap(), "line 997 / line 998 / line 999");
    }

    #[tokio::test]
    async fn a_line_is_waited_for_whether_it_came_before_or_after() {
        use tokio::io::AsyncWriteExt as _;

        let (theirs, mut ours) = tokio::io::duplex(64);
        let console = Console::forward(theirs, Speaker::Guest);
        ours.write_all(b"agent: ready\n").await.unwrap();
        console.says("ready").await;
        console.says("ready").await;
        assert!(timeout(Duration::from_millis(50), console.says("gone")).await.is_err());
        ours.write_all(b"agent: gone\n").await.unwrap();
        console.says("gone").await;
    }
}
