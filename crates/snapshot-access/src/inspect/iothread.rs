//! iothreads: disks that QEMU cannot export, and pauses that could hang a disk.

use super::{Machine, ask, qmp_error};
use crate::{command, error::Result};
use serde_json::Value;
use stillpoint_qmp::Qmp;

/// Below this an NBD export of a node in an iothread aborts QEMU (fixed in 8.2.1 and 9.0).
const IOTHREADS_FROM: (u32, u32, u32) = (8, 2, 1);
/// From here on `stop` can lose an interrupt that an iothread is about to send (ADR 0017).
const STOP_LOSES_INTERRUPTS_FROM: (u32, u32, u32) = (8, 2, 0);

impl Machine {
    pub(super) async fn find_iothreads(&mut self, qmp: &Qmp) -> Result<()> {
        let threads: Vec<Value> = ask(qmp, command::query_iothreads()).await?;
        if threads.is_empty() {
            return Ok(());
        }
        // Whatever has it: a device that is not backed up would hang just the same.
        self.stop_is_unsafe = self.qemu.number() >= STOP_LOSES_INTERRUPTS_FROM;
        for disk in &self.disks {
            if self.qemu.number() < IOTHREADS_FROM && has_iothread(qmp, &disk.front_end).await? {
                let why = format!(
                    "it has an iothread, and QEMU {} aborts when such a disk is exported (fixed in 8.2.1)",
                    self.qemu
                );
                self.obstacles.push((disk.name.clone(), why));
            }
        }
        Ok(())
    }
}

/// Whether the device itself, or the controller that its bus belongs to, has an iothread.
async fn has_iothread(qmp: &Qmp, front_end: &str) -> Result<bool> {
    let mut start = vec![front_end.to_owned()];
    if let Ok(Value::String(bus)) = qmp.execute(command::qom_get(front_end, "parent_bus")).await {
        start.push(bus);
    }
    for path in start {
        let mut path = path.as_str();
        while !path.is_empty() && path != "/machine" {
            match qmp.execute(command::qom_get(path, "iothread")).await {
                Ok(Value::String(thread)) if !thread.is_empty() => return Ok(true),
                Ok(_) => {}
                // Most objects have no such property.
                Err(error) if error.class().is_some() => {}
                Err(error) => return Err(qmp_error("look for iothreads", error)),
            }
            path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
    }
    Ok(false)
}
