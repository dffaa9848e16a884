//! A repository that is open: its files, its key, and rustic's view of it.

use crate::{
    blob::{BlobKind, Id},
    crypto::{self, Key},
    error::{damaged, rustic, rustic_or, stored},
    index::Location,
    key_file,
    password::Password,
    steps::Watcher,
    store::{self, Files, Folder, Store},
};
use bytes::Bytes;
use rustic_core::{
    ConfigOptions, Credentials, KeyOptions, OpenStatus, RepositoryBackends, RepositoryOptions,
    repofile::MasterKey,
};
use std::{io, sync::Arc};
use stillpoint_provider::{Error, ErrorKind, Result};

/// Largest blob that is read. restic's are 8 MiB at most, but for trees.
const LARGEST_BLOB: u32 = 512 << 20;

/// Largest configuration, in the clear. restic's have some hundred bytes.
const LARGEST_CONFIG: u64 = 64 << 10;

/// An open repository.
pub(crate) struct Repository {
    pub store: Arc<dyn Store>,
    pub key: Key,
    /// Whether its format has compression (version 2).
    pub compress: bool,
    /// Its id: 64 hex digits.
    pub id: String,
    /// The file of the key that it was opened with.
    pub key_name: String,
    /// Who hears of what rustic does.
    pub watcher: Watcher,
    /// For what rustic does.
    pub rustic: rustic_core::Repository<OpenStatus>,
}

fn closed(store: &Arc<dyn Store>, watcher: &Watcher) -> Result<rustic_core::Repository<()>> {
    let backends = RepositoryBackends::new(Arc::new(Files(Arc::clone(store))), None);
    // Nothing of a repository is left in the home directory of whoever runs a backup.
    let options = RepositoryOptions::default().no_cache(true);
    rustic_core::Repository::new_with_progress(&options, &backends, watcher.clone())
        .map_err(|error| rustic("cannot use the repository", &error))
}

/// Version and id of a repository, from its configuration.
fn describe(store: &dyn Store, key: &Key, cannot: &str) -> Result<(u32, String)> {
    #[derive(serde::Deserialize)]
    struct Config {
        version: u32,
        id: String,
    }
    let sealed = store.read(Folder::Config, "config").map_err(|error| stored(cannot, error))?;
    let wrong = |why: &str| damaged(cannot).because(format!("its configuration {why}"));
    let json = crypto::open_file(key, &sealed, LARGEST_CONFIG).map_err(|error| wrong(&error.to_string()))?;
    let config: Config = serde_json::from_slice(&json).map_err(|_| wrong("is not what was written"))?;
    if Id::parse(&config.id).is_none() || config.version == 0 {
        return Err(wrong("has no id or no version"));
    }
    Ok((config.version, config.id))
}

impl Repository {
    /// Opens the repository at `location`. It is never created here.
    pub(crate) fn open(location: &str, password: &Password) -> Result<Self> {
        let store = store::open(location)?;
        let place = store.location();
        let config = store.list(Folder::Config);
        let config = config.map_err(|error| {
            let cannot = format!("cannot open repository {place}");
            match stored(&cannot, error) {
                error if error.kind() == ErrorKind::Damaged => {
                    Error::new(ErrorKind::Io, cannot).because(error)
                }
                error => error,
            }
        })?;
        if config.is_empty() {
            return Err(store.absent());
        }
        Self::unlock(store, password)
    }

    fn unlock(store: Arc<dyn Store>, password: &Password) -> Result<Self> {
        let (place, watcher) = (store.location(), Watcher::default());
        let cannot = format!("cannot open repository {place}");
        let found = key_file::find(&*store, password)?;
        let key = Key::new(&found.key.encrypt, &found.key.mac.k, &found.key.mac.r)?;
        let (version, id) = describe(&*store, &key, &cannot)?;
        if version > 2 {
            let newer = format!("repository {place} is of version {version}; only 1 and 2 are known here");
            return Err(Error::new(ErrorKind::Unsupported, newer)
                .next("use a newer Stillpoint for it, or another repository"));
        }
        let opened = closed(&store, &watcher)?.open(&Credentials::Masterkey(found.key));
        let opened = opened.map_err(|error| rustic_or(ErrorKind::Damaged, &cannot, &error))?;
        Ok(Self { store, key, compress: version == 2, id, key_name: found.name, watcher, rustic: opened })
    }

    /// Makes a new repository at `location`, where there must be none.
    pub(crate) fn create(location: &str, password: &Password) -> Result<Self> {
        let store = store::open(location)?;
        let place = store.location();
        let cannot = format!("cannot create a repository at {place}");
        for folder in [Folder::Config].into_iter().chain(Folder::ALL) {
            let found = store.list(folder).map_err(|error| stored(&cannot, error))?;
            if !found.is_empty() {
                let what = format!(
                    "there is a repository at {place} already, or what is left of one ({})",
                    folder.name()
                );
                return Err(Error::new(ErrorKind::TargetForeign, what).next(
                    "use it as it is, or name an empty place for a new one; nothing there was changed",
                ));
            }
        }
        let key = MasterKey::new();
        store.create().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::new(ErrorKind::TargetMissing, &cannot).because(error),
            _ => stored(&cannot, error),
        })?;
        key_file::add(&*store, &key, password)?;
        let made = closed(&store, &Watcher::default())?.init(
            &Credentials::Masterkey(key),
            &KeyOptions::default(),
            &ConfigOptions::default(),
        );
        made.map_err(|error| rustic(&cannot, &error))?;
        store.sync().map_err(|error| stored("the new repository is not durable", error))?;
        // As everybody opens it from now on: then it is known that its key works, and which that is.
        Self::unlock(store, password)
    }

    /// Its location, for messages.
    pub(crate) fn location(&self) -> String {
        self.store.location()
    }

    /// Reads a file that is encrypted as a whole, checks it against its name, and unpacks it.
    pub(crate) fn read_file(&self, folder: Folder, name: &str, most: u64) -> Result<Vec<u8>> {
        let what = format!("{}/{name}", folder.name());
        let sealed =
            self.store.read(folder, name).map_err(|error| stored(format!("cannot read {what}"), error))?;
        if Id::of(&sealed).to_string() != name {
            return Err(damaged(format!("{what} is not what was written")));
        }
        crypto::open_file(&self.key, &sealed, most).map_err(|error| damaged(format!("{what} {error}")))
    }

    /// Reads a blob and checks it against its id. It begins on a page if it is large.
    pub(crate) fn read_blob(&self, kind: BlobKind, id: &Id, at: &Location) -> Result<Bytes> {
        let large =
            at.length > LARGEST_BLOB || at.uncompressed.is_some_and(|length| length.get() > LARGEST_BLOB);
        let what = || format!("{kind:?} blob {id} in pack {}", at.pack).to_lowercase();
        if large {
            return Err(damaged(format!("{} is larger than any blob", what())));
        }
        let sealed = self
            .store
            .read_part(Folder::Data, &at.pack.to_string(), at.offset.into(), at.length.into())
            .map_err(|error| stored(format!("cannot read {}", what()), error))?;
        let content = crypto::open_blob(&self.key, sealed, at.uncompressed.map(std::num::NonZeroU32::get))
            .map_err(|error| damaged(format!("{} {error}", what())))?;
        if Id::of(&content) == *id {
            return Ok(content);
        }
        Err(damaged(format!("{} is not what was written", what())))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_repository_of_a_newer_version_is_not_called_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let location = directory.path().join("repository");
        let location = location.to_str().unwrap();
        let file = directory.path().join("password");
        std::fs::write(&file, "canary").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let password = crate::PasswordSource::File(file).read().unwrap();
        let made = Repository::create(location, &password).unwrap();
        let write = |text: &str| {
            made.store.remove(Folder::Config, "config").unwrap();
            let sealed = made.key.encrypt(text.as_bytes()).unwrap();
            made.store.write(Folder::Config, "config", &[sealed.into()]).unwrap();
            Repository::open(location, &password).err().unwrap().kind()
        };
        let config = |version: u32| format!(r#"{{"version":{version},"id":"{}"}}"#, made.id);
        assert_eq!(write(&config(3)), ErrorKind::Unsupported);
        assert_eq!(write(&config(0)), ErrorKind::Damaged);
        assert_eq!(write("{}"), ErrorKind::Damaged);
        made.store.remove(Folder::Config, "config").unwrap();
        assert_eq!(Repository::open(location, &password).err().unwrap().kind(), ErrorKind::Damaged);
    }
}
