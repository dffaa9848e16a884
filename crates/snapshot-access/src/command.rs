//! Every command that is sent to a VM's monitor, in one place: a monitor can do anything to its VM, so what this
//! project does to it should be readable on one page.

use crate::names::LISTENER;
use serde_json::{Value, json};
use std::path::Path;
use stillpoint_model::{BitmapName, Granularity, NodeName};
use stillpoint_qmp::Command;

pub(crate) fn query_status() -> Command {
    Command::new("query-status")
}

pub(crate) fn query_name() -> Command {
    Command::new("query-name")
}

pub(crate) fn query_block() -> Command {
    Command::new("query-block")
}

/// Without `flat` QEMU repeats all backing files inside each node; with a long chain that is megabytes.
pub(crate) fn query_nodes() -> Command {
    Command::with("query-named-block-nodes", json!({"flat": true}))
}

pub(crate) fn query_exports() -> Command {
    Command::new("query-block-exports")
}

pub(crate) fn query_jobs() -> Command {
    Command::new("query-block-jobs")
}

pub(crate) fn query_migrate() -> Command {
    Command::new("query-migrate")
}

pub(crate) fn query_fd_sets() -> Command {
    Command::new("query-fdsets")
}

pub(crate) fn query_iothreads() -> Command {
    Command::new("query-iothreads")
}

/// Parent and child nodes. It is marked unstable, but has been there unchanged since QEMU 4.0, and is the only way to
/// learn below 10.1 which node a filter stands on.
pub(crate) fn query_graph() -> Command {
    Command::new("x-debug-query-block-graph")
}

pub(crate) fn qom_get(path: &str, property: &str) -> Command {
    Command::with("qom-get", json!({"path": path, "property": property}))
}

pub(crate) fn qom_list(path: &str) -> Command {
    Command::with("qom-list", json!({"path": path}))
}

/// Points the front end at another node; its `BlockBackend`, and with it throttling and error policy, stays.
pub(crate) fn set_drive(front_end: &str, node: &NodeName) -> Command {
    Command::with("qom-set", json!({"path": front_end, "property": "drive", "value": node}))
}

pub(crate) fn stop() -> Command {
    Command::new("stop")
}

pub(crate) fn cont() -> Command {
    Command::new("cont")
}

/// What QEMU does when the guest powers itself off: `poweroff` ends it, `pause` leaves it in state `shutdown`.
pub(crate) fn set_shutdown_action(action: &str) -> Command {
    Command::with("set-action", json!({"shutdown": action}))
}

pub(crate) fn quit() -> Command {
    Command::new("quit")
}

/// To be sent with the descriptor.
pub(crate) fn add_fd(opaque: &str) -> Command {
    Command::with("add-fd", json!({"opaque": opaque}))
}

pub(crate) fn remove_fd(set: u64) -> Command {
    Command::with("remove-fd", json!({"fdset-id": set}))
}

/// To be sent with the descriptor.
pub(crate) fn get_listener() -> Command {
    Command::with("getfd", json!({"fdname": LISTENER}))
}

pub(crate) fn close_listener() -> Command {
    Command::with("closefd", json!({"fdname": LISTENER}))
}

/// The clients are ours alone: one for the map and one for the data of each disk, and some to spare. Without a `path`
/// the listener is the descriptor that was passed.
pub(crate) fn start_server(disks: usize, path: Option<&Path>) -> Command {
    let address = path.map_or_else(
        || json!({"type": "fd", "data": {"str": LISTENER}}),
        |path| json!({"type": "unix", "data": {"path": path}}),
    );
    Command::with(
        "nbd-server-start",
        json!({"addr": address, "max-connections": disks.saturating_mul(2).saturating_add(2)}),
    )
}

/// Tells whether the server runs, and starts none: QEMU looks for a running one first, and then finds no descriptor of
/// this name. It has no query for its server.
pub(crate) fn probe_server() -> Command {
    let nowhere = json!({"type": "fd", "data": {"str": crate::names::NO_LISTENER}});
    Command::with("nbd-server-start", json!({"addr": nowhere}))
}

pub(crate) fn stop_server() -> Command {
    Command::new("nbd-server-stop")
}

/// To be sent with the descriptor.
pub(crate) fn get_descriptor(name: &str) -> Command {
    Command::with("getfd", json!({"fdname": name}))
}

pub(crate) fn close_descriptor(name: &str) -> Command {
    Command::with("closefd", json!({"fdname": name}))
}

/// Where QEMU finds the file behind a descriptor of its own.
pub(crate) fn own_descriptor(number: u32) -> String {
    format!("/proc/self/fd/{number}")
}

/// Where QEMU finds the file of a descriptor set.
pub(crate) fn of_fd_set(set: u64) -> String {
    format!("/dev/fdset/{set}")
}

/// A raw image that is found at `place`; `discard` lets space go back to the file system as the backup proceeds.
pub(crate) fn add_fleecing(node: &NodeName, place: &str) -> Command {
    let file = json!({"driver": "file", "filename": place, "locking": "off", "discard": "unmap"});
    Command::with(
        "blockdev-add",
        json!({"driver": "raw", "node-name": node, "discard": "unmap", "file": file}),
    )
}

/// The filter, with what keeps the guest out of harm's way (I5): the defaults would turn a full or slow fleecing image
/// into an I/O error of the guest.
pub(crate) fn add_filter(
    node: &NodeName,
    disk: &NodeName,
    fleecing: &NodeName,
    timeout_seconds: u32,
) -> Command {
    Command::with(
        "blockdev-add",
        json!({
            "driver": "copy-before-write",
            "node-name": node,
            "file": disk,
            "target": fleecing,
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": timeout_seconds,
            // Else QEMU drops the guest's discards while the filter is there; whether the disk takes them is its own.
            "discard": "unmap",
        }),
    )
}

/// A node that passes everything on to `file`, and can be pointed elsewhere by [`switch_junctions`].
pub(crate) fn add_junction(node: &NodeName, file: &NodeName) -> Command {
    Command::with("blockdev-add", junction(node, file))
}

/// Points all junctions at their filters at one instant: QEMU drains all of them first, changes all or none, and only
/// then lets requests in again.
pub(crate) fn switch_junctions<'a>(junctions: impl Iterator<Item = (&'a NodeName, &'a NodeName)>) -> Command {
    let options: Vec<_> = junctions.map(|(node, file)| junction(node, file)).collect();
    Command::with("blockdev-reopen", json!({"options": options}))
}

/// `discard` as for the filter.
fn junction(node: &NodeName, file: &NodeName) -> Value {
    json!({"driver": "raw", "node-name": node, "file": file, "discard": "unmap"})
}

pub(crate) fn add_access(node: &NodeName, filter: &NodeName) -> Command {
    Command::with(
        "blockdev-add",
        json!({"driver": "snapshot-access", "node-name": node, "file": filter, "discard": "unmap"}),
    )
}

pub(crate) fn delete_node(node: &str) -> Command {
    Command::with("blockdev-del", json!({"node-name": node}))
}

/// `discards` asks for an export that takes them, which a read-only one does not; who may connect is settled by the
/// socket's directory.
pub(crate) fn add_export(
    id: &str,
    node: &NodeName,
    bitmap: Option<(&NodeName, &str)>,
    discards: bool,
) -> Command {
    let mut export = json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": discards});
    if let (Some((node, name)), Some(export)) = (bitmap, export.as_object_mut()) {
        export.insert("bitmaps".into(), json!([{"node": node, "name": name}]));
    }
    Command::with("block-export-add", export)
}

/// For reading which image of `node`'s chain has what.
pub(crate) fn add_depth_export(id: &str, node: &NodeName) -> Command {
    let export = json!({"type": "nbd", "id": id, "name": id, "node-name": node, "allocation-depth": true});
    Command::with("block-export-add", export)
}

pub(crate) fn delete_export(id: &str) -> Command {
    Command::with("block-export-del", json!({"id": id, "mode": "hard"}))
}

pub(crate) fn add_bitmap(
    node: &NodeName,
    name: &BitmapName,
    granularity: Granularity,
    persistent: bool,
) -> Value {
    action(
        "block-dirty-bitmap-add",
        json!({"node": node, "name": name, "granularity": granularity, "persistent": persistent}),
    )
}

/// A bitmap that records nothing by itself.
pub(crate) fn add_read_bitmap(node: &NodeName, granularity: Granularity) -> Value {
    let data = json!({"node": node, "name": crate::names::READ_BITMAP, "granularity": granularity, "disabled": true});
    action("block-dirty-bitmap-add", data)
}

/// Sources may be on nodes below `node`.
pub(crate) fn merge_into_read_bitmap(node: &NodeName, sources: &[(NodeName, BitmapName)]) -> Value {
    let sources: Vec<_> = sources.iter().map(|(node, name)| json!({"node": node, "name": name})).collect();
    let data = json!({"node": node, "target": crate::names::READ_BITMAP, "bitmaps": sources});
    action("block-dirty-bitmap-merge", data)
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

/// All of them or none.
pub(crate) fn transaction(actions: &[Value]) -> Command {
    Command::with("transaction", json!({"actions": actions}))
}

pub(crate) fn remove_bitmap(node: &str, name: &str) -> Command {
    Command::with("block-dirty-bitmap-remove", json!({"node": node, "name": name}))
}
