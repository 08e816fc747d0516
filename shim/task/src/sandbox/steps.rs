//! The parts of a start or an end, each with its duration: what `vmctr inspect` shows and one line of the log says.
//!
//! ```text
//!   start   prepare  share  spawn  boot  hello  mount │ create │ start        session │ create │ start
//!   end     close  flush  vm  share  files
//! ```
//!
//! Invariant: the durations do not overlap, so that their sum is what this shim took.

use std::fmt;
use std::time::{Duration, Instant};

/// A part.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// "share", "spawn", "boot", ...
    pub name: &'static str,
    /// Its duration.
    pub duration: Duration,
}

/// Parts that are done, and since when the next one is under way.
#[derive(Clone, Debug)]
pub struct Steps {
    done: Vec<Step>,
    since: Instant,
}

impl Steps {
    /// The first part begins.
    pub fn begin() -> Self {
        Self { done: vec![], since: Instant::now() }
    }

    /// A part ends here and the next one begins.
    pub fn end(&mut self, name: &'static str) {
        self.done.push(Step { name, duration: self.since.elapsed() });
        self.since = Instant::now();
    }

    /// Somebody else has timed what was done since the last part's end.
    pub fn add(&mut self, steps: impl IntoIterator<Item = Step>) {
        self.done.extend(steps);
        self.since = Instant::now();
    }

    /// What passed since the last part's end is nobody's.
    pub fn skip(&mut self) {
        self.since = Instant::now();
    }

    /// The parts in order.
    pub fn done(&self) -> &[Step] {
        &self.done
    }
}

/// `boot=2412.034 hello=31.200`, in milliseconds.
impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Step { name, duration }) in self.done.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            let micros = duration.as_micros();
            write!(f, "{space}{name}={}.{:03}", micros / 1000, micros % 1000)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_in_order_in_milliseconds() {
        let mut steps = Steps::begin();
        let step = |name, micros| Step { name, duration: Duration::from_micros(micros) };
        steps.add([step("boot", 2_412_034), step("hello", 7)]);
        assert_eq!(steps.to_string(), "boot=2412.034 hello=0.007");
    }

    #[test]
    fn what_is_skipped_is_in_no_step() {
        let mut steps = Steps::begin();
        std::thread::sleep(Duration::from_millis(50));
        steps.skip();
        steps.end("next");
        assert!(steps.done()[0].duration < Duration::from_millis(50));
    }
}
