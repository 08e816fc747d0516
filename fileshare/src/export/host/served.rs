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
//!    waits for whoever is just binding by its name.
//! 3. A node stays while the kernel knows it, or one below it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};

use super::beneath::{Beneath, Found, Raw, read_folder};
use super::shared::lock;
use crate::export::wire::abi::{Attr, Entry, OWN_NODES};

/// What the host serves by itself.
#[derive(Debug)]
pub(super) struct Served {
    beneath: Option<Beneath>,
    table: Mutex<Table>,
    /// Held shared while names are told to the guest.
    binding: RwLock<()>,
}

#[derive(Debug, Default)]
struct Table {
    nodes: HashMap<u64, Own>,
    by_guest: HashMap<u64, u64>,
    last: u64,
}

/// A node of ours.
#[derive(Debug)]
struct Own {
    place: Place,
    attr: Attr,
    /// It has no extended attributes.
    bare: bool,
    parent: u64,
    /// How often the kernel was told of it and has not forgotten, and how many nodes below need it.
    told: u64,
    below: u64,
    guest: Option<Bound>,
    /// It may differ from what lies in the layer.
    changed: bool,
    /// Its names may.
    moved: bool,
    /// Of a folder: the nodes that have a name in it.
    names: HashMap<Box<[u8]>, u64>,
}

/// The guest's node, and how often it told of it.
#[derive(Clone, Copy, Debug)]
struct Bound {
    id: u64,
    told: u64,
}

/// Where something lies in the layers.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) layer: usize,
    /// The folder that it is in.
    pub(super) folder: Arc<[u8]>,
    pub(super) name: Box<[u8]>,
}

impl Place {
    pub(super) fn path(&self) -> Vec<u8> {
        match &*self.folder {
            [] => self.name.to_vec(),
            folder => [folder, b"/", &*self.name].concat(),
        }
    }

    /// Of a path that ends in a name.
    pub(super) fn of(layer: usize, path: &[u8]) -> Self {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let (folder, name) = slash.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
        Self { layer, folder: folder.into(), name: name.into() }
    }
}

/// The number by which the kernel is told of a node, and its inode's where that is not the guest's to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) id: u64,
    pub(super) ino: Option<u64>,
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
        let mut table = self.table();
        let mut next = id;
        while let Some(own) = table.nodes.get_mut(&next) {
            own.changed = true;
            next = own.parent;
        }
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
        if let Some(own) = self.table().nodes.get_mut(&folder) {
            own.names.remove(name);
        }
        drop(self.binding.write());
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
        if let Some(settled) = table.settle(folder, name, told) {
            return settled;
        }
        drop(table);
        let whole = pure.and_then(|(layer, path)| self.whole(Place::of(layer, path), &told.attr));
        let Some((place, bare)) = whole else { return unknown };
        let mut table = self.table();
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
        if is_own(id) { self.table().forget(id, count) } else { vec![(id, count)] }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.table().nodes.len()
    }
}

impl Table {
    /// A folder whose names are those of the layer.
    fn serving(&self, folder: u64) -> Option<&Own> {
        self.nodes.get(&folder).filter(|own| !own.moved && own.attr.kind() == libc::S_IFDIR)
    }

    fn named(&self, folder: u64, name: &[u8]) -> Option<u64> {
        self.nodes.get(&folder)?.names.get(name).copied()
    }

    /// The kernel is told of a node that is as it was; of others the guest tells.
    fn tell(&mut self, id: u64) -> Option<Entry> {
        let own = self.nodes.get_mut(&id).filter(|own| !own.changed)?;
        own.told += 1;
        Some(Entry { nodeid: id, attr: own.attr })
    }

    fn add(&mut self, parent: u64, place: Place, (attr, bare): (Attr, bool)) -> u64 {
        if let Some(known) = self.named(parent, &place.name) {
            return known;
        }
        self.last += 1;
        let id = OWN_NODES | self.last;
        if let Some(folder) = self.nodes.get_mut(&parent) {
            folder.below += 1;
            folder.names.insert(place.name.clone(), id);
        }
        let names = HashMap::new();
        let own = Own {
            place,
            attr,
            bare,
            parent,
            told: 0,
            below: 0,
            guest: None,
            changed: false,
            moved: false,
            names,
        };
        self.nodes.insert(id, own);
        id
    }

    fn list(
        &mut self,
        folder: u64,
        place: &Place,
        path: &Arc<[u8]>,
        raw: &Raw,
        usual: (Attr, bool),
    ) -> Option<(u64, Attr)> {
        let place = Place { layer: place.layer, folder: Arc::clone(path), name: raw.name.to_bytes().into() };
        let id = self.add(folder, place, usual);
        self.tell(id).map(|entry| (id, entry.attr))
    }

    fn bind(&mut self, id: u64, found: &Entry) -> bool {
        let taken = self.by_guest.get(&found.nodeid).is_some_and(|other| *other != id);
        let Some(own) = self.nodes.get_mut(&id) else { return false };
        let other = own.guest.is_some_and(|bound| bound.id != found.nodeid);
        if taken || other || own.attr.kind() != found.attr.kind() {
            return false;
        }
        own.guest.get_or_insert(Bound { id: found.nodeid, told: 0 }).told += 1;
        self.by_guest.insert(found.nodeid, id);
        true
    }

    /// Finds which node of ours a node of the guest's is; its number, and its inode's.
    fn settle(&mut self, folder: u64, name: &[u8], told: &Entry) -> Option<Settled> {
        let bound = self.by_guest.get(&told.nodeid).copied();
        let id = bound.or_else(|| self.named(folder, name))?;
        if !self.bind(id, told) {
            return None;
        }
        let own = self.nodes.get_mut(&id)?;
        own.told += 1;
        Some(Settled { id, ino: Some(own.attr.ino) })
    }

    fn forget(&mut self, id: u64, count: u64) -> Vec<(u64, u64)> {
        if let Some(own) = self.nodes.get_mut(&id) {
            own.told = own.told.saturating_sub(count);
        }
        let (mut gone, mut next) = (Vec::new(), id);
        while self.nodes.get(&next).is_some_and(|own| own.told == 0 && own.below == 0) {
            let Some(own) = self.nodes.remove(&next) else { break };
            if let Some(bound) = own.guest {
                self.by_guest.remove(&bound.id);
                gone.push((bound.id, bound.told));
            }
            if let Some(folder) = self.nodes.get_mut(&own.parent) {
                folder.below -= 1;
                // What lies in the layer is no longer what the name stands for.
                folder.moved |= own.changed;
                if folder.names.get(&own.place.name) == Some(&next) {
                    folder.names.remove(&own.place.name);
                }
            }
            next = own.parent;
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, StatxFlags};

    use super::*;

    /// Told by the guest.
    fn told(nodeid: u64, path: &Path) -> Entry {
        let st = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS).unwrap();
        Entry { nodeid, attr: crate::export::stat::attr(&st, st.stx_ino) }
    }

    fn here(look: Look) -> u64 {
        match look {
            Look::Here(entry) => entry.nodeid,
            other => panic!("{other:?}"),
        }
    }

    /// A layer with `dir/sub/file`, and the node of `dir`, which is 7 to the guest.
    fn layer() -> (tempfile::TempDir, Served, u64) {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::create_dir_all(dir.path().join("dir/sub")).unwrap();
        fs::write(dir.path().join("dir/sub/file"), "text").unwrap();
        let served = Served::new(Beneath::open(&[dir.path().to_owned()]).unwrap());
        let entry = told(7, &dir.path().join("dir"));
        let id = served.settle(1, b"dir", &entry, Some((0, b"dir"))).id;
        assert!(is_own(id));
        (dir, served, id)
    }

    #[test]
    fn what_the_guest_says_is_compared_with_the_layer() {
        let (dir, served, _) = layer();
        let entry = told(8, &dir.path().join("dir/sub"));
        let claims: [(usize, &[u8]); 6] =
            [(1, b"dir/sub"), (0, b"dir"), (0, b"none"), (0, b"/etc"), (0, b".."), (0, b"dir/sub/file")];
        for (layer, path) in claims {
            let settled = served.settle(1, b"x", &entry, Some((layer, path)));
            assert_eq!(settled.id, 8, "{}", String::from_utf8_lossy(path));
        }
        let merged = Entry { attr: Attr { nlink: 1, ..entry.attr }, ..entry };
        assert_eq!(served.settle(1, b"x", &merged, Some((0, b"dir/sub"))).id, 8);
        assert!(is_own(served.settle(1, b"x", &entry, Some((0, b"dir/sub"))).id));
    }

    #[test]
    fn a_node_keeps_its_number_when_the_guest_hears_of_it() {
        let (dir, served, id) = layer();
        let sub = here(served.look(id, b"sub"));
        let file = here(served.look(sub, b"file"));
        assert_eq!(here(served.look(sub, b"file")), file);
        assert_eq!(served.look(sub, b"other"), Look::Absent);
        assert_eq!(served.guest(file), None);
        let way = served.way(file).unwrap();
        assert_eq!((way.from, &way.nodes[..], &way.names[..]), (7, &[sub, file][..], &b"sub\0file\0"[..]));
        let found = [told(20, &dir.path().join("dir/sub")), told(21, &dir.path().join("dir/sub/file"))];
        assert!(served.bind(&way.nodes, &found));
        assert_eq!(served.guest(file), Some(21));
        assert_eq!(served.settle(99, b"elsewhere", &found[1], None).id, file);
        assert!(!served.bind(&[sub], &[told(22, dir.path())]), "bound to another already");
    }

    #[test]
    fn a_guest_cannot_exchange_one_kind_for_another() {
        let (dir, served, id) = layer();
        let sub = here(served.look(id, b"sub"));
        let file = here(served.look(sub, b"file"));
        let swapped = [told(21, &dir.path().join("dir/sub/file")), told(20, &dir.path().join("dir/sub"))];
        assert!(!served.bind(&[sub, file], &swapped));
        assert!(!served.bind(&[sub, file], &swapped[..1]));
    }

    #[test]
    fn what_changed_is_the_guest_s_to_tell() {
        let (dir, served, id) = layer();
        let sub = here(served.look(id, b"sub"));
        let file = here(served.look(sub, b"file"));
        assert!(served.attr(file).is_some() && served.attr(sub).is_some());
        served.change(file);
        assert!(served.attr(file).is_none() && served.attr(sub).is_none() && served.attr(id).is_none());
        assert_eq!(served.look(sub, b"file"), Look::Guest);
        served.forget(file, 1);
        assert_eq!(served.look(sub, b"file"), Look::Guest, "also when it was forgotten");
        fs::write(dir.path().join("dir/other"), "").unwrap();
        assert_eq!(served.change_name(id, b"other"), None);
        assert_eq!(served.look(id, b"other"), Look::Guest);
        assert!(served.list(id, 0, 100, false).is_none());
        let (listed, whole) = served.list(id, 0, 100, true).unwrap();
        assert!(
            whole && listed.iter().all(|one| one.node.is_none()),
            "a listing that began goes on, of names"
        );
    }

    #[test]
    fn whiteouts_leave_their_folder_to_the_guest() {
        let (dir, served, id) = layer();
        let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::empty());
        rustix::fs::mknodat(CWD, dir.path().join("dir/gone"), kind, mode, 0).unwrap();
        assert_eq!(served.look(id, b"gone"), Look::Guest);
        assert!(served.list(id, 0, 100, false).is_none());
        assert_eq!(served.look(id, b"new"), Look::Guest);
    }

    #[test]
    fn files_with_several_names_are_left_to_the_guest() {
        let (dir, served, id) = layer();
        fs::hard_link(dir.path().join("dir/sub/file"), dir.path().join("dir/second")).unwrap();
        assert_eq!(served.look(id, b"second"), Look::Guest);
        let (listed, _) = served.list(id, 0, 100, false).unwrap();
        let second = listed.iter().find(|one| one.raw.name.to_bytes() == b"second").unwrap();
        assert!(second.node.is_none());
    }

    #[test]
    fn nothing_is_kept_of_what_the_kernel_forgot() {
        let (dir, served, id) = layer();
        let sub = here(served.look(id, b"sub"));
        let file = here(served.look(sub, b"file"));
        let way = served.way(file).unwrap();
        let found = [told(20, &dir.path().join("dir/sub")), told(21, &dir.path().join("dir/sub/file"))];
        assert!(served.bind(&way.nodes, &found) && served.bind(&way.nodes, &found));
        assert!(served.forget(sub, 1).is_empty(), "one below it is known");
        assert!(served.forget(id, 1).is_empty());
        assert_eq!(served.forget(file, 1), [(21, 2), (20, 2), (7, 1)]);
        assert_eq!(served.len(), 0);
        assert_eq!(served.forget(7, 3), [(7, 3)], "one of the guest's own");
    }

    #[test]
    fn who_loses_a_name_waits_for_who_is_finding_by_it() {
        let (_dir, served, id) = layer();
        here(served.look(id, b"sub"));
        let finding = served.binding();
        std::thread::scope(|scope| {
            let losing = scope.spawn(|| served.lose_name(id, b"sub"));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!losing.is_finished());
            drop(finding);
        });
    }
}
