//! Lock files in the run directory, which others may enter: only who may write there gets at them, and nobody waits for
//! ever.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A lock of flock(2) needs no more than a descriptor for reading.
const MODE: u32 = 0o600;

const POLL: Duration = Duration::from_millis(5);

/// Makes the file if it is missing, and locks it for this process alone; it is free again when the returned file is
/// closed, however the holder ends. Blocks for at most `limit`.
///
/// # Errors
/// The file cannot be opened, or somebody else holds the lock for so long.
pub fn lock(path: &Path, limit: Duration) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).mode(MODE).open(path)?;
    file.set_permissions(Permissions::from_mode(MODE))?;
    let until = Instant::now() + limit;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => sleep(POLL),
            Err(Errno::WOULDBLOCK) => return Err(is_held(path, limit)),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn is_held(path: &Path, limit: Duration) -> io::Error {
    let (seconds, path) = (limit.as_secs(), path.display());
    let text = format!("after {seconds} s, another process still holds it: find that by `fuser -v {path}`");
    io::Error::new(io::ErrorKind::TimedOut, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_waited_for_but_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let held = lock(&path, Duration::ZERO).unwrap();
        let error = lock(&path, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("x.lock"), "{error}");
        let waits = std::thread::spawn(move || lock(&path, Duration::from_secs(60)).map(drop));
        drop(held);
        waits.join().unwrap().unwrap();
    }

    #[test]
    fn only_its_owner_gets_at_a_lock_file_new_or_old() {
        let dir = tempfile::tempdir().unwrap();
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        std::fs::write(&old, "").unwrap();
        std::fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        for path in [new, old] {
            let file = lock(&path, Duration::ZERO).unwrap();
            assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        }
    }
}
