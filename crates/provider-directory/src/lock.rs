//! One backup of a VM at a time in a target.

use crate::{error::from_image, layout};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{Seek, Write},
};
use stillpoint_image::{self as image, Directory};
use stillpoint_model::{Length, VmName};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Who holds the lock. The lock itself is the kernel's and ends with its holder; this is only to name them. A process
/// id alone would be reused, and means nothing on another boot or host.
#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    boot_id: String,
    start_time: u64,
}

impl Holder {
    fn this_process() -> Self {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        // Field 22; the second is in parentheses and may itself have spaces and parentheses.
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let start_time =
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok());
        Self {
            pid: std::process::id(),
            boot_id: boot_id.trim().to_owned(),
            start_time: start_time.unwrap_or_default(),
        }
    }
}

/// The lock of one VM, held until it is dropped. The file stays: removing it would let two hold a lock on two files
/// of the same name.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(crate) fn take(directory: &Directory, vm: &VmName) -> Result<Self> {
        let mut file = match directory.lock_file(layout::LOCK) {
            Ok(file) => file,
            Err(error) if error.kind() == image::ErrorKind::Locked => return Err(locked(directory, vm)),
            Err(error) => return Err(from_image(error)),
        };
        let name = serde_json::to_vec(&Holder::this_process()).unwrap_or_default();
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(&name)).map_err(
            |source| from_image(image::Error::at("write", &directory.path().join(layout::LOCK), source)),
        )?;
        Ok(Self { _file: file })
    }
}

fn locked(directory: &Directory, vm: &VmName) -> Error {
    let holder = directory
        .read_file(layout::LOCK, Length::new(4096))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Holder>(&bytes).ok());
    let path = directory.path().display();
    let who = match holder {
        Some(holder) if holder.boot_id == Holder::this_process().boot_id => format!("process {}", holder.pid),
        Some(holder) => format!("process {} of another host", holder.pid),
        None => "another process".to_owned(),
    };
    Error::new(ErrorKind::Locked, format!("{who} is backing up {vm} into {path}"))
}
