//! The rate of the host CPU's time-stamp counter (TSC).
//!
//! Under TCG the guest's TSC is the host's. The guest's kernel measures its rate while it boots; on a busy
//! host that measurement can be wrong by any factor, and the guest's clock with it for good. So the guest is
//! told.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

/// Apart enough that the error of both readings, well below a microsecond, is below 0.01 %.
const DISTANCE: Duration = Duration::from_millis(20);

/// Of this many readings the tightest counts, as the thread may lose its CPU in the middle of one.
const TRIES: usize = 8;

/// Counter and clock at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    ticks: u64,
    at: Instant,
}

impl Reading {
    /// Reads both now.
    pub(crate) fn take() -> Self {
        let (mut best, mut uncertainty) = Self::once();
        for _ in 1..TRIES {
            let (reading, gap) = Self::once();
            if gap < uncertainty {
                (best, uncertainty) = (reading, gap);
            }
        }
        best
    }

    /// The rate in kHz from this reading to now; waits until they are apart enough.
    pub(crate) async fn khz_until_now(self) -> u64 {
        sleep(DISTANCE.saturating_sub(self.at.elapsed())).await;
        self.khz_until(Self::take())
    }

    fn khz_until(self, later: Self) -> u64 {
        let micros = (later.at - self.at).as_nanos() / 1000;
        let ticks = u128::from(later.ticks.wrapping_sub(self.ticks));
        u64::try_from(ticks * 1000 / micros.max(1)).unwrap_or(u64::MAX)
    }

    fn once() -> (Self, Duration) {
        let before = Instant::now();
        // SAFETY: reads a counter that every x86-64 CPU has and that Linux lets processes read.
        let ticks = unsafe { _rdtsc() };
        let gap = before.elapsed();
        (Self { ticks, at: before + gap / 2 }, gap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_ticks_per_millisecond() {
        let first = Reading { ticks: u64::MAX, at: Instant::now() };
        let later = Reading { ticks: 49_999_999, at: first.at + Duration::from_millis(20) };
        assert_eq!(first.khz_until(later), 2_500_000);
    }

    #[tokio::test]
    async fn two_measurements_agree() {
        let one = Reading::take().khz_until_now().await;
        let other = Reading::take().khz_until_now().await;
        assert!(one.abs_diff(other) * 1000 < one, "{one} and {other} kHz");
        assert!((100_000..10_000_000).contains(&one), "{one} kHz");
    }
}
