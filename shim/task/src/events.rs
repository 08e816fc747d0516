//! What containerd is told without asking: one task sends the events one after the other, in the order in
//! which they were published, and stays with an event until containerd has it.
//!
//! ```text
//!   driver --publish()--> bounded queue --> task: connect, Forward, wait for the answer --> containerd
//!                                             ^ on failure: back off, connect anew, same event again
//! ```
//!
//! While containerd is away events wait; a full queue drops the newest and says so in the log.
//! An event may arrive twice (the answer was lost), never out of order.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim::event::Event;
use containerd_shim::protos::protobuf::MessageDyn;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim::events::ForwardRequest;
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::protos::ttrpc;
use containerd_shim::protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim::util::convert_to_any;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, warn};

/// Events that wait while containerd is away. A container makes a handful; execs three each.
const QUEUE: usize = 4096;

/// How long containerd may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Refusals (not: absences) of one event after which it is given up.
const MAX_REFUSALS: u32 = 5;

const BACK_OFF_FIRST: Duration = Duration::from_millis(50);
const BACK_OFF_LAST: Duration = Duration::from_secs(5);

/// Where events are handed in.
#[derive(Clone, Debug)]
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
}

/// The sending task; ends when all publishers are gone and the queue is empty.
#[derive(Debug)]
pub struct Sender(JoinHandle<()>);

/// Starts the sending task for containerd's ttrpc `address`, a path or a `unix://` URL.
pub fn spawn(address: &str, namespace: &str) -> (Publisher, Sender) {
    let (queue, events) = mpsc::channel(QUEUE);
    let link = Link { path: address.strip_prefix("unix://").unwrap_or(address).to_owned(), client: None };
    let sender = Sender(tokio::spawn(link.send_all(events)));
    (Publisher { namespace: namespace.to_owned(), queue }, sender)
}

impl Publisher {
    /// Puts an event last in the queue.
    pub fn publish<E: Event + MessageDyn>(&self, event: E) {
        let topic = event.topic();
        match self.envelope(topic.clone(), event) {
            Ok(envelope) => {
                if self.queue.try_send(envelope).is_err() {
                    error!(topic, "Event dropped: {QUEUE} events wait for containerd already");
                }
            }
            Err(error) => error!(topic, "Event cannot be encoded: {error}"),
        }
    }

    fn envelope<E: MessageDyn>(&self, topic: String, event: E) -> containerd_shim::Result<Envelope> {
        let mut envelope = Envelope::new();
        envelope.set_topic(topic);
        envelope.set_namespace(self.namespace.clone());
        envelope.set_timestamp(timestamp(SystemTime::now()));
        envelope.set_event(convert_to_any(Box::new(event))?);
        Ok(envelope)
    }
}

impl Sender {
    /// Waits until everything published is sent; all publishers must be dropped before. Gives up after `limit`.
    pub async fn finish(self, limit: Duration) {
        if timeout(limit, self.0).await.is_err() {
            warn!("containerd did not take the last events within {} s", limit.as_secs());
        }
    }
}

/// A point in time as containerd's messages write it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Timestamp::default()
    }
}

struct Link {
    path: String,
    client: Option<EventsClient>,
}

impl Link {
    async fn send_all(mut self, mut events: mpsc::Receiver<Envelope>) {
        while let Some(envelope) = events.recv().await {
            self.send(envelope).await;
        }
    }

    async fn send(&mut self, envelope: Envelope) {
        let mut request = ForwardRequest::new();
        let topic = envelope.topic().to_owned();
        request.set_envelope(envelope);
        let mut wait = BACK_OFF_FIRST;
        let mut refusals = 0;
        while let Err(error) = self.try_send(&request).await {
            debug!(topic, "containerd did not take an event, trying again: {error}");
            if matches!(error, ttrpc::Error::RpcStatus(_)) {
                refusals += 1;
            }
            if refusals == MAX_REFUSALS {
                error!(topic, "containerd refuses an event: {error}");
                return;
            }
            sleep(wait).await;
            wait = (wait * 2).min(BACK_OFF_LAST);
        }
    }

    async fn try_send(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match self.client.take() {
            Some(client) => client,
            None => self.connect().await?,
        };
        let context = ttrpc::context::with_duration(ANSWER_LIMIT);
        client.forward(context, request).await?;
        self.client = Some(client);
        Ok(())
    }

    async fn connect(&self) -> ttrpc::Result<EventsClient> {
        let socket = Socket::connect_unix(&self.path)
            .await
            .map_err(|error| ttrpc::Error::Socket(format!("cannot connect to {}: {error}", self.path)))?;
        Ok(EventsClient::new(Client::new(socket)))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim::protos::events::task::{TaskExit, TaskStart};
    use containerd_shim::protos::protobuf::Message;
    use containerd_shim::protos::shim_async::{Events, create_events};
    use containerd_shim::protos::types::empty::Empty;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    #[derive(Clone, Default)]
    struct Fake {
        seen: Arc<Mutex<Vec<(String, String)>>>,
        refuse: Arc<Mutex<u32>>,
    }

    #[async_trait]
    impl Events for Fake {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let mut refuse = self.refuse.lock().unwrap();
            if *refuse > 0 {
                *refuse -= 1;
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNAVAILABLE, "not now")));
            }
            let envelope = request.envelope();
            assert_eq!(envelope.namespace(), "ns");
            let exit = TaskExit::parse_from_bytes(&envelope.event().value).unwrap();
            self.seen.lock().unwrap().push((envelope.topic().to_owned(), exit.container_id));
            Ok(Empty::default())
        }
    }

    async fn serve(fake: &Fake, path: &Path) -> Server {
        let _ = std::fs::remove_file(path);
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(fake.clone())));
        server.start().await.unwrap();
        server
    }

    fn exit(id: u32) -> TaskExit {
        TaskExit { container_id: id.to_string(), ..TaskExit::default() }
    }

    fn ids(fake: &Fake) -> Vec<u32> {
        fake.seen.lock().unwrap().iter().map(|(_, id)| id.parse().unwrap()).collect()
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn events_keep_their_order_and_topic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let fake = Fake::default();
        let _server = serve(&fake, &path).await;
        let (publisher, sender) = spawn(&format!("unix://{}", path.display()), "ns");
        publisher.publish(TaskStart { container_id: "0".into(), ..TaskStart::default() });
        (1..200).for_each(|id| publisher.publish(exit(id)));
        drop(publisher);
        sender.finish(LIMIT).await;
        assert_eq!(ids(&fake), (0..200).collect::<Vec<_>>());
        let seen = fake.seen.lock().unwrap();
        assert_eq!((seen[0].0.as_str(), seen[1].0.as_str()), ("/tasks/start", "/tasks/exit"));
    }

    #[tokio::test]
    async fn events_wait_for_containerd_and_survive_its_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let fake = Fake::default();
        let (publisher, sender) = spawn(path.to_str().unwrap(), "ns");
        publisher.publish(exit(1));
        sleep(Duration::from_millis(120)).await;
        let mut server = serve(&fake, &path).await;
        while ids(&fake).is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
        server.shutdown().await.unwrap();
        drop(server);
        publisher.publish(exit(2));
        publisher.publish(exit(3));
        sleep(Duration::from_millis(120)).await;
        let _server = serve(&fake, &path).await;
        drop(publisher);
        sender.finish(LIMIT).await;
        assert_eq!(ids(&fake), [1, 2, 3]);
    }

    #[tokio::test]
    async fn a_refused_event_is_tried_again_and_then_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ttrpc");
        let fake = Fake::default();
        let _server = serve(&fake, &path).await;
        let (publisher, sender) = spawn(path.to_str().unwrap(), "ns");
        *fake.refuse.lock().unwrap() = MAX_REFUSALS - 1;
        publisher.publish(exit(1));
        while ids(&fake).is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
        *fake.refuse.lock().unwrap() = MAX_REFUSALS;
        publisher.publish(exit(2));
        publisher.publish(exit(3));
        drop(publisher);
        sender.finish(LIMIT).await;
        assert_eq!(ids(&fake), [1, 3]);
    }

    #[tokio::test]
    async fn an_absent_containerd_does_not_hold_up_the_end() {
        let (publisher, sender) = spawn("/nonexistent/ttrpc", "ns");
        publisher.publish(exit(1));
        drop(publisher);
        let begun = std::time::Instant::now();
        sender.finish(Duration::from_millis(200)).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
