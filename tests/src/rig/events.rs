//! containerd's events, as `ctr events` prints them.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::command::{Running, TIME_LIMIT, eventually};
use super::{NAMESPACE, Rig};

/// An event.
#[derive(Clone, Debug)]
pub struct Event {
    /// As in `/tasks/exit`.
    pub topic: String,
    /// Its fields.
    pub fields: Value,
}

/// A recorder of events from its start on.
pub struct Events {
    seen: Arc<Mutex<Vec<Event>>>,
    _ctr: Running,
}

impl Events {
    /// Subscribes; returns when events do arrive.
    pub fn record(rig: &Rig) -> Self {
        let mut ctr =
            Running::start_with(rig.ctr().arg("events").stdin(Stdio::null()).stdout(Stdio::piped()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (lines, sink) = (BufReader::new(ctr.stdout()).lines(), Arc::clone(&seen));
        thread::spawn(move || {
            for event in lines.map_while(Result::ok).filter_map(|line| parse(&line)) {
                sink.lock().expect("no holder panics").push(event);
            }
        });
        let events = Self { seen, _ctr: ctr };
        let mut count = 0;
        eventually("events arrive", Duration::from_secs(20), || {
            count += 1;
            rig.ctr_run(&["namespaces", "label", NAMESPACE, &format!("probe={count}")]).ok();
            !events.all().is_empty()
        });
        events
    }

    /// All events so far.
    pub fn all(&self) -> Vec<Event> {
        self.seen.lock().expect("no holder panics").clone()
    }

    /// Events of a container's task so far.
    pub fn of(&self, id: &str) -> Vec<Event> {
        let mut events = self.all();
        events.retain(|event| event.topic.starts_with("/tasks/") && event.fields["container_id"] == id);
        events
    }

    /// Waits for an event of a container's task.
    #[track_caller]
    pub fn wait(&self, id: &str, topic: &str) -> Event {
        let find = || self.of(id).into_iter().find(|event| event.topic == topic);
        eventually(&format!("event {topic} of {id}; seen: {:?}", self.topics(id)), TIME_LIMIT, || {
            find().is_some()
        });
        find().expect("just seen")
    }

    /// Topics of a container's task, in order.
    pub fn topics(&self, id: &str) -> Vec<String> {
        self.of(id).into_iter().map(|event| event.topic).collect()
    }
}

/// `DATE TIME ZONE NAME NAMESPACE TOPIC JSON`, such as `2026-01-02 03:04:05.6 +0000 UTC default /tasks/exit {...}`.
fn parse(line: &str) -> Option<Event> {
    let (head, _) = line.split_once('{')?;
    let topic = head.split_whitespace().last()?.to_owned();
    let fields = serde_json::from_str(&line[head.len()..]).ok()?;
    Some(Event { topic, fields })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ctr_events_is_split() {
        let line =
            r#"2026-01-02 03:04:05.678 +0000 UTC default /tasks/exit {"container_id":"a","id":"a","pid":7}"#;
        let event = parse(line).unwrap();
        assert_eq!(event.topic, "/tasks/exit");
        assert_eq!(event.fields["pid"], 7);
        assert!(parse("no event").is_none());
    }
}
