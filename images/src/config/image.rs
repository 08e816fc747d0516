//! Builds the config and the manifest of the image that a commit makes.
//!
//! Invariant: the config's diff IDs and the manifest's layers are equally many and in the same order.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::instruction::{Instruction, InstructionError, apply_all};
use super::media::Format;
use crate::digest::{ChainId, DiffId, Digest};
use crate::layer::LayerInfo;

/// A blob that a manifest names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// What it is.
    #[serde(rename = "mediaType")]
    pub media_type: String,
    /// Its address.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// URLs, annotations and whatever else came with it.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Descriptor {
    /// A descriptor with nothing more.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, more: Map::new() }
    }
}

/// The image that a container was started from.
#[derive(Debug, Clone)]
pub struct Base {
    config: Map<String, Value>,
    diff_ids: Vec<DiffId>,
    layers: Vec<Descriptor>,
}

/// Why an image cannot be built on its base.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The base's JSON is not what it should be.
    #[error("The base image's {0} is malformed")]
    Malformed(&'static str, #[source] serde_json::Error),
    /// The two parts do not belong together.
    #[error("The base image's config lists {diff_ids} layers and its manifest {layers}")]
    Mismatch {
        /// In the config.
        diff_ids: usize,
        /// In the manifest.
        layers: usize,
    },
    /// An instruction cannot be carried out.
    #[error("The config cannot be changed")]
    Instruction(#[from] InstructionError),
    /// A time that RFC 3339 has no form for.
    #[error("The time {0} is outside the years that an image can tell")]
    Time(i64),
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<DiffId>,
}

#[derive(Deserialize)]
struct Manifest {
    layers: Vec<Descriptor>,
}

/// This machine's architecture, as images call it.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl Base {
    /// An image without layers for this machine's architecture.
    pub fn empty() -> Self {
        let config = json!({"architecture": architecture(), "os": "linux"});
        let config = if let Value::Object(config) = config { config } else { Map::new() };
        Self { config, diff_ids: Vec::new(), layers: Vec::new() }
    }

    /// The image with this config and manifest.
    pub fn parse(config: &[u8], manifest: &[u8]) -> Result<Self, BuildError> {
        let bad_config = |error| BuildError::Malformed("config", error);
        let config: Map<String, Value> = serde_json::from_slice(config).map_err(bad_config)?;
        let rootfs = config.get("rootfs").cloned().unwrap_or_else(|| json!({}));
        let RootFs { diff_ids } = serde_json::from_value(rootfs).map_err(bad_config)?;
        let bad_manifest = |error| BuildError::Malformed("manifest", error);
        let Manifest { layers } = serde_json::from_slice(manifest).map_err(bad_manifest)?;
        if diff_ids.len() != layers.len() {
            return Err(BuildError::Mismatch { diff_ids: diff_ids.len(), layers: layers.len() });
        }
        Ok(Self { config, diff_ids, layers })
    }

    /// The layers' diff IDs, lowest first.
    pub fn diff_ids(&self) -> &[DiffId] {
        &self.diff_ids
    }

    /// The layers' blobs, lowest first.
    pub fn layers(&self) -> &[Descriptor] {
        &self.layers
    }
}

/// What a commit changes besides the files.
#[derive(Debug, Clone)]
pub struct Build {
    /// Changes to the config.
    pub instructions: Vec<Instruction>,
    /// Who.
    pub author: Option<String>,
    /// Why; goes into the history.
    pub message: Option<String>,
    /// When, in seconds since 1970.
    pub created: i64,
    /// The dialect of media types.
    pub format: Format,
    /// The layer is everything: the base's layers go.
    pub squash: bool,
}

/// A finished image, not stored yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The config's bytes.
    pub config: Vec<u8>,
    /// The manifest's bytes.
    pub manifest: Vec<u8>,
    /// How the manifest names the config.
    pub config_descriptor: Descriptor,
    /// How an index names the manifest.
    pub manifest_descriptor: Descriptor,
    /// The layers' blobs, lowest first; the new one is the last.
    pub layers: Vec<Descriptor>,
    /// The diff IDs, in the same order.
    pub diff_ids: Vec<DiffId>,
}

impl Image {
    /// What containerd calls the snapshot of all layers.
    pub fn chain_id(&self) -> Option<ChainId> {
        ChainId::of(&self.diff_ids)
    }

    /// What containerd calls the snapshot below the new layer.
    pub fn parent_chain_id(&self) -> Option<ChainId> {
        ChainId::of(self.diff_ids.split_last()?.1)
    }
}

/// Puts `layer` on `base`.
pub fn build(base: &Base, layer: &LayerInfo, build: &Build) -> Result<Image, BuildError> {
    let format = build.format;
    let mut diff_ids = if build.squash { Vec::new() } else { base.diff_ids.clone() };
    let mut layers = if build.squash { Vec::new() } else { base.layers.clone() };
    for layer in &mut layers {
        layer.media_type = format.translate(&layer.media_type);
    }
    diff_ids.push(layer.diff_id);
    layers.push(Descriptor::new(format.layer(layer.compression), layer.digest, layer.size));

    let config = serialized(&Value::Object(edited(base, build, &diff_ids)?));
    let config_descriptor = Descriptor::new(format.config(), Digest::of(&config), config.len() as u64);
    let manifest = serialized(&json!({
        "schemaVersion": 2,
        "mediaType": format.manifest(),
        "config": config_descriptor,
        "layers": layers,
    }));
    let manifest_descriptor =
        Descriptor::new(format.manifest(), Digest::of(&manifest), manifest.len() as u64);
    Ok(Image { config, manifest, config_descriptor, manifest_descriptor, layers, diff_ids })
}

/// The config with the changes.
fn edited(base: &Base, build: &Build, diff_ids: &[DiffId]) -> Result<Map<String, Value>, BuildError> {
    let created = rfc3339(build.created)?;
    let mut config = base.config.clone();
    // They tell of the container that the base was built in.
    config.remove("container");
    config.remove("container_config");
    config.insert("created".into(), json!(created));
    config.insert("rootfs".into(), json!({"type": "layers", "diff_ids": diff_ids}));
    if let Some(author) = &build.author {
        config.insert("author".into(), json!(author));
    }
    let mut run = match config.remove("config") {
        Some(Value::Object(run)) => run,
        _ => Map::new(),
    };
    apply_all(&build.instructions, &mut run)?;
    config.insert("config".into(), Value::Object(run));
    let mut history = match config.remove("history") {
        Some(Value::Array(history)) if !build.squash => history,
        _ => Vec::new(),
    };
    history.push(history_entry(build, &created));
    config.insert("history".into(), Value::Array(history));
    Ok(config)
}

fn history_entry(build: &Build, created: &str) -> Value {
    let mut entry = json!({"created": created, "created_by": "vmctr commit"});
    for (key, value) in [("author", &build.author), ("comment", &build.message)] {
        if let Some(value) = value {
            entry[key] = json!(value);
        }
    }
    entry
}

fn rfc3339(seconds: i64) -> Result<String, BuildError> {
    let time = OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| BuildError::Time(seconds))?;
    time.format(&Rfc3339).map_err(|_| BuildError::Time(seconds))
}

fn serialized(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Compression, Totals};

    fn layer() -> LayerInfo {
        LayerInfo {
            diff_id: DiffId(Digest::of(b"diff")),
            digest: Digest::of(b"blob"),
            size: 4,
            compression: Compression::Gzip(6),
            totals: Totals::default(),
        }
    }

    fn base() -> Base {
        let id = Digest::of(b"base");
        let config = json!({
            "architecture": "amd64", "os": "linux", "variant": "v3", "container": "gone",
            "config": {"Env": ["A=1"], "OnBuild": ["kept"]},
            "rootfs": {"type": "layers", "diff_ids": [id]},
            "history": [{"created_by": "first"}],
        });
        let layers = [
            json!({"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "digest": id, "size": 9, "urls": ["u"]}),
        ];
        let manifest = json!({"schemaVersion": 2, "layers": layers});
        Base::parse(config.to_string().as_bytes(), manifest.to_string().as_bytes()).unwrap()
    }

    fn options() -> Build {
        Build {
            instructions: vec!["ENV B=2".parse().unwrap()],
            author: Some("a".into()),
            message: Some("m".into()),
            created: 0,
            format: Format::Oci,
            squash: false,
        }
    }

    #[test]
    fn what_is_not_known_stays_and_the_layer_is_added() {
        let image = build(&base(), &layer(), &options()).unwrap();
        let config: Value = serde_json::from_slice(&image.config).unwrap();
        assert_eq!(config["variant"], "v3");
        assert_eq!(config["config"], json!({"Env": ["A=1", "B=2"], "OnBuild": ["kept"]}));
        assert_eq!(config["created"], "1970-01-01T00:00:00Z");
        assert_eq!(config["author"], "a");
        assert!(config.get("container").is_none());
        assert_eq!(config["history"][1]["comment"], "m");
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 2);
        let manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
        assert_eq!(manifest["layers"][0]["urls"], json!(["u"]));
        assert_eq!(manifest["layers"][1]["digest"], json!(Digest::of(b"blob")));
        assert_eq!(manifest["config"]["digest"], json!(Digest::of(&image.config)));
        assert_eq!(image.parent_chain_id(), Some(ChainId(Digest::of(b"base"))));
    }

    #[test]
    fn squashed_it_has_one_layer_and_one_history_entry() {
        let image = build(&base(), &layer(), &Build { squash: true, ..options() }).unwrap();
        let config: Value = serde_json::from_slice(&image.config).unwrap();
        assert_eq!(config["history"].as_array().unwrap().len(), 1);
        assert_eq!((image.layers.len(), image.diff_ids.len()), (1, 1));
        assert_eq!(image.parent_chain_id(), None);
    }

    #[test]
    fn equal_input_gives_equal_bytes() {
        assert_eq!(
            build(&base(), &layer(), &options()).unwrap(),
            build(&base(), &layer(), &options()).unwrap()
        );
    }

    #[test]
    fn a_base_whose_parts_do_not_fit_is_refused() {
        let error = Base::parse(b"{}", b"{\"layers\":[{\"mediaType\":\"x\",\"digest\":\"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\",\"size\":1}]}");
        assert!(matches!(error, Err(BuildError::Mismatch { diff_ids: 0, layers: 1 })));
        assert!(matches!(Base::parse(b"[]", b"{}"), Err(BuildError::Malformed("config", _))));
    }
}
