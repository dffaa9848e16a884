//! Files that hold the repository's key, sealed with a password, as restic's design document has them.

use crate::{
    blob::Id,
    crypto::{self, Key},
    error::stored,
    password::Password,
    store::{Folder, Store},
};
use rustic_core::repofile::{KeyFile, MasterKey};
use std::io;
use stillpoint_provider::{Error, ErrorKind, Result};

/// What deriving a key from a password costs: 2^15 blocks of 1 KiB, as restic has it, ...
const LOG_N: u8 = 15;
const R: u32 = 8;
/// ... four times, which as many cores can do at once. It has to be paid with each command, by whoever guesses too; three
/// times are the least that OWASP's password storage guide recommends with 32 MiB.
const P: u32 = 4;
/// Bytes of salt.
const SALT: usize = 64;
/// Bytes that one derivation may take on one core, and all it may go through. restic's own files ask for 32 MiB and some
/// 300 MiB, on a fast machine for more of the latter.
const MEMORY: u64 = 1 << 30;
const WORK: u64 = 64 << 30;

/// Adds a file to `store` that opens with `password` what `key` encrypts, and returns its name. It is durable then: nobody may rely
/// on a key that a power cut takes away, least of all a new repository, which has no other.
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
    let written = store.write(Folder::Keys, &name, &[content.into()]).and_then(|()| store.sync());
    written.map_err(|error| stored("cannot write the key", error))?;
    Ok(name)
}

/// Refuses a file whose derivation would take all memory, or for ever: rustic does what a file asks for, and whoever can
/// write to a repository could end every run with it. What cannot be read at all is left to rustic.
pub(crate) fn check(content: &[u8]) -> io::Result<()> {
    #[derive(serde::Deserialize)]
    struct Cost {
        #[serde(rename = "N")]
        n: u64,
        r: u64,
        p: u64,
    }
    let Ok(Cost { n, r, p }) = serde_json::from_slice(content) else { return Ok(()) };
    let memory = n.saturating_mul(r).saturating_mul(128);
    if n.is_power_of_two() && r > 0 && p > 0 && memory <= MEMORY && memory.saturating_mul(p) <= WORK {
        return Ok(());
    }
    let why = format!("a key asks for scrypt with N {n}, r {r} and p {p}, which is not done here");
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_key_that_costs_too_much_is_refused() {
        let cost = |n: u64, r: u64, p: u64| {
            let text =
                format!("{{\"kdf\":\"scrypt\",\"N\":{n},\"r\":{r},\"p\":{p},\"data\":\"\",\"salt\":\"\"}}");
            check(text.as_bytes()).is_ok()
        };
        // Ours, restic's, rustic's, and what restic makes on a machine that is ten times as fast.
        assert!(
            cost(1 << LOG_N, R.into(), P.into())
                && cost(1 << 15, 8, 9)
                && cost(1 << 17, 8, 1)
                && cost(1 << 15, 8, 90)
        );
        assert!(!cost(1 << 31, 8, 1) && !cost(1 << 17, 1 << 20, 1) && !cost(1 << 15, 8, u64::from(u32::MAX)));
        assert!(
            !cost(0, 8, 1)
                && !cost(3, 8, 1)
                && !cost(1 << 15, 0, 1)
                && !cost(1 << 15, 8, 0)
                && !cost(u64::MAX, u64::MAX, 2)
        );
        assert!(check(b"not a key").is_ok());
    }
}
