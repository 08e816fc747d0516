//! Room for open files: what this kernel merely remembers of the share is let go when the share's daemon, or this
//! process, may not open any more.
//!
//! The daemon has a file open for each that this kernel remembers, and the kernel forgets only for want of memory.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::io::{Errno, Result};

/// How long the daemon may take to close what it is told to, and the host to forget.
const PATIENCE: [Duration; 5] = [
    Duration::from_millis(5),
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_millis(1000),
];

/// When letting go did not help, it is not tried again so soon.
const PAUSE: Duration = Duration::from_secs(1);

/// Who makes room. What is done with it must not ask for room itself.
#[derive(Debug, Default)]
pub(super) struct Room(Mutex<Option<Instant>>);

impl Room {
    /// Does something that opens files; once more with room made for it.
    pub(super) fn with<T>(&self, open: impl FnMut() -> Result<T>) -> Result<T> {
        self.with_letting_go(open, let_go)
    }

    fn with_letting_go<T>(&self, mut open: impl FnMut() -> Result<T>, let_go: impl Fn()) -> Result<T> {
        let mut result = open();
        if !is_full(&result) {
            return result;
        }
        // One at a time: the others find the room that the first one made.
        let mut failed = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return result;
        }
        for patience in PATIENCE {
            let_go();
            std::thread::sleep(patience);
            result = open();
            if !is_full(&result) {
                return result;
            }
        }
        *failed = Some(Instant::now());
        result
    }
}

fn is_full<T>(result: &Result<T>) -> bool {
    matches!(result, Err(Errno::NFILE | Errno::MFILE))
}

fn let_go() {
    // Names and inodes. Without the right to, nothing is let go and the error stays.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "2");
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_finds_no_room_is_done_again_when_there_is_some() {
        let (tries, let_go) = (Cell::new(0), Cell::new(0));
        let open = || {
            tries.set(tries.get() + 1);
            if let_go.get() < 2 { Err(Errno::NFILE) } else { Ok(7) }
        };
        assert_eq!(Room::default().with_letting_go(open, || let_go.set(let_go.get() + 1)), Ok(7));
        assert_eq!((tries.get(), let_go.get()), (3, 2));
    }

    #[test]
    fn other_errors_and_lasting_want_are_told() {
        let (room, let_go) = (Room::default(), Cell::new(0));
        let more = || let_go.set(let_go.get() + 1);
        assert_eq!(room.with_letting_go(|| Err::<(), _>(Errno::NOENT), more), Err(Errno::NOENT));
        assert_eq!(let_go.get(), 0);
        assert_eq!(room.with_letting_go(|| Err::<(), _>(Errno::MFILE), more), Err(Errno::MFILE));
        assert_eq!(room.with_letting_go(|| Err::<(), _>(Errno::MFILE), more), Err(Errno::MFILE));
        assert_eq!(let_go.get(), PATIENCE.len(), "not again so soon");
    }
}
