//! What there is: the machine's version and state, its disks, and the bitmaps on them. Reads only.

mod front_end;
mod graph;
mod iothread;
mod writers;

pub(crate) use writers::Descriptor;

use crate::{
    command,
    direct::{ImageFile, ImageFormat},
    error::{Error, ErrorKind, Result},
    image_id::ImageId,
    layers::{ChainBitmap, Layers},
    offline::OfflineDisk,
};
pub use front_end::FrontEnd;
use front_end::{disk_name, is_flash};
use graph::Graph;
use serde::Deserialize;
use serde_json::Value;
use std::path::PathBuf;
use stillpoint_model::{DiskName, Generation, Granularity, Length, NodeName, TargetId};
use stillpoint_provider::Skipped;
use stillpoint_qmp::{Command, ErrorKind as QmpErrorKind, Qmp, Version};

/// The first QEMU whose copy-before-write filter can let go of a snapshot instead of failing the guest.
const OLDEST_QEMU: (u32, u32, u32) = (7, 1, 0);

/// QEMU has one NBD server, and whoever started it would lose their exports with ours.
pub(crate) const SERVER_IN_USE: &str = "QEMU's one NBD server is already in use, by a storage migration or another backup tool; try again when it has ended";

/// A running VM, as it was when it was looked at.
#[derive(Debug)]
pub struct Machine {
    /// Version of QEMU.
    pub qemu: Version,
    /// The name it was given (`-name`), if any.
    pub name: Option<String>,
    /// Whether its virtual CPUs run.
    pub running: bool,
    /// QEMU's word for its state (`running`, `paused`, `shutdown`, ...).
    pub status: String,
    /// Whether no QEMU runs it, and its images were opened by themselves.
    pub off: bool,
    /// Its disks, in QEMU's order, media in removable drives among them.
    pub disks: Vec<Disk>,
    /// Its block devices that are not backed up, and why that loses nothing.
    pub skipped: Vec<Skipped>,
    /// What the user has to know of a disk.
    pub warnings: Vec<(DiskName, String)>,
    /// Whether `stop` could make a disk of it hang for good.
    pub(crate) stop_is_unsafe: bool,
    /// Disks in the way of a backup unless they are excluded, and why.
    pub obstacles: Vec<(DiskName, String)>,
}

/// One disk of a running VM.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Named by its front end's qdev id.
    pub name: DiskName,
    /// QOM path of the front end, whose property `drive` is the node.
    pub(crate) front_end: String,
    /// The node that the front end reads and writes.
    pub(crate) node: NodeName,
    /// Size in bytes as the guest sees it.
    pub size: Length,
    /// Driver of the node (`qcow2`, `raw`, ...).
    pub format: String,
    /// The image's file, as QEMU tells it; for flushing its caches and for messages.
    pub image: Option<PathBuf>,
    /// The image itself, if it can be reached from here.
    pub(crate) image_file: Option<ImageFile>,
    /// Whether the image can hold a bitmap across QEMU's end.
    pub(crate) keeps_bitmaps: bool,
    /// Whether the guest cannot write it. Then nothing has to be kept aside for it, and it takes no bitmap.
    pub read_only: bool,
    /// Whether a bitmap on it would be of use to the next run.
    pub(crate) takes_bitmaps: bool,
    /// Which image it is, for the names of bitmaps on it.
    pub(crate) image_id: Option<ImageId>,
    /// The bitmaps of ours on it and on the images below it.
    pub(crate) bitmaps: Vec<ChainBitmap>,
}

impl Disk {
    /// Bitmaps that record all changes since a point in `target`, with that point and their granularity.
    pub fn usable_bitmaps(&self, target: &TargetId) -> impl Iterator<Item = (&Generation, Granularity)> {
        let of_target = self.bitmaps.iter().filter(move |bitmap| bitmap.target == *target);
        of_target
            .filter(|bitmap| bitmap.fault.is_none())
            .map(|bitmap| (&bitmap.generation, bitmap.granularity))
    }

    /// The bitmap that such an increment is read by.
    pub(crate) fn usable_bitmap(&self, target: &TargetId, generation: &Generation) -> Option<&ChainBitmap> {
        let fits = |bitmap: &&ChainBitmap| {
            bitmap.target == *target && bitmap.generation == *generation && bitmap.fault.is_none()
        };
        self.bitmaps.iter().find(fits)
    }

    /// The targets that it has bitmaps of ours for, fit for use or not.
    pub fn targets(&self) -> impl Iterator<Item = &TargetId> {
        self.bitmaps.iter().map(|bitmap| &bitmap.target)
    }

    /// Whether there is any bitmap of ours for `target`, fit for use or not: proof that this disk has points there.
    pub fn has_bitmap(&self, target: &TargetId) -> bool {
        self.bitmaps.iter().any(|bitmap| bitmap.target == *target)
    }

    /// Why a bitmap that is there for `target` cannot be relied on, if there is such a one.
    pub fn bitmap_fault(&self, target: &TargetId) -> Option<&'static str> {
        self.bitmaps.iter().filter(|bitmap| bitmap.target == *target).find_map(|bitmap| bitmap.fault)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Block {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    #[serde(default)]
    removable: bool,
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Inserted {
    pub(crate) node_name: Option<NodeName>,
    pub(crate) drv: String,
    #[serde(default)]
    pub(crate) file: String,
    #[serde(default)]
    ro: bool,
    pub(crate) image: Image,
    #[serde(default)]
    pub(crate) dirty_bitmaps: Vec<Bitmap>,
}

impl Inserted {
    /// Whether the image can hold a bitmap: a qcow2 image of a version that has extensions.
    pub(crate) fn keeps_bitmaps(&self) -> bool {
        self.drv == "qcow2"
            && self.image.format_specific.as_ref().and_then(|specific| specific.pointer("/data/compat"))
                != Some(&Value::from("0.10"))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Image {
    pub(crate) virtual_size: Length,
    format_specific: Option<Value>,
}

#[derive(Deserialize)]
pub(crate) struct Bitmap {
    pub(crate) name: Option<String>,
    pub(crate) granularity: u64,
    #[serde(default)]
    pub(crate) recording: bool,
    #[serde(default)]
    pub(crate) busy: bool,
    #[serde(default)]
    pub(crate) inconsistent: bool,
    #[serde(default)]
    pub(crate) persistent: bool,
}

#[derive(Deserialize)]
struct Status {
    running: bool,
    status: String,
}

impl Machine {
    /// Looks at the VM.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if nothing of this VM can be backed up safely as it is now; the message says why.
    /// A single disk in the way is an obstacle, not an error, since it may be excluded.
    pub async fn inspect(qmp: &Qmp) -> Result<Self> {
        let qemu = qmp.version().clone();
        refuse_old(&qemu)?;
        let status: Status = ask(qmp, command::query_status()).await?;
        let name = qmp.execute(command::query_name()).await.ok();
        let name = name.and_then(|reply| Some(reply.get("name")?.as_str()?.to_owned()));
        let mut machine = Self {
            qemu,
            name,
            running: status.running,
            status: status.status,
            off: false,
            disks: Vec::new(),
            skipped: Vec::new(),
            warnings: Vec::new(),
            stop_is_unsafe: false,
            obstacles: Vec::new(),
        };
        machine.refuse_what_others_do(qmp).await?;
        let blocks: Vec<Block> = ask(qmp, command::query_block()).await?;
        let graph = Graph::of(qmp).await;
        for block in blocks {
            machine.add(qmp, block, &graph).await?;
        }
        machine.find_disks_without_node(qmp).await?;
        machine.find_iothreads(qmp).await?;
        machine.find_images(qmp).await?;
        machine.find_other_writers(qmp).await;
        Ok(machine)
    }

    /// Looks at images that were opened without their VM: disks and the names of their nodes.
    pub(crate) async fn inspect_offline(qmp: &Qmp, disks: &[(OfflineDisk, String)]) -> Result<Self> {
        let nodes: Vec<Inserted> = ask(qmp, command::query_nodes()).await?;
        let mut machine = Self {
            qemu: qmp.version(),
            name: None,
            running: false,
            status: "off".into(),
            off: true,
            disks: Vec::new(),
            skipped: Vec::new(),
            warnings: Vec::new(),
            stop_is_unsafe: false,
            obstacles: Vec::new(),
        };
        for (disk, node) in disks {
            let found =
                nodes.iter().find(|found| found.node_name.as_ref().is_some_and(|name| name.as_str() == node));
            let Some((node, found)) = found.and_then(|found| Some((found.node_name.clone()?, found))) else {
                return Err(Error::new(ErrorKind::Inconsistent, format!("node {node} is not there")));
            };
            let keeps_bitmaps = found.keeps_bitmaps();
            machine.disks.push(Disk {
                name: disk.name.clone(),
                front_end: String::new(),
                node,
                size: found.image.virtual_size,
                format: found.drv.clone(),
                image: Some(disk.image.clone()),
                image_file: None,
                keeps_bitmaps,
                read_only: found.ro,
                takes_bitmaps: keeps_bitmaps && !found.ro,
                image_id: None,
                bitmaps: Vec::new(),
            });
        }
        machine.find_images(qmp).await?;
        Ok(machine)
    }

    async fn refuse_what_others_do(&self, qmp: &Qmp) -> Result<()> {
        let migration: Value = ask(qmp, command::query_migrate()).await?;
        if let Some(state) = migration_under_way(&migration) {
            return Err(refused(format!(
                "a migration of this VM is under way (status {state}); try again when it has ended"
            )));
        }
        if matches!(self.status.as_str(), "inmigrate" | "postmigrate" | "finish-migrate") {
            return Err(refused(format!("this VM is being migrated (state {})", self.status)));
        }
        let jobs: Vec<Value> = ask(qmp, command::query_jobs()).await?;
        if let Some(job) = jobs.first() {
            let text = |key| job.get(key).and_then(Value::as_str).unwrap_or("?").escape_debug().to_string();
            return Err(refused(format!(
                "a block job ({}) works on disk {}; a backup would change the block graph under it. Try again when it has ended",
                text("type"),
                text("device")
            )));
        }
        match qmp.execute(command::probe_server()).await {
            Err(error) if error.desc().is_some_and(|desc| desc.contains("already running")) => {
                Err(refused(SERVER_IN_USE))
            }
            Err(error) if error.class().is_some() => Ok(()),
            Err(error) => Err(qmp_error("look for an NBD server", error)),
            // Never seen: there is no such descriptor.
            Ok(_) => qmp
                .execute(command::stop_server())
                .await
                .map(|_| ())
                .map_err(|error| qmp_error("stop a server", error)),
        }
    }

    async fn add(&mut self, qmp: &Qmp, block: Block, graph: &Graph) -> Result<()> {
        let node = block.inserted.as_ref().and_then(|inserted| inserted.node_name.clone());
        let node_name = node.as_ref().map(NodeName::as_str).unwrap_or_default();
        let Some(qdev) = block.qdev else {
            let name = if block.device.is_empty() { node_name } else { &block.device };
            self.skip(name, "no device of the guest uses this drive");
            return Ok(());
        };
        let name = disk_name(&qdev, &block.device, node_name)?;
        let front_end = front_end::path(&qdev);
        let Some(inserted) = block.inserted else {
            if block.removable {
                self.skip(name.as_str(), "the drive is empty");
            } else {
                self.obstacles.push((name, "its front end has no drive".into()));
            }
            return Ok(());
        };
        let keeps_bitmaps = inserted.keeps_bitmaps();
        let Some(node) = node else {
            self.obstacles.push((name, "QEMU tells no node name for it".into()));
            return Ok(());
        };
        if inserted.ro && is_flash(&front_end) {
            self.skip(name.as_str(), "it is the firmware's code, which only the host's packages change");
            return Ok(());
        }
        let device = self.look_at_front_end(qmp, &front_end, &name).await?;
        let known_as = if block.device.is_empty() { &qdev } else { &block.device };
        if let Some(who) = graph.other_writer(node.as_str(), known_as) {
            let why = format!("{who} writes it too, past what holds the instant");
            self.obstacles.push((name.clone(), why));
        }
        if self.disks.iter().any(|disk| disk.name == name) {
            return Err(refused(format!(
                "two disks are called {name}; give their front ends ids of their own"
            )));
        }
        let read_only = inserted.ro || device == FrontEnd::ReadOnly;
        self.disks.push(Disk {
            name,
            front_end,
            node,
            size: inserted.image.virtual_size,
            format: inserted.drv,
            image: (inserted.file.starts_with('/')).then(|| PathBuf::from(inserted.file)),
            image_file: None,
            keeps_bitmaps,
            read_only,
            takes_bitmaps: !read_only,
            image_id: None,
            bitmaps: Vec::new(),
        });
        Ok(())
    }

    fn skip(&mut self, name: &str, reason: &str) {
        self.skipped.push(Skipped { name: name.to_owned(), reason: reason.to_owned() });
    }
}

impl Machine {
    /// Looks at the images of each disk.
    async fn find_images(&mut self, qmp: &Qmp) -> Result<()> {
        let graph = crate::graph::Graph::ask(qmp).await?;
        for disk in &mut self.disks {
            let Some(top) = graph.node(&disk.node) else { continue };
            let layers = Layers::of(&graph, qmp.peer_pid(), &disk.name, top).await?;
            (disk.image_id, disk.bitmaps) = (layers.image, layers.bitmaps);
            disk.image_file = image_file(&graph, qmp.peer_pid(), disk).await;
        }
        Ok(())
    }
}

/// The file or block device of a disk: of a node of a format that we read, right above a `file` or `host_device` one, with
/// nothing in between that could throttle, fail or change what is read.
async fn image_file(graph: &crate::graph::Graph, qemu: Option<u32>, disk: &Disk) -> Option<ImageFile> {
    let format = ImageFormat::of(&disk.format)?;
    let file = graph.child(&disk.node, "file")?;
    let plain = matches!(file.drv.as_str(), "file" | "host_device");
    if plain { ImageFile::find(qemu?, file.file.as_ref(), format).await } else { None }
}

/// The state of a migration, by the reply to `query-migrate`, if one is under way.
pub(crate) fn migration_under_way(migration: &Value) -> Option<&str> {
    let state = migration.get("status").and_then(Value::as_str).unwrap_or("none");
    (!matches!(state, "none" | "completed" | "failed" | "cancelled")).then_some(state)
}

/// Refuses a QEMU that cannot do what is needed; to be asked before anything else, since an old one lacks commands.
pub(crate) fn refuse_old(qemu: &Version) -> Result<()> {
    if qemu.number() < OLDEST_QEMU {
        return Err(refused(format!(
            "QEMU {qemu} is too old: 7.1 is the first that can drop a snapshot instead of failing the guest's writes"
        )));
    }
    Ok(())
}

pub(crate) fn refused(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Refused, why)
}

pub(crate) fn qmp_error(doing: &str, error: stillpoint_qmp::Error) -> Error {
    let kind = match error.kind() {
        QmpErrorKind::Timeout(_) | QmpErrorKind::Silent => ErrorKind::Silent,
        _ => ErrorKind::Qmp,
    };
    Error::new(kind, doing).because(error)
}

/// Asks and takes the reply apart.
pub(crate) async fn ask<T: serde::de::DeserializeOwned>(qmp: &Qmp, command: Command) -> Result<T> {
    let what = command.name();
    let reply =
        qmp.execute(command).await.map_err(|error| qmp_error(&format!("ask QEMU ({what})"), error))?;
    serde_json::from_value(reply).map_err(|error| {
        Error::new(ErrorKind::Inconsistent, format!("QEMU's reply to {what} is not of the known form"))
            .because(error)
    })
}
