//! How far long work is, on stderr: phase, bytes, rate.
//!
//! Shown only on a terminal, and only once the work has taken a second.

use std::fmt;
use std::io::{IsTerminal as _, Read};
use std::time::Duration;

use indicatif::{BinaryBytes, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use tokio::task::AbortHandle;

/// Work that is done sooner needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

const REDRAW: Duration = Duration::from_millis(100);

/// The line; it goes away with the work.
pub struct Progress {
    bar: ProgressBar,
    appears: Option<AbortHandle>,
}

impl Progress {
    /// Nothing to see yet, and never with `quiet`.
    pub fn begin(quiet: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template("{spinner} {msg}{done}");
        // The template is ours and parses; without it the bar has its own.
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()).with_key("done", done));
        let appears = (!quiet && std::io::stderr().is_terminal()).then(|| appear(bar.clone()));
        Self { bar, appears }
    }

    /// Another part of the work begins.
    pub fn phase(&self, name: &'static str) {
        self.bar.set_message(name);
        self.bar.reset();
    }

    /// For another thread.
    pub fn counter(&self) -> impl FnMut(u64) + Send + use<> {
        let bar = self.bar.clone();
        move |bytes| bar.set_position(bytes)
    }

    /// Counts what is read.
    pub fn reading<R: Read>(&self, source: R) -> impl Read + use<R> {
        self.bar.wrap_read(source)
    }
}

/// Bytes and rate, once there are any: some work has none to count.
fn done(state: &ProgressState, line: &mut dyn fmt::Write) {
    if state.pos() > 0 {
        // A line that cannot be written is one redraw later by a tenth of a second.
        let _ = write!(line, ": {} ({}/s)", BinaryBytes(state.pos()), BinaryBytes(state.per_sec() as u64));
    }
}

fn appear(bar: ProgressBar) -> AbortHandle {
    let appear = async move {
        tokio::time::sleep(PATIENCE).await;
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.enable_steady_tick(REDRAW);
    };
    tokio::spawn(appear).abort_handle()
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(appears) = &self.appears {
            appears.abort();
        }
        self.bar.finish_and_clear();
    }
}
