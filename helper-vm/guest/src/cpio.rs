//! Writes a cpio archive in the "newc" format, the one that the kernel unpacks as initramfs.
//!
//! ```text
//!   "070701" | 13 fields of 8 hex digits | name, NUL | pad to 4 | data | pad to 4 |  ...  TRAILER!!!
//! ```
//!
//! Reproducible: owner and time are 0, inode numbers count up, order is that of the calls.
//! Format: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

const MAGIC: &[u8] = b"070701";
const TRAILER: &str = "TRAILER!!!";

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_CHAR_DEVICE: u32 = 0o020_000;

/// Something does not fit the format.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpioError {
    /// The format has 32 bits for a size.
    #[error("{name} has {size} bytes, too many for a cpio archive")]
    FileTooLarge {
        /// Entry.
        name: String,
        /// Its size.
        size: usize,
    },
}

/// A device's number.
#[derive(Clone, Copy, Debug, Default)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
}

/// An archive being written. Parents must be added before their children.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn directory(&mut self, name: &str, permissions: u32) {
        self.header(name, TYPE_DIRECTORY | permissions, 2, 0, Device::default());
    }

    pub fn char_device(&mut self, name: &str, permissions: u32, device: Device) {
        self.header(name, TYPE_CHAR_DEVICE | permissions, 1, 0, device);
    }

    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> Result<(), CpioError> {
        let size = u32::try_from(data.len())
            .map_err(|_| CpioError::FileTooLarge { name: name.to_owned(), size: data.len() })?;
        self.header(name, TYPE_FILE | permissions, 1, size, Device::default());
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.header(TRAILER, 0, 1, 0, Device::default());
        self.bytes
    }

    fn header(&mut self, name: &str, mode: u32, links: u32, size: u32, device: Device) {
        self.entries += 1;
        let name_size = name.len() as u32 + 1;
        let (inode, uid, gid, time, checksum) = (self.entries, 0, 0, 0, 0);
        let on_device = Device::default();
        let fields = [
            inode,
            mode,
            uid,
            gid,
            links,
            time,
            size,
            on_device.major,
            on_device.minor,
            device.major,
            device.minor,
            name_size,
            checksum,
        ];
        self.bytes.extend_from_slice(MAGIC);
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
pub mod testing {
    //! A reader written from the format's description, independent of the writer.

    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Entry {
        pub name: String,
        pub mode: u32,
        pub device: (u32, u32),
        pub data: Vec<u8>,
    }

    pub fn read(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                let digits = std::str::from_utf8(&archive[start..start + 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name_at = at + 110;
            let data_at = (name_at + name_size).div_ceil(4) * 4;
            assert_eq!(archive[name_at + name_size - 1], 0);
            let name = String::from_utf8(archive[name_at..name_at + name_size - 1].to_vec()).unwrap();
            if name == "TRAILER!!!" {
                assert_eq!(archive.len(), data_at);
                return entries;
            }
            entries.push(Entry {
                name,
                mode: field(1),
                device: (field(9), field(10)),
                data: archive[data_at..data_at + size].to_vec(),
            });
            at = (data_at + size).div_ceil(4) * 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing::{Entry, read};
    use super::*;

    #[derive(Clone, Debug)]
    enum Item {
        Directory,
        File(Vec<u8>),
        CharDevice(u32, u32),
    }

    fn any_item() -> impl Strategy<Value = Item> {
        prop_oneof![
            Just(Item::Directory),
            any::<Vec<u8>>().prop_map(Item::File),
            (any::<u32>(), any::<u32>()).prop_map(|(major, minor)| Item::CharDevice(major, minor)),
        ]
    }

    fn write(items: &[(String, u32, Item)]) -> Vec<u8> {
        let mut archive = Archive::default();
        for (name, permissions, item) in items {
            match item {
                Item::Directory => archive.directory(name, *permissions),
                Item::File(data) => archive.file(name, *permissions, data).unwrap(),
                Item::CharDevice(major, minor) => {
                    archive.char_device(name, *permissions, Device { major: *major, minor: *minor });
                }
            }
        }
        archive.finish()
    }

    fn expected((name, permissions, item): &(String, u32, Item)) -> Entry {
        let (kind, device, data) = match item {
            Item::Directory => (0o040_000, (0, 0), Vec::new()),
            Item::File(data) => (0o100_000, (0, 0), data.clone()),
            Item::CharDevice(major, minor) => (0o020_000, (*major, *minor), Vec::new()),
        };
        Entry { name: name.clone(), mode: kind | permissions, device, data }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_back(
            items in prop::collection::vec(("[a-z][a-z0-9/._-]{0,40}", 0u32..0o10000, any_item()), 0..20),
        ) {
            let entries: Vec<Entry> = items.iter().map(expected).collect();
            prop_assert_eq!(read(&write(&items)), entries);
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let mut archive = Archive::default();
        archive.file("ab", 0o755, b"hello").unwrap();
        let text = String::from_utf8(archive.finish()).unwrap();
        let first = "070701\
            00000001000081ed00000000000000000000000100000000\
            000000050000000000000000000000000000000000000003\
            00000000ab\0\0\0\0hello\0\0\0";
        assert_eq!(&text[..first.len()], first);
    }
}
