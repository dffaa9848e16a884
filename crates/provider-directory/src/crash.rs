//! Runs that end in the middle, as by a crash: nothing half-made is ever listed, and the next run works.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

#[path = "../tests/common/mod.rs"]
mod common;

use crate::{DirectoryProvider, backup::Step};
use common::{Disk, Random, Vm, assert_restores, findings};
use stillpoint_provider::{ErrorKind, Provider};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_each_step_of_a_commit() {
    for step in [Step::WriteManifest, Step::SyncPartial, Step::Rename, Step::SyncParent, Step::End] {
        let scratch = tempfile::tempdir().unwrap();
        let provider = DirectoryProvider::new(scratch.path().to_owned());
        let mut random = Random(7);
        let mut vm = Vm::new("web01", vec![Disk::new("vda", 3_000_001, 65_536)]);
        vm.disks[0].scribble(&mut random, 10);
        let first = vm.back_up(&provider).await;
        vm.disks[0].scribble(&mut random, 10);

        let mut dying = provider.clone();
        dying.stop_before = Some(step);
        let (mut backup, id, frozen, answers, reports) = vm.store(&dying, usize::MAX).await;
        reports.unwrap();
        let error = backup.commit(&vm.record(&id, &answers)).await.unwrap_err();
        // The process is gone: nobody cleans up.
        drop(backup);

        let listed = provider.points(None).await.unwrap();
        let there = listed.iter().any(|point| point.id == id);
        assert_eq!(there, matches!(step, Step::SyncParent | Step::End), "{step:?}");
        assert_eq!(listed.len(), 1 + usize::from(there));
        if step == Step::SyncParent {
            assert_eq!(error.kind(), ErrorKind::CommitUnknown);
        }
        for point in &listed {
            assert_eq!(point.damage, None);
            assert_eq!(findings(&provider, &vm.name, &point.id).await, Vec::<String>::new());
        }

        // The bitmap is still relative to the first point, which is a good base whatever became of the second.
        let third = vm.back_up(&provider).await;
        assert_eq!(answers, third.answers);
        assert_restores(&provider, &vm.name, &first).await;
        assert_restores(&provider, &vm.name, &third).await;
        if there {
            let second = common::Taken {
                id,
                disks: vec![(vm.disks[0].name.clone(), frozen[0].bytes.clone())],
                reports: Vec::new(),
                answers,
            };
            assert_restores(&provider, &vm.name, &second).await;
        }
        let names = std::fs::read_dir(scratch.path().join("web01")).unwrap();
        for name in names {
            let name = name.unwrap().file_name();
            assert!(!name.to_str().unwrap().starts_with('.'), "{name:?} was left");
        }
    }
}
