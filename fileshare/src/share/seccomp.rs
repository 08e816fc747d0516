//! The system calls that the daemon may still make once it faces the guest. Any other kills it.
//!
//! The server keeps CAP_SYS_ADMIN, since only that lets it set `trusted.*` attributes. The capability is worth
//! nothing more than that here: calls that it would unlock (mount, pivot_root, setns, unshare, bpf, ioctl,
//! quotactl, swapon, perf_event_open, open_by_handle_at, ...) are not in the list, and `clone` makes threads,
//! no namespaces.

use libc::{self as c, c_long};
use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};

/// Threads, memory, time, signals, waiting: what any Rust program does.
const RUNTIME: &[c_long] = &[
    c::SYS_brk,
    c::SYS_clock_gettime,
    c::SYS_close,
    c::SYS_dup,
    c::SYS_epoll_create1,
    c::SYS_epoll_ctl,
    c::SYS_epoll_pwait,
    c::SYS_epoll_wait,
    c::SYS_eventfd2,
    c::SYS_exit,
    c::SYS_exit_group,
    c::SYS_fcntl,
    c::SYS_futex,
    c::SYS_getpid,
    c::SYS_getrandom,
    c::SYS_gettid,
    c::SYS_madvise,
    c::SYS_membarrier,
    c::SYS_mmap,
    c::SYS_mprotect,
    c::SYS_mremap,
    c::SYS_munmap,
    c::SYS_read,
    c::SYS_readv,
    c::SYS_restart_syscall,
    c::SYS_rseq,
    c::SYS_rt_sigaction,
    c::SYS_rt_sigprocmask,
    c::SYS_rt_sigreturn,
    c::SYS_sched_getaffinity,
    c::SYS_sched_yield,
    c::SYS_set_robust_list,
    c::SYS_sigaltstack,
    c::SYS_tgkill,
    c::SYS_wait4,
    c::SYS_waitid,
    c::SYS_write,
    c::SYS_writev,
];

/// The vhost-user socket.
const SOCKET: &[c_long] = &[c::SYS_accept4, c::SYS_recvmsg, c::SYS_sendmsg];

/// Acting as the guest's user when files are made.
const CREDENTIALS: &[c_long] = &[
    c::SYS_capget,
    c::SYS_capset,
    c::SYS_getegid,
    c::SYS_geteuid,
    c::SYS_setgroups,
    c::SYS_setresgid,
    c::SYS_setresuid,
    c::SYS_umask,
];

/// What FUSE requests turn into.
const FILES: &[c_long] = &[
    c::SYS_copy_file_range,
    c::SYS_fallocate,
    c::SYS_fchdir,
    c::SYS_fchmod,
    c::SYS_fchmodat,
    c::SYS_fchownat,
    c::SYS_fdatasync,
    c::SYS_fgetxattr,
    c::SYS_flistxattr,
    c::SYS_fremovexattr,
    c::SYS_fsetxattr,
    c::SYS_fstat,
    c::SYS_fstatfs,
    c::SYS_fsync,
    c::SYS_ftruncate,
    c::SYS_getdents64,
    c::SYS_getxattr,
    c::SYS_linkat,
    c::SYS_listxattr,
    c::SYS_lseek,
    c::SYS_mkdirat,
    c::SYS_mknodat,
    c::SYS_newfstatat,
    c::SYS_openat,
    c::SYS_openat2,
    c::SYS_pread64,
    c::SYS_preadv,
    c::SYS_preadv2,
    c::SYS_pwrite64,
    c::SYS_pwritev,
    c::SYS_pwritev2,
    c::SYS_readlinkat,
    c::SYS_removexattr,
    c::SYS_renameat2,
    c::SYS_setxattr,
    c::SYS_statx,
    c::SYS_symlinkat,
    c::SYS_syncfs,
    c::SYS_unlinkat,
    c::SYS_utimensat,
];

/// `clone` flags that make a namespace.
const NAMESPACES: u64 = (c::CLONE_NEWNS
    | c::CLONE_NEWCGROUP
    | c::CLONE_NEWUTS
    | c::CLONE_NEWIPC
    | c::CLONE_NEWUSER
    | c::CLONE_NEWPID
    | c::CLONE_NEWNET) as u64;

/// `prctl` operations in use: naming a thread, and libcap-ng's look at the bounding and the ambient set.
const PRCTLS: &[(i32, Option<i32>)] = &[
    (c::PR_SET_NAME, None),
    (c::PR_CAPBSET_READ, None),
    (c::PR_CAP_AMBIENT, Some(c::PR_CAP_AMBIENT_IS_SET)),
];

/// The filter could not be made or loaded.
#[derive(Debug, thiserror::Error)]
#[error("cannot load the seccomp filter")]
pub struct FilterError(#[from] SeccompError);

/// Loads the filter for this thread and all that it starts; sets no_new_privs.
pub(super) fn install() -> Result<(), FilterError> {
    Ok(filter()?.load()?)
}

fn filter() -> Result<ScmpFilterContext, SeccompError> {
    let mut filter = ScmpFilterContext::new(ScmpAction::KillProcess)?;
    for number in [RUNTIME, SOCKET, CREDENTIALS, FILES].into_iter().flatten() {
        filter.add_rule(ScmpAction::Allow, call(*number))?;
    }
    let no_namespace = ScmpArgCompare::new(0, ScmpCompareOp::MaskedEqual(NAMESPACES), 0);
    filter.add_rule_conditional(ScmpAction::Allow, call(c::SYS_clone), &[no_namespace])?;
    // Its flags are in memory, out of a filter's reach; the C library falls back to clone.
    filter.add_rule(ScmpAction::Errno(c::ENOSYS), call(c::SYS_clone3))?;
    for (operation, kind) in PRCTLS {
        let mut arguments = vec![equals(0, *operation)];
        arguments.extend(kind.map(|kind| equals(1, kind)));
        filter.add_rule_conditional(ScmpAction::Allow, call(c::SYS_prctl), &arguments)?;
    }
    Ok(filter)
}

fn equals(argument: u32, value: i32) -> ScmpArgCompare {
    ScmpArgCompare::new(argument, ScmpCompareOp::Equal, u64::from(value.unsigned_abs()))
}

/// Numbers of system calls are small: the conversion loses nothing.
#[allow(clippy::cast_possible_truncation)]
fn call(number: c_long) -> ScmpSyscall {
    ScmpSyscall::from(number as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sys_admin_would_unlock_is_not_allowed() {
        let dangerous = [
            c::SYS_mount,
            c::SYS_umount2,
            c::SYS_pivot_root,
            c::SYS_chroot,
            c::SYS_setns,
            c::SYS_unshare,
            c::SYS_open_tree,
            c::SYS_move_mount,
            c::SYS_fsopen,
            c::SYS_fsmount,
            c::SYS_fsconfig,
            c::SYS_mount_setattr,
            c::SYS_bpf,
            c::SYS_ioctl,
            c::SYS_quotactl,
            c::SYS_swapon,
            c::SYS_perf_event_open,
            c::SYS_open_by_handle_at,
            c::SYS_name_to_handle_at,
            c::SYS_fanotify_init,
            c::SYS_ptrace,
            c::SYS_execve,
            c::SYS_execveat,
            c::SYS_socket,
            c::SYS_connect,
            c::SYS_kill,
            c::SYS_seccomp,
            c::SYS_setdomainname,
            c::SYS_sethostname,
            c::SYS_keyctl,
            c::SYS_io_uring_setup,
            c::SYS_userfaultfd,
            c::SYS_process_vm_readv,
            c::SYS_process_vm_writev,
            c::SYS_pidfd_getfd,
        ];
        for number in dangerous {
            for list in [RUNTIME, SOCKET, CREDENTIALS, FILES] {
                assert!(!list.contains(&number), "system call {number} is allowed");
            }
        }
    }

    #[test]
    fn the_filter_can_be_built() {
        filter().unwrap();
    }
}
