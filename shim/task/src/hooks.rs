//! Programs of the spec that run on the host around the container, as any OCI runtime runs them: the
//! container's state as JSON on standard input, nothing else.
//!
//! ```text
//!   Create  prestart, createRuntime   a failure fails the create
//!   Start   poststart                 a failure is logged
//!   Delete  poststop                  a failure is logged
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{Hook, Hooks};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tracing::warn;

/// For a hook that names no limit: no program may hold up a container for ever.
const DEFAULT_LIMIT: Duration = Duration::from_secs(120);

/// Of what a failing hook says, this much is passed on.
const MAX_OUTPUT: u64 = 4096;

/// When hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The VM runs, the container's process does not.
    Create,
    /// The container's process runs.
    PostStart,
    /// The container is gone.
    PostStop,
}

/// State of the container as the OCI runtime spec describes it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Version of the OCI runtime spec.
    pub oci_version: String,
    /// The container.
    pub id: String,
    /// `creating`, `created`, `running` or `stopped`.
    pub status: &'static str,
    /// The container's process on the host: QEMU. Left out when it is gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Annotations of the spec.
    pub annotations: HashMap<String, String>,
}

/// A hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot run.
    #[error("Hook {} cannot run", path.display())]
    Run {
        /// The program.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// It ran and failed.
    #[error("Hook {} ended with {status}: {output}", path.display())]
    Failed {
        /// The program.
        path: PathBuf,
        /// Its end.
        status: ExitStatus,
        /// The beginning of what it said.
        output: String,
    },
    /// It took too long and was killed.
    #[error("Hook {} did not end within {} s", path.display(), limit.as_secs())]
    Timeout {
        /// The program.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
    },
}

/// Runs the hooks of a moment in order; stops at the first that fails.
pub async fn run(hooks: &Hooks, moment: Moment, state: &State) -> Result<(), HookError> {
    let input = serde_json::to_vec(state).unwrap_or_default();
    for hook in of(hooks, moment) {
        run_one(hook, &input).await?;
    }
    Ok(())
}

/// Runs the hooks of a moment; those that fail are logged and the others still run.
pub async fn run_all(hooks: &Hooks, moment: Moment, state: &State) {
    let input = serde_json::to_vec(state).unwrap_or_default();
    for hook in of(hooks, moment) {
        if let Err(error) = run_one(hook, &input).await {
            warn!("{}", crate::error::chain(&error));
        }
    }
}

fn of(hooks: &Hooks, moment: Moment) -> impl Iterator<Item = &Hook> {
    let lists = match moment {
        Moment::Create => [hooks.prestart(), hooks.create_runtime()],
        Moment::PostStart => [hooks.poststart(), &None],
        Moment::PostStop => [hooks.poststop(), &None],
    };
    lists.into_iter().flatten().flatten()
}

async fn run_one(hook: &Hook, input: &[u8]) -> Result<(), HookError> {
    let seconds = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let limit = seconds.map_or(DEFAULT_LIMIT, Duration::from_secs);
    let failed = |source| HookError::Run { path: hook.path().clone(), source };
    let mut child = command(hook).spawn().map_err(failed)?;
    let Ok(ended) = timeout(limit, talk(&mut child, input)).await else {
        // Dropping the child kills it; reaping it here leaves no zombie.
        let _ = child.kill().await;
        return Err(HookError::Timeout { path: hook.path().clone(), limit });
    };
    let (status, output) = ended.map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    Err(HookError::Failed { path: hook.path().clone(), status, output })
}

fn command(hook: &Hook) -> Command {
    let path: &Path = hook.path();
    let mut command = Command::new(path);
    let args = hook.args().as_deref().unwrap_or_default();
    if let Some((arg0, rest)) = args.split_first() {
        command.arg0(arg0).args(rest);
    }
    command.env_clear();
    command.envs(hook.env().iter().flatten().filter_map(|pair| pair.split_once('=')));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn talk(child: &mut Child, input: &[u8]) -> std::io::Result<(ExitStatus, String)> {
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its input.
        let _ = stdin.write_all(input).await;
    }
    let mut output = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        (&mut stderr).take(MAX_OUTPUT).read_to_end(&mut output).await?;
        // A closed pipe would kill a talkative hook.
        tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
    }
    let status = child.wait().await?;
    Ok((status, String::from_utf8_lossy(&output).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state() -> State {
        State {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            status: "created",
            pid: Some(7),
            bundle: "/b".into(),
            annotations: HashMap::new(),
        }
    }

    fn hooks(json: serde_json::Value) -> Hooks {
        serde_json::from_value(json).unwrap()
    }

    fn shell(script: &str) -> serde_json::Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["OUT=x", "PATH=/usr/bin:/bin"]})
    }

    #[tokio::test]
    async fn hooks_get_the_state_and_run_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let hooks = hooks(json!({
            "prestart": [shell(&format!("echo first >> {}", out.display()))],
            "createRuntime": [shell(&format!("cat >> {}", out.display()))],
            "poststop": [shell("exit 1")],
        }));
        run(&hooks, Moment::Create, &state()).await.unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let (first, rest) = text.split_once('\n').unwrap();
        assert_eq!(first, "first");
        let seen: serde_json::Value = serde_json::from_str(rest).unwrap();
        assert_eq!(
            (&seen["id"], &seen["pid"], &seen["ociVersion"]),
            (&json!("c1"), &json!(7), &json!("1.0.2"))
        );
    }

    #[tokio::test]
    async fn failures_say_what_the_hook_said() {
        let failing = hooks(json!({"createRuntime": [shell("echo no bridge >&2; exit 3")]}));
        let text = run(&failing, Moment::Create, &state()).await.unwrap_err().to_string();
        assert!(text.contains("no bridge") && text.contains('3'), "{text}");
        let missing = hooks(json!({"createRuntime": [{"path": "/nonexistent/hook"}]}));
        let error = run(&missing, Moment::Create, &state()).await.unwrap_err();
        assert!(matches!(error, HookError::Run { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed() {
        let mut hook = shell("exec sleep 60");
        hook["timeout"] = json!(1);
        let error =
            run(&hooks(json!({"createRuntime": [hook]})), Moment::Create, &state()).await.unwrap_err();
        assert!(matches!(error, HookError::Timeout { .. }), "{error}");
    }
}
