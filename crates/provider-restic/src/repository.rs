//! A repository that is open: its files, its key, and rustic's view of it.

use crate::{
    blob::{BlobKind, Id},
    crypto::{self, Key},
    error::{damaged, rustic, stored},
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
use std::sync::Arc;
use stillpoint_provider::{Error, ErrorKind, Result};

/// Largest blob that is read. restic's are 8 MiB at most, but for trees.
const LARGEST_BLOB: u32 = 512 << 20;

/// An open repository.
pub(crate) struct Repository {
    pub store: Arc<dyn Store>,
    pub key: Key,
    /// Whether its format has compression (version 2).
    pub compress: bool,
    /// Its id: 64 hex digits.
    pub id: String,
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

impl Repository {
    /// Opens the repository at `location`. It is never created here.
    pub(crate) fn open(location: &str, password: &Password) -> Result<Self> {
        let store = store::open(location)?;
        let place = store.location();
        let config = store.list(Folder::Config);
        let config = config.map_err(|error| {
            let error = stored(format!("cannot reach repository {place}"), error);
            match error.kind() {
                ErrorKind::Damaged => Error::new(ErrorKind::Io, error.to_string()),
                _ => error,
            }
        })?;
        if config.is_empty() {
            return Err(Error::new(ErrorKind::TargetMissing, format!("there is no repository at {place}")));
        }
        Self::unlock(store, password)
    }

    fn unlock(store: Arc<dyn Store>, password: &Password) -> Result<Self> {
        let (place, watcher) = (store.location(), Watcher::default());
        let opened = closed(&store, &watcher)?.open(&Credentials::password(password.expose()));
        let opened = opened.map_err(|error| match error.is_incorrect_password() {
            true => Error::new(
                ErrorKind::TargetMissing,
                format!("no key of repository {place} has this password"),
            ),
            false => Error::new(ErrorKind::Damaged, format!("cannot open repository {place}"))
                .because(crate::error::in_one_line(&*error)),
        })?;
        let key = opened.key();
        let (version, id) = (opened.config().version, opened.config().id.to_hex().to_string());
        if !(1..=2).contains(&version) {
            return Err(damaged(format!("the repository is of version {version}, which is not known here")));
        }
        Ok(Self {
            store,
            key: Key::new(&key.encrypt, &key.mac.k, &key.mac.r)?,
            compress: version == 2,
            id,
            watcher,
            rustic: opened,
        })
    }

    /// Makes a new repository at `location`, where there must be none.
    pub(crate) fn create(location: &str, password: &Password) -> Result<Self> {
        let store = store::open(location)?;
        let place = store.location();
        for folder in Folder::ALL.into_iter().chain([Folder::Config]) {
            let found = store.list(folder);
            let found = found
                .map_err(|error| Error::new(ErrorKind::Io, format!("cannot reach {place}")).because(error))?;
            if !found.is_empty() {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "there is a repository at {place} already, or what is left of one ({})",
                        folder.name()
                    ),
                ));
            }
        }
        let key = MasterKey::new();
        let cannot = format!("cannot create a repository at {place}");
        store.create().map_err(|error| stored(&cannot, error))?;
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
