//! Passwords are read byte for byte as the real restic reads them: each file, command and variable here is put before both.

use super::*;
use crate::{
    key_file::{self, Cost},
    store::{self, Folder},
};
use rustic_core::repofile::MasterKey;
use std::{ffi::OsStr, os::unix::fs::PermissionsExt as _, process::Output};

const CHEAP: Cost = Cost { log_n: 1, r: 8, p: 1 };

/// What files may hold.
fn contents() -> Vec<(&'static str, Vec<u8>)> {
    let text = |text: &str| text.as_bytes().to_vec();
    let wide = |mark: [u8; 2], text: &str, unit: fn(u16) -> [u8; 2]| {
        mark.into_iter().chain(text.encode_utf16().flat_map(unit)).collect::<Vec<_>>()
    };
    vec![
        ("plain", text("secret")),
        ("a line", text("secret\n")),
        ("CR LF", text("secret\r\n")),
        ("a trailing blank", text("secret \n")),
        ("a trailing tab", text("secret\t\n")),
        ("a leading blank", text(" secret\n")),
        ("a leading line", text("\n\nsecret\n")),
        ("a blank inside", text("se cret\n")),
        ("two lines", text("secret\nsecond\n")),
        ("two lines of CR LF", text("secret\r\nsecond\r\n")),
        ("UTF-8 with a mark", text("\u{feff}s\u{e9}cret\n")),
        ("a mark behind a blank", text(" \u{feff}secret")),
        ("two marks", text("\u{feff}\u{feff}secret")),
        ("UTF-16, little-endian", wide([0xff, 0xfe], " s\u{e9}cret\u{1f511}\r\n", u16::to_le_bytes)),
        ("UTF-16, big-endian", wide([0xfe, 0xff], "s\u{e9}cret\n", u16::to_be_bytes)),
        ("UTF-16 with two marks", wide([0xff, 0xfe], "\u{feff}secret", u16::to_le_bytes)),
        ("UTF-16 with half a unit", b"\xff\xfes\0e".to_vec()),
        ("UTF-16 with half a pair", b"\xff\xfe\x00\xd8s\0".to_vec()),
        ("UTF-16 with half a pair at its end", b"\xff\xfes\0\x00\xd8".to_vec()),
        ("UTF-16 with the wrong half first", b"\xfe\xff\xdc\x00\0s".to_vec()),
        ("UTF-32", b"\xff\xfe\0\0s\0\0\0".to_vec()),
        ("Latin-1", b"secr\xe9t\n".to_vec()),
        ("Latin-1's next line", b"\x85secret\x85".to_vec()),
        ("a mark and Latin-1", b"\xef\xbb\xbfsecr\xe9t\n".to_vec()),
        ("half a character", b"secret\xe2\x80\n".to_vec()),
        ("a zero", b"se\0cret\n".to_vec()),
        ("a zero at its end", b"secret\0\n".to_vec()),
        ("spaces of Unicode", text("\u{a0}\u{2003}\u{3000}secret\u{2028}\u{85}\u{1680}")),
        ("what is no space", text("\u{200b}secret\u{1c}\u{180e}")),
        ("vertical tabs", text("\u{b}secret\u{c}")),
        ("a long one", [vec![b'x'; 10_000], b" \n".to_vec()].concat()),
    ]
}

/// What neither takes.
const REFUSED: [&[u8]; 6] = [b"", b"\n", b" \t\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff\xfe \0\n\0"];

/// A repository with one key.
struct Place {
    directory: tempfile::TempDir,
    key: MasterKey,
}

impl Place {
    fn empty() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), key: MasterKey::new() }
    }

    fn new() -> Self {
        let place = Self::empty();
        let store = place.store();
        store.create().unwrap();
        let key = crate::crypto::Key::new(&place.key.encrypt, &place.key.mac.k, &place.key.mac.r).unwrap();
        let config =
            format!(r#"{{"version":2,"id":"{}","chunker_polynomial":"25b468838dcb75"}}"#, "ab".repeat(32));
        store.write(Folder::Config, "config", &[key.encrypt(config.as_bytes()).unwrap().into()]).unwrap();
        place
    }

    fn store(&self) -> std::sync::Arc<dyn store::Store> {
        store::open(self.directory.path().join("repository").to_str().unwrap()).unwrap()
    }

    fn file(&self, content: &[u8]) -> PathBuf {
        let path = self.directory.path().join("password");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// The repository opens with this password and no other.
    fn lock(&self, password: &Password) {
        let store = self.store();
        for (name, _) in store.list(Folder::Keys).unwrap() {
            store.remove(Folder::Keys, &name).unwrap();
        }
        key_file::write(&*store, &self.key, password, &CHEAP).unwrap();
    }

    fn restic(&self, arguments: &[&OsStr], variables: &[(&str, &OsStr)]) -> Output {
        let mut restic = Command::new("restic");
        restic.args(["--no-cache", "--quiet"]).args(arguments).stdin(Stdio::null());
        restic
            .env_remove("RESTIC_PASSWORD")
            .env("RESTIC_REPOSITORY", self.directory.path().join("repository"));
        restic.envs(variables.iter().copied()).output().unwrap()
    }

    fn restic_opens(&self, option: &str, value: &OsStr) -> bool {
        self.restic(&["cat".as_ref(), "config".as_ref(), option.as_ref(), value], &[]).status.success()
    }
}

#[test]
fn a_file_that_opens_a_repository_here_opens_it_with_restic() {
    let place = Place::new();
    for (what, content) in contents() {
        let file = place.file(&content);
        place.lock(&PasswordSource::File(file.clone()).read().unwrap());
        assert!(place.restic_opens("--password-file", file.as_ref()), "{what}: {content:?}");
    }
    // The negative control: it is the password that opens it.
    assert!(!place.restic_opens("--password-file", place.file(b"another").as_ref()));
    for content in REFUSED {
        let file = place.file(content);
        let error = PasswordSource::File(file.clone()).read().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{content:?}");
        assert!(!place.restic_opens("--password-file", file.as_ref()), "{content:?}");
    }
}

#[test]
fn a_file_that_opens_a_repository_with_restic_opens_it_here() {
    // Each costs restic half a second: those that differ in what it does to them.
    let some = [
        "CR LF",
        "a trailing blank",
        "a trailing tab",
        "a leading blank",
        "a leading line",
        "two lines",
        "UTF-8 with a mark",
        "UTF-16, little-endian",
        "UTF-16, big-endian",
        "UTF-16 with half a pair",
        "Latin-1",
        "a zero",
        "spaces of Unicode",
    ];
    for (what, content) in contents().into_iter().filter(|(what, _)| some.contains(what)) {
        let place = Place::empty();
        let file = place.file(&content);
        // Not `key add --new-password-file`: restic 0.14 heeds no byte-order mark there, and does not open with the same
        // file what it has made then.
        let line = ["init", "--password-file"].map(OsStr::new);
        let made = place.restic(&[&line[..], &[file.as_os_str()]].concat(), &[]);
        assert!(made.status.success(), "{what}: {made:?}");
        let password = PasswordSource::File(file).read().unwrap();
        assert!(key_file::find(&*place.store(), &password).is_ok(), "{what}");
        let another = Password::new(b"another", "a test").unwrap();
        assert_eq!(key_file::find(&*place.store(), &another).err().unwrap().kind(), ErrorKind::Unauthorized);
    }
}

#[test]
fn commands_and_variables_are_read_as_restic_reads_them() {
    let place = Place::new();
    // As restic splits it, and as it is given here.
    for printed in
        ["secret", " \\t secret \\r\\n\\n", "\\357\\273\\277secret", "secret\\nsecond\\n", "secr\\351t"]
    {
        let command = ["printf", printed].map(str::to_owned).to_vec();
        place.lock(&PasswordSource::Command(command).read().unwrap());
        assert!(
            place.restic_opens("--password-command", format!("printf '{printed}'").as_ref()),
            "{printed}"
        );
    }
    for bad in ["true", "printf ' \\n'", "false"] {
        let command = vec!["sh".to_owned(), "-c".into(), bad.into()];
        assert!(PasswordSource::Command(command).read().is_err(), "{bad}");
        assert!(!place.restic_opens("--password-command", format!("sh -c \"{bad}\"").as_ref()), "{bad}");
    }
    // Variables of a test are those of all: what reads them is asked instead.
    for value in [&b" secret\n"[..], b" ", b"\xef\xbb\xbfsecret", b"secr\xe9t"] {
        place.lock(&Password::new(value, "a test").unwrap());
        let opened = place
            .restic(&["cat", "config"].map(OsStr::new), &[("RESTIC_PASSWORD", OsStr::from_bytes(value))]);
        assert!(opened.status.success(), "{value:?}: {opened:?}");
    }
    assert_eq!(Password::new(b"", "a test").unwrap_err().kind(), ErrorKind::InvalidInput);
    let empty = place.restic(&["cat", "config"].map(OsStr::new), &[("RESTIC_PASSWORD", "".as_ref())]);
    assert!(!empty.status.success());
}
