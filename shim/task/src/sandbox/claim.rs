//! What a session has for itself before anything of it starts: its run directory, and locks on the folders of its root.
//!
//! Invariant: a claim waits for others off the threads that answer containerd; a start that fails leaves no directory.

use tokio::task::spawn_blocking;
use tracing::error;
use vmctr_fileshare::share::{LockError, Locks, ShareSpec, Top};
use vmctr_vmm::config::Config;
use vmctr_vmm::run_dir::RunDir;

use super::session::{SessionError, SessionPlan};
use super::work_dir::WorkDir;

/// Its run directory. Others may clear up at that moment, which blocks.
pub(super) async fn run_dir(config: &Config, plan: &SessionPlan) -> Result<RunDir, SessionError> {
    let (place, owner) = (config.run_dir.clone(), plan.owner.clone());
    let claimed = spawn_blocking(move || RunDir::create(&place, owner));
    Ok(claimed.await.map_err(|error| SessionError::Blocking(error.into()))??)
}

/// The folders of its root, and the work folder of its own. One may be in use for a moment, which blocks.
pub(super) async fn folders(plan: &SessionPlan) -> Result<(Locks, Option<WorkDir>), SessionError> {
    let (share, own) = (plan.share.clone(), plan.work_dir.clone());
    let claimed = spawn_blocking(move || {
        let locks = Locks::take(&share, own.as_deref()).map_err(|error| refused(&share, error))?;
        Ok((locks, own.as_deref().map(WorkDir::create).transpose()?))
    });
    claimed.await.map_err(|error| SessionError::Blocking(error.into()))?
}

fn refused(share: &ShareSpec, error: LockError) -> SessionError {
    match (&share.top, &error) {
        (Top::Folder { .. }, LockError::InUse(..)) => SessionError::Root(error),
        _ => SessionError::Lock(error),
    }
}

/// Removes the run directory of a start that failed.
pub(super) struct RemoveOnDrop(Option<RunDir>);

impl RemoveOnDrop {
    pub(super) fn new(run_dir: &RunDir) -> Self {
        Self(Some(run_dir.clone()))
    }

    /// It did not fail.
    pub(super) fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Some(run_dir) = &self.0
            && let Err(error) = run_dir.remove()
        {
            error!("{}", crate::error::chain(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lets_containers_start_from_one_folder_is_told_where_it_helps() {
        let in_use = || LockError::InUse("/srv/root".into(), None);
        let root = Top::Folder { path: "/srv/root".into(), read_only: false };
        let root = ShareSpec { top: root, ..ShareSpec::new() };
        let words = refused(&root, in_use()).to_string();
        assert!(
            words.starts_with("/srv/root is in use") && words.contains("io.vmctr.upper=guest"),
            "{words}"
        );
        let upper = Top::Overlay { upper: "/up".into(), work: "/work".into() };
        let upper = ShareSpec { top: upper, ..ShareSpec::new() };
        assert_eq!(refused(&upper, in_use()).to_string(), in_use().to_string());
    }
}
