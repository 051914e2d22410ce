//! Looks whether a sweep could run, without running it: the database, the table, the columns, the values, the rights.

use std::time::Duration;

use super::connection::Session;
use super::error::Step;
use super::{Error, Plan, Target, statement};

/// Reaching the database and planning a statement takes far less than this.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Connects and has the server plan the very statement of a batch, which checks names, types and rights. Changes
/// nothing and locks no row.
///
/// # Errors
/// Those that a sweep would have at the same place.
pub async fn preflight(plan: &Plan, target: &Target) -> Result<(), Error> {
    let session = target.connect(plan.deadline).await?;
    explain(&session, plan).await?;
    session.close().await;
    Ok(())
}

/// Has the server plan the statement of a batch.
pub(super) async fn explain(session: &Session, plan: &Plan) -> Result<(), Error> {
    let sql = statement::explain(plan, plan.statement_timeout.min(TIMEOUT));
    let explained = session.query(Step::Preflight, &sql, TIMEOUT).await;
    if explained.is_err() {
        session.rollback().await;
    }
    explained.map(drop)
}
