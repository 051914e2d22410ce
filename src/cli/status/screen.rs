//! All that there is to know of one AuditLogSweeper, on one screen. Pure.

use chrono::{DateTime, Utc};

use super::history;
use super::object_view::{ObjectView, advice};
use super::page::Page;
use super::words::{ago, count, due, exact, length, number, plain, took};
use crate::api::AuditLogSweeperSpec;
use crate::api::Reason;
use crate::api::condition::{Condition, ConditionType};
use crate::api::spec::Mode;
use crate::api::status::{LastSweep, Outcome, Trigger};
use crate::cli::style::{BAD, FAINT, GOOD, STRONG, UNSURE, paint, verdict};

/// The screen of an object, on a terminal of `width` columns.
pub fn screen(now: DateTime<Utc>, seen: &ObjectView, width: usize) -> String {
    let mut page = Page::new(width);
    page.line(&format!("{} in namespace {}", paint(STRONG, &plain(&seen.name)), plain(&seen.namespace)));
    page.line("");
    ready(&mut page, now, seen);
    others(&mut page, now, seen);
    request(&mut page, seen);
    match &seen.spec {
        Ok(spec) => page.row("Spec", &sentence(spec)),
        Err(error) => page.marked("Spec", BAD, "cannot be read", &format!(": {error}")),
    }
    if let Some(error) = &seen.unreadable {
        page.marked("Status", BAD, "cannot be read", &format!(", another version may have written it: {error}"));
    }
    next(&mut page, now, seen);
    last(&mut page, now, seen);
    counts(&mut page, now, seen);
    past(&mut page, now, seen);
    page.finish()
}

/// Whether all is well, why, since when, and what to do.
fn ready(page: &mut Page, now: DateTime<Utc>, seen: &ObjectView) {
    let Some(ready) = seen.condition(ConditionType::Ready) else {
        let since = seen.created.map_or_else(String::new, |created| format!("; created {}", ago(now, created)));
        page.marked("Ready", UNSURE, "Unknown", &format!(": no operator has seen it yet{since}"));
        return page.more(&format!("Do: {}", Reason::Pending.advice()));
    };
    condition(page, now, "Ready", ready);
    page.more(&ready.message);
    if let Some(advice) = advice(&ready.reason, &ready.message) {
        page.more(&format!("Do: {advice}"));
    }
    if seen.status.observed_generation.is_some_and(|seen_at| seen_at < seen.generation) {
        page.marked("", UNSURE, "The last edit", " was not looked at yet: this is about the spec before it");
    }
}

fn condition(page: &mut Page, now: DateTime<Utc>, label: &str, condition: &Condition) {
    let since = DateTime::from_timestamp(condition.last_transition_time.0.as_second(), 0);
    let since = since.map_or_else(String::new, |since| format!(", for {}", length((now - since).num_seconds())));
    // Stalled is bad news where it is True.
    let style = if label == "Ready" { verdict(&condition.status) } else { BAD };
    page.marked(label, style, &plain(&condition.status), &format!(": {}{since}", condition.reason));
}

/// The conditions that have something to add.
fn others(page: &mut Page, now: DateTime<Utc>, seen: &ObjectView) {
    let said = seen.condition(ConditionType::Ready).map_or("", |ready| ready.message.as_str());
    for (type_, bad) in [
        (ConditionType::Stalled, "True"),
        (ConditionType::DatabaseReachable, "False"),
        (ConditionType::SchemaReady, "False"),
        (ConditionType::BacklogBounded, "False"),
    ] {
        let Some(found) = seen.condition(type_).filter(|condition| condition.status == bad) else { continue };
        condition(page, now, type_.as_str(), found);
        // What Ready says already is not said twice.
        if found.message != said {
            page.more(&found.message);
            if let Some(advice) = advice(&found.reason, &found.message) {
                page.more(&format!("Do: {advice}"));
            }
        }
    }
}

fn request(page: &mut Page, seen: &ObjectView) {
    let requested = seen.requested.as_deref().map(|token| crate::api::cut(token, 128));
    if requested.is_some() && requested != seen.status.last_handled_request.as_deref() {
        page.marked("Request", UNSURE, "not answered yet", ": a sweep was asked for");
    }
}

/// The spec in a sentence.
fn sentence(spec: &AuditLogSweeperSpec) -> String {
    let mode = if spec.mode == Mode::Observe { "; only counts (mode: Observe)" } else { "" };
    let suspended = if spec.suspend { "; suspended" } else { "" };
    format!(
        "{}.{}: every {}, rows open for more than {}, at most {} a sweep{mode}{suspended}",
        spec.schema,
        spec.table,
        spec.period,
        spec.timeout,
        number(spec.limit.into())
    )
}

fn next(page: &mut Page, now: DateTime<Utc>, seen: &ObjectView) {
    let failures = i64::from(seen.status.consecutive_failures);
    match seen.status.next_schedule_time {
        None if seen.suspend() => page.marked("Next sweep", UNSURE, "none", ": it is suspended"),
        None => page.row("Next sweep", "not planned yet"),
        Some(at) => {
            let retry = if failures > 0 {
                format!("; it failed {} in a row", count(failures, "time", "times"))
            } else {
                String::new()
            };
            // A sweep that runs is overdue too; after a minute somebody should look.
            let style = if (now - at).num_seconds() > 60 { BAD } else { anstyle::Style::new() };
            page.marked("Next sweep", style, &due(now, at), &format!(", at {}{retry}", exact(at)));
        }
    }
    match seen.status.last_successful_time {
        Some(at) => page.row("Last success", &format!("{}, at {}", ago(now, at), exact(at))),
        None => page.row("Last success", "never"),
    }
}

/// What the last sweep did.
fn last(page: &mut Page, now: DateTime<Utc>, seen: &ObjectView) {
    let Some(last) = &seen.status.last_sweep else { return page.row("Last sweep", "never") };
    let LastSweep { start_time, duration_milliseconds, trigger, outcome, attempts, .. } = last;
    let why = match trigger {
        Trigger::Schedule => "by schedule",
        Trigger::Request => "on request",
        Trigger::Create => "at its creation",
        Trigger::Command => "by command",
    };
    let attempts = if *attempts > 1 { format!(", attempt {}", number(i64::from(*attempts))) } else { String::new() };
    let style = match outcome {
        Outcome::Drained | Outcome::Observed => GOOD,
        Outcome::LimitReached | Outcome::DeadlineReached | Outcome::Stopped => UNSURE,
        Outcome::Failed => BAD,
    };
    let rest = format!(", {why}, {}, took {}{attempts}", ago(now, *start_time), took(*duration_milliseconds));
    page.marked("Last sweep", style, &format!("{outcome:?}"), &rest);
    let mut done = format!(
        "{} timed out of at most {}, in {}",
        count(last.timed_out, "row", "rows"),
        number(last.limit.into()),
        count(last.batches, "batch", "batches")
    );
    for (rows, what) in [
        (last.skipped, "skipped, too busy"),
        (last.suppressed, "suppressed by a trigger"),
        (last.uncertain, "uncertain, their COMMIT got no answer"),
    ] {
        if rows > 0 {
            done.push_str(&format!("; {} {what}", number(rows)));
        }
    }
    page.more(&done);
    if let Some(cutoff) = last.cutoff {
        page.more(&format!("of those that started before {}", exact(cutoff)));
    }
}

/// What is left, what is refused, and what was done in all.
fn counts(page: &mut Page, now: DateTime<Utc>, seen: &ObjectView) {
    if let Some(backlog) = &seen.status.backlog {
        let more = if backlog.at_least { "more than " } else { "" };
        let oldest = backlog.oldest_time_started;
        let oldest = oldest.map_or_else(String::new, |oldest| format!(", the oldest started {}", ago(now, oldest)));
        let rows = count(backlog.remaining, "stale row", "stale rows");
        let left = if backlog.remaining == 0 { "none".into() } else { format!("{more}{rows}{oldest}") };
        // A failed attempt counts nothing.
        let then = if seen.status.consecutive_failures > 0 { ", as of the last success" } else { "" };
        page.row("Backlog", &format!("{left}{then}"));
    }
    if let Some(refused) = seen.status.unsweepable.as_ref().filter(|refused| refused.count > 0) {
        let ids = if refused.ids.is_empty() { String::new() } else { format!(": {}", refused.ids.join(", ")) };
        page.marked("Unsweepable", BAD, &count(refused.count, "row", "rows"), &ids);
        page.more(&format!("Do: {}", Reason::RowRefused.advice()));
    }
    if let Some(totals) = &seen.status.totals {
        let (sweeps, failures) = (count(totals.sweeps, "attempt", "attempts"), number(totals.failures));
        let rows = count(totals.timed_out, "row", "rows");
        page.row("Totals", &format!("{sweeps}, {failures} failed, {rows} timed out"));
    }
    if let Some(skew) = seen.status.clock_skew_milliseconds.filter(|skew| skew.unsigned_abs() >= 5000) {
        let way = if skew > 0 { "ahead of" } else { "behind" };
        page.row("Clocks", &format!("the operator's is {} {way} the database's", took(skew.saturating_abs())));
    }
}

/// The history, and the last error unless the screen began with it.
fn past(page: &mut Page, now: DateTime<Utc>, seen: &ObjectView) {
    let history = &seen.status.history;
    if let (Some(newest), Some(oldest)) = (history.first(), history.last()) {
        let bars = history::bars(history);
        let line = format!("{}  {bars}  {}", ago(now, oldest.first_time), ago(now, newest.last_time));
        page.painted("History", &line);
        page.faint(&history::legend(history));
    }
    let Some(error) = &seen.status.last_error else { return };
    let holds = seen
        .condition(ConditionType::Ready)
        .is_some_and(|ready| ready.status == "False" && ready.reason == error.reason && ready.message == error.message);
    if !holds {
        page.marked("Last error", FAINT, &ago(now, error.time), &format!(": {}", error.reason));
        page.more(&error.message);
        if let Some(advice) = advice(&error.reason, &error.message) {
            page.more(&format!("Do: {advice}"));
        }
    }
}
