//! Seccomp and capabilities of an exec, which libcontainer leaves out: it gives a further process neither
//! the container's filter nor a way to add one while the process still may.

use libcontainer::capabilities::drop_privileges;
use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;

/// What a further process gives up right before it executes.
#[derive(Clone, Default)]
pub struct Confinement {
    /// The container's filter.
    pub seccomp: Option<LinuxSeccomp>,
    /// The capabilities to keep; `None` keeps all.
    pub capabilities: Option<LinuxCapabilities>,
    /// Whether `no_new_privileges` is set, which lets an unprivileged process add a filter.
    pub no_new_privileges: bool,
}

impl Confinement {
    /// Confines the calling process.
    pub fn enter(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        // Without no_new_privileges only a privileged process may add a filter: filter first. With it the
        // filter comes last, so that it need not allow the calls that drop capabilities.
        if self.no_new_privileges {
            self.drop_capabilities()?;
            self.filter()
        } else {
            self.filter()?;
            self.drop_capabilities()
        }
    }

    fn filter(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if let Some(seccomp) = &self.seccomp {
            initialize_seccomp(seccomp)?;
        }
        Ok(())
    }

    fn drop_capabilities(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if let Some(capabilities) = &self.capabilities {
            drop_privileges(capabilities, create_syscall().as_ref())?;
        }
        Ok(())
    }
}
