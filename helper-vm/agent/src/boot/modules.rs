//! Kernel modules from the initramfs, in the order that its builder wrote down.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::Context;
use rustix::io::Errno;
use rustix::system::finit_module;

const DIR: &str = "/modules";
const ORDER: &str = "/modules/order";

/// Loads every listed module, then frees the memory that their files take.
pub fn load_all() -> anyhow::Result<()> {
    for name in names(&fs::read_to_string(ORDER).with_context(|| ORDER.to_owned())?) {
        let path = Path::new(DIR).join(format!("{name}.ko"));
        load(&path).with_context(|| format!("module {}", path.display()))?;
    }
    fs::remove_dir_all(DIR).with_context(|| format!("removing {DIR}"))
}

fn names(order: &str) -> impl Iterator<Item = &str> {
    order.lines().map(str::trim).filter(|name| !name.is_empty())
}

fn load(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", 0) {
        // Built in, or loaded by an earlier dependency.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_order_file_is_one_name_per_line() {
        let names: Vec<_> = super::names("vsock\n\n overlay \n").collect();
        assert_eq!(names, ["vsock", "overlay"]);
    }
}
