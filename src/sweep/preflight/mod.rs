//! Looks whether a sweep could run, without running it: asks (`catalog`), judges (`judge`, `columns`, `types`, `index`), tries the values
//! (`values`) and says what mends what it found (`finding`, `mend`).

mod catalog;
mod columns;
mod dependants;
mod finding;
mod index;
mod judge;
mod mend;
mod types;
mod values;

use std::time::Duration;

pub use finding::{Checked, Finding, Fix, Part, RunAs, Severity, Subject};
use serde::de::DeserializeOwned;
use tokio_postgres::SimpleQueryMessage;

use super::connection::Session;
use super::error::{Class, Step};
use super::{Error, Plan, Target, statement};
use crate::api::Reason;

/// Reaching the database and planning a statement takes far less than this.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Connects and looks at everything that a sweep rests on. Changes nothing and locks no row.
///
/// # Errors
/// When the database cannot be reached or stops answering: what is wrong with the table is no error but a finding.
pub async fn check(plan: &Plan, target: &Target) -> Result<Checked, Error> {
    check_in_turn(plan, target, std::future::ready(())).await
}

/// The same, but once connected it waits for its turn, and keeps what that gives to the end.
///
/// # Errors
/// As [`check`].
pub async fn check_in_turn<T>(plan: &Plan, target: &Target, turn: impl Future<Output = T>) -> Result<Checked, Error> {
    let session = target.connect(plan.deadline).await?;
    let _turn = turn.await;
    let checked = look(&session, plan).await;
    if checked.is_err() {
        session.rollback().await;
    }
    session.close().await;
    checked
}

async fn look(session: &Session, plan: &Plan) -> Result<Checked, Error> {
    let mut checked = Checked::default();
    let server: catalog::Server = ask(session, &catalog::server(timeout(plan))).await?;
    checked.server_version = Some(server.version.clone());
    if !judge::server(&server, &mut checked) {
        return Ok(checked);
    }
    let facts: catalog::Catalog = ask(session, &catalog::catalog(plan, timeout(plan))).await?;
    judge::catalog(plan, &server, &facts, &mut checked);
    // Where more is wrong, the server would only say one of these things again.
    if checked.blocking().is_some() {
        return Ok(checked);
    }
    match steps(session, plan).await {
        Ok(steps) => {
            try_values(session, plan, &facts, &mut checked).await?;
            judge::statement(&steps, &mut checked);
        }
        Err(error) if error.class() == Class::Transient && error.reason() != Reason::DatabaseError => {
            return Err(error);
        }
        Err(error) => judge::refused_statement(&error, &mut checked),
    }
    Ok(checked)
}

/// Has the server evaluate what planning leaves for each row: domains, and the CHECKs that the values decide.
async fn try_values(
    session: &Session,
    plan: &Plan,
    facts: &catalog::Catalog,
    checked: &mut Checked,
) -> Result<(), Error> {
    let Some(table) = &facts.table else { return Ok(()) };
    for trial in values::trials(plan, table) {
        let sql = statement::read_only(&trial.sql, timeout(plan));
        match session.query(Step::Preflight, &sql, TIMEOUT).await {
            Ok(answer) => {
                let answer = statement::last_row(&answer).and_then(|row| statement::text(row, 0));
                values::trial(&trial, Ok(answer), checked);
            }
            Err(error) => {
                session.rollback().await;
                if error.sqlstate().is_none() || session.is_closed() {
                    return Err(error);
                }
                values::trial(&trial, Err(&error), checked);
            }
        }
    }
    values::untried(plan, facts, table, checked);
    Ok(())
}

/// A statement of the preflight takes no longer than one of the sweep.
fn timeout(plan: &Plan) -> Duration {
    plan.statement_timeout.min(TIMEOUT)
}

/// Asks a question that is answered by one JSON document.
async fn ask<T: DeserializeOwned>(session: &Session, sql: &str) -> Result<T, Error> {
    let answer = session.query(Step::Preflight, sql, TIMEOUT).await?;
    let document = statement::last_row(&answer).and_then(|row| statement::text(row, 0));
    document.and_then(|json| serde_json::from_str(json).ok()).ok_or(Error::Answer("the question about the catalog"))
}

/// Has the server plan the statement of a batch.
pub(super) async fn explain(session: &Session, plan: &Plan) -> Result<(), Error> {
    steps(session, plan).await.map(drop)
}

/// The server's plan for the statement of a batch, a line each.
async fn steps(session: &Session, plan: &Plan) -> Result<Vec<String>, Error> {
    let explained = session.query(Step::Preflight, &statement::explain(plan, timeout(plan)), TIMEOUT).await;
    if explained.is_err() {
        session.rollback().await;
    }
    let lines = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => statement::text(row, 0).map(str::to_owned),
        _ => None,
    };
    explained.map(|answer| answer.iter().filter_map(lines).collect())
}
