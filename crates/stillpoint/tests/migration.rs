//! A live migration that somebody else starts: a backup does not begin under it, and one that is under way ends clean.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests: a panic is a failed test")]

mod common;

use common::{Held, tool};
use serde_json::json;
use std::time::{Duration, Instant};
use stillpoint_testkit::{BareMachine, Qemu};

fn migrate(machine: &mut BareMachine) {
    machine.execute("migrate-set-parameters", json!({"max-bandwidth": 65536})).unwrap();
    machine.execute("migrate", json!({"uri": "exec:cat > /dev/null"})).unwrap();
}

fn cancel(machine: &mut BareMachine) {
    machine.execute("migrate_cancel", json!({})).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let state = machine.execute("query-migrate", json!({})).unwrap();
        if state["status"] == "cancelled" {
            return;
        }
        assert!(Instant::now() < deadline, "{state}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_backup_and_a_migration_keep_out_of_each_others_way() {
    let mut machine = BareMachine::with_disks(&Qemu::installed().unwrap(), &[("vda", 16 << 20)]).unwrap();
    let (tool, target) = (tool(machine.work()), machine.work().join("target"));
    let arguments = common::backup_arguments(&machine.qmp(), &target, &[]);
    machine.disk_io("vda", "write -P 1 0 16m").unwrap();

    migrate(&mut machine);
    let refused = tool.run(&arguments).unwrap();
    assert_eq!(refused.status, 1, "{refused:?}");
    assert!(refused.stderr.contains("a migration of this VM is under way"), "{}", refused.stderr);
    assert!(refused.stderr.contains("was not touched"), "{}", refused.stderr);
    cancel(&mut machine);

    let held = Held::at(&tool, "decided#1", arguments.clone());
    migrate(&mut machine);
    let failed = held.go_on();
    assert_eq!(failed.status, 1, "{failed:?}");
    assert!(
        failed.stderr.contains("migrat") && failed.stderr.contains("nothing of this run"),
        "{}",
        failed.stderr
    );
    let nodes = machine.execute("query-named-block-nodes", json!({})).unwrap();
    let ours = |node: &serde_json::Value| node["node-name"].as_str().unwrap().starts_with("stillpoint");
    assert!(!nodes.as_array().unwrap().iter().any(ours), "{nodes}");
    assert_eq!(machine.status().unwrap(), "running");
    cancel(&mut machine);
    tool.run(&arguments).unwrap().json().unwrap();
}
