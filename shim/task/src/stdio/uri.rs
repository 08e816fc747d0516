//! How containerd names the ends of a process's streams: a path or `fifo:` URI, `file:` or `binary:`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// What is at containerd's end of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A FIFO, or any file that is there already.
    Path(PathBuf),
    /// A log file, made when it is missing and appended to.
    File(PathBuf),
    /// A program that gets the output on descriptors 3 and 4.
    Binary(Program),
}

/// A logging program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Keys and values of the URI's query, in turn.
    pub args: Vec<OsString>,
}

/// The URI names nothing that a stream can end in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// Not one of the three.
    #[error("Stream {0:?} has an unknown scheme; known are fifo, file and binary")]
    Scheme(String),
    /// No absolute path.
    #[error("Stream {0:?} names no absolute path")]
    Path(String),
    /// A percent sign without two hexadecimal digits.
    #[error("Stream {0:?} is badly escaped")]
    Escape(String),
}

/// Reads a stream's name; `None` for the empty name, which means no stream.
pub fn parse(text: &str) -> Result<Option<Target>, UriError> {
    if text.is_empty() {
        return Ok(None);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok(Some(Target::Path(absolute(PathBuf::from(text), text)?)));
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = absolute(decode(path, false, text)?.into(), text)?;
    match scheme {
        "fifo" => Ok(Some(Target::Path(path))),
        "file" => Ok(Some(Target::File(path))),
        "binary" => Ok(Some(Target::Binary(Program { path, args: args(query, text)? }))),
        _ => Err(UriError::Scheme(text.to_owned())),
    }
}

fn absolute(path: PathBuf, text: &str) -> Result<PathBuf, UriError> {
    if path.is_absolute() { Ok(path) } else { Err(UriError::Path(text.to_owned())) }
}

/// `a=b&c=d` as `a b c d`.
fn args(query: &str, text: &str) -> Result<Vec<OsString>, UriError> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(key, true, text)?);
        args.push(decode(value, true, text)?);
    }
    Ok(args)
}

fn decode(part: &str, plus_is_space: bool, text: &str) -> Result<OsString, UriError> {
    let mut out = Vec::with_capacity(part.len());
    let mut bytes = part.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'+' if plus_is_space => b' ',
            b'%' => {
                let digits = (bytes.next(), bytes.next());
                hex_pair(digits).ok_or_else(|| UriError::Escape(text.to_owned()))?
            }
            other => other,
        });
    }
    Ok(OsString::from_vec(out))
}

fn hex_pair(digits: (Option<u8>, Option<u8>)) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(digits.0?)? * 16 + digit(digits.1?)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(text: &str) -> Target {
        parse(text).unwrap().unwrap()
    }

    #[test]
    fn each_form_is_read() {
        assert_eq!(parse(""), Ok(None));
        assert_eq!(target("/run/a b?c"), Target::Path("/run/a b?c".into()));
        assert_eq!(target("fifo:///run/x"), Target::Path("/run/x".into()));
        assert_eq!(target("file:///var/log/a%20b"), Target::File("/var/log/a b".into()));
        let program = Program {
            path: "/usr/bin/nerdctl".into(),
            args: ["_LOG", "/var/lib/x y", "k", ""].map(OsString::from).to_vec(),
        };
        assert_eq!(target("binary:///usr/bin/nerdctl?_LOG=%2Fvar%2flib/x+y&k"), Target::Binary(program));
    }

    #[test]
    fn everything_else_is_refused() {
        assert!(matches!(parse("npipe:///x"), Err(UriError::Scheme(_))));
        for bad in ["relative", "file://host/x", "binary://?a=b"] {
            assert!(matches!(parse(bad), Err(UriError::Path(_))), "{bad}");
        }
        for bad in ["file:///a%2", "file:///a%zz", "binary:///a?b=%"] {
            assert!(matches!(parse(bad), Err(UriError::Escape(_))), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn escaped_arguments_round_trip(key in "[^\0]{1,8}", value in "[^\0]{0,8}") {
            let escape = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
            let uri = format!("binary:///x?{}={}", escape(&key), escape(&value));
            let want = Target::Binary(Program { path: "/x".into(), args: vec![key.into(), value.into()] });
            prop_assert_eq!(target(&uri), want);
        }
    }
}
