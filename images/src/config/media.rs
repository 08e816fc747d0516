//! Media types in the two dialects that registries speak.

use std::str::FromStr;

use crate::layer::Compression;

/// A dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// application/vnd.oci.…
    #[default]
    Oci,
    /// application/vnd.docker.…
    Docker,
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "oci" => Ok(Self::Oci),
            "docker" => Ok(Self::Docker),
            _ => Err(UnknownFormat(text.chars().take(40).collect())),
        }
    }
}

/// Neither of the two.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no image format; use oci or docker")]
pub struct UnknownFormat(String);

const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

impl Format {
    /// Of a manifest.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    /// Of a config.
    pub fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    /// Of a layer.
    pub fn layer(self, compression: Compression) -> String {
        let kind = match compression {
            Compression::None => "",
            Compression::Gzip(_) => "gzip",
            Compression::Zstd(_) => "zstd",
        };
        self.layer_of_kind(kind)
    }

    fn layer_of_kind(self, kind: &str) -> String {
        match (self, kind) {
            (Self::Oci, "") => OCI_LAYER.into(),
            (Self::Docker, "") => DOCKER_LAYER.into(),
            (Self::Oci, kind) => format!("{OCI_LAYER}+{kind}"),
            (Self::Docker, kind) => format!("{DOCKER_LAYER}.{kind}"),
        }
    }

    /// A layer's type of either dialect in this one; types of neither stay.
    pub(super) fn translate(self, layer: &str) -> String {
        let oci = layer.strip_prefix(OCI_LAYER).and_then(|rest| kind_after(rest, '+'));
        let docker = || layer.strip_prefix(DOCKER_LAYER).and_then(|rest| kind_after(rest, '.'));
        oci.or_else(docker).map_or_else(|| layer.to_owned(), |kind| self.layer_of_kind(kind))
    }
}

fn kind_after(rest: &str, separator: char) -> Option<&str> {
    if rest.is_empty() { Some("") } else { rest.strip_prefix(separator) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_translate_both_ways() {
        for compression in [Compression::None, Compression::Gzip(6), Compression::Zstd(3)] {
            let (oci, docker) = (Format::Oci.layer(compression), Format::Docker.layer(compression));
            assert_eq!(Format::Docker.translate(&oci), docker);
            assert_eq!(Format::Oci.translate(&docker), oci);
            assert_eq!(Format::Oci.translate(&oci), oci);
        }
        assert_eq!(Format::Oci.translate("text/plain"), "text/plain");
    }
}
