//! The folders of a union, and the commands for it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use vmctr_tests::rig::Rig;
use vmctr_tests::rig::command::{Output, run};

/// The folders of a union, and the commands for it.
pub struct Place<'rig> {
    rig: &'rig Rig,
}

impl<'rig> Place<'rig> {
    /// Two lower folders with something in them, an empty upper folder.
    pub fn new(rig: &'rig Rig) -> Self {
        for name in ["top", "base", "upper", "work", "mnt"] {
            rig.new_folder(name);
        }
        let place = Self { rig };
        for folder in ["base/dir", "base/gone", "top/dir"] {
            fs::create_dir(place.at(folder)).expect("writable");
        }
        for (file, text) in [
            ("base/dir/below", "below\n"),
            ("base/dir/hidden", "hidden\n"),
            ("base/gone/file", "gone\n"),
            ("base/shared", "base\n"),
            ("base/changed", "before\n"),
            ("top/shared", "top\n"),
            ("top/dir/above", "above\n"),
        ] {
            fs::write(place.at(file), text).expect("writable");
        }
        place
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.rig.folder().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|e| panic!("cannot read {name}: {e}"))
    }

    pub fn options(&self) -> String {
        let at = |name| self.at(name).display().to_string();
        format!("lowerdir={}:{},upperdir={},workdir={}", at("top"), at("base"), at("upper"), at("work"))
    }

    pub fn vmctr(&self, args: &[&str]) -> Output {
        run(self.rig.vmctr_command().arg("union").args(args))
    }

    pub fn try_mount(&self, options: &str, mountpoint: &str) -> Output {
        self.vmctr(&["mount", "-o", options, &self.at(mountpoint).to_string_lossy()])
    }

    /// Mounts it by a shell that does something before.
    pub fn mount_after(&self, script: &str, options: &str) -> Output {
        let vmctr = self.rig.vmctr_command();
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("{script}; \"$@\""), "bash"]).current_dir(self.rig.folder());
        shell.arg(vmctr.get_program()).args(vmctr.get_args()).args(["union", "mount", "-o", options]);
        shell.envs(vmctr.get_envs().filter_map(|(name, value)| Some((name, value?))));
        run(shell.arg(self.at("mnt")))
    }

    pub fn mount(&self) {
        self.try_mount(&self.options(), "mnt").ok();
    }

    pub fn umount(&self) {
        self.vmctr(&["umount", &self.at("mnt").to_string_lossy()]).ok();
        assert_eq!(self.list(), Vec::<Value>::new());
    }

    pub fn list(&self) -> Vec<Value> {
        let list = self.vmctr(&["ls", "--json"]).ok().json();
        list.as_array().expect("a list").clone()
    }

    /// A process of the only union.
    pub fn process(&self, name: &str) -> u32 {
        let list = self.list();
        assert_eq!(list.len(), 1, "{list:?}");
        u32::try_from(list[0][name].as_u64().expect("it lives")).expect("a process ID")
    }

    pub fn shell(&self, script: &str) -> Output {
        run(Command::new("sh").args(["-ec", script]).current_dir(self.rig.folder()))
    }

    /// The same folders under this host's own overlay, where nobody else sees it.
    pub fn by_the_kernel(&self, script: &str) -> Output {
        let options = format!("{},redirect_dir=on,index=off,metacopy=off", self.options());
        let script = format!("mount -t overlay overlay -o {options} mnt\n{script}");
        let inside = ["-m", "--propagation", "private", "sh", "-ec", &script];
        run(Command::new("unshare").args(inside).current_dir(self.rig.folder()))
    }
}
