//! The middle of a sweep: batch after batch until nothing is left or something ends it. `batch_planner` decides.

use super::{
    BatchAttempt, Cursor, EXPLAIN_TIMEOUT, Ended, Error, MAX_LISTED_KEYS, RESPONSE_GRACE, Start, Step, Sweep, explain,
    sleep_with_jitter, statement,
};
use crate::sweep::batch_planner::{BatchPlanner, NextBatch, Reaction};
use crate::sweep::statement::{Batch, Locking};
use crate::sweep::throttle;
use crate::sweep::transaction::Limits;

impl Sweep<'_> {
    /// Completes batches until nothing is left or something ends it.
    pub(super) async fn batches(&mut self, start: &Start, limit: i64) -> Result<Ended, Error> {
        let mut planner = BatchPlanner::new(self.plan.batch_size, self.plan.yield_budget);
        let mut cursor = self.resume_after.clone();
        let ended = loop {
            let left = limit - self.report.timed_out;
            if left <= 0 {
                break Ended::LimitReached;
            }
            let next = planner.next(left, self.time_spent(), self.peers.are_waiting());
            if next.throttled {
                sleep_with_jitter(throttle::THROTTLE_PAUSE).await;
            }
            let started = self.peers.start();
            let (row, error) = match self.attempt(start, cursor.as_ref(), next).await {
                Ok(BatchAttempt::Early(ended)) => break ended,
                Ok(BatchAttempt::Batch(batch)) => {
                    self.commit_batch(start, &batch, next, &mut planner, started).await?;
                    cursor = batch.cursor.or(cursor);
                    if batch.selected < next.rows {
                        break Ended::Drained;
                    }
                    continue;
                }
                Ok(BatchAttempt::RolledBack) => {
                    planner.lock_rows_first();
                    continue;
                }
                Ok(BatchAttempt::Refused { row, error }) => (Some(row), error),
                Err(error) => (None, error),
            };
            match planner.react(next, &error, row.is_some(), self.is_short_of_time()) {
                Reaction::OutOfTime => break Ended::DeadlineReached,
                Reaction::StepOver { refused } => {
                    self.count_row(start, row.as_ref(), &error, refused);
                    cursor = row;
                    if let Some(error) = planner.step_over(error, refused) {
                        self.report.resume_after = start.shown(cursor);
                        return Err(error);
                    }
                }
                reaction => self.recover(start, reaction, error, &mut planner).await?,
            }
        };
        // The cursor stays behind refused rows until one sweep reaches the end.
        if ended != Ended::Drained && self.resume_after.is_some() {
            self.report.resume_after = start.shown(cursor);
        }
        Ok(ended)
    }

    async fn attempt(
        &mut self,
        start: &Start,
        cursor: Option<&Cursor>,
        next: NextBatch,
    ) -> Result<BatchAttempt, Error> {
        if next.single { self.one(start, cursor).await } else { self.batch(start, cursor, next).await }
    }

    async fn commit_batch(
        &mut self,
        start: &Start,
        batch: &Batch,
        next: NextBatch,
        planner: &mut BatchPlanner,
        started: u64,
    ) -> Result<(), Error> {
        if batch.selected > 0 && batch.cursor.is_none() {
            self.session.rollback().await;
            return Err(Error::NullKey);
        }
        self.commit(start, batch).await?;
        self.report.small_batches += i64::from(next.reduced);
        self.report.fallback_batches += i64::from(next.locking == Locking::Pessimistic);
        planner.record_success(next.rows);
        if let Some(ended) = batch.ended {
            planner.record_activity(ended, started, self.time_spent());
        }
        Ok(())
    }

    /// Rolls back, then pauses or diagnoses before the next batch.
    async fn recover(
        &self,
        start: &Start,
        reaction: Reaction,
        error: Error,
        planner: &mut BatchPlanner,
    ) -> Result<(), Error> {
        self.session.rollback().await;
        match reaction {
            Reaction::Retry(about) => sleep_with_jitter(about).await,
            // If the statement fails without any row too, the error is not about a row.
            Reaction::Diagnose if !self.session.is_closed() => {
                if let Err(error) = self.try_without_rows(start).await {
                    let pause = planner.wait_for_table(&error).ok_or(error)?;
                    sleep_with_jitter(pause).await;
                }
            }
            _ => return Err(error),
        }
        Ok(())
    }

    /// Has the server plan the statement of a batch, then run it for no row: this locks the table, and fires the triggers that fire
    /// once for each statement.
    async fn try_without_rows(&self, start: &Start) -> Result<(), Error> {
        explain(&self.session, self.plan, start).await?;
        let limit = self.plan.statement_timeout.min(EXPLAIN_TIMEOUT);
        let sql = statement::batch(self.plan, start, None, 0, Locking::Pessimistic, Limits::of(limit));
        let tried = self.session.query(Step::Batch, &sql, limit + RESPONSE_GRACE).await;
        self.session.rollback().await;
        tried.map(drop)
    }

    /// Counts a row that is stepped over. Lists a refused row by its key unless the key is row data.
    fn count_row(&mut self, start: &Start, row: Option<&Cursor>, error: &Error, refused: bool) {
        if !refused {
            self.report.skipped += 1;
            return;
        }
        self.report.refused += 1;
        self.report.refused_why.get_or_insert_with(|| error.to_string());
        if self.report.refused_ids.len() < MAX_LISTED_KEYS && start.key_is_shown {
            self.report.refused_ids.extend(row.and_then(|row| row.id.clone()));
        }
    }
}
