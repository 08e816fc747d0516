//! How many lines that a guest can cause reach the log: a burst, then a steady few; the rest is counted.

use std::time::Instant;

/// Lines that may come at once: a whole boot log of the kernel fits.
const BURST: u32 = 1000;

/// Lines per second after that.
const PER_SECOND: u32 = 50;

/// Token bucket.
#[derive(Debug)]
pub struct LogRate {
    tokens: f64,
    at: Instant,
    dropped: u64,
}

impl LogRate {
    /// A full bucket.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { tokens: f64::from(BURST), at: now, dropped: 0 }
    }

    /// The number of lines dropped since the last admitted one, if this line may pass.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        let refill = now.duration_since(self.at).as_secs_f64() * f64::from(PER_SECOND);
        self.tokens = (self.tokens + refill).min(f64::from(BURST));
        self.at = now;
        if self.tokens < 1.0 {
            self.dropped += 1;
            return None;
        }
        self.tokens -= 1.0;
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_passes_at_the_limit_and_is_counted() {
        let start = Instant::now();
        let mut rate = LogRate::new(start);
        let passed = (0..5000).filter(|_| rate.admit(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        let dropped = rate.admit(start + Duration::from_secs(1)).unwrap();
        assert_eq!(dropped, 5000 - u64::from(BURST));
    }
}
