//! The block graph: which node stands on which, who else writes one, and which images can be read past QEMU.

use super::{Inserted, Machine, ask};
use crate::{
    command,
    direct::{ImageFile, ImageFormat},
    error::Result,
};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use stillpoint_model::NodeName;
use stillpoint_qmp::Qmp;

/// Nodes, and what uses them: devices, exports and other nodes.
#[derive(Default, Deserialize)]
pub(super) struct Graph {
    #[serde(default)]
    nodes: Vec<Vertex>,
    #[serde(default)]
    edges: Vec<Edge>,
}

#[derive(Deserialize)]
struct Vertex {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Edge {
    parent: u64,
    child: u64,
    name: String,
    #[serde(default)]
    perm: Vec<String>,
}

impl Edge {
    /// Whether the parent keeps what it stores in the child. A backing file is only read.
    fn holds_the_data(&self) -> bool {
        matches!(self.name.as_str(), "file" | "data-file")
    }

    fn writes(&self) -> bool {
        self.perm.iter().any(|permission| permission == "write")
    }
}

impl Graph {
    /// As QEMU tells it; empty if it has no such command any more.
    pub(super) async fn of(qmp: &Qmp) -> Self {
        ask(qmp, command::query_graph()).await.unwrap_or_default()
    }

    /// Who writes a node, or one that it stands on, past the front end that the graph calls `own`; in words.
    ///
    /// What a second device or an export writes to the same node is in the bitmap, but not held by the filter, which is
    /// between the front end and the node. What somebody writes further below is in neither.
    pub(super) fn other_writer(&self, node: &str, own: &str) -> Option<String> {
        let vertices: BTreeMap<u64, &Vertex> = self.nodes.iter().map(|vertex| (vertex.id, vertex)).collect();
        let top = self.nodes.iter().find(|vertex| vertex.kind == "block-driver" && vertex.name == node)?.id;
        let (mut above, mut rest, mut seen) = (BTreeSet::from([top]), vec![top], BTreeSet::new());
        while let Some(at) = rest.pop() {
            if !seen.insert(at) {
                continue;
            }
            for edge in self.edges.iter().filter(|edge| edge.child == at && edge.writes()) {
                let Some(parent) = vertices.get(&edge.parent) else { continue };
                let front_end = at == top && parent.kind == "block-backend" && parent.name == own;
                if front_end || above.contains(&edge.parent) {
                    continue;
                }
                let name = parent.name.escape_debug();
                return Some(match parent.kind.as_str() {
                    "block-backend" if parent.name.is_empty() => "an export".to_owned(),
                    "block-backend" => format!("device {name}"),
                    _ => format!("node {name}"),
                });
            }
            let below = self.edges.iter().filter(|edge| edge.parent == at && edge.holds_the_data());
            for edge in below {
                above.insert(at);
                rest.push(edge.child);
            }
        }
        None
    }

    /// For each node the one that it stands on (its child `file`).
    fn children(&self) -> BTreeMap<String, String> {
        let names: BTreeMap<u64, &str> =
            self.nodes.iter().map(|vertex| (vertex.id, vertex.name.as_str())).collect();
        let files = self.edges.iter().filter(|edge| edge.name == "file");
        let pair = |edge: &Edge| {
            Some(((*names.get(&edge.parent)?).to_owned(), (*names.get(&edge.child)?).to_owned()))
        };
        files.filter_map(pair).collect()
    }
}

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

/// For each node the one that it stands on, as the graph says; nothing if QEMU has no such command.
pub(crate) async fn children(qmp: &Qmp) -> BTreeMap<String, String> {
    Graph::of(qmp).await.children()
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    fn graph(edges: &[(u64, u64, &str, bool)]) -> Graph {
        let vertices = [
            (1, "block-driver", "disk"),
            (2, "block-driver", "disk-file"),
            (3, "block-backend", "/machine/peripheral/vda/virtio-backend"),
            (4, "block-backend", ""),
            (5, "block-driver", "second"),
            (6, "block-backend", "vdb"),
        ];
        let vertices = vertices.map(|(id, kind, name)| json!({"id": id, "type": kind, "name": name}));
        let edges: Vec<_> = edges
            .iter()
            .map(|(parent, child, name, writes)| {
                let perm: &[&str] =
                    if *writes { &["consistent-read", "write"] } else { &["consistent-read"] };
                json!({"parent": parent, "child": child, "name": name, "perm": perm, "shared-perm": []})
            })
            .collect();
        serde_json::from_value(json!({"nodes": vertices, "edges": edges})).unwrap()
    }

    #[test]
    fn whoever_writes_beside_the_front_end_is_found() {
        let own = "/machine/peripheral/vda/virtio-backend";
        let writer = |more: &[(u64, u64, &str, bool)]| {
            let edges = [&[(3, 1, "root", true), (1, 2, "file", true)], more].concat();
            graph(&edges).other_writer("disk", own)
        };
        assert_eq!(writer(&[]), None);
        assert_eq!(writer(&[(4, 1, "root", false), (5, 1, "backing", false)]), None, "they only read");
        assert_eq!(writer(&[(4, 1, "root", true)]).unwrap(), "an export");
        assert_eq!(writer(&[(6, 1, "root", true)]).unwrap(), "device vdb");
        assert_eq!(writer(&[(5, 2, "file", true)]).unwrap(), "node second");
        assert_eq!(writer(&[(6, 2, "root", true)]).unwrap(), "device vdb");
        assert_eq!(writer(&[(2, 1, "file", false)]), None, "a graph with a loop ends the search too");
        assert_eq!(Graph::default().other_writer("disk", own), None);
    }
}
