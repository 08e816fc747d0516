//! Folders that lie in one lower layer only, and all beneath them: found and listed by the host itself.
//!
//! ```text
//!   guest: "this folder lies whole in layer K at P" ── looked at, compared ──> own node, bound to the guest's
//!        names in it, and in folders below ── read in the layer ──> own nodes that the guest does not know
//!             something else is asked of one ── FIND from the nearest bound one ──> bound: the guest's node
//!                  it is changed ──> asked of the guest from then on, and so are the folders that it is in
//! ```
//!
//! The kernel holds numbers of ours for all of these, before and after the guest hears of them.
//!
//! Invariants:
//! 1. One file has one number: a node that the guest tells is first looked for among those that are bound, then among
//!    those that have its name in its folder.
//! 2. Names by which nodes are not yet bound are those of the union: who moves or removes one binds it before, and
//!    waits for whoever is just binding by its name, or binds it with the removal while nobody else binds.
//! 3. A node stays while the kernel knows it, or one below it.
//! 4. A folder that the kernel was told of by the guest's number keeps it until the kernel has forgotten it.

mod table;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::beneath::{Beneath, Found, Raw, read_folder};
use super::shared::lock;
use crate::export::wire::abi::{Attr, Entry, OWN_NODES};
use table::{Own, Table};
pub(super) use table::{Place, Settled};

/// What the host serves by itself.
#[derive(Debug)]
pub(super) struct Served {
    beneath: Option<Beneath>,
    table: Mutex<Table>,
    /// Held shared while names are told to the guest.
    binding: RwLock<()>,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// A node, which the kernel is now told of once more.
    Here(Entry),
    /// Nothing.
    Absent,
    /// The guest knows.
    Guest,
}

/// A way from a node that the guest knows to one that it does not.
#[derive(Debug)]
pub(super) struct Chain {
    /// The guest's node.
    pub(super) from: u64,
    /// Below it, one in the other.
    pub(super) nodes: Vec<u64>,
    /// Their names, as FIND has them.
    pub(super) names: Vec<u8>,
}

/// An entry of a folder, as it is listed.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) raw: Raw,
    pub(super) node: Option<(u64, Attr)>,
}

/// What is listed, and whether it is the rest.
pub(super) type Listing = (Vec<Listed>, bool);

pub(super) fn is_own(nodeid: u64) -> bool {
    nodeid >= OWN_NODES
}

/// Whether the host serves such a file, in a folder that it serves.
fn is_usual(attr: &Attr) -> bool {
    match attr.kind() {
        libc::S_IFDIR => true,
        libc::S_IFREG | libc::S_IFLNK => attr.nlink == 1,
        _ => false,
    }
}

impl Served {
    pub(super) fn new(beneath: Option<Beneath>) -> Self {
        Self { beneath, table: Mutex::default(), binding: RwLock::default() }
    }

    /// Whether there is anything to serve from.
    pub(super) fn serves(&self) -> bool {
        self.beneath.is_some()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Looks a name up in a folder of ours.
    pub(super) fn look(&self, folder: u64, name: &[u8]) -> Look {
        self.try_look(folder, name).unwrap_or(Look::Guest)
    }

    fn try_look(&self, folder: u64, name: &[u8]) -> Option<Look> {
        let beneath = self.beneath.as_ref()?;
        let mut table = self.table();
        let place = table.serving(folder)?.place.clone();
        if let Some(known) = table.named(folder, name) {
            return Some(table.tell(known).map_or(Look::Guest, Look::Here));
        }
        drop(table);
        let path: Arc<[u8]> = place.path().into();
        let found = beneath.look(&beneath.folder(place.layer, &path).ok()?, name);
        let mut table = self.table();
        table.serving(folder)?;
        match found {
            Found::Nothing => Some(Look::Absent),
            Found::Usual(attr, bare) => {
                let place = Place { layer: place.layer, folder: path, name: name.into() };
                let id = table.add(folder, place, (attr, bare));
                table.tell(id).map(Look::Here)
            }
            Found::Unusual | Found::Mark => None,
        }
    }

    /// Lists a folder of ours from `offset` on, `size` bytes at most. With `begun`, the listing goes on though names
    /// have changed, then without nodes.
    pub(super) fn list(&self, folder: u64, offset: u64, most: usize, begun: bool) -> Option<Listing> {
        let beneath = self.beneath.as_ref()?;
        let place = self.table().nodes.get(&folder).filter(|own| begun || !own.moved)?.place.clone();
        let path: Arc<[u8]> = place.path().into();
        let open = beneath.folder(place.layer, &path).ok()?;
        let mut seen = Vec::new();
        let enough = |raw: Raw| {
            let dots = matches!(raw.name.to_bytes(), b"." | b"..");
            let found = if dots { Found::Unusual } else { beneath.look(&open, raw.name.to_bytes()) };
            seen.push((raw, found));
            seen.len() >= most
        };
        let whole = read_folder(&open, offset, enough).ok()?;
        let mut table = self.table();
        if seen.iter().any(|(_, found)| *found == Found::Mark) {
            table.nodes.get_mut(&folder)?.moved = true;
            return None;
        }
        let serving = table.serving(folder).is_some();
        if !serving && !begun {
            return None;
        }
        let mut listed = Vec::with_capacity(seen.len());
        for (raw, found) in seen {
            let usual = match found {
                Found::Usual(attr, bare) if serving => Some((attr, bare)),
                _ => None,
            };
            let node = usual.and_then(|usual| table.list(folder, &place, &path, &raw, usual));
            listed.push(Listed { raw, node });
        }
        Some((listed, whole))
    }

    /// Whether it was served once, and is the guest's to list now.
    pub(super) fn is_moved(&self, folder: u64) -> bool {
        is_own(folder) && self.table().nodes.get(&folder).is_some_and(|own| own.moved)
    }

    /// What is known of a node that is as it lies in the layer.
    fn unchanged<T>(&self, id: u64, what: impl FnOnce(&Own) -> T) -> Option<T> {
        self.table().nodes.get(&id).filter(|own| !own.changed).map(what)
    }

    pub(super) fn attr(&self, id: u64) -> Option<Attr> {
        self.unchanged(id, |own| own.attr)
    }

    /// Where a file lies that is as it was.
    pub(super) fn place(&self, id: u64) -> Option<(Place, Attr)> {
        self.unchanged(id, |own| (own.place.clone(), own.attr))
    }

    /// A node's inode number, if it is one of ours.
    pub(super) fn ino(&self, id: u64) -> Option<u64> {
        if is_own(id) { self.table().nodes.get(&id).map(|own| own.attr.ino) } else { None }
    }

    pub(super) fn is_bare(&self, id: u64) -> bool {
        self.unchanged(id, |own| own.bare) == Some(true)
    }

    /// Where a symbolic link leads.
    pub(super) fn target(&self, id: u64) -> Option<Vec<u8>> {
        let (place, attr) = self.place(id).filter(|(_, attr)| attr.kind() == libc::S_IFLNK)?;
        let target = self.beneath.as_ref()?.target(place.layer, &place.folder, &place.name).ok()?;
        // Another one would have been exchanged for it.
        (target.len() as u64 == attr.size).then_some(target)
    }

    /// A node is about to be changed, or was: so are the folders that it is in, which an overlay copies up with it.
    pub(super) fn change(&self, id: u64) {
        self.table().change(id);
    }

    /// A name in a folder is about to be made, moved or removed. From now on it is the guest's to tell what names
    /// there are; tells which node of ours has the name.
    pub(super) fn change_name(&self, folder: u64, name: &[u8]) -> Option<u64> {
        let mut table = self.table();
        let own = table.nodes.get_mut(&folder)?;
        own.moved = true;
        own.names.get(name).copied()
    }

    /// A node of ours is bound and about to lose its name: returns when nobody is finding anything by it any more.
    pub(super) fn lose_name(&self, folder: u64, name: &[u8]) {
        self.take_name(folder, name);
        drop(self.binding_alone());
    }

    /// The same for who is alone with it.
    pub(super) fn take_name(&self, folder: u64, name: &[u8]) {
        if let Some(own) = self.table().nodes.get_mut(&folder) {
            own.names.remove(name);
        }
    }

    /// The guest's node that a number stands for, if it knows it.
    pub(super) fn guest(&self, id: u64) -> Option<u64> {
        if is_own(id) { self.table().nodes.get(&id)?.guest.map(|bound| bound.id) } else { Some(id) }
    }

    /// How many of the nodes the guest knows.
    pub(super) fn bound(&self) -> u64 {
        self.table().by_guest.len() as u64
    }

    /// While it is held, no name that a way is made of goes.
    pub(super) fn binding(&self) -> RwLockReadGuard<'_, ()> {
        self.binding.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// While it is held, nobody else tells names to the guest.
    pub(super) fn binding_alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.binding.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The way to a node that the guest does not know.
    pub(super) fn way(&self, id: u64) -> Option<Chain> {
        let table = self.table();
        let (mut nodes, mut at) = (Vec::new(), table.nodes.get(&id)?);
        let mut next = id;
        let from = loop {
            if let Some(bound) = at.guest {
                break bound.id;
            }
            nodes.push(next);
            next = at.parent;
            at = table.nodes.get(&next)?;
        };
        nodes.reverse();
        let mut names = Vec::new();
        for node in &nodes {
            names.extend_from_slice(&table.nodes.get(node)?.place.name);
            names.push(0);
        }
        Some(Chain { from, nodes, names })
    }

    /// Binds nodes to those that the guest found; `false` if they are others.
    pub(super) fn bind(&self, nodes: &[u64], found: &[Entry]) -> bool {
        let mut table = self.table();
        let mut all = nodes.len() == found.len();
        for (id, entry) in nodes.iter().zip(found) {
            all &= table.bind(*id, entry);
        }
        all
    }

    /// The number by which the kernel is told of a node that the guest told, under a name in a folder if it has one,
    /// and with its place if the guest says that it lies whole in a layer.
    pub(super) fn settle(
        &self,
        folder: u64,
        name: &[u8],
        told: &Entry,
        pure: Option<(usize, &[u8])>,
    ) -> Settled {
        let unknown = Settled { id: told.nodeid, ino: None };
        if told.nodeid == 0 {
            return unknown;
        }
        let mut table = self.table();
        if table.is_plain(told.nodeid) {
            table.tell_plain(told);
            return unknown;
        }
        if let Some(settled) = table.settle(folder, name, told) {
            return settled;
        }
        if is_usual(&told.attr) {
            // It could not be looked at here, and now is another node than it would be here.
            table.give_up(folder);
        }
        drop(table);
        let whole = pure.and_then(|(layer, path)| self.whole(Place::of(layer, path), &told.attr));
        let mut table = self.table();
        let Some((place, bare)) = whole else {
            table.tell_plain(told);
            return unknown;
        };
        if let Some(settled) = table.settle(folder, name, told) {
            return settled;
        }
        let id = table.add(0, place, (told.attr, bare));
        if table.bind(id, told) {
            table.tell(id);
        }
        Settled { id, ino: Some(told.attr.ino) }
    }

    /// Whether a folder is in the layer what the guest says. The number of its links tells one that is merged, which
    /// has 1 in an overlay.
    fn whole(&self, place: Place, told: &Attr) -> Option<(Place, bool)> {
        let beneath = self.beneath.as_ref()?;
        let Found::Usual(attr, bare) =
            beneath.look(&beneath.folder(place.layer, &place.folder).ok()?, &place.name)
        else {
            return None;
        };
        let facts = |attr: &Attr| (attr.ino, attr.mode, attr.nlink, attr.mtime, attr.mtimensec);
        (attr.kind() == libc::S_IFDIR && attr.nlink > 1 && facts(&attr) == facts(told))
            .then_some((place, bare))
    }

    /// The kernel forgot so often; the guest's nodes of which it need not keep them any more, and how often it told.
    pub(super) fn forget(&self, id: u64, count: u64) -> Vec<(u64, u64)> {
        if is_own(id) {
            return self.table().forget(id, count);
        }
        if self.serves() {
            self.table().forget_plain(id, count);
        }
        vec![(id, count)]
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.table().nodes.len()
    }
}
