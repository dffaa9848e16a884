//! Which target was seen in which place: remembered on this host, so that a directory without the target that was there is not
//! taken for a new one (ADR 0021).
//!
//! ```text
//! STATE/targets/HASH.TARGET.json     target TARGET was seen in the place whose hash is HASH
//! ```
//! A name says all that matters, so that a file that was cut short still says it; what is in it is for people. Files are only ever
//! added. Whoever could write there could make us use an empty mount point; so the directory must be its owner's alone.

use crate::runtime;
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};
use stillpoint_image::Directory;
use stillpoint_model::{Length, TargetId};
use stillpoint_provider_directory::Before;

const TARGETS: &str = "targets";
/// More than any of the files has.
const MOST: Length = Length::new(64 << 10);

/// What this host remembers of targets.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    state: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Seen {
    place: String,
    target: TargetId,
    first_seen: String,
}

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

impl Places {
    /// Those of this host.
    pub(crate) fn of_this_host() -> Self {
        Self { state: runtime::state_directory() }
    }

    /// The targets that were seen in the directory `path`.
    pub(crate) fn before(&self, path: &Path) -> Before {
        let hashes: Vec<_> = names_of(path).iter().map(|name| hash(name.as_os_str())).collect();
        match self.all() {
            Ok(all) => {
                let mut ids: Vec<_> =
                    all.into_iter().filter(|(place, _)| hashes.contains(place)).map(|(_, id)| id).collect();
                ids.sort();
                ids.dedup();
                Before::Targets(ids)
            }
            Err(error) => Before::Unknown(error.to_string()),
        }
    }

    /// Whether `target` was seen anywhere. What cannot be told counts as seen: it is no reason to say anything.
    pub(crate) fn knows(&self, target: &TargetId) -> bool {
        self.all().map_or(true, |all| all.iter().any(|(_, id)| id == target))
    }

    /// Remembers that `target` is in the directory `path`, by its own name and by the one without links.
    ///
    /// # Errors
    /// If that cannot be made durable.
    pub(crate) fn remember_directory(&self, path: &Path, target: &TargetId) -> Result<()> {
        names_of(path).iter().try_for_each(|name| self.remember(name.as_os_str(), target))
    }

    /// Remembers that `target` is in the place that a provider calls `name`.
    ///
    /// # Errors
    /// If that cannot be made durable.
    pub(crate) fn remember_name(&self, name: &str, target: &TargetId) -> Result<()> {
        self.remember(OsStr::new(name), target)
    }

    fn remember(&self, place: &OsStr, target: &TargetId) -> Result<()> {
        let name = format!("{}.{target}.json", hash(place));
        if let Some(directory) = self.open()?
            && directory.contains(&name)?
        {
            return Ok(());
        }
        stillpoint_snapshot_access::private_directory(&self.state)?;
        let directory = Directory::open(&self.state)?.directory_or_create(TARGETS)?;
        let seen = Seen {
            place: place.to_string_lossy().into_owned(),
            target: target.clone(),
            first_seen: jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        };
        let aside = format!(".{name}-{}", std::process::id());
        directory.remove_tree(&aside)?;
        directory.write_file(&aside, &serde_json::to_vec_pretty(&seen)?)?;
        if let Err(error) = directory.rename(&aside, &name) {
            directory.remove_tree(&aside)?;
            // Another run has seen it too.
            if error.kind() != stillpoint_image::ErrorKind::Exists {
                return Err(error.into());
            }
        }
        Ok(directory.sync()?)
    }

    /// The directory, if there is one.
    fn open(&self) -> Result<Option<Directory>> {
        match std::fs::symlink_metadata(&self.state) {
            Ok(_) => stillpoint_snapshot_access::private_directory(&self.state)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("cannot look at {}: {error}", self.state.display()).into()),
        }
        match Directory::open(&self.state)?.directory(TARGETS) {
            Ok(directory) => Ok(Some(directory)),
            Err(error) if error.kind() == stillpoint_image::ErrorKind::Missing => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// By the hash of the place, each target that was seen there.
    fn all(&self) -> Result<Vec<(String, TargetId)>> {
        let Some(directory) = self.open()? else { return Ok(Vec::new()) };
        let names = directory.names()?;
        Ok(names.iter().filter_map(|name| parse(name)).collect())
    }

    /// The places that `target` was seen in, as far as the files can be read.
    pub(crate) fn of(&self, target: &TargetId) -> Vec<String> {
        let Ok(Some(directory)) = self.open() else { return Vec::new() };
        let names = directory.names().unwrap_or_default();
        let of_target = names.iter().filter(|name| parse(name).is_some_and(|(_, id)| id == *target));
        let read = |name: &String| {
            let bytes = directory.read_file(name, MOST).ok()?;
            Some(serde_json::from_slice::<Seen>(&bytes).ok()?.place)
        };
        let mut places: Vec<_> = of_target.filter_map(read).collect();
        places.sort();
        places
    }
}

fn parse(name: &str) -> Option<(String, TargetId)> {
    let (place, rest) = name.split_once('.')?;
    Some((place.to_owned(), rest.strip_suffix(".json")?.parse().ok()?))
}

fn hash(place: &OsStr) -> String {
    let mut hash = blake3::hash(place.as_bytes()).to_hex().to_string();
    hash.truncate(32);
    hash
}

/// The absolute names of a directory, whether it is there or not: as it was named, and without links.
fn names_of(path: &Path) -> Vec<PathBuf> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // Without a slash at the end.
    let absolute: PathBuf = absolute.components().collect();
    let real = std::fs::canonicalize(&absolute).ok().or_else(|| {
        let parent = std::fs::canonicalize(absolute.parent()?).ok()?;
        Some(parent.join(absolute.file_name()?))
    });
    let real = real.filter(|real| *real != absolute);
    [absolute].into_iter().chain(real).collect()
}

#[cfg(test)]
mod test {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    fn id(text: &str) -> TargetId {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_seen_is_known_by_every_name_of_its_place() {
        let scratch = tempfile::tempdir().unwrap();
        let places = Places { state: scratch.path().join("var/state") };
        let (real, link) = (scratch.path().join("disk"), scratch.path().join("link"));
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(places.before(&link), Before::default());
        assert!(!scratch.path().join("var").exists(), "looking makes nothing");
        for _ in 0..2 {
            places.remember_directory(&link.join("backups/"), &id("0badcafe")).unwrap();
        }
        for name in ["link/backups", "disk/backups", "disk/./backups/", "link//backups/."] {
            let before = places.before(&scratch.path().join(name));
            assert_eq!(before, Before::Targets(vec![id("0badcafe")]), "{name}");
        }
        assert_eq!(places.before(&real), Before::default());
        // Also by the name that leads nowhere now.
        fs::remove_dir(&real).unwrap();
        assert_eq!(places.before(&link.join("backups")), Before::Targets(vec![id("0badcafe")]));
        places.remember_directory(&link.join("backups"), &id("00000001")).unwrap();
        assert_eq!(
            places.before(&link.join("backups")),
            Before::Targets(vec![id("00000001"), id("0badcafe")])
        );
        assert!(places.knows(&id("0badcafe")) && !places.knows(&id("00000002")));
        assert_eq!(places.of(&id("0badcafe")).len(), 2);
        let mode = fs::metadata(&places.state).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_file_that_is_cut_short_still_tells_and_a_directory_of_others_does_not() {
        let scratch = tempfile::tempdir().unwrap();
        let places = Places { state: scratch.path().join("state") };
        let path = scratch.path().join("backups");
        places.remember_directory(&path, &id("0badcafe")).unwrap();
        for entry in fs::read_dir(scratch.path().join("state/targets")).unwrap() {
            fs::write(entry.unwrap().path(), "").unwrap();
        }
        assert_eq!(places.before(&path), Before::Targets(vec![id("0badcafe")]));
        fs::set_permissions(&places.state, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(places.before(&path), Before::Unknown(_)));
        assert!(places.remember_directory(&path, &id("00000001")).is_err());
    }
}
