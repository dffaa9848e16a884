//! Passwords and places on this host.

use super::*;
use std::os::unix::fs::PermissionsExt as _;

#[test]
fn each_fault_of_a_password_or_a_place_has_its_own_words() {
    let target = Target::new("%/repository").quiet();
    let made = target.place.run(&["target", "init", "main"]);
    assert_eq!(made.status, 0, "{made:?}");
    let again = ["target", "init", "main"];
    target.says_to(&again, 1, "there is a repository", "use it as it is, or name an empty place");
    let file = |name: &str, content: &str, mode: u32| {
        let path = target.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    file("other", "canary-another", 0o600);
    file("empty", "\n", 0o600);
    file("open", PASSWORD, 0o644);
    let with_password = |line: &str| target.set("password-", line);
    with_password("password-file = \"%/other\"");
    target.says(1, "no key of repository", "check that the password is that of this repository");
    with_password("password-file = \"%/empty\"");
    target.says(2, "is empty", "put the password");
    with_password("password-file = \"%/nowhere\"");
    target.says(2, "cannot read password file", "correct the path of the password file");
    with_password("password-file = \"%/open\"");
    target.says(2, "is open to other users (mode 644)", "chmod 600 ");
    with_password("password-environment = \"STILLPOINT_NONE\"");
    target.says(2, "has no variable STILLPOINT_NONE", "set STILLPOINT_NONE where stillpoint runs");
    with_password("password-command = [\"sh\", \"-c\", \"echo canary-x; exit 7\"]");
    target.says(1, "exit status: 7", "run it by hand");
    with_password("password-command = [\"/nowhere\"]");
    target.says(2, "cannot be started", "correct `password-command`");
    with_password("password-file = \"%/password\"");
    assert_eq!(target.place.run(&["points"]).status, 0);

    let at = |place: &str| target.set("repository", &format!("repository = \"{place}\""));
    fs::create_dir(target.path().join("nothing")).unwrap();
    fs::create_dir(target.path().join("other-things")).unwrap();
    fs::write(target.path().join("other-things/mine"), "mine").unwrap();
    at("b2:bucket:path");
    target.says(2, "begins with \"b2\", which is no kind of place", "s3:https://HOST/BUCKET");
    at("%/nowhere");
    target.says(1, "there is no such directory", "stillpoint target init main");
    at("%/nothing");
    target.says(1, "the directory is empty", "stillpoint target init main");
    at("%/other-things");
    target.says(1, "holds something else", "name the repository's directory");
    at("%/password");
    target.says(1, "is a file, and no repository", "name the repository's directory");
    at("%/nowhere/below");
    target.says_to(
        &["target", "init", "main"],
        1,
        "cannot create a repository",
        "mount the target, or correct its path",
    );
    fs::remove_file(target.path().join("repository/config")).unwrap();
    at("%/repository");
    target.says(1, "its file `config` is missing", "put `config` back");

    // The same of a backup and of `doctor`, which are about a VM besides.
    let doctor = target.place.run(&["doctor"]);
    assert!(doctor.stdout.contains("its file `config` is missing"), "{doctor:?}");
    assert!(doctor.stdout.contains("next:   put `config` back"), "{doctor:?}");
}
