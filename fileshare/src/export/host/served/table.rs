//! The nodes of served folders: numbers, names, and which of the guest's nodes they stand for.
//!
//! Invariant: a node stays while the kernel knows it, or one below it; `by_guest` and the nodes' own bonds say the same.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::beneath::Raw;
use crate::export::wire::abi::{Attr, Entry, OWN_NODES};

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) nodes: HashMap<u64, Own>,
    pub(super) by_guest: HashMap<u64, u64>,
    /// The folders that the kernel knows by the guest's numbers, and how often it was told.
    plain: HashMap<u64, u64>,
    last: u64,
}

/// A node of ours.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) place: Place,
    pub(super) attr: Attr,
    /// It has no extended attributes.
    pub(super) bare: bool,
    pub(super) parent: u64,
    /// How often the kernel was told of it and has not forgotten, and how many nodes below need it.
    told: u64,
    below: u64,
    pub(super) guest: Option<Bound>,
    /// It may differ from what lies in the layer.
    pub(super) changed: bool,
    /// Its names may.
    pub(super) moved: bool,
    /// Of a folder: the nodes that have a name in it.
    pub(super) names: HashMap<Box<[u8]>, u64>,
}

/// The guest's node, and how often it told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bound {
    pub(super) id: u64,
    told: u64,
}

/// Where something lies in the layers.
#[derive(Clone, Debug)]
pub(in super::super) struct Place {
    pub(in super::super) layer: usize,
    /// The folder that it is in.
    pub(in super::super) folder: Arc<[u8]>,
    pub(in super::super) name: Box<[u8]>,
}

impl Place {
    pub(in super::super) fn path(&self) -> Vec<u8> {
        match &*self.folder {
            [] => self.name.to_vec(),
            folder => [folder, b"/", &*self.name].concat(),
        }
    }

    /// Of a path that ends in a name.
    pub(in super::super) fn of(layer: usize, path: &[u8]) -> Self {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let (folder, name) = slash.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
        Self { layer, folder: folder.into(), name: name.into() }
    }
}

/// The number by which the kernel is told of a node, and its inode's where that is not the guest's to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Settled {
    pub(in super::super) id: u64,
    pub(in super::super) ino: Option<u64>,
}

impl Table {
    /// A folder whose names are those of the layer.
    pub(super) fn serving(&self, folder: u64) -> Option<&Own> {
        self.nodes.get(&folder).filter(|own| !own.moved && own.attr.kind() == libc::S_IFDIR)
    }

    pub(super) fn named(&self, folder: u64, name: &[u8]) -> Option<u64> {
        self.nodes.get(&folder)?.names.get(name).copied()
    }

    /// A node may differ from what lies in the layer, and so may the folders that it is in.
    pub(super) fn change(&mut self, id: u64) {
        let mut next = id;
        while let Some(own) = self.nodes.get_mut(&next) {
            own.changed = true;
            next = own.parent;
        }
    }

    /// Leaves a folder to the guest from now on.
    pub(super) fn give_up(&mut self, folder: u64) {
        if let Some(own) = self.nodes.get_mut(&folder) {
            own.moved = true;
            self.change(folder);
        }
    }

    pub(super) fn is_plain(&self, guest: u64) -> bool {
        self.plain.contains_key(&guest)
    }

    /// The kernel is told of something by the guest's number.
    pub(super) fn tell_plain(&mut self, told: &Entry) {
        if told.attr.kind() == libc::S_IFDIR {
            *self.plain.entry(told.nodeid).or_default() += 1;
        }
    }

    pub(super) fn forget_plain(&mut self, guest: u64, count: u64) {
        if let Some(told) = self.plain.get_mut(&guest) {
            *told = told.saturating_sub(count);
            if *told == 0 {
                self.plain.remove(&guest);
            }
        }
    }

    /// The kernel is told of a node that is as it was; of others the guest tells.
    pub(super) fn tell(&mut self, id: u64) -> Option<Entry> {
        let own = self.nodes.get_mut(&id).filter(|own| !own.changed)?;
        own.told += 1;
        Some(Entry { nodeid: id, attr: own.attr })
    }

    pub(super) fn add(&mut self, parent: u64, place: Place, (attr, bare): (Attr, bool)) -> u64 {
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

    pub(super) fn list(
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

    pub(super) fn bind(&mut self, id: u64, found: &Entry) -> bool {
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
    pub(super) fn settle(&mut self, folder: u64, name: &[u8], told: &Entry) -> Option<Settled> {
        let bound = self.by_guest.get(&told.nodeid).copied();
        let id = bound.or_else(|| self.named(folder, name))?;
        if !self.bind(id, told) {
            return None;
        }
        let own = self.nodes.get_mut(&id)?;
        own.told += 1;
        Some(Settled { id, ino: Some(own.attr.ino) })
    }

    pub(super) fn forget(&mut self, id: u64, count: u64) -> Vec<(u64, u64)> {
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
