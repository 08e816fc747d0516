//! Merged lookups: which folders of which layers make up one folder of the container.
//!
//! Follows the kernel's rules: the topmost entry of a name wins; folders of the same name merge until
//! one is opaque, a whiteout or a file ends the search, and a redirect says under which name the search
//! goes on in the layers below.
//!
//! ```text
//! upper   etc/ (redirect /old)     View of etc = [upper:etc, lower 0:old, lower 1:old]
//! lower 0 old/
//! lower 1 old/  etc/               etc of lower 1 is not part of it
//! ```
//!
//! Invariant: a folder is remembered by its path beneath its layer's root and its inode; when it is
//! opened again and is another inode, that is reported as a change, never used.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::FileType;

use super::change::EntryKind;
use super::content::Content;
use super::error::{At, WalkError};
use super::marks::{Marks, Namespace};
use crate::beneath::{self, Node};
use crate::meta::InodeId;
use crate::path::TreePath;

/// The folders of an overlay, topmost first.
pub struct Layers {
    roots: Vec<Node>,
    namespace: Namespace,
}

impl Layers {
    /// Opens `folders`, topmost first. The first is the upper in [`super::Scope::Changes`].
    pub fn open<P: AsRef<Path>>(
        folders: impl IntoIterator<Item = P>,
        namespace: Namespace,
    ) -> Result<Self, OpenError> {
        beneath::check_proc().map_err(OpenError::Proc)?;
        let open = |path: P| {
            Node::root(path.as_ref())
                .map_err(|source| OpenError::Folder { path: path.as_ref().to_owned(), source })
        };
        let roots = folders.into_iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { roots, namespace })
    }

    /// How many folders there are.
    pub fn count(&self) -> usize {
        self.roots.len()
    }

    /// Whether the folders from `first` on show something at `path`.
    pub fn show(&self, first: usize, path: &TreePath) -> Result<bool, WalkError> {
        Ok(first < self.count() && find(self, first, path, path)?.exists())
    }

    pub(super) fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// The root folder as the layers from `first` on show it.
    pub(super) fn root(&self, first: usize) -> io::Result<View> {
        let mut dirs = Vec::new();
        for (layer, root) in self.roots.iter().enumerate().skip(first) {
            let marks = Marks::of_dir(root, self.namespace)?;
            dirs.push(Dir::new(layer, TreePath::root(), &marks, Rc::new(root.duplicate()?)));
        }
        Ok(View(dirs))
    }
}

/// Why the folders of an overlay cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A folder is missing or no folder.
    #[error("The layer folder {path:?} cannot be opened")]
    Folder {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// /proc is missing.
    #[error("Layers cannot be read here")]
    Proc(#[source] io::Error),
}

/// One layer's part of a merged folder.
pub(super) struct Dir {
    pub layer: usize,
    pub path: TreePath,
    pub opaque: bool,
    pub redirected: bool,
    id: InodeId,
    holds_whiteout_files: bool,
    open: RefCell<Option<Rc<Node>>>,
}

impl Dir {
    fn new(layer: usize, path: TreePath, marks: &Marks, node: Rc<Node>) -> Self {
        Self {
            layer,
            path,
            opaque: marks.opaque,
            redirected: marks.redirect.is_some(),
            id: node.stat.id,
            holds_whiteout_files: marks.holds_whiteout_files,
            open: RefCell::new(Some(node)),
        }
    }

    /// The folder, opened again if it had been closed.
    pub(super) fn node(&self, layers: &Layers) -> Result<Rc<Node>, WalkError> {
        if let Some(node) = &*self.open.borrow() {
            return Ok(Rc::clone(node));
        }
        let node = layers.roots[self.layer].descend(&self.path).at(&self.path)?;
        let node = node.filter(|node| node.stat.id == self.id);
        let node = Rc::new(node.ok_or_else(|| WalkError::Changed(self.path.clone()))?);
        *self.open.borrow_mut() = Some(Rc::clone(&node));
        Ok(node)
    }

    fn is_whiteout(&self, node: &Node, namespace: Namespace) -> io::Result<bool> {
        Ok(node.stat.is_whiteout_device()
            || (self.holds_whiteout_files
                && node.stat.kind == FileType::RegularFile
                && Marks::is_whiteout_file(node, namespace)?))
    }
}

/// A merged folder: its parts, topmost first. Empty where there is no such folder.
#[derive(Default)]
pub(super) struct View(pub Vec<Dir>);

/// What a name is in a merged folder.
pub(super) enum Found {
    /// No layer has it.
    Absent,
    /// The topmost layer that has it says that it is deleted.
    Whiteout,
    /// Not a folder.
    Leaf(Leaf),
    /// A folder.
    Dir(View),
}

/// Anything but a folder.
pub(super) struct Leaf {
    pub node: Node,
    /// In which layer it was found.
    pub layer: usize,
    /// Where the bytes are if `node` has only the metadata.
    pub data: Option<Node>,
}

impl Leaf {
    /// The inode that holds a regular file's bytes.
    pub(super) fn bytes(&self) -> &Node {
        self.data.as_ref().unwrap_or(&self.node)
    }

    /// A regular file's bytes.
    fn into_content(self) -> Content {
        Content { node: self.data.unwrap_or(self.node) }
    }

    /// What it is, for a layer; `None` for what cannot be in one.
    pub(super) fn into_kind(self) -> io::Result<Option<EntryKind>> {
        let stat = &self.node.stat;
        Ok(Some(match stat.kind {
            FileType::RegularFile => EntryKind::File(self.into_content()),
            FileType::Symlink => EntryKind::Symlink(self.node.read_link()?),
            FileType::CharacterDevice => EntryKind::Char(stat.rdev),
            FileType::BlockDevice => EntryKind::Block(stat.rdev),
            FileType::Fifo => EntryKind::Fifo,
            _ => return Ok(None),
        }))
    }
}

impl View {
    /// The topmost folder: the one whose metadata shows.
    pub(super) fn top(&self) -> Option<&Dir> {
        self.0.first()
    }

    /// The parts, opened.
    pub(super) fn nodes(&self, layers: &Layers) -> Result<Vec<Rc<Node>>, WalkError> {
        self.0.iter().map(|dir| dir.node(layers)).collect()
    }

    /// Frees the handles; they are opened again when needed.
    pub(super) fn close(&self) {
        self.0.iter().for_each(|dir| drop(dir.open.borrow_mut().take()));
    }

    /// What `name` is in this folder.
    pub(super) fn lookup(&self, layers: &Layers, name: &[u8], place: &TreePath) -> Result<Found, WalkError> {
        let mut search = Search { layers, place, name: name.to_vec(), dirs: Vec::new() };
        for dir in &self.0 {
            match search.layer(dir)? {
                Step::Below => {}
                Step::Elsewhere(path) => {
                    search.redirected(dir.layer + 1, &path)?;
                    break;
                }
                Step::Whiteout if search.dirs.is_empty() => return Ok(Found::Whiteout),
                Step::Leaf(node) if search.dirs.is_empty() => {
                    let data = self.data_of(layers, &node, dir, &search.name, place)?;
                    return Ok(Found::Leaf(Leaf { node, layer: dir.layer, data }));
                }
                Step::Whiteout | Step::Leaf(_) | Step::End => break,
            }
        }
        let dirs = search.dirs;
        Ok(if dirs.is_empty() { Found::Absent } else { Found::Dir(View(dirs)) })
    }

    /// Where the bytes of a file are that has only metadata; `None` if it has its own.
    fn data_of(
        &self,
        layers: &Layers,
        node: &Node,
        found_in: &Dir,
        name: &[u8],
        place: &TreePath,
    ) -> Result<Option<Node>, WalkError> {
        if node.stat.kind != FileType::RegularFile {
            return Ok(None);
        }
        let marks = Marks::of_file(node, layers.namespace).at(place)?;
        if !marks.metacopy {
            return Ok(None);
        }
        let below = self.0.iter().filter(|dir| dir.layer > found_in.layer);
        let found = match redirect(marks.redirect.as_deref(), place)? {
            None => lookup_in(layers, below, name, place)?,
            Some(Redirect::Sibling(name)) => lookup_in(layers, below, &name, place)?,
            Some(Redirect::Absolute(path)) => find(layers, found_in.layer + 1, &path, place)?,
        };
        match found {
            Found::Leaf(leaf) if leaf.node.stat.kind == FileType::RegularFile => {
                Ok(Some(leaf.data.unwrap_or(leaf.node)))
            }
            _ => Err(WalkError::MissingData(place.clone())),
        }
    }
}

/// Looks up `name` in some of a folder's parts.
fn lookup_in<'a>(
    layers: &Layers,
    dirs: impl Iterator<Item = &'a Dir>,
    name: &[u8],
    place: &TreePath,
) -> Result<Found, WalkError> {
    let copy = |dir: &Dir| Dir {
        layer: dir.layer,
        path: dir.path.clone(),
        opaque: dir.opaque,
        redirected: dir.redirected,
        id: dir.id,
        holds_whiteout_files: dir.holds_whiteout_files,
        open: RefCell::new(dir.open.borrow().clone()),
    };
    View(dirs.map(copy).collect()).lookup(layers, name, place)
}

/// What `path` is in the layers from `first` on.
fn find(layers: &Layers, first: usize, path: &TreePath, place: &TreePath) -> Result<Found, WalkError> {
    let mut view = layers.root(first).at(place)?;
    let mut components = path.components().peekable();
    while let Some(name) = components.next() {
        match view.lookup(layers, name, place)? {
            Found::Dir(next) => view = next,
            found if components.peek().is_none() => return Ok(found),
            _ => return Ok(Found::Absent),
        }
    }
    Ok(Found::Dir(view))
}

/// The state of a lookup on its way down the layers.
struct Search<'a> {
    layers: &'a Layers,
    place: &'a TreePath,
    name: Vec<u8>,
    dirs: Vec<Dir>,
}

/// What one layer says.
enum Step {
    /// Look further below.
    Below,
    /// Look further below, at another place.
    Elsewhere(TreePath),
    /// Nothing below shows.
    End,
    Whiteout,
    Leaf(Node),
}

impl Search<'_> {
    fn layer(&mut self, dir: &Dir) -> Result<Step, WalkError> {
        let Some(node) = dir.node(self.layers)?.child(&self.name).at(self.place)? else {
            return Ok(Step::Below);
        };
        if dir.is_whiteout(&node, self.layers.namespace).at(self.place)? {
            return Ok(Step::Whiteout);
        }
        if !node.is_dir() {
            return Ok(Step::Leaf(node));
        }
        self.folder(dir, node)
    }

    fn folder(&mut self, dir: &Dir, node: Node) -> Result<Step, WalkError> {
        let marks = Marks::of_dir(&node, self.layers.namespace).at(self.place)?;
        self.dirs.push(Dir::new(dir.layer, dir.path.join(&self.name), &marks, Rc::new(node)));
        if marks.opaque {
            return Ok(Step::End);
        }
        Ok(match redirect(marks.redirect.as_deref(), self.place)? {
            None => Step::Below,
            Some(Redirect::Sibling(name)) => {
                self.name = name;
                Step::Below
            }
            Some(Redirect::Absolute(path)) => Step::Elsewhere(path),
        })
    }

    fn redirected(&mut self, first: usize, path: &TreePath) -> Result<(), WalkError> {
        if let Found::Dir(view) = find(self.layers, first, path, self.place)? {
            self.dirs.extend(view.0);
        }
        Ok(())
    }
}

enum Redirect {
    Sibling(Vec<u8>),
    Absolute(TreePath),
}

/// Takes what the kernel takes: an absolute path, or one name.
fn redirect(value: Option<&[u8]>, place: &TreePath) -> Result<Option<Redirect>, WalkError> {
    let Some(value) = value else { return Ok(None) };
    let bad = || WalkError::BadRedirect(place.clone());
    let path = TreePath::parse(value).map_err(|_| bad())?;
    match value {
        [b'/', ..] => Ok(Some(Redirect::Absolute(path))),
        name if !name.is_empty() && path.as_bytes() == name && !name.contains(&b'/') => {
            Ok(Some(Redirect::Sibling(name.to_vec())))
        }
        _ => Err(bad()),
    }
}
