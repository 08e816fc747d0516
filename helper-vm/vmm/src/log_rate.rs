//! How much of what a guest can cause reaches a log: a burst of lines, then a steady few, and so many bytes in all.
//!
//! ```text
//!   line ──> too many per second: dropped, counted ── told before the next that passes
//!     └────> passes ── the last that fits ──> "no more is logged", once ──> dropped
//! ```
//!
//! Invariant: however long a guest lives, a log takes no more than [`MOST`] from it, besides two lines of our own.

use std::borrow::Cow;
use std::time::Instant;

/// Lines that may come at once: a whole boot log of the kernel fits.
const BURST: u32 = 1000;

/// Lines per second after that.
const PER_SECOND: u32 = 50;

/// Bytes in all: logs lie in memory where /run does.
const MOST: usize = 4 << 20;

/// What a line takes besides its text: time, level, target, span.
const AROUND: usize = 128;

/// Token bucket, with a bottom.
#[derive(Debug)]
pub struct LogRate {
    tokens: f64,
    at: Instant,
    dropped: u64,
    /// Bytes that may still come; none: it was told that no more do.
    left: Option<usize>,
}

impl LogRate {
    /// A full bucket.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { tokens: f64::from(BURST), at: now, dropped: 0, left: Some(MOST) }
    }

    /// What is to be logged now that this line has come: the line if it may pass, and what became of others.
    pub fn admit<'line>(&mut self, now: Instant, line: &'line str) -> impl Iterator<Item = Cow<'line, str>> {
        self.passes(now, line.len()).into_iter().flatten().map(|own| own.map_or(line.into(), Cow::from))
    }

    /// Words of our own, or `None` for the line.
    fn passes(&mut self, now: Instant, length: usize) -> [Option<Option<String>>; 2] {
        let refill = now.duration_since(self.at).as_secs_f64() * f64::from(PER_SECOND);
        self.tokens = (self.tokens + refill).min(f64::from(BURST));
        self.at = now;
        let Some(left) = self.left else { return [None, None] };
        if self.tokens < 1.0 {
            self.dropped += 1;
            return [None, None];
        }
        self.tokens -= 1.0;
        self.left = left.checked_sub(length + AROUND);
        if self.left.is_none() {
            return [Some(Some(format!("({} MiB are logged: no more is)", MOST >> 20))), None];
        }
        let dropped = std::mem::take(&mut self.dropped);
        let told = (dropped > 0).then(|| Some(format!("({dropped} lines dropped: too many per second)")));
        [told, Some(None)]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn admit(rate: &mut LogRate, now: Instant, line: &str) -> Vec<String> {
        rate.admit(now, line).map(Cow::into_owned).collect()
    }

    #[test]
    fn a_flood_passes_at_the_limit_and_is_counted() {
        let start = Instant::now();
        let mut rate = LogRate::new(start);
        let passed = (0..5000).filter(|_| !admit(&mut rate, start, "line").is_empty()).count();
        assert_eq!(passed, BURST as usize);
        let next = admit(&mut rate, start + Duration::from_secs(1), "next");
        assert_eq!(next, ["(4000 lines dropped: too many per second)", "next"]);
        assert_eq!(admit(&mut rate, start + Duration::from_secs(1), "last"), ["last"]);
    }

    #[test]
    fn however_long_it_goes_on_there_is_an_end() {
        for line in ["", "x", &"x".repeat(1024)] {
            let mut now = Instant::now();
            let mut rate = LogRate::new(now);
            let (mut bytes, mut last) = (0, String::new());
            // Days at the limit.
            for _ in 0..100_000 {
                now += Duration::from_secs(1) / PER_SECOND;
                for logged in admit(&mut rate, now, line) {
                    bytes += logged.len() + AROUND;
                    last = logged;
                }
            }
            assert!((MOST - 2048..MOST + 2048).contains(&bytes), "{bytes}");
            assert_eq!(last, "(4 MiB are logged: no more is)");
            assert!(admit(&mut rate, now + Duration::from_secs(86400), line).is_empty());
        }
    }
}
