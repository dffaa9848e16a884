//! What a target is, and where one is made: never where something else is, or where one was before.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod common;

use common::{Disk, Random, Vm, assert_restores, findings};
use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt as _, path::Path, sync::Arc};
use stillpoint_model::TargetId;
use stillpoint_provider::{Depth, ErrorKind, Provider};
use stillpoint_provider_directory::{Before, DirectoryProvider, TargetState};

fn at(path: &Path) -> DirectoryProvider {
    DirectoryProvider::new(path.to_owned())
}

fn before(id: &TargetId) -> Before {
    Before::Targets(vec![id.clone()])
}

fn vm() -> Vm {
    let mut vm = Vm::new("web01", vec![Disk::new("vda", 1_000_001, 65_536)]);
    vm.disks[0].scribble(&mut Random(9), 8);
    vm
}

/// What each call says of a target that cannot be used, and that none of them touched anything.
async fn refused(provider: &DirectoryProvider, kind: ErrorKind, words: &[&str]) {
    let before = listing(provider.path());
    let point = vm().next_id();
    let (name, progress) = ("web01".parse().unwrap(), Arc::new(common::Counted::default()));
    let errors = [
        provider.job_init().await.err(),
        provider.backup_init(&name, &point).await.err(),
        provider.points(None).await.err(),
        provider.points(Some(&name)).await.err(),
        provider.restore_vm_init(&name, &point).await.err(),
        provider.verify(&name, &point, progress).await.err(),
    ];
    for (call, error) in errors.into_iter().enumerate() {
        let error = error.unwrap_or_else(|| panic!("call {call} did it"));
        assert_eq!(error.kind(), kind, "call {call}: {error}");
        for word in words {
            assert!(error.to_string().contains(word), "call {call}: {word:?} is missing in: {error}");
        }
    }
    assert_eq!(listing(provider.path()), before);
}

fn listing(path: &Path) -> Option<Vec<std::ffi::OsString>> {
    let mut names: Vec<_> = fs::read_dir(path).ok()?.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    Some(names)
}

#[tokio::test]
async fn a_target_is_made_where_there_is_nothing_and_was_none() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, entries) in
        [("new", None), ("empty", Some(&[][..])), ("fresh", Some(&["lost+found", ".stillpoint-77"]))]
    {
        let path = scratch.path().join(name);
        for entry in entries.into_iter().flatten() {
            fs::create_dir_all(path.join(entry)).unwrap();
        }
        if entries.is_some_and(<[_]>::is_empty) {
            fs::create_dir(&path).unwrap();
        }
        let provider = at(&path);
        // Nothing but a backup makes one, and nothing takes this for a target without points.
        assert_eq!(provider.points(None).await.unwrap_err().kind(), ErrorKind::TargetMissing, "{name}");
        let examined = provider.examine().await.unwrap();
        assert!(matches!(examined.state, TargetState::New | TargetState::Empty), "{examined:?}");
        assert!(examined.obstacle.is_none() && examined.space.is_some(), "{examined:?}");
        let id = provider.job_init().await.unwrap();
        assert_eq!(provider.examine().await.unwrap().state, TargetState::Target(id.clone()));
        assert_eq!(provider.points(None).await.unwrap(), []);
        assert_eq!(at(&path).known(before(&id)).job_init().await.unwrap(), id);
    }
}

#[tokio::test]
async fn no_target_is_made_where_one_was() {
    let scratch = tempfile::tempdir().unwrap();
    let id: TargetId = "0badcafe".parse().unwrap();
    for name in ["missing", "empty", "foreign"] {
        let path = scratch.path().join(name);
        if name != "missing" {
            fs::create_dir(&path).unwrap();
        }
        if name == "foreign" {
            fs::write(path.join("NOT-MOUNTED"), "").unwrap();
        }
        let provider = at(&path).known(before(&id));
        let words = ["target 0badcafe was here before", "is it mounted?", path.to_str().unwrap()];
        refused(&provider, ErrorKind::TargetMissing, &words).await;
        assert!(provider.examine().await.unwrap().obstacle.is_some());
    }
    let both = Before::Targets(vec![id.clone(), "00000001".parse().unwrap()]);
    let provider = at(&scratch.path().join("empty")).known(both);
    refused(&provider, ErrorKind::TargetMissing, &["one of the targets 0badcafe, 00000001 was here"]).await;
    // Nor where that cannot be told. What is a target all the same is one.
    let unknown = Before::Unknown("the disk is on fire".to_owned());
    let provider = at(&scratch.path().join("empty")).known(unknown.clone());
    refused(&provider, ErrorKind::TargetMissing, &["cannot be told: the disk is on fire"]).await;
    let made = at(&scratch.path().join("other")).job_init().await.unwrap();
    let provider = at(&scratch.path().join("other")).known(unknown);
    assert_eq!(provider.job_init().await.unwrap(), made);
    // Another than the one that was there is one too: disks that are changed each week are mounted in one place.
    assert_eq!(at(&scratch.path().join("other")).known(before(&id)).job_init().await.unwrap(), made);
    // On purpose one is made wherever nothing is in the way.
    for name in ["missing", "empty"] {
        let provider = at(&scratch.path().join(name)).known(before(&id));
        let (made, new) = provider.create().await.unwrap();
        assert!(new && made != id);
        assert_eq!(provider.create().await.unwrap(), (made.clone(), false));
        assert_eq!(provider.job_init().await.unwrap(), made);
    }
}

#[tokio::test]
async fn what_is_no_target_is_refused_by_every_call() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    for (name, file) in [("photos", "a.jpg"), ("hidden", ".snapshot"), ("vm", "web01")] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join(file), "").unwrap();
        let words = ["other things", file, path(name).to_str().unwrap()].map(str::to_owned);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        refused(&at(&path(name)), ErrorKind::TargetForeign, &words).await;
        assert_eq!(at(&path(name)).create().await.unwrap_err().kind(), ErrorKind::TargetForeign);
    }
    // A name that is not UTF-8 is something too, and is shown as what a terminal takes.
    fs::create_dir(path("latin")).unwrap();
    fs::write(path("latin").join(OsStr::from_bytes(b"\x1b[2Jm\xfcll")), "").unwrap();
    let error = at(&path("latin")).job_init().await.unwrap_err().to_string();
    assert!(error.contains("other things") && error.chars().all(|c| !c.is_control()), "{error:?}");
    fs::write(path("file"), "").unwrap();
    refused(&at(&path("file")), ErrorKind::TargetForeign, &["not a directory"]).await;
    refused(&at(&path("file/x")), ErrorKind::TargetForeign, &["not a directory"]).await;
    refused(&at(&path("not/mounted")), ErrorKind::TargetMissing, &["is it mounted?"]).await;
    // An identity that is none.
    for (name, content) in
        [("empty-identity", ""), ("garbage", "{\"format\":1}"), ("newer", "{\"format\":2}")]
    {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("stillpoint-target.json"), content).unwrap();
        refused(&at(&path(name)), ErrorKind::TargetForeign, &["does not say which target it is"]).await;
        // Nothing else is there, so that nothing is lost by another.
        assert!(at(&path(name)).create().await.unwrap().1);
        assert_eq!(at(&path(name)).points(None).await.unwrap(), []);
    }
    fs::create_dir_all(path("linked")).unwrap();
    std::os::unix::fs::symlink(path("garbage/stillpoint-target.json"), path("linked/stillpoint-target.json"))
        .unwrap();
    refused(&at(&path("linked")), ErrorKind::TargetForeign, &["does not say which target it is"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identity_that_is_lost_takes_no_point_away() {
    let scratch = tempfile::tempdir().unwrap();
    let provider = at(scratch.path());
    let mut vm = vm();
    let taken = vm.back_up(&provider).await;
    let was = provider.job_init().await.unwrap();
    provider.job_cleanup().await.unwrap();
    let identity = scratch.path().join("stillpoint-target.json");
    for damage in ["", "garbage"] {
        fs::write(&identity, damage).unwrap();
        if damage.is_empty() {
            fs::remove_file(&identity).unwrap();
        }
        assert_restores(&provider, &vm.name, &taken).await;
        assert_eq!(provider.points(None).await.unwrap().len(), 1);
        assert!(findings(&provider, &vm.name, &taken.id).await.is_empty());
        let report = provider.verify_target(Depth::Full, Arc::new(common::Counted::default())).await.unwrap();
        assert_eq!(report.unwrap().findings.len(), 1);
        // But nothing is added to what may be another's.
        assert_eq!(provider.job_init().await.unwrap_err().kind(), ErrorKind::TargetForeign);
        let id = vm.next_id();
        assert_eq!(provider.backup_init(&vm.name, &id).await.err().unwrap().kind(), ErrorKind::TargetForeign);
        // Until it is given another on purpose. No bitmap is of that one.
        let (made, new) = provider.create().await.unwrap();
        assert!(new && made != was);
        assert_restores(&provider, &vm.name, &taken).await;
    }
    vm.back_up(&provider).await;
}

#[tokio::test]
async fn a_target_that_is_changed_while_a_job_begins_is_noticed() {
    let scratch = tempfile::tempdir().unwrap();
    let (path, other) = (scratch.path().join("target"), scratch.path().join("other"));
    let provider = at(&path);
    provider.job_init().await.unwrap();
    at(&other).job_init().await.unwrap();
    fs::rename(&path, scratch.path().join("aside")).unwrap();
    fs::rename(&other, &path).unwrap();
    let mut vm = vm();
    let id = vm.next_id();
    let error = provider.backup_init(&vm.name, &id).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TargetForeign, "{error}");
    provider.job_cleanup().await.unwrap();
    vm.back_up(&provider).await;
}
