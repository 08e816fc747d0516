//! Locks between processes, on the mount and in the guest.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};

use super::rig::{Mounted, Place, as_other_process, eventually, in_private_namespace};
use super::sys::own_descriptors;

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    let (l_type, l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
    libc::flock { l_type, l_whence, l_start: start, l_len: length, l_pid: 0 }
}

fn set(file: &File, kind: i32, start: i64, length: i64) -> Result<(), i32> {
    let lock = range(kind, start, length);
    fcntl(file, FcntlArg::F_SETLK(&lock)).map(drop).map_err(|errno| errno as i32)
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Runs a test on files that are open in the guest, and on some that are lent to the host.
fn on_mount(test: impl Fn(&Mounted, &Path) + Send + Sync) {
    on_one(&test, |place| (Mounted::new(&place.folder("served"), &place.folder("mnt")), "served"));
    on_one(&test, |place| {
        let lower = place.folder("lower");
        (Mounted::lending(place, "union", &lower), "union/merged")
    });
}

fn on_one(
    test: impl Fn(&Mounted, &Path) + Send + Sync,
    mount: impl Fn(&Place) -> (Mounted, &'static str) + Send + Sync,
) {
    in_private_namespace(|| {
        let place = Place::new();
        let (mounted, served) = mount(&place);
        fs::write(mounted.path("file"), "0123456789").unwrap();
        test(&mounted, &place.path(served));
        mounted.unmount();
    });
}

#[test]
fn ranges_exclude_other_processes() {
    on_mount(|mounted, _| {
        let ours = open(&mounted.path("file"));
        set(&ours, libc::F_WRLCK, 0, 5).unwrap();
        as_other_process(|| {
            let theirs = open(&mounted.path("file"));
            assert_eq!(set(&theirs, libc::F_RDLCK, 4, 1), Err(libc::EAGAIN));
            set(&theirs, libc::F_WRLCK, 5, 0).unwrap();
            let mut asked = range(libc::F_WRLCK, 0, 0);
            fcntl(&theirs, FcntlArg::F_GETLK(&mut asked)).unwrap();
            assert_eq!((asked.l_type, asked.l_start, asked.l_len), (libc::F_WRLCK as libc::c_short, 0, 5));
        });
        // The other process has closed the file, which drops its locks.
        set(&ours, libc::F_WRLCK, 5, 0).unwrap();
        set(&ours, libc::F_UNLCK, 0, 0).unwrap();
        as_other_process(|| set(&open(&mounted.path("file")), libc::F_WRLCK, 0, 0).unwrap());
    });
}

#[test]
fn shared_locks_become_exclusive_and_closing_any_descriptor_drops_them() {
    on_mount(|mounted, _| {
        let (reading, writing) = (File::open(mounted.path("file")).unwrap(), open(&mounted.path("file")));
        set(&reading, libc::F_RDLCK, 0, 4).unwrap();
        as_other_process(|| {
            let theirs = open(&mounted.path("file"));
            set(&theirs, libc::F_RDLCK, 0, 1).unwrap();
            assert_eq!(set(&theirs, libc::F_WRLCK, 3, 1), Err(libc::EAGAIN));
        });
        set(&writing, libc::F_WRLCK, 1, 1).unwrap();
        as_other_process(|| {
            let theirs = open(&mounted.path("file"));
            assert_eq!(set(&theirs, libc::F_RDLCK, 1, 1), Err(libc::EAGAIN));
            set(&theirs, libc::F_RDLCK, 0, 1).unwrap();
            assert_eq!(set(&theirs, libc::F_WRLCK, 3, 1), Err(libc::EAGAIN), "the first lock is gone");
        });
        drop(reading);
        as_other_process(|| set(&open(&mounted.path("file")), libc::F_WRLCK, 0, 0).unwrap());
    });
}

#[test]
fn the_guest_s_own_processes_are_excluded_too() {
    on_mount(|mounted, served| {
        let ours = open(&mounted.path("file"));
        set(&ours, libc::F_WRLCK, 0, 0).unwrap();
        as_other_process(|| {
            assert_eq!(set(&open(&served.join("file")), libc::F_WRLCK, 0, 0), Err(libc::EAGAIN));
        });
        let flocked = open(&mounted.path("file"));
        flocked.lock().unwrap();
        assert!(open(&served.join("file")).try_lock().is_err());
        assert!(open(&mounted.path("file")).try_lock_shared().is_err());
        drop(flocked);
        // Closing is told to the guest after close(2) returned.
        let until = Instant::now() + Duration::from_secs(5);
        while open(&served.join("file")).try_lock().is_err() {
            assert!(Instant::now() < until, "the lock outlives its file");
        }
    });
}

#[test]
fn waiters_get_the_lock_while_all_lanes_wait() {
    on_mount(|mounted, _| {
        let ours = open(&mounted.path("file"));
        set(&ours, libc::F_WRLCK, 0, 0).unwrap();
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..12)
                .map(|_| {
                    scope.spawn(|| {
                        own_descriptors();
                        let theirs = open(&mounted.path("file"));
                        fcntl(&theirs, FcntlArg::F_SETLKW(&range(libc::F_WRLCK, 0, 0))).unwrap();
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_millis(200));
            assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
            set(&ours, libc::F_UNLCK, 0, 0).unwrap();
        });
    });
}

#[test]
fn a_lock_that_was_waited_for_goes_with_its_process_though_another_descriptor_was_closed_meanwhile() {
    on_mount(|mounted, _| {
        let ours = open(&mounted.path("file"));
        set(&ours, libc::F_WRLCK, 0, 0).unwrap();
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                own_descriptors();
                let theirs = open(&mounted.path("file"));
                std::thread::scope(|process| {
                    process.spawn(|| {
                        fcntl(&theirs, FcntlArg::F_SETLKW(&range(libc::F_WRLCK, 0, 0))).unwrap();
                    });
                    std::thread::sleep(Duration::from_millis(200));
                    drop(open(&mounted.path("file")));
                    sender.send(()).unwrap();
                });
            });
            receiver.recv().unwrap();
            set(&ours, libc::F_UNLCK, 0, 0).unwrap();
        });
        eventually("lock", || set(&ours, libc::F_WRLCK, 0, 0).is_ok());
    });
}

#[test]
fn a_lock_of_an_open_file_goes_when_that_is_closed_for_good() {
    on_mount(|mounted, _| {
        let lock = range(libc::F_WRLCK, 0, 5);
        let ours = open(&mounted.path("file"));
        fcntl(&ours, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        let copy = ours.try_clone().unwrap();
        drop(ours);
        let theirs = open(&mounted.path("file"));
        let take = || fcntl(&theirs, FcntlArg::F_OFD_SETLK(&lock));
        assert_eq!(take(), Err(nix::errno::Errno::EAGAIN), "the copy is open still");
        drop(copy);
        eventually("lock", || take().is_ok());
        drop(open(&mounted.path("file")));
        assert_eq!(
            set(&open(&mounted.path("file")), libc::F_WRLCK, 0, 1),
            Err(libc::EAGAIN),
            "of another file"
        );
    });
}

#[test]
fn a_signal_ends_the_waiting() {
    on_mount(|mounted, _| {
        let ours = open(&mounted.path("file"));
        ours.lock().unwrap();
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut child = std::process::Command::new("flock")
                    .arg(mounted.path("file"))
                    .arg("true")
                    .spawn()
                    .unwrap();
                std::thread::sleep(Duration::from_millis(300));
                assert_eq!(child.try_wait().unwrap(), None, "flock did not wait");
                let started = Instant::now();
                child.kill().unwrap();
                child.wait().unwrap();
                sender.send(started.elapsed()).unwrap();
            });
            assert!(receiver.recv_timeout(Duration::from_secs(20)).unwrap() < Duration::from_secs(10));
        });
        assert!(ours.as_raw_fd() > 0);
    });
}
