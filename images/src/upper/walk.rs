//! Walks an upper folder and tells, in order, what a layer must say.
//!
//! ```text
//! frame  "/"      base: lower roots      names of the upper only
//! frame  "etc"    base: lower etc        names of the upper only; told once something below is
//! frame  "app"    base hidden            opaque or renamed: names of all parts, everything is told
//! ```
//!
//! Invariants: paths ascend ([`TreePath`]'s order), a folder comes before what is in it, and the first
//! of a group of hard links carries the content. Only the current folder's handles are open.

use std::collections::VecDeque;

use rustix::fs::FileType;

use super::change::{Change, Consistency, Entry, EntryKind, Scope, What};
use super::error::{At, MAX_DEPTH, WalkError};
use super::index::check_index;
use super::links::Links;
use super::marks::Marks;
use super::names::MergedNames;
use super::note::{Note, Notes};
use super::same::{same_leaf, same_metadata};
use super::view::{Found, Layers, Leaf, View};
use crate::beneath::Node;
use crate::meta::{Stat, Xattrs};
use crate::path::{Escaped, TreePath};

/// A walk over the changes.
pub struct Walk<'a> {
    layers: &'a Layers,
    scope: Scope,
    consistency: Consistency,
    subtree: TreePath,
    frames: Vec<Frame>,
    links: Links,
    ready: VecDeque<Change>,
    notes: Notes,
    /// The root, if nothing at all was told.
    silent_root: Option<Change>,
}

/// A folder in progress.
struct Frame {
    path: TreePath,
    /// The folder as the container sees it.
    view: View,
    /// The folder at this path as the base shows it.
    base: View,
    /// The base does not shine through: the view is more than the upper over the base.
    replaced: bool,
    /// It was already said that nothing of the base shows.
    hidden: bool,
    names: Names,
    /// This folder's own entry, as long as nothing below it was told.
    unsaid: Option<Change>,
    stat: Stat,
}

/// What is known of a folder when it is entered.
#[derive(Clone, Copy)]
struct State {
    replaced: bool,
    hidden: bool,
    changed: bool,
    in_base: bool,
}

enum Names {
    Listed(MergedNames),
    /// On the way to the subtree: just its next component.
    One(Option<Vec<u8>>),
}

impl<'a> Walk<'a> {
    /// Starts at the root; `subtree` leaves out all that is not at or beneath it.
    pub fn new(
        layers: &'a Layers,
        scope: Scope,
        consistency: Consistency,
        subtree: TreePath,
    ) -> Result<Self, WalkError> {
        let root = TreePath::root();
        let view = layers.root(0).at(&root)?;
        let everything = scope == Scope::Everything;
        let base = if everything { View::default() } else { layers.root(1).at(&root)? };
        let mut walk = Self {
            layers,
            scope,
            consistency,
            subtree,
            frames: Vec::new(),
            links: Links::default(),
            ready: VecDeque::new(),
            notes: Notes::default(),
            silent_root: None,
        };
        let replaced = everything || view.top().is_some_and(|top| top.opaque);
        let in_base = !base.0.is_empty();
        walk.enter(root, view, base, replaced, everything, in_base)?;
        Ok(walk)
    }

    /// The next statement; `None` at the end.
    pub fn next_change(&mut self) -> Result<Option<Change>, WalkError> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                self.note_empty_xattrs(&change);
                return Ok(Some(change));
            }
            if self.frames.is_empty() {
                self.note_split_links();
                return Ok(None);
            }
            match self.step() {
                Err(WalkError::Changed(path)) if self.consistency == Consistency::Live => self.skip(path),
                result => result?,
            }
        }
    }

    /// Goes on after something has vanished: with the next name, or above if the folder is gone.
    fn skip(&mut self, path: TreePath) {
        self.notes.add(Note::Vanished(path));
        let gone = |frame: &Frame| frame.view.0.iter().any(|dir| dir.node(self.layers).is_err());
        if self.frames.last().is_some_and(gone) {
            self.frames.pop();
        }
    }

    /// At the end of a walk that told nothing: the root, which a folder needs all the same.
    pub(crate) fn silent_root(&mut self) -> Option<Change> {
        self.silent_root.take()
    }

    /// After an opaque mark: what the base has in that folder and the container has not.
    pub(super) fn hidden_names(&self) -> Result<Vec<TreePath>, WalkError> {
        let Some(frame) = self.frames.last() else { return Ok(Vec::new()) };
        let nodes = frame.base.nodes(self.layers)?;
        let mut names = MergedNames::new(nodes.len(), self.frames.len());
        let mut hidden = Vec::new();
        while let Some(name) = names.next(&nodes).at(&frame.path)? {
            let path = frame.path.join(&name);
            let was = frame.base.lookup(self.layers, &name, &path)?.exists();
            if was && !frame.view.lookup(self.layers, &name, &path)?.exists() {
                hidden.push(path);
            }
        }
        Ok(hidden)
    }

    /// What there is to note so far.
    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    fn note_split_links(&mut self) {
        let split = self.links.split();
        if self.scope == Scope::Changes {
            split.into_iter().for_each(|path| self.notes.add(Note::SplitLink(path)));
        }
    }

    fn note_empty_xattrs(&mut self, change: &Change) {
        let (What::Entry(entry) | What::Parent(entry)) = &change.what else { return };
        for (name, _) in entry.xattrs.iter().filter(|(_, value)| value.is_empty()) {
            self.notes.add(Note::EmptyXattr(change.path.clone(), Escaped(name).to_string()));
        }
    }

    fn step(&mut self) -> Result<(), WalkError> {
        let layers = self.layers;
        let Some(frame) = self.frames.last_mut() else { return Ok(()) };
        match frame.next_name(layers)? {
            Some(name) => self.visit(&name),
            None => self.leave(),
        }
    }

    /// Looks at one name of the folder in progress.
    fn visit(&mut self, name: &[u8]) -> Result<(), WalkError> {
        let Some(frame) = self.frames.last() else { return Ok(()) };
        let path = frame.path.join(name);
        let base = frame.base.lookup(self.layers, name, &path)?;
        let (hidden, replaced) = (frame.hidden, frame.replaced);
        let one_name = matches!(frame.names, Names::One(_));
        match frame.view.lookup(self.layers, name, &path)? {
            Found::Whiteout => self.gone(path, &base, hidden),
            Found::Absent if one_name => self.gone(path, &base, hidden),
            Found::Absent => self.vanished(path),
            Found::Leaf(leaf) if leaf.node.stat.kind == FileType::Socket => {
                self.notes.add(Note::Socket(path.clone()));
                self.gone(path, &base, hidden)
            }
            Found::Leaf(leaf) => self.leaf(path, leaf, &base, hidden),
            Found::Dir(view) => self.dir(path, view, base, hidden, replaced),
        }
    }

    /// A name under which nothing shows any more.
    fn gone(&mut self, path: TreePath, base: &Found, hidden: bool) -> Result<(), WalkError> {
        if !hidden && base.exists() && path.starts_with(&self.subtree) {
            self.say(path, What::Whiteout, true);
        }
        Ok(())
    }

    fn vanished(&mut self, path: TreePath) -> Result<(), WalkError> {
        match self.consistency {
            Consistency::Frozen => Err(WalkError::Changed(path)),
            Consistency::Live => {
                self.notes.add(Note::Vanished(path));
                Ok(())
            }
        }
    }

    fn leaf(&mut self, path: TreePath, leaf: Leaf, base: &Found, hidden: bool) -> Result<(), WalkError> {
        // A file where the way to the subtree was: the subtree holds nothing.
        if !path.starts_with(&self.subtree) {
            return Ok(());
        }
        if let (false, Found::Leaf(base)) = (hidden, base)
            && same_leaf(&leaf, base, self.layers.namespace(), &path)?
        {
            return Ok(());
        }
        let (marks, xattrs) = self.attributes(&leaf.node, &path)?;
        check_index(&leaf.node, &marks, base, &path)?;
        let meta = leaf.node.stat.meta;
        let kind = match self.links.seen(&path, &leaf.node.stat, leaf.layer > 0)? {
            Some(first) => EntryKind::Link(first),
            None => leaf.into_kind().at(&path)?.ok_or_else(|| WalkError::Changed(path.clone()))?,
        };
        let entry = Entry { meta, xattrs, kind };
        self.say(path, What::Entry(entry), base.exists());
        Ok(())
    }

    fn dir(
        &mut self,
        path: TreePath,
        view: View,
        base: Found,
        hidden: bool,
        replaced: bool,
    ) -> Result<(), WalkError> {
        let Some(top) = view.top() else { return Ok(()) };
        // On the way to a subtree, and nothing of the upper is here.
        if !replaced && top.layer > 0 {
            return Ok(());
        }
        let replaced = replaced || top.opaque || top.redirected;
        let in_base = base.exists();
        let base = match base {
            Found::Dir(view) => view,
            _ => View::default(),
        };
        if let Some(parent) = self.frames.last() {
            parent.view.close();
            parent.base.close();
        }
        self.enter(path, view, base, replaced, hidden, in_base)
    }

    /// Makes a folder the one in progress, and tells it unless that depends on what is in it.
    fn enter(
        &mut self,
        path: TreePath,
        view: View,
        base: View,
        replaced: bool,
        hidden: bool,
        in_base: bool,
    ) -> Result<(), WalkError> {
        if self.frames.len() >= MAX_DEPTH {
            return Err(WalkError::TooDeep(path));
        }
        let within = path.starts_with(&self.subtree);
        let hide = within && replaced && !hidden && !base.0.is_empty();
        let changed = within && (hide || hidden || !self.same_dir(&path, &view, &base)?);
        if within && !hidden {
            self.note_lost_xattrs(&path, &view, &base)?;
        }
        let state = State { replaced, hidden: hidden || hide, changed, in_base };
        self.push(path.clone(), view, base, &state)?;
        if changed {
            self.say_unsaid();
        }
        if hide {
            self.say(path, What::Opaque, true);
        }
        Ok(())
    }

    fn note_lost_xattrs(&mut self, path: &TreePath, view: &View, base: &View) -> Result<(), WalkError> {
        let (Some(now), Some(before)) = (view.top(), base.top()) else { return Ok(()) };
        let (now, before) = (now.node(self.layers)?, before.node(self.layers)?);
        if now.stat.id == before.stat.id {
            return Ok(());
        }
        let (now, before) = (self.attributes(&now, path)?.1, self.attributes(&before, path)?.1);
        for name in before.keys().filter(|name| !now.contains_key(*name)) {
            self.notes.add(Note::LostXattr(path.clone(), Escaped(name).to_string()));
        }
        Ok(())
    }

    fn same_dir(&self, path: &TreePath, view: &View, base: &View) -> Result<bool, WalkError> {
        match (view.top(), base.top()) {
            (Some(one), Some(other)) => {
                let (one, other) = (one.node(self.layers)?, other.node(self.layers)?);
                same_metadata(&one, &other, self.layers.namespace(), path)
            }
            _ => Ok(false),
        }
    }

    fn push(&mut self, path: TreePath, view: View, base: View, state: &State) -> Result<(), WalkError> {
        let Some(top) = view.top() else { return Ok(()) };
        let node = top.node(self.layers)?;
        let (_, xattrs) = self.attributes(&node, &path)?;
        let entry = Entry { meta: node.stat.meta, xattrs, kind: EntryKind::Dir };
        let what = if state.changed { What::Entry(entry) } else { What::Parent(entry) };
        let unsaid = Some(Change { path: path.clone(), what, in_base: state.in_base });
        let names = self.names(&path, &view, state.replaced);
        let State { replaced, hidden, .. } = *state;
        self.frames.push(Frame { path, view, base, replaced, hidden, names, unsaid, stat: node.stat });
        Ok(())
    }

    /// The names to look at: of the upper alone while the base shines through.
    fn names(&self, path: &TreePath, view: &View, replaced: bool) -> Names {
        if !path.starts_with(&self.subtree) {
            let depth = path.components().count();
            return Names::One(self.subtree.components().nth(depth).map(<[u8]>::to_vec));
        }
        let parts = if replaced { view.0.len() } else { 1 };
        Names::Listed(MergedNames::new(parts, self.frames.len()))
    }

    /// Ends the folder in progress.
    fn leave(&mut self) -> Result<(), WalkError> {
        let Some(mut frame) = self.frames.pop() else { return Ok(()) };
        if frame.path.is_root() {
            self.silent_root = frame.unsaid.take();
        }
        let Some(top) = frame.view.top().filter(|_| self.consistency == Consistency::Frozen) else {
            return Ok(());
        };
        let now = top.node(self.layers)?.stat_again().at(&frame.path)?;
        match now.unchanged_since(&frame.stat) {
            true => Ok(()),
            false => Err(WalkError::Changed(frame.path)),
        }
    }

    fn attributes(&self, node: &Node, path: &TreePath) -> Result<(Marks, Xattrs), WalkError> {
        Ok(Marks::split(node.xattrs().at(path)?, self.layers.namespace()))
    }

    /// Queues a statement, after the folders above it that were not told yet.
    fn say(&mut self, path: TreePath, what: What, in_base: bool) {
        self.say_unsaid();
        self.ready.push_back(Change { path, what, in_base });
    }

    fn say_unsaid(&mut self) {
        // Folders are told from the root down, so those not told yet are at the end.
        let first = self.frames.iter().rposition(|frame| frame.unsaid.is_none()).map_or(0, |told| told + 1);
        self.ready.extend(self.frames[first..].iter_mut().filter_map(|frame| frame.unsaid.take()));
    }
}

impl Frame {
    fn next_name(&mut self, layers: &Layers) -> Result<Option<Vec<u8>>, WalkError> {
        match &mut self.names {
            Names::One(name) => Ok(name.take()),
            Names::Listed(names) => {
                let mut nodes = self.view.nodes(layers)?;
                nodes.truncate(names.folders());
                names.next(&nodes).map_err(|source| match source.kind() {
                    std::io::ErrorKind::FileTooLarge => WalkError::TooManyNames(self.path.clone()),
                    _ => WalkError::Read { path: self.path.clone(), source },
                })
            }
        }
    }
}

impl Found {
    pub(super) fn exists(&self) -> bool {
        matches!(self, Self::Leaf(_) | Self::Dir(_))
    }
}
