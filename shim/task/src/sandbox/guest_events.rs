//! The agent's stream of events: read by one task, checked, handed to the driver in order.
//!
//! A broken stream is opened again after the last event that arrived, so that none is lost; a guest that does
//! not let it be opened has ended, as far as the host is concerned.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status, Streaming};
use tracing::{debug, warn};
use vmctr_proto::agent::{Event, EventsRequest, event};
use vmctr_vmm::vm::Agent;

use super::agent::{EndSignal, clean};

/// Events on the way to the driver; a full queue holds up the guest, not the host.
const QUEUE: usize = 64;

/// To answer the call that opens the stream.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Tries to open the stream, one after the other, before the guest counts as ended.
const TRIES: u32 = 5;

const BACK_OFF: Duration = Duration::from_millis(500);

/// Exit codes end here; so do 128 + signal.
const MAX_STATUS: u32 = 255;

/// What happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// A process ended.
    Exit {
        /// Empty for the container's init process.
        exec_id: String,
        /// Exit code, or 128 + signal number.
        status: u32,
    },
    /// The container's memory limit killed a process.
    Oom,
}

/// Starts reading. The receiver ends with the VM.
pub fn spawn(agent: Agent, container_id: String, end: EndSignal) -> mpsc::Receiver<GuestEvent> {
    let (events, queue) = mpsc::channel(QUEUE);
    let reader = Reader { agent, container_id, last: 0, events };
    tokio::spawn(async move {
        tokio::select! {
            reason = reader.run() => end.set(reason),
            _ = end.wait() => {}
        }
    });
    queue
}

struct Reader {
    agent: Agent,
    container_id: String,
    /// Sequence number of the last event that the driver has.
    last: u64,
    events: mpsc::Sender<GuestEvent>,
}

impl Reader {
    /// Reads until it makes no sense any more, and says why.
    async fn run(mut self) -> String {
        let mut failures = 0;
        loop {
            let before = self.last;
            let broken = match self.open().await {
                Ok(mut stream) => self.read(&mut stream).await,
                Err(status) => Broken::Link(status),
            };
            match broken {
                Broken::Link(status) if failures < TRIES => {
                    debug!("Event stream broke: {}", clean(&status.to_string()));
                }
                Broken::Link(status) => {
                    return format!("The guest's agent does not answer: {}", clean(status.message()));
                }
                Broken::Protocol(what) => return format!("The guest's agent broke the protocol: {what}"),
                Broken::Unwanted => return "The container is gone".to_owned(),
            }
            failures = if self.last > before { 0 } else { failures + 1 };
            sleep(BACK_OFF).await;
        }
    }

    async fn open(&mut self) -> Result<Streaming<Event>, Status> {
        let request = EventsRequest { after: self.last };
        match timeout(OPEN_LIMIT, self.agent.events(request)).await {
            Ok(reply) => Ok(reply?.into_inner()),
            Err(_) => Err(Status::new(Code::DeadlineExceeded, "no answer")),
        }
    }

    async fn read(&mut self, stream: &mut Streaming<Event>) -> Broken {
        loop {
            let event = match stream.message().await {
                Ok(Some(event)) => event,
                Ok(None) => return Broken::Link(Status::unavailable("the stream ended")),
                Err(status) => return Broken::Link(status),
            };
            if event.sequence != self.last + 1 {
                return Broken::Protocol(format!("event {} after {}", event.sequence, self.last));
            }
            self.last = event.sequence;
            if let Some(event) = check(event, &self.container_id)
                && self.events.send(event).await.is_err()
            {
                return Broken::Unwanted;
            }
        }
    }
}

/// Why reading stopped.
enum Broken {
    Link(Status),
    Protocol(String),
    Unwanted,
}

/// The event, if it is about our container.
fn check(event: Event, container_id: &str) -> Option<GuestEvent> {
    match event.kind? {
        event::Kind::Exit(exit) => {
            let process = exit.process.filter(|process| process.container_id == container_id)?;
            if exit.status > MAX_STATUS {
                warn!("The guest reports the impossible exit status {}", exit.status);
            }
            Some(GuestEvent::Exit { exec_id: process.exec_id, status: exit.status.min(MAX_STATUS) })
        }
        event::Kind::Oom(oom) => (oom.container_id == container_id).then_some(GuestEvent::Oom),
    }
}

#[cfg(test)]
mod tests {
    use vmctr_proto::agent::{ExitEvent, OomEvent, ProcessRef};

    use super::*;

    fn exit(container_id: &str, status: u32) -> Event {
        let process = Some(ProcessRef { container_id: container_id.into(), exec_id: "e".into() });
        Event { sequence: 1, kind: Some(event::Kind::Exit(ExitEvent { process, status })) }
    }

    #[test]
    fn events_of_others_and_impossible_ones_do_not_pass() {
        let seen = check(exit("c1", 3), "c1");
        assert_eq!(seen, Some(GuestEvent::Exit { exec_id: "e".into(), status: 3 }));
        let clamped = check(exit("c1", u32::MAX), "c1");
        assert_eq!(clamped, Some(GuestEvent::Exit { exec_id: "e".into(), status: 255 }));
        assert_eq!(check(exit("c2", 3), "c1"), None);
        assert_eq!(check(Event { sequence: 1, kind: None }, "c1"), None);
        let oom = |id: &str| Event {
            sequence: 1,
            kind: Some(event::Kind::Oom(OomEvent { container_id: id.into() })),
        };
        assert_eq!(check(oom("c1"), "c1"), Some(GuestEvent::Oom));
        assert_eq!(check(oom("c2"), "c1"), None);
    }
}
