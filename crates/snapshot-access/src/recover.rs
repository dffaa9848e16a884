//! What an earlier run left in a VM, and how it is undone.
//!
//! QEMU itself tells what is there, by our names; the journal adds what QEMU cannot tell (whose the NBD server is, and
//! on which node a filter stood, should the graph not say). Undoing is the same code as in a run that goes well, and
//! can be cut off and begun again anywhere: each time it looks first.
//!
//! Bitmaps of the chain are no left-overs. After a death both may be there, both complete; the next run asks the
//! provider which one counts (see the `bitmap` module).

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    inspect::{ask, refuse_old},
    journal::Journal,
    names::{self, is_ours},
    step::Step,
};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path, path::PathBuf};
use stillpoint_model::NodeName;
use stillpoint_qmp::Qmp;

/// What an earlier run left in a VM.
#[derive(Debug)]
pub struct LeftOvers {
    steps: Vec<Step>,
    runtime: PathBuf,
}

impl LeftOvers {
    /// Looks, and touches nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] on a QEMU that is too old for us to have left anything; if QEMU does not answer, or a filter of ours is there and nothing tells on which node.
    pub async fn find(qmp: &Qmp, runtime: &Path) -> Result<Self> {
        refuse_old(&qmp.version())?;
        let journal = Journal::read(runtime, qmp);
        let nodes: Vec<Value> = ask(qmp, command::query_nodes()).await?;
        let blocks: Vec<Value> = ask(qmp, command::query_block()).await?;
        let exports: Vec<Value> = ask(qmp, command::query_exports()).await?;
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);

        let mut ours: Vec<NodeName> = Vec::new();
        let mut steps = Vec::new();
        for node in &nodes {
            let Some(name) = text(node, "node-name").and_then(|name| name.parse::<NodeName>().ok()) else {
                continue;
            };
            let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            if bitmaps
                .iter()
                .any(|bitmap| bitmap.get("name").and_then(Value::as_str) == Some(names::READ_BITMAP))
            {
                steps.push(Step::ReadBitmap { node: name.clone() });
            }
            if is_ours(name.as_str()) {
                ours.push(name);
            }
        }
        let our_exports: Vec<String> =
            exports.iter().filter_map(|export| text(export, "id")).filter(|id| is_ours(id)).collect();
        if journal.contains(&Step::Listener) {
            steps.push(Step::Listener);
        }
        // Alone with our exports, or started by a run of ours that did not stop it: the server is ours.
        let foreign_exports = exports.len() > our_exports.len();
        if !foreign_exports && (!our_exports.is_empty() || journal.contains(&Step::Server)) {
            steps.push(Step::Server);
        }
        // QEMU keeps a removed set until the guest runs: without a trace of a run that died it is no left-over.
        if !journal.is_empty() || !ours.is_empty() {
            steps.extend(our_fd_sets(qmp).await?.into_iter().map(|opaque| Step::FdSet { opaque }));
        }
        // In the order in which a run makes them, so that undoing from the last is right.
        for role in ["fleece", "filter"] {
            let prefix = format!("{}{role}-", names::PREFIX);
            let of_role = ours.iter().filter(|name| name.as_str().starts_with(&prefix));
            steps.extend(of_role.map(|name| Step::Node { name: name.clone() }));
        }
        steps.extend(switched_drives(qmp, &blocks, &journal).await?);
        let access = format!("{}access-", names::PREFIX);
        let access = ours.iter().filter(|name| name.as_str().starts_with(&access));
        steps.extend(access.map(|name| Step::Node { name: name.clone() }));
        steps.extend(our_exports.into_iter().map(|id| Step::Export { id }));
        Ok(Self { steps, runtime: runtime.to_owned() })
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// A line for each.
    pub fn describe(&self) -> Vec<String> {
        self.steps.iter().map(Step::describe).collect()
    }

    /// Undoes all of it, going on whatever fails, and looks again.
    ///
    /// # Errors
    /// [`ErrorKind::LeftBehind`] if something is still there.
    pub async fn undo(self, qmp: &Qmp) -> Result<()> {
        let mut first = None;
        for step in self.steps.iter().rev() {
            if let Err(error) = step.undo(qmp).await {
                first.get_or_insert(error);
            }
        }
        if let Some(error) = first {
            return Err(Error::new(ErrorKind::LeftBehind, "not everything could be undone").because(error));
        }
        Journal::forget(&self.runtime, qmp);
        let rest = Self::find(qmp, &self.runtime).await?;
        if rest.is_empty() {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::LeftBehind, format!("still in the VM: {}", rest.describe().join(", "))))
        }
    }
}

async fn our_fd_sets(qmp: &Qmp) -> Result<Vec<String>> {
    let sets: Vec<Value> = ask(qmp, command::query_fd_sets()).await?;
    let descriptors = sets.iter().filter_map(|set| set.get("fds")?.as_array()).flatten();
    let opaque = descriptors.filter_map(|fd| fd.get("opaque")?.as_str());
    let mut ours: Vec<String> = opaque.filter(|name| is_ours(name)).map(str::to_owned).collect();
    ours.sort_unstable();
    ours.dedup();
    Ok(ours)
}

/// Front ends that are on a filter of ours.
async fn switched_drives(qmp: &Qmp, blocks: &[Value], journal: &[Step]) -> Result<Vec<Step>> {
    let mut drives = Vec::new();
    let mut below = None;
    for block in blocks {
        let node = block.pointer("/inserted/node-name").and_then(Value::as_str);
        let qdev = block.get("qdev").and_then(Value::as_str);
        let (Some(node), Some(qdev)) = (node.filter(|node| is_ours(node)), qdev) else { continue };
        let front_end =
            if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") };
        let below = match &mut below {
            Some(below) => below,
            None => below.insert(nodes_below(qmp).await),
        };
        let journaled = journal.iter().rev().find_map(|step| match step {
            Step::Drive { filter, original, .. } if filter.as_str() == node => Some(original.clone()),
            _ => None,
        });
        let named = |name: &str| name.parse::<NodeName>().ok();
        let (Some(filter), Some(original)) =
            (named(node), below.get(node).and_then(|name| named(name)).or(journaled))
        else {
            let context = format!(
                "front end {front_end} is on our filter {node}, and nothing tells which node it had before"
            );
            return Err(Error::new(ErrorKind::LeftBehind, context));
        };
        drives.push(Step::Drive { front_end, filter, original });
    }
    Ok(drives)
}

/// For each of our filters the node it stands on, as the graph says; nothing if QEMU has no such command.
async fn nodes_below(qmp: &Qmp) -> BTreeMap<String, String> {
    let Ok(graph) = ask::<Value>(qmp, command::query_graph()).await else { return BTreeMap::new() };
    let list = |key: &str| graph.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let names: BTreeMap<u64, String> = list("nodes")
        .iter()
        .filter_map(|node| Some((node.get("id")?.as_u64()?, node.get("name")?.as_str()?.to_owned())))
        .collect();
    list("edges")
        .iter()
        .filter(|edge| edge.get("name").and_then(Value::as_str) == Some("file"))
        .filter_map(|edge| {
            let name = |key| names.get(&edge.get(key)?.as_u64()?).cloned();
            Some((name("parent")?, name("child")?))
        })
        .filter(|(parent, _)| is_ours(parent))
        .collect()
}
