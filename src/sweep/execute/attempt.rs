//! One try at a batch, or at a single row, up to its COMMIT.

use super::{Answer, BatchAttempt, Cursor, Ended, Error, Start, Step, Sweep, statement};
use crate::sweep::batch_planner::NextBatch;
use crate::sweep::recovery::Recovery;
use crate::sweep::statement::{Batch, Locking};
use crate::sweep::transaction::Limits;
use tokio_postgres::SimpleQueryMessage;

impl Sweep<'_> {
    /// Completes the next row by itself, up to its COMMIT; a refusal tells which row it is.
    pub(super) async fn one(&mut self, start: &Start, cursor: Option<&Cursor>) -> Result<BatchAttempt, Error> {
        let Some(statement_timeout) = self.time_for_a_statement() else { return Ok(BatchAttempt::Early(self.cause())) };
        let sql = statement::choose_one(self.plan, start, cursor, statement_timeout);
        let chosen = match self.ask_for_rows(Step::Select, &sql, statement_timeout).await? {
            Answer::Early(ended) => return Ok(BatchAttempt::Early(ended)),
            Answer::Rows(answer) => statement::read_chosen(&answer),
        };
        let Some(row) = chosen else {
            self.session.rollback().await;
            return Ok(BatchAttempt::Early(Ended::Drained));
        };
        match self.ask_for_rows(Step::Batch, &statement::complete_one(self.plan, start, &row), statement_timeout).await
        {
            Ok(Answer::Early(ended)) => Ok(BatchAttempt::Early(ended)),
            Ok(Answer::Rows(answer)) => self.read_batch(&answer).await.map(BatchAttempt::Batch),
            Err(error @ Error::Server(_)) => {
                self.session.rollback().await;
                Ok(BatchAttempt::Refused { row, error })
            }
            Err(error) => Err(error),
        }
    }

    /// Runs one batch up to its COMMIT.
    pub(super) async fn batch(
        &mut self,
        start: &Start,
        cursor: Option<&Cursor>,
        next: NextBatch,
    ) -> Result<BatchAttempt, Error> {
        let Some(statement_timeout) = self.time_for_a_statement() else { return Ok(BatchAttempt::Early(self.cause())) };
        match next.locking {
            Locking::Optimistic => {
                self.optimistic_batch(start, cursor, next.rows, Limits::optimistic(statement_timeout)).await
            }
            Locking::Pessimistic => {
                let limits = Limits::of(statement_timeout);
                let sql = statement::batch(self.plan, start, cursor, next.rows, next.locking, limits);
                match self.ask_for_rows(Step::Batch, &sql, statement_timeout).await? {
                    Answer::Early(ended) => Ok(BatchAttempt::Early(ended)),
                    Answer::Rows(answer) => self.read_batch(&answer).await.map(BatchAttempt::Batch),
                }
            }
        }
    }

    /// Runs a batch and rolls it back, for whatever cause, unless it completed exactly the rows that it selected.
    async fn optimistic_batch(
        &mut self,
        start: &Start,
        cursor: Option<&Cursor>,
        size: i64,
        limits: Limits,
    ) -> Result<BatchAttempt, Error> {
        let sql = statement::batch(self.plan, start, cursor, size, Locking::Optimistic, limits);
        match self.ask_for_rows(Step::Batch, &sql, limits.statement).await {
            Ok(Answer::Early(ended)) => return Ok(BatchAttempt::Early(ended)),
            Ok(Answer::Rows(answer)) => {
                let batch = statement::read_batch(&answer).ok_or(Error::Answer("a batch"))?;
                if batch.is_exact() {
                    return Ok(BatchAttempt::Batch(batch));
                }
            }
            Err(error) if Recovery::from(&error) == Recovery::End => return Err(error),
            Err(_) => {}
        }
        self.session.rollback().await;
        Ok(BatchAttempt::RolledBack)
    }

    /// Reads what a batch did, and takes it back if it changed rows beside those that it chose.
    async fn read_batch(&self, answer: &[SimpleQueryMessage]) -> Result<Batch, Error> {
        let batch = statement::read_batch(answer).ok_or(Error::Answer("a batch"))?;
        if batch.updated > batch.selected {
            self.session.rollback().await;
            return Err(Error::KeyNotUnique { selected: batch.selected, completed: batch.updated });
        }
        Ok(batch)
    }
}
