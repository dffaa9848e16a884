//! Who writes the nodes of a disk.

use super::ask;
use crate::command;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
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
