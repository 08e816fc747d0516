//! A folder that others change, too: what the mount may remember of it, and when its own changes have to wait.

use std::fs::{self, File};
use std::io::Read;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vmctr_fileshare::export::guest::{Gate, Server};
use vmctr_fileshare::export::host::{Cache, Config};

use super::rig::{Mounted, Place, in_private_namespace};

/// Longer than any test: what is seen earlier is seen for another reason.
const LONG: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_secs(20);

fn on_mount(gate: &Arc<Gate>, test: impl FnOnce(&Mounted, &Place) + Send) {
    in_private_namespace(|| {
        let place = Place::new();
        let server = Server::new(&place.folder("served")).unwrap().with_gate(Arc::clone(gate));
        let config = Config { cache: Cache::For(LONG), ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::serve(server, config);
        test(&mounted, &place);
        mounted.unmount();
    });
}

#[test]
fn who_opens_a_file_sees_what_was_written_before() {
    on_mount(&Arc::default(), |mounted, place| {
        let behind = place.path("served/file");
        for text in ["one\n", "one\ntwo\n", "3\n", "four\nfive\n"] {
            fs::write(&behind, text).unwrap();
            let mut seen = [0; 64];
            // Without a look at its size, which would be asked for.
            let count = File::open(mounted.path("file")).unwrap().read(&mut seen).unwrap();
            assert_eq!(&seen[..count], text.as_bytes());
            // What it is like is known now, and stays so for long.
            assert_eq!(fs::metadata(mounted.path("file")).unwrap().len(), text.len() as u64);
        }
    });
}

#[test]
fn that_a_name_is_not_there_is_not_remembered() {
    on_mount(&Arc::default(), |mounted, place| {
        assert!(!mounted.path("new").exists());
        fs::write(place.path("served/new"), "").unwrap();
        assert!(mounted.path("new").exists());
    });
}

#[test]
fn changes_wait_at_a_gate_and_readers_do_not() {
    let gate = Arc::default();
    on_mount(&gate, |mounted, place| {
        fs::write(mounted.path("file"), "before").unwrap();
        gate.shut(SOON).unwrap();
        thread::scope(|scope| {
            let writing = scope.spawn(|| fs::write(mounted.path("file"), "after"));
            // It cannot be seen to wait; that it is not done yet, by and by.
            thread::sleep(Duration::from_millis(300));
            assert_eq!(fs::read_to_string(place.path("served/file")).unwrap(), "before");
            assert_eq!(fs::read_dir(&mounted.root).unwrap().count(), 1);
            gate.open();
            writing.join().unwrap().unwrap();
        });
        assert_eq!(fs::read_to_string(place.path("served/file")).unwrap(), "after");
    });
}
