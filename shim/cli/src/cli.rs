//! The command line as data: every verb, flag and help text, and nothing that acts.
//!
//! Flags that concern the whole program stand before the verb: a verb may then use the same letters for
//! its own purpose. Only `--json` may stand on either side.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand};
use vmctr_images::config::{Format, Instruction};
use vmctr_images::layer::Compression;

/// Where containerd listens unless told otherwise.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";

/// The namespace that `ctr` uses unless told otherwise.
pub const DEFAULT_NAMESPACE: &str = "default";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the command did its work and the answer is bad: doctor found a problem, a guest file is damaged
  125  vmctr could not do its work: wrong usage, bad configuration, a failed system call
  127  what the command names does not exist: no such container, no guest assets
  130  a signal ended a commit, and it took back what it had made";

/// Containers that each run behind their own kernel: look at them, commit them, check this host, build the
/// guest.
#[derive(Debug, Parser)]
#[command(name = "vmctr", version, after_help = EXIT_CODES, arg_required_else_help = true, args_override_self = true)]
pub struct Cli {
    /// Flags of the whole program.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags of the whole program.
#[derive(Args, Debug)]
pub struct Globals {
    /// containerd's socket
    #[arg(short, long, value_name = "SOCKET", env = "CONTAINERD_ADDRESS", default_value = DEFAULT_ADDRESS)]
    pub address: String,
    /// containerd's namespace
    #[arg(short, long, value_name = "NAME", env = "CONTAINERD_NAMESPACE", default_value = DEFAULT_NAMESPACE)]
    pub namespace: String,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Check that this host can run containers in VMs; name what is missing and the command that fixes it
    ///
    /// Every check runs, whatever the others found. Exits 1 when one of them failed; warnings do not count.
    Doctor,
    /// List the VMs of the namespace
    Ps,
    /// Show a container's VM: state, processes, memory, shares, start phases, tasks
    Inspect {
        /// The container's ID
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Turn what a container changed into an image, a folder, or both
    ///
    /// A running container stands still while its changes are read, then runs on. The image is the
    /// container's image and one layer more; any runtime can run it.
    Commit(Box<CommitArgs>),
    /// List what a container changed: A (added), C (changed) or D (deleted), and the path
    ///
    /// A running container stands still meanwhile.
    Diff {
        /// The container's ID
        #[arg(value_name = "CONTAINER")]
        container: String,
    },
    /// Look into layers of images
    #[command(subcommand)]
    Layer(LayerVerb),
    /// Print the versions of vmctr, of the agent protocol and of containerd, if it answers
    Version,
    /// Build or look at what the VMs boot: a kernel and an initramfs
    #[command(subcommand)]
    Guest(GuestVerb),
    /// List, make or remove the templates that VMs are restored from
    #[command(subcommand)]
    Template(TemplateVerb),
    /// Keep VMs that wait for containers, or list them
    #[command(subcommand)]
    Pool(PoolVerb),
    /// Mount the root of a running container on this host, as its processes see it
    ///
    /// Returns when the mount is usable; a background process keeps it. Image and changes are shown, not what is
    /// mounted in the container: volumes, /proc, /sys. Both sides may write. What the container writes is seen here
    /// within a second, at once by who opens the file after that; the container sees at once what is written here.
    /// When the container ends, the mount fails until it is unmounted.
    Mount(MountArgs),
    /// Unmount what `vmctr mount` or `vmctr union mount` mounted, or remove what is left of it
    Umount(UnionUmount),
    /// Mount unions of folders, made by a helper VM: this host's kernel needs FUSE only
    #[command(subcommand)]
    Union(UnionVerb),
}

/// Verbs of `vmctr union`.
#[derive(Debug, Subcommand)]
pub enum UnionVerb {
    /// Mount a union of folders
    ///
    /// Returns when the mount is usable; a background process keeps it until it is unmounted, by `vmctr union
    /// umount` or umount(8). The unions of a user have one VM, up to eight of them, unless one asks for its own.
    /// Also as `mount -t fuse.vmctr vmctr MOUNTPOINT -o OPTIONS` and in fstab.
    Mount(UnionMount),
    /// Unmount a union, or remove what is left of one whose process was killed
    ///
    /// Returns when all changes are on disk and, with the last of its unions, the VM has ended. Exits 127 when there is
    /// no union.
    Umount(UnionUmount),
    /// List the unions and mounted containers, also those of which only something is left
    Ls,
    /// Show a union or mounted container: folders, options, processes, log
    Inspect {
        /// Where it is mounted
        #[arg(value_name = "MOUNTPOINT")]
        mountpoint: PathBuf,
    },
    /// What `mount` starts in the background
    #[command(hide = true)]
    Serve,
}

/// Arguments of `vmctr mount`.
#[derive(Args, Debug)]
pub struct MountArgs {
    /// The container's ID
    #[arg(value_name = "CONTAINER")]
    pub container: String,
    /// An empty folder
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Nothing can be changed here
    #[arg(long)]
    pub ro: bool,
}

/// Arguments of `vmctr union mount`.
#[derive(Args, Debug)]
pub struct UnionMount {
    /// lowerdir=A[:B...], from the top, up to 500; upperdir=U,workdir=W, without which the union is read-only;
    /// ro, noexec, suid, dev, noatime, ... as mount(8) has them; nopassthrough: read and write all files
    /// through the VM, none on the host. A backslash protects a colon or comma
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", required = true, action = clap::ArgAction::Append)]
    pub options: Vec<String>,
    /// Give it a VM of its own, which no other union shares; as an option for mount(8): own_vm
    #[arg(long)]
    pub own_vm: bool,
    /// An empty folder
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,
}

/// Arguments of `vmctr umount` and `vmctr union umount`.
#[derive(Args, Debug)]
pub struct UnionUmount {
    /// Take it away now, and end it when nobody uses it any more
    #[arg(short, long)]
    pub lazy: bool,
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,
}

/// Verbs of `vmctr pool`.
#[derive(Debug, Subcommand)]
pub enum PoolVerb {
    /// Keep as many VMs waiting as the configuration says, until this program ends
    ///
    /// Containers with vm.start = "pool", or the annotation io.vmctr.start=pool, take one of them. However this
    /// program ends, VMs that wait end with it, and VMs that were taken do not notice.
    Run,
    /// List the VMs that wait or are being prepared
    ///
    /// Exits 127 when no pool runs.
    Ls,
}

/// Verbs of `vmctr template`.
#[derive(Debug, Subcommand)]
pub enum TemplateVerb {
    /// List the templates: key, size, age, and the VMs that they are for
    Ls,
    /// Make the template for VMs of this size, unless it is there
    ///
    /// The first container that needs one has it made in the background; making it beforehand spares that
    /// container the boot.
    Create(TemplateCreate),
    /// Remove templates
    ///
    /// VMs that run are not affected. The next container boots and has a new one made. Exits 127 when there is
    /// no template with the key.
    Rm(TemplateRm),
}

/// Arguments of `vmctr template create`.
#[derive(Args, Debug)]
pub struct TemplateCreate {
    /// Memory of the VMs [default: vm.memory of the configuration]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// CPUs of the VMs [default: vm.vcpus of the configuration]
    #[arg(long, value_name = "COUNT")]
    pub vcpus: Option<String>,
    /// Leave the terminal's session and the CPU to others
    #[arg(long, hide = true)]
    pub background: bool,
}

/// Arguments of `vmctr template rm`.
#[derive(Args, Debug)]
pub struct TemplateRm {
    /// Keys, as `vmctr template ls` shows them
    #[arg(value_name = "KEY", required_unless_present = "all")]
    pub keys: Vec<String>,
    /// Every template
    #[arg(long, conflicts_with = "keys")]
    pub all: bool,
}

/// Arguments of `vmctr commit`.
#[derive(Args, Debug)]
pub struct CommitArgs {
    /// Author of the image, such as "Jo Doe <jo@example.org>"
    #[arg(short, long, value_name = "NAME")]
    pub author: Option<String>,
    /// Comment in the image's history
    #[arg(short, long, value_name = "TEXT")]
    pub message: Option<String>,
    /// Change to the image's config, as in a Dockerfile: CMD, ENTRYPOINT, ENV, USER, WORKDIR, LABEL, EXPOSE,
    /// VOLUME or STOPSIGNAL; may be given several times
    #[arg(short = 'c', long = "change", value_name = "INSTRUCTION")]
    pub changes: Vec<Instruction>,
    /// Stop the container's processes while its changes are read; --pause=false lets them run
    #[arg(short, long, value_name = "BOOL", default_value_t = true, default_missing_value = "true",
        action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    pub pause: bool,
    /// How the layer is compressed: zstd, gzip or none, with a level as in zstd:9
    #[arg(long, value_name = "KIND[:LEVEL]", default_value_t = Compression::default())]
    pub compression: Compression,
    /// Media types: oci or docker
    #[arg(long, value_name = "FORMAT", default_value = "oci")]
    pub format: Format,
    /// Seconds since 1970: the image's time, and the latest that a file of the layer may have
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", allow_negative_numbers = true)]
    pub timestamp: Option<i64>,
    /// Make one layer of everything: the image has no other
    #[arg(long)]
    pub squash: bool,
    /// Only changes at or below this path in the container
    #[arg(long, value_name = "PATH")]
    pub subtree: Option<OsString>,
    /// Also, or without REF only, put the changes into this new folder, as an overlay's next lower layer
    #[arg(long, value_name = "DIR")]
    pub to_dir: Option<PathBuf>,
    /// Where the image goes
    #[arg(
        long,
        value_name = "STORE",
        default_value = "containerd",
        help = "Where the image goes: containerd, oci:DIR[:TAG] or oci-archive:FILE"
    )]
    pub output: ImageStore,
    /// Read the stored layer again, put it on the base and compare that with what the container shows; the
    /// container stands still meanwhile
    ///
    /// Exits 1 when they differ.
    #[arg(long)]
    pub verify: bool,
    /// Print the image's digest only
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// The container's ID
    #[arg(value_name = "CONTAINER")]
    pub container: String,
    /// The image's name, such as docker.io/library/mine:1
    #[arg(value_name = "REF")]
    pub reference: Option<String>,
}

/// Where an image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageStore {
    /// containerd's content store.
    Containerd,
    /// An OCI layout folder.
    Layout {
        /// The folder.
        dir: PathBuf,
        /// The image's name in it.
        tag: Option<String>,
    },
    /// An archive of such a folder.
    Archive(PathBuf),
}

impl FromStr for ImageStore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "containerd" => Ok(Self::Containerd),
            Some(("oci", place)) if !place.is_empty() => Ok(layout(place)),
            Some(("oci-archive", file)) if !file.is_empty() => Ok(Self::Archive(file.into())),
            _ => Err("use containerd, oci:DIR[:TAG] or oci-archive:FILE".to_owned()),
        }
    }
}

/// What follows the last colon is a tag unless it is part of a path.
fn layout(place: &str) -> ImageStore {
    match place.rsplit_once(':') {
        Some((dir, tag)) if !dir.is_empty() && !tag.is_empty() && !tag.contains('/') => {
            ImageStore::Layout { dir: dir.into(), tag: Some(tag.to_owned()) }
        }
        _ => ImageStore::Layout { dir: place.into(), tag: None },
    }
}

/// Verbs of `vmctr layer`.
#[derive(Debug, Subcommand)]
pub enum LayerVerb {
    /// List the entries of a layer; of an image, those of its topmost layer
    Ls(LayerArgs),
    /// Read a layer, or all layers of an image, and check their digests
    ///
    /// Exits 1 when a layer is damaged or its digest differs.
    Verify(LayerArgs),
}

/// Arguments of the verbs of `vmctr layer`.
#[derive(Args, Debug)]
pub struct LayerArgs {
    /// A layer's file (tar, gzip or zstd), or an image's name in containerd
    #[arg(value_name = "FILE|REF")]
    pub source: String,
}

/// Verbs of `vmctr guest`.
#[derive(Debug, Subcommand)]
pub enum GuestVerb {
    /// Build the guest's kernel image and initramfs
    ///
    /// Without --deb and --kernel, the distribution's cloud kernel package is downloaded with apt-get; it is
    /// unpacked, never installed.
    Build(GuestBuild),
    /// Show the guest assets in use: versions, sizes, and whether the files still are what was built
    ///
    /// Exits 1 when a file is missing or its digest differs, 127 when there are no guest assets.
    Info(GuestInfo),
}

/// Arguments of `vmctr guest build`.
#[derive(Args, Debug)]
pub struct GuestBuild {
    /// Kernel package (linux-image-*.deb) to take the kernel and its modules from
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "modules"])]
    pub deb: Option<PathBuf>,
    /// Kernel image (bzImage or ELF vmlinux) to use instead of a package
    #[arg(long, value_name = "FILE", requires = "modules")]
    pub kernel: Option<PathBuf>,
    /// The kernel's module directory, such as /lib/modules/6.12.0
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// The agent's binary [default: vmctr-agent beside this program]
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,
    /// Directory to fill; created if missing
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Arguments of `vmctr guest info`.
#[derive(Args, Debug)]
pub struct GuestInfo {
    /// Asset directory [default: the one that VMs boot from]
    #[arg(value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn json_may_stand_on_either_side_of_the_verb() {
        assert!(Cli::try_parse_from(["vmctr", "--json", "doctor"]).unwrap().globals.json);
        assert!(Cli::try_parse_from(["vmctr", "doctor", "--json"]).unwrap().globals.json);
        assert!(!Cli::try_parse_from(["vmctr", "doctor"]).unwrap().globals.json);
    }

    #[test]
    fn a_unions_options_add_up() {
        let args = ["vmctr", "union", "mount", "-o", "lowerdir=/a", "-o", "ro", "/mnt"];
        let Verb::Union(UnionVerb::Mount(mount)) = Cli::try_parse_from(args).unwrap().verb else {
            panic!("another verb");
        };
        assert_eq!(mount.options, ["lowerdir=/a", "ro"]);
    }

    #[test]
    fn address_and_namespace_stand_before_the_verb_only() {
        let cli = Cli::try_parse_from(["vmctr", "-a", "/x", "-n", "k8s.io", "ps"]).unwrap();
        assert_eq!((cli.globals.address.as_str(), cli.globals.namespace.as_str()), ("/x", "k8s.io"));
        assert!(Cli::try_parse_from(["vmctr", "ps", "-n", "k8s.io"]).is_err());
    }

    #[test]
    fn the_last_of_repeated_flags_counts() {
        let cli = Cli::try_parse_from(["vmctr", "-n", "a", "-n", "b", "ps"]).unwrap();
        assert_eq!(cli.globals.namespace, "b");
    }

    #[test]
    fn a_kernel_needs_its_modules_and_excludes_a_package() {
        let build = |more: &[&str]| {
            Cli::try_parse_from(["vmctr", "guest", "build", "--out", "o"].iter().chain(more)).is_ok()
        };
        assert!(build(&[]));
        assert!(build(&["--deb", "d"]));
        assert!(build(&["--kernel", "k", "--modules", "m"]));
        assert!(!build(&["--kernel", "k"]));
        assert!(!build(&["--modules", "m"]));
        assert!(!build(&["--deb", "d", "--kernel", "k", "--modules", "m"]));
    }

    fn commit(more: &[&str]) -> Result<CommitArgs, clap::Error> {
        match Cli::try_parse_from(["vmctr", "commit"].iter().chain(more))?.verb {
            Verb::Commit(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_commit_pauses_unless_told_otherwise() {
        assert!(commit(&["c", "r"]).unwrap().pause);
        assert!(commit(&["-p", "c", "r"]).unwrap().pause);
        assert!(!commit(&["--pause=false", "c", "r"]).unwrap().pause);
        assert!(commit(&["--pause=maybe", "c", "r"]).is_err());
    }

    #[test]
    fn short_letters_belong_to_commit_behind_it() {
        let args = commit(&["-a", "me", "-m", "why", "-c", "CMD x", "-c", "ENV A=1", "c", "r"]).unwrap();
        assert_eq!((args.author.as_deref(), args.changes.len()), (Some("me"), 2));
        assert!(commit(&["-c", "RUN x", "c", "r"]).is_err());
    }

    #[test]
    fn stores_are_told_apart() {
        let store = |text: &str| text.parse::<ImageStore>();
        let layout = |dir: &str, tag: Option<&str>| {
            Ok(ImageStore::Layout { dir: dir.into(), tag: tag.map(str::to_owned) })
        };
        assert_eq!(store("containerd"), Ok(ImageStore::Containerd));
        assert_eq!(store("oci:/a/b"), layout("/a/b", None));
        assert_eq!(store("oci:/a/b:1.0"), layout("/a/b", Some("1.0")));
        assert_eq!(store("oci:/a:b/c"), layout("/a:b/c", None));
        assert_eq!(store("oci-archive:/x.tar"), Ok(ImageStore::Archive("/x.tar".into())));
        for bad in ["", "docker", "oci:", "oci-archive:", "containerd:x"] {
            assert!(store(bad).is_err(), "{bad}");
        }
    }
}
