//! The container, its processes and its VM: one driver task owns them, everyone else sends requests.
//!
//! ```text
//!   service (ttrpc) ─┐                        ┌─> session: VM, share daemon, agent     (session)
//!   control (gRPC) ──┼─ Handle ─> queue ─> driver ─> processes, their states and stdio (process, tasks)
//!   signals ─────────┘                        └─> events for containerd, in order
//!                         exits, VM's end ─────^
//! ```

mod agent;
mod claim;
mod container;
mod create;
mod driver;
mod guest_events;
mod inspect;
mod process;
mod request;
mod session;
mod share;
mod share_daemon;
mod steps;
mod task;
mod warm;
mod work_dir;

pub use agent::clean;
pub use create::CreateRequest;
pub use driver::{Identity, spawn};
pub use process::{Exit, Phase};
pub use request::{Answer, ContainerRequest, Deleted, ExecRequest, Handle, Pid, Request, StateReply};
pub use warm::Warm;
pub use work_dir::WorkDir;
