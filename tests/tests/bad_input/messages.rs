//! Bad messages: each is answered with an `error` that names the rule and,
//! where there is one, the field; the link lives on.

use crate::raw::{BINARY, FIN, Raw, frame, word};
use crate::stage::{
    COMMAND, STREAM, Stage, agent_greeting, dashboard_greeting, output, request, subscribe,
};

/// A message, and how it is refused: the code and the field.
type Case<'a> = (String, &'a str, Option<&'a str>);

fn invalid(json: impl Into<String>, field: Option<&str>) -> Case<'_> {
    (json.into(), "invalid_message", field)
}

fn forbidden<'a>(json: impl Into<String>) -> Case<'a> {
    (json.into(), "forbidden", Some("type"))
}

/// Each is refused, once, and the link lives on.
async fn refused(raw: &mut Raw, cases: impl IntoIterator<Item = Case<'_>>) {
    for (n, (json, code, field)) in (1000..).zip(cases) {
        let shown: String = json.chars().take(200).collect();
        println!("{shown}");
        raw.say(&json).await;
        let error = raw.refused(code, field).await;
        println!("    {error}");
        assert!(error.len() < 600, "an answer does not repeat what it answers");
        raw.lives(n).await;
    }
}

/// To a greeted dashboard and to a greeted agent alike.
async fn refused_to_both<'a>(cases: impl Fn() -> Vec<Case<'a>>) {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    refused(&mut dashboard, cases()).await;
    let mut agent = stage.guest_agent("guest").await;
    refused(&mut agent, cases()).await;
    drop((dashboard, agent));
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn not_json() {
    refused_to_both(|| {
        [
            "",
            " ",
            "hello",
            "{",
            "}",
            "{\"type\":",
            "{\"type\":\"heartbeat:ping\"",
            "nul",
            "NaN",
            "{'type':'heartbeat:ping'}",
            "{\"type\":\"heartbeat:ping\"}{\"type\":\"heartbeat:ping\"}",
            "{\"type\":\"heartbeat:ping\"},",
            "\u{feff}{\"type\":\"heartbeat:ping\"}",
            "{\"type\":\"heartbeat\u{1}:ping\"}",
            "{\"type\":\"heartbeat:ping\",}",
            "// {\"type\":\"heartbeat:ping\"}",
        ]
        .map(|json| invalid(json, None))
        .to_vec()
    })
    .await;
}

#[tokio::test]
async fn wrong_shapes() {
    refused_to_both(|| {
        let mut cases =
            ["null", "42", "\"heartbeat:ping\"", "true", "[]", "{\"type\":\"\\ud800\"}"]
                .map(|json| invalid(json, None))
                .to_vec();
        cases.extend([
            invalid(r#"["heartbeat:ping"]"#, None),
            invalid(r#"[{"type":"heartbeat:ping"}]"#, None),
            invalid(r#"{"type":["heartbeat:ping"]}"#, Some("type")),
            invalid(r#"{"type":null}"#, Some("type")),
            invalid(r#"{"type":7}"#, Some("type")),
            invalid(r#"{"kind":"heartbeat:ping"}"#, Some("type")),
            invalid(r#"{"type":"heartbeat:ping","type":"heartbeat:ping"}"#, Some("type")),
            invalid(r#"{"type":"heartbeat:ping","payload":[7]}"#, Some("payload")),
            invalid(r#"{"type":"heartbeat:ping","payload":7}"#, Some("payload")),
            invalid(r#"{"type":"heartbeat:ping","payload":"{}"}"#, Some("payload")),
            invalid(r#"{"type":"heartbeat:ping","payload":{"n":[7]}}"#, Some("payload.n")),
            invalid(r#"{"type":"heartbeat:ping","payload":{"n":"7"}}"#, Some("payload.n")),
            invalid(r#"{"type":"batch","payload":[]}"#, Some("payload")),
            invalid(r#"{"type":"batch","payload":{}}"#, Some("payload.messages")),
            invalid(r#"{"type":"batch","payload":{"messages":{}}}"#, Some("payload.messages")),
            invalid(r#"{"type":"error","payload":["forbidden","",false]}"#, Some("payload")),
        ]);
        cases
    })
    .await;
}

#[tokio::test]
async fn unknown_types() {
    refused_to_both(|| {
        let long = format!(r#"{{"type":"{}"}}"#, "x".repeat(1_000_000));
        [
            r#"{"type":""}"#,
            r#"{"type":"ping"}"#,
            r#"{"type":"Heartbeat:ping"}"#,
            r#"{"type":"agent:self-destruct"}"#,
            &long,
        ]
        .map(|json| invalid(json, Some("type")))
        .to_vec()
    })
    .await;
}

#[tokio::test]
async fn an_agent_speaking_a_dashboards_lines() {
    let mut stage = Stage::new().await;
    let mut agent = stage.guest_agent("guest").await;
    let lines = [
        subscribe("honest"),
        request("r", "0191d4a8-5a3c-7f00-8000-000000000077", "honest"),
        r#"{"type":"unsubscribe","payload":{"terminals":[]}}"#.into(),
        r#"{"type":"system:emergency-stop","payload":{}}"#.into(),
        format!(r#"{{"type":"command:interrupt","payload":{{"command":"{COMMAND}"}}}}"#),
        format!(
            r#"{{"type":"terminal:input","payload":{{"command":"{COMMAND}","offset":0,"data":"rm"}}}}"#
        ),
        format!(
            r#"{{"type":"terminal:resize","payload":{{"command":"{COMMAND}","size":{{"cols":1,"rows":1}}}}}}"#
        ),
        format!(r#"{{"type":"terminal:shown","payload":{{"stream":"{STREAM}","offset":0}}}}"#),
        r#"{"type":"dashboard:disconnect"}"#.into(),
        // And the hub's own.
        r#"{"type":"connection:ack","payload":{}}"#.into(),
        format!(r#"{{"type":"command:settled","payload":{{"command":"{COMMAND}","attempt":1}}}}"#),
        // And greeting twice.
        agent_greeting("guest"),
        agent_greeting("honest"),
        dashboard_greeting("watcher"),
    ];
    refused(&mut agent, lines.into_iter().map(forbidden)).await;
    drop(agent);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn a_dashboard_speaking_an_agents_lines() {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    let lines = [
        output(STREAM, 0, "forged"),
        r#"{"type":"agent:status","payload":{}}"#.into(),
        r#"{"type":"agent:disconnect"}"#.into(),
        format!(
            r#"{{"type":"command:started","payload":{{"command":"{COMMAND}","attempt":1,"stream":"{STREAM}"}}}}"#
        ),
        format!(
            r#"{{"type":"command:complete","payload":{{"command":"{COMMAND}","attempt":1,"status":"completed","end":{{}}}}}}"#
        ),
        format!(
            r#"{{"type":"terminal:gap","payload":{{"stream":"{STREAM}","from":0,"to":9,"reason":"evicted"}}}}"#
        ),
        format!(
            r#"{{"type":"terminal:input-taken","payload":{{"command":"{COMMAND}","writer":"watcher","offset":9}}}}"#
        ),
        agent_greeting("honest"),
        dashboard_greeting("guest"),
        dashboard_greeting("watcher"),
    ];
    refused(&mut dashboard, lines.into_iter().map(forbidden)).await;
    // Binary is an agent's, too.
    let mut forged = vec![1, 1, 0, 0];
    forged.extend([0; 24]);
    forged.extend(b"forged");
    for bytes in [&forged[..], b"", b"\x02", b"{}"] {
        dashboard.send(&frame(FIN | BINARY, bytes)).await.unwrap();
        dashboard.refused("invalid_message", None).await;
    }
    dashboard.lives(1).await;
    drop(dashboard);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn ids_that_are_none() {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    let long = "x".repeat(129);
    let huge = "x".repeat(1_000_000);
    let names = [
        "",
        &long,
        &huge,
        "../etc",
        "a b",
        "a\\u0000",
        "a\\nb",
        "b\u{fc}ro",
        "a>b.*",
        "\u{202e}nimda",
    ];
    let field = Some("payload.terminals[0].agent");
    let terminals = names.map(|name| invalid(subscribe(name), field));
    refused(&mut dashboard, terminals).await;
    let requests = names
        .map(|name| invalid(format!(r#"{{"type":"heartbeat:ping","id":"{name}"}}"#), Some("id")));
    refused(&mut dashboard, requests).await;
    let serials = [
        "",
        "7",
        &long,
        &huge,
        "0191D4A8-5A3C-7F00-8000-00000000000C",
        "{0191d4a8-5a3c-7f00-8000-00000000000c}",
        "0191d4a85a3c7f008000000000000c",
        "0191d4a8-5a3c-7f00-8000-00000000000g",
    ];
    let commands =
        serials.map(|serial| invalid(request("r", serial, "honest"), Some("payload.command")));
    refused(&mut dashboard, commands).await;
    drop(dashboard);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn numbers_that_are_none() {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    let ns = [
        "-1",
        "1.5",
        "1e3",
        "1e999",
        "18446744073709551616",
        "-0.0",
        "0x10",
        "1_000",
        "\"1\"",
        "99999999999999999999999999",
    ];
    let cases = ns.map(|n| {
        let json = format!(r#"{{"type":"heartbeat:ping","payload":{{"n":{n}}}}}"#);
        match n {
            // What is no number at all is no JSON either.
            "0x10" | "1_000" => invalid(json, None),
            "1e999" => invalid(json, Some("payload")),
            _ => invalid(json, Some("payload.n")),
        }
    });
    refused(&mut dashboard, cases).await;
    let times = ["-1", "1e300", "253402300800000", "18446744073709551615", "\"now\""];
    let cases =
        times.map(|ts| invalid(format!(r#"{{"type":"heartbeat:ping","ts":{ts}}}"#), Some("ts")));
    refused(&mut dashboard, cases).await;
    let offsets = ["-1", "9223372036854775808", "18446744073709551615"];
    let cases = offsets.map(|offset| {
        let json = format!(
            r#"{{"type":"terminal:shown","payload":{{"stream":"{STREAM}","offset":{offset}}}}}"#
        );
        invalid(json, Some("payload.offset"))
    });
    refused(&mut dashboard, cases).await;
    let windows = ["-1", "0", "18446744073709551616"];
    let cases = windows.map(|window| {
        let json = format!(r#"{{"type":"subscribe","payload":{{"terminals":[{{"agent":"honest","window_bytes":{window}}}]}}}}"#);
        invalid(json, Some("payload.terminals[0].window_bytes"))
    });
    refused(&mut dashboard, cases).await;
    let sizes = [("0", "1"), ("1", "4097"), ("65536", "1"), ("1", "-1")];
    let cases = sizes.map(|(cols, rows)| {
        let json = format!(r#"{{"type":"terminal:resize","payload":{{"command":"{COMMAND}","size":{{"cols":{cols},"rows":{rows}}}}}}}"#);
        let bad = if cols == "1" { "payload.size.rows" } else { "payload.size.cols" };
        invalid(json, Some(bad))
    });
    refused(&mut dashboard, cases).await;
    // The largest of each kind are numbers like any other.
    dashboard.say(r#"{"type":"heartbeat:ping","ts":253402300799999,"payload":{"n":18446744073709551615}}"#).await;
    assert!(dashboard.until("heartbeat:pong").await.contains("18446744073709551615"));
    let far = format!(
        r#"{{"type":"terminal:shown","payload":{{"stream":"{STREAM}","offset":9223372036854775807}}}}"#
    );
    dashboard.say(&far).await;
    dashboard.lives(1).await;
    drop(dashboard);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn nesting_and_counts() {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    let nested = |depth: usize, open: &str, close: &str| {
        format!(r#"{{"type":"heartbeat:ping","x":{}1{}}}"#, open.repeat(depth), close.repeat(depth))
    };
    dashboard.say(&nested(31, "[", "]")).await;
    dashboard.until("heartbeat:pong").await;
    for depth in [32, 128, 10_000] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            dashboard.say(&nested(depth, open, close)).await;
            dashboard.until("error").await;
            dashboard.lives(depth as u64).await;
        }
    }
    // Never closed, and as deep as a message is long.
    for open in ["[".repeat(1_000_000), "{\"a\":".repeat(200_000)] {
        dashboard.say(&open).await;
        dashboard.until("error").await;
        dashboard.say(&format!(r#"{{"type":"subscribe","payload":{open}"#)).await;
        dashboard.until("error").await;
        dashboard.lives(1).await;
    }
    let ping = r#"{"type":"heartbeat:ping"}"#;
    let batch = |messages: &[&str]| {
        format!(r#"{{"type":"batch","payload":{{"messages":[{}]}}}}"#, messages.join(","))
    };
    refused(
        &mut dashboard,
        [
            invalid(batch(&[ping; 101]), Some("payload.messages")),
            invalid(batch(&[&batch(&[ping])]), Some("type")),
        ],
    )
    .await;
    // One bad message costs only itself.
    dashboard
        .say(&batch(&[
            r#"{"type":"x","id":"first"}"#,
            r#"{"type":"heartbeat:ping","payload":{"n":77}}"#,
        ]))
        .await;
    let error = dashboard.refused("invalid_message", Some("type")).await;
    assert_eq!(word(&error, "in_reply_to"), Some("first"));
    assert!(dashboard.until("heartbeat:pong").await.contains("\"n\":77"));
    drop(dashboard);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn subscriptions_refuse_what_they_do_not_know() {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    let one = |fields: &str| {
        format!(r#"{{"type":"subscribe","payload":{{"terminals":[{{{fields}}}]}}}}"#)
    };
    let at = |field: &str| format!("payload.terminals[0].{field}");
    let (lag, from, positions, typo) = (at("lag"), at("from"), at("positions"), at("windov_bytes"));
    refused(
        &mut dashboard,
        [
            invalid(one(r#""agent":"honest","windov_bytes":7"#), Some(&typo)),
            invalid(one(r#""agent":"honest","lag":"sometimes""#), Some(&lag)),
            invalid(one(r#""agent":"honest","from":"end""#), Some(&from)),
            invalid(one(""), Some("payload.terminals[0]")),
            invalid(
                one(&format!(r#""agent":"honest","command":"{COMMAND}""#)),
                Some("payload.terminals[0]"),
            ),
            invalid(one(r#""agent":"honest","positions":[]"#), Some(&positions)),
            invalid(
                r#"{"type":"subscribe","payload":{"terminals":[],"agents":[]}}"#,
                Some("payload.agents"),
            ),
            invalid(
                r#"{"type":"subscribe","payload":{"terminals":[["honest"]]}}"#,
                Some("payload.terminals[0]"),
            ),
        ],
    )
    .await;
    let many =
        (0..1025).map(|n| format!(r#"{{"agent":"agent-{n}"}}"#)).collect::<Vec<_>>().join(",");
    dashboard.say(&format!(r#"{{"type":"subscribe","payload":{{"terminals":[{many}]}}}}"#)).await;
    dashboard.refused("limit_reached", Some("payload.terminals")).await;
    dashboard.lives(1).await;
    drop(dashboard);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn commands_that_are_none() {
    let mut stage = Stage::new().await;
    let mut dashboard = stage.guest_dashboard("guest").await;
    let spec = |spec: &str| {
        let command = "0191d4a8-5a3c-7f00-8000-000000000077";
        format!(
            r#"{{"type":"command:request","id":"r","payload":{{"command":"{command}","agent":"honest","spec":{spec}}}}}"#
        )
    };
    let long = "x".repeat(70_000);
    let many = vec!["\"x\""; 1025].join(",");
    let env = (0..257).map(|n| format!(r#""V{n}":"""#)).collect::<Vec<_>>().join(",");
    refused(
        &mut dashboard,
        [
            invalid(spec(r#"{"run":{}}"#), Some("payload.spec.run")),
            invalid(spec(r#"{"run":{"shell":"a","text":"b"}}"#), Some("payload.spec.run")),
            invalid(spec(r#"{"run":["shell","a"]}"#), Some("payload.spec.run")),
            invalid(spec(r#"{"run":{"argv":[]}}"#), Some("payload.spec.run.argv")),
            invalid(spec(r#"{"run":{"argv":[""]}}"#), Some("payload.spec.run.argv")),
            invalid(spec(r#"{"run":{"argv":["a","b\u0000"]}}"#), Some("payload.spec.run.argv")),
            invalid(
                spec(&format!(r#"{{"run":{{"argv":[{many}]}}}}"#)),
                Some("payload.spec.run.argv"),
            ),
            invalid(spec(&format!(r#"{{"run":{{"shell":"{long}"}}}}"#)), Some("payload.spec")),
            invalid(
                spec(&format!(r#"{{"run":{{"text":"a"}},"env":{{{env}}}}}"#)),
                Some("payload.spec.env"),
            ),
            invalid(
                spec(r#"{"run":{"text":"a"},"run_for_ms":-1}"#),
                Some("payload.spec.run_for_ms"),
            ),
        ],
    )
    .await;
    // The same id for something else; nobody's command; nobody's agent.
    dashboard.say(&request("again", COMMAND, "elsewhere")).await;
    dashboard.refused("conflict", Some("payload.command")).await;
    dashboard.say(r#"{"type":"command:interrupt","id":"i","payload":{"command":"0191d4a8-5a3c-7f00-8000-000000000099"}}"#).await;
    dashboard.refused("not_found", None).await;
    drop(dashboard);
    stage.goes_on_alone().await;
}

#[tokio::test]
async fn many_bad_messages_in_a_row() {
    let mut stage = Stage::new().await;
    for mut guest in [stage.guest_dashboard("guest").await, stage.guest_agent("guest").await] {
        // 31, a good one, and 31 again.
        for n in 0..2 {
            for _ in 0..31 {
                guest.say("nonsense").await;
                guest.refused("invalid_message", None).await;
            }
            guest.lives(n).await;
        }
        for _ in 0..33 {
            let _ = guest.send(&frame(FIN | 1, b"nonsense")).await;
        }
        for _ in 0..32 {
            guest.refused("invalid_message", None).await;
        }
        guest.closed(4400).await;
    }
    // All at once, and in one batch.
    let mut guest = stage.guest_dashboard("guest").await;
    let batch = ["7"; 100].join(",");
    guest.say(&format!(r#"{{"type":"batch","payload":{{"messages":[{batch}]}}}}"#)).await;
    guest.closed(4400).await;
    // Binary ones count as well.
    let mut guest = stage.guest_agent("guest").await;
    let _ = guest.send(&frame(FIN | BINARY, b"\x01").repeat(33)).await;
    guest.closed(4400).await;
    stage.goes_on_alone().await;
}
