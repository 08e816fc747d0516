//! What was measured: figures, each the samples of one thing for one subject.
//!
//! Invariant: figures keep the order in which their first samples came, and no two have the same key.

use serde_json::{Value, json};

use super::samples::Samples;

/// Version of the JSON's layout.
const FORMAT: u32 = 2;

/// Whose figures the others are compared with.
pub const REFERENCE: &str = "runc";

/// The same for unions, which no container has to do with.
pub const UNION_REFERENCE: &str = "overlayfs";

/// The same for commits, of which runc has none.
pub const COMMIT_REFERENCE: &str = "buildah";

/// What a sample is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Less is better.
    Seconds,
    /// Less is better.
    Mib,
    /// More is better.
    MibPerSecond,
    /// Less is better.
    Microseconds,
    /// Less is better.
    Turns,
    /// Processor time by time.
    Cores,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Mib => "MiB",
            Self::MibPerSecond => "MiB/s",
            Self::Microseconds => "µs",
            Self::Turns => "turns",
            Self::Cores => "cores",
        }
    }

    /// With as many digits as are worth reading.
    pub fn show(self, value: f64) -> String {
        let digits = match self {
            Self::Seconds => 3,
            Self::Mib | Self::Cores => 1,
            Self::MibPerSecond | Self::Microseconds | Self::Turns => 0,
        };
        format!("{value:.digits$} {}", self.name())
    }
}

/// What a figure says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The benchmark.
    pub benchmark: &'static str,
    /// What was measured. A part of the figure above it begins with two spaces.
    pub what: String,
    /// Of whom.
    pub subject: &'static str,
}

/// One line of the results.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What it says.
    pub key: Key,
    /// What its samples are counted in.
    pub unit: Unit,
    /// The measurements.
    pub samples: Samples,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Results {
    /// What it was measured on: names and values.
    pub machine: Vec<(&'static str, Value)>,
    figures: Vec<Figure>,
}

impl Results {
    /// Adds a sample.
    pub fn add(&mut self, key: Key, unit: Unit, sample: f64) {
        match self.figures.iter_mut().find(|figure| figure.key == key) {
            Some(figure) => figure.samples.push(sample),
            None => self.figures.push(Figure { key, unit, samples: Samples::of(sample) }),
        }
    }

    /// The figures in order.
    pub fn figures(&self) -> &[Figure] {
        &self.figures
    }

    /// What the same costs the reference, as a multiple: 2 means twice the time or half the rate. `None` for the
    /// reference itself and for what it has not.
    pub fn ratio(&self, figure: &Figure) -> Option<f64> {
        if is_reference(figure.key.subject) {
            return None;
        }
        let of = |other: &&Figure| {
            let Key { benchmark, what, subject } = &other.key;
            is_reference(subject) && (benchmark, what) == (&figure.key.benchmark, &figure.key.what)
        };
        let reference = self.figures.iter().find(of)?.samples.median();
        let (own, reference) = match figure.unit {
            Unit::MibPerSecond => (reference, figure.samples.median()),
            _ => (figure.samples.median(), reference),
        };
        (reference > 0.0).then_some(own / reference)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let machine: serde_json::Map<_, _> =
            self.machine.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let figures: Vec<_> = self.figures.iter().map(|figure| self.figure_json(figure)).collect();
        json!({"format": FORMAT, "machine": machine, "figures": figures})
    }

    fn figure_json(&self, figure: &Figure) -> Value {
        let (least, most) = figure.samples.range();
        json!({
            "benchmark": figure.key.benchmark,
            "what": figure.key.what.trim_start(),
            "subject": figure.key.subject,
            "unit": figure.unit.name(),
            "times_reference": self.ratio(figure),
            "median": figure.samples.median(),
            "least": least,
            "most": most,
            "samples": figure.samples.all(),
        })
    }
}

fn is_reference(subject: &str) -> bool {
    matches!(subject, REFERENCE | UNION_REFERENCE | COMMIT_REFERENCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(what: &str, subject: &'static str) -> Key {
        Key { benchmark: "b", what: what.to_owned(), subject }
    }

    fn results() -> Results {
        let mut results = Results::default();
        for (subject, time, rate) in [("vmctr", 4.0, 50.0), (REFERENCE, 0.5, 200.0), ("vmctr", 6.0, 50.0)] {
            results.add(key("time", subject), Unit::Seconds, time);
            results.add(key("rate", subject), Unit::MibPerSecond, rate);
        }
        results.add(key("only", "vmctr"), Unit::Mib, 1.0);
        results
    }

    #[test]
    fn a_ratio_above_one_is_worse_whatever_the_unit() {
        let results = results();
        let ratios: Vec<_> = results.figures().iter().map(|figure| results.ratio(figure)).collect();
        assert_eq!(ratios, [Some(10.0), Some(4.0), None, None, None]);
    }

    #[test]
    fn nothing_is_compared_with_nothing() {
        let mut results = Results::default();
        results.add(key("m", "vmctr"), Unit::Mib, 1.0);
        results.add(key("m", REFERENCE), Unit::Mib, 0.0);
        assert_eq!(results.ratio(&results.figures()[0]), None);
    }

    #[test]
    fn the_json_holds_machine_and_samples() {
        let mut results = results();
        results.machine.push(("cores", 2.into()));
        let json = results.json();
        assert_eq!(json["format"], FORMAT);
        assert_eq!(json["machine"]["cores"], 2);
        assert_eq!(
            json["figures"][0],
            json!({
                "benchmark": "b", "what": "time", "subject": "vmctr", "unit": "s", "times_reference": 10.0,
                "median": 5.0, "least": 4.0, "most": 6.0, "samples": [4.0, 6.0],
            })
        );
    }
}
