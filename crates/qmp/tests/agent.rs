//! The guest agent's client against guests that do what a script says, good and bad ones.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, unreachable_pub, reason = "shared with the test kit, which has it public")]
#[path = "../../testkit/src/qmp_peer.rs"]
mod qmp_peer;

use qmp_peer::{Client, QmpPeer, Received};
use serde_json::{Value, json};
use std::{error::Error as _, future::Future, io::Write, path::PathBuf, time::Duration};
use stillpoint_qmp::{Agent, ErrorKind, FreezeStatus, Result};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

/// Where a test waits on purpose until time is up.
const SHORT: Duration = Duration::from_millis(150);
/// Where it does not.
const LONG: Duration = Duration::from_secs(20);
/// No test may hang.
const HANG: Duration = Duration::from_secs(30);

struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

async fn done<T>(what: impl Future<Output = T>) -> T {
    timeout(HANG, what).await.expect("nothing hangs")
}

fn guest<Fut>(script: impl FnOnce(Client) -> Fut + Send + 'static) -> (JoinHandle<()>, Place)
where
    Fut: Future<Output = ()> + Send,
{
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qga");
    let peer = QmpPeer::listen(&path).unwrap();
    let task = tokio::spawn(async move { script(peer.accept().await).await });
    (task, Place { _directory: directory, path })
}

async fn connect(place: &Place, deadline: Duration) -> Result<Agent> {
    done(Agent::connect(&place.path, deadline)).await
}

/// Takes the client's request to synchronise, which must begin with the sentinel.
async fn sync_request(client: &mut Client) -> Received {
    let (line, _) = client.line().await.expect("a request to synchronise");
    let (sentinel, text) = line.split_first().unwrap();
    assert_eq!(*sentinel, 0xff);
    let mut request: Value = serde_json::from_slice(text).unwrap();
    let mut take = |member: &str| request.get_mut(member).map(Value::take).unwrap_or_default();
    let name = take("execute").as_str().unwrap().to_owned();
    assert_eq!(name, "guest-sync-delimited");
    Received { name, arguments: take("arguments"), id: take("id"), fds: Vec::new() }
}

async fn sync_answer(client: &mut Client, request: &Received) {
    client.raw(b"\xff").await;
    client.returns(request, request.arguments.get("id").cloned().unwrap()).await;
}

async fn synchronise(client: &mut Client) {
    let request = sync_request(client).await;
    sync_answer(client, &request).await;
}

#[tokio::test]
async fn a_willing_guest_freezes_and_thaws() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        for (name, answer) in [
            ("guest-fsfreeze-status", json!("thawed")),
            ("guest-fsfreeze-freeze", json!(3)),
            ("guest-fsfreeze-status", json!("frozen")),
            ("guest-fsfreeze-thaw", json!(3)),
        ] {
            let command = client.expect(name).await;
            assert!(command.id.is_null() && command.arguments.is_null());
            client.returns(&command, answer).await;
        }
        let command = client.expect("guest-fsfreeze-freeze").await;
        client.refuses(&command, "CommandNotFound", "disabled").await;
        // A refusal is an answer: nothing has to be found again.
        let command = client.expect("guest-fsfreeze-thaw").await;
        client.returns(&command, json!(0)).await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    assert_eq!(done(agent.fsfreeze_status(LONG)).await.unwrap(), FreezeStatus::Thawed);
    assert_eq!(done(agent.fsfreeze_freeze(LONG)).await.unwrap(), 3);
    assert_eq!(done(agent.fsfreeze_status(LONG)).await.unwrap(), FreezeStatus::Frozen);
    assert_eq!(done(agent.fsfreeze_thaw(LONG)).await.unwrap(), 3);
    let error = done(agent.fsfreeze_freeze(LONG)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.class(), error.desc()),
        (ErrorKind::Command, Some("CommandNotFound"), Some("disabled"))
    );
    assert_eq!(done(agent.fsfreeze_thaw(LONG)).await.unwrap(), 0);
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn what_an_earlier_client_left_is_discarded() {
    let (guest, place) = guest(|mut client| async move {
        client.raw(b"{\"return\": \"frozen\"}\n{\n\"half a l").await;
        let request = sync_request(&mut client).await;
        let id = request.arguments.get("id").cloned().unwrap();
        client.raw(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n").await;
        // The right id without the sentinel is the end of something else; another id is another client's.
        client.say(&json!({"return": id})).await;
        client.raw(b"\xff{\"return\": 1}\nrubbish\xff\xfe\n").await;
        client.raw(b"more rubbish").await;
        sync_answer(&mut client, &request).await;
        let command = client.expect("guest-fsfreeze-status").await;
        client.returns(&command, json!("thawed")).await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    assert_eq!(done(agent.fsfreeze_status(LONG)).await.unwrap(), FreezeStatus::Thawed);
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn two_clients_do_not_choose_the_same_id() {
    let mut ids = Vec::new();
    for _ in 0..2 {
        let (tell, told) = oneshot::channel();
        let (guest, place) = guest(|mut client| async move {
            let request = sync_request(&mut client).await;
            tell.send(request.arguments.get("id").and_then(Value::as_i64)).unwrap();
        });
        assert_eq!(connect(&place, LONG).await.unwrap_err().kind(), ErrorKind::Disconnected);
        ids.push(told.await.unwrap().expect("an id that fits in the agent's 64 signed bits"));
        done(guest).await.unwrap();
    }
    assert_ne!(ids.first(), ids.last());
}

#[tokio::test]
async fn a_guest_without_an_agent_is_silent() {
    let (guest, place) = guest(|mut client| async move {
        sync_request(&mut client).await;
        client.expect_closed().await;
    });
    assert_eq!(connect(&place, SHORT).await.unwrap_err().kind(), ErrorKind::AgentSilent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn a_missing_socket_is_not_a_silent_guest() {
    let directory = tempfile::tempdir().unwrap();
    let error = Agent::connect(&directory.path().join("none"), SHORT).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSocket);
    assert!(error.source().is_some());
}

#[tokio::test]
async fn an_endless_stream_is_cut_off() {
    for chunk in [&b"xxxxxxxxxxxxxxx"[..], b"{\"return\": 1}\n\n", b"\xff{\"return\": 1}\n"] {
        let chunk = chunk.repeat(100);
        let (guest, place) = guest(|mut client| async move {
            let mut sent = 0;
            while client.try_raw(&chunk).await.is_ok() {
                sent += chunk.len();
            }
            // What was taken plus what the kernel holds for a client that has stopped to read.
            assert!((64 << 10..4 << 20).contains(&sent), "{sent}");
        });
        assert_eq!(connect(&place, LONG).await.unwrap_err().kind(), ErrorKind::Protocol);
        done(guest).await.unwrap();
    }
}

#[tokio::test]
async fn an_endless_answer_is_cut_off_and_the_next_command_finds_the_way_back() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        client.expect("guest-fsfreeze-freeze").await;
        client.raw(&b"9".repeat(70 << 10)).await;
        synchronise(&mut client).await;
        let command = client.expect("guest-fsfreeze-thaw").await;
        client.returns(&command, json!(1)).await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    assert_eq!(done(agent.fsfreeze_freeze(LONG)).await.unwrap_err().kind(), ErrorKind::Protocol);
    assert_eq!(done(agent.fsfreeze_thaw(LONG)).await.unwrap(), 1);
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn a_late_answer_is_not_the_next_commands() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        let freeze = client.expect("guest-fsfreeze-freeze").await;
        let request = sync_request(&mut client).await;
        // The freeze took long; now the agent goes through what has queued up, in order.
        client.returns(&freeze, json!(7)).await;
        sync_answer(&mut client, &request).await;
        let thaw = client.expect("guest-fsfreeze-thaw").await;
        client.returns(&thaw, json!(2)).await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    let error = done(agent.fsfreeze_freeze(SHORT)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout("guest-fsfreeze-freeze"));
    assert_eq!(done(agent.fsfreeze_thaw(LONG)).await.unwrap(), 2);
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn a_dropped_command_is_as_good_as_one_out_of_time() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        let freeze = client.expect("guest-fsfreeze-freeze").await;
        let request = sync_request(&mut client).await;
        client.returns(&freeze, json!(7)).await;
        sync_answer(&mut client, &request).await;
        let status = client.expect("guest-fsfreeze-status").await;
        client.returns(&status, json!("frozen")).await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    assert!(timeout(Duration::ZERO, agent.fsfreeze_freeze(LONG)).await.is_err());
    assert_eq!(done(agent.fsfreeze_status(LONG)).await.unwrap(), FreezeStatus::Frozen);
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_stays_silent_after_a_timeout_is_told_as_such() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        client.expect("guest-fsfreeze-freeze").await;
        sync_request(&mut client).await;
        sync_request(&mut client).await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    assert_eq!(
        done(agent.fsfreeze_freeze(SHORT)).await.unwrap_err().kind(),
        ErrorKind::Timeout("guest-fsfreeze-freeze")
    );
    for _ in 0..2 {
        assert_eq!(done(agent.fsfreeze_thaw(SHORT)).await.unwrap_err().kind(), ErrorKind::AgentSilent);
    }
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn answers_of_another_kind_are_refused() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        for answer in [json!(-1), json!("3"), json!({}), json!(null)] {
            let command = client.expect("guest-fsfreeze-freeze").await;
            client.returns(&command, answer).await;
        }
        let command = client.expect("guest-fsfreeze-status").await;
        client.returns(&command, json!("\u{1b}[2Jmelted".repeat(1000))).await;
        client.expect("guest-fsfreeze-status").await;
        client.raw(b"\x1b\xff\x00\n").await;
        client.expect_closed().await;
    });
    let mut agent = connect(&place, LONG).await.unwrap();
    for _ in 0..4 {
        assert_eq!(done(agent.fsfreeze_freeze(LONG)).await.unwrap_err().kind(), ErrorKind::Protocol);
    }
    for _ in 0..2 {
        let error = done(agent.fsfreeze_status(LONG)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(!error.to_string().contains(char::is_control) && error.to_string().len() < 1200, "{error:?}");
    }
    drop(agent);
    done(guest).await.unwrap();
}

#[tokio::test]
async fn a_duplicate_of_the_socket_can_thaw() {
    let (guest, place) = guest(|mut client| async move {
        synchronise(&mut client).await;
        client.expect("guest-fsfreeze-thaw").await;
        client.expect_closed().await;
    });
    let agent = connect(&place, LONG).await.unwrap();
    let socket = std::os::unix::net::UnixStream::from(agent.try_clone_socket().unwrap());
    drop(agent);
    (&socket).write_all(b"\xff{\"execute\": \"guest-fsfreeze-thaw\"}\n").unwrap();
    drop(socket);
    done(guest).await.unwrap();
}
