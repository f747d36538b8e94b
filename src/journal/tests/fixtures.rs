//! Logs of every format version that was ever written must stay readable. The
//! folder of version 1 was written by `write_the_fixture_of_version_1`.

use std::path::PathBuf;

use super::*;

/// Where a version's files are.
fn fixture(version: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/journal-v{version}"))
}

/// What the fixture holds: entries 1 to 60, of which the multiples of seven are
/// left, and one that was put with the last removes.
fn expected() -> Entries {
    (1..=60u64)
        .filter(|id| id % 7 == 0)
        .chain([61])
        .map(|id| (id, body(id, id as usize * 13)))
        .collect()
}

#[test]
fn a_log_of_version_1_is_read() {
    let disk = Disk::new();
    let mut segments = 0;
    for file in fixture(1).read_dir().unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        disk.insert(&name, std::fs::read(&path).unwrap());
        segments += usize::from(name.ends_with(".seg"));
    }
    assert!(segments > 1);
    let (mut rig, found) = Rig::open(&disk).unwrap();
    assert_eq!(found, expected());
    assert_eq!(rig.report.segments, segments);
    let ids: Vec<_> = found.keys().copied().collect();
    let read = rig.read(&ids).unwrap();
    assert!(read.into_iter().flatten().eq(found.into_values()));
    // One that compaction moved is among them, and the next id is known.
    let moved = |id| !rig.shared.lock().index.locate(id).unwrap().home;
    assert!(ids.iter().copied().any(moved));
    assert_eq!(rig.append(put("next")).unwrap().first, 62);
    rig.work().unwrap();
}

#[test]
fn a_log_of_a_newer_version_is_refused_with_both_versions() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    rig.append(put("a")).unwrap();
    rig.work().unwrap();
    rig.close();
    disk.edit(&disk.names()[0], |data| data[8] = 2);
    let Err(error) = Rig::open(&disk) else {
        panic!("opened");
    };
    let text = error.to_string();
    assert!(
        matches!(
            error,
            JournalError::Version {
                found: 2,
                known: 1,
                ..
            }
        ),
        "{text}"
    );
    assert!(
        text.contains("version 2") && text.contains("up to 1"),
        "{text}"
    );
}

#[test]
#[ignore = "writes the fixture anew, which is done once for a version"]
fn write_the_fixture_of_version_1() {
    let disk = Disk::new();
    let (mut rig, _) = Rig::open(&disk).unwrap();
    for id in 1..=60u64 {
        rig.append(put(body(id, id as usize * 13))).unwrap();
        rig.work().unwrap();
    }
    let mut last = remove((1..=60).filter(|id| id % 7 != 0));
    last.put(body(61, 61 * 13));
    rig.append(last).unwrap();
    rig.work().unwrap();
    rig.close();
    let folder = fixture(1);
    std::fs::create_dir_all(&folder).unwrap();
    for name in disk.names() {
        std::fs::write(folder.join(&name), disk.read(&name)).unwrap();
    }
}
