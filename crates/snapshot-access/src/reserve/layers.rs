//! What is below a file system: a loop device keeps it in a file of another one, whose space it then takes.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Devices on devices end at some depth; a loop in them would not.
const DEEPEST: usize = 8;

/// What is below a directory.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Layers {
    /// Directories of the files that hold its file system, the next one first.
    pub(super) directories: Vec<PathBuf>,
    /// Thin pools that its device takes space of.
    pub(super) pools: Vec<String>,
}

/// What is below `directory`, as far as it can be seen.
pub(super) fn below(directory: &Path) -> Layers {
    let mut layers = Layers::default();
    let mut next = Some(directory.to_owned());
    while let Some(directory) = next.take().filter(|_| layers.directories.len() < DEEPEST) {
        let Some(device) = device_of(&directory) else { break };
        let sys = Path::new("/sys/dev/block").join(device);
        let before = layers.directories.len();
        devices(&sys, 0, &mut layers);
        next = layers.directories.get(before..).and_then(|new| new.last()).cloned();
    }
    layers
}

/// `MAJOR:MINOR` of the device that holds the file system of `directory`. Some (btrfs, overlays) have numbers of their own;
/// then the table of mounts names the device.
fn device_of(directory: &Path) -> Option<String> {
    let device = fs::metadata(directory).ok()?.dev();
    let name = |device| format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    if rustix::fs::major(device) != 0 {
        return Some(name(device));
    }
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let source = mounted_from(&table, &name(device))?;
    fs::metadata(source).ok().map(|source| name(source.rdev()))
}

/// The source of the mount whose file system has this number (proc_pid_mountinfo(5)).
fn mounted_from<'a>(table: &'a str, device: &str) -> Option<&'a str> {
    let lines = table.lines().filter(|line| line.split(' ').nth(2) == Some(device));
    let mut sources = lines.filter_map(|line| line.split_once(" - ")?.1.split(' ').nth(1));
    sources.find(|source| source.starts_with('/'))
}

/// Adds what is below the device that sysfs shows at `sys`.
fn devices(sys: &Path, depth: usize, layers: &mut Layers) {
    if depth > DEEPEST {
        return;
    }
    // A partition is a directory in that of its disk.
    let sys = if sys.join("partition").exists() { sys.join("..") } else { sys.to_owned() };
    if let Ok(file) = fs::read_to_string(sys.join("loop/backing_file")) {
        let directory = Path::new(file.trim_end()).parent().map(Path::to_owned);
        layers.directories.extend(directory.filter(|new| !layers.directories.contains(new)));
    }
    let uuid = fs::read_to_string(sys.join("dm/uuid")).unwrap_or_default();
    // LVM's name for the device in which a pool hands out space.
    if uuid.trim_end().ends_with("-tpool") {
        let name = fs::read_to_string(sys.join("dm/name")).unwrap_or_default();
        if !layers.pools.iter().any(|known| known == name.trim_end()) {
            layers.pools.push(name.trim_end().to_owned());
        }
    }
    for slave in fs::read_dir(sys.join("slaves")).into_iter().flatten().flatten() {
        devices(&slave.path(), depth.saturating_add(1), layers);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_loop_device_below_others_leads_to_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let sys = |path: &str| directory.path().join(path);
        let write = |path: &str, text: &str| {
            fs::create_dir_all(sys(path).parent().unwrap()).unwrap();
            fs::write(sys(path), text).unwrap();
        };
        // A partition of a loop device, below LVM; and a thin pool.
        write("loop0/loop/backing_file", "/srv/images/disk.raw\n");
        write("loop0/loop0p1/partition", "1\n");
        write("dm-1/dm/uuid", "LVM-abc-tpool\n");
        write("dm-1/dm/name", "vg-pool-tpool\n");
        write("dm-0/dm/uuid", "LVM-abc\n");
        fs::create_dir_all(sys("dm-0/slaves")).unwrap();
        std::os::unix::fs::symlink(sys("dm-1"), sys("dm-0/slaves/dm-1")).unwrap();
        std::os::unix::fs::symlink(sys("loop0/loop0p1"), sys("dm-0/slaves/loop0p1")).unwrap();
        // A device that is below itself ends somewhere.
        fs::create_dir_all(sys("dm-1/slaves")).unwrap();
        std::os::unix::fs::symlink(sys("dm-0"), sys("dm-1/slaves/dm-0")).unwrap();
        let mut layers = Layers::default();
        devices(&sys("dm-0"), 0, &mut layers);
        assert_eq!(layers.directories, [Path::new("/srv/images")]);
        assert_eq!(layers.pools, ["vg-pool-tpool"]);
        let mut alone = Layers::default();
        devices(&sys("none"), 0, &mut alone);
        assert_eq!(alone, Layers::default());
    }

    #[test]
    fn the_table_of_mounts_names_a_device() {
        let table = "36 35 0:42 /sub /mnt rw,noatime shared:1 - btrfs /dev/sda2 rw\n\
                     37 35 0:43 / /m rw - overlay overlay rw,upperdir=/x\n";
        assert_eq!(mounted_from(table, "0:42"), Some("/dev/sda2"));
        assert_eq!(mounted_from(table, "0:43"), None);
        assert_eq!(mounted_from(table, "0:44"), None);
    }
}
