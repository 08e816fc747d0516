//! QEMU's control connection (QMP): one JSON message per line, over a socketpair that QEMU inherits.
//!
//! A client of our own, small on purpose: the guest may take over QEMU, so each line and each wait are bounded
//! here, and the few commands that the driver needs fit on one page. The generated bindings bound neither.
//!
//! ```text
//!   greeting ──> qmp_capabilities ──> { command ──> return | error }*     events between any two lines
//! ```

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use crate::lines::{Line, LineReader};

/// Far above any reply to the commands used here.
const LINE_LIMIT: usize = 64 * 1024;

/// How long QEMU may take to answer a command.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// How long QEMU may take to take out a device whose port was switched off.
const DELETED_LIMIT: Duration = Duration::from_secs(2);

/// More devices than a machine ever had.
const MAX_DELETED: usize = 64;

/// QEMU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The connection broke.
    #[error("The connection to QEMU's monitor broke")]
    Io(#[from] io::Error),
    /// QEMU closed it: it is gone or about to be.
    #[error("QEMU closed its monitor")]
    Closed,
    /// A line that is no message, or one that is too long.
    #[error("QEMU's monitor sent no valid message: {0:?}")]
    Message(String),
    /// The command failed.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: &'static str,
        /// In QEMU's words.
        description: String,
    },
    /// The device stays.
    #[error("QEMU did not take out a device within {} s", DELETED_LIMIT.as_secs())]
    NotDeleted,
    /// No answer.
    #[error("QEMU did not answer {command} within {} s", REPLY_LIMIT.as_secs())]
    Silent {
        /// The command.
        command: &'static str,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
    Return {
        #[serde(rename = "return")]
        value: Value,
    },
    Error {
        error: ErrorBody,
    },
    Greeting {
        #[serde(rename = "QMP")]
        _capabilities: Value,
    },
}

#[derive(Deserialize)]
struct ErrorBody {
    desc: String,
}

/// A monitor that has said hello.
#[derive(Debug)]
pub(crate) struct Qmp {
    lines: LineReader<UnixStream>,
    shutdown: Option<String>,
    /// Named devices that are gone, until somebody has asked for them.
    deleted: BTreeSet<String>,
}

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode. QEMU greets when its devices are set up.
    pub(crate) async fn connect(stream: UnixStream) -> Result<Self, QmpError> {
        let mut qmp =
            Self { lines: LineReader::new(stream, LINE_LIMIT), shutdown: None, deleted: BTreeSet::new() };
        match qmp.read().await? {
            Message::Greeting { .. } => qmp.execute("qmp_capabilities").await.map(|()| qmp),
            _ => Err(QmpError::Message("no greeting".to_owned())),
        }
    }

    /// Stops the guest's CPUs.
    pub(crate) async fn stop(&mut self) -> Result<(), QmpError> {
        self.execute("stop").await
    }

    /// Lets the guest's CPUs run.
    pub(crate) async fn cont(&mut self) -> Result<(), QmpError> {
        self.execute("cont").await
    }

    /// Writes the state of a stopped machine.
    pub(crate) async fn save(&mut self, uri: &str) -> Result<(), QmpError> {
        self.migrate("migrate", uri).await
    }

    /// Reads a machine's state; QEMU was started with `-incoming defer`.
    pub(crate) async fn restore(&mut self, uri: &str) -> Result<(), QmpError> {
        self.migrate("migrate-incoming", uri).await
    }

    /// Plugs a device in.
    pub(crate) async fn device_add(&mut self, device: Value) -> Result<(), QmpError> {
        self.ask("device_add", device).await.map(drop)
    }

    /// Gives QEMU a connected socket, as a character device with this name.
    pub(crate) async fn add_socket(&mut self, name: &str, socket: OwnedFd) -> Result<(), QmpError> {
        let line = command("getfd", &json!({ "fdname": name }));
        self.send_with(&line, socket).await?;
        self.answer("getfd").await?;
        let address = json!({ "type": "fd", "data": { "str": name } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        self.ask("chardev-add", json!({ "id": name, "backend": backend })).await.map(drop)
    }

    /// Closes such a socket; no device may use it.
    pub(crate) async fn remove_socket(&mut self, name: &str) -> Result<(), QmpError> {
        self.ask("chardev-remove", json!({ "id": name })).await.map(drop)
    }

    /// Waits until QEMU has taken out a device that the guest has switched off. Cancel safe.
    pub(crate) async fn device_deleted(&mut self, name: &str) -> Result<(), QmpError> {
        let gone = async {
            while !self.deleted.remove(name) {
                self.read().await?;
            }
            Ok(())
        };
        timeout(DELETED_LIMIT, gone).await.map_err(|_| QmpError::NotDeleted)?
    }

    /// Forgets what is known of an earlier device with this name.
    pub(crate) fn forget_deleted(&mut self, name: &str) {
        self.deleted.remove(name);
    }

    /// The line is short and QEMU reads at once: it goes whole or not at all.
    async fn send_with(&mut self, line: &str, socket: OwnedFd) -> Result<(), QmpError> {
        let fds = [socket.as_fd()];
        let stream = self.lines.stream_mut();
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            let line = [IoSlice::new(line.as_bytes())];
            Ok(rustix::net::sendmsg(&*stream, &line, &mut ancillary, SendFlags::NOSIGNAL)?)
        };
        let sent = stream.async_io(Interest::WRITABLE, send).await?;
        if sent == line.len() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero).into()) }
    }

    /// QEMU answers at once and goes on in the background.
    async fn migrate(&mut self, command: &'static str, uri: &str) -> Result<(), QmpError> {
        const POLL: Duration = Duration::from_millis(1);
        // The RAM is in its file already: the state leaves it out.
        let without_ram = json!({ "capability": "x-ignore-shared", "state": true });
        self.ask("migrate-set-capabilities", json!({ "capabilities": [without_ram] })).await?;
        self.ask(command, json!({ "uri": uri })).await?;
        let done = async {
            loop {
                let info = self.ask("query-migrate", json!({})).await?;
                match info["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some("failed" | "cancelled") => {
                        let description = shorten(info["error-desc"].as_str().unwrap_or("it failed"));
                        return Err(QmpError::Refused { command, description });
                    }
                    _ => sleep(POLL).await,
                }
            }
        };
        timeout(REPLY_LIMIT, done).await.map_err(|_| QmpError::Silent { command })?
    }

    /// Reads events until the monitor breaks, and says how. Cancel safe.
    pub(crate) async fn broken(&mut self) -> QmpError {
        loop {
            // A reply to a command that timed out has no one to go to.
            if let Err(error) = self.read().await {
                return error;
            }
        }
    }

    /// Why QEMU shuts down, such as `guest-reset`, if it has said so.
    pub(crate) fn shutdown(&self) -> Option<&str> {
        self.shutdown.as_deref()
    }

    async fn execute(&mut self, command: &'static str) -> Result<(), QmpError> {
        self.ask(command, json!({})).await.map(drop)
    }

    async fn ask(&mut self, name: &'static str, arguments: Value) -> Result<Value, QmpError> {
        self.lines.stream_mut().write_all(command(name, &arguments).as_bytes()).await?;
        self.answer(name).await
    }

    async fn answer(&mut self, command: &'static str) -> Result<Value, QmpError> {
        timeout(REPLY_LIMIT, self.reply(command)).await.map_err(|_| QmpError::Silent { command })?
    }

    async fn reply(&mut self, command: &'static str) -> Result<Value, QmpError> {
        loop {
            match self.read().await? {
                Message::Return { value } => return Ok(value),
                Message::Error { error } => {
                    return Err(QmpError::Refused { command, description: shorten(&error.desc) });
                }
                Message::Event { .. } => {}
                Message::Greeting { .. } => return Err(QmpError::Message("a second greeting".to_owned())),
            }
        }
    }

    async fn read(&mut self) -> Result<Message, QmpError> {
        let Line { bytes, cut } = self.lines.next().await?.ok_or(QmpError::Closed)?;
        let message = if cut { None } else { serde_json::from_slice(&bytes).ok() };
        let message = message.ok_or_else(|| QmpError::Message(shorten(&String::from_utf8_lossy(&bytes))))?;
        if let Message::Event { event, data } = &message {
            self.note(event, data);
        }
        Ok(message)
    }

    fn note(&mut self, event: &str, data: &Value) {
        match (event, data["device"].as_str()) {
            ("SHUTDOWN", _) => self.shutdown = data["reason"].as_str().map(shorten),
            // QEMU belongs to the guest if it fell: what it says is remembered within bounds.
            ("DEVICE_DELETED", Some(name)) if self.deleted.len() < MAX_DELETED => {
                self.deleted.insert(shorten(name));
            }
            _ => {}
        }
    }
}

fn command(name: &str, arguments: &Value) -> String {
    format!("{}\n", json!({ "execute": name, "arguments": arguments }))
}

/// For error messages.
fn shorten(text: &str) -> String {
    const LIMIT: usize = 200;
    text.chars().take(LIMIT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#;
    const OK: &str = r#"{"return": {}}"#;

    /// A monitor that sends these lines whatever it is told.
    async fn scripted(lines: &[&str]) -> (Result<Qmp, QmpError>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for line in lines {
            theirs.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
        }
        (Qmp::connect(ours).await, theirs)
    }

    #[tokio::test]
    async fn commands_are_answered_around_events() {
        let stop = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
        let shutdown = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#;
        let (qmp, theirs) = scripted(&[GREETING, OK, stop, OK, shutdown]).await;
        let mut qmp = qmp.unwrap();
        qmp.stop().await.unwrap();
        assert_eq!(qmp.shutdown(), None);
        drop(theirs);
        assert!(matches!(qmp.broken().await, QmpError::Closed | QmpError::Io(_)));
        assert_eq!(qmp.shutdown(), Some("guest-reset"));
    }

    #[tokio::test]
    async fn a_refusal_carries_qemus_words() {
        let refusal = r#"{"error": {"class": "GenericError", "desc": "Resetting the VM"}}"#;
        let (qmp, _theirs) = scripted(&[GREETING, OK, refusal]).await;
        let message = qmp.unwrap().cont().await.unwrap_err().to_string();
        assert_eq!(message, "QEMU refused cont: Resetting the VM");
    }

    #[tokio::test]
    async fn what_is_no_monitor_is_refused() {
        assert!(matches!(scripted(&["hello"]).await.0, Err(QmpError::Message(_))));
        assert!(matches!(scripted(&[OK]).await.0, Err(QmpError::Message(_))));
        let long = format!("{{\"QMP\": \"{}\"}}", "x".repeat(LINE_LIMIT));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sent = tokio::spawn(async move {
            let _ = theirs.write_all(format!("{long}\n").as_bytes()).await;
            theirs
        });
        assert!(matches!(Qmp::connect(ours).await, Err(QmpError::Message(_))));
        drop(sent.await.unwrap());
    }

    #[tokio::test]
    async fn a_state_is_restored_when_qemu_says_so() {
        let active = r#"{"return": {"status": "active"}}"#;
        let completed = r#"{"return": {"status": "completed"}}"#;
        let failed = r#"{"return": {"status": "failed", "error-desc": "Unknown section"}}"#;
        let (qmp, _theirs) = scripted(&[GREETING, OK, OK, OK, active, completed]).await;
        qmp.unwrap().restore("file:x").await.unwrap();
        let (qmp, _theirs) = scripted(&[GREETING, OK, OK, OK, failed]).await;
        let message = qmp.unwrap().save("file:x").await.unwrap_err().to_string();
        assert_eq!(message, "QEMU refused migrate: Unknown section");
    }

    #[tokio::test]
    async fn a_device_is_gone_once_for_each_time_that_qemu_says_so() {
        let deleted = |name: &str| {
            format!(r#"{{"event": "DEVICE_DELETED", "data": {{"device": "{name}", "path": "/"}}}}"#)
        };
        let (one, other) = (deleted("union-1"), deleted("union-2"));
        let nameless = r#"{"event": "DEVICE_DELETED", "data": {"path": "/machine/peripheral/union-1/x"}}"#;
        let (qmp, theirs) = scripted(&[GREETING, OK, nameless, &other, OK, &one]).await;
        let mut qmp = qmp.unwrap();
        qmp.stop().await.unwrap();
        qmp.device_deleted("union-1").await.unwrap();
        qmp.device_deleted("union-2").await.unwrap();
        drop(theirs);
        assert!(matches!(qmp.device_deleted("union-2").await, Err(QmpError::Closed | QmpError::Io(_))));
    }

    #[tokio::test]
    async fn a_socket_goes_with_the_line_that_names_it() {
        let (qmp, mut theirs) = scripted(&[GREETING, OK, OK, OK]).await;
        let (given, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut qmp = qmp.unwrap();
        qmp.add_socket("union-1", given.into()).await.unwrap();
        drop(qmp);
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut theirs, &mut text).await.unwrap();
        assert!(text.contains(r#"{"arguments":{"fdname":"union-1"},"execute":"getfd"}"#), "{text}");
    }
}
