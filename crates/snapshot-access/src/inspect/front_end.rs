//! Front ends: which of them can be trusted, what a disk is called, and disks that QEMU has no node for.
//!
//! A point is right only if everything that the guest writes passes the disk's node, where bitmap and filter are. That is
//! a property of QEMU's device, so only devices for which a test has shown it are backed up (ADR 0022); `docs/front-ends.md`
//! has the list. A device that is not known is refused, not guessed at.

use super::{Machine, ask, qmp_error, refused};
use crate::{command, error::Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;
use stillpoint_model::DiskName;
use stillpoint_qmp::Qmp;

/// What is known of a front end, by its QOM type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// All that the guest writes goes through its node, as a test shows.
    Proven,
    /// The guest cannot write it.
    ReadOnly,
    /// The guest's commands go to the host's device, past QEMU's block layer.
    PassThrough,
    /// Somebody else than QEMU's block layer serves it: there is no node.
    WithoutNode,
    /// Nothing has been shown.
    Unknown,
}

impl FrontEnd {
    /// What is known of devices of this QOM type. That of `virtio-blk` is `virtio-blk-device`, whatever bus it is on.
    pub fn of(qom_type: &str) -> Self {
        match qom_type {
            "virtio-blk-device" | "scsi-hd" | "ide-hd" | "ide-cf" | "nvme" | "nvme-ns" | "floppy"
            | "sd-card" | "cfi.pflash01" => Self::Proven,
            "scsi-cd" | "ide-cd" => Self::ReadOnly,
            "scsi-block" | "scsi-generic" => Self::PassThrough,
            _ if without_node(qom_type).is_some() => Self::WithoutNode,
            _ => Self::Unknown,
        }
    }

    /// Why a disk on it is not backed up, if so.
    fn obstacle(self, qom_type: &str) -> Option<String> {
        let why = match self {
            Self::Proven | Self::ReadOnly => return None,
            Self::PassThrough => {
                "it passes the guest's commands on to the host's device, so QEMU does not see what is written; use scsi-hd"
            }
            Self::WithoutNode => without_node(qom_type).unwrap_or_default(),
            Self::Unknown => {
                "nothing proves that all that the guest writes through it passes QEMU's block layer"
            }
        };
        Some(format!("its front end is {}: {why}", qom_type.escape_debug()))
    }
}

/// Why QEMU has no node for what a device of this type stores.
fn without_node(qom_type: &str) -> Option<&'static str> {
    let begins = |types: &[&str]| types.iter().any(|start| qom_type.starts_with(start));
    if begins(&["vhost-user-blk", "vhost-user-scsi"]) {
        return Some("another process serves it, and QEMU does not see what is written");
    }
    if begins(&["vhost-scsi", "vhost-vdpa-device"]) {
        return Some("the host serves it, and QEMU does not see what is written");
    }
    if begins(&["nvdimm", "virtio-pmem", "cxl-type3"]) {
        return Some("the guest writes it as memory, and QEMU does not see what is written");
    }
    None
}

/// Where the kernel tells of PCI devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Whether a device of the host, as QEMU names it, is a controller of mass storage; `false` if it cannot be seen.
fn is_storage(pci_devices: &Path, host: &str) -> bool {
    let Some(name) = Path::new(host).file_name() else { return false };
    // The class is six hexadecimal digits, of which the first two are 01 for mass storage (PCI Code and ID Assignment).
    let class = std::fs::read_to_string(pci_devices.join(name).join("class"));
    class.is_ok_and(|class| class.starts_with("0x01"))
}

/// A device as `qom-list` tells of it.
#[derive(Deserialize)]
struct Child {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Machine {
    /// Looks at a front end itself: whether there is something in the way of backing its disk up, and whether the guest can
    /// write it.
    pub(super) async fn look_at_front_end(
        &mut self,
        qmp: &Qmp,
        path: &str,
        name: &DiskName,
    ) -> Result<FrontEnd> {
        let qom_type = text(qmp, path, "type").await?.unwrap_or_else(|| "?".into());
        let front_end = FrontEnd::of(&qom_type);
        if let Some(why) = front_end.obstacle(&qom_type) {
            self.obstacles.push((name.clone(), why));
        }
        // The flash and SD cards have no such property, and nobody else may write those.
        if property(qmp, path, "share-rw").await? == Some(Value::Bool(true)) {
            let why = "it has share-rw=on: what another VM or host writes to it cannot be held still for the instant, and is in no \
                       bitmap. If nobody else writes it, remove share-rw";
            self.obstacles.push((name.clone(), why.into()));
        }
        Ok(front_end)
    }

    /// Disks that the guest has and `query-block` does not show.
    pub(super) async fn find_disks_without_node(&mut self, qmp: &Qmp) -> Result<()> {
        for place in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let devices: Vec<Child> = ask(qmp, command::qom_list(place)).await?;
            for device in devices {
                let Some(qom_type) =
                    device.kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>'))
                else {
                    continue;
                };
                let path = format!("{place}/{}", device.name);
                let front_end = FrontEnd::of(qom_type);
                let why = if front_end == FrontEnd::WithoutNode {
                    front_end.obstacle(qom_type)
                } else if qom_type.starts_with("vfio-pci") {
                    let (host, sysfs) =
                        (text(qmp, &path, "host").await?, text(qmp, &path, "sysfsdev").await?);
                    let mut names = [host, sysfs].into_iter().flatten();
                    names.any(|name| is_storage(Path::new(PCI_DEVICES), &name)).then(|| {
                        "it is a storage controller of the host that the guest has for itself (vfio-pci)"
                            .into()
                    })
                } else {
                    None
                };
                if let Some(why) = why {
                    self.obstacles.push((disk_name(&path, "", "")?, why));
                }
            }
        }
        Ok(())
    }
}

/// A property of a device; `None` if it has none of that name.
pub(super) async fn property(qmp: &Qmp, path: &str, name: &str) -> Result<Option<Value>> {
    match qmp.execute(command::qom_get(path, name)).await {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.class().is_some() => Ok(None),
        Err(error) => Err(qmp_error("look at a device", error)),
    }
}

async fn text(qmp: &Qmp, path: &str, name: &str) -> Result<Option<String>> {
    Ok(property(qmp, path, name).await?.and_then(|value| value.as_str().map(str::to_owned)))
}

/// Where QEMU has a front end, by what `query-block` calls it.
pub(super) fn path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// Where a machine keeps its firmware's flash; the one that can be written has the UEFI variables.
const FLASH: &str = "/machine/system.flash";

pub(super) fn is_flash(front_end: &str) -> bool {
    front_end.starts_with(FLASH)
}

/// The front end's id: `/machine/peripheral/ID/...` or the bare id; `pflashN` for the firmware's flash. A front end
/// without an id is named by its drive, which a legacy `-drive` always has, else by its node; and where it has neither, by
/// its place: `device-3` for `/machine/peripheral-anon/device[3]`.
pub(super) fn disk_name(qdev: &str, device: &str, node: &str) -> Result<DiskName> {
    let flash = qdev.strip_prefix(FLASH).map(|number| format!("pflash{number}"));
    let place = qdev.rsplit('/').find_map(|part| part.strip_prefix("device[")?.strip_suffix(']'));
    let place = place.map(|number| format!("device-{number}"));
    let id = match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next().unwrap_or(rest),
        None if flash.is_some() => flash.as_deref().unwrap_or_default(),
        None if !qdev.starts_with('/') => qdev,
        None if !device.is_empty() => device,
        None if !node.is_empty() && !node.starts_with('#') => node,
        None => match &place {
            Some(place) => place,
            None => {
                return Err(refused(format!(
                    "the disk at {} has no id; give its -device an id, which becomes the disk's name",
                    qdev.escape_debug()
                )));
            }
        },
    };
    id.parse().map_err(|error| {
        refused("a disk's id cannot be used as its name; give its -device another id").because(error)
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_front_ends_id_else_by_its_drive_node_or_place() {
        let name = |qdev, device, node| disk_name(qdev, device, node).map(String::from);
        assert_eq!(name("/machine/peripheral/vda/virtio-backend", "", "n0").unwrap(), "vda");
        assert_eq!(name("/machine/peripheral/usb0/usb0.0/legacy[0]", "", "n0").unwrap(), "usb0");
        assert_eq!(name("sd0", "", "n0").unwrap(), "sd0");
        let anonymous = "/machine/peripheral-anon/device[3]/virtio-backend";
        assert_eq!(name(anonymous, "virtio0", "#block123").unwrap(), "virtio0");
        assert_eq!(name(anonymous, "", "n0").unwrap(), "n0");
        assert_eq!(name(anonymous, "", "#block123").unwrap(), "device-3");
        assert_eq!(name(anonymous, "", "").unwrap(), "device-3");
        assert_eq!(name("/machine/system.flash1", "", "n0").unwrap(), "pflash1");
        assert!(name("/machine/somewhere", "", "#block123").is_err());
        assert!(name("/machine/peripheral/..", "", "").is_err());
        assert!(name("\u{1b}[2J", "", "").unwrap_err().to_string().chars().all(|c| !c.is_control()));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for refused in
            ["scsi-block", "scsi-generic", "vhost-user-blk-pci", "vhost-scsi-pci", "nvdimm", "new-disk", "?"]
        {
            let why = FrontEnd::of(refused).obstacle(refused).unwrap();
            assert!(why.contains(refused), "{why}");
        }
        assert_eq!(FrontEnd::of("virtio-blk-device").obstacle("virtio-blk-device"), None);
        assert_eq!(FrontEnd::of("scsi-cd").obstacle("scsi-cd"), None);
    }

    #[test]
    fn a_storage_controller_of_the_host_is_known_by_its_class() {
        let devices = tempfile::tempdir().unwrap();
        for (name, class) in [("0000:01:00.0", "0x010802\n"), ("0000:02:00.0", "0x020000\n")] {
            std::fs::create_dir(devices.path().join(name)).unwrap();
            std::fs::write(devices.path().join(name).join("class"), class).unwrap();
        }
        assert!(is_storage(devices.path(), "0000:01:00.0"));
        assert!(is_storage(devices.path(), "/sys/bus/pci/devices/0000:01:00.0"));
        assert!(!is_storage(devices.path(), "0000:02:00.0"));
        assert!(!is_storage(devices.path(), "0000:03:00.0"));
    }
}
