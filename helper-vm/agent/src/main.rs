//! `vmctr-agent`: PID 1 of the helper VM's guest, in one static binary.
//!
//! ```text
//!   kernel ─> vmctr-agent (PID 1)
//!               boot        mounts, modules, own cgroup, limits that keep PID 1 alive
//!               service     gRPC on vsock AGENT, thin: each call becomes one verb
//!               verbs       create, exec, start, ... : the steps of a call, waiting outside the actor
//!               devices     devices that come and go while the guest runs, such as those of a VM from a template
//!               network     a network namespace made ahead
//!               identity    makes randomness and clock this VM's own
//!               guest       the actor: sole owner of containers, processes, events; reaps
//!               archive     a guest-side upper folder as a tar stream
//!               exports     folders of the guest, served to the host on vsock EXPORT
//!               unions      overlays of shares that are plugged in later, one export each
//!               stdio       raw streams on vsock STDIO, one copying thread per stream
//!               └─ vmctr-agent runtime create|exec ... (short-lived, single-threaded)
//!                     rootfs   overlay or bind mount of the container's root
//!                     runtime  libcontainer: forks the container's processes, which PID 1 inherits
//! ```
//!
//! PID 1 never forks without executing: it has threads. Everything that forks for long, or may block on
//! the share, happens in the `runtime` subcommand.

mod archive;
mod boot;
mod cgroup;
mod devices;
mod exports;
mod guest;
mod identity;
mod ids;
mod network;
mod rootfs;
mod runtime;
mod service;
mod spec;
mod stdio;
mod sys;
mod unions;
mod verbs;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some(runtime::SUBCOMMAND) {
        return runtime::main(args);
    }
    if !rustix::process::getpid().is_init() {
        eprintln!("vmctr-agent is PID 1 of a vmctr guest; on a host use vmctr");
        return ExitCode::from(125);
    }
    boot::console::log_panics();
    // The end of PID 1 panics the guest's kernel: the host sees QEMU exit and this message.
    let error = match boot::boot().and_then(|()| service::serve()) {
        Ok(()) => "the service ended".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    boot::console::error(&format!("agent ends: {error}"));
    ExitCode::FAILURE
}
