//! QEMU's block graph: nodes, and which stands on which.

use crate::{
    command,
    error::Result,
    inspect::{Inserted, ask},
};
use serde_json::Value;
use std::collections::BTreeMap;
use stillpoint_model::NodeName;
use stillpoint_qmp::Qmp;

/// The nodes of a QEMU and the edges between them, as they were when it was asked.
#[derive(Default)]
pub(crate) struct Graph {
    nodes: BTreeMap<String, Inserted>,
    /// By parent and role (`file`, `backing`, ...), the child.
    edges: BTreeMap<(String, String), String>,
}

impl Graph {
    /// Asks QEMU.
    pub(crate) async fn ask(qmp: &Qmp) -> Result<Self> {
        let nodes: Vec<Inserted> = ask(qmp, command::query_nodes()).await?;
        let named = |node: Inserted| Some((node.node_name.as_ref()?.as_str().to_owned(), node));
        Ok(Self { nodes: nodes.into_iter().filter_map(named).collect(), edges: edges(qmp).await })
    }

    /// The node of that name.
    pub(crate) fn node(&self, name: &NodeName) -> Option<&Inserted> {
        self.nodes.get(name.as_str())
    }

    /// What `parent` has in that role.
    pub(crate) fn child(&self, parent: &NodeName, role: &str) -> Option<&Inserted> {
        self.nodes.get(self.edges.get(&(parent.as_str().to_owned(), role.to_owned()))?)
    }

    /// Below `node`, by one `file` after the other (filters for debugging call theirs `image`), what has no such child any more: the node
    /// that reads and writes the image itself.
    pub(crate) fn bottom<'a>(&'a self, node: &'a Inserted) -> &'a Inserted {
        let mut bottom = node;
        // A graph has no circles, and a peer's word is not relied on for that.
        for _ in 0..self.nodes.len() {
            let below = |name| self.child(name, "file").or_else(|| self.child(name, "image"));
            match bottom.node_name.as_ref().and_then(below) {
                Some(below) => bottom = below,
                None => break,
            }
        }
        bottom
    }
}

/// For each node the one that it stands on (its child `file`).
pub(crate) async fn children(qmp: &Qmp) -> BTreeMap<String, String> {
    let edges = edges(qmp).await.into_iter();
    edges.filter(|((_, role), _)| role == "file").map(|((parent, _), child)| (parent, child)).collect()
}

/// By parent and role, the child; nothing if QEMU has no such command.
async fn edges(qmp: &Qmp) -> BTreeMap<(String, String), String> {
    let Ok(graph) = ask::<Value>(qmp, command::query_graph()).await else { return BTreeMap::new() };
    let list = |key: &str| graph.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let names: BTreeMap<u64, String> = list("nodes")
        .iter()
        .filter_map(|node| Some((node.get("id")?.as_u64()?, node.get("name")?.as_str()?.to_owned())))
        .collect();
    let edge = |edge: &Value| {
        let name = |key| names.get(&edge.get(key)?.as_u64()?).cloned();
        Some(((name("parent")?, edge.get("name")?.as_str()?.to_owned()), name("child")?))
    };
    list("edges").iter().filter_map(edge).collect()
}
