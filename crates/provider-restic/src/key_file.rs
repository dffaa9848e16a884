//! Files that hold the repository's key, sealed with a password, as restic's design document has them.

use crate::{
    blob::Id,
    crypto::{self, Key},
    error::stored,
    password::Password,
    store::{Folder, Store},
};
use rustic_core::repofile::{KeyFile, MasterKey};
use stillpoint_provider::{Error, ErrorKind, Result};

/// What deriving a key from a password costs: 2^15 blocks of 1 KiB, as restic has it, ...
const LOG_N: u8 = 15;
const R: u32 = 8;
/// ... four times, which as many cores can do at once. It has to be paid with each command, by whoever guesses too; three
/// times are the least that OWASP's password storage guide recommends with 32 MiB.
const P: u32 = 4;
/// Bytes of salt.
const SALT: usize = 64;

/// Adds a file to `store` that opens with `password` what `key` encrypts, and returns its name. It may not be durable yet.
pub(crate) fn add(store: &dyn Store, key: &MasterKey, password: &Password) -> Result<String> {
    let failed = |what: &str| Error::new(ErrorKind::Io, what.to_owned());
    let mut salt = vec![0; SALT];
    crypto::random(&mut salt)?;
    let sealing = derive(password, &salt)?;
    let json = serde_json::to_vec(key).map_err(|error| failed("cannot write a key down").because(error))?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let file = KeyFile {
        hostname: Some(host),
        username: Some("stillpoint".to_owned()),
        created: Some(rustic_core::jiff::Zoned::now()),
        kdf: "scrypt".to_owned(),
        n: 1 << LOG_N,
        r: R,
        p: P,
        data: sealing.encrypt(&json)?,
        salt,
    };
    let content =
        serde_json::to_vec(&file).map_err(|error| failed("cannot write a key down").because(error))?;
    let name = Id::of(&content).to_string();
    store
        .write(Folder::Keys, &name, &[content.into()])
        .map_err(|error| stored("cannot write the key", error))?;
    Ok(name)
}

fn derive(password: &Password, salt: &[u8]) -> Result<Key> {
    let failed = || Error::new(ErrorKind::Io, "cannot derive a key from the password");
    let parameters = scrypt::Params::new(LOG_N, R, P).map_err(|error| failed().because(error))?;
    let mut derived = [0; 64];
    scrypt::scrypt(password.expose().as_bytes(), salt, &parameters, &mut derived)
        .map_err(|error| failed().because(error))?;
    let (encrypt, mac) = derived.split_at(32);
    let (k, r) = mac.split_at(16);
    Key::new(encrypt, k, r)
}
