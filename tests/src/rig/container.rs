//! One container: how it is to run, and what can be done to it while it runs detached.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::api;
use super::command::{self, Output, Running, TIME_LIMIT, eventually};
use super::{RUNC, Rig};

/// A `ctr run` in the making.
pub struct Run<'rig> {
    rig: &'rig Rig,
    runtime: &'static str,
    id: String,
    flags: Vec<OsString>,
    root: Option<OsString>,
    args: Vec<OsString>,
}

impl<'rig> Run<'rig> {
    pub(super) fn from_image(rig: &'rig Rig, id: String, image: &str) -> Self {
        Self::with(rig, id, Vec::new(), Some(image.into()))
    }

    pub(super) fn from_folder(rig: &'rig Rig, id: String, root: &Path) -> Self {
        Self::with(rig, id, vec!["--rootfs".into()], Some(root.into()))
    }

    /// `ctr` then takes neither an image nor arguments: the specification says all.
    pub(super) fn from_spec(rig: &'rig Rig, id: String, spec: &Path) -> Self {
        Self::with(rig, id, vec!["--config".into(), spec.into()], None)
    }

    fn with(rig: &'rig Rig, id: String, flags: Vec<OsString>, root: Option<OsString>) -> Self {
        Self { rig, runtime: rig.runtime(), id, flags, root, args: Vec::new() }
    }

    /// Runs it under another runtime than the rig's.
    #[must_use]
    pub fn under(mut self, runtime: &'static str) -> Self {
        self.runtime = runtime;
        self
    }

    /// The container's ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Adds a flag without a value.
    #[must_use]
    pub fn switch(mut self, flag: &str) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// Adds a flag with a value.
    #[must_use]
    pub fn flag(mut self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.flags.extend([flag.into(), value.as_ref().to_owned()]);
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(self, key: &str, value: impl std::fmt::Display) -> Self {
        self.flag("--annotation", format!("{key}={value}"))
    }

    /// Mounts a host path into the container; the options are as in `rbind:ro`.
    #[must_use]
    pub fn bind(self, source: &Path, target: &str, options: &str) -> Self {
        self.flag("--mount", format!("type=bind,src={},dst={target},options={options}", source.display()))
    }

    /// What the container runs.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        self
    }

    /// The container runs a shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.args(["/bin/sh", "-c", script])
    }

    /// `ctr run --rm` in the foreground, not started yet.
    pub fn command(&self) -> Command {
        self.command_with(&["--rm"])
    }

    fn command_with(&self, mode: &[&str]) -> Command {
        let mut ctr = self.rig.ctr();
        ctr.args(["run", "--runtime", self.runtime]).args(mode).args(&self.flags);
        ctr.args(&self.root).arg(&self.id).args(&self.args);
        ctr
    }

    /// Makes the container without a task.
    pub fn create(&self) -> Output {
        let mut ctr = self.rig.ctr();
        ctr.args(["container", "create", "--runtime", self.runtime]).args(&self.flags);
        ctr.args(&self.root).arg(&self.id).args(&self.args);
        command::run(&mut ctr)
    }

    /// Runs it to its end with nothing on stdin.
    pub fn output(mut self) -> Output {
        self.outlive_the_opening();
        command::run(&mut self.command())
    }

    /// runc starts a process whether or not its output has a reader: ctr loses what one has printed that ended before.
    fn outlive_the_opening(&mut self) {
        if let (RUNC, [shell, _, script]) = (self.runtime, self.args.as_mut_slice())
            && *shell == "/bin/sh"
        {
            let mut longer = OsString::from("trap 'sleep 0.2' EXIT; ");
            longer.push(&script);
            *script = longer;
        }
    }

    /// Runs it to its end with these bytes on stdin.
    pub fn output_with_input(self, input: &str) -> Output {
        let (_, mut running) = self.start();
        let mut stdin = running.stdin();
        stdin.write_all(input.as_bytes()).expect("the container reads");
        // Only now: ctr 1.6 forgets an end of its input that comes before the task runs.
        drop(stdin);
        running.finish()
    }

    /// Starts it in the foreground with stdin piped and stdout collected; returns when its task runs.
    pub fn start(self) -> (Container<'rig>, Running) {
        let running = Running::start(self.command().stdin(Stdio::piped()));
        let container = Container { rig: self.rig, id: self.id };
        eventually("the task runs", TIME_LIMIT, || container.status().as_deref() == Some("RUNNING"));
        (container, running)
    }

    /// Starts it in the background without stdio.
    pub fn detached(self) -> Container<'rig> {
        command::run(&mut self.command_with(&["--detach", "--null-io"])).ok();
        Container { rig: self.rig, id: self.id }
    }
}

/// A container that runs in the background.
pub struct Container<'rig> {
    rig: &'rig Rig,
    id: String,
}

impl<'rig> Container<'rig> {
    pub(super) fn of(rig: &'rig Rig, id: &str) -> Self {
        Self { rig, id: id.to_owned() }
    }

    /// Its ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Runs a shell script in it.
    pub fn sh(&self, script: &str) -> Output {
        self.exec("sh", &[], &["/bin/sh", "-c", script])
    }

    /// Runs a further process in it; the flags are those of `ctr task exec`.
    pub fn exec(&self, exec_id: &str, flags: &[&str], args: &[&str]) -> Output {
        command::run(&mut self.exec_command(exec_id, flags, args))
    }

    /// `ctr task exec`, not started yet.
    pub fn exec_command(&self, exec_id: &str, flags: &[&str], args: &[&str]) -> Command {
        let mut ctr = self.rig.ctr();
        ctr.args(["task", "exec", "--exec-id", exec_id]).args(flags).arg(&self.id).args(args);
        ctr
    }

    /// Runs a verb of `ctr task` on it.
    pub fn task(&self, verb: &str, flags: &[&str]) -> Output {
        command::run(self.rig.ctr().args(["task", verb]).args(flags).arg(&self.id))
    }

    /// Sends a signal to its first process.
    pub fn kill(&self, signal: &str) -> Output {
        self.task("kill", &["--signal", signal])
    }

    /// Its task's status as `ctr task list` prints it; none when it has no task.
    pub fn status(&self) -> Option<String> {
        let list = self.rig.ctr_run(&["task", "list"]).ok().text();
        let mut rows = list.lines().map(str::split_whitespace);
        let mut row = rows.find_map(|mut row| (row.next() == Some(&self.id)).then_some(row))?;
        row.nth(1).map(str::to_owned)
    }

    /// Its task's process ID as `ctr task list` prints it.
    pub fn pid(&self) -> Option<u32> {
        let list = self.rig.ctr_run(&["task", "list"]).ok().text();
        let mut rows = list.lines().map(str::split_whitespace);
        let mut row = rows.find_map(|mut row| (row.next() == Some(&self.id)).then_some(row))?;
        row.next()?.parse().ok()
    }

    /// Waits until its task has a status.
    #[track_caller]
    pub fn wait_for(&self, status: &str) {
        eventually(&format!("task is {status}"), TIME_LIMIT, || self.status().as_deref() == Some(status));
    }

    /// Deletes the stopped task; returns its exit code. The container is removed, too.
    pub fn delete(self) -> u32 {
        let (code, _) =
            api::delete(self.rig, &self.id).unwrap_or_else(|e| panic!("cannot delete {}: {e}", self.id));
        self.forget();
        code
    }

    /// Kills it, then removes all of it.
    pub fn remove(self) {
        self.task("delete", &["--force"]);
        self.forget();
    }

    /// Removes the container's record; its task is gone.
    pub fn forget(self) {
        self.rig.ctr_run(&["container", "delete", &self.id]).ok();
    }
}
