//! Front ends: what a disk is called.

use super::refused;
use crate::error::Result;
use stillpoint_model::DiskName;

/// Where a machine keeps its firmware's flash; the one that can be written has the UEFI variables.
const FLASH: &str = "/machine/system.flash";

pub(super) fn is_flash(front_end: &str) -> bool {
    front_end.starts_with(FLASH)
}

/// The front end's id: `/machine/peripheral/ID/...` or the bare id; `pflashN` for the firmware's flash. A front end
/// without an id is named by its drive, which a legacy `-drive` always has.
pub(super) fn disk_name(qdev: &str, device: &str) -> Result<DiskName> {
    let flash = qdev.strip_prefix(FLASH).map(|number| format!("pflash{number}"));
    let id = match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next().unwrap_or(rest),
        None if flash.is_some() => flash.as_deref().unwrap_or_default(),
        None if !qdev.starts_with('/') => qdev,
        None if !device.is_empty() => device,
        None => {
            return Err(refused(format!(
                "the disk at {} has no id; give its -device an id, which becomes the disk's name",
                qdev.escape_debug()
            )));
        }
    };
    id.parse().map_err(|error| {
        refused("a disk's id cannot be used as its name; give its -device another id").because(error)
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_front_ends_id() {
        let name = |qdev, device| disk_name(qdev, device).map(String::from);
        assert_eq!(name("/machine/peripheral/vda/virtio-backend", "").unwrap(), "vda");
        assert_eq!(name("sd0", "").unwrap(), "sd0");
        assert_eq!(name("/machine/peripheral-anon/device[3]/virtio-backend", "virtio0").unwrap(), "virtio0");
        assert_eq!(name("/machine/system.flash1", "").unwrap(), "pflash1");
        assert!(name("/machine/peripheral-anon/device[3]", "").is_err());
        assert!(name("/machine/peripheral/..", "").is_err());
        assert!(name("\u{1b}[2J", "").unwrap_err().to_string().chars().all(|c| !c.is_control()));
    }
}
