//! The block graph: which node stands on which, and which images can be read past QEMU.

use super::{Inserted, Machine, ask};
use crate::{
    command,
    direct::{ImageFile, ImageFormat},
    error::Result,
};
use serde_json::Value;
use std::collections::BTreeMap;
use stillpoint_model::NodeName;
use stillpoint_qmp::Qmp;

impl Machine {
    /// Looks which disks are in a file or a block device: a node of a format that we read, right above a `file` or
    /// `host_device` one, with nothing in between that could throttle, fail or change what is read.
    pub(super) async fn find_image_files(&mut self, qmp: &Qmp) -> Result<()> {
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
