//! What there is: the machine's version and state, its disks, and the bitmaps on them. Reads only.

use crate::{
    command,
    direct::{ImageFile, ImageFormat},
    error::{Error, ErrorKind, Result},
    names,
    offline::OfflineDisk,
};
use serde::Deserialize;
use serde_json::Value;
use std::{collections::BTreeMap, path::PathBuf};
use stillpoint_model::{BitmapName, DiskName, Generation, Granularity, Length, NodeName, TargetId};
use stillpoint_qmp::{Command, ErrorKind as QmpErrorKind, Qmp, Version};

/// The first QEMU whose copy-before-write filter can let go of a snapshot instead of failing the guest.
const OLDEST_QEMU: (u32, u32, u32) = (7, 1, 0);
/// Below this an NBD export of a node in an iothread aborts QEMU (fixed in 8.2.1 and 9.0).
const IOTHREADS_FROM: (u32, u32, u32) = (8, 2, 1);
/// From here on `stop` can lose an interrupt that an iothread is about to send (ADR 0017).
const STOP_LOSES_INTERRUPTS_FROM: (u32, u32, u32) = (8, 2, 0);

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
    /// Its disks, in QEMU's order. Removable media are not disks.
    pub disks: Vec<Disk>,
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
    /// Whether a bitmap on it would be of use to the next run.
    pub(crate) takes_bitmaps: bool,
    /// The bitmaps of ours on it.
    pub(crate) bitmaps: Vec<ChainBitmap>,
}

/// A bitmap of ours, whatever its state.
#[derive(Debug, Clone)]
pub(crate) struct ChainBitmap {
    pub(crate) name: BitmapName,
    pub(crate) target: TargetId,
    pub(crate) generation: Generation,
    pub(crate) granularity: Granularity,
    /// Why it cannot be relied on, if so.
    pub(crate) fault: Option<&'static str>,
}

impl Disk {
    /// Bitmaps that record all changes since a point in `target`, with that point and their granularity.
    pub fn usable_bitmaps(&self, target: &TargetId) -> impl Iterator<Item = (&Generation, Granularity)> {
        let of_target = self.bitmaps.iter().filter(move |bitmap| bitmap.target == *target);
        of_target
            .filter(|bitmap| bitmap.fault.is_none())
            .map(|bitmap| (&bitmap.generation, bitmap.granularity))
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
struct Inserted {
    node_name: Option<NodeName>,
    drv: String,
    #[serde(default)]
    file: String,
    #[serde(default)]
    ro: bool,
    image: Image,
    #[serde(default)]
    dirty_bitmaps: Vec<Bitmap>,
}

impl Inserted {
    /// Whether the image can hold a bitmap: a qcow2 image of a version that has extensions.
    fn keeps_bitmaps(&self) -> bool {
        self.drv == "qcow2"
            && self.image.format_specific.as_ref().and_then(|specific| specific.pointer("/data/compat"))
                != Some(&Value::from("0.10"))
    }

    fn chain_bitmaps(&self, disk: &DiskName) -> Result<Vec<ChainBitmap>> {
        let keeps_bitmaps = self.keeps_bitmaps();
        let bitmaps = self.dirty_bitmaps.iter();
        bitmaps.filter_map(|bitmap| chain_bitmap(bitmap, disk, keeps_bitmaps).transpose()).collect()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    virtual_size: Length,
    format_specific: Option<Value>,
}

#[derive(Deserialize)]
struct Bitmap {
    name: Option<String>,
    granularity: u64,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    busy: bool,
    #[serde(default)]
    inconsistent: bool,
    #[serde(default)]
    persistent: bool,
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
            stop_is_unsafe: false,
            obstacles: Vec::new(),
        };
        machine.refuse_what_others_do(qmp).await?;
        let blocks: Vec<Block> = ask(qmp, command::query_block()).await?;
        for block in blocks {
            machine.add(block)?;
        }
        machine.find_iothreads(qmp).await?;
        machine.find_image_files(qmp).await?;
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
                takes_bitmaps: keeps_bitmaps && !found.ro,
                bitmaps: found.chain_bitmaps(&disk.name)?,
            });
        }
        machine.find_image_files(qmp).await?;
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
        Ok(())
    }

    fn add(&mut self, block: Block) -> Result<()> {
        // Without a front end the guest cannot write it.
        let Some(qdev) = block.qdev.filter(|_| !block.removable) else { return Ok(()) };
        let name = disk_name(&qdev, &block.device)?;
        let front_end = if qdev.starts_with('/') { qdev } else { format!("/machine/peripheral/{qdev}") };
        let Some(inserted) = block.inserted else {
            self.obstacles.push((name, "its front end has no drive".into()));
            return Ok(());
        };
        let (bitmaps, keeps_bitmaps) = (inserted.chain_bitmaps(&name)?, inserted.keeps_bitmaps());
        let Some(node) = inserted.node_name else {
            self.obstacles.push((name, "QEMU tells no node name for it".into()));
            return Ok(());
        };
        if inserted.ro {
            if is_flash(&front_end) {
                // The firmware's code, which belongs to the host's packages.
                return Ok(());
            }
            self.obstacles.push((name.clone(), "it is read-only".into()));
        }
        if self.disks.iter().any(|disk| disk.name == name) {
            return Err(refused(format!(
                "two disks are called {name}; give their front ends ids of their own"
            )));
        }
        self.disks.push(Disk {
            name,
            front_end,
            node,
            size: inserted.image.virtual_size,
            format: inserted.drv,
            image: (inserted.file.starts_with('/')).then(|| PathBuf::from(inserted.file)),
            image_file: None,
            keeps_bitmaps,
            takes_bitmaps: true,
            bitmaps,
        });
        Ok(())
    }

    async fn find_iothreads(&mut self, qmp: &Qmp) -> Result<()> {
        let threads: Vec<Value> = ask(qmp, command::query_iothreads()).await?;
        if threads.is_empty() {
            return Ok(());
        }
        // Whatever has it: a device that is not backed up would hang just the same.
        self.stop_is_unsafe = self.qemu.number() >= STOP_LOSES_INTERRUPTS_FROM;
        for disk in &self.disks {
            if self.qemu.number() < IOTHREADS_FROM && has_iothread(qmp, &disk.front_end).await? {
                let why = format!(
                    "it has an iothread, and QEMU {} aborts when such a disk is exported (fixed in 8.2.1)",
                    self.qemu
                );
                self.obstacles.push((disk.name.clone(), why));
            }
        }
        Ok(())
    }
}

impl Machine {
    /// Looks which disks are in a file or a block device: a node of a format that we read, right above a `file` or
    /// `host_device` one, with nothing in between that could throttle, fail or change what is read.
    async fn find_image_files(&mut self, qmp: &Qmp) -> Result<()> {
        let Some(pid) = qmp.peer_pid() else { return Ok(()) };
        let below = children(qmp).await;
        let nodes: Vec<Inserted> = ask(qmp, command::query_nodes()).await?;
        for disk in &mut self.disks {
            let Some(format) = ImageFormat::of(&disk.format) else { continue };
            let child = below.get(disk.node.as_str());
            let named =
                |node: &&Inserted| node.node_name.as_ref().map(NodeName::as_str) == child.map(String::as_str);
            let file = child.and_then(|_| nodes.iter().find(named));
            let file = file.filter(|node| matches!(node.drv.as_str(), "file" | "host_device"));
            disk.image_file = match file {
                Some(node) => ImageFile::find(pid, node.file.as_ref(), format).await,
                None => None,
            };
        }
        Ok(())
    }
}

/// For each node the one that it stands on (its child `file`), as the graph says; nothing if QEMU has no such command.
pub(crate) async fn children(qmp: &Qmp) -> BTreeMap<String, String> {
    let Ok(graph) = ask::<Value>(qmp, command::query_graph()).await else { return BTreeMap::new() };
    let list = |key: &str| graph.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let names: BTreeMap<u64, String> = list("nodes")
        .iter()
        .filter_map(|node| Some((node.get("id")?.as_u64()?, node.get("name")?.as_str()?.to_owned())))
        .collect();
    let edges = list("edges");
    let files = edges.iter().filter(|edge| edge.get("name").and_then(Value::as_str) == Some("file"));
    let pair = |edge: &Value| {
        let name = |key| names.get(&edge.get(key)?.as_u64()?).cloned();
        Some((name("parent")?, name("child")?))
    };
    files.filter_map(pair).collect()
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

/// Whether the device itself, or the controller that its bus belongs to, has an iothread.
async fn has_iothread(qmp: &Qmp, front_end: &str) -> Result<bool> {
    let mut start = vec![front_end.to_owned()];
    if let Ok(Value::String(bus)) = qmp.execute(command::qom_get(front_end, "parent_bus")).await {
        start.push(bus);
    }
    for path in start {
        let mut path = path.as_str();
        while !path.is_empty() && path != "/machine" {
            match qmp.execute(command::qom_get(path, "iothread")).await {
                Ok(Value::String(thread)) if !thread.is_empty() => return Ok(true),
                Ok(_) => {}
                // Most objects have no such property.
                Err(error) if error.class().is_some() => {}
                Err(error) => return Err(qmp_error("look for iothreads", error)),
            }
            path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
    }
    Ok(false)
}

/// What is wrong with a bitmap that has a name of ours and is not ours.
pub(crate) const FOREIGN: &str = "its bitmap was made by someone else";

fn chain_bitmap(bitmap: &Bitmap, disk: &DiskName, keeps_bitmaps: bool) -> Result<Option<ChainBitmap>> {
    let Some(name) = &bitmap.name else { return Ok(None) };
    let Some((target, generation, of_disk)) = names::parse_chain_bitmap(name) else { return Ok(None) };
    let fault = if of_disk != *disk {
        Some("its image was another disk's when the bitmap was made")
    } else if bitmap.inconsistent {
        Some("its bitmap is inconsistent: QEMU did not end cleanly")
    } else if bitmap.busy {
        Some("its bitmap is in use by something else")
    } else if !bitmap.recording {
        // It may have missed writes while it was off, and nothing tells since when.
        Some("its bitmap was disabled by someone else")
    } else if bitmap.persistent != keeps_bitmaps {
        // We make them persistent wherever that is possible, so this one is not ours, whatever its name.
        Some(FOREIGN)
    } else {
        None
    };
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(ErrorKind::Inconsistent, "QEMU describes a dirty bitmap that cannot be").because(error)
    };
    Ok(Some(ChainBitmap {
        name: name.parse().map_err(|error: stillpoint_model::NameError| wrong(error.into()))?,
        target,
        generation,
        granularity: Granularity::try_from(bitmap.granularity).map_err(|error| wrong(error.into()))?,
        fault,
    }))
}

/// Where a machine keeps its firmware's flash; the one that can be written has the UEFI variables.
const FLASH: &str = "/machine/system.flash";

fn is_flash(front_end: &str) -> bool {
    front_end.starts_with(FLASH)
}

/// The front end's id: `/machine/peripheral/ID/...` or the bare id; `pflashN` for the firmware's flash. A front end
/// without an id is named by its drive, which a legacy `-drive` always has.
fn disk_name(qdev: &str, device: &str) -> Result<DiskName> {
    let flash = qdev.strip_prefix(FLASH).map(|number| format!("pflash{number}"));
    let id = match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next().unwrap_or(rest),
        None if flash.is_some() => flash.as_deref().unwrap_or_default(),
        None if !qdev.starts_with('/') => qdev,
        None if !device.is_empty() => device,
        None => {
            return Err(refused(format!(
                "the disk at {} has no id; give its -device an id, which becomes the disk's name",
                qdev.escape_debug()
            )));
        }
    };
    id.parse().map_err(|error| {
        refused("a disk's id cannot be used as its name; give its -device another id").because(error)
    })
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_front_ends_id() {
        let name = |qdev, device| disk_name(qdev, device).map(String::from);
        assert_eq!(name("/machine/peripheral/vda/virtio-backend", "").unwrap(), "vda");
        assert_eq!(name("sd0", "").unwrap(), "sd0");
        assert_eq!(name("/machine/peripheral-anon/device[3]/virtio-backend", "virtio0").unwrap(), "virtio0");
        assert_eq!(name("/machine/system.flash1", "").unwrap(), "pflash1");
        assert!(name("/machine/peripheral-anon/device[3]", "").is_err());
        assert!(name("/machine/peripheral/..", "").is_err());
        assert!(name("\u{1b}[2J", "").unwrap_err().to_string().chars().all(|c| !c.is_control()));
    }
}
