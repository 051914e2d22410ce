//! Drives a sweep: connect, freeze the cutoff, batch after batch, then count what is left.

mod attempt;
mod batches;
mod cancel;
mod commit;

use std::time::Duration;

use chrono::Utc;
use tokio::time::{Instant, timeout};
use tokio_postgres::SimpleQueryMessage;
use tokio_util::sync::CancellationToken;

use super::batch_planner::LOCKED;
use super::recovery::Recovery;
use super::report::Ended;
use super::start::{self, Cursor, Start};
use super::statement::{self, Batch, Locking};
use super::throttle::Peers;
use super::{Plan, Report};
use crate::api::Failure;
use crate::api::spec::Mode;
use crate::api::status::Backlog;
use crate::database::error::Step;
use crate::database::session::{last_row, text};
use crate::database::{Error, Session, Target};

/// The server enforces the statement timeout. This long afterwards it counts as dead.
const RESPONSE_GRACE: Duration = Duration::from_secs(5);

/// The longest that the first question of a sweep may take.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Planning a statement takes far less than this.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// With less time than this for a statement the deadline counts as reached.
const MIN_STATEMENT_TIME: Duration = Duration::from_millis(20);

/// So many of them are named.
pub const MAX_LISTED_KEYS: usize = 10;

/// So long after its deadline a sweep is over, whatever the server does.
const OVERTIME: Duration = Duration::from_millis(4500);

/// So long after its deadline a sweep waits for the answer to a COMMIT that it has sent.
const COMMIT_GRACE: Duration = Duration::from_secs(2);

/// So long after its deadline it has looked up what became of that.
const LOOKUP_GRACE: Duration = Duration::from_secs(4);

/// Counting what is left may take this long where the deadline leaves less.
const MIN_COUNT_TIME: Duration = Duration::from_secs(1);

/// The input of one attempt at a sweep.
#[derive(Clone, Debug)]
pub struct Job {
    /// What to sweep.
    pub plan: Plan,
    /// Where.
    pub target: Target,
    /// The most rows to complete: the limit less what earlier attempts of the same slot completed.
    pub limit: i64,
    /// Where to begin; None: with the oldest row.
    pub resume_after: Option<Cursor>,
    /// Sweeps of this process on the same server.
    pub peers: Peers,
}

impl Job {
    /// A whole sweep from the oldest row on, alone.
    pub fn new(plan: Plan, target: Target) -> Self {
        Self { limit: plan.limit, plan, target, resume_after: None, peers: Peers::default() }
    }
}

/// An open connection, and when the attempt began.
#[derive(Debug)]
pub struct Connected {
    pub session: Session,
    /// When it began to connect, without time spent waiting for a slot.
    start: Instant,
}

impl Connected {
    /// The first half of an attempt: connects.
    ///
    /// # Errors
    /// Why an attempt came no further.
    pub async fn open(plan: &Plan, target: &Target) -> Result<Self, Failure> {
        let start = Instant::now();
        let session = target.connect(plan.deadline).await.map_err(|error| Failure::from(&error))?;
        Ok(Self { session, start })
    }

    /// Excludes time from the sweep's own, such as a wait for a slot.
    pub fn exclude(&mut self, time: Duration) {
        self.start += time;
    }

    /// Closes the connection without a sweep.
    pub async fn close(self) {
        self.session.close().await;
    }
}

/// Makes one attempt. The report holds the committed counts and how it ended.
pub async fn sweep(job: &Job, stop: &CancellationToken) -> Report {
    let start = Instant::now();
    let end = match stop.run_until_cancelled(Connected::open(&job.plan, &job.target)).await {
        Some(Ok(connected)) => {
            let mut report = Report::new(Ok(Ended::Stopped));
            run(connected, job, stop, &mut report).await;
            return report;
        }
        Some(Err(failure)) => Err(failure),
        None => Ok(Ended::Stopped),
    };
    Report { duration: start.elapsed(), ..Report::new(end) }
}

/// The second half: sweeps, and fills a new report, as [`sweep`] gives it.
pub async fn run(connected: Connected, job: &Job, stop: &CancellationToken, report: &mut Report) {
    let start = connected.start;
    let end = tokio::select! {
        end = sweep_with(connected, job, stop, report) => end,
        () = cancel::overdue(stop) => Ok(Ended::Stopped),
        // What is not known by now stays uncertain.
        () = tokio::time::sleep_until(start + job.plan.deadline + OVERTIME) => {
            Err(Error::Timer { what: "the sweep", after: job.plan.deadline + OVERTIME })
        }
    };
    report.end = end.map_err(|error| Failure::from(&error));
    report.duration = start.elapsed();
}

async fn sweep_with(
    connected: Connected,
    job: &Job,
    stop: &CancellationToken,
    report: &mut Report,
) -> Result<Ended, Error> {
    let Job { plan, target, limit, resume_after, peers } = job;
    let Connected { session, start } = connected;
    let deadline = start + plan.deadline;
    let mut sweep = Sweep { plan, target, session, server: None, resume_after, peers, deadline, stop, report };
    let asked = tokio::select! {
        asked = sweep.ask_start() => asked?,
        () = stop.cancelled() => return Ok(Ended::Stopped),
    };
    let ended = match plan.mode {
        Mode::Apply => sweep.batches(&asked, *limit).await?,
        Mode::Observe => {
            tokio::select! {
                explained = explain(&sweep.session, plan, &asked) => explained?,
                () = stop.cancelled() => return Ok(Ended::Stopped),
            }
            Ended::Observed
        }
    };
    if ended == Ended::DeadlineReached && sweep.report.batches == 0 {
        return Err(Error::NothingDone { rows: plan.batch_size, deadline: plan.deadline });
    }
    let ended = match ended {
        Ended::Drained | Ended::LimitReached | Ended::Observed => {
            let counted = tokio::select! {
                backlog = sweep.backlog(&asked) => backlog?,
                () = stop.cancelled() => {
                    drop(timeout(cancel::CANCEL, sweep.session.cancel()).await);
                    return Ok(ended);
                }
            };
            let nothing_left = counted.as_ref().is_some_and(|backlog| backlog.remaining == 0);
            sweep.report.backlog = counted;
            // Nothing is left, so the limit did not end the sweep early.
            if nothing_left && ended == Ended::LimitReached { Ended::Drained } else { ended }
        }
        Ended::DeadlineReached | Ended::Stopped => ended,
    };
    sweep.session.close().await;
    Ok(ended)
}

/// Has the server plan the statement of a batch.
async fn explain(session: &Session, plan: &Plan, start: &Start) -> Result<(), Error> {
    let limit = plan.statement_timeout.min(EXPLAIN_TIMEOUT);
    let sql = statement::explain(plan, start, Locking::Pessimistic, limit);
    let planned = session.query(Step::Preflight, &sql, limit + RESPONSE_GRACE).await;
    if planned.is_err() {
        session.rollback().await;
    }
    planned.map(drop)
}

struct Sweep<'a> {
    plan: &'a Plan,
    target: &'a Target,
    session: Session,
    /// Which server it is on, if that can tell.
    server: Option<String>,
    resume_after: &'a Option<Cursor>,
    peers: &'a Peers,
    deadline: Instant,
    stop: &'a CancellationToken,
    report: &'a mut Report,
}

/// What became of a try.
enum BatchAttempt {
    /// It waits for its COMMIT.
    Batch(Batch),
    /// The sweep is over.
    Early(Ended),
    /// It was optimistic and not exact: nothing of it is left.
    RolledBack,
    /// The server refused this row.
    Refused { row: Cursor, error: Error },
}

/// What came of a statement.
enum Answer {
    Rows(Vec<SimpleQueryMessage>),
    Early(Ended),
}

/// Sleeps for 0.5 to 1.5 times `about`, so that transactions that collided do not collide again.
async fn sleep_with_jitter(about: Duration) {
    tokio::time::sleep(about.mul_f64(0.5 + fastrand::f64())).await;
}

impl Sweep<'_> {
    /// Reads the parameters of the sweep, once. The cutoff is frozen, so that the sweep ends.
    async fn ask_start(&mut self) -> Result<Start, Error> {
        let mut locked = 0;
        let (answer, asked_at) = loop {
            // It reads the catalog alone, so `statementTimeout` does not bound it.
            let limit = self.time_left().clamp(MIN_STATEMENT_TIME, START_TIMEOUT);
            let sql = start::start(self.plan, limit);
            let which = statement::server();
            let asked_at = Utc::now();
            // Side by side: where the server cannot tell which one it is, the sweep goes on all the same.
            let (server, answer) = tokio::join!(
                self.session.query(Step::Lookup, &which, limit + RESPONSE_GRACE),
                self.session.query(Step::Cutoff, &sql, limit + RESPONSE_GRACE)
            );
            self.server = server.ok().and_then(|answer| Some(text(last_row(&answer)?, 0)?.to_owned()));
            match answer {
                Err(error)
                    if Recovery::from(&error) == Recovery::Later && locked < LOCKED.0 && limit > MIN_STATEMENT_TIME =>
                {
                    locked += 1;
                    self.session.rollback().await;
                    sleep_with_jitter(LOCKED.1).await;
                }
                answer => break (answer?, asked_at),
            }
        };
        // The database read its clock somewhere between question and answer.
        let ours = asked_at + (Utc::now() - asked_at) / 2;
        let asked = start::read_start(&answer).ok_or(Error::Answer("the first question of a sweep"))?;
        self.report.clock_skew = asked.now.map(|now| ours - now);
        self.report.cutoff = start::read_time(&asked.cutoff);
        Ok(asked)
    }

    /// Returns the timeout of the next statement: at most a quarter of the remaining time. The rest allows a retry with fewer
    /// rows. None: start no further statement.
    fn time_for_a_statement(&self) -> Option<Duration> {
        let share = self.time_left() / 4;
        (!self.stop.is_cancelled() && share >= MIN_STATEMENT_TIME).then(|| self.plan.statement_timeout.min(share))
    }

    fn time_spent(&self) -> Duration {
        self.plan.deadline.saturating_sub(self.time_left())
    }

    fn time_left(&self) -> Duration {
        self.time_left_with(Duration::ZERO)
    }

    /// The time left until so long after the deadline.
    fn time_left_with(&self, grace: Duration) -> Duration {
        (self.deadline + grace).saturating_duration_since(Instant::now())
    }

    /// Whether the last statement had less time than `statementTimeout` says.
    fn is_short_of_time(&self) -> bool {
        self.time_left() / 4 < self.plan.statement_timeout
    }

    /// Why no further statement begins.
    fn cause(&self) -> Ended {
        if self.stop.is_cancelled() { Ended::Stopped } else { Ended::DeadlineReached }
    }

    /// Counts the stale rows that are left. None: there was no time for it.
    async fn backlog(&mut self, start: &Start) -> Result<Option<Backlog>, Error> {
        let bound = self.plan.backlog_bound();
        let limit = self.plan.statement_timeout.min(self.time_left().max(MIN_COUNT_TIME));
        let sql = statement::backlog(self.plan, start, bound, limit);
        let answer = match self.session.query(Step::Backlog, &sql, limit + MIN_COUNT_TIME).await {
            Err(error) if limit < self.plan.statement_timeout && is_slow(&error) => {
                self.session.rollback().await;
                return Ok(None);
            }
            answer => answer?,
        };
        let backlog = statement::read_backlog(&answer, bound).ok_or(Error::Answer("the count of the backlog"))?;
        Ok(Some(backlog))
    }
}

/// Whether a statement took longer than it was given.
fn is_slow(error: &Error) -> bool {
    error.sqlstate() == Some("57014") || matches!(error, Error::Timer { .. })
}
