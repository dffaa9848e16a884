//! The files that belong to a VM beside its disks: its configuration, its firewall rules, the state of its TPM.
//!
//! They are read twice: before anything is done to the VM, so that a wrong path fails early, and again right after the
//! instant. What did not change in between is what it was at the instant.

use crate::{
    config::Vm,
    failure::{Exit, Failure, Guest},
};
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
};
use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};
use stillpoint_model::{DiskName, NameError};
use stillpoint_provider::{ConfigFile, ConfigRole};

/// They are small; a wrong path must not fill memory.
const MOST: u64 = 16 << 20;

/// The files of one VM.
#[derive(Clone)]
pub(crate) struct ConfigFiles {
    /// To be stored.
    pub files: Vec<ConfigFile>,
    paths: Vec<PathBuf>,
}

impl ConfigFiles {
    /// Reads them.
    ///
    /// # Errors
    /// If one cannot be read, is no small file, or is called as another one is.
    pub(crate) fn read(vm: &Vm) -> Result<Self, Failure> {
        let guest = vm.config.iter().map(|path| (path, ConfigRole::Guest));
        let firewall = vm.firewall.iter().map(|path| (path, ConfigRole::Firewall));
        let tpm = vm.tpm.iter().map(|path| (path, ConfigRole::Tpm));
        let mut all = Self { files: Vec::new(), paths: Vec::new() };
        for (path, role) in guest.chain(firewall).chain(tpm) {
            let failed = |error: &dyn std::error::Error| {
                Failure::because(Exit::Failed, format!("cannot read {}", path.display()), error)
                    .guest(Guest::Untouched)
            };
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let name: DiskName = name.parse().map_err(|error: NameError| failed(&error))?;
            if all.files.iter().any(|file| file.name == name) {
                let what = format!("two files of this VM are called {name}");
                return Err(Failure::usage(what).guest(Guest::Untouched));
            }
            let content = content(path).map_err(|error| failed(&error))?;
            all.files.push(ConfigFile { name, role, content });
            all.paths.push(path.clone());
        }
        Ok(all)
    }

    /// Reads them again, after the instant, and returns what is to be said of those that have changed.
    pub(crate) fn read_again(&mut self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (file, path) in self.files.iter_mut().zip(&self.paths) {
            match content(path) {
                Ok(now) if now == file.content => {}
                Ok(now) => {
                    file.content = now;
                    let path = path.display();
                    warnings.push(format!(
                        "{path} changed around the instant; the point has it as it was just after"
                    ));
                }
                Err(error) => {
                    let path = path.display();
                    warnings.push(format!(
                        "{path} could not be read again, the point has it as it was just before: {error}"
                    ));
                }
            }
        }
        warnings
    }
}

fn content(path: &Path) -> io::Result<Vec<u8>> {
    // Its directory may be another user's, who could put a link there to a file that only we can read. What is examined is what was opened:
    // a fifo would be waited for, and a device has no end.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP) => return Err(io::Error::other("it is a link; name the file itself")),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut content = Vec::new();
    file.take(MOST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MOST {
        return Err(io::Error::other(format!("it has more than {MOST} bytes, too many for a configuration")));
    }
    Ok(content)
}

#[cfg(test)]
mod test {
    use super::*;

    fn vm(text: String) -> Vm {
        toml::from_str(&text).unwrap()
    }

    #[test]
    fn a_file_that_changes_around_the_instant_is_told_and_kept_as_it_was_after() {
        let directory = tempfile::tempdir().unwrap();
        let (tpm, config) = (directory.path().join("tpm2-00.permall"), directory.path().join("vm.conf"));
        std::fs::write(&tpm, "one").unwrap();
        std::fs::write(&config, "cores = 2").unwrap();
        let mut files = ConfigFiles::read(&vm(format!("tpm = {tpm:?}\nconfig = [{config:?}]"))).unwrap();
        assert!(files.read_again().is_empty());
        std::fs::write(&tpm, "two").unwrap();
        std::fs::remove_file(&config).unwrap();
        let warnings = files.read_again();
        assert!(warnings.len() == 2 && warnings[1].contains("just after"), "{warnings:?}");
        assert_eq!(files.files[1].content, b"two");
        assert_eq!(files.files[0].content, b"cores = 2");
    }

    #[test]
    fn what_is_no_small_file_of_a_name_of_its_own_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        File::create(path("large")).unwrap().set_len(MOST + 1).unwrap();
        std::fs::create_dir(path("sub")).unwrap();
        std::fs::write(path("same"), "").unwrap();
        std::fs::write(path("sub/same"), "").unwrap();
        std::fs::write(path("secret"), "root's").unwrap();
        std::os::unix::fs::symlink(path("secret"), path("link")).unwrap();
        for bad in [vec!["large"], vec!["sub"], vec!["none"], vec!["link"], vec!["same", "sub/same"]] {
            let paths: Vec<_> = bad.iter().map(|name| format!("{:?}", path(name))).collect();
            assert!(ConfigFiles::read(&vm(format!("config = [{}]", paths.join(", ")))).is_err(), "{bad:?}");
        }
    }
}
