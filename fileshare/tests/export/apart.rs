//! Server and relay in a process of their own.
//!
//! A process must not map files of a mount that it serves itself: a page fault holds the process's memory map
//! while it waits for the answer, and whoever is to give the answer may need the map to get memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use vmctr_fileshare::export::guest::{Layers, Server};
use vmctr_fileshare::export::host::{Config, Writes};

use super::rig::Mounted;

/// The variables that tell the helper what to do.
const FOLDER: &str = "VMCTR_EXPORT_FOLDER";
const MOUNTPOINT: &str = "VMCTR_EXPORT_MOUNTPOINT";
const GATHERED: &str = "VMCTR_EXPORT_GATHERED";
const LAYER: &str = "VMCTR_EXPORT_LAYER";
const UPPER: &str = "VMCTR_EXPORT_UPPER";

const READY: &str = "the export is mounted";

/// What is served.
pub struct Spec<'a> {
    pub folder: &'a Path,
    pub mountpoint: &'a Path,
    pub writes: Writes,
    /// Upper and lower folder.
    pub layers: Option<(PathBuf, PathBuf)>,
}

/// Starts the helper in this thread's mount namespace and waits until the mount is there.
pub fn start(spec: &Spec<'_>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "apart::serves", "--ignored", "--nocapture"]);
    command.env(FOLDER, spec.folder).env(MOUNTPOINT, spec.mountpoint);
    if spec.writes == Writes::Gathered {
        command.env(GATHERED, "1");
    }
    if let Some((upper, lower)) = &spec.layers {
        command.env(UPPER, upper).env(LAYER, lower);
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    assert!(output.lines().map_while(Result::ok).any(|line| line.contains(READY)), "the helper failed");
    child
}

#[test]
#[ignore = "the helper process of other tests"]
fn serves() {
    let path = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let mut server = Server::new(&path(FOLDER).unwrap()).unwrap();
    let mut config = Config::new(path(MOUNTPOINT).unwrap());
    if std::env::var_os(GATHERED).is_some() {
        config.writes = Writes::Gathered;
    }
    if let Some(layer) = path(LAYER) {
        let layers = Layers::open(path(UPPER).as_deref(), std::slice::from_ref(&layer)).unwrap();
        server = server.with_layers(layers);
        config.layers.push(layer);
        config.upper = path(UPPER);
    }
    let mounted = Mounted::serve(server, config);
    writeln!(std::io::stdout(), "{READY}").unwrap();
    // Whoever started this holds the other end: when it is gone, so is the mount.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    mounted.wait();
    // Nobody reads what the test harness would still say.
    std::process::exit(0);
}
