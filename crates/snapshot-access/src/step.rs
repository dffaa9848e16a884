//! What a run does to a VM, step by step, and what undoes each step.
//!
//! A step (but for `Server`: one that is there already is not ours) is recorded before its side effect, so that undoing always covers at least what was done; undoing a step
//! that never took effect does nothing. Recovery of a run that died undoes the same steps, found by their names.
//!
//! | step          | done by                              | undone by                                |
//! |---------------|--------------------------------------|------------------------------------------|
//! | `Listener`    | `getfd`                              | `closefd` (gone once the server has it)  |
//! | `Server`      | `nbd-server-start`                   | `nbd-server-stop`                        |
//! | `FdSet`       | `add-fd`                             | `remove-fd`                              |
//! | `Node`        | `blockdev-add`                       | `blockdev-del`                           |
//! | `NewBitmap`   | `block-dirty-bitmap-add`             | `block-dirty-bitmap-remove`, by outcome  |
//! | `ReadBitmap`  | `block-dirty-bitmap-add`, `-merge`   | `block-dirty-bitmap-remove`              |
//! | `Drive`       | `qom-set` to the filter              | `qom-set` to the disk's own node         |
//! | `Export`      | `block-export-add`                   | `block-export-del`, then awaited         |

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    inspect::{ask, qmp_error},
    names,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::Duration;
use stillpoint_model::NodeName;
use stillpoint_qmp::{Command, EventStream, Qmp};

/// How long QEMU may take to let go of an export: its clients are ours and already gone.
const EXPORT_GONE: Duration = Duration::from_secs(20);

/// One thing done to the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(crate) enum Step {
    Listener,
    Server,
    FdSet { opaque: String },
    Node { name: NodeName },
    NewBitmap { node: NodeName, name: String },
    ReadBitmap { node: NodeName },
    Drive { front_end: String, filter: NodeName, original: NodeName },
    Export { id: String },
}

impl Step {
    /// Undoes the step, as far as it took effect. A new bitmap stays: what becomes of it is decided by the outcome.
    pub(crate) async fn undo(&self, qmp: &Qmp) -> Result<()> {
        match self {
            Self::Listener => gone(qmp, command::close_listener()).await,
            Self::Server => gone(qmp, command::stop_server()).await,
            Self::FdSet { opaque } => remove_fd_sets(qmp, opaque).await,
            Self::Node { name } => delete_node(qmp, name).await,
            Self::NewBitmap { .. } => Ok(()),
            Self::ReadBitmap { node } => {
                gone(qmp, command::remove_bitmap(node.as_str(), names::READ_BITMAP)).await
            }
            Self::Drive { front_end, filter, original } => drive_back(qmp, front_end, filter, original).await,
            Self::Export { id } => delete_export(qmp, id).await,
        }
    }

    /// In words, for what `recover` prints.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Listener => "descriptor of the NBD listener".into(),
            Self::Server => "NBD server".into(),
            Self::FdSet { opaque } => format!("descriptor set {opaque}"),
            Self::Node { name } => format!("block node {name}"),
            Self::NewBitmap { node, name } => format!("bitmap {name} on node {node}"),
            Self::ReadBitmap { node } => format!("bitmap {} on node {node}", names::READ_BITMAP),
            Self::Drive { front_end, filter, original } => {
                format!("front end {front_end} on filter {filter} (belongs to node {original})")
            }
            Self::Export { id } => format!("NBD export {id}"),
        }
    }
}

/// Sends a command whose refusal means that there is nothing left to undo. Whether that is so is checked at the end
/// by looking at the VM again, never by the text of an error.
async fn gone(qmp: &Qmp, command: Command) -> Result<()> {
    let what = command.name();
    match qmp.execute(command).await {
        Ok(_) => Ok(()),
        Err(error) if error.class().is_some() => {
            tracing::debug!(what, desc = error.desc(), "nothing to undo");
            Ok(())
        }
        Err(error) => Err(qmp_error(&format!("undo a step ({what})"), error)),
    }
}

async fn remove_fd_sets(qmp: &Qmp, opaque: &str) -> Result<()> {
    for set in fd_sets(qmp, |found| found == opaque).await? {
        gone(qmp, command::remove_fd(set)).await?;
    }
    Ok(())
}

/// Ids of the fd sets with a descriptor whose `opaque` satisfies `wanted`.
async fn fd_sets(qmp: &Qmp, wanted: impl Fn(&str) -> bool) -> Result<Vec<u64>> {
    let sets: Vec<Value> = ask(qmp, command::query_fd_sets()).await?;
    let id = |set: &Value| {
        let descriptors = set.get("fds")?.as_array()?;
        let ours = descriptors.iter().any(|fd| fd.get("opaque").and_then(Value::as_str).is_some_and(&wanted));
        ours.then(|| set.get("fdset-id")?.as_u64()).flatten()
    };
    Ok(sets.iter().filter_map(id).collect())
}

async fn delete_node(qmp: &Qmp, name: &NodeName) -> Result<()> {
    match qmp.execute(command::delete_node(name.as_str())).await {
        Ok(_) => Ok(()),
        Err(error) if error.class().is_some() => {
            let nodes: Vec<Value> = ask(qmp, command::query_nodes()).await?;
            let there =
                nodes.iter().any(|node| node.get("node-name").and_then(Value::as_str) == Some(name.as_str()));
            if there { Err(qmp_error(&format!("remove block node {name}"), error)) } else { Ok(()) }
        }
        Err(error) => Err(qmp_error(&format!("remove block node {name}"), error)),
    }
}

async fn drive_back(qmp: &Qmp, front_end: &str, filter: &NodeName, original: &NodeName) -> Result<()> {
    match current_node(qmp, front_end).await? {
        Some(node) if node == filter.as_str() => {
            qmp.execute(command::set_drive(front_end, original)).await.map_err(|error| {
                qmp_error(&format!("give front end {front_end} its node {original} back"), error)
            })?;
            Ok(())
        }
        // Never switched, or unplugged, or moved elsewhere by somebody: nothing of ours to undo.
        _ => Ok(()),
    }
}

/// The node that a front end is on now; `None` if there is no such front end any more.
async fn current_node(qmp: &Qmp, front_end: &str) -> Result<Option<String>> {
    let blocks: Vec<Value> = ask(qmp, command::query_block()).await?;
    let bare = front_end.strip_prefix("/machine/peripheral/");
    let block = blocks.iter().find(|block| {
        let qdev = block.get("qdev").and_then(Value::as_str);
        qdev == Some(front_end) || (bare.is_some() && qdev == bare)
    });
    Ok(block
        .and_then(|block| block.pointer("/inserted/node-name"))
        .and_then(Value::as_str)
        .map(str::to_owned))
}

/// Removes an export and awaits its end, which is told by an event: until then its node is in use.
async fn delete_export(qmp: &Qmp, id: &str) -> Result<()> {
    let events = qmp.events();
    gone(qmp, command::delete_export(id)).await?;
    let waited = tokio::time::timeout(EXPORT_GONE, await_export_gone(qmp, id, events)).await;
    waited.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::LeftBehind, format!("QEMU does not let go of NBD export {id}")))
    })
}

async fn await_export_gone(qmp: &Qmp, id: &str, mut events: EventStream) -> Result<()> {
    loop {
        let exports: Vec<Value> = ask(qmp, command::query_exports()).await?;
        if !exports.iter().any(|export| export.get("id").and_then(Value::as_str) == Some(id)) {
            return Ok(());
        }
        // Any event is a reason to look again; the one that tells of the end will come.
        if events.next().await.is_none() {
            return Err(Error::new(ErrorKind::Qmp, "QEMU is gone"));
        }
    }
}
