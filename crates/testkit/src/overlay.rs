//! Overlays that somebody else puts on a guest's disks, and commits back: what libvirt does for an external snapshot.

use crate::{Guest, guest::ANSWER, kernel::run};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    process::Command,
    time::{Duration, Instant},
};

impl Guest {
    /// Puts an overlay on the image of each of these disks at one instant, with empty bitmaps of the names that its disk has: all that
    /// are persistent and record, as libvirt does, or every one.
    ///
    /// # Errors
    /// If QEMU refuses it.
    pub fn put_overlays(&mut self, disks: &[&str], every_bitmap: bool) -> Result<()> {
        let mut actions = Vec::new();
        for disk in disks {
            let top = self.top(disk)?;
            let size = top.pointer("/image/virtual-size").and_then(Value::as_u64).context("a size")?;
            let number = self.number();
            let (node, image) =
                (format!("overlay-{disk}-{number}"), self.work().join(format!("{disk}.{number}")));
            run(Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&image)
                .arg(size.to_string()))?;
            let file = json!({"driver": "file", "filename": image});
            let options = json!({"driver": "qcow2", "node-name": node, "file": file, "backing": null, "discard": "unmap"});
            self.execute("blockdev-add", options)?;
            let below = top.get("node-name").context("a node")?;
            actions.push(json!({"type": "blockdev-snapshot", "data": {"node": below, "overlay": node}}));
            for bitmap in top.get("dirty-bitmaps").and_then(Value::as_array).into_iter().flatten() {
                let is = |key: &str| bitmap.get(key).and_then(Value::as_bool) == Some(true);
                let Some(name) = bitmap.get("name").and_then(Value::as_str) else { continue };
                if every_bitmap || is("persistent") && is("recording") {
                    let data = json!({"node": node, "name": name, "persistent": true,
                        "granularity": bitmap.get("granularity")});
                    actions.push(json!({"type": "block-dirty-bitmap-add", "data": data}));
                }
            }
        }
        self.execute("transaction", json!({"actions": actions})).map(|_| ())
    }

    /// Commits everything above the disk's first image into that, which becomes the disk's again.
    ///
    /// # Errors
    /// If QEMU refuses it, or the job does not end.
    pub fn commit_overlays(&mut self, disk: &str) -> Result<()> {
        let top = self.top(disk)?;
        let above = top.get("node-name").and_then(Value::as_str).context("a node")?.to_owned();
        let (base, job) = (format!("node-{disk}"), format!("commit-{disk}"));
        let options = json!({"job-id": job, "device": above, "base-node": base, "top-node": above});
        self.execute("block-commit", options)?;
        self.await_job(&job, |status| status == Some("ready"))?;
        self.execute("job-complete", json!({"id": job}))?;
        self.await_job(&job, |status| status.is_none())?;
        ensure!(self.top(disk)?.get("node-name") == Some(&base.into()), "{disk} is not on its image");
        Ok(())
    }

    fn await_job(&mut self, job: &str, until: impl Fn(Option<&str>) -> bool) -> Result<()> {
        let deadline = Instant::now() + ANSWER;
        loop {
            let jobs = self.execute("query-jobs", json!({}))?;
            let found = jobs.as_array().into_iter().flatten().find(|found| found["id"] == job);
            if let Some(error) = found.and_then(|found| found.get("error")) {
                bail!("{job}: {error}");
            }
            if until(found.and_then(|found| found["status"].as_str())) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{job} does not end: {jobs}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The node that a disk's front end is on; below filters, if it is on one of them.
    fn top(&mut self, disk: &str) -> Result<Value> {
        let nodes = self.execute("query-named-block-nodes", json!({"flat": true}))?;
        let blocks = self.execute("query-block", json!({}))?;
        let of_disk = |block: &&Value| {
            let qdev = block.get("qdev").and_then(Value::as_str).unwrap_or_default();
            qdev == disk || qdev.starts_with(&format!("/machine/peripheral/{disk}/"))
        };
        let block = blocks.as_array().into_iter().flatten().find(of_disk);
        let inserted = block.and_then(|block| block.get("inserted")).context("such a disk")?;
        let name = inserted.get("node-name").and_then(Value::as_str).context("a node")?;
        if !name.starts_with("stillpoint-") {
            return Ok(inserted.clone());
        }
        // Others name the node that they know, below whatever stands above it.
        let of_disk = |node: &&Value| {
            let name = node.get("node-name").and_then(Value::as_str).unwrap_or_default();
            name == format!("node-{disk}") || name.starts_with(&format!("overlay-{disk}-"))
        };
        let known = nodes.as_array().into_iter().flatten().filter(of_disk);
        let mut known = known.filter(|node| node.get("ro") == Some(&false.into()));
        known.next_back().cloned().context("a node that is written to")
    }

    fn number(&mut self) -> usize {
        self.overlays += 1;
        self.overlays
    }
}
