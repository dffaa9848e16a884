//! What a run does to a VM and to this host, step by step, and what undoes each step.
//!
//! Every step is recorded before its side effect, so that undoing always covers at least what was done; undoing a step
//! that never took effect does nothing. Recovery of a run that died undoes the same steps, found by their names.
//!
//! | step             | done by                            | undone by                                       |
//! |------------------|------------------------------------|-------------------------------------------------|
//! | `ShutdownAction` | `set-action shutdown=pause`        | `set-action`, and `quit` if the guest is off    |
//! | `Listener`       | a directory; `getfd`               | directory removed; `closefd`                    |
//! | `Server`         | `nbd-server-start`                 | `nbd-server-stop`, if it took our listener      |
//! | `FleecingFile`   | a file, where it must have a name  | file removed                                    |
//! | `Descriptor`     | `getfd`                            | `closefd`                                       |
//! | `FdSet`          | `add-fd`                           | `remove-fd`                                     |
//! | `Node`           | `blockdev-add`                     | `blockdev-del`                                  |
//! | `NewBitmap`      | `block-dirty-bitmap-add`           | `block-dirty-bitmap-remove`, by outcome         |
//! | `ReadBitmap`     | `block-dirty-bitmap-add`, `-merge` | `block-dirty-bitmap-remove`                     |
//! | `Freeze`         | `guest-fsfreeze-freeze`            | `guest-fsfreeze-thaw`, then `Thawed`            |
//! | `Pause`          | `stop`                             | `cont`, then `Resumed`                          |
//! | `Drive`          | `qom-set` to the filter            | `qom-set` to the filter's child by then         |
//! | `Junction`       | `qom-set` to the junction          | `qom-set` to the filter, which `Drive` undoes   |
//! | `Export`         | `block-export-add`                 | `block-export-del`, then awaited                |

use crate::{
    command,
    error::{Error, ErrorKind, Result},
    fleecing, freeze,
    graph::children,
    inspect::{ask, qmp_error},
    listener, names, power,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use stillpoint_model::NodeName;
use stillpoint_qmp::{Command, EventStream, Qmp};

/// How long QEMU may take to let go of an export: its clients are ours and already gone.
const EXPORT_GONE: Duration = Duration::from_secs(20);

/// One thing done to the VM or to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub(crate) enum Step {
    /// Not a step: which monitor the run uses.
    Begin {
        monitor: String,
    },
    ShutdownAction,
    /// `directory` is below the runtime directory.
    Listener {
        directory: String,
    },
    Server,
    FleecingFile {
        path: PathBuf,
    },
    /// `directory` is where the descriptor's file is.
    Descriptor {
        name: String,
        directory: PathBuf,
    },
    /// Likewise.
    FdSet {
        opaque: String,
        directory: PathBuf,
    },
    Node {
        name: NodeName,
    },
    NewBitmap {
        node: NodeName,
        name: String,
    },
    ReadBitmap {
        node: NodeName,
    },
    Freeze {
        agent: PathBuf,
    },
    Thawed,
    Pause,
    Resumed,
    Drive {
        front_end: String,
        filter: NodeName,
        original: NodeName,
    },
    /// Undone before its `Drive`: whether the junction stands on the filter or on the disk's own node by then, the
    /// filter can take its place.
    Junction {
        front_end: String,
        junction: NodeName,
        filter: NodeName,
    },
    Export {
        id: String,
    },
}

impl Step {
    /// What it is called in the journal.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Begin { .. } => "begin",
            Self::ShutdownAction => "shutdown-action",
            Self::Listener { .. } => "listener",
            Self::Server => "server",
            Self::FleecingFile { .. } => "fleecing-file",
            Self::Descriptor { .. } => "descriptor",
            Self::FdSet { .. } => "fd-set",
            Self::Node { .. } => "node",
            Self::NewBitmap { .. } => "new-bitmap",
            Self::ReadBitmap { .. } => "read-bitmap",
            Self::Freeze { .. } => "freeze",
            Self::Thawed => "thawed",
            Self::Pause => "pause",
            Self::Resumed => "resumed",
            Self::Drive { .. } => "drive",
            Self::Junction { .. } => "junction",
            Self::Export { .. } => "export",
        }
    }

    /// Undoes the step, as far as it took effect. A new bitmap stays: what becomes of it is decided by the outcome.
    pub(crate) async fn undo(&self, qmp: &Qmp) -> Result<()> {
        match self {
            Self::ShutdownAction => power::settle(qmp).await.map(|_| ()),
            Self::Listener { .. } => gone(qmp, command::close_listener()).await,
            Self::Server => stop_server(qmp).await,
            Self::Descriptor { name, .. } => gone(qmp, command::close_descriptor(name)).await,
            Self::FdSet { opaque, .. } => remove_fd_sets(qmp, opaque).await,
            Self::Node { name } => delete_node(qmp, name).await,
            Self::ReadBitmap { node } => {
                gone(qmp, command::remove_bitmap(node.as_str(), names::READ_BITMAP)).await
            }
            Self::Freeze { agent } => freeze::thaw_after_a_death(agent).await,
            Self::Pause => resume(qmp).await,
            Self::Drive { front_end, filter, original } => {
                // Whoever put an overlay on the disk meanwhile put it below the filter: there the guest's writes are now.
                let below = children(qmp).await.remove(filter.as_str()).and_then(|name| name.parse().ok());
                drive_back(qmp, front_end, filter, below.as_ref().unwrap_or(original)).await
            }
            Self::Junction { front_end, junction, filter } => {
                drive_back(qmp, front_end, junction, filter).await
            }
            Self::Export { id } => delete_export(qmp, id).await,
            Self::Begin { .. }
            | Self::FleecingFile { .. }
            | Self::NewBitmap { .. }
            | Self::Thawed
            | Self::Resumed => Ok(()),
        }
    }

    /// Undoes what the step did to this host, for which no QEMU is needed.
    pub(crate) fn undo_on_host(&self, runtime: &Path) {
        let (path, removed) = match self {
            Self::Listener { directory } if listener::is_a_directory_of_ours(directory) => {
                let path = runtime.join(directory);
                let removed = std::fs::remove_dir_all(&path);
                (path, removed)
            }
            Self::FleecingFile { path } if fleecing::is_a_file_of_ours(path) => {
                (path.clone(), std::fs::remove_file(path))
            }
            _ => return,
        };
        if let Err(error) = removed
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "could not remove what a run left");
        }
    }

    /// In words, for what `recover` prints.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Begin { monitor } => format!("journal of a run at monitor {monitor}"),
            Self::ShutdownAction => "the guest's own power-off is held up (set-action)".into(),
            Self::Listener { .. } => "descriptor of the NBD listener".into(),
            Self::Server => "NBD server".into(),
            Self::FleecingFile { path } => format!("fleecing image {}", path.display()),
            Self::Descriptor { name, .. } => format!("descriptor {name}"),
            Self::FdSet { opaque, .. } => format!("descriptor set {opaque}"),
            Self::Node { name } => format!("block node {name}"),
            Self::NewBitmap { node, name } => format!("bitmap {name} on node {node}"),
            Self::ReadBitmap { node } => format!("bitmap {} on node {node}", names::READ_BITMAP),
            Self::Freeze { .. } => "the guest's file systems may be frozen".into(),
            Self::Thawed => "the guest's file systems were thawed".into(),
            Self::Pause => "the guest is paused".into(),
            Self::Resumed => "the guest was resumed".into(),
            Self::Drive { front_end, filter, original } => {
                format!("front end {front_end} on filter {filter} (belongs to node {original})")
            }
            Self::Junction { front_end, junction, .. } => format!("front end {front_end} on node {junction}"),
            Self::Export { id } => format!("NBD export {id}"),
        }
    }
}

/// QEMU takes the listener's descriptor when its server starts, and not if it refuses: a descriptor that is still there
/// says that the server, if there is one, is somebody else's.
async fn stop_server(qmp: &Qmp) -> Result<()> {
    match qmp.execute(command::close_listener()).await {
        Ok(_) => Ok(()),
        Err(error) if error.class().is_some() => gone(qmp, command::stop_server()).await,
        Err(error) => Err(qmp_error("undo a step (closefd)", error)),
    }
}

/// Lets a guest run that our `stop` holds.
async fn resume(qmp: &Qmp) -> Result<()> {
    let status: Value = ask(qmp, command::query_status()).await?;
    if status.get("status").and_then(Value::as_str) == Some("paused") {
        qmp.execute(command::cont()).await.map_err(|error| qmp_error("resume the guest", error))?;
    }
    Ok(())
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

/// Points a front end that is on `ours` at `node`. It looks first: QEMU 7.2 aborts if a front end is pointed at the node that it is
/// on already.
async fn drive_back(qmp: &Qmp, front_end: &str, ours: &NodeName, node: &NodeName) -> Result<()> {
    match current_node(qmp, front_end).await? {
        Some(current) if current == ours.as_str() => {
            qmp.execute(command::set_drive(front_end, node)).await.map_err(|error| {
                qmp_error(&format!("give front end {front_end} its node {node} back"), error)
            })?;
            Ok(())
        }
        // Never switched, or unplugged, or moved elsewhere by somebody: nothing of ours to undo.
        _ => Ok(()),
    }
}

/// The node that a front end is on now; `None` if there is no such front end any more.
pub(crate) async fn current_node(qmp: &Qmp, front_end: &str) -> Result<Option<String>> {
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
