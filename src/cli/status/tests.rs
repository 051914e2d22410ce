//! The screens, in every situation that a status can be in.

use anstream::adapter::strip_str;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr;

use super::object_view::ObjectView;
use super::screen::screen;
use super::table::table;
use crate::api::{AuditLogSweeper, Reason};

fn now() -> DateTime<Utc> {
    "2026-11-22T20:15:00Z".parse().unwrap()
}

/// What the README shows.
fn saved() -> Vec<ObjectView> {
    super::read(include_str!("../../../docs/screens.yaml")).unwrap().iter().map(ObjectView::from).collect()
}

fn named(name: &str) -> ObjectView {
    saved().into_iter().find(|seen| seen.name == name).unwrap()
}

/// An object with this status, and further fields of the spec.
fn object(spec: Value, status: Value) -> ObjectView {
    let whole = support::json::merged(json!({ "database": { "secretRef": { "name": "db" } } }), &spec);
    let object = json!({
        "apiVersion": "auditlog.dev/v1alpha1", "kind": "AuditLogSweeper",
        "metadata": { "name": "app", "namespace": "shop", "generation": 1, "creationTimestamp": "2026-11-22T20:14:00Z" },
        "spec": whole, "status": status,
    });
    ObjectView::from(&serde_json::from_value(object).unwrap())
}

fn condition(type_: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({ "type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-11-22T20:10:00Z" })
}

fn shown(seen: &ObjectView) -> String {
    strip_str(&screen(now(), seen, 100)).to_string()
}

#[track_caller]
fn assert_lines(seen: &ObjectView, lines: &[&str]) {
    let shown = shown(seen);
    for line in lines {
        assert!(shown.lines().any(|shown| shown == *line), "no line {line:?} in\n{shown}");
    }
}

#[test]
fn the_readmes_objects_are_as_the_operator_writes_them() {
    let objects = super::read(include_str!("../../../docs/screens.yaml")).unwrap();
    for object in objects {
        let whole: AuditLogSweeper = object.clone().try_parse().unwrap();
        let status = json!(whole.status);
        // No field is misspelt: all of it is read, and is written again.
        for (field, value) in object.data["status"].as_object().unwrap() {
            let count = |value: &Value| value.as_array().map_or(1, Vec::len);
            assert_eq!(count(&status[field]), count(value), "{field}");
            assert!(!status[field].is_null(), "{field}");
        }
        for condition in whole.status.unwrap().conditions {
            assert!(Reason::parse(&condition.reason).is_some(), "{}", condition.reason);
        }
    }
}

#[test]
fn never_seen_by_an_operator() {
    let seen = object(json!({}), json!({ "observedGeneration": -1 }));
    assert_eq!(
        shown(&seen),
        "app in namespace shop\n\
         \n\
         Ready               Unknown: no operator has seen it yet; created 60s ago\n\
         \x20                   Do: wait; if it stays, no operator leads: see AuditLogSweeperNoLeader in\n\
         \x20                   docs/operating.md\n\
         Spec                public.audit_log: every 10m, rows open for more than 4h, at most 1,000 a sweep\n\
         Next sweep          not planned yet\n\
         Last success        never\n\
         Last sweep          never\n"
    );
}

#[test]
fn pending_and_an_edit_that_was_not_looked_at() {
    let mut seen = object(
        json!({}),
        json!({
            "observedGeneration": 1,
            "conditions": [condition("Ready", "Unknown", "Pending", "the spec was seen and is being tried")],
        }),
    );
    assert_lines(&seen, &["Ready               Unknown: Pending, for 5m"]);
    assert!(!shown(&seen).contains("The last edit"));
    seen.generation = 2;
    assert_lines(&seen, &["                    The last edit was not looked at yet: this is about the spec before it"]);
}

#[test]
fn well_at_its_limit_with_an_error_long_ago() {
    assert_eq!(
        shown(&named("orders")),
        "orders in namespace shop\n\
         \n\
         Ready               True: LimitReached, for 23d\n\
         \x20                   completed 1000 rows, stopped at the limit; >1000 stale rows are left\n\
         \x20                   Do: nothing if the backlog shrinks; else raise limit or shorten period\n\
         Spec                public.audit_log: every 10m, rows open for more than 4h, at most 1,000 a sweep\n\
         Next sweep          in 6m47s, at 2026-11-22T20:21:47Z\n\
         Last success        3m13s ago, at 2026-11-22T20:11:47Z\n\
         Last sweep          LimitReached, by schedule, 3m13s ago, took 212ms\n\
         \x20                   1,000 rows timed out of at most 1,000, in 1 batch\n\
         \x20                   of those that started before 2026-11-22T16:11:47Z\n\
         Backlog             more than 1,000 stale rows, the oldest started 4h10m ago\n\
         Totals              16,069 attempts, 4 failed, 1,415 rows timed out\n\
         History             88d ago  ▁·×·▄█  3m13s ago\n\
         \x20                   12,708 attempts, █ is 1,000 rows, · none, × failed (4 ConnectTimeout)\n\
         Last error          23d ago: ConnectTimeout\n\
         \x20                   no answer from orders-db.shop within 10s\n\
         \x20                   Do: check host, port, firewalls and NetworkPolicies\n"
    );
}

#[test]
fn failing_says_why_and_what_to_do_once() {
    let shown = shown(&named("payments"));
    assert_eq!(shown.matches("Connection refused").count(), 1, "{shown}");
    assert_eq!(shown.matches("Do: ").count(), 1, "{shown}");
    assert_lines(
        &named("payments"),
        &[
            "Ready               False: DatabaseUnreachable, for 7m41s",
            "                    Do: check host and port; wait if it restarts",
            "DatabaseReachable   False: DatabaseUnreachable, for 7m41s",
            "Next sweep          in 2m19s, at 2026-11-22T20:17:19Z; it failed 5 times in a row",
            "Last sweep          Failed, by schedule, 19s ago, took 3ms, attempt 3",
            "Backlog             none, as of the last success",
        ],
    );
}

#[test]
fn stalled_and_a_missing_index_are_told_beside_ready() {
    let seen = object(
        json!({}),
        json!({
            "observedGeneration": 1,
            "conditions": [
                condition("Ready", "False", "TableNotFound", "there is no table public.audit_log"),
                condition("Stalled", "True", "TableNotFound", "there is no table public.audit_log"),
                condition("SchemaReady", "False", "IndexMissing", "no valid index"),
            ],
            "nextScheduleTime": "2026-11-22T20:12:00Z",
        }),
    );
    assert_lines(
        &seen,
        &[
            "Stalled             True: TableNotFound, for 5m",
            "SchemaReady         False: IndexMissing, for 5m",
            "                    no valid index",
            "                    Do: run the SQL that audit-log-sweeper check prints, as the roles named in it",
            "                    and not in a transaction",
            "Next sweep          3m overdue, at 2026-11-22T20:12:00Z",
        ],
    );
}

#[test]
fn suspended_with_a_request_that_waits() {
    assert_lines(
        &named("billing"),
        &["Ready               True: Suspended, for 111d", "Next sweep          none: it is suspended"],
    );
    let mut seen = named("billing");
    seen.requested = Some("now".into());
    assert_lines(&seen, &["Request             not answered yet: a sweep was asked for"]);
    // The first 128 bytes are what is answered.
    seen.requested = Some("x".repeat(500));
    seen.status.last_handled_request = Some("x".repeat(128));
    assert!(!shown(&seen).contains("Request "));
}

#[test]
fn observing_with_rows_that_cannot_be_swept() {
    let seen = object(
        json!({ "mode": "Observe", "table": "Audit Log" }),
        json!({
            "observedGeneration": 1,
            "conditions": [
                condition("Ready", "True", "Observed", "changed nothing, as spec.mode says"),
                condition("BacklogBounded", "False", "FallingBehind", "17 stale rows are left"),
            ],
            "lastSweep": {
                "scheduleTime": "2026-11-22T20:10:00Z", "startTime": "2026-11-22T20:10:00Z", "durationMilliseconds": 1500,
                "trigger": "Request", "outcome": "Observed", "attempts": 1, "limit": 1, "timedOut": 1, "skipped": 2,
                "suppressed": 3, "uncertain": 4, "batches": 1,
            },
            "unsweepable": { "count": 2, "ids": ["17", "18"] },
            "clockSkewMilliseconds": -61000,
        }),
    );
    assert_lines(
        &seen,
        &[
            "                    Do: set mode: Apply when you like the count",
            "BacklogBounded      False: FallingBehind, for 5m",
            "                    only counts (mode: Observe)",
            "Last sweep          Observed, on request, 5m ago, took 1.5s",
            "                    1 row timed out of at most 1, in 1 batch; 2 skipped, too busy; 3 suppressed by a",
            "Unsweepable         2 rows: 17, 18",
            "                    Do: see AuditLogSweeperUnsweepableRows in docs/operating.md",
            "Clocks              the operator's is 61s behind the database's",
        ],
    );
}

#[test]
fn an_object_that_cannot_be_read_is_shown_as_far_as_it_can_be() {
    let seen = object(
        json!({ "limit": "many\u{1b}[2J" }),
        json!({ "observedGeneration": 1, "conditions": [condition("Ready", "False", "InvalidSpec", "the object cannot be read")] }),
    );
    let text = shown(&seen);
    assert!(text.contains("\nReady               False: InvalidSpec, for 5m\n"), "{text}");
    assert!(text.contains("\nSpec                cannot be read: invalid type: string \"many"), "{text}");
    let seen = object(json!({}), json!({ "totals": "all", "observedGeneration": 1 }));
    assert!(shown(&seen).contains("\nStatus              cannot be read, another version may have written it: "));
    // A reason that only a newer operator knows has no advice.
    let newer = json!({ "conditions": [condition("Ready", "False", "MoonPhase", "full")] });
    assert!(!shown(&object(json!({}), newer)).contains("Do: "));
}

#[test]
fn huge_numbers_and_the_ends_of_time_are_shown() {
    let (most, first, last) = (i64::MAX, DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
    let mut seen = named("orders");
    let status = &mut seen.status;
    let sweep = status.last_sweep.as_mut().unwrap();
    (sweep.timed_out, sweep.batches, sweep.duration_milliseconds, sweep.start_time) = (most, most, most, first);
    (sweep.skipped, sweep.attempts, sweep.limit) = (most, i32::MAX, i32::MAX);
    status.clock_skew_milliseconds = Some(i64::MIN);
    status.next_schedule_time = Some(last);
    status.backlog.as_mut().unwrap().remaining = most;
    status.history[0].timed_out = most;
    for width in [1, 20, 60, 100, 1000] {
        let text = strip_str(&screen(now(), &seen, width)).to_string();
        assert!(text.replace(char::is_whitespace, "").contains("9,223,372,036,854,775,807rowstimedout"), "{text}");
    }
}

#[test]
fn screens_keep_within_the_terminal_and_lose_nothing() {
    let squeezed = |text: &str| text.replace(char::is_whitespace, "");
    for seen in saved() {
        let wide = squeezed(&strip_str(&screen(now(), &seen, 1000)).to_string());
        for width in [40, 60, 80, 132] {
            let narrow = strip_str(&screen(now(), &seen, width)).to_string();
            assert!(narrow.lines().all(|line| line.width() <= width), "{width}\n{narrow}");
            assert_eq!(squeezed(&narrow), wide);
        }
    }
}

#[test]
fn nothing_in_an_object_steers_the_terminal() {
    let evil = "x\u{1b}]0;owned\u{7}\u{1b}[2J\r\n\u{9b}1A\u{202e}y";
    let mut seen = named("orders");
    seen.namespace = evil.into();
    seen.name = evil.into();
    seen.requested = Some(evil.into());
    let status = &mut seen.status;
    for condition in &mut status.conditions {
        (condition.status, condition.reason, condition.message) =
            (if condition.type_ == "Ready" { evil } else { "False" }.into(), evil.into(), evil.into());
    }
    status.backlog.as_mut().unwrap().display = evil.into();
    status.unsweepable = Some(crate::api::status::Unsweepable { count: 1, ids: vec![evil.into()], resume_after: None });
    let error = status.last_error.as_mut().unwrap();
    (error.reason, error.message) = (evil.into(), evil.into());
    for entry in &mut status.history {
        (entry.outcome, entry.reason) = (crate::api::status::Outcome::Failed, Some(evil.into()));
    }
    let spec = seen.spec.as_mut().unwrap();
    (spec.schema, spec.table) = (evil.into(), evil.into());
    let mut not_ready = seen.clone();
    not_ready.status.conditions[0].status = "False".into();
    let all = [seen, not_ready];
    let screens = all.iter().map(|seen| screen(now(), seen, 80));
    for text in screens.chain([table(now(), &all, true, 500)]) {
        // Our own colours go; what is left over is foreign.
        let mut rest = text.clone();
        for ours in ["\u{1b}[0m", "\u{1b}[1m", "\u{1b}[2m", "\u{1b}[31m", "\u{1b}[32m", "\u{1b}[33m"] {
            rest = rest.replace(ours, "");
        }
        assert!(rest.contains("owned") && !rest.contains('\u{202e}'), "{rest:?}");
        assert!(!rest.contains(|c: char| c.is_control() && c != '\n'), "{rest:?}");
    }
}

#[test]
fn the_table_is_aligned_and_says_what_to_do() {
    let text = strip_str(&table(now(), &saved(), false, 120)).to_string();
    assert_eq!(
        text,
        "NAME       READY   REASON                LAST SUCCESS   TIMED OUT   BACKLOG   NEXT SWEEP   HISTORY\n\
         billing    True    Suspended             12h ago        0           0         suspended    ·\n\
         orders     True    LimitReached          3m13s ago      1,000       >1,000    in 6m47s     ▁·×·▄█\n\
         payments   False   DatabaseUnreachable   12m ago        0           0         in 2m19s     ·█▂×\n\
         \n\
         payments: DatabaseUnreachable: check host and port; wait if it restarts\n"
    );
    let everywhere = strip_str(&table(now(), &saved(), true, 120)).to_string();
    assert!(
        everywhere.starts_with("NAMESPACE   NAME ") && everywhere.contains("\nshop        orders "),
        "{everywhere}"
    );
    assert!(everywhere.ends_with("\nshop/payments: DatabaseUnreachable: check host and port; wait if it restarts\n"));
}

#[test]
fn on_a_narrow_terminal_columns_go_before_lines_break() {
    let heads = |width| strip_str(&table(now(), &saved(), false, width)).to_string().lines().next().unwrap().to_owned();
    assert_eq!(heads(80), "NAME       READY   REASON                LAST SUCCESS   TIMED OUT   BACKLOG");
    assert_eq!(heads(40), "NAME       READY   REASON");
    assert_eq!(heads(1), "NAME       READY");
}

#[test]
fn machines_get_the_reason_the_advice_and_the_whole_status() {
    let report = named("payments").report();
    assert_eq!(
        (&report["ready"], &report["reason"], &report["advice"]),
        (&json!(false), &json!("DatabaseUnreachable"), &json!("check host and port; wait if it restarts"))
    );
    assert_eq!(report["status"]["totals"], json!({ "sweeps": 700, "failures": 5, "timedOut": 9964 }));
    let fresh = object(json!({ "suspend": true }), json!({})).report();
    assert_eq!((&fresh["ready"], &fresh["suspend"], &fresh["reason"]), (&Value::Null, &json!(true), &Value::Null));
}

#[test]
fn every_reason_has_one_sentence_of_advice() {
    for reason in Reason::ALL {
        let advice = reason.advice();
        assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
        assert!(advice.len() > 5 && !advice.ends_with('.') && super::plain(&advice) == advice, "{reason:?}: {advice}");
    }
}
