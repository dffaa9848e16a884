//! The client against a server that breaks the protocol, dawdles, or dies at any byte.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, also in its own helpers"
)]

#[path = "../../testkit/src/nbd_peer.rs"]
#[allow(dead_code, unreachable_pub)]
mod nbd_peer;

use bytes::Bytes;
use futures_util::FutureExt;
use nbd_peer::{Export, Level, Misbehaviour as M, serve};
use proptest::prelude::*;
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use stillpoint_model::{Length, Offset, Range};
use stillpoint_nbd::{Client, Deadlines, Errno, ErrorKind, MetaContext, Options, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    task::JoinHandle,
    time::timeout,
};

const LEVELS: [Level; 3] = [Level::Simple, Level::Structured, Level::Extended];
const INVALID: ErrorKind = ErrorKind::Server { errno: Errno::EINVAL };

fn range(offset: u64, length: u64) -> Range {
    Range::new(Offset::new(offset), Length::new(length)).unwrap()
}

/// Blocks of data and holes in turn, and an odd tail.
fn disk(size: usize) -> Vec<u8> {
    (0..size).map(|at| if at / 4096 % 3 == 1 { 0 } else { (at % 251) as u8 + 1 }).collect()
}

fn options(deadline: Duration) -> Options {
    let deadlines = Deadlines { connect: deadline, request: deadline };
    Options::new("disk").context(MetaContext::base_allocation()).deadlines(deadlines)
}

fn start(export: Export) -> (UnixStream, JoinHandle<std::io::Result<()>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, tokio::spawn(serve(theirs, export)))
}

async fn open(export: Export) -> Result<Client> {
    Client::from_stream(start(export).0, options(Duration::from_secs(20))).await
}

/// All that a client does, checked against what the server holds.
async fn session(stream: UnixStream, data: &[u8], deadline: Duration) -> Result<()> {
    let client = Client::from_stream(stream, options(deadline)).await?;
    let base = MetaContext::base_allocation();
    let size = client.size();
    if client.has_context(&base) {
        let map = client.map(&base, Offset::ZERO, size).await?;
        assert_eq!(map.iter().map(|extent| extent.range.length()).sum::<Length>(), size);
        for extent in map.iter().filter(|extent| extent.is_zero(&base)) {
            let (start, end) = (extent.range.start().get() as usize, extent.range.end().get() as usize);
            assert!(data[start..end].iter().all(|byte| *byte == 0));
        }
    }
    let half = size.get() / 2 + 1;
    let (head, tail) = tokio::join!(client.read(range(0, half)), client.read(range(half, size.get() - half)));
    assert_eq!([head?, tail?].concat(), data);
    // More parts than requests may be on their way at once.
    assert_eq!(client.read_in_parts(range(0, size.get()), Length::new(half / 12 + 1)).await?, data);
    client.write(Offset::new(3), Bytes::copy_from_slice(&data[3..9])).await?;
    client.flush().await?;
    client.trim(range(0, 1)).await?;
    client.disconnect().await
}

#[tokio::test]
async fn a_good_server_is_served_well_at_every_level() {
    for level in LEVELS {
        for size in [9, 511, 4096, 70_001, 300_000] {
            let data = disk(size);
            let (stream, server) = start(Export::new(data.clone(), level));
            session(stream, &data, Duration::from_secs(20)).await.unwrap();
            server.await.unwrap().unwrap_or_else(|error| panic!("{level:?}, {size}: the server saw {error}"));
        }
    }
}

#[tokio::test]
async fn a_broken_handshake_is_a_typed_error() {
    let cases = [
        (M::WrongInitMagic, ErrorKind::NotNbd),
        (M::Oldstyle, ErrorKind::NotNbd),
        (M::NotFixed, ErrorKind::NotNbd),
        (M::WrongOptionMagic, ErrorKind::Protocol),
        (M::WrongOption, ErrorKind::Protocol),
        (M::HugeOptionReply, ErrorKind::Protocol),
        (M::EndlessInfo, ErrorKind::Protocol),
        (M::EndlessContexts, ErrorKind::Protocol),
        (M::UnaskedContext, ErrorKind::Protocol),
        (M::NoSize, ErrorKind::Protocol),
        (M::HugeSize, ErrorKind::Protocol),
        (M::OddBlockSize, ErrorKind::Protocol),
        (M::NoSuchExport, ErrorKind::NoSuchExport),
        (M::WantsTls, ErrorKind::Refused),
    ];
    for level in [Level::Structured, Level::Extended] {
        for (misbehaviour, kind) in cases {
            let error = open(Export::new(disk(5000), level).but(misbehaviour)).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{misbehaviour:?}: {error}");
            let text = error.to_string();
            assert!(text.chars().all(|c| !c.is_control()) && text.len() < 400, "{text:?}");
        }
    }
}

#[tokio::test]
async fn a_broken_reply_to_a_read_is_a_typed_error() {
    let both = [Level::Structured, Level::Extended].as_slice();
    let cases: &[(M, &[Level], ErrorKind)] = &[
        (M::WrongReplyMagic, &LEVELS, ErrorKind::Protocol),
        (M::UnaskedCookie, &LEVELS, ErrorKind::Protocol),
        (M::UnknownChunk, both, ErrorKind::Protocol),
        (M::UnknownError, both, INVALID),
        (M::Fails, &LEVELS, INVALID),
        (M::FailsSimply, &[Level::Simple, Level::Structured], INVALID),
        (M::FailsSimply, &[Level::Extended], ErrorKind::Protocol),
        (M::FailsAtOffset, both, INVALID),
        (M::FailsWithSuccess, both, ErrorKind::Protocol),
        (M::ErrorTooShort, both, ErrorKind::Protocol),
        (M::HugeError, both, ErrorKind::Protocol),
        (M::EndlessErrors, both, ErrorKind::Protocol),
        (M::EndlessEmpty, both, ErrorKind::Protocol),
        (M::WrongOffset, &[Level::Extended], ErrorKind::Protocol),
        (M::DataOutside, both, ErrorKind::Protocol),
        (M::DataBefore, both, ErrorKind::Protocol),
        (M::DataTooLong, both, ErrorKind::Protocol),
        (M::DataOverlaps, both, ErrorKind::Protocol),
        (M::DataMissing, both, ErrorKind::Protocol),
        (M::NoData, both, ErrorKind::Protocol),
        (M::EndlessEmptyData, both, ErrorKind::Protocol),
        (M::HoleOutside, both, ErrorKind::Protocol),
        (M::HugeData, both, ErrorKind::Protocol),
        (M::SimpleRead, both, ErrorKind::Protocol),
        (M::StatusForRead, both, ErrorKind::Protocol),
    ];
    for &(misbehaviour, levels, kind) in cases {
        for &level in levels {
            let client = open(Export::new(disk(50_000), level).but(misbehaviour)).await.unwrap();
            let error = client.read(range(1000, 20_000)).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{misbehaviour:?} at {level:?}: {error}");
            assert!(error.to_string().chars().all(|c| !c.is_control()), "{error}");
            // A poisoned connection stays poisoned; a failed request leaves it whole.
            let again = client.read_in_parts(range(1000, 20_000), Length::new(4096)).await.unwrap_err();
            assert_eq!(again.kind(), kind, "{misbehaviour:?} at {level:?}, again: {again}");
        }
    }
}

#[tokio::test]
async fn a_broken_block_status_is_a_typed_error() {
    let cases = [
        M::NoExtents,
        M::EmptyExtent,
        M::WrongContextId,
        M::ContextTwice,
        M::ContextMissing,
        M::ExtentsOutside,
        M::HugeStatus,
        M::HalfExtent,
        M::WrongStatusType,
        M::DataForStatus,
        M::OneByteExtents,
    ];
    for level in [Level::Structured, Level::Extended] {
        for misbehaviour in cases.into_iter().chain((level == Level::Extended).then_some(M::WrongExtentCount))
        {
            // With 50000 bytes, one byte at a time takes more answers than a map is given.
            let client = open(Export::new(disk(50_000), level).but(misbehaviour)).await.unwrap();
            let base = MetaContext::base_allocation();
            let error = client.map(&base, Offset::ZERO, client.size()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{misbehaviour:?} at {level:?}: {error}");
        }
    }
}

#[tokio::test]
async fn a_second_reply_to_a_request_ends_the_connection() {
    for level in [Level::Structured, Level::Extended] {
        let (stream, server) = start(Export::new(disk(5000), level).but(M::DoneTwice));
        let client = Client::from_stream(stream, options(Duration::from_secs(20))).await.unwrap();
        client.read(range(0, 5000)).await.unwrap();
        // Whether the second reply is seen before or after this request is sent, it is not taken for its answer.
        assert_eq!(client.read(range(0, 4999)).await.unwrap_err().kind(), ErrorKind::Protocol);
        drop(client);
        let _ = server.await.unwrap();
    }
}

#[tokio::test]
async fn what_is_odd_but_allowed_is_accepted() {
    for level in [Level::Structured, Level::Extended] {
        for misbehaviour in [M::Backwards, M::LastExtentLonger, M::OneExtent] {
            let data = disk(70_001);
            let (stream, server) = start(Export::new(data.clone(), level).but(misbehaviour));
            session(stream, &data, Duration::from_secs(20)).await.unwrap();
            server.await.unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn a_map_is_exactly_as_long_as_asked_and_unknown_flags_are_data() {
    let base = MetaContext::base_allocation();
    for level in [Level::Structured, Level::Extended] {
        let client = open(Export::new(disk(70_001), level).but(M::OneExtent)).await.unwrap();
        for (from, most) in [(0, 1), (1, 4096), (4095, 2), (5000, 60_000), (70_000, 500), (70_001, 9)] {
            let map = client.map(&base, Offset::new(from), Length::new(most)).await.unwrap();
            let mut at = from;
            for extent in &map {
                assert_eq!(extent.range.start().get(), at);
                at = extent.range.end().get();
            }
            assert_eq!(at, (from + most).min(70_001));
            assert!(map.windows(2).all(|pair| pair[0].flags != pair[1].flags));
        }
        let past = client.map(&base, Offset::new(70_002), Length::new(1)).await.unwrap_err();
        assert_eq!(past.kind(), ErrorKind::Limits);

        let client = open(Export::new(disk(70_001), level).but(M::UnknownFlags)).await.unwrap();
        let map = client.map(&base, Offset::ZERO, client.size()).await.unwrap();
        assert!(!map.is_empty() && map.iter().all(|extent| !extent.is_zero(&base)));
    }
}

#[tokio::test]
async fn without_structured_replies_there_are_no_maps_but_reads() {
    let client = open(Export::new(disk(5000), Level::Simple)).await.unwrap();
    let base = MetaContext::base_allocation();
    assert!(!client.has_context(&base));
    assert_eq!(client.block_status(range(0, 5000)).await.unwrap_err().kind(), ErrorKind::MissingContext);
    let missing = client.map(&base, Offset::ZERO, client.size()).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::MissingContext);
    assert_eq!(client.read(range(7, 4000)).await.unwrap(), disk(5000)[7..4007]);
}

#[tokio::test]
async fn an_export_without_a_byte_has_an_empty_map() {
    let client = open(Export::new(Vec::new(), Level::Structured)).await.unwrap();
    assert!(client.size().is_zero());
    let base = MetaContext::base_allocation();
    assert_eq!(client.map(&base, Offset::ZERO, Length::new(1)).await.unwrap(), []);
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn a_caller_out_of_bounds_is_told_before_anything_is_sent() {
    let client = open(Export::new(disk(5000), Level::Structured)).await.unwrap();
    for bad in [range(5000, 1), range(4999, 2), range(0, 5001), range(1 << 40, 1)] {
        assert_eq!(client.read(bad).await.unwrap_err().kind(), ErrorKind::Limits, "{bad}");
        assert_eq!(client.trim(bad).await.unwrap_err().kind(), ErrorKind::Limits, "{bad}");
        assert_eq!(client.block_status(bad).await.unwrap_err().kind(), ErrorKind::Limits, "{bad}");
    }
    assert!(client.read(range(5000, 0)).await.unwrap().is_empty());
    let long = Options::new("x".repeat(4097));
    let refused = Client::from_stream(UnixStream::pair().unwrap().0, long).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Limits);
}

#[tokio::test]
async fn no_socket_and_no_listener_are_told_apart() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("nbd.sock");
    let error = Client::connect_unix(&path, Options::new("")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSocket);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = Client::connect_unix(&path, Options::new("")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_meets_the_deadline() {
    let (stream, _server) = start(Export::new(disk(5000), Level::Structured).but(M::Silent));
    let error = Client::from_stream(stream, options(Duration::from_secs(3))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);

    let client = open(Export::new(disk(5000), Level::Structured).but(M::NeverReplies)).await.unwrap();
    // More requests than slots: those that wait for a slot end as well.
    let reads = (0..40).map(|at| client.read(range(at, 1)));
    for result in futures_util::future::join_all(reads).await {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Timeout);
    }
    assert_eq!(client.disconnect().await.unwrap_err().kind(), ErrorKind::Timeout);
}

#[tokio::test]
async fn replies_out_of_order_find_their_requests() {
    for level in LEVELS {
        let mut export = Export::new(disk(100_000), level);
        export.batch = 8;
        let data = export.data.clone();
        let client = open(export).await.unwrap();
        let parts: Vec<Range> = (0..64).map(|index| range(index * 1500, 1 + index * 70)).collect();
        let reads = futures_util::future::join_all(parts.iter().map(|part| client.read(*part))).await;
        for (part, read) in parts.iter().zip(reads) {
            let (start, end) = (part.start().get() as usize, part.end().get() as usize);
            assert_eq!(read.unwrap(), data[start..end], "{part}");
        }
    }
}

/// A client of a server that answers so many requests together, and that may have no more on their way; and the disk.
async fn held_back(level: Level, requests: usize) -> (Client, Vec<u8>) {
    let mut export = Export::new(disk(100_000), level);
    export.batch = requests;
    let data = export.data.clone();
    let options = options(Duration::from_secs(20)).in_flight(requests);
    (Client::from_stream(start(export).0, options).await.unwrap(), data)
}

#[tokio::test]
async fn an_abandoned_request_does_no_harm_to_those_after_it() {
    for level in LEVELS {
        let (client, data) = held_back(level, 2).await;
        for round in 0..20 {
            // Sent, since it was polled once, and held back by the server until there are two.
            assert!(client.read(range(round, 70_000)).now_or_never().is_none());
            let read = client.read(range(round + 1, 30_000)).await.unwrap();
            let start = round as usize + 1;
            assert_eq!(read, data[start..start + 30_000]);
        }
    }
}

#[tokio::test]
async fn a_read_in_parts_that_is_abandoned_does_no_harm_either() {
    for level in LEVELS {
        let (client, data) = held_back(level, 4).await;
        let part = Length::new(10_000);
        for round in 0..20 {
            // Three are sent and held back, until the fourth.
            assert!(client.read_in_parts(range(0, 30_000), part).now_or_never().is_none());
            assert_eq!(client.read(range(round, 30_000)).await.unwrap(), data[round as usize..][..30_000]);
            // Eight parts, of which four may be on their way.
            assert_eq!(client.read_in_parts(range(20_000, 80_000), part).await.unwrap(), data[20_000..]);
        }
    }
}

#[tokio::test]
async fn a_late_answer_is_thrown_away() {
    let mut export = Export::new(disk(100_000), Level::Structured);
    export.batch = 2;
    let data = export.data.clone();
    let deadlines = Deadlines { request: Duration::from_millis(50), ..Deadlines::default() };
    let client = Client::from_stream(start(export).0, Options::new("").deadlines(deadlines)).await.unwrap();
    assert_eq!(client.read(range(0, 90_000)).await.unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(client.read(range(5, 80)).await.unwrap(), data[5..85]);
    let (one, two) = tokio::join!(client.read(range(1, 9)), client.read(range(2, 9)));
    assert_eq!((&one.unwrap()[..], &two.unwrap()[..]), (&data[1..10], &data[2..11]));
}

#[tokio::test]
async fn the_connection_ends_with_its_last_handle() {
    let (stream, server) = start(Export::new(disk(5000), Level::Structured));
    let client = Client::from_stream(stream, options(Duration::from_secs(20))).await.unwrap();
    let clone = client.clone();
    drop(client);
    clone.read(range(0, 5000)).await.unwrap();
    drop(clone);
    let ended = timeout(Duration::from_secs(20), server).await.expect("the server still has its client");
    assert_eq!(ended.unwrap().unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn a_disconnect_waits_for_what_is_in_flight_and_turns_others_away() {
    let (stream, server) = start(Export::new(disk(100_000), Level::Structured));
    let client = Client::from_stream(stream, options(Duration::from_secs(20))).await.unwrap();
    let (read, closed) = tokio::join!(client.read(range(0, 100_000)), client.clone().disconnect());
    assert_eq!(read.unwrap().len(), 100_000);
    closed.unwrap();
    server.await.unwrap().unwrap();
    assert_eq!(client.read(range(0, 1)).await.unwrap_err().kind(), ErrorKind::Disconnected);
    assert_eq!(client.disconnect().await.unwrap_err().kind(), ErrorKind::Disconnected);
}

/// Passes what the server sends through `change`, piece by piece; `None` cuts the connection both ways. Gives the
/// number of bytes passed.
async fn through(
    server: UnixStream,
    client: UnixStream,
    piece: usize,
    mut change: impl FnMut(usize, &mut u8) -> Option<()> + Send,
) -> usize {
    let (mut from_server, mut to_server) = server.into_split();
    let (mut from_client, mut to_client) = client.into_split();
    let up = tokio::spawn(async move {
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
    });
    let mut passed = 0;
    let mut buffer = vec![0; piece];
    'all: while let Ok(got @ 1..) = from_server.read(&mut buffer).await {
        let mut keep = got;
        for (index, byte) in buffer[..got].iter_mut().enumerate() {
            if change(passed + index, byte).is_none() {
                keep = index;
                break;
            }
        }
        passed += keep;
        if to_client.write_all(&buffer[..keep]).await.is_err() || keep < got {
            break 'all;
        }
    }
    up.abort();
    let _ = up.await;
    passed
}

async fn session_through(
    export: Export,
    piece: usize,
    deadline: Duration,
    change: impl FnMut(usize, &mut u8) -> Option<()> + Send + 'static,
) -> (Result<()>, usize) {
    let data = export.data.clone();
    let (server, _task) = start(export);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let proxy = tokio::spawn(through(server, theirs, piece, change));
    let result =
        timeout(Duration::from_secs(60), session(ours, &data, deadline)).await.expect("the client hangs");
    (result, proxy.await.unwrap())
}

#[tokio::test]
async fn bytes_may_come_one_by_one() {
    for level in LEVELS {
        let (result, _) =
            session_through(Export::new(disk(9001), level), 1, Duration::from_secs(30), |_, _| Some(()))
                .await;
        result.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_cut_at_any_byte_is_an_error() {
    for level in LEVELS {
        let data: Vec<u8> = (0..700u32).map(|at| (at % 251) as u8 + 1).collect();
        let export = Export::new(data, level);
        let limit = Duration::from_secs(30);
        let (result, whole) = session_through(export.clone(), 4096, limit, |_, _| Some(())).await;
        result.unwrap();
        assert!(whole > 700);
        for cut in 0..whole {
            let keep = move |at, _: &mut u8| (at < cut).then_some(());
            let (result, _) = session_through(export.clone(), 4096, limit, keep).await;
            let error = result.expect_err("a cut connection goes unnoticed");
            assert_eq!(error.kind(), ErrorKind::Disconnected, "{level:?}, cut at {cut}: {error}");
        }
    }
}

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Panics in the client's own tasks do not reach the test by themselves.
fn count_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info.location().is_some_and(|place| place.file().contains("nbd/src")) {
            PANICS.fetch_add(1, Ordering::SeqCst);
        }
        before(info);
    }));
}

/// What a client does without a look at what it gets.
async fn careless(stream: UnixStream) -> Result<()> {
    let client = Client::from_stream(stream, options(Duration::from_millis(40))).await?;
    let base = MetaContext::base_allocation();
    let some = Length::new(client.size().get().min(1 << 16));
    let _ = client.map(&base, Offset::ZERO, some).await;
    let _ = tokio::join!(
        client.read(range(0, some.get() / 2)),
        client.read(range(some.get() / 2, some.get() / 4))
    );
    client.disconnect().await
}

fn run(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(Duration::from_secs(20), work).await.expect("the client hangs") });
}

#[test]
fn random_bytes_neither_panic_nor_hang() {
    count_panics();
    let level = prop::sample::select(LEVELS.to_vec());
    let config = ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() };
    // Random from the start; random after a good handshake; one byte changed anywhere.
    let noise = proptest::collection::vec(any::<u8>(), 0..300);
    let strategy = (level, 0usize..700, any::<u8>(), any::<bool>(), noise);
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let tested = runner.run(&strategy, |(level, from, change, rest, noise)| {
        let first = noise.clone();
        run(async move {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&first).await.unwrap();
            theirs.shutdown().await.unwrap();
            assert!(careless(ours).await.is_err());
        });
        run(async move {
            let (server, _task) = start(Export::new(disk(9001), level));
            let (ours, theirs) = UnixStream::pair().unwrap();
            let proxy = tokio::spawn(through(server, theirs, 512, move |at, byte| {
                if at == from {
                    *byte ^= change;
                } else if at > from && rest {
                    *byte = noise.get(at % 300).copied().unwrap_or(*byte);
                }
                Some(())
            }));
            let _ = careless(ours).await;
            proxy.await.unwrap();
        });
        Ok(())
    });
    tested.unwrap();
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}
