//! The shim's lines in containerd's log: when it said something, and the steps that it timed.
//!
//! ```text
//!   time="2026-01-02T03:04:05.678Z" level=info msg="Container started" target=... id=c1 namespace=default
//!   steps="prepare=12.345 share=6.789"        one line; milliseconds
//! ```

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::eventually;

/// containerd copies a shim's lines within moments.
const PATIENCE: Duration = Duration::from_secs(10);

/// A line.
#[derive(Debug, PartialEq)]
pub struct Line {
    /// When it was written.
    pub at: SystemTime,
    /// Names and seconds.
    pub steps: Vec<(String, f64)>,
}

/// What a container's shim said, when it has said it.
pub fn wait_for(rig: &Rig, id: &str, message: &str) -> Line {
    let look = || find(&rig.daemon().log(), id, message);
    eventually(&format!("the shim of {id} logs {message:?}"), PATIENCE, || look().is_some());
    look().expect("just seen")
}

fn find(log: &str, id: &str, message: &str) -> Option<Line> {
    let (message, id) = (format!(" msg=\"{message}\" "), format!(" id={id} "));
    log.lines().find(|line| line.contains(&message) && line.contains(&id)).and_then(parse)
}

fn parse(line: &str) -> Option<Line> {
    let at = OffsetDateTime::parse(field(line, "time")?, &Rfc3339).ok()?;
    let steps = field(line, "steps").unwrap_or_default();
    Some(Line { at: at.into(), steps: steps.split_whitespace().map(step).collect::<Option<_>>()? })
}

/// Of fields in quotes.
fn field<'line>(line: &'line str, name: &str) -> Option<&'line str> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    rest.split('"').next()
}

fn step(text: &str) -> Option<(String, f64)> {
    const MILLIS_PER_SECOND: f64 = 1000.0;
    let (name, millis) = text.split_once('=')?;
    Some((name.to_owned(), millis.parse::<f64>().ok()? / MILLIS_PER_SECOND))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "time=\"2026-01-02T03:04:05.25Z\" level=info msg=\"Shim started\" target=t id=a-1 namespace=n pid=7\n\
        time=\"2026-01-02T03:04:06Z\" level=info msg=\"Container started\" target=t id=a-10 namespace=n steps=\"boot=9.000\"\n\
        time=\"2026-01-02T03:04:07Z\" level=info msg=\"Container started\" target=t id=a-1 namespace=n steps=\"boot=2412.500 hello=0.007\"\n";

    #[test]
    fn the_line_of_this_container_is_found_with_its_steps() {
        let line = find(LOG, "a-1", "Container started").unwrap();
        assert_eq!(line.steps, [("boot".to_owned(), 2.4125), ("hello".to_owned(), 0.000_007)]);
        let shim = find(LOG, "a-1", "Shim started").unwrap();
        assert_eq!(shim.steps, []);
        assert_eq!(line.at.duration_since(shim.at).unwrap(), Duration::from_millis(1750));
        assert_eq!(find(LOG, "a", "Shim started"), None);
    }
}
