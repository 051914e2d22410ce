//! What comes out of a sweep: counts that hold whether or not it ended well.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::start::Cursor;
use crate::api::Failure;
use crate::api::status::{Backlog, Outcome};

/// The counts of one attempt, and how it ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// Rows that started before were stale; None when the database was not reached.
    pub cutoff: Option<DateTime<Utc>>,
    /// Rows completed and committed.
    pub timed_out: i64,
    /// Rows that the database was too busy to complete.
    pub skipped: i64,
    /// Rows whose update a trigger suppressed.
    pub suppressed: i64,
    /// Rows of a COMMIT without an answer that could not be looked up.
    pub uncertain: i64,
    /// Transactions committed.
    pub batches: i64,
    /// Of them those that were small, since others wrote to the server.
    pub small_batches: i64,
    /// Of them those that locked their rows first, since one that did not met a row that was in use, or a trigger.
    pub fallback_batches: i64,
    /// Rows that the server refused to complete.
    pub refused: i64,
    /// Keys of the first of them, where a key is no row data: uuid and int8.
    pub refused_ids: Vec<String>,
    /// Why the first of them was.
    pub refused_why: Option<String>,
    /// Where the next sweep goes on, so that refused rows do not keep it from those behind them.
    pub resume_after: Option<Cursor>,
    /// This machine's clock less the database's. None: the database was not asked.
    pub clock_skew: Option<TimeDelta>,
    /// Stale rows left; None when they could not be counted.
    pub backlog: Option<Backlog>,
    /// How the attempt ended. What was counted before a failure stays counted.
    pub end: Result<Ended, Failure>,
    /// How long it took.
    pub duration: Duration,
}

/// How an attempt that did not fail ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    Drained,
    LimitReached,
    DeadlineReached,
    Stopped,
    Observed,
}

impl Report {
    /// An attempt that ended before it counted anything.
    pub const fn new(end: Result<Ended, Failure>) -> Self {
        Self {
            cutoff: None,
            timed_out: 0,
            skipped: 0,
            suppressed: 0,
            uncertain: 0,
            batches: 0,
            small_batches: 0,
            fallback_batches: 0,
            refused: 0,
            refused_ids: vec![],
            refused_why: None,
            resume_after: None,
            clock_skew: None,
            backlog: None,
            end,
            duration: Duration::ZERO,
        }
    }

    /// How it ended, for the status.
    pub const fn outcome(&self) -> Outcome {
        match self.end {
            Ok(Ended::Drained) => Outcome::Drained,
            Ok(Ended::LimitReached) => Outcome::LimitReached,
            Ok(Ended::DeadlineReached) => Outcome::DeadlineReached,
            Ok(Ended::Stopped) => Outcome::Stopped,
            Ok(Ended::Observed) => Outcome::Observed,
            Err(_) => Outcome::Failed,
        }
    }

    /// Whole milliseconds that it took.
    pub fn duration_milliseconds(&self) -> i64 {
        i64::try_from(self.duration.as_millis()).unwrap_or(i64::MAX)
    }
}
