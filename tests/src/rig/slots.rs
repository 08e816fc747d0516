//! At most so many VMs' tests at once on this machine, whichever processes they run in: an emulated guest keeps a
//! CPU busy while it boots, and time limits mean nothing on an overloaded machine.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Tests with VMs at once.
const SLOTS: usize = 2;

/// The right to run a VM; given back when dropped, or when the process ends in any way.
pub struct Slot {
    _lock: File,
}

impl Slot {
    /// Waits for a free slot.
    pub fn take() -> Self {
        Self::take_in(Path::new("/run/lock/vmctr-tests"))
    }

    fn take_in(folder: &Path) -> Self {
        fs::create_dir_all(folder).expect("the lock folder can be made");
        loop {
            if let Some(lock) = (0..SLOTS).find_map(|slot| try_lock(&folder.join(slot.to_string()))) {
                return Self { _lock: lock };
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn try_lock(path: &Path) -> Option<File> {
    let file = File::create(path).unwrap_or_else(|e| panic!("cannot open {}: {e}", path.display()));
    file.try_lock().ok().map(|()| file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_slots_than_there_are() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Slot::take_in(folder.path());
        let second = Slot::take_in(folder.path());
        assert!((0..SLOTS).all(|slot| try_lock(&folder.path().join(slot.to_string())).is_none()));
        drop(second);
        let _third = Slot::take_in(folder.path());
    }
}
