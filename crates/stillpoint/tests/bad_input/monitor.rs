//! Monitors that are none, or not for us.

use super::*;

#[test]
fn there_is_no_socket() {
    let place = Place::new();
    let words = [place.text("qmp"), "-qmp unix:".into(), UNTOUCHED.into()];
    backup_failed(&place.backup(), 1, &words.each_ref().map(String::as_str));
    let json = place.run(&["backup", "box", "--qmp", "@qmp", "--to", "@target", "--json"]);
    let printed: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&printed["result"], &printed["exit_status"]), (&json!("failed"), &json!(1)), "{printed}");
    assert!(printed["error"].as_str().unwrap().contains(&words[0]), "{printed}");
    assert!(!place.path("target").exists());
    says(&place.run(&["recover", "--qmp", "@qmp"]), 1, &[&words[0]]);
    says(&place.run(&["doctor", "--qmp", "@qmp"]), 1, &["WRONG", &words[0]]);
}

#[test]
fn nobody_listens_on_the_socket() {
    let place = Place::new();
    drop(UnixListener::bind(place.path("qmp")).unwrap());
    backup_failed(&place.backup(), 1, &[&place.text("qmp"), "QEMU is not", UNTOUCHED]);
}

/// Serves one client with these bytes, then closes.
fn serve(path: &Path, bytes: &'static [u8]) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.write_all(bytes).unwrap();
    })
}

#[test]
fn what_answers_is_not_qmp() {
    let garbage: [&[u8]; 4] = [
        b"SSH-2.0-OpenSSH_9.2\x1b[2J\r\n",
        b"\x00\x01\x02\xff\xfe binary",
        b"{\"QMP\": 7}\r\n",
        b"{\"hello\": \"\x1b[31m\"}\r\n",
    ];
    for bytes in garbage {
        let place = Place::new();
        let peer = serve(&place.path("qmp"), bytes);
        let outcome = place.backup();
        peer.join().unwrap();
        backup_failed(&outcome, 1, &[&place.text("qmp"), "QMP", UNTOUCHED]);
    }
}

#[test]
fn what_answers_closes_at_once() {
    let place = Place::new();
    let peer = serve(&place.path("qmp"), b"");
    let outcome = place.backup();
    peer.join().unwrap();
    backup_failed(&outcome, 1, &[&place.text("qmp"), "closed before its greeting", UNTOUCHED]);
}

#[test]
fn the_monitor_has_another_client() {
    let place = Place::new();
    let _vm = place.qemu(&["-M", "none"]);
    let first = Monitor::connect(&place.path("qmp")).unwrap();
    backup_failed(&place.backup(), 1, &["another client", "a second -qmp socket", UNTOUCHED]);
    drop(first);
    // The same monitor, now free: it was the client that was in the way.
    says(&place.run(&["recover", "--qmp", "@qmp"]), 0, &["nothing to undo"]);
}
