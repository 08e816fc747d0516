//! More files than may be open: the kernel is made to forget some, and nobody notices.

use std::fs::{self, File};
use std::io::Read;
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;
use vmctr_fileshare::export::host::Config;

use super::rig::{Mounted, Place, in_private_namespace};

/// Whether this kernel forgets nothing that is in use: since 6.18.
fn prunes() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut parts = release.split('.').map_while(|part| part.parse::<u32>().ok());
    (parts.next(), parts.next()) >= (Some(6), Some(18))
}

const FILES: usize = 2000;
const MOST: u64 = 200;

#[test]
fn a_large_tree_is_forgotten_in_parts_and_all_of_it_stays_usable() {
    in_private_namespace(|| {
        let place = Place::new();
        let folder = place.folder("folder");
        for number in 0..FILES {
            fs::write(folder.join(number.to_string()), number.to_string()).unwrap();
        }
        let config = Config { most_nodes: MOST, ..Config::new(place.folder("mnt")) };
        let mounted = Mounted::within(&folder, config);
        let mut kept = File::open(mounted.path("7")).unwrap();
        let over = place.folder("over").join("file");
        fs::write(&over, "mounted").unwrap();
        rustix::mount::mount_bind(&over, mounted.path("8")).unwrap();
        for _ in 0..2 {
            let all = fs::read_dir(&mounted.root).unwrap();
            let lengths = all.map(|entry| entry.unwrap().metadata().unwrap().len());
            assert_eq!(lengths.filter(|length| *length > 0).count(), FILES);
            let until = Instant::now() + Duration::from_secs(10);
            while mounted.export().figures().nodes > MOST {
                assert!(Instant::now() < until, "{} nodes are known", mounted.export().figures().nodes);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let mut text = String::new();
        kept.read_to_string(&mut text).unwrap();
        assert_eq!(text, "7");
        for number in [0, FILES / 2, FILES - 1] {
            assert_eq!(fs::read_to_string(mounted.path(&number.to_string())).unwrap(), number.to_string());
        }
        drop(kept);
        let still = fs::read_to_string(mounted.path("8")).unwrap();
        if prunes() {
            assert_eq!(still, "mounted");
            rustix::mount::unmount(mounted.path("8"), UnmountFlags::empty()).unwrap();
        } else {
            assert_eq!(still, "8");
        }
        mounted.unmount();
    });
}
