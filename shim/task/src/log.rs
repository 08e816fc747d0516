//! The shim's log: logfmt lines into the FIFO `log` of the bundle, which containerd copies into its own log.
//!
//! ```text
//!   time="2026-01-02T03:04:05.678Z" level=info msg="Process ended" status=0 target=... id=c1 namespace=default
//! ```
//!
//! A line is one write of at most `PIPE_BUF` bytes, so lines never mix. The FIFO is opened for reading too and
//! never waited for: while containerd is away lines stay in it, and when it is full they are dropped.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write};
use std::panic;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber, error};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// Longest write that does not mix with others (POSIX `PIPE_BUF` on Linux).
const MAX_LINE: usize = 4096;

/// Name of the FIFO in the bundle.
const FIFO: &str = "log";

/// Starts logging for this container. `RUST_LOG` wins over `level`. Without a FIFO, as when the shim runs by
/// hand, lines go to standard error.
pub fn start(level: &str, id: &str, namespace: &str) -> io::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let format = Logfmt { suffix: format!(" id={} namespace={}", quoted(id), quoted(namespace)) };
    let fifo = open(Path::new(FIFO))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .event_format(format)
        .with_writer(Target(fifo))
        .try_init()
        .map_err(io::Error::other)?;
    panic::set_hook(Box::new(|panic| error!("{panic}")));
    Ok(())
}

fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(fd.into())),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The FIFO, or standard error without one.
struct Target(Option<File>);

impl<'a> MakeWriter<'a> for Target {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> LineWriter<'a> {
        LineWriter(self.0.as_ref())
    }
}

/// Writes whole lines or nothing.
struct LineWriter<'a>(Option<&'a File>);

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // A full FIFO takes no line; there is nowhere to report that.
        let _ = match self.0 {
            Some(mut fifo) => fifo.write(&cut(line)),
            None => io::stderr().write(line),
        };
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn cut(line: &[u8]) -> std::borrow::Cow<'_, [u8]> {
    const MARK: &[u8] = b"...\"\n";
    if line.len() <= MAX_LINE {
        return line.into();
    }
    let mut cut = line[..MAX_LINE - MARK.len()].to_vec();
    cut.extend_from_slice(MARK);
    cut.into()
}

struct Logfmt {
    suffix: String,
}

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let target = fields.target.as_deref().unwrap_or(metadata.target());
        let level = level_name(*metadata.level());
        let time = OffsetDateTime::now_utc().format(&Rfc3339).map_err(|_| fmt::Error)?;
        writeln!(
            writer,
            "time=\"{time}\" level={level} msg={} target={}{}{}",
            quoted(&fields.message),
            quoted(target),
            self.suffix,
            fields.others
        )
    }
}

/// As containerd's logger writes levels.
fn level_name(level: tracing::Level) -> &'static str {
    match level {
        tracing::Level::ERROR => "error",
        tracing::Level::WARN => "warning",
        tracing::Level::INFO => "info",
        tracing::Level::DEBUG => "debug",
        tracing::Level::TRACE => "trace",
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    /// Of a record of the `log` crate.
    target: Option<String>,
    others: String,
}

impl Fields {
    fn add(&mut self, name: &str, value: String) {
        match name {
            "message" => self.message = value,
            "log.target" => self.target = Some(value),
            name if name.starts_with("log.") => {}
            name => {
                // Writing into a string cannot fail.
                let _ = write!(self.others, " {name}={}", quoted(&value));
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value.to_owned());
    }
}

/// As logfmt wants it: bare when it is one plain word, else in quotes with escapes.
fn quoted(text: &str) -> String {
    let plain = |char: char| char.is_ascii_alphanumeric() || "-._/@^+:".contains(char);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for char in text.chars() {
        match char {
            '"' | '\\' => out.extend(['\\', char]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            char if char.is_control() => out.push('\u{fffd}'),
            char => out.push(char),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use rustix::fs::{CWD, FileType, mknodat};
    use tracing::{info, subscriber};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_names_level_message_container_and_fields() {
        let buffer = Buffer::default();
        let target = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(Logfmt { suffix: " id=c1 namespace=ns".into() })
            .with_writer(move || target.clone())
            .finish();
        subscriber::with_default(subscriber, || {
            info!(target: "guest", status = 3, why = "a \"b\"\nc", "It is over");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let want = " level=info msg=\"It is over\" target=guest id=c1 namespace=ns status=3 why=\"a \\\"b\\\"\\nc\"\n";
        assert!(text.starts_with("time=\"20") && text.ends_with(want), "{text}");
    }

    #[test]
    fn long_lines_are_cut_to_what_a_fifo_takes_whole() {
        let line = vec![b'x'; 10_000];
        let short = cut(&line);
        assert_eq!(short.len(), MAX_LINE);
        assert!(short.ends_with(b"x...\"\n"));
        assert_eq!(&*cut(b"short\n"), b"short\n");
    }

    #[test]
    fn a_full_fifo_without_a_reader_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let fifo = open(&path).unwrap();
        let mut writer = LineWriter(fifo.as_ref());
        for _ in 0..1000 {
            assert_eq!(writer.write(&[b'x'; 1000]).unwrap(), 1000);
        }
        assert!(open(&dir.path().join("missing")).unwrap().is_none());
    }
}
