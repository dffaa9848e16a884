//! The monitor's client against peers that do what a script says.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[allow(dead_code, unreachable_pub, reason = "shared with the test kit, which has it public")]
#[path = "../../testkit/src/qmp_peer.rs"]
mod qmp_peer;

use qmp_peer::{Client, QmpPeer, greeting};
use serde_json::{Value, json};
use std::{
    error::Error as _,
    fs::File,
    future::Future,
    io::Write,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};
use stillpoint_qmp::{Command, Deadlines, Error, ErrorKind, Qmp};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

/// Where a test waits on purpose until time is up.
const SHORT: Duration = Duration::from_millis(150);
/// No test may hang.
const HANG: Duration = Duration::from_secs(30);

struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let directory = tempfile::tempdir().expect("a directory for the socket");
    let path = directory.path().join("qmp");
    Place { _directory: directory, path }
}

async fn done<T>(what: impl Future<Output = T>) -> T {
    timeout(HANG, what).await.expect("nothing hangs")
}

/// Runs a script against one client that has not been greeted.
fn accept<Fut>(path: &Path, script: impl FnOnce(Client) -> Fut + Send + 'static) -> JoinHandle<()>
where
    Fut: Future<Output = ()> + Send,
{
    let peer = QmpPeer::listen(path).expect("the peer listens");
    tokio::spawn(async move { script(peer.accept().await).await })
}

/// Runs a script against one client that is ready for commands.
async fn serve<Fut>(script: impl FnOnce(Client) -> Fut + Send + 'static) -> (Qmp, JoinHandle<()>, Place)
where
    Fut: Future<Output = ()> + Send,
{
    let place = place();
    let peer = QmpPeer::listen(&place.path).expect("the peer listens");
    let task = tokio::spawn(async move { script(peer.serve().await).await });
    let qmp = done(Qmp::connect(&place.path, Deadlines::default())).await.expect("the peer is served");
    (qmp, task, place)
}

async fn refused_connection(path: &Path) -> Error {
    let deadlines = Deadlines { connect: SHORT, ..Deadlines::default() };
    done(Qmp::connect(path, deadlines)).await.expect_err("no connection")
}

async fn answers(qmp: &Qmp, name: &'static str) -> Value {
    done(qmp.execute(Command::new(name))).await.expect("an answer")
}

#[tokio::test]
async fn a_missing_socket_and_a_dead_one_are_told_apart() {
    let place = place();
    assert_eq!(refused_connection(&place.path).await.kind(), ErrorKind::NoSocket);
    drop(QmpPeer::listen(&place.path).unwrap());
    let error = refused_connection(&place.path).await;
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(!error.to_string().contains("os error"), "the cause is in source(): {error}");
    assert!(error.source().is_some());
    let long = PathBuf::from("/tmp/".to_owned() + &"x".repeat(200));
    assert_eq!(refused_connection(&long).await.kind(), ErrorKind::Io);
}

#[tokio::test]
async fn a_monitor_that_serves_another_client_is_busy() {
    let place = place();
    let _listening = QmpPeer::listen(&place.path).unwrap();
    let error = refused_connection(&place.path).await;
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("another client"), "{error}");
}

#[tokio::test]
async fn a_full_queue_of_waiting_clients_is_busy_too() {
    let place = place();
    let address = rustix::net::SocketAddrUnix::new(&place.path).unwrap();
    let listener =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = std::os::unix::net::UnixStream::connect(&place.path).unwrap();
    assert_eq!(refused_connection(&place.path).await.kind(), ErrorKind::Busy);
}

#[tokio::test]
async fn whoever_is_not_a_monitor_is_found_out() {
    let endless = [b"{".to_vec(), vec![b' '; 100_000]].concat();
    let said: [&[u8]; 7] = [
        b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
        b"NBDMAGICIHAVEOPT\x00\x03",
        b"{\"return\": {}}\r\n",
        b"{\"QMP\": {}}\r\n",
        b"{\"QMP\": \"\xff\"}\r\n",
        b"{\"QMP\"",
        &endless,
    ];
    for text in said {
        let place = place();
        let text = text.to_vec();
        let (over, wait) = oneshot::channel::<()>();
        let peer = accept(&place.path, move |mut client| async move {
            let _ = client.try_raw(&text).await;
            let _ = wait.await;
        });
        let error = refused_connection(&place.path).await;
        assert_eq!(error.kind(), ErrorKind::NotQmp, "{error}");
        assert!(error.to_string().len() < 400, "{error}");
        assert!(!error.to_string().contains(char::is_control), "{error:?}");
        drop(over);
        done(peer).await.unwrap();
    }
}

#[tokio::test]
async fn a_peer_that_closes_before_its_greeting_is_gone() {
    let place = place();
    let peer = accept(&place.path, |client| async move { drop(client) });
    assert_eq!(refused_connection(&place.path).await.kind(), ErrorKind::Disconnected);
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_greets_and_hangs_runs_into_the_deadline() {
    let place = place();
    let peer = accept(&place.path, |mut client| async move {
        client.say(&greeting()).await;
        client.expect("qmp_capabilities").await;
        client.expect_closed().await;
    });
    assert_eq!(refused_connection(&place.path).await.kind(), ErrorKind::Timeout("qmp_capabilities"));
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_greeting_tells_who_it_is() {
    let (qmp, peer, _place) = serve(|mut client| async move { client.expect_closed().await }).await;
    let version = qmp.version();
    assert_eq!((version.number(), version.package.as_str()), ((7, 2, 22), "scripted"));
    assert_eq!(qmp.peer_pid(), Some(std::process::id()));
    let clone = qmp.clone();
    drop(qmp);
    assert!(!peer.is_finished());
    drop(clone);
    done(peer).await.expect("the connection closes with the last handle");
}

#[tokio::test]
async fn byte_by_byte_delivery_is_delivery() {
    let place = place();
    let peer = accept(&place.path, |mut client| async move {
        let slowly = |text: Value| text.to_string() + "\r\n";
        for byte in slowly(greeting()).bytes() {
            client.raw(&[byte]).await;
            tokio::task::yield_now().await;
        }
        let ready = client.expect("qmp_capabilities").await;
        client.returns(&ready, json!({})).await;
        let command = client.expect("query-status").await;
        for byte in slowly(json!({"return": {"status": "running"}, "id": command.id})).bytes() {
            client.raw(&[byte]).await;
            tokio::task::yield_now().await;
        }
    });
    let qmp = done(Qmp::connect(&place.path, Deadlines::default())).await.unwrap();
    assert_eq!(answers(&qmp, "query-status").await, json!({"status": "running"}));
    done(peer).await.unwrap();
}

#[tokio::test]
async fn arguments_arrive_and_refusals_come_back() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        let command = client.expect("blockdev-del").await;
        assert_eq!(command.arguments, json!({"node-name": "n"}));
        client.refuses(&command, "GenericError", "Node \u{1b}[31m'n' is busy").await;
        let command = client.expect("stop").await;
        assert_eq!(command.arguments, Value::Null);
        client.returns(&command, json!({})).await;
    })
    .await;
    let error =
        done(qmp.execute(Command::with("blockdev-del", json!({"node-name": "n"})))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Command);
    assert_eq!((error.class(), error.desc()), (Some("GenericError"), Some("Node \u{1b}[31m'n' is busy")));
    assert!(error.to_string().contains("blockdev-del") && !error.to_string().contains('\u{1b}'), "{error}");
    assert_eq!(answers(&qmp, "stop").await, json!({}));
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_pipeline_is_sent_before_any_reply_and_replies_may_come_in_any_order() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        let mut commands = Vec::new();
        for number in 0..20 {
            let command = client.expect("qom-get").await;
            assert_eq!(command.arguments, json!({"number": number}));
            commands.push(command);
        }
        for (number, command) in commands.iter().enumerate().rev() {
            if number % 5 == 3 {
                client.refuses(command, "DeviceNotFound", &number.to_string()).await;
            } else {
                client.returns(command, json!(number)).await;
            }
        }
    })
    .await;
    let commands = (0..20).map(|number| Command::with("qom-get", json!({"number": number}))).collect();
    let pipelined = done(qmp.pipeline(commands)).await.unwrap();
    assert_eq!((pipelined.replies.len(), pipelined.done.len()), (20, 20));
    for (number, reply) in pipelined.replies.iter().enumerate() {
        match reply {
            Ok(value) => assert_eq!(value, &json!(number)),
            Err(error) => {
                assert_eq!(number % 5, 3);
                assert_eq!(
                    (error.class(), error.desc()),
                    (Some("DeviceNotFound"), Some(&*number.to_string()))
                );
            }
        }
    }
    assert!(pipelined.done.iter().rev().is_sorted(), "the last command was answered first");
    assert!(pipelined.done.iter().all(|at| *at >= pipelined.sent));
    done(peer).await.unwrap();
    let nothing = done(qmp.pipeline(Vec::new())).await.unwrap();
    assert!(nothing.replies.is_empty() && nothing.done.is_empty());
}

#[tokio::test]
async fn a_pipeline_larger_than_the_socket_takes_arrives_whole() {
    let text = "x".repeat(100_000);
    let expected = text.clone();
    let (qmp, peer, _place) = serve(|mut client| async move {
        for _ in 0..10 {
            let command = client.expect("qom-set").await;
            assert_eq!(command.arguments["value"].as_str(), Some(expected.as_str()));
            client.returns(&command, json!({})).await;
        }
    })
    .await;
    let commands = vec![Command::with("qom-set", json!({"value": text})); 10];
    let pipelined = done(qmp.pipeline(commands)).await.unwrap();
    assert!(pipelined.replies.iter().all(Result::is_ok));
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_late_reply_is_nobody_elses() {
    let (tell, told) = oneshot::channel();
    let (qmp, peer, _place) = serve(|mut client| async move {
        let late = client.expect("query-block").await;
        told.await.unwrap();
        let next = client.expect("query-status").await;
        client.returns(&late, json!("late")).await;
        client.returns(&next, json!("next")).await;
        let last = client.expect("query-name").await;
        client.returns(&last, json!("last")).await;
    })
    .await;
    let error = done(qmp.execute_within(Command::new("query-block"), SHORT)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout("query-block"));
    tell.send(()).unwrap();
    assert_eq!(answers(&qmp, "query-status").await, "next");
    assert_eq!(answers(&qmp, "query-name").await, "last");
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_pipeline_that_is_answered_in_part_says_which_part() {
    let place = place();
    let listener = QmpPeer::listen(&place.path).unwrap();
    let peer = tokio::spawn(async move {
        let mut client = listener.serve().await;
        let stop = client.expect("stop").await;
        client.expect("cont").await;
        client.returns(&stop, json!({})).await;
        client.expect_closed().await;
    });
    let deadlines = Deadlines { command: SHORT, ..Deadlines::default() };
    let qmp = done(Qmp::connect(&place.path, deadlines)).await.unwrap();
    let pipelined = done(qmp.pipeline(vec![Command::new("stop"), Command::new("cont")])).await.unwrap();
    assert!(pipelined.replies[0].is_ok());
    assert_eq!(pipelined.replies[1].as_ref().unwrap_err().kind(), ErrorKind::Timeout("cont"));
    assert!(pipelined.done[1] >= pipelined.sent + SHORT.mul_f32(0.9));
    drop(qmp);
    done(peer).await.unwrap();
}

/// Short for commands; whoever waits longer than the grace would wait in vain.
fn impatient(grace: Duration) -> Deadlines {
    Deadlines { command: SHORT, grace, ..Deadlines::default() }
}

#[tokio::test]
async fn to_a_silent_monitor_nothing_is_sent_until_it_has_answered_all_that_was() {
    let place = place();
    let listener = QmpPeer::listen(&place.path).unwrap();
    let (tell, told) = oneshot::channel();
    let (again, asked) = oneshot::channel();
    let peer = tokio::spawn(async move {
        let mut client = listener.serve().await;
        let overdue = client.expect("query-block").await;
        let behind = client.expect("query-jobs").await;
        told.await.unwrap();
        client.returns(&behind, json!("behind")).await;
        asked.await.unwrap();
        client.returns(&overdue, json!("late")).await;
        // Nothing of what was asked in between.
        let next = client.expect("query-status").await;
        client.returns(&next, json!("next")).await;
    });
    let qmp = done(Qmp::connect(&place.path, impatient(HANG))).await.unwrap();
    assert!(done(qmp.answers_again()).await, "it never was silent");
    let silence = tokio::spawn({
        let qmp = qmp.clone();
        async move { qmp.silence().await }
    });
    let (first, behind) = tokio::join!(
        qmp.execute(Command::new("query-block")),
        qmp.execute_within(Command::new("query-jobs"), HANG)
    );
    assert_eq!(first.unwrap_err().kind(), ErrorKind::Timeout("query-block"));
    let behind = behind.unwrap_err();
    assert_eq!(behind.kind(), ErrorKind::Silent, "one deadline holds for all: {behind}");
    done(silence).await.unwrap();
    let began = tokio::time::Instant::now();
    for _ in 0..100 {
        let refused = qmp.execute(Command::new("query-name")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Silent);
        assert!(refused.to_string().contains("query-block was not answered"), "{refused}");
        let refused = qmp.pipeline(vec![Command::new("stop"), Command::new("cont")]).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Silent);
    }
    assert!(began.elapsed() < SHORT, "they wait, and for nothing");
    tell.send(()).unwrap();
    let answers_to_one = timeout(SHORT, qmp.answers_again()).await;
    assert!(answers_to_one.is_err() && qmp.is_silent(), "one of two is still open");
    again.send(()).unwrap();
    assert!(done(qmp.answers_again()).await && !qmp.is_silent());
    assert_eq!(answers(&qmp, "query-status").await, "next");
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_monitor_is_given_one_more_chance_and_no_second() {
    let place = place();
    let listener = QmpPeer::listen(&place.path).unwrap();
    let (tell, told) = oneshot::channel();
    let peer = tokio::spawn(async move {
        let mut client = listener.serve().await;
        let first = client.expect("query-block").await;
        told.await.unwrap();
        client.returns(&first, json!("late")).await;
        client.expect("query-name").await;
        client.expect_closed().await;
    });
    let qmp = done(Qmp::connect(&place.path, impatient(HANG * 4))).await.unwrap();
    qmp.execute(Command::new("query-block")).await.unwrap_err();
    tell.send(()).unwrap();
    assert!(done(qmp.answers_again()).await);
    qmp.execute(Command::new("query-name")).await.unwrap_err();
    assert!(!done(qmp.answers_again()).await);
    drop(qmp);
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_silence_is_not_waited_for_beyond_its_grace() {
    let (gone, stays) = oneshot::channel::<()>();
    let place = place();
    let peer = accept(&place.path, |mut client| async move {
        client.say(&greeting()).await;
        let ready = client.expect("qmp_capabilities").await;
        client.returns(&ready, json!({})).await;
        client.expect("query-block").await;
        let _ = stays.await;
    });
    let qmp = done(Qmp::connect(&place.path, impatient(SHORT))).await.unwrap();
    qmp.execute(Command::new("query-block")).await.unwrap_err();
    let since = tokio::time::Instant::now();
    assert!(!done(qmp.answers_again()).await);
    let waited = since.elapsed();
    assert!(waited < SHORT * 10 && waited > SHORT / 2, "{waited:?}");
    // It counts from the beginning of the silence, so that asking again costs nothing.
    let since = tokio::time::Instant::now();
    assert!(!done(qmp.answers_again()).await && since.elapsed() < SHORT / 2);
    drop(gone);
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_was_handed_over_is_neither_read_nor_written() {
    let (tell, told) = oneshot::channel();
    let (qmp, peer, _place) = serve(|mut client| async move {
        let from_another = client.line().await.unwrap().0;
        assert_eq!(from_another, br#"{"execute":"cont","id":"other"}"#);
        client.say(&json!({"return": {}, "id": "other"})).await;
        told.await.unwrap();
    })
    .await;
    let socket = std::os::unix::net::UnixStream::from(qmp.try_clone_socket().unwrap());
    done(qmp.hand_over()).await;
    let refused = qmp.execute(Command::new("query-status")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Silent);
    socket.set_nonblocking(false).unwrap();
    (&socket).write_all(b"{\"execute\":\"cont\",\"id\":\"other\"}\n").unwrap();
    let answer = tokio::task::spawn_blocking(move || {
        let mut answer = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(socket), &mut answer).unwrap();
        answer
    });
    assert!(done(answer).await.unwrap().contains("other"), "the connection's own reader took it");
    tell.send(()).unwrap();
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_dropped_pipeline_is_sent_whole_and_harms_nothing() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        let stop = client.expect("stop").await;
        let cont = client.expect("cont").await;
        let status = client.expect("query-status").await;
        client.returns(&stop, json!(1)).await;
        client.returns(&cont, json!(2)).await;
        client.returns(&status, json!(3)).await;
        client.expect_closed().await;
    })
    .await;
    let dropped =
        timeout(Duration::ZERO, qmp.pipeline(vec![Command::new("stop"), Command::new("cont")])).await;
    assert!(dropped.is_err(), "no reply can have come");
    assert_eq!(answers(&qmp, "query-status").await, 3);
    drop(qmp);
    done(peer).await.unwrap();
}

#[tokio::test]
async fn what_was_begun_is_sent_even_if_the_last_handle_goes() {
    let (tell, told) = oneshot::channel();
    let (qmp, peer, _place) = serve(|mut client| async move {
        told.await.unwrap();
        client.expect("qom-set").await;
        client.expect_closed().await;
    })
    .await;
    // More than the socket takes at once, so that most of it is still unsent when the handle goes.
    let long = Command::with("qom-set", json!({"value": "x".repeat(300_000)}));
    assert!(timeout(Duration::ZERO, qmp.execute(long)).await.is_err());
    drop(qmp);
    tell.send(()).unwrap();
    done(peer).await.unwrap();
}

#[tokio::test]
async fn unknown_and_repeated_ids_are_passed_over() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        let first = client.expect("query-status").await;
        client.say(&json!({"return": "foreign", "id": 987_654_321})).await;
        client.say(&json!({"return": "foreign", "id": "text"})).await;
        client.say(&json!({"return": "foreign", "id": -1})).await;
        client.say(&json!({"return": "none"})).await;
        client.returns(&first, json!("first")).await;
        client.returns(&first, json!("again")).await;
        let second = client.expect("query-name").await;
        assert_ne!(first.id, second.id);
        client.returns(&first, json!("and again")).await;
        client.returns(&second, json!("second")).await;
    })
    .await;
    assert_eq!(answers(&qmp, "query-status").await, "first");
    assert_eq!(answers(&qmp, "query-name").await, "second");
    done(peer).await.unwrap();
}

#[tokio::test]
async fn every_event_reaches_every_subscriber_whatever_its_name() {
    let (tell, told) = oneshot::channel();
    let (qmp, peer, _place) = serve(|mut client| async move {
        told.await.unwrap();
        let command = client.expect("stop").await;
        client.event("STOP", Value::Null).await;
        client.event("FROM_THE_FUTURE", json!({"a": [1, 2]})).await;
        client.returns(&command, json!({})).await;
        client.say(&json!({"event": "TIMELESS"})).await;
    })
    .await;
    let (mut first, mut second) = (qmp.events(), qmp.events());
    tell.send(()).unwrap();
    answers(&qmp, "stop").await;
    for events in [&mut first, &mut second] {
        let mut next = async || done(events.next()).await.expect("an event").expect("nothing was lost");
        let stop = next().await;
        assert_eq!(stop.name, "STOP");
        assert_eq!(stop.timestamp, Duration::from_micros(1_700_000_000_000_250));
        let unknown = next().await;
        assert_eq!((unknown.name.as_str(), unknown.data), ("FROM_THE_FUTURE", json!({"a": [1, 2]})));
        assert_eq!(next().await.name, "TIMELESS");
        assert!(done(events.next()).await.is_none(), "the peer is gone");
    }
    done(peer).await.unwrap();
    assert!(done(qmp.events().next()).await.is_none(), "a late subscriber does not wait for ever");
}

#[tokio::test]
async fn a_peer_that_vanishes_fails_all_that_is_pending_and_all_that_follows() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        let first = client.expect("stop").await;
        client.expect("query-block").await;
        client.expect("cont").await;
        client.returns(&first, json!({})).await;
    })
    .await;
    let pipelined =
        done(qmp.pipeline(vec![Command::new("stop"), Command::new("query-block"), Command::new("cont")]))
            .await
            .unwrap();
    assert!(pipelined.replies[0].is_ok(), "what was answered before the end is answered");
    for reply in &pipelined.replies[1..] {
        assert_eq!(reply.as_ref().unwrap_err().kind(), ErrorKind::Disconnected);
    }
    done(peer).await.unwrap();
    let error = done(qmp.execute(Command::new("query-status"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    assert!(error.to_string().contains("query-status"), "{error}");
    assert_eq!(
        done(qmp.pipeline(vec![Command::new("stop")])).await.unwrap_err().kind(),
        ErrorKind::Disconnected
    );
}

/// A peer that says `bytes` instead of an answer, which must end the connection with a protocol error.
async fn poisons(bytes: Vec<u8>) -> Error {
    let (qmp, peer, _place) = serve(|mut client| async move {
        client.expect("query-block").await;
        client.expect("query-status").await;
        let _ = client.try_raw(&bytes).await;
        // The client hangs up, perhaps before it has taken everything.
        while client.line().await.is_some() {}
    })
    .await;
    let mut events = qmp.events();
    let pipelined =
        done(qmp.pipeline(vec![Command::new("query-block"), Command::new("query-status")])).await.unwrap();
    for reply in &pipelined.replies {
        assert_eq!(reply.as_ref().unwrap_err().kind(), ErrorKind::Protocol);
    }
    assert!(done(events.next()).await.is_none());
    let error = done(qmp.execute(Command::new("query-name"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
    assert!(error.to_string().len() < 800, "{error}");
    assert!(!error.to_string().contains(char::is_control), "{error:?}");
    drop(qmp);
    done(peer).await.unwrap();
    error
}

#[tokio::test]
async fn a_message_without_end_poisons_the_connection() {
    let mut line = b"{\"return\": \"".to_vec();
    line.resize(20 << 20, b'x');
    assert!(poisons(line).await.to_string().contains("16 MiB"));
}

#[tokio::test]
async fn a_message_just_under_the_limit_is_taken() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        let command = client.expect("query-named-block-nodes").await;
        let text = "x".repeat((16 << 20) - 100);
        client.returns(&command, json!(text)).await;
    })
    .await;
    let value = answers(&qmp, "query-named-block-nodes").await;
    assert_eq!(value.as_str().map(str::len), Some((16 << 20) - 100));
    done(peer).await.unwrap();
}

#[tokio::test]
async fn what_is_not_a_message_poisons_the_connection() {
    poisons(b"{\"return\": \"\xc3\x28\", \"id\": 0}\r\n".to_vec()).await;
    poisons(b"\x1b[2Jhello\r\n".to_vec()).await;
    poisons(b"{\"return\": {}\r\n".to_vec()).await;
    poisons(b"[1, 2]\r\n".to_vec()).await;
    poisons(b"{\"neither\": 1}\r\n".to_vec()).await;
    poisons([vec![b'['; 100_000], b"\r\n".to_vec()].concat()).await;
    poisons(format!("{}\r\n", greeting()).into_bytes()).await;
    let error =
        poisons(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\r\n".to_vec())
            .await;
    assert!(error.to_string().contains("JSON parse error"), "{error}");
}

#[tokio::test]
async fn the_descriptor_is_the_right_file_and_comes_with_the_first_byte() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"the right file").unwrap();
    let wanted = file.metadata().unwrap();
    let (qmp, peer, _place) = serve(move |mut client| async move {
        for name in ["query-status", "getfd", "query-name", "add-fd"] {
            let command = client.expect(name).await;
            let found: Vec<File> = command.fds.iter().map(|fd| File::from(fd.try_clone().unwrap())).collect();
            if name.starts_with("query") {
                assert!(found.is_empty());
            } else {
                // Longer than the socket takes at once, and still only one descriptor.
                assert_eq!(found.len(), 1);
                let found = found[0].metadata().unwrap();
                assert_eq!((found.dev(), found.ino()), (wanted.dev(), wanted.ino()));
            }
            client.returns(&command, json!({})).await;
        }
    })
    .await;
    answers(&qmp, "query-status").await;
    let long = Command::with("getfd", json!({"fdname": "x".repeat(500_000)}));
    done(qmp.execute_with_fd(long, file.as_fd())).await.unwrap();
    answers(&qmp, "query-name").await;
    done(qmp.execute_with_fd(Command::new("add-fd"), file.as_fd())).await.unwrap();
    done(peer).await.unwrap();
}

#[tokio::test]
async fn commands_with_a_descriptor_wait_for_one_another() {
    let file = tempfile::tempfile().unwrap();
    let (qmp, peer, _place) = serve(|mut client| async move {
        let first = client.expect("getfd").await;
        // Only after the first is answered may the second descriptor be on its way.
        let early = timeout(SHORT, client.command()).await;
        assert!(early.is_err(), "{early:?}");
        client.returns(&first, json!(1)).await;
        let second = client.expect("add-fd").await;
        client.returns(&second, json!(2)).await;
    })
    .await;
    let (first, second) = done(async {
        tokio::join!(
            qmp.execute_with_fd(Command::new("getfd"), file.as_fd()),
            qmp.execute_with_fd(Command::new("add-fd"), file.as_fd())
        )
    })
    .await;
    assert_eq!((first.unwrap(), second.unwrap()), (json!(1), json!(2)));
    done(peer).await.unwrap();
}

#[tokio::test]
async fn a_duplicate_of_the_socket_keeps_it_open_and_reaches_the_monitor() {
    let (qmp, peer, _place) = serve(|mut client| async move {
        client.expect("cont").await;
        client.expect_closed().await;
    })
    .await;
    let socket = std::os::unix::net::UnixStream::from(qmp.try_clone_socket().unwrap());
    drop(qmp);
    (&socket).write_all(b"{\"execute\": \"cont\"}\n").unwrap();
    drop(socket);
    done(peer).await.unwrap();
}
