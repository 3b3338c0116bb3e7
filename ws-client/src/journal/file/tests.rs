//! What a file survives, and what it refuses.

use std::fmt::Write as _;

use trunkline_protocol::ids::CommandId;
use trunkline_protocol::message::{
    CommandAccepted, CommandComplete, CommandEnd, CommandSettled, CommandStatus,
};

use super::*;

#[test]
fn a_torn_end_is_cut_off_wherever_it_was_torn() {
    let (folder, path) = place();
    let written = bytes_of(&path, &[&[begun(1), begun(2)], &[ended(1)], &[begun(3), settled(1)]]);
    let kept = bytes_of(&folder.path().join("shorter"), &[&[begun(1), begun(2)], &[ended(1)]]);
    let tears = (kept.len() + 1..written.len()).map(|at| written[..at].to_vec());
    // A file that was made longer before its bytes arrived.
    let zeros = (1..40).map(|count| [&kept[..], &vec![0; count]].concat());
    for torn in tears.chain(zeros) {
        fs::write(&path, &torn).unwrap();
        let journal = FileJournal::open(&path).unwrap();
        assert_eq!(known(&journal), known_of(&[begun(1), begun(2), ended(1)]));
        let instance = lock(&journal.book).instance;
        assert_ne!(instance, instance_of(&written), "something may be lost");
        drop(journal);
        let journal = FileJournal::open(&path).unwrap();
        assert_eq!(known(&journal), known_of(&[begun(1), begun(2), ended(1)]));
        assert_eq!(lock(&journal.book).instance, instance, "nothing is lost twice");
    }
}

#[test]
fn damage_is_refused_and_nothing_is_changed() {
    let (_folder, path) = place();
    let batches: [&[JournalRecord]; 3] = [&[begun(1), begun(2)], &[ended(1)], &[begun(3)]];
    let written = bytes_of(&path, &batches);
    let last = frame(&[begun(3)]).unwrap().len();
    for at in 0..written.len() - last {
        for bit in 0..8 {
            let mut bytes = written.clone();
            bytes[at] ^= 1 << bit;
            fs::write(&path, &bytes).unwrap();
            let error = FileJournal::open(&path).unwrap_err();
            match at {
                0..8 => assert!(matches!(error, OpenError::Foreign { .. }), "{at}: {error}"),
                8..12 if bytes[8..12] > [0, 0, 0, 1][..] => {
                    assert!(matches!(error, OpenError::Newer { .. }), "{at}: {error}");
                }
                _ => assert!(matches!(error, OpenError::Damaged { .. }), "{at}: {error}"),
            }
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
    }
    // Cut where it was synced before it had its name.
    let journal = reopen(&path, &written);
    lock(&journal.book).write_anew().unwrap();
    drop(journal);
    let anew = fs::read(&path).unwrap();
    for at in HEADER_BYTES..anew.len() {
        fs::write(&path, &anew[..at]).unwrap();
        assert!(matches!(FileJournal::open(&path), Err(OpenError::Damaged { .. })), "{at}");
        assert_eq!(fs::read(&path).unwrap(), anew[..at]);
    }
}

#[test]
fn what_is_no_journal_of_ours_is_left_alone() {
    let (folder, path) = place();
    let mut newer = header(InstanceId::from_u128(1), 44);
    newer[11] = 2;
    newer.extend(b"and what only it understands");
    for (bytes, says) in [
        (&b""[..], "is not an agent's journal"),
        (b"# notes\n", "is not an agent's journal"),
        (b"trunklnJ", "is damaged at byte 8"),
        (&newer, "is a journal of version 2"),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = FileJournal::open(&path).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    assert!(matches!(FileJournal::open(folder.path()), Err(OpenError::Foreign { .. })));
    let nowhere = folder.path().join("nowhere/agent.journal");
    assert!(matches!(FileJournal::open(nowhere), Err(OpenError::Io { .. })));
}

#[test]
fn two_cannot_share_a_file() {
    let (folder, path) = place();
    let first = FileJournal::open(&path).unwrap();
    assert!(matches!(FileJournal::open(&path), Err(OpenError::InUse { .. })));
    #[cfg(unix)]
    {
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(FileJournal::open(&link), Err(OpenError::InUse { .. })));
    }
    // Also not after the file was replaced.
    lock(&first.book).write_anew().unwrap();
    assert!(matches!(FileJournal::open(&path), Err(OpenError::InUse { .. })));
    drop((first, folder.path()));
    FileJournal::open(&path).unwrap();
}

#[tokio::test]
async fn one_that_is_dropped_over_a_write_lets_go_of_its_file() {
    let (_folder, path) = place();
    let mut known = FileJournal::open(&path).unwrap().load().await.unwrap();
    for n in 0..200 {
        let journal = FileJournal::open(&path).expect("the last one has let go of it");
        known = journal.load().await.unwrap();
        let records = [begun(n)];
        let mut dropped = journal.record(&records);
        let waker = std::task::Waker::noop();
        assert!(dropped.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending());
    }
    assert!(known.records.len() <= 199, "what nobody waited for is there, or is not");
}

#[tokio::test]
async fn a_write_that_fails_is_told_and_leaves_nothing_behind() {
    let (_folder, path) = place();
    let journal = FileJournal::open(&path).unwrap();
    journal.record(&[begun(1)]).await.unwrap();
    // Opened for reading only: nothing can be written to it.
    lock(&journal.book).file = Some(File::open(&path).unwrap());
    let error = journal.record(&[begun(2)]).await.unwrap_err();
    assert!(error.to_string().starts_with("the agent's journal: "), "{error}");
    journal.record(&[begun(3)]).await.unwrap();
    drop(journal);
    assert_eq!(known(&FileJournal::open(&path).unwrap()), known_of(&[begun(1), begun(3)]));
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_fails_the_record_until_it_can() {
    let (folder, path) = place();
    let journal = FileJournal::open(&path).unwrap();
    lock(&journal.book).file = None;
    // A folder in its place is in the way of a new file.
    fs::create_dir(beside(&path, ".new")).unwrap();
    journal.record(&[begun(1)]).await.unwrap_err();
    journal.record(&[begun(2)]).await.unwrap_err();
    fs::remove_dir(beside(&path, ".new")).unwrap();
    journal.record(&[begun(3)]).await.unwrap();
    drop(journal);
    assert_eq!(known(&FileJournal::open(&path).unwrap()), known_of(&[begun(3)]));
    drop(folder);
}

#[test]
fn a_file_is_written_anew_before_it_is_long() {
    let (_folder, path) = place();
    let journal = FileJournal::open(&path).unwrap();
    let mut longest = 0;
    for n in 0..20_000 {
        let records = [begun(n), ended(n), settled(n)];
        let mut book = lock(&journal.book);
        // As `append`, without waiting for the disk twenty thousand times.
        if n % 100 == 0 {
            book.append(&records).unwrap();
        } else {
            let frame = frame(&records).unwrap();
            book.file.as_mut().unwrap().write_all(&frame).unwrap();
            book.length += frame.len() as u64;
            for record in &records {
                book.attempts.apply(record);
            }
        }
        longest = longest.max(fs::metadata(&path).unwrap().len());
    }
    assert!(longest < 2 * 1024 * 1024, "{longest}");
    let instance = lock(&journal.book).instance;
    drop(journal);
    let journal = FileJournal::open(&path).unwrap();
    assert_eq!(lock(&journal.book).attempts.records().len(), super::super::FENCES_MAX);
    assert_eq!(lock(&journal.book).instance, instance);
}

#[cfg(unix)]
#[test]
fn others_cannot_read_it() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_folder, path) = place();
    drop(FileJournal::open(&path).unwrap());
    for path in [path.clone(), beside(&path, ".lock")] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o077, 0);
    }
}

/// The form of the file: a change of it is a new version.
#[test]
fn the_form_of_a_file_is_what_it_was() {
    let header = header(InstanceId::from_u128(0x0a), 44);
    let frame = frame(&[begun(0xc)]).unwrap();
    let hex = |bytes: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        })
    };
    assert_eq!(
        hex(&header),
        "7472756e6b6c6e4a000000010000000000000000000000000000000a000000000000002c".to_owned()
            + &hex(&checksum(&[&header[..36]]))
    );
    let payload = r#"{"begun":{"command":"00000000-0000-0000-0000-00000000000c","attempt":1}}"#;
    assert_eq!(&frame[12..], format!("{payload}\n").as_bytes());
    assert_eq!(frame[..4], [0, 0, 0, 73]);
    assert_eq!(hex(&checksum(&[b"abc"])), "ba7816bf8f01cfea");
}

// ---- below the tests ----------------------------------------------------------

fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(folder.path()).unwrap().join("agent.journal");
    (folder, path)
}

/// The file in which these batches were recorded.
fn bytes_of(path: &Path, batches: &[&[JournalRecord]]) -> Vec<u8> {
    let journal = FileJournal::open(path).unwrap();
    for batch in batches {
        lock(&journal.book).append(batch).unwrap();
    }
    drop(journal);
    fs::read(path).unwrap()
}

fn reopen(path: &Path, bytes: &[u8]) -> FileJournal {
    fs::write(path, bytes).unwrap();
    FileJournal::open(path).unwrap()
}

fn known(journal: &FileJournal) -> Attempts {
    lock(&journal.book).attempts.clone()
}

fn known_of(records: &[JournalRecord]) -> Attempts {
    records.iter().collect()
}

fn instance_of(bytes: &[u8]) -> InstanceId {
    read_header(bytes).unwrap().0
}

fn begun(command: u128) -> JournalRecord {
    JournalRecord::Begun(CommandAccepted { command: CommandId::from_u128(command), attempt: 1 })
}

fn ended(command: u128) -> JournalRecord {
    JournalRecord::Ended(CommandComplete {
        command: CommandId::from_u128(command),
        attempt: 1,
        status: CommandStatus::Completed,
        end: CommandEnd::default(),
    })
}

fn settled(command: u128) -> JournalRecord {
    JournalRecord::Settled(CommandSettled { command: CommandId::from_u128(command), attempt: 1 })
}
