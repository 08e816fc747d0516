//! The image that a container was started from, which the new one is put on.

use anyhow::anyhow;
use vmctr_images::config::Base;
use vmctr_images::store::containerd::Store;
use vmctr_images::upper::Scope;

use super::order::{Image, Order};
use crate::container::Container;
use crate::failure::Failure;

/// Finds it. A squashed image has no base.
pub async fn find(store: &Store, container: &Container, order: &Order) -> Result<Base, Failure> {
    let name = &container.image;
    let stored = if name.is_empty() { None } else { store.image(name).await? };
    match (stored, &order.image) {
        (Some(stored), _) => Ok(stored.base),
        (None, Some(Image::Containerd(_))) if order.scope == Scope::Changes => Err(no_base(container)),
        (None, _) => {
            if order.image.is_some() && order.scope == Scope::Changes {
                eprintln!("vmctr: warning: {}; the new image has the new layer only", gone(name));
            }
            Ok(Base::empty())
        }
    }
}

fn gone(name: &str) -> String {
    if name.is_empty() {
        "The container was not started from an image".to_owned()
    } else {
        format!("Image {name}, which the container was started from, is not in containerd any more")
    }
}

fn no_base(container: &Container) -> Failure {
    Failure::failed(anyhow!("{}: there is nothing to put a layer on", gone(&container.image))).hint(
        "--squash makes an image of everything; --to-dir and --output oci-archive:FILE keep the changes",
    )
}
