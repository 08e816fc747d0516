//! /proc as the tests read it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// All processes.
pub fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Whether the process carries a tag in its cgroup, command line or environment. One that has ended does not.
pub fn mentions(pid: u32, tag: &str) -> bool {
    let holds = |file: &str| {
        let bytes = fs::read(of(pid).join(file)).unwrap_or_default();
        bytes.windows(tag.len()).any(|window| window == tag.as_bytes())
    };
    holds("cgroup") && !is_zombie(pid) || holds("cmdline") || holds("environ")
}

/// A process's command line, its words separated by spaces.
pub fn command_line(pid: u32) -> String {
    let bytes = fs::read(of(pid).join("cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ").trim_end().to_owned()
}

/// What a process is and does, for a message: a command line is gone before the process is.
pub fn describe(pid: u32) -> String {
    let text = |file: &str| fs::read_to_string(of(pid).join(file)).unwrap_or_default();
    let state = status_field(pid, "State").unwrap_or_default();
    format!("{} ({state}, waits in {:?}) {}", program(pid), text("wchan"), command_line(pid))
}

/// Name of its executable.
pub fn program(pid: u32) -> String {
    fs::read_to_string(of(pid).join("comm")).unwrap_or_default().trim_end().to_owned()
}

/// Parent of a process.
pub fn parent(pid: u32) -> Option<u32> {
    status_field(pid, "PPid")?.parse().ok()
}

/// Whether a process is there and no zombie.
pub fn is_alive(pid: u32) -> bool {
    of(pid).exists() && !is_zombie(pid)
}

/// A field of /proc/PID/status.
pub fn status_field(pid: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(of(pid).join("status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// Mount points that a process sees, with their options and type.
pub fn mounts(pid: u32) -> Vec<Mount> {
    let table = fs::read_to_string(of(pid).join("mountinfo")).unwrap_or_default();
    table.lines().filter_map(Mount::parse).collect()
}

/// A line of mountinfo.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// Folder of the file system that is mounted.
    pub root: String,
    /// Where.
    pub point: String,
    /// Options of this mount, as `ro,nosuid`.
    pub options: String,
    /// Type of the file system.
    pub kind: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ').skip(3).map(str::to_owned);
        let (root, point, options) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Self { root, point, options, kind: right.split(' ').next()?.to_owned() })
    }

    /// Whether an option is set.
    pub fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|set| set == option)
    }
}

/// Proportional set size in bytes: shared pages count for their share only.
pub fn pss(pid: u32) -> Option<u64> {
    rollup(pid, "Pss:")
}

/// A field of smaps_rollup in bytes.
pub fn rollup(pid: u32, name: &str) -> Option<u64> {
    let rollup = fs::read_to_string(of(pid).join("smaps_rollup")).ok()?;
    let value = rollup.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Proportional set size in bytes without a VM's RAM.
pub fn pss_beside_ram(pid: u32) -> Option<u64> {
    Some(pss_without(&fs::read_to_string(of(pid).join("smaps")).ok()?, is_ram))
}

/// Bytes that the files of a VM's RAM, which a process has open, really take.
pub fn ram_bytes(pid: u32) -> u64 {
    const BLOCK: u64 = 512;
    let files = fs::read_dir(of(pid).join("fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    let ram = files.filter(|file| fs::read_link(file).is_ok_and(|path| is_ram(&path.to_string_lossy())));
    ram.filter_map(|file| fs::metadata(file).ok()).map(|meta| meta.blocks() * BLOCK).sum()
}

/// Whether a file is a VM's RAM, by its name in smaps and in links to it: a memory file, or, in a VM that was
/// restored, one of a mount that only its QEMU has.
fn is_ram(name: &str) -> bool {
    name.starts_with("/memfd:") || name.trim_end_matches(" (deleted)").ends_with("/ram")
}

/// From smaps: a line for each mapping, its figures below it.
fn pss_without(smaps: &str, left_out: fn(&str) -> bool) -> u64 {
    let (mut sum, mut counts) = (0, true);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") if counts => {
                sum += words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0) * 1024
            }
            // 7f00-7fff rw-s 00000000 00:01 1034 /memfd:name (deleted)
            Some(word) if !word.ends_with(':') => {
                counts = !words.nth(4).is_some_and(left_out);
            }
            _ => {}
        }
    }
    sum
}

/// Open file descriptors of a process.
pub fn open_files(pid: u32) -> usize {
    fs::read_dir(of(pid).join("fd")).map(Iterator::count).unwrap_or_default()
}

fn is_zombie(pid: u32) -> bool {
    status_field(pid, "State").is_some_and(|state| state.starts_with('Z'))
}

fn of(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_line_is_split() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(
            (mount.root.as_str(), mount.point.as_str(), mount.kind.as_str()),
            ("/mnt1", "/mnt2", "ext3")
        );
        assert!(mount.has("noatime") && !mount.has("ro"));
    }

    #[test]
    fn memory_files_are_not_counted() {
        let smaps = "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \nRss: 9 kB\nPss:   3 kB\nSwapPss: 7 kB\n\
                     7f0000002000-7f0000003000 rw-s 00000000 00:01 77                        /memfd:ram (deleted)\n\
                     Pss:  500 kB\nVmFlags: rd wr\n\
                     7f0000004000-7f0000005000 r--p 00000000 fe:00 88                        /usr/bin/x y\nPss: 2 kB\n";
        assert_eq!(pss_without(smaps, is_ram), 5 * 1024);
        let me = std::process::id();
        assert!(pss_beside_ram(me).unwrap() > 0);
        assert_eq!(ram_bytes(me), 0);
    }

    #[test]
    fn this_process_is_alive_and_mentions_its_name() {
        let me = std::process::id();
        assert!(all().contains(&me) && is_alive(me));
        assert!(mentions(me, &program(me)[..8]));
        assert!(!mentions(me, "no-process-says-this-\u{1}"));
        assert!(pss(me).unwrap() > 0);
        assert!(open_files(me) > 0);
    }
}
