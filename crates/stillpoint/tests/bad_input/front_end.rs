//! Front ends that no test machine has: what the program makes of them is told by a monitor that is a script.

use super::*;

/// A VM with one disk `lun0` on a front end of this type, by script. What it was asked is kept.
fn vm_with(qom_type: &'static str, path: &Path) -> (Runtime, Arc<Mutex<Vec<String>>>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let peer = runtime.block_on(async { QmpPeer::listen(path).unwrap() });
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&asked);
    let block = json!({"device": "", "qdev": "lun0", "removable": false, "locked": false, "type": "unknown",
        "inserted": {"node-name": "node0", "drv": "raw", "file": "/dev/sg0", "ro": false,
            "image": {"virtual-size": 1 << 20, "filename": "/dev/sg0", "format": "raw"}}});
    runtime.spawn(async move {
        let mut client = peer.accept().await;
        client.say(&greeting()).await;
        while let Some(command) = client.command().await {
            seen.lock().unwrap().push(command.name.clone());
            match command.name.as_str() {
                "query-status" => {
                    client.returns(&command, json!({"running": true, "status": "running"})).await
                }
                "qmp_capabilities" | "query-name" | "query-migrate" => {
                    client.returns(&command, json!({})).await
                }
                "query-block" => client.returns(&command, json!([block])).await,
                "qom-get" if command.arguments["property"] == "type" => {
                    assert_eq!(command.arguments["path"], "/machine/peripheral/lun0");
                    client.returns(&command, json!(qom_type)).await;
                }
                "qom-get" => client.refuses(&command, "GenericError", "Property not found").await,
                "nbd-server-start" => {
                    client.refuses(&command, "GenericError", "File descriptor has not been found").await;
                }
                _ => client.returns(&command, json!([])).await,
            }
        }
    });
    (runtime, asked)
}

#[test]
fn what_is_not_proven_to_write_through_its_node_is_refused_by_its_type() {
    for qom_type in ["scsi-block", "scsi-generic", "vhost-user-blk", "of-the-future"] {
        let place = Place::new();
        let (_runtime, asked) = vm_with(qom_type, &place.path("qmp"));
        backup_failed(&place.backup(), 1, &["disk lun0", qom_type, "--exclude lun0", UNTOUCHED]);
        let asked = asked.lock().unwrap();
        let harmless =
            ["qmp_capabilities", "qom-get", "qom-list", "nbd-server-start", "x-debug-query-block-graph"];
        let changes = |name: &&String| !name.starts_with("query-") && !harmless.contains(&name.as_str());
        assert_eq!(asked.iter().find(changes), None, "{asked:?}");
        assert!(!place.path("target").exists());
    }
}
