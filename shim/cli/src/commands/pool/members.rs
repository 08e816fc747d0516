//! Who is in the pool. Keepers add and remove members, clients take them; each member is given to one client at
//! most.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmctr_vmm::pool::wire::send;
use vmctr_vmm::pool::{Member, Order};

/// The table.
#[derive(Debug, Default)]
pub struct Members(Mutex<Vec<Row>>);

#[derive(Debug)]
struct Row {
    pid: u32,
    began: Instant,
    socket: Arc<UnixStream>,
    /// QEMU's process ID, once the VM waits.
    qemu: Option<u32>,
}

impl Members {
    /// A member was started.
    pub fn add(&self, pid: u32, socket: Arc<UnixStream>) {
        self.lock().push(Row { pid, began: Instant::now(), socket, qemu: None });
    }

    /// Its VM waits.
    pub fn ready(&self, pid: u32, qemu: u32) {
        if let Some(row) = self.lock().iter_mut().find(|row| row.pid == pid) {
            row.qemu = Some(qemu);
        }
    }

    /// It is over. `true`: it was still in the pool, so nobody took it.
    pub fn remove(&self, pid: u32) -> bool {
        let mut rows = self.lock();
        let before = rows.len();
        rows.retain(|row| row.pid != pid);
        rows.len() < before
    }

    /// Gives the order to the member that has waited longest; its process ID.
    pub fn give(&self, order: &Order, fds: &[OwnedFd]) -> Option<u32> {
        loop {
            let row = {
                let mut rows = self.lock();
                let place = rows.iter().position(|row| row.qemu.is_some())?;
                rows.remove(place)
            };
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            // One that has just died takes nothing; its keeper finds out by itself.
            if send(&row.socket, order, &fds).is_ok() {
                return Some(row.pid);
            }
        }
    }

    /// For people.
    pub fn list(&self) -> Vec<Member> {
        let member =
            |row: &Row| Member { pid: row.pid, qemu: row.qemu, age_seconds: row.began.elapsed().as_secs() };
        self.lock().iter().map(member).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Row>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use vmctr_vmm::pool::wire::receive;

    use super::*;

    fn order(id: &str) -> Order {
        Order {
            config: String::new(),
            namespace: "n".into(),
            id: id.into(),
            address: String::new(),
            socket: String::new(),
            ttrpc_address: String::new(),
            debug: false,
        }
    }

    #[test]
    fn only_members_whose_vm_waits_are_given_and_each_once() {
        let members = Members::default();
        let (ours, theirs) = UnixStream::pair().unwrap();
        members.add(7, Arc::new(ours));
        assert_eq!(members.give(&order("a"), &[]), None);
        members.ready(7, 8);
        assert_eq!(members.list()[0].qemu, Some(8));
        assert_eq!(members.give(&order("b"), &[]), Some(7));
        assert_eq!(receive::<Order>(&theirs).unwrap().unwrap().0.id, "b");
        assert_eq!(members.give(&order("c"), &[]), None);
        assert!(!members.remove(7), "it was taken");
    }

    #[test]
    fn a_member_that_died_is_passed_over() {
        let members = Members::default();
        let (dead, gone) = UnixStream::pair().unwrap();
        drop(gone);
        let (alive, _theirs) = UnixStream::pair().unwrap();
        for (pid, socket) in [(1, dead), (2, alive)] {
            members.add(pid, Arc::new(socket));
            members.ready(pid, pid);
        }
        assert_eq!(members.give(&order("a"), &[]), Some(2));
    }
}
