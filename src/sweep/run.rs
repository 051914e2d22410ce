//! Drives a sweep: connect, freeze the cutoff, batch after batch, then count what is left.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::connection::Session;
use super::error::Step;
use super::report::Ended;
use super::statement::{self, Batch, Cursor, Receipt};
use super::{Error, Plan, Report, Target, preflight};
use crate::api::Reason;
use crate::api::status::Backlog;

/// The server ends a statement by itself; this long after that it is taken for dead.
const GRACE: Duration = Duration::from_secs(5);

/// How long a COMMIT without an answer is looked up.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the end of a transaction is asked for.
const LOOKUP_PAUSE: Duration = Duration::from_millis(100);

/// A batch that lost against other transactions is tried again this often at once.
const CONFLICT_RETRIES: u32 = 5;

/// From this many completed rows on, the backlog is counted from where the sweep stopped: the index entries of rows
/// just completed would have to be read again.
const COUNT_FROM_CURSOR: i64 = 10_000;

/// One attempt at a sweep.
#[derive(Clone, Debug)]
pub struct Job {
    /// What to sweep.
    pub plan: Plan,
    /// Where.
    pub target: Target,
    /// The most rows to complete: the limit less what earlier attempts of the same slot completed.
    pub limit: i64,
}

/// Makes one attempt. Never fails as such: the report counts what was committed, and holds the error if there was one.
pub async fn sweep(job: &Job, stop: &CancellationToken) -> Report {
    let start = Instant::now();
    let mut report = Report::default();
    match run(job, start + job.plan.deadline, stop, &mut report).await {
        Ok(ended) => report.ended = Some(ended),
        Err(error) => report.error = Some(error),
    }
    report.duration = start.elapsed();
    report
}

async fn run(job: &Job, deadline: Instant, stop: &CancellationToken, report: &mut Report) -> Result<Ended, Error> {
    let Job { plan, target, limit } = job;
    let connected = tokio::select! {
        session = target.connect() => session?,
        () = stop.cancelled() => return Ok(Ended::Stopped),
        () = tokio::time::sleep_until(deadline) => return Ok(Ended::DeadlineReached),
    };
    let mut sweep = Sweep { plan, target, session: connected, deadline, stop, report };
    let cutoff = sweep.cutoff().await?;
    let (ended, cursor) = sweep.batches(&cutoff, *limit).await?;
    let ended = match ended {
        Ended::Drained | Ended::LimitReached => {
            let backlog = sweep.backlog(&cutoff, cursor.as_ref()).await?;
            let nothing_left = backlog.remaining == 0;
            sweep.report.backlog = Some(backlog);
            // A limit that was just enough held nothing back.
            if nothing_left { Ended::Drained } else { ended }
        }
        Ended::DeadlineReached | Ended::Stopped => ended,
    };
    sweep.session.close().await;
    Ok(ended)
}

struct Sweep<'a> {
    plan: &'a Plan,
    target: &'a Target,
    session: Session,
    deadline: Instant,
    stop: &'a CancellationToken,
    report: &'a mut Report,
}

/// How a batch's statement ended.
enum Done {
    Batch(Batch),
    Early(Ended),
}

impl Sweep<'_> {
    /// Reads the cutoff, once. It is frozen for the whole sweep, so that the sweep ends.
    async fn cutoff(&mut self) -> Result<String, Error> {
        let answer = self.session.query(Step::Cutoff, &statement::cutoff(self.plan), self.patience()).await?;
        let cutoff = statement::last_row(&answer)
            .and_then(|row| statement::text(row, 0))
            .ok_or(Error::Answer("the question for the time"))?;
        self.report.cutoff = statement::read_time(cutoff);
        Ok(cutoff.to_owned())
    }

    /// Completes batches until nothing is left or something ends it; also returns how far it looked.
    async fn batches(&mut self, cutoff: &str, limit: i64) -> Result<(Ended, Option<Cursor>), Error> {
        let mut cursor = None;
        let mut conflicts = 0;
        loop {
            let size = self.plan.batch_size.min(limit - self.report.timed_out);
            if size <= 0 {
                return Ok((Ended::LimitReached, cursor));
            }
            let batch = match self.batch(cutoff, cursor.as_ref(), size).await {
                Ok(Done::Batch(batch)) => batch,
                Ok(Done::Early(ended)) => return Ok((ended, cursor)),
                Err(error) => {
                    self.session.rollback().await;
                    if matches!(error.sqlstate(), Some("40001" | "40P01")) && conflicts < CONFLICT_RETRIES {
                        conflicts += 1;
                        continue;
                    }
                    return Err(self.diagnose(error).await);
                }
            };
            conflicts = 0;
            if batch.completed > batch.selected {
                self.session.rollback().await;
                return Err(Error::KeyNotUnique { selected: batch.selected, completed: batch.completed });
            }
            self.commit(&batch).await?;
            cursor = batch.cursor.or(cursor);
            if batch.selected < size {
                return Ok((Ended::Drained, cursor));
            }
        }
    }

    /// Runs one batch up to its COMMIT. A stop, or the deadline, cancels the statement on the server.
    async fn batch(&mut self, cutoff: &str, cursor: Option<&Cursor>, size: i64) -> Result<Done, Error> {
        if self.stop.is_cancelled() {
            return Ok(Done::Early(Ended::Stopped));
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Done::Early(Ended::DeadlineReached));
        }
        let statement_timeout = self.plan.statement_timeout.min(left);
        let sql = statement::batch(self.plan, cutoff, cursor, size, statement_timeout);
        let query = self.session.query(Step::Batch, &sql, statement_timeout + GRACE);
        tokio::pin!(query);
        let answer = tokio::select! {
            answer = &mut query => answer,
            () = self.stop.cancelled() => {
                self.session.cancel().await;
                // Whether the cancel came in time or not: nothing of the batch is committed.
                drop(timeout(GRACE, &mut query).await);
                self.session.rollback().await;
                return Ok(Done::Early(Ended::Stopped));
            }
        };
        match answer {
            Ok(answer) => statement::read_batch(&answer).map(Done::Batch).ok_or(Error::Answer("a batch")),
            // The server's statement timeout was cut to what the deadline left.
            Err(error) if error.sqlstate() == Some("57014") && Instant::now() >= self.deadline => {
                self.session.rollback().await;
                Ok(Done::Early(Ended::DeadlineReached))
            }
            Err(error) => Err(error),
        }
    }

    /// Tells a row that the server refuses from a value that fits no row: that one EXPLAIN refuses too, without a row.
    async fn diagnose(&self, error: Error) -> Error {
        if error.reason() != Reason::RowRefused {
            return error;
        }
        match preflight::explain(&self.session, self.plan).await {
            Err(cause @ Error::Server(_)) => cause,
            _ => error,
        }
    }

    /// Commits a batch and counts it.
    async fn commit(&mut self, batch: &Batch) -> Result<(), Error> {
        let committed = self.session.query(Step::Commit, "COMMIT", self.plan.statement_timeout + GRACE).await;
        let error = match committed {
            Ok(_) => {
                self.count(batch);
                return Ok(());
            }
            Err(error) => error,
        };
        // An error on a living connection is the server's word that nothing was committed. Any other end of COMMIT
        // says nothing: the rows may be committed.
        if !matches!(&error, Error::Server(_)) || says_nothing(error.sqlstate()) {
            match &batch.receipt {
                None => {}
                Some(receipt) => match timeout(LOOKUP_TIMEOUT, self.look_up(receipt)).await.ok().flatten() {
                    Some(true) => self.count(batch),
                    Some(false) => {}
                    None => self.report.uncertain += batch.completed,
                },
            }
        }
        Err(error)
    }

    fn count(&mut self, batch: &Batch) {
        self.report.timed_out += batch.completed;
        self.report.suppressed += batch.selected - batch.completed;
        self.report.batches += 1;
    }

    /// Whether the transaction of a receipt was committed; None: it cannot be known.
    async fn look_up(&self, receipt: &Receipt) -> Option<bool> {
        loop {
            match self.ask(receipt).await {
                Ok(Some(answer)) => return Some(answer),
                // In progress, or the server is not back yet.
                Ok(None) | Err(_) => tokio::time::sleep(LOOKUP_PAUSE).await,
            }
        }
    }

    async fn ask(&self, receipt: &Receipt) -> Result<Option<bool>, Error> {
        let session = self.target.connect().await?;
        let status = session.query(Step::Lookup, &statement::transaction_status(receipt), self.patience()).await;
        let status = match &status {
            Ok(answer) => statement::last_row(answer).and_then(|row| statement::text(row, 0)).unwrap_or_default(),
            // After a failover the new primary may not know the transaction's id; the row itself then tells.
            Err(Error::Server(_)) => "unknown",
            Err(_) => return Ok(None),
        };
        if status == "in progress" {
            return Ok(None);
        }
        let row = session.query(Step::Lookup, &statement::row_status(self.plan, receipt), self.patience()).await?;
        session.close().await;
        Ok(match statement::last_row(&row).map(|row| statement::text(row, 0)) {
            Some(carries) => Some(carries == Some("t")),
            // The row is gone: only the transaction can tell.
            None => Some(status == "committed"),
        })
    }

    /// Counts the stale rows that are left.
    async fn backlog(&mut self, cutoff: &str, cursor: Option<&Cursor>) -> Result<Backlog, Error> {
        let bound = self.plan.backlog_bound();
        let cursor = cursor.filter(|_| self.report.timed_out >= COUNT_FROM_CURSOR);
        let sql = statement::backlog(self.plan, cutoff, cursor, bound, self.plan.statement_timeout);
        let answer = self.session.query(Step::Backlog, &sql, self.patience()).await?;
        let row = statement::last_row(&answer).ok_or(Error::Answer("the count of the backlog"))?;
        let counted = statement::text(row, 0).and_then(|n| n.parse().ok());
        let oldest = statement::text(row, 1).and_then(statement::read_time);
        Ok(Backlog::new(counted.ok_or(Error::Answer("the count of the backlog"))?, bound, oldest))
    }

    fn patience(&self) -> Duration {
        self.plan.statement_timeout + GRACE
    }
}

/// Whether an error in answer to COMMIT leaves open if it took place: the server was going away.
fn says_nothing(sqlstate: Option<&str>) -> bool {
    sqlstate.is_some_and(|code| code.starts_with("08") || code.starts_with("57P") || code.starts_with("25P0"))
}
