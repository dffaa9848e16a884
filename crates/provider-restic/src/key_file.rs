//! Files that hold the repository's key, sealed with a password, as restic's design document has them.

use crate::{
    blob::Id,
    crypto::{self, Key},
    error::{damaged, in_one_line, stored},
    password::Password,
    store::{Folder, Store},
};
use rustic_core::repofile::{KeyFile, MasterKey};
use stillpoint_provider::{Error, ErrorKind, Result};

/// What deriving a key from a password costs: 2^`log_n` blocks of `r` times 128 bytes, `p` times.
pub(crate) struct Cost {
    pub log_n: u8,
    pub r: u32,
    pub p: u32,
}

/// 2^15 blocks of 1 KiB, as restic has it, four times, which as many cores can do at once. It has to be paid with each
/// command, by whoever guesses too; three times are the least that OWASP's password storage guide recommends with 32 MiB.
const COST: Cost = Cost { log_n: 15, r: 8, p: 4 };
/// Bytes of salt.
const SALT: usize = 64;
/// Bytes that one derivation may take on one core, on all of them, and besides, and all it may go through. restic's own files
/// ask for 32 MiB and some 300 MiB, on a fast machine for more of the latter; rustic's for 128 MiB.
const MEMORY: u64 = 256 << 20;
const ALL_MEMORY: u64 = 4 << 30;
const BUFFER: u64 = 16 << 20;
const WORK: u64 = 8 << 30;
/// What trying the keys of a repository may go through in all: some eighty of restic's. Whoever can write there could add
/// keys without end.
const ALL_WORK: u64 = 32 << 30;
/// Most keys that are looked at, and the largest of them; they have some 500 bytes.
const MOST_KEYS: usize = 1000;
const LARGEST_KEY: u64 = 64 << 10;

/// The key that a password opens.
pub(crate) struct Opened {
    /// The name of its file.
    pub name: String,
    pub key: MasterKey,
}

/// Finds the key of the repository in `store` that `password` opens. It is done here and not by rustic since a password
/// may be any bytes, and since what a file asks for is bounded here.
///
/// # Errors
/// [`ErrorKind::Unauthorized`] if there is none. One that cannot be tried is passed over, and told if no other opens.
pub(crate) fn find(store: &dyn Store, password: &Password) -> Result<Opened> {
    let place = store.location();
    let files = store.list(Folder::Keys);
    let files = files.map_err(|error| stored(format!("cannot open repository {place}"), error))?;
    if files.is_empty() {
        return Err(damaged(format!("repository {place} has no key")));
    }
    let (mut left, mut passed_over) = (ALL_WORK, None);
    for (at, (name, size)) in files.into_iter().enumerate() {
        let mut pass = |why: String| {
            tracing::warn!(key = name, why, "a key cannot be tried");
            passed_over
                .get_or_insert(format!("key {} cannot be tried: {why}", name.get(..12).unwrap_or(&name)));
        };
        if at >= MOST_KEYS || left == 0 {
            pass("there are too many keys".to_owned());
            break;
        }
        if size > LARGEST_KEY {
            pass(format!("it has {size} bytes"));
            continue;
        }
        let content = match store.read(Folder::Keys, &name) {
            Ok(content) => content,
            Err(error) => {
                let error = stored(format!("cannot read key {name}"), error);
                // Somebody else removes keys, too.
                if error.kind() != ErrorKind::Damaged {
                    return Err(error);
                }
                pass(in_one_line(&error));
                continue;
            }
        };
        match cost(&content) {
            Err(why) => {
                pass(why);
                continue;
            }
            Ok(work) => left = left.saturating_sub(work),
        }
        match open(&content, password) {
            Ok(Some(key)) => return Ok(Opened { name, key }),
            Ok(None) => {}
            Err(why) => pass(why),
        }
    }
    let what = format!("no key of repository {place} has this password");
    Err(match passed_over {
        None => Error::new(ErrorKind::Unauthorized, what).next(
            "check that the password is that of this repository, and that `repository` names the right one",
        ),
        Some(why) => damaged(format!("{what}; {why}")),
    })
}

/// What opening a key file goes through, in bytes.
fn cost(content: &[u8]) -> std::result::Result<u64, String> {
    #[derive(serde::Deserialize)]
    struct Asked {
        kdf: String,
        #[serde(rename = "N")]
        n: u64,
        r: u64,
        p: u64,
    }
    let Asked { kdf, n, r, p } =
        serde_json::from_slice(content).map_err(|_| "it is damaged, or no key".to_owned())?;
    if kdf != "scrypt" {
        return Err(format!(
            "it is sealed by {:?}, which is not known here",
            kdf.chars().take(20).collect::<String>()
        ));
    }
    let block = r.saturating_mul(128);
    let (memory, buffer) = (n.saturating_mul(block), p.saturating_mul(block));
    let work = memory.saturating_mul(p);
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let sane = n.is_power_of_two() && n > 1 && r > 0 && p > 0;
    let fits = memory <= MEMORY && memory.saturating_mul(p.min(cores)) <= ALL_MEMORY;
    if sane && fits && buffer <= BUFFER && work <= WORK {
        return Ok(work);
    }
    Err(format!("a key asks for scrypt with N {n}, r {r} and p {p}, which is not done here"))
}

/// The key in a file, if this is its password.
fn open(content: &[u8], password: &Password) -> std::result::Result<Option<MasterKey>, String> {
    let damaged = || "it is damaged, or no key".to_owned();
    let file: KeyFile = serde_json::from_slice(content).map_err(|_| damaged())?;
    let log_n = u8::try_from(file.n.ilog2()).map_err(|_| damaged())?;
    let parameters = scrypt::Params::new(log_n, file.r, file.p).map_err(|_| damaged())?;
    let sealing = derive(password, &file.salt, &parameters).map_err(|error| error.to_string())?;
    let Ok(json) = sealing.decrypt(&file.data) else { return Ok(None) };
    serde_json::from_slice(&json).map(Some).map_err(|_| damaged())
}

/// Adds a file to `store` that opens with `password` what `key` encrypts, and returns its name. It is durable then: nobody may rely
/// on a key that a power cut takes away, least of all a new repository, which has no other.
pub(crate) fn add(store: &dyn Store, key: &MasterKey, password: &Password) -> Result<String> {
    write(store, key, password, &COST)
}

pub(crate) fn write(store: &dyn Store, key: &MasterKey, password: &Password, cost: &Cost) -> Result<String> {
    let failed = |what: &str| Error::new(ErrorKind::Io, what.to_owned());
    let mut salt = vec![0; SALT];
    crypto::random(&mut salt)?;
    let parameters = scrypt::Params::new(cost.log_n, cost.r, cost.p)
        .map_err(|error| failed("cannot derive a key from the password").because(error))?;
    let sealing = derive(password, &salt, &parameters)?;
    let json = serde_json::to_vec(key).map_err(|error| failed("cannot write a key down").because(error))?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let file = KeyFile {
        hostname: Some(host),
        username: Some("stillpoint".to_owned()),
        created: Some(rustic_core::jiff::Zoned::now()),
        kdf: "scrypt".to_owned(),
        n: 1 << cost.log_n,
        r: cost.r,
        p: cost.p,
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

fn derive(password: &Password, salt: &[u8], parameters: &scrypt::Params) -> Result<Key> {
    let mut derived = [0; 64];
    scrypt::scrypt(password.expose(), salt, parameters, &mut derived)
        .map_err(|error| Error::new(ErrorKind::Io, "cannot derive a key from the password").because(error))?;
    let (encrypt, mac) = derived.split_at(32);
    let (k, r) = mac.split_at(16);
    Key::new(encrypt, k, r)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_key_that_costs_too_much_is_refused() {
        let done = |n: u64, r: u64, p: u64| {
            let text =
                format!("{{\"kdf\":\"scrypt\",\"N\":{n},\"r\":{r},\"p\":{p},\"data\":\"\",\"salt\":\"\"}}");
            cost(text.as_bytes()).is_ok()
        };
        // Ours, restic's, rustic's, and what restic makes on a machine that is ten times as fast.
        assert!(
            done(1 << COST.log_n, COST.r.into(), COST.p.into())
                && done(1 << 15, 8, 9)
                && done(1 << 17, 8, 1)
                && done(1 << 15, 8, 90)
        );
        assert!(!done(1 << 31, 8, 1) && !done(1 << 17, 1 << 20, 1) && !done(1 << 15, 8, u64::from(u32::MAX)));
        assert!(
            !done(0, 8, 1)
                && !done(3, 8, 1)
                && !done(1 << 15, 0, 1)
                && !done(1 << 15, 8, 0)
                && !done(u64::MAX, u64::MAX, 2)
        );
        // All of it in the second factor, which is of nobody's memory per core.
        assert!(!done(2, 1, 1 << 28) && !done(2, 1 << 20, 1 << 10) && !done(2, 8, 1 << 20));
        assert!(cost(b"not a key").is_err());
    }
}
