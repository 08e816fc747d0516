//! The wait for the vsock device.
//!
//! A VM that boots has the device from the start. One that is made into a template has none: everything else
//! is prepared, the agent says so, and there the VM is stopped and saved. Each VM restored from it finds its
//! own devices on the bus when it goes on.

use std::fs;
use std::io;
use std::time::Duration;

use vmctr_proto::TEMPLATE_POINT;
use vsock::{VMADDR_CID_ANY, get_local_cid};

use crate::boot::console;

/// Makes the kernel look for devices that it does not know.
const RESCAN: &str = "/sys/bus/pci/rescan";

/// Between two looks: short, as a restored VM sleeps through it once, on the average through half of it.
const PAUSE: Duration = Duration::from_millis(4);

/// Returns when the guest has a context ID, so a vsock device that works. A guest that has to wait, as its VM
/// becomes a template, prepares itself first.
pub async fn wait<E: From<io::Error>>(prepare: impl Future<Output = Result<(), E>>) -> Result<(), E> {
    if is_there()? {
        return Ok(());
    }
    prepare.await?;
    console::info(TEMPLATE_POINT);
    loop {
        tokio::time::sleep(PAUSE).await;
        look()?;
        if is_there()? {
            return Ok(());
        }
    }
}

/// Finds devices that were plugged in; when it returns, their drivers have taken them.
pub fn look() -> io::Result<()> {
    fs::write(RESCAN, "1")
}

fn is_there() -> io::Result<bool> {
    Ok(get_local_cid()? != VMADDR_CID_ANY)
}
