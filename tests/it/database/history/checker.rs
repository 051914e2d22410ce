//! Proves from the record of committed changes and the journals that every promise was kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, TimeDelta, Utc};

use super::TIMEOUT;
use super::players::{Journal, Swept, Touch};
use crate::fixtures::AuditTable;

/// The clocks of the processes are one machine's; reading them takes a moment.
const SLACK: TimeDelta = TimeDelta::milliseconds(50);

/// A committed change of a row.
#[derive(Clone, Debug)]
struct Change {
    xid: i64,
    began: DateTime<Utc>,
    at: DateTime<Utc>,
    app: String,
    id: String,
    time_started: DateTime<Utc>,
    old_completed: Option<DateTime<Utc>>,
    new_completed: Option<DateTime<Utc>>,
}

/// The committed changes that one transaction of a sweep made.
#[derive(Clone, Debug)]
struct Batch {
    began: DateTime<Utc>,
    ended: DateTime<Utc>,
    rows: BTreeSet<(DateTime<Utc>, String)>,
}

/// Checks everything; tells how much there was to check.
pub async fn check(log: &AuditTable, journal: &Journal) -> String {
    let changes = changes(log).await;
    let (touches, sweeps) = (journal.touches.lock().unwrap().clone(), journal.sweeps.lock().unwrap().clone());

    for change in &changes {
        assert!(change.old_completed.is_none(), "a completed row changed: {change:?}");
    }
    let mut by_app: HashMap<&str, Vec<&Change>> = HashMap::new();
    for change in changes.iter().filter(|c| c.app.starts_with("audit-log-sweeper/")) {
        by_app.entry(&change.app).or_default().push(change);
    }
    let timeout = TimeDelta::from_std(TIMEOUT).unwrap();
    for sweep in &sweeps {
        let recorded = by_app.remove(sweep.app.as_str()).unwrap_or_default();
        for change in &recorded {
            let age = change.new_completed.unwrap() - change.time_started;
            assert!(age >= timeout, "a row {age} old was closed: {change:?}");
            assert!(change.time_started < sweep.cutoff.unwrap(), "a row beyond the cutoff: {change:?} {sweep:?}");
        }
        let rows = i64::try_from(recorded.len()).unwrap();
        assert!(rows <= sweep.limit, "{rows} rows in {sweep:?}");
        assert!(
            rows >= sweep.timed_out && rows <= sweep.timed_out + sweep.uncertain,
            "the table shows {rows} rows for {sweep:?}"
        );
    }
    assert!(by_app.is_empty(), "sweeps that nobody reported: {:?}", by_app.keys());

    let open = log.query("SELECT id, time_started FROM audit_log WHERE time_completed IS NULL").await;
    assert!(open.is_empty(), "stale rows are open after two quiet sweeps: {open:?}");
    let left_out = oldest_first(&changes, &touches, &sweeps);

    let swept: usize = changes.iter().filter(|c| c.app.starts_with("audit-log-sweeper/")).count();
    let completed = changes.iter().filter(|c| c.app.starts_with("writer") && c.new_completed.is_some()).count();
    let trouble = journal.trouble.lock().unwrap().clone();
    let kills = trouble.get("kills").copied().unwrap_or_default();
    assert!(
        swept > 50 && completed > 50 && kills > 10,
        "too little happened: {swept} swept, {completed} completed, {kills} kills"
    );
    format!(
        "{} operations: {} rows, {completed} completed, {swept} swept in {} sweeps ({} failed, {} rows uncertain), {trouble:?}, \
         {left_out} rows left out for a reason",
        changes.len(),
        changes.iter().filter(|c| c.new_completed.is_none()).count(),
        sweeps.len(),
        sweeps.iter().filter(|s| s.failed).count(),
        sweeps.iter().map(|s| s.uncertain).sum::<i64>(),
    )
}

/// Each row that a batch left out though it was older than one that it took was held by somebody, or not there yet.
fn oldest_first(changes: &[Change], touches: &[Touch], sweeps: &[Swept]) -> usize {
    let mut touches_of: HashMap<&str, Vec<&Touch>> = HashMap::new();
    for touch in touches {
        touches_of.entry(&touch.id).or_default().push(touch);
    }
    let mut started: Vec<&Change> = changes.iter().filter(|change| change.new_completed.is_none()).collect();
    started.sort_by_key(|change| change.at);
    let mut closing: Vec<&Change> = changes.iter().filter(|change| change.new_completed.is_some()).collect();
    closing.sort_by_key(|change| change.at);
    let closed: HashMap<&str, &Change> = closing.iter().map(|change| (change.id.as_str(), *change)).collect();
    let failed: Vec<&Swept> = sweeps.iter().filter(|sweep| sweep.failed).collect();
    let (mut started, mut closing) = (started.into_iter().peekable(), closing.into_iter().peekable());
    // The rows that are open, as time goes on from batch to batch.
    let mut open: BTreeMap<(DateTime<Utc>, &str), DateTime<Utc>> = BTreeMap::new();
    let mut cursors: HashMap<&str, (DateTime<Utc>, String)> = HashMap::new();
    let mut left_out = 0;
    for (app, batch) in batches(changes) {
        while let Some(change) = started.next_if(|change| change.at <= batch.began - SLACK) {
            open.insert((change.time_started, &change.id), change.at);
        }
        while let Some(change) = closing.next_if(|change| change.at < batch.began - SLACK) {
            open.remove(&(change.time_started, change.id.as_str()));
        }
        let last = batch.rows.last().unwrap().clone();
        let cursor = cursors.get(app);
        for key in open.range(..(last.0, last.1.as_str())).map(|(key, _)| key) {
            let full = (key.0, key.1.to_owned());
            let close = closed.get(key.1);
            if cursor.is_some_and(|cursor| full <= *cursor)
                || batch.rows.contains(&full)
                || close.is_some_and(|change| change.at < batch.began + SLACK)
            {
                continue;
            }
            left_out += 1;
            let overlaps =
                |from: DateTime<Utc>, to: DateTime<Utc>| from <= batch.ended + SLACK && to >= batch.began - SLACK;
            let held = touches_of.get(key.1).is_some_and(|all| all.iter().any(|touch| overlaps(touch.from, touch.to)))
                || close.is_some_and(|change| overlaps(change.began, change.at + SLACK))
                // The other sweeper may have held it in a batch that it did not commit.
                || failed.iter().any(|other| other.app != app && overlaps(other.from, other.to + TimeDelta::seconds(5)));
            assert!(held, "row {key:?} was left out by {batch:?} of {app} for no reason; closed by {close:?}");
        }
        cursors.insert(app, last);
    }
    left_out
}

/// What each transaction of a sweep changed, in the order in which they began.
fn batches(changes: &[Change]) -> Vec<(&str, Batch)> {
    let mut batches: HashMap<i64, (&str, Batch)> = HashMap::new();
    for change in changes.iter().filter(|change| change.app.starts_with("audit-log-sweeper/")) {
        let new = || (change.app.as_str(), Batch { began: change.began, ended: change.at, rows: BTreeSet::new() });
        let (_, batch) = batches.entry(change.xid).or_insert_with(new);
        batch.ended = batch.ended.max(change.at);
        batch.rows.insert((change.time_started, change.id.clone()));
    }
    let mut batches: Vec<_> = batches.into_values().collect();
    batches.sort_by_key(|(_, batch)| batch.began);
    batches
}

async fn changes(log: &AuditTable) -> Vec<Change> {
    let sql = "SELECT xid, began, at, app, id, time_started, old_completed, new_completed FROM change ORDER BY seq";
    let rows = log.client.query(sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| Change {
            xid: row.get(0),
            began: row.get(1),
            at: row.get(2),
            app: row.get(3),
            id: row.get(4),
            time_started: row.get(5),
            old_completed: row.get(6),
            new_completed: row.get(7),
        })
        .collect()
}
