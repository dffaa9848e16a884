//! A guest's disk: what it is made of, and the arguments by which QEMU gets it.

use crate::kernel::run;
use anyhow::Result;
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Format of a disk's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// Raw.
    Raw,
    /// qcow2.
    Qcow2,
}

impl ImageFormat {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What the guest sees of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// `virtio-blk-pci`.
    VirtioBlk,
    /// `scsi-hd` on a `virtio-scsi-pci` of its own.
    ScsiHd,
    /// `nvme`.
    Nvme,
    /// `ide-hd`.
    IdeHd,
}

/// How QEMU uses the host's page cache for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Through it; the guest's flushes reach the disk.
    Writeback,
    /// Past it (`O_DIRECT`).
    None,
    /// Through it, and the guest's flushes are ignored.
    Unsafe,
}

impl Cache {
    /// The word that `-drive` has for it.
    fn legacy_name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
            Self::Unsafe => "unsafe",
        }
    }
}

/// A disk to give to a guest.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    pub(crate) id: String,
    pub(crate) size: u64,
    format: ImageFormat,
    front_end: FrontEnd,
    cache: Cache,
    legacy: bool,
    iothread: bool,
    pub(crate) ext4: bool,
}

impl DiskSpec {
    /// A qcow2 disk on virtio-blk of `size` bytes; sizes tell disks apart in the guest, so they differ.
    pub fn new(id: &str, size: u64) -> Self {
        Self {
            id: id.to_owned(),
            size,
            format: ImageFormat::Qcow2,
            front_end: FrontEnd::VirtioBlk,
            cache: Cache::Writeback,
            legacy: false,
            iothread: false,
            ext4: false,
        }
    }

    /// With a raw image.
    #[must_use]
    pub fn raw(mut self) -> Self {
        self.format = ImageFormat::Raw;
        self
    }

    /// With a raw image that has an ext4 file system, in place of a disk for the writer's stamps.
    #[must_use]
    pub fn ext4(mut self) -> Self {
        self.ext4 = true;
        self.raw()
    }

    /// Behind this front end.
    #[must_use]
    pub fn front_end(mut self, front_end: FrontEnd) -> Self {
        self.front_end = front_end;
        self
    }

    /// With this use of the host's page cache.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// By `-drive` instead of `-blockdev`.
    #[must_use]
    pub fn legacy(mut self) -> Self {
        self.legacy = true;
        self
    }

    /// With an iothread of its own.
    #[must_use]
    pub fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }
}

/// Makes the disk's image, and adds the disk to QEMU's arguments.
pub(crate) fn add_disk(command: &mut Command, disk: &DiskSpec, work: &Path) -> Result<PathBuf> {
    let image = work.join(format!("{}.{}", disk.id, disk.format.name()));
    if disk.format == ImageFormat::Raw {
        fs::File::create(&image)?.set_len(disk.size)?;
        if disk.ext4 {
            run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-O", "^metadata_csum"]).arg(&image))?;
        }
    } else {
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg(disk.size.to_string()))?;
    }
    let (id, format) = (&disk.id, disk.format.name());
    let drive = if disk.legacy {
        let file = image.display();
        let cache = disk.cache.legacy_name();
        let drive = format!("if=none,id=legacy-{id},file={file},format={format},discard=unmap,cache={cache}");
        command.args(["-drive", &drive]);
        format!("legacy-{id}")
    } else {
        let cache = json!({"direct": disk.cache == Cache::None, "no-flush": disk.cache == Cache::Unsafe});
        let file = json!({"driver": "file", "filename": image, "node-name": format!("file-{id}"), "discard": "unmap",
            "cache": cache});
        let node = json!({"driver": format, "file": format!("file-{id}"), "node-name": format!("node-{id}"),
            "discard": "unmap", "cache": cache});
        command.args(["-blockdev", &file.to_string(), "-blockdev", &node.to_string()]);
        format!("node-{id}")
    };
    let thread = if disk.iothread {
        command.args(["-object", &format!("iothread,id=thread-{id}")]);
        format!(",iothread=thread-{id}")
    } else {
        String::new()
    };
    let device = match disk.front_end {
        FrontEnd::VirtioBlk => format!("virtio-blk-pci,id={id},drive={drive}{thread}"),
        FrontEnd::ScsiHd => {
            command.args(["-device", &format!("virtio-scsi-pci,id=bus-{id}{thread}")]);
            format!("scsi-hd,id={id},drive={drive},bus=bus-{id}.0")
        }
        FrontEnd::Nvme => format!("nvme,id={id},drive={drive},serial={id}"),
        FrontEnd::IdeHd => format!("ide-hd,id={id},drive={drive}"),
    };
    command.args(["-device", &device]);
    Ok(image)
}
