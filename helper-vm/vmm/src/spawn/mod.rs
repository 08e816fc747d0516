//! Starts child processes that die with this one.
//!
//! A child's parent-death signal fires when the *thread* that forked it exits, not the process. Worker
//! threads come and go, so one thread that lives as long as the process forks for all.

mod sys;

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{OnceLock, mpsc};
use std::thread;

use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Starts `command` with stdin and stdout at `/dev/null`, stderr piped, and `fds` open under the numbers
/// that they have in this process: numbers of its own choice could hit a descriptor that the standard
/// library uses between fork and exec. The child is killed when the returned handle is dropped.
pub(crate) async fn spawn(mut command: Command, fds: Vec<OwnedFd>) -> io::Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    sys::inherit(&mut command, fds);
    let (answer, answered) = oneshot::channel();
    let runtime = Handle::current();
    let job = Box::new(move || {
        let _in_runtime = runtime.enter();
        // A caller that went away drops the child, which kills it.
        let _ = answer.send(command.spawn());
    });
    let gone = || io::Error::other("the thread that starts processes is gone");
    spawner()?.send(job).map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}

type Job = Box<dyn FnOnce() + Send>;

fn spawner() -> io::Result<mpsc::Sender<Job>> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    if let Some(spawner) = SPAWNER.get() {
        return Ok(spawner.clone());
    }
    let (jobs, queue) = mpsc::channel::<Job>();
    let work = move || queue.iter().for_each(|job| job());
    thread::Builder::new().name("vmctr-spawn".to_owned()).spawn(work)?;
    // When two first callers race, the loser's thread ends with its queue, having started nothing.
    Ok(SPAWNER.get_or_init(|| jobs).clone())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::run_dir::{HostProcess, Role};

    #[tokio::test]
    async fn the_child_writes_to_what_it_was_passed() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("/bin/bash");
        command.args(["-c", &format!("echo passed >&{}; echo said >&2", theirs.as_raw_fd())]);
        let mut child = spawn(command, vec![theirs.into()]).await.unwrap();
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).await.unwrap();
        assert!(child.wait().await.unwrap().success());
        assert_eq!(stderr, "said\n");
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "passed\n");
    }

    #[tokio::test]
    async fn a_missing_program_is_an_error() {
        let error = spawn(Command::new("/nonexistent/program"), vec![]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let child = spawn(command, vec![]).await.unwrap();
        let process = HostProcess::of_live(Role::Qemu, child.id().unwrap()).unwrap();
        drop(child);
        for _ in 0..250 {
            if !process.is_alive() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the child still lives");
    }
}
