//! The bitmaps of ours in a VM or in its images: seen and removed, whatever state they are in.

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    inspect::{ask, qmp_error},
    names::ChainName,
};
use serde_json::Value;
use stillpoint_model::{DiskName, Generation, Length, NodeName, TargetId};
use stillpoint_qmp::Qmp;

/// A bitmap that records what changed on a disk since a point.
#[derive(Debug, Clone)]
pub struct PointBitmap {
    /// The disk.
    pub disk: DiskName,
    /// The target that has the point.
    pub target: TargetId,
    /// The point.
    pub point: Generation,
    /// The node that it is on: the disk's own, or one of an image below it.
    pub node: NodeName,
    /// Bytes that it marks as changed.
    pub dirty: Length,
    /// Bytes a bit.
    pub granularity: Length,
    /// Whether it is stored in the image.
    pub persistent: bool,
    /// Whether QEMU did not end cleanly while it recorded, so that it is of no use.
    pub inconsistent: bool,
    /// Whether QEMU has its image for reading only, since others are above it.
    pub read_only: bool,
    name: String,
}

impl PointBitmap {
    /// All of this QEMU, on disks and on images below them. Nobody else's are among them.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub async fn all(qmp: &Qmp) -> Result<Vec<Self>> {
        let nodes: Vec<Value> = ask(qmp, command::query_nodes()).await?;
        let mut found = Vec::new();
        for node in &nodes {
            let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array);
            found.extend(bitmaps.into_iter().flatten().filter_map(|bitmap| Self::of(node, bitmap)));
        }
        found.sort_by(|a, b| (&a.disk, &a.target, &a.point).cmp(&(&b.disk, &b.target, &b.point)));
        Ok(found)
    }

    fn of(node: &Value, bitmap: &Value) -> Option<Self> {
        let name = bitmap.get("name")?.as_str()?;
        let told = ChainName::parse(name)?;
        let is = |of: &Value, key: &str| of.get(key).and_then(Value::as_bool).unwrap_or(false);
        let bytes = |key: &str| Length::new(bitmap.get(key).and_then(Value::as_u64).unwrap_or(0));
        Some(Self {
            disk: told.disk,
            target: told.target,
            point: told.generation,
            node: node.get("node-name")?.as_str()?.parse().ok()?,
            dirty: bytes("count"),
            granularity: bytes("granularity"),
            persistent: is(bitmap, "persistent"),
            inconsistent: is(bitmap, "inconsistent"),
            read_only: is(node, "ro"),
            name: name.to_owned(),
        })
    }

    /// Removes it. The disk's next point in that target is a full one.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if QEMU has the image for reading only, or the bitmap is in use.
    pub async fn remove(&self, qmp: &Qmp) -> Result<()> {
        match qmp.execute(command::remove_bitmap(self.node.as_str(), &self.name)).await {
            Ok(_) => Ok(()),
            Err(error) if error.class().is_some() => {
                let context = format!("QEMU does not remove bitmap {} of disk {}", self.name, self.disk);
                Err(Error::new(ErrorKind::Refused, context).because(error))
            }
            Err(error) => Err(qmp_error("remove a bitmap", error)),
        }
    }
}
