//! How a sweep ends when it is told to stop: soon, whatever the database does.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::SimpleQueryMessage;
use tokio_util::sync::CancellationToken;

use super::{Answer, Instant, Sweep};
use crate::database::Error;
use crate::database::error::Step;
use crate::sweep::report::Ended;

/// So long after it was told to stop a sweep is over, with what is known by then.
const LONGEST: Duration = Duration::from_secs(2);

/// Of that, a statement has this long to be cancelled and rolled back.
pub(super) const CANCEL: Duration = Duration::from_millis(1500);

/// A COMMIT that was not answered so long after the stop is looked up instead.
pub(super) const COMMIT: Duration = Duration::from_millis(900);

/// Which then may take this long.
pub(super) const LOOKUP: Duration = Duration::from_millis(900);

/// Waits for the stop, and until nothing is waited for any longer.
pub(super) async fn overdue(stop: &CancellationToken) {
    after(stop, LONGEST).await;
}

/// Waits for the stop, and then so long.
pub(super) async fn after(stop: &CancellationToken, time: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(time).await;
}

impl Sweep<'_> {
    /// Waits for an answer. A stop, or the deadline, cancels the statement on the server.
    pub(super) async fn ask_for_rows(
        &self,
        step: Step,
        sql: &str,
        statement_timeout: Duration,
    ) -> Result<Answer, Error> {
        let query = self.session.query(step, sql, statement_timeout + super::RESPONSE_GRACE);
        tokio::pin!(query);
        let answer: Result<Vec<SimpleQueryMessage>, Error> = tokio::select! {
            answer = &mut query => answer,
            () = self.stop.cancelled() => {
                // Whether the cancel comes in time or not: nothing of the batch is committed.
                let cancelled = async {
                    self.session.cancel().await;
                    drop(query.await);
                    self.session.rollback().await;
                };
                drop(timeout(CANCEL, cancelled).await);
                return Ok(Answer::Early(Ended::Stopped));
            }
        };
        match answer {
            Ok(answer) => Ok(Answer::Rows(answer)),
            // The server's statement timeout was cut to what the deadline left.
            Err(error) if error.sqlstate() == Some("57014") && Instant::now() >= self.deadline => {
                self.session.rollback().await;
                Ok(Answer::Early(Ended::DeadlineReached))
            }
            Err(error) => Err(error),
        }
    }
}
