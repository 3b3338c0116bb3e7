//! Stories about who may do what: tokens that run out and are renewed, rights
//! that grow and shrink, tenants that know nothing of each other. Virtual time.

#![allow(clippy::unwrap_used, reason = "stories")]

use std::time::Duration;

use proptest::prelude::*;
use trunkline_client::ConnectionState;
use trunkline_client::core::dashboard::{Audit, Reading, RequestError};
use trunkline_protocol::close::CloseCode;
use trunkline_protocol::ids::{CommandId, RequestId};
use trunkline_protocol::limits::Limits;
use trunkline_protocol::message::{
    CommandInterrupt, CommandRequest, CommandStatus, DashboardToHub, EmergencyStop, ErrorCode,
    Presence, Target, TerminalInput, TerminalResize, TerminalSize,
};
use trunkline_server::Identity;
use trunkline_server::hooks::{Permission, RolePolicy};
use trunkline_tests::{Memory, Peer, World};

const S: Duration = Duration::from_secs(1);

fn policy() -> RolePolicy {
    RolePolicy::new()
        .role("viewer", ["observe:*"])
        .and_then(|policy| policy.role("operator", ["observe:*", "command:*", "input:*"]))
        .and_then(|policy| policy.role("admin", ["observe:*", "command:*", "administer:*"]))
        .and_then(|policy| policy.role("ci", ["observe:label=ci", "command:label=ci"]))
        .unwrap()
}

fn identity(subject: &str, roles: &[&str]) -> Identity {
    let roles = roles.iter().map(|role| (*role).to_owned()).collect();
    Identity { roles, ..Identity::new("default".parse().unwrap(), subject) }
}

fn agent_identity(name: &str, labels: &[&str]) -> Identity {
    let labels = labels.iter().map(|label| (*label).to_owned()).collect();
    Identity { labels, ..Identity::new("default".parse().unwrap(), name) }
}

/// Agents `a` (labelled `ci`) and `b`, and a dashboard for each role.
fn world(seed: u64, roles: &[&[&str]]) -> World {
    let mut world = World::new(seed);
    world.set_policy(policy());
    for (number, (name, labels)) in [("a", &["ci"][..]), ("b", &[])].into_iter().enumerate() {
        world.agent(name);
        world.identities.insert(Peer::Agent(number), agent_identity(name, labels));
    }
    for (number, roles) in roles.iter().enumerate() {
        world.dashboard();
        world.identities.insert(Peer::Dashboard(number), identity(&format!("d{number}"), roles));
    }
    world.run_for(3 * S);
    world
}

fn is_up(world: &mut World, dashboard: usize) -> bool {
    world.core_of(dashboard).connection().is_connected()
}

fn refusal(world: &mut World, dashboard: usize, request: &RequestId) -> Option<ErrorCode> {
    world.run_until(5 * S, |w| w.answer(dashboard, request).is_some());
    match world.answer(dashboard, request).unwrap() {
        Ok(_) => None,
        Err(RequestError::Refused(refusal)) => Some(refusal.code.clone()),
        Err(other) => panic!("{other}"),
    }
}

/// Everything that a dashboard can ask about a command, in one order.
fn about(command: CommandId) -> [DashboardToHub; 3] {
    let size = TerminalSize { cols: 80, rows: 24 };
    let input = TerminalInput { command, writer: None, offset: 0, data: "x".into() };
    [
        DashboardToHub::Resize(TerminalResize { command, size }),
        DashboardToHub::Input(input),
        DashboardToHub::Interrupt(CommandInterrupt { command, attempt: None, grace_ms: None }),
    ]
}

#[test]
fn each_role_may_do_what_it_says_and_nothing_else() {
    let mut world = world(1, &[&["viewer"], &["operator"], &["admin"], &[]]);
    let (command, accepted) = world.request(1, "a", "write:100 sleep:100000 exit:0");
    assert_eq!(refusal(&mut world, 1, &accepted), None);
    world.run_until(5 * S, |w| w.status(0, command) == Some(CommandStatus::Running));
    for dashboard in [1, 2] {
        assert_eq!(world.status(dashboard, command), Some(CommandStatus::Running));
    }
    assert_eq!(world.roster(3).agents().len(), 0, "who has no role sees nobody");

    let (forbidden, not_found) = (Some(ErrorCode::Forbidden), Some(ErrorCode::NotFound));
    // resize, input, interrupt
    let expected = [
        [&forbidden, &forbidden, &forbidden],
        [&None, &None, &None],
        [&forbidden, &forbidden, &None],
        [&not_found, &not_found, &not_found],
    ];
    for dashboard in [0, 3, 1, 2] {
        let (_, request) = world.request(dashboard, "a", "exit:0");
        let may = refusal(&mut world, dashboard, &request);
        let should = if [1, 2].contains(&dashboard) { &None } else { &forbidden };
        assert_eq!(may, *should, "dashboard {dashboard}");
        for (message, expected) in about(command).into_iter().zip(expected[dashboard]) {
            if matches!(message, DashboardToHub::Input(_)) && expected.is_none() {
                continue; // input that is taken is not answered
            }
            let kind = format!("{message:?}");
            let request = world.ask(dashboard, message);
            assert_eq!(refusal(&mut world, dashboard, &request), *expected, "{dashboard}: {kind}");
        }
    }
}

#[test]
fn only_who_administers_stops_everything() {
    let mut world = world(2, &[&["operator"], &["admin"], &[]]);
    let (command, _) = world.request(0, "a", "sleep:100000 exit:0");
    world.run_until(5 * S, |w| w.status(0, command) == Some(CommandStatus::Running));
    let by_operator = world.stop_all(0);
    assert_eq!(refusal(&mut world, 0, &by_operator), Some(ErrorCode::Forbidden));
    let agents = Some(vec!["a".parse().unwrap()]);
    let named = world.ask(0, DashboardToHub::EmergencyStop(EmergencyStop { agents }));
    assert_eq!(refusal(&mut world, 0, &named), Some(ErrorCode::Forbidden));
    let by_nobody = world.stop_all(2);
    assert_eq!(refusal(&mut world, 2, &by_nobody), None, "there is nothing for it to see");
    world.run_for(S);
    assert_eq!(world.status(0, command), Some(CommandStatus::Running));
    let by_admin = world.stop_all(1);
    world.run_until(10 * S, |w| w.status(0, command) == Some(CommandStatus::Interrupted));
    let Some(Ok(accepted)) = world.answer(1, &by_admin) else { panic!() };
    assert_eq!(accepted.stopped, Some(1));
}

#[test]
fn who_may_see_some_agents_sees_and_reads_those_only() {
    let mut world = world(3, &[&["operator"], &["ci"]]);
    assert_eq!(world.presence(1, "a"), Some(Presence::Online));
    assert_eq!(world.presence(1, "b"), None);
    let (seen, _) = world.request(0, "a", "write:1000 exit:0");
    let (unseen, _) = world.request(0, "b", "write:1000 exit:0");
    let mine = world.watch(1, seen);
    let foreign = world.watch(1, unseen);
    let all_of_b = world.read(1, Target::Agent("b".parse().unwrap()), Reading::default());
    world.run_until(20 * S, |w| {
        [seen, unseen].iter().all(|id| w.status(0, *id) == Some(CommandStatus::Completed))
    });
    world.run_for(20 * S);
    assert_eq!(world.status(1, seen), Some(CommandStatus::Completed));
    assert_eq!(world.status(1, unseen), None);
    let node = &world.dashboards[1];
    assert_eq!(node.of(seen).unwrap().bytes, 1000);
    assert!(node.of(unseen).is_none(), "not a byte of it");
    assert!(!node.refused.contains_key(&mine));
    assert!(!node.refused.contains_key(&foreign), "as if it did not exist");
    assert_eq!(node.refused[&all_of_b].code, ErrorCode::Forbidden);
    for message in about(unseen) {
        let request = world.ask(1, message);
        assert_eq!(refusal(&mut world, 1, &request), Some(ErrorCode::NotFound));
    }
    let (_, request) = world.request(1, "b", "exit:0");
    let to_b = refusal(&mut world, 1, &request);
    let (_, request) = world.request(1, "there-is-none", "exit:0");
    assert_eq!(to_b, refusal(&mut world, 1, &request), "b is like one that there is not");
}

#[test]
fn rights_that_shrink_end_what_is_read_and_rights_that_grow_show_more() {
    let mut world = world(4, &[&["operator"], &["viewer"]]);
    let (a, _) = world.request(0, "a", "write:500 sleep:200000 exit:0");
    let (b, _) = world.request(0, "b", "write:500 sleep:200000 exit:0");
    let readers = [world.watch(1, a), world.watch(1, b)];
    let all_of_b = world.read(1, Target::Agent("b".parse().unwrap()), Reading::default());
    world.run_until(20 * S, |w| {
        [a, b].iter().all(|id| w.dashboards[1].of(*id).is_some_and(|seen| seen.bytes == 500))
    });

    // The next token has less. The old one runs out in an hour.
    let set = |world: &mut World, roles: &[&str]| {
        let expires_in = Some(3600 * S);
        world
            .identities
            .insert(Peer::Dashboard(1), Identity { expires_in, ..identity("d1", roles) });
        world.core_of(1).refresh("token".into());
        world.run_for(2 * S);
    };
    set(&mut world, &["ci"]);
    let node = &world.dashboards[1];
    assert!(!node.refused.contains_key(&readers[0]));
    assert_eq!(node.refused[&readers[1]].code, ErrorCode::Forbidden);
    assert_eq!(node.refused[&all_of_b].code, ErrorCode::Forbidden);
    assert_eq!(world.presence(1, "b"), None);
    assert_eq!(world.status(1, b), None);
    assert_eq!(world.status(1, a), Some(CommandStatus::Running));

    set(&mut world, &["operator"]);
    assert_eq!(world.presence(1, "b"), Some(Presence::Busy));
    assert_eq!(world.status(1, b), Some(CommandStatus::Running));
    world.watch(1, b);
    let stop = world.interrupt(1, b);
    assert_eq!(refusal(&mut world, 1, &stop), None);
    world.run_until(20 * S, |w| w.status(1, b) == Some(CommandStatus::Interrupted));
    assert_eq!(world.roster(0).agents().len(), world.roster(1).agents().len());
}

#[test]
fn a_dashboard_that_returns_with_less_sees_less_at_once() {
    let mut world = world(5, &[&["viewer"]]);
    assert_eq!(world.roster(0).agents().len(), 2);
    for (roles, agents) in [(&["ci"][..], 1), (&[], 0), (&["viewer"], 2)] {
        world.cut(Peer::Dashboard(0));
        world.identities.insert(Peer::Dashboard(0), identity("d0", roles));
        world.run_for(3 * S);
        assert_eq!(world.roster(0).agents().len(), agents, "{roles:?}");
    }
}

#[test]
fn an_agent_that_gets_another_label_is_seen_by_others() {
    let mut world = world(6, &[&["ci"], &["viewer"]]);
    assert_eq!((world.presence(0, "a"), world.presence(0, "b")), (Some(Presence::Online), None));
    // b comes back with the label, a without.
    world.identities.insert(Peer::Agent(0), agent_identity("a", &[]));
    world.identities.insert(Peer::Agent(1), agent_identity("b", &["ci"]));
    let of_a = world.read(0, Target::Agent("a".parse().unwrap()), Reading::default());
    world.run_for(S);
    assert!(world.dashboards[0].refused.is_empty());
    world.cut(Peer::Agent(0));
    world.cut(Peer::Agent(1));
    world.run_for(3 * S);
    assert_eq!((world.presence(0, "a"), world.presence(0, "b")), (None, Some(Presence::Online)));
    assert_eq!(world.dashboards[0].refused[&of_a].code, ErrorCode::Forbidden);
    assert_eq!(world.roster(1).agents().len(), 2);

    // One that was away meanwhile is not shown what it may not see.
    world.cut(Peer::Dashboard(0));
    world.set_reachable(Peer::Dashboard(0), false);
    world.identities.insert(Peer::Agent(1), agent_identity("b", &[]));
    world.cut(Peer::Agent(1));
    world.run_for(3 * S);
    world.set_reachable(Peer::Dashboard(0), true);
    world.run_for(40 * S);
    assert_eq!(world.roster(0).agents().len(), 0);
}

#[test]
fn who_knew_an_agent_by_its_label_hears_that_it_is_forgotten() {
    let mut world = world(7, &[&["ci"]]);
    let now = world.now();
    world.agents[0].core.as_mut().unwrap().stop(now);
    world.run_until(S, |w| w.presence(0, "a") == Some(Presence::Offline));
    world.run_for(25 * 3600 * S);
    assert_eq!(world.presence(0, "a"), None);
}

#[test]
fn tokens_are_renewed_under_running_output_and_nothing_is_disturbed() {
    let mut world = world(8, &[&["operator"]]);
    for (peer, identity) in [
        (Peer::Agent(0), agent_identity("a", &["ci"])),
        (Peer::Dashboard(0), identity("d0", &["operator"])),
    ] {
        world.identities.insert(peer, Identity { expires_in: Some(90 * S), ..identity });
        world.cut(peer);
    }
    world.run_for(5 * S);
    let script = (0..60).map(|_| "write:2000 sleep:10000 ").collect::<String>() + "exit:0";
    let (command, _) = world.request(0, "a", &script);
    world.watch(0, command);
    let cables = world.cables_made();
    world.run_until(700 * S, |w| w.status(0, command) == Some(CommandStatus::Completed));
    world.run_for(5 * S);
    let seen = world.dashboards[0].of(command).unwrap();
    assert_eq!((seen.bytes, seen.gaps.len()), (120_000, 0));
    assert_eq!(seen.ended.as_ref().unwrap().1, Audit::Verified);
    assert_eq!(world.cables_made(), cables, "ten minutes on tokens of 90 s, over the same links");
}

#[test]
fn a_token_that_cannot_be_had_at_once_is_asked_for_again_until_it_can() {
    let mut world = world(9, &[&["viewer"]]);
    let expires_in = Some(90 * S);
    world
        .identities
        .insert(Peer::Dashboard(0), Identity { expires_in, ..identity("d0", &["viewer"]) });
    world.cut(Peer::Dashboard(0));
    world.run_for(5 * S);
    let cables = world.cables_made();
    world.without_tokens.insert(Peer::Dashboard(0));
    world.run_for(100 * S); // beyond its expiry, within the grace
    world.without_tokens.clear();
    world.run_for(60 * S);
    assert_eq!(world.cables_made(), cables, "it was renewed in its grace");
    // The issuer is down.
    world.auth_fails = true;
    world.run_for(50 * S);
    world.auth_fails = false;
    world.run_for(60 * S);
    assert_eq!(world.cables_made(), cables, "and again");
}

#[test]
fn without_a_new_token_a_link_is_closed_after_its_grace_and_comes_back_with_one() {
    let mut world = world(10, &[&["viewer"]]);
    let expires_in = Some(90 * S);
    world
        .identities
        .insert(Peer::Dashboard(0), Identity { expires_in, ..identity("d0", &["viewer"]) });
    world.cut(Peer::Dashboard(0));
    world.run_for(2 * S);
    let cables = world.cables_made();
    world.without_tokens.insert(Peer::Dashboard(0));
    world.run_for(116 * S);
    assert_eq!(world.cables_made(), cables, "90 s and 30 s of grace are not over");
    world.run_for(10 * S);
    assert!(world.cables_made() > cables, "it dialled again, with a token that it asked for");
}

#[test]
fn a_token_for_somebody_else_changes_nothing() {
    let mut world = world(11, &[&["viewer"]]);
    for other in [identity("somebody", &["admin"]), {
        let mut other = identity("d0", &["admin"]);
        other.tenant = "another".parse().unwrap();
        other
    }] {
        world.identities.insert(Peer::Dashboard(0), other);
        world.core_of(0).refresh("token".into());
        world.run_for(S);
        let (_, request) = world.request(0, "a", "exit:0");
        assert_eq!(refusal(&mut world, 0, &request), Some(ErrorCode::Forbidden));
    }
    let mut other = agent_identity("a", &[]);
    other.agent = Some("b".parse().unwrap());
    world.identities.insert(Peer::Agent(0), other);
    let now = world.now();
    world.agents[0].core.as_mut().unwrap().refresh("token".into(), now);
    world.run_for(S);
    assert_eq!(world.presence(0, "a"), Some(Presence::Online));
    assert!(matches!(world.connection(0), ConnectionState::Connected));
}

#[test]
fn an_agent_may_not_go_by_another_subjects_id() {
    let mut world = world(12, &[&["viewer"]]);
    let intruder = world.agent("a");
    world.identities.insert(Peer::Agent(intruder), agent_identity("mallory", &[]));
    world.run_for(10 * S);
    assert!(matches!(world.connection(0), ConnectionState::Connected), "it was not superseded");
    let ConnectionState::Disconnected { why } = world.connection(intruder) else { panic!() };
    assert_eq!(why.code, CloseCode::Forbidden);
}

#[test]
fn a_token_says_which_agent_its_bearer_is() {
    let mut world = world(13, &[&["viewer"]]);
    let renamed = world.agent("a");
    let mut identity = agent_identity("c", &[]);
    identity.agent = Some("c".parse().unwrap());
    world.identities.insert(Peer::Agent(renamed), identity);
    world.run_for(3 * S);
    assert_eq!(world.presence(0, "c"), Some(Presence::Online), "whatever it proposed");
    assert_eq!(world.presence(0, "a"), Some(Presence::Online));
    assert!(matches!(world.connection(0), ConnectionState::Connected));
}

#[test]
fn what_exists_in_another_tenant_does_not_exist() {
    let mut world = world(14, &[&["admin"], &["admin"]]);
    let mut stranger = identity("d1", &["admin"]);
    stranger.tenant = "another".parse().unwrap();
    world.identities.insert(Peer::Dashboard(1), stranger);
    let (before, _) = world.request(0, "a", "write:100 sleep:100000 exit:0");
    world.cut(Peer::Dashboard(1));
    world.run_for(5 * S);
    // Its id is its own still; there is nobody to be seen.
    assert_eq!(world.roster(1).agents().len(), 0);
    let reader = world.watch(1, before);
    let of_a = world.read(1, Target::Agent("a".parse().unwrap()), Reading::default());
    let missing = CommandId::from_u128(77);
    for (theirs, none) in about(before).into_iter().zip(about(missing)) {
        let (theirs, none) = (world.ask(1, theirs), world.ask(1, none));
        world.run_for(S);
        let said = |request| match world.answer(1, request).unwrap() {
            Err(RequestError::Refused(refusal)) => {
                let mut refusal = refusal.clone();
                refusal.in_reply_to = None;
                refusal
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(said(&theirs), said(&none), "to the letter");
    }
    let stop = world.stop_all(1);
    world.run_for(S);
    assert_eq!(world.answer(1, &stop).unwrap().as_ref().unwrap().stopped, Some(0));
    // A request for an agent of the same name waits for one of its own tenant.
    let (waits, accepted) = world.request(1, "a", "exit:0");
    assert_eq!(refusal(&mut world, 1, &accepted), None);
    world.run_for(20 * S);
    assert_eq!(world.status(1, waits), Some(CommandStatus::Queued));
    assert_eq!(world.status(0, waits), None);
    assert_eq!(world.status(0, before), Some(CommandStatus::Running));
    let node = &world.dashboards[1];
    assert!(node.of(before).is_none() && node.refused.is_empty());
    assert!(!node.over.contains(&of_a) && !node.over.contains(&reader));
}

#[test]
fn rights_hold_across_a_restart_of_the_hub() {
    let mut world = world(15, &[&["operator"], &["ci"]]);
    let (on_b, _) = world.request(0, "b", "write:100 sleep:20000 exit:0");
    world.run_for(3 * S);
    world.kill_hub();
    world.start_hub(Memory::Kept);
    world.run_for(40 * S);
    assert_eq!(world.status(0, on_b), Some(CommandStatus::Completed));
    assert_eq!(world.status(1, on_b), None);
    assert_eq!((world.presence(1, "a"), world.presence(1, "b")), (Some(Presence::Online), None));
}

#[test]
fn who_is_revoked_is_out_at_once_and_the_others_go_on() {
    let mut world = World::new(20);
    world.set_policy(policy());
    for (number, subject) in ["ann", "ann", "bob"].into_iter().enumerate() {
        world.dashboard();
        world.identities.insert(Peer::Dashboard(number), identity(subject, &["viewer"]));
    }
    for name in ["a", "b"] {
        world.agent(name);
    }
    world.run_for(3 * S);
    // Nobody gets in again.
    world.auth_fails = true;
    assert_eq!(world.revoke("another", "ann"), 0, "it is another Ann");
    assert_eq!(world.revoke("default", "ann"), 2);
    world.run_for(S);
    for dashboard in [0, 1] {
        assert!(!is_up(&mut world, dashboard));
    }
    assert!(is_up(&mut world, 2));

    assert_eq!(world.revoke("default", "a"), 1, "an agent has one link");
    world.run_until(5 * S, |w| w.presence(2, "a") != Some(Presence::Online));
    assert_eq!(world.presence(2, "b"), Some(Presence::Online));
    assert_eq!(world.revoke("default", "nobody"), 0);
}

#[test]
fn who_is_revoked_while_the_authenticator_thinks_does_not_slip_in() {
    let mut world = world(21, &[&["viewer"], &["viewer"]]);
    world.hook_delay = 3 * S;
    let cables = world.cables_made();
    world.cut(Peer::Dashboard(0));
    world.run_until(5 * S, |w| w.cables_made() > cables);
    world.run_for(S / 50);
    // It has greeted, and the answer is on its way: it was good when asked.
    assert_eq!(world.revoke("default", "d0"), 0, "there is no link of it to end yet");
    world.auth_fails = true;
    world.run_for(10 * S);
    assert!(!is_up(&mut world, 0));
    assert!(is_up(&mut world, 1));
    world.auth_fails = false;

    // Nor by a new token that was being looked at.
    world.core_of(1).refresh("token".into());
    world.run_for(S / 10);
    world.auth_fails = true;
    assert_eq!(world.revoke("default", "d1"), 1);
    world.run_for(5 * S);
    assert!(!is_up(&mut world, 1));
}

#[test]
fn a_tenant_that_floods_costs_itself_only() {
    let limits = Limits {
        log_bytes_per_stream: 64 * 1024,
        log_bytes_per_tenant: 128 * 1024,
        log_bytes_total: 512 * 1024,
        ..Limits::default()
    };
    let mut world = neighbours(22, limits);
    let (modest, _) = world.request(0, "quiet", "write:40000 exit:0");
    world.run_until(20 * S, |w| w.status(0, modest) == Some(CommandStatus::Completed));
    let before = world.hub().unwrap().log_bytes();
    let loud: Vec<_> = (0..8).map(|_| world.request(1, "loud", "write:60000 exit:0").0).collect();
    world.run_until(60 * S, |w| {
        loud.iter().all(|id| w.status(1, *id) == Some(CommandStatus::Completed))
    });
    let theirs = world.hub().unwrap().log_bytes() - before;
    assert!(theirs <= 128 * 1024, "{theirs}");
    assert!(theirs > 64 * 1024, "but of what it may have it has most: {theirs}");

    // Who reads now has all of the one, and of the other what is left, named.
    let readers: Vec<_> = loud.iter().map(|id| (*id, world.watch(1, *id))).collect();
    let reader = world.watch(0, modest);
    world.run_until(20 * S, |w| {
        let all = readers.iter().all(|(_, reader)| w.dashboards[1].over.contains(reader));
        all && w.dashboards[0].over.contains(&reader)
    });
    let seen = world.dashboards[0].of(modest).unwrap();
    assert_eq!((seen.bytes, seen.gaps.len()), (40_000, 0));
    let gaps = |id: &CommandId| world.dashboards[1].of(*id).unwrap().gaps.len();
    assert!(loud.iter().map(gaps).sum::<usize>() > 0, "there was no room for all of it");
}

/// Two tenants with an agent and a dashboard each: `quiet` and `loud`.
fn neighbours(seed: u64, limits: Limits) -> World {
    let mut world = World::with_limits(seed, limits);
    for (number, tenant) in ["quiet", "loud"].into_iter().enumerate() {
        let of = |subject: &str| Identity::new(tenant.parse().unwrap(), subject);
        world.agent_with(tenant, |setup| setup.slots = 8);
        world.dashboard();
        world.identities.insert(Peer::Agent(number), of("agent"));
        world.identities.insert(Peer::Dashboard(number), of("dashboard"));
    }
    world.run_for(3 * S);
    world
}

/// What a tenant's commands take up is bounded, whatever they are: what has
/// ended gives way, and what has not is refused. Nobody else notices.
#[test]
fn a_tenant_that_asks_for_much_is_told_to_wait() {
    let limits = Limits { command_bytes_per_tenant: 20 * 1024, ..Limits::default() };
    let mut world = neighbours(23, limits);
    let bytes = |world: &World| world.stats().unwrap().command_bytes;
    let (modest, _) = world.request(0, "quiet", "exit:0");
    world.run_until(20 * S, |w| w.status(0, modest) == Some(CommandStatus::Completed));
    let theirs = bytes(&world);
    assert!(theirs > 1024, "{theirs}");

    // Each with 1 KiB to run and 1 KiB to remember it by: ten, and no more.
    let long = |request: &mut CommandRequest| {
        request.spec.env.insert("LONG".into(), "x".repeat(1000));
    };
    let waiting: Vec<_> =
        (0..12).map(|_| world.request_with(1, "absent", "exit:0", long)).collect();
    for (n, (_, request)) in waiting.iter().enumerate() {
        let expected = if n < 10 { None } else { Some(ErrorCode::QueueFull) };
        assert_eq!(refusal(&mut world, 1, request), expected, "{n}");
    }
    assert!(bytes(&world) - theirs <= 20 * 1024, "{}", bytes(&world));
    let (_, request) = world.request_with(0, "quiet", "exit:0", long);
    assert_eq!(refusal(&mut world, 0, &request), None, "others have room of their own");

    // One that has ended is forgotten for one that is new.
    for (command, _) in &waiting[..10] {
        world.interrupt(1, *command);
    }
    world.run_until(20 * S, |w| {
        waiting[..10].iter().all(|(c, _)| w.status(1, *c) == Some(CommandStatus::Interrupted))
    });
    let (new, request) = world.request_with(1, "loud", "exit:0", long);
    assert_eq!(refusal(&mut world, 1, &request), None);
    world.run_until(20 * S, |w| w.status(1, new) == Some(CommandStatus::Completed));
    assert_eq!(world.status(1, waiting[0].0), None, "it is the first to go");
    assert_eq!(world.status(1, waiting[8].0), Some(CommandStatus::Interrupted));
    assert!(bytes(&world) - 2 * theirs <= 21 * 1024, "{}", bytes(&world));
}

/// A hub without memory has no room for what an agent brings: it says so, and
/// the agent comes again, with its commands, until there is.
#[test]
fn an_agent_that_brings_more_than_there_is_room_for_comes_later() {
    let limits = Limits { command_bytes_per_tenant: 12 * 1024, ..Limits::default() };
    let mut world = neighbours(24, limits);
    let all: Vec<_> =
        (0..8).map(|_| world.request(1, "loud", "write:100 sleep:200000 exit:0").0).collect();
    let is = |status| {
        let all = all.clone();
        move |w: &World| all.iter().all(|id| w.status(1, *id) == Some(status))
    };
    world.run_until(20 * S, is(CommandStatus::Running));
    world.kill_hub();
    world.start_hub(Memory::Lost);
    // Before the agent is back, its room is taken up by others.
    world.set_reachable(Peer::Agent(1), false);
    world.run_for(20 * S);
    let waiting: Vec<_> = (0..8).map(|_| world.request(1, "absent", "exit:0").0).collect();
    world.run_for(5 * S);
    world.set_reachable(Peer::Agent(1), true);
    world.run_for(60 * S);
    assert_eq!(world.presence(1, "loud"), Some(Presence::Unreachable), "there is no room for it");
    for command in &waiting {
        world.interrupt(1, *command);
    }
    world.run_until(120 * S, is(CommandStatus::Completed));
}

/// Streams are bounded, too: output of what has ended gives way, and while
/// there are only such that may grow, commands wait.
#[test]
fn a_tenant_that_runs_much_has_only_so_many_streams() {
    let limits = Limits { streams_per_tenant: 4, ..Limits::default() };
    let mut world = neighbours(25, limits);
    let first: Vec<_> = (0..4).map(|_| world.request(1, "loud", "write:100 exit:0").0).collect();
    world.run_until(20 * S, |w| {
        first.iter().all(|id| w.status(1, *id) == Some(CommandStatus::Completed))
    });
    let reader = world.watch(1, first[3]);
    world.run_until(20 * S, |w| w.dashboards[1].over.contains(&reader));
    assert_eq!(world.dashboards[1].of(first[3]).unwrap().bytes, 100);
    let more: Vec<_> =
        (0..6).map(|_| world.request(1, "loud", "write:100 sleep:20000 exit:0").0).collect();
    world.run_for(10 * S);
    let running = more.iter().filter(|c| world.status(1, **c) == Some(CommandStatus::Running));
    assert_eq!(running.count(), 4, "of eight slots");
    assert_eq!(world.stats().unwrap().streams, 4);
    world.run_until(120 * S, |w| {
        more.iter().all(|id| w.status(1, *id) == Some(CommandStatus::Completed))
    });
    assert_eq!(world.stats().unwrap().streams, 4);
    let (other, _) = world.request(0, "quiet", "write:10 exit:0");
    world.run_until(20 * S, |w| w.status(0, other) == Some(CommandStatus::Completed));
}

/// Agents, and what labels each has.
const FLEET: [(&str, &[&str]); 3] = [("a", &["ci", "arm"]), ("b", &["ci"]), ("c", &[])];

/// A grant as it is written: any permission, on all, on one, by a label, on nobody.
fn grant() -> impl Strategy<Value = (Permission, &'static str)> {
    let agents = ["*", "a", "b", "c", "label=ci", "label=arm", "label=c", "nobody"];
    (prop::sample::select(&Permission::ALL[..]), prop::sample::select(agents.to_vec()))
}

/// What grants mean, said a second time.
fn may(grants: &[(Permission, &str)], permission: Permission, agent: usize) -> bool {
    let (name, labels) = FLEET[agent];
    let has = |wanted| {
        grants.iter().any(|(permission, whom)| {
            let is_meant = *whom == "*"
                || *whom == name
                || whom.strip_prefix("label=").is_some_and(|label| labels.contains(&label));
            *permission == wanted && is_meant
        })
    };
    has(Permission::Observe) && has(permission)
}

fn fleet(grants: &[(Permission, &str)], of_role: usize) -> World {
    let mut world = World::new(7);
    let written = |(permission, agents): &(Permission, &str)| format!("{permission}:{agents}");
    let (role, own) = grants.split_at(of_role.min(grants.len()));
    let role: Vec<String> = role.iter().map(written).collect();
    let everything = ["observe:*", "command:*", "input:*", "administer:*"];
    let policy = RolePolicy::new()
        .role("some", role.iter().map(String::as_str))
        .and_then(|policy| policy.role("all", everything))
        .unwrap();
    world.set_policy(policy);
    for (number, (name, labels)) in FLEET.into_iter().enumerate() {
        world.agent(name);
        world.identities.insert(Peer::Agent(number), agent_identity(name, labels));
    }
    let grants = own.iter().map(|grant| written(grant).parse().unwrap()).collect();
    for who in [Identity { grants, ..identity("some", &["some"]) }, identity("all", &["all"])] {
        let number = world.dashboard();
        world.identities.insert(Peer::Dashboard(number), who);
    }
    world.run_for(3 * S);
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever somebody is granted, by a role or by name: that is what it sees
    /// and may do, to each agent and on every path, and what is refused has not
    /// been done.
    #[test]
    fn grants_mean_what_they_say(
        grants in prop::collection::vec(grant(), 0..8),
        of_role in 0_usize..8,
    ) {
        let may = |permission, agent| may(&grants, permission, agent);
        let mut world = fleet(&grants, of_role);
        let (some, all) = (0, 1);
        let running: Vec<CommandId> = FLEET
            .iter()
            .map(|(name, _)| world.request(all, name, "write:10 sleep:100000 exit:0").0)
            .collect();
        world.run_until(10 * S, |w| {
            running.iter().all(|id| w.status(all, *id) == Some(CommandStatus::Running))
        });
        world.run_for(S);
        let terminals: Vec<_> = FLEET
            .iter()
            .map(|(name, _)| {
                world.read(some, Target::Agent(name.parse().unwrap()), Reading::default())
            })
            .collect();
        world.run_for(S);

        let (forbidden, not_found) = (Some(ErrorCode::Forbidden), Some(ErrorCode::NotFound));
        for (agent, (name, _)) in FLEET.into_iter().enumerate() {
            let command = running[agent];
            let sees = may(Permission::Observe, agent);
            prop_assert_eq!(world.presence(some, name).is_some(), sees, "{} is listed", name);
            prop_assert_eq!(world.status(some, command).is_some(), sees, "{}: its command", name);
            let bytes = world.dashboards[some].of(command).map_or(0, |seen| seen.bytes);
            prop_assert_eq!(bytes, if sees { 10 } else { 0 }, "{}: its output", name);
            let refused = world.dashboards[some].refused.get(&terminals[agent]);
            prop_assert_eq!(refused.is_none(), sees, "{}: its terminals", name);

            let answer = |is_allowed| if is_allowed { None } else { forbidden.clone() };
            let about_command =
                |permission| if sees { answer(may(permission, agent)) } else { not_found.clone() };
            let [resize, _, interrupt] = about(command);
            let request = world.ask(some, resize);
            prop_assert_eq!(
                refusal(&mut world, some, &request), about_command(Permission::Input),
                "{}: resize", name
            );
            let (_, request) = world.request(some, name, "exit:0");
            prop_assert_eq!(
                refusal(&mut world, some, &request), answer(may(Permission::Command, agent)),
                "{}: request", name
            );
            prop_assert_eq!(world.status(all, command), Some(CommandStatus::Running));

            let agents = Some(vec![name.parse().unwrap()]);
            let request = world.ask(some, DashboardToHub::EmergencyStop(EmergencyStop { agents }));
            let stops = may(Permission::Administer, agent);
            prop_assert_eq!(refusal(&mut world, some, &request), answer(stops), "{}: stop", name);
            world.run_for(5 * S);
            let is_over = |world: &World| world.status(all, command) != Some(CommandStatus::Running);
            prop_assert_eq!(is_over(&world), stops, "{}: it is stopped", name);
            if !stops {
                let request = world.ask(some, interrupt);
                let expected = about_command(Permission::Command);
                let interrupts = expected.is_none();
                prop_assert_eq!(refusal(&mut world, some, &request), expected, "{}: interrupt", name);
                world.run_for(5 * S);
                prop_assert_eq!(is_over(&world), interrupts, "{}: it is interrupted", name);
            }
        }
    }
}
