//! Names that are traps, and configurations that say what makes no sense.

use super::*;

#[test]
fn a_name_on_the_command_line_is_a_trap() {
    let place = Place::new();
    fs::create_dir(place.path("target")).unwrap();
    let long = "x".repeat(300);
    let long = long.as_str();
    for name in ["/", "..", ".", "a/b", "../x", "", "a\nb", "a\rb", "\u{1b}[2J\u{7}", "\u{9b}31m", "ä", long]
    {
        for line in [
            vec!["backup", name, "--qmp", "@qmp", "--to", "@target"],
            vec!["points", name, "--to", "@target"],
            vec!["recover", name],
            vec!["doctor", name],
            vec!["restore", "box/latest", "--to", "@target", "--output", "@out", "--disk", name],
        ] {
            let outcome = place.run(&line);
            says(&outcome, 2, &["error:"]);
            assert!(!outcome.stderr.contains("a\nb"), "{}", outcome.stderr);
        }
        for point in [format!("{name}/latest"), format!("box/{name}"), format!("{name}/{NO_POINT}")] {
            let line = ["restore", point.as_str(), "--to", "@target", "--output", "@out"];
            says(&place.run(&line), 2, &["error:"]);
            says(&place.run(&["verify", &point, "--to", "@target"]), 2, &["error:"]);
        }
    }
    assert_eq!(fs::read_dir(place.path("target")).unwrap().count(), 0);
    assert!(!place.path("out").exists());
}

#[test]
fn a_name_in_the_configuration_is_a_trap() {
    let place = Place::new();
    for name in ["../x", "a/b", "..", "\\u001b[2J", "\u{1b}[2J"] {
        place.configure(&format!("[vm.\"{name}\"]\nqmp = \"@/qmp\"\n"));
        let outcome = place.configured(&["backup", "--all", "--to", "@target"]);
        says(&outcome, 2, &["box.toml", "line 1"]);
    }
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexclude = [\"../x\"]\n");
    says(&place.configured(&["backup", "box", "--to", "@target"]), 2, &["box.toml", "line 3"]);
    assert!(!place.path("target").exists());
}

#[test]
fn a_key_of_the_configuration_is_unknown() {
    let place = Place::new();
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexlcude = [\"vda\"]\n");
    for line in [&["backup", "box", "--to", "@target"][..], &["points", "--to", "@target"], &["doctor"]] {
        says(&place.configured(line), 2, &[&place.text("box.toml"), "line 3", "exlcude"]);
    }
}

#[test]
fn nothing_says_where_points_are_kept() {
    let place = Place::new();
    for line in [&["backup", "box", "--qmp", "@qmp"][..], &["points"], &["verify"]] {
        says(&place.run(line), 2, &["next:", "--to DIRECTORY", "[target.NAME]"]);
    }
    place.configure("[target.main]\nprovider = \"directory\"\ndirectory = \"@/target\"\n");
    says(&place.configured(&["points", "--target", "other"]), 2, &["no target other", "main"]);
    place.configure("[target.main]\nprovider = \"carrier-pigeon\"\n");
    says(&place.configured(&["points"]), 2, &["carrier-pigeon"]);
}

#[test]
fn a_limit_that_would_hold_nothing_back_is_refused() {
    let place = Place::new();
    for kept in ["\"directory\"\ndirectory = \"@/target\"", "\"restic\"\nrepository = \"@/target\""] {
        place.configure(&format!("[target.main]\nprovider = {kept}\nbandwidth-limit = \"1MiB\"\n"));
        says(&place.configured(&["points"]), 2, &["target main", "bandwidth-limit", "programs", "next:"]);
    }
}

#[test]
fn the_vm_is_not_configured() {
    let place = Place::new();
    place.configure("[vm.box]\nqmp = \"@/qmp\"\n");
    let outcome = place.configured(&["backup", "other", "--to", "@target"]);
    says(&outcome, 2, &["no VM other", "box.toml", "[vm.other]", "--qmp SOCKET"]);
    says(&place.configured(&["recover", "other"]), 2, &["no VM other"]);
}

#[test]
fn a_backup_that_could_not_begin_tells_the_guests_fate_too() {
    let place = Place::new();
    backup_failed(&place.run(&["backup", "box", "--qmp", "@qmp"]), 2, &[UNTOUCHED]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\nexlcude = []\n");
    backup_failed(&place.configured(&["backup", "box", "--to", "@target"]), 2, &[UNTOUCHED]);
    place.configure("[vm.box]\nqmp = \"@/qmp\"\n");
    backup_failed(&place.configured(&["backup", "other", "--to", "@target"]), 2, &[UNTOUCHED]);
}
