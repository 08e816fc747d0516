//! What a check says, and how all of them are printed.

use serde::Serialize;

use crate::failure::one_line;
use crate::output;

/// The answer of one check.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked, in a word or two.
    pub name: &'static str,
    /// Whether it is as it should be.
    pub status: Status,
    /// What was found, or what is wrong.
    pub detail: String,
    /// The command or change that puts it right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Whether a thing is as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing to do.
    Ok,
    /// Containers run, but something is missing or slower than it could be.
    Warn,
    /// Containers do not run.
    Fail,
}

impl Check {
    /// All is well.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), fix: None }
    }

    /// Containers run nevertheless.
    pub fn warn(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    /// Containers do not run.
    pub fn fail(name: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }

    /// Containers do not run, because of this error.
    pub fn error(name: &'static str, error: impl Into<anyhow::Error>, fix: impl Into<String>) -> Self {
        Self::fail(name, one_line(&error.into()), fix)
    }
}

/// Whether containers run, by what the checks say.
pub fn healthy(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.status != Status::Fail)
}

/// The checks as aligned lines, each fix below the check that it belongs to.
pub fn text(checks: &[Check]) -> String {
    let rows = checks.iter().flat_map(|check| {
        let finding = vec![mark(check.status).to_owned(), check.name.to_owned(), check.detail.clone()];
        let fix = check.fix.iter().map(|fix| vec![String::new(), String::new(), format!("fix: {fix}")]);
        std::iter::once(finding).chain(fix)
    });
    output::table(&["STATUS", "CHECK", "FINDING"], rows)
}

fn mark(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_failed_check_makes_the_host_unhealthy() {
        let mut checks = vec![Check::ok("a", "x"), Check::warn("b", "x", "y")];
        assert!(healthy(&checks));
        checks.push(Check::fail("c", "x", "y"));
        assert!(!healthy(&checks));
    }

    #[test]
    fn a_fix_stands_below_its_check() {
        let text = text(&[Check::ok("root", "yes"), Check::fail("QEMU", "missing", "apt-get install q")]);
        let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines[1], ["ok", "root", "yes"]);
        assert_eq!(lines[2], ["FAIL", "QEMU", "missing"]);
        assert_eq!(lines[3], ["fix:", "apt-get", "install", "q"]);
    }

    #[test]
    fn json_has_one_object_per_check() {
        let json = serde_json::to_value(Check::warn("b", "slow", "do")).unwrap();
        assert_eq!(json, serde_json::json!({"name": "b", "status": "warn", "detail": "slow", "fix": "do"}));
        assert!(serde_json::to_value(Check::ok("a", "x")).unwrap().get("fix").is_none());
    }
}
