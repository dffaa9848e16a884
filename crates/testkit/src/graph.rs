//! What is in a VM's block layer: the same before a run of the tool and after it.

use crate::{BareMachine, Guest};
use anyhow::Result;
use serde_json::{Value, json};

impl Guest {
    /// Names of all nodes that were named, all exports, and per disk the bitmaps of its node: what must be the same after
    /// a run as before.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn block_graph(&mut self) -> Result<BlockGraph> {
        block_graph(|command, arguments| self.execute(command, arguments))
    }
}

impl BareMachine {
    /// As [`Guest::block_graph`].
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn block_graph(&mut self) -> Result<BlockGraph> {
        block_graph(|command, arguments| self.execute(command, arguments))
    }
}

fn block_graph(mut execute: impl FnMut(&str, Value) -> Result<Value>) -> Result<BlockGraph> {
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let list = |value: Value| value.as_array().cloned().unwrap_or_default();
    let nodes = execute("query-named-block-nodes", json!({"flat": true}))?;
    let mut nodes: Vec<_> = list(nodes).iter().map(|node| text(node, "node-name")).collect();
    nodes.sort();
    let exports = list(execute("query-block-exports", json!({}))?).len();
    let fd_sets = list(execute("query-fdsets", json!({}))?).len();
    let mut drives = Vec::new();
    let mut bitmaps = Vec::new();
    for block in list(execute("query-block", json!({}))?) {
        let Some(inserted) = block.get("inserted") else { continue };
        drives.push((text(&block, "qdev"), text(inserted, "node-name")));
        for bitmap in list(inserted.get("dirty-bitmaps").cloned().unwrap_or_default()) {
            bitmaps.push((text(&block, "qdev"), text(&bitmap, "name")));
        }
    }
    Ok(BlockGraph { nodes, exports, fd_sets, drives, bitmaps })
}

/// What is in a VM's block layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockGraph {
    /// Names of all nodes.
    pub nodes: Vec<String>,
    /// Number of exports.
    pub exports: usize,
    /// Number of descriptor sets.
    pub fd_sets: usize,
    /// Front ends and their nodes.
    pub drives: Vec<(String, String)>,
    /// Front ends and their bitmaps.
    pub bitmaps: Vec<(String, String)>,
}

impl BlockGraph {
    /// Without the bitmaps.
    #[must_use]
    pub fn without_bitmaps(mut self) -> Self {
        self.bitmaps.clear();
        self
    }
}
