//! How long the usual work takes on an export, on a kernel overlay and on fuse-overlayfs, over equal folders.
//!
//! `export_figures TREE` copies nothing of TREE: it is the lower folder. Needs root; fuse-overlayfs is left out
//! where it is not installed. Server and relay are one process, joined by socket pairs: what a VM adds is the
//! turns of each workload times the cost of one, and the guest's slower work.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use vmctr_fileshare::export::guest::{Layers, Server};
use vmctr_fileshare::export::host::{Config, Export, Streams};
use vmctr_fileshare::export::wire::stream::Stream;

const LANES: usize = 4;

fn main() -> Result<()> {
    let tree = PathBuf::from(std::env::args_os().nth(1).context("usage: export_figures TREE")?);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let place = tempfile::tempdir_in("/var/tmp")?;
    let lower = place.path().join("big");
    fs::create_dir(&lower)?;
    make_big(&lower.join("big.bin"))?;
    let lowers = format!("{}:{}", tree.canonicalize()?.display(), lower.display());
    for side in ["kernel", "export", "relay", "fuse-overlayfs"] {
        if let Err(error) = measure(side, &lowers, &place.path().join(side)) {
            writeln!(std::io::stdout(), "{side}: {error:#}")?;
        }
    }
    Ok(())
}

fn make_big(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0u8; 1 << 20];
    for at in 0..512u32 {
        block
            .iter_mut()
            .zip(0u32..)
            .for_each(|(byte, number)| *byte = (number.wrapping_mul(at | 1) >> 7) as u8);
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

/// A mounted union, and what ends it.
struct Union {
    root: PathBuf,
    under: Option<PathBuf>,
    export: Option<Export>,
}

fn overlay(lowers: &str, place: &Path, name: &str) -> Result<(PathBuf, String)> {
    let folder = |part: &str| -> Result<PathBuf> {
        let path = place.join(name).join(part);
        fs::create_dir_all(&path)?;
        Ok(path)
    };
    let (upper, work, merged) = (folder("upper")?, folder("work")?, folder("merged")?);
    Ok((merged, format!("lowerdir={lowers},upperdir={},workdir={}", upper.display(), work.display())))
}

fn mount(side: &str, lowers: &str, place: &Path) -> Result<Union> {
    let (merged, options) = overlay(lowers, place, side)?;
    if side == "fuse-overlayfs" {
        let status =
            Command::new(side).args(["-o", &options]).arg(&merged).status().context("not installed")?;
        if !status.success() {
            bail!("fuse-overlayfs failed");
        }
        return Ok(Union { root: merged, under: None, export: None });
    }
    let options = CString::new(format!("{options},redirect_dir=on"))?;
    rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), Some(options.as_c_str()))?;
    if side == "kernel" {
        return Ok(Union { root: merged, under: None, export: None });
    }
    let root = place.join("mnt");
    fs::create_dir(&root)?;
    // "relay": nothing is read in the layers.
    let layers = if side == "export" { lowers.split(':').map(PathBuf::from).collect() } else { Vec::new() };
    let export = export(&merged, &root, &place.join(side).join("upper"), layers)?;
    Ok(Union { root, under: Some(merged), export: Some(export) })
}

fn export(folder: &Path, mountpoint: &Path, upper: &Path, layers: Vec<PathBuf>) -> Result<Export> {
    let server = Server::new(folder)?.with_layers(Layers::open(Some(upper), &layers)?);
    let upper = (!layers.is_empty()).then(|| upper.to_owned());
    let server = Arc::new(server);
    let stream = || -> Result<Stream> {
        let (ours, theirs) = Stream::pair()?;
        let server = Arc::clone(&server);
        std::thread::spawn(move || server.serve(theirs));
        Ok(ours)
    };
    let turns = (0..LANES).map(|_| stream()).collect::<Result<_>>()?;
    Ok(Export::start(
        &Config { layers, upper, ..Config::new(mountpoint.to_owned()) },
        Streams { turns, waits: stream()? },
    )?)
}

fn measure(side: &str, lowers: &str, place: &Path) -> Result<()> {
    fs::create_dir_all(place)?;
    let union = mount(side, lowers, place)?;
    let root = union.root.clone();
    let timed = |name: &str, work: &dyn Fn() -> Result<()>| -> Result<()> {
        let (before, started) = (turns(&union), Instant::now());
        work()?;
        let took = started.elapsed().as_secs_f64();
        let asked = since(&before, &turns(&union));
        Ok(writeln!(std::io::stdout(), "{side:15} {name:22} {took:8.3} s   {asked}")?)
    };
    let find = || run("find", &[".", "-printf", "%s %m\n"], &root);
    let tar = || tar_all(&root);
    let read = || read_all(&root.join("big.bin"));
    for (name, cold, work) in [
        ("find cold", true, &find as &dyn Fn() -> Result<()>),
        ("find warm", false, &find),
        ("tar cold", true, &tar),
        ("tar warm", false, &tar),
        ("read 512M cold", true, &read),
        ("read 512M warm", false, &read),
    ] {
        if cold {
            drop_caches()?;
        }
        timed(name, work)?;
    }
    timed("write 256M + fsync", &|| write_all(&root.join("new.bin")))?;
    let many = root.join("many");
    fs::create_dir(&many)?;
    timed("create 2000", &|| each(2000, |at| Ok(fs::write(many.join(at.to_string()), "some text\n")?)))?;
    timed("rename 1000", &|| {
        each(1000, |at| Ok(fs::rename(many.join(at.to_string()), many.join(format!("r{at}")))?))
    })?;
    let files = some_files(&root, 200)?;
    timed("copy-up 200", &|| {
        each(files.len(), |at| Ok(File::options().append(true).open(&files[at]).map(drop)?))
    })?;
    timed("remove 2000", &|| Ok(fs::remove_dir_all(&many)?))?;
    end(union)
}

fn turns(union: &Union) -> BTreeMap<u32, u64> {
    union.export.iter().flat_map(Export::turns).collect()
}

/// The turns of a workload, in all and by opcode.
fn since(before: &BTreeMap<u32, u64>, after: &BTreeMap<u32, u64>) -> String {
    let more = |(opcode, count): (&u32, &u64)| (*opcode, count - before.get(opcode).unwrap_or(&0));
    let asked: Vec<(u32, u64)> = after.iter().map(more).filter(|(_, count)| *count > 0).collect();
    let all: u64 = asked.iter().map(|(_, count)| count).sum();
    if after.is_empty() { String::new() } else { format!("{all} turns {asked:x?}") }
}

fn end(union: Union) -> Result<()> {
    rustix::mount::unmount(&union.root, UnmountFlags::DETACH)?;
    if let Some(export) = union.export {
        export.wait();
    }
    if let Some(under) = union.under {
        rustix::mount::unmount(under, UnmountFlags::DETACH)?;
    }
    Ok(())
}

fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

fn run(command: &str, arguments: &[&str], folder: &Path) -> Result<()> {
    let status = Command::new(command).args(arguments).current_dir(folder).stdout(Stdio::null()).status()?;
    if status.success() { Ok(()) } else { bail!("{command} failed") }
}

/// Through a pipe: tar reads no contents when it writes to /dev/null.
fn tar_all(folder: &Path) -> Result<()> {
    let arguments = ["cf", "-", "--exclude=./big.bin", "--exclude=./new.bin", "."];
    let mut tar = Command::new("tar").args(arguments).current_dir(folder).stdout(Stdio::piped()).spawn()?;
    let mut output = tar.stdout.take().context("no pipe")?;
    let mut buffer = vec![0; 1 << 20];
    while output.read(&mut buffer)? > 0 {}
    if tar.wait()?.success() { Ok(()) } else { bail!("tar failed") }
}

fn read_all(path: &Path) -> Result<()> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; 1 << 20]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

fn write_all(path: &Path) -> Result<()> {
    let (mut file, block) = (File::create(path)?, vec![7; 1 << 20]);
    (0..256).try_for_each(|_| file.write_all(&block))?;
    Ok(file.sync_all()?)
}

fn each(count: usize, work: impl Fn(usize) -> Result<()>) -> Result<()> {
    (0..count).try_for_each(work)
}

fn some_files(root: &Path, count: usize) -> Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![root.join("usr")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && files.len() < count {
                files.push(entry.path());
            }
        }
        if files.len() >= count {
            break;
        }
    }
    Ok(files)
}
