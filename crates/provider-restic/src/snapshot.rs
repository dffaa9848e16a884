//! Snapshots: a point is one, of a tree with `/disks/NAME.raw`, `/config/NAME` and `/point.json`.

use crate::{
    blob::{BlobKind, Id},
    crypto,
    error::{damaged, stored},
    index::{self, Location},
    repository::Repository,
    store::Folder,
    tree::{Node, Tree},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use stillpoint_model::{DiskName, Length, PointId, VmName};
use stillpoint_provider::{ConfigRole, Error, ErrorKind, PointRecord, Result};

/// Most bytes of a snapshot file, once unpacked.
const LARGEST: u64 = 64 << 20;
const READERS: usize = 4;
/// The tag of our snapshots.
pub(crate) const TAG: &str = "stillpoint";
/// Version of [`PointFile`].
const FORMAT: u32 = 1;

pub(crate) const DISKS: &str = "disks";
pub(crate) const CONFIG: &str = "config";
pub(crate) const POINT: &str = "point.json";

/// Name of a disk's file.
pub(crate) fn file_of(disk: &DiskName) -> String {
    format!("{disk}.raw")
}

/// A snapshot file, as restic's design document has it, and what rustic adds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SnapshotFile {
    /// RFC 3339.
    pub time: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Id>,
    pub tree: Id,
    pub paths: Vec<String>,
    #[serde(default)]
    pub hostname: String,
    #[serde(default)]
    pub username: String,
    #[serde(default)]
    pub tags: Option<Vec<String>>,
    #[serde(default)]
    pub program_version: String,
    /// [`Description`] as JSON. restic drops it when it changes a snapshot; `/point.json` stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

impl SnapshotFile {
    fn is_ours(&self) -> bool {
        self.tags.iter().flatten().any(|tag| tag == TAG)
    }
}

/// What a listing needs, in the snapshot itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Description {
    pub sequence: u64,
    /// Bytes that the point added to the repository.
    pub stored: Length,
    /// Chunk size of each disk, in bytes.
    pub chunks: BTreeMap<DiskName, u64>,
    pub record: PointRecord,
}

/// `/point.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct PointFile {
    pub format: u32,
    #[serde(flatten)]
    pub description: Description,
    pub config: Vec<ConfigEntry>,
}

/// A file in `/config`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ConfigEntry {
    pub name: DiskName,
    pub role: ConfigRole,
}

impl PointFile {
    pub(crate) fn new(description: Description, config: Vec<ConfigEntry>) -> Self {
        Self { format: FORMAT, description, config }
    }

    fn parse(json: &[u8]) -> Result<Self> {
        let point: Self = serde_json::from_slice(json)
            .map_err(|error| damaged("/point.json cannot be read").because(error))?;
        if point.format == FORMAT {
            return Ok(point);
        }
        Err(damaged(format!("/point.json is of format {}, which a newer version made", point.format)))
    }
}

/// A snapshot of ours, found in a repository.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// Of the snapshot.
    pub id: Id,
    pub tree: Id,
    pub point: std::result::Result<Description, String>,
    /// As far as tags and host tell, which is what is left when the rest is damaged.
    pub vm: VmName,
    pub point_id: PointId,
}

impl Found {
    pub(crate) fn sequence(&self) -> u64 {
        self.point.as_ref().map_or(0, |point| point.sequence)
    }
}

/// What listing the snapshots gives.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// Ours, in the order in which the points were made.
    pub points: Vec<Found>,
    /// Snapshot files that cannot be read, and why.
    pub damaged: Vec<(String, String)>,
}

/// The tag by which a point is found again.
pub(crate) fn point_tag(point: &PointId) -> String {
    format!("point={point}")
}

/// One snapshot file.
pub(crate) fn read(repository: &Repository, name: &str) -> Result<SnapshotFile> {
    let json = repository.read_file(Folder::Snapshots, name, LARGEST)?;
    serde_json::from_slice(&json).map_err(|error| damaged(format!("snapshot {name} is none")).because(error))
}

/// All snapshot files, whoever made them, and the reasons for those that cannot be read.
pub(crate) fn read_all(repository: &Repository) -> Result<Vec<(String, Result<SnapshotFile>)>> {
    let files = repository.store.list(Folder::Snapshots);
    let files = files.map_err(|error| stored("cannot list the snapshots", error))?;
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some((name, _)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let read = read(repository, name);
            if let Ok(mut found) = found.lock() {
                found.push((name.clone(), read));
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..READERS.min(files.len()) {
            scope.spawn(work);
        }
        work();
    });
    found.into_inner().map_err(|_| damaged("reading the snapshots failed"))
}

/// The points of one VM or of all.
pub(crate) fn list(repository: &Repository, vm: Option<&VmName>) -> Result<Listing> {
    let (mut listing, mut trees) = (Listing::default(), None);
    for (name, snapshot) in read_all(repository)? {
        let snapshot = match snapshot {
            Ok(snapshot) => snapshot,
            Err(error) => {
                listing.damaged.push((name, crate::error::in_one_line(&error)));
                continue;
            }
        };
        if !snapshot.is_ours() || vm.is_some_and(|vm| vm.as_str() != snapshot.hostname) {
            continue;
        }
        let Some(id) = Id::parse(&name) else { continue };
        let tagged = snapshot.tags.iter().flatten().find_map(|tag| tag.strip_prefix("point="));
        let point_id = tagged.and_then(|tag| tag.parse::<PointId>().ok());
        let (Some(point_id), Ok(vm)) = (point_id, snapshot.hostname.parse::<VmName>()) else {
            listing.damaged.push((name, "its tags name no VM and no point".to_owned()));
            continue;
        };
        let described =
            snapshot.description.as_deref().and_then(|text| serde_json::from_str::<Description>(text).ok());
        let point = match described {
            Some(point) => Ok(point),
            None => from_contents(repository, &mut trees, &snapshot.tree),
        };
        let point = match point {
            Ok(point) if point.record.id == point_id && point.record.vm == vm => Ok(point),
            Ok(point) => Err(format!("it says that it is {}/{}", point.record.vm, point.record.id)),
            Err(error) => Err(crate::error::in_one_line(&error)),
        };
        listing.points.push(Found { id, tree: snapshot.tree, point, vm, point_id });
    }
    listing.points.sort_by(|a, b| (a.sequence(), &a.point_id, a.id).cmp(&(b.sequence(), &b.point_id, b.id)));
    // Changing a snapshot's tags, or copying it, makes another of the same point.
    listing.points.dedup_by(|a, b| a.vm == b.vm && a.point_id == b.point_id);
    Ok(listing)
}

/// What a snapshot that another program changed says of itself. The index is read once for all of them.
fn from_contents(
    repository: &Repository,
    trees: &mut Option<HashMap<Id, Location>>,
    tree: &Id,
) -> Result<Description> {
    let trees = match trees {
        Some(trees) => trees,
        None => trees.insert(index::trees(repository)?),
    };
    Ok(Contents::open(repository, trees, tree)?.point.description)
}

/// Writes a snapshot; it is durable when this returns.
///
/// # Errors
/// With `CommitUnknown` if it may be there all the same.
pub(crate) fn write(repository: &Repository, snapshot: &SnapshotFile) -> Result<Id> {
    let json = serde_json::to_vec(snapshot)
        .map_err(|error| Error::new(ErrorKind::Io, "the snapshot cannot be written").because(error))?;
    let sealed = crypto::seal_file(&repository.key, repository.compress, &json)?;
    let id = Id::of(&sealed);
    let name = id.to_string();
    let written = repository.store.write(Folder::Snapshots, &name, &[Bytes::from(sealed)]);
    if let Err(error) = written {
        // A request that failed may have been carried out.
        return match repository.store.list(Folder::Snapshots) {
            Ok(names) if names.iter().all(|(there, _)| *there != name) => {
                Err(stored("cannot write the snapshot", error))
            }
            _ => {
                Err(Error::new(ErrorKind::CommitUnknown, "whether the point is there is unknown")
                    .because(error))
            }
        };
    }
    let synced = repository.store.sync();
    synced.map_err(|error| {
        Error::new(ErrorKind::CommitUnknown, "whether the point lasts is unknown").because(error)
    })?;
    Ok(id)
}

/// What is in a snapshot.
pub(crate) struct Contents {
    pub point: PointFile,
    /// Nodes of `/disks` by file name.
    pub disks: HashMap<String, Node>,
    pub config: HashMap<String, Node>,
}

impl Contents {
    /// Reads the trees and `/point.json`.
    pub(crate) fn open(repository: &Repository, trees: &HashMap<Id, Location>, tree: &Id) -> Result<Self> {
        let (mut disks, mut config, mut point) = (HashMap::new(), HashMap::new(), None);
        for node in read_tree(repository, trees, tree)?.nodes {
            match node.name.as_str() {
                DISKS => disks = below(repository, trees, &node)?,
                CONFIG => config = below(repository, trees, &node)?,
                POINT => point = node.content,
                _ => {}
            }
        }
        let point = point.ok_or_else(|| damaged("the snapshot has no /point.json"))?;
        let point = PointFile::parse(&read_content(repository, &point)?)?;
        Ok(Self { point, disks, config })
    }
}

/// Nodes of `/disks` in a snapshot, by file name.
pub(crate) fn read_disks(
    repository: &Repository,
    trees: &HashMap<Id, Location>,
    tree: &Id,
) -> Result<HashMap<String, Node>> {
    let disks = read_tree(repository, trees, tree)?.take(DISKS);
    below(repository, trees, &disks.ok_or_else(|| damaged("the snapshot has no /disks"))?)
}

fn below(
    repository: &Repository,
    trees: &HashMap<Id, Location>,
    node: &Node,
) -> Result<HashMap<String, Node>> {
    let subtree = node.subtree.ok_or_else(|| damaged(format!("/{} is no directory", node.name)))?;
    let nodes = read_tree(repository, trees, &subtree)?.nodes;
    Ok(nodes.into_iter().map(|node| (node.name.clone(), node)).collect())
}

/// A directory.
pub(crate) fn read_tree(repository: &Repository, trees: &HashMap<Id, Location>, id: &Id) -> Result<Tree> {
    let place = trees.get(id).ok_or_else(|| damaged(format!("tree blob {id} is in no index")))?;
    Tree::parse(&repository.read_blob(BlobKind::Tree, id, place)?)
}

/// A small file, read whole.
pub(crate) fn read_content(repository: &Repository, content: &[Id]) -> Result<Vec<u8>> {
    let places = index::locate(repository, BlobKind::Data, &content.iter().copied().collect())?;
    let mut bytes = Vec::new();
    for id in content {
        let place = places.get(id).ok_or_else(|| damaged(format!("data blob {id} is in no index")))?;
        bytes.extend(repository.read_blob(BlobKind::Data, id, place)?);
    }
    Ok(bytes)
}
