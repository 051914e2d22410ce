//! The end of a batch: its COMMIT, and what to do when no answer to it comes.

use std::time::Duration;

use super::{COMMIT_GRACE, LOOKUP_GRACE, RESPONSE_GRACE, Start, Sweep, cancel, statement};
use crate::database::Error;
use crate::database::error::Step;
use crate::sweep::statement::{Batch, Fate, Receipt};

/// How long a COMMIT without an answer is looked up.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the end of a transaction is asked for.
const LOOKUP_PAUSE: Duration = Duration::from_millis(100);

impl Sweep<'_> {
    /// Commits a batch and counts it.
    pub(super) async fn commit(&mut self, start: &Start, batch: &Batch) -> Result<(), Error> {
        // Until it is known otherwise: a sweep that is told to stop may end in the midst of this.
        self.report.uncertain += batch.completed;
        let limit = self.time_left_with(COMMIT_GRACE).min(self.plan.statement_timeout + RESPONSE_GRACE);
        let committed = tokio::select! {
            committed = self.session.query(Step::Commit, "COMMIT", limit) => committed,
            () = cancel::after(self.stop, cancel::COMMIT) => Err(Error::Timer { what: "COMMIT", after: cancel::COMMIT }),
        };
        let (known, result) = match committed {
            Ok(_) => (Some(true), Ok(())),
            // An error on a living connection is the server's word that nothing was committed. Any other end of COMMIT
            // says nothing: the rows may be committed.
            Err(error) => match &batch.receipt {
                Some(receipt) if !matches!(&error, Error::Server(_)) || says_nothing(error.sqlstate()) => {
                    (self.find_out(start, receipt).await, Err(error))
                }
                _ => (Some(false), Err(error)),
            },
        };
        if let Some(committed) = known {
            self.report.uncertain -= batch.completed;
            if committed {
                self.count(batch);
            }
        }
        result
    }

    fn count(&mut self, batch: &Batch) {
        self.report.timed_out += batch.completed;
        self.report.suppressed += batch.selected - batch.completed;
        self.report.batches += 1;
    }

    /// Whether the transaction of a receipt was committed; None: it cannot be known in the time there is.
    async fn find_out(&self, start: &Start, receipt: &Receipt) -> Option<bool> {
        let limit = LOOKUP_TIMEOUT.min(self.time_left_with(LOOKUP_GRACE));
        tokio::select! {
            fate = self.look_up(start, receipt) => match fate {
                Fate::Committed => Some(true),
                Fate::NotCommitted => Some(false),
                Fate::AskAgain | Fate::Unknown => None,
            },
            () = tokio::time::sleep(limit) => None,
            () = cancel::after(self.stop, cancel::LOOKUP) => None,
        }
    }

    async fn look_up(&self, start: &Start, receipt: &Receipt) -> Fate {
        loop {
            match self.ask(start, receipt).await {
                // In progress, or the server is not back yet.
                Ok(Fate::AskAgain) | Err(_) => tokio::time::sleep(LOOKUP_PAUSE).await,
                Ok(fate) => return fate,
            }
        }
    }

    async fn ask(&self, start: &Start, receipt: &Receipt) -> Result<Fate, Error> {
        let session = self.target.connect(LOOKUP_TIMEOUT).await?;
        let sql = statement::evidence(self.plan, start, receipt, self.server.as_deref());
        let answer = session.query(Step::Lookup, &sql, LOOKUP_TIMEOUT).await;
        session.close().await;
        let answer = match answer {
            // Its number was never given out: a crash took the transaction back. Asked only on the server of the batch.
            Err(error) if error.sqlstate() == Some("22023") && self.server.is_some() => return Ok(Fate::NotCommitted),
            answer => answer?,
        };
        Ok(statement::read_evidence(&answer).ok_or(Error::Answer("a lookup"))?.fate())
    }
}

/// Whether an error in answer to COMMIT leaves open if it took place: the server was going away.
fn says_nothing(sqlstate: Option<&str>) -> bool {
    sqlstate.is_some_and(|code| code.starts_with("08") || code.starts_with("57P") || code.starts_with("25P0"))
}
