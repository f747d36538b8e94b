//! The folder on a real file system: who may open it, and who may read it.

use super::*;

#[test]
fn a_folder_has_one_owner_and_the_second_is_told_who() {
    let folder = tempfile::tempdir().unwrap();
    let journal = Journal::open(folder.path(), small())
        .unwrap()
        .recover(|_, _| {})
        .unwrap();
    let Err(JournalError::Locked { path, holder }) = Journal::open(folder.path(), small()) else {
        panic!("opened twice");
    };
    assert_eq!(path, folder.path());
    assert_eq!(holder, Some(std::process::id()));
    journal.close().unwrap();
    Journal::open(folder.path(), small()).unwrap();
}

#[cfg(unix)]
#[test]
fn files_are_their_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made/for/us");
    let journal = Journal::open(&path, small())
        .unwrap()
        .recover(|_, _| {})
        .unwrap();
    journal.append(put("secret")).unwrap();
    journal.close().unwrap();
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    let files: Vec<_> = path
        .read_dir()
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    assert_eq!(files.len(), 2, "{files:?}");
    for file in files {
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }
}

#[test]
fn segments_are_allocated_at_once_and_cut_to_size_when_done() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let options = JournalOptions {
        segment_bytes: 64 << 10,
        ..small()
    };
    let journal = Journal::open(folder.path(), options)
        .unwrap()
        .recover(|_, _| {})
        .unwrap();
    let appended = journal.append(put("a")).unwrap();
    runtime.block_on(journal.synced(appended.lsn)).unwrap();
    let file = folder.path().join("00000000000000000001.seg");
    let len = || file.metadata().unwrap().len();
    if cfg!(target_os = "linux") {
        assert_eq!(len(), 64 << 10);
    }
    journal.close().unwrap();
    assert_eq!(len(), 32 + (32 + 9 + 1) + (32 + 1));
}

#[test]
fn other_files_in_the_folder_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.seg"), "mine").unwrap();
    std::fs::write(folder.path().join("1.txt"), "mine").unwrap();
    let journal = Journal::open(folder.path(), small())
        .unwrap()
        .recover(|_, _| {})
        .unwrap();
    journal.close().unwrap();
    assert_eq!(
        std::fs::read(folder.path().join("notes.seg")).unwrap(),
        b"mine"
    );
}
