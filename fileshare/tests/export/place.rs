//! Where a mount is put and taken away from: that place, and that mount.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::mount::UnmountFlags;
use vmctr_fileshare::export::guest::Server;
use vmctr_fileshare::export::host::{Config, Export, MountError, StartError, Streams, unmount};
use vmctr_fileshare::export::wire::stream::Stream;

use super::rig::{Mounted, Place, eventually, in_private_namespace, mount_tmpfs};

fn is_there(mountpoint: &Path, kind: &str) -> bool {
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let place = mountpoint.to_str().unwrap();
    let mut last = table.lines().rev().map(|line| line.split(' ').collect::<Vec<_>>());
    last.find(|fields| fields[1] == place).is_some_and(|fields| fields[2] == kind)
}

#[test]
fn another_mount_at_its_place_is_left_alone() {
    in_private_namespace(|| {
        let place = Place::new();
        let config = Config::new(place.folder("mnt"));
        let mounted = Mounted::within(&place.folder("folder"), config);
        // Over it.
        mount_tmpfs(&mounted.root, "size=1m");
        assert!(!mounted.export().take_away().unwrap());
        assert!(is_there(&mounted.root, "tmpfs"));
        rustix::mount::unmount(&mounted.root, UnmountFlags::empty()).unwrap();
        // In its place, while somebody still uses it.
        let used = fs::File::create(mounted.path("used")).unwrap();
        unmount(&mounted.root, true).unwrap();
        mount_tmpfs(&mounted.root, "size=1m");
        assert!(!mounted.export().take_away().unwrap());
        assert!(is_there(&mounted.root, "tmpfs"));
        rustix::mount::unmount(&mounted.root, UnmountFlags::empty()).unwrap();
        assert!(!mounted.export().take_away().unwrap(), "nothing is mounted there");
        drop(used);
        mounted.wait();
    });
}

#[test]
fn it_is_taken_away_while_it_is_in_use() {
    in_private_namespace(|| {
        let place = Place::new();
        let mounted = Mounted::within(&place.folder("folder"), Config::new(place.folder("mnt")));
        let used = fs::File::create(mounted.path("used")).unwrap();
        assert!(mounted.export().take_away().unwrap());
        assert!(!is_there(&mounted.root, "fuse.vmctr"));
        assert!(!mounted.export().is_gone());
        drop(used);
        eventually("end", || mounted.export().is_gone());
        mounted.wait();
    });
}

#[test]
fn a_link_that_came_into_a_path_is_not_followed() {
    in_private_namespace(|| {
        let place = Place::new();
        place.folder("elsewhere/in");
        symlink(place.path("elsewhere"), place.path("link")).unwrap();
        let (link, inner) = (place.path("link"), place.path("link/in"));
        let config = || Config::new(place.folder("mnt"));
        let refused = |config: Config| {
            let server = Server::new(&place.folder("folder")).unwrap();
            let (ours, theirs): (Vec<_>, Vec<_>) = (0..2).map(|_| Stream::pair().unwrap()).unzip();
            std::thread::scope(|scope| {
                for stream in theirs {
                    // It may find the stream closed before a word was said.
                    scope.spawn(|| drop(server.serve(stream)));
                }
                let mut ours = ours.into_iter();
                let streams = Streams { waits: ours.next().unwrap(), turns: ours.collect() };
                Export::start(&config, streams).err()
            })
        };
        for path in [&link, &inner] {
            let error = refused(Config::new(path.clone()));
            assert!(matches!(error, Some(StartError::Mount(MountError::Place(..)))), "{error:?}");
            let error = refused(Config { layers: vec![path.clone()], ..config() });
            assert!(matches!(error, Some(StartError::Layers(_))), "{error:?}");
            let error = refused(Config { upper: Some(path.clone()), ..config() });
            assert!(matches!(error, Some(StartError::Upper(_))), "{error:?}");
        }
        for path in ["elsewhere", "elsewhere/in", "mnt"] {
            assert!(!is_there(&place.path(path), "fuse.vmctr"), "{path}");
        }
    });
}
