//! One test's own corner of the host, and the proof that nothing is left of it.
//!
//! ```text
//!   /tmp/<tag>/                       everything on disk: containerd's root and state, run directories, images
//!   <cgroup v2 mount>/<tag>/          containerd and all that it starts, unless moved to a container's cgroup
//!   <tag>-NAME                        container IDs
//! ```
//!
//! The tag is unique to the test. So whatever the test caused and left behind - a process, mount, socket, cgroup
//! or file - carries the tag in its name, command line or cgroup, and is found by it.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::command::POLL;
use super::{prerequisites, proc};

/// How long the last remains of a test may take to go.
const PATIENCE: Duration = Duration::from_secs(60);

/// A test's corner of the host.
pub struct Scope {
    tag: String,
    folder: TempDir,
    cgroup: PathBuf,
}

impl Scope {
    /// Makes the folder and the cgroup.
    pub fn new() -> Self {
        // Names of unix sockets have 107 bytes at most: the folder's is short.
        let folder = tempfile::Builder::new()
            .prefix("vt-")
            .rand_bytes(8)
            .tempdir_in("/tmp")
            .expect("/tmp is writable");
        let tag = folder.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        let cgroup = prerequisites::cgroup2().join(&tag);
        fs::create_dir(&cgroup).unwrap_or_else(|e| panic!("cannot make cgroup {}: {e}", cgroup.display()));
        Self { tag, folder, cgroup }
    }

    /// What marks all that belongs to the test.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The test's folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// File to write a process's ID to, which then belongs to the test with all its descendants.
    pub fn cgroup_procs(&self) -> PathBuf {
        self.cgroup.join("cgroup.procs")
    }

    /// Waits until nothing is left except the folder itself; else says what.
    pub fn leftovers(&self) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = self.look();
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            thread::sleep(POLL * 5);
        }
    }

    fn look(&self) -> Vec<String> {
        let processes =
            self.processes().into_iter().map(|pid| format!("process {pid}: {}", proc::describe(pid)));
        let mounts = self.mounts().into_iter().map(|path| format!("mount {}", path.display()));
        let cgroups = self.cgroups().into_iter().map(|path| format!("cgroup {}", path.display()));
        processes.chain(mounts).chain(cgroups).chain(self.sockets()).collect()
    }

    /// Processes in the test's cgroup, and any other that mentions the tag.
    pub fn processes(&self) -> Vec<u32> {
        processes(&self.tag)
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let points =
            table.lines().filter_map(|line| line.split(' ').nth(4)).filter(|point| point.contains(&self.tag));
        points.map(PathBuf::from).collect()
    }

    /// cgroups of the test's containers, in any hierarchy.
    fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        find_named(Path::new("/sys/fs/cgroup"), &self.tag, 4, &mut found);
        found.retain(|path| *path != self.cgroup);
        found
    }

    fn sockets(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
        table.lines().filter(|line| line.contains(&self.tag)).map(|line| format!("socket {line}")).collect()
    }

    /// Ends and removes whatever carries the tag.
    pub fn wipe(&self) {
        let deadline = Instant::now() + PATIENCE;
        while kill_all(&self.tag) && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        for mount in self.mounts().iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        for cgroup in self.cgroups().iter().rev() {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        self.wipe();
        // Busy while what was killed is still ending.
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.cgroup).is_err() && self.cgroup.exists() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
    }
}

fn processes(tag: &str) -> Vec<u32> {
    let me = std::process::id();
    let belongs = |pid: &u32| *pid != me && proc::mentions(*pid, tag);
    proc::all().into_iter().filter(belongs).collect()
}

/// Kills every process that carries a test's tag; whether there was one.
pub fn kill_all(tag: &str) -> bool {
    let found = processes(tag);
    for pid in &found {
        // It may have ended meanwhile.
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
    }
    !found.is_empty()
}

/// The socket that containerd and a shim agree on for a container.
pub fn shim_socket(address: &Path, namespace: &str, id: &str) -> PathBuf {
    let name = Sha256::digest(address.join(namespace).join(id).to_string_lossy().as_bytes());
    let hex: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new("/run/containerd/s").join(hex)
}

fn find_named(folder: &Path, name: &str, depth: usize, found: &mut Vec<PathBuf>) {
    let Some(entries) = (depth > 0).then(|| fs::read_dir(folder).ok()).flatten() else { return };
    for path in
        entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path())
    {
        if path.file_name().is_some_and(|file| file.to_string_lossy().contains(name)) {
            found.push(path.clone());
        }
        find_named(&path, name, depth - 1, found);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_left_in_the_cgroup_is_found_and_wiped() {
        let scope = Scope::new();
        let join = format!("echo $$ > {}; exec env -i sleep 600", scope.cgroup_procs().display());
        let mut child = Command::new("sh").args(["-c", &join]).stdout(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        super::super::command::eventually("the process joins", PATIENCE, || scope.processes().contains(&pid));
        assert!(scope.look().iter().any(|left| left.starts_with(&format!("process {pid}: "))));
        let reaper = thread::spawn(move || child.wait());
        scope.wipe();
        reaper.join().unwrap().unwrap();
        assert_eq!(scope.look(), Vec::<String>::new());
    }

    #[test]
    fn a_mount_left_is_found_and_wiped() {
        let scope = Scope::new();
        let none: Option<&str> = None;
        let point = scope.folder().join("m");
        fs::create_dir(&point).unwrap();
        nix::mount::mount(Some("t"), &point, Some("tmpfs"), nix::mount::MsFlags::empty(), none).unwrap();
        assert_eq!(scope.look(), [format!("mount {}", point.display())]);
        scope.wipe();
        assert_eq!(scope.look(), Vec::<String>::new());
    }

    #[test]
    fn a_socket_left_is_found() {
        let scope = Scope::new();
        let _listener = std::os::unix::net::UnixListener::bind(scope.folder().join("s")).unwrap();
        assert_eq!(scope.look().len(), 1);
    }
}
