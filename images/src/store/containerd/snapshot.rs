//! The snapshot of the new layer, filled by us instead of being unpacked again.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::tonic::Code;
use containerd_client::types::Mount;

use super::{ContainerdError, Doing, Store};
use crate::digest::ChainId;
use crate::tree::Form;
use crate::upper::Namespace;

/// A snapshot that is being filled.
pub struct Snapshot {
    /// By whom.
    pub snapshotter: String,
    key: String,
    /// Where the layer's files belong.
    pub dir: PathBuf,
    /// In which form.
    pub form: Form,
}

impl Store {
    /// Prepares a snapshot on `parent`; `None` if the parent is not unpacked.
    pub async fn prepare(
        &self,
        snapshotter: &str,
        parent: Option<&ChainId>,
    ) -> Result<Option<Snapshot>, ContainerdError> {
        let key = self.unique();
        let request = self.request(PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.clone(),
            parent: parent.map(ChainId::to_string).unwrap_or_default(),
            labels: HashMap::new(),
        })?;
        let mounts = match self.client.snapshots().prepare(request).await {
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            result => result.doing("prepare a snapshot")?.into_inner().mounts,
        };
        let snapshotter = snapshotter.to_owned();
        match place(&mounts) {
            Some((dir, form)) => Ok(Some(Snapshot { snapshotter, key, dir, form })),
            None => {
                let kind = mounts.first().map(|mount| mount.r#type.clone()).unwrap_or_default();
                self.remove_snapshot(&snapshotter, &key).await?;
                Err(ContainerdError::Mounts { snapshotter, kind })
            }
        }
    }

    /// Prepares a snapshot that takes changes as they are; `None` if the snapshotter gives none on `parent`.
    pub async fn prepare_for_changes(
        &self,
        snapshotter: &str,
        parent: &ChainId,
    ) -> Result<Option<Snapshot>, ContainerdError> {
        match self.prepare(snapshotter, Some(parent)).await? {
            Some(snapshot) if matches!(snapshot.form, Form::Overlay(_)) => Ok(Some(snapshot)),
            Some(snapshot) => self.drop_snapshot(snapshot).await.map(|()| None),
            None => Ok(None),
        }
    }

    /// Makes a filled snapshot the one that containerd finds under the layers' chain.
    pub async fn commit_snapshot(&self, snapshot: Snapshot, name: &ChainId) -> Result<(), ContainerdError> {
        let Snapshot { snapshotter, key, .. } = snapshot;
        let request = self.request(CommitSnapshotRequest {
            snapshotter: snapshotter.clone(),
            name: name.to_string(),
            key: key.clone(),
            labels: HashMap::new(),
        })?;
        match self.client.snapshots().commit(request).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                self.remove_snapshot(&snapshotter, &key).await
            }
            result => result.doing("keep a snapshot").map(drop),
        }
    }

    /// Throws a snapshot away.
    pub async fn drop_snapshot(&self, snapshot: Snapshot) -> Result<(), ContainerdError> {
        self.remove_snapshot(&snapshot.snapshotter, &snapshot.key).await
    }

    /// Whether a snapshot of these layers is there.
    pub async fn has_snapshot(&self, snapshotter: &str, name: &ChainId) -> Result<bool, ContainerdError> {
        let request =
            self.request(StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: name.to_string() })?;
        match self.client.snapshots().stat(request).await {
            Err(status) if status.code() == Code::NotFound => Ok(false),
            result => result.doing("look for a snapshot").map(|_| true),
        }
    }

    async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), ContainerdError> {
        let request =
            self.request(RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() })?;
        self.client.snapshots().remove(request).await.doing("remove a snapshot").map(drop)
    }
}

/// Where a snapshot's own files are: an overlay's upper, or the whole tree of a bind mount.
fn place(mounts: &[Mount]) -> Option<(PathBuf, Form)> {
    let [mount] = mounts else { return None };
    match mount.r#type.as_str() {
        "overlay" => {
            let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="))?;
            let user = mount.options.iter().any(|option| option == "userxattr");
            let namespace = if user { Namespace::User } else { Namespace::Trusted };
            Some((upper.into(), Form::Overlay(namespace)))
        }
        "bind" => Some((mount.source.clone().into(), Form::Plain)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        Mount { r#type: kind.into(), source: source.into(), options, ..Mount::default() }
    }

    #[test]
    fn the_place_of_files_follows_from_the_mounts() {
        let overlay = mount("overlay", "overlay", &["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/l"]);
        assert_eq!(place(&[overlay]), Some(("/u".into(), Form::Overlay(Namespace::Trusted))));
        let user = mount("overlay", "overlay", &["userxattr", "upperdir=/u"]);
        assert_eq!(place(&[user]), Some(("/u".into(), Form::Overlay(Namespace::User))));
        assert_eq!(place(&[mount("bind", "/fs", &["rbind", "rw"])]), Some(("/fs".into(), Form::Plain)));
        assert_eq!(place(&[mount("ext4", "/dev/loop0", &[])]), None);
        assert_eq!(place(&[mount("overlay", "overlay", &["lowerdir=/a:/b"])]), None);
        assert_eq!(place(&[]), None);
    }
}
