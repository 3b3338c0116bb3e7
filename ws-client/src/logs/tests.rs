//! What the layer makes of events.

use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use super::*;

#[test]
fn an_event_becomes_a_record() {
    let records = heard(Options::default(), || {
        tracing::warn!(target: "app::db", rows = 3, who = "ann", error = ?Some(1), "slow {}", "query");
    });
    let [(0, record)] = &records[..] else { panic!("{records:?}") };
    assert_eq!((&record.level, record.target.as_str()), (&LogLevel::Warn, "app::db"));
    assert_eq!(record.message, "slow query");
    let fields = [("error", "Some(1)"), ("rows", "3"), ("who", "ann")];
    assert_eq!(record.fields, fields.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    assert!(record.ts_ms > 1_600_000_000_000);
}

#[test]
fn what_is_less_serious_than_asked_for_is_left_out_here_and_not_for_others() {
    let say = || {
        tracing::error!(target: "app", "1");
        tracing::info!(target: "app", "2");
        tracing::debug!(target: "app", "3");
        tracing::trace!(target: "app", "4");
    };
    assert_eq!(messages(&heard(Options::default(), say)), ["1", "2"]);
    let all = Options { level: Level::TRACE, ..Options::default() };
    assert_eq!(messages(&heard(all, say)), ["1", "2", "3", "4"]);

    let (coarse, coarse_logs) = forward(Options { level: Level::ERROR, ..Options::default() });
    let (fine, fine_logs) = forward(Options { level: Level::DEBUG, ..Options::default() });
    let subscriber = tracing_subscriber::registry().with(coarse).with(fine);
    tracing::subscriber::with_default(subscriber, say);
    assert_eq!(messages(coarse_logs.take().make_contiguous()), ["1"]);
    assert_eq!(messages(fine_logs.take().make_contiguous()), ["1", "2", "3"]);
}

#[test]
fn a_filter_of_targets_goes_with_it() {
    let (layer, logs) = forward(Options { level: Level::TRACE, ..Options::default() });
    let targets = Targets::new().with_target("app", Level::DEBUG);
    let subscriber = tracing_subscriber::registry().with(layer.with_filter(targets));
    tracing::subscriber::with_default(subscriber, || {
        tracing::debug!(target: "app::db", "in");
        tracing::trace!(target: "app::db", "out");
        tracing::error!(target: "other", "out");
    });
    assert_eq!(messages(logs.take().make_contiguous()), ["in"]);
}

#[test]
fn what_sending_says_itself_is_left_out() {
    let all = Options { level: Level::TRACE, ..Options::default() };
    let records = heard(all, || {
        tracing::error!(target: "trunkline::client", "own");
        tracing::error!(target: "trunkline_client::core", "own");
        tracing::error!(target: "trunkline::forwarded", "own");
        tracing::trace!(target: "tungstenite::protocol", "a frame");
        tracing::debug!(target: "tokio_tungstenite", "a frame");
        tracing::trace!(target: "runtime.resource", "a timer");
        tracing::warn!(target: "rustls::conn", "a certificate");
        // As what comes from the `log` crate comes.
        tracing::trace!(target: "log", { log.target = "tungstenite::protocol" }, "a frame");
        tracing::info!(target: "log", { log.target = "app", log.line = 3 }, "mine");
        let life = unheard(async { tracing::error!(target: "quinn", "a frame") });
        futures_util::FutureExt::now_or_never(life).unwrap();
        tracing::info!(target: "app", "after");
    });
    let seen: Vec<_> = records.iter().map(|(_, r)| (&*r.target, &*r.message)).collect();
    assert_eq!(seen, [("rustls::conn", "a certificate"), ("app", "mine"), ("app", "after")]);
    assert!(records.iter().all(|(_, record)| record.fields.is_empty()));
}

#[test]
fn a_value_that_logs_while_it_is_written_is_no_circle() {
    struct Chatty;
    impl fmt::Debug for Chatty {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            tracing::error!(target: "app", chatty = ?Chatty2, "from within");
            f.write_str("chatty")
        }
    }
    #[derive(Debug)]
    struct Chatty2;
    let records = heard(
        Options::default(),
        || tracing::info!(target: "app", value = ?Chatty, "from outside"),
    );
    assert_eq!(messages(&records), ["from outside"]);
}

#[test]
fn a_value_that_panics_leaves_the_layer_as_it_was() {
    struct Broken;
    impl fmt::Debug for Broken {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no such thing")
        }
    }
    let records = heard(Options::default(), || {
        std::panic::catch_unwind(|| tracing::info!(target: "app", value = ?Broken, "before"))
            .unwrap_err();
        tracing::info!(target: "app", "after");
    });
    assert_eq!(messages(&records), ["after"]);
}

#[test]
fn what_is_too_long_is_cut_where_a_character_ends_and_marked() {
    let options = Options { message_bytes_max: 64, ..Options::default() };
    let long = "ä".repeat(10_000);
    let records = heard(options, || tracing::info!(target: "app", b = long, c = 1, "{long}"));
    let record = &records[0].1;
    assert_eq!(record.message, "ä".repeat(30) + "…");
    assert_eq!(record.fields["b"], "ä".repeat(30) + "…");
    assert_eq!(record.fields["…"], "1 more");
    let records = heard(Options::default(), || tracing::info!(target: "app", b = long, "{long}"));
    let record = &records[0].1;
    assert!((8189..=8192).contains(&record.message.len()));
    assert!((1021..=1024).contains(&record.fields["b"].len()));
    // Whoever reads it takes it as it is.
    let json = serde_json::to_string(record).unwrap();
    assert_eq!(&serde_json::from_str::<LogRecord>(&json).unwrap(), record);
}

#[test]
fn what_nobody_takes_is_bounded_and_the_numbers_tell() {
    let options = Options { records_max: 10, ..Options::default() };
    let records = heard(options, || (0..1000).for_each(|n| tracing::info!(target: "app", "{n}")));
    let numbers: Vec<u64> = records.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (990..1000).collect::<Vec<u64>>());
    let long = "x".repeat(8192);
    let records = heard(Options::default(), || {
        (0..1000).for_each(|_| tracing::info!(target: "app", "{long}"));
    });
    let bytes: usize = records.iter().map(|(_, record)| cost(record)).sum();
    assert!((200 * 1024..=256 * 1024).contains(&bytes), "{bytes}");
}

#[test]
fn a_layer_whose_other_half_is_gone_keeps_nothing() {
    let (layer, logs) = forward(Options::default());
    let inbox = Arc::clone(&logs.0);
    drop(logs);
    let subscriber = tracing_subscriber::registry().with(layer);
    tracing::subscriber::with_default(subscriber, || tracing::info!(target: "app", "to nobody"));
    assert!(inbox.waiting().records.is_empty());
}

/// What is forwarded of what is said.
fn heard(options: Options, say: impl FnOnce()) -> Vec<(u64, LogRecord)> {
    let (layer, logs) = forward(options);
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), say);
    logs.take().into()
}

fn messages(records: &[(u64, LogRecord)]) -> Vec<&str> {
    records.iter().map(|(_, record)| &*record.message).collect()
}
