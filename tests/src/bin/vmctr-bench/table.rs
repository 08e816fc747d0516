//! The results as a table for people: ratios first, one line for each figure, what it is compared with beneath it:
//! runc, for commits buildah, for unions the kernel's overlay.

use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value;

use super::results::{Figure, Results};

const HEADER: [&str; 6] = ["RATIO", "", "", "MEDIAN", "LEAST … MOST", "RUNS"];

/// Machine and figures.
pub fn text(results: &Results) -> String {
    let mut text = String::new();
    for (name, value) in &results.machine {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        text += &format!("{:18}{value}\n", name.replace('_', " "));
    }
    for figures in results.figures().chunk_by(|a, b| a.key.benchmark == b.key.benchmark) {
        text += &format!("\n{}\n{}\n", figures[0].key.benchmark, table(results, figures));
    }
    text
}

fn table(results: &Results, figures: &[Figure]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(HEADER);
    for figure in in_order(figures) {
        table.add_row(row(results, figure));
    }
    for column in [0, 3, 4, 5] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Figures of the same thing beside each other, where the first of them stands.
fn in_order(figures: &[Figure]) -> Vec<&Figure> {
    let place = |figure: &&Figure| figures.iter().position(|other| other.key.what == figure.key.what);
    let mut ordered: Vec<_> = figures.iter().collect();
    ordered.sort_by_key(place);
    ordered
}

fn row(results: &Results, figure: &Figure) -> [String; 6] {
    let ratio = results.ratio(figure).map_or_else(String::new, |ratio| match ratio < 1.0 {
        true => format!("{ratio:.2}"),
        false => format!("{ratio:.1}"),
    });
    let (least, most) = figure.samples.range();
    [
        ratio,
        figure.key.what.clone(),
        figure.key.subject.to_owned(),
        figure.unit.show(figure.samples.median()),
        format!("{} … {}", bare(figure, least), bare(figure, most)),
        figure.samples.all().len().to_string(),
    ]
}

/// Without the unit, which stands beside it.
fn bare(figure: &Figure, value: f64) -> String {
    let shown = figure.unit.show(value);
    shown.split(' ').next().map_or_else(String::new, str::to_owned)
}

/// A fact of the machine.
pub fn fact(text: impl Into<String>) -> Value {
    Value::String(text.into())
}

#[cfg(test)]
mod tests {
    use super::super::results::{Key, REFERENCE, Unit};
    use super::*;

    #[test]
    fn subjects_of_one_thing_stand_together_with_the_ratio_first() {
        let mut results = Results::default();
        results.machine.push(("guest_kernel", fact("6.12")));
        for subject in ["vmctr", REFERENCE] {
            for (what, sample) in [("first output", 2.5), ("end", 3.0)] {
                let sample = if subject == REFERENCE { sample / 10.0 } else { sample };
                let key = Key { benchmark: "start", what: what.to_owned(), subject };
                results.add(key, Unit::Seconds, sample);
            }
        }
        let text = text(&results);
        assert!(text.starts_with("guest kernel      6.12\n\nstart\n"), "{text}");
        let words: Vec<Vec<_>> =
            text.lines().skip(4).map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(words[0], ["10.0", "first", "output", "vmctr", "2.500", "s", "2.500", "…", "2.500", "1"]);
        assert_eq!(words[1], ["first", "output", "runc", "0.250", "s", "0.250", "…", "0.250", "1"]);
        assert_eq!(words[2][..3], ["10.0", "end", "vmctr"]);
        assert_eq!(words.len(), 4);
    }
}
