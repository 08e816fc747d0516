//! Files of a union's upper folder are read and written by the host; the VM, which remembers what it has seen of
//! them, finds them as the host left them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use serde_json::Value;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{eventually, run};
use vmctr_tests::rig::vm::signal;

/// How many files the host lends at the same time.
const MOST: usize = 1024;

/// How soon a union whose VM is gone must say so.
const SOON: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

struct Union<'rig>(&'rig Rig);

impl<'rig> Union<'rig> {
    fn mount(rig: &'rig Rig) -> Self {
        for name in ["lower", "upper", "work", "mnt"] {
            rig.new_folder(name);
        }
        let union = Self(rig);
        fs::write(union.at("lower/low"), [b'l'; 6000]).expect("writable");
        let at = |name| union.at(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        run(rig.vmctr_command().args(["union", "mount", "-o", &options]).arg(union.at("mnt"))).ok();
        union
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.folder().join(name)
    }

    fn umount(&self) {
        run(self.0.vmctr_command().args(["union", "umount"]).arg(self.at("mnt"))).ok();
    }

    fn inspect(&self) -> Value {
        run(self.0.vmctr_command().args(["union", "inspect", "--json"]).arg(self.at("mnt"))).ok().json()
    }

    fn asked(&self, request: &str) -> u64 {
        self.inspect()["relay"]["requests"][request].as_u64().unwrap_or(0)
    }

    /// Fills the host's room for open files; each is made and kept open.
    fn fill(&self) -> Vec<File> {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("up to the hard limit");
        let open = |at: usize| File::create_new(self.at(&format!("mnt/{at}"))).expect("made");
        (0..MOST).map(open).collect()
    }
}

fn append(path: &Path, text: &[u8]) {
    File::options().append(true).open(path).expect("there").write_all(text).expect("written");
}

/// Has the host's kernel forget names, files and what they hold.
fn forget() {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root may");
}

#[test]
fn what_the_host_wrote_the_vm_finds_when_it_is_asked_after_all() {
    let rig = Rig::vmctr();
    let union = Union::mount(&rig);
    let (new, low) = (union.at("mnt/new"), union.at("mnt/low"));
    fs::write(&new, [b'n'; 5000]).expect("made");
    append(&low, b"up");
    File::options().write(true).open(&low).expect("there").write_at(b"UP", 100).expect("written");
    let held = union.fill();
    // From here on nothing more is lent.
    append(&new, b"end");
    append(&low, b"end");
    let wanted = [[b'n'; 5000].as_slice(), b"end"].concat();
    assert!(fs::read(union.at("upper/new")).expect("there") == wanted);
    for _ in 0..2 {
        forget();
        assert!(fs::read(&new).expect("there") == wanted);
        let text = fs::read(&low).expect("there");
        assert_eq!((text.len(), &text[98..104], &text[5998..]), (6005, &b"llUPll"[..], &b"llupend"[..]));
    }
    eventually("the writing is counted", PATIENCE, || union.asked("write") >= 2);
    let (from, to) = (File::open(&new).expect("there"), File::create(union.at("mnt/copy")).expect("made"));
    let copied = rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), 9000).expect("copied");
    assert_eq!(copied, 5003);
    assert!(fs::read(union.at("upper/copy")).expect("there") == wanted);
    drop((held, from, to));
    forget();
    append(&new, b"!");
    assert_eq!(fs::read(&new).expect("there").len(), 5004);
    union.umount();
    assert_eq!(fs::read(union.at("upper/new")).expect("there").len(), 5004);
}

#[test]
fn what_was_forgotten_is_found_as_it_was_left() {
    let rig = Rig::vmctr();
    let union = Union::mount(&rig);
    let file = union.at("mnt/file");
    fs::write(&file, "").expect("made");
    let mut length = 0;
    for round in 1..20 {
        forget();
        append(&file, &vec![b'x'; round * 1000]);
        length += round as u64 * 1000;
        if round % 2 == 0 {
            forget();
        }
        assert_eq!(fs::metadata(&file).expect("there").len(), length);
        if round % 5 == 0 {
            length -= 3000;
            nix::unistd::truncate(&file, length.cast_signed()).expect("cut");
        }
        let listed =
            fs::read_dir(union.at("mnt")).expect("a folder").flatten().find(|e| e.file_name() == "file");
        assert_eq!(listed.expect("listed").metadata().expect("there").len(), length);
        assert_eq!(fs::read(&file).expect("there").len() as u64, length);
    }
    assert_eq!(union.asked("write"), 0);
    union.umount();
    assert_eq!(fs::metadata(union.at("upper/file")).expect("there").len(), length);
}

#[test]
fn what_was_synced_outlives_the_vm_and_nothing_is_written_without_it() {
    let rig = Rig::vmctr();
    let union = Union::mount(&rig);
    let mut file = File::create_new(union.at("mnt/file")).expect("made");
    file.write_all(b"synced").expect("written");
    file.sync_all().expect("synced");
    let qemu = union.inspect()["qemu_pid"].as_u64().expect("it lives");
    signal(u32::try_from(qemu).expect("a process ID"), Signal::SIGKILL);
    let until = Instant::now() + SOON;
    while file.write_at(b"lost", 6).is_ok() {
        assert!(Instant::now() < until, "written to a union whose VM is gone");
        std::thread::sleep(Duration::from_millis(20));
    }
    let error = file.sync_all().expect_err("the VM is gone").raw_os_error();
    assert_eq!(error, Some(nix::libc::EIO));
    let mut text = String::new();
    File::open(union.at("upper/file")).expect("there").read_to_string(&mut text).expect("readable");
    assert!(text.starts_with("synced"), "{text}");
    drop(file);
    eventually("it is listed as lost", PATIENCE, || union.inspect()["state"] == "lost");
    union.umount();
}
