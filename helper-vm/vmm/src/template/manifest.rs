//! `manifest`: what a template is and what its parts must be. Its first line is the digest of the rest, so
//! that a changed byte anywhere in it is seen.
//!
//! ```text
//!   <sha256 of what follows, 64 hex digits>\n
//!   {"version":1,"key":"...","host_boot":"...","memory":"512MiB",...,"state":{...},"ram":{"size":...,"extents":[[offset,length,crc32],...]}}
//! ```

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Key;
use super::ram::Layout;
use crate::accel::Accelerator;
use crate::memory::MemoryMib;
use crate::spec::{Machine, Vcpus, VmSpec};

/// Format of manifest, state and RAM files.
pub(super) const VERSION: u32 = 1;

/// More than any manifest has.
pub(super) const SIZE_LIMIT: u64 = 16 << 20;

/// Contents of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    version: u32,
    /// The directory's name, which another template's manifest does not have.
    pub key: Key,
    /// Host boot that it was made in; in another it is of no use.
    pub host_boot: String,
    pub qemu_version: String,
    pub machine: Machine,
    pub accelerator: Accelerator,
    pub vcpus: Vcpus,
    pub memory: MemoryMib,
    pub state: State,
    pub ram: Layout,
}

/// The file `state`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub size: u64,
    pub sha256: String,
}

impl Manifest {
    pub(super) fn new(
        key: Key,
        spec: &VmSpec,
        accelerator: Accelerator,
        qemu_version: String,
        state: State,
        ram: Layout,
    ) -> Self {
        Self {
            version: VERSION,
            key,
            host_boot: crate::run_dir::boot_id(),
            qemu_version,
            machine: spec.machine(),
            accelerator,
            vcpus: spec.vcpus(),
            memory: spec.memory(),
            state,
            ram,
        }
    }

    /// As written to the file.
    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        Ok([sha256(&body).as_bytes(), b"\n", &body].concat())
    }

    /// From the file, or what is wrong with it.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("the manifest is cut off")?;
        let (digest, body) = (&bytes[..end], &bytes[end + 1..]);
        if digest != sha256(body).as_bytes() {
            return Err("the manifest's digest differs".to_owned());
        }
        let manifest: Self =
            serde_json::from_slice(body).map_err(|error| format!("the manifest cannot be read: {error}"))?;
        if manifest.version != VERSION {
            return Err(format!("its format version is {}, this build reads {VERSION}", manifest.version));
        }
        manifest.ram.check(manifest.memory.bytes())?;
        Ok(manifest)
    }
}

/// In lower-case hex.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::ram::Extent;

    fn manifest() -> Manifest {
        Manifest {
            version: VERSION,
            key: "0123456789abcdef".parse().unwrap(),
            host_boot: "boot".into(),
            qemu_version: "10.0.2".into(),
            machine: Machine::Q35,
            accelerator: Accelerator::Tcg,
            vcpus: Vcpus::ONE,
            memory: MemoryMib::new(1),
            state: State { size: 3, sha256: "00".into() },
            ram: Layout { size: 4096, extents: vec![Extent { offset: 4096, length: 4096, crc32: 7 }] },
        }
    }

    #[test]
    fn it_round_trips() {
        let manifest = manifest();
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()), Ok(manifest));
    }

    #[test]
    fn the_written_form_stays() {
        let want = "d3f5\n{\"version\":1,\"key\":\"0123456789abcdef\",\"host_boot\":\"boot\",\"qemu_version\":\"10.0.2\",\
                    \"machine\":\"q35\",\"accelerator\":\"tcg\",\"vcpus\":1,\"memory\":\"1MiB\",\
                    \"state\":{\"size\":3,\"sha256\":\"00\"},\"ram\":{\"size\":4096,\"extents\":[[4096,4096,7]]}}";
        let encoded = String::from_utf8(manifest().encode().unwrap()).unwrap();
        assert_eq!(encoded.split_once('\n').unwrap().1, want.split_once('\n').unwrap().1);
    }

    #[test]
    fn any_changed_or_missing_byte_is_seen() {
        let good = manifest().encode().unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(Manifest::decode(&bad).is_err(), "byte {at}");
            assert!(Manifest::decode(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn another_version_and_an_impossible_layout_are_refused() {
        let refusal = |manifest: Manifest| Manifest::decode(&manifest.encode().unwrap()).unwrap_err();
        assert!(refusal(Manifest { version: 2, ..manifest() }).contains("format version is 2"));
        let beyond = Layout { size: 4096, extents: vec![Extent { offset: 1 << 20, length: 4096, crc32: 0 }] };
        assert!(refusal(Manifest { ram: beyond, ..manifest() }).contains("beyond the end"));
    }
}
